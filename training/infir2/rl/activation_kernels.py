"""A Triton kernel that quantises activations as training does: infir2.fp8's ROW tiles, E4M3, bit for bit.

For engines on a GPU (infir2.rl.sglang_launch). `infir2.fp8.quantize(x, ROW, E4M3, scale_fmt)` is its reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128


def quantize_(x: Tensor, codes: Tensor, scale_inv: Tensor, scale_fmt: str) -> None:
    """Write the E4M3 codes of x and FP32 1 / scale of each 128 neighbours of a row, "pow2" or "fp32".

    x: BF16 or FP16 [M, K], contiguous, K a multiple of 128. codes: float8_e4m3fn [M, K], contiguous. scale_inv: FP32
    [M, K / 128], with any strides.
    """
    if x.shape[1] % GROUP or not x.is_contiguous() or not codes.is_contiguous():
        raise ValueError(
            f"x must be contiguous with columns a multiple of {GROUP}; found {tuple(x.shape)}, {x.stride()}"
        )
    if scale_fmt not in ("pow2", "fp32"):
        raise ValueError(f"scale format is {scale_fmt!r}; known: pow2, fp32")
    groups = x.shape[1] // GROUP
    if x.numel():
        _rows[(x.shape[0] * groups,)](
            x,
            codes,
            scale_inv,
            *scale_inv.stride(),
            torch.finfo(x.dtype).max,
            groups,
            GROUP,
            scale_fmt == "pow2",
            num_warps=1,
        )


@triton.jit
def _rows(
    x, codes, scale_inv, row_stride, column_stride, overflow, groups, SIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    at = program * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + at).to(tl.float32)
    amax = tl.max(tl.abs(values))
    scale = tl.div_rn(448.0, tl.where(amax == 0.0, 448.0, amax))
    scale = tl.where(scale == float("inf"), overflow, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    tl.store(codes + at, (values * scale).to(codes.dtype.element_ty))
    row, column = program // groups, program % groups
    tl.store(scale_inv + row * row_stride + column * column_stride, tl.div_rn(1.0, scale))
