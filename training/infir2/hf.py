"""Hugging Face model folders: read tensor by tensor, written whole or not at all, and refused by name when broken.

`HFReader` opens a folder with one model.safetensors or with shards and an index. It reads only headers, checks them
against the index and the files' sizes, and loads a tensor when asked. `HFWriter` streams tensors into shards in a
temporary folder beside the target and renames it at the end, so that nothing half-written ever has the target's name.
Neither holds more than a few tensors, whatever the size of the model.

The rest is what this recipe's folders hold: which tensors a Qwen2 model has, which of them are FP8, and the
`quantization_config` that SGLang, vLLM and transformers read. A weight in FP8 E4M3 has a neighbour
`<name>_scale_inv`, float32, one scale for each 128x128 block.

File format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

import contextlib
import copy
import itertools
import json
import math
import os
import re
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from xxhash import xxh3_64_intdigest

from infir2 import files, fp8, precision
from infir2.qwen2 import Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RECORD = "infir2"  # config.json's key for what the training run was

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # ours, Qwen's, DeepSeek's
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The header comes first in the file but is complete only at the end, so its room is reserved and padded with spaces,
# as the format allows. 128 KiB hold about a thousand tensors; a shard also ends when its header is full.
_DATA_START = 128 * 1024
# What may wait between reading and writing, in bytes of input.
_IN_FLIGHT_BYTES = 640 * 1024**2
# Small enough for malloc to use the same memory again: fresh memory costs a page fault every 4 KiB.
_PIECE_BYTES = 16 * 1024**2
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
_SCALE = "_scale_inv"
_FP8_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")


@contextlib.contextmanager
def about(path: Path | str, *others: Path | str) -> Iterator[None]:
    """Refusals (ValueError, TypeError) inside that name neither `path` nor one of `others` get `path` before them."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if any(str(named) in str(error) for named in (path, *others)):
            raise
        raise ValueError(f"{path}: {error}") from error


class HFReader:
    """A model folder, opened without loading it.

    config: config.json as a dict. names: every tensor, in the order of the files. Refused, with the file's or the
    tensor's name: a missing config, JSON that does not parse or repeats a key, an index that names a missing file or
    tensor, a file truncated or of a wrong length, a tensor held twice, a tensor type outside `DTYPES`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder; expected a Hugging Face model folder")
        self.config: dict = _read_json(self.path / CONFIG)
        self._tensors: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            self._add_file(self.path / file, weight_map)
        if missing := [name for name in weight_map or () if name not in self._tensors]:
            place = f"places {missing[0]!r} in {weight_map[missing[0]]}, which does not hold it"
            raise ValueError(f"{self.path}/{INDEX} {place}; fetch both again")

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name][1]

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from its file and so read as it is used. Safe to call from several threads."""
        with safe_open(self._tensors[name][0], framework="pt") as file:
            return file.get_tensor(name)

    def side_files(self) -> list[Path]:
        """What belongs to a model besides config and weights, relative: tokenizer, templates, generation config, ..."""
        weights = {file for pattern in _WEIGHT_FILES for file in self.path.glob(pattern)}
        files = [f for f in self.path.iterdir() if f.is_file() and f not in weights and not f.name.startswith(".")]
        files += (self.path / "additional_chat_templates").glob("*.jinja")
        return sorted(f.relative_to(self.path) for f in files if f.name != CONFIG)

    def map[T](
        self, function: Callable[[str, Tensor], T], names: Sequence[str], *, workers: int, progress: str
    ) -> Iterator[T]:
        """function(name, tensor) for every name, on `workers` threads, results in order; a progress bar on stderr.

        Tensors of 640 MB together are on their way at a time, besides the one whose result is next.
        """
        waiting: deque[tuple[str, Future[T]]] = deque()
        bar = tqdm(total=sum(map(self.nbytes, names)), unit="B", unit_scale=True, desc=progress)
        threads_before = torch.get_num_threads()
        # One tensor a thread beats many threads on each tensor: no waiting for each other after every operation.
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

        def is_full(next_name: str) -> bool:
            held = sum(self.nbytes(name) for name, _ in itertools.islice(waiting, 1, None))
            return len(waiting) > 2 * workers or held + self.nbytes(next_name) > _IN_FLIGHT_BYTES

        def first_result() -> T:
            name, future = waiting.popleft()
            bar.update(self.nbytes(name))
            return future.result()

        try:
            for name in names:
                while waiting and is_full(name):
                    yield first_result()
                waiting.append((name, pool.submit(lambda n: function(n, self.tensor(n)), name)))
            while waiting:
                yield first_result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)
            bar.close()

    def _weight_map(self) -> dict[str, str] | None:
        """The index's map from tensor to file, or None for a single file."""
        single, index = self.path / SINGLE, self.path / INDEX
        if single.exists() and index.exists():
            raise ValueError(f"{self.path} holds both {SINGLE} and {INDEX}; remove the one that is stale")
        if single.exists():
            return None
        if not index.exists():
            found = ", ".join(sorted(f.name for f in self.path.iterdir())) or "nothing"
            raise FileNotFoundError(f"{self.path} holds neither {SINGLE} nor {INDEX}; found {found}")
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; write the folder again with save_pretrained")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not (self.path / file).is_file():
                raise FileNotFoundError(f"{index} places {name!r} in {file}, which does not exist; fetch it again")
        return weight_map

    def _add_file(self, file: Path, weight_map: dict[str, str] | None) -> None:
        for name, (dtype, shape) in _read_header(file).items():
            if name in self._tensors:
                both = f"{self._tensors[name][0].name} and {file.name}"
                raise ValueError(f"{self.path}: tensor {name!r} is in two files: {both}; remove the stale one")
            if weight_map is not None and name not in weight_map:
                raise ValueError(f"{file} holds {name!r}, which {INDEX} does not list; fetch both again")
            self._tensors[name] = (file, dtype, shape)


