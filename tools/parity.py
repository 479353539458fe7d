#!/usr/bin/env python
"""Report how far an FP8 run ends from its BF16 twin, with a gate: 0.01 nats per token of held-out loss.

    python tools/parity.py --fp8 exp/InfiR2_CPT_FP8_7B --bf16 exp/InfiR2_CPT_BF16_7B --output exp/parity
    python tools/parity.py --fp8 RUN --bf16 RUN --bf16-seed RUN --output DIR       # and the noise of a second BF16 seed
    python tools/parity.py --fp8 RUN --bf16 RUN --no-weights --output DIR          # its checkpoints are gone

RUN is a folder of scripts/CPT or scripts/SFT, its run ended. Writes parity.json, parity.md, parity.png and
parity.html, which needs no network and no script; prints the Markdown.

    gap         FP8's held-out loss less BF16's, at every evaluation; at the last step the gate judges it. The training
                loss's, too, over the last tenth of the steps
    noise       how far two BF16 seeds are apart at the same evaluations, where --bf16-seed gives the second
    gradients   their norm by step
    weights     those of the FP8 run's last checkpoint, quantised as training does: SNR, underflow, saturation
    cost        seconds a step, seconds from start to end, peak memory where it was recorded
    commands    every flag that differs, and whether it is precision, a path, or something else

Exit status: 0 within the gate and precision alone differs; 1 otherwise; 2 where there is nothing to compare: a run that
has not ended, a loss that is not finite, an FP8 run that was not in FP8, or runs that are not twins (other data, order,
seed, shape, schedule or number of steps, by what the runs recorded).
"""

import argparse
import difflib
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import quickstart_report as shared
import torch
from quickstart_learning import HOLLOW, LIGHT, Verdict, legend, quiet
from quickstart_report import ReportError
from torch import Tensor
from tqdm import tqdm

from infir2 import checkpoint, fp8
from infir2.events import read_scalars
from infir2.precision import MLP_ONLY, PRECISIONS
from infir2.preflight import RUN_FILE
from infir2.receipts import sha256_file

LIMIT = 0.01  # nats per token, of the last held-out loss
LOSS, HELD_OUT, GRAD_NORM, RATE = "lm loss", "lm loss validation", "grad-norm", "learning-rate"
SECONDS, MEMORY = "iteration-time", "mem-max-allocated-bytes"
LOGGED_MEMORY = re.compile(r"\| max allocated: ([0-9.]+) ")  # MiB; Megatron prints it with its first steps and saves

# What run.json says of precision; of data, which is compared by hash; and of the start. All else must be equal.
PRECISION_FACTS = {"fp8", "fp8_recipe", "scale_fmt", "te_precision_config", "first_last_layers_bf16"}
DATA_FACTS, START = {"data", "sft_data", "data_manifests"}, "parent"
# Flags that place a run. Their data and weights are compared by the hashes in run.json.
PATH_FLAGS = {"--save", "--load", "--pretrained-checkpoint", "--tensorboard-dir", "--data-cache-path", "--cwd"}
PATH_FLAGS |= {"--train-data-path", "--valid-data-path", "--data-path", "--sft-data", "--tokenizer-model"}
PRECISION_FLAGS = {word for entry in PRECISIONS.values() for word in entry.flags if word.startswith("--")} - {"--bf16"}
EVALUATION_FLAGS = ("--eval-interval", "--eval-iters", "--full-validation")  # what the held-out loss is of

