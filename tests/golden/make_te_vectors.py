"""Golden vectors of TransformerEngine's FP8 quantisers, for tests/test_fp8_golden.py. Needs a Hopper GPU, one minute.

    PYTHONPATH=training python tests/golden/make_te_vectors.py

Quantises seeded inputs with TransformerEngine, compares codes and scales at once with infir2.fp8 on the GPU and on the
CPU, and writes beside this file

    te_fp8.json  SHA-256 of inputs, codes and scales of every case, with versions and device
    te_fp8.npz   small inputs with their codes and scales, to see where a difference begins (at most 2 MB)

A case is a layout (row, column, block, tensor, and ragged ones), a kind of input, its dtype, a format and a scale
format. For each layout, kind and scale format there are at least 10,000 tiles (tensor: one each). Inputs are made of
random integers and bit patterns on the CPU, without a rounding that machines could do differently.

Layouts are normalised before digests are taken: TransformerEngine keeps column-wise codes transposed, and scales padded
to a multiple of four, row-wise ones transposed; ours are [M, K] and [ceil(M / rows), ceil(K / columns)].

Exit status 1 if any code or scale differs; the first tile that does is printed for every case.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infir2 import fp8
from infir2.fp8 import BLOCK, COLUMN, E4M3, E5M2, ROW, SCALE_FORMATS, TENSOR

VERSION = "2.20.2"
FOLDER = Path(__file__).parent
RAW_BYTES = 2_000_000


@dataclass(frozen=True)
class Layout:
    """A tiling, the shape of one part of the input, and how many parts of other seeds make a case."""

    tile: fp8.Tile
    shape: tuple[int, int]
    parts: int = 1


# Sizes differ in M and K, and in their tiles, so that a transposed result cannot pass.
LAYOUTS = {
    "row": Layout(ROW, (1024, 1280)),
    "column": Layout(COLUMN, (1024, 1280)),
    "block": Layout(BLOCK, (2048, 5120), parts=4),
    "tensor": Layout(TENSOR, (256, 384)),
    "ragged-row": Layout(ROW, (301, 463)),
    "ragged-column": Layout(COLUMN, (301, 463)),
    "ragged-block": Layout(BLOCK, (301, 463)),
}
RAW_LAYOUTS = {"row": Layout(ROW, (64, 384)), "column": Layout(COLUMN, (64, 384)), "block": Layout(BLOCK, (64, 384))}
RAW_KINDS = ("activation", "adversarial")
KINDS = ("activation", "weight", "gradient", "adversarial")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = (E4M3, E5M2)
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def inputs(kind: str, layout: Layout, dtype: torch.dtype, salt: int = 0) -> Iterator[Tensor]:
    """The parts of one input, each [M, K] of dtype on the CPU, the same on every machine."""
    for part in range(layout.parts):
        generator = torch.Generator().manual_seed(1000 * KINDS.index(kind) + 100 * salt + part)
        if kind == "adversarial":
            yield _adversarial(layout, dtype, generator)
        else:
            yield _plausible(kind, layout.shape, generator).to(dtype)


def _plausible(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Numbers like a training run's, float32: a bell of standard deviation 1, then exact factors and zeros."""

    def integers(low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

    def powers(low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return (integers(low, high, size) + 127).bitwise_left_shift_(23).view(torch.float32)

    rows, columns = shape
    x = sum(integers(-(2**21), 2**21, shape) for _ in range(3)).float() * 2.0**-21
    if kind == "activation":  # tokens of different size, and a few channels far above the others
        x *= powers(-3, 4, (rows, 1))
        x[:, 7::97] *= 32
    elif kind == "weight":
        x *= powers(-8, -4, (1, columns))
    else:  # gradients: tiny, wide in exponent, a quarter exact zeros, rare outliers
        x *= powers(-24, -12, (rows, 1))
        x *= integers(0, 4, shape) != 0
        x *= torch.where(integers(0, 1000, shape) == 0, 64.0, 1.0)
    return x


def _adversarial(layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Tiles of bit patterns: each has an amax where a rule changes or breaks, and values close below it.

    amax, as its bits, cycles through: 0; subnormals; 2^e and 1.75 * 2^e with their neighbours, for every e; the
    dtype's largest; the edges where 448 / amax and 57344 / amax overflow. Bodies: random below amax, the same with ties
    of E4M3 and E5M2, amax alone above a far smaller rest, and all equal.
    """
    rows, columns = layout.tile or layout.shape
    count = math.ceil(layout.shape[0] / rows) * math.ceil(layout.shape[1] / columns)
    mantissa = {torch.bfloat16: 7, torch.float32: 23}[dtype]
    amax = _amax_bits(count, mantissa)[:, None]
    below = torch.randint(0, 16 << mantissa, (count, rows * columns), generator=generator, dtype=torch.int32)
    bits = (amax - below).clamp_(min=0)  # up to 16 powers of two below amax: all of E4M3's range
    body = torch.arange(count) % 7
    bits[body == 1] &= -(1 << (mantissa - 4))  # 4 mantissa bits: halfway between E4M3 codes, or on them
    bits[body == 2] &= -(1 << (mantissa - 3))  # 3: halfway between E5M2 codes
    bits = torch.where((body == 3)[:, None], (amax - (20 << mantissa)).clamp_(min=0), bits)
    bits = torch.where((body == 4)[:, None], amax, bits)
    tile_index = torch.arange(count)
    bits[tile_index, tile_index * 37 % (rows * columns)] = amax[:, 0]
    sign_shift = 15 if dtype == torch.bfloat16 else 31
    negative = torch.randint(0, 2, bits.shape, generator=generator, dtype=torch.int32) << sign_shift
    values = (bits | negative).to(_BITS[dtype]).view(dtype)
    grid = values.view(math.ceil(layout.shape[0] / rows), -1, rows, columns).transpose(1, 2)
    return grid.reshape(grid.shape[0] * rows, -1)[: layout.shape[0], : layout.shape[1]].contiguous()


def _amax_bits(count: int, mantissa: int) -> Tensor:
    """Bit patterns of `count` amaxes, int32: the special ones, cycling through all exponents."""
    power = [e << mantissa for e in range(1, 255)]
    special = [b for p in power for b in (p, p + (3 << (mantissa - 2)), p + (3 << (mantissa - 2)) + 1)]
    special += [p + (3 << (mantissa - 2)) - 1 for p in power] + [p - 1 for p in power] + [p + 1 for p in power]
    # 448 / amax reaches 2^128 at 1.75 * 2^-120, 57344 / amax at 1.75 * 2^-113.
    edges = [(127 + e << mantissa) + (3 << (mantissa - 2)) + step for e in (-120, -113) for step in (-2, -1, 0, 1, 2)]
    special += 20 * [*edges, 0, 1, 2, 3, (1 << mantissa) - 1, (255 << mantissa) - 1]
    order = torch.arange(count) * 811 % len(special)  # 811 is prime: neighbours in the list part
    return torch.tensor(special, dtype=torch.int32)[order]


def tile_count(layout: Layout) -> int:
    return layout.parts * math.prod(fp8.scale_shape(layout.shape, layout.tile))


def sha256(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def first_difference(x: Tensor, tile: fp8.Tile, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> str:
    """Where and how two results of one input differ, "" if they do not. Everything on the CPU."""
    (codes, scale_inv), (codes_te, scale_inv_te) = ours, theirs
    wrong_codes = codes.view(torch.uint8) != codes_te.view(torch.uint8)
    wrong_scales = scale_inv.view(torch.int32) != scale_inv_te.view(torch.int32)
    if not (wrong_codes.any() or wrong_scales.any()):
        return ""
    rows, columns = tile or x.shape
    m, k = wrong_codes.nonzero()[0].tolist() if wrong_codes.any() else (0, 0)
    i, j = wrong_scales.nonzero()[0].tolist() if wrong_scales.any() else (m // rows, k // columns)
    part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
    wrong_here = wrong_codes[part].nonzero()
    text = (
        f"{int(wrong_codes.sum())} codes and {int(wrong_scales.sum())} scales differ; first tile ({i}, {j}): amax "
        f"{_hex(x[part].abs().max())}, scale_inv ours {_hex(scale_inv[i, j])}, TransformerEngine "
        f"{_hex(scale_inv_te[i, j])}, {len(wrong_here)} codes differ in it"
    )
    for m, k in (wrong_here[:4] + torch.tensor([i * rows, j * columns])).tolist():
        text += f"; x[{m}, {k}] = {_hex(x[m, k])}: {_hex(codes[m, k])} and {_hex(codes_te[m, k])}"
    return text


def _hex(value: Tensor) -> str:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.element_size()]
    number = int(value.view(bits)) % 2 ** (8 * value.element_size())
    return f"{float(value)} (0x{number:0{2 * value.element_size()}x})"


def te_quantize(x: Tensor, tile: fp8.Tile, fmt: fp8.Format, scale_fmt: str) -> tuple[Tensor, Tensor]:
    """TransformerEngine's codes and inverse scales of x, on the GPU, in our layouts."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer

    te_dtype = {E4M3: tex.DType.kFloat8E4M3, E5M2: tex.DType.kFloat8E5M2}[fmt]
    options = {"rowwise": True, "columnwise": tile is not TENSOR, "amax_epsilon": 0.0}
    options["force_pow_2_scales"] = scale_fmt == "pow2"
    if tile is TENSOR:
        q = Float8CurrentScalingQuantizer(te_dtype, x.device, **options)(x)
        return q._data.view(fmt.dtype), q._scale_inv.view(1, 1)
    q = Float8BlockQuantizer(te_dtype, block_scaling_dim=2 if tile == BLOCK else 1, **options)(x)
    sizes = x.shape, fp8.scale_shape(x.shape, tile)
    if tile != COLUMN:
        rowwise = [_oriented(*pair) for pair in zip((q._rowwise_data, q._rowwise_scale_inv), sizes, strict=True)]
    if tile != ROW:
        stored = q._columnwise_data, q._columnwise_scale_inv
        columnwise = [_oriented(*pair) for pair in zip(stored, sizes, strict=True)]
    if tile == BLOCK and not all(torch.equal(a, b) for a, b in zip(rowwise, columnwise, strict=True)):
        raise RuntimeError("TransformerEngine's transposed 128x128 codes or scales are not those of the weight")
    codes, scale_inv = columnwise if tile == COLUMN else rowwise
    return codes.view(fmt.dtype), scale_inv


def _oriented(t: Tensor, shape: tuple[int, int]) -> Tensor:
    """Cut off padding, and transpose where TransformerEngine stores the transpose."""
    rows, columns = shape
    if t.shape[0] == rows and t.shape[1] >= columns:
        return t[:, :columns].contiguous()
    if t.shape[0] == columns and t.shape[1] >= rows:
        return t[:, :rows].t().contiguous()
    raise RuntimeError(f"a tensor of TransformerEngine has shape {tuple(t.shape)}; expected {shape} or its transpose")


def compare(name: str, x: Tensor, tile: fp8.Tile, fmt: fp8.Format, scale_fmt: str) -> tuple[Tensor, Tensor, int]:
    """TransformerEngine's result on the CPU, and how many of our two (GPU, CPU) differ from it."""
    on_gpu = x.cuda()
    theirs = tuple(t.cpu() for t in te_quantize(on_gpu, tile, fmt, scale_fmt))
    failures = 0
    for device, source in (("cuda", on_gpu), ("cpu", x)):
        ours = tuple(t.cpu() for t in fp8.quantize(source, tile, fmt=fmt, scale_fmt=scale_fmt))
        if text := first_difference(x, tile, ours, theirs):
            print(f"DIFFERENT {name} on {device}: {text}", flush=True)
            failures += 1
    return *theirs, failures


def digests() -> tuple[dict, dict, int]:
    """Digests of inputs and of TransformerEngine's results for every case, and the number of failures."""
    input_digests, cases, failures = {}, {}, 0
    for (layout_name, layout), kind, dtype in itertools.product(LAYOUTS.items(), KINDS, DTYPES):
        parts = list(inputs(kind, layout, DTYPES[dtype]))
        input_digests[f"{layout_name}/{kind}/{dtype}"] = sha256(parts)
        for fmt, scale_fmt in itertools.product(FORMATS, SCALE_FORMATS):
            name = f"{layout_name}/{kind}/{dtype}/{fmt.name}/{scale_fmt}"
            results = [compare(name, x, layout.tile, fmt, scale_fmt) for x in parts]
            codes, scale_inv, failed = zip(*results, strict=True)
            cases[name] = {"codes": sha256(codes), "scale_inv": sha256(scale_inv)}
            failures += sum(failed)
        print(f"{layout_name}/{kind}/{dtype}: {tile_count(layout)} tiles", flush=True)
    return input_digests, cases, failures


def raw_vectors() -> tuple[dict[str, np.ndarray], int]:
    """Small inputs and TransformerEngine's codes and scales for them, as bits, and the number of failures."""
    arrays, failures = {}, 0
    for (layout_name, layout), kind, dtype in itertools.product(RAW_LAYOUTS.items(), RAW_KINDS, DTYPES):
        (x,) = inputs(kind, layout, DTYPES[dtype], salt=1)
        arrays[f"input/{layout_name}/{kind}/{dtype}"] = x.view(_BITS[x.dtype]).numpy()
        for fmt, scale_fmt in itertools.product(FORMATS, SCALE_FORMATS):
            name = f"{layout_name}/{kind}/{dtype}/{fmt.name}/{scale_fmt}"
            codes, scale_inv, failed = compare(f"raw {name}", x, layout.tile, fmt, scale_fmt)
            arrays[f"codes/{name}"] = codes.view(torch.uint8).numpy()
            arrays[f"scale_inv/{name}"] = scale_inv.view(torch.int32).numpy()
            failures += failed
    return arrays, failures


def main() -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: beside this file")
    arguments = parser.parse_args()
    import transformer_engine

    if transformer_engine.__version__.split("+")[0] != VERSION:
        print(f"error: TransformerEngine {transformer_engine.__version__} found; these vectors pin {VERSION}")
        return 2
    started = time.monotonic()
    input_digests, cases, failures = digests()
    arrays, raw_failures = raw_vectors()
    failures += raw_failures
    np.savez_compressed(arguments.output / "te_fp8.npz", **arrays)
    made_by = {
        "transformer_engine": transformer_engine.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "command": "PYTHONPATH=training python tests/golden/make_te_vectors.py",
    }
    content = {"made_by": made_by, "inputs": input_digests, "cases": cases}
    (arguments.output / "te_fp8.json").write_text(json.dumps(content, indent=1) + "\n")
    raw_bytes = (arguments.output / "te_fp8.npz").stat().st_size
    per_kind = {n: 4 * tile_count(layout) for n, layout in LAYOUTS.items()}
    print(f"tiles for each kind and scale format: {per_kind}")
    print(f"{len(cases)} cases, raw vectors {raw_bytes} bytes, {time.monotonic() - started:.0f} s: ", end="")
    print(f"{failures} DIFFERENCES" if failures else "all codes and scales equal, on GPU and CPU")
    return 1 if failures or raw_bytes > RAW_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
