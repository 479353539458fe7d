"""BF16 products on a CPU that has no instructions for them.

Such a CPU multiplies BF16 matrices 2 to 100 times slower than FP32 ones: torch widens them one element at a time. So
there, the operands of every BF16 product are raised to FP32, multiplied, and the result is rounded to BF16 once. A
product of two BF16 numbers is exact in FP32 and sums were kept in FP32 before: what changes is the order of addition.
The same for attention, whose softmax then sees unrounded scores.

`install` replaces torch's own kernels for BF16 on the CPU, so training, generation and evaluation gain alike, their
backward passes too. FP32 and every other type go to torch's kernels as before.

`install_for_generation` adds what transformers does slowly on every CPU: attention of one new token.
"""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CHOICE = "INFIR2_CPU_MATMUL"
CPU_INFO = Path("/proc/cpuinfo")
_LIBRARY = torch.library.Library("aten", "IMPL")  # what is registered there lives as long as it does
_BF16_ISAS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")  # as oneDNN names them


def has_bf16_products() -> bool:
    """Whether this processor, as oneDNN may use it (ONEDNN_MAX_CPU_ISA), multiplies BF16 matrices by itself."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if allowed not in ("ALL", "DEFAULT") and not allowed.startswith(_BF16_ISAS):
        return False
    try:
        flags = CPU_INFO.read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # the last is Arm's


def chosen() -> str:
    """ "fp32" or "bf16": what INFIR2_CPU_MATMUL says, else what the processor is faster with. ValueError for another
    word."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "fp32", "bf16"):
        raise ValueError(f"{CHOICE} is '{choice}'; known: fp32, bf16. Unset it to let the processor decide")
    return choice or ("bf16" if has_bf16_products() else "fp32")


def describe() -> str:
    """One line for the first lines of a run."""
    why = f"{CHOICE} says so" if os.environ.get(CHOICE) else "the processor decides"
    how = {"fp32": "in FP32 and rounded to BF16", "bf16": "by the processor's BF16 instructions"}[chosen()]
    return f"CPU: BF16 products are computed {how} ({why})"


@functools.cache
def install() -> None:
    """Replace the kernels, once, where `chosen` says "fp32"."""
    if chosen() == "bf16":
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that kernels are replaced
        for name in _PRODUCTS:
            raised = _raised(torch.library.get_kernel(f"aten::{name}", "CPU"), name == _ATTENTION)
            _LIBRARY.impl(name, raised, "CPU", allow_override=True)


def install_for_generation() -> None:
    """`install`, and attention by groups for transformers' models."""
    install()
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", _attend)


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' interface: query [B, H, T, D], key and value [B, KV, S, D] -> [B, T, H, D] and None.

    A single new token is one position for every head of a group, under one mask. So the heads of a group are handed
    over as positions: keys and values are read once a group instead of copied once a head, in a quarter of the time.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (batch, heads, tokens, width), groups = query.shape, key.shape[1]
    if query.is_cuda or tokens > 1 or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, groups, heads // groups, width)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch, groups, heads // groups, -1)
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    found = F.scaled_dot_product_attention(grouped, key, value, attention_mask, dropout, scale=scale)
    return found.reshape(batch, 1, heads, width), None


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", _ATTENTION, f"{_ATTENTION}_backward")


def _raised(kernel, first_alone: bool) -> Callable:
    """The kernel with every BF16 tensor raised to FP32, and its results, or the first alone, rounded to BF16.

    The second result of attention is the logarithm of each row's sum, in FP32 whatever the inputs are.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def run(*args, **kwargs):
        if not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in args):
            return kernel.call_boxed(keys, *args, **kwargs)
        raised = {name: _raise(value) for name, value in kwargs.items()}
        found = kernel.call_boxed(keys, *map(_raise, args), **raised)
        if not isinstance(found, tuple):
            return found.bfloat16()
        return tuple(x if first_alone and i else x.bfloat16() for i, x in enumerate(found))

    return run


def _raise(x):
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
