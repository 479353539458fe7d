"""Where a training step's GPU time goes: kernels of a profiler's trace, sorted into categories.

A kernel is known by its name where its library names it well (GEMMs, attention, casts). Generic kernels, torch's
elementwise ones and what its compiler makes, are known by the operator that launched them and by the shapes it had:
what works on tensors as wide as the vocabulary is the loss.

No torch: this reads the Chrome trace that `torch.profiler` exports (with `record_shapes`).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# In this order: the first pattern that is found in a kernel's name decides.
BY_NAME = (
    ("communication", r"nccl"),
    (
        "attention",
        r"sdpa|fmha|flash_(fwd|bwd)|FlashAttn|flashattn|cudnn::fusion|fused_attn|flash_attention|compute_dot_do_o|convert_dq|scaled_dot",
    ),
    (
        "quantisation",
        r"block_scaled|cast_transpose|quantize|Quantize|amax|swizzle|cast_fp8|compute_scale|transpose_kernel|_quantis",
    ),
    ("gemm", r"nvjet|gemm|cublas|cutlass|splitK|xmma|sm90_\w*(f8|bf16)|Kernel2"),
    ("optimizer", r"multi_tensor|Adam|adam_|L2Norm|l2norm"),
    ("norm", r"rmsnorm|layernorm|layer_norm|ln_\w*(fwd|bwd)|RMSNorm|LayerNorm|_rms"),
    ("rope", r"rope|rotary|_rotate"),
    ("activation", r"swiglu|silu|gated_act|gated_kernel|dgated"),
    ("cross entropy", r"cross_entropy|^_rows$"),
)
BY_OPERATOR = (
    ("cross entropy", r"CrossEntropy|cross_entropy"),
    ("activation", r"SwiGLU|swiglu"),
    ("rope", r"RoPE|rotary"),
    ("embedding", r"embedding"),
)
CATEGORIES = (
    *("gemm", "attention", "quantisation", "cross entropy", "activation", "norm", "rope", "elementwise", "embedding"),
    *("optimizer", "communication", "copy"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or memset on the GPU; times in microseconds.

    operator: what launched it, from the outermost operator to the innermost. shapes: the inputs of the innermost.
    """

    name: str
    start: float
    duration: float
    operator: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


def read_trace(path: Path) -> list[Kernel]:
    """The GPU's work in a Chrome trace, in order of time."""
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    events = [event for event in events if event.get("ph") == "X"]
    operators = _operators(event for event in events if event.get("cat") == "cpu_op")
    kernels = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        operator, shapes = operators.get(event.get("args", {}).get("External id"), ((), ()))
        kernels.append(Kernel(event["name"], event["ts"], event["dur"], operator, shapes))
    return sorted(kernels, key=lambda kernel: kernel.start)


def _operators(events: Iterable[dict]) -> dict[int, tuple[tuple[str, ...], tuple]]:
    """By external id: the operator's path (outermost first) and the shapes of its inputs."""
    by_thread = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    found = {}
    for thread in by_thread.values():
        stack: list[dict] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            stack.append(event)
            args = event.get("args", {})
            found[args.get("External id")] = (tuple(e["name"] for e in stack), _shapes(args.get("Input Dims", ())))
    return found


def _shapes(dims) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors among an operator's inputs; lists of tensors are left out."""
    return tuple(tuple(shape) for shape in dims if shape and all(isinstance(size, int) for size in shape))


def category(kernel: Kernel, vocabulary: int) -> str:
    """The category of one kernel. `vocabulary`: this rank's columns of logits."""
    for name, pattern in BY_NAME:
        if re.search(pattern, kernel.name):
            return name
    if any(shape[-1] == vocabulary for shape in kernel.shapes):
        return "cross entropy"
    path = " ".join(kernel.operator)
    for name, pattern in BY_OPERATOR:
        if re.search(pattern, path):
            return name
    return "copy" if kernel.name.startswith(("Memcpy", "Memset")) else "elementwise"


def categories(kernels: list[Kernel], vocabulary: int) -> list[str]:
    """The category of each kernel of one step, given in order of time.

    What follows the gradient norm is the optimizer's: the copies of its masters to the weights have no names of their
    own.
    """
    found = [category(kernel, vocabulary) for kernel in kernels]
    last_gemm = max((i for i, name in enumerate(found) if name == "gemm"), default=len(found))
    first = next((i for i in range(last_gemm, len(found)) if found[i] == "optimizer"), len(found))
    return found[:first] + [name if name == "communication" else "optimizer" for name in found[first:]]


def summary(kernels: list[Kernel], vocabulary: int, top: int = 60) -> dict:
    """Milliseconds by category; `busy`, the time with a kernel running; `span`, first start to last end; the largest.

    Categories may overlap in time, so that their sum can be above `busy`.
    """
    names = categories(kernels, vocabulary)
    milliseconds = dict.fromkeys(CATEGORIES, 0.0)
    groups: dict[tuple, list[float]] = defaultdict(list)
    for kernel, name in zip(kernels, names, strict=True):
        milliseconds[name] += kernel.duration / 1e3
        ends = kernel.operator[:1] + kernel.operator[-1:] if len(kernel.operator) > 1 else kernel.operator
        groups[name, kernel.name[:160], ends, kernel.shapes].append(kernel.duration / 1e3)
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:top]
    return {
        "milliseconds": milliseconds,
        "busy": _union(kernels) / 1e3,
        "span": (max(k.start + k.duration for k in kernels) - kernels[0].start) / 1e3 if kernels else 0.0,
        "kernels": len(kernels),
        "gaps": gaps(kernels),
        "largest": [
            dict(zip(("category", "kernel", "operator", "shapes"), key, strict=True))
            | {"ms": sum(times), "count": len(times)}
            for key, times in largest
        ],
    }


def gaps(kernels: list[Kernel], top: int = 20) -> list[dict]:
    """Where nothing runs, by the kernels on both sides; the largest sums of milliseconds first.

    Under a profiler the CPU launches more slowly than without one: what is here may be more than a plain step has.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    last = None  # of those before, the kernel that ends last
    for kernel in kernels:
        if last is not None and kernel.start > last.start + last.duration:
            groups[last.name[:80], kernel.name[:80]].append((kernel.start - last.start - last.duration) / 1e3)
        if last is None or kernel.start + kernel.duration > last.start + last.duration:
            last = kernel
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {"after": key[0], "before": key[1], "ms": sum(times), "longest": max(times), "count": len(times)}
        for key, times in largest
    ]


def _union(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one of the kernels (in order of start) runs."""
    ends = [0.0]
    for kernel in kernels:
        ends.append(max(ends[-1], kernel.start + kernel.duration))
    return sum(
        max(0.0, end - max(kernel.start, before)) for kernel, (before, end) in zip(kernels, pairwise(ends), strict=True)
    )
