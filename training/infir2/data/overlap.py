"""Overlap of training data with evaluation sets, and `prepare_data.py decontaminate`.

A problem is found where its statement stands in a text, as a whole, in whatever writing: texts are compared in a
canonical form without case, white space, punctuation, mark-up and LaTeX's alternatives (`canonical`). What is looked
for is text, so a paraphrase, a translation, or the same problem with other numbers is not found.

    candidates  Windows of WINDOW characters (n-grams) of the text that are windows of the problem too, looked up by
                hash. Windows that more than COMMON problems share say nothing and are not counted.
    match       Where enough of a problem's windows lie close together, problem and text are aligned there (fewest
                insertions and deletions). A match has a similarity of NEAR or more and the same digits, but for numbers
                that count its sentences: a template with other numbers is another problem. RUN characters in one run
                are a match too: a long statement without its examples.
    short       A problem of fewer than SHORT characters must stand there character for character, and the text must not
                go on as if the expression were longer ("Find 0+3" is not in "find 0+3+5").
"""

import argparse
import base64
import html
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from rapidfuzz.distance import Indel
from tqdm import tqdm

from infir2.data.sources import COMPRESSIONS, Rejects, Source, open_sources
from infir2.indexed import DataError
from infir2.receipts import building, tool_facts, write_manifest

VERSION = 2  # raise it when other texts would match
WINDOW = 16
COMMON = 8
SHARE = 0.25  # of a problem's windows that must lie close together before the texts are aligned
NEAR, NEAR_BRIEF, BRIEF = 0.8, 0.9, 100  # least similarity; for problems below BRIEF characters
SHORT = 32
RUN = 300
COUNT = 10  # characters at the beginning of a sentence in which a number, `Step 2:` and the like, may count it
DIGIT_EDITS = 0.02  # of a problem's digits may differ: none in fewer than 50
EXCERPT = 300  # characters
KEPT_RECORDS = "kept.jsonl"
KEYS = ("problem", "question", "Question", "question_content", "prompt", "text", "messages")
TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"

log = logging.getLogger("prepare_data")

# The canonical form

GREEK = {
    chr(code): unicodedata.name(chr(code)).split()[-1].lower() for code in (*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA))
}
AT_MOST, AT_LEAST, UNEQUAL = "\x11", "\x12", "\x13"  # stand for signs that ASCII lacks: ASCII text is handled faster
SYMBOLS = str.maketrans(
    GREEK
    | dict.fromkeys("−‐‑‒", "-")
    | dict.fromkeys("—–×·⋅∗÷°∘→⇒↦″′…", " ")
    | {"≤": AT_MOST, "≥": AT_LEAST, "≠": UNEQUAL}
    | {"√": " sqrt ", "∞": " infty ", "∠": " angle ", "△": " triangle ", "∆": " delta ", "∑": " sum ", "∏": " prod "}
    | {"∫": " int ", "∈": " in ", "∪": " cup ", "∩": " cap ", "≡": " equiv ", "≈": " approx ", "⊥": " perp "}
    | {"∥": " parallel ", "±": " pm ", "⌊": " lfloor ", "⌋": " rfloor ", "⌈": " lceil ", "⌉": " rceil ", "ℓ": " ell "}
)
# LaTeX commands that change only how something looks, or that plain text writes as a mark which is dropped.
LOOKS = frozenset(
    """
    left right middle big bigl bigr bigg biggl biggr limits nolimits displaystyle textstyle scriptstyle rm bf it sf tt
    cal text textbf textit textrm textsf texttt textup textnormal emph underline mbox hbox mathrm mathbf mathit mathsf
    mathtt mathbb mathcal mathscr mathfrak mathop mathrel mathbin boldsymbol bm operatorname overline bar widehat hat
    vec overrightarrow widetilde tilde frac dfrac tfrac cfrac over quad qquad hspace vspace phantom thinspace enspace
    ldots dots cdots dotsc dotsb vdots ddots cdot times ast star circ degree colon lbrace rbrace lbrack rbrack langle
    rangle vert lvert rvert mid to rightarrow longrightarrow implies mapsto prime tag label nonumber notag hline item
    par noindent centering displaylines slash div percent space newline linebreak
    """.split()
)
SAME = {
    "leq": AT_MOST, "le": AT_MOST, "leqslant": AT_MOST, "geq": AT_LEAST, "ge": AT_LEAST, "geqslant": AT_LEAST,
    "neq": UNEQUAL, "ne": UNEQUAL, "lt": "<", "gt": ">", "bmod": "mod", "pmod": "mod", "dbinom": "binom",
    "tbinom": "binom", "choose": "binom", "varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta",
    "measuredangle": "angle",
}  # fmt: skip
LATEX = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|(\\[a-z]+)|\\([^a-z])")  # environments, commands, escaped marks
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,31}\d{0,2});")  # of HTML, also &amp;#36;
LAYOUT = re.compile(r"^[ \t]*[-*+>#]+(?=\s)", re.MULTILINE)  # bullets, quotes, headings
HYPHEN = re.compile(r"-(?<=[^\W\d_]{2}-)(?=[^\W\d_]{2})")
END = "\x1e"  # of a sentence; white space to Python
ENDS = re.compile(r"[.?!;:]+(?=\s|$)|\n")
KEPT = "+-=<>" + AT_MOST + AT_LEAST + UNEQUAL + END
DROPPED = re.compile(rf"(?:[^\w{re.escape(KEPT)}]|_)+")
ASCII_DROPPED = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) in KEPT)}


