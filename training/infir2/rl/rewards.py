r"""Rewards of reinforcement learning: answers of a model, scored in processes of their own.

    with RewardPool("deepscaler", processes=4) as pool:
        scores = pool.score([Sample(prompt="6 * 12?", response="...</think> \\boxed{72}", label="72")])

Names (`--rm-type`): `deepscaler`, `deepscaler-no-think` and `math-verify` (REWARDS leads to the rules of each), and
`reasoning-gym:TASK`; or `package.module.function` (`--custom-rm-path`), a function from a Sample to a number or a
Score.

A response is data. It is never evaluated: deepscaler reads formulas with latex2sympy's grammar; math-verify does too,
and gives sympy's parser only what consists of digits and `+-*/^().`; the tasks of reasoning-gym whose scorers hand the
answer to `eval` get it only if its characters cannot call anything. What is left to fear is time and memory: every
sample is scored in a worker process with a deadline and limits of the kernel, so the worst that a response can do is
lose its own reward.

A worker is a fresh interpreter, as with multiprocessing's `spawn`: the caller has threads, CUDA and Ray's state, which
must not be forked. But multiprocessing (`forkserver` too) would import the caller's main module, which is all of
Megatron, into every worker, and starts nothing from a daemonic process; so this is a plain subprocess. Each worker
imports its libraries once, and has a socket of its own: killing one leaves no lock behind.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import logging
import math
import os
import queue
import re
import resource
import socket
import struct
import subprocess
import sys
import unicodedata
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Any

from infir2.evaluation.answers import after_thinking, boxed_answer, find_answer

logger = logging.getLogger(__name__)

LONGEST_RESPONSE = 1_000_000  # characters; of a longer response the end is read
LONGEST_FORMULA = 200  # characters; a longer answer of deepscaler's is compared as a string only
LONGEST_PARSED = 1_000  # characters that math-verify gets: a longer \boxed{...} is wrong, of other text it gets the end
START_SECONDS = 300  # imports on a busy machine or a network disk
MEMORY_BYTES = 4 << 30

GYM = "reasoning-gym:"


class RewardError(Exception):
    """No reward can be computed: an unknown name, a function that cannot be imported, workers that do not start."""


class Why(StrEnum):
    """What a reward rests on. CORRECT is a reward of at least 1, WRONG any other that was computed."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    TRUNCATED = "truncated"
    TIMED_OUT = "timed out"
    ERROR = "error"


@dataclass(frozen=True)
class Sample:
    """A response to score. `metadata` is what JSON can hold, None where the prompt has none; for reasoning-gym it is
    the item's own `metadata`, and the label the item's `answer`, which some tasks do not have. `opening`: what of the
    model's turn its chat template wrote, such as `<think>`. `system`: what the system message says. `truncated`: the
    response has no end."""

    prompt: str
    response: str
    label: str | int | float | None
    metadata: Mapping[str, Any] | None = None
    truncated: bool = False
    opening: str = ""
    system: str = ""


@dataclass(frozen=True)
class Score:
    """`answer` is the text that was judged, None where none was found; `detail` says what went wrong, for the log."""

    reward: float
    answer: str | None
    why: Why
    detail: str = ""


Reward = Callable[[Sample], Score]
CUT = Score(0.0, None, Why.TRUNCATED)  # of a response without an end: what it would have said is not known


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, equation 13; to be added to the reward.

    `length`, `limit` (L_max) and `buffer` (L_cache) in tokens. 0 up to limit - buffer, then linear down to -1 at
    `limit`, -1 above. Refuses a negative length and a buffer that is not in 0..limit.
    """
    if length < 0 or not 0 <= buffer <= limit:
        raise ValueError(f"length {length}, limit {limit}, buffer {buffer}: need length >= 0 and 0 <= buffer <= limit")
    if length > limit:
        return -1.0
    return min(0, limit - buffer - length) / max(1, buffer)


# ---------------------------------------------------------------------------------------------------------------------
# The answer in a response: infir2.evaluation.answers reads it


def _turn(sample: Sample) -> str:
    """What the model's turn holds: what the template wrote of it, and the response."""
    return sample.opening + sample.response


def _asking(sample: Sample) -> str:
    return f"{sample.system}\n{sample.prompt}"


