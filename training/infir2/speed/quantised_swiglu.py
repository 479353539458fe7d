"""SwiGLU between TransformerEngine's FP8 layers, its result and its gradient quantised where they are computed.

In place of Megatron's `bias_swiglu_impl`, by --fused-swiglu-quantisation (infir2.backend). GPU only. Where the layers
are not in blockwise FP8, or a shape has no whole tiles, Megatron's own function runs.

fc2 takes the quantised tensor as its input, fc1 as the gradient of its output. TransformerEngine lets go of a row-wise
copy only of inputs that it quantised itself; `attach` does it for ours, or 1.5B's layers would keep 4 GB more.

By --recompute-swiglu fc2 keeps nothing of its input: the column-wise copy, which its weight's gradient takes, is
computed in the backward pass from what SwiGLU keeps anyway. The same codes; a byte less for each element.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.speed import quantising_kernels
from infir2.speed.quantising_kernels import BLOCK
from infir2.speed.te_quantisation import as_te_tensor, keeping_less, kernel_format


def in_place_of(original: Callable, recompute: bool = False) -> Callable:
    """A `bias_swiglu_impl` that quantises where it can."""

    def bias_swiglu_impl(x, bias, fp8_input_store=False, cpu_offload_input=False):
        if bias is not None or fp8_input_store or cpu_offload_input or not _applies(x):
            return original(x, bias, fp8_input_store, cpu_offload_input)
        forward_quantiser, backward_quantiser = _quantisers()
        result = _QuantisedSwiGLU.apply(x, forward_quantiser, backward_quantiser, not recompute)
        if recompute:
            result.made_again = functools.partial(_quantised, x.detach(), forward_quantiser, rows=False)
        return result

    return bias_swiglu_impl


def attach(models: list, recompute: bool = False) -> list:
    """Have each fc2 keep no more of its input than its backward pass reads, or nothing."""
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("linear_fc2"):
                module.forward = keeping_less(module.forward) if recompute else _letting_go(module.forward)
    return models


def _letting_go(forward: Callable) -> Callable:
    def forward_and_let_go(x, *args, **kwargs):
        result = forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and _is_blockwise(x):
            x.update_usage(rowwise_usage=False, columnwise_usage=True)
        return result

    return forward_and_let_go


def _is_blockwise(x: Any) -> bool:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    return isinstance(x, Float8BlockwiseQTensor)


def _applies(x: Tensor) -> bool:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    if x.dtype != torch.bfloat16 or x.shape[-1] % (2 * BLOCK) or (x.numel() // x.shape[-1]) % BLOCK:
        return False
    return FP8GlobalStateManager.is_fp8_enabled() and FP8GlobalStateManager.get_fp8_recipe().float8_block_scaling()


def _quantisers() -> tuple[Any, Any]:
    """Of fc2's input and of the gradient of fc1's output, as the recipe makes them."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager, get_fp8_te_dtype
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    recipe = FP8GlobalStateManager.get_fp8_recipe()
    return tuple(
        Float8BlockQuantizer(
            get_fp8_te_dtype(recipe, forward),
            rowwise=True,
            columnwise=True,
            force_pow_2_scales=parameters.power_2_scale,
            block_scaling_dim=1,
        )
        for forward, parameters in ((True, recipe.fp8_quant_fwd_inp), (False, recipe.fp8_quant_bwd_grad))
    )


class _QuantisedSwiGLU(torch.autograd.Function):
    """x [..., 2F] to a quantised [..., F], along its columns too if asked for; the gradient of x is quantised too."""

    @staticmethod
    def forward(ctx, x, forward_quantiser, backward_quantiser, columns):
        ctx.save_for_backward(x)
        ctx.quantiser = backward_quantiser
        return _quantised(x, forward_quantiser, columns=columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        result = quantising_kernels.swiglu_gradient(dy, x.reshape(-1, x.shape[-1]), *kernel_format(ctx.quantiser))
        return as_te_tensor(result, x.shape, ctx.quantiser), None, None, None


def _quantised(x: Tensor, quantiser: Any, **ways: bool) -> Tensor:
    result = quantising_kernels.swiglu(x.reshape(-1, x.shape[-1]), *kernel_format(quantiser), **ways)
    return as_te_tensor(result, (*x.shape[:-1], x.shape[-1] // 2), quantiser)