def canonical(text: str) -> str:
    r"""The text as it is compared: words, digits, + - = < > and AT_MOST and so on, spaces between, END after sentences.

    Unicode NFKC and case folded. Dollar signs, braces, `\left`, `\text`, `\dfrac` and the like, thousands separators,
    and other marks are gone; a symbol, its LaTeX command and its entity of HTML become the same.
    """
    for _ in range(2):  # an entity may itself be written with one
        if "&" in text:
            text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    if not text.isascii():
        text = text.translate(SYMBOLS)
    if "\\" in text:
        text = LATEX.sub(_plain, text)
    text = LAYOUT.sub(" ", text)
    text = text.replace("<=", AT_MOST).replace(">=", AT_LEAST).replace("!=", UNEQUAL).replace("->", " ")
    text = HYPHEN.sub(" ", ENDS.sub(END, text))
    return text.translate(ASCII_DROPPED) if text.isascii() else DROPPED.sub(" ", text)


def _plain(match: re.Match[str]) -> str:
    command, mark = match[1], match[2]
    if command is None:
        return " \n" if mark == "\n" else " "
    name = command[1:]
    return " " if name in LOOKS else f" {SAME.get(name, name)} "


def squeezed(form: str) -> str:
    """A canonical form without its spaces: what windows are taken from."""
    return "".join(form.split())


def window_hashes(text: str) -> np.ndarray:
    """Polynomial hashes of all windows of WINDOW characters: uint64 [len(text) - WINDOW + 1], empty if too short."""
    encoding, width = ("ascii", "u1") if text.isascii() else ("utf-32-le", "<u4")
    codes = np.frombuffer(text.encode(encoding), width)
    hashes = codes.astype(np.uint64)
    if hashes.size < WINDOW:
        return np.empty(0, np.uint64)
    width, power = 1, 0x9E3779B97F4A7C15
    while width < WINDOW:  # windows of twice the width, from two that touch
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        width, power = 2 * width, power * power % 2**64
    return hashes * np.uint64(0xFF51AFD7ED558CCD)  # the high bits, which are looked up first, depend on all


# Evaluation sets


@dataclass(frozen=True)
class Problem:
    """A problem of an evaluation set: where it stands (file and line), and its statement."""

    where: str
    text: str


