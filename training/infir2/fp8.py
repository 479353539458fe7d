"""The recipe's FP8 numbers in plain torch: one scale rule, bit for bit TransformerEngine 2.20's, on CPU and GPU.

Formats (both have a sign bit and round to nearest, ties to even)

    name  exponent, mantissa  largest  smallest normal  smallest step  Inf  NaN codes
    e4m3  4, 3 bits           448      2^-6             2^-9           no   0x7f 0xff
    e5m2  5, 2 bits           57344    2^-14            2^-16          yes  0x7d..0x7f 0xfd..0xff

Layouts. A tensor is [M, K]; each tile shares one FP32 scale, and scale_inv is [ceil(M / rows), ceil(K / columns)].
Edges need not be multiples of 128: the last tile is smaller, and missing elements count as zeros.

    ROW     1 x 128    activations and gradients, along the last dimension (forward, dgrad)
    COLUMN  128 x 1    the same tensors along the first dimension (wgrad, whose sum runs over tokens)
    BLOCK   128 x 128  weights; the transpose of the codes is the codes of the transpose
    TENSOR  the whole  "fp8-current": one scale, [1, 1]

TransformerEngine stores COLUMN and transposed BLOCK codes as [K, M], and pads its scales to a multiple of four in
the last dimension, ROW ones transposed. Here nothing is transposed and nothing is padded.

Formulas, in FP32, for each tile:

    amax      = max |x|
    s         = max_of_format / amax          one IEEE division, rounded to nearest
    s         = max_of_dtype(x)               if that division overflows (FP32's maximum for TENSOR)
    s         = s with its mantissa cleared   if scale_fmt is "pow2"
    s         = 1                             if amax is 0
    code      = to_fp8(x * s)                 the product in FP32, then one rounding
    scale_inv = 1 / s                         what is stored; x ~ code * scale_inv

Source, TransformerEngine release 2.20: the scale is `compute_scale_from_amax` and `compute_scale_from_types` in
common/recipe/recipe_common.cuh; ROW and COLUMN are common/transpose/quantize_transpose_vector_blockwise.cu; BLOCK is
quantize_transpose_square_blockwise.cu beside it; TENSOR is common/recipe/current_scaling.cu with the plain cast of
common/util/vectorized_pointwise.h. Its recipes use an amax epsilon of 0, as here. Blockwise scaling defaults to
power-of-two scales there (NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 switches them off), and so does this module. Current
scaling defaults to FP32 scales there (NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES): pass scale_fmt="fp32" with TENSOR.
tests/test_fp8_golden.py compares codes and scales with digests that TransformerEngine itself made on a GPU.

TransformerEngine's cast saturates; torch's does not. No clamp is needed: |x * s| exceeds the format's maximum by at
most one FP32 rounding, and that rounds back to the maximum.

One difference is meant. TransformerEngine gives a tile with Inf the scale 1 and saturates, and ignores NaN when it
looks for amax. Here such a tile is an error; where the check is off, scale_inv is NaN, so all of the tile is NaN.

Other implementations, and what differs:

    slime's Triton cast     max(amax, 1e-10) / 448, then x * (1 / that): 55 % of FP32 scales and 0.03 % of codes differ
    DeepGEMM's test casts   the same with a floor of 1e-4; power-of-two scales agree above it (older releases took
                            exp2(ceil(log2(amax / 448))), which can double the scale at an exact power of two)
    torchao's training      448 / max(amax, 1e-12): agrees above the floor; has FP32 scales only
    transformers 5.12       agrees with FP32 scales; with "ue8m0" it rounds the stored scale after quantising
    FP16 scales, anywhere   underflow to 0 below an amax of 1.3e-5
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from infir2 import cpu_quantisation


@dataclass(frozen=True)
class Format:
    """An FP8 format: its name, torch's dtype of its codes, and its largest finite value."""

    name: str
    dtype: torch.dtype
    max: float


Tile = tuple[int, int] | None

E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0)
SCALE_FORMATS = ("pow2", "fp32")
ROW: Tile = (1, 128)
COLUMN: Tile = (128, 1)
BLOCK: Tile = (128, 128)
TENSOR: Tile = None

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Elements per step on the CPU: the few arrays of one step stay in a core's second-level cache.
_CHUNK = 1 << 17


