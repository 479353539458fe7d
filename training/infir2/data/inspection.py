"""`prepare_data.py inspect`: show a person what a model will learn from.

Prints samples of a folder of `cpt`, `sft` or `rl` with what is trained set apart from what is only read, and writes the
same as an HTML page that needs nothing beside it.
"""

import argparse
import html
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from infir2.data.chat import ChatTokenizer, read_tokenizer
from infir2.data.pretraining import positive
from infir2.data.samples import Samples
from infir2.files import write_text
from infir2.indexed import DataError, IndexedReader
from infir2.receipts import OWN_HASH, check_cheaply

LONGEST_CHARACTER = 4  # bytes, so at most as many tokens
SHOWN_TOKENS = 6000  # of one sample, unless asked for more
# Characters that would steer a terminal are shown as pictures; a line end keeps its break.
CONTROLS = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421", ord("\t"): "⇥", ord("\n"): "⏎\n"}
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that make whole characters; one token as a rule."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One sample: its number in the split, and its pieces; of a prompt the label too."""

    index: int
    pieces: list[Piece]
    tokens: int
    trained: int
    label: str | None = None


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int], mask: Sequence[bool]) -> Iterator[Piece]:
    """Cut tokens into pieces of whole characters, each trained or not as a whole."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pending: list[int] = []
    for place, (token, trained) in enumerate(zip(tokens, mask, strict=True)):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        unfinished = text.endswith("\ufffd") and len(pending) < LONGEST_CHARACTER
        more = place + 1 < len(tokens) and mask[place + 1] == trained and tokens[place + 1] not in special
        if not (unfinished and more):
            yield Piece(text, tuple(pending), bool(trained), token in special)
            pending = []


# Folders


class Folder:
    """A folder of prepared data, whatever its task, as samples to look at."""

    def __init__(self, folder: Path, split: str, tokenizer: Path | None, shown_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.manifest = check_cheaply(folder)
        self.task = self.manifest["request"].get("task")
        if self.task not in ("cpt", "sft", "rl"):
            raise DataError(f"{folder} was prepared for {self.task!r}: there is nothing to show of it.")
        splits = self.manifest["prompts" if self.task == "rl" else "splits"]
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}, only {', '.join(splits)} (--split).")
        self.facts: dict[str, Any] = splits[split]
        self.tokenizer_folder = self._tokenizer_folder(tokenizer)
        self.tokenizer = read_tokenizer(self.tokenizer_folder / "tokenizer.json")[1]
        self._shown_tokens = shown_tokens
        self._sample, self.count = self._reader()

    def _tokenizer_folder(self, given: Path | None) -> Path:
        path = given / "tokenizer.json" if given else Path(self.manifest["tokenizer"]["path"])
        if not path.is_file():
            raise DataError(f"{path} does not exist. Name the tokenizer's folder with --tokenizer.")
        found, wanted = read_tokenizer(path)[0], self.manifest["tokenizer"]["sha256"]
        if found != wanted:
            raise DataError(
                f"{self.folder} was prepared with a tokenizer.json of SHA-256 {wanted}, {path} has {found}. Name the "
                "right folder with --tokenizer."
            )
        return path.parent

    def _reader(self) -> tuple[Callable[[int], Shown], int]:
        if self.task == "sft":
            samples = Samples(self.folder, self.split)
            return lambda index: self._shown(index, *samples.sample(index)), len(samples)
        if self.task == "cpt":
            reader = IndexedReader(self.folder / self.split)
            return lambda index: self._document(index, reader.tokens(index)), reader.documents
        chat = ChatTokenizer(self.tokenizer_folder, self.manifest["request"]["apply_chat_template_kwargs"])
        return lambda index: self._prompt(index, chat), self.facts["prompts"]

    def sample(self, index: int) -> Shown:
        """Sample `index` of the split."""
        return self._sample(index)

    def _document(self, index: int, tokens: np.ndarray) -> Shown:
        return self._shown(index, tokens, np.ones(tokens.size, bool))

    def _prompt(self, index: int, chat: ChatTokenizer) -> Shown:
        with (self.folder / f"{self.split}.jsonl").open(encoding="utf-8") as file:
            line = json.loads(next(itertools.islice(file, index, None)))
        encoded = chat.encode([chat.prompt_rendering(line["prompt"])])[0]
        return self._shown(index, encoded.tokens, encoded.mask.astype(bool), line["label"])

    def _shown(self, index: int, tokens: np.ndarray, mask: np.ndarray, label: str | None = None) -> Shown:
        left_out = tokens.size - self._shown_tokens
        tail = tokens.size if left_out <= 0 else self._shown_tokens // 4
        head = tokens.size - tail - max(0, left_out)
        pieces = list(pieces_of(self.tokenizer, tokens[:head].tolist(), mask[:head].tolist()))
        if left_out > 0:
            pieces.append(Piece(f" ... {left_out:,} tokens are not shown (--tokens) ... ", (), False, False))
        pieces += pieces_of(self.tokenizer, tokens[tokens.size - tail :].tolist(), mask[tokens.size - tail :].tolist())
        return Shown(index, pieces, tokens.size, int(mask.sum()), label)


# Text


def headline(sample: Shown, task: str) -> str:
    """One line on a sample."""
    if task == "rl":
        return f"{task} prompt {sample.index} · {sample.tokens:,} tokens · label {sample.label!r}"
    share = f"{sample.trained:,} trained ({sample.trained / sample.tokens:.1%})"
    return f"{task} sample {sample.index} · {sample.tokens:,} tokens · {share}"


def as_text(sample: Shown, task: str, color: bool) -> str:
    """A sample for a terminal: runs of trained and of masked text, each line after the name of what it is."""
    lines = [headline(sample, task)]
    for trained, run in itertools.groupby(sample.pieces, key=lambda piece: piece.trained):
        name = "trained" if trained else "prompt" if task == "rl" else "masked"
        text = "".join(
            _colored("".join(piece.text for piece in pieces), trained, special, color)
            for special, pieces in itertools.groupby(run, key=lambda piece: piece.special)
        )
        for number, line in enumerate(text.removesuffix("\n").split("\n")):
            lines.append(f"{name if number == 0 else '':>8} │ {line}")
    return "\n".join(lines) + "\n"


def _colored(text: str, trained: bool, special: bool, color: bool) -> str:
    """Green for trained, dim for masked, reversed for special tokens; begun anew on every line."""
    text = text.translate(CONTROLS)
    if not color:
        return text
    code = ("32" if trained else "2") + (";7" if special else "")
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


# Page

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #fff; --ink: #22242a; --soft: #6b7078; --line: #dfdcd4;
  --trained: #d8f0d9; --trained-ink: #14401c; --special: #8a5a00; --bar: #4d9a5b; --rest: #d9d6cd; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #1e2126; --ink: #e4e5e7; --soft: #969ba4;
  --line: #34383f; --trained: #1d3d26; --trained-ink: #c9efd0; --special: #e5b45a; --bar: #5fb170; --rest: #3a3e46; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem; }
.figures section { flex: 1 1 22rem; min-width: 0; } article { margin: 1rem 0; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
table { border-collapse: collapse; } td { padding: .1rem 1.25rem .1rem 0; vertical-align: top; }
th { padding: .5rem 0 .1rem; text-align: left; font-weight: 400; color: var(--soft); }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: .75rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre span { color: var(--soft); border-radius: 2px; }
pre span:hover { outline: 1px solid var(--bar); }
.key span { padding: 0 .3rem; color: var(--soft); border-radius: 2px; }
pre span.t, .key span.t { background: var(--trained); color: var(--trained-ink); }
pre span.s, .key span.s { color: var(--special); font-weight: 600; }
"""