def after_marker(turn: str) -> str:
    """What follows the last `</think>`, else the last `###Response`; nothing where there is neither."""
    for marker in ("</think>", "###Response"):
        if marker in turn:
            return after_thinking(turn.rpartition(marker)[2])
    return ""


def _label(sample: Sample) -> str:
    label = str(sample.label).strip()
    if not label or sample.label is None:
        raise ValueError(f"the label is {sample.label!r}; it must be a number or a text that is not empty")
    return label


def _judged(reward: float, answer: str | None) -> Score:
    return Score(float(reward), answer, Why.CORRECT if reward >= 1 else Why.WRONG)


# ---------------------------------------------------------------------------------------------------------------------
# deepscaler: strings in one spelling, then sympy

# Canonical names, and how they are written. The first ones only within \text{...}: 5m and 2s are formulas.
SHORT_UNITS = {
    "m": "m",
    "g": "g",
    "l": "l",
    "s": "s sec",
    "h": "h hr",
    "min": "min",
    "in": "in",
    "ft": "ft",
    "lb": "lb",
    "oz": "oz",
}
LONG_UNITS = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "meter metre",
    "km": "km kilometer kilometre", "kg": "kg kilogram", "g": "gram", "l": "liter litre", "lb": "pound", "oz": "ounce",
    "s": "second", "min": "minute", "h": "hour", "day": "day", "week": "week", "month": "month", "year": "year",
    "in": "inche inch", "ft": "foot feet", "yd": "yard", "mi": "mile", "degree": "degree", "dollar": "dollar",
    "cent": "cent", "percent": "percent", "unit": "unit", "mi/h": "mph", "km/h": "kph",
}  # fmt: skip
UNIT_NAMES = {
    spelling: name for table in (SHORT_UNITS, LONG_UNITS) for name, words in table.items() for spelling in words.split()
}
SIGN_UNITS = {"\\$": "dollar", "%": "percent", "\\%": "percent", "$": ""}  # every other sign is one of degrees
POWER = r"(?:\s*\^\s*\{?\d\}?)?"


TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
# 2\mathrm{e} has no unit, and of 5\text{ or 6} more than the unit would go
UNIT_TEXT = r"\\(?:text|textrm|mathrm|mbox)\s*\{(?!\s*[ei]\s*\})[^{}0-9]*(?:\^\s*\d)?[^{}0-9]*\}"
MEASURE = r"(?:(?:square|cubic|sq)\s+)?(?:{})s?" + POWER.replace("{", "{{").replace("}", "}}")
UNIT = MEASURE.format("|".join(" ".join(LONG_UNITS.values()).split()))
UNIT += rf"(?:\s*(?:/|per\s)\s*{MEASURE.format('|'.join(UNIT_NAMES))})*"
UNIT_PART = re.compile(
    rf"(?:(square|sq|cubic)\s+)?({'|'.join(sorted(UNIT_NAMES, key=len, reverse=True))})s?(?:\s*\^\s*\{{?(\d)\}}?)?"
)
SIGNS = re.compile(r"\\?[$%]|\u00b0|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
UNIT_AT_END = re.compile(rf"(?<=[\d}}])\s*(?:{UNIT_TEXT}|{UNIT}){POWER}\s*$")
SYMBOLS = {
    "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u00f7": r"\div ", "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
    "\u2248": r"\approx ", "\u2208": r"\in ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2228": r"\vee ",
    "\u2227": r"\wedge ", "\u2192": r"\to ", "\u2205": r"\emptyset ", "\u00b0": r"^{\circ}",
}  # fmt: skip
# Characters that LaTeX has a command for. Both readers of formulas know the command alone.
CHARACTERS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
        (r"[\u2212\u2013]", "-"),
        (f"[{''.join(SYMBOLS)}]", lambda match: SYMBOLS[match[0]]),
        (r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e\u2189])", " "),  # one and a half, not eleven halves
        (r"[\u00bc-\u00be\u2150-\u215e\u2189]", lambda match: unicodedata.normalize("NFKC", match[0])),
        (r"(\d+)\u2044(\d+)", r"\\frac{\1}{\2}"),
        (r"([\u221a\u221b\u221c])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))", r"\1{\2\3}"),
        (r"\u221a", r"\\sqrt"),
        (r"\u221b", r"\\sqrt[3]"),
        (r"\u221c", r"\\sqrt[4]"),
    )
]
# Applied in this order, and again until nothing changes: normalising twice is then the same as once.
SPELLINGS = CHARACTERS + [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"\\sqrt(\[\d\])?\s*\(([^()]*)\)", r"\\sqrt\1{\2}"),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\!|\{,\}(?=\d{3})", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"(?<!\\)\\[()\[\]]", ""),  # \( ... \) and \[ ... \]
        (SIGNS, ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
        (UNIT_AT_END, ""),
        (TEXT, r"\1"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt(\[\d\])?\s*(\d+)", r"\\sqrt\1{\2}"),
        (r"^\s*(-?(?:\d+\s+)?)(\d+)\s*/\s*(\d+)\s*$", r"\1\\frac{\2}{\3}"),  # 1/2 and 1 1/2
        (r"\\frac\{-(\d+)\}\{(\d+)\}", r"-\\frac{\1}{\2}"),
        (r"(?<![A-Za-z0-9\\]) | (?![A-Za-z0-9])", ""),  # spaces that part neither words nor digits
        (r"^[A-Za-z](?:=|\\in(?![A-Za-z]))|^\+|[.,;:]$", ""),
        (r"^\{([^{}]*)\}$", r"\1"),
        (r"^\(([A-Za-z])\)$", r"\1"),  # the letter of a choice
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"(?<![\d.,\s])0+(?=\d)", ""),  # but not those of 1,000
        (r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1"),
        (r"(?<![\d.])(\d+\.\d*[1-9])0+(?![\d.])", r"\1"),
    )
]
THOUSANDS = re.compile(r"(?<![\d.,])(?<!\d )\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)")
BRACKET = re.compile(r"[()\[\]]|\\[{}]")

