r"""Rewards: what counts as an answer, which answers are the same, and that no response can do more than lose."""

import argparse
import ast
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.evaluation.answers import boxed_answer
from infir2.rl import rewards
from infir2.rl.rewards import RewardError, RewardPool, Sample, Why, normalize, overlong_penalty

CUSTOM = """
import os, time
from infir2.rl.rewards import Score, Why

def reward(sample):
    print("not a result")
    match sample.response:
        case "hang": time.sleep(600)
        case "hang in C": 9**9**9
        case "die": os.kill(os.getpid(), 9)
        case "raise": raise KeyError("what")
        case "not a number": return "much"
        case "nan": return float("nan")
        case "memory": bytearray(6 << 30)  # more than a worker may have
        case "pid": return os.getpid()
        case "score": return Score(0.5, "half", Why.CORRECT)
    return len(sample.response) / 10
"""


@pytest.fixture(scope="module")
def custom_path(tmp_path_factory):
    """Path of a function of the user's own, importable by this process and by those that it starts."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "rewards_of_tests.py").write_text(CUSTOM)
    sys.path.insert(0, str(folder))
    yield "rewards_of_tests.reward"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def custom(custom_path):
    with RewardPool(custom_path, processes=2, deadline=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def deepscaler():
    with RewardPool("deepscaler", processes=1, deadline=20) as pool:
        yield pool


@pytest.fixture(scope="module")
def math_verify():
    with RewardPool("math-verify", processes=1, deadline=20) as pool:
        yield pool


def pairs_scored(pool, pairs):
    """Outcome of each (label, answer), the answer boxed after thoughts."""
    samples = [Sample("?", f"<think>5</think> so \\boxed{{{answer}}}.", label) for label, answer in pairs]
    return {pair: str(score.why) for pair, score in zip(pairs, pool.score(samples), strict=True)}


def responses_scored(pool, responses, label="72"):
    return pool.score([Sample("6 * 12?", response, label) for response in responses])


# ---------------------------------------------------------------------------------------------------------------------
# Overlong responses


@given(st.integers(1, 10**5), st.data())
def test_overlong_penalty_is_equation_13(limit, data):
    """Pins a slope or an end that is off by one, against the equation in exact arithmetic."""
    buffer = data.draw(st.integers(0, limit))
    length = data.draw(st.integers(0, 2 * limit))
    if length <= limit - buffer:
        expected = Fraction(0)
    elif length <= limit:
        expected = Fraction(limit - buffer - length, buffer)
    else:
        expected = Fraction(-1)
    assert overlong_penalty(length, limit, buffer) == float(expected)
    assert overlong_penalty(length + 1, limit, buffer) <= overlong_penalty(length, limit, buffer)


def test_overlong_penalty_by_hand():
    """DAPO's own setting: 16,384 tokens expected, 4,096 of buffer."""
    penalties = [overlong_penalty(length, 20480, 4096) for length in (0, 16384, 16385, 18432, 20480, 20481, 10**6)]
    assert penalties == [0, 0, -1 / 4096, -0.5, -1, -1, -1]


@pytest.mark.parametrize(("length", "limit", "buffer"), [(-1, 10, 5), (1, 10, 11), (1, 10, -1), (0, -1, 0)])
def test_overlong_penalty_refuses(length, limit, buffer):
    """A buffer above the limit would punish every response."""
    with pytest.raises(ValueError, match="need length"):
        overlong_penalty(length, limit, buffer)


# ---------------------------------------------------------------------------------------------------------------------
# The answer in a response


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{72}", "72"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {\text{a {b} c}} }", r"\text{a {b} c}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # one escaped brace, which closes nowhere
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} and \boxed{2", None),  # cut off: the last box has no end
        (r"\boxed{}", None),
        (r"\boxed 5", None),
        ("72", None),
        (r"\boxed{" + "1" * 10_000 + "}", "1" * 10_000),
        (r"\boxed{" + "1" * 10_001 + "}", None),
    ],
)
def test_last_box(text, answer):
    """Pins braces counted wrongly, the first box taken, a box without end taken."""
    assert boxed_answer(text) == answer


