#!/usr/bin/env python
"""Before a run: the memory it needs on each GPU, part by part, and about how long a step takes, in FP8 and in BF16.

    python tools/plan.py --shape 1.5B --seq-length 8192 --micro-batch-size 2
    python tools/plan.py --shape 7B --seq-length 32768 --tensor-parallel 4 --data-parallel 2 --recompute --gpu H100
    python tools/plan.py --model models/Qwen2.5-7B --seq-length 8192
    python tools/plan.py --shape 1.5B --seq-length 8192 --micro-batch-size 2 --compare out/1.5B-8k.json

Ways to train are planned, each in BF16 and in FP8: stock Megatron with its native fused cross entropy; ours as
the scripts train under tensor parallelism; and "faster", as those for pre-training train without it, with DeepGEMM and
FlashAttention 4; in FP8 with --recompute-swiglu, --recompute-norms and --transpose-weights-late too, "less"
(docs/performance.md). The largest micro-batch that fits is named for each. --compare sets the plan beside what
tools/bench_step.py measured.

Memory is counted: what Megatron 0.19 and TransformerEngine 2.20 keep, in bytes a parameter, a token and a logit; those
of a logit in stock are what was left over of the measured peaks of two runs of the 1.5B shape at 8k. Time is what four
such runs took, scaled: each kind of kernel by its own operations or bytes. What of it was held against other shapes,
and how far it was off, is in docs/performance.md; the interval of time, 15 % to both sides, holds them.

Communication is that of tensor parallelism with sequence parallelism, and of data parallelism, within one host, and
none of it hidden: its rate is a fit to two GPUs with 8 layers of 1.5B. Context parallelism's, and networks between
hosts, are not in it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench_step import FASTER, GRAPHS, KEEP_LESS, NATIVE, OURS, SHAPES

from infir2.data.pretraining import positive
from infir2.qwen2 import Shape
from infir2.speed.linear_cross_entropy import CHUNK_ELEMENTS

GIGA = 1e9
TIME_ERROR = 0.15


@dataclass(frozen=True)
class Gpu:
    """capacity: bytes of memory that a process can have; bandwidth, links: bytes a second, beside the H200's."""

    capacity: float
    bandwidth: float
    links: float


# From data sheets: memory 4.8 and 3.35 TB/s, NVLink 900 GB/s, of the H800 400.
GPUS = {"H200": Gpu(150e9, 1.0, 1.0), "H100": Gpu(84e9, 3.35 / 4.8, 1.0), "H800": Gpu(84e9, 3.35 / 4.8, 400 / 900)}


@dataclass(frozen=True)
class Way:
    """How to train: linear layers in FP8, our parts of the step, those that are on without tensor parallelism, and
    FP8 copies made in the backward pass instead of kept."""

    fp8: bool
    ours: bool
    faster: bool = False
    less: bool = False


# Named as tools/bench_step.py's arms.
WAYS = {
    "stock-bf16-ce": Way(fp8=False, ours=False),
    "stock-fp8-ce": Way(fp8=True, ours=False),
    "bf16": Way(fp8=False, ours=True),
    "fp8": Way(fp8=True, ours=True),
    "bf16-faster": Way(fp8=False, ours=True, faster=True),
    "fp8-faster": Way(fp8=True, ours=True, faster=True),
    "fp8-faster-less": Way(fp8=True, ours=True, faster=True, less=True),
}


@dataclass(frozen=True)
class Plan:
    """What is asked for. micro_batches: of each GPU's group in a step."""

    shape: Shape
    seq_length: int
    micro_batch: int
    micro_batches: int
    tensor: int = 1
    context: int = 1
    data: int = 1
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one GPU, before tensor parallelism."""
        return self.micro_batch * self.seq_length // self.context

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Elements a token: hidden, width of the feed-forward layer, of all queries, of all keys and values."""
        shape = self.shape
        return shape.hidden, shape.ffn, shape.heads * shape.head_size, 2 * shape.kv_heads * shape.head_size

    @property
    def linear(self) -> int:
        """Weights of the blocks' linear layers."""
        hidden, ffn, queries, kv = self.sizes
        return self.shape.layers * (hidden * (queries + kv) + queries * hidden + 3 * hidden * ffn)

    @property
    def head(self) -> int:
        return self.shape.vocab * self.shape.hidden

    @property
    def parameters(self) -> int:
        return self.linear + self.head * (1 if self.shape.tied else 2)


# Memory


def activations(plan: Plan, way: Way) -> float:
    """Bytes a token that one block keeps for its backward pass."""
    hidden, ffn, queries, kv = plan.sizes
    code = 1 if way.fp8 else 2  # a linear layer's input is kept as FP8 codes
    norms = 2 * 2 * hidden  # what both norms were given
    inputs = 0 if way.less else code * (2 * hidden + ffn)  # of qkv, fc1 and fc2
    attention = 2 * (queries + kv) + 2 * queries + 4 * plan.shape.heads  # q, k, v; output; log-sums
    projection = queries if way.fp8 else 0  # in BF16 it shares the attention's output
    return norms + inputs + attention + projection + 2 * 2 * ffn  # and what SwiGLU was given


