"""The qkv layer's output split into q, k and v, with q and k rotated, in one pass; and its gradient.

By --fused-qkv-rope (infir2.backend) this stands in for TransformerEngine's kernel of the same task, which takes as long
as the five steps it replaces. v is copied too: a view would keep all of the layer's output until the backward pass.

Angles a, in FP32 as the numbers are until they are rounded to BF16 (rotation of halves, Su et al. 2021):

    first half:  x1 cos a - x2 sin a        second half:  x2 cos a + x1 sin a        backward: with -a
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16  # tokens of a program


def in_place_of(original: Callable) -> Callable:
    """An `apply_fused_qkv_rotary_pos_emb` that runs the kernel below where it can."""

    def apply(qkv, q_angles, k_angles, sizes):
        dimension = sizes[-1]
        same = q_angles is k_angles or q_angles.data_ptr() == k_angles.data_ptr()
        whole = q_angles.shape[1:] == (1, 1, dimension) and dimension & (dimension - 1) == 0
        if not (same and whole and sizes[1] == sizes[2] and qkv.is_contiguous() and qkv.dtype == torch.bfloat16):
            return original(qkv, q_angles, k_angles, sizes)
        return _SplitAndRotate.apply(qkv, q_angles.float().contiguous(), sizes[0] // dimension)

    return apply


class _SplitAndRotate(torch.autograd.Function):
    """BF16 [s, b, g, (n + 2) d], angles FP32 [>= s, 1, 1, d] whose halves are the same: to q [s, b, g n, d] and k, v
    [s, b, g, d], for n heads of q a group."""

    @staticmethod
    def forward(ctx, qkv, angles, heads):
        ctx.save_for_backward(angles)
        ctx.heads = heads
        length, samples, groups, columns = qkv.shape
        dimension = columns // (heads + 2)
        q, k, v = (qkv.new_empty(length, samples, count, dimension) for count in (groups * heads, groups, groups))
        _launch(qkv, q, k, v, angles, backward=False)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        (angles,) = ctx.saved_tensors
        length, samples, groups, dimension = dk.shape
        gradient = dk.new_empty(length, samples, groups, (ctx.heads + 2) * dimension)
        _launch(gradient, dq.contiguous(), dk.contiguous(), dv.contiguous(), angles, backward=True)
        return gradient, None, None


def _launch(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, *, backward: bool) -> None:
    length, samples, groups, dimension = k.shape
    grid = triton.cdiv(length * samples, ROWS), groups
    heads = q.shape[2] // groups
    _split_and_rotate[grid](
        mixed, q, k, v, angles, length * samples, samples, groups, heads, dimension // 2, ROWS, backward
    )


@triton.jit
def _split_and_rotate(
    mixed,
    q,
    k,
    v,
    angles,
    tokens,
    samples,
    groups,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """ROWS tokens of one group. Forward from `mixed` to q, k, v; backward from their gradients to that of `mixed`."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = (token < tokens)[:, None]
    half = tl.arange(0, HALF)[None, :]
    angle = tl.load(angles + (token // samples)[:, None] * (2 * HALF) + half, mask=inside, other=0.0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    if BACKWARD:
        sine = -sine
    group = token * groups + tl.program_id(1)
    for head in tl.static_range(HEADS + 2):
        apart = group
        if head < HEADS:
            part = q
            apart = group * HEADS + head
        elif head == HEADS:
            part = k
        else:
            part = v
        part += apart[:, None] * (2 * HALF) + half
        together = mixed + (group * (HEADS + 2) + head)[:, None] * (2 * HALF) + half
        source, target = together, part
        if BACKWARD:
            source, target = part, together
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if head <= HEADS:
            rotated = first * cosine - second * sine
            second = second * cosine + first * sine
            first = rotated
        tl.store(target, first.to(mixed.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(mixed.dtype.element_ty), mask=inside)
