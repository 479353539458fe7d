"""Decontamination: what infir2.data.overlap finds, what it leaves alone, and the commands that use it.

Each test's docstring says which fault it pins.
"""

import gzip
import importlib
import json
import random
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reasoning_gym

from infir2.data.overlap import Contamination, EvaluationSets, Problem, canonical, squeezed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
prepare_data = importlib.import_module("prepare_data")

# Problems of the genre, with places for numbers. The phrases are those that such problems share.
TEMPLATES = [
    "Find the number of ordered pairs of integers $(a,b)$ such that $1\\leq a<b\\leq {A}$ and $a+b$ is divisible by "
    "${B}$.",
    "Find the number of positive integers less than ${A}{{,}}000$ that are divisible by neither ${B}$ nor ${C}$.",
    "Let $\\triangle ABC$ have side lengths $AB={A}$, $BC={B}$, and $CA={C}$. The area of the circle through the "
    "midpoints of its sides is $\\frac{{m}}{{n}}\\pi$, where $m$ and $n$ are relatively prime positive integers. Find "
    "$m+n$.",
    "A fair coin is flipped ${A}$ times. The probability that no two consecutive flips are heads can be written as "
    "$\\frac{{m}}{{n}}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n$.",
    "Find the remainder when $\\sum_{{k=1}}^{{{A}}} k^{B}$ is divided by ${C}$.",
    "Let $x$, $y$ and $z$ be positive real numbers satisfying \\[\\log_2\\left(\\dfrac{{x}}{{yz}}\\right)="
    "\\frac{{1}}{{{A}}}\\] and $xyz={B}$. Find the value of $\\left|\\log_2(x^{{{C}}}y^3z^2)\\right|$.",
    "There exist real numbers $x$ and $y$, both greater than 1, such that $\\log_x\\left(y^x\\right)="
    "\\log_y\\left(x^{{{A}y}}\\right)={B}$. Find $xy$.",
    "Every morning Aya goes for a ${A}$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her ${B}$ hours, including $t$ minutes spent in the "
    "coffee shop. Find the number of minutes the walk takes her at $s+\\tfrac{{1}}{{{C}}}$ kilometers per hour.",
    "Find the number of ways to place a digit in each cell of a ${A}\\times {B}$ grid so that the sum of the rows is "
    "${C}{{,}}999$ and the sum of the columns is $99$.",
    "The complex numbers $z$ and $w$ satisfy $|z|={A}$ and $|w|={B}$. Find the largest possible value of "
    "$\\text{{Re}}\\left(({C}+117i)z+\\frac{{96+144i}}{{w}}\\right)$.",
]
PHRASES = [
    "Find the number of {} such that {}.",
    "Find the number of {} for which {}. Express your answer as an integer between 0 and 999.",
    "The probability that {1} for a random choice among the {0} can be written as $\\frac{{m}}{{n}}$, where $m$ and "
    "$n$ are relatively prime positive integers. Find $m+n$.",
    "Let $N$ be the number of {} such that {}. Find the remainder when $N$ is divided by $1000$.",
]
THINGS = [
    "ordered triples of positive integers $(a,b,c)$",
    "subsets of $\\{{1,2,\\ldots,{}\\}}$",
    "permutations of ${}$ letters",
]
CONDITIONS = [
    "$a+b+c\\leq {}$",
    "no two elements differ by ${}$",
    "the sum is a multiple of ${}$",
    "exactly ${}$ are fixed",
]


def problem(template: str, seed: int) -> str:
    numbers = random.Random(seed)
    return template.format(A=numbers.randint(12, 999), B=numbers.randint(12, 999), C=numbers.randint(12, 999))


BENCHMARK = [problem(template, seed) for template in TEMPLATES for seed in (1, 2, 3)]


def contamination(texts: list[str]) -> Contamination:
    return Contamination(EvaluationSets([Problem(f"eval:{number}", text) for number, text in enumerate(texts)], []))


@pytest.fixture(scope="module")
def against() -> Contamination:
    return contamination(BENCHMARK)


def respaced(text: str, choice: random.Random) -> str:
    """White space of all kinds in place of spaces, and around marks where LaTeX and prose allow it."""
    blank = lambda: choice.choice([" ", "  ", "\n", "\t", "\u00a0", " \n  "])  # noqa: E731
    text = re.sub(r"(?<=[,.$+=<(){}|])(?=[^\s,])", lambda _: choice.choice(["", " "]), text)
    return re.sub(r"\s+", lambda _: blank(), text)


