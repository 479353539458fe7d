"""SwiGLU between TransformerEngine's FP8 layers, its result and its gradient quantised where they are computed.

In place of Megatron's `bias_swiglu_impl`, by --fused-swiglu-quantisation (infir2.backend). GPU only. Where the layers
are not in blockwise FP8, or a shape has no whole tiles, Megatron's own function runs.

fc2 takes the quantised tensor as its input, fc1 as the gradient of its output. TransformerEngine lets go of a row-wise
copy only of inputs that it quantised itself; `attach` does it for ours, or 1.5B's layers would keep 4 GB more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.speed import quantising_kernels
from infir2.speed.quantising_kernels import BLOCK, Quantised


def in_place_of(original: Callable) -> Callable:
    """A `bias_swiglu_impl` that quantises where it can."""

    def bias_swiglu_impl(x, bias, fp8_input_store=False, cpu_offload_input=False):
        if bias is not None or fp8_input_store or cpu_offload_input or not _applies(x):
            return original(x, bias, fp8_input_store, cpu_offload_input)
        return _QuantisedSwiGLU.apply(x, *_quantisers())

    return bias_swiglu_impl


def attach(models: list) -> list:
    """Have each fc2 let go of what its backward pass does not read."""
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("linear_fc2"):
                module.register_forward_hook(_release)
    return models


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
    """x [..., 2F] to a quantised [..., F]; the gradient of x is quantised too."""

    @staticmethod
    def forward(ctx, x, forward_quantiser, backward_quantiser):
        ctx.save_for_backward(x)
        ctx.quantiser = backward_quantiser
        result = quantising_kernels.swiglu(x.reshape(-1, x.shape[-1]), *kernel_format(forward_quantiser))
        return as_te_tensor(result, (*x.shape[:-1], x.shape[-1] // 2), forward_quantiser)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        result = quantising_kernels.swiglu_gradient(dy, x.reshape(-1, x.shape[-1]), *kernel_format(ctx.quantiser))
        return as_te_tensor(result, x.shape, ctx.quantiser), None, None


def kernel_format(quantiser) -> tuple[torch.dtype, bool]:
    """What a kernel asks: the codes' type, and whether scales are powers of two."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantiser.dtype], quantiser.force_pow_2_scales


def as_te_tensor(result: Quantised, shape: tuple[int, ...], quantiser) -> Tensor:
    """TransformerEngine's tensor of the logical shape; its column-wise data are the transpose."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    return Float8BlockwiseQTensor(
        shape=shape,
        dtype=torch.bfloat16,
        rowwise_data=result.codes.view(torch.uint8).view(shape),
        rowwise_scale_inv=result.scale_inv,
        columnwise_data=result.transposed.view(torch.uint8).view(shape[-1], *shape[:-1]),
        columnwise_scale_inv=result.transposed_scale_inv,
        fp8_dtype=quantiser.dtype,
        quantizer=quantiser,
        is_2D_scaled=False,
    )


def _release(module, inputs, output) -> None:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    if isinstance(inputs[0], Float8BlockwiseQTensor) and torch.is_grad_enabled():
        inputs[0].update_usage(rowwise_usage=False, columnwise_usage=True)
