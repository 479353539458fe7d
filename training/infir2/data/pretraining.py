"""`prepare_data.py cpt`: text to token files for continual pre-training.

Two passes over the inputs. The survey reads every document, so that bad records, duplicates and overlaps with
evaluation sets are known before anything is tokenised; it leaves a hash of each document on disk. Then documents that
stay are tokenised and joined into train and valid in the order of the inputs.

Both passes work in blocks (infir2.data.sources), in several processes. What is finished of a block is stored with its
own receipt beside the output until all is done, so that a run that was killed goes on from there; order and bytes of
the output depend neither on that nor on the number of processes.
"""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from infir2.data import duplicates, overlap
from infir2.data.sources import BLOCK_BYTES, BYTE_ORDER_MARK, Block, Rejects, Source, open_sources
from infir2.data.tokenizer import LIBRARIES, DocumentTokenizer
from infir2.data.workers import in_order
from infir2.files import write_text
from infir2.indexed import DataError, IndexedWriter, token_dtype
from infir2.receipts import (
    OUTPUT,
    check_cheaply,
    remove_leftovers,
    resuming,
    reusable,
    sha256_file,
    tool_facts,
    write_manifest,
)

VERSION = 4  # raise it when the same request would give other bytes
TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"
BLOCKS_WORTH_A_PROCESS = 2  # to start one and load the tokenizer takes seconds
BLEND = "train.blend"
VALID = "valid"  # the group of --valid-input, and the split
REASONS = (
    "",
    "in the validation split",
    "duplicate",
    "duplicate of another source",
    "near duplicate in the validation split",
    "near duplicate",
    "near duplicate of another source",
    "overlaps with an evaluation set",
)
EXACT, NEAR, OVERLAP = 1, 4, 7  # places in REASONS; the first two begin three kinds each


@dataclass(frozen=True)
class Task:
    """One block of the corpus: its number over all inputs and the group (source) that it belongs to.

    `reasons` holds, for the second pass, a byte for each of its documents: the place in REASONS of why it is left out.
    """

    number: int
    group: str
    block: Block
    reasons: bytes = b""


class Shelf:
    """A folder of finished blocks: NUMBER.json, which is the receipt, and data files NUMBER.SUFFIX."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int, suffix: str) -> Path:
        """Where a data file of block `number` lies."""
        return self.folder / f"{number:08}.{suffix}"

    def files(self, number: int) -> dict[str, str]:
        """Suffix and SHA-256 of a finished block's data files."""
        return json.loads(self.path(number, "json").read_text(encoding="utf-8"))["files"]

    def load(self, number: int, key: str) -> dict[str, Any] | None:
        """The receipt of a block that was finished from what `key` names and is still whole; else None."""
        try:
            receipt = json.loads(self.path(number, "json").read_text(encoding="utf-8"))
            whole = receipt["key"] == key and all(
                sha256_file(self.path(number, suffix)) == digest for suffix, digest in receipt["files"].items()
            )
        except (OSError, ValueError, LookupError):
            return None
        return receipt if whole else None

    def store(self, number: int, key: str, files: dict[str, bytes], facts: dict[str, Any]) -> dict[str, Any]:
        """Write a block's data files, then its receipt; returns the receipt."""
        for suffix, data in files.items():
            self.path(number, suffix).write_bytes(data)
        hashes = {suffix: hashlib.sha256(data).hexdigest() for suffix, data in files.items()}
        receipt = {"key": key, **facts, "files": hashes}
        write_text(self.path(number, "json"), json.dumps(receipt))
        return receipt


@dataclass(frozen=True)
class Options:
    """What worker processes need to know."""

    work: Path
    text_key: str
    on_error: str
    near: bool
    fraction: float | None
    single: bool
    tokenizer: Path
    eod_token: str
    parse_special_tokens: bool
    library: str
    evaluation: overlap.EvaluationSets | None


