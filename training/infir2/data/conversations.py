"""`prepare_data.py sft`: conversations to tokens and loss masks for supervised fine-tuning.

A record holds `messages`, a list of {role, content}, and perhaps `tools`, definitions for the template, and `system`,
the text of a system message. Each becomes one sample: the tokens of its rendering through the
tokenizer's chat template, and a mask over those that are trained (infir2.data.chat says which). Files as in
infir2.data.samples.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from infir2.data import duplicates, pipeline
from infir2.data.chat import (
    BadMessages,
    ChatTokenizer,
    Encoded,
    Messages,
    Rendering,
    Tools,
    check_messages,
    check_record,
    tools_of,
    with_system,
    without_nulls_of_tables,
)
from infir2.data.pipeline import (
    Converted,
    Outcome,
    Outcomes,
    OverlapFinder,
    Records,
    Refused,
    exact_digest,
    question_digest,
    run_task,
    without_near_duplicates,
)
from infir2.data.pretraining import fraction, positive
from infir2.data.samples import mask_path
from infir2.data.sources import Block
from infir2.indexed import DataError, IndexedWriter

VERSION = 3  # raise it when the same request would give other bytes


@dataclass(frozen=True)
class Conversation:
    """A record on its way to a sample."""

    where: str
    messages: Messages
    tools: Tools
    rendering: Rendering


class Conversations:
    """Converter of blocks of conversations; the value of a Converted is (Encoded, whether it was cut)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = ChatTokenizer(args.tokenizer, args.apply_chat_template_kwargs)
        self.messages_key: str = args.messages_key
        self.last_only: bool = args.train_on == "last"
        self.max_length: int | None = args.max_length
        self.over_long: str = args.over_long
        self.near: bool = args.near_duplicates is not None
        self.overlaps = OverlapFinder(args.evaluation_sets)

    def __call__(self, block: Block) -> list[Outcome]:
        """Outcomes of the block's records, in order."""
        found = Outcomes()
        for where, record in block.records(found):
            try:
                messages, tools = without_nulls_of_tables(self._messages(record), tools_of(record))
                rendering = self.tokenizer.rendering(messages, self.last_only, tools)
                found.append(Conversation(where, messages, tools, rendering))
            except BadMessages as error:
                found.bad(where, error.reason, error.found)
        conversations = [entry for entry in found if isinstance(entry, Conversation)]
        samples = iter(self.tokenizer.encode([conversation.rendering for conversation in conversations]))
        return [self._outcome(entry, next(samples)) if isinstance(entry, Conversation) else entry for entry in found]

    def _messages(self, record: dict[str, Any]) -> Messages:
        if self.messages_key not in record:
            found = f"field {self.messages_key!r} is missing, found {sorted(record)} (--messages-key names the field)"
            raise BadMessages("no messages", found)
        check_record(record)
        return with_system(check_messages(record[self.messages_key]), record)

    def _outcome(self, conversation: Conversation, sample: Encoded) -> Outcome:
        where, messages, length = conversation.where, conversation.messages, sample.tokens.size
        over_long = self.max_length is not None and length > self.max_length
        if over_long and self.over_long != "truncate":
            found = f"{length} tokens, --max-length is {self.max_length} (--over-long drop or truncate)"
            return Refused(where, "over-long", found, by_choice=self.over_long == "drop")
        if over_long:
            sample = replace(sample, tokens=sample.tokens[: self.max_length], mask=sample.mask[: self.max_length])
        if not sample.mask.any():
            found = f"no token of {sample.tokens.size} is an assistant's"
            return Refused(where, "nothing to train on", found, by_choice=over_long)
        signature = None
        if self.near:
            text = "\n".join(message["content"] for message in messages)
            signature = duplicates.signatures([duplicates.normalised(text)])[0]
        parts = [str(part) for message in messages for _, part in sorted(message.items())]
        parts += map(str, conversation.tools)
        overlaps = self.overlaps.find(where, messages)
        return Converted(
            where, question_digest(messages), exact_digest(parts), (sample, over_long), overlaps, signature
        )


