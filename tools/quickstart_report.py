#!/usr/bin/env python
"""Report on a finished quickstart: tables on stdout; report.png, report_learning.png and report.html in its folder.

    python tools/quickstart_report.py exp/quickstart

The page needs no network and no script. Every number is read from the files that the stages left: stages.tsv, each
run's TensorBoard events, run.json, command.sh, commit and log.txt, metrics.jsonl of reinforcement learning, the counted
answers, evalscope's scores, and the receipts of the data. Without reinforcement learning or evaluation the report goes
without their sections. A verdict that fails is printed as such, and the exit status is still 0; it is 2 where a file is
missing or the runs cannot be compared.
"""

import argparse
import difflib
import io
import itertools
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import quickstart_learning as learned
from quickstart_learning import HOLLOW, LIGHT, Learning, Verdict, legend, quiet

from infir2.events import read_scalars
from infir2.files import json_lines
from infir2.precision import PRECISIONS
from infir2.receipts import MANIFEST, sha256_file

# Which stages train a run in each precision, and the run's folder. The verdicts compare the first pair.
TRAINED = {
    "pretraining": "InfiR2_CPT_{precision}_{model}",
    "sft_stage1": "InfiR2_SFT_{precision}_{model}_stage1",
    "sft_stage2": "InfiR2_SFT_{precision}_{model}_stage2",
}
RANDOM_BASES = {"tiny"}  # models whose base had learned nothing
SCORES = "evaluation/aime24/report/scores.json"
# What the report reads beside the runs: a file, the stage that makes it, and what it must hold.
FILES = (
    ("corpus/sources.json", "corpus", ()),
    ("data/manifest.json", "data", ("outputs", "splits")),
    ("bigram.json", "bigram", ("nats_per_token",)),
    ("answers.json", "answers", ("model", "answers")),
    ("accuracy.json", "accuracy", ("models",)),
)
FACTS = ("train_iters", "padded_vocab_size", "global_batch_size", "seq_length", "num_layers", "hidden_size")
QUICK_NOTE = "A quick run, of a few steps a stage: it shows that the installation works. Its scores mean nothing."
GAP_LIMIT_PERCENT = 1.0  # what the recipe claims for FP8 beside its BF16 twin
PREPARED = ("data", "sft_data1", "sft_data2")  # folders of tools/prepare_data.py, each with its receipt
PROBLEMS = {"stage1": "two numbers", "stage2": "three numbers"}  # the held-out problems of each stage
BEFORE_LIMIT, AFTER_LIMIT, GAIN_LIMIT, TWIN_LIMIT = 10.0, 60.0, 20.0, 3.0  # percent, and points
PRECISION_FACTS = {"fp8", "fp8_recipe", "scale_fmt"}
PROOF = re.compile(r"^\[infir2\] (backend .*: (\d+) of (\d+) linear layers in FP8)$", re.MULTILINE)
ANSWER_COLUMNS = 96  # of one answer in the terminal

# The page's colours on a dark ground, by the names of LIGHT.
DARK = {"ink": "#e6e8eb", "muted": "#9aa4af", "grid": "#30363d", "shade": "#1b212a"}
DARK |= {"fp8": "#ff9b5e", "bf16": "#62b5ee", "bigram": "#3fc79a", "gap": "#c3a1e0"}


class ReportError(Exception):
    """The report cannot be made; the message says what was wrong and what to do."""


# Reading


@dataclass(frozen=True)
class Stage:
    """One line of stages.tsv."""

    name: str
    seconds: int
    result: Path


@dataclass(frozen=True)
class Run:
    """One training run: its facts, its command's words, and its curves from step to value."""

    label: str
    name: str
    facts: dict[str, Any]  # of run.json
    words: list[str]
    commit: str
    proof: str  # what the run said of its precision when it started
    linears_in_fp8: int
    linears: int
    loss: dict[int, float]  # nats per token, of each training step
    held_out: dict[int, float]  # nats per token, at some steps
    step_seconds: dict[int, float]


@dataclass(frozen=True)
class Quickstart:
    """All that the report is made from."""

    folder: Path
    model: str  # in the names of its runs
    stages: list[Stage]
    runs: dict[str, dict[str, Run]]  # stage to label to run
    sources: list[dict[str, Any]]
    manifest: dict[str, Any]
    manifest_sha256: str
    bigram: dict[str, Any]
    answers: dict[str, Any]
    accuracy: dict[str, dict[str, dict[str, list]]]  # run's name to set of problems to `right`, one for each problem
    learning: Learning
    quick: bool = False  # a few steps a stage: the numbers say nothing

    @property
    def fp8(self) -> Run:
        return self.runs["pretraining"]["FP8"]

    @property
    def bf16(self) -> Run:
        return self.runs["pretraining"]["BF16"]

    @property
    def origin(self) -> Path:
        """The folder's path when the runs ran, from their --save: it may have been moved since."""
        words = self.fp8.words
        saved = words.index("--save") + 1 if "--save" in words else len(words)
        return Path(words[saved]).parents[1] if saved < len(words) else self.folder.resolve()

    def relative(self, path: Path) -> str:
        """`path` below the quickstart's folder, or as it is where it lies elsewhere."""
        for parent in (self.origin, self.folder.resolve(), self.folder):
            if path.is_relative_to(parent):
                return str(path.relative_to(parent))
        return str(path)


def load(folder: Path, quick: bool = False) -> Quickstart:
    """Read a finished quickstart, `quick` as in Quickstart.

    ReportError names a file that is missing or damaged, and the stage that makes it.
    """
    stages = read_stages(folder / "stages.tsv")
    model = find_model(folder)
    results = {stage.name: stage.result for stage in stages}
    found = {}
    for name, stage, keys in FILES:
        with blaming(folder / name, stage, results):
            found[name] = read_json(folder / name, keys)
    runs = {
        stage: {label: read_run(folder / name, label, stage, results) for label, name in names.items()}
        for stage, names in run_names(model).items()
        if stage in results or stage == "pretraining"
    }
    check_comparable(*runs["pretraining"].values())
    return Quickstart(
        folder,
        model,
        stages,
        runs,
        sources=found["corpus/sources.json"],
        manifest=found["data/manifest.json"],
        manifest_sha256=sha256_file(folder / "data/manifest.json"),
        bigram=found["bigram.json"],
        answers=found["answers.json"],
        accuracy=found["accuracy.json"]["models"],
        learning=read_learning(folder, model, results),
        quick=quick,
    )


