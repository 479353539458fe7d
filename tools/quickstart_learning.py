"""What the quickstart's model learned from stage to stage: accuracy, reinforcement learning, scores through evalscope.

A part of tools/quickstart_report.py, which says where the files are. Here they are read, and become rows of tables,
verdicts and a figure. Intervals hold 95 % over problems; those of differences are paired (infir2.evaluation.scores).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infir2.evaluation import scores
from infir2.evaluation.scores import Estimate

TRAINING = {"pretraining": "pre-\ntraining", "sft_stage1": "SFT 1", "sft_stage2": "SFT 2"}  # the figure's words
REINFORCING = {"rl_stage1": "RL 1", "rl_stage2": "RL 2"}
PARENT = "sft_stage2"  # reinforcement learning starts from it
PROBLEMS = {"rl1": "three and four numbers", "rl2": "four numbers"}  # the held-out problems of each stage
POOLED = "both"
BENCHMARK = "aime24"  # evalscope's name of the form in which it asks the held-out sums
CAST = "FP8"  # the name under which the last model, cast to block FP8, is asked

GAIN_LIMIT = 5.0  # points
GAP_LIMIT = 0.003  # the gate of runs whose engine is in FP8: infir2.rl.arguments.MAX_GEN_KL

# Names in metrics.jsonl (infir2.rl.log).
SCORE, GAP, EVALUATION = "rollout/score", "gap/gen_kl_error", "eval/valid/mean"
LAG = "lag/gen_kl_error"  # in place of GAP, in a step that trained on what an earlier policy left over
PHASES = ("generation", "training", "sync")
SECONDS = {phase: f"seconds/{phase}" for phase in ("step", *PHASES)}

# Okabe and Ito's colours, told apart by the colour-blind; the page replaces each by a CSS variable of the same name.
LIGHT = {"ink": "#1f2328", "muted": "#656d76", "grid": "#e4e7eb", "shade": "#f3f4f7"}
LIGHT |= {"fp8": "#d55e00", "bf16": "#0072b2", "bigram": "#00795a", "gap": "#6f4a8e"}
HOLLOW = {"facecolor": "none", "linewidth": 1.3, "clip_on": False}  # a point at the last step is drawn whole


@dataclass(frozen=True)
class Verdict:
    """A claim, whether it holds, and the numbers behind it."""

    claim: str
    holds: bool
    numbers: str

    @property
    def word(self) -> str:
        return "yes" if self.holds else "no"


# Reading. ValueError, LookupError and TypeError say that a file is damaged.


@dataclass(frozen=True)
class Reinforced:
    """A run of reinforcement learning, from step (counted from 1) to value."""

    name: str
    reward: dict[int, float]  # mean score of the samples that the step trained on
    gap: dict[int, float]  # gen_kl_error between trainer and engine, nats per token, of steps that sampled anew
    evaluated: dict[int, float]  # mean score of greedy answers to validation problems, at some steps from 0 on
    seconds: dict[str, float]  # of all steps: "step" in whole, and each of PHASES


@dataclass(frozen=True)
class Learning:
    """All that is read beside the pre-training and the fine-tuning; empty where the quickstart has no such stage."""

    runs: dict[str, Reinforced] = field(default_factory=dict)  # by stage
    right: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # stage to set to [problems], 0 or 1
    benchmark: dict[str, Any] = field(default_factory=dict)  # scores.json's part of BENCHMARK


def run_names(model: str) -> dict[str, str]:
    """Folders of the runs of reinforcement learning, by stage."""
    return {stage: f"InfiR2_RL_FP8_{model}_stage{number}" for number, stage in enumerate(REINFORCING, 1)}


def read_metrics(path: Path, steps: int) -> Reinforced:
    """A run's metrics.jsonl; of a step or an evaluation that is there twice, the last line counts.

    ValueError names a damaged line, and refuses a run that has not all steps from 1 to `steps`.
    """
    taken: dict[int, dict[str, float]] = {}
    evaluated: dict[int, float] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                if SCORE in values:
                    names = (SCORE, LAG if LAG in values else GAP, *SECONDS.values())
                    taken[values["step"]] = {name: float(values[name]) for name in names}
                elif EVALUATION in values:
                    evaluated[values["step"]] = float(values[EVALUATION])
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"line {number} holds no step and no evaluation ({error!r})") from None
    if taken.keys() != set(range(1, steps + 1)):
        raise ValueError(f"it holds {len(taken)} steps, and the run has the steps from 1 to {steps}")
    curves = [{step: taken[step][name] for step in sorted(taken) if name in taken[step]} for name in (SCORE, GAP)]
    seconds = {phase: sum(values[name] for values in taken.values()) for phase, name in SECONDS.items()}
    return Reinforced(path.parent.name, *curves, dict(sorted(evaluated.items())), seconds)


def read_right(path: Path, models: dict[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Of rl_accuracy.json: which problems the model of each stage (`models`) answers right, by set and for POOLED."""
    found = json.loads(path.read_text(encoding="utf-8"))["models"]
    right = {
        stage: {problems: np.array(found[name][problems]["right"], dtype=float) for problems in PROBLEMS}
        for stage, name in models.items()
    }
    counts = {tuple(values.size for values in sets.values()) for sets in right.values()}
    if len(counts) > 1 or min(counts.pop()) < 2:
        raise ValueError("its models were not asked the same problems, at least two of each set")
    return {stage: sets | {POOLED: np.concatenate(list(sets.values()))} for stage, sets in right.items()}