def in_other_latex(text: str, choice: random.Random) -> str:
    """The same formulas in other commands."""
    swaps: list[tuple[str, list[str]]] = [
        (r"\\[dt]?frac", ["\\frac", "\\dfrac", "\\tfrac"]),
        (r"\\leq\b", ["\\le", "\\leqslant", "≤"]),
        (r"\{,\}", ["", ",", "{,}", "\\,"]),
        (r"\\left(?=[|(])", ["", "\\bigl", "\\left"]),
        (r"\\right(?=[|)])", ["", "\\bigr", "\\right"]),
        (r"\\text\{Re\}", ["\\mathrm{Re}", "\\operatorname{Re}", "Re"]),
        (r"\\times", ["×", "\\times"]),
        (r"\\pi\b", ["π", "\\pi"]),
        (r"\\triangle ", ["\\triangle{}", "△"]),
        (r"\^\{?(\d+)\}?", ["^{\\1}", "^\\1"]),
        (r"\+", ["+", " + ", "\\,+\\,"]),
    ]
    for pattern, replacements in swaps:
        chosen = choice.choice(replacements)
        text = re.sub(pattern, chosen if "\\1" in chosen else lambda _, chosen=chosen: chosen, text)
    opening, closing = choice.choice([("$", "$"), ("\\(", "\\)"), ("", "")])
    text = re.sub(r"\$([^$]*)\$", lambda match: opening + match[1] + closing, text)
    return text.replace("\\[", "$$").replace("\\]", "$$")


def embedded(text: str, choice: random.Random) -> str:
    """Within a long document on other things."""
    words = "a long page on how the town was built and what its people did in winter when the river froze".split()
    filler = lambda: " ".join(choice.choices(words, k=400))  # noqa: E731
    return f"{filler()}. Problem {choice.randint(1, 30)}. {text} Solution. We note {filler()}"