def find_model(folder: Path) -> str:
    """The model's name, from its pre-training in FP8."""
    prefix = TRAINED["pretraining"].format(precision="FP8", model="")
    found = sorted(path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir())
    if not found:
        raise ReportError(
            f"{folder} holds no run {prefix}*. The stage 'pretraining' makes it: run bash scripts/quickstart.sh again."
        )
    if len(found) > 1:
        raise ReportError(
            f"{folder} holds {len(found)} runs {prefix}*: {', '.join(found)}. A quickstart has one; give each model a "
            "folder of its own with QUICKSTART."
        )
    return found[0]


def run_names(model: str) -> dict[str, dict[str, str]]:
    """Stage to FP8 or BF16 to the run's folder."""
    labels = ("FP8", "BF16")
    return {
        stage: {label: name.format(precision=label, model=model) for label in labels} for stage, name in TRAINED.items()
    }


def read_learning(folder: Path, model: str, results: dict[str, Path]) -> Learning:
    """Reinforcement learning, if one of its stages ran (then both must have), and the evaluation, if it ran."""
    runs, right, benchmark = {}, {}, {}
    names = learned.run_names(model)
    if names.keys() & results.keys():
        for stage, name in names.items():
            facts, metrics = folder / name / "checkpoints/run.json", folder / name / "metrics.jsonl"
            with blaming(facts, stage, results, folder / name):
                steps = read_json(facts, ("train_iters",))["train_iters"]
            with blaming(metrics, stage, results, folder / name):
                runs[stage] = learned.read_metrics(metrics, steps)
        measured = {learned.PARENT: run_names(model)[learned.PARENT]["FP8"]} | names
        with blaming(folder / "rl_accuracy.json", "rl_accuracy", results):
            right = learned.read_right(folder / "rl_accuracy.json", measured)
    if "evaluation" in results:
        with blaming(folder / SCORES, "evaluation", results):
            benchmark = learned.read_benchmark(folder / SCORES)
    return Learning(runs, right, benchmark)


def read_json(path: Path, keys: tuple[str, ...]) -> Any:
    """A JSON file. ValueError names the first of `keys` that its object lacks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        if key not in content:
            raise ValueError(f"it holds no '{key}'")
    return content


@contextmanager
def blaming(path: Path, stage: str, results: dict[str, Path], finished: Path | None = None) -> Iterator[None]:
    """Turn what goes wrong while reading `path` into a ReportError that says how to get it.

    `finished` is a run that has to be removed too: the stage would find it at its end, and do nothing.
    """
    removed = [str(one) for one in (finished, results.get(stage)) if one]
    remove = f"remove {' and '.join(removed)}, " if removed else ""
    remedy = f"The stage '{stage}' makes it: {remove}then run bash scripts/quickstart.sh again."
    try:
        yield
    except FileNotFoundError:
        raise ReportError(f"{path} is missing. {remedy}") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ReportError(f"{path} cannot be read: {error}. {remedy}") from error


def read_stages(path: Path) -> list[Stage]:
    """The stages in the order in which they first ran; of one that ran again, the last line counts."""
    if not path.is_file():
        raise ReportError(f"{path} is missing. Every stage adds a line to it: run bash scripts/quickstart.sh first.")
    stages: dict[str, Stage] = {}
    for number, line in enumerate(json_lines(path), 1):
        try:
            name, seconds, result = line.split("\t")
            stage = Stage(name, int(seconds), Path(result))
        except ValueError:
            raise ReportError(
                f"{path}, line {number} is {line!r}, not name, seconds and result. Remove the line; its stage's time "
                "will be left out."
            ) from None
        stages[name] = stage
    return list(stages.values())


def read_run(folder: Path, label: str, stage: str, results: dict[str, Path]) -> Run:
    """A finished run. ReportError where a file is missing, or the run ended before its last step."""

    def read(name: str, parse: Callable[[Path], Any] = lambda path: path.read_text(encoding="utf-8", errors="replace")):
        with blaming(folder / name, stage, results):
            return parse(folder / name)

    facts = read("checkpoints/run.json", lambda path: read_json(path, FACTS))
    words = read("command.sh", lambda path: shlex.split(path.read_text(encoding="utf-8")))
    proof = read("log.txt", find_proof)
    curves = read("tensorboard", lambda path: pick_curves(read_scalars(path)))
    run = Run(label, folder.name, facts, words, read("commit").strip(), proof[1], int(proof[2]), int(proof[3]), *curves)
    if max(run.loss) != facts["train_iters"]:
        raise ReportError(
            f"{folder} ends at step {max(run.loss)} of {facts['train_iters']}. Remove "
            f"{results.get(stage, stage)} and run bash scripts/quickstart.sh again: the run goes on where it was."
        )
    return run


def find_proof(log: Path) -> re.Match[str]:
    """The last line in which the run said how many linear layers run in FP8: of a resumed run, the last start's."""
    found = list(PROOF.finditer(log.read_text(encoding="utf-8", errors="replace")))
    if not found:
        raise ValueError("no line '[infir2] backend ...: N of M linear layers in FP8'")
    return found[-1]


def pick_curves(scalars: dict[str, dict[int, float]]) -> list[dict[int, float]]:
    """Training loss, held-out loss, seconds a step. ValueError names a curve that is not there."""
    tags = ("lm loss", "lm loss validation", "iteration-time")
    absent = [tag for tag in tags if not scalars.get(tag)]
    if absent:
        raise ValueError(f"no scalars named {', '.join(map(repr, absent))}")
    return [scalars[tag] for tag in tags]


def check_comparable(fp8: Run, bf16: Run) -> None:
    """ReportError where the last held-out losses of the two were not measured at the same step."""
    last = max(fp8.held_out), max(bf16.held_out)
    if last[0] != last[1]:
        raise ReportError(
            f"{fp8.name} was last evaluated at step {last[0]}, {bf16.name} at step {last[1]}: they cannot be compared. "
            "Run both with the same --train-iters and --eval-interval."
        )


# What the numbers say


