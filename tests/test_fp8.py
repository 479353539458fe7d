"""The quantiser against an oracle of its own: numpy, all codes of a format enumerated, nothing of torch or infir2."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infir2 import cpu_quantisation, fp8
from infir2.fp8 import BLOCK, COLUMN, E4M3, E5M2, ROW, SCALE_FORMATS, TENSOR, dequantize, fake_quantize, quantize

TILES = (ROW, COLUMN, BLOCK, TENSOR)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
EXPONENT_BITS = {"e4m3": 4, "e5m2": 5}
DTYPE_MAX = {  # written out: this is the oracle's knowledge
    torch.bfloat16: np.float32((2 - 2.0**-7) * 2.0**127),
    torch.float32: np.float32((2 - 2.0**-23) * 2.0**127),
    torch.float16: np.float32(65504),
}
many = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def magnitudes(fmt: fp8.Format) -> np.ndarray:
    """Value of each non-negative finite code, ascending, float64: the index is the code. From the bit fields."""
    exponent_bits = EXPONENT_BITS[fmt.name]
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        values.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return np.array([v for v in values if v <= fmt.max])


def oracle_codes(x: np.ndarray, fmt: fp8.Format) -> np.ndarray:
    """Nearest code of each float32, the even one in a tie, saturating; uint8."""
    values = magnitudes(fmt)
    size = np.abs(x.astype(np.float64))  # sums and halves of the values below are exact in float64
    above = np.searchsorted(values, size).clip(1, len(values) - 1)
    below, middle = above - 1, (values[above - 1] + values[above]) / 2
    code = np.where(size < middle, below, np.where(size > middle, above, np.where(below % 2 == 0, below, above)))
    return (code + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def oracle_scale(amax: np.float32, fmt: fp8.Format, scale_fmt: str, on_overflow: np.float32) -> np.float32:
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = np.float32(fmt.max) / np.float32(amax)
    scale = on_overflow if np.isinf(scale) else scale
    if scale_fmt == "pow2":
        (bits,) = struct.unpack("<I", struct.pack("<f", scale))
        scale = np.float32(2.0 ** ((bits >> 23) - 127))
    return scale


def oracle(x: torch.Tensor, tile: fp8.Tile, fmt: fp8.Format, scale_fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [M, K] and scale_inv float32, one tile after the other."""
    values = x.float().numpy()
    rows, columns = tile or values.shape
    codes = np.empty(values.shape, np.uint8)
    scale_inv = np.empty((-(-values.shape[0] // rows), -(-values.shape[1] // columns)), np.float32)
    on_overflow = DTYPE_MAX[torch.float32 if tile is TENSOR else x.dtype]
    for i, j in np.ndindex(scale_inv.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = oracle_scale(np.abs(values[part]).max(), fmt, scale_fmt, on_overflow)
        codes[part] = oracle_codes(values[part] * scale, fmt)
        scale_inv[i, j] = np.float32(1) / scale
    return codes, scale_inv


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


def assert_matches_oracle(x: torch.Tensor, tile: fp8.Tile, fmt: fp8.Format, scale_fmt: str) -> None:
    codes, scale_inv = quantize(x, tile, fmt=fmt, scale_fmt=scale_fmt)
    expected_codes, expected_scale_inv = oracle(x, tile, fmt, scale_fmt)
    assert np.array_equal(scale_inv.numpy().view(np.uint32), expected_scale_inv.view(np.uint32))
    assert np.array_equal(codes.view(torch.uint8).numpy(), expected_codes)


@st.composite
def tensors(draw, dtypes=DTYPES, largest: int = 300) -> torch.Tensor:
    """Finite [M, K] of ragged sizes: plain, wide in exponent, of one magnitude a row, or any bits at all."""
    shape = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "wide", "rows", "bits", "sparse"]))
    x = rng.standard_normal(shape)
    if kind == "wide":
        x *= np.exp(rng.normal(0, 4, shape))
    elif kind == "rows":
        x *= 2.0 ** rng.integers(-149, 120, (shape[0], 1))
    elif kind == "bits":
        x = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    elif kind == "sparse":
        x *= rng.random(shape) < 0.02
    tensor = torch.from_numpy(x).to(draw(st.sampled_from(dtypes)))
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))


formats = st.sampled_from((E4M3, E5M2))
scale_formats = st.sampled_from(SCALE_FORMATS)
tiles = st.sampled_from(TILES)


@many
@given(tensors(), tiles, formats, scale_formats)
def test_codes_and_scales_are_the_oracles(x, tile, fmt, scale_fmt):
    """Pins the whole contract: division (not amax / 448), overflow, masking, rounding, 1 / s, ragged edges."""
    assert_matches_oracle(x, tile, fmt, scale_fmt)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), scale_formats)
