"""What `prepare_data.py sft` and `rl` share: options, records through worker processes in order, splits, receipts.

A converter turns one block of a source into outcomes: a Converted for each record that is kept, a Refused for each that
is not. It runs in worker processes; whether a refusal ends the run is decided here, in the order of the input, so that
the number of processes changes nothing.
"""

import argparse
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from infir2.data import duplicates, overlap
from infir2.data.chat import ChatTokenizer, Messages
from infir2.data.pretraining import fraction, positive
from infir2.data.sources import Block, Rejects, open_sources
from infir2.data.workers import in_order
from infir2.indexed import DataError
from infir2.receipts import building, check_cheaply, reusable, sha256_file, tool_facts, write_manifest

BLOCK_BYTES = 1 << 20  # uncompressed input that a process takes at once
TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"


@dataclass(frozen=True)
class Converted:
    """A record that is kept.

    `question` identifies what is asked, case and white space aside, `identity` the whole record, white space aside.
    `overlaps` are its entries of an overlap report; `signature` is for near duplicates, where they are looked for.
    """

    where: str
    question: bytes
    identity: bytes
    value: Any
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    signature: np.ndarray | None = None


@dataclass(frozen=True)
class Refused:
    """A record that is left out; `by_choice` if an option asks for that, so that it is only counted."""

    where: str
    reason: str
    found: str
    by_choice: bool = False


Outcome = Converted | Refused
Converter = Callable[[Block], list[Outcome]]


class Outcomes(list[Any]):
    """What became of a block's records, in order; takes what the block's reader refuses (it calls `bad`)."""

    def bad(self, where: str, reason: str, found: str) -> None:
        """Note a bad record."""
        self.append(Refused(where, reason, found))


def exact_digest(parts: Iterable[str]) -> bytes:
    """16 bytes that identify `parts`, white space and capitals at the beginning of words aside."""
    return duplicates.digest(json.dumps([duplicates.nearly_as_written(part) for part in parts]))


def asked(messages: Messages) -> list[str]:
    """What the user says."""
    return [message["content"] for message in messages if message["role"] == "user"]


def question_digest(messages: Messages) -> bytes:
    """Digest of what the user says, case aside too: answers to one question share it."""
    return duplicates.digest(json.dumps([duplicates.normalised(part) for part in asked(messages)]))


class OverlapFinder:
    """Finds evaluation problems in conversations; without evaluation sets nothing."""

    def __init__(self, sets: overlap.EvaluationSets | None) -> None:
        self._contamination = overlap.Contamination(sets) if sets is not None else None

    def find(self, where: str, messages: Messages) -> list[dict[str, Any]]:
        """Entries of an overlap report for one record."""
        if self._contamination is None:
            return []
        text = "\n".join(message["content"] for message in messages)
        return [match.facts(where) for match in self._contamination.find(text)]