INTEGER = re.compile(r"-?\d+")
NUMBER = re.compile(r"(-?)(?:(\d+(?:\.\d+)?)|\\frac\{(\d+)\}\{(\d+)\})")
RATIO = re.compile(r"-?(?:\d+|\\frac\{\d+\}\{\d+\})")
FORMULA = re.compile(rf"[0-9A-Za-z+\-*/^().{{}}\\| ]{{1,{LONGEST_FORMULA}}}")
COMMAND = re.compile(r"\\([A-Za-z]+|.?)")
ROOT = re.compile(r"\\sqrt\[\d\]")
COMMANDS = set("frac sqrt pi cdot times div sin cos tan cot sec csc arcsin arccos arctan log ln exp infty".split())
WORD = re.compile(r"[A-Za-z]{3}")
# latex2sympy reads "1 2" as a product, "1e5" as 5e and the first number of "1.2.3".
MISREAD = re.compile(r"\d \d|\d[eE][-+]?\d|\.\d*\.")
HUGE_POWER = re.compile(r"\^\s*\{?\s*-?\d{5}|\^\s*\{[^{}]*\^|\^[^{}]\^")


def in_latex(text: str) -> str:
    """A formula with LaTeX's commands in place of the characters that have one."""
    for pattern, replacement in CHARACTERS:
        text = pattern.sub(replacement, text)
    return text


def normalize(answer: str) -> str:
    r"""One spelling for the ways to write an answer. Idempotent.

    Spacing, `\left`, `\text{...}`, $, %, degrees and units go; `\dfrac`, 1/2 and a half in one character become
    `\frac{1}{2}`; 1,234 and 1234.0 become 1234; `x=` in front goes. Commas within brackets part the elements of a
    tuple: (1,234) is no number. Of a text longer than LONGEST_FORMULA, prose or a table, only the spacing is changed.
    """
    return _normalized(answer)[0]


def _normalized(answer: str) -> tuple[str, str]:
    """The text without its unit, and that unit's canonical name; empty without one, and for one that is not known."""
    previous, unit = None, ""
    while answer != previous:
        previous, answer = answer, " ".join(answer.split())
        if len(answer) > LONGEST_FORMULA:
            continue
        for pattern, replacement in SPELLINGS:
            if pattern in (SIGNS, UNIT_AT_END):
                unit = unit or next(filter(None, map(_unit_name, pattern.findall(answer))), "")
            answer = pattern.sub(replacement, answer)
        if not BRACKET.search(answer):
            answer = THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), answer)
        answer = answer if "\\" in answer else answer.lower()
    return answer, unit