def memory(plan: Plan, way: Way) -> dict[str, float]:
    """Bytes on each GPU, by part."""
    parameters = plan.parameters / plan.tensor
    tokens = plan.tokens / plan.tensor  # sequence parallelism
    whole = activations(plan, way) * tokens
    kept = 2 * plan.shape.hidden * tokens if plan.recompute else whole
    logits = plan.tokens * plan.shape.vocab / plan.tensor
    copies = 1 if way.less else 2  # both ways round
    # Ours has a chunk of the logits, or a block's gradients of SwiGLU; stock holds all logits in BF16, in FP32 twice.
    chunk = 2 * min(logits, CHUNK_ELEMENTS) + 2 * plan.shape.hidden * plan.tokens
    loss = max(chunk, 6 * plan.shape.ffn * tokens) if way.ours else 10 * logits
    return {
        "weights, BF16": 2 * parameters,
        "weights, FP8 codes": way.fp8 * copies * plan.linear / plan.tensor,
        "gradients, FP32": 4 * parameters,
        "masters and moments, FP32": 12 * parameters / (plan.data * plan.context),
        "activations": kept * plan.shape.layers + (whole if plan.recompute else 0),
        "logits and loss, or gradients": loss,
    }


def largest_micro_batch(plan: Plan, way: Way, capacity: float) -> int:
    """That fits; 0 where not even one does."""
    largest = 0
    while sum(memory(replace(plan, micro_batch=largest + 1), way).values()) <= capacity and largest < 1024:
        largest += 1
    return largest


# Time


@dataclass(frozen=True)
class Rates:
    """Of one H200, from the profiles of four runs of the 1.5B shape at 8k tokens."""

    linear_bf16: float = 748e12  # operations a second
    linear_fp8: float = 1085e12
    head: float = 827e12
    attention: float = 490e12
    flash: float = 563e12  # by FlashAttention 4, which takes 0.87 of the time at that shape
    quantisation: float = 6.0e11  # elements a second
    traffic: float = 2.25e12  # bytes a second of SwiGLU, norms, RoPE and the rest
    loss_stock: float = 11.8e-12  # seconds a logit
    loss_ours: float = 1.95e-12
    optimizer: float = 14.0e-12  # seconds a parameter
    again: float = 3.7e12  # bytes a second of what is computed again; from a later run of 1.5B
    gap_bf16: float = 0.56e-3  # seconds a block and micro-batch in which nothing runs
    gap_fp8: float = 0.81e-3
    links: float = 1.8e11  # bytes a second to and from another GPU; from two GPUs, with CUDA graphs


def traffic_between_gpus(plan: Plan) -> float:
    """Bytes that one GPU sends in a step. Tensor parallelism gathers and scatters a block's tokens ten times: before
    and after its two parts, forward and backward, and once more for two weight gradients. Data parallelism scatters
    gradients in FP32 and gathers weights in BF16."""
    replicas = plan.data * plan.context
    activations = 10 * 2 * plan.shape.hidden * plan.tokens * plan.micro_batches * plan.shape.layers
    return activations * (1 - 1 / plan.tensor) + 6 * plan.parameters / plan.tensor * (1 - 1 / replicas)


def seconds(plan: Plan, way: Way, gpu: Gpu, rates: Rates = Rates()) -> dict[str, float]:
    """Of one step, by kind of kernel."""
    hidden, ffn, queries, kv = plan.sizes
    tokens = plan.tokens * plan.micro_batches
    layers, tensor = plan.shape.layers, plan.tensor
    passes = 4 / 3 if plan.recompute else 1  # a forward pass more
    causal = 3.5 * 2 * plan.seq_length * queries  # operations a token and block, forward and backward
    quantised = (2 if way.faster else 4) * hidden + queries + (queries + kv)  # inputs and gradients of four layers
    quantised += 0 if way.ours else 3 * ffn  # ours: in the kernels of SwiGLU, which move as many bytes as without
    split = 1 if way.faster else 4 if way.ours else 6  # of qkv's output, its rotation, and other copies
    traffic = 16 * ffn + 2 * 16 * hidden + split * (2 * hidden + queries + kv)
    again = (5 * ffn + 6 * hidden) * tokens * layers + 2 * plan.linear * plan.micro_batches if way.less else 0
    loss = rates.loss_ours if way.ours else rates.loss_stock
    return {
        "linear layers": 6
        * plan.linear
        * tokens
        * passes
        / tensor
        / (rates.linear_fp8 if way.fp8 else rates.linear_bf16),
        "head": 6 * plan.head * tokens / tensor / rates.head,
        "attention": causal * tokens * layers * passes / tensor / (rates.flash if way.faster else rates.attention),
        "quantisation": quantised * tokens * layers * passes / tensor / rates.quantisation / gpu.bandwidth
        if way.fp8
        else 0,
        "elementwise": traffic * tokens * layers * passes / tensor / rates.traffic / gpu.bandwidth,
        "made again": again / tensor / rates.again / gpu.bandwidth,
        "loss": tokens * plan.shape.vocab / tensor * loss / gpu.bandwidth,
        "optimizer": plan.parameters / tensor / (plan.data * plan.context) * rates.optimizer / gpu.bandwidth,
        "communication": traffic_between_gpus(plan) / rates.links / gpu.links,
        "nothing runs": layers * plan.micro_batches * (rates.gap_fp8 if way.fp8 else rates.gap_bf16),
    }


