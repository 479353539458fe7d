"""The step of fine-tuning: one packed micro-batch through the model, loss and greedy answers. Needs Megatron."""

import time

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import get_args, get_tensorboard_writer, get_timers, print_rank_last
from torch import Tensor

from infir2 import packing
from infir2.language_model import flush_tensorboard, run_model


def to_device(batch: packing.Pack) -> tuple[dict[str, Tensor], Tensor, PackedSeqParams]:
    """The model's arguments (tokens, positions, labels; int64 [1, T]), the mask (float32 [1, T]), and the boundaries.

    T is this context-parallel rank's share of the pack.
    """
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    mine = packing.context_parallel_index(batch.boundaries, size, rank)

    def shared(values) -> Tensor:
        return torch.from_numpy(values[mine])[None].cuda(non_blocking=True)

    boundaries = torch.from_numpy(batch.boundaries).cuda(non_blocking=True)
    longest = int((batch.boundaries[1:] - batch.boundaries[:-1]).max())
    padded = boundaries if size > 1 else None  # TransformerEngine asks for both under context parallelism
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    arguments = {
        "input_ids": shared(batch.tokens),
        "position_ids": shared(batch.position),
        "labels": shared(batch.labels),
        "attention_mask": None,
    }
    return arguments, shared(batch.mask), packed


class Meter:
    """What one step's packing was: tokens of samples and tokens computed, and the seconds that the data took."""

    def __init__(self) -> None:
        self.iteration, self.real, self.computed, self.seconds = -1, 0, 0, 0.0

    def add(self, iteration: int, batch: packing.Pack, seconds: float) -> None:
        if iteration != self.iteration:
            self._log()
            self.iteration, self.real, self.computed, self.seconds = iteration, 0, 0, 0.0
        self.real += batch.real
        self.computed += len(batch.tokens)
        self.seconds += seconds

    def _log(self) -> None:
        writer = get_tensorboard_writer()
        if writer is None or self.iteration < 0:
            return
        writer.add_scalar("packing/efficiency", self.real / self.computed, self.iteration + 1)
        writer.add_scalar("packing/seconds", self.seconds, self.iteration + 1)


_meter = Meter()


def forward_step(data_iterator, model):
    """One micro-batch through `model`: the per-token losses, and the function that sums them."""
    args = get_args()
    flush_tensorboard(args.curr_iteration)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    started = time.perf_counter()
    batch = next(data_iterator)
    arguments, mask, packed = to_device(batch)
    if model.training:
        _meter.add(args.curr_iteration, batch, time.perf_counter() - started)
    timers("batch-generator").stop()
    return run_model(model, mask, **arguments, packed_seq_params=packed)


def exact_match(model, batches) -> tuple[int, int] | None:
    """Of how many samples greedy decoding gives the trained tokens exactly: (those, all).

    Greedy decoding, given the prompt, yields the reference if and only if at every trained place the reference's token
    is the most likely one after the reference so far. So one forward pass over the references decides it.
    """
    found = torch.zeros(2, dtype=torch.int64, device="cuda")
    for _ in range(batches.micro_batches()):
        batch = next(batches)
        arguments, mask, packed = to_device(batch)
        labels = arguments.pop("labels")
        with torch.no_grad():
            logits = model(**arguments, packed_seq_params=packed)
        wrong = (_argmax(logits) != labels) & (mask > 0)
        found += _count(wrong[0], mask[0] > 0, batch)
    torch.distributed.all_reduce(found, group=mpu.get_data_parallel_group())
    return tuple(found.tolist())


def _argmax(logits: Tensor) -> Tensor:
    """The most likely token, int64 [1, T], of logits [1, T, vocabulary / TP]; the first of equals."""
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    value, index = logits.float().max(dim=-1)
    index = index + rank * logits.shape[-1]
    if size == 1:
        return index
    values = [torch.empty_like(value) for _ in range(size)]
    indices = [torch.empty_like(index) for _ in range(size)]
    torch.distributed.all_gather(values, value.contiguous(), group=mpu.get_tensor_model_parallel_group())
    torch.distributed.all_gather(indices, index.contiguous(), group=mpu.get_tensor_model_parallel_group())
    best = torch.stack(values).argmax(dim=0, keepdim=True)
    return torch.stack(indices).gather(0, best)[0]


def _count(wrong: Tensor, trained: Tensor, batch: packing.Pack) -> Tensor:
    """(samples without a wrong token, samples with a trained one) of a pack; wrong, trained: bool, this rank's [T]."""
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    mine = torch.from_numpy(packing.context_parallel_index(batch.boundaries, size, rank))
    sample = torch.bucketize(mine, torch.from_numpy(batch.boundaries[1:]).long(), right=True).to(wrong.device)
    counts = torch.zeros(2, len(batch.boundaries) - 1, dtype=torch.int64, device=wrong.device)
    counts[0].index_add_(0, sample, wrong.long())
    counts[1].index_add_(0, sample, trained.long())
    torch.distributed.all_reduce(counts, group=mpu.get_context_parallel_group())
    has_target = counts[1] > 0
    return torch.stack([(has_target & (counts[0] == 0)).sum(), has_target.sum()])


def log_exact_match(found: tuple[int, int], iteration: int, writer) -> None:
    """Called by Megatron on the last rank, with the result of `exact_match`."""
    share = found[0] / found[1]
    writer.add_scalar("exact match validation", share, iteration)
    print_rank_last(f" exact match at iteration {iteration}: {found[0]} of {found[1]} ({share:.1%})")