def read_benchmark(path: Path) -> dict[str, Any]:
    """BENCHMARK's part of eval_report.py's scores.json: `scores` by model, `differences`; estimates as Estimate."""
    found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][BENCHMARK]
    estimates = ("average", "truncated", "invalid")
    return {
        "scores": {
            model: {name: Estimate(**score[name]) for name in estimates}
            | {name: int(score[name]) for name in ("problems", "samples")}
            for model, score in found["scores"].items()
        },
        "differences": {(pair["one"], pair["other"]): Estimate(**pair["estimate"]) for pair in found["differences"]},
    }


# Tables and verdicts

RIGHT_HEADER = ("after", "held-out problems", "FP8, % right", f"gain over {PARENT}, points")
RIGHT_NOTE = "Greedy answers. Intervals: 95 %, over problems; the gain is paired."
PHASE_HEADER = ("stage", "steps", "seconds", *(f"{phase}, %" for phase in PHASES), "other, %")
PHASE_NOTE = "Seconds of all steps, and how they divide. Other: evaluations, saving, and what lies between the phases."
SCORE_HEADER = ("model", "score, %", "truncated, %", "no answer found, %")


def share_text(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    mark = "*" if estimate.few_problems else ""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}\N{EN DASH}{100 * estimate.high:.1f}){mark}"


def gain_text(estimate: Estimate) -> str:
    """A difference with its interval, in points."""
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def gain(learning: Learning, stage: str, problems: str) -> Estimate:
    """From PARENT to a stage, paired by problem; a fraction of 1."""
    return scores.difference(learning.right[stage][problems], learning.right[PARENT][problems])


def right_rows(learning: Learning) -> list[tuple[str, ...]]:
    """For each set of problems, and both: the share answered right after each stage, and the gain since PARENT."""
    return [
        (
            stage,
            PROBLEMS.get(problems, f"{problems}: {sets[problems].size:,} problems"),
            share_text(scores.share(sets[problems])),
            "" if stage == PARENT else gain_text(gain(learning, stage, problems)),
        )
        for problems in (*PROBLEMS, POOLED)
        for stage, sets in learning.right.items()
    ]


def phase_rows(learning: Learning) -> list[tuple[str, ...]]:
    """Where each stage's seconds went."""
    rows = []
    for stage, run in learning.runs.items():
        total = run.seconds["step"]
        parts = [run.seconds[phase] for phase in PHASES]
        shares = [f"{100 * seconds / total:.1f}" for seconds in (*parts, total - sum(parts))]
        rows.append((stage, f"{len(run.reward):,}", f"{total:,.0f}", *shares))
    return rows


def score_rows(learning: Learning) -> list[tuple[str, ...]]:
    """Each model's score through evalscope."""
    names = ("average", "truncated", "invalid")
    found = learning.benchmark.get("scores", {})
    return [(model, *(share_text(score[name]) for name in names)) for model, score in found.items()]


def score_note(learning: Learning) -> str:
    found = learning.benchmark["scores"].values()
    problems = ", ".join(sorted({f"{score['problems']:,}" for score in found}))
    samples = ", ".join(sorted({str(score["samples"]) for score in found}))
    answers = "answer" if samples == "1" else "answers"
    few = any(score[name].few_problems for score in found for name in ("average", "truncated", "invalid"))
    return (
        f"{problems} held-out sums in the form of the benchmark {BENCHMARK}, {samples} {answers} to each, asked and "
        f"scored by evalscope. {CAST} is the last model, cast to block FP8; the others are served in BF16."
        + (" * too few problems carry the value: its interval is too narrow." if few else "")
    )


