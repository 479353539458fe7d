"""One rank of a larger layout on one GPU, to measure its kernels, memory and launches. Communication is left out.

Megatron's --fake-process-group makes the groups of any layout in one process, whose collectives do nothing. Most of
them are right that way; those whose result is larger than what went in would leave memory as it was. `install` makes
these hand out what this rank has, as often as it is needed, so that values stay finite and of the right size.
"""

import contextlib

import torch.distributed as dist
from torch import Tensor


class _Done:
    """The handle of a communication that is over."""

    def wait(self, *_) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _all_gather(output: Tensor, mine: Tensor, group=None, async_op=False):
    output.view(-1, mine.numel()).copy_(mine.reshape(1, -1).clone())  # `mine` may be a part of `output`
    return _Done() if async_op else None


def _reduce_scatter(output: Tensor, parts: Tensor, op=None, group=None, async_op=False):
    output.copy_(parts.reshape(-1)[: output.numel()].view_as(output).clone())  # as above
    return _Done() if async_op else None


def _all_to_all(output: Tensor, mine: Tensor, *sizes, group=None, async_op=False):
    output.view(-1).copy_(mine.reshape(-1)[: output.numel()])
    return _Done() if async_op else None


def _batch_isend_irecv(operations: list) -> list[_Done]:
    """What is sent is what is received, in order."""
    sent = [one.tensor for one in operations if one.op is dist.isend]
    received = [one.tensor for one in operations if one.op is dist.irecv]
    for to, source in zip(received, sent, strict=True):
        to.copy_(source.view_as(to))
    return [_Done()]


def _all_gather_object(every: list, mine: object, group=None) -> None:
    every[:] = [mine] * len(every)


class _Operation:
    """dist.P2POp without its checks of the group."""

    def __init__(self, op, tensor, peer=None, group=None, tag=0, group_peer=None):
        self.op, self.tensor = op, tensor


def install() -> None:
    """Before Megatron makes its groups."""
    dist.all_gather_into_tensor = dist._all_gather_base = _all_gather
    dist.reduce_scatter_tensor = dist._reduce_scatter_base = _reduce_scatter
    dist.all_to_all_single = _all_to_all
    dist.batch_isend_irecv, dist.P2POp = _batch_isend_irecv, _Operation
    dist.all_gather_object = _all_gather_object
    dist.distributed_c10d._coalescing_manager = dist._coalescing_manager = _coalescing


class _Coalescing(_Done):
    def append(self, work) -> None: ...


def _coalescing(group=None, device=None, async_ops=False):
    return contextlib.nullcontext(_Coalescing())