def documents(block: Block, key: str, rejects: Rejects) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of a block's records; those without a text in field `key` go to `rejects`."""
    for where, record in block.records(rejects):
        if key not in record:
            found = f"field {key!r} is missing, found {sorted(record)} (--text-key names the field)"
            rejects.bad(where, "no text", found)
        elif not isinstance(record[key], str):
            rejects.bad(where, "no text", f"field {key!r} is a {type(record[key]).__name__}, not a string")
        elif not (text := record[key].lstrip(BYTE_ORDER_MARK)).strip():
            rejects.bad(where, "empty document", "nothing but white space")
        else:
            yield where, text


class Survey:
    """First pass, in a worker process: what there is to know about each document of a block."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.shelf = Shelf(options.work / "survey")
        self.contamination = options.evaluation and overlap.Contamination(options.evaluation)

    def __call__(self, task: Task) -> dict[str, Any]:
        """The block's receipt: documents, rejected, examples, overlaps; data files: digests, signatures."""
        return self.shelf.load(task.number, task.block.fingerprint) or self._survey(task)

    def _survey(self, task: Task) -> dict[str, Any]:
        rejects = Rejects(self.options.on_error, quiet=True)
        digests, normal_texts, overlaps = [], [], []
        for where, text in documents(task.block, self.options.text_key, rejects):
            if self.contamination is not None:
                found = [match.facts(where) for match in self.contamination.find(text)]
                overlaps += [{"document": len(digests), **facts} for facts in found]
            normal = duplicates.normalised(text)
            digests.append(duplicates.digest(normal))
            if self.options.near:
                normal_texts.append(normal)
        files = {"digests": b"".join(digests)}
        if self.options.near:
            files["signatures"] = duplicates.signatures(normal_texts).tobytes()
        facts = {"documents": len(digests), "rejected": rejects.counts, "examples": rejects.examples}
        return self.shelf.store(task.number, task.block.fingerprint, files, {**facts, "overlaps": overlaps})


class Encode:
    """Second pass, in a worker process: the tokens of a block's documents that stay."""

    def __init__(self, options: Options, tokenizer: DocumentTokenizer | None = None) -> None:
        self.options = options
        self.shelf = Shelf(options.work / "tokens")
        self.survey = Shelf(options.work / "survey")
        self.tokenizer = tokenizer or DocumentTokenizer(
            options.tokenizer, options.eod_token, options.parse_special_tokens, options.library
        )
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, task: Task) -> dict[str, Any]:
        """The block's receipt: prefixes, scripts of what was left out, checked; data files: PREFIX.bin, .lengths."""
        key = f"{task.block.fingerprint} {hashlib.sha256(task.reasons).hexdigest()}"
        return self.shelf.load(task.number, key) or self._encode(task, key)

    def _encode(self, task: Task, key: str) -> dict[str, Any]:
        rejects = Rejects("skip", quiet=True)  # the survey has judged and counted them
        texts = [text for _, text in documents(task.block, self.options.text_key, rejects)]
        stays = [text for text, reason in zip(texts, task.reasons, strict=True) if not reason]
        scripts: dict[str, Counter[str]] = {}
        for text, reason in zip(texts, task.reasons, strict=True):
            if reason:
                scripts.setdefault(REASONS[reason], Counter())[duplicates.script_of(text)] += 1
        ids, lengths = self.tokenizer.encode(stays)
        if ids.size and ids.max() >= self.tokenizer.vocab_size:
            found, size = ids.max(), self.tokenizer.vocab_size
            raise DataError(f"{self.tokenizer.path} gives id {found}, outside its vocabulary of {size}. Replace it.")
        facts = {"scripts": scripts, "library": self.tokenizer.library}
        files = {}
        for prefix, chosen in self._prefixes(task).items():
            files[f"{prefix}.bin"] = ids[np.repeat(chosen, lengths)].astype(self.dtype).tobytes()
            files[f"{prefix}.lengths"] = lengths[chosen].astype("<i4").tobytes()
        return self.shelf.store(task.number, key, files, {**facts, "checked": self.tokenizer.check(stays)})

    def _prefixes(self, task: Task) -> dict[str, np.ndarray]:
        """Which of the documents that stay go to each output: bool [documents that stay]."""
        stays = np.frombuffer(task.reasons, np.uint8) == 0
        if self.options.fraction is None:
            valid = np.full(stays.sum(), task.group == VALID)
        else:
            digests = np.fromfile(self.survey.path(task.number, "digests"), duplicates.DIGEST)
            valid = digests["high"][stays] < np.uint64(self.options.fraction * 2**64)
        found = {VALID: valid, train_prefix(task.group, self.options.single): ~valid}
        return {prefix: chosen for prefix, chosen in found.items() if chosen.any()}


