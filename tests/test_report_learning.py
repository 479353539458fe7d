"""Reinforcement learning and evaluation in the quickstart's report, on a folder made up here: its numbers are known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import HOSTILE, ORIGIN, Page, change_json, make_quickstart, printed, report, write_json

from infir2.rl import arguments as rl_arguments

learned = report.learned

STEPS = 4
RUNS = {f"rl_stage{number}": f"InfiR2_RL_FP8_tiny_stage{number}" for number in (1, 2)}
SCORES = "evaluation/aime24/report/scores.json"
# Of 100 problems, how many are right: of rl1's, of rl2's.
RIGHT = {"InfiR2_SFT_FP8_tiny_stage2": (30, 10), RUNS["rl_stage1"]: (40, 12), RUNS["rl_stage2"]: (50, 20)}
STUDENT_199 = 1.9720  # 97.5 % quantile of Student's t with 199 degrees of freedom, from a table


def step_line(step: int, stage: int = 1, **changes: float) -> dict:
    """A step as infir2.rl.log writes it; 10 s in stage 1, 20 s in stage 2, divided otherwise."""
    line = {"step": step, "rollout/score": step / 8, "rollout/length": 60.0, "gap/gen_kl_error": step / 4096}
    line |= {"seconds/step": 10.0 * stage, "seconds/generation": 6.0, "seconds/training": 3.0, "seconds/sync": 0.5}
    return line | {name.replace("__", "/"): value for name, value in changes.items()}


def evaluation_line(step: int, mean: float) -> dict:
    return {"step": step, "eval/valid/mean": mean, "eval/valid/truncated": 0.0, "eval/valid/length": 60.0}


def write_metrics(run: Path, lines: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def first_right(share: int) -> dict:
    return {"answers": [None] * 100, "right": [number < share for number in range(100)]}


def estimate(value: float, half: float = 0.0625, few: bool = False) -> dict:
    low, high = value - half, value + half
    return {"value": value, "standard_error": half / 2, "low": low, "high": high, "few_problems": few}


def score(average: float, few: bool = False) -> dict:
    """A model's score as eval_report.py writes it, as far as the report reads it, and one name more."""
    parts = {"average": estimate(average, few=few), "truncated": estimate(0.25), "invalid": estimate(0.125)}
    return {"problems": 128, "samples": 1, "pass_at": {"1": estimate(average)}} | parts


def write_scores(folder: Path, differences: list[dict]) -> None:
    models = {RUNS["rl_stage2"]: score(0.5), "FP8": score(0.4375, few=True), HOSTILE: score(0.75)}
    write_json(folder / SCORES, {"benchmarks": {"aime24": {"scores": models, "differences": differences}}})


def difference(one: str, other: str, value: float, half: float = 0.0625) -> dict:
    return {"one": one, "other": other, "estimate": estimate(value, half), "verdict": ""}


