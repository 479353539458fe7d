"""Check a Hugging Face model folder, BF16 or block-scaled FP8, alone or against the model that it was made from.

    python tools/verify_checkpoint.py --model DIR [--source DIR] [--logits] [--report FILE.json]

Always checked: names, shapes and types of all tensors against config.json, the index and its total_size, no NaN or
Inf, and for FP8 the quantization_config, the scales (positive, finite, powers of two where config.json says "ue8m0"),
which layers are in BF16, and the scale format that training recorded. Scales may be FP32, BF16 or exponents (E8M0).

--source compares tensor by tensor. FP8 codes and scales must be Q(BF16(source)), every other tensor the source's,
rounded to the model's type; the relative error (norm) of each is reported. The source may be FP8 too, for a model that
was cast back.

--logits compares next-token logits of model and source on fixed token sequences, both in FP32 on the CPU, FP8 weights
dequantised. For small models: each is held in memory as a whole.

Faults are named on stderr and in the report, those of all tensors, and the exit status is then 1. Where names, shapes
or types are wrong, the check ends at the first fault. Exit status 2: there is no such folder.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from infir2 import files, fp8, hf
from infir2.qwen2 import Shape

log = logging.getLogger("verify_checkpoint")

SEQUENCES, TOKENS, SEED = 4, 64, 1236
# Relative norm of the difference of centred logits that rounding may leave: FP8 weights are off by 2.7 % each, BF16
# ones by 0.17 %, and layers add to it. A wrong scale or an exchanged tensor leaves 100 % or more.
LOGITS_LIMIT = {"fp8": 0.5, "bf16": 0.05}


@dataclass
class Row:
    """What was found of one tensor. Errors are relative norms; None where there is nothing to compare with."""

    name: str
    shape: list[int]
    dtype: str
    relative_error: float | None = None
    differing: int | None = None
    faults: list[str] = field(default_factory=list)


def verify(
    model: Path,
    source: Path | None = None,
    *,
    logits: bool = False,
    allow_mixed_scales: bool = False,
    workers: int = 1,
) -> dict[str, object]:
    """The report on folder `model`: "faults" (empty if it is right), "summary", and one row for each of "tensors"."""
    report: dict[str, object] = {"model": str(model), "source": source and str(source), "tensors": [], "logits": None}
    faults: list[str] = []
    rows: list[Row] = []
    try:
        reader, in_fp8 = open_model(model)
        origin = open_model(source)[0] if source else None
        faults += config_faults(reader, in_fp8, allow_mixed_scales)

        def check(name: str, _: Tensor) -> Row:
            return check_tensor(name, reader, origin)

        rows = list(reader.map(check, main_tensors(reader), workers=workers, progress="verify"))
        faults += [fault for row in rows for fault in row.faults]
        if logits:
            report["logits"] = found = compare_logits(reader, origin)
            faults += found.pop("faults")
        report["summary"] = summary(reader, rows, in_fp8)
    except (OSError, ValueError, TypeError) as error:
        faults.append(str(error))
        report.setdefault("summary", {})
    return report | {"faults": faults, "tensors": [asdict(row) for row in rows]}


def open_model(path: Path) -> tuple[hf.HFReader, bool]:
    """The folder, its tensors checked against config.json, and whether it is FP8."""
    reader = hf.HFReader(path)
    in_fp8 = any(reader.dtype(name) in hf.FP8_DTYPES or name.endswith("_scale_inv") for name in reader.names)
    if in_fp8:
        hf.stored_scale_format(reader)
    hf.check_qwen2(reader, in_fp8=in_fp8)
    return reader, in_fp8


def main_tensors(reader: hf.HFReader) -> list[str]:
    """All tensors but scales, which belong to their weight."""
    return [name for name in reader.names if not name.endswith("_scale_inv")]


def config_faults(reader: hf.HFReader, in_fp8: bool, allow_mixed_scales: bool) -> Iterator[str]:
    """What config.json and the index say wrongly of the folder as a whole."""
    config = reader.config
    plain = {reader.dtype(n) for n in main_tensors(reader)} - set(hf.FP8_DTYPES)
    for stated in {config.get("dtype"), config.get("torch_dtype")}:
        if stated is not None and plain != {getattr(torch, str(stated).removeprefix("torch."), None)}:
            yield f"{hf.CONFIG} says dtype {stated}, the tensors are {', '.join(sorted(map(str, plain)))}"
    index = reader.path / hf.INDEX
    if index.is_file():
        said = (json.loads(index.read_text()).get("metadata") or {}).get("total_size")
        size = sum(map(reader.nbytes, reader.names))
        if said != size:
            yield f"{hf.INDEX} says total_size {said}, the tensors have {size} bytes; write the index again"
    if in_fp8:
        yield from quantisation_faults(reader, allow_mixed_scales)


def quantisation_faults(reader: hf.HFReader, allow_mixed_scales: bool) -> Iterator[str]:
    """Disagreement between quantization_config, the FP8 tensors, and what is recorded of training."""
    config = reader.config
    quantisation = config["quantization_config"]
    scale_fmt = hf.stored_scale_format(reader)
    wanted = hf.fp8_quantization_config(scale_fmt)["activation_scheme"]
    if (found := quantisation.get("activation_scheme")) != wanted:
        yield f"quantization_config.activation_scheme is {found!r}; there are no static scales, write {wanted!r}"
    yield from left_out_faults(reader, hf.modules_left_out(config))
    shape, trained_as = Shape.from_config(config), hf.trained_precision(config)
    kept = hf.kept_in_bf16(shape, trained_as) if trained_as else ()
    if (cast := [name for name in kept if reader.dtype(name) in hf.FP8_DTYPES]) and not allow_mixed_scales:
        yield f"{cast[0]!r} is FP8 ({len(cast)} such), training in {trained_as} kept it in BF16; cast again"
    trained = hf.trained_scale_format(config)
    if trained not in (None, scale_fmt) and not allow_mixed_scales:
        yield (
            f"the weights have {scale_fmt} scales, training used {trained} ones ({hf.RECORD} in {hf.CONFIG}); "
            f"cast again with --scale-fmt {trained}"
        )


def left_out_faults(reader: hf.HFReader, left_out: list[str] | None) -> Iterator[str]:
    """Disagreement between the modules that engines leave as they are and the tensors."""
    key = "quantization_config.modules_to_not_convert"
    if left_out is not None and "lm_head" not in left_out and not reader.config.get("tie_word_embeddings"):
        yield f"{key} lacks 'lm_head', which is not FP8; engines would convert it"
    linears = [name.removesuffix(".weight") for name in reader.names if hf.is_fp8_linear(name)]
    in_fp8 = [name for name in linears if reader.dtype(f"{name}.weight") in hf.FP8_DTYPES]
    # Engines match a module by its whole name or by a part of it.
    for word in left_out or ():
        if hit := [name for name in in_fp8 if f".{word}." in f".{name}."]:
            yield f"{key} names {word!r}, but {hit[0]!r} is FP8; remove the word"
    for name in set(linears) - set(in_fp8):
        if not any(f".{word}." in f".{name}." for word in left_out or ()):
            yield f"{key} lacks {name!r}, which is not FP8; engines would convert it"


def check_tensor(name: str, reader: hf.HFReader, source: hf.HFReader | None) -> Row:
    """One tensor, with its scales where it has some: finite, of the right format, and what the source makes of it."""
    row = Row(name, list(reader.shape(name)), str(reader.dtype(name)).removeprefix("torch."))
    try:
        if reader.dtype(name) in hf.FP8_DTYPES:
            hf.refuse_wrong_scales(hf.scale_name(name), hf.read_scales(reader, name), hf.stored_scale_format(reader))
        value = values(reader, name)
        fp8.refuse_non_finite(value, name)
        if source is not None:
            compare(row, value, reader, source)
    except (ValueError, TypeError) as error:
        row.faults.append(str(error))
    return row


def values(reader: hf.HFReader, name: str) -> Tensor:
    """A tensor's values: FP8 dequantised in float32, others as they are stored."""
    tensor = reader.tensor(name)
    if tensor.dtype not in hf.FP8_DTYPES:
        return tensor
    return fp8.dequantize(tensor, hf.read_scales(reader, name), fp8.BLOCK)


