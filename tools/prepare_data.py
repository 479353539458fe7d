"""Turn text into token files for training, with a receipt of what went in and what came out.

    python tools/prepare_data.py cpt --input corpus.jsonl --tokenizer HF_FOLDER --output DIR --valid-fraction 0.01
    python tools/prepare_data.py verify DIR

`cpt` writes train.bin/.idx and valid.bin/.idx in Megatron's format, and manifest.json. Every document ends in the
document-end token. Which split a document goes to follows from its text's hash, so equal documents never part, and a
training document that is also a validation document is left out and counted.

The same command again, on the same inputs, reuses the folder.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from infir2.indexed import DataError, IndexedWriter
from infir2.receipts import building, check_cheaply, reusable, sha256_file, tool_facts, verify, write_manifest

VERSION = 1  # raise it when the same request would give other bytes
BATCH_CHARACTERS = 2_000_000  # text handed to the tokenizer at once: enough to keep its threads busy
LOGGED_REJECTS = 10

log = logging.getLogger("prepare_data")


class Rejects:
    """Counts what is left out, by reason; under `fail` the first bad record ends the run instead."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()

    def bad(self, where: str, reason: str, found: str) -> None:
        """Note a bad record at `where` (file or file:line)."""
        if self.on_error == "fail":
            raise DataError(
                f"{where}: {reason}: {found}. Correct it, or pass --on-error skip to leave such records out and count "
                "them."
            )
        if self.counts.total() < LOGGED_REJECTS:
            log.warning("%s: %s: %s; left out", where, reason, found)
        self.counts[reason] += 1


class Source:
    """One input file: a .jsonl of documents, or a .txt that is one document. Read once, hashed as it is read."""

    def __init__(self, path: Path, text_key: str) -> None:
        if path.suffix not in (".jsonl", ".txt"):
            raise DataError(f"{path} is neither .jsonl nor .txt. Convert it to one of them.")
        if not path.is_file():
            raise DataError(f"{path} does not exist or is not a file.")
        self.path = path
        self.text_key = text_key
        self.bytes = 0
        self._hash = hashlib.sha256()

    def receipt(self) -> dict[str, Any]:
        """Path, size and hash of what was read; complete once `documents` is exhausted."""
        return {"path": str(self.path), "bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def documents(self, rejects: Rejects, progress: tqdm) -> Iterator[str]:
        """Yield the file's texts; what is not a document goes to `rejects` with its line."""
        for where, raw in self._records(progress):
            try:
                text = raw.decode("utf-8")
                text = text if self.path.suffix == ".txt" else self._text_of(text)
                text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no character
            except UnicodeError as error:
                rejects.bad(where, "not valid UTF-8", str(error))
            except json.JSONDecodeError as error:
                rejects.bad(where, "broken JSON", f"{error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of 4,300 digits, brackets 1,000 deep
                rejects.bad(where, "broken JSON", str(error))
            except LookupError as error:
                rejects.bad(where, "no text", error.args[0])
            else:
                if text.strip():
                    yield text
                else:
                    rejects.bad(where, "empty document", "nothing but white space")
        if self.bytes == 0:
            rejects.bad(str(self.path), "empty file", "0 bytes")

    def _records(self, progress: tqdm) -> Iterator[tuple[str, bytes]]:
        with self.path.open("rb") as file:
            for number, raw in enumerate([file.read()] if self.path.suffix == ".txt" else file, start=1):
                self._hash.update(raw)
                self.bytes += len(raw)
                progress.update(len(raw))
                if self.path.suffix == ".txt":
                    if raw:
                        yield str(self.path), raw
                elif raw.strip():  # a blank line holds no record
                    yield f"{self.path}:{number}", raw

    def _text_of(self, line: str) -> str:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise LookupError(f"the line is a {type(record).__name__}, not an object")
        if self.text_key not in record:
            raise LookupError(
                f"field {self.text_key!r} is missing, found {sorted(record)} (--text-key names the field)"
            )
        if not isinstance(record[self.text_key], str):
            raise LookupError(f"field {self.text_key!r} is a {type(record[self.text_key]).__name__}, not a string")
        return record[self.text_key]


class DocumentTokenizer:
    """An HF folder's tokenizer, set up to turn documents into ids; `eod` is the document-end token's id.

    Refuses a folder without tokenizer.json, and a vocabulary without the document-end token. Truncation and padding
    that were saved in tokenizer.json are switched off: they would cut documents without a word.
    """

    def __init__(self, folder: Path, eod_token: str, parse_special_tokens: bool) -> None:
        self.path = folder / "tokenizer.json"
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist. Give the folder of a Hugging Face fast tokenizer.")
        self.sha256 = sha256_file(self.path)
        try:
            self._tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.eod = self._document_end(eod_token)

    def _document_end(self, eod_token: str) -> int:
        eod = self._tokenizer.token_to_id(eod_token)
        if eod is None:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise DataError(
                f"{self.path} has no document-end token {eod_token!r}; its special tokens are {special}. Name the "
                "right one with --eod-token."
            )
        return eod

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, the document-end token last; on all of the tokenizer's threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*encoding.ids, self.eod] for encoding in encodings]


def batches(documents: Iterable[tuple[str, str]], characters: int) -> Iterator[list[tuple[str, str]]]:
    """Group (split, text) pairs so that each group holds about `characters` characters."""
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Splitter:
    """Decides the split of each document; `sources` holds the input files of each option, validation first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.fraction: float | None = args.valid_fraction
        self.sources = {
            "valid": [Source(path, args.text_key) for path in args.valid_input or []],
            "train": [Source(path, args.text_key) for path in args.input],
        }
        self.rejects = Rejects(args.on_error)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (split, text) over all inputs. A training document equal to a validation document is dropped."""
        total = sum(source.path.stat().st_size for group in self.sources.values() for source in group)
        held_out: set[bytes] = set()
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as progress:
            for origin, group in self.sources.items():
                for source in group:
                    for text in source.documents(self.rejects, progress):
                        digest = hashlib.sha256(text.encode("utf-8")).digest()
                        split = self._split(origin, digest)
                        if split == "valid" and self.fraction is None:
                            held_out.add(digest)
                        elif digest in held_out:
                            self.rejects.counts["in the validation split"] += 1
                            continue
                        yield split, text

    def _split(self, origin: str, digest: bytes) -> str:
        """Split by hash where a fraction is asked for: equal texts fall on the same side."""
        if self.fraction is None:
            return origin
        return "valid" if int.from_bytes(digest[:8], "big") < self.fraction * 2**64 else "train"


def write_splits(documents: Iterable[tuple[str, str]], tokenizer: DocumentTokenizer, folder: Path) -> dict[str, Any]:
    """Tokenise into folder/train and folder/valid; returns documents and tokens of each. Refuses an empty split."""
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(folder / split, tokenizer.vocab_size))
            for split in ("train", "valid")
        }
        for batch in batches(documents, BATCH_CHARACTERS):
            for (split, _), ids in zip(batch, tokenizer.encode([text for _, text in batch]), strict=True):
                writers[split].add_document(ids)
        counts = {split: {"documents": w.document_count, "tokens": w.token_count} for split, w in writers.items()}
        empty = [split for split, count in counts.items() if count["documents"] == 0]
        if empty:
            raise DataError(
                f"the {' and '.join(empty)} split has no documents, found {counts}. Give more text, another "
                "--valid-fraction, or --valid-input."
            )
    return counts


