"""Cast a block-scaled FP8 model back to BF16, for tools and engines that read no FP8.

    python tools/fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR

Scales may be FP32, BF16 (Qwen's own FP8 models) or exponents (E8M0, DeepSeek's), and linear layers may be in BF16.
Each FP8 weight becomes BF16(code * scale_inv). With power-of-two scales that is exact, and casting the result to FP8
again gives the same weights, value by value; a block whose largest code is exactly 224, half of E4M3's 448, comes
back with half the scale and twice the codes. With FP32 scales BF16 rounds once more, by at most 2^-9 of a value.

These weights hold FP8's rounding, 2.6 % of noise. To go on training, convert the training checkpoint instead.

Refused, besides what cannot be read: scales that are not what config.json says (a model that mixes formats), not
positive or not finite, and codes that are NaN. The output is checked before it gets its name.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infir2 import fp8, hf

log = logging.getLogger("fp8_cast_bf16")


def cast(source: Path, target: Path, *, verify: bool = True, workers: int = 1) -> str:
    """Write target, the BF16 form of the FP8 folder source. Returns what was done, in one line."""
    reader = hf.HFReader(source)
    scale_fmt = hf.stored_scale_format(reader)
    hf.check_qwen2(reader, in_fp8=True)
    hf.refuse_mixed_scales(reader, scale_fmt)
    names = [name for name in reader.names if not name.endswith("_scale_inv")]
    in_fp8 = {name for name in names if reader.dtype(name) in hf.FP8_DTYPES}
    expected_bytes = sum(2 * math.prod(reader.shape(name)) for name in names)

    def dequantise(name: str, tensor: Tensor) -> Tensor:
        if name not in in_fp8:
            return hf.bf16_tensor(name, tensor)
        scale_inv = hf.read_scales(reader, name)
        values = fp8.dequantize(tensor, scale_inv, fp8.BLOCK, torch.bfloat16)
        fp8.refuse_non_finite(values, name)
        if verify:
            _refuse_other_values(name, values, tensor, scale_inv, scale_fmt)
        return values

    with hf.HFWriter(target, like=reader, expected_bytes=expected_bytes, workers=workers) as writer:
        del writer.config["quantization_config"]
        hf.set_dtype(writer.config, "bfloat16")
        for name, tensor in zip(names, reader.map(dequantise, names, workers=workers, progress="cast"), strict=True):
            writer.add(name, tensor)
        summary = f"{len(in_fp8)} tensors of {len(names)} were FP8 with {scale_fmt} scales"
        if verify:
            writer.verify()
            summary += "; verified, " + ("exact" if scale_fmt == "pow2" else "rounded to BF16")
    return f"{target}: {summary}"


def _refuse_other_values(name: str, result: Tensor, codes: Tensor, scale_inv: Tensor, scale_fmt: str) -> None:
    """ValueError unless every eighth row of blocks is code * scale_inv, by torch's own conversion of the codes."""
    # BF16 keeps 7 mantissa bits: power-of-two scales need only 3 of them, FP32 scales round at the last.
    tolerance = 0.0 if scale_fmt == "pow2" else 2.0**-8
    for i in range(0, len(scale_inv), 8):
        rows = slice(128 * i, 128 * (i + 1))
        exact = codes[rows].float() * scale_inv[i].repeat_interleave(128)
        if not ((result[rows].float() - exact).abs() <= exact.abs() * tolerance).all():
            raise ValueError(f"{name!r} is not code * scale_inv in rows {rows.start} to ...+127")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="threads; default: one a core")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    arguments = parse_arguments(argv)
    try:
        with hf.about(arguments.input_fp8_hf_path, arguments.output_bf16_hf_path):
            summary = cast(
                arguments.input_fp8_hf_path,
                arguments.output_bf16_hf_path,
                verify=arguments.verify,
                workers=arguments.workers,
            )
    except (OSError, ValueError, TypeError) as error:
        log.error("error: %s", error)
        return 2
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
