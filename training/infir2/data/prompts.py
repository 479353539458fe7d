"""`prepare_data.py rl`: prompts and labels for reinforcement learning, checked.

A record holds `prompt`, a string or a list of messages, and `label`, the right answer; perhaps `system`, the text of a
system message, and `metadata`, an object for the reward. A key may name a field inside another one, with a dot between.
What is kept:

    FOLDER/SPLIT.jsonl   one object a line: id (of the question), prompt (messages), label (string), source (file and
                         line), and metadata (object) where the record has one

A wrong label teaches a wrong answer: labels are read here as the reward will read them (math-verify), and prompts that
come again with another label are refused.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infir2.data import pipeline
from infir2.data.chat import (
    BadMessages,
    ChatTokenizer,
    Messages,
    Rendering,
    check_messages,
    decoded,
    label_text,
    tools_of,
    with_system,
)
from infir2.data.pipeline import (
    Converted,
    Outcome,
    Outcomes,
    OverlapFinder,
    Records,
    Refused,
    asked,
    exact_digest,
    question_digest,
    run_task,
)
from infir2.data.pretraining import positive
from infir2.data.sources import Block
from infir2.indexed import DataError

VERSION = 3  # raise it when the same request would give other bytes
PARSING_SECONDS = 5

NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?", re.ASCII)
TEXT = re.compile(r"\\text\s*\{[^}]*\}")
WRAPPING = re.compile(r"\\boxed|\\[()\[\]]|[${}\s]")
WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3}")  # three letters that are no LaTeX command
# What math-verify reads beyond ASCII: pi, minus, times, empty set, degree. The rest it drops, or stops there.
READ = "\u03c0\u2212\u00d7\u2205\u00b0"
# What math-verify reads as something else: "10 000" as 10 times 0, "1_000" as 1, "0,05" as 0 and 5.
MISREAD = {
    "digits apart": re.compile(r"\d(?:\s|~|\\[ ,:;!])+\d|\n"),
    "an underscore after a digit": re.compile(r"\d[\s}]*\\?_"),
    "a number in exponent form": re.compile(r"\d[eE][-+]?\d"),
    "a number in another base": re.compile(r"\b0[xXbBoO][0-9A-Fa-f]"),
    "several decimal points": re.compile(r"\.\.|\.\d+\.\d"),
    "a comma that parts no thousands": re.compile(r",\s*0\d"),
    "a bar between digits": re.compile(r"\d\|\d"),
    "a power written with **": re.compile(r"\*\*"),
    "a signed exponent without braces": re.compile(r"\^\s*[-+]"),
    "an &": re.compile("&"),
    "an operator at its end": re.compile(r"[-+*/^]\W*$"),
    "a decimal comma": re.compile(r"\.\d{3},\d"),
}
LABEL_KEYS = ("label", "reward_model.ground_truth")  # the second is that of DAPO's and verl's data sets


def why_no_mathematics(label: str) -> str:
    """Why a label is no number or expression that math-verify reads as it is written; "" if it is one.

    math-verify looks for an answer inside a text and takes words for products of letters, so words are refused here.
    Uses SIGALRM: only in the main thread of a process.
    """
    if NUMBER.fullmatch(label):
        return ""
    formula = TEXT.sub(" ", label)  # units and the like
    for what, pattern in MISREAD.items():
        if pattern.search(label):
            return f"{what}, which math-verify misreads"
    unread = next((character for character in formula if not character.isascii() and character not in READ), None)
    if unread is not None:
        return f"{unread!r} ({unicodedata.name(unread, 'no name')}), which math-verify does not read: write it in ASCII"
    if WRAPPING.sub("", formula) and not WORD.search(formula):
        found = _parsed(label)
        if found and not isinstance(found[0], str) and str(found[0]) not in ("zoo", "nan"):
            return ""
    return "no number or formula"


def is_mathematics(label: str) -> bool:
    """Whether all of a label is a number or an expression that math-verify reads as it is written."""
    return not why_no_mathematics(label)


def _parsed(label: str) -> list[Any]:
    from math_verify import parse  # a second

    wrapped = label if label.startswith(("$", r"\(", r"\[", r"\boxed")) else f"${label}$"
    return parse(wrapped, parsing_timeout=PARSING_SECONDS)


def same_label(one: str, other: str, mathematics: bool) -> bool:
    """Whether two labels say the same: as strings, or as mathematics."""
    if one == other or not mathematics:
        return one == other
    from math_verify import verify

    return verify(_parsed(one), _parsed(other)) and verify(_parsed(other), _parsed(one))


@dataclass(frozen=True)
class Prompt:
    """A record on its way to a line of output."""

    where: str
    messages: Messages
    label: str
    metadata: dict[str, Any] | None
    rendering: Rendering


class Prompts:
    """Converter of blocks of prompts; the value of a Converted is (line of output, tokens, Rendering)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = ChatTokenizer(args.tokenizer, args.apply_chat_template_kwargs)
        self.args = args
        self.overlaps = OverlapFinder(args.evaluation_sets)

    def __call__(self, block: Block) -> list[Outcome]:
        """Outcomes of the block's records, in order."""
        found = Outcomes()
        for where, record in block.records(found):
            try:
                messages = self._messages(record)
                rendering = self.tokenizer.prompt_rendering(messages)
                found.append(Prompt(where, messages, self._label(record), self._metadata(record), rendering))
            except BadMessages as error:
                found.bad(where, error.reason, error.found)
        renderings = [entry.rendering for entry in found if isinstance(entry, Prompt)]
        lengths = (encoded.tokens.size for encoded in self.tokenizer.encode(renderings))
        return [self._outcome(entry, next(lengths)) if isinstance(entry, Prompt) else entry for entry in found]

    def _field(self, record: dict[str, Any], option: str, keys: Sequence[str]) -> Any:
        """The value of the first of the keys that the record has."""
        for key in keys:
            value = _nested(record, key)
            if value is not None:
                return value
        found = f"field {keys[0]!r} is missing, found {_keys(record)} (--{option}-key names the field)"
        raise BadMessages(f"no {option}", found)

    def _messages(self, record: dict[str, Any]) -> Messages:
        prompt = self._field(record, "prompt", [self.args.prompt_key])
        messages = check_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        messages = with_system(messages, record)
        if tools_of(record):
            raise BadMessages("tools", "definitions of tools are not given to the model in RL; leave such prompts out")
        if messages[-1]["role"] == "assistant":
            raise BadMessages("roles out of order", "a prompt ends before the assistant's turn, this one with it")
        return messages

    def _label(self, record: dict[str, Any]) -> str:
        label = label_text(self._field(record, "label", [self.args.label_key] if self.args.label_key else LABEL_KEYS))
        why = why_no_mathematics(label) if self.args.label_kind == "math" else ""
        if why:
            raise BadMessages("label does not parse", f"{label!r:.80}: {why} (--label-kind text takes any)")
        return label

    def _metadata(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The record's metadata, also from JSON in a string; None if there is none that is an object."""
        value = _nested(record, self.args.metadata_key)
        try:
            value = decoded(value, "metadata", "metadata")
        except BadMessages:  # some other text of that name
            return None
        return value if isinstance(value, dict) else None

    def _outcome(self, prompt: Prompt, length: int) -> Outcome:
        limit = self.args.max_prompt_length
        if limit is not None and length > limit:
            found = f"{length} tokens, --max-prompt-length is {limit} (--over-long drop leaves such prompts out)"
            return Refused(prompt.where, "over-long", found, by_choice=self.args.over_long == "drop")
        question = question_digest(prompt.messages)
        line = {
            "id": question.hex(),
            "prompt": prompt.messages,
            "label": prompt.label,
            "source": Path(prompt.where).name,
            **({} if prompt.metadata is None else {"metadata": prompt.metadata}),
        }
        value = (line, length, prompt.rendering)
        overlaps = self.overlaps.find(prompt.where, prompt.messages)
        return Converted(prompt.where, question, exact_digest(asked(prompt.messages)), value, overlaps)


def _nested(record: dict[str, Any], key: str) -> Any:
    """The value of a field, or of one inside others (`reward_model.ground_truth`); None if there is none."""
    if key in record:
        return record[key]
    outer, _, inner = key.partition(".")
    return _nested(record[outer], inner) if inner and isinstance(record.get(outer), dict) else None


def _keys(record: dict[str, Any]) -> list[str]:
    """The names of a record's fields, with those inside others."""
    inside = ([f"{key}.{inner}" for inner in part] if isinstance(part, dict) else [key] for key, part in record.items())
    return sorted(key for keys in inside for key in keys)


@dataclass
class Kept:
    """The first record of a question."""

    split: str
    where: str
    line: dict[str, Any]
    tokens: int
    rendering: Rendering
    disputed: bool = False


def distinct(args: argparse.Namespace, records: Records) -> list[Kept]:
    """One record for each prompt; memory grows with the number of prompts. Those whose labels disagree are bad
    records, all of them."""
    kept: dict[bytes, Kept] = {}
    ids: set[str] = set()
    for split, record in records.converted(partial(Prompts, args)):
        line, tokens, rendering = record.value
        first = kept.setdefault(record.identity, Kept(split, record.where, line, tokens, rendering))
        if first.line is line:
            if line["id"] in ids:  # another prompt that differs in the case of its symbols
                line["id"] = record.identity.hex()
            ids.add(line["id"])
            continue
        if same_label(first.line["label"], line["label"], args.label_kind == "math"):
            records.rejects.counts["duplicate"] += 1
        else:
            found = f"{line['label']!r} here and {first.line['label']!r} at {first.where} for the same prompt"
            records.rejects.bad(record.where, "labels disagree", found)
            records.rejects.counts["labels disagree"] += not first.disputed  # the first one is left out too
            first.disputed = True
    return [first for first in kept.values() if not first.disputed]


def write_prompts(args: argparse.Namespace, records: Records, tokenizer: ChatTokenizer, folder: Path) -> dict[str, Any]:
    """Write every split into `folder`; returns facts for the manifest. Refuses an empty split."""
    kept = distinct(args, records)
    facts = {}
    for split in records.splits():
        chosen = [entry for entry in kept if entry.split == split]
        if not chosen:
            raise DataError(
                f"the {split} split has no prompts; left out: {dict(records.rejects.counts)}. Give more prompts, "
                "another --valid-fraction, or --valid-input."
            )
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry.line, ensure_ascii=False, default=str) + "\n" for entry in chosen)
        lengths = Counter(entry.tokens.bit_length() - 1 for entry in chosen)
        facts[split] = {
            "prompts": len(chosen),
            "longest": max(entry.tokens for entry in chosen),
            "prompts_by_length": {str(1 << power): count for power, count in sorted(lengths.items())},
        }
    counted = Counter({"special tokens typed": sum(entry.rendering.typed_special_tokens for entry in kept)})
    for entry in kept:
        counted.update(entry.rendering.left_out)
    return {"prompts": facts, "counted": dict(counted)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rl`."""
    pipeline.add_arguments(parser)
    add = parser.add_argument
    add(
        "--prompt-key",
        default="prompt",
        metavar="KEY",
        help="field that holds the prompt, or its messages; A.B is B in A (prompt)",
    )
    add("--label-key", metavar="KEY", help=f"field that holds the right answer (the first of {', '.join(LABEL_KEYS)})")
    add(
        "--metadata-key",
        default="metadata",
        metavar="KEY",
        help="field that holds an object for the reward, or JSON of one (metadata)",
    )
    add(
        "--label-kind",
        choices=("math", "text"),
        default="math",
        help="what labels are: numbers and formulas, each of which must parse, or any text (math)",
    )
    add("--max-prompt-length", type=positive, metavar="N", help="tokens of a rendered prompt (no limit)")
    add("--over-long", choices=("fail", "drop"), default="fail", help="longer prompts: bad records, or left out (fail)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The `rl` command."""
    options = {
        "task": "rl",
        "pipeline": VERSION,
        "prompt_key": args.prompt_key,
        "label_key": args.label_key,
        "metadata_key": args.metadata_key,
        "label_kind": args.label_kind,
        "max_prompt_length": args.max_prompt_length,
        "over_long": args.over_long,
    }
    return run_task(args, options, partial(write_prompts, args))