MODULES = {  # a layer's linear layers, by the name in tables
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
LEAVE_FP8 = {"qkv", "proj"}  # by fp8_mlp.yaml
NOT_MEASURED = (
    "Activations and gradients are not measured: no checkpoint holds them. tools/measure_numerics.py has figures of "
    "synthetic ones."
)
ONE_DRAW = "That is one pair of seeds: one draw of the noise, not its size."
MINUS = "\N{MINUS SIGN}"


# Reading


@dataclass(frozen=True)
class Run:
    """A run that has ended. Curves go from step to value; losses are in nats per token."""

    label: str
    folder: Path
    facts: dict[str, Any]  # of run.json
    words: list[str]  # of command.sh
    commit: str
    in_fp8: tuple[int, int] | None  # linear layers in FP8, and all, as log.txt has it; None where it does not say
    loss: dict[int, float]
    held_out: dict[int, float]
    grad_norm: dict[int, float]
    learning_rate: dict[int, float]
    step_seconds: dict[int, float]
    seconds: float  # from the opening of the event file to its last entry, over all starts of the run
    starts: int
    peak_bytes: float | None  # of GPU memory allocated on the logging rank
    memory_source: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        return self.facts["train_iters"]

    @property
    def flags(self) -> dict[str, tuple[str, ...]]:
        """Flag to its values, of a repeated flag the last, which wins in argparse. The program's words are under ""."""
        groups = shared.flag_groups(["python", *self.words[1:]])
        return {"": groups[0]} | {group[0]: group[1:] for group in groups[1:]}


def read_run(label: str, folder: Path) -> Run:
    """A run's folder. ReportError where something is missing or damaged, the run has not ended, or a curve has NaN."""
    remedy = "Name the folder of a run of scripts/CPT or scripts/SFT."
    try:
        facts = shared.read_json(
            folder / "checkpoints" / RUN_FILE, ("train_iters", "seed", "fp8", "bf16", "num_layers")
        )
        words = shlex.split((folder / "command.sh").read_text(encoding="utf-8"))
        commit = (folder / "commit").read_text(encoding="utf-8").strip()
        scalars = read_scalars(folder / "tensorboard")
        seconds, starts = wall_seconds(folder / "tensorboard")
    except FileNotFoundError as error:
        raise ReportError(f"{error.filename or error} is missing. {remedy}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ReportError(f"{folder} cannot be read: {error}. {remedy}") from error
    absent = [tag for tag in (LOSS, HELD_OUT, GRAD_NORM, RATE, SECONDS) if not scalars.get(tag)]
    if absent:
        raise ReportError(f"{folder}/tensorboard has no scalars named {', '.join(map(repr, absent))}. {remedy}")
    refuse_unended(folder, facts, scalars)
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    proofs = shared.PROOF.findall(text)
    return Run(
        label=label,
        folder=folder,
        facts=facts,
        words=words,
        commit=commit,
        in_fp8=(int(proofs[-1][1]), int(proofs[-1][2])) if proofs else None,
        loss=scalars[LOSS],
        held_out=scalars[HELD_OUT],
        grad_norm=scalars[GRAD_NORM],
        learning_rate=scalars[RATE],
        step_seconds=scalars[SECONDS],
        seconds=seconds,
        starts=starts,
        **peak_memory(scalars.get(MEMORY, {}), text),
    )


def refuse_unended(folder: Path, facts: dict[str, Any], scalars: dict[str, dict[int, float]]) -> None:
    """ReportError where the last step was not evaluated, or a curve holds NaN or Inf."""
    for tag in (LOSS, HELD_OUT, GRAD_NORM):
        bad = [step for step, value in scalars[tag].items() if not math.isfinite(value)]
        if bad:
            raise ReportError(
                f"{folder}: '{tag}' is {scalars[tag][bad[0]]} at step {bad[0]}. The run broke there and its end says "
                "nothing of parity; find out why first."
            )
    last = max(scalars[HELD_OUT])
    if last != facts["train_iters"]:
        raise ReportError(
            f"{folder} has not ended: its last held-out loss is of step {last}, of {facts['train_iters']}. Run its "
            "script again, it goes on where it was."
        )


def wall_seconds(folder: Path) -> tuple[float, int]:
    """Seconds between the first and the last entry of each event file in `folder`, summed, and the number of files.

    A run writes one file each time it starts; what passed between two starts is not counted.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    total, files = 0.0, sorted(folder.glob("events.out.tfevents.*"))
    for file in files:
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        total += max(times) - min(times) if times else 0.0
    return total, len(files)


def peak_memory(curve: dict[int, float], log: str) -> dict[str, Any]:
    """Peak bytes allocated on a GPU, and where that was read: TensorBoard, else what Megatron printed, else nowhere."""
    printed = max((float(value) * 2**20 for value in LOGGED_MEMORY.findall(log)), default=0.0)
    if curve:
        return {"peak_bytes": max(curve.values()), "memory_source": "TensorBoard"}
    if printed:  # 0 on a CPU
        return {"peak_bytes": printed, "memory_source": "log.txt, up to the last time it was printed"}
    return {"peak_bytes": None, "memory_source": "not recorded"}


# Whether the runs are twins


@dataclass(frozen=True)
class Commands:
    """Flags that differ between two runs: flag, the first run's values, the second's; None where a run has it not."""

    precision: list[tuple[str, str | None, str | None]]
    paths: list[tuple[str, str | None, str | None]]
    other: list[tuple[str, str | None, str | None]]


def check_precision(fp8_run: Run, bf16_run: Run, second: Run | None) -> None:
    """ReportError where the FP8 run was not in FP8, or a BF16 run was not in BF16."""
    facts, said = fp8_run.facts, fp8_run.in_fp8
    if not facts["fp8"] or (said and not said[0]):
        found = f"{said[0]} of {said[1]} linear layers in FP8" if said else "run.json has no fp8"
        raise ReportError(f"{fp8_run.folder} was not trained in FP8: {found}. Give the FP8 run to --fp8.")
    for run in filter(None, (bf16_run, second)):
        if run.facts["fp8"] or not run.facts["bf16"] or (run.in_fp8 and run.in_fp8[0]):
            found = f"fp8 {run.facts['fp8']}, bf16 {run.facts['bf16']}"
            raise ReportError(f"{run.folder} is no BF16 run: {found}. Give a BF16 run to --bf16 and --bf16-seed.")


def check_twins(one: Run, other: Run, apart: frozenset[str] = frozenset()) -> str:
    """ReportError where two runs differ in more than precision and the facts `apart`; else how their starts compare.

    Compared are run.json, data by the hashes of its receipts, the learning rate of every step, and the flags that say
    what is held out. The answer is "same" weights, "twins" where each run began from a parent and those are twins in
    turn, or "unknown" where a parent's run.json is gone.
    """
    differing = unequal(one.facts, other.facts, apart)
    pairs = ((flag, one.flags.get(flag), other.flags.get(flag)) for flag in EVALUATION_FLAGS)
    differing += [f"{flag} is {shown(left)}, and {shown(right)}" for flag, left, right in pairs if left != right]
    refuse_strangers(one.folder, other.folder, differing)
    for step in sorted(one.learning_rate.keys() & other.learning_rate.keys()):
        if one.learning_rate[step] != other.learning_rate[step]:
            rates = f"{one.learning_rate[step]:g}, and {other.learning_rate[step]:g}"
            refuse_strangers(one.folder, other.folder, [f"the learning rate of step {step} is {rates}"])
    return compare_starts((one.folder, one.facts), (other.folder, other.facts), apart)


def refuse_strangers(one: Path, other: Path, differing: list[str]) -> None:
    if differing:
        raise ReportError(
            f"{one} and {other} are not twins: {'; '.join(differing)}. Train both with the same settings, precision "
            "aside."
        )


def unequal(one: dict[str, Any], other: dict[str, Any], apart: frozenset[str]) -> list[str]:
    """What two run.json differ in, besides precision, the start and `apart`: one phrase for each."""
    aside = PRECISION_FACTS | DATA_FACTS | {START} | apart
    names = [name for name in one | other if name not in aside and one.get(name) != other.get(name)]
    found = [f"{name} is {one.get(name)}, and {other.get(name)}" for name in names]
    if data_identity(one) != data_identity(other):
        receipts = [one.get("data_manifests") or one.get("data"), other.get("data_manifests") or other.get("data")]
        found.append(f"data is {receipts[0]}, and {receipts[1]}")
    return found


def data_identity(facts: dict[str, Any]) -> str:
    """A run's data in the order it was given, each path replaced by its receipt's hash, and so wherever it lies.

    A corpus is one file of its receipt's folder and keeps its name. Data without a receipt is known by its path alone.
    """
    hashes = facts.get("data_manifests") or {}
    if "sft_data" in facts:
        return str(hashes.get(facts["sft_data"], facts["sft_data"]))
    named = {path: f"{sha}/{Path(path).name}" for path, sha in hashes.items()}
    data = facts.get("data") or {}
    return json.dumps(
        {
            key: [named.get(word, word) for word in value] if isinstance(value, list) else value
            for key, value in data.items()
        }
    )


def compare_starts(one: tuple[Path, dict], other: tuple[Path, dict], apart: frozenset[str]) -> str:
    """How the weights that two runs (folder, facts) began from compare; see `check_twins`."""
    parents = [facts.get(START) for _, facts in (one, other)]
    if parents[0] == parents[1] or (all(parents) and parents[0]["sha256"] == parents[1]["sha256"]):
        return "same"
    places = ["random weights" if parent is None else parent["folder"] for parent in parents]
    if None in parents or Path(places[0]).name != Path(places[1]).name:
        refuse_strangers(one[0], other[0], [f"one began from {places[0]}, the other from {places[1]}"])
    found = [find_parent(run[0], place) for run, place in zip((one, other), places, strict=True)]
    if None in found:
        return "unknown"
    differing = unequal(found[0][1], found[1][1], apart)
    refuse_strangers(one[0], other[0], [f"of their parents, {phrase}" for phrase in differing])
    return "unknown" if compare_starts(*found, apart) == "unknown" else "twins"


def find_parent(folder: Path, iteration: str) -> tuple[Path, dict[str, Any]] | None:
    """Folder and run.json of the run that wrote a checkpoint: where it was, else beside `folder`, which has moved."""
    run = Path(iteration).parents[1]
    for place in (run, folder.parent / run.name):
        path = place / "checkpoints" / RUN_FILE
        if path.is_file():
            return place, shared.read_json(path, ())
    return None


def compare_commands(one: Run, other: Run) -> Commands:
    """Every flag whose values differ, of precision, of paths, and else; and the commit of the code, as "commit"."""
    left, right = one.flags, other.flags
    found = Commands([], [], [])
    for flag in left | right:
        if left.get(flag) == right.get(flag):
            continue
        precise = flag in PRECISION_FLAGS or flag.startswith("--fp8-")
        kind = found.precision if precise else found.paths if flag in PATH_FLAGS else found.other
        kind.append((flag or "program", words_of(left.get(flag)), words_of(right.get(flag))))
    if one.commit != other.commit:
        found.other.append(("commit", one.commit, other.commit))
    return found


def words_of(values: tuple[str, ...] | None) -> str | None:
    return None if values is None else shlex.join(values)


def shown(values: tuple[str, ...] | str | None) -> str:
    """Values of a flag for a reader."""
    text = words_of(values) if isinstance(values, tuple) else values
    return "not given" if text is None else text or "given"


# The gap


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses of one step, in nats per token."""

    step: int
    fp8: float
    bf16: float
    second: float | None  # the second BF16 seed's

    @property
    def gap(self) -> float:
        """FP8 less BF16."""
        return self.fp8 - self.bf16

    @property
    def noise(self) -> float | None:
        """How far the two BF16 seeds are apart."""
        return None if self.second is None else abs(self.second - self.bf16)


def evaluations(fp8_loss: dict[int, float], bf16_loss: dict[int, float], second: dict[int, float] | None) -> list:
    """An Evaluation for each step at which all of the given runs were evaluated."""
    steps = fp8_loss.keys() & bf16_loss.keys() & (bf16_loss if second is None else second).keys()
    return [
        Evaluation(step, fp8_loss[step], bf16_loss[step], second[step] if second else None) for step in sorted(steps)
    ]


def within_gate(last: Evaluation) -> bool:
    """At most LIMIT above BF16. A gap below zero is within: FP8 lost nothing."""
    return last.gap <= LIMIT


def gate_words(last: Evaluation) -> str:
    """The gate's verdict as sentences."""
    words = (
        f"{'Within' if within_gate(last) else 'Above'} the gate: at step {last.step:,} FP8's held-out loss is "
        f"{abs(last.gap):.4f} nats {'above' if last.gap >= 0 else 'below'} BF16's; the limit is {LIMIT:g}."
    )
    if last.bf16 <= LIMIT:
        words += f" BF16's whole loss is {last.bf16:.4f}, less than the limit: the gate says little here."
    return words


def training_gap(fp8_loss: dict[int, float], bf16_loss: dict[int, float]) -> tuple[int, float]:
    """A tenth of the steps, and FP8's training loss less BF16's, averaged over that many at the end."""
    steps = sorted(fp8_loss.keys() & bf16_loss.keys())
    count = max(1, len(steps) // 10)
    return count, float(np.mean([fp8_loss[step] - bf16_loss[step] for step in steps[-count:]]))


def noise_words(found: list[Evaluation]) -> str:
    """How the gap compares with the noise of seeds, as sentences."""
    last = found[-1]
    if last.noise is None:
        return (
            "The noise is unknown: no second BF16 seed was given (--bf16-seed), so it is not known how far apart two "
            "runs of one precision end."
        )
    above = abs(last.gap) > last.noise
    words = (
        f"The gap is {'above' if above else 'not above'} the seeds' noise: two BF16 seeds end {last.noise:.4f} nats "
    )
    words += f"apart. {ONE_DRAW}"
    widest = max(found, key=lambda one: one.noise)
    if widest is not last:
        words += f" At step {widest.step:,} they were {widest.noise:.4f} apart"
        words += ", more than the gap at the end." if above and widest.noise >= abs(last.gap) else "."
    return words


# Quantisation


@dataclass(frozen=True)
class Counts:
    """What quantisation did to a weight, in sums, so that weights can be added up."""

    signal: float = 0.0  # sum of squares of the BF16 weight
    noise: float = 0.0  # sum of squares of what quantisation changed
    elements: int = 0
    nonzero: int = 0
    lost: int = 0  # elements that are not zero and whose code is
    at_max: int = 0  # elements whose code is the format's largest value, of either sign
    blocks: int = 0
    blocks_at_max: int = 0  # blocks with such an element

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def snr(self) -> float | None:
        """Signal-to-noise ratio in dB; None where quantisation changed nothing."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else None

    @property
    def underflow(self) -> float:
        """Share of the nonzero elements that became zero."""
        return self.lost / self.nonzero if self.nonzero else 0.0

    @property
    def saturation(self) -> float:
        """Share of all elements whose code is the format's largest value, which rounding reaches too."""
        return self.at_max / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Scheme:
    """How a run quantises its weights."""

    fmt: fp8.Format
    tile: fp8.Tile
    scale_fmt: str

    def __str__(self) -> str:
        tile = "x".join(map(str, self.tile)) if self.tile else "one for the whole tensor"
        return f"{self.fmt.name}, blocks {tile}, scales {self.scale_fmt}"


def count(weight: Tensor, scheme: Scheme, name: str = "weight") -> Counts:
    """Quantise a weight [M, K], rounded to BF16 as in training, and count. ValueError for NaN or Inf."""
    exact = weight.bfloat16()
    codes, scale_inv = fp8.quantize(exact, scheme.tile, fmt=scheme.fmt, scale_fmt=scheme.scale_fmt, name=name)
    exact, values = exact.float(), codes.float()
    at_max = values.abs() == scheme.fmt.max
    tile = scheme.tile or tuple(exact.shape)
    blocks_at_max = torch.nn.functional.max_pool2d(at_max[None].float(), tile, ceil_mode=True)
    change = fp8.dequantize(codes, scale_inv, scheme.tile) - exact
    return Counts(
        signal=torch.linalg.vector_norm(exact, dtype=torch.float64).item() ** 2,
        noise=torch.linalg.vector_norm(change, dtype=torch.float64).item() ** 2,
        elements=exact.numel(),
        nonzero=int((exact != 0).sum()),
        lost=int(((values == 0) & (exact != 0)).sum()),
        at_max=int(at_max.sum()),
        blocks=scale_inv.numel(),
        blocks_at_max=int(blocks_at_max.sum()),
    )


def scheme_of(facts: dict[str, Any]) -> Scheme:
    """How weights are quantised under run.json's precision. ReportError for a recipe that this tool does not know."""
    formats = {"e4m3": fp8.E4M3, "hybrid": fp8.E4M3}  # hybrid's E5M2 is for gradients
    tiles = {"blockwise": fp8.BLOCK, "tensorwise": fp8.TENSOR}
    if facts["fp8"] not in formats or facts["fp8_recipe"] not in tiles:
        raise ReportError(
            f"the weights of --fp8-format {facts['fp8']} --fp8-recipe {facts['fp8_recipe']} cannot be quantised here; "
            f"known are formats {', '.join(formats)} and recipes {', '.join(tiles)}."
        )
    return Scheme(formats[facts["fp8"]], tiles[facts["fp8_recipe"]], facts["scale_fmt"])


def linears_in_fp8(run: Run) -> list[tuple[int, str]]:
    """Layer (from 0) and module (a key of MODULES) of every linear layer that the run has in FP8.

    ReportError where that cannot be known from the flags, or log.txt says another number.
    """
    layers, chosen = range(run.facts["num_layers"]), set(MODULES)
    if run.facts.get("first_last_layers_bf16"):
        ends = (f"--num-layers-at-{end}-in-bf16" for end in ("start", "end"))
        start, end = (int(run.flags.get(flag, ("1",))[0]) for flag in ends)
        layers = layers[start : len(layers) - end]
    by_module = run.facts.get("te_precision_config")
    if by_module:
        if by_module != sha256_file(MLP_ONLY):
            raise ReportError(
                f"{run.folder} chose FP8 by module with a file that is not {MLP_ONLY.name} as it is now: which layers "
                "were in FP8 is not known. Use the commit of the run."
            )
        chosen -= LEAVE_FP8
    found = [(layer, module) for layer in layers for module in MODULES if module in chosen]
    everything = run.facts["num_layers"] * len(MODULES)
    # A rank of a pipeline counts its own layers only.
    if run.in_fp8 and run.in_fp8[1] == everything and run.in_fp8[0] != len(found):
        raise ReportError(
            f"{run.folder}/log.txt has {run.in_fp8[0]} linear layers in FP8, its flags say {len(found)}; the folder "
            "holds parts of two runs."
        )
    return found


def quantisation(run: Run) -> dict[tuple[int, str], Counts]:
    """Counts of every weight in FP8 of the run's last checkpoint, by layer and module."""
    scheme, found = scheme_of(run.facts), {}
    folder = checkpoint.iteration_folder(run.folder / "checkpoints", run.steps)
    try:
        stored = checkpoint.TorchDist(folder)
        for layer, module in tqdm(linears_in_fp8(run), desc="weights", disable=None):
            name = f"decoder.layers.{layer}.{MODULES[module]}.weight"
            found[layer, module] = count(stored.read(name), scheme, name)
    except (OSError, KeyError, ValueError) as error:
        raise ReportError(f"the weights in {folder} cannot be measured: {error}") from error
    return found


# The report


@dataclass(frozen=True)
class Report:
    """All that the four files say."""

    fp8: Run
    bf16: Run
    second: Run | None
    start: str  # of check_twins
    second_start: str | None
    commands: Commands  # FP8 and BF16
    second_commands: Commands | None  # BF16 and its second seed
    evaluations: list[Evaluation]
    weights: dict[tuple[int, str], Counts]  # empty: not measured

    @property
    def runs(self) -> list[Run]:
        return [run for run in (self.fp8, self.bf16, self.second) if run]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def total(self) -> Counts:
        return sum(self.weights.values(), Counts())

    @property
    def layers(self) -> dict[int, Counts]:
        """All weights of a layer added up."""
        groups = itertools.groupby(self.weights.items(), key=lambda item: item[0][0])
        return {layer: sum((counts for _, counts in group), Counts()) for layer, group in groups}

    @property
    def precision_alone(self) -> bool:
        return not self.commands.other and self.start != "unknown"


def make_report(fp8_folder: Path, bf16_folder: Path, second_folder: Path | None, weights: bool = True) -> Report:
    """Read, check and, with `weights`, measure the FP8 run's. ReportError where there is nothing to compare."""
    fp8_run, bf16_run = read_run("FP8", fp8_folder), read_run("BF16", bf16_folder)
    second = read_run("BF16, second seed", second_folder) if second_folder else None
    check_precision(fp8_run, bf16_run, second)
    start = check_twins(fp8_run, bf16_run)
    second_start = None
    if second:
        if second.facts["seed"] == bf16_run.facts["seed"]:
            raise ReportError(
                f"{second.folder} has the seed of {bf16_run.folder}, {second.facts['seed']}: their difference is no "
                "noise of seeds. Train the BF16 run again with another --seed."
            )
        second_start = check_twins(bf16_run, second, frozenset({"seed"}))
    return Report(
        fp8=fp8_run,
        bf16=bf16_run,
        second=second,
        start=start,
        second_start=second_start,
        commands=compare_commands(fp8_run, bf16_run),
        second_commands=compare_commands(bf16_run, second) if second else None,
        evaluations=evaluations(fp8_run.held_out, bf16_run.held_out, second.held_out if second else None),
        weights=quantisation(fp8_run) if weights else {},
    )


def verdicts(report: Report) -> list[Verdict]:
    last, other = report.last, report.commands.other
    same = "run.json but for precision, hashes of the data, learning rate of every step, flags but for paths, commit"
    starts = {
        "same": "; both began from the same weights",
        "twins": "; each began from its own parent, and those differ in precision alone too: the gap is the chain's",
        "unknown": "they began from different weights, and the parents' run.json is gone",
    }[report.start]
    differing = ", ".join(flag for flag, _, _ in other)
    return [
        Verdict(
            f"final held-out gap at most {LIMIT:g} nats",
            within_gate(last),
            f"{last.gap:+.4f} at step {last.step:,}: {last.fp8:.4f} in FP8, {last.bf16:.4f} in BF16",
        ),
        Verdict(
            "precision alone differs",
            report.precision_alone,
            f"differing: {differing}" if other else starts if report.start == "unknown" else f"equal: {same}{starts}",
        ),
    ]


def passed(report: Report) -> bool:
    return all(verdict.holds for verdict in verdicts(report))


@dataclass(frozen=True)
class Table:
    """A table of plain text. `numbers` are the columns set to the right."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: set[int]
    notes: tuple[str, ...] = ()


def tables(report: Report) -> list[Table]:
    weights = [weight_table(report)] if report.weights else []
    return [gap_table(report), run_table(report), *weights, flag_table(report)]


def gap_table(report: Report) -> Table:
    noisy = report.second is not None
    header = ("step", "FP8", "BF16", f"gap, FP8 {MINUS} BF16", *(["BF16, second seed", "seeds apart"] if noisy else []))
    rows = [
        (
            *(f"{one.step:,}", f"{one.fp8:.4f}", f"{one.bf16:.4f}", f"{one.gap:+.4f}"),
            *([f"{one.second:.4f}", f"{one.noise:.4f}"] if noisy else []),
        )
        for one in report.evaluations
    ]
    count, gap = training_gap(report.fp8.loss, report.bf16.loss)
    notes = [
        "Nats per token. At a step FP8 and BF16 are evaluated on the same batches. Of the training loss, over the last "
        f"{count:,} steps, the gap is {gap:+.4f} on average; where text is seen again it says what is learned by heart."
    ]
    if report.second_commands:
        extra = [flag for flag, _, _ in report.second_commands.other if flag != "--seed"]
        notes.append("A seed decides the order of the data too; in pre-training, of the held-out text as well.")
        if report.second_start == "unknown":
            notes.append("The second seed began from other weights, and what made them is not recorded.")
        notes += [f"The second seed's run also differs in {', '.join(extra)}."] if extra else []
    return Table("Held-out loss", header, rows, set(range(len(header))), tuple(notes))


def run_table(report: Report) -> Table:
    """What a run's gradients were and what it cost, a row each, a column for each run."""

    def row(name: str, cells: Iterable[str]) -> tuple[str, ...]:
        return (name, *cells)

    runs = report.runs
    norms = [np.array(list(run.grad_norm.values())) for run in runs]
    seconds = [np.array(list(run.step_seconds.values())) for run in runs]
    rows = [
        row("linear layers in FP8", (f"{run.in_fp8[0]} of {run.in_fp8[1]}" if run.in_fp8 else "-" for run in runs)),
        row("seed", (str(run.facts["seed"]) for run in runs)),
        row("gradient norm, median", (f"{np.median(norm):.3f}" for norm in norms)),
        row(
            "gradient norm, largest after a tenth of the steps",
            (f"{norm[norm.size // 10 :].max():.3f}" for norm in norms),
        ),
        row("seconds a step, median", (f"{np.median(values):.3f}" for values in seconds)),
        row("seconds end to end", (f"{run.seconds:,.0f}" for run in runs)),
        row("starts", (str(run.starts) for run in runs)),
        row("peak GPU memory, GB", (f"{run.peak_bytes / 1e9:.2f}" if run.peak_bytes else "-" for run in runs)),
    ]
    return Table(
        "Gradients and cost", ("", *(run.label for run in runs)), rows, set(range(1, len(runs) + 1)), cost_notes(runs)
    )


def cost_notes(runs: list[Run]) -> tuple[str, ...]:
    notes = [
        "End to end: from the opening of each TensorBoard file to its last entry, so with building the model, "
        "evaluations and saves, without the program's start. Times compare only runs that had equal machines to "
        "themselves, which no file records.",
    ]
    if runs[0].facts.get("backend") == "cpu":
        notes.append("FP8 was emulated on a CPU: its time says nothing about FP8 on a GPU.")
    sources = {run.memory_source for run in runs}
    notes.append(
        "Memory was not recorded: a GPU run has it with --log-memory-to-tensorboard."
        if sources == {"not recorded"}
        else "Memory of the rank that logs: " + "; ".join(f"{run.label}: {run.memory_source}" for run in runs) + "."
    )
    if any(run.in_fp8 is None for run in runs):
        notes.append("-: log.txt is missing or does not say.")
    return tuple(notes)


def weight_table(report: Report) -> Table:
    """A row for each layer: the SNR of its weights, and the shares of all of them together."""

    def row(name: str, snrs: Iterable[Counts | None], counts: Counts) -> tuple[str, ...]:
        cells = ("-" if one is None else "exact" if one.snr is None else f"{one.snr:.2f}" for one in snrs)
        blocks = f"{100 * counts.blocks_at_max / counts.blocks:.0f} %"
        return (name, *cells, percent(counts.underflow), percent(counts.saturation), blocks)

    rows = [
        row(str(layer + 1), (report.weights.get((layer, module)) for module in MODULES), counts)
        for layer, counts in report.layers.items()
    ]
    columns = [
        sum((counts for (_, name), counts in report.weights.items() if name == module), Counts()) for module in MODULES
    ]
    rows.append(row("all", (counts if counts.elements else None for counts in columns), report.total))
    header = ("layer", *(f"{module}, dB" for module in MODULES), "underflow", "saturation", "blocks at the largest")
    return Table("Quantisation of the weights", header, rows, set(range(1, len(header))), weight_notes(report))


def weight_notes(report: Report) -> tuple[str, ...]:
    scheme = scheme_of(report.fp8.facts)
    by_scale = {
        "fp32": "With FP32 scales every block has at least one such element by construction.",
        "pow2": "With power-of-two scales a block has one only where its largest element comes near.",
    }[scheme.scale_fmt]
    notes = [
        f"The BF16 weights of step {report.fp8.steps:,} of the FP8 run, quantised as training does ({scheme}). "
        "SNR: sum of squares of the BF16 weight over that of the change, in dB. Underflow: share of the nonzero "
        "elements that become zero.",
        f"Saturation: share of the elements whose code is {scheme.fmt.max:g}, the format's largest value. None is cut "
        f"off: a scale brings a block's largest element to at most that value. {by_scale}",
    ]
    if scheme.tile is fp8.TENSOR and report.fp8.flags.get("--tensor-model-parallel-size", ("1",)) != ("1",):
        notes.append("Training had a scale for each rank's shard; here there is one for the whole weight.")
    return (*notes, NOT_MEASURED)


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value else "0"


def flag_table(report: Report) -> Table:
    """The flags that differ between the FP8 and the BF16 run."""
    kinds = {"precision": report.commands.precision, "other": report.commands.other, "path": report.commands.paths}
    rows = [(kind, flag, shown(left), shown(right)) for kind, found in kinds.items() for flag, left, right in found]
    alone = "Precision alone differs" if report.precision_alone else "More than precision differs"
    equal = len(report.fp8.flags.keys() & report.bf16.flags.keys()) - sum(
        left is not None and right is not None for found in kinds.values() for _, left, right in found
    )
    note = f"{alone}; {equal} flags are equal. What the environment set is not recorded, but for the format of scales."
    return Table("Flags that differ", ("kind", "flag", "FP8", "BF16"), rows, set(), (note,))


def command_diff(report: Report) -> list[str]:
    """Both command lines, a flag a line: "  " where they agree, "- " only in BF16, "+ " only in FP8."""
    lines = []
    for run in (report.bf16, report.fp8):
        groups = shared.flag_groups(["python", *run.words[1:]])
        lines.append([shlex.join(group) for group in groups])
    matcher = difflib.SequenceMatcher(None, *lines, autojunk=False)
    found = []
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            found += [f"  {line}" for line in lines[0][a:b]]
        else:
            found += [f"- {line}" for line in lines[0][a:b]] + [f"+ {line}" for line in lines[1][c:d]]
    return found


def as_json(report: Report) -> str:
    """Every number of the report, with the curves."""
    content = {
        "gate": {
            "limit_nats": LIMIT,
            "step": report.last.step,
            "gap_nats": report.last.gap,
            "within": within_gate(report.last),
            "noise_nats": report.last.noise,
            "words": [gate_words(report.last), noise_words(report.evaluations)],
        },
        "training_gap_nats": dict(zip(("steps", "mean"), training_gap(report.fp8.loss, report.bf16.loss), strict=True)),
        "verdicts": [asdict(verdict) for verdict in verdicts(report)],
        "evaluations": [asdict(one) | {"gap": one.gap, "noise": one.noise} for one in report.evaluations],
        "runs": [asdict(run) | {"folder": str(run.folder), "name": run.name} for run in report.runs],
        "commands": asdict(report.commands),
        "starting_weights": report.start,
        "weights": report.weights
        and {
            "scheme": str(scheme_of(report.fp8.facts)),
            "activations_and_gradients": NOT_MEASURED,
            "all": counts_json(report.total),
            "layers": [
                {"layer": layer, "module": MODULES[module]} | counts_json(counts)
                for (layer, module), counts in report.weights.items()
            ],
        },
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def counts_json(counts: Counts) -> dict[str, Any]:
    return {"snr_db": counts.snr, "underflow": counts.underflow, "saturation": counts.saturation} | asdict(counts)


def as_markdown(report: Report) -> str:
    lines = [f"# FP8 beside BF16: {report.fp8.name}", "", gate_words(report.last), noise_words(report.evaluations), ""]
    lines += [f"- {verdict.claim}: **{verdict.word}** ({verdict.numbers})" for verdict in verdicts(report)]
    lines += ["", f"![{summary(report)}](parity.png)"]
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += [
            markdown_row(table.header),
            "|" + "".join("---:|" if i in table.numbers else "---|" for i in range(len(table.header))),
        ]
        lines += [markdown_row(row) for row in table.rows]
        lines += ["", " ".join(table.notes)]
    lines += ["", "## The two command lines", "", "```diff", *command_diff(report), "```"]
    return "\n".join(lines) + "\n"


def markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(shared.printable(cell).replace("|", "\\|") for cell in cells) + " |"


# The figure

MARKERS = {"qkv": "o", "proj": "s", "fc1": "^", "fc2": "D"}
COLOURS = {"qkv": "fp8", "proj": "gap", "fc1": "bf16", "fc2": "bigram"}


def summary(report: Report) -> str:
    """The figure in words."""
    by_layer = "; SNR, underflow and saturation by layer" if report.weights else ""
    return f"Loss, gap and gradient norm of the FP8 and the BF16 run by step{by_layer}"


def draw(report: Report, width: float, height: float) -> Any:
    """The figure, sizes in inches: three panels by step, and below them two by layer, side by side on a wide one.

    Without weights, the three alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, hspace=0.03)
    wide = width > 6
    rows = (4 if wide else 5) if report.weights else 3
    grid = figure.add_gridspec(rows, 2 if wide else 1, height_ratios=(1.5, 1.2, 1, 1.1, 1.1)[:rows])
    top = figure.add_subplot(grid[0, :])
    by_step = [top, *(figure.add_subplot(grid[row, :], sharex=top) for row in (1, 2))]
    for axes in by_step:
        shared.style(axes, report.fp8.facts)
    draw_losses(by_step[0], report)
    draw_gap(by_step[1], report)
    draw_norms(by_step[2], report)
    if report.weights:
        draw_snr(quiet(figure.add_subplot(grid[3, 0])), report)
        draw_shares(quiet(figure.add_subplot(grid[3, 1] if wide else grid[4, 0])), report)
    for axes in by_step[:2]:
        axes.tick_params(labelbottom=False)
    top.set_xlim(min(report.fp8.loss) - 1, max(report.fp8.loss))
    by_step[2].set_xlabel("step", color=LIGHT["ink"], fontsize=10.5)
    figure.align_ylabels(by_step)
    return figure


def strokes(report: Report) -> list[tuple[Run, dict[str, Any]]]:
    """Each run with how its lines look; the one drawn last lies on top."""
    looks = {
        "BF16, second seed": {"color": LIGHT["muted"], "linewidth": 1.2, "linestyle": (0, (1, 1.5)), "zorder": 3},
        "BF16": {"color": LIGHT["bf16"], "linewidth": 1.8, "linestyle": "-", "zorder": 4},
        "FP8": {"color": LIGHT["fp8"], "linewidth": 1.8, "linestyle": "--", "zorder": 5},
    }
    return [(run, looks[run.label]) for run in reversed(report.runs)]


def named(axes: Any, words: str) -> None:
    axes.set_ylabel(words, color=LIGHT["ink"], fontsize=10.5)


def draw_losses(axes: Any, report: Report) -> None:
    """Training losses smoothed, held-out losses as points."""
    for run, look in strokes(report):
        axes.plot(
            list(run.loss), shared.smoothed(np.array(list(run.loss.values()))), **look, label=f"{run.label}, training"
        )
        points = HOLLOW | {
            "s": 28,
            "edgecolor": look["color"],
            "zorder": 7,
            "marker": "o" if run is report.fp8 else "s",
        }
        axes.scatter(*zip(*run.held_out.items(), strict=True), **points, label=f"{run.label}, held out")
    named(axes, "loss (nats per token)")
    legend(axes, loc="upper right")


def draw_gap(axes: Any, report: Report) -> None:
    """FP8 less BF16: training smoothed, held out as points; the gate; and how far the two BF16 seeds are apart."""
    steps, gap = shared.difference(report.fp8.loss, report.bf16.loss)
    smooth = shared.smoothed(gap)
    at = [one.step for one in report.evaluations]
    held_out = [one.gap for one in report.evaluations]
    noise = [one.noise or 0.0 for one in report.evaluations]
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.9, zorder=2)
    axes.plot(steps, smooth, color=LIGHT["gap"], linewidth=1.4, alpha=0.7, zorder=4, label="training")
    if report.second:
        axes.errorbar(
            at, [0.0] * len(at), yerr=noise, fmt="none", ecolor=LIGHT["bf16"], elinewidth=5, alpha=0.35, zorder=3,
            label="BF16 seeds apart",
        )  # fmt: skip
    axes.axhline(LIMIT, color=LIGHT["fp8"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=3, label=f"gate, {LIMIT:g}")
    points = HOLLOW | {"marker": "D", "s": 26, "edgecolor": LIGHT["ink"], "zorder": 6}
    axes.scatter(at, held_out, **points, label="held out")
    # The first steps' gap is of the start, and would hide the rest.
    settled = np.abs(smooth[smooth.size // 10 :]).max()
    reach = 1.25 * max(settled, *np.abs(held_out), *noise, LIMIT)
    axes.set_ylim(-reach, reach)
    named(axes, f"FP8 {MINUS} BF16\n(nats per token)")
    legend(
        axes, loc="lower left", bbox_to_anchor=(0, 0.97), borderpad=0, ncols=4 if axes.figure.get_figwidth() > 6 else 2
    )


def draw_norms(axes: Any, report: Report) -> None:
    """Gradient norms, single steps faint and smoothed."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    for run, look in strokes(report):
        steps, norm = list(run.grad_norm), np.array(list(run.grad_norm.values()))
        axes.plot(steps, norm, **look | {"linewidth": 0.6, "alpha": 0.3, "linestyle": "-"})
        axes.plot(steps, shared.smoothed(norm), **look)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    named(axes, "gradient norm")


def layer_axis(axes: Any, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer", color=LIGHT["ink"], fontsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, report.fp8.facts["num_layers"] + 0.5)


def draw_snr(axes: Any, report: Report) -> None:
    """SNR of each weight, by layer."""
    for module, colour in COLOURS.items():
        found = {layer + 1: counts.snr for (layer, name), counts in report.weights.items() if name == module}
        found = {layer: snr for layer, snr in found.items() if snr is not None}
        if found:
            look = {"color": LIGHT[colour], "marker": MARKERS[module], "markersize": 4.5, "linewidth": 1.2}
            axes.plot(list(found), list(found.values()), **look, label=module)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))  # hundredths of a dB say nothing
    named(axes, "SNR of weights (dB)")
    layer_axis(axes, report)
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, ncols=4, handlelength=1.2, columnspacing=1)


def draw_shares(axes: Any, report: Report) -> None:
    """Underflow and saturation of each layer's weights together."""
    layers = report.layers
    for label, colour, marker, values in (
        ("underflow", "gap", "o", [100 * counts.underflow for counts in layers.values()]),
        ("saturation", "bigram", "s", [100 * counts.saturation for counts in layers.values()]),
    ):
        look = {"color": LIGHT[colour], "marker": marker, "markersize": 4.5, "linewidth": 1.2, "clip_on": False}
        axes.plot([layer + 1 for layer in layers], values, **look, label=label)
    axes.set_ylim(bottom=0)
    named(axes, "share of elements (%)")
    layer_axis(axes, report)
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, ncols=2)


# The page

# The quickstart's page has the style of this one, too.
STYLE = shared.PAGE[shared.PAGE.index("<style>") : shared.PAGE.index("</style>")]
PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
"""
    + STYLE
    + """
pre { overflow-x: auto; padding: .9rem 1rem; border-radius: .5rem; background: var(--shade); font-size: .82rem; }
pre span { display: block; } pre .fp8 { color: var(--fp8); } pre .bf16 { color: var(--bf16); }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$gate</p>
<p>$noise</p>
<p class="note">$model</p>
</header>
<dl class="figures">
$figures</dl>
<ul class="verdicts">
$verdicts</ul>
<h2>$figure_title</h2>
<figure style="margin:0">$figure</figure>
<p class="note">$figure_note</p>
$tables
<h2>The two command lines</h2>
<p>A flag a line; $command_words</p>
<pre>$commands</pre>
<footer>Commits $commits. Every number is read from the runs' folders.</footer>
</body>
</html>
"""
)


def page(report: Report) -> str:
    """The HTML page. Everything that comes from a file is escaped; nothing is fetched."""
    safe, window = shared.safe, shared.smoothing_window(len(report.fp8.loss))
    sizes = ((9, 11), (4.3, 15)) if report.weights else ((9, 8), (4.3, 9))
    fields = {
        "light": shared.css_variables(LIGHT),
        "dark": shared.css_variables(shared.DARK),
        "title": safe(f"FP8 beside BF16: {report.fp8.name}"),
        "gate": safe(gate_words(report.last)),
        "noise": safe(noise_words(report.evaluations)),
        "model": safe(f"{shared.model_words(report.fp8.facts)}; {report.fp8.steps:,} steps."),
        "figures": figures(report),
        "verdicts": "".join(map(shared.verdict_item, verdicts(report))),
        "figure": shared.both_widths(draw, report, sizes, summary(report)),
        "figure_title": "By step and by layer" if report.weights else "By step",
        "figure_note": f"Lines are means of {window} steps centred on each, faint ones single steps. Bars around zero: "
        "how far two BF16 seeds are apart.",
        "tables": "".join(map(table_html, tables(report))),
        "command_words": "those marked + are of FP8 alone, those marked - of BF16 alone.",
        "commands": "".join(map(diff_line, command_diff(report))),
        "commits": safe(", ".join(dict.fromkeys(run.commit for run in report.runs))),
    }
    return Template(PAGE).substitute(fields)


def figures(report: Report) -> str:
    """The numbers at the top."""
    last = report.last
    noise = (
        ("unknown", "no second BF16 seed") if last.noise is None else (f"{last.noise:.4f}", "nats, one pair of seeds")
    )
    items = (
        ("fp8", "FP8, held out", f"{last.fp8:.4f}", "nats per token"),
        ("bf16", "BF16, held out", f"{last.bf16:.4f}", "nats per token"),
        ("gap", f"gap, FP8 {MINUS} BF16", f"{last.gap:+.4f}", f"nats, limit {LIMIT:g}"),
        ("bigram", "BF16 seeds apart", *noise),
    )
    return "".join(
        f'<div class="{style}"><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>\n'
        for style, name, value, unit in items
    )


def table_html(table: Table) -> str:
    body = shared.safe_table(table.header, table.rows, table.numbers)
    return f"<h2>{shared.safe(table.title)}</h2>\n{body}" + "".join(
        f'<p class="note">{shared.safe(note)}</p>\n' for note in table.notes
    )


def diff_line(line: str) -> str:
    mark = {"+": ' class="fp8"', "-": ' class="bf16"'}.get(line[0], "")
    return f"<span{mark}>{shared.safe(line)}</span>"


# The command


def write(report: Report, output: Path) -> None:
    """The four files in the folder `output`, which is made; each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    shared.write(output / "parity.json", as_json(report).encode())
    shared.write(output / "parity.md", as_markdown(report).encode())
    shared.write(output / "parity.png", shared.png(draw(report, 9, 11 if report.weights else 8)))
    shared.write(output / "parity.html", page(report).encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--fp8", type=Path, required=True, metavar="RUN", help="folder of the FP8 run")
    add("--bf16", type=Path, required=True, metavar="RUN", help="folder of its BF16 twin")
    add("--bf16-seed", type=Path, metavar="RUN", help="folder of the BF16 run again, trained from another --seed")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the four files")
    add("--no-weights", dest="weights", action="store_false", help="leave out the weights: no checkpoint is needed")
    args = parser.parse_args(arguments)
    try:
        report = make_report(args.fp8, args.bf16, args.bf16_seed, args.weights)
        write(report, args.output)
    except (ReportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(as_markdown(report), end="")
    return 0 if passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())