def add_learning(folder: Path) -> Path:
    """Reinforcement learning of 4 steps a stage, and an evaluation."""
    with (folder / "stages.tsv").open("a") as file:
        results = {"rl_stage1": "reinforced1", "rl_stage2": "reinforced2", "rl_accuracy": "rl_accuracy.json"}
        results["evaluation"] = "evaluation/aime24/report"
        for number, (stage, result) in enumerate(results.items(), 1):
            file.write(f"{stage}\t{100 * number}\t{ORIGIN / result}\n")
    for number, name in enumerate(RUNS.values(), 1):
        write_json(folder / name / "checkpoints/run.json", {"train_iters": STEPS})
        steps = [step_line(step, number) for step in range(1, STEPS + 1)]
        write_metrics(folder / name, [evaluation_line(0, 0.25), *steps[:3], evaluation_line(STEPS, 0.5), steps[3]])
    models = {name: {"rl1": first_right(easy), "rl2": first_right(hard)} for name, (easy, hard) in RIGHT.items()}
    write_json(folder / "rl_accuracy.json", {"labels": {}, "models": models})
    write_scores(folder, [difference("FP8", RUNS["rl_stage2"], -0.0625, 0.125)])
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return add_learning(make_quickstart(tmp_path / "quickstart"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A folder with its report; drawing takes seconds, so once."""
    folder = add_learning(make_quickstart(tmp_path_factory.mktemp("learned") / "quickstart"))
    assert report.main([str(folder)]) == 0
    return folder


def verdict(folder: Path, claim: str) -> str:
    """The line of the one verdict that begins with `claim`, after it."""
    (line,) = [line for line in printed(folder).splitlines() if line.startswith(claim)]
    return line.removeprefix(claim)


GAIN = "reinforcement learning adds at least 5 points over both stages: "
GATE = "trainer and engine agree: gen_kl_error at most 0.003 in every step: "
CAST = "the FP8 model answers as its BF16 original through evalscope: "


def test_tables_hold_what_was_written(folder):
    """Pins shares, gains, times and scores that come from anywhere but the files, or of other pairs of models."""
    text = printed(folder)
    rows = [line.split() for line in text.splitlines()]
    # Wilson: the shares x at which (p - x)^2 = t^2 x (1 - x) / N; N is 199, as the variance of 200 problems has ddof 1.
    p, t2 = 0.35, STUDENT_199**2 / 199
    low, high = sorted(np.roots([1 + t2, -2 * p - t2, p**2]).real)
    # Of 200 problems 30 became right and none wrong.
    half = 100 * STUDENT_199 * np.sqrt(0.15 * 0.85 / 199)
    gain = f"+15.0 (+{15 - half:.1f} to +{15 + half:.1f})"
    assert f"rl_stage2 both: 200 problems 35.0 ({100 * low:.1f}–{100 * high:.1f}) {gain}".split() in rows  # noqa: RUF001
    assert [row[5] for row in rows if row[:3] == ["rl_stage1", "three", "and"]] == ["40.0"]
    assert [row[5] for row in rows if row[:3] == ["rl_stage2", "four", "numbers"]] == ["+10.0"]
    assert "rl_stage1 4 40 60.0 30.0 5.0 5.0".split() in rows
    assert "rl_stage2 4 80 30.0 15.0 2.5 52.5".split() in rows
    assert "FP8 4 80 InfiR2_RL_FP8_tiny_stage2".split() in rows
    assert "FP8 43.8 (37.5–50.0)* 25.0 (18.8–31.2) 12.5 (6.2–18.8)".split() in rows  # noqa: RUF001
    assert "128 held-out sums in the form of the benchmark aime24, 1 answer to each" in text
    assert verdict(folder, GAIN) == f"yes (20.0 % to 35.0 %: {gain} points, 200 problems)"
    assert verdict(folder, GATE) == "yes (largest 0.000977, in step 4 of rl_stage1; 8 steps)"
    assert verdict(folder, CAST) == "yes (FP8 − BF16: -6.2 (-18.8 to +6.2) points)"  # noqa: RUF001
    assert text.count(": yes (") == 10


@pytest.mark.parametrize(("right", "said"), [((39, 10), "no (20.0 % to 24.5 %: +4.5"), ((40, 10), "yes (20.0 %")])
def test_gain_below_the_limit_fails(folder, right, said):
    """Pins the limit of 5 points, and that it is of both sets together: rl2 gains nothing here."""
    change_right(folder, RUNS["rl_stage2"], right)
    assert verdict(folder, GAIN).startswith(said)


def test_gain_that_may_be_none_fails(folder):
    """Pins a gain told from its mean alone: of 200 problems 50 became right, but 40 others became wrong."""
    models = json.loads((folder / "rl_accuracy.json").read_text())["models"]
    for name, (begin, end) in {"InfiR2_SFT_FP8_tiny_stage2": (0, 40), RUNS["rl_stage2"]: (40, 90)}.items():
        models[name]["rl1"]["right"] = [begin <= number < end for number in range(100)]
        models[name]["rl2"]["right"] = [False] * 100
    write_json(folder / "rl_accuracy.json", {"models": models})
    assert verdict(folder, GAIN).startswith("no (20.0 % to 25.0 %: +5.0 (-4.")


def change_right(folder: Path, model: str, shares: tuple[int, int]) -> None:
    models = json.loads((folder / "rl_accuracy.json").read_text())["models"]
    models[model] = {name: first_right(share) for name, share in zip(("rl1", "rl2"), shares, strict=True)}
    write_json(folder / "rl_accuracy.json", {"models": models})


@pytest.mark.parametrize(("value", "said"), [(0.00302, "no (largest 0.00302"), (float("nan"), "no (largest nan")])
def test_gap_above_the_gate_is_said(folder, value, said):
    """Pins one bad step among good ones that is passed over, a limit rounded away, and a NaN that compares as small."""
    steps = [step_line(step) for step in range(1, STEPS + 1)]
    steps[1]["gap/gen_kl_error"] = value
    write_metrics(folder / RUNS["rl_stage2"], steps)
    assert verdict(folder, GATE) == f"{said}, in step 2 of rl_stage2; 8 steps)"


def test_steps_on_left_over_samples_are_no_gap(folder):
    """Pins what an update changed, told as a gap between trainer and engine."""
    steps = [step_line(step) for step in range(1, STEPS + 1)]
    steps[2]["lag/gen_kl_error"] = 0.5
    del steps[2]["gap/gen_kl_error"]
    write_metrics(folder / RUNS["rl_stage2"], steps)
    assert verdict(folder, GATE) == (
        "yes (largest 0.000977, in step 4 of rl_stage1; 7 steps, without 1 that sampled nothing anew)"
    )


def test_gate_is_that_of_the_runs():
    """Pins a report that holds runs against another gate than their own."""
    assert rl_arguments.MAX_GEN_KL["fp8"] == learned.GAP_LIMIT


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((RUNS["rl_stage2"], "FP8", 0.0625, 0.125), "yes (FP8 − BF16: -6.2 (-18.8 to +6.2)"),  # noqa: RUF001
        (("FP8", RUNS["rl_stage2"], -0.125, 0.0625), "no (FP8 − BF16: -12.5 (-18.8 to -6.2)"),  # noqa: RUF001
        (("FP8", "InfiR2_RL_FP8_tiny_stage1", 0.0, 0.125), None),
    ],
)
def test_cast_model_is_compared_with_its_original(folder, pair, said):
    """Pins a sign turned by the pair's order, a difference that is hidden, and a verdict about other models."""
    write_scores(folder, [difference("FP8", HOSTILE, -0.5), difference(*pair)])
    if said is None:
        assert CAST not in printed(folder)
    else:
        assert verdict(folder, CAST).startswith(said)


def test_step_that_is_there_twice_counts_once(folder):
    """Pins a resumed run whose repeated steps add to the time, or whose first try is told."""
    run = folder / RUNS["rl_stage1"]
    again = [step_line(4, rollout__score=0.75, gap__gen_kl_error=0.0005, seconds__step=70.0), evaluation_line(4, 0.625)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    found = report.load(folder).learning.runs["rl_stage1"]
    assert found.reward == {1: 0.125, 2: 0.25, 3: 0.375, 4: 0.75}
    assert found.gap[4] == 0.0005
    assert found.evaluated == {0: 0.25, 4: 0.625}
    assert found.seconds == {"step": 100.0, "generation": 24.0, "training": 12.0, "sync": 2.0}


DAMAGE = {
    "cut line": lambda text: text[:-30],
    "step without its gap": lambda text: text.replace("gap/gen_kl_error", "gap/other", 1),
    "step that is no number": lambda text: text.replace('"rollout/score": 0.25', '"rollout/score": null'),
    "missing step": lambda text: "".join(line for line in text.splitlines(True) if '"step": 2,' not in line),
    "run that stopped": lambda text: "".join(text.splitlines(True)[:2]),
    "nothing": lambda text: "",
    "no object": lambda text: "3\n" + text,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics_name_the_stage(folder, capsys, damage):
    """Pins a traceback, a curve with a hole, and advice after which the finished run writes nothing new."""
    metrics = folder / RUNS["rl_stage2"] / "metrics.jsonl"
    metrics.write_text(DAMAGE[damage](metrics.read_text()))
    assert report.main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"{metrics} cannot be read" in message
    assert f"'rl_stage2' makes it: remove {metrics.parent} and {ORIGIN / 'reinforced2'}, then" in message
    assert not list(folder.glob("*report*"))


@pytest.mark.parametrize(
    ("name", "stage"),
    {
        f"{RUNS['rl_stage1']}/metrics.jsonl": "rl_stage1",
        f"{RUNS['rl_stage2']}/checkpoints/run.json": "rl_stage2",
        "rl_accuracy.json": "rl_accuracy",
        SCORES: "evaluation",
    }.items(),
)
def test_missing_file_is_named_with_its_stage(folder, capsys, name, stage):
    """Pins a report that goes without a section whose stage did run."""
    (folder / name).unlink()
    assert report.main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"{folder / name} is missing. The stage '{stage}' makes it: remove" in message


def test_models_asked_other_problems_are_refused(folder, capsys):
    """Pins a paired gain over problems that are not pairs."""
    models = json.loads((folder / "rl_accuracy.json").read_text())["models"]
    models[RUNS["rl_stage1"]]["rl2"]["right"].pop()
    write_json(folder / "rl_accuracy.json", {"models": models})
    assert report.main([str(folder)]) == 2
    assert "not asked the same problems" in capsys.readouterr().err


def test_folder_without_reinforcement_learning(tmp_path):
    """Pins a report that wants stages that MODEL=smollm2-135m has not, or shows empty sections and panels for them."""
    quickstart = report.load(make_quickstart(tmp_path / "quickstart"))
    text = report.text_report(quickstart)
    assert "einforcement" not in text
    assert "evalscope" not in text
    assert report.reinforcement_section(quickstart) == report.evaluation_section(quickstart) == ""
    assert [axes.get_ylabel() for axes in report.draw_learning(quickstart, 9, 4).axes] == [
        "held-out problems right (%)"
    ]


def test_model_is_named_by_its_runs(tmp_path):
    """Pins runs sought under the tiny model's name, and random weights claimed of a base that was trained before."""
    folder = make_quickstart(tmp_path / "quickstart")
    for run in folder.glob("InfiR2_*_tiny*"):
        run.rename(folder / run.name.replace("tiny", "smollm2-135m"))
    accuracy = folder / "accuracy.json"
    accuracy.write_text(accuracy.read_text().replace("tiny", "smollm2-135m"))
    text = printed(folder)
    assert "InfiR2_SFT_BF16_smollm2-135m_stage2" in text
    assert "The base model was trained before; pre-training goes on with these 40 steps" in text
    assert "random" not in text


def test_other_than_one_model_is_refused(folder, capsys):
    """Pins a report that picks one of two models by chance, and a traceback where there is none."""
    (folder / "InfiR2_CPT_FP8_other").mkdir()
    assert report.main([str(folder)]) == 2
    assert "holds 2 runs InfiR2_CPT_FP8_*: other, tiny." in capsys.readouterr().err
    for run in folder.glob("InfiR2_CPT_FP8_*"):
        run.rename(folder / f"gone_{run.name}")
    assert report.main([str(folder)]) == 2
    assert "The stage 'pretraining' makes it" in capsys.readouterr().err


def test_figure_shows_the_numbers(folder):
    """Pins curves of one stage over the other's, a gap on a linear axis, a gate elsewhere, and intervals of nothing."""
    accuracy, reward, gap = report.draw_learning(report.load(folder), 9, 5).axes
    assert [line.get_ydata().tolist() for line in reward.lines[:1]] == [[0.125, 0.25, 0.375, 0.5]]
    first, second = (line.get_xdata() for line in gap.lines if len(line.get_xdata()) == STEPS)
    assert list(first) == [1, 2, 3, 4]
    assert list(second) == [6, 7, 8, 9]  # its step 0 stands at 5, beside the last of the first
    points = [point.get_offsets().tolist() for point in reward.collections]
    assert points == [[[0, 0.25], [4, 0.5]], [[5, 0.25], [9, 0.5]]]
    assert gap.get_yscale() == "log"
    assert [0.003, 0.003] in [list(line.get_ydata()) for line in gap.lines]
    drawn = [bars.lines[0].get_ydata().tolist() for bars in accuracy.containers]
    assert drawn == [[0, 90, 80], [1, 92, 80], [0, 10, 60], [0, 8, 62], pytest.approx([20, 26, 35])]
    low, high = accuracy.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert low == 0
    assert high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))  # Clopper and Pearson: none of 100 was right


def test_page_tells_the_chain_and_stands_alone(reported):
    """Pins a model's name that becomes markup, ids that two figures share, and links that lead elsewhere."""
    html = (reported / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "embed", "img"}
    assert "<script>alert(1)</script>" in page.words
    assert "\x1b" not in html
    own = {target for target in page.targets if not target.startswith(("#", "data:"))}
    assert own == {"data/manifest.json", "evaluation/aime24/report/scores.html"}
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    for words in ("+15.0 (+10.0 to +20.0)", "largest 0.000977", "60.0", "gate 0.003", "fine-tuned, then trained"):
        assert words in page.words
    colours = set(re.findall(r"#[0-9a-f]{6}\b", html[html.index("<svg") : html.rindex("</svg>")]))
    assert not colours & set(report.LIGHT.values())
    assert "\x1b" not in printed(reported)
    assert (reported / "report_learning.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_bars_are_of_the_longest_stage(reported):
    """Pins bars of runs or of the total, and a scale that is not the longest stage's."""
    html = (reported / "report.html").read_text(encoding="utf-8")
    widths = [float(width) for width in re.findall(r'class="bar"><i style="width:([0-9.]+)%"', html)]
    seconds = [*range(10, 20), 100, 200, 300, 400]
    assert widths == [pytest.approx(100 * one / 400, abs=0.051) for one in seconds]


def test_change_of_scores_format_is_named(folder, capsys):
    """Pins a table of the wrong numbers, or a traceback, where scores.json is not what it was."""
    change_json(folder / SCORES, benchmarks={"aime25": {}})
    assert report.main([str(folder)]) == 2
    assert f"{folder / SCORES} cannot be read" in capsys.readouterr().err
