"""Causal attention by FlashAttention 4, called as it should be.

By --flash-attention-4 (infir2.backend) this module stands before `forward` of Megatron's attention. TransformerEngine
2.20.2 can call the same library, by --attention-backend flash, but describes the causal mask by the window (-1, 0),
which FlashAttention 4 reads as an empty one since Dao-AILab/flash-attention#2490: the attention's output is zero
everywhere, and nothing says so (NVIDIA/TransformerEngine#3528). infir2.engine refuses that flag. TransformerEngine also
copies q, k, v [s, b, h, d] and their gradients to batches first; here they are read and written where they lie.

Its backward adds up the gradient of q in the order in which its blocks end, so two runs differ in their last bits. With
NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, TransformerEngine's own switch, the blocks wait for each other.

Under context parallelism a rank's queries are two pieces of the sequence, one from its front and one from its end
(Megatron's order, in which every rank has as much to do). They meet the keys and values before them, of all ranks,
which are few where heads share them: those are gathered, in place of TransformerEngine's ring of partial results.

What is not plain causal self-attention in BF16 or FP16, of whole or of packed sequences, goes on to TransformerEngine;
packed sequences under context parallelism, too.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

HEAD_DIMENSIONS = (64, 128)  # tests/gpu/test_speed.py has tried these


def in_place_of(original: Callable) -> Callable:
    """A `TEDotProductAttention.forward` that asks FlashAttention where it can."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, **options):
        packed = options.get("packed_seq_params")
        others = any(value is not None for name, value in options.items() if name != "packed_seq_params")
        parallel = self.config.context_parallel_size > 1
        if others or not _applies(self, attn_mask_type) or not _takes(query, key, packed) or (packed and parallel):
            return original(self, query, key, value, attention_mask, attn_mask_type, **options)
        if parallel:
            from megatron.core.parallel_state import get_context_parallel_group

            group = get_context_parallel_group()
            return causal_across_ranks(query, key, value, group, self.config.softmax_scale).flatten(-2)
        return causal(query, key, value, packed, self.config.softmax_scale).flatten(-2)

    return forward


def causal(query: Tensor, key: Tensor, value: Tensor, packed: Any = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale, causal) v, its gradients by autograd. Heads of q may share those of k and v.

    query [s, b, h, d], key and value [s, b, g, d], BF16 or FP16, on a GPU, to [s, b, h, d]; with `packed`, Megatron's
    PackedSeqParams, [t, h, d] and [t, g, d] to [t, h, d]. `scale`: d^-0.5 unless given.
    """
    lengths = {}
    if packed is not None:
        lengths = {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_kv}
        lengths |= {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": packed.max_seqlen_kv}
    return _FlashAttention.apply(query, key, value, scale or query.shape[-1] ** -0.5, lengths)


def causal_across_ranks(query: Tensor, key: Tensor, value: Tensor, group, scale: float | None = None) -> Tensor:
    """`causal` of a sequence of n ranks' pieces: this rank's [s / n, b, ...] are pieces r and 2n - 1 - r of 2n."""
    return _AcrossRanks.apply(query, key, value, scale or query.shape[-1] ** -0.5, group)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, lengths):
        ctx.options = {"softmax_scale": scale, **lengths}
        output = query.new_empty(query.shape)
        logsumexp = _forward(query, key, value, output, **ctx.options)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *operands, logsumexp = ctx.saved_tensors
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in operands[:3]]
        _backward(*operands, gradient, logsumexp, *gradients, **ctx.options)
        return *gradients, None, None


class _AcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, group):
        ctx.scale, ctx.group = scale, group
        keys, values = _in_order(_gather(torch.stack([key, value]), group))
        output = query.new_empty(query.shape)
        logsumexps = [
            _forward(query[mine], keys[:end], values[:end], output[mine], softmax_scale=scale)
            for mine, end in _pieces(len(query), group)
        ]
        ctx.save_for_backward(query, key, value, output, *logsumexps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, *logsumexps = ctx.saved_tensors
        keys, values = _in_order(_gather(torch.stack([key, value]), ctx.group))
        dq, total = query.new_empty(query.shape), torch.zeros_like(torch.stack([keys, values]))
        for (mine, end), logsumexp in zip(_pieces(len(query), ctx.group), logsumexps, strict=True):
            of_piece = total.new_empty(2, end, *total.shape[2:])
            one = query[mine], keys[:end], values[:end], output[mine], gradient[mine]
            _backward(*one, logsumexp, dq[mine], *of_piece, softmax_scale=ctx.scale)
            total[:, :end] += of_piece
        # Each rank's part of every rank's piece, added up in FP32 and rounded once.
        dk, dv = _exchange(_by_rank(total, ctx.group), ctx.group).float().sum(0).to(key.dtype)
        return dq, dk, dv, None, None


def _pieces(length: int, group) -> list[tuple[slice, int]]:
    """This rank's two pieces: where they are in its tensors, and up to where in the whole sequence they see."""
    ranks, rank, piece = group.size(), group.rank(), length // 2
    return [(slice(0, piece), (rank + 1) * piece), (slice(piece, None), (2 * ranks - rank) * piece)]