def verdicts(learning: Learning) -> list[Verdict]:
    """What reinforcement learning and the evaluation are there to show."""
    found = []
    if learning.runs:
        found += [gain_verdict(learning), gap_verdict(learning)]
        found += cast_verdict(learning, list(learning.runs.values())[-1].name)
    return found


def gain_verdict(learning: Learning) -> Verdict:
    last = list(learning.runs)[-1]
    gained = gain(learning, last, POOLED)
    before, after = (100 * learning.right[stage][POOLED].mean() for stage in (PARENT, last))
    return Verdict(
        f"reinforcement learning adds at least {GAIN_LIMIT:g} points over both stages",
        bool(100 * gained.value >= GAIN_LIMIT and gained.low > 0),
        f"{before:.1f} % to {after:.1f} %: {gain_text(gained)} points, {learning.right[last][POOLED].size:,} problems",
    )


def gap_verdict(learning: Learning) -> Verdict:
    found = [(gap, step, stage) for stage, run in learning.runs.items() for step, gap in run.gap.items()]
    largest, step, stage = max(found, key=lambda one: (one[0] != one[0], one[0]))  # a NaN is the largest
    lagging = sum(len(run.reward) for run in learning.runs.values()) - len(found)
    return Verdict(
        f"trainer and engine agree: gen_kl_error at most {GAP_LIMIT:g} in every step",
        largest <= GAP_LIMIT,
        f"largest {largest:.3g}, in step {step} of {stage}; {len(found)} steps"
        + (f", without {lagging} that sampled nothing anew" if lagging else ""),
    )


def cast_verdict(learning: Learning, original: str) -> list[Verdict]:
    """Of CAST beside the model that it was cast from; none where they were not compared."""
    differences = learning.benchmark.get("differences", {})
    pair = next((pair for pair in differences if set(pair) == {CAST, original}), None)
    if pair is None:
        return []
    found = differences[pair]
    sign = 1 if pair[0] == CAST else -1
    low, high = sorted((sign * found.low, sign * found.high))
    turned = Estimate(sign * found.value + 0.0, found.standard_error, low, high)  # + 0.0: no negative zero
    numbers = f"{CAST} \N{MINUS SIGN} BF16: {gain_text(turned)} points"
    return [Verdict("the FP8 model answers as its BF16 original through evalscope", low <= 0 <= high, numbers)]


# The figure

Shares = dict[tuple[str, str], dict[str, np.ndarray]]  # (FP8 or BF16, problems) to stage to [problems], 0 or 1
RL_PROBLEMS = "RL's problems"
MARKERS = {"two numbers": "o", "three numbers": "^", RL_PROBLEMS: "D"}


def draw(learning: Learning, shares: Shares, width: float, height: float) -> Any:
    """The figure, sizes in inches: accuracy by stage and, with reinforcement learning, its reward and its gap by step.

    A wide one has accuracy on the left, a narrow one on top.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.04)
    if not learning.runs:
        draw_accuracy(quiet(figure.add_subplot()), shares, list(TRAINING))
        return figure
    if width > height:
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.1))
        places = grid[:, 0], grid[0, 1], grid[1, 1]
    else:
        places = figure.add_gridspec(3, 1, height_ratios=(1.35, 1, 1))
    left, top = (quiet(figure.add_subplot(place)) for place in (places[0], places[1]))
    bottom = quiet(figure.add_subplot(places[2], sharex=top))
    pooled = {("FP8", RL_PROBLEMS): {stage: sets[POOLED] for stage, sets in learning.right.items()}}
    draw_accuracy(left, shares | pooled, [*TRAINING, *learning.runs])
    draw_reward(top, learning)
    draw_engine_gap(bottom, learning)
    figure.align_ylabels([top, bottom])
    return figure


def quiet(axes: Any) -> Any:
    """The axes without what says nothing."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=LIGHT["muted"], labelsize=10, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    return axes