@dataclass(frozen=True)
class Ending:
    """The last held-out losses, in nats per token."""

    step: int
    fp8: float
    bf16: float
    bigram: float

    @property
    def gap(self) -> float:
        return self.fp8 - self.bf16

    @property
    def gap_percent(self) -> float:
        return 100 * self.gap / self.bf16


def ending(quickstart: Quickstart) -> Ending:
    """The last held-out losses of the two runs, and the bigram's."""
    fp8, bf16 = quickstart.fp8.held_out, quickstart.bf16.held_out
    step = max(fp8)
    return Ending(step, fp8[step], bf16[step], quickstart.bigram["nats_per_token"])


def verdicts(quickstart: Quickstart) -> list[Verdict]:
    """What the quickstart is there to show, each with whether it did; nothing of a quick one."""
    if quickstart.quick:
        return []
    end, fp8, bf16 = ending(quickstart), quickstart.fp8, quickstart.bf16
    differing = unequal_settings(quickstart)
    return [
        Verdict("below the bigram", end.fp8 < end.bigram, f"{end.fp8:.4f} against {end.bigram:.4f} nats per token"),
        Verdict(
            f"FP8 within {GAP_LIMIT_PERCENT:g} % of BF16",
            abs(end.gap_percent) <= GAP_LIMIT_PERCENT,
            f"{end.gap_percent:+.4f} %; below zero FP8 is the better",
        ),
        Verdict(
            "the FP8 run ran in FP8, the BF16 run did not",
            fp8.linears_in_fp8 > 0 == bf16.linears_in_fp8,
            f"{fp8.linears_in_fp8} of {fp8.linears} linear layers, and {bf16.linears_in_fp8} of {bf16.linears}",
        ),
        Verdict(
            "same data, order and settings: only precision differs",
            not differing,
            f"differing: {', '.join(differing)}" if differing else "run.json, command line, commit and receipt of data",
        ),
        *accuracy_verdicts(quickstart),
        *learned.verdicts(quickstart.learning),
    ]


# How many held-out problems each stage's model answers right


def right_answers(quickstart: Quickstart, stage: str, label: str, problems: str) -> np.ndarray:
    """Which problems of a set a stage's run (label FP8 or BF16) answers right; [problems], 0 or 1."""
    name = run_names(quickstart.model)[stage][label]
    return np.array(quickstart.accuracy[name][problems]["right"], dtype=float)


def percent_right(quickstart: Quickstart, stage: str, label: str, problems: str) -> float:
    """Right answers of a stage's run (label FP8 or BF16) to a set of problems, in percent."""
    return 100 * float(right_answers(quickstart, stage, label, problems).mean())


def half_width(percent: float, count: int) -> float:
    """Half of the 95 % interval of a share of `count` problems, in points: 1.96 standard errors (binomial)."""
    return 1.96 * float(np.sqrt(percent * (100 - percent) / count))


def accuracy_rows(quickstart: Quickstart) -> list[tuple[str, ...]]:
    """For each stage and set of problems: FP8, BF16, and the paired difference with its 95 % interval."""
    rows = []
    for stage in TRAINED:
        for problems, name in PROBLEMS.items():
            right = [right_answers(quickstart, stage, label, problems) for label in ("FP8", "BF16")]
            shares = [100 * values.mean() for values in right]
            cells = [f"{share:.1f} \N{PLUS-MINUS SIGN} {half_width(share, right[0].size):.1f}" for share in shares]
            gap = 100 * (right[0] - right[1])
            error = 1.96 * gap.std(ddof=1) / np.sqrt(gap.size)
            cells.append(f"{gap.mean():+.1f} \N{PLUS-MINUS SIGN} {error:.1f}")
            rows.append((stage, name, *cells))
    return rows


ACCURACY_HEADER = ("after", "held-out problems", "FP8, % right", "BF16, % right", "FP8 \N{MINUS SIGN} BF16, points")


def accuracy_note(quickstart: Quickstart) -> str:
    counts = {len(found["right"]) for sets in quickstart.accuracy.values() for found in sets.values()}
    return (
        f"Greedy answers to {' or '.join(map(str, sorted(counts)))} problems a set, none of them trained on or looked "
        "at for any setting. Intervals: 95 %, over problems; the difference is paired."
    )


def accuracy_verdicts(quickstart: Quickstart) -> list[Verdict]:
    """What fine-tuning is there to show."""
    easy = {stage: percent_right(quickstart, stage, "FP8", "stage1") for stage in TRAINED}
    hard = {stage: percent_right(quickstart, stage, "FP8", "stage2") for stage in TRAINED}
    twins = {
        (stage, problems): percent_right(quickstart, stage, "FP8", problems)
        - percent_right(quickstart, stage, "BF16", problems)
        for stage, problems in (("sft_stage1", "stage1"), ("sft_stage2", "stage2"))
    }
    return [
        Verdict(
            f"stage 1 teaches its problems: from under {BEFORE_LIMIT:g} % to at least {AFTER_LIMIT:g} %",
            easy["pretraining"] < BEFORE_LIMIT and easy["sft_stage1"] >= AFTER_LIMIT,
            f"{easy['pretraining']:.1f} % to {easy['sft_stage1']:.1f} % (FP8)",
        ),
        Verdict(
            f"stage 2 adds at least {GAIN_LIMIT:g} points on its harder problems",
            hard["sft_stage2"] - hard["sft_stage1"] >= GAIN_LIMIT,
            f"{hard['sft_stage1']:.1f} % to {hard['sft_stage2']:.1f} % (FP8)",
        ),
        Verdict(
            f"FP8 answers within {TWIN_LIMIT:g} points of BF16 after both stages",
            max(map(abs, twins.values())) <= TWIN_LIMIT,
            ", ".join(f"{stage}: {points:+.1f} points" for (stage, _), points in twins.items()),
        ),
    ]


def unequal_settings(quickstart: Quickstart) -> list[str]:
    """What differs between the two runs, or between their data and the bigram's, and is not precision."""
    fp8, bf16 = quickstart.fp8, quickstart.bf16
    facts = {key for key in fp8.facts | bf16.facts if fp8.facts.get(key) != bf16.facts.get(key)}
    differing = sorted(facts - PRECISION_FACTS)
    known = {group for precision in PRECISIONS.values() for group in flag_groups(list(precision.flags))}
    left, right = ({own_path_aside(group, run.name) for group in flag_groups(run.words)} for run in (fp8, bf16))
    differing += sorted(" ".join(group) for group in (left ^ right) - known)
    differing += ["commit"] if fp8.commit != bf16.commit else []
    receipts = {quickstart.manifest_sha256, quickstart.bigram.get("manifest_sha256", quickstart.manifest_sha256)}
    receipts |= {sha for run in (fp8, bf16) for sha in run.facts.get("data_manifests", {}).values()}
    return differing + (["the data's receipt"] if len(receipts) > 1 else [])