def _unit_name(text: str) -> str:
    r"""The canonical name of what is written as a unit: km/h for `\text{ kilometers per hour}`."""
    text = re.sub(TEXT, r"\1", text).strip().lower()
    if text in SIGN_UNITS or "\u00b0" in text or "circ" in text:
        return SIGN_UNITS.get(text, "degree")
    parts = [UNIT_PART.fullmatch(part) for part in re.split(r"\s*(?:/|\bper\b)\s*", text)]
    if not all(parts):
        return ""
    powers = {"square": "2", "sq": "2", "cubic": "3", None: "1"}
    return "/".join(f"{UNIT_NAMES[part[2]]}^{part[3] or powers[part[1]]}" for part in parts).replace("^1", "")


MATRIX = re.compile(
    r"(?:[A-Za-z]=)?(?:\\begin\{(?P<kind>[pb]?|small)matrix\}|\\begin\{array\}\{[lcr|]*\})(?P<body>.*)"
    r"\\end\{(?:(?P=kind)matrix|array)\}",
    re.DOTALL,
)


def _matrix(text: str) -> list[list[str]] | None:
    r"""The elements of a matrix, by rows; round or square brackets are the same."""
    text = re.sub(r"\\left\s*[(\[]|\\right\s*[)\]]|[$]|^\s*\\\[|\\\]\s*$", "", text).strip()
    found = MATRIX.fullmatch(re.sub(r"^([A-Za-z])\s*=\s*", r"\1=", text))
    if found is None:
        return None
    return [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", found["body"]) if row.strip()]


def same_answer(label: str, answer: str) -> bool:
    r"""Whether two answers are the same as normalised strings, or sympy finds them equal, element by element.

    Brackets must be the same, and so must the order, but for sets in `\{...\}`. Fractions and integers must match
    exactly, so that 2/4 is not 1/2; and where the label is an integer, only that integer will do: not 2^3 for 8.
    Where both have a unit that is known it must be the same one: units are not converted. A percentage is its part of
    100, and also the number before its sign where the other one has no unit and is above 1: 50 % is 0.5 and 50, 0.5 %
    is not 0.5. What is longer than LONGEST_FORMULA is compared as a string. Can take any time: it is made for a
    worker.
    """
    rows, others = _matrix(label), _matrix(answer)
    if rows is not None and others is not None:
        return list(map(len, rows)) == list(map(len, others)) and all(
            map(same_answer, itertools.chain(*rows), itertools.chain(*others))
        )
    (label, unit), (answer, other) = _normalized(label), _normalized(answer)
    if unit and other:
        return unit == other and _same_value(label, answer)
    if unit == "percent":
        return _same_percentage(label, answer)
    if other == "percent":
        return _same_percentage(answer, label)
    return _same_value(label, answer)


def _same_percentage(percentage: str, number: str) -> bool:
    """`percentage` is what stands before the sign, `number` has no unit."""
    known = NUMBER.fullmatch(number)
    if not (known and abs(_fraction(number)) <= 1) and _same_value(percentage, number):
        return True
    part = rf"\frac{{{percentage}}}{{100}}"
    return _is_formula(part) and _is_formula(number) and _equal_in_sympy(part, number)


def _fraction(number: str) -> Fraction:
    """Of a text that NUMBER matches. Raises ZeroDivisionError for 1/0."""
    negative, whole, above, below = NUMBER.fullmatch(number).groups()
    value = Fraction(whole) if whole else Fraction(int(above), int(below))
    return -value if negative else value


def _same_value(label: str, answer: str) -> bool:
    """Of two that are normalised."""
    if label == answer:
        return True
    if max(len(label), len(answer)) > LONGEST_FORMULA:
        return False
    (*brackets, expected), (*other_brackets, found) = _elements(label), _elements(answer)
    if brackets != other_brackets or len(expected) != len(found):
        return False
    if len(expected) == 1 and not brackets[0]:
        return _same_element(label, answer)
    if brackets[0] != "\\{":
        return all(map(same_answer, expected, found))
    pairs = [[same_answer(one, other) for other in found] for one in expected]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _elements(text: str) -> tuple[str, str, list[str]]:
    """Opening bracket, closing bracket (both empty if none enclose all of the text), and what commas part inside."""
    enclosed = re.fullmatch(r"(\(|\[|\\\{)(.*?)(\)|\]|\\\})", text, re.DOTALL)
    opening, inner, closing = enclosed.groups() if enclosed else ("", text, "")
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\\[{}]|[()\[\]{},]", inner):
        if match[0] == "," and depth == 0:
            parts.append(inner[start : match.start()])
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0][-1] in "([{" else -1
        if depth < 0:  # as in (x+1)(x-1): the first bracket does not close at the end
            return "", "", [text]
    return opening, closing, [*parts, inner[start:]]


