"""Weights from a trainer into running SGLang engines, and proof that they arrived.

Trainer's side: `WeightSender.send` takes (Hugging Face name, tensor) pairs, FP8 codes and scales included, packs them
into buckets of one flat array each, and hands those to every engine: through CUDA IPC where trainer and engine share a
GPU, through NCCL where they do not. An engine stores bytes; it never quantises.

Engine's side: `load` runs inside SGLang (`--custom-weight-loader infir2.rl.sglang_weights.load`). Through SGLang's own
loader a wrong name is a line in a log, a missing tensor is nothing at all, and a BF16 tensor for an FP8 parameter of
some other model is an assertion that kills the engine. `load` refuses those before it writes, and answers in a file.

Proof: `digest` is a 64-bit sum over a tensor's elements of a hash of place and bits. Any single element that differs
changes it; digests of the parts of a tensor add up to that of the whole. So each tensor-parallel rank of an engine
takes the digests of what it holds, cut back into Hugging Face's tensors (`pieces`), and their sums are compared with
the trainer's.

What SGLang 0.5.17 does with 128x128 FP8 weights on Hopper (sm_90), whatever the GEMM backend: codes and FP32
`weight_scale_inv` stay as they are loaded. Only on Blackwell does DeepGEMM repack the scales
(`should_deepgemm_weight_requant_ue8m0`); `load` refuses such an engine, whose scales are no longer FP32. `scale_fmt` of
config.json is not read for linear layers; activations get FP32 scales whatever it says.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn

LOADER = "infir2.rl.sglang_weights.load"
GROUP = "infir2_weights"
BUCKET_BYTES = 512 * 2**20

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGEST_CHUNK = 1 << 22  # elements hashed at a time; a few int64 arrays of this size are in use
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd: multiplying by them loses nothing


class EngineError(RuntimeError):
    """An engine refused, failed or is gone: which one, and its own words."""


def in_url(host: str) -> str:
    """A host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def call(url: str, path: str, body: Mapping | None = None, seconds: float = 60) -> Any:
    """POST `body` as JSON, or GET without one; returns the answer, parsed where it is JSON. EngineError otherwise."""
    # http.client and not urllib.request: that would use the web's proxy, and read all certificates at each call (0.3 s)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=seconds)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(f"{url}{path} did not answer ({error!r}); its log says why") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise EngineError(f"{url}{path} answered {answer.status}: {text[:2000]}")
    try:
        return json.loads(text)
    except ValueError:
        return text


# Digests


