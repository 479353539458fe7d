"""Causal attention by FlashAttention 4, called as it should be.

By --flash-attention-4 (infir2.backend) this module stands before `forward` of Megatron's attention. TransformerEngine
2.20.2 can call the same library, by --attention-backend flash, but describes the causal mask by the window (-1, 0),
which FlashAttention 4 reads as an empty one since Dao-AILab/flash-attention#2490: the attention's output is zero
everywhere, and nothing says so (NVIDIA/TransformerEngine#3528). infir2.engine refuses that flag. TransformerEngine also
copies q, k, v [s, b, h, d] and their gradients to batches first; here they are read and written where they lie.

What is not plain causal self-attention in BF16 or FP16, of whole or of packed sequences, goes on to TransformerEngine.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HEAD_DIMENSIONS = (64, 128)  # tests/gpu/test_speed.py has tried these


def in_place_of(original: Callable) -> Callable:
    """A `TEDotProductAttention.forward` that asks FlashAttention where it can."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, **options):
        packed = options.get("packed_seq_params")
        others = any(value is not None for name, value in options.items() if name != "packed_seq_params")
        if others or not _applies(self, attn_mask_type) or not _takes(query, key, packed):
            return original(self, query, key, value, attention_mask, attn_mask_type, **options)
        scale = self.config.softmax_scale
        return causal(query, key, value, packed, scale).flatten(-2)

    return forward


def causal(query: Tensor, key: Tensor, value: Tensor, packed: Any = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale, causal) v, its gradients by autograd. Heads of q may share those of k and v.

    query [s, b, h, d], key and value [s, b, g, d], BF16 or FP16, on a GPU, to [s, b, h, d]; with `packed`, Megatron's
    PackedSeqParams, [t, h, d] and [t, g, d] to [t, h, d]. `scale`: d^-0.5 unless given.
    """
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options = {"softmax_scale": scale, "causal": True}
    if packed is None:
        batch_first = (one.transpose(0, 1) for one in (query, key, value))
        return flash_attn_func(*batch_first, **options)[0].transpose(0, 1)
    lengths = {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_kv}
    lengths |= {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": packed.max_seqlen_kv}
    return flash_attn_varlen_func(query, key, value, **lengths, **options)[0]


def _applies(attention: Any, mask: Any) -> bool:
    """Whether a layer is plain causal self-attention of one rank."""
    config = attention.config
    plain = config.softmax_type == "vanilla" and config.window_size is None and config.context_parallel_size == 1
    more = config.deterministic_mode or config.qk_clip or config.log_max_attention_logit or attention.num_splits
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
