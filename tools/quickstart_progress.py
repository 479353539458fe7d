#!/usr/bin/env python
"""Write the quickstart's page while it runs: what is done, what runs, how long the rest will take, losses so far.

    python tools/quickstart_progress.py exp/quickstart --stage corpus --stage pretraining ...

Runs beside scripts/quickstart.sh until it is ended, and writes QUICKSTART/report.html every few seconds; the finished
page of tools/quickstart_report.py takes its place. Reads stages.tsv (what is done), running/ (a file for each stage
that runs, named like it) and the logs of the runs. The standard library alone: it starts at once and costs little.

How long a stage will take is its time on one machine (REFERENCE), times how much slower this one was on what it has
done; of a stage that logs its steps, the steps that are left times the time of one.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from infir2.events import logged_steps
from infir2.files import write_text

SECONDS = 3  # between two pages
RELOAD = 10  # seconds after which a browser asks again

# Seconds of each stage on 2 cores of an AMD EPYC with BF16 instructions, and what it is called.
REFERENCE = {
    "corpus": (10, "Text from packages, and a tokenizer"),
    "base": (5, "A base model, random weights"),
    "data": (2, "The text as tokens"),
    "base_torch_dist": (4, "The base in Megatron's format"),
    "pretraining": (80, "Pre-training, FP8 beside BF16"),
    "conversations": (1, "Sums as conversations"),
    "bigram": (2, "A bigram model to compare with"),
    "sft_data1": (2, "Conversations of stage 1 as tokens"),
    "sft_data2": (4, "Conversations of stage 2 as tokens"),
    "sft_stage1": (110, "Fine-tuning, stage 1: two numbers"),
    "sft_stage2": (150, "Fine-tuning, stage 2: three numbers"),
    "tuned_to_hf": (2, "The model in Hugging Face's format"),
    "accuracy": (60, "Answers of each stage's models counted"),
    "early_evaluation": (40, "The models so far through evalscope"),
    "rl_stage1": (60, "Reinforcement learning, stage 1"),
    "rl_stage2": (60, "Reinforcement learning, stage 2"),
    "to_hf": (2, "The last model in Hugging Face's format"),
    "to_fp8": (2, "Cast to block FP8"),
    "answers": (5, "Three answers"),
    "rl_accuracy": (40, "Answers after reinforcement learning counted"),
    "evaluation": (40, "Evaluation through evalscope"),
}
BESIDE = {"accuracy", "early_evaluation", "rl_accuracy"}  # they run beside others: their time adds nothing
CURVES = {"pretraining": "CPT_*", "sft_stage1": "SFT_*_stage1", "sft_stage2": "SFT_*_stage2"}
CURVES |= {"rl_stage1": "RL_*_stage1", "rl_stage2": "RL_*_stage2"}


@dataclass
class Curve:
    """What a run logged: its value by step, of how many steps, and the seconds of the last ones."""

    values: list[tuple[int, float]] = field(default_factory=list)
    total: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def left(self) -> float | None:
        """Seconds that the steps left will take; None before the third step."""
        if len(self.seconds) < 3:
            return None
        recent = sorted(self.seconds[1:][-20:])  # without the first step, which warms up
        return (self.total - self.values[-1][0]) * recent[len(recent) // 2]


def read_curve(log: Path) -> Curve:
    """The curve of a run's log; empty where it says nothing yet."""
    curve = Curve()
    for step in logged_steps(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []:
        curve.values.append((step.step, step.value))
        curve.total = step.steps
        curve.seconds.append(step.seconds)
    return curve


@dataclass
class Progress:
    """The state of a quickstart: seconds of each finished stage, seconds since each running one began, curves."""

    stages: list[str]
    done: dict[str, int]
    running: dict[str, float]
    curves: dict[str, dict[str, Curve]]  # stage to FP8 or BF16 to curve

    @property
    def slowness(self) -> float:
        """How many times longer than on the reference machine the finished stages took."""
        both = [(seconds, REFERENCE[stage][0]) for stage, seconds in self.done.items() if stage in REFERENCE]
        return max(0.2, sum(seconds for seconds, _ in both) / sum(expected for _, expected in both)) if both else 1.0

    def left(self, stage: str) -> float:
        """Seconds that a stage which is not done will still take."""
        of_steps = [curve.left for curve in self.curves.get(stage, {}).values()]
        if stage in self.running and of_steps and None not in of_steps:
            return max(of_steps)
        return max(0.0, REFERENCE[stage][0] * self.slowness - self.running.get(stage, 0.0))

    @property
    def all_left(self) -> float:
        return sum(self.left(stage) for stage in self.stages if stage not in self.done and stage not in BESIDE)


def read_progress(folder: Path, stages: list[str], now: float) -> Progress:
    """What the files in the quickstart's folder say. Half-written and foreign lines are passed over."""
    done: dict[str, int] = {}
    tsv = folder / "stages.tsv"
    for line in tsv.read_text(encoding="utf-8").split("\n") if tsv.is_file() else []:
        words = line.split("\t")
        if len(words) == 3 and words[1].isdigit():
            done[words[0]] = int(words[1])
    began = {path.name: path.stat().st_mtime for path in (folder / "running").glob("*")}
    running = {stage: now - begin for stage, begin in began.items() if stage in stages and stage not in done}
    curves = {}
    for stage, pattern in CURVES.items():
        runs = {path.name.split("_")[2]: path / "log.txt" for path in sorted(folder.glob(f"InfiR2_{pattern}"))}
        if stage in stages and (stage in done or stage in running):
            curves[stage] = {label: read_curve(log) for label, log in runs.items()}
    return Progress(stages, done, running, curves)


# The page


def in_words(seconds: float) -> str:
    """About how long: "40 s", "12 min"."""
    return f"{max(5, 5 * round(seconds / 5))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def row(progress: Progress, stage: str) -> str:
    """A stage's line of the table: its name, a bar, and its time."""
    curves = [curve for curve in progress.curves.get(stage, {}).values() if curve.values]
    share = min((curve.values[-1][0] / curve.total for curve in curves), default=0.0)
    if stage in progress.done:
        state, share, words = "done", 1.0, f"{progress.done[stage]} s"
    elif stage in progress.running:
        state, words = "now", f"about {in_words(progress.left(stage))} left"
        if curves:
            words = f"step {min(c.values[-1][0] for c in curves)} of {curves[0].total}, {words}"
    else:
        state, words = "", f"about {in_words(progress.left(stage))}"
    return (
        f'<tr class="{state}"><td>{escape(REFERENCE[stage][1])}</td>'
        f'<td class="bar"><i style="width:{100 * share:.0f}%"></i></td><td class="n">{words}</td></tr>'
    )


def panel(stage: str, curves: dict[str, Curve]) -> str:
    """The curves of a stage as a picture of 440 x 200 units."""
    shown = {label: curve for label, curve in curves.items() if len(curve.values) > 1}
    if not shown:
        return ""
    of_all = [value for curve in shown.values() for _, value in curve.values]
    low, high, steps = min(of_all), max(of_all), max(curve.total for curve in shown.values())
    high = high if high > low else low + 1
    lines = []
    for label, curve in shown.items():
        points = curve.values[:: max(1, len(curve.values) // 300)] + curve.values[-1:]
        at = " ".join(f"{44 + 390 * s / steps:.1f},{12 + 160 * (high - v) / (high - low):.1f}" for s, v in points)
        lines.append(f'<polyline class="{label.lower()}" points="{at}"/>')
    last = ", ".join(f"{label} {curve.values[-1][1]:.3f}" for label, curve in shown.items())
    what = "reward" if stage.startswith("rl") else "loss"
    axis = (
        f'<path d="M44 12V172H434"/><text x="38" y="18" text-anchor="end">{high:.2f}</text>'
        f'<text x="38" y="174" text-anchor="end">{low:.2f}</text>'
        f'<text x="434" y="190" text-anchor="end">step {steps}</text>'
    )
    title = escape(REFERENCE[stage][1])
    return (
        f'<figure><figcaption>{title}<small>{what}: {last}</small></figcaption><svg viewBox="0 0 440 196" role="img" '
        f'aria-label="{title}, {what} by step: {last}">{axis}{"".join(lines)}</svg></figure>'
    )


def page(progress: Progress, quick: bool) -> str:
    """The page of a quickstart that is under way."""
    names = [REFERENCE[stage][1] for stage in progress.running if stage not in BESIDE] or ["starting"]
    return Template(PAGE).substitute(
        reload=RELOAD,
        now=escape(names[0]),
        left=in_words(progress.all_left),
        quick='<p class="quick">A quick run: it shows that the installation works. Its scores mean nothing.</p>'
        * quick,
        rows="\n".join(row(progress, stage) for stage in progress.stages),
        panels="".join(panel(stage, curves) for stage, curves in reversed(progress.curves.items())),
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="refresh" content="$reload">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>InfiR2 quickstart: $now</title>
<style>
:root { --page: #ffffff; --ink: #1f2328; --muted: #656d76; --grid: #e4e7eb; --shade: #f3f4f7; --fp8: #d55e00;
  --bf16: #0072b2; --done: #00795a; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --ink: #e6e8eb; --muted: #9aa4af; --grid: #30363d;
  --shade: #1b212a; --fp8: #ff9b5e; --bf16: #62b5ee; --done: #3fc79a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 58rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .4rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
p { margin: .5rem 0; max-width: 44rem; }
.lead { font-size: 1.15rem; } .lead b { font-weight: 600; }
.note, small { color: var(--muted); font-size: .85rem; }
.quick { padding: .6rem 1rem; border-radius: .5rem; background: var(--shade); border-left: .25rem solid var(--fp8); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin: 1.6rem 0; }
figure { margin: 0; padding: .8rem 1rem; border-radius: .5rem; background: var(--shade); }
figcaption small { display: block; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
path { fill: none; stroke: var(--muted); } text { fill: var(--muted); font: 11px system-ui, sans-serif; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.fp8 { stroke: var(--fp8); } .bf16 { stroke: var(--bf16); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--grid); color: var(--muted); }
td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { width: 30%; } .bar i { display: block; height: .5rem; border-radius: .25rem; background: var(--done); }
.now td { color: var(--ink); font-weight: 600; } .now .bar i { background: var(--fp8); } .done td { color: var(--ink); }
@media (max-width: 40rem) { .bar { width: 4rem; } body { padding-top: 1.5rem; } td { font-size: .84rem; } }
</style>
</head>
<body>
<h1>InfiR2 quickstart</h1>
<p class="lead"><b>$now</b>, about $left to the finished page</p>
$quick
<p class="note">This page renews itself. Orange is FP8, blue its BF16 control on the same data in the same order.
Times are estimates from what this machine has done so far.</p>
<div class="panels">$panels</div>
<table>
$rows
</table>
</body>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, metavar="QUICKSTART_DIR", help="folder of scripts/quickstart.sh")
    parser.add_argument("--stage", action="append", required=True, choices=list(REFERENCE), help="in order; repeat")
    parser.add_argument("--quick", action="store_true", help="say that scores mean nothing")
    parser.add_argument("--once", action="store_true", help="write the page once and end")
    args = parser.parse_args()
    while True:
        write_text(
            args.quickstart / "report.html", page(read_progress(args.quickstart, args.stage, time.time()), args.quick)
        )
        if args.once:
            return
        time.sleep(SECONDS)


if __name__ == "__main__":
    sys.exit(main())
