"""torch_dist checkpoint folders: what is complete, which iteration a path means, and reading tensors from one.

A run's folder holds `iter_0000100/`, ... and the tracker `latest_checkpointed_iteration.txt`. Megatron writes an
iteration's `metadata.json` last, so a folder without it is half-written. Converted weights lie in `release/`.

Reading needs neither Megatron nor a GPU nor a process group. Tensors of equal layers are stacked: Megatron's
`decoder.layers.3.mlp.linear_fc2.weight` lies in `decoder.layers.mlp.linear_fc2.weight` at index 3. The index of a
checkpoint is a pickle; it is unpickled with a list of allowed classes, and tensors with `weights_only`.
"""

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infir2 import files

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# FP32 masters by name: the plain optimizer's, and the distributed one's with --dist-ckpt-optim-fully-reshardable.
MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")
FLAT_OPTIMIZER = "optimizer.distributed.dp_group_idx"  # the distributed optimizer's default: buckets without names


class CheckpointError(ValueError):
    """A checkpoint is missing, half-written, or not what was asked for."""


def iteration_folder(folder: Path, iteration: int | str) -> Path:
    return folder / (iteration if iteration == RELEASE else f"iter_{iteration:07d}")


def complete_iterations(folder: Path) -> list[int]:
    """Iterations whose save finished, ascending. `release` is not among them."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*"))
    return sorted(int(m[1]) for m in found if m and _is_complete(folder / m[0]))


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint's save finished: Megatron writes metadata.json last."""
    return (folder / "metadata.json").is_file()


def tracked(folder: Path) -> int | str | None:
    """What the tracker names: an iteration, "release", or None where there is no tracker or it is cut off.

    CheckpointError for another text with a number in it: somebody has written it, who did not mean the newest one.
    """
    text = _tracker_text(folder)
    if number := re.fullmatch(r"(?:iter_)?(\d+)", text):
        return int(number[1])
    if re.search(r"\d", text):
        raise CheckpointError(f"{folder / TRACKER} holds {text!r:.80}; write the number of an iteration into it, alone")
    return RELEASE if text == RELEASE else None


def _tracker_text(folder: Path) -> str:
    path = folder / TRACKER
    return path.read_bytes().decode("ascii", "replace").strip() if path.is_file() else ""


def repair_tracker(folder: Path) -> str | None:
    """Make a tracker that names no complete checkpoint name the newest one; returns what was done, or None.

    Megatron rewrites the tracker in place after a save: a kill in between leaves it empty. One that names a complete
    checkpoint is obeyed, even where newer ones lie beside it: somebody may have set it back.
    """
    complete = complete_iterations(folder)
    now = tracked(folder)
    if now in complete and _tracker_text(folder) != str(now):  # iter_0000010, which Megatron does not read
        files.write_text(folder / TRACKER, str(now))
    if not complete or now in complete or (now == RELEASE and _is_complete(folder / RELEASE)):
        return None
    files.write_text(folder / TRACKER, str(complete[-1]))
    found = "nothing" if now is None else f"iteration {now}, which is missing or half-written"
    return f"{folder / TRACKER} named {found}: set to the newest complete checkpoint, {complete[-1]}"