def test_thoughts_are_not_judged(deepscaler, math_verify):
    """Pins answers found in thoughts, and each reward's rule for responses without </think>."""
    responses = [
        r"<think>x</think>\boxed{72}",
        r"\boxed{72}</think>\boxed{1}",
        r"\boxed{72}</think>",
        r"a</think>\boxed{1}</think>\boxed{72}",
        r"###Response \boxed{72}",
        r"so \boxed{72}",
        r"<think>\boxed{72}",
        r"</think>the answer is 72",
    ]
    c, w, n = "correct", "wrong", "no answer"
    for pool, expected in ((deepscaler, [c, w, n, c, c, n, n, n]), (math_verify, [c, w, n, c, c, c, n, c])):
        assert [str(score.why) for score in responses_scored(pool, responses)] == expected
    no_think = rewards.find_reward("deepscaler-no-think")
    assert [str(no_think(Sample("?", response, "72")).why) for response in responses] == [c, w, n, c, c, c, n, n]


TURNS = ("", "<think>\n", "<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("response", "expected"),
    [  # of deepscaler, deepscaler-no-think and math-verify, for a turn that begins with each of TURNS
        (r"\boxed{72}", "ncc nnn ccc"),
        (r"<think>\boxed{72}", "nnn nnn nnn"),
        (r"\boxed{1}</think>\boxed{72}", "ccc ccc ccc"),
        (r"x</think>y<think>\boxed{72}", "nnn nnn nnn"),
        ("the answer is 72", "nnc nnn nnc"),
    ],
)
def test_thoughts_that_the_prompt_opens(response, expected):
    """Whether a thought has ended is read from the whole turn. Pins: an answer found in a thought that the template
    opened and the response did not end; one without answer because the template ended the thought; one in a second
    thought."""
    names = ("deepscaler", "deepscaler-no-think", "math-verify")
    scorers = [rewards.find_reward(name) for name in names]
    found = [[scorer(Sample("?", response, "72", opening=turn)).why[0] for scorer in scorers] for turn in TURNS]
    assert " ".join(map("".join, found)) == expected


@pytest.mark.parametrize("name", ["deepscaler", "deepscaler-no-think", "math-verify", "reasoning-gym:chain_sum"])
@pytest.mark.parametrize("response", [r"</think>\boxed{72}", "</think>the answer is 72", r"</think>\boxed{72"])
def test_truncated_is_never_right(name, response):
    """Pins: a sentence cut after 72, of 720, that is rewarded."""
    score = rewards.find_reward(name)(Sample("6 * 12?", response, "72", {}, truncated=True))
    assert (score.reward, score.why) == (0, Why.TRUNCATED)


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n6 * 12?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
GSM8K = """6 * 12? Let's think step by step and output the final answer after "####"."""
TAGS = "6 * 12? Give your answer within <answer> </answer> tags."
PLAIN = "6 * 12?\nAnswer:"


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (DAPO, "so\nAnswer: 72", "c"),
        (DAPO, "so\nAnswer: $72$.", "c"),
        (DAPO, "**Answer: 72**", "c"),
        (DAPO, r"Answer: \boxed{72}", "c"),
        (DAPO, "Answer: 71\nAnswer: 72", "c"),
        (DAPO, "Answer: 72\nAnswer: 71", "w"),
        (DAPO, r"\boxed{6} times 12 is" + "\nAnswer: 72", "c"),
        (DAPO, "so\n**Final Answer: 72**", "c"),
        (DAPO, "The final answer: 72", "c"),
        (DAPO, "Answer: as follows\n" + r"\boxed{72}", "c"),
        (DAPO, "Answer: 999 = 72", "w"),
        (DAPO, "Answer: 71, 72", "w"),
        (DAPO, "Answer:", "n"),
        (DAPO, "72", "n"),
        (GSM8K, "6 * 12 = 72\n#### 72", "c"),
        (GSM8K, "#### 71", "w"),
        (TAGS, "<answer>72</answer>", "c"),
        (TAGS, "<answer> 71 </answer>", "w"),
        (PLAIN, "#### 72 <answer>72</answer>", "n"),
    ],
)
def test_form_that_the_prompt_asks_for(prompt, response, expected):
    """Pins: 0 for each response to DAPO's own prompts, whatever it says, because nothing is boxed."""
    for name in ("deepscaler", "deepscaler-no-think", "math-verify"):
        for question, system in ((prompt, ""), ("6 * 12?", prompt)):
            sample = Sample(question, f"</think>{response}", "72", system=system)
            assert rewards.find_reward(name)(sample).why[0] == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("the answer is 72", "c"),
        ("The final answer is $72$. I hope it is correct.", "c"),
        ("the answer is 7.2e1, no: the answer is: 72", "c"),
        ("a number I like is 72", "n"),
        ("so 71 + 1 = 72", "n"),
        ("the answer is 72 or 71", "w"),
        ("the answer is 72, or 71", "w"),
        ("the answer is not 72", "w"),
        ("the answer is 72 = 999", "w"),
        ("the answer is 7.2", "w"),
    ],
)
def test_unboxed_answers_of_math_verify(math_verify, response, expected):
    """Only what is said to be the answer, alone. Pins: the last number of any text taken."""
    (score,) = responses_scored(math_verify, [response])
    assert score.why[0] == expected