@settings(deadline=None, max_examples=300)
def test_any_finite_floats_match_the_oracle(values, scale_fmt):
    """Pins single odd values, which whole random tensors hide: subnormals, neighbours of powers of two, the largest."""
    assert_matches_oracle(torch.tensor([values]), ROW, E4M3, scale_fmt)


@many
@given(tensors(), tiles, formats, scale_formats, st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_fake_quantize_is_dequantize_of_quantize(x, tile, fmt, scale_fmt, out_dtype):
    """Pins the CPU's short cut to the codes bit for bit, -0, subnormals and the ranges where it must step aside."""
    short = fake_quantize(x, tile, fmt=fmt, scale_fmt=scale_fmt, out_dtype=out_dtype)
    long = dequantize(*quantize(x, tile, fmt=fmt, scale_fmt=scale_fmt), tile, short.dtype)
    assert_same_bits(short, long)
    assert short.is_contiguous()


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Both ways to quantise on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_quantisation, "available", lambda: False)
    elif not cpu_quantisation.available():
        pytest.skip("no C compiler here")


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("amax", [1.0, 1.75, 1.7578125, 448.0, 3.3e-20, 5e30, 1e-38])
def test_every_bf16_value_below_an_amax(amax, fmt, way):
    """Pins every tie and every subnormal step: random numbers meet few of them."""
    every = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    limit = torch.tensor(amax, dtype=torch.bfloat16)
    below = every[every.abs() <= limit]
    x = torch.nn.functional.pad(below, (0, -len(below) % 127)).view(-1, 127)
    x = torch.cat([x, limit.expand(len(x), 1)], dim=1)
    assert_matches_oracle(x, ROW, fmt, "pow2")
    for tile, tiles in ((ROW, x), (COLUMN, x.t().contiguous()), (BLOCK, x.repeat(128, 1)[:256])):
        for dtype in (torch.bfloat16, torch.float32):
            wanted = dequantize(*quantize(tiles, tile, fmt=fmt), tile, dtype)
            assert_same_bits(fake_quantize(tiles, tile, fmt=fmt, out_dtype=dtype), wanted)