VARIANTS: dict[str, Callable[[str, random.Random], str]] = {
    "verbatim": lambda text, _: text,
    "upper case": lambda text, _: re.sub(
        r"\\[a-zA-Z]+|[a-z]+", lambda m: m[0] if m[0][0] == "\\" else m[0].upper(), text
    ),
    "lower case": lambda text, _: text.lower(),
    "re-spaced": respaced,
    "LaTeX": in_other_latex,
    "embedded": embedded,
    "all": lambda text, choice: embedded(respaced(in_other_latex(text, choice), choice), choice).title(),
    "quoted": lambda text, _: "> " + text.replace(". ", ".\n> "),
    "bold": lambda text, _: f"**Question:** {text.replace('Find', '**Find**')}\n\n**Answer:** 7",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_planted_problems_are_found(against, variant):
    """Pins contamination that hides in another case, spacing or LaTeX, or in a long document: all of it is found."""
    choice = random.Random(variant)
    missed = []
    for number, text in enumerate(BENCHMARK):
        for _ in range(4):
            planted = VARIANTS[variant](text, choice)
            if f"eval:{number}" not in [match.problem for match in against.find(planted)]:
                missed.append(planted)
    assert missed == []


def clean_problems(count: int) -> list[str]:
    """Problems of the same genre that are not in BENCHMARK: a third each from other phrases, from the benchmark's own
    templates with other numbers, and from reasoning-gym."""
    choice = random.Random(0)
    things = [choice.choice(THINGS).format(choice.randint(2, 99)) for _ in range(count // 3)]
    conditions = [choice.choice(CONDITIONS).format(choice.randint(2, 99)) for _ in range(count // 3)]
    phrased = [choice.choice(PHRASES).format(*pair) for pair in zip(things, conditions, strict=True)]
    renumbered = [problem(choice.choice(TEMPLATES), seed) for seed in range(100, 100 + count // 3)]
    tasks = ("basic_arithmetic", "chain_sum", "gcd", "lcm", "leg_counting", "prime_factorization", "simple_equations",
             "time_intervals", "products", "fraction_simplification")  # fmt: skip
    size = (count - len(phrased) - len(renumbered)) // len(tasks) + 1
    gym = [item["question"] for task in tasks for item in reasoning_gym.create_dataset(task, size=size, seed=5)]
    own = {squeezed(canonical(text)) for text in BENCHMARK}  # a template may get the same numbers by chance
    return [text for text in phrased + renumbered + gym if squeezed(canonical(text)) not in own][:count]


def test_clean_problems_are_left_alone(against):
    """Pins alarms at shared phrases ("Find the number of ... such that ..."): at most 0.1 % of 10,000 problems."""
    texts = clean_problems(10_000)
    assert len(texts) == 10_000
    alarms = [(text, match) for text in texts for match in against.find(text)]
    assert len(alarms) <= 10, alarms[:3]


SHORT = ["Find 0+3.", "What is 0+1?", "Compute $7!$.", "Hi"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Find 0+3.", [0]),
        ("Q: FIND  0 + 3 .\nA: 3", [0]),
        ("First find $0+3$; then rest.", [0]),
        ("Find 0+3+5.", []),
        ("Find 0+35.", []),
        ("Find 0+3. 5 apples are left.", [0]),
        ("Find 10+3.", []),
        ("Find 0-3.", []),
        ("What is 0+1? What is 0+12?", [1]),
        ("hi", [3]),
        ("Hi there", []),
        ("nothing of this", []),
    ],
)
def test_short_problems_stand_alone(text, found):
    """Pins "Find 0+3" found in "Find 0+35", and a problem of two letters found in every text."""
    assert [int(match.problem[5:]) for match in contamination(SHORT).find(text)] == found


def test_what_decides_a_match(against):
    """Pins the rules' edges: another number, a typing error, a phrase, and a long quotation of a longer problem."""
    text = BENCHMARK[21]  # of some 400 characters
    number = re.search(r"\d+", text)
    assert against.find(text.replace("coffee", "coffe")) != []
    assert against.find(text.replace(number[0], str(int(number[0]) + 1))) == []
    assert against.find("where $m$ and $n$ are relatively prime positive integers. Find $m+n$.") == []
    long = " ".join(f"Line number {word} tells of the {word[::-1]}." for word in dir(str))
    assert [match.kind for match in contamination([long + " 1 2 3" * 200]).find(long)] == ["run"]
    assert contamination([long + " 1 2 3" * 200]).find(long[:250]) == []
    (match,) = against.find(embedded(text, random.Random(0)))
    assert match.text_excerpt.startswith("Every morning Aya")
    assert match.problem_excerpt == text[:300]


def counted(form: str, first: int = 1):
    """A writing that puts a number before each sentence."""

    def write(text: str) -> str:
        sentences = re.split(r"(?<=[.?!])\s+", text)
        return " ".join(form.format(number) + sentence for number, sentence in enumerate(sentences, first))

    return write


DISGUISES = {
    "decimal entities": lambda text: "".join(f"&#{ord(character)};" for character in text),
    "hexadecimal entities": lambda text: "".join(f"&#x{ord(character):X};" for character in text),
    "entities of marks": lambda text: re.sub(r"[^\w\s]", lambda match: f"&#{ord(match[0])};", text),
    "entities in entities": lambda text: "".join(f"&amp;#{ord(character)};" for character in text),
    "1.": counted("{}. "),
    "1": counted("{} "),
    "(1)": counted("({}) "),
    "[7]": counted("[{}] ", 7),
    "#1": counted("#{} "),
    "**1.**": counted("**{}.** "),
    "1)": counted("\n{}) "),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_disguised_problems_are_found(against, name):
    """Pins problems in HTML's numeric entities, and with a number before each sentence: none was found."""
    missed = [number for number, problem in enumerate(BENCHMARK) if not against.find(DISGUISES[name](problem))]
    assert missed == []
    embedding = "Here is one more for today. {} Think well, and say why."
    missed = [n for n, problem in enumerate(BENCHMARK) if not against.find(embedding.format(DISGUISES[name](problem)))]
    assert missed == []


def test_other_numbers_at_a_sentence_s_beginning_are_another_problem():
    """Pins a template taken for its problem because its other numbers look like a count of sentences."""
    problem = (
        "There are 5 people in a room of an old house. 3 of them are tall. 2 of them sing. How many ways to line up?"
    )
    found = contamination([problem])
    assert found.find(problem) != []
    for other in (problem.replace(" 3 of", " 13 of"), problem.replace(" 3 of", " 13 of").replace(" 2 of", " 12 of")):
        assert found.find(other) == []


def test_symbols_and_commands_become_the_same():
    """Pins canonical forms that differ between plain text and LaTeX."""
    pairs = [
        (r"\(\dfrac12 \cdot 1{,}000 \leq \pi r^2\)", "½ · 1,000 ≤ πr²"),
        (r"$$\left\lfloor x \right\rfloor \neq \sqrt{2}$$", "⌊x⌋ ≠ √2"),
        (r"\begin{align*} a &= b \\ \text{and } c &\ge \mathbb{R} \end{align*}", "a = b\nand c >= R"),
        (r"\angle ABC = 90^{\circ}, \ldots", "∠ABC = 90°…"),
    ]
    for latex, plain in pairs:
        assert squeezed(canonical(latex)) == squeezed(canonical(plain))
    assert squeezed(canonical("x+1")) != squeezed(canonical("x-1"))


def test_monotonous_text_takes_no_time(against):
    """Pins every zero of a text paired with every zero of a problem: 10^9 pairs here."""
    zeros = contamination(["Print the matrix. " + "0 " * 10_000])
    assert [match.kind for match in zeros.find("x " * 100 + "0 " * 100_000)] == []
    assert zeros.find("Print the matrix. " + "0 " * 10_000) != []


# The commands


CODE = "Read two integers a and b from the first line and print their greatest common divisor on a line of its own."


def evaluation_folders(folder: Path) -> list[Path]:
    """AIME, GPQA and LiveCodeBench as evalscope reads them."""
    rows = {
        "aime24/test.jsonl": {"id": 0, "problem": BENCHMARK[0], "answer": "3"},
        "gpqa/train.jsonl": {"Question": BENCHMARK[6], "Correct Answer": "1", "Incorrect Answer 1": "2"},
        "own/mine.jsonl.gz": {"task": BENCHMARK[12]},
    }
    for name, row in rows.items():
        (folder / name).parent.mkdir(parents=True)
        data = (json.dumps(row) + "\n").encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (folder / "lcb" / "v5").mkdir(parents=True)
    table = pa.table({"question_title": ["gcd"], "question_content": [CODE], "starter_code": [""]})
    pq.write_table(table, folder / "lcb" / "v5" / "test-00000-of-00001.parquet")
    (folder / "lcb" / "README.md").write_text("configs:")
    return [folder / "aime24", folder / "gpqa" / "train.jsonl", folder / "lcb"]


def test_kept_records_lose_nothing(tmp_path):
    """Pins a traceback over decimals, bytes and times of a table, integers above 64 bits written as floats, and nulls
    that the table made, written into records that do not have the field."""
    sets = evaluation_folders(tmp_path / "eval")
    lines = [b'{"text": "one",  "n": 42391158275216203514294433201, "x": 1.50, "y": NaN}', b'{"text": "tw\\u006f"}']
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    columns = {
        "text": ["three"],
        "price": pa.array([Decimal("1.50")]),
        "raw": [b"\xff"],
        "at": pa.array([1700000000123456789], pa.timestamp("ns")),
        "nested": [[{"cost": Decimal("12345678901234567890.5")}]],
        "of_others": pa.array([None], pa.string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    inputs = [str(tmp_path / name) for name in ("in.jsonl", "in.parquet")]
    command = ["decontaminate", "--input", *inputs, "--against", str(sets[0]), "--drop", "--output"]
    assert prepare_data.main([*command, str(tmp_path / "out")]) == 0
    kept = (tmp_path / "out" / "kept.jsonl").read_bytes().split(b"\n")
    assert kept[:2] == lines
    assert kept[2] == (
        b'{"text":"three","price":1.50,"raw":"/w==","at":"2023-11-14 22:13:20.123456789",'
        b'"nested":[{"cost":12345678901234567890.5}]}'
    )


def test_decontaminate_reports_drops_and_fails(tmp_path, capsys, caplog):
    """Pins formats of evaluation sets that are passed over, a report without pairs, --drop that drops others."""
    sets = evaluation_folders(tmp_path / "eval")
    records = [
        {"messages": [{"role": "user", "content": BENCHMARK[0].upper()}, {"role": "assistant", "content": "3"}]},
        {"text": "Nothing of this is in any evaluation set, as far as anybody knows."},
        {"prompt": [{"role": "user", "content": BENCHMARK[6]}], "label": "4"},
        {"text": CODE},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    command = ["decontaminate", "--input", str(data), "--against", *map(str, sets)]

    assert prepare_data.main([*command, "--output", str(tmp_path / "report")]) == 0
    assert json.loads(capsys.readouterr().out) | {"output": ""} == {"output": "", "records": 4, "overlaps": 3}
    report = json.loads((tmp_path / "report" / "overlap.json").read_text())
    pairs = [(match["where"].rpartition(":")[2], Path(match["problem"]).name[:4]) for match in report["matches"]]
    assert pairs == [("1", "test"), ("3", "trai"), ("4", "test")]
    assert [len(receipt["sha256"]) for receipt in report["against"]] == [64] * 3
    assert BENCHMARK[6] in (tmp_path / "report" / "overlap.txt").read_text()

    assert prepare_data.main([*command, "--output", str(tmp_path / "clean"), "--drop"]) == 0
    kept = [json.loads(line) for line in (tmp_path / "clean" / "kept.jsonl").read_text().splitlines()]
    assert kept == [records[1]]
    assert prepare_data.main(["verify", str(tmp_path / "clean")]) == 0
    assert prepare_data.main([*command, "--output", str(tmp_path / "failed"), "--fail"]) == 2
    assert "3 records overlap with 3 problems" in caplog.records[-1].getMessage()

    own = ["decontaminate", "--input", str(data), "--output", str(tmp_path / "own"), "--against"]
    assert prepare_data.main([*own, str(tmp_path / "eval" / "own")]) == 2
    assert "--against-key" in caplog.records[-1].getMessage()
    assert prepare_data.main([*own, str(tmp_path / "eval" / "own"), "--against-key", "task"]) == 0
    (tmp_path / "empty").mkdir()
    assert prepare_data.main([*own, str(tmp_path / "empty")]) == 2
    assert "holds no .jsonl" in caplog.records[-1].getMessage()