def compare(row: Row, value: Tensor, reader: hf.HFReader, source: hf.HFReader) -> None:
    """Fill in the row's error against the source, and its fault where the model holds something else than it should."""
    name = row.name
    # A tied head may be stored or not.
    origin = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in source else name
    if origin not in source:
        raise ValueError(f"{source.path} has no {name!r}; is it the model that this one was made from?")
    if source.shape(origin) != reader.shape(name):
        raise ValueError(f"{name!r} has shape {reader.shape(name)}, the source's is {source.shape(origin)}")
    expected, meant = expected_tensors(name, origin, reader, source)
    found = held(name, reader)
    row.differing = sum(int(differing(found[part], expected[part])) for part in expected)
    exact = values(source, origin)
    row.relative_error = relative_error(value, exact)
    if row.differing:
        raise ValueError(
            f"{name!r}: {row.differing} of {sum(t.numel() for t in expected.values())} elements are not {meant}, "
            f"relative error {row.relative_error:.2%}"
        )
    if len(expected) == 2 and source.dtype(origin) not in hf.FP8_DTYPES:
        hf.rounding_error(name, exact, *found.values())  # codes that are Q(source) must also mean it


def expected_tensors(name: str, origin: str, reader: hf.HFReader, source: hf.HFReader) -> tuple[dict[str, Tensor], str]:
    """What the model must hold for the source's tensor, part by part, and what that is called."""
    if reader.dtype(name) in hf.FP8_DTYPES:
        if source.dtype(origin) in hf.FP8_DTYPES:
            return held(name, source), "the source's"
        return hf.fp8_tensors(name, source.tensor(origin), hf.stored_scale_format(reader)), "Q(BF16(source))"
    dtype = reader.dtype(name)
    meant = "the source's" if source.dtype(origin) == dtype else f"the source's, rounded to {dtype}"
    return {name: values(source, origin).to(dtype)}, meant