def flag_groups(words: list[str]) -> list[tuple[str, ...]]:
    """A command's words, each flag with its values: ("--lr", "2e-3")."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return [tuple(group) for group in groups]


def own_path_aside(group: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The words with the run's own folder replaced, so that two runs can be compared."""
    return tuple(re.sub(rf"(?<=/){re.escape(name)}(?=/|$)", "RUN", word) for word in group)


def precision_summary(run: Run) -> str:
    """What the run's precision is, in the words of the one table of precisions."""
    groups = set(flag_groups(run.words))
    fitting = [entry for entry in PRECISIONS.values() if set(flag_groups(list(entry.flags))) <= groups]
    return max(fitting, key=lambda entry: len(entry.flags)).summary if fitting else run.proof


def base_note(quickstart: Quickstart) -> str:
    """Whether something was learned before, with the loss that shows it."""
    run = quickstart.fp8
    vocabulary = run.facts["padded_vocab_size"]
    steps = max(run.loss)
    tokens = steps * run.facts["global_batch_size"] * run.facts["seq_length"]
    if quickstart.model in RANDOM_BASES:
        base = "The base model had random weights; nothing was learned before"
    else:
        base = "The base model was trained before; pre-training goes on with"
    return (
        f"{base} these {steps:,} steps ({tokens:,} tokens). "
        f"Its first loss is {run.loss[min(run.loss)]:.3f}, and a uniform guess over {vocabulary:,} tokens costs "
        f"{np.log(vocabulary):.3f}."
    )


def fp8_note(quickstart: Quickstart) -> str:
    """Where the FP8 arithmetic was done."""
    facts = quickstart.fp8.facts
    if not facts.get("fp8"):
        return f"{quickstart.fp8.name} asked for no FP8."
    if facts.get("backend") == "cpu":
        return "FP8 was emulated on a CPU: the numbers of FP8, not its speed."
    return "FP8 ran on the GPU, through TransformerEngine."


# The table on stdout

Row = tuple[str, str, str, str, str, str]
HEADER: Row = ("stage", "steps", "loss first", "loss last", "seconds", "where")


def table(quickstart: Quickstart) -> list[Row]:
    """A row for each stage that ran, and under a stage that trains one for each run, with its steps' seconds."""
    rows: list[Row] = []
    for stage in quickstart.stages:
        runs = quickstart.runs.get(stage.name, {})
        reinforced = quickstart.learning.runs.get(stage.name)
        where = "" if runs or reinforced else quickstart.relative(stage.result)
        rows.append((stage.name, "", "", "", f"{stage.seconds:,}", where))
        for run in runs.values():
            first, last = run.loss[min(run.loss)], run.loss[max(run.loss)]
            seconds = f"{sum(run.step_seconds.values()):,.0f}"
            rows.append((f"  {run.label}", f"{max(run.loss):,}", f"{first:.3f}", f"{last:.3f}", seconds, run.name))
        if reinforced:
            seconds = f"{reinforced.seconds['step']:,.0f}"
            rows.append(("  FP8", f"{max(reinforced.reward):,}", "", "", seconds, reinforced.name))
    total = sum(stage.seconds for stage in quickstart.stages)
    return [*rows, ("total", "", "", "", f"{total:,}", "")]


TABLE_NOTE = (
    "Losses are of single training steps, nats per token; a run's seconds are those of its steps alone. Answers are "
    "counted beside the stages that follow, so the total is more than it took."
)