class Records:
    """The records of all inputs, validation first, each with its split.

    A split follows from the question's digest where a fraction is held out, so that answers to one question never part.
    A training record whose question is in the validation files is left out and counted, and so is, with --drop, a
    record that overlaps with an evaluation set.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rejects = Rejects(args.on_error)
        self.overlaps: list[dict[str, Any]] = []
        self.sources = {
            "valid": open_sources(args.valid_input or [], block_bytes=BLOCK_BYTES),
            "train": open_sources(args.input, block_bytes=BLOCK_BYTES),
        }

    def splits(self) -> list[str]:
        """Names of the splits that are made."""
        return ["train", "valid"] if self.sources["valid"] or self.args.valid_fraction else ["train"]

    def converted(self, factory: Callable[[], Converter]) -> Iterator[tuple[str, Converted]]:
        """Yield (split, record). With --fail, refuses overlaps with evaluation sets once all are known."""
        held_out: set[bytes] = set()
        for origin, record in self._records(factory):
            split = self._split(origin, record.question)
            if split == "valid":
                held_out.add(record.question)
            elif record.question in held_out:
                self.rejects.counts["in the validation split"] += 1
                continue
            self.overlaps += record.overlaps
            if record.overlaps and self.args.overlap_action == "drop":
                self.rejects.counts["overlaps with an evaluation set"] += 1
                continue
            yield split, record
        if self.overlaps and self.args.overlap_action == "fail":
            report = self.args.output.with_name(self.args.output.name + ".overlap")
            overlap.write_report(report, self.overlaps, self.args.evaluation_sets)
            raise DataError(f"{overlap.summary(self.overlaps)}; {report}.txt shows them. Remove them, or pass --drop.")

    def _records(self, factory: Callable[[], Converter]) -> Iterator[tuple[str, Converted]]:
        """Yield (origin, record), after dealing with what is refused."""
        for origin, outcome in self._outcomes(factory):
            if isinstance(outcome, Converted):
                yield origin, outcome
            elif outcome.by_choice:
                self.rejects.counts[outcome.reason] += 1
            else:
                self.rejects.bad(outcome.where, outcome.reason, outcome.found)

    def _outcomes(self, factory: Callable[[], Converter]) -> Iterator[tuple[str, Outcome]]:
        sizes = {origin: sum(s.path.stat().st_size for s in group) for origin, group in self.sources.items()}
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="convert", disable=None) as progress:
            for origin, group in self.sources.items():
                blocks = (block for source in group for block in source.blocks(self.rejects))
                workers = max(
                    1, min(self.args.workers, sizes[origin] // BLOCK_BYTES)
                )  # a process takes seconds to start
                for block, outcomes in in_order(factory, blocks, workers):
                    progress.update(block.size)
                    yield from ((origin, outcome) for outcome in outcomes)

    def _split(self, origin: str, question: bytes) -> str:
        if self.args.valid_fraction is None:
            return origin
        return "valid" if int.from_bytes(question[:8], "big") < self.args.valid_fraction * 2**64 else "train"


def without_near_duplicates(
    records: Iterable[tuple[str, Converted]], threshold: float, rejects: Rejects, folder: Path
) -> Iterator[tuple[str, Converted]]:
    """Yield the records that have no near duplicate before them; the others are counted.

    All records wait in an unnamed file in `folder` until their signatures are compared.
    """
    with tempfile.TemporaryFile(dir=folder) as waiting, tempfile.TemporaryFile(dir=folder) as signatures:
        count = 0
        for split, record in records:
            pickle.dump((split, record), waiting)
            signatures.write(record.signature.astype("<u4").tobytes())
            count += 1
        if count == 0:
            return
        signatures.flush()
        rows = np.memmap(signatures, "<u4", "r", shape=(count, duplicates.PERMUTATIONS))
        repeats = set(duplicates.near_duplicates(rows, np.arange(count), threshold)[0].tolist())
        rejects.counts["near duplicate"] += len(repeats)
        waiting.seek(0)
        for number in range(count):
            found = pickle.load(waiting)
            if number not in repeats:
                yield found


# Commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `sft` and `rl` share."""
    add = parser.add_argument
    files = ".jsonl (also .gz, .zst), .parquet, folders of datasets.save_to_disk"
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help=files)
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face folder with a chat template")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    valid = parser.add_mutually_exclusive_group()
    valid.add_argument("--valid-fraction", type=fraction, metavar="F", help="hold out this share of questions, by hash")
    valid.add_argument(
        "--valid-input", type=Path, nargs="+", metavar="PATH", help="files that are the validation split"
    )
    add(
        "--apply-chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="""variables for the chat template, such as '{"enable_thinking": false}'""",
    )
    overlap.add_options(parser)
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a bad record: stop, or leave it out and count it (fail)",
    )
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (one a core)")


def json_object(text: str) -> dict[str, Any]:
    """Argument type: a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, found {text}")
    return value


def run_task(
    args: argparse.Namespace, options: dict[str, Any], write: Callable[[Records, ChatTokenizer, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Build args.output, or reuse it if it holds exactly this; returns the result to print.

    `options` are the task's part of the request (`task`, `pipeline` and what else decides the bytes). `write` fills a
    folder from the records and returns facts for the manifest.
    """
    tokenizer = ChatTokenizer(args.tokenizer, args.apply_chat_template_kwargs)
    args.evaluation_sets = overlap.read_evaluation_sets(args)
    records = Records(args)
    request = {**options, **_shared_request(args, tokenizer)}
    reused = args.output.exists()
    if reused:
        hashes = {origin: [sha256_file(source.path) for source in group] for origin, group in records.sources.items()}
        reused = reusable(args.output, {**request, "inputs": hashes})
    if not reused:
        with building(args.output) as folder:
            facts = write(records, tokenizer, folder)
            if args.evaluation_sets is not None:
                overlap.write_report(folder / "overlap", records.overlaps, args.evaluation_sets)
            write_manifest(folder, _manifest(args, request, records, tokenizer, facts))
    manifest = check_cheaply(args.output)
    shown = ("vocab_size", "splits", "prompts", "counted", "dropped")
    return {"output": str(args.output), "reused": reused, **{key: manifest[key] for key in shown if key in manifest}}


def _shared_request(args: argparse.Namespace, tokenizer: ChatTokenizer) -> dict[str, Any]:
    sets = args.evaluation_sets
    return {
        "tokenizer": tokenizer.sha256,
        "chat_template": tokenizer.template_sha256,
        "apply_chat_template_kwargs": args.apply_chat_template_kwargs,
        "valid_fraction": args.valid_fraction,
        "on_error": args.on_error,
        "against": sets and sets.request(),
        "overlap_action": args.overlap_action if sets else None,
    }


def _manifest(
    args: argparse.Namespace, request: dict[str, Any], records: Records, tokenizer: ChatTokenizer, facts: dict[str, Any]
) -> dict[str, Any]:
    inputs = {origin: [source.receipt() for source in group] for origin, group in records.sources.items()}
    hashes = {origin: [receipt["sha256"] for receipt in receipts] for origin, receipts in inputs.items()}
    return {
        **tool_facts(TOOL, request["pipeline"], args.arguments),
        "request": {**request, "inputs": hashes},
        "inputs": inputs,
        "tokenizer": {"path": str(tokenizer.path), "sha256": tokenizer.sha256},
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "chat_template": {"sha256": tokenizer.template_sha256, "end_of_turn": tokenizer.end_of_turn},
        "vocab_size": tokenizer.vocab_size,
        **facts,
        "dropped": dict(sorted(records.rejects.counts.items())),
        "overlaps": len(records.overlaps) if args.evaluation_sets else None,
    }