def cpt_request(args: argparse.Namespace, tokenizer: DocumentTokenizer, inputs: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that decides the output's bytes; `inputs` holds the SHA-256 of each file."""
    return {
        "task": "cpt",
        "pipeline": VERSION,
        "inputs": inputs,
        "tokenizer": tokenizer.sha256,
        "eod_token": args.eod_token,
        "text_key": args.text_key,
        "valid_fraction": args.valid_fraction,
        "on_error": args.on_error,
        "parse_special_tokens": args.parse_special_tokens,
    }


def build_cpt(args: argparse.Namespace, tokenizer: DocumentTokenizer, splitter: Splitter, folder: Path) -> None:
    """Write the token files and their manifest into `folder`."""
    counts = write_splits(splitter.documents(), tokenizer, folder)
    inputs = {origin: [source.receipt() for source in group] for origin, group in splitter.sources.items()}
    hashes = {origin: [receipt["sha256"] for receipt in group] for origin, group in inputs.items()}
    facts = {
        **tool_facts(Path(__file__).resolve(), VERSION, args.arguments),
        "request": cpt_request(args, tokenizer, hashes),
        "inputs": inputs,
        "tokenizer": {"path": str(tokenizer.path), "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "splits": counts,
        "dropped": dict(sorted(splitter.rejects.counts.items())),
    }
    write_manifest(folder, facts)


def run_cpt(args: argparse.Namespace) -> dict[str, Any]:
    """The `cpt` command: build the folder, or reuse it if it holds exactly this."""
    # The tokenizer's thread pool reads these once, when it first runs.
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = DocumentTokenizer(args.tokenizer, args.eod_token, args.parse_special_tokens)
    splitter = Splitter(args)
    exists = args.output.exists()
    if exists:
        groups = splitter.sources.items()
        hashes = {origin: [sha256_file(source.path) for source in group] for origin, group in groups}
        exists = reusable(args.output, cpt_request(args, tokenizer, hashes))
    if not exists:
        with building(args.output) as folder:
            build_cpt(args, tokenizer, splitter, folder)
    manifest = check_cheaply(args.output)
    keys = ("vocab_size", "eod", "splits", "dropped")
    return {"output": str(args.output), "reused": exists, **{key: manifest[key] for key in keys}}


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    """The `verify` command."""
    manifest = verify(args.folder)
    return {"folder": str(args.folder), "verified": len(manifest["outputs"]), "splits": manifest.get("splits")}


def fraction(text: str) -> float:
    """Argument type: a number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, found {text}")
    return value


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value


def add_cpt_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `cpt`."""
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl (one object a line), .txt (one document)",
    )
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face folder with tokenizer.json")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    valid = parser.add_mutually_exclusive_group(required=True)
    valid.add_argument("--valid-fraction", type=fraction, metavar="F", help="hold out this share of documents, by hash")
    valid.add_argument(
        "--valid-input", type=Path, nargs="+", metavar="FILE", help="files that are the validation split"
    )
    add("--text-key", default="text", metavar="KEY", help="field of a .jsonl line that holds the text (text)")
    add("--eod-token", default="<|endoftext|>", metavar="TOKEN", help="document-end token (<|endoftext|>)")
    add(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read special tokens spelled out in a document as tokens; else they are ordinary text, so that a document "
        "about <|endoftext|> does not end there (no)",
    )
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a bad record: stop, or leave it out and count it (fail)",
    )
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="tokenizer threads (one a core)")
    parser.set_defaults(run=run_cpt)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line to namespace; `arguments` keeps what was typed, for the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_cpt_arguments(commands.add_parser("cpt", help="text to token files for continual pre-training"))
    check = commands.add_parser("verify", help="recompute every hash of a prepared folder")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.set_defaults(run=run_verify)
    return parser.parse_args(arguments, argparse.Namespace(arguments=list(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; prints its result as JSON. Exit status 1 on any refusal."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s: %(message)s")
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        print(json.dumps(args.run(args), ensure_ascii=False))
    except (DataError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