def text_report(quickstart: Quickstart) -> str:
    """What goes to stdout."""
    end = ending(quickstart)
    rows = [HEADER, *table(quickstart)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [f"Quickstart in {quickstart.folder}", base_note(quickstart)]
    lines += [QUICK_NOTE] if quickstart.quick else []
    lines += [f"{fp8_note(quickstart)} The run said: {quickstart.fp8.proof}.", ""]
    for row in rows:
        middle = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append(f"{row[0]:<{widths[0]}}  {middle}  {row[-1]}".rstrip())
    lines += [TABLE_NOTE, "", f"Held-out loss at step {end.step:,}, nats per token"]
    lines += [f"  FP8     {end.fp8:.4f}", f"  BF16    {end.bf16:.4f}"]
    lines += [f"  gap    {end.gap:+.4f}  ({end.gap_percent:+.2f} %)", f"  bigram  {end.bigram:.4f}", ""]
    lines += [f"{verdict.claim}: {verdict.word} ({verdict.numbers})" for verdict in verdicts(quickstart)]
    lines += ["", "Held-out problems answered right", *columns(ACCURACY_HEADER, accuracy_rows(quickstart))]
    lines += [accuracy_note(quickstart), *learning_text(quickstart), ""]
    lines.append(f"Answers of {quickstart.relative(Path(quickstart.answers['model']))}")
    for pair in quickstart.answers["answers"]:
        lines.append(f"  {one_line(pair['prompt'])} | {one_line(pair['answer'])}")
    return "\n".join(lines)


def columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table."""
    rows = [tuple(map(one_line, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def learning_text(quickstart: Quickstart) -> list[str]:
    """Reinforcement learning and the evaluation, where there are any."""
    learning = quickstart.learning
    lines = []
    if learning.runs:
        lines += ["", "Reinforcement learning: held-out problems answered right"]
        lines += [*columns(learned.RIGHT_HEADER, learned.right_rows(learning)), learned.RIGHT_NOTE, ""]
        lines += ["Reinforcement learning: where the time went"]
        lines += [*columns(learned.PHASE_HEADER, learned.phase_rows(learning)), learned.PHASE_NOTE]
    if learning.benchmark:
        lines += ["", f"Scores through evalscope ({Path(SCORES).with_suffix('.html')})"]
        lines += [*columns(learned.SCORE_HEADER, learned.score_rows(learning)), learned.score_note(learning)]
    return lines


def printable(text: str) -> str:
    """Model output without what a terminal or a page would obey: control characters become U+FFFD."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def one_line(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= ANSWER_COLUMNS else line[: ANSWER_COLUMNS - 3] + "..."


# The figures: this one of pre-training; that of learned.draw has accuracy, and reinforcement learning


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the curve, over fewer values at its ends; shape [steps]."""
    window = np.ones(min(smoothing_window(values.size), values.size))
    return np.convolve(values, window, "same") / np.convolve(np.ones(values.size), window, "same")


def smoothing_window(steps: int) -> int:
    return max(steps // 30, 1) | 1  # odd, so that it has a centre


def phases(facts: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Name, first and last step of the learning rate's phases; none under a schedule other than WSD."""
    if facts.get("lr_decay_style") != "WSD":
        return []
    total, warmup = facts["train_iters"], facts.get("lr_warmup_iters") or 0
    decay = total - (facts.get("lr_wsd_decay_iters") or 0)
    spans = [("warmup", 0, warmup), ("stable", warmup, decay), ("decay", decay, total)]
    return [span for span in spans if span[2] > span[1]]


def draw(quickstart: Quickstart, width: float, height: float) -> Any:
    """The figure, sizes in inches: losses above, the gap below, on one axis of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.7, 1))
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    for axes in (top, bottom):
        style(axes, quickstart.fp8.facts)
    draw_losses(top, quickstart)
    draw_gap(bottom, quickstart)
    top.tick_params(labelbottom=False)
    top.set_xlim(0, max(quickstart.fp8.loss))
    for name, begin, end in phases(quickstart.fp8.facts):
        centre = (begin + end) / 2 if name != "warmup" else 0  # a short phase's name may run on into the next
        where = {"ha": "center" if centre else "left", "va": "bottom", "fontsize": 9, "color": LIGHT["muted"]}
        top.annotate(name, (centre, 1), (0, 3), ("data", "axes fraction"), "offset points", **where)
    return figure


def style(axes: Any, facts: dict[str, Any]) -> None:
    """Quiet axes, and a shade on every second phase of the learning rate."""
    quiet(axes)
    for name, begin, end in phases(facts):
        if name != "stable":
            axes.axvspan(begin, end, color=LIGHT["shade"], linewidth=0, zorder=0)


def draw_losses(axes: Any, quickstart: Quickstart) -> None:
    """Training losses raw and smoothed, held-out losses as points, the bigram's as a line."""
    for run, colour, marker, order in (
        (quickstart.bf16, LIGHT["bf16"], "s", 3),
        (quickstart.fp8, LIGHT["fp8"], "o", 4),
    ):
        steps, loss = np.array(list(run.loss)), np.array(list(run.loss.values()))
        axes.plot(steps, loss, color=colour, linewidth=0.7, alpha=0.28, zorder=2)
        line = "--" if run is quickstart.fp8 else "-"
        label = f"{run.label}, training"
        axes.plot(steps, smoothed(loss), color=colour, linewidth=1.8, linestyle=line, zorder=order, label=label)
        points = HOLLOW | {"marker": marker, "s": 28, "edgecolor": colour, "zorder": order + 2}
        axes.scatter(*zip(*run.held_out.items(), strict=True), **points, label=f"{run.label}, held out")
    bigram = quickstart.bigram["nats_per_token"]
    label = f"bigram, held out ({bigram:.2f})"
    axes.axhline(bigram, color=LIGHT["bigram"], linewidth=1.4, linestyle=(0, (1, 1.5)), zorder=5, label=label)
    axes.set_ylabel("loss (nats per token)", color=LIGHT["ink"], fontsize=10.5)
    legend(axes, loc="upper right")


def draw_gap(axes: Any, quickstart: Quickstart) -> None:
    """FP8 less BF16 at each step that both have, raw and smoothed, and the same of the held-out losses."""
    steps, gap = difference(quickstart.fp8.loss, quickstart.bf16.loss)
    window = smoothing_window(steps.size)
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.9, zorder=2)
    axes.plot(steps, gap, color=LIGHT["gap"], linewidth=0.7, alpha=0.35, zorder=3)
    label = f"training, mean of {window} steps"
    axes.plot(steps, smoothed(gap), color=LIGHT["gap"], linewidth=1.8, zorder=4, label=label)
    points = HOLLOW | {"marker": "D", "s": 24, "edgecolor": LIGHT["ink"], "zorder": 5}
    axes.scatter(*difference(quickstart.fp8.held_out, quickstart.bf16.held_out), **points, label="held out")
    axes.set_ylabel("FP8 \N{MINUS SIGN} BF16\n(nats per token)", color=LIGHT["ink"], fontsize=10.5)
    axes.set_xlabel("step", color=LIGHT["ink"], fontsize=10.5)
    legend(axes, loc="lower right", bbox_to_anchor=(1, 0.97), borderpad=0, ncols=2)


def difference(left: dict[int, float], right: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that both have, and left less right there; two arrays [steps]."""
    steps = [step for step in left if step in right]
    return np.array(steps), np.array([left[step] - right[step] for step in steps])


def draw_learning(quickstart: Quickstart, width: float, height: float) -> Any:
    """The figure of what each stage taught, sizes in inches."""
    shares = {
        (label, name): {stage: right_answers(quickstart, stage, label, problems) for stage in TRAINED}
        for problems, name in PROBLEMS.items()
        for label in ("FP8", "BF16")
    }
    return learned.draw(quickstart.learning, shares, width, height)


def learning_sizes(quickstart: Quickstart) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of that figure, wide and narrow, in inches: three panels, or accuracy alone."""
    return ((9, 5.6), (4.3, 9.4)) if quickstart.learning.runs else ((9, 4.2), (4.3, 4.4))


def png(figure: Any) -> bytes:
    """A figure 9 inches wide as a PNG of 1800 pixels, to be shown 900 wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def svg(figure: Any, width: str, summary: str) -> str:
    """A figure as an SVG element of the class `width`, whose colours are the page's CSS variables.

    Its ids begin with a hash of both words, so that two figures of a page do not share one.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"{width} {summary}", "path.simplify_threshold": 0.3}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"\bid=\"(?!p[0-9a-f]{10}|m[0-9a-f]{10}|C[0-9a-f]+_)[^\"]*\"", "", text[text.index("<svg") :])
    for variable, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg class="{width}" role="img" aria-label="{escape(summary)}"', 1)