def _same_element(label: str, answer: str) -> bool:
    if INTEGER.fullmatch(label) or (RATIO.fullmatch(label) and RATIO.fullmatch(answer)):
        return False
    return _is_formula(label) and _is_formula(answer) and _equal_in_sympy(label, answer)


def _is_formula(text: str) -> bool:
    """Whether sympy may read a text: short, of few characters, known commands, no words (products of letters to it),
    nothing that is read otherwise than written, and no exponent that is a tower or has five digits."""
    return (
        FORMULA.fullmatch(ROOT.sub(r"\\sqrt", text)) is not None
        and all(command in COMMANDS for command in COMMAND.findall(text))
        and not WORD.search(COMMAND.sub(" ", text))
        and re.search(r"[\d+\-*/^\\]", text) is not None
        and not MISREAD.search(text)
        and not HUGE_POWER.search(text)
    )


def _equal_in_sympy(label: str, answer: str) -> bool:
    from latex2sympy2_extended import latex2sympy
    from sympy import nsimplify, simplify

    try:
        one, other = (nsimplify(latex2sympy(text), rational=True) for text in (label, answer))  # 0.1 is 1/10
        return bool(simplify(one - other) == 0)
    except MemoryError:
        raise
    except Exception:  # latex2sympy raises plain Exceptions on what it cannot read, sympy half a dozen kinds
        return False


def deepscaler(sample: Sample, judged_text: Callable[[str], str] = after_marker) -> Score:
    r"""1 if the answer after the last `</think>`, else after `###Response`, is the label; else 0.

    The answer is the last `\boxed{...}`, or stands in the form that the prompt asks for. Without either marker there is
    none. `deepscaler-no-think` is for models that do not think: the whole response is judged, unless it has thoughts.
    """
    label = _label(sample)
    if sample.truncated:
        return CUT
    answer = find_answer(judged_text(_turn(sample)), _asking(sample))
    if answer is None:
        return Score(0.0, None, Why.NO_ANSWER)
    return _judged(same_answer(boxed_answer(label) or label, answer), answer)


def _deepscaler(judged_text: Callable[[str], str]) -> Reward:
    _equal_in_sympy("\\frac{x^2}{2}", "0.5x^2")  # imports, and the tables that a first use makes
    return functools.partial(deepscaler, judged_text=judged_text)


# ---------------------------------------------------------------------------------------------------------------------
# math-verify


# What an answer to a label of one value does not have: relations, separators, alternatives; words.
SEVERAL = re.compile(
    r"[=<>,;|&\[\]]|\\[\\{}]|\\(?:pm|mp|ne|le|ge|lt|gt|approx|sim|simeq|equiv|to|in|cup|cap|vee|wedge|lor|land|mid|qquad)"
    r"(?![A-Za-z])"
)
WORDS = re.compile(r"(?<![A-Za-z])[A-Za-z]{2}")
STATED = re.compile(
    r"\banswer\s*(?:is|=|:)\s*:?((?:(?!\banswer\b).)+?)(?:[.!](?=\s|$)|$)", re.IGNORECASE | re.MULTILINE
)


def stated_answer(text: str) -> str | None:
    """X of the last "answer is X", to the end of its sentence or line."""
    found = STATED.findall(text[-10 * LONGEST_PARSED :])
    return (found[-1].strip(" \t*_:") or None) if found else None


