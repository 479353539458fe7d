#!/usr/bin/env python
"""Convert a torch_dist checkpoint to a Hugging Face folder.

    python tools/convert_torch_dist_to_hf.py --input-dir exp/RUN/checkpoints --output-dir models/RUN \
        --origin-hf-dir models/Qwen2.5-7B

--input-dir is a run's folder (its newest checkpoint) or one iteration's. Any TP, PP and DP layout; needs no GPU and not
Megatron. Weights come from the FP32 masters where the checkpoint names them, rounded once to --dtype; flat optimizer
buckets have no names and are refused; --weights model takes the BF16 weights instead. Memory: a few tensors.

--origin-hf-dir gives config.json and the tokenizer. It must be the model that the run trained: the run's run.json (a
converted model's source.json), beside its iterations, is compared with it, and every stored tensor must have its place.

The output's generation_config.json and config.json name what ends a response: the origin's end of text, and the token
with which the fine-tuning data and the chat template end a turn. generation_config.json has do_sample on.

config.json also records, as "infir2", with which scale format the run trained in FP8 and which precision kept layers in
BF16. tools/bf16_cast_fp8.py follows it.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infir2 import fp8, hf, precision, receipts, stop_tokens
from infir2.checkpoint import RELEASE, CheckpointError, TorchDist
from infir2.hf import RECORD, HFReader, HFWriter, trained_scale_format
from infir2.indexed import DataError
from infir2.preflight import RUN_FILE
from infir2.qwen2 import Entry, Shape, entries

EMBEDDING = "embedding.word_embeddings.weight"
BY_TOKEN = (EMBEDDING, "output_layer.weight")
PADDING = 128  # Megatron may pad the vocabulary by fewer rows than that
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(source: Path, output: Path, origin: Path, dtype: torch.dtype, weights: str) -> str:
    """Write checkpoint `source` as Hugging Face folder `output`; returns which weights were taken."""
    stored = TorchDist(source)
    reader = HFReader(origin)
    shape = Shape.from_config(reader.config, origin / hf.CONFIG)
    run = recorded_run(stored.folder)
    check_origin(stored, shape, origin, run)
    if EMBEDDING in stored and (cut := stored.shape(EMBEDDING)[0] - shape.vocab):
        print(
            f"{stored.folder}: the last {cut} rows of the vocabulary, which {origin} lacks, are padding",
            file=sys.stderr,
        )
    take_masters = weights == "masters" and stored.master(EMBEDDING) is not None
    size = dtype.itemsize * sum(map(math.prod, hf.qwen2_tensors(shape).values()))
    with HFWriter(output, like=reader, expected_bytes=size) as writer:
        hf.set_dtype(writer.config, str(dtype).removeprefix("torch."))
        writer.config.pop("quantization_config", None)
        writer.config.pop(RECORD, None)  # the origin's, not this run's
        if (record := training_record(stored.folder, take_masters)) is not None:
            writer.config[RECORD] = record
        name_stop_tokens(writer, origin, data_end_of_turn(run))
        for entry in tqdm(list(entries(shape)), desc="converting", unit="tensor"):
            for name, tensor in zip(entry.hf, entry.split(_read(stored, take_masters, entry, shape)), strict=True):
                tensor = tensor.to(dtype)
                fp8.refuse_non_finite(tensor, name)  # a value beyond FP16, or training that diverged
                writer.add(name, tensor)
        writer.verify()
    return "FP32 masters" if take_masters else "model weights"


# What the run was


def recorded_run(iteration: Path) -> dict[str, Any]:
    """The run.json beside the folder `iteration`; empty where there is none."""
    path = iteration.parent / RUN_FILE
    return _read_json(path) if path.is_file() else {}


def training_record(iteration: Path, take_masters: bool) -> dict | None:
    """What config.json keeps of the run that trained the folder `iteration`; None where no run.json lies beside it."""
    run = recorded_run(iteration)
    if not run:
        return None
    if "scale_fmt" not in run:
        raise CheckpointError(f"{iteration.parent / RUN_FILE} has no scale_fmt; copy it again from the run's folder")
    record = {
        "trained_scale_fmt": run["scale_fmt"],
        "iteration": int(iteration.name.removeprefix("iter_")) if iteration.name != RELEASE else None,
        "weights": "masters" if take_masters else "model",
    }
    trained_scale_format({RECORD: record})  # refuses a format that is not known
    if run.get("first_last_layers_bf16") or run.get("te_precision_config"):
        record["precision"] = precision.of_run(run) or "without a name"
    return record


def check_origin(stored: TorchDist, shape: Shape, origin: Path, run: dict[str, Any]) -> None:
    """CheckpointError unless `origin`, of this shape, is the model that was trained, and has a place for every tensor
    of it. What no tensor shows (RoPE's base, epsilon) is compared where a run.json or a source.json tells it."""
    source = stored.folder.parent / "source.json"
    if run:
        where, found = RUN_FILE, run
    elif source.is_file():
        where, found = source.name, Shape.from_config(_read_json(source), source).megatron_arguments()
    else:
        where, found = "", {}
        print(
            f"warning: neither {RUN_FILE} nor {source.name} lies beside {stored.folder}: that {origin} has the RoPE "
            "base and the epsilon that it was trained with cannot be checked",
            file=sys.stderr,
        )
    wrong = [
        f"{name} is {value} in {origin / hf.CONFIG}, {found[name]} in {where}"
        for name, value in shape.megatron_arguments().items()
        if name in found and not _agree(name, value, found[name])
    ]
    if wrong:
        raise CheckpointError(
            f"{origin} is not the model that {stored.folder} was trained from: {'; '.join(wrong)}. Give the folder of "
            "the base that the run began with"
        )
    _refuse_homeless(stored, shape, origin)


def _agree(name: str, value: Any, found: Any) -> bool:
    if name == "padded_vocab_size":
        return 0 <= found - value < PADDING
    return value == found


def _refuse_homeless(stored: TorchDist, shape: Shape, origin: Path) -> None:
    """Every stored weight must be one of `shape`'s, with all of its layers. Sizes are seen when they are read."""
    known = {stored.locate(entry.megatron)[0] for entry in entries(shape) if entry.megatron in stored}
    for key in (key for key in stored.keys if not key.startswith("optimizer.")):
        if key not in known:
            raise CheckpointError(f"{stored.folder} holds {key}, for which {origin} has no place; it is another model")
        stacked = re.match(r"decoder\.layers\.\D", key)
        if stacked and stored.shape(key)[0] != shape.layers:
            raise CheckpointError(f"{stored.folder} has {stored.shape(key)[0]} layers, {origin} has {shape.layers}")


def _read(stored: TorchDist, take_masters: bool, entry: Entry, shape: Shape) -> Tensor:
    """The Megatron tensor of `entry`, vocabulary padding cut off."""
    name = stored.master(entry.megatron) if take_masters else entry.megatron
    if name is None or name not in stored:
        raise CheckpointError(
            f"{stored.folder} has no {entry.megatron}; is {shape.layers} layers what it was trained with?"
        )
    sizes = hf.qwen2_tensors(shape)
    expected = list(entry.join(*(torch.empty(sizes[part], device="meta") for part in entry.hf)).shape)
    key, layer = stored.locate(name)
    found = list(stored.shape(key))[0 if layer is None else 1 :]
    padding = found[0] - expected[0] if entry.megatron in BY_TOKEN and found else 0
    if found[1:] != expected[1:] or found[:1] != [expected[0] + padding] or not 0 <= padding < PADDING:
        raise CheckpointError(f"{stored.folder}: {name} is {found}, config.json implies {expected}")
    return stored.read(name)[: expected[0]]


# What ends a response


def data_end_of_turn(run: dict[str, Any]) -> str | None:
    """The token with which the data of the run, or of the fine-tuning that it began with, ends a turn, from the data's
    manifest; None without such data, and where the manifest is gone or another one by now."""
    while not run.get("sft_data") and run.get("parent"):
        run = recorded_run(Path(run["parent"]["folder"]))
    folder = Path(run.get("sft_data") or "")
    manifest = folder / receipts.MANIFEST
    recorded = (run.get("data_manifests") or {}).get(str(folder))
    if not run.get("sft_data") or not manifest.is_file() or receipts.sha256_file(manifest) != recorded:
        return None
    return receipts.read_manifest(folder).get("chat_template", {}).get("end_of_turn")


def name_stop_tokens(writer: HFWriter, origin: Path, data_end: str | None) -> None:
    """Set eos_token_id in both configs to the end of a turn, of the data and of the chat template, and what the origin
    names; and do_sample, without which `transformers serve` would not sample. CheckpointError where they contradict."""
    end = stop_tokens.end_of_turn(origin)
    if data_end is not None:
        number = stop_tokens.token_id(origin, data_end)
        wrong = "has no such token" if number is None else f"ends it with {end.text}" if end else ""
        if number is None or (end is not None and end.text != data_end):
            raise CheckpointError(
                f"the run's data ends a turn with {data_end}, {origin} {wrong}; give an --origin-hf-dir with the "
                "tokenizer and the chat template that the data was prepared with"
            )
        end = stop_tokens.Token(data_end, number)
    others = stop_tokens.eos_tokens(origin) - ({end.id} if end else set())
    ids = [*([end.id] if end else []), *sorted(others)]
    path = origin / stop_tokens.GENERATION
    generation = _read_json(path) if path.is_file() else {}
    for name in ("bos_token_id", "pad_token_id"):
        if writer.config.get(name) is not None:
            generation.setdefault(name, writer.config[name])
    if ids:
        generation["eos_token_id"] = writer.config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    generation.pop("_from_model_config", None)  # readers would take the model's config.json instead
    writer.side_files[stop_tokens.GENERATION] = generation | {"do_sample": True}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); copy it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(found).__name__}; copy it again")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", type=Path, required=True, help="run folder or one iteration's folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--origin-hf-dir", type=Path, required=True, help="folder with config and tokenizer")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--weights", choices=("masters", "model"), default="masters")
    args = parser.parse_args()
    try:
        with hf.about(args.input_dir, args.output_dir, args.origin_hf_dir):
            taken = convert(args.input_dir, args.output_dir, args.origin_hf_dir, DTYPES[args.dtype], args.weights)
    except (ValueError, OSError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {args.dtype} from {taken}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
