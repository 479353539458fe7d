"""Measure what FP8's formats cost: the tables of docs/numerics.md, as Markdown on stdout.

    python tools/measure_numerics.py [--model HF_DIR]

On seeded synthetic tensors, or for weights on the linear weights of --model's transformer blocks. On the CPU; a minute.

    error by kind of tensor   relative error (norm) and underflow (share of the non-zero elements that become 0)
    mixed scale formats       what one scale format does to weights that were trained with another
    rounding to BF16 first    share of codes that differ where FP32 masters are quantised without it
    cast back and again       share of blocks, and of codes, that are coded anew after a cast to BF16 and back to FP8
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from infir2 import fp8, hf

SEED, SIZE = 1236, 2048
TILES = {"1x128": fp8.ROW, "128x1": fp8.COLUMN, "128x128": fp8.BLOCK, "tensor": fp8.TENSOR}
COMBINATIONS = [  # tile of weights, tile of other tensors, scale format
    ("128x128", "1x128", "pow2"),
    ("128x128", "1x128", "fp32"),
    ("128x128", "128x1", "pow2"),
    ("tensor", "tensor", "fp32"),
]


def synthetic() -> dict[str, Tensor]:
    """Tensors [2048, 2048] in FP32, of the kinds that a transformer block's linear layers multiply. Seeded."""
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> Tensor:
        return torch.randn(SIZE, SIZE, generator=generator)

    outliers = normal()
    outliers[:, :4] *= 50  # a few channels far above the others, as in trained models
    per_token = torch.exp(2 * torch.randn(SIZE, 1, generator=generator))
    return {
        "weight": normal() * 0.02,
        "activation": normal(),
        "activation, 4 channels x50": outliers,
        "SwiGLU output": torch.nn.functional.silu(normal()) * normal(),
        "gradient": normal() * per_token * 1e-5,
    }


def weights_of(model: Path) -> Iterator[Tensor]:
    """The linear weights of a model's transformer blocks, one after another, in the type they are stored in."""
    reader = hf.HFReader(model)
    hf.check_qwen2(reader, in_fp8=False)
    yield from (reader.tensor(name) for name in reader.names if hf.is_fp8_linear(name))


class Sums:
    """Sums of squares and counts over several tensors."""

    def __init__(self):
        self.noise = self.signal = self.lost = self.elements = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        self.noise += (found.double() - exact.double()).square().sum().item()
        self.signal += exact.double().square().sum().item()
        self.lost += ((found == 0) & (exact != 0)).sum().item()
        self.elements += (exact != 0).sum().item()

    @property
    def error(self) -> float:
        return (self.noise / self.signal) ** 0.5 if self.signal else 0.0

    @property
    def underflow(self) -> float:
        return self.lost / self.elements if self.elements else 0.0


def rounded(x: Tensor, tile: str, fmt: fp8.Format, scale_fmt: str) -> Tensor:
    return fp8.fake_quantize(x.bfloat16(), TILES[tile], fmt=fmt, scale_fmt=scale_fmt, out_dtype=torch.float32)


def error_table(weights: Sequence[Tensor], others: dict[str, Tensor]) -> Iterator[str]:
    yield from heading("tensor", "tile", "scales", "E4M3 error", "E4M3 underflow", "E5M2 error", "E5M2 underflow")
    for kind, tensors in {"weight": weights, **{k: [t] for k, t in others.items()}}.items():
        for weight_tile, other_tile, scale_fmt in COMBINATIONS:
            tile = weight_tile if kind == "weight" else other_tile
            if (kind, other_tile) == ("weight", "128x1"):
                continue
            sums = {fmt: Sums() for fmt in (fp8.E4M3, fp8.E5M2)}
            for (fmt, found), x in itertools.product(sums.items(), tensors):
                found.add(rounded(x, tile, fmt, scale_fmt), x.bfloat16())
            numbers = [f"{value:.2%}" for s in sums.values() for value in (s.error, s.underflow)]
            yield line(kind, tile, scale_fmt, *numbers)


