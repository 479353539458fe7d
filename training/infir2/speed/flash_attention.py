"""Causal attention by FlashAttention 4, called as it should be.

By --flash-attention-4 (infir2.backend) this module stands before `forward` of Megatron's attention. TransformerEngine
2.20.2 can call the same library, by --attention-backend flash, but describes the causal mask by the window (-1, 0),
which FlashAttention 4 reads as an empty one since Dao-AILab/flash-attention#2490: the attention's output is zero
everywhere, and nothing says so (NVIDIA/TransformerEngine#3528). infir2.engine refuses that flag. TransformerEngine also
copies q, k, v [s, b, h, d] and their gradients to batches first; here they are read and written where they lie.

Its backward adds up the gradient of q in the order in which its blocks end, so two runs differ in their last bits. With
NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, TransformerEngine's own switch, the blocks wait for each other.

What is not plain causal self-attention in BF16 or FP16, of whole or of packed sequences, goes on to TransformerEngine.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HEAD_DIMENSIONS = (64, 128)  # tests/gpu/test_speed.py has tried these


def in_place_of(original: Callable) -> Callable:
    """A `TEDotProductAttention.forward` that asks FlashAttention where it can."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, **options):
        packed = options.get("packed_seq_params")
        others = any(value is not None for name, value in options.items() if name != "packed_seq_params")
        if others or not _applies(self, attn_mask_type) or not _takes(query, key, packed):
            return original(self, query, key, value, attention_mask, attn_mask_type, **options)
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


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, lengths):
        from flash_attn.cute.interface import _flash_attn_fwd

        ctx.options = {"softmax_scale": scale, "causal": True, **lengths}
        output = query.new_empty(query.shape)
        q, k, v, out = _batch_first(query, key, value, output)
        logsumexp = _flash_attn_fwd(q, k, v, out=out, return_lse=True, **ctx.options)[1]
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        from flash_attn.cute.interface import _flash_attn_bwd

        *operands, logsumexp = ctx.saved_tensors
        gradients = [one.new_empty(one.shape) for one in operands[:3]]
        dq, dk, dv = _batch_first(*gradients)
        options = ctx.options | {"deterministic": os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"}
        _flash_attn_bwd(*_batch_first(*operands, gradient), logsumexp, dq=dq, dk=dk, dv=dv, **options)
        return *gradients, None, None


def _batch_first(*tensors: Tensor) -> list[Tensor]:
    """Views [b, s, h, d] of [s, b, h, d]; packed sequences as they are."""
    return [one.transpose(0, 1) if one.dim() == 4 else one for one in tensors]


def _applies(attention: Any, mask: Any) -> bool:
    """Whether a layer is plain causal self-attention of one rank."""
    config = attention.config
    plain = config.softmax_type == "vanilla" and config.window_size is None and config.context_parallel_size == 1
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
