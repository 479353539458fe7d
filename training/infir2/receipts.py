"""Receipts: a folder of data carries a manifest.json that says what is in it and what it was made from.

The manifest holds the request (everything that decides the bytes: inputs by hash, tokenizer, options), counts, and the
size and SHA-256 of every output file, and last its own SHA-256. It holds no time and no host, so the same request gives
the same manifest.

    building       makes a folder under a temporary name and renames it when it is complete
    resuming       the same for long work, which goes on where a killed run stopped
    reusable       says whether a folder already holds what a request asks for
    check_cheaply  what training runs before it starts: the manifest is whole; files, sizes and counts agree
    verify         recomputes every hash
"""

import argparse
import contextlib
import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infir2 import files
from infir2.indexed import DataError, IndexedReader

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
OWN_HASH = "manifest_sha256"
NO_HASH = "0" * 64
OUTPUT = "output"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tool_facts(script: Path, version: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Manifest entries naming the program: `tool` (name, version, git commit or null) and `command`, as typed."""
    tool = {"name": script.name, "version": version, "commit": _git_commit(script.parent)}
    return {"tool": tool, "command": shlex.join(["python", f"{script.parent.name}/{script.name}", *arguments])}


def _git_commit(folder: Path) -> str | None:
    """Commit of the checkout that `folder` lies in, with `-dirty` if files differ from it; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """As `files.building`, with every refusal, and a full disk, as a DataError."""
    with _refusing(output), files.building(output) as partial:
        yield partial


@contextlib.contextmanager
def resuming(output: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """As `building`, for work that goes on where a killed run stopped: yields a folder that holds what that run left.

    What is to become `output` goes into its folder OUTPUT, which is empty at first; the rest is removed at the end.
    What was left by work with another `identity` (anything of JSON) is removed, and everything after a refusal.
    """
    with _refusing(output), files.holding(output) as partial:
        note, made = partial / "identity.json", partial / OUTPUT
        text = json.dumps(identity, sort_keys=True)
        if not note.is_file() or note.read_text(encoding="utf-8") != text:
            files.clear(partial)
            files.write_text(note, text)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            yield partial
            files.publish(made, output)
            shutil.rmtree(partial)
        except (DataError, OSError):
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_leftovers(output: Path) -> None:
    """Remove what a run left that was killed after it had made `output` and before it had tidied up."""
    if files.partial_name(output).is_dir():
        with _refusing(output), files.holding(output) as partial:
            shutil.rmtree(partial)


@contextlib.contextmanager
def _refusing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a refusal of files.py
            raise DataError(str(error)) from error
        # a full disk gives no file name
        raise DataError(f"{output} was not made: {error}. Put right what is named and run again.") from error


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json over `facts` and every file now in `folder`.

    `facts` carries `request`, and `splits` (name to documents and tokens) where the folder holds NAME.bin/.idx. The
    last entry is the manifest's own SHA-256, taken over the file's bytes with zeros in its place.
    """
    present = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    outputs = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in present
    }
    manifest = {"format": MANIFEST_FORMAT, **facts, "outputs": outputs, OWN_HASH: NO_HASH}
    text = json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
    with files.replacing(folder / MANIFEST) as partial:
        partial.write_bytes(_with_hash(text, hashlib.sha256(text).hexdigest()))


def _with_hash(text: bytes, digest: str) -> bytes:
    """A manifest's bytes with its own hash set; that it comes last is why it can be found by its place."""
    end = len(text) - len(b'"\n}\n')
    return text[: end - len(NO_HASH)] + digest.encode("ascii") + text[end:]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest. Refuses a missing, broken or changed one, and one of another format."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist, so {folder} is no complete folder of prepared data. Make it with "
            "tools/prepare_data.py, or name another folder."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Prepare the data again.") from error
    known = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    if not known or not all(isinstance(manifest.get(part), dict) for part in ("request", "outputs")):
        raise DataError(f"{path} is not a manifest of format {MANIFEST_FORMAT}. Prepare the data again.")
    found = hashlib.sha256(_with_hash(text, NO_HASH)).hexdigest()
    if manifest.get(OWN_HASH) != found:
        raise DataError(
            f"{path} was changed after it was written: its SHA-256 is {found}, it says {manifest.get(OWN_HASH)}. "
            "Prepare the data again."
        )
    return manifest


def check_cheaply(folder: Path) -> dict[str, Any]:
    """Check in milliseconds that files, sizes and counts are the manifest's; returns the manifest.

    Refuses a missing file, another size, and an index whose documents or tokens differ. A byte changed in place is
    found only by `verify`. Files that the manifest does not name are left alone: Megatron caches its sample index here.
    """
    manifest = read_manifest(folder)
    for name, receipt in manifest["outputs"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != receipt["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path} {state}; its manifest says {receipt['bytes']} bytes. Prepare the data again.")
    for split, counts in manifest.get("splits", {}).items():
        reader = IndexedReader(folder / split)
        found = {"documents": reader.documents, "tokens": reader.token_count}
        if found != {key: counts[key] for key in found}:
            raise DataError(f"{folder / split} holds {found}; its manifest says {counts}. Prepare the data again.")
    return manifest


def verify(folder: Path, inputs: bool = False) -> dict[str, Any]:
    """Check that every output has the manifest's SHA-256, reading all of it; returns the manifest.

    With `inputs` the files that the folder was made from are checked too, where the manifest says they were.
    """
    manifest = check_cheaply(folder)
    receipts = {folder / name: receipt for name, receipt in manifest["outputs"].items()}
    if inputs:
        receipts |= {Path(receipt["path"]): receipt for receipt in _input_receipts(manifest.get("inputs", []))}
    for path, receipt in receipts.items():
        found = sha256_file(path) if path.is_file() else None
        if found != receipt["sha256"]:
            state = "is missing" if found is None else f"was changed after it was written: SHA-256 is {found}"
            raise DataError(f"{path} {state}; its manifest says {receipt['sha256']}. Prepare the data again.")
    return manifest


def _input_receipts(inputs: Any) -> Iterator[dict[str, Any]]:
    """The receipts in a manifest's `inputs`: a list of them, or one for each group."""
    for entry in inputs.values() if isinstance(inputs, dict) else inputs:
        if isinstance(entry, list):
            yield from entry
        else:
            yield entry


def reusable(folder: Path, request: dict[str, Any]) -> bool:
    """True if `folder` already holds what `request` asks for, False if nothing is there; refuses anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = check_cheaply(folder)["request"]
    changed = sorted(key for key in request.keys() | found.keys() if request.get(key) != found.get(key))
    if changed:
        raise DataError(
            f"{folder} was made from something else: {', '.join(changed)} differ. Give another --output, or remove "
            f"{folder} first."
        )
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare_data.py verify`."""
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--inputs", action="store_true", help="also check the files that it was made from")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`prepare_data.py verify`: returns what was verified."""
    manifest = verify(args.folder, args.inputs)
    return {"folder": str(args.folder), "verified": len(manifest["outputs"]), "splits": manifest.get("splits")}
