"""Triton kernels of linear_cross_entropy: one program a row of logits, which it reads twice and writes once.

A row of 152 thousand BF16 logits is 0.3 MB and the rows in flight fit Hopper's L2 cache, so the second read is cheap
where statistics and gradient are computed by one kernel. The operations are those of
`infir2.speed.linear_cross_entropy._TorchRows`, which is their reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16


def statistics(logits: Tensor, target: Tensor, token_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [t, V]: maximum, sum of exp(logit - maximum), the target's logit or 0; FP32 [t] each.

    target: int64 [t]. With `token_weight` (FP32 [t]) the logits are replaced by their gradient.
    """
    maximum, total, of_target = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    _launch(logits, target, token_weight, None, (maximum, total, of_target))
    return maximum, total, of_target


def gradient_(logits: Tensor, target: Tensor, token_weight: Tensor, log_sum: Tensor) -> None:
    """Replace the logits by token_weight x (exp(logit - log_sum) - [column is the target])."""
    _launch(logits, target, token_weight, log_sum, (None, None, None))


def _launch(logits: Tensor, target: Tensor, token_weight: Tensor | None, log_sum: Tensor | None, outputs) -> None:
    if logits.stride(1) != 1:
        raise ValueError(f"rows of logits must be contiguous; the strides are {logits.stride()}")
    _rows[(len(logits),)](
        logits,
        logits.stride(0),
        target,
        token_weight,
        log_sum,
        *outputs,
        COLUMNS=logits.shape[1],
        STATISTICS=log_sum is None,
        GRADIENT=token_weight is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _rows(
    logits,
    stride,
    target,
    token_weight,
    log_sum,
    maximum_out,
    total_out,
    of_target_out,
    COLUMNS: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target_column = tl.load(target + row)
    if STATISTICS:
        maximum = -float("inf")
        total = 0.0
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(logits + column, mask=column < COLUMNS, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(maximum, tl.max(value, axis=0))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(value - larger), axis=0)
            maximum = larger
        here = (target_column >= 0) & (target_column < COLUMNS)
        of_target = tl.load(logits + target_column, mask=here, other=0.0).to(tl.float32)
        tl.store(maximum_out + row, maximum)
        tl.store(total_out + row, total)
        tl.store(of_target_out + row, of_target)
        normaliser = maximum + tl.log(total)
    else:
        normaliser = tl.load(log_sum + row)
    if GRADIENT:
        weight = tl.load(token_weight + row)
        tl.debug_barrier()  # the target's logit is read before another thread replaces it
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(logits + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            gradient = weight * (tl.exp(value - normaliser) - tl.where(column == target_column, 1.0, 0.0))
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < COLUMNS)