@dataclass(frozen=True)
class EvaluationSets:
    """The problems to look for, and the receipts of the files that they come from."""

    problems: list[Problem]
    receipts: list[dict[str, Any]]

    def request(self) -> dict[str, Any]:
        """What decides the matches, for a manifest's request."""
        return {"version": VERSION, "files": [receipt["sha256"] for receipt in self.receipts]}


def read_evaluation_sets(args: argparse.Namespace) -> EvaluationSets | None:
    """The evaluation sets of the options (`add_options`); None without --against. Refuses files without problems."""
    if not args.against:
        return None
    sources = open_sources(file for path in args.against for file in _files(path))
    rejects = Rejects("fail")
    problems = []
    for source in sources:
        found = [
            Problem(where, _statement(record, where, args.against_key)) for where, record in source.records(rejects)
        ]
        if not found:
            raise DataError(f"{source.path} holds no problems.")
        problems += found
    return EvaluationSets(problems, [source.receipt() for source in sources])


def _files(path: Path) -> list[Path]:
    """The files of an evaluation set: the path itself, or the .jsonl and .parquet below a folder."""
    if not path.is_dir() or (path / "state.json").is_file():
        return [path]
    endings = (".parquet", ".jsonl", *(f".jsonl{ending}" for ending in COMPRESSIONS))
    files = sorted(file for file in path.rglob("*") if file.name.endswith(endings))
    if not files:
        raise DataError(f"{path} holds no .jsonl or .parquet file. Name the file or folder of an evaluation set.")
    return files


def _statement(record: dict[str, Any], where: str, key: str | None) -> str:
    keys = [name for name in ((key,) if key else KEYS) if name in record]
    if not keys:
        raise DataError(f"{where}: no field {key or ' or '.join(KEYS)}, found {sorted(record)}. Name it: --against-key")
    text = "\n".join(strings(record[keys[0]]))
    if not squeezed(canonical(text)):
        raise DataError(f"{where}: field {keys[0]!r} holds no text. Name another: --against-key")
    return text


def strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, in order; of a chat message only its content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        chosen = [value["content"]] if "role" in value and "content" in value else value.values()
        for part in chosen:
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


# Finding


@dataclass(frozen=True)
class Match:
    """A problem found in a text: how alike they are (1 is the same but for the canonical form), and both excerpts."""

    problem: str
    kind: str  # verbatim, near duplicate, run, short
    similarity: float
    problem_excerpt: str
    text_excerpt: str

    def facts(self, where: str) -> dict[str, Any]:
        """Entry of a report: the match with the place of the text."""
        return {"where": where, **asdict(self)}


