"""What "bf16" and "fp8" mean in this repository, for every stage: the one table of named precisions.

A precision is a set of Megatron flags. On a GPU TransformerEngine carries them out; on a CPU `infir2.layers` emulates
the same quantisation. `python -m infir2.precision NAME` prints the flags, one a line, for scripts/lib/precision.sh.

`SCALE_FMT` (environment) is the one switch for the format of blockwise scales: "pow2" (default) or "fp32".
`set_scale_format` hands it to TransformerEngine, which reads its own variable once, when it is imported. Scales of a
whole tensor ("fp8-current") are always FP32.
"""

import os
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

SCALE_FORMATS = ("pow2", "fp32")
TE_FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
TE_CURRENT_POW2_SCALES = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"
MLP_ONLY = Path(__file__).with_name("fp8_mlp.yaml")


@dataclass(frozen=True)
class Precision:
    """A named precision: what it is in one line, and the Megatron flags that ask for it."""

    summary: str
    flags: tuple[str, ...]


PRECISIONS = {
    "bf16": Precision("every GEMM in BF16", ("--bf16",)),
    "fp8": Precision(
        "linear layers in FP8 E4M3, activations and gradients by 1x128, weights by 128x128",
        ("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    ),
    "fp8-hybrid": Precision(
        "as fp8, with gradients in E5M2", ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "blockwise")
    ),
    "fp8-current": Precision(
        "linear layers in FP8 with one FP32 scale for each tensor, E4M3 forward, gradients in E5M2",
        ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
    ),
    "fp8-mlp": Precision(
        "as fp8, but attention projections and the first and last layer in BF16",
        (
            *("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--first-last-layers-bf16"),
            *("--num-layers-at-start-in-bf16", "1", "--num-layers-at-end-in-bf16", "1"),
            *("--te-precision-config-file", str(MLP_ONLY)),
        ),
    ),
    "fp8-ffn": Precision(
        "as fp8, but attention projections in BF16",
        (
            *("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
            *("--te-precision-config-file", str(MLP_ONLY)),
        ),
    ),
}


def flags(name: str) -> tuple[str, ...]:
    """Megatron flags of the precision `name`. An unknown name is a ValueError that lists the known ones."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision '{name}'; known: {' '.join(PRECISIONS)}")
    return PRECISIONS[name].flags


def keeps_in_bf16(name: str, layers: int, layer: int, attention: bool) -> bool:
    """Whether precision `name` leaves the linear layers of a block's attention (else of its MLP) out of FP8. `layer`
    counts from 0."""
    words = flags(name)
    at_an_end = "--first-last-layers-bf16" in words and layer in (0, layers - 1)
    return "--fp8-recipe" not in words or at_an_end or (attention and str(MLP_ONLY) in words)


def of_run(run: dict) -> str | None:
    """The name of the precision of a run whose run.json is `run`; None where it has no name here."""
    by_module = sha256(MLP_ONLY.read_bytes()).hexdigest()
    found = (run.get("fp8"), run.get("fp8_recipe") if run.get("fp8") else None)
    found += (bool(run.get("first_last_layers_bf16")), run.get("te_precision_config"))
    for name, precision in PRECISIONS.items():
        words = dict(zip(precision.flags, (*precision.flags[1:], ""), strict=True))
        ends, table = "--first-last-layers-bf16" in words, "--te-precision-config-file" in words
        facts = (words.get("--fp8-format"), words.get("--fp8-recipe"), ends, by_module if table else None)
        if facts == found:
            return name
    return None


def scale_format() -> str:
    """The scale format of this run, from `SCALE_FMT`: "pow2" unless set. Another word is a ValueError."""
    chosen = os.environ.get("SCALE_FMT", "pow2")
    if chosen not in SCALE_FORMATS:
        raise ValueError(f"SCALE_FMT is '{chosen}'; known: {' '.join(SCALE_FORMATS)}")
    return chosen


def scale_format_of_recipe(recipe: str, scale_fmt: str) -> str:
    """The format of the scales that Megatron's --fp8-recipe `recipe` uses in a run whose SCALE_FMT is `scale_fmt`."""
    return "fp32" if recipe == "tensorwise" else scale_fmt


def set_scale_format() -> str:
    """Set TransformerEngine's variable from `SCALE_FMT` and return the format.

    Call before TransformerEngine is imported. A variable already set to the other format is a ValueError: weights
    trained with one format and exported in the other carry a second rounding, 2.7 to 2.8 % of their size.
    """
    if sys.modules.get("transformer_engine") is not None:
        raise RuntimeError("transformer_engine was imported before its scale format was set")
    fmt = scale_format()
    wanted = "1" if fmt == "fp32" else "0"
    found = os.environ.get(TE_FP32_SCALES)
    if found is not None and found != wanted:
        raise ValueError(f"{TE_FP32_SCALES}={found} contradicts SCALE_FMT={fmt}; unset it, SCALE_FMT sets it")
    if os.environ.get(TE_CURRENT_POW2_SCALES, "0") != "0":
        raise ValueError(f"{TE_CURRENT_POW2_SCALES} is set, but scales of whole tensors are FP32 here; unset it")
    os.environ[TE_FP32_SCALES] = wanted
    return fmt


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m infir2.precision NAME")
    try:
        print(*flags(sys.argv[1]), sep="\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
