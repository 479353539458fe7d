"""`prepare_data.py rl`: prompts and labels for reinforcement learning, checked.

A record holds `prompt`, a string or a list of messages, and `label`, the right answer. What is kept:

    FOLDER/SPLIT.jsonl   one object a line: id (of the question), prompt (messages), label (string), source (file, line)

A wrong label teaches a wrong answer: labels are read here as the reward will read them (math-verify), and prompts that
come again with another label are refused.
"""

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infir2.data import pipeline
from infir2.data.chat import BadMessages, ChatTokenizer, Messages, Rendering, check_messages, label_text
from infir2.data.pipeline import (
    Converted,
    Outcome,
    Outcomes,
    OverlapFinder,
    Records,
    Refused,
    question_digest,
    run_task,
)
from infir2.data.pretraining import positive
from infir2.data.sources import Block
from infir2.indexed import DataError

VERSION = 1  # raise it when the same request would give other bytes
PARSING_SECONDS = 5

NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
TEXT = re.compile(r"\\text\s*\{[^}]*\}")
WRAPPING = re.compile(r"\\boxed|\\[()\[\]]|[${}\s]")
WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3}")  # three letters that are no LaTeX command
# math-verify reads "10 000" as 10 times 0, "1 2" as 3, "1e5" as 5e, "3..4" as 3.
MISREAD = re.compile(r"\d\s+\d|\d[eE][-+]?\d|\.\.|\n")


def is_mathematics(label: str) -> bool:
    """Whether all of a label is a number or an expression that math-verify reads as it is written.

    math-verify looks for an answer inside a text and takes words for products of letters, so words are refused here.
    Uses SIGALRM: only in the main thread of a process.
    """
    if NUMBER.fullmatch(label):
        return True
    formula = TEXT.sub(" ", label)  # units and the like
    if not WRAPPING.sub("", formula) or WORD.search(formula) or MISREAD.search(label):
        return False
    found = _parsed(label)
    return bool(found) and not isinstance(found[0], str) and str(found[0]) not in ("zoo", "nan")


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
    rendering: Rendering


class Prompts:
    """Converter of blocks of prompts; the value of a Converted is (line of output, tokens, typed special tokens)."""

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
                label = self._label(record)
                found.append(Prompt(where, messages, label, self.tokenizer.prompt_rendering(messages)))
            except BadMessages as error:
                found.bad(where, error.reason, error.found)
        renderings = [entry.rendering for entry in found if isinstance(entry, Prompt)]
        lengths = (encoded.tokens.size for encoded in self.tokenizer.encode(renderings))
        return [self._outcome(entry, next(lengths)) if isinstance(entry, Prompt) else entry for entry in found]

    def _field(self, record: dict[str, Any], option: str) -> Any:
        key = getattr(self.args, f"{option}_key")
        if key not in record:
            found = f"field {key!r} is missing, found {sorted(record)} (--{option}-key names the field)"
            raise BadMessages(f"no {option}", found)
        return record[key]

    def _messages(self, record: dict[str, Any]) -> Messages:
        prompt = self._field(record, "prompt")
        messages = check_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if messages[-1]["role"] == "assistant":
            raise BadMessages("roles out of order", "a prompt ends before the assistant's turn, this one with it")
        return messages

    def _label(self, record: dict[str, Any]) -> str:
        label = label_text(self._field(record, "label"))
        if self.args.label_kind == "math" and not is_mathematics(label):
            raise BadMessages(
                "label does not parse", f"{label!r:.80} is no number or formula (--label-kind text takes any)"
            )
        return label

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
        }
        value = (line, length, prompt.rendering.typed_special_tokens)
        return Converted(prompt.where, question, question, value, self.overlaps.find(prompt.where, prompt.messages))


@dataclass
class Kept:
    """The first record of a question."""

    split: str
    where: str
    line: dict[str, Any]
    tokens: int
    typed_special_tokens: int
    disputed: bool = False


def distinct(args: argparse.Namespace, records: Records) -> list[Kept]:
    """One record for each question; memory grows with the number of questions. Those whose labels disagree are bad
    records, all of them."""
    kept: dict[bytes, Kept] = {}
    for split, record in records.converted(partial(Prompts, args)):
        line, tokens, typed = record.value
        first = kept.setdefault(record.question, Kept(split, record.where, line, tokens, typed))
        if first.line is line:
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
            file.writelines(json.dumps(entry.line, ensure_ascii=False) + "\n" for entry in chosen)
        lengths = Counter(entry.tokens.bit_length() - 1 for entry in chosen)
        facts[split] = {
            "prompts": len(chosen),
            "longest": max(entry.tokens for entry in chosen),
            "prompts_by_length": {str(1 << power): count for power, count in sorted(lengths.items())},
        }
    return {"prompts": facts, "counted": {"special tokens typed": sum(entry.typed_special_tokens for entry in kept)}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rl`."""
    pipeline.add_arguments(parser)
    add = parser.add_argument
    add("--prompt-key", default="prompt", metavar="KEY", help="field that holds the prompt, or its messages (prompt)")
    add("--label-key", default="label", metavar="KEY", help="field that holds the right answer (label)")
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
        "label_kind": args.label_kind,
        "max_prompt_length": args.max_prompt_length,
        "over_long": args.over_long,
    }
    return run_task(args, options, partial(write_prompts, args))
