"""The embedding's gradient added to its main gradient, row by row.

By --fused-embedding-gradient (infir2.backend) this stands before `torch.nn.functional.embedding`. A step reads some
ten thousand of 150 thousand rows, and torch's gradient is the whole matrix: zeros written, rows summed up in BF16, and
all of it read and added to the FP32 main gradient. Here the rows' gradients are added there, in FP32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_place_of(original: Callable) -> Callable:
    """An `embedding` that adds up where the weight has an FP32 main gradient (Megatron's `main_grad`)."""

    def embedding(input, weight, *rest, **options):
        main = getattr(weight, "main_grad", None)
        if rest or options or main is None or main.dtype != torch.float32 or not torch.is_grad_enabled():
            return original(input, weight, *rest, **options)
        if hasattr(weight, "zero_out_wgrad"):  # the head's too; Megatron would add what autograd gets once more
            weight.zero_out_wgrad = False
        return _Embedding.apply(input, weight)

    return embedding


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight  # not saved as a tensor: it may be written in between
        return torch.embedding(weight, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (tokens,) = ctx.saved_tensors
        ctx.weight.main_grad.index_add_(0, tokens.flatten(), gradient.flatten(0, -2).float())
        ctx.weight.grad_added_to_main_grad = True
        return None, torch.empty_like(ctx.weight)  # Megatron's hooks want one, and do not read it
