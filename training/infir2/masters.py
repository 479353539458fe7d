"""FP32 master weights at a hand-off: a stage starts from its parent's masters, not from their rounding to BF16.

Megatron's `--pretrained-checkpoint` loads BF16 weights and derives masters from them; what the parent learned below
BF16's resolution is lost (RL steps at a learning rate of 1e-6 are of that size). This reads the named masters of a
checkpoint, whichever optimizer wrote them, at any tensor, pipeline and data parallelism.
"""

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import extract_sharded_tensors_and_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from infir2.checkpoint import CheckpointError, TorchDist


def load_masters(models: list, path: Path | str) -> int:
    """Set the optimizer's FP32 masters from the checkpoint at `path`; returns how many tensors came from masters.

    `models`: Megatron's list of wrapped model chunks, its weights already loaded from the same checkpoint. A
    weights-only checkpoint in FP32 counts as masters; one in BF16 is left as it is (0 is returned). Collective over all
    ranks. Refuses flat optimizer buckets, which have no names, and masters that do not round to the loaded weights.
    """
    stored = TorchDist(path)
    wanted = {}
    for base in (base for model in models for base in _sharded_parameters(model)):
        source = stored.master(base.key)
        if source is None and stored.dtype(base.key) != torch.float32:
            continue
        buffer = torch.empty(base.data.shape, dtype=torch.float32, device=base.data.device)
        changes = {"key": source or base.key, "data": buffer}
        if isinstance(base, ShardedTensor):
            changes["dtype"] = torch.float32
        wanted[base.data] = replace(base, **changes)
    if not wanted:
        return 0
    request = {"masters": dict(enumerate(wanted.values()))}
    loaded = dist_checkpointing.load(request, str(stored.folder))["masters"]
    for number, parameter in enumerate(wanted):
        _set_master(models, parameter, loaded[number])
    return len(wanted)


def _sharded_parameters(model):
    """The model's parameters as Megatron's sharded tensors (or factories of them), each holding the parameter."""
    state = unwrap_model(model).sharded_state_dict()
    bases, _ = extract_sharded_tensors_and_factories(state)
    return [base for base in nested_values(bases) if isinstance(base.data, torch.nn.Parameter)]


def _set_master(models: list, parameter: Tensor, value: Tensor) -> None:
    if not torch.equal(value.to(parameter.dtype), parameter.detach()):
        raise CheckpointError("the checkpoint's FP32 masters do not round to its weights: it is not of one piece")
    master = getattr(parameter, "main_param", None)
    if master is None and not getattr(parameter, "main_param_sharded", False):
        raise CheckpointError("this optimizer keeps no FP32 masters of its own; drop --use-precision-aware-optimizer")
    if master is None:  # another data-parallel rank holds this parameter's shard
        return
    value = value.view(-1)
    if getattr(parameter, "main_param_sharded", False):
        start, end = _shard_range(models, parameter)
        value = value[start:end]
    master.data.view(-1).copy_(value)


def _shard_range(models: list, parameter: Tensor) -> tuple[int, int]:
    """Which flat elements of `parameter` the distributed optimizer keeps on this rank: its bucket in equal parts."""
    for buffer in (buffer for model in models for buffer in model.buffers + model.expert_parallel_buffers):
        if parameter not in buffer.param_index_map:
            continue
        start, end, bucket_index = buffer.param_index_map[parameter]
        bucket = buffer.buckets[bucket_index]
        size = bucket.grad_data.numel() // mpu.get_data_parallel_world_size(with_context_parallel=True)
        first = bucket.offset + mpu.get_data_parallel_rank(with_context_parallel=True) * size
        return max(first - start, 0), min(first + size, end) - start
    raise KeyError("parameter in no gradient buffer")
