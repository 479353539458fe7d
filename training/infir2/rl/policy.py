"""The model that is trained by reinforcement learning, on one rank: Megatron's model, optimizer and checkpoints, as in
pre-training and fine-tuning (infir2.engine); log-probabilities, steps, and its weights for the engines. Needs Megatron.

Every method is collective: all ranks call it with the same arguments.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch import Tensor

from infir2 import engine, hf, packing, preflight, qwen2
from infir2.packed_model import to_device
from infir2.rl.grpo import Objective, TokenLogprobs
from infir2.rl.rollout import Batch
from infir2.sft import PackedBatches


class _Batches(PackedBatches):
    """Packs of a Batch, each with the place of every trained position in the batch's response tokens, -1 elsewhere."""

    def __next__(self) -> tuple[packing.Pack, np.ndarray]:
        if not self._left:
            self._plan()
        chosen = self._left[0]
        pack = super().__next__()
        places = np.full(len(pack.tokens), -1, dtype=np.int64)
        for start, index in zip(pack.boundaries, chosen, strict=False):
            first, last = self.samples.boundaries[index : index + 2]
            begin = start + self.samples.prompts[index] - 1
            places[begin : begin + last - first] = np.arange(first, last)
        return pack, places


class Policy:
    """Built from a stage's parsed arguments; starts, resumes and hands over as every stage does."""

    def __init__(self, args: Namespace, start: preflight.Start, kind: str, scale_fmt: str, objective: Objective):
        self.args, self.scale_fmt, self.objective = args, scale_fmt, objective
        self.model, self.optimizer, self.scheduler, self.config = _build(args, start, kind, scale_fmt)
        self.temperature = args.rollout_temperature
        self.run = training.get_forward_backward_func()
        self.shape = preflight.shape_of_flags(args)
        self.iteration = args.iteration

    # Training

    def log_probabilities(self, batch: Batch) -> np.ndarray:
        """Of every response token under the present weights, float32 [tokens], on every rank."""
        step = _Step(batch, self.objective, self.temperature)
        machine = get_rerun_state_machine()
        mode = machine.get_mode()
        machine.set_mode(RerunMode.DISABLED)
        with torch.no_grad():
            self._forward(step, [np.arange(len(batch))], forward_only=True)
        machine.set_mode(mode)
        return step.gathered()

    def train(self, batch: Batch) -> tuple[dict[str, float], np.ndarray]:
        """One pass over the batch, --global-batch-size samples to an update: means over tokens, and the trainer's
        log-probability of each token before the update that it was in, float32 [tokens]."""
        step = _Step(batch, self.objective, self.temperature)
        size = self.args.global_batch_size
        shares = [np.arange(start, start + size) for start in range(0, len(batch), size)]
        data = self._data(batch, shares)
        metrics: dict[str, list[float]] = {}
        for model in self.model:
            model.train()
        for _ in shares:
            self.args.curr_iteration = self.iteration
            losses, skipped, _, _, _, norm, *_ = training.train_step(
                step.forward, data, self.model, self.optimizer, self.scheduler, self.config, self.run, self.iteration
            )
            if skipped:
                raise RuntimeError("the optimizer refused the step: a gradient is not a finite number")
            for name, value in {**losses, "grad norm": norm, "learning rate": self._learning_rate()}.items():
                metrics.setdefault(name, []).append(float(value))
        self.iteration += 1
        return {name: float(np.mean(values)) for name, values in metrics.items()}, step.gathered()

    def _learning_rate(self) -> float:
        return training.get_canonical_lr_for_logging(self.optimizer.param_groups)

    def _data(self, batch: Batch, shares: list[np.ndarray]) -> RerunDataIterator:
        args = self.args
        batches = _Batches(
            batch,
            lambda step: shares[step],
            rank=mpu.get_data_parallel_rank(),
            ranks=mpu.get_data_parallel_world_size(),
            tensor_parallel=args.tensor_model_parallel_size,
            context_parallel=args.context_parallel_size,
            budget=args.max_tokens_per_gpu * args.context_parallel_size,
            size=args.micro_batch_size,
        )
        return RerunDataIterator(batches)

    def _forward(self, step: "_Step", shares: list[np.ndarray], *, forward_only: bool) -> None:
        for model in self.model:
            model.eval()
        self.run(
            forward_step_func=step.forward,
            data_iterator=self._data(step.batch, shares),
            model=self.model,
            num_microbatches=1,  # the data says it
            seq_length=self.args.seq_length,
            micro_batch_size=1,
            decoder_seq_length=None,
            forward_only=forward_only,
        )

    def save(self, iteration: int) -> None:
        """A checkpoint, complete when this returns."""
        training.save_checkpoint_and_time(iteration, self.model, self.optimizer, self.scheduler, 0, {})

    # Weights

    def weights(self, fp8: bool) -> Iterator[tuple[str, Tensor]]:
        """The model in Hugging Face's names, whole tensors on every rank: BF16, or codes and scales of the block
        linears. Codes are those that the next forward pass makes: both quantise the BF16 weights, tile by tile."""
        tp, group = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_group()
        parameters = {_canonical(name): p.detach() for name, p in unwrap_model(self.model)[0].named_parameters()}
        for entry in qwen2.entries(qwen2.shard(self.shape, tp)):
            for name, shard in zip(entry.hf, entry.split(parameters.pop(entry.megatron)), strict=True):
                tensors = hf.fp8_tensors(name, shard, self.scale_fmt) if fp8 else {name: shard.to(torch.bfloat16)}
                for part, tensor in tensors.items():
                    yield part, _gathered(tensor, qwen2.sharded_dimension(name), tp, group)
        if parameters:
            raise RuntimeError(f"parameters that no Hugging Face tensor holds: {sorted(parameters)}")