def of_one_kind(label: str, answer: str) -> bool:
    """Whether an answer is one value where the label is: no equation, list or choice, and nothing in words. math-verify
    looks for the label in them, and would find it in `999 = 34`. Units that are known must be the same, and a set,
    which has no order, is no tuple or interval."""
    (label, unit), (answer, other) = _normalized(label), _normalized(answer)
    if unit and other and unit != other:
        return False
    opened = {_elements(text)[0] for text in (label, answer)}
    if "\\{" in opened and opened & {"(", "["}:
        return False
    for pattern in (SEVERAL, MISREAD):
        if pattern.search(answer) and not pattern.search(label):
            return False
    return bool(WORDS.search(COMMAND.sub(" ", label))) or not WORDS.search(COMMAND.sub(" ", answer))


def _math_verify() -> Reward:
    r"""1 if math-verify finds the label equal to the answer outside thoughts: the last `\boxed{...}`, what stands in
    the form that the prompt asks for, or, where there is neither, X of the last "answer is X". Where the label is one
    value the answer must be one too (`of_one_kind`). A truncated response has no answer."""
    from math_verify import parse, verify

    # Its own time limit is SIGALRM, which a loop in C does not notice; the worker's deadline does. It warns about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def reward(sample: Sample) -> Score:
        label = in_latex(_label(sample))
        wrapped = label if label.startswith(("$", r"\(", r"\[", r"\boxed")) else f"${label}$"
        # The label comes first in `verify`: the comparison is not symmetric.
        gold = parse(wrapped, parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot read the label {label[:100]!r}")
        if sample.truncated:
            return CUT
        text = after_thinking(_turn(sample))
        answer = find_answer(text, _asking(sample))
        if answer is None and r"\boxed" not in text:
            answer = stated_answer(text)
        if answer is None:
            return Score(0.0, None, Why.NO_ANSWER)
        if len(answer) > LONGEST_PARSED or not of_one_kind(boxed_answer(label) or label, answer):
            return Score(0.0, answer, Why.WRONG)
        formula = in_latex(answer).rstrip(".")
        found = parse(f"\\boxed{{{formula}}}", parsing_timeout=None)
        return _judged(bool(found) and verify(gold, found, timeout_seconds=None), answer)

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# reasoning-gym

# The scorers of these tasks evaluate the answer as Python. It reaches them only if all of it matches. LISTS has no
# parentheses, dots and braces, so nothing is called or looked up; the others have no quotes, no dot that is not within
# a number, and no names but a letter or a function of sympy's.
LISTS = re.compile(r"[A-Za-z0-9_\s,\[\]'\"-]*")
ARITHMETIC = re.compile(r"(?:[0-9]++(?:\.[0-9]++)?|[-+*/()\s])*+")
ALGEBRA = re.compile(
    r"(?:[0-9]++(?:\.[0-9]++)?|(?:sin|cos|tan|exp|log|sqrt|asin|acos|atan|[A-Za-z])(?![A-Za-z0-9])|[-+*/()\s])*+"
)
EVALUATED = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LISTS),
    **dict.fromkeys(("countdown", "puzzle24"), ARITHMETIC),
    **dict.fromkeys(("intermediate_integration", "polynomial_multiplication", "simple_integration"), ALGEBRA),
}


class _Item(dict):
    """An item of reasoning-gym that knows what a scorer missed: some go on, and give less than a right answer's
    reward."""

    def __missing__(self, key: str) -> Any:
        self.missed = key
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else self.__dict__.setdefault("missed", key) and default

    @contextlib.contextmanager
    def complete(self) -> Iterator[None]:
        """Raises ValueError if its body misses something of the item."""
        try:
            yield
        finally:
            if missed := vars(self).get("missed"):
                raise ValueError(f"the scorer reads the item's {missed}, and the prompt has none") from None