def quantize(
    x: Tensor,
    tile: Tile,
    *,
    fmt: Format = E4M3,
    scale_fmt: str = "pow2",
    name: str | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Codes and inverse scales of a tensor, as TransformerEngine computes them.

    x is [M, K] in float32, bfloat16 or float16, on any device. Returns codes [M, K] of fmt.dtype and scale_inv
    float32 [ceil(M / rows), ceil(K / columns)] ([1, 1] for TENSOR). Both are contiguous; no gradient flows.

    NaN or Inf raises ValueError with the tensor's name and the first bad tile. check_finite=False skips that check
    (and the wait for the GPU it needs) and marks such a tile with a scale_inv of NaN.
    """
    tiles = _checked_tiles(x, tile, scale_fmt, name)
    amax = _amax(tiles)
    if check_finite:
        _refuse_non_finite_tile(amax, tile, name)
    scale = _scale(amax, tile, fmt, scale_fmt)
    product_dtype = _work_dtype(x.dtype, scale_fmt)
    factor = scale.to(product_dtype)
    codes = torch.empty(tiles.shape, dtype=fmt.dtype, device=x.device)
    product = _scratch(tiles, product_dtype)
    for rows in _chunks(tiles):
        codes[rows] = torch.mul(tiles[rows], factor[rows], out=product[: len(factor[rows])])
    return _untiled(codes, x.shape), (torch.ones_like(scale) / scale).view(scale.shape[0], scale.shape[2])


def dequantize(codes: Tensor, scale_inv: Tensor, tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale_inv, the product in FP32, then one rounding to dtype.

    codes is [M, K] of an FP8 dtype; scale_inv is float32 of the shape that `scale_shape` gives. Power-of-two scales
    make the result exact in float32, and in bfloat16 too while scale_inv is at least 2^-124.
    Refused: another dtype of codes or scales (FP16 scales underflow), a scale_inv of another shape.
    """
    if codes.dtype not in (E4M3.dtype, E5M2.dtype):
        raise TypeError(f"codes are {codes.dtype}; dequantize takes {E4M3.dtype} or {E5M2.dtype}")
    expected = scale_shape(codes.shape, tile)
    if scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv is {scale_inv.dtype} {tuple(scale_inv.shape)}; codes {tuple(codes.shape)} in tiles of "
            f"{tile or 'the whole tensor'} need torch.float32 {expected}"
        )
    tiles = _tiled(codes.detach().view(torch.int8), tile)
    factor = scale_inv.detach().view(expected[0], 1, expected[1], 1)
    values = torch.empty(tiles.shape, dtype=dtype, device=codes.device)
    for rows in _chunks(tiles):
        values[rows] = _decode(tiles[rows].view(codes.dtype)).mul_(factor[rows])
    return _untiled(values, codes.shape)


def fake_quantize(
    x: Tensor,
    tile: Tile,
    *,
    fmt: Format = E4M3,
    scale_fmt: str = "pow2",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dequantize(quantize(x)), bit for bit, without making codes where that is faster (the CPU).

    x is [M, K] in float32, bfloat16 or float16; the result is a new contiguous [M, K] without gradient. Its dtype is
    out_dtype, or by default one that holds it exactly: that of a bfloat16 x with power-of-two scales, else float32.
    NaN or Inf in x makes all of its tile NaN: this is the training loop, where a check would cost a pass.
    """
    tiles = _checked_tiles(x, tile, scale_fmt, None)
    out_dtype = out_dtype or _work_dtype(x.dtype, scale_fmt)
    if _is_compiled(x, tile, scale_fmt, out_dtype):
        found = cpu_quantisation.fake_quantize(x.detach().contiguous(), tile, fmt, out_dtype)
        if found is not None:
            return found
    if not x.is_cuda:
        amax = _amax(tiles)
        if _in_ordinary_range(amax):
            return _untiled(_round_tiles(tiles, _scale(amax, tile, fmt, scale_fmt), fmt, scale_fmt, out_dtype), x.shape)
    codes, scale_inv = quantize(x, tile, fmt=fmt, scale_fmt=scale_fmt, check_finite=False)
    return dequantize(codes, scale_inv, tile, out_dtype)


def _is_compiled(x: Tensor, tile: Tile, scale_fmt: str, out_dtype: torch.dtype) -> bool:
    """Whether infir2.cpu_quantisation computes this."""
    whole = tile is not TENSOR and x.shape[0] % tile[0] == x.shape[1] % tile[1] == 0
    plain = x.dtype == torch.bfloat16 and out_dtype in (torch.bfloat16, torch.float32) and scale_fmt == "pow2"
    return whole and plain and not x.is_cuda and cpu_quantisation.available()


def scale_shape(shape: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """Shape of scale_inv for a tensor of this shape: one scale for each tile, the last ones possibly smaller."""
    rows, columns = tile or shape
    return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)


def is_power_of_two(scale_inv: Tensor) -> bool:
    """Whether every scale is a positive power of two, as E8M0 and scale_fmt="pow2" hold. float32, any shape."""
    # frexp, not a mantissa mask: 2^-127, the smallest scale of the pow2 format, is subnormal in FP32.
    return bool((torch.frexp(scale_inv).mantissa == 0.5).all())


def refuse_non_finite(x: Tensor, name: str) -> None:
    """Raise ValueError with the tensor's name and the first bad index if x, [...] of a float dtype, has NaN or Inf."""
    flat = x.detach().reshape(-1)
    step = max(1, flat.numel()) if x.is_cuda else _CHUNK  # each chunk's answer makes the CPU wait for the GPU
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        if not torch.isfinite(_amax(chunk.view(1, 1, 1, -1))):
            first = start + int((~torch.isfinite(chunk)).nonzero()[0])
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), x.shape))
            raise ValueError(f"tensor {name!r} has {float(flat[first])} at {index}; every weight must be finite")