def _build(args: Namespace, start: preflight.Start, kind: str, scale_fmt: str):
    """Model, optimizer, scheduler and config, as `megatron.training.pretrain` makes them."""
    training.initialize_megatron()
    training.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    config, proof = engine.model_config(args, kind, scale_fmt)
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    engine.restore_masters(args, proof.models, start)
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = training.finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = model[0].no_sync
    return model, optimizer, scheduler, config


_LOCAL_NORMS = {  # where Megatron's local layers keep what TransformerEngine's linear layers hold
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def _canonical(name: str) -> str:
    for local, checkpoint in _LOCAL_NORMS.items():
        if name.endswith(local):
            return name.removesuffix(local) + checkpoint
    return name


def _gathered(tensor: Tensor, dimension: int | None, size: int, group) -> Tensor:
    """The whole tensor from each tensor-parallel rank's part of it. Bytes are gathered: NCCL knows no FP8."""
    if size == 1 or dimension is None:
        return tensor
    ours = tensor.contiguous()
    parts = [torch.empty_like(ours) for _ in range(size)]
    torch.distributed.all_gather([p.view(torch.uint8) for p in parts], ours.view(torch.uint8), group=group)
    if tensor.element_size() > 1:
        return torch.cat(parts, dim=dimension)
    return torch.cat([p.view(torch.uint8) for p in parts], dim=dimension).view(tensor.dtype)


class _Step:
    """Forward passes over a batch: the loss of each micro-batch, and the log-probabilities that they see."""

    def __init__(self, batch: Batch, objective: Objective, temperature: float) -> None:
        self.batch, self.objective, self.temperature = batch, objective, temperature
        self.rollout, self.advantages = (_to_device(x) for x in (batch.rollout, batch.advantages))
        self.old = None if batch.old is None else _to_device(batch.old)
        self.seen = torch.zeros_like(self.rollout)

    def forward(self, data_iterator, model) -> tuple:
        """One micro-batch, as Megatron's schedules call it."""
        pack, places = next(data_iterator)
        arguments, _, packed = to_device(pack)
        labels = arguments.pop("labels")
        size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        mine = packing.context_parallel_index(pack.boundaries, size, rank)
        places = torch.from_numpy(places[mine]).cuda(non_blocking=True)
        logits = model(**arguments, packed_seq_params=packed)
        group = mpu.get_tensor_model_parallel_group() if mpu.get_tensor_model_parallel_world_size() > 1 else None
        logprobs, entropy = TokenLogprobs.apply(logits.squeeze(0), labels.squeeze(0), self.temperature, group)
        trained = places >= 0
        at = places[trained]
        self.seen[at] = logprobs.detach()[trained]
        return logprobs, partial(self._loss, trained, at, entropy)

    def _loss(self, trained: Tensor, at: Tensor, entropy: Tensor, logprobs: Tensor) -> tuple:
        """(sum over this micro-batch's tokens, their number, what is logged as sum and number)."""
        new = logprobs[trained]
        old = new.detach() if self.old is None else self.old[at]
        loss, clipped, cut = self.objective.loss(new, old, self.rollout[at], self.advantages[at])
        tokens = trained.sum()
        sums = {
            "policy loss": loss.detach(),
            "entropy": entropy[trained],
            "clipped": clipped,
            "tis clipped": cut,
            "policy kl": torch.expm1(new.detach() - old) - (new.detach() - old),
        }
        logged = {name: torch.stack([values.float().sum(), tokens.float()]) for name, values in sums.items()}
        return loss.sum(), tokens.to(torch.int), logged

    def gathered(self) -> np.ndarray:
        """What all ranks saw: each token on one data- and context-parallel rank."""
        torch.distributed.all_reduce(self.seen, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return self.seen.cpu().numpy()


def _to_device(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).cuda()  # a copy: Ray's arrays are read-only
