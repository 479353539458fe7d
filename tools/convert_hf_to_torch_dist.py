#!/usr/bin/env python
"""Convert a Hugging Face Qwen2 folder to a torch_dist checkpoint that Megatron loads at any TP, PP and DP.

    python tools/convert_hf_to_torch_dist.py --input-dir models/Qwen2.5-7B --output-dir models/Qwen2.5-7B_torch_dist

Single file or sharded, tied or untied head, BF16, FP16 or FP32: weights are kept as they are, bit for bit. The result
holds weights only (Megatron's `release` folder); pass it as --pretrained-checkpoint. Memory: the model's weights once.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from infir2 import backend, files
from infir2.checkpoint import RELEASE, TRACKER
from infir2.hf import HFReader, about, check_qwen2
from infir2.qwen2 import Entry, Shape, entries

# Modules of TransformerEngine for which Megatron asks a checkpoint for their (in these recipes empty) FP8 state.
_HAS_EXTRA_STATE = (
    "linear_qkv.weight",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
    "final_layernorm.weight",
)


def convert(source: Path, output: Path) -> None:
    """Write `source` as a torch_dist checkpoint in the new folder `output`, which appears only when complete. Refuses
    what `hf.check_qwen2` refuses."""
    files.refuse_existing(output)
    reader = HFReader(source)
    shape = check_qwen2(reader, in_fp8=False)
    with files.building(output) as folder:
        (folder / RELEASE).mkdir()
        _save(_sharded_state(reader, shape), folder / RELEASE)
        (folder / TRACKER).write_text(RELEASE)
        (folder / "source.json").write_text(json.dumps(reader.config, indent=1) + "\n")


def _sharded_state(reader: HFReader, shape: Shape) -> dict:
    """Megatron's sharded state dict of the model's weights, equal layers stacked along a new first dimension."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    state = {}
    for entry in tqdm(list(entries(shape)), desc="reading", unit="tensor"):
        tensor = entry.join(*(reader.tensor(name) for name in entry.hf))
        key, layer = _stacked(entry)
        offsets = () if layer is None else ((0, layer, shape.layers),)
        state[entry.megatron] = ShardedTensor.from_rank_offsets(
            key, tensor, *offsets, prepend_axis_num=0 if layer is None else 1
        )
        if entry.megatron.endswith(_HAS_EXTRA_STATE):
            at = ((1,), (0,)) if layer is None else ((shape.layers,), (layer,))
            state[f"{entry.megatron} extra"] = ShardedObject(f"{key.rpartition('.')[0]}._extra_state", None, *at)
    return state


def _stacked(entry: Entry) -> tuple[str, int | None]:
    parts = entry.megatron.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return entry.megatron, None
    return ".".join(parts[:2] + parts[3:]), int(parts[2])


def _save(state: dict, folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            dist_checkpointing.save({"model": state, "checkpoint_version": 3.0}, str(folder))
    finally:
        torch.distributed.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="new folder for the checkpoint")
    args = parser.parse_args()
    os.environ["INFIR2_BACKEND"] = "cpu"
    backend.install()
    try:
        with about(args.input_dir, args.output_dir):
            convert(args.input_dir, args.output_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