def _refuse_non_finite_tile(amax: Tensor, tile: Tile, name: str | None) -> None:
    bad = ~torch.isfinite(amax[:, 0, :, 0])
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        size = "the whole tensor" if tile is TENSOR else f"{tile[0]}x{tile[1]}"
        raise ValueError(
            f"tensor {name or '(unnamed)'!r} has {float(amax[row, 0, column, 0])} in tile ({row}, {column}) of size "
            f"{size}, the first of {int(bad.sum())} bad tiles; NaN and Inf cannot be scaled"
        )


def _checked_tiles(x: Tensor, tile: Tile, scale_fmt: str, name: str | None) -> Tensor:
    """Refuse what cannot be quantised, then cut into tiles. FP16 becomes FP32, exactly: its scales never overflow."""
    what = f"tensor {name!r}" if name else "tensor"
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"{what} is {x.dtype}; FP8 quantisation takes {', '.join(map(str, _INPUT_DTYPES))}")
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(x.shape)}; FP8 quantisation takes a non-empty [M, K]")
    if tile not in (ROW, COLUMN, BLOCK, TENSOR):
        raise ValueError(f"unknown tile {tile}; valid: ROW {ROW}, COLUMN {COLUMN}, BLOCK {BLOCK}, TENSOR {TENSOR}")
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"unknown scale format {scale_fmt!r}; valid: {', '.join(SCALE_FORMATS)}")
    return _tiled(x.detach().float() if x.dtype == torch.float16 else x.detach(), tile)


def _work_dtype(dtype: torch.dtype, scale_fmt: str) -> torch.dtype:
    """Where arithmetic loses nothing: a power of two times a BF16 number is a BF16 number, all else needs FP32."""
    return torch.bfloat16 if dtype == torch.bfloat16 and scale_fmt == "pow2" else torch.float32