def test_compiled_quantisation_steps_aside(way):
    """NaN, Inf, and tiles beyond the ordinary range, among ordinary ones. Pins a NaN that becomes a number, and a
    result that is half of one way and half of the other."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for value in (torch.nan, torch.inf, 1e-38, 3e38, 0.0, -0.0):
        for tile in (ROW, COLUMN, BLOCK):
            tiles = x.clone()
            tiles[130] = value
            wanted = dequantize(*quantize(tiles, tile, check_finite=False), tile, torch.bfloat16)
            found = fake_quantize(tiles, tile)
            assert torch.equal(found.isnan(), wanted.isnan())
            assert_same_bits(found.nan_to_num(0), wanted.nan_to_num(0))


@pytest.mark.skipif(not cpu_quantisation.available(), reason="no C compiler here")
def test_quantisation_is_compiled_where_it_can_be(monkeypatch):
    """Pins a fast way that nobody takes."""
    taken = []
    monkeypatch.setattr(cpu_quantisation, "fake_quantize", lambda *words: taken.append(words))
    fake_quantize(torch.ones(128, 256, dtype=torch.bfloat16), COLUMN)
    assert len(taken) == 1


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_power_of_two_scale_is_the_largest_that_fits(fmt):
    """Pins exp2(ceil(log2())), which doubles some scales at exact powers of two: s is exact, from exponent bits."""
    exact = [m * 2.0**e for e in range(-110, 128) for m in (1.0, 1.75)]
    amax = np.array([f(np.float32(a)) for a in exact for f in (np.float32, _next_up, _next_down)], np.float32)
    _, scale_inv = quantize(torch.from_numpy(amax)[:, None], ROW, fmt=fmt)
    for a, s in zip(amax.astype(np.float64), 1 / scale_inv[:, 0].double().numpy(), strict=True):
        assert math.frexp(s)[0] == 0.5
        assert a * s <= fmt.max < a * 2 * s  # exact in float64


def _next_up(a: np.float32) -> np.float32:
    return np.nextafter(a, np.float32(np.inf))


def _next_down(a: np.float32) -> np.float32:
    return np.nextafter(a, np.float32(0))


@pytest.mark.parametrize("scale_fmt", SCALE_FORMATS)
def test_zero_tile_has_scale_one(scale_fmt):
    """Pins 1e-10 / 448 and 0 / 0 for all-zero tiles, as padding gives them: scale 1, codes 0, signs kept."""
    x = torch.zeros(256, 256)
    x[:128, :128], x[130, 140] = 3.0, -0.0
    codes, scale_inv = quantize(x, BLOCK, scale_fmt=scale_fmt)
    assert scale_inv.flatten()[1:].tolist() == [1.0] * 3
    assert codes.view(torch.uint8)[130, 140] == 0x80
    assert int(codes.view(torch.uint8)[:, 128:].sum()) == 0x80


@pytest.mark.parametrize(("dtype", "tile"), [(torch.bfloat16, ROW), (torch.float32, ROW), (torch.bfloat16, TENSOR)])
def test_scale_that_overflows_is_the_types_maximum(dtype, tile):
    """Pins 448 / amax = Inf for a tiny amax: TransformerEngine takes the input type's maximum, FP32's for TENSOR."""
    x = torch.full((1, 128), 2.0**-125).to(dtype)
    expected = DTYPE_MAX[torch.float32 if tile is TENSOR else dtype]
    codes, scale_inv = quantize(x, tile, scale_fmt="fp32")
    assert scale_inv.item() == np.float32(1) / expected
    assert codes.float()[0, 0] > 0
    assert quantize(x, tile)[1].item() == 2.0**-127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_fmt", SCALE_FORMATS)
def test_largest_values_do_not_become_nan(dtype, scale_fmt):
    """Pins a product just over 448, which torch's cast turns into NaN where TransformerEngine's saturates."""
    x = torch.full((2, 200), torch.finfo(dtype).max, dtype=dtype)
    for fmt in (E4M3, E5M2):
        codes, scale_inv = quantize(x, ROW, fmt=fmt, scale_fmt=scale_fmt)
        assert torch.isfinite(codes.float()).all()
        assert torch.isfinite(scale_inv).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_by_name_and_tile(tile, bad):
    """Pins fmax(NaN, x) = x: NaN must not vanish in amax, and the message must say where it is."""
    x = torch.ones(200, 300)
    x[130, 290] = bad
    where = {ROW: r"\(130, 2\)", COLUMN: r"\(1, 290\)", BLOCK: r"\(1, 2\)", TENSOR: r"\(0, 0\)"}[tile]
    with pytest.raises(ValueError, match=f"'layer.7.weight' has (nan|inf) in tile {where}"):
        quantize(x, tile, name="layer.7.weight")


@pytest.mark.parametrize("scale_fmt", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unchecked_nan_and_inf_spoil_their_tile_and_no_other(bad, dtype, scale_fmt):
    """Pins the training loop, which has no check: a saturated Inf or a lost NaN would train on."""
    x = torch.ones(256, 256, dtype=dtype)
    x[200, 10] = bad
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[128:, :128] = True
    result = fake_quantize(x, BLOCK, scale_fmt=scale_fmt)
    assert torch.equal(result.isnan(), expected)
    codes, scale_inv = quantize(x, BLOCK, scale_fmt=scale_fmt, check_finite=False)
    assert scale_inv.isnan().tolist() == [[False, False], [True, False]]
    assert torch.equal(dequantize(codes, scale_inv, BLOCK).isnan(), expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_every_code_decodes(fmt):
    """Pins the decoder's bit moves: all 256 codes, NaN codes as NaN, E5M2's Inf as Inf, both signs of zero."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    finite = np.array([v for sign in (1, -1) for v in sign * magnitudes(fmt)], np.float32)
    is_finite = (codes & 0x7F) < len(magnitudes(fmt))
    for some in (codes, codes[is_finite]):  # with and without NaN codes: two ways through the decoder
        values = dequantize(some.view(fmt.dtype)[None], torch.ones(1, -(-len(some) // 128)), ROW)[0]
        assert_same_bits(values[torch.isfinite(values)], torch.from_numpy(finite))
        assert int(values.isnan().sum()) == (len(some) == 256) * (2 if fmt is E4M3 else 6)
        assert int(values.isinf().sum()) == (len(some) == 256) * (0 if fmt is E4M3 else 2)


@many
@given(tensors(), formats, scale_formats)
def test_column_tiles_are_row_tiles_of_the_transpose(x, fmt, scale_fmt):
    """Pins a swap of dimensions: the backward's operands are column-wise, and a square test would not notice."""
    codes, scale_inv = quantize(x, COLUMN, fmt=fmt, scale_fmt=scale_fmt)
    codes_t, scale_inv_t = quantize(x.t(), ROW, fmt=fmt, scale_fmt=scale_fmt)
    assert_same_bits(codes, codes_t.t().contiguous())
    assert_same_bits(scale_inv, scale_inv_t.t().contiguous())
    block, block_t = quantize(x, BLOCK, fmt=fmt), quantize(x.t(), BLOCK, fmt=fmt)
    assert_same_bits(block[0], block_t[0].t().contiguous())


@many
@given(tensors(), tiles, formats)
def test_power_of_two_values_survive_a_second_quantisation(x, tile, fmt):
    """Pins FP8 -> BF16 -> FP8: no value moves. Where a tile's largest code is half the maximum, the scale halves."""
    codes, scale_inv = quantize(x, tile, fmt=fmt)
    values = dequantize(codes, scale_inv, tile)
    if not torch.isfinite(values).all():  # FP32's largest numbers round up to 2^128
        return
    again, scale_inv_again = quantize(values, tile, fmt=fmt)
    assert torch.equal(dequantize(again, scale_inv_again, tile), values)
    largest = tile_maxima(dequantize(codes, torch.ones_like(scale_inv), tile), tile)
    halves = (largest == fmt.max / 2) & (scale_inv > 2.0**-127)
    expected = torch.where(halves, scale_inv / 2, scale_inv)
    expected[largest == 0] = 1.0  # all zeros now, or then: an FP32 amax below 2^-137 rounds to zeros
    assert torch.equal(scale_inv_again, expected)


def tile_maxima(x: torch.Tensor, tile: fp8.Tile) -> torch.Tensor:
    rows, columns = tile or x.shape
    return torch.stack([torch.stack([p.abs().max() for p in s.split(columns, 1)]) for s in x.split(rows)])


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 30])
def test_results_do_not_depend_on_chunks(monkeypatch, chunk):
    """Pins the boundaries of the cache-sized steps: scratch memory of one must not leak into the next."""
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    cases = [(tile, scale_fmt) for tile in TILES for scale_fmt in SCALE_FORMATS]
    expected = [(*quantize(x, t, scale_fmt=s), fake_quantize(x, t, scale_fmt=s)) for t, s in cases]
    monkeypatch.setattr(fp8, "_CHUNK", chunk)
    for (tile, scale_fmt), parts in zip(cases, expected, strict=True):
        again = *quantize(x, tile, scale_fmt=scale_fmt), fake_quantize(x, tile, scale_fmt=scale_fmt)
        for a, b in zip(again, parts, strict=True):
            assert_same_bits(a, b)


def test_inputs_are_left_alone_and_need_no_layout():
    """Pins in-place arithmetic on a view of the caller's tensor, and strides that `view` cannot take."""
    x = torch.randn(300, 256, requires_grad=True)
    before = x.detach().clone()
    part = x.t()[:, ::2]
    result = fake_quantize(part, ROW)
    assert not result.requires_grad
    assert_same_bits(result, fake_quantize(part.detach().contiguous(), ROW))
    result.zero_()
    assert_same_bits(x.detach(), before)


def test_fp16_is_quantised_as_the_fp32_it_equals():
    """Pins FP16's narrow range: its scales and products must not be computed in FP16."""
    x = (torch.randn(64, 256) * 1e-3).half()
    for scale_fmt in SCALE_FORMATS:
        for a, b in zip(
            quantize(x, ROW, scale_fmt=scale_fmt), quantize(x.float(), ROW, scale_fmt=scale_fmt), strict=True
        ):
            assert_same_bits(a, b)
    assert fake_quantize(x, ROW).dtype == torch.float32


def test_wrong_arguments_are_refused():
    """Pins silent misuse: each message names what was found and what is valid."""
    x = torch.ones(128, 128)
    with pytest.raises(ValueError, match="unknown scale format 'ue8m0'; valid: pow2, fp32"):
        quantize(x, ROW, scale_fmt="ue8m0")
    with pytest.raises(ValueError, match="unknown tile"):
        quantize(x, (1, 64))
    with pytest.raises(ValueError, match="'w' has shape"):
        quantize(x[0], ROW, name="w")
    with pytest.raises(TypeError, match=r"'w' is torch\.int64"):
        quantize(x.long(), ROW, name="w")
    codes, scale_inv = quantize(x, BLOCK)
    with pytest.raises(ValueError, match=r"need torch\.float32"):
        dequantize(codes, scale_inv.half(), BLOCK)
    with pytest.raises(ValueError, match=r"need torch\.float32"):
        dequantize(codes, scale_inv, ROW)
    with pytest.raises(TypeError, match=r"codes are torch\.float32"):
        dequantize(x, scale_inv, BLOCK)


def test_is_power_of_two():
    """Pins a mantissa mask, which calls 2^-127, a subnormal FP32 number and a legal scale, no power of two."""
    assert fp8.is_power_of_two(torch.tensor([1.0, 2.0**-127, 2.0**120]))
    for wrong in (1.5, 0.0, -2.0, math.nan, math.inf):
        assert not fp8.is_power_of_two(torch.tensor([1.0, wrong]))


def test_refuse_non_finite_finds_the_place():
    """Pins a check that stops at the first chunk: the message must name tensor and index."""
    x = torch.zeros(1000, 500, dtype=torch.bfloat16)
    fp8.refuse_non_finite(x, "norm.weight")
    x[999, 3] = math.inf
    with pytest.raises(ValueError, match=r"'norm.weight' has inf at \(999, 3\)"):
        fp8.refuse_non_finite(x, "norm.weight")