def held(name: str, reader: hf.HFReader) -> dict[str, Tensor]:
    """A tensor as it is stored; of an FP8 weight the scales too, in float32."""
    tensors = {name: reader.tensor(name)}
    if reader.dtype(name) in hf.FP8_DTYPES:
        tensors[hf.scale_name(name)] = hf.read_scales(reader, name)
    return tensors


def differing(found: Tensor, expected: Tensor) -> int:
    """How many elements differ in their bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return int((found.view(bits) != expected.view(bits)).sum())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; 0 for two zeros, infinite for a difference from zero."""
    noise, signal = (value.float() - exact.float()).norm().item(), exact.float().norm().item()
    return noise / signal if signal else math.inf if noise else 0.0


def summary(reader: hf.HFReader, rows: list[Row], in_fp8: bool) -> dict[str, object]:
    linears = [row for row in rows if reader.dtype(row.name) in hf.FP8_DTYPES]
    compared = [row for row in rows if row.relative_error is not None]
    return {
        "precision": "fp8" if in_fp8 else rows[0].dtype,
        "scale_fmt": hf.stored_scale_format(reader) if in_fp8 else None,
        "trained_scale_fmt": hf.trained_scale_format(reader.config),
        "tensors": len(rows),
        "fp8_tensors": len(linears),
        "bytes": sum(map(reader.nbytes, reader.names)),
        "compared": len(compared),
        "differing_elements": sum(row.differing for row in compared if row.differing is not None),
        "largest_relative_error": max((row.relative_error for row in compared), default=None),
    }


