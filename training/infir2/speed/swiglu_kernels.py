"""Triton kernels: SwiGLU and the FP8 quantisation of its result, and its gradient and the quantisation of that, in one
pass each.

Apart, the activation is written in BF16 and read again: at 1.5B a tenth of a training step is spent on that. What they
write is TransformerEngine's layout: codes along rows with their scales transposed, and the transpose's codes.

For a gate g and a value u, with s = 1 / (1 + exp(-g)), in FP32, rounded to BF16 before it is quantised:

    y = g s u            dg = dy u s (1 + g (1 - s))            du = dy g s

infir2.fp8 with ROW tiles, of the result and of its transpose, is the reference for codes and scales.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True)
class Quantised:
    """A [T, F] tensor, quantised along its rows and along its columns."""

    codes: Tensor  # [T, F], FP8
    scale_inv: Tensor  # FP32 [F / 128, T]
    transposed: Tensor  # FP8 [F, T]
    transposed_scale_inv: Tensor  # FP32 [T / 128, F]

    @classmethod
    def empty(cls, tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> "Quantised":
        return cls(
            torch.empty(tokens, features, dtype=dtype, device=device),
            torch.empty(features // BLOCK, tokens, dtype=torch.float32, device=device),
            torch.empty(features, tokens, dtype=dtype, device=device),
            torch.empty(tokens // BLOCK, features, dtype=torch.float32, device=device),
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scale_inv, self.transposed, self.transposed_scale_inv


def swiglu(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> Quantised:
    """x: BF16 [T, 2F], contiguous, the gate's columns first; T and F multiples of 128. The result is [T, F]."""
    tokens, features = _checked(x)
    out = Quantised.empty(tokens, features, dtype, x.device)
    _swiglu[(tokens // BLOCK, features // BLOCK)](
        x, *out.parts, tokens, features, *_limits(dtype), power_of_two, BLOCK, num_warps=8
    )
    return out


def swiglu_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, power_of_two: bool) -> Quantised:
    """The gradient of x, [T, 2F], from that of the result; dy: BF16 [T, F], contiguous."""
    tokens, features = _checked(x)
    if dy.shape != (tokens, features) or dy.dtype != torch.bfloat16 or not dy.is_contiguous():
        raise ValueError(f"dy must be contiguous BF16 [{tokens}, {features}]; found {dy.dtype} {tuple(dy.shape)}")
    out = Quantised.empty(tokens, 2 * features, dtype, x.device)
    _swiglu_gradient[(tokens // BLOCK, features // BLOCK)](
        dy, x, *out.parts, tokens, features, *_limits(dtype), power_of_two, BLOCK, num_warps=16
    )
    return out


def _checked(x: Tensor) -> tuple[int, int]:
    tokens, columns = x.shape
    if tokens % BLOCK or columns % (2 * BLOCK) or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous BF16 with rows a multiple of {BLOCK} and columns one of {2 * BLOCK}; found "
            f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}"
        )
    return tokens, columns // 2


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """The largest code, and the scale of a tile so small that its own would overflow."""
    return torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max


@triton.jit
def _swiglu(
    x,
    codes,
    scale_inv,
    transposed,
    transposed_scale_inv,
    tokens,
    features,
    LARGEST: tl.constexpr,
    OVERFLOW: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = row * SIZE + tl.arange(0, SIZE)
    f = column * SIZE + tl.arange(0, SIZE)
    at = t[:, None] * (2 * features) + f[None, :]
    gate = tl.load(x + at).to(tl.float32)
    value = tl.load(x + at + features).to(tl.float32)
    y = gate * _sigmoid(gate) * value
    _quantise(
        y, row, column, codes, scale_inv, transposed, transposed_scale_inv, tokens, features, LARGEST, OVERFLOW,
        POWER_OF_TWO, SIZE,
    )  # fmt: skip


@triton.jit
def _swiglu_gradient(
    dy,
    x,
    codes,
    scale_inv,
    transposed,
    transposed_scale_inv,
    tokens,
    features,
    LARGEST: tl.constexpr,
    OVERFLOW: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = row * SIZE + tl.arange(0, SIZE)
    f = column * SIZE + tl.arange(0, SIZE)
    at = t[:, None] * (2 * features) + f[None, :]
    gate = tl.load(x + at).to(tl.float32)
    value = tl.load(x + at + features).to(tl.float32)
    gradient = tl.load(dy + t[:, None] * features + f[None, :]).to(tl.float32)
    sigmoid = _sigmoid(gate)
    _quantise(
        gradient * gate * sigmoid, row, column + features // SIZE, codes, scale_inv, transposed, transposed_scale_inv,
        tokens, 2 * features, LARGEST, OVERFLOW, POWER_OF_TWO, SIZE,
    )  # fmt: skip
    _quantise(
        gradient * value * sigmoid * (1 + gate * (1 - sigmoid)), row, column, codes, scale_inv, transposed,
        transposed_scale_inv, tokens, 2 * features, LARGEST, OVERFLOW, POWER_OF_TWO, SIZE,
    )  # fmt: skip


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _quantise(
    y,
    row,
    column,
    codes,
    scale_inv,
    transposed,
    transposed_scale_inv,
    tokens,
    columns,
    LARGEST: tl.constexpr,
    OVERFLOW: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write one 128 x 128 tile of a [tokens, columns] tensor, whose values are still in FP32."""
    y = y.to(tl.bfloat16).to(tl.float32)
    magnitude = tl.abs(y)
    t = row * SIZE + tl.arange(0, SIZE)
    f = column * SIZE + tl.arange(0, SIZE)
    scale = _scale(tl.max(magnitude, 1), LARGEST, OVERFLOW, POWER_OF_TWO)
    tl.store(codes + t[:, None] * columns + f[None, :], (y * scale[:, None]).to(codes.dtype.element_ty))
    tl.store(scale_inv + column * tokens + t, tl.div_rn(1.0, scale))
    scale = _scale(tl.max(magnitude, 0), LARGEST, OVERFLOW, POWER_OF_TWO)
    turned = tl.trans((y * scale[None, :]).to(transposed.dtype.element_ty))
    tl.store(transposed + f[:, None] * tokens + t[None, :], turned)
    tl.store(transposed_scale_inv + row * columns + f, tl.div_rn(1.0, scale))


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, OVERFLOW: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """infir2.fp8's rule."""
    scale = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(amax == 0.0, LARGEST, amax))
    scale = tl.where(scale == float("inf"), OVERFLOW, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return scale
