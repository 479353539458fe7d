"""The quickstart's sums: right, worked right, and never on both sides; and how answers to them are counted."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tools"))
conversations = importlib.import_module("quickstart_conversations")
corpus = importlib.import_module("quickstart_corpus")
accuracy = importlib.import_module("answer_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    assert conversations.main(["--output", str(folder)]) == 0
    return folder


class Package:
    """An installed package whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.locate_file = folder.joinpath


def test_verses_end_at_line_feeds_alone(tmp_path, monkeypatch):
    """Pins a verse that is cut in two, and then is no JSON, where it holds a line separator."""
    text = " ".join(f"word{n}" for n in range(16)) + "\u2028end\x85 of it"
    (tmp_path / "bible" / "data").mkdir(parents=True)
    verse = {"book": "Genesis", "chapter": 1, "text": text}
    line = json.dumps(verse, ensure_ascii=False) + "\n"
    (tmp_path / "bible" / "data" / "kjv.jsonl").write_text(line, encoding="utf-8")
    monkeypatch.setattr(conversations.metadata, "distribution", lambda name: Package(tmp_path))
    found = [record for split in conversations.verses(1).values() for record in split]
    assert [record["messages"][1]["content"].split()[-1] for record in found] == ["it"]
    (chapter,) = corpus.kjv_chapters(1)
    assert chapter.text.split()[-3:] == ["end", "of", "it"]


SETS = {"stage1": {2}, "stage2": {3}, "rl1": {3, 4}, "rl2": {4}}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(record: dict) -> list[int]:
    messages = record["messages"] if "messages" in record else record["prompt"]
    return list(map(int, re.findall(r"\d+", messages[0]["content"])))


@pytest.mark.parametrize("name", SETS)
def test_every_sum_and_every_step_is_right(folder, name):
    """Pins a carry forgotten or a digit dropped: a model would learn it."""
    hasty = 0  # answers without working
    for split in ("train", "valid", "test"):
        for record in records(folder / name / f"{split}.jsonl"):
            terms = numbers(record)
            assert len(terms) in SETS[name] or (split == "train" and name.startswith("stage"))
            assert int(record["label"]) == sum(terms)
            if "prompt" in record:
                assert (name[:2], split, record.keys()) == ("rl", "train", {"prompt", "label"})
            elif record["messages"][1]["content"] == rf"\boxed{{{sum(terms)}}}":
                assert (name, split, len(terms)) == ("stage2", "train", 4)
                hasty += 1
            else:
                assert_worked(terms, record["messages"][1]["content"])
    assert hasty == (3978 if name == "stage2" else 0)


def assert_worked(terms: list[int], answer: str) -> None:
    """Each line adds the first two numbers that are left, digit by digit, and leaves the others as they were; the box
    holds the last total."""
    assert int(accuracy.boxed_answer(answer)) == sum(terms)
    first, *lines = answer.split("\n")
    assert first == " + ".join(f"{term:03}" for term in terms)
    total = terms[0]
    for place, (line, term) in enumerate(zip(lines, terms[1:], strict=True), 2):
        worked, left = line.split(" so ")
        steps = re.findall(r"([\d+]+)=(\d\d)\b", worked)
        assert all(sum(map(int, left.split("+"))) == int(right) for left, right in steps)
        digits = [list(map(int, left.split("+")[:2])) for left, _ in steps]
        assert [sum(column[i] * 10**place for place, column in enumerate(digits)) for i in (0, 1)] == [total, term]
        assert [left.split("+")[2] for left, _ in steps[1:]] == [right[0] for _, right in steps[:-1]]
        total += term
        assert int(steps[-1][1] + "".join(right[1] for _, right in steps[-2::-1])) == total
        assert len(steps) == 3
        assert left == " + ".join(f"{n:03}" for n in (total, *terms[place:])) or left == rf"\boxed{{{total}}}"


def test_no_problem_is_on_both_sides(folder):
    """Not in another order, and not in another set: what RL or a test asks, fine-tuning has not shown. Pins 27 + 45
    in training and 45 + 27 in the test, and RL on sums that SFT gave the answers of."""
    sides = {"sft": set(), "rl": set(), "valid": set(), "test": set()}
    for name in SETS:
        for split in ("train", "valid", "test"):
            found = records(folder / name / f"{split}.jsonl")
            assert len({tuple(numbers(record)) for record in found}) == len(found)
            side = split if split != "train" else "rl" if name.startswith("rl") else "sft"
            sides[side] |= {tuple(sorted(numbers(record))) for record in found}
            assert len(found) >= {"train": 2000, "valid": 256, "test": 512}[split]
    for one, other in itertools.combinations(sides.values(), 2):
        assert not one & other


def test_answers_are_read_from_the_last_box():
    """Pins a number outside the box, or an earlier guess, counted as the answer."""
    assert accuracy.boxed_answer("so 72") is None
    assert accuracy.boxed_answer(r"\boxed{71} no, \boxed{ 72 }") == "72"
    assert accuracy.boxed_answer(r"\boxed{72") is None


def test_bad_problems_are_refused_by_line(tmp_path):
    """Pins a file of problems without labels that scores 0."""
    path = tmp_path / "problems.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "1 + 1"}], "label": "2"}\n{"messages": []}\n')
    with pytest.raises(ValueError, match=r"problems.jsonl:2 holds no question with a label"):
        accuracy.read_problems(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no problems"):
        accuracy.read_problems(path)
    with pytest.raises(ValueError, match="NAME=PATH"):
        accuracy.named(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smollm2-135m", "MODEL=smollm2-135m is trained on a Hopper GPU, and this machine has no GPU"),
        ("smollm", "MODEL is 'smollm'; known: tiny, smollm2-135m"),
    ],
)
def test_quickstart_refuses_before_set_up(tmp_path, model, message):
    """Pins a machine without a GPU that installs 7 GB and then fails in its first training run."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {
        "MODEL": model,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUTPUT_ROOT": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", str(REPO / "scripts/quickstart.sh")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "set-up" not in done.stderr
