r"""The answer in a response, as rewards and evaluation read it. It needs the standard library alone.

What is read is the model's whole turn: what its chat template wrote of the turn already (`turn_opening`), and the
response. The answer stands after the last thought; a thought that does not end has none after it. There it stands in
the last `\boxed{...}`, or in the form that the prompt asks for (FORMS), whichever comes last.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

LONGEST_ANSWER = 10_000  # characters; a longer answer is none

BOXED = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of the answer
OPENING = re.compile(r"<think>\s*(?:</think>\s*)?$")
EMPHASIS = " \t*_"
ENDS = ("stop", "max_tokens", "tool_calls")  # of answers, in evalscope's words


class Form(NamedTuple):
    """How a prompt asks for an answer, and how a response then gives it; group 1 of `gives` is the answer."""

    name: str
    asks: re.Pattern[str]
    gives: re.Pattern[str]


FORMS = (
    Form(  # DAPO's prompts, simple-evals'
        "Answer: X",
        re.compile(r"\b(?:form|format|line|after|with|write|as|by)\b[^.]{0,60}?\bAnswer\s*:\s*\S", re.IGNORECASE),
        re.compile(r"^[>#*_ \t-]*(?:The[ \t]+)?(?:Final[ \t]+)?Answer[*_ \t]*:(.*)$", re.IGNORECASE | re.MULTILINE),
    ),
    Form(  # GSM8K's
        "#### X",
        re.compile(r"(?:after|with|form|format|as|by)\W{1,4}####", re.IGNORECASE),
        re.compile(r"^[ \t]*####(.*)$", re.MULTILINE),
    ),
    Form(  # reasoning-gym's, DeepSeek-R1-Zero's
        "<answer>X</answer>",
        re.compile(r"<answer>"),
        re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL),
    ),
)


def asked_forms(prompt: str) -> list[Form]:
    """The forms besides a box that a prompt asks for."""
    return [form for form in FORMS if form.asks.search(prompt)]


def turn_opening(prompt: str) -> str:
    """What of the model's turn stands at the end of a rendered prompt: a thought that begins, one that is empty, or
    nothing."""
    found = OPENING.search(prompt[-100:])
    return found[0] if found else ""


def after_thinking(turn: str) -> str:
    """What follows the last `</think>`, all of the turn where there are no thoughts; nothing if a thought has no
    end."""
    after = turn.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def judged_text(text: str, opening: str, truncated: bool, thoughts_apart: bool) -> str:
    """What evaluation judges of a response. `opening`: what the template wrote of its turn, where that is known.
    `thoughts_apart`: thoughts that had an end were taken out of the text before. A response that was cut may be a
    thought that the template opened: without an end of thoughts it has no answer."""
    if thoughts_apart:
        return after_thinking(text)
    turn = opening + text
    return "" if truncated and "</think>" not in turn else after_thinking(turn)


def server_error(output: dict[str, Any]) -> str:
    """Why evalscope's record of an answer is none of the model's, in words; empty where it is one. By itself evalscope
    writes some refusals of a server down as answers, with the stop reasons model_length and content_filter."""
    if output.get("error"):
        return str(output["error"])
    choices = output.get("choices")
    if choices is None:
        return ""
    if not choices:
        return "the server's answer has no choices"
    reason = choices[0].get("stop_reason", "stop")
    return "" if reason in ENDS else f"it ended by {reason!r}, not by {' or '.join(map(repr, ENDS))}"


def find_answer(text: str, prompt: str = "") -> str | None:
    """The last answer in a text: in a box, or in a form that `prompt` asks for. None if there is none, or it has no
    end."""
    found = [*_last_box(text), *(candidate for form in asked_forms(prompt) for candidate in _last_given(form, text))]
    return max(found, key=lambda candidate: candidate[0])[1] if found else None


def boxed_answer(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, stripped. None if it is empty or does not close within LONGEST_ANSWER."""
    return next((content for _, content in _last_box(text)), None)


def _last_box(text: str) -> Iterator[tuple[int, str | None]]:
    start = max((match.end() for match in BOXED.finditer(text)), default=None)
    if start is None:
        return
    depth = 1
    for match in BRACE.finditer(text, start, start + LONGEST_ANSWER + 1):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            yield start, text[start : match.start()].strip() or None
            return
    yield start, None


def _last_given(form: Form, text: str) -> Iterator[tuple[int, str | None]]:
    """A box within the form is found by itself, and later in the text."""
    if last := next(iter(deque(form.gives.finditer(text), maxlen=1)), None):
        content = last[1].strip().strip(EMPHASIS)
        yield last.start(), content if 0 < len(content) <= LONGEST_ANSWER else None