def compare_logits(reader: hf.HFReader, source: hf.HFReader) -> dict[str, object]:
    """Next-token logits of both models on the same fixed sequences: their difference, and how often argmax agrees."""
    vocab = reader.config["vocab_size"]
    generator = torch.Generator().manual_seed(SEED)
    length = min(TOKENS, reader.config["max_position_embeddings"])
    sequences = torch.randint(0, vocab, (SEQUENCES, length), generator=generator)
    ours, theirs = (logits_of(folder, sequences) for folder in (reader, source))
    centred = [x - x.mean(-1, keepdim=True) for x in (ours, theirs)]
    greedy = theirs.argmax(-1, keepdim=True)
    logprobs = [x.log_softmax(-1).gather(-1, greedy) for x in (ours, theirs)]
    found = {
        "sequences": SEQUENCES,
        "tokens": length,
        "greedy_agreement": (ours.argmax(-1, keepdim=True) == greedy).double().mean().item(),
        "mean_logprob_difference": (logprobs[0] - logprobs[1]).abs().mean().item(),
        "relative_error": relative_error(*centred),
    }
    in_fp8 = [folder.dtype(name) in hf.FP8_DTYPES for folder in (reader, source) for name in folder.names]
    limit = LOGITS_LIMIT["fp8" if any(in_fp8) else "bf16"]
    fault = f"logits differ by {found['relative_error']:.2%} from the source's; at most {limit:.2%} can be rounding"
    return found | {"limit": limit, "faults": [] if found["relative_error"] <= limit else [fault]}


def logits_of(reader: hf.HFReader, sequences: Tensor) -> Tensor:
    """Logits [sequences, tokens, vocab] of the model in transformers, in FP32, FP8 weights dequantised."""
    from transformers import AutoConfig, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(reader.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = Qwen2ForCausalLM(config).eval()
    weights = {name: values(reader, name).float() for name in main_tensors(reader)}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise ValueError(f"transformers expects {missing[0]!r}, which {reader.path} does not hold")
    model.tie_weights()
    with torch.no_grad():
        return model.float()(sequences).logits


def describe(report: dict) -> str:
    """The report in a few lines."""
    found, lines = report["summary"], []
    if found:
        scales = f" with {found['scale_fmt']} scales" if found["scale_fmt"] else ""
        lines.append(
            f"{report['model']}: {found['tensors']} tensors, {found['bytes'] / 1e6:.1f} MB, "
            f"{found['fp8_tensors']} in FP8{scales}"
        )
        if found["compared"]:
            lines.append(
                f"  against {report['source']}: {found['differing_elements']} elements differ from what they should "
                f"be, largest relative error of a tensor {found['largest_relative_error']:.2%}"
            )
    if report["logits"]:
        lines.append(
            "  logits on {sequences} x {tokens} tokens: relative error {relative_error:.2%}, greedy token equal at "
            "{greedy_agreement:.1%}, mean |logprob difference| {mean_logprob_difference:.4f}".format(**report["logits"])
        )
    lines.append(f"{len(report['faults'])} faults" if report["faults"] else "no fault")
    return "\n".join(lines)


def write_report(report: dict, path: Path) -> None:
    files.write_text(path, json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    summary_line, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary_line, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--source", type=Path, metavar="DIR", help="the model that --model was made from")
    parser.add_argument("--logits", action=argparse.BooleanOptionalAction, default=False, help="default: no")
    parser.add_argument(
        "--allow-mixed-scales",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="accept another scale format than that of training; default: no",
    )
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="threads; default: one a core")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(argv)
    if arguments.logits and arguments.source is None:
        parser.error("--logits compares with a source; give --source DIR")
    for folder in filter(None, (arguments.model, arguments.source)):
        if not (folder / hf.CONFIG).is_file():
            log.error("error: %s is not a Hugging Face model folder: it has no %s", folder, hf.CONFIG)
            return 2
    report = verify(
        arguments.model,
        arguments.source,
        logits=arguments.logits,
        allow_mixed_scales=arguments.allow_mixed_scales,
        workers=arguments.workers,
    )
    if arguments.report:
        write_report(report, arguments.report)
    for fault in report["faults"]:
        log.error("fault: %s", fault)
    print(describe(report))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