def as_page(folder: Folder, samples: Sequence[Shown], seed: int) -> str:
    """The HTML page; it refers to nothing outside itself."""
    title = html.escape(f"{folder.folder.name} · {folder.split}")
    sha256 = folder.manifest[OWN_HASH]
    note = f"{len(samples)} of {folder.count:,} {unit(folder.task)}, drawn with seed {seed}. Manifest {sha256[:16]}."
    return textwrap.dedent("""\
        <!doctype html>
        <html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
        <title>{title}</title><style>{style}</style></head><body>
        <h1>{title}</h1>
        <p class="soft">{task}: {note}</p>
        <div class="figures">{figures}</div>
        <p class="key">{key}</p>
        {samples}
        </body></html>
        """).format(
        title=title,
        style=STYLE,
        task=html.escape(str(folder.task)),
        note=html.escape(note),
        figures="".join(_figures(folder)),
        key=_key(folder.task),
        samples="\n".join(_article(sample, folder.task) for sample in samples),
    )


def unit(task: str) -> str:
    """What a folder of the task holds."""
    return {"cpt": "documents", "sft": "samples", "rl": "prompts"}[task]


def _key(task: str) -> str:
    trained = '<span class="t">trained</span> <span>masked: read, not trained</span>'
    parts = "<span>prompt</span>" if task == "rl" else trained
    return f'{parts} <span class="s">special token</span> <span>⏎ line end</span> <span>⇥ tab</span>'