def _reasoning_gym(task: str) -> Reward:
    r"""The task's own `score_answer` on the answer outside thoughts, in the last `\boxed{...}` or the form that the
    prompt asks for; many tasks give part of 1 for answers that are near, or that contain the right one. An
    error where the scorer reads an item's `metadata` and the prompt has none."""
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if task not in DATASETS:
        raise RewardError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    score_answer = get_score_answer_fn(task)

    def reward(sample: Sample) -> Score:
        if sample.truncated:
            return CUT
        answer = find_answer(after_thinking(_turn(sample)), _asking(sample))
        if answer is None:
            return Score(0.0, None, Why.NO_ANSWER)
        if task in EVALUATED and not EVALUATED[task].fullmatch(answer):
            return Score(0.0, answer, Why.WRONG, "characters that no answer of this task has")
        item = _Item(question=sample.prompt)
        if sample.label is not None:
            item["answer"] = str(sample.label)
        if sample.metadata is not None:
            item["metadata"] = sample.metadata
        with item.complete():
            return _judged(score_answer(answer, item), answer)

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# Names

# Each makes a reward, and imports what it needs: that is done in a worker, once.
REWARDS: dict[str, Callable[[], Reward]] = {
    "deepscaler": functools.partial(_deepscaler, after_marker),
    "deepscaler-no-think": functools.partial(_deepscaler, after_thinking),
    "math-verify": _math_verify,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --rm-type, --custom-rm-path, --rm-workers and --rm-deadline; `pool_from` makes a pool of them."""
    names = ", ".join((*REWARDS, f"{GYM}TASK"))
    parser.add_argument("--rm-type", type=_known, default="deepscaler", metavar="NAME", help=f"the reward: {names}")
    parser.add_argument("--custom-rm-path", type=_known, metavar="PACKAGE.MODULE.FUNCTION", help="a reward of your own")
    parser.add_argument("--rm-workers", type=int, default=4, help="processes that score")
    parser.add_argument("--rm-deadline", type=float, default=10.0, help="seconds for one sample")


def name_from(arguments: argparse.Namespace) -> str:
    """The reward's name: --custom-rm-path wins over --rm-type."""
    return arguments.custom_rm_path or arguments.rm_type


def needs_label(name: str) -> bool:
    """Whether every prompt must have a label; others may make do with an item's metadata."""
    return name in REWARDS


def pool_from(arguments: argparse.Namespace) -> "RewardPool":
    """The pool that the flags of `add_arguments` ask for."""
    return RewardPool(name_from(arguments), processes=arguments.rm_workers, deadline=arguments.rm_deadline)


def _known(name: str) -> str:
    if name in REWARDS or (name.startswith(GYM) and name != GYM) or re.fullmatch(r"\w+(\.\w+)+", name):
        return name
    raise argparse.ArgumentTypeError(
        f"no reward is called {name!r}; there are {', '.join(REWARDS)}, {GYM}TASK, and package.module.function"
    )


def find_reward(name: str) -> Reward:
    """The reward of a name, ready to use, with its libraries imported. For a worker: a call can hang, or use any amount
    of memory. Raises RewardError for an unknown name and for a path that leads to no function."""
    try:
        _known(name)
    except argparse.ArgumentTypeError as error:
        raise RewardError(str(error)) from None
    if name in REWARDS:
        return REWARDS[name]()
    if name.startswith(GYM):
        return _reasoning_gym(name.removeprefix(GYM))
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise RewardError(f"{module} has no function {attribute!r}")

    def reward(sample: Sample) -> Score:
        value = function(sample)
        return value if isinstance(value, Score) else _judged(value, None)

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def serve(descriptor: int, name: str, seconds: float, memory_bytes: int) -> None:
    """A worker: says that it is ready (or why not), then answers each sample on the socket with a score, until the
    other end closes. The limit on CPU time ends it where nobody is left to kill it."""
    connection = Connection(descriptor)
    try:
        reward = find_reward(name)
    except Exception as error:
        connection.send_bytes(_message(error).encode())
        return
    connection.send_bytes(b"")
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory_bytes)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.recv_bytes()
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 1)
            connection.send_bytes(_scored(reward, request))


def _limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _scored(reward: Reward, request: bytes) -> bytes:
    try:
        score = reward(Sample(**json.loads(request)))
        if not math.isfinite(score.reward):
            raise ValueError(f"the reward is {score.reward}; it must be finite")
        return json.dumps(vars(score)).encode()
    except MemoryError:
        raise  # ends the worker: what is left of its memory is not worth having
    except Exception as error:
        return json.dumps(vars(Score(0.0, None, Why.ERROR, _message(error)))).encode()


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