# The page


def page(quickstart: Quickstart) -> str:
    """The HTML page. Everything that comes from a file is escaped; nothing is fetched."""
    end = ending(quickstart)
    fields = {
        "light": css_variables(LIGHT),
        "dark": css_variables(DARK),
        "base_note": safe(base_note(quickstart)),
        "quick": f'<p class="quick">{safe(QUICK_NOTE)}</p>' if quickstart.quick else "",
        "fp8_note": safe(fp8_note(quickstart)),
        "model": safe(model_words(quickstart.fp8.facts)),
        "figures": "".join(figures(end)),
        "verdicts": "".join(map(verdict_item, verdicts(quickstart))),
        "figure": both_widths(draw, quickstart, ((9, 6.5), (4.3, 6.6)), FIGURE_SUMMARY),
        "figure_note": safe(
            f"Light lines are single steps, strong lines the mean of {smoothing_window(len(quickstart.fp8.loss))} "
            "steps centred on each. Shaded: warmup and decay of the learning rate."
        ),
        "learning_figure": both_widths(
            draw_learning, quickstart, learning_sizes(quickstart), learning_summary(quickstart)
        ),
        "learning_note": safe(learning_note(quickstart)),
        "reinforcement": reinforcement_section(quickstart),
        "evaluation": evaluation_section(quickstart),
        "stages": stage_table(quickstart),
        "precision": precision_list(quickstart),
        "accuracy": safe_table(ACCURACY_HEADER, accuracy_rows(quickstart), {2, 3, 4}),
        "accuracy_note": safe(accuracy_note(quickstart)),
        "answers_model": safe(quickstart.relative(Path(quickstart.answers["model"]))),
        "answers_how": "fine-tuned" + (", then trained by reinforcement learning," if quickstart.learning.runs else ""),
        "answers": "".join(map(answer_item, quickstart.answers["answers"])),
        "sources": source_table(quickstart.sources),
        "receipts": receipt_table(quickstart),
        "commands": command_diff(quickstart),
        "footer": footer(quickstart),
    }
    return Template(PAGE).substitute(fields)


FIGURE_SUMMARY = "Training and held-out loss of the FP8 and the BF16 run by step, and the gap between them"


def both_widths(drawing: Callable, quickstart: Quickstart, sizes: tuple, summary: str) -> str:
    """A figure for wide pages and for narrow ones; the page's style shows one of them."""
    pairs = zip(("wide", "narrow"), sizes, strict=True)
    return "".join(svg(drawing(quickstart, *size), width, summary) for width, size in pairs)


def learning_summary(quickstart: Quickstart) -> str:
    accuracy = "Held-out problems answered right after each stage"
    more = ", reward and gen_kl_error by step of reinforcement learning"
    return accuracy + (more if quickstart.learning.runs else "")


def learning_note(quickstart: Quickstart) -> str:
    note = "Bars are 95 % intervals over problems."
    if quickstart.learning.runs:
        note += (
            " RL's problems: held-out sums of three and four numbers, both sets together. Reward: the share of right "
            "samples among those that a step trained on, from problems that the model answers now right, now wrong; "
            "each stage has problems of its own. gen_kl_error: how far the trainer's probabilities are from those with "
            "which the engine sampled."
        )
    return note


def reinforcement_section(quickstart: Quickstart) -> str:
    """Accuracy and time of reinforcement learning; nothing where there is none."""
    learning = quickstart.learning
    if not learning.runs:
        return ""
    rows = learned.right_rows(learning)
    return (
        "<h2>Reinforcement learning: held-out problems answered right</h2>\n"
        + safe_table(learned.RIGHT_HEADER, rows, {2, 3})
        + f'<p class="note">{safe(learned.RIGHT_NOTE)}</p>\n'
        + "<h2>Reinforcement learning: where the time went</h2>\n"
        + safe_table(learned.PHASE_HEADER, learned.phase_rows(learning), set(range(1, len(learned.PHASE_HEADER))))
        + f'<p class="note">{safe(learned.PHASE_NOTE)}</p>\n'
    )


def evaluation_section(quickstart: Quickstart) -> str:
    """Scores through evalscope with a link to their own page; nothing where there are none."""
    learning = quickstart.learning
    if not learning.benchmark:
        return ""
    link = safe(Path(SCORES).with_suffix(".html"))
    return (
        "<h2>Scores through evalscope</h2>\n"
        + safe_table(learned.SCORE_HEADER, learned.score_rows(learning), {1, 2, 3})
        + f'<p class="note">{safe(learned.score_note(learning))} <a href="{link}">All of its numbers</a>.</p>\n'
    )


def safe(words: Any) -> str:
    """Text from a file, escaped for HTML, control characters replaced."""
    return escape(printable(str(words)))


def css_variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def model_words(facts: dict[str, Any]) -> str:
    return (
        f"Qwen2.5 architecture, {facts['num_layers']} layers, hidden size {facts['hidden_size']}, vocabulary "
        f"{facts['padded_vocab_size']:,}; {facts['global_batch_size']} sequences of {facts['seq_length']} tokens a step"
    )


def figures(end: Ending) -> Iterator[str]:
    """The four numbers at the top."""
    gap = f"{end.gap:+.4f} nats"
    for style_of, name, value, unit in (
        ("fp8", "FP8", f"{end.fp8:.4f}", "nats per token"),
        ("bf16", "BF16", f"{end.bf16:.4f}", "nats per token"),
        ("gap", "gap, FP8 \N{MINUS SIGN} BF16", f"{end.gap_percent:+.2f} %", gap),
        ("bigram", "bigram", f"{end.bigram:.4f}", "nats per token"),
    ):
        yield f'<div class="{style_of}"><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>\n'


def verdict_item(verdict: Verdict) -> str:
    return (
        f'<li class="{verdict.word}"><b>{verdict.word}</b><span>{safe(verdict.claim)}'
        f"<small>{safe(verdict.numbers)}</small></span></li>\n"
    )