def train_prefix(group: str, single: bool) -> str:
    """Name of a source's training tokens."""
    return "train" if single else f"train-{group}"


class Corpus:
    """All inputs, by group: the validation files first, then each source; and how much of it each weighs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.weights, files = parse_inputs(args.input)
        self.single = len(files) == 1
        opened = {VALID: args.valid_input or [], **files}
        self.groups: dict[str, list[Source]] = {
            group: open_sources(paths, args.text_key, args.block_bytes) for group, paths in opened.items()
        }
        self.rejects = Rejects(args.on_error)
        self.bytes = sum(source.path.stat().st_size for group in self.groups.values() for source in group)

    def tasks(self, rejects: Rejects) -> Iterator[Task]:
        """Yield every block; empty files go to `rejects`."""
        number = 0
        for group, sources in self.groups.items():
            for source in sources:
                for block in source.blocks(rejects):
                    yield Task(number, group, block)
                    number += 1

    def prefixes(self) -> list[str]:
        """Names of the outputs, training first."""
        return [train_prefix(group, self.single) for group in self.groups if group != VALID] + [VALID]

    def hashes(self) -> dict[str, list[str]]:
        """SHA-256 of each file by group; reads them."""
        return {group: [sha256_file(source.path) for source in sources] for group, sources in self.groups.items()}


SOURCE_NAME = re.compile(r"([A-Za-z][\w.-]*)=(\d+(?:\.\d+)?)")


def parse_inputs(words: list[list[str]]) -> tuple[dict[str, float], dict[str, list[Path]]]:
    """Weights and files of each source, from `FILE...` once, or `NAME=WEIGHT FILE...` for each source."""
    if len(words) == 1 and not SOURCE_NAME.fullmatch(words[0][0]):
        return {"train": 1.0}, {"train": [Path(word) for word in words[0]]}
    weights: dict[str, float] = {}
    files: dict[str, list[Path]] = {}
    for first, *paths in words:
        match = SOURCE_NAME.fullmatch(first)
        if not match or not paths or float(match[2]) == 0 or match[1] in (VALID, *files):
            raise DataError(
                f"--input {' '.join([first, *paths])}: each of several sources is NAME=WEIGHT FILE..., as in --input "
                f"web=0.7 web.jsonl; names differ from each other and from {VALID!r}, and a weight is above 0."
            )
        weights[match[1]], files[match[1]] = float(match[2]), [Path(path) for path in paths]
    return weights, files


class Build:
    """One run: survey, decisions, tokens, and the joined output in `work`/OUTPUT."""

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, tokenizer: DocumentTokenizer, options: Options
    ) -> None:
        self.args = args
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.options = options
        self.work = options.work
        self.workers = min(args.workers, max(1, corpus.bytes // (BLOCKS_WORTH_A_PROCESS * args.block_bytes)))
        self.starts = [0]  # number of the first document of each block, then their total
        self.fingerprints: list[str] = []  # of the blocks, as they were surveyed
        self.group_starts: dict[str, int] = {}  # number of the first document of each group
        self.matches: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.scripts: dict[str, Counter[str]] = {}
        self.checked = 0
        self.libraries: set[str] = set()

    def survey(self) -> None:
        """First pass. Refuses what --on-error fail or --fail refuses."""
        (self.work / "survey").mkdir(exist_ok=True)
        rejects = self.corpus.rejects
        with self._progress("survey") as progress:
            for task, receipt in in_order(partial(Survey, self.options), self.corpus.tasks(rejects), self.workers):
                progress.update(task.block.size)
                rejects.absorb(receipt["rejected"], receipt["examples"])
                self.fingerprints.append(task.block.fingerprint)
                start = self.starts[-1]
                self.group_starts.setdefault(task.group, start)
                self.matches += [{**match, "document": start + match["document"]} for match in receipt["overlaps"]]
                self.starts.append(start + receipt["documents"])
        if self.matches and self.args.overlap_action == "fail":
            report = self.args.output.with_name(self.args.output.name + ".overlap")
            overlap.write_report(report, self.matches, self.options.evaluation)
            raise DataError(
                f"{overlap.summary(self.matches)}; {report}.txt shows them. Remove these documents, or pass --drop."
            )

    def decide(self) -> np.ndarray:
        """Why each document is left out, as a place in REASONS, 0 if it stays: uint8 [documents], on disk."""
        if self.starts[-1] == 0:
            return np.empty(0, np.uint8)
        reasons = np.memmap(self.work / "reasons", np.uint8, "w+", shape=(self.starts[-1],))
        digests = self._gathered("digests").view(duplicates.DIGEST)
        self._mark(reasons, EXACT, *duplicates.first_occurrences(digests), only_leaks=self.args.keep_duplicates)
        if self.args.near_duplicates is not None:
            rows = self._gathered("signatures").view("<u4").reshape(-1, duplicates.PERMUTATIONS)
            stays = np.flatnonzero(reasons == 0)
            self._mark(reasons, NEAR, *duplicates.near_duplicates(rows, stays, self.args.near_duplicates))
        if self.args.overlap_action == "drop":
            reasons[[match["document"] for match in self.matches]] = OVERLAP
        return reasons

    def _gathered(self, suffix: str) -> np.ndarray:
        """The survey's data files of that suffix, one after the other, as bytes on disk."""
        with (self.work / suffix).open("wb") as file:
            for number in range(len(self.starts) - 1):
                file.write(Shelf(self.work / "survey").path(number, suffix).read_bytes())
        return np.memmap(self.work / suffix, np.uint8, "r")

    def _mark(
        self, reasons: np.ndarray, kind: int, repeats: np.ndarray, firsts: np.ndarray, only_leaks: bool = False
    ) -> None:
        """Note why `repeats` are left out: they repeat `firsts`, of the validation files, their source or another."""
        starts = list(self.group_starts.values())
        later, earlier = (np.searchsorted(starts, numbers, side="right") for numbers in (repeats, firsts))
        names = list(self.group_starts)
        leaks = (earlier == 1) & (later != 1) if names[0] == VALID else np.zeros(later.size, bool)
        codes = np.where(leaks, kind, np.where(later == earlier, kind + 1, kind + 2))
        chosen = leaks if only_leaks else np.ones(later.size, bool)
        reasons[repeats[chosen]] = codes[chosen]

    def encode(self, reasons: np.ndarray) -> None:
        """Second pass."""
        (self.work / "tokens").mkdir(exist_ok=True)
        with self._progress("tokenize") as progress:
            # A process of its own loads the tokenizer again: it holds what cannot be sent.
            factory = partial(Encode, self.options, *([self.tokenizer] if self.workers == 1 else []))
            for task, receipt in in_order(factory, self._marked(reasons), self.workers):
                progress.update(task.block.size)
                self.checked += receipt["checked"]
                self.libraries.add(receipt["library"])
                for reason, scripts in receipt["scripts"].items():
                    self.scripts.setdefault(reason, Counter()).update(scripts)
        self.dropped.update({reason: scripts.total() for reason, scripts in self.scripts.items()})

    def _marked(self, reasons: np.ndarray) -> Iterator[Task]:
        for task in self.corpus.tasks(Rejects("skip", quiet=True)):
            if self.fingerprints[task.number : task.number + 1] != [task.block.fingerprint]:
                raise DataError(f"{task.block.path} changed while it was read. Run again.")
            chosen = reasons[self.starts[task.number] : self.starts[task.number + 1]].tobytes()
            yield Task(task.number, task.group, task.block, chosen)

    def join(self) -> dict[str, Any]:
        """Write the outputs' token files; returns documents, tokens and length histogram of each."""
        splits = {}
        shelf = Shelf(self.work / "tokens")
        for prefix in self.corpus.prefixes():
            histogram: Counter[int] = Counter()
            with IndexedWriter(self.work / OUTPUT / prefix, self.tokenizer.vocab_size) as writer:
                for number in range(len(self.starts) - 1):
                    if f"{prefix}.bin" in shelf.files(number):
                        lengths = np.fromfile(shelf.path(number, f"{prefix}.lengths"), "<i4")
                        writer.add_documents(np.fromfile(shelf.path(number, f"{prefix}.bin"), writer.dtype), lengths)
                        histogram.update(np.frexp(lengths)[1].tolist())
            lengths_from = {str(2 ** (exponent - 1)): histogram[exponent] for exponent in sorted(histogram)}
            counts = {"documents": writer.document_count, "tokens": writer.token_count}
            splits[prefix] = {**counts, "documents_by_length": lengths_from}
        self._refuse_small(splits)
        return splits

    def _refuse_small(self, splits: dict[str, Any]) -> None:
        counts = {name: {key: split[key] for key in ("documents", "tokens")} for name, split in splits.items()}
        empty = [name for name, split in counts.items() if split["documents"] == 0]
        if empty:
            raise DataError(
                f"the {' and '.join(empty)} split has no documents, found {counts}. Give more text, another "
                "--valid-fraction, or --valid-input."
            )
        needed = (self.args.seq_length or 0) + 1  # a sample's targets are one token further
        small = [name for name, split in counts.items() if split["tokens"] < needed]
        if small:
            raise DataError(
                f"the {' and '.join(small)} split is smaller than one sample of {needed} tokens, found {counts}. Give "
                "more text, or a smaller --seq-length."
            )

    def _progress(self, name: str) -> tqdm:
        return tqdm(total=self.corpus.bytes, unit="B", unit_scale=True, desc=name, disable=None)