def test_labels_that_do_not_parse_are_counted(deepscaler, math_verify, caplog):
    """Pins a label that is missing being compared as the text None, and batches that stop at it."""
    for pool in (deepscaler, math_verify):
        for label in ("", "  ", None):
            (score,) = responses_scored(pool, [r"</think>\boxed{None}"], label)
            assert (score.reward, score.why) == (0, Why.ERROR)
            assert "label" in score.detail
    assert "1 error" in caplog.text
    (score,) = responses_scored(deepscaler, [r"</think>\boxed{72}"], 72)
    assert (score.reward, score.why, score.answer) == (1, Why.CORRECT, "72")


# ---------------------------------------------------------------------------------------------------------------------
# Which answers are the same

SAME = [  # for both rewards
    ("72", "72"),
    ("72", r"\boxed{72}"),
    ("1234", "1,234"),
    ("1000000", "1,000,000.0"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", r"\dfrac12"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{3}{2}", r"1\frac{1}{2}"),
    ("50%", r"50\%"),
    ("90", r"90^\circ"),
    ("10", r"10\text{ cm}"),
    ("12.5", r"\$12.50"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\pi", r"2 \pi"),
    ("x^2-1", "(x+1)(x-1)"),
    ("(1,2)", "(1, 2)"),
    (r"(\frac{1}{2},3)", "(0.5,3)"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"(-\infty,3]", r"\left(-\infty, 3\right]"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("5", "x=5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\ 3 \\ \end{bmatrix}"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}"),
    (r"\sqrt[3]{2}", "2^{1/3}"),
    (r"5 \text{ km}", r"5\text{ km}"),
    ("50%", "0.5"),
]
SAME_TO_DEEPSCALER = [
    ("50", r"50\%"),  # the sign is taken off: a percentage is its number
    ("10", "10 cm^2"),
    ("3", r"3 \text{ square units}"),
    ("10 000", "10000"),
    ("1000", r"1{,}000"),
    ("1 1/2", "1.5"),
    (r"\text{Yes}", "yes"),
    ("(A)", r"\text{(A)}"),
    ("2,3", "2, 3"),
    ("5 km", "5 kilometers"),
    ("5 cm^2", "5 square centimeters"),
    ("60 km/h", r"60\text{ km per hour}"),
    ("60", "60 km/h"),
    (r"\$12.50", "12.5 dollars"),
    ("1/2", "50%"),
    ("1/2", "\u00bd"),
    ("1.5", "1\u00bd"),
    ("2/3", "2\u20443"),
    (r"2\sqrt{3}", "2\u221a3"),
    (r"\frac{\sqrt{3}}{2}", "\u221a3/2"),
    (r"\sqrt{x+1}", "\u221a(x+1)"),
    (r"\sqrt{3}", "sqrt(3)"),
    (r"\sqrt[3]{2}", "\u221b2"),
    ("x^2", "x\u00b2"),
    (r"2\pi", "2\u03c0"),
]
DIFFERENT = [
    ("72", "73"),
    ("5", "-5"),
    ("12", "1.2"),
    ("1/3", "0.33"),
    ("50", "0.5"),
    ("1000", "1"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x+1", "x-1"),
    ("5", "5x"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("5 km", "5 cm"),
    ("5 cm", "5 cm^2"),
    (r"5\text{ m}", r"5\text{ s}"),
    (r"90^\circ", r"90\%"),
    (r"\$5", "5 cents"),
    ("0.5", r"0.5\%"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("34", "999 = 34"),
    ("34", "33, 34"),
    ("34", r"\{34\}"),
    ("34", "[34]"),
    ("34", r"34 \text{ or } 33"),
    ("34", r"34 \text{ or 33}"),
    ("34", "33 and 34"),
    ("34", r"\pm 34"),
    ("34", "33;34"),
    ("34", r"33 \\ 34"),
    ("34", "1 34"),
    ("34", r"\text{not } 34"),
    ("34", "x < 34"),
    ("1/2", r"3 = \frac{1}{2}"),
    ("x^2", "y = 7 = x^2"),
]
DIFFERENT_TO_DEEPSCALER = [
    ("1/2", "2/4"),  # fractions must match exactly
    (r"\frac{4}{2}", "2"),
    ("8", "2^3"),  # and so must integers
    ("0.5", "50"),
    ("cat", "act"),  # letters are no factors
    ("0.0", "10 0"),  # not read as 10 times 0
    ("12", "1 2"),
    ("(1,234)", "1234"),  # a pair
    ("(1,2)", "[1,2]"),
    ("2,3", "3,2"),
    ("(5 km,1)", "(5 cm,1)"),
    ("1", r"1\%"),
    ("23", "2\u00b3"),
]


@pytest.mark.parametrize("name", ["deepscaler", "math_verify"])
def test_same_and_different_answers(name, request):
    """Pins answers that are marked wrong for their spelling, and wrong ones that pass: in another unit (0.5 % for 0.5,
    5 cm for 5 km), or with the label in an equation, a list or a choice."""
    pool = request.getfixturevalue(name)
    own = name == "deepscaler"
    same, different = SAME + own * SAME_TO_DEEPSCALER, DIFFERENT + own * DIFFERENT_TO_DEEPSCALER
    assert pairs_scored(pool, same) == dict.fromkeys(same, "correct")
    assert pairs_scored(pool, different) == dict.fromkeys(different, "wrong")


def test_math_verify_is_asked_gold_first(math_verify):
    """Pins swapped arguments: math-verify takes x=1 for 1 only where the label is the plain one, not the equation."""
    answers = pairs_scored(math_verify, [("1<x<2", "(1,2)"), ("(1,2)", "1<x<2")])
    assert answers == {("1<x<2", "(1,2)"): "correct", ("(1,2)", "1<x<2"): "wrong"}


@pytest.mark.parametrize(
    ("label", "answer", "same"),
    [
        (r"\frac{1}{2}", "\u00bd", True), ("\u00bd", "0.5", True), (r"\frac{3}{2}", "1\u00bd", True),
        (r"\frac{11}{2}", "1\u00bd", False), (r"\sqrt{2}", "\u221a2", True), (r"\sqrt{10}", "\u221a10", True),
        (r"\sqrt{1+x}", "\u221a(1+x)", True), (r"\sqrt{x}", "\u221ax", True), (r"\sqrt{2}x", "\u221a2x", True),
        (r"\sqrt{2x}", "\u221a2x", False), (r"\sqrt[3]{2}", "\u221b2", True),
        (r"\frac{\sqrt{3}}{2}", "\u221a3/2", True),
        (r"\frac{\sqrt{3}}{2}", "\u221a(3/2)", False), ("2^3", "2\u00b3", True), ("23", "2\u00b3", False),
        (r"\frac{1}{1000}", "10\u207b\u00b3", True), (r"120^\circ", "120\u00b0", True), (r"\infty", "\u221e", True),
        (r"(-\infty,3)", "(-\u221e,3)", True), (r"[1,2]\cup[3,4]", "[1,2]\u222a[3,4]", True),
        (r"[1,2]\cup[3,4]", "[1,2]\u2229[3,4]", False), ("34", "x \u2264 34", False), ("34", "\u00b134", False),
        ("34", "\u224834", False), ("34", "34 \u2228 35", False), (r"\pm 3", "\u00b13", True), ("1", "1.", True),
        ("(E)", "E", True), ("(E)", "(D)", False), (r"\emptyset", "\u2205", True), ("(1,2)", r"\{1,2\}", False),
        (r"\{1,2\}", "(1,2)", False), (r"\{1,2\}", r"\{2,1\}", True), ("(0,1)", "[0,1]", False),
    ],
)  # fmt: skip
def test_characters_for_commands(math_verify, deepscaler, label, answer, same):
    """Pins: math-verify stopping at a half, a root or a power in one character, 34 found in a choice of signs, a set
    taken for a tuple. deepscaler's reader is held to the same."""
    sample = Sample("", rf"</think>\boxed{{{answer}}}", label)
    for pool in (math_verify, deepscaler):
        assert [score.reward for score in pool.score([sample])] == [same]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**13))
def test_spellings_of_an_integer(number):
    """Pins a separator, a zero or a wrapping that changes the number; 1,000 once lost its zeros."""
    spellings = (
        f"{number:,}",
        rf"\text{{{number}}}",
        f"${number}$",
        f"{number}.0",
        f"0{number}",
        f"{number}.",
        f"+{number}",
    )
    assert {normalize(spelling) for spelling in spellings} == {str(number)}
    assert normalize(f"-{number:,}.00") == f"-{number}"
    assert normalize(str(10 * number + 10)) != normalize(str(number + 1))


PIECES = st.sampled_from(
    r"\frac \dfrac \text \text{ \left \right \{ \} \( \) \, \! \$ \% ^\circ ^{\circ} \sqrt \le \leq { } ( ) [ ] , . 0 "
    r"00 1 12 000 / - + = x= cm degrees ^2 $ % \boxed{ \\ \ ~ ; : \mathrm{ \in sqrt( \sqrt[3] km/h \pi ".split(" ")
    + list("\u221a\u221b\u00bd\u00b2\u2044\u03c0")
)
LATEX = st.lists(st.one_of(PIECES, st.just(" ")), max_size=60).map("".join)


@settings(max_examples=200, deadline=2000)
@given(st.one_of(LATEX, st.text(max_size=300)))
def test_normalizing_twice_is_once(text):
    """Pins rules that undo each other or depend on their order, and regular expressions of exponential time."""
    once = normalize(text)
    assert normalize(once) == once


# ---------------------------------------------------------------------------------------------------------------------
# Hostile responses


def hostile(marker):
    """Answers that would run something if they were evaluated, take all time or memory, or break a parser."""
    return [
        f"__import__('os').system('touch {marker}')",
        f"[x for x in [open('{marker}', 'w')]]",
        f"exec(\"open('{marker}','w')\")",
        "().__class__.__base__.__subclasses__()",
        "9**9**9**9",
        "9^{9^{9^9}}",
        "{" * 4000 + "}" * 4000,
        "(" * 400,
        r"\frac{1}{" * 300 + "1" + "}" * 300,
        "\x00",
        "7\x002",
        "\ud800",
        "\N{ARABIC-INDIC DIGIT SEVEN}" * 3,
        "1" * 9000,
        "nan",
    ]


def test_hostile_answers(deepscaler, tmp_path):
    """Pins evaluation of model text, parsers without bounds, and characters that do not pass between processes."""
    marker = tmp_path / "marker"
    responses = [rf"</think>\boxed{{{answer}}}" for answer in hostile(marker)]
    start = time.monotonic()
    scores = responses_scored(deepscaler, responses, r"x^2-\frac{1}{2}")
    assert time.monotonic() - start < 300
    assert {score.why for score in scores} <= {Why.WRONG, Why.NO_ANSWER}
    assert not marker.exists()


def test_hostile_answers_to_math_verify(tmp_path):
    """The same where the parser is not ours: the deadline holds, and the pool goes on."""
    marker = tmp_path / "marker"
    answers = [*hostile(marker)[:4], "9^{9^{9^9}}", "\x00", "\ud800", "1" * 9000, "nan"]
    with RewardPool("math-verify", processes=1, deadline=1.5) as pool:
        scores = responses_scored(pool, [rf"\boxed{{{answer}}}" for answer in answers] + [r"\boxed{72}"])
    assert scores.pop().why is Why.CORRECT
    assert {score.reward for score in scores} == {0}
    assert scores[4].why is Why.TIMED_OUT
    assert not marker.exists()


@pytest.mark.parametrize("text", [r"\boxed{", "9 ", r"</think>\boxed{1}", "answer is 1 ", "{", "$", "\ud800"])
def test_ten_megabytes(deepscaler, math_verify, text):
    """Pins regular expressions that take quadratic time, and responses that are copied whole."""
    response = text * (10_000_000 // len(text))
    for pool in (deepscaler, math_verify):
        start = time.monotonic()
        (score,) = responses_scored(pool, [response])
        assert time.monotonic() - start < 300
        assert score.reward == 0


# ---------------------------------------------------------------------------------------------------------------------
# reasoning-gym


def called_functions(function):
    """Names of what a function calls, from its source."""
    calls = [
        node.func
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Call)
    ]
    return {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


def test_every_scorer_that_evaluates_is_guarded():
    """Pins tasks of a newer reasoning-gym whose scorers evaluate the answer. Two evaluate only the task's own text."""
    from reasoning_gym.factory import DATASETS

    evaluating = set()
    for task, (dataset, _) in DATASETS.items():
        pending, seen = ["score_answer"], set()
        while pending:
            name = pending.pop()
            function = getattr(dataset, name, None) or getattr(inspect.getmodule(dataset), name, None)
            if name in seen or not inspect.isfunction(function):
                continue
            seen.add(name)
            calls = called_functions(function)
            pending.extend(calls)
            if calls & {"eval", "exec", "parse_expr", "sympify", "S", "lambdify"}:
                evaluating.add(task)
    assert evaluating - {"number_sorting", "bitwise_arithmetic"} == set(rewards.EVALUATED)


def test_guarded_scorers_run_nothing(tmp_path):
    """Pins `eval` reached by a response. The scorer alone, as the control, does run the text."""
    import reasoning_gym

    marker = tmp_path / "marker"
    reasoning_gym.get_score_answer_fn("string_insertion")(hostile(marker)[0], {"answer": "A"})
    assert marker.exists()
    marker.unlink()
    for task in rewards.EVALUATED:
        reward = rewards.find_reward(f"reasoning-gym:{task}")
        for answer in (*hostile(marker)[:4], "exit()", "f'{exit()}'", "1.0.n(9)", "copyright.x", "lambda: 0"):
            assert reward(Sample("", rf"\boxed{{{answer}}}", "A")).why is Why.WRONG
    assert not marker.exists()


@pytest.mark.parametrize(
    "task", ["chain_sum", "countdown", "string_insertion", "polynomial_multiplication", "n_queens"]
)
def test_right_answers_of_tasks(task):
    """Pins guards that refuse right answers, and items that reach the scorer changed."""
    import reasoning_gym

    reward = rewards.find_reward(f"reasoning-gym:{task}")
    for item in reasoning_gym.create_dataset(task, size=5, seed=1):
        sample = Sample(item["question"], f"so \\boxed{{{item['answer']}}}", item["answer"], item["metadata"])
        assert reward(sample).why is Why.CORRECT
        wrong = Sample(item["question"], r"so \boxed{7}", item["answer"], item["metadata"])
        assert reward(wrong).why is Why.WRONG


@pytest.mark.parametrize("task", ["countdown", "n_queens", "sudoku"])
def test_scorer_without_metadata(task):
    """An error, and with it the right reward. Pins: an empty object in its place, with which some scorers raised and
    some gave a right answer 0.01 and said nothing."""
    import reasoning_gym

    (item,) = reasoning_gym.create_dataset(task, size=1, seed=1)
    reward, response = rewards.find_reward(f"reasoning-gym:{task}"), f"\\boxed{{{item['answer']} }}"
    assert reward(Sample(item["question"], response, item["answer"], item["metadata"])).why is Why.CORRECT
    with pytest.raises(ValueError, match="the scorer reads the item's metadata, and the prompt has none"):
        reward(Sample(item["question"], response, item["answer"]))


@pytest.mark.parametrize("task", ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"])
def test_task_without_an_answer(task):
    """Scored by its metadata alone. Pins: items without an answer that no run could have."""
    import reasoning_gym

    (item,) = reasoning_gym.create_dataset(task, size=1, seed=1)
    assert item["answer"] is None
    score = rewards.find_reward(f"reasoning-gym:{task}")(Sample(item["question"], r"\boxed{x}", None, item["metadata"]))
    assert score.why is Why.WRONG
    assert not score.detail


def test_task_that_needs_its_answer():
    """Pins: a label that is not there compared as None, and every answer wrong."""
    reward = rewards.find_reward("reasoning-gym:chain_sum")
    with pytest.raises(ValueError, match="the scorer reads the item's answer, and the prompt has none"):
        reward(Sample("1 + 1", r"\boxed{2}", None, {}))


def test_scorer_that_raises():
    """prime_factorization raises on junk; a worker makes an error of that, which the test of the pool shows."""
    reward = rewards.find_reward("reasoning-gym:prime_factorization")
    item = {"label": "2 \u00d7 3", "metadata": {"number": 6}}
    assert reward(Sample("", "\\boxed{2 \u00d7 3}", **item)).why is Why.CORRECT
    assert reward(Sample("", "6", **item)).why is Why.NO_ANSWER
    with pytest.raises(ValueError, match="invalid literal"):
        reward(Sample("", "\\boxed{a \u00d7 b}", **item))


def test_unknown_task_lists_the_others():
    """Pins a KeyError without the names that there are."""
    with pytest.raises(RewardError, match=r"no task 'chain_sums'; it has .*chain_sum,"):
        rewards.find_reward("reasoning-gym:chain_sums")


# ---------------------------------------------------------------------------------------------------------------------
# The pool


def test_each_failure_costs_its_own_sample(custom, caplog, capfd):
    """Pins hangs (in C too), deaths, exceptions and rewards that are no numbers reaching another sample."""
    failures = {
        "hang": Why.TIMED_OUT,
        "hang in C": Why.TIMED_OUT,
        "die": Why.ERROR,
        "raise": Why.ERROR,
        "not a number": Why.ERROR,
        "nan": Why.ERROR,
        "memory": Why.ERROR,
    }
    responses = [response for failure in failures for response in (failure, "a" * len(failure))]
    start = time.monotonic()
    scores = responses_scored(custom, responses)
    assert time.monotonic() - start < 300
    assert {response: score.why for response, score in zip(responses[::2], scores[::2], strict=True)} == failures
    assert {score.reward for score in scores[::2]} == {0}
    assert [score.reward for score in scores[1::2]] == [len(failure) / 10 for failure in failures]
    assert "2 timed out" in caplog.text
    assert "5 error" in caplog.text
    assert "not a result" not in capfd.readouterr().out


def test_custom_function_may_give_a_score(custom):
    """Pins a Score of the user's being judged again."""
    (score,) = responses_scored(custom, ["score"])
    assert (score.reward, score.answer, score.why) == (0.5, "half", Why.CORRECT)


def worker_pids(pool):
    return {int(score.reward) for score in responses_scored(pool, ["pid"] * 20)}


def test_workers_are_kept_and_replaced_after_a_kill(custom):
    """Pins a process for every sample, and a SIGKILL from outside that changes a reward."""
    (first,) = responses_scored(custom, ["pid"])
    (again,) = responses_scored(custom, ["pid"])
    assert first.reward == again.reward
    os.kill(int(first.reward), signal.SIGKILL)
    assert [score.reward for score in responses_scored(custom, ["abc"] * 4)] == [0.3] * 4
    assert first.reward not in worker_pids(custom)


def test_stopped_worker_costs_the_deadline(custom):
    """Pins a send that blocks for ever: a response larger than the socket's buffer to a process that does not read."""
    for pid in worker_pids(custom):
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    (score,) = responses_scored(custom, ["a" * 900_000])
    assert time.monotonic() - start < 300
    assert score.reward == 90_000


def test_pool_works_in_a_thread(custom):
    """Pins signals, which only a main thread may set; a Ray actor's methods may run in other threads."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(responses_scored(custom, ["ab"])))
    thread.start()
    thread.join(10)
    assert [score.reward for score in results] == [0.2]


def alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    limit = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_close_ends_the_workers(custom_path):
    """Pins workers that outlive their pool, and a closed pool that hands out rewards."""
    with RewardPool(custom_path, processes=1) as pool:
        pids = worker_pids(pool)
    assert wait_until_gone(pids, 2)
    with pytest.raises(RuntimeError, match="shutdown"):
        responses_scored(pool, ["a"])


CALLER = """
import sys, threading, time
from infir2.rl.rewards import RewardPool, Sample
pool = RewardPool("rewards_of_tests.reward", processes=2, deadline=1)
print(int(pool.score([Sample("", "pid", "")])[0].reward), flush=True)
if sys.argv[1] == "hang":
    pool.score([Sample("", "hang in C", "")] * 2)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


@pytest.mark.parametrize(("state", "kill"), [("exit", False), ("wait", True), ("hang", True)])
def test_workers_do_not_outlive_the_caller(custom_path, state, kill):
    """Pins processes that stay behind: after an exit without close, and after a SIGKILL while they wait or work."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CALLER, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as caller:
        worker = int(caller.stdout.readline())
        if kill:
            time.sleep(0.2)
            caller.kill()
        assert caller.wait(20) == (-signal.SIGKILL if kill else 0)
    assert wait_until_gone([worker], 40)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def parsed(*flags):
    parser = argparse.ArgumentParser()
    rewards.add_arguments(parser)
    return parser.parse_args(flags)


def test_unknown_name_lists_the_others(capsys):
    """Pins a bare KeyError after the cluster has started."""
    with pytest.raises(SystemExit):
        parsed("--rm-type", "deepscalar")
    message = capsys.readouterr().err
    assert all(name in message for name in (*rewards.REWARDS, "reasoning-gym:TASK", "package.module.function"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepscalar", "there are deepscaler, "),
        ("rewards_of_tests.rewards", "has no function 'rewards'"),
        ("no_such_module.reward", "No module named 'no_such_module'"),
    ],
)
def test_reward_that_cannot_be_had(custom_path, name, message):
    """Pins a run that trains on rewards of 0 because its reward could not be loaded."""
    with pytest.raises(RewardError, match=message):
        RewardPool(name)


def test_custom_path_wins(custom_path):
    """Pins the default --rm-type hiding the user's own function."""
    with rewards.pool_from(parsed("--custom-rm-path", custom_path, "--rm-workers", "1")) as pool:
        assert responses_scored(pool, ["abcd"])[0].reward == 0.4