# What is printed


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    )


def by_part(found: dict[str, dict[str, float]], unit: float, digits: int) -> list[list[str]]:
    """Rows of parts, columns of ways, and the sum."""
    parts = next(iter(found.values()))
    rows = [[part, *(f"{values[part] / unit:.{digits}f}" for values in found.values())] for part in parts]
    return [*rows, ["sum", *(f"{sum(values.values()) / unit:.{digits}f}" for values in found.values())]]


def report(plan: Plan, name_of_gpu: str) -> str:
    gpu = GPUS[name_of_gpu]
    held = {name: memory(plan, way) for name, way in WAYS.items()}
    taken = {name: seconds(plan, way, gpu) for name, way in WAYS.items()}
    step = {name: sum(parts.values()) for name, parts in taken.items()}
    fits = [str(largest_micro_batch(plan, way, gpu.capacity)) for way in WAYS.values()]
    times = [
        f"{step[name]:.2f} ({step[name] * (1 - TIME_ERROR):.2f}-{step[name] * (1 + TIME_ERROR):.2f})" for name in WAYS
    ]
    ratios = [f"{step[name] / step['stock-bf16-ce']:.2f}" for name in WAYS]
    rows = [["a step, s", *times], ["of stock BF16", *ratios], ["largest micro-batch", *fits]]
    return "\n\n".join(
        [
            f"{plan.parameters / GIGA:.2f} B parameters on {plan.tensor * plan.context * plan.data} {name_of_gpu}, "
            f"{plan.micro_batch} x {plan.seq_length} tokens a micro-batch, {plan.micro_batches} of them a step",
            table(["memory of a GPU, GB", *WAYS], by_part(held, GIGA, 1)),
            table(["time of a step, ms", *WAYS], by_part(taken, 1e-3, 0)),
            table(["", *WAYS], rows),
        ]
    )


def way_of(arm: dict) -> Way | None:
    """Of a measured arm, by its flags; None where no plan is of such a run. With CUDA graphs the peak says nothing."""
    flags = set(arm["flags"])
    ours, less = OURS[0] in flags, {flag in flags for flag in KEEP_LESS}
    planned = arm["precision"] in ("bf16", "fp8") and len(less) == 1 and GRAPHS[0] not in flags
    if not planned or not (ours or NATIVE[0] in flags):
        return None
    return Way(arm["precision"] == "fp8", ours, ours and FASTER[0] in flags, less == {True})


def compare(plan: Plan, gpu: str, measured: Path) -> str:
    """The plan beside what was measured, arm by arm."""
    try:
        arms = json.loads(measured.read_text(encoding="utf-8"))["arms"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{measured} is not what tools/bench_step.py writes: {type(error).__name__}: {error}"
        ) from None
    rows = []
    for name, arm in arms.items():
        rounds, way = arm["rounds"], way_of(arm)
        if way is None or not rounds:
            continue
        times = sorted(value for one in rounds for value in one["seconds"])
        pairs = (
            (sum(memory(plan, way).values()) / GIGA, max(one["peak_gb"] for one in rounds)),
            (sum(seconds(plan, way, GPUS[gpu]).values()), times[len(times) // 2]),
        )
        cells = [f"{planned:.2f} {found:.2f} {100 * (planned / found - 1):+.1f} %" for planned, found in pairs]
        rows.append([name, *cells])
    if not rows:
        raise ValueError(f"{measured} holds no arm like {', '.join(WAYS)}")
    return table(["planned, measured, difference", "peak GB", "s a step"], rows)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=sorted(SHAPES))
    which.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder")
    add("--layers", type=positive, help="this many of the shape's layers")
    add("--seq-length", type=positive, default=8192)
    add("--micro-batch-size", type=positive, default=1)
    add("--micro-batches", type=positive, default=4, help="of a step, one after another")
    add("--tensor-parallel", type=positive, default=1)
    add("--context-parallel", type=positive, default=1)
    add("--data-parallel", type=positive, default=1)
    add("--recompute", action="store_true", help="every block is computed again for its backward pass")
    add("--gpu", choices=sorted(GPUS), default="H200")
    add("--compare", type=Path, metavar="JSON", help="of tools/bench_step.py")
    args = parser.parse_args(words)
    try:
        shape = SHAPES[args.shape] if args.shape else Shape.from_folder(args.model)
        shape = replace(shape, layers=args.layers) if args.layers else shape
        plan = Plan(
            shape,
            args.seq_length,
            args.micro_batch_size,
            args.micro_batches,
            args.tensor_parallel,
            args.context_parallel,
            args.data_parallel,
            args.recompute,
        )
        print(report(plan, args.gpu))
        if args.compare:
            print("\n" + compare(plan, args.gpu, args.compare))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
