"""The step of pre-training: datasets, one micro-batch, forward and loss. Needs an initialised Megatron.

Megatron's own versions of these live in a script that its wheel does not ship.
"""

import functools
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tensorboard_writer, get_timers, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from infir2.speed import linear_cross_entropy

BATCH = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


class StoredTokens(GPTDataset):
    """Megatron's dataset with every stored token as it is: what lies in the .bin is what the model sees and learns.

    Megatron takes the tokenizer's pad token for padding wherever it stands. Where that is the document end too (as of
    Qwen2.5-Instruct), each document end would become token 0 and its label masked, and the first sample's mask would
    stay in each worker for all later ones (Megatron-LM#1711, #2170). Here padding is an id that no stored token has.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pad_token_id = -1
        self.masks_and_position_ids_are_cacheable = False  # the first sample may be a padded one


class FixedValidation(torch.utils.data.Dataset):
    """Repeats the first `period` samples of a dataset, so that every evaluation sees the same ones."""

    def __init__(self, dataset, period: int, length: int):
        self.dataset, self.period, self.length = dataset, min(period, len(dataset)), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return self.dataset[index % self.period]


def build_datasets(sample_counts, vp_stage: int | None = None):
    """Training, validation and test sets, for `pretrain`'s `datasets_provider`.

    The training set's order depends on how many samples it is asked for. `--data-index-iters` keeps that number at the
    parent run's, so that a branch with another --train-iters still sees the parent's samples in the parent's order.
    """
    args = get_args()
    train, valid, test = sample_counts
    if args.data_index_iters is not None:
        train = args.data_index_iters * args.global_batch_size
    evaluation = args.eval_iters * args.eval_global_batch_size
    print_rank_0("> building the datasets")
    train_set, valid_set, test_set = BlendedMegatronDatasetBuilder(
        StoredTokens, (train, evaluation, test), partial(_is_built_here, vp_stage), _dataset_config(args)
    ).build()
    if valid_set is not None:
        valid_set = FixedValidation(valid_set, evaluation, valid)
    return train_set, valid_set, test_set


def _is_built_here(vp_stage: int | None) -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and _is_end_stage(vp_stage)


def _is_end_stage(vp_stage: int | None) -> bool:
    """Whether this pipeline stage reads tokens (the first) or labels (the last)."""
    ends = (mpu.is_pipeline_first_stage, mpu.is_pipeline_last_stage)
    return any(is_end(ignore_virtual=vp_stage is None, vp_stage=vp_stage) for is_end in ends)


def _dataset_config(args) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def get_batch(data_iterator, vp_stage: int | None = None) -> list[Tensor | None]:
    """The tensors of `BATCH` for this rank; all None on a middle pipeline stage."""
    if not _is_end_stage(vp_stage):
        return [None] * len(BATCH)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = dict.fromkeys(BATCH)
    if tp_rank == 0:
        sample = next(data_iterator)
        batch |= {key: sample[key].cuda(non_blocking=True) for key in BATCH if sample.get(key) is not None}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return [batch.get(key) for key in BATCH]


def forward_step(data_iterator, model):
    """One micro-batch through `model`: the per-token losses, and the function that sums them."""
    flush_tensorboard(get_args().curr_iteration)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, position_ids, attention_mask, labels, loss_mask = get_batch(data_iterator, getattr(model, "vp_stage", None))
    timers("batch-generator").stop()
    return run_model(
        model, loss_mask, input_ids=tokens, position_ids=position_ids, attention_mask=attention_mask, labels=labels
    )


def run_model(model, loss_mask: Tensor | None, **inputs):
    """The model's output and the function that Megatron's schedules call for its loss."""
    if get_args().fused_linear_cross_entropy:
        factor = None if loss_mask is None else loss_factor(loss_mask)
        head = partial(linear_cross_entropy.output_processor, factor=factor)
        return model(**inputs, loss_mask=loss_mask, output_processor=head), partial(checked, loss_mask)
    return model(**inputs, loss_mask=loss_mask), partial(loss_sum, loss_mask)


def loss_factor(loss_mask: Tensor) -> Tensor:
    """What Megatron's schedules multiply a micro-batch's sum of losses by before its backward pass, FP32, a scalar."""
    if get_args().calculate_per_token_loss:  # they divide the gradients at the end
        return torch.ones((), device=loss_mask.device)
    return 1 / (number_of_tokens(loss_mask).clamp(min=1) * get_num_microbatches())


def number_of_tokens(loss_mask: Tensor) -> Tensor:
    """Trained ones, int32, a scalar."""
    return loss_mask.sum(dtype=torch.float32).to(torch.int)


@functools.lru_cache(maxsize=1)
def flush_tensorboard(iteration: int) -> None:
    """Once an iteration: a killed run loses no more than its last point (the writer's own interval is 120 s)."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def loss_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the trained tokens' losses in nats, their number, and both for the log."""
    return checked(loss_mask, (losses.view(-1).float() * loss_mask.view(-1).float()).sum())


def checked(loss_mask: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `loss_sum`, given the sum. NaN and Inf end the run."""
    tokens = number_of_tokens(loss_mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected in (torch.isnan, torch.isinf):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"the loss of a forward pass is not a number ({rejected.__name__})",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
