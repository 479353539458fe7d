"""Cast a Hugging Face model to block-scaled FP8, the form that SGLang, vLLM and transformers load.

    python tools/bf16_cast_fp8.py --input-bf16-hf-path DIR --output-fp8-hf-path DIR

Weights of the transformer blocks' linear layers (q, k, v, o, gate, up, down) become FP8 E4M3 codes with one FP32
inverse scale for each 128x128 block, `<name>_scale_inv`. Every other tensor is kept in BF16. The input may be BF16,
FP16 or FP32, one file or shards; it is rounded to BF16 first, as in training, so the codes are those that training
used. Layers that training kept in BF16 (precision fp8-mlp, fp8-ffn) stay in BF16, where config.json records that
precision or --precision names it, and config.json tells the engines which. Scales are powers of two, or FP32 with
--scale-fmt fp32 (environment: SCALE_FMT). Where config.json records the format that the model was trained with in
FP8, that one is taken, and another one is refused with the error that it would add, unless --allow-mixed-scales says
that this is meant.

The output is checked before it gets its name: decoded again, every 32nd row of blocks is within FP8's rounding of the
input, and the files, opened as a reader opens them, give back every byte that was handed to them. (To compare two
folders later, tools/verify_checkpoint.py.) Prints what was written. Nothing is left behind on an error.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from infir2 import fp8, hf
from infir2.precision import scale_format

FP8_WEIGHTS = ("fp8", "fp8-mlp", "fp8-ffn")

log = logging.getLogger("bf16_cast_fp8")


def cast(
    source: Path,
    target: Path,
    scale_fmt: str | None = None,
    *,
    precision: str | None = None,
    allow_mixed_scales: bool = False,
    verify: bool = True,
    workers: int = 1,
    device: str = "cpu",
) -> str:
    """Write target, the FP8 form of the folder source. Returns what was done, in one line.

    Without scale_fmt: the format that the environment names, else the recorded one of training, else powers of two.
    Without precision: the recorded one of training, else every linear layer of the blocks becomes FP8.
    Refused: what `hf.HFReader`, `hf.HFWriter` and `hf.check_qwen2` refuse, sizes that break the 128 rule, tensors with
    NaN or Inf, and a scale format other than the recorded one.
    """
    reader = hf.HFReader(source)
    shape = hf.check_qwen2(reader, in_fp8=False)
    shape.refuse_fp8()
    kept = hf.kept_in_bf16(shape, precision or hf.trained_precision(reader.config) or "fp8")
    in_fp8 = {name for name in reader.names if hf.is_fp8_linear(name)} - kept
    if not in_fp8:
        raise ValueError(f"{source} has {shape.layers} layers, and training kept all of them in BF16: nothing to cast")
    scale_fmt = _scale_format(reader, scale_fmt, allow_mixed_scales)
    with hf.HFWriter(target, like=reader, expected_bytes=_expected_bytes(reader, in_fp8), workers=workers) as writer:
        writer.config["quantization_config"] = hf.fp8_quantization_config(scale_fmt, kept)
        hf.set_dtype(writer.config, "bfloat16")

        def quantise(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], tuple[float, float]]:
            if name not in in_fp8:
                return {name: hf.bf16_tensor(name, tensor)}, (0.0, 0.0)
            parts = hf.fp8_tensors(name, tensor.to(device), scale_fmt)
            parts = {part: result.cpu() for part, result in parts.items()}
            return parts, hf.rounding_error(name, tensor, *parts.values(), every=32) if verify else (0.0, 0.0)

        errors = []
        for tensors, error in reader.map(quantise, reader.names, workers=workers, progress="cast"):
            errors.append(error)
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        summary = _summary(reader, writer.written(), scale_fmt, len(in_fp8))
        if verify:
            writer.verify()
            noise, signal = (math.fsum(column) for column in zip(*errors, strict=True))
            error = math.sqrt(noise / signal) if signal else 0.0
            summary += f"; verified, relative error of the FP8 weights {error:.2%}"
    return f"{target}: {summary}"


def _scale_format(reader: hf.HFReader, asked: str | None, allow_mixed: bool) -> str:
    """The format to write. ValueError where it is not the one that config.json records of training."""
    trained = hf.trained_scale_format(reader.config)
    if asked is None and trained is not None and not os.environ.get("SCALE_FMT"):
        return trained
    wanted = asked or scale_format()
    if trained is not None and not allow_mixed:
        name = next(filter(hf.is_fp8_linear, reader.names))
        try:
            hf.refuse_mixed_formats(str(reader.path), repr(name), reader.tensor(name), trained, wanted)
        except ValueError as error:
            raise ValueError(f"{error}, or pass --allow-mixed-scales") from None
    return wanted


def _expected_bytes(reader: hf.HFReader, in_fp8: Collection[str]) -> int:
    """Size of the output; a scale for each 16,384 weights and headers are within the 1 % on top."""
    elements = {name: math.prod(reader.shape(name)) for name in reader.names}
    return int(1.01 * sum(n * (1 if name in in_fp8 else 2) for name, n in elements.items()))


def _summary(reader: hf.HFReader, written: hf.HFReader, scale_fmt: str, in_fp8: int) -> str:
    before, after = (sum(map(folder.nbytes, folder.names)) / 1e9 for folder in (reader, written))
    return (
        f"{in_fp8} tensors in FP8 E4M3 with {scale_fmt} scales, {len(reader.names) - in_fp8} in BF16, "
        f"{before:.2f} GB to {after:.2f} GB"
    )


def _true_or_false(word: str) -> bool:
    values = {"true": True, "false": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return values[word.lower()]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-bf16-hf-path", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output-fp8-hf-path", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--scale-fmt", choices=fp8.SCALE_FORMATS, help="default: SCALE_FMT, else that of training, else pow2"
    )
    parser.add_argument(
        "--precision",
        choices=FP8_WEIGHTS,
        help="which layers become FP8; default: as config.json records of training, else all",
    )
    parser.add_argument(
        "--allow-mixed-scales",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="cast even if training used the other scale format; default: no",
    )
    parser.add_argument(
        "--force-pow-2-scale", type=_true_or_false, metavar="True|False", help="the same switch: pow2 or fp32"
    )
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="threads; default: one a core")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is a GPU"
    )
    arguments = parser.parse_args(argv)
    if arguments.force_pow_2_scale is not None:
        word = "pow2" if arguments.force_pow_2_scale else "fp32"
        if arguments.scale_fmt not in (None, word):
            parser.error(f"--force-pow-2-scale asks for {word} and --scale-fmt for {arguments.scale_fmt}; pass one")
        arguments.scale_fmt = word
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    arguments = parse_arguments(argv)
    try:
        with hf.about(arguments.input_bf16_hf_path, arguments.output_fp8_hf_path):
            summary = cast(
                arguments.input_bf16_hf_path,
                arguments.output_fp8_hf_path,
                arguments.scale_fmt,
                precision=arguments.precision,
                allow_mixed_scales=arguments.allow_mixed_scales,
                verify=arguments.verify,
                workers=arguments.workers,
                device=arguments.device,
            )
    except (OSError, ValueError, TypeError) as error:
        log.error("error: %s", error)
        return 2
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