def html_table(header: tuple[str, ...], rows: list[tuple[str, ...]], numbers: set[int], marks: list[str]) -> str:
    """A table of cells that are HTML already. `numbers` are the columns set to the right, `marks` the rows' classes."""

    def line(cells: tuple[str, ...], tag: str, mark: str = "") -> str:
        inner = "".join(
            f'<{tag} class="n">{cell}</{tag}>' if column in numbers else f"<{tag}>{cell}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f'<tr class="{mark}">{inner}</tr>\n' if mark else f"<tr>{inner}</tr>\n"

    body = "".join(line(row, "td", mark) for row, mark in zip(rows, marks, strict=True))
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def safe_table(header: tuple[str, ...], rows: list[tuple[str, ...]], numbers: set[int]) -> str:
    """A table of plain text."""
    return html_table(header, [tuple(map(safe, row)) for row in rows], numbers, ["" for _ in rows])


def stage_table(quickstart: Quickstart) -> str:
    """The table of stdout, with a bar for each stage's seconds."""
    rows = table(quickstart)
    marks = ["run" if row[0].startswith(" ") else "total" if row is rows[-1] else "" for row in rows]
    longest = max(stage.seconds for stage in quickstart.stages)
    bars = {stage.name: seconds_bar(stage.seconds / max(longest, 1)) for stage in quickstart.stages}
    cells = [
        (*map(safe, row[:-1]), bars.get(row[0], ""), f"<code>{safe(row[-1])}</code>" if row[-1] else "")
        if mark != "total"
        else (*map(safe, row[:-1]), "", "")
        for row, mark in zip(rows, marks, strict=True)
    ]
    header = (*HEADER[:-1], "", HEADER[-1])
    return html_table(header, cells, {1, 2, 3, 4}, marks) + f'<p class="note">{safe(TABLE_NOTE)}</p>'


def seconds_bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'


def precision_list(quickstart: Quickstart) -> str:
    """How FP8 was done in this run."""
    fp8, bf16 = quickstart.fp8, quickstart.bf16
    scales = {"pow2": "powers of two", "fp32": "any FP32 number"}
    chosen = str(fp8.facts.get("scale_fmt"))
    seconds = [np.median(list(run.step_seconds.values())) for run in (fp8, bf16)]
    items = [
        ("Said at start", f"<code>{safe(fp8.proof)}</code><br><code>{safe(bf16.proof)}</code>"),
        ("In FP8", safe(precision_summary(fp8)) + ", in all three matrix products: forward and both gradients"),
        ("Scales", f"{safe(scales.get(chosen, chosen))} (<code>{safe(chosen)}</code>), one for each tile or block"),
        ("Not in FP8", "embedding, output head, norms, attention core and residual stream: BF16. Master weights: FP32"),
        ("Where", safe(fp8_note(quickstart))),
        ("Median step", f"{seconds[0]:.2f} s in FP8, {seconds[1]:.2f} s in BF16, both runs side by side"),
    ]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{words}</dd>\n" for name, words in items) + "</dl>"


def answer_item(pair: dict[str, str]) -> str:
    return f"<blockquote><b>{safe(pair['prompt'])}</b>{safe(pair['answer'])}</blockquote>\n"


def source_table(sources: list[dict[str, Any]]) -> str:
    header = ("source", "package", "licence", "documents", "held out", "characters")
    rows = [
        (
            f"{safe(source['name'])}<small>{safe(source.get('note', ''))}</small>",
            f"{safe(source['package'])} {safe(source['version'])}",
            safe(source["licence"]),
            f"{source['documents']:,}",
            f"{source['held_out_documents']:,}",
            f"{source['characters']:,}",
        )
        for source in sources
    ]
    return html_table(header, rows, {3, 4, 5}, ["" for _ in rows])


def receipt_table(quickstart: Quickstart) -> str:
    """Counts of the splits, and the hashes of the receipt and of what it names."""
    manifest = quickstart.manifest
    splits = "; ".join(
        f"{safe(name)}: {counts['documents']:,} documents, {counts['tokens']:,} tokens"
        for name, counts in manifest.get("splits", {}).items()
    )
    folders = [folder for folder in PREPARED if (quickstart.folder / folder / MANIFEST).is_file()]
    rows = [(f"{folder}/{MANIFEST}", sha256_file(quickstart.folder / folder / MANIFEST)) for folder in folders]
    rows += [(f"data/{name}", receipt["sha256"]) for name, receipt in manifest["outputs"].items()]
    if "sha256" in manifest.get("tokenizer", {}):
        rows.append(("tokenizer.json", manifest["tokenizer"]["sha256"]))
    cells = [(linked(name), f'<code class="hash">{safe(sha)}</code>') for name, sha in rows]
    hashes = html_table(("file", "SHA-256"), cells, set(), ["" for _ in cells])
    command = flag_groups(shlex.split(manifest.get("command", "")))
    made = f"<p>Made by <code>{' '.join(map(unbroken, command))}</code></p>" if command else ""
    return f"<p>{splits}.</p>{made}{hashes}"


def linked(name: str) -> str:
    """A file's name; a receipt is a link to it, beside the page."""
    code = f"<code>{safe(name)}</code>"
    return f'<a href="{safe(name)}">{code}</a>' if name.endswith(MANIFEST) else code


def unbroken(words: tuple[str, ...]) -> str:
    """Words of a command that stay on one line where the line is long enough."""
    return f'<span class="flag">{safe(" ".join(words))}</span>'


def command_diff(quickstart: Quickstart) -> str:
    """Both command lines as one, with the words that only one of them has marked by its name."""
    fp8, bf16 = (flag_groups(shortened(run, quickstart.origin)) for run in (quickstart.fp8, quickstart.bf16))
    parts = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, fp8, bf16, autojunk=False).get_opcodes():
        if tag == "equal":
            parts += map(unbroken, fp8[a:b])
        elif tag == "replace" and b - a == d - c:
            parts += [words_apart(left, right) for left, right in zip(fp8[a:b], bf16[c:d], strict=True)]
        else:
            parts += [words_apart(sum(fp8[a:b], ()), sum(bf16[c:d], ()))]
    return " ".join(parts)


def shortened(run: Run, origin: Path) -> list[str]:
    """The command's words with the quickstart's folder as $QUICKSTART and the interpreter as python."""
    words = [word.replace(str(origin), "$QUICKSTART") for word in run.words]
    return ["python" if re.search(r"/python[0-9.]*$", word) else word for word in words[:1]] + words[1:]


