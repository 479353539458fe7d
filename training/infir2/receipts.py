"""Receipts: a folder of data carries a manifest.json that says what is in it and what it was made from.

The manifest holds the request (everything that decides the bytes: inputs by hash, tokenizer, options), counts, and the
size and SHA-256 of every output file. It holds no time and no host, so the same request gives the same manifest.

    building     makes a folder under a temporary name and renames it when it is complete
    reusable     says whether a folder already holds what a request asks for
    check_cheaply  what training runs before it starts: files, sizes and counts agree
    verify       recomputes every hash
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infir2.indexed import DataError, IndexedReader

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


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
    """Yields an empty folder beside `output`; renames it to `output` at the end, or removes it after an error.

    What a killed run left behind is removed by the next one. Refuses while another process builds the same output,
    and an output that exists and is not empty.
    """
    partial = output.with_name(f".{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is building {output}. Wait for it, or end it.") from None
        _clear(partial)
        try:
            yield partial
            os.rename(partial, output)  # fails, by design, when output is a folder that is not empty
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):  # a full disk gives no file name
                raise DataError(f"{output} was not made: {error}. Put right what is named and run again.") from error
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json over `facts` and every file now in `folder`.

    `facts` carries `request`, and `splits` (name to documents and tokens) where the folder holds NAME.bin/.idx.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    outputs = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    text = json.dumps({"format": MANIFEST_FORMAT, **facts, "outputs": outputs}, indent=1, ensure_ascii=False)
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest. Refuses a missing or broken one and one of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
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


def verify(folder: Path) -> dict[str, Any]:
    """Check that every output has the manifest's SHA-256, reading all of it; returns the manifest."""
    manifest = check_cheaply(folder)
    for name, receipt in manifest["outputs"].items():
        found = sha256_file(folder / name)
        if found != receipt["sha256"]:
            raise DataError(
                f"{folder / name} was changed after it was written: SHA-256 is {found}, its manifest says "
                f"{receipt['sha256']}. Prepare the data again."
            )
    return manifest


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