def cpt_request(args: argparse.Namespace, tokenizer: DocumentTokenizer, corpus: Corpus) -> dict[str, Any]:
    """Everything that decides the output's bytes, but for `inputs`, the SHA-256 of each file by group."""
    evaluation = args.evaluation_sets
    return {
        "task": "cpt",
        "pipeline": VERSION,
        "weights": corpus.weights,
        "tokenizer": tokenizer.sha256,
        "eod_token": args.eod_token,
        "text_key": args.text_key,
        "valid_fraction": args.valid_fraction,
        "on_error": args.on_error,
        "parse_special_tokens": args.parse_special_tokens,
        "keep_duplicates": args.keep_duplicates,
        "near_duplicates": args.near_duplicates,
        "seq_length": args.seq_length,
        "against": evaluation and evaluation.request(),
        "overlap_action": args.overlap_action if evaluation else None,
    }


def build_cpt(
    args: argparse.Namespace, tokenizer: DocumentTokenizer, corpus: Corpus, request: dict[str, Any], work: Path
) -> None:
    """Write the token files and their manifest into `work`/OUTPUT."""
    options = Options(
        work=work,
        text_key=args.text_key,
        on_error=args.on_error,
        near=args.near_duplicates is not None,
        fraction=args.valid_fraction,
        single=corpus.single,
        tokenizer=args.tokenizer,
        eod_token=args.eod_token,
        parse_special_tokens=args.parse_special_tokens,
        library=args.tokenizer_library,
        evaluation=args.evaluation_sets,
    )
    build = Build(args, corpus, tokenizer, options)
    build.survey()
    build.encode(build.decide())
    splits = build.join()
    inputs = {group: [source.receipt() for source in sources] for group, sources in corpus.groups.items() if sources}
    output = work / OUTPUT
    if not corpus.single:
        weights = [f"{corpus.weights[group]:g} {train_prefix(group, False)}\n" for group in corpus.weights]
        (output / BLEND).write_text("".join(weights), encoding="utf-8")
    if args.evaluation_sets is not None:
        overlap.write_report(output / "overlap", build.matches, args.evaluation_sets)
    hashes = {group: [receipt["sha256"] for receipt in receipts] for group, receipts in inputs.items()}
    facts = {
        **tool_facts(TOOL, VERSION, args.arguments),
        "request": {**request, "inputs": hashes},
        "inputs": inputs,
        "tokenizer": {"path": str(tokenizer.path), "sha256": tokenizer.sha256},
        "encoded_by": {"libraries": sorted(build.libraries), "documents_compared": build.checked},
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "weights": corpus.weights,
        "splits": splits,
        "dropped": dict(sorted((corpus.rejects.counts + build.dropped).items())),
        "dropped_by_script": {reason: dict(sorted(scripts.items())) for reason, scripts in build.scripts.items()},
        "overlaps": len(build.matches) if args.evaluation_sets else None,
    }
    write_manifest(output, facts)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The `cpt` command: build the folder, or reuse it if it holds exactly this."""
    tokenizer = DocumentTokenizer(args.tokenizer, args.eod_token, args.parse_special_tokens, args.tokenizer_library)
    args.evaluation_sets = overlap.read_evaluation_sets(args)
    corpus = Corpus(args)
    request = cpt_request(args, tokenizer, corpus)
    exists = args.output.exists()
    if exists:
        hashes = {group: found for group, found in corpus.hashes().items() if found}
        exists = reusable(args.output, {**request, "inputs": hashes})
    if exists:
        remove_leftovers(args.output)
    else:
        paths = {group: [str(source.path) for source in sources] for group, sources in corpus.groups.items()}
        identity = {
            **request,
            "paths": paths,
            "block_bytes": args.block_bytes,
            "library": args.tokenizer_library,
        }
        with resuming(args.output, identity) as work:
            build_cpt(args, tokenizer, corpus, request, work)
    manifest = check_cheaply(args.output)
    splits = {name: {key: split[key] for key in ("documents", "tokens")} for name, split in manifest["splits"].items()}
    facts = {key: manifest[key] for key in ("vocab_size", "eod", "dropped")}
    return {"output": str(args.output), "reused": exists, "splits": splits, **facts}


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `cpt`."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="append",
        required=True,
        metavar="FILE",
        help=".jsonl or .txt (also .gz, .zst), .parquet, folders of datasets.save_to_disk. For a blend give --input "
        "NAME=WEIGHT FILE... for each source",
    )
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face folder with tokenizer.json")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    valid = parser.add_mutually_exclusive_group(required=True)
    valid.add_argument("--valid-fraction", type=fraction, metavar="F", help="hold out this share of documents, by hash")
    valid.add_argument(
        "--valid-input", type=Path, nargs="+", metavar="FILE", help="files that are the validation split"
    )
    add("--text-key", default="text", metavar="KEY", help="field of a record that holds the text (text)")
    add("--eod-token", default="<|endoftext|>", metavar="TOKEN", help="document-end token (<|endoftext|>)")
    add(
        "--parse-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read special tokens spelled out in a document as tokens; else they are ordinary text, so that a document "
        "about <|endoftext|> does not end there (no)",
    )
    add(
        "--keep-duplicates",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep documents that are equal but for case and white space, except those of the validation split (no)",
    )
    add(
        "--near-duplicates",
        type=fraction,
        metavar="S",
        help="also leave out documents whose similarity (Jaccard, five words, or characters where words are not "
        "spaced) to an earlier one is S or more; 0.8 is usual (off)",
    )
    add("--seq-length", type=positive, metavar="N", help="refuse a split smaller than one sample of N tokens (off)")
    overlap.add_options(parser)
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a bad record: stop, or leave it out and count it (fail)",
    )
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (one a core)")
    add(
        "--block-bytes",
        type=positive,
        default=BLOCK_BYTES,
        metavar="N",
        help=f"text that a process takes at once, and that a killed run may lose ({BLOCK_BYTES})",
    )
    add("--tokenizer-library", choices=LIBRARIES, default=LIBRARIES[0], help=f"what encodes ({LIBRARIES[0]})")