def words_apart(left: tuple[str, ...], right: tuple[str, ...]) -> str:
    """Words that FP8's (left) and BF16's (right) command share, and after them those of each alone."""
    pairs = zip(left, right, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    parts = [unbroken(left[:shared])] if shared else []
    for name, label, words in (("fp8", "FP8", left[shared:]), ("bf16", "BF16", right[shared:])):
        if words:
            parts.append(f'<mark class="{name}"><b>{label}</b> {safe(" ".join(words))}</mark>')
    return " ".join(parts)


def footer(quickstart: Quickstart) -> str:
    commits = dict.fromkeys(run.commit for run in (quickstart.fp8, quickstart.bf16))
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    )
    return (
        f"Commit {safe(', '.join(commits))}. Report drawn {date.today().isoformat()} on {safe(machine)}. Every number "
        "is read from the files in this folder."
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>InfiR2 quickstart</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --no: #b3261e; --no-page: #fceeed; $light }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --no: #ff8a80; --no-page: #33191a; $dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 58rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .4rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .8rem; font-size: 1.2rem; letter-spacing: -.01em; }
p { margin: .5rem 0; max-width: 44rem; }
a { color: inherit; text-decoration-color: var(--muted); }
small, .note, footer { color: var(--muted); font-size: .85rem; }
small { display: block; line-height: 1.4; }
code { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.6rem 0; }
.figures div { padding: .8rem 1rem; border-radius: .5rem; background: var(--shade); border-left: .25rem solid; }
.figures .fp8 { border-color: var(--fp8); } .figures .bf16 { border-color: var(--bf16); }
.figures .gap { border-color: var(--gap); } .figures .bigram { border-color: var(--bigram); }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.figures small { font-weight: 400; }
.quick { padding: .6rem 1rem; border-radius: .5rem; background: var(--shade); border-left: .25rem solid var(--fp8); }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { display: flex; gap: .9rem; padding: .55rem 0; border-top: 1px solid var(--grid); line-height: 1.4; }
.verdicts b { flex: none; align-self: start; width: 2.9rem; border-radius: 1rem; text-align: center;
  font-size: .85rem; line-height: 1.5; margin-top: .05rem; color: var(--page); background: var(--bigram); }
.verdicts .no b { background: var(--no); }
.verdicts .no { background: var(--no-page); }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.narrow { display: none; }
@media (max-width: 40rem) { .wide { display: none; } .narrow { display: block; } body { padding-top: 1.5rem; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; line-height: 1.45; }
th { color: var(--muted); font-size: .82rem; font-weight: 500; text-align: left; white-space: nowrap; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.run td:first-child { padding-left: 1.2rem; }
.total td { border-bottom: 0; font-weight: 600; }
.bar { display: block; width: 9rem; }
.bar i { display: block; min-width: 1px; height: .7rem; margin-top: .35rem; border-radius: .15rem;
  background: var(--muted); }
.sources table { min-width: 46rem; }
td code { white-space: nowrap; }
td .hash { font-size: .78em; white-space: normal; }
@media (max-width: 40rem) { table { font-size: .84rem; } th { font-size: .78rem; } th, td { padding-right: .6rem; }
  .bar { width: 4rem; } }
dl { margin: 0; }
.precision dl { display: grid; grid-template-columns: 8rem 1fr; gap: .4rem 1rem; }
.precision dt { color: var(--muted); }
.precision dd { margin: 0; }
@media (max-width: 40rem) { .precision dl { grid-template-columns: 1fr; gap: 0; }
  .precision dd { margin-bottom: .7rem; } }
blockquote { margin: .75rem 0; padding: .8rem 1rem; border-radius: .5rem; background: var(--shade);
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.command { padding: .9rem 1rem; border-radius: .5rem; background: var(--shade); color: var(--muted);
  font: .82rem/1.9 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
.flag, mark { display: inline-block; max-width: 100%; }
mark { line-height: 1.5; background: var(--page); color: var(--ink); padding: .12rem .35rem;
  border-radius: .25rem; border: 1px solid; }
mark.fp8 { border-color: var(--fp8); } mark.fp8 b { color: var(--fp8); }
mark.bf16 { border-color: var(--bf16); } mark.bf16 b { color: var(--bf16); }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
</style>
</head>
<body>
<header>
<h1>InfiR2 quickstart: FP8 beside BF16</h1>
<p>$base_note $fp8_note</p>
<p class="note">$model.</p>
$quick
</header>
<dl class="figures">
$figures</dl>
<p class="note">Final held-out loss of the two runs, and of a bigram model of the same training tokens.</p>
<ul class="verdicts">
$verdicts</ul>

<h2>What each stage taught</h2>
<figure style="margin:0">$learning_figure</figure>
<p class="note">$learning_note</p>

<h2>Held-out problems answered right</h2>
$accuracy
<p class="note">$accuracy_note</p>

$reinforcement
$evaluation

<h2>Loss of pre-training</h2>
<figure style="margin:0">$figure</figure>
<p class="note">$figure_note</p>

<h2>Stages</h2>
$stages

<h2>How FP8 was done</h2>
<div class="precision">$precision</div>

<h2>Answers</h2>
<p>Greedy answers of <code>$answers_model</code>, $answers_how in FP8.</p>
$answers

<h2>Data</h2>
<div class="sources">$sources</div>
$receipts

<h2>The two command lines</h2>
<p>One command line, with the words that only one of the runs has marked. <code>$$QUICKSTART</code> is the folder of
this page; each run's <code>command.sh</code> holds its own, to the letter.</p>
<div class="command">$commands</div>
<footer>$footer</footer>
</body>
</html>
"""


# Writing


def write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, metavar="QUICKSTART_DIR", help="folder of scripts/quickstart.sh")
    parser.add_argument("--quick", action="store_true", help="of QUICK=1: draw no verdict, and say why")
    args = parser.parse_args(arguments)
    folder = args.quickstart
    sys.stdout.reconfigure(errors="replace")  # a model may answer in characters that the terminal lacks
    try:
        quickstart = load(folder, args.quick)
        print(text_report(quickstart))
        write(folder / "report.png", png(draw(quickstart, 9, 6.5)))
        write(folder / "report_learning.png", png(draw_learning(quickstart, *learning_sizes(quickstart)[0])))
        write(folder / "report.html", page(quickstart).encode())
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{folder / 'report.html'}, {folder / 'report.png'} and {folder / 'report_learning.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