@dataclass(frozen=True)
class Digest:
    """What a tensor is: its dtype ("bfloat16"), shape, and `digest`."""

    dtype: str
    shape: tuple[int, ...]
    value: int

    @classmethod
    def of(cls, tensor: Tensor) -> Digest:
        return cls(dtype_name(tensor), tuple(tensor.shape), digest(tensor))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def digest(part: Tensor, start: tuple[int, int] = (0, 0), columns: int | None = None) -> int:
    """Digest of a tensor, [M] or [M, K] of any dtype, on any device: below 2^64, the same on CPU and GPU.

    A part of a tensor says where it begins, `start`, and how many columns the whole has: the digests of parts that
    make up a tensor add up, modulo 2^64, to its own. Every step of the hash can be undone, so one element that differs
    always changes the sum; several hide each other with a chance of 2^-64.
    """
    if not part.numel():  # of a vocabulary, a rank's part may be all padding
        return 0
    rows = part.detach().reshape(len(part), -1)
    bits = rows.view(_INTEGERS[part.element_size()])
    across = start[1] + torch.arange(rows.shape[1], device=part.device)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    step = max(1, _DIGEST_CHUNK // max(1, rows.shape[1]))
    for top in range(0, len(rows), step):
        chunk = bits[top : top + step].to(torch.int64)
        down = start[0] + top + torch.arange(len(chunk), device=part.device)
        places = down[:, None] * (columns or rows.shape[1]) + across
        total += _mixed(places, chunk).sum()
    return total.item() % 2**64


def _mixed(places: Tensor, bits: Tensor) -> Tensor:
    """A hash of each element's place and bits, int64 [m, k] each. Arithmetic wraps around, as integers of torch do."""
    first, second, third = _FACTORS
    x = places.mul_(first).add_(bits, alpha=second)
    x ^= (x >> 30) & (2**34 - 1)  # torch shifts signs in
    x *= third
    return x.bitwise_xor_((x >> 31) & (2**33 - 1))


def compare(trainer: Mapping[str, Digest], engine: Mapping[str, Digest]) -> None:
    """ValueError, with the names, unless the engine holds the trainer's tensors, all of them, bit for bit."""
    if missing := sorted(trainer.keys() ^ engine.keys()):
        raise ValueError(f"{len(missing)} tensors are in only one of trainer and engine: {missing[:3]}")
    if wrong := [name for name in trainer if trainer[name] != engine[name]]:
        first = wrong[0]
        raise ValueError(
            f"{len(wrong)} of the engine's {len(engine)} tensors are not the trainer's, first {first}: "
            f"{engine[first]}, the trainer has {trainer[first]}"
        )


# Inside the engine


@dataclass(frozen=True)
class Piece:
    """The part of a Hugging Face tensor that an engine's rank holds: `local` [m] or [m, k], a view of its parameter.
    It begins at `start` (row, column) of a tensor of `shape`."""

    name: str
    local: Tensor
    start: tuple[int, int]
    shape: tuple[int, ...]


def pieces(model: nn.Module) -> Iterator[Piece]:
    """All that a rank of an SGLang Qwen2 model holds, as Hugging Face's tensors. Merged projections are cut apart."""
    for module_name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if kind not in ("k_scale", "v_scale"):  # of an FP8 KV cache: constants, in no checkpoint
                yield from _pieces_of(module_name, module, kind, parameter.data)


def _pieces_of(module_name: str, module: nn.Module, kind: str, data: Tensor) -> Iterator[Piece]:
    path, _, last = module_name.rpartition(".")
    prefix = f"{path}." if path else ""
    if last in ("qkv_proj", "gate_up_proj"):
        unit = module.output_size_per_partition // len(data)  # rows for each row of `data`: 128 for scales
        offset = 0
        for part, rows, first, total in _merged_parts(last, module):
            local = data[offset // unit : (offset + rows) // unit]
            shape = (total // unit, *data.shape[1:])
            yield Piece(f"{prefix}{part}_proj.{kind}", local, (first // unit, 0), shape)
            offset += rows
        return
    name = f"{module_name}.{kind}"
    if last in ("o_proj", "down_proj") and data.dim() == 2:
        columns = data.shape[1]
        yield Piece(name, data, (0, module.tp_rank * columns), (len(data), module.tp_size * columns))
    elif hasattr(module, "shard_indices"):  # the vocabulary, padded
        first, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        yield Piece(name, data[: end - first], (first, 0), (module.org_vocab_size, *data.shape[1:]))
    else:
        yield Piece(name, data, (0, 0), tuple(data.shape))


def _merged_parts(last: str, module: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Each projection in a merged one, in order: name, rows that this rank holds, the first of them, rows in all."""
    rank, size = module.tp_rank, module.tp_size
    if last == "gate_up_proj":
        for part, total in zip(("gate", "up"), module.output_sizes, strict=True):
            yield part, total // size, rank * (total // size), total
        return
    queries = module.num_heads * module.head_size
    yield "q", queries, rank * queries, queries * size
    keys = module.num_kv_heads * module.head_size  # more ranks than heads: several hold the same one
    for part in "kv":
        first = rank // module.num_kv_head_replicas * keys
        yield part, keys, first, module.total_num_kv_heads * module.head_size


_ARRIVED = "_infir2_arrived"  # the model's attribute: names of tensors since its last complete sync


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """What SGLang calls, on each tensor-parallel rank. Each name is an order in JSON; its tensor is one flat bucket.

    The answer is a file, one for each rank, because SGLang takes no result from here and an exception would end the
    engine without a word to the sender.
    """
    for words, flat in named_tensors:
        order = json.loads(words)
        try:
            with torch.no_grad():
                answer = _store(model, order, flat) if "tensors" in order else _describe(model, order["digests"])
        except Exception as error:
            setattr(model, _ARRIVED, set())
            answer = {"error": f"{type(error).__name__}: {error}"}
        if flat.is_cuda:
            torch.cuda.synchronize()  # the sender uses its bucket again once we return
        rank = next((module.tp_rank for module in model.modules() if hasattr(module, "tp_rank")), 0)
        _write(Path(order["answers"]) / f"{rank}.json", answer)


def _write(path: Path, answer: dict) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(answer))
    temporary.rename(path)


def _store(model: nn.Module, order: dict, flat: Tensor) -> dict:
    """Check a bucket's tensors against the model, and load them. With the last one, check that none is missing."""
    held = {piece.name: piece for piece in pieces(model)}
    tensors = []
    for name, dtype, shape, first in order["tensors"]:
        if name not in held:
            raise ValueError(f"the engine's model has no tensor {name!r}")
        found = (dtype_name(held[name].local), held[name].shape)
        if found != (dtype, tuple(shape)):
            raise ValueError(f"the engine's {name!r} is {found[0]} {found[1]}; the trainer sent {dtype} {tuple(shape)}")
        element = getattr(torch, dtype)
        data = flat[first : first + math.prod(shape) * element.itemsize]
        tensors.append((name, data.view(element).view(shape)))
    model.load_weights(tensors)
    arrived = getattr(model, _ARRIVED, set()) | {name for name, _ in tensors}
    setattr(model, _ARRIVED, set() if order["last"] else arrived)
    if order["last"]:
        if missing := sorted(held.keys() - arrived):
            raise ValueError(f"the trainer did not send {len(missing)} of {len(held)} tensors: {missing[:3]}")
        _restore_cache_scales(model)
    return {}


def _restore_cache_scales(model: nn.Module) -> None:
    """SGLang keeps the KV cache's scales as parameters, which are lost with the weights' memory and in no checkpoint;
    their values are beside them as numbers."""
    for module in model.modules():
        for kind in ("k_scale", "v_scale"):
            scale, value = getattr(module, kind, None), getattr(module, f"{kind}_float", None)
            if isinstance(scale, Tensor) and value is not None:
                scale.fill_(value)


def _describe(model: nn.Module, with_digests: bool) -> dict:
    """Every piece that this rank holds: name, dtype, whole shape, where it begins, its own elements, its digest."""
    rows = []
    for piece in pieces(model):
        columns = math.prod(piece.shape[1:])
        value = digest(piece.local, piece.start, columns) if with_digests else 0
        rows.append([piece.name, dtype_name(piece.local), piece.shape, piece.start, piece.local.numel(), value])
    return {"pieces": rows}


# Orders to an engine


def describe(url: str, ranks: int, *, digests: bool, seconds: float = 120) -> dict[str, Digest]:
    """What an engine of `ranks` GPUs on this machine holds, by Hugging Face's names (values 0 unless `digests`).

    EngineError where the parts of its ranks do not make up whole tensors.
    """
    with tempfile.TemporaryDirectory(prefix="infir2-sglang-") as folder:
        words = json.dumps({"digests": digests, "answers": folder})
        payload = pickle.dumps([(words, _Rebuilt(torch.Tensor, ()))])
        answers = _order(url, [payload] * ranks, Path(folder), seconds)
    return merge(url, [answer["pieces"] for answer in answers])


def merge(url: str, ranks: Sequence[Sequence[list]]) -> dict[str, Digest]:
    """The pieces of an engine's ranks, put together. Pieces that several ranks hold count once, and must be equal."""
    parts: dict[str, dict[tuple, list]] = {}
    for rows in ranks:
        for row in rows:
            held = parts.setdefault(row[0], {}).setdefault(tuple(row[3]), row)
            if held != row:
                raise EngineError(f"the ranks of {url} hold different {row[0]!r} at {row[3]}")
    whole = {}
    for name, rows in parts.items():
        _, dtype, shape, *_ = next(iter(rows.values()))
        if sum(row[4] for row in rows.values()) != math.prod(shape):
            raise EngineError(f"the ranks of {url} hold only a part of {name!r} {tuple(shape)}")
        whole[name] = Digest(dtype, tuple(shape), sum(row[5] for row in rows.values()) % 2**64)
    return whole


def _order(url: str, payloads: Sequence[bytes], answers: Path, seconds: float) -> list[dict]:
    """Have `load` run on every rank of an engine on this machine; returns the ranks' answers."""
    for old in answers.glob("*.json"):
        old.unlink()
    encoded = [base64.b64encode(payload).decode() for payload in payloads]
    body = {"serialized_named_tensors": encoded, "load_format": LOADER, "flush_cache": False}
    call(url, "/update_weights_from_tensor", body, seconds)
    files = [answers / f"{rank}.json" for rank in range(len(payloads))]
    if missing := [file.name for file in files if not file.exists()]:
        raise EngineError(f"{url} left no answer in {answers}: {missing}; does it run on this machine, with {LOADER}?")
    found = [json.loads(file.read_text()) for file in files]
    if errors := [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(found) if "error" in answer]:
        raise EngineError(f"{url} refused the weights: {errors[0]}")
    return found


class _Rebuilt:
    """Pickles as a call: SGLang unpickles only what comes from torch and the like, none of our own classes."""

    def __init__(self, function, arguments: tuple) -> None:
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _shared(tensor: Tensor) -> _Rebuilt:
    """A handle of a CUDA tensor that another process can open. The GPU is named by its UUID: the engine, which sees
    other GPUs than we do, counts from 0 in its own."""
    from torch.multiprocessing import reductions

    function, arguments = reductions.reduce_tensor(tensor)
    device = arguments[6]
    if isinstance(device, int):
        device = str(torch.cuda.get_device_properties(device).uuid)
    return _Rebuilt(function, (*arguments[:6], device, *arguments[7:]))


# In the trainer


@dataclass(frozen=True)
class Engine:
    """An engine as trainers see it. ranks: the trainer ranks on its GPUs, in the order of its tensor-parallel ranks
    (CUDA_VISIBLE_DEVICES); empty where it has GPUs of its own."""

    url: str
    gpus: int = 1
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sync:
    """What was sent. digests: of every tensor, where they were asked for."""

    tensors: int
    bytes: int
    seconds: float
    digests: dict[str, Digest]


@dataclass
class _Bucket:
    """One flat array, uint8, and what lies where in it."""

    flat: Tensor
    entries: list[tuple[str, str, tuple[int, ...], int]] = field(default_factory=list)
    used: int = 0

    def has_room(self, tensor: Tensor) -> bool:
        # no padding: SGLang's own buckets, used with NCCL, have none; views of other dtypes need aligned starts
        return self.used + tensor.nbytes <= len(self.flat) and self.used % tensor.element_size() == 0

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.entries and tensor.nbytes > len(self.flat):
            self.flat = self.flat.new_empty(tensor.nbytes)
        self.flat[self.used : self.used + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self.entries.append((name, dtype_name(tensor), tuple(tensor.shape), self.used))
        self.used += tensor.nbytes

    def clear(self) -> None:
        self.entries, self.used = [], 0


class WeightSender:
    """Sends a model to engines. Every trainer rank makes one, with the same engines in the same order: that and `send`
    are collective.

    Engines either all share GPUs with trainers or all have their own. `device` is where buckets are made. With NCCL
    (no shared GPUs) rank 0 sends to all engines; `address` is its IP for them; NCCL_CUMEM_ENABLE=0 and
    NCCL_NVLS_ENABLE=0 must be set before its first collective, as SGLang sets them.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        device: str = "cuda",
        bucket_bytes: int = BUCKET_BYTES,
        address: str = "127.0.0.1",
        seconds: float = 300,
    ) -> None:
        if len({bool(engine.ranks) for engine in engines}) != 1:
            raise ValueError(f"engines must all share GPUs with trainers, or none of them: {list(engines)}")
        if wrong := [engine for engine in engines if engine.ranks and len(engine.ranks) != engine.gpus]:
            raise ValueError(
                f"{wrong[0]} has {wrong[0].gpus} GPUs, but {len(wrong[0].ranks)} trainer ranks are on them"
            )
        self._device, self._bucket_bytes = device, bucket_bytes
        rank = dist.get_rank() if dist.is_initialized() else 0
        if engines[0].ranks:
            self._route = _Ipc(engines, rank, seconds)
        else:
            self._route = _Nccl(engines, rank, "nccl" if device == "cuda" else "gloo", address, seconds)

    def send(self, tensors: Iterable[tuple[str, Tensor]], *, digests: bool = False) -> Sync:
        """Send every tensor of the model, whole, under its Hugging Face name, in the dtype that the engine holds.

        The engines must be idle (their KV cache need not be there), and must be flushed afterwards: what they cached is
        of the old weights. Every rank passes the same tensors in the same order, on the sender's device. EngineError on
        every rank of an engine that fails or refuses; its weights are then of no use.
        """
        started, count, size, found = time.perf_counter(), 0, 0, {}
        bucket = _Bucket(torch.empty(self._bucket_bytes, dtype=torch.uint8, device=self._device))
        for name, tensor in tensors:
            if bucket.entries and not bucket.has_room(tensor):
                self._route.push(bucket, last=False)
                bucket.clear()
            bucket.add(name, tensor)
            if digests:
                found[name] = Digest.of(tensor)
            count, size = count + 1, size + tensor.nbytes
        if not count:
            raise ValueError("there is no tensor to send")
        self._route.push(bucket, last=True)
        del bucket
        if self._device == "cuda":
            torch.cuda.ipc_collect()  # the engines have let go of the buckets
        return Sync(count, size, time.perf_counter() - started, found)

    def close(self) -> None:
        """Leave the engines' process group and remove temporary files."""
        self._route.close()


class _Ipc:
    """To the engine on this rank's GPU. Each of its ranks opens the bucket of the trainer rank beside it; the first
    trainer rank of an engine speaks for the others."""

    def __init__(self, engines: Sequence[Engine], rank: int, seconds: float) -> None:
        self._engine, self._group, self._seconds = None, None, seconds
        for engine in engines:
            # making a group is collective: every rank makes them all
            group = dist.new_group(list(engine.ranks), backend="gloo") if len(engine.ranks) > 1 else None
            if rank in engine.ranks:
                self._engine, self._group = engine, group
        self._speaks = self._engine is not None and rank == self._engine.ranks[0]
        folder = [tempfile.mkdtemp(prefix="infir2-sglang-") if self._speaks else ""]
        if self._group is not None:
            dist.broadcast_object_list(folder, self._engine.ranks[0], self._group)
        self._answers = Path(folder[0])

    def push(self, bucket: _Bucket, last: bool) -> None:
        if self._engine is None:
            return
        if bucket.flat.is_cuda:
            torch.cuda.synchronize()
        words = json.dumps({"tensors": bucket.entries, "last": last, "answers": str(self._answers)})
        payloads = self._gathered(pickle.dumps([(words, _shared(bucket.flat))]))
        error = [""]
        if self._speaks:
            try:
                _order(self._engine.url, payloads, self._answers, self._seconds)
            except EngineError as failure:
                error = [str(failure)]
        if self._group is not None:
            dist.broadcast_object_list(error, self._engine.ranks[0], self._group)
        if error[0]:
            raise EngineError(error[0])

    def _gathered(self, payload: bytes) -> list[bytes]:
        if self._group is None:
            return [payload]
        payloads = [None] * len(self._engine.ranks) if self._speaks else None
        dist.gather_object(payload, payloads, self._engine.ranks[0], self._group)
        return payloads

    def close(self) -> None:
        if self._speaks:
            shutil.rmtree(self._answers, ignore_errors=True)


class _Nccl:
    """From rank 0 to all engines at once, through a process group of its own. SGLang's own loader takes the buckets and
    says nothing of a tensor that is unknown or missing: compare what `describe` returns with what is sent."""

    def __init__(self, engines: Sequence[Engine], rank: int, backend: str, address: str, seconds: float) -> None:
        self._engines, self._seconds, self._group = list(engines), seconds, None
        if rank != 0:
            return
        self._pool = ThreadPoolExecutor(len(engines))
        world, offset, bodies = 1 + sum(engine.gpus for engine in engines), 1, []
        meeting = {"master_address": address, "master_port": _free_port(), "world_size": world}
        for engine in engines:
            bodies.append(meeting | {"rank_offset": offset, "group_name": GROUP, "backend": backend})
            offset += engine.gpus
        waiting = self._post("/init_weights_update_group", bodies)
        self._group = join(address, meeting["master_port"], 0, world, backend)
        self._finish(waiting)

    def push(self, bucket: _Bucket, last: bool) -> None:
        if self._group is None:
            return
        names, dtypes, shapes, _ = (list(column) for column in zip(*bucket.entries, strict=True))
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": GROUP, "flush_cache": False}
        waiting = self._post(
            "/update_weights_from_distributed", [body | {"load_format": "flattened_bucket"}] * len(self._engines)
        )
        work = dist.broadcast(bucket.flat[: bucket.used], 0, self._group, async_op=True)
        while not work.is_completed():  # it would wait for ever for an engine that refused
            if any(future.done() and future.exception() for future in waiting):
                self._finish(waiting)
            time.sleep(0.001)
        self._finish(waiting)

    def _post(self, path: str, bodies: Sequence[Mapping]) -> list:
        pairs = zip(self._engines, bodies, strict=True)
        return [self._pool.submit(call, engine.url, path, body, self._seconds) for engine, body in pairs]

    def _finish(self, waiting: list) -> None:
        done, _ = wait(waiting, self._seconds, "FIRST_EXCEPTION")
        for future in done:
            future.result()
        if len(done) < len(waiting):
            raise EngineError(f"an engine did not answer within {self._seconds:g} s")

    def close(self) -> None:
        if self._group is not None:
            waiting = self._post("/destroy_weights_update_group", [{"group_name": GROUP}] * len(self._engines))
            dist.destroy_process_group(self._group)
            self._finish(waiting)
            self._pool.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def join(address: str, port: int, rank: int, world: int, backend: str) -> dist.ProcessGroup:
    """A rank of a process group beside the default one, as SGLang makes it: the same store, prefixes and names."""
    from torch.distributed import distributed_c10d as c10d

    store, rank, world = next(
        c10d.rendezvous(f"tcp://{in_url(address)}:{port}", rank, world, timeout=c10d.default_pg_timeout)
    )
    store = c10d.PrefixStore(GROUP, store)
    group, _ = c10d._new_process_group_helper(
        world, rank, [], c10d.Backend(backend), store, group_name=GROUP, timeout=c10d.default_pg_timeout
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group