class _Worker:
    """One process that scores one sample at a time; `process` is None while it is not started. Not for two threads at
    once."""

    def __init__(self, name: str, deadline: float, memory_bytes: int) -> None:
        self.arguments = (name, deadline, memory_bytes)
        self.deadline = deadline
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None

    def ask(self, request: bytes) -> bytes:
        """The worker's answer. TimeoutError after the deadline, EOFError or another OSError if it died."""
        self.connection.send_bytes(request)
        if not self.connection.poll(self.deadline):
            raise TimeoutError
        return self.connection.recv_bytes()

    def start(self) -> None:
        """Starts the process and waits until its imports are done. Raises RewardError if it cannot score."""
        ours, theirs = socket.socketpair()
        for direction in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a stopped process must not block us either
            ours.setsockopt(socket.SOL_SOCKET, direction, struct.pack("@ll", math.ceil(self.deadline), 0))
        code = f"from infir2.rl.rewards import serve; serve({theirs.fileno()}, *{self.arguments!r})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints is no result of ours
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the caller, which then closes the pool
            )
        self.connection = Connection(ours.detach())
        try:
            problem = self.connection.recv_bytes().decode() if self.connection.poll(START_SECONDS) else "it hangs"
        except (EOFError, OSError):
            problem = f"it ended with status {self.process.wait()}"
        if problem:
            self.stop()
            raise RewardError(f"the process for the reward {self.arguments[0]!r} did not start: {problem}")

    def stop(self) -> None:
        """Kills the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
        self.process = None


def _stop(threads: ThreadPoolExecutor, workers: Sequence[_Worker]) -> None:
    threads.shutdown(cancel_futures=True)
    for worker in workers:
        worker.stop()


class RewardPool:
    """Scores samples with one reward in `processes` processes, kept until `close`, garbage collection or exit.

    `name` is one of REWARDS, `reasoning-gym:TASK` or `package.module.function`. A sample may take `deadline` seconds
    (of wall clock: leave room for a busy machine) and its process `memory_bytes` of address space. The first process
    is started at once, so that a wrong name raises RewardError here; the others with the first samples. Many threads
    may use one pool.
    """

    def __init__(self, name: str, processes: int = 4, deadline: float = 10.0, memory_bytes: int = MEMORY_BYTES) -> None:
        if processes < 1 or deadline <= 0:
            raise RewardError(f"{processes} processes with a deadline of {deadline} s; both must be above 0")
        workers = [_Worker(name, deadline, memory_bytes) for _ in range(processes)]
        workers[0].start()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in reversed(workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="reward")
        self._finalizer = weakref.finalize(self, _stop, self._threads, workers)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores in the order of the samples. Every sample has one; those that timed out or failed have a reward of 0,
        and are counted in a warning. Metadata that JSON cannot hold raises TypeError."""
        scores = list(self._threads.map(self._score_one, map(_request, samples)))
        failed = Counter(score.why for score in scores if score.why in (Why.TIMED_OUT, Why.ERROR))
        if failed:
            counts = ", ".join(f"{number} {why}" for why, number in failed.items())
            details = next((score.detail for score in scores if score.detail and score.why is Why.ERROR), "")
            logger.warning("rewards of %d samples: %s (reward 0) %s", len(scores), counts, details)
        return scores

    def _score_one(self, request: bytes) -> Score:
        worker = self._idle.get()
        try:
            for _ in range(2):  # a process that died may have been killed by someone else: once more in a fresh one
                if worker.process is None:
                    worker.start()  # what this raises is not the sample's fault: it ends the run
                try:
                    answer = json.loads(worker.ask(request))
                    return Score(**answer | {"why": Why(answer["why"])})
                except TimeoutError:
                    worker.stop()
                    return Score(0.0, None, Why.TIMED_OUT)
                except (EOFError, OSError):
                    worker.stop()
            return Score(0.0, None, Why.ERROR, "the process that scores it died, twice")
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes. A pool that is closed cannot score."""
        self._finalizer()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _request(sample: Sample) -> bytes:
    metadata = None if sample.metadata is None else dict(sample.metadata)
    shortened = {"response": sample.response[-LONGEST_RESPONSE:], "metadata": metadata}
    return json.dumps(vars(sample) | shortened).encode()