def mixing_table(weights: Sequence[Tensor]) -> Iterator[str]:
    yield from heading("trained with", "cast with", "second rounding of the trained weights", "cast from the masters")
    for trained, wanted in itertools.product(fp8.SCALE_FORMATS, repeat=2):
        again, direct = Sums(), Sums()
        for w in weights:
            used = rounded(w, "128x128", fp8.E4M3, trained)
            again.add(rounded(used, "128x128", fp8.E4M3, wanted), used)
            direct.add(rounded(w, "128x128", fp8.E4M3, wanted), used)
        yield line(trained, wanted, f"{again.error:.2%}", f"{direct.error:.2%}")


def masters_table(weights: Sequence[Tensor]) -> Iterator[str]:
    """Only FP32 weights say something here."""
    yield from heading("scales", "codes that differ", "scales that differ")
    for scale_fmt in fp8.SCALE_FORMATS:
        differing, scales = Share(), Share()
        for w in weights:
            pairs = [fp8.quantize(x, fp8.BLOCK, scale_fmt=scale_fmt) for x in (w, w.bfloat16())]
            differing.add(pairs[0][0].view(torch.uint8) != pairs[1][0].view(torch.uint8))
            scales.add(pairs[0][1] != pairs[1][1])
        yield line(scale_fmt, differing, scales)


def random_magnitudes(weight: Tensor, times: int = 8) -> Iterator[Tensor]:
    """The weight, each block times 2 to a random power in [0, 1): its largest value is then anywhere in an octave."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(times):
        factors = torch.exp2(torch.rand(fp8.scale_shape(weight.shape, fp8.BLOCK), generator=generator))
        yield weight * factors.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]


def recast_table(weights: Sequence[Tensor]) -> Iterator[str]:
    yield from heading("weights", "scales", "blocks", "blocks coded anew", "codes that differ", "values that differ")
    kinds = {"as they are": lambda: weights, "blocks of random magnitude": lambda: random_magnitudes(weights[0])}
    for (kind, tensors), scale_fmt in itertools.product(kinds.items(), fp8.SCALE_FORMATS):
        yield recast_line(kind, scale_fmt, tensors())


def recast_line(kind: str, scale_fmt: str, weights: Iterable[Tensor]) -> str:
    blocks, codes, values = Share(), Share(), Share()
    for w in weights:
        before = fp8.quantize(w.bfloat16(), fp8.BLOCK, scale_fmt=scale_fmt)
        back = fp8.dequantize(*before, fp8.BLOCK, torch.bfloat16)
        after = fp8.quantize(back, fp8.BLOCK, scale_fmt=scale_fmt)
        blocks.add(before[1] != after[1])
        codes.add(before[0].view(torch.uint8) != after[0].view(torch.uint8))
        values.add(fp8.dequantize(*before, fp8.BLOCK) != fp8.dequantize(*after, fp8.BLOCK))
    return line(kind, scale_fmt, blocks.total, blocks, codes, values)


class Share:
    """A share of true elements, in per cent when printed."""

    def __init__(self):
        self.true = self.total = 0

    def add(self, mask: Tensor) -> None:
        self.true += int(mask.sum())
        self.total += mask.numel()

    def __str__(self) -> str:
        return f"{self.true / self.total:.2%}"


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def heading(*cells: str) -> tuple[str, str]:
    return line(*cells), "|" + "---|" * len(cells)


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="HF_DIR", help="take its weights, not synthetic ones")
    arguments = parser.parse_args(argv)
    try:
        others = {} if arguments.model else synthetic()
        weights = list(weights_of(arguments.model)) if arguments.model else [others.pop("weight")]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = {
        "error by kind of tensor": error_table(weights, others),
        "mixed scale formats": mixing_table(weights),
        "rounding to BF16 first": masters_table(weights),
        "cast back and again": recast_table(weights),
    }
    for title, lines in tables.items():
        print(f"\n{title}\n", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