def resolve(path: Path | str) -> Path:
    """The folder of one iteration, from itself or from a run's folder (then the tracked one). Refuses what is
    missing or half-written."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.name == RELEASE or re.fullmatch(r"iter_\d+", path.name):
        folder = path
    else:
        iteration = tracked(path)
        if iteration is None:
            raise CheckpointError(f"{path} holds no checkpoint: {TRACKER} is missing or empty")
        folder = iteration_folder(path, iteration)
    if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
        raise CheckpointError(f"checkpoint {folder} is missing or half-written: no metadata.json or .metadata in it")
    return folder


class TorchDist:
    """One iteration's tensors, read piece by piece: memory is that of the tensor asked for."""

    def __init__(self, path: Path | str):
        """Open `path` (see `resolve`), checking that every file is there and long enough."""
        self.folder = resolve(path)
        self._index = _read_index(self.folder / ".metadata")
        self._tensors = {
            key: entry for key, entry in self._index.state_dict_metadata.items() if hasattr(entry, "chunks")
        }
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for item in self._index.storage_data.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                found = "missing" if size is None else f"{size} bytes long, at least {end} expected"
                raise CheckpointError(f"checkpoint file {path} is {found}: copy the checkpoint again")

    @property
    def keys(self) -> Sequence[str]:
        """Names of all tensors, as stored (layers stacked)."""
        return list(self._tensors)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[key].size

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def locate(self, name: str) -> tuple[str, int | None]:
        """Stored key and index along dimension 0 for a Megatron tensor name; KeyError where there is none."""
        if name in self._tensors:
            return name, None
        stacked = re.sub(r"\bdecoder\.layers\.(\d+)\.", "decoder.layers.", name)
        layer = re.search(r"\bdecoder\.layers\.(\d+)\.", name)
        if layer and stacked in self._tensors and int(layer[1]) < self.shape(stacked)[0]:
            return stacked, int(layer[1])
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        try:
            self.locate(name)
        except KeyError:
            return False
        return True

    def master(self, name: str) -> str | None:
        """Name of the FP32 master of the weight called `name` in Megatron, or None where the checkpoint has none.

        Flat optimizer buckets hold masters without names: CheckpointError.
        """
        if any(key.startswith(FLAT_OPTIMIZER) for key in self._tensors):
            raise CheckpointError(
                f"{self.folder} keeps its FP32 masters in flat optimizer buckets, which have no names; save it with "
                "--dist-ckpt-optim-fully-reshardable"
            )
        return next((prefix + name for prefix in MASTER_PREFIXES if prefix + name in self), None)

    def read(self, name: str) -> Tensor:
        """The whole tensor called `name` in Megatron, put together from its shards, on the CPU."""
        key, layer = self.locate(name)
        entry = self._tensors[key]
        shape = list(entry.size)
        out = torch.empty(shape if layer is None else shape[1:], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            data = self._read_item(key, chunk.offsets)
            if list(data.shape) != sizes:
                raise CheckpointError(f"{self.folder}: a part of {name} is {list(data.shape)}, its index says {sizes}")
            if layer is not None:
                data, offsets, sizes = data[layer - offsets[0]], offsets[1:], sizes[1:]
            out[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = data
            filled += data.numel()
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: the shards of {name} hold {filled} of its {out.numel()} elements")
        return out

    def _read_item(self, key: str, offsets: torch.Size) -> Tensor:
        item = self._items.get((key, tuple(offsets)))
        if item is None:
            raise CheckpointError(f"the index of {self.folder} names no file for a part of {key}; copy it again")
        with open(self.folder / item.relative_path, "rb") as file:
            file.seek(item.offset)
            data = file.read(item.length)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes are read as anything
            raise CheckpointError(
                f"{self.folder / item.relative_path} is damaged: {key} cannot be read ({error!r:.200}); copy it again"
            ) from error

    @property
    def _items(self) -> dict:
        if not hasattr(self, "_items_by_key"):
            self._items_by_key = {
                (index.fqn, tuple(index.offset)): item
                for index, item in self._index.storage_data.items()
                if index.offset is not None
            }
        return self._items_by_key


_INDEX_CLASSES = {  # all that an index of torch 2.11 names
    "torch": {"Size", "bfloat16", "float32", "float16", "float64", "int64", "int32", "uint8", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _INDEX_CLASSES.get(module, ()):
            raise CheckpointError(f"the checkpoint's index names {module}.{name}, which no index needs: not loading it")
        return super().find_class(module, name)


def _refuse_other_index(index: object) -> None:
    """Any error unless all that is read of an index is there, and is what it should be."""
    right = True
    for key, entry in index.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            right &= isinstance(key, str) and isinstance(entry.properties.dtype, torch.dtype)
            right &= all(len(chunk.offsets) == len(chunk.sizes) == len(entry.size) for chunk in entry.chunks)
    for item, place in index.storage_data.items():
        right &= isinstance(item.fqn, str) and isinstance(place.relative_path, str)
        right &= isinstance(place.offset + place.length, int)
    if not right:
        raise ValueError("its entries are of other types")


def _read_index(path: Path):
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
        _refuse_other_index(index)
        return index
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except OSError:
        raise
    except Exception as error:  # a damaged pickle is a program: anything can go wrong in it
        raise CheckpointError(f"checkpoint index {path} cannot be read ({error!r}): half-written or damaged") from error