class HFWriter:
    """Writes a model folder, all or nothing. Use with `with`; add tensors one by one.

    config starts as a copy of like's; its tokenizer, templates and other side files are copied, but for those that
    side_files gives by name, as objects of JSON. Shards end before
    shard_bytes (a single shard becomes model.safetensors, without an index). expected_bytes is checked against the
    free space of the disk first. Tensors are written by `workers` threads, in pieces, each to its own place.

    The folder appears under its name when the `with` block ends well, and otherwise not at all. Refused: a target that
    exists, a tensor added twice, a full disk, a config that disagrees with the tensors about FP8.
    """

    def __init__(
        self,
        path: Path | str,
        like: HFReader | None = None,
        shard_bytes: int = 5 * 1024**3,
        expected_bytes: int = 0,
        workers: int = 2,
    ) -> None:
        self.path = Path(path)
        self.config: dict = copy.deepcopy(like.config) if like else {}
        self.side_files: dict[str, dict] = {}
        self._like, self._shard_bytes, self._expected_bytes = like, shard_bytes, expected_bytes
        self._shards: list[_Shard] = []
        self._pool = ThreadPoolExecutor(workers)
        self._on_the_way: deque[tuple[str, list[Future[int]]]] = deque()
        self._digests: dict[str, list[int]] = {}
        self._finished = False

    def __enter__(self) -> Self:
        files.refuse_existing(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.path.parent).free) < self._expected_bytes:
            raise OSError(
                f"{self.path} needs {self._expected_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                "free some space or choose another output folder"
            )
        with contextlib.ExitStack() as opened:
            self._temporary = opened.enter_context(files.building(self.path))
            opened.callback(self._close)
            opened.push(self._finish_unless_failed)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _finish_unless_failed(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def _close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for shard in self._shards:
            shard.file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, [...] of any dtype in `DTYPES`, on any device. It must not change afterwards: it is written
        in the background, and kept until it is."""
        if any(name in shard.entries for shard in self._shards):
            raise ValueError(f"tensor {name!r} was added twice to {self.path}")
        tensor = tensor.detach().cpu().contiguous()
        if not self._shards or not self._shards[-1].has_room(name, tensor, self._shard_bytes):
            self._shards.append(_Shard(self._temporary / f"shard-{len(self._shards)}"))
        shard = self._shards[-1]
        offset = shard.reserve(name, tensor)
        data = _bytes(tensor)
        starts = range(0, len(data), _PIECE_BYTES)
        pieces = [self._pool.submit(shard.store, offset + s, data[s : s + _PIECE_BYTES]) for s in starts]
        self._on_the_way.append((name, pieces))
        while sum(len(pieces) for _, pieces in self._on_the_way) * _PIECE_BYTES > _IN_FLIGHT_BYTES:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        name, pieces = self._on_the_way.popleft()
        try:
            self._digests[name] = [piece.result() for piece in pieces]
        except OSError as error:
            raise OSError(f"cannot write tensor {name!r} below {self.path.parent}: {error.strerror}") from error

    def written(self) -> HFReader:
        """Finish the files and open them, still under their temporary name, for checks. No tensor can follow."""
        self._finish()
        return HFReader(self._temporary)

    def verify(self) -> None:
        """Finish the files, open them as any reader would, and compare each tensor's bytes with those handed to `add`.

        ValueError with the tensor's name where dtype, shape or a byte differs, or a tensor is missing or too many.
        """
        written = self.written()
        entries = {name: entry for shard in self._shards for name, entry in shard.entries.items()}
        expected = {name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
        if {name: (written.dtype(name), written.shape(name)) for name in written.names} != expected:
            raise ValueError(f"{self.path} does not hold the tensors written to it; check the disk and convert again")
        places = [place for shard in self._shards for place in shard.pieces()]
        found = self._pool.map(lambda place: xxh3_64_intdigest(_read_piece(*place[1:])), places)
        digests: dict[str, list[int]] = {}
        bar = tqdm(total=sum(place[-1] for place in places), unit="B", unit_scale=True, desc="verify")
        for (name, *_, size), digest in zip(places, found, strict=True):
            digests.setdefault(name, []).append(digest)
            bar.update(size)
        bar.close()
        for name, expected_digests in self._digests.items():
            if digests.get(name, []) != expected_digests:
                raise ValueError(
                    f"{self.path}: {name!r} is not in the files as it was written; check the disk and convert again"
                )

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        while self._on_the_way:
            self._wait_for_first()
        self._refuse_wrong_config()
        weight_map = {}
        for i, shard in enumerate(self._shards, start=1):
            shard.finish()
            name = SINGLE if len(self._shards) == 1 else f"model-{i:05d}-of-{len(self._shards):05d}.safetensors"
            shard.path = shard.path.rename(self._temporary / name)
            weight_map |= dict.fromkeys(shard.entries, name)
        if len(self._shards) > 1:
            total_size = sum(shard.size for shard in self._shards)
            _write_json(self._temporary / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
        _write_json(self._temporary / CONFIG, self.config)
        for file in self._like.side_files() if self._like else ():
            (self._temporary / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._like.path / file, self._temporary / file)
        for name, content in self.side_files.items():
            _write_json(self._temporary / name, content)

    def _refuse_wrong_config(self) -> None:
        """A config with another precision than the weights makes every engine read noise, without an error."""
        if not self._shards:
            raise ValueError(f"no tensor was added to {self.path}")
        fp8_dtypes = [_DTYPE_NAMES[dtype] for dtype in FP8_DTYPES]
        fp8_names = [n for shard in self._shards for n, e in shard.entries.items() if e["dtype"] in fp8_dtypes]
        if bool(fp8_names) != ("quantization_config" in self.config):
            found = f"{len(fp8_names)} FP8 tensors" if fp8_names else "no FP8 tensor"
            raise ValueError(f"{self.path} would hold {found} but its config.json would say otherwise")


class _Shard:
    """One safetensors file while it is written: data first, the header into its reserved room at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.entries = path, 0, {}
        self._header_bytes = len(self._header())
        self.file = path.open("wb")

    def has_room(self, name: str, tensor: Tensor, shard_bytes: int) -> bool:
        full = self.size + tensor.nbytes > shard_bytes
        misaligned = self.size % tensor.element_size()  # torch could not map it from there
        header_full = self._header_bytes + self._entry_bytes(name, self._entry(tensor)) > _DATA_START - 8
        return not self.entries or not (full or misaligned or header_full)

    def reserve(self, name: str, tensor: Tensor) -> int:
        """Enter the tensor in the header; returns where in the file its bytes belong."""
        entry = self._entry(tensor)
        self.entries[name] = entry
        self._header_bytes += self._entry_bytes(name, entry)
        self.size += tensor.nbytes
        return _DATA_START + entry["data_offsets"][0]

    def store(self, offset: int, data: np.ndarray) -> int:
        """Write bytes, uint8 [n], at their place in the file; returns their digest. Called from several threads."""
        view = memoryview(data)
        while view:  # a disk that is nearly full takes a part
            count = os.pwrite(self.file.fileno(), view, offset)
            view, offset = view[count:], offset + count
        return xxh3_64_intdigest(data)

    def finish(self) -> None:
        header = self._header().ljust(_DATA_START - 8)
        self.file.write(struct.pack("<Q", len(header)) + header)
        self.file.close()

    def pieces(self) -> Iterator[tuple[str, Path, int, int]]:
        """Tensor's name, file, place and size of each piece that was stored, as the finished file's header has them."""
        with self.path.open("rb") as file:
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(header_bytes))
        for name in self.entries:
            start, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
            for place in range(start, end, _PIECE_BYTES):
                yield name, self.path, place, min(_PIECE_BYTES, end - place)

    def _entry(self, tensor: Tensor) -> dict:
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{tensor.dtype} cannot be written; known: {', '.join(map(str, _DTYPE_NAMES))}")
        offsets = [self.size, self.size + tensor.nbytes]
        return {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    @staticmethod
    def _entry_bytes(name: str, entry: dict) -> int:
        return len(json.dumps({name: entry}).encode())

    def _header(self) -> bytes:
        return json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()


def _bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, uint8 [nbytes]."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _read_piece(file: Path, place: int, size: int) -> bytes:
    with file.open("rb") as stream:
        return os.pread(stream.fileno(), size, place)


def qwen2_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Qwen2ForCausalLM, in the order of the network."""
    h, q, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, h)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = (h,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{layer}self_attn.{part}_proj.weight"] = (rows, h)
            tensors[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        tensors[layer + "self_attn.o_proj.weight"] = (h, q)
        tensors[layer + "post_attention_layernorm.weight"] = (h,)
        tensors[layer + "mlp.gate_proj.weight"] = tensors[layer + "mlp.up_proj.weight"] = (shape.ffn, h)
        tensors[layer + "mlp.down_proj.weight"] = (h, shape.ffn)
    tensors["model.norm.weight"] = (h,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, h)
    return tensors


def is_fp8_linear(name: str) -> bool:
    """Whether the recipe holds this tensor in FP8: the linear weights of the transformer blocks, nothing else."""
    return _FP8_LINEAR.fullmatch(name) is not None


def scale_name(name: str) -> str:
    return name + _SCALE


def _is_scale(name: str) -> bool:
    return name.endswith(_SCALE)


def kept_in_bf16(shape: Shape, name: str) -> set[str]:
    """The linear weights of the blocks that precision `name` leaves in BF16."""
    return {
        tensor
        for tensor in filter(is_fp8_linear, qwen2_tensors(shape))
        if precision.keeps_in_bf16(name, shape.layers, int(tensor.split(".")[2]), ".self_attn." in tensor)
    }


def read_scales(reader: HFReader, name: str) -> Tensor:
    """The inverse scales of the FP8 weight `name`, float32, whatever type they are stored in."""
    return reader.tensor(scale_name(name)).to(torch.float32)


def fp8_quantization_config(scale_fmt: str, kept: Iterable[str] = ()) -> dict:
    """config.json's `quantization_config` for 128x128 E4M3 weights; `kept` are the linear weights that stay in BF16.

    "ue8m0" is the published word for power-of-two scales. FP32 scales have no word that all engines accept
    (transformers says "float", slime refuses it), but all take its absence for them.
    """
    config = {
        "quant_method": "fp8",
        "fmt": fp8.E4M3.name,
        "activation_scheme": "dynamic",
        "weight_block_size": list(fp8.BLOCK),
        "modules_to_not_convert": ["lm_head", *_modules(kept)],
    }
    return config | {"scale_fmt": "ue8m0"} if scale_fmt == "pow2" else config


def _modules(weights: Iterable[str]) -> list[str]:
    """The modules of these linear weights, and after each group the merged one by which SGLang knows it."""
    modules = sorted(name.removesuffix(".weight") for name in weights)
    merged = {re.sub(r"\.[qkv]_proj$", ".qkv_proj", re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", m)) for m in modules}
    return sorted({*modules, *merged})


def modules_left_out(config: dict) -> list[str] | None:
    """The modules that engines do not read as FP8, as config.json names them; None where it leaves that to them."""
    quantisation = config["quantization_config"]
    return quantisation.get("modules_to_not_convert", quantisation.get("ignored_layers"))


def stored_scale_format(reader: HFReader) -> str:
    """`scale_format_of` a folder; scales that are stored as exponents are powers of two, whatever it says."""
    stated = scale_format_of(reader.config)
    exponents = any(reader.dtype(name) == torch.float8_e8m0fnu for name in reader.names)
    return "pow2" if exponents else stated


def scale_format_of(config: dict) -> str:
    """The scale format, "pow2" or "fp32", that config.json states. ValueError for any other kind of quantisation."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise ValueError("config.json has no quantization_config; expected a block-scaled FP8 model")
    expected = {"quant_method": "fp8", "weight_block_size": list(fp8.BLOCK)}
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(f"quantization_config.{key} is {found.get(key)!r}; this tool reads {value!r}")
    if found.get("fmt", fp8.E4M3.name) != fp8.E4M3.name:
        raise ValueError(f"quantization_config.fmt is {found['fmt']!r}; this tool reads {fp8.E4M3.name!r}")
    formats = {"ue8m0": "pow2", "float": "fp32", None: "fp32"}
    if (word := found.get("scale_fmt")) not in formats:
        raise ValueError(f"quantization_config.scale_fmt is {word!r}; known: 'ue8m0', 'float', or no such key")
    return formats[word]


def set_dtype(config: dict, dtype: str) -> None:
    """State the dtype of the weights that are not FP8, under the key that this config.json uses."""
    # transformers wrote "torch_dtype" before its release 5; engines read both, each in its own order.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = dtype


def refuse_mixed_scales(reader: HFReader, scale_fmt: str) -> None:
    """ValueError, with the tensor's name, unless all scales are positive and of the format that config.json states."""
    for name in filter(_is_scale, reader.names):
        refuse_wrong_scales(name, read_scales(reader, name.removesuffix(_SCALE)), scale_fmt)


def refuse_wrong_scales(name: str, scale_inv: Tensor, scale_fmt: str) -> None:
    """ValueError unless `scale_inv`, float32 of any shape, holds positive numbers of the format `scale_fmt`.

    A tensor of FP32 scales may by chance hold only powers of two, so that counts only from 8 scales other than 1 on.
    """
    if not (torch.isfinite(scale_inv) & (scale_inv > 0)).all():
        raise ValueError(f"{name!r} holds scales that are not positive numbers; cast the model again")
    is_pow2 = fp8.is_power_of_two(scale_inv)
    if scale_fmt == "pow2" and not is_pow2:
        raise ValueError(f"{name!r} holds FP32 scales, but config.json says 'ue8m0', powers of two")
    if scale_fmt == "fp32" and is_pow2 and (scale_inv != 1).sum() >= 8:
        raise ValueError(
            f"{name!r} holds power-of-two scales, but config.json states FP32 ones; if all are powers of two, "
            'add "scale_fmt": "ue8m0" to its quantization_config'
        )


def fp8_tensors(name: str, tensor: Tensor, scale_fmt: str) -> dict[str, Tensor]:
    """The tensors that stand in an FP8 model for `tensor`: a block linear's codes and scales, any other one in BF16.

    tensor: [...] of a weight dtype, on any device. NaN or Inf is a ValueError with the tensor's name.
    """
    # Training quantises the BF16 copy of its FP32 masters; quantising the masters would change 3 % of the codes.
    if not is_fp8_linear(name):
        return {name: bf16_tensor(name, tensor)}
    tensor = tensor.to(torch.bfloat16)
    codes, scale_inv = fp8.quantize(tensor, fp8.BLOCK, scale_fmt=scale_fmt, name=name)
    return {name: codes, scale_name(name): scale_inv}


def bf16_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor in BF16. NaN or Inf is a ValueError with its name."""
    tensor = tensor.to(torch.bfloat16)
    fp8.refuse_non_finite(tensor, name)
    return tensor


def rounding_error(
    name: str, weight: Tensor, codes: Tensor, scale_inv: Tensor, *, every: int = 1
) -> tuple[float, float]:
    """Sums of squares of the error of codes and scales, and of BF16(weight) itself; all [M, K] but the scales.

    Takes every `every`-th row of blocks. ValueError with the tensor's name where a row is off by more than FP8 rounds.
    """
    sums = []
    for i in range(0, len(scale_inv), every):
        rows = slice(128 * i, 128 * (i + 1))
        exact = weight[rows].to(torch.bfloat16).float().view(-1)
        error = fp8.dequantize(codes[rows], scale_inv[i : i + 1], fp8.BLOCK).view(-1).sub_(exact)
        noise, signal = torch.dot(error, error).item(), torch.dot(exact, exact).item()
        # E4M3 keeps 3 mantissa bits, so each value is off by at most 2^-4 of itself. What is so small that it is off
        # by more adds nothing beside its block's largest value.
        if not noise <= signal * 2**-8:
            off = math.sqrt(noise / signal) if signal else math.inf
            raise ValueError(f"{name!r} is off by {off:.2%} in rows {rows.start} to ...+127")
        sums.append((noise, signal))
    return tuple(map(math.fsum, zip(*sums, strict=True)))


def trained_scale_format(config: dict) -> str | None:
    """The scale format, "pow2" or "fp32", of the FP8 training that config.json records; None where it records none.

    tools/convert_torch_dist_to_hf.py writes the record, the key "infir2".
    """
    record = config.get(RECORD) or {}
    found = record.get("trained_scale_fmt") if isinstance(record, dict) else record
    if found is not None and found not in fp8.SCALE_FORMATS:
        raise ValueError(
            f"config.json's {RECORD}.trained_scale_fmt is {found!r}; known: {', '.join(fp8.SCALE_FORMATS)}, null"
        )
    return found


def trained_precision(config: dict) -> str | None:
    """The precision that config.json records of training where that kept linear layers of the blocks in BF16; None
    where it records none. ValueError for one that has no name here: which layers those are is not known."""
    record = config.get(RECORD)
    found = record.get("precision") if isinstance(record, dict) else None
    if found is not None and found not in precision.PRECISIONS:
        raise ValueError(
            f"config.json's {RECORD}.precision is {found!r}: which layers were trained in BF16 is not known; name the "
            "precision that comes nearest with --precision"
        )
    return found


def mixing_error(weight: Tensor, trained: str, wanted: str) -> tuple[float, float]:
    """What scale format `wanted` does to weights [M, K] that were trained in FP8 with the format `trained`.

    Norms relative to the weights that training computed with, T = dequantised Q_trained(BF16(weight)):
    of the second rounding, Q_wanted(T) - T, and of the distance of what would be served, Q_wanted(BF16(weight)) - T.
    """

    def rounded(x: Tensor, scale_fmt: str) -> Tensor:
        return fp8.fake_quantize(x, fp8.BLOCK, scale_fmt=scale_fmt, out_dtype=torch.float32)

    weight = weight.to(torch.bfloat16)
    used = rounded(weight, trained)
    results = (rounded(used.to(torch.bfloat16), wanted), rounded(weight, wanted))
    return tuple(((result - used).norm() / used.norm()).item() if used.any() else 0.0 for result in results)


def refuse_mixed_formats(where: str, name: str, weight: Tensor, trained: str, wanted: str) -> None:
    """ValueError, with the error that it would add to `weight`, where the formats of scales differ."""
    if trained == wanted:
        return
    second_rounding, distance = mixing_error(weight, trained, wanted)
    raise ValueError(
        f"{where} was trained in FP8 with {trained} scales, {wanted} ones are asked for. Measured on {name}: a second "
        f"rounding, {second_rounding:.2%} relative weight error, and weights {distance:.2%} away from those that "
        f"training computed with; take SCALE_FMT={trained}"
    )


def check_qwen2(reader: HFReader, *, in_fp8: bool) -> Shape:
    """The network's shape, after checking that the folder holds exactly its tensors.

    in_fp8 says what is expected: block linears in E4M3 with their scales (some may be in a weight dtype, without any)
    and the rest in a weight dtype, or all in a weight dtype (BF16, FP16, FP32). A tied head may be present if it equals
    the embedding. Refused with the tensor's name: another architecture, a missing or an unknown tensor, a shape that
    config.json contradicts, a dtype that is not expected.
    """
    shape = Shape.from_config(reader.config, reader.path / CONFIG)
    expected = {name: (size, WEIGHT_DTYPES) for name, size in qwen2_tensors(shape).items()}
    if shape.tied and HEAD in reader:
        expected[HEAD] = expected[EMBEDDING]
    if in_fp8:
        for name in [name for name in expected if is_fp8_linear(name) and _claims_fp8(reader, name)]:
            size = expected[name][0]
            expected[name] = (size, (fp8.E4M3.dtype,))
            expected[scale_name(name)] = (fp8.scale_shape(size, fp8.BLOCK), SCALE_DTYPES)
        if not any(map(_is_scale, expected)):
            raise ValueError(f"{reader.path}/{CONFIG} has a quantization_config, but no tensor is FP8; remove it")
    elif in_fp8_already := [n for n in reader.names if reader.dtype(n) in FP8_DTYPES or _is_scale(n)]:
        raise ValueError(
            f"{reader.path} is FP8 already: it holds {in_fp8_already[0]!r}. Take the model that it was cast from, or "
            "cast it back with tools/fp8_cast_bf16.py"
        )
    elif "quantization_config" in reader.config:
        raise ValueError(f"{reader.path}/{CONFIG} has a quantization_config, but no tensor is FP8; remove one of them")
    _refuse_other_tensors(reader, expected)
    _refuse_other_head(reader, shape)
    return shape


def _claims_fp8(reader: HFReader, name: str) -> bool:
    """Whether a linear is FP8, or has what only an FP8 one has."""
    return name not in reader or scale_name(name) in reader or reader.dtype(name) in FP8_DTYPES


def _refuse_other_head(reader: HFReader, shape: Shape) -> None:
    """ValueError where config.json ties the head to the embedding, and the folder holds another head: readers would
    throw it away, or read it, each as it likes."""
    if not shape.tied or HEAD not in reader:
        return
    head, embedding = reader.tensor(HEAD), reader.tensor(EMBEDDING)
    if not torch.equal(head, embedding.to(head.dtype)):
        raise ValueError(
            f"{reader.path}/{CONFIG} says tie_word_embeddings, but {HEAD!r} is not {EMBEDDING!r}; set "
            "tie_word_embeddings to false if the head is meant, or remove the tensor"
        )


def _refuse_other_tensors(
    reader: HFReader, expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
) -> None:
    if missing := [name for name in expected if name not in reader]:
        raise ValueError(f"{reader.path} lacks {missing[0]!r} ({len(missing)} missing) that its config.json implies")
    if unknown := [name for name in reader.names if name not in expected]:
        raise ValueError(f"{reader.path} holds {unknown[0]!r} ({len(unknown)} such), which its config.json rules out")
    for name, (size, dtypes) in expected.items():
        if reader.shape(name) != size:
            raise ValueError(f"{name!r} has shape {reader.shape(name)}; {reader.path}/{CONFIG} implies {size}")
        if reader.dtype(name) not in dtypes:
            expected_types = " or ".join(map(str, dtypes))
            raise ValueError(f"{reader.path}: {name!r} is {reader.dtype(name)}; expected {expected_types}")


def _read_header(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor in a safetensors file, whose size must be what its header says."""
    try:
        with safe_open(file, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.offset_keys()}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"{file} ({size} bytes) is truncated or damaged: {error}; fetch it again") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} has type {dtype}; known: {', '.join(DTYPES)}")
    return {name: (DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a Hugging Face model folder")
    return _parse_json(file.read_bytes(), file)


def _parse_json(text: bytes, file: Path) -> dict:
    """A JSON object. A repeated key is an error: Python would keep the last one, other readers the first."""

    def refuse_repeats(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        if repeated := [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []:
            raise ValueError(f"{repeated[0]!r} appears twice")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=refuse_repeats)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds JSON of type {type(parsed).__name__}; expected an object")
    return parsed


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