def _tiled(x: Tensor, tile: Tile) -> Tensor:
    """View [M, K] as [M / rows, rows, K / columns, columns], after padding ragged edges with zeros."""
    rows, columns = tile or x.shape
    bottom, right = -x.shape[0] % rows, -x.shape[1] % columns
    x = pad(x, (0, right, 0, bottom)) if bottom or right else x.contiguous()
    return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_tiled`: back to a contiguous [M, K], padding cut off."""
    rows, columns = tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3]
    return tiles.view(rows, columns)[: shape[0], : shape[1]].contiguous()


def _chunks(tiles: Tensor) -> Iterator[slice]:
    """Cut the first dimension so that a chunk fits a core's cache; a GPU takes all at once."""
    step = _step(tiles)
    for start in range(0, len(tiles), step):
        yield slice(start, start + step)


def _step(tiles: Tensor) -> int:
    return len(tiles) if tiles.is_cuda else max(1, _CHUNK // tiles[0].numel())


def _scratch(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one chunk, reused by all: new memory costs page faults, more than the arithmetic done in it."""
    return torch.empty((min(_step(tiles), len(tiles)), *tiles.shape[1:]), dtype=dtype, device=tiles.device)


def _amax(tiles: Tensor) -> Tensor:
    """Largest magnitude of each tile, [R, 1, C, 1] in the input's dtype; NaN (or else Inf) wins over any number."""
    # Without its sign, an IEEE number sorts as the integer of its bits. Integer maxima are several times faster than
    # BF16 ones on a CPU, and NaN sorts above Inf above all else.
    bits = tiles.view(_BITS[tiles.dtype])
    magnitude_mask = torch.iinfo(bits.dtype).max
    amax = torch.empty(tiles.shape[0], 1, tiles.shape[2], 1, dtype=bits.dtype, device=tiles.device)
    scratch = _scratch(tiles, bits.dtype)
    for rows in _chunks(tiles):
        magnitude = torch.bitwise_and(bits[rows], magnitude_mask, out=scratch[: len(bits[rows])])
        torch.amax(magnitude, (1, 3), keepdim=True, out=amax[rows])
    return amax.view(tiles.dtype)


def _scale(amax: Tensor, tile: Tile, fmt: Format, scale_fmt: str) -> Tensor:
    """s of the module docstring for amax, which has x's dtype: float32, same shape; NaN where amax is not finite."""
    on_overflow = torch.finfo(torch.float32 if tile is TENSOR else amax.dtype).max
    amax = amax.float()
    divisor = torch.where(amax == 0, fmt.max, amax)  # a zero tile gets scale 1
    # `fmt.max / divisor` would multiply by a rounded reciprocal: torch divides exactly only by a tensor.
    scale = torch.full_like(divisor, fmt.max) / divisor
    scale.nan_to_num_(nan=math.nan, posinf=on_overflow)
    if scale_fmt == "pow2":
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return scale + (amax - amax)  # adds 0, or NaN where amax is Inf or NaN


def _decode(codes: Tensor) -> Tensor:
    """FP8 codes to float32, exactly. A new tensor of the same shape."""
    # torch 2.11 converts from FP8 one element at a time on a CPU. An E4M3 code moved into FP16's bit fields is its
    # value times 2^-8, subnormals included; an E5M2 code is the upper half of an FP16 number.
    bits = codes.view(torch.int8)
    if codes.is_cuda or (codes.dtype == E4M3.dtype and int((bits & 0x7F).amax()) == 0x7F):  # E4M3's NaN is not FP16's
        return codes.float()
    if codes.dtype == E5M2.dtype:
        return (bits.to(torch.int16) << 8).view(torch.float16).float()
    return (bits.to(torch.int16).bitwise_left_shift_(7) & -0x4080).view(torch.float16).float().mul_(256.0)


def _bits_of_power(exponent: int, dtype: torch.dtype) -> int:
    """2^exponent in bfloat16 or float32, as the integer of its bits; 2^128 is Inf, all exponent bits set."""
    return (exponent + 127) << {torch.bfloat16: 7, torch.float32: 23}[dtype]


def _in_ordinary_range(amax: Tensor) -> bool:
    """Whether every tile is zero or has an amax where no step of `_round_tiles` can overflow or lose bits."""
    bits = amax.view(_BITS[amax.dtype])
    low, high = _bits_of_power(-100, amax.dtype), _bits_of_power(100, amax.dtype)
    return int(bits.amax()) <= high and int(torch.where(bits == 0, high, bits).amin()) >= low


def _round_tiles(tiles: Tensor, scale: Tensor, fmt: Format, scale_fmt: str, out_dtype: torch.dtype) -> Tensor:
    """What decoding the codes would give, from arithmetic on the CPU's own numbers.

    FP8 keeps the mantissa bits of a number, and below the smallest normal one fixed step. A power-of-two scale only
    shifts exponents, so there tiles are rounded where they stand, with the smallest normal moved to each tile's scale.
    FP32 scales need the product x * s, its rounding, and the product with 1 / s.
    """
    work_dtype = _work_dtype(tiles.dtype, scale_fmt)
    scale_inv = torch.ones_like(scale) / scale
    smallest_normal = torch.finfo(fmt.dtype).smallest_normal
    smallest = scale_inv * smallest_normal if scale_fmt == "pow2" else torch.full_like(scale, smallest_normal)
    smallest = smallest.to(work_dtype)
    out = torch.empty(tiles.shape, dtype=out_dtype)
    product, result, power = (_scratch(tiles, dtype) for dtype in (work_dtype, work_dtype, _BITS[work_dtype]))
    for rows in _chunks(tiles):
        x, n = tiles[rows], len(out[rows])
        if scale_fmt == "fp32":
            x = product[:n].copy_(x).mul_(scale[rows])
        rounded = out[rows] if out_dtype == work_dtype else result[:n]
        _round_to_format(x, smallest[rows], fmt, power[:n], out=rounded)
        if scale_fmt == "fp32":
            rounded.mul_(scale_inv[rows])
        if out_dtype != work_dtype:
            out[rows] = rounded
    return out


def _round_to_format(x: Tensor, smallest_normal: Tensor, fmt: Format, power: Tensor, *, out: Tensor) -> None:
    """Round x (float32 or bfloat16) to fmt's mantissa bits, or below smallest_normal to the step just above it.

    Adding 1.5 * 2^n, n chosen so that the sum's last bit is the step wanted, makes the adder round to nearest even;
    subtracting it again is exact. smallest_normal holds powers of two and broadcasts over x; power is scratch memory,
    integers of x's shape and width; out must not be x.
    """
    bits = x.view(power.dtype)
    torch.bitwise_and(bits, _bits_of_power(128, x.dtype), out=power)  # the bits of 2^floor(log2 |x|)
    torch.maximum(power, smallest_normal.view(power.dtype), out=power)
    multiple = 1.5 * torch.finfo(fmt.dtype).eps / torch.finfo(x.dtype).eps
    torch.add(x, power.view(x.dtype), alpha=multiple, out=out)
    out.sub_(power.view(x.dtype), alpha=multiple)
    # A negative number that rounds to zero came out as +0.
    torch.bitwise_and(bits, torch.iinfo(power.dtype).min, out=power)
    out.view(power.dtype).bitwise_or_(power)
