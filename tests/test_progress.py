"""The page of a quickstart that is under way, and the lines in place of bars."""

import html.parser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from infir2.events import LoggedStep, logged_steps

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tools"))
progress, side_by_side = (importlib.import_module(name) for name in ("quickstart_progress", "side_by_side"))

MEGATRON = (
    " [2026-12-01 01:44:39] iteration {step:8d}/     320 | consumed samples: 448 | elapsed time per iteration "
    "(ms): 250.0 | throughput: 0.1 | learning rate: 5.0E-04 | lm loss: {loss:.6E} | loss scale: 1 |\n"
)
STAGES = ["corpus", "pretraining", "sft_stage1", "accuracy", "rl_stage1", "evaluation"]


def test_steps_are_read_from_logs():
    """Pins: a log's format that changed, so that nobody sees a run's progress."""
    text = "noise\n" + MEGATRON.format(step=7, loss=3.25)
    text += "[rl] step 2 of 10: reward 0.367, length 63, gen_kl_error 0.00000, 12.1 s (generation 8.8, training 3.2)\n"
    text += "[rl] step 3 of 10: reward 0.438, length 64, gen_kl_error 0.0 (all of an earlier policy), 3.2 s (training 3"
    assert logged_steps(text) == [
        LoggedStep(7, 320, "loss", 3.25, 0.25),
        LoggedStep(2, 10, "reward", 0.367, 12.1),
        LoggedStep(3, 10, "reward", 0.438, 3.2),
    ]


@pytest.fixture
def folder(tmp_path):
    """A quickstart in the middle of its pre-training, on a machine half as fast as the reference."""
    (tmp_path / "running").mkdir()
    corpus = 2 * progress.REFERENCE["corpus"][0]
    (tmp_path / "stages.tsv").write_text(f"corpus\t{corpus}\t{tmp_path}/corpus\nhalf a li")
    (tmp_path / "running/pretraining").touch()
    for label, steps in (("FP8", 40), ("BF16", 60)):
        run = tmp_path / f"InfiR2_CPT_{label}_tiny"
        run.mkdir()
        lines = [MEGATRON.format(step=step, loss=7 - step / 50) for step in range(1, steps + 1)]
        (run / "log.txt").write_text("".join(lines) + " [2026-12-01 01:44:39] iteration    ")
    return tmp_path


def test_time_left(folder):
    """Of a stage that logs steps, those that are left; of the others, the reference times how slow this machine is."""
    now = (folder / "running/pretraining").stat().st_mtime
    found = progress.read_progress(folder, STAGES, now + 30)
    assert found.slowness == 2
    assert found.left("pretraining") == pytest.approx((320 - 40) * 0.25)
    assert found.left("sft_stage1") == 2 * progress.REFERENCE["sft_stage1"][0]
    ahead = sum(2 * progress.REFERENCE[stage][0] for stage in ("sft_stage1", "rl_stage1", "evaluation"))
    assert found.all_left == pytest.approx((320 - 40) * 0.25 + ahead)  # answers are counted beside others


def test_before_anything(tmp_path):
    """Pins: a page that waits for the first stage's end."""
    found = progress.read_progress(tmp_path, STAGES, 0.0)
    assert found.slowness == 1
    assert found.all_left == sum(progress.REFERENCE[stage][0] for stage in STAGES if stage != "accuracy")
    assert "<polyline" not in progress.page(found, quick=False)


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.points = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "polyline":
            self.points.append(dict(attributes)["points"].split())

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(folder):
    """One picture for each stage that logged a loss, a curve a run; a line a stage; each tag is closed."""
    command = [sys.executable, str(REPO / "tools/quickstart_progress.py"), str(folder), "--once", "--quick"]
    for stage in STAGES:
        command += ["--stage", stage]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "training")}
    subprocess.run(command, check=True, env=environment)
    text = (folder / "report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    assert sorted(map(len, tags.points)) == [41, 61]  # the last point twice
    assert text.count("<tr") == len(STAGES)
    assert "Its scores mean nothing" in text
    assert 'http-equiv="refresh"' in text
    assert not {"http://", "https://"} & set(text.split('"'))


def test_stages_of_the_script_are_known():
    """Pins: a stage that the script runs and the page does not know."""
    text = (REPO / "scripts/quickstart.sh").read_text()
    names = set(re.findall(r"(?:^ +|then |beside )stage (\w+) ", text, re.MULTILINE))
    assert names <= progress.REFERENCE.keys()
    assert {"corpus", "pretraining", "evaluation", "rl_accuracy"} <= names


def test_lines_where_nobody_watches(capsys):
    """A file gets a line at each quarter of the run that is behind, of a resumed one too, and no carriage return.
    Pins: a stream of bars in a log."""
    quarters = side_by_side.Quarters()
    fast, slow = (SimpleNamespace(label=label, step=0, steps=0, said="loss 3.000") for label in ("BF16", "FP8"))
    quarters.update([fast, slow])  # neither has begun
    for step in range(16, 321, 8):
        slow.step, slow.steps, fast.step, fast.steps = step, 320, min(320, step + 40), 320
        quarters.update([fast, slow])
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert [re.search(r"FP8 step (\d+) of 320, loss 3.000; about \d+ s left", line)[1] for line in lines] == [
        *("80", "160", "240", "320"),
    ]