def _article(sample: Shown, task: str) -> str:
    spans = "".join(
        f'<span class="{"t" if piece.trained else ""}{" s" if piece.special else ""}" '
        f'title="{" ".join(map(str, piece.ids))}">{html.escape(piece.text.translate(CONTROLS))}</span>'
        for piece in sample.pieces
    )
    head = html.escape(headline(sample, task))
    return f"<article><section><h2>{head}</h2><pre>{spans}</pre></section></article>"


def _figures(folder: Folder) -> Iterator[str]:
    """Counts, what share is trained, and lengths."""
    counts = {name: value for name, value in folder.facts.items() if isinstance(value, int)}
    noted = {name: count for name, count in folder.manifest.get("counted", {}).items() if count}
    left_out = {f"left out: {reason}": count for reason, count in folder.manifest.get("dropped", {}).items()}
    rows = _rows(counts) + ('<tr><th colspan="2">in all splits</th></tr>' if noted | left_out else "")
    yield f"<section><h2>Counts</h2><table>{rows}{_rows(noted | left_out)}</table></section>"
    share = {"cpt": 1.0, "sft": folder.facts.get("trained_share")}.get(folder.task)
    bar = "" if share is None else f"<h2>Trained tokens: {share:.1%}</h2>{share_bar(share)}"
    histogram = next((value for name, value in folder.facts.items() if name.endswith("_by_length")), {})
    title = f"<h2>{unit(folder.task).capitalize()} by tokens</h2>"
    yield f"<section>{bar}{title}{length_histogram(histogram)}</section>"


def _rows(counts: dict[str, int]) -> str:
    return "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{count:,}</td></tr>" for name, count in counts.items()
    )


def share_bar(share: float) -> str:
    """A bar of which `share`, 0 to 1, is filled, as SVG."""
    return (
        f'<svg viewBox="0 0 460 26" role="img" aria-label="{share:.1%} of the tokens are trained">'
        '<rect width="460" height="14" rx="3" style="fill:var(--rest)"/>'
        f'<rect width="{460 * share:.1f}" height="14" rx="3" style="fill:var(--bar)"/></svg>'
    )


def length_histogram(counts: dict[str, int]) -> str:
    """Bars over powers of two, as SVG; `counts` maps a power of two to the number of samples of so many tokens or more,
    but fewer than twice as many."""
    if not counts:
        return "<p>No lengths are recorded.</p>"
    powers = [int(key).bit_length() - 1 for key in counts]
    bins = range(min(powers), max(powers) + 1)
    width, height, most = min(90.0, 460 / len(bins)), 120, max(counts.values())
    parts = []
    for place, power in enumerate(bins):
        count = counts.get(str(1 << power), 0)
        tall = max(1.0, height * count / most) if count else 0.0
        left = place * width
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{height + 16 - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}" rx="2" '
            f'style="fill:var(--bar)"><title>{1 << power:,} to {(2 << power) - 1:,} tokens: {count:,}</title></rect>'
            f'<text x="{left + width / 2:.1f}" y="{height + 11 - tall:.1f}" text-anchor="middle">{count:,}</text>'
        )
    for place, power in enumerate([*bins, bins[-1] + 1]):  # the edges
        anchor = "start" if place == 0 else "end" if place * width > 440 else "middle"
        parts.append(f'<text x="{place * width:.1f}" y="{height + 31}" text-anchor="{anchor}">{1 << power:,}</text>')
    return f'<svg viewBox="0 0 460 {height + 36}" role="img" aria-label="lengths">{"".join(parts)}</svg>'


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR")
    add("-n", type=positive, default=5, metavar="N", help="samples to show, drawn at random (5)")
    add("--split", default="train", help="which split (train)")
    add("--seed", type=int, default=0, help="decides which samples are drawn (0)")
    add(
        "--tokens",
        type=positive,
        default=SHOWN_TOKENS,
        metavar="N",
        help=f"shown of one sample at most, from both ends ({SHOWN_TOKENS})",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="its folder (where it was when the data was prepared)")
    add("--html", type=Path, metavar="FILE", help="write the samples as a page too")
    add("--color", action=argparse.BooleanOptionalAction, help="colours (if standard output is a terminal)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The `inspect` command: prints samples; returns what was shown."""
    folder = Folder(args.folder, args.split, args.tokenizer, args.tokens)
    chosen = np.random.default_rng(args.seed).choice(folder.count, min(args.n, folder.count), replace=False)
    samples = [folder.sample(int(index)) for index in np.sort(chosen)]
    if args.html is not None:
        write_text(args.html, as_page(folder, samples, args.seed))
    color = sys.stdout.isatty() if args.color is None else args.color
    for sample in samples:
        print(as_text(sample, folder.task, color))
    shown = {
        "folder": str(args.folder),
        "task": folder.task,
        "split": args.split,
        "samples": [s.index for s in samples],
    }
    return {**shown, "html": args.html and str(args.html)}