def draw_accuracy(axes: Any, shares: Shares, stages: list[str]) -> None:
    """Answers right after each stage, with intervals; BF16's stand a little to the right of FP8's."""
    names = TRAINING | REINFORCING
    shift = len(stages) / 90
    for (label, problems), measured in shares.items():
        found = [scores.share(right) for right in measured.values()]
        value, low, high = 100 * np.array([(one.value, one.low, one.high) for one in found]).T
        first = label == "FP8"
        axes.errorbar(
            np.array([stages.index(stage) for stage in measured]) + (-shift if first else shift),
            value,
            yerr=(value - low, high - value),
            color=LIGHT["fp8" if first else "bf16"],
            marker=MARKERS[problems],
            markerfacecolor=LIGHT["fp8"] if first else "none",
            markersize=6 if MARKERS[problems] != "D" else 5,
            linewidth=1.6 if first else 1.2,
            linestyle="-" if first else (0, (4, 2)),
            elinewidth=1.2,
            clip_on=False,
            zorder=4 if first else 3,
        )
    axes.set_xticks(range(len(stages)), [names[stage] for stage in stages])
    axes.tick_params(axis="x", pad=7)  # clear of points at 0
    axes.set_xlim(-0.35, len(stages) - 0.65)
    axes.set_ylim(0, 100)
    axes.set_ylabel("held-out problems right (%)", color=LIGHT["ink"], fontsize=10.5)
    told = [problems for problems in MARKERS if any(problems == name for _, name in shares)]
    for problems in told:
        axes.plot([], [], color=LIGHT["ink"], marker=MARKERS[problems], linestyle="none", label=problems)
    axes.plot([], [], color=LIGHT["fp8"], linewidth=1.6, label="FP8")
    axes.plot([], [], color=LIGHT["bf16"], linewidth=1.2, linestyle=(0, (4, 2)), label="BF16")
    legend(axes, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.01), borderpad=0, columnspacing=1.6)


def legend(axes: Any, **where: Any) -> None:
    axes.legend(frameon=False, fontsize=10, labelcolor=LIGHT["ink"], **where)


def offsets(learning: Learning) -> dict[str, int]:
    """What is added to each run's steps so that the runs stand one after the other, step 0 of the next included."""
    lengths = [max(run.reward) + 1 for run in learning.runs.values()]
    return dict(zip(learning.runs, np.cumsum([0, *lengths]).tolist(), strict=False))


def along(curve: dict[int, float], offset: int) -> tuple[list[int], list[float]]:
    """Places on the common axis of steps, and values."""
    return [step + offset for step in curve], list(curve.values())


def draw_reward(axes: Any, learning: Learning) -> None:
    """Reward of both runs, one after the other, with the greedy evaluations as points."""
    points = HOLLOW | {"marker": "D", "s": 24, "edgecolor": LIGHT["ink"], "zorder": 5}
    for stage, offset in offsets(learning).items():
        run = learning.runs[stage]
        told = stage == next(iter(learning.runs))
        line = {"color": LIGHT["fp8"], "linewidth": 1.8, "zorder": 4}
        axes.plot(*along(run.reward, offset), **line, label="samples trained on" if told else None)
        if run.evaluated:
            axes.scatter(*along(run.evaluated, offset), **points, label="greedy, validation" if told else None)
        mark_stage(axes, offset, max(run.reward), REINFORCING[stage])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("reward", color=LIGHT["ink"], fontsize=10.5)
    axes.tick_params(labelbottom=False)
    legend(axes, loc="lower right", bbox_to_anchor=(1, 1.06), borderpad=0, ncols=2, columnspacing=1.2)


def mark_stage(axes: Any, offset: int, steps: int, name: str = "") -> None:
    """A line where a run ends and the next begins, and the run's name inside it."""
    if offset:
        axes.axvline(offset - 0.5, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    where = {"ha": "center", "va": "bottom", "fontsize": 9, "color": LIGHT["muted"]}
    axes.annotate(name, (offset + steps / 2, 1), (0, 2), ("data", "axes fraction"), "offset points", **where)


def draw_engine_gap(axes: Any, learning: Learning) -> None:
    """gen_kl_error by step, and the gate that no step may pass."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    ticks: dict[int, str] = {}
    for stage, offset in offsets(learning).items():
        run = learning.runs[stage]
        line = {"color": LIGHT["gap"], "linewidth": 1.4, "marker": "o", "markersize": 3, "clip_on": False, "zorder": 4}
        axes.plot(*along(run.gap, offset), **line)
        last = max(run.reward)
        mark_stage(axes, offset, last)
        steps = [int(step) for step in MaxNLocator(4, integer=True).tick_values(0, last) if step <= last]
        ticks |= {offset + step: str(step) for step in steps if step or not offset}  # a second 0 would touch the end
    axes.axhline(GAP_LIMIT, color=LIGHT["ink"], linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=3)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, GAP_LIMIT / 20), max(high, GAP_LIMIT * 2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    where = {"ha": "left", "va": "bottom", "fontsize": 9, "color": LIGHT["muted"]}
    axes.annotate(f"gate {GAP_LIMIT:g}", (0, GAP_LIMIT), (2, 2), "data", "offset points", **where)
    axes.set_ylabel("gen_kl_error\n(nats per token)", color=LIGHT["ink"], fontsize=10.5)
    axes.set_xlabel("step of each stage", color=LIGHT["ink"], fontsize=10.5)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(0, offset + last)