def _in_order(gathered: Tensor) -> Tensor:
    """[n, 2, s / n, ...] of all ranks to [2, s, ...], in the order of the sequence."""
    front, back = gathered.unflatten(2, (2, -1)).unbind(2)
    return torch.cat([front, back.flip(0)]).transpose(0, 1).flatten(1, 2)


def _by_rank(whole: Tensor, group) -> Tensor:
    """The way back: [2, s, ...] to [n, 2, s / n, ...]."""
    front, back = whole.unflatten(1, (2 * group.size(), -1)).chunk(2, 1)
    return torch.stack([front, back.flip(1)], 2).transpose(0, 1).flatten(2, 3).contiguous()


def _gather(mine: Tensor, group) -> Tensor:
    """[...] to [n, ...]."""
    every = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather_into_tensor(every, mine, group=group)
    return every


def _exchange(parts: Tensor, group) -> Tensor:
    """[n, ...], one for each rank, to what every rank has for this one."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _forward(query, key, value, output, **options) -> Tensor:
    """Fills `output`; returns the logarithms of the rows' sums. Fewer queries than keys are the last ones."""
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v, out = _batch_first(query, key, value, output)
    return _flash_attn_fwd(q, k, v, out=out, return_lse=True, causal=True, **options)[1]


def _backward(query, key, value, output, gradient, logsumexp, dq, dk, dv, **options) -> None:
    """Fills dq, dk and dv."""
    from flash_attn.cute.interface import _flash_attn_bwd

    repeats = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"
    operands, gradients = _batch_first(query, key, value, output, gradient), _batch_first(dq, dk, dv)
    _flash_attn_bwd(
        *operands, logsumexp, **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
        causal=True, deterministic=repeats, **options,
    )  # fmt: skip


def _batch_first(*tensors: Tensor) -> list[Tensor]:
    """Views [b, s, h, d] of [s, b, h, d]; packed sequences as they are."""
    return [one.transpose(0, 1) if one.dim() == 4 else one for one in tensors]


def _applies(attention: Any, mask: Any) -> bool:
    """Whether a layer is plain causal self-attention."""
    config = attention.config
    plain = config.softmax_type == "vanilla" and config.window_size is None
    more = config.qk_clip or config.log_max_attention_logit or attention.num_splits
    dropout = attention.training and config.attention_dropout
    scaled = config.apply_query_key_layer_scaling
    return plain and not (more or dropout or scaled) and mask.name == "causal"


def _takes(query: Tensor, key: Tensor, packed: Any) -> bool:
    """Whether the operands are as `causal` takes them: as many queries as keys, or the mask would be another."""
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] not in HEAD_DIMENSIONS:
        return False
    if packed is None:
        return query.dim() == 4 and len(query) == len(key)
    of_one_rank = packed.cu_seqlens_q_padded is None and packed.cp_group is None
    return packed.qkv_format == "thd" and of_one_rank and packed.cu_seqlens_q is packed.cu_seqlens_kv