class Contamination:
    """Finds the problems of evaluation sets in texts. Building it takes about 100 bytes a character of the problems."""

    def __init__(self, sets: EvaluationSets) -> None:
        self.problems = sets.problems
        forms = [canonical(problem.text) for problem in sets.problems]
        self._streams = [squeezed(form) for form in forms]
        self._sentences = [_sentence_starts(form) for form in forms]
        self._short = [(index, stream) for index, stream in enumerate(self._streams) if len(stream) < SHORT]
        self._index(*self._windows())

    def _windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hash, problem and position of every window of the problems that are not short."""
        rows = [
            (hashes, np.full(hashes.size, index, np.int32), np.arange(hashes.size, dtype=np.int32))
            for index, stream in enumerate(self._streams)
            if len(stream) >= SHORT
            for hashes in (window_hashes(stream),)
        ]
        empty = (np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int32))
        hashes, owners, places = (np.concatenate(column) for column in zip(empty, *rows, strict=True))
        return hashes, owners, places

    def _index(self, hashes: np.ndarray, owners: np.ndarray, places: np.ndarray) -> None:
        """Set the sorted index, with a window once for each problem, without those of more than COMMON problems."""
        order = np.lexsort((places, owners, hashes))
        hashes, owners, places = hashes[order], owners[order], places[order]
        once = np.ones(hashes.size, bool)
        once[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        hashes, owners, places = hashes[once], owners[once], places[once]
        _, which, problems = np.unique(hashes, return_inverse=True, return_counts=True)
        telling = problems[which] <= COMMON
        self._hashes, self._owners, self._places = hashes[telling], owners[telling], places[telling]
        self._counts = np.bincount(self._owners, minlength=len(self.problems))
        self._shift = np.uint64(64 - max(16, int(self._hashes.size * 16).bit_length()))
        self._table = np.zeros(1 << (64 - int(self._shift)), bool)
        self._table[self._hashes >> self._shift] = True

    def find(self, text: str) -> list[Match]:
        """The problems that stand in `text`, in the order of the evaluation sets."""
        form = canonical(text)
        stream = squeezed(form)
        found = [self._match_short(index, form, text) for index, short in self._short if short in stream]
        found += [self._match(index, stream, hits, text) for index, hits in self._candidates(stream)]
        return [match for match in found if match is not None]

    def _candidates(self, stream: str) -> Iterator[tuple[int, np.ndarray]]:
        """Problems of which many windows lie close together, and where: int64 [hits, 2], in text and in problem."""
        hashes = window_hashes(stream)
        places = np.flatnonzero(self._table[hashes >> self._shift])
        low = np.searchsorted(self._hashes, hashes[places], "left")
        counts = np.searchsorted(self._hashes, hashes[places], "right") - low
        if not counts.any():
            return
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(low, counts) + within
        owners = self._owners[entries]
        hits = np.stack([np.repeat(places, counts), self._places[entries]], axis=1)
        for index in np.unique(owners):
            near = _densest(hits[owners == index], int(1.5 * len(self._streams[index])))
            if np.unique(near[:, 1]).size >= SHARE * self._counts[index]:
                yield int(index), near

    def _match(self, index: int, stream: str, hits: np.ndarray, text: str) -> Match | None:
        problem = self._streams[index]
        aligned = _on_main_diagonal(hits, len(problem) // 4)
        first, last = aligned[np.argmin(aligned[:, 1])], aligned[np.argmax(aligned[:, 1])]
        start = max(0, int(first[0] - first[1]))
        end = max(start, int(last[0] - last[1]) + len(problem))
        window = stream[start:end]
        similarity = Indel.normalized_similarity(problem, window)
        alike = similarity >= (NEAR if len(problem) >= BRIEF else NEAR_BRIEF) and _same_digits(
            problem, window, self._sentences[index], stream[max(0, start - COUNT) : start]
        )
        if not alike and _longest_run(hits) < RUN:
            return None
        kind = "verbatim" if similarity == 1 else "near duplicate" if alike else "run"
        return self._found(index, kind, similarity, text, int(hits[:, 0].min()))

    def _match_short(self, index: int, form: str, text: str) -> Match | None:
        problem = self._streams[index]
        letters = r"\s*".join(map(re.escape, problem))
        # Not inside a longer word or number, and not the beginning of a longer expression.
        pattern = rf"(?<!\w){letters}(?!\w)(?! *[\d+-])"
        whole = squeezed(form) == problem
        match = re.search(pattern, form) if len(problem) >= 6 else None
        if match is None and not whole:
            return None
        place = len(squeezed(form[: match.start()])) if match else 0
        return self._found(index, "short", 1.0, text, place)

    def _found(self, index: int, kind: str, similarity: float, text: str, place: int) -> Match:
        problem = self.problems[index]
        excerpt = _excerpt(text, place)
        return Match(problem.where, kind, round(similarity, 3), _excerpt(problem.text, 0), excerpt)


def _densest(hits: np.ndarray, length: int) -> np.ndarray:
    """The hits in the stretch of `length` characters of the text that holds most of them."""
    places = hits[:, 0]
    ends = np.searchsorted(places, places + length)
    best = int(np.argmax(ends - np.arange(places.size)))
    return hits[best : ends[best]]


def _on_main_diagonal(hits: np.ndarray, drift: int) -> np.ndarray:
    """The hits of the most frequent distance between text and problem, and of those up to `drift` from it.

    The others pair a phrase with its repetition.
    """
    shift = hits[:, 0] - hits[:, 1]
    values, counts = np.unique(shift, return_counts=True)
    return hits[np.abs(shift - values[np.argmax(counts)]) <= drift]


def _sentence_starts(form: str) -> np.ndarray:
    """Where the sentences of a canonical form begin in its squeezed form: int64 [sentences], ascending from 0."""
    lengths = [len(squeezed(sentence)) for sentence in form.split(END)]
    return np.unique(np.cumsum([0, *lengths[:-1]]))


def _same_digits(problem: str, window: str, sentences: np.ndarray, before: str) -> bool:
    """Whether the alignment inserts and deletes no digits, or few of many, those aside that count sentences.

    Numbers count where they are inserted at the beginnings of sentences (`sentences`, places in `problem`) and go up by
    one, from the one that stands `before` the window.
    """
    changed = placed = 0
    counts = [int(number) for number in re.findall(r"[0-9]{1,4}", before)[-1:]]
    for edit in Indel.opcodes(problem, window):
        if edit.tag == "delete":
            changed += sum(map(str.isdigit, problem[edit.src_start : edit.src_end]))
        elif edit.tag == "insert":
            inserted = window[edit.dest_start : edit.dest_end]
            numbers = re.findall(r"[0-9]{1,4}", inserted)
            start = sentences[np.searchsorted(sentences, edit.src_start, "right") - 1]
            if len(numbers) == 1 and edit.src_start - start < COUNT:
                counts = [*(counts if start else []), int(numbers[0])]
                placed += sum(map(str.isdigit, inserted))
            else:
                changed += sum(map(str.isdigit, inserted))
    counting = len(counts) > 1 and bool((np.diff(counts) == 1).all())
    return changed + (0 if counting else placed) <= DIGIT_EDITS * sum(map(str.isdigit, problem))


def _longest_run(hits: np.ndarray) -> int:
    """Characters in the longest stretch that is the same in problem and text."""
    shift = hits[:, 0] - hits[:, 1]
    order = np.lexsort((hits[:, 0], shift))
    places, shift = hits[order, 0], shift[order]
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(shift) != 0)) + 1
    return int(np.diff(np.concatenate([[0], breaks, [places.size]])).max()) + WINDOW - 1


def _excerpt(text: str, place: int) -> str:
    """About EXCERPT characters of the text from where its squeezed canonical form is at `place`."""
    passed = 0
    for word in re.finditer(r"\S+", text):
        if passed >= place:
            return text[word.start() : word.start() + EXCERPT]
        passed += len(squeezed(canonical(word[0])))
    return text[-EXCERPT:]


# Reports


def summary(matches: list[dict[str, Any]]) -> str:
    """One sentence on what was found."""
    texts, problems = (len({match[key] for match in matches}) for key in ("where", "problem"))
    return f"{texts} records overlap with {problems} problems of the evaluation sets"


def write_report(path: Path, matches: list[dict[str, Any]], sets: EvaluationSets) -> None:
    """Write PATH.json, for programs, and PATH.txt, for people: every match with both excerpts."""
    kinds = dict(Counter(match["kind"] for match in matches))
    report = {"against": sets.receipts, "problems": len(sets.problems), "kinds": kinds, "matches": matches}
    lines = [summary(matches) + "." if matches else "No overlap was found.", ""]
    for match in matches:
        lines += [
            f"{match['where']} holds {match['problem']} ({match['kind']}, similarity {match['similarity']:.3f})",
            f"    problem: {' '.join(match['problem_excerpt'].split())}",
            f"    text:    {' '.join(match['text_excerpt'].split())}",
            "",
        ]
    path.with_name(path.name + ".json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    path.with_name(path.name + ".txt").write_text("\n".join(lines), encoding="utf-8")


# Options, and the `decontaminate` command


def add_options(parser: argparse.ArgumentParser, action: str = "fail") -> None:
    """Options that other commands share; `action` is what happens without --drop and --fail (`overlap_action`)."""
    add = parser.add_argument
    add(
        "--against",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="evaluation sets to look for: .jsonl or .parquet files, or folders of them (AIME, GPQA, LiveCodeBench)",
    )
    add("--against-key", metavar="KEY", help=f"field that holds a problem (the first of {', '.join(KEYS)})")
    chosen = parser.add_mutually_exclusive_group()
    for name, words in {"drop": "leave out records that overlap", "fail": "stop if records overlap"}.items():
        text = f"with --against: {words}{' (this)' if name == action else ''}"
        chosen.add_argument(f"--{name}", dest="overlap_action", action="store_const", const=name, help=text)
    parser.set_defaults(overlap_action=action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `decontaminate`."""
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE", help="records: .jsonl (.gz, .zst) or .parquet")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make: the report; with --drop kept.jsonl")
    add("--text-key", metavar="KEY", help="field to search (every string of a record)")
    add_options(parser, action="report")
    add("--on-error", choices=("fail", "skip"), default="fail", help="at a bad record: stop, or leave it out (fail)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`prepare_data.py decontaminate`: report which records overlap; returns the counts."""
    sets = read_evaluation_sets(args)
    if sets is None:
        raise DataError("decontaminate needs --against: the evaluation sets to look for.")
    sources = open_sources(args.input)
    rejects = Rejects(args.on_error)
    with building(args.output) as folder:
        with (folder / KEPT_RECORDS).open("wb") as kept:
            records, matches = _search(sources, rejects, Contamination(sets), args.text_key, kept)
        if args.overlap_action != "drop":
            (folder / KEPT_RECORDS).unlink()
        write_report(folder / "overlap", matches, sets)
        facts = {
            **tool_facts(TOOL, VERSION, args.arguments),
            "request": {"task": "decontaminate", "against": sets.request(), "action": args.overlap_action},
            "inputs": [source.receipt() for source in sources],
            "records": records,
            "overlaps": len(matches),
            "dropped": dict(sorted(rejects.counts.items())),
        }
        write_manifest(folder, facts)
    log.info("%s", summary(matches) if matches else "no overlap was found")
    if matches and args.overlap_action == "fail":
        raise DataError(f"{summary(matches)}; {args.output}/overlap.txt shows them.")
    return {"output": str(args.output), "records": records, "overlaps": len(matches)}


def _search(
    sources: list[Source], rejects: Rejects, contamination: Contamination, key: str | None, kept: BinaryIO
) -> tuple[int, list[dict[str, Any]]]:
    """Number of records, and the matches; records without one are written to `kept`."""
    records, matches = 0, []
    total = sum(source.path.stat().st_size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="decontaminate", disable=None) as progress:
        for where, record, line in (entry for source in sources for entry in source.entries(rejects, progress)):
            if key is not None and key not in record:
                rejects.bad(where, "no text", f"field {key!r} is missing, found {sorted(record)} (--text-key names it)")
                continue
            records += 1
            found = contamination.find("\n".join(strings(record if key is None else record[key])))
            matches += [match.facts(where) for match in found]
            if not found:
                kept.write((_as_json(record) if line is None else line.rstrip(b"\r")) + b"\n")
    return records, matches


def _as_json(record: dict[str, Any]) -> bytes:
    """A row of a table in JSON, without its nulls: a table gives every row the fields of each."""
    return orjson.dumps({key: value for key, value in record.items() if value is not None}, default=_json_of)


def _json_of(value: Any) -> Any:
    """What a table holds that JSON lacks: decimals with all their digits, bytes as text or else in base 64."""
    if isinstance(value, Decimal):
        return orjson.Fragment(f"{value:f}")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeError:
            return base64.b64encode(value).decode("ascii")
    return str(value)