class SplitWriter:
    """Writes one split: PREFIX.bin, .idx and .mask; counts what the manifest says of it."""

    def __init__(self, prefix: Path, vocab_size: int, stack: ExitStack) -> None:
        self._tokens = stack.enter_context(IndexedWriter(prefix, vocab_size))
        self._mask = stack.enter_context(mask_path(prefix).open("wb"))
        self._trained_tokens = 0
        self._longest = 0
        self._lengths: Counter[int] = Counter()

    def add(self, sample: Encoded) -> None:
        """Append one sample."""
        self._tokens.add_document(sample.tokens)
        self._mask.write(sample.mask.tobytes())
        self._trained_tokens += int(sample.mask.sum())
        self._longest = max(self._longest, sample.tokens.size)
        self._lengths[sample.tokens.size.bit_length() - 1] += 1

    def facts(self) -> dict[str, Any]:
        """Counts; `documents_by_length` maps a power of two to the samples of so many tokens or
        more, but fewer than twice as many."""
        tokens = self._tokens.token_count
        return {
            "documents": self._tokens.document_count,
            "tokens": tokens,
            "trained_tokens": self._trained_tokens,
            "trained_share": self._trained_tokens / max(1, tokens),
            "longest": self._longest,
            "documents_by_length": {str(1 << power): count for power, count in sorted(self._lengths.items())},
        }


def distinct(args: argparse.Namespace, records: Records, folder: Path) -> Iterator[tuple[str, Converted]]:
    """Yield (split, record) of the conversations that stay; `folder` takes temporary files."""
    found = records.converted(partial(Conversations, args))
    if not args.keep_duplicates:
        found = _without_duplicates(found, records)
    if args.near_duplicates is not None:
        found = without_near_duplicates(found, args.near_duplicates, records.rejects, folder)
    return found


def _without_duplicates(found: Iterator[tuple[str, Converted]], records: Records) -> Iterator[tuple[str, Converted]]:
    seen: set[bytes] = set()
    for split, record in found:
        if record.identity in seen:
            records.rejects.counts["duplicate"] += 1
        else:
            seen.add(record.identity)
            yield split, record


def write_samples(args: argparse.Namespace, records: Records, tokenizer: ChatTokenizer, folder: Path) -> dict[str, Any]:
    """Write every split into `folder`; returns facts for the manifest. Refuses an empty split."""
    counted: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: SplitWriter(folder / split, tokenizer.vocab_size, stack) for split in records.splits()}
        for split, record in distinct(args, records, folder):
            sample, cut = record.value
            writers[split].add(sample)
            counted["truncated samples"] += cut
            counted["tokens across the beginning of a turn"] += sample.straddling
            counted["special tokens kept as text"] += sample.typed_special_tokens
            counted["turns not rendered in full"] += sample.shortened_turns
            counted.update(sample.left_out)
        splits = {split: writer.facts() for split, writer in writers.items()}
        for split, facts in splits.items():
            if facts["documents"] == 0:
                raise DataError(
                    f"the {split} split has no samples; left out: {dict(records.rejects.counts)}. Give more "
                    "conversations, another --valid-fraction, or --valid-input."
                )
    return {"splits": splits, "counted": dict(counted)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sft`."""
    pipeline.add_arguments(parser)
    add = parser.add_argument
    add("--messages-key", default="messages", metavar="KEY", help="field that holds the conversation (messages)")
    add("--train-on", choices=("all", "last"), default="all", help="assistant turns that are trained (all)")
    add("--max-length", type=positive, metavar="N", help="tokens of a sample (no limit)")
    add(
        "--over-long",
        choices=("fail", "drop", "truncate"),
        default="fail",
        help="longer samples: a bad record, left out, or cut at the end; all are counted (fail)",
    )
    add(
        "--keep-duplicates",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep conversations that are equal but for case and white space; else the first stays (no)",
    )
    add(
        "--near-duplicates",
        type=fraction,
        metavar="S",
        help="also leave out conversations whose similarity (Jaccard, five words, or characters where words are not "
        "spaced) to an earlier one is S or more (off)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The `sft` command."""
    options = {
        "task": "sft",
        "pipeline": VERSION,
        "messages_key": args.messages_key,
        "train_on": args.train_on,
        "max_length": args.max_length,
        "over_long": args.over_long,
        "keep_duplicates": args.keep_duplicates,
        "near_duplicates": args.near_duplicates,
    }
    return run_task(args, options, partial(write_samples, args))
