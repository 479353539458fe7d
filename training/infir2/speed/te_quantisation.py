"""Where TransformerEngine quantises to FP8 blocks, kernels of ours instead. GPU only.

    rmsnorm_fwd                         by --fused-norm-quantisation: an RMSNorm's result, quantised where it is
                                        computed; TransformerEngine writes it in BF16 first and reads it again
    Float8BlockQuantizer.quantize_impl  by --fast-quantisation: the same codes, by a faster kernel
    grad_output_preprocess              by --fused-bias-gradient: a bias's gradient, added up where the gradient that it
                                        comes from is quantised; TransformerEngine reads that once more

What a layer keeps for its backward pass can be made there instead, the same bits:

    --recompute-norms           with the first: the column-wise copy, from what the norm was given
    --transpose-weights-late    set_usage, update_usage: the column-wise copies of weights, one at a time

What is not asked for both ways round in blocks of 1 x 128, or has no whole tiles, goes on to TransformerEngine. So do
weights, whose blocks are 128 x 128, and the norm's backward pass.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from infir2.speed import quantising_kernels
from infir2.speed.quantising_kernels import BLOCK, Quantised


def norm_in_place_of(original: Callable, recompute: bool = False) -> Callable:
    """A `rmsnorm_fwd` that quantises where it can."""

    def rmsnorm_fwd(x, weight, epsilon, out, quantiser, out_dtype, sm_margin, zero_centered):
        if out is not None or zero_centered or not _applies(x, quantiser):
            return original(x, weight, epsilon, out, quantiser, out_dtype, sm_margin, zero_centered)
        rows, form = x.reshape(-1, x.shape[-1]), kernel_format(quantiser)
        codes, inverse = quantising_kernels.rms_norm(rows, weight, epsilon, *form)
        result = as_te_tensor(codes, tuple(x.shape), quantiser)
        if recompute:
            arguments = (rows.detach(), weight.detach(), inverse, *form)
            result._columnwise_data.made_again = functools.partial(_columns, result._columnwise_data.shape, *arguments)
        return result, None, inverse

    return rmsnorm_fwd


def _columns(shape: torch.Size, *arguments: Any) -> Tensor:
    return quantising_kernels.rms_norm_columns(*arguments).view(torch.uint8).view(shape)


def keeping_less(forward: Callable) -> Callable:
    """A layer's `forward` that keeps, for a tensor with an attribute `made_again`, that call and not the tensor; the
    backward pass gets what it gives."""

    @functools.wraps(forward)
    def forward_keeping_less(*args, **kwargs):
        with saved_tensors_hooks(lambda one: getattr(one, "made_again", one), _unpacked):
            return forward(*args, **kwargs)

    return forward_keeping_less


def _unpacked(kept: Any) -> Any:
    return kept if isinstance(kept, Tensor) else kept()


def attach_norms(models: list) -> list:
    """Have each layer that begins with a norm keep less."""
    for model in models:
        for name, module in model.named_modules():
            if name.endswith(("linear_qkv", "linear_fc1")):
                module.forward = keeping_less(module.forward)
    return models


def usage_in_place_of(original: Callable) -> Callable:
    """A quantiser's `set_usage` by which weights get no column-wise copy when they are quantised."""

    def set_usage(self, *, rowwise=None, columnwise=None):
        original(self, rowwise=rowwise, columnwise=False if self.block_scaling_dim == 2 and columnwise else columnwise)

    return set_usage


def late_transposes(original: Callable) -> Callable:
    """A tensor's `update_usage` that makes a weight's column-wise copy when the backward pass asks for it, always anew,
    and lets go of the one before: the GEMM that reads that is queued already."""
    before: list[weakref.ref] = []

    def update_usage(self, rowwise_usage=None, columnwise_usage=None):
        if self._is_2D_scaled and columnwise_usage and rowwise_usage is not False and self._rowwise_data is not None:
            for one in (self, *(reference() for reference in before)):
                if one is not None:
                    one._columnwise_data = one._columnwise_scale_inv = None
            before[:] = [weakref.ref(self)]
        return original(self, rowwise_usage, columnwise_usage)

    return update_usage


def quantiser_in_place_of(original: Callable) -> Callable:
    """A `quantize_impl` of the quantiser for FP8 blocks."""

    def quantize_impl(self, tensor):
        if not _applies(tensor, self):
            return original(self, tensor)
        result = quantising_kernels.quantise(tensor.reshape(-1, tensor.shape[-1]), *kernel_format(self))
        return as_te_tensor(result, tuple(tensor.shape), self)

    return quantize_impl


def bias_gradient_in_place_of(original: Callable) -> Callable:
    """A `grad_output_preprocess` that gives a quantised gradient [T, K] and the bias's [K], where it can."""

    def grad_output_preprocess(ctx, gradient, row_parallel, quantiser):
        gathered, quantised = row_parallel and ctx.sequence_parallel, hasattr(gradient, "_rowwise_data")
        if ctx.fp8 and ctx.use_bias and not (gathered or quantised or ctx.debug or ctx.backward_override):
            rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
            if _applies(rows, quantiser):
                result, sums = quantising_kernels.quantise_with_sums(rows, *kernel_format(quantiser))
                return as_te_tensor(result, tuple(rows.shape), quantiser), sums
        return original(ctx, gradient, row_parallel, quantiser)

    return staticmethod(grad_output_preprocess)


def _applies(x: Tensor, quantiser: Any) -> bool:
    one_dimensional = getattr(quantiser, "block_scaling_dim", None) == 1
    if not one_dimensional or not (quantiser.rowwise_usage and quantiser.columnwise_usage) or quantiser.amax_epsilon:
        return False
    columns = x.shape[-1]
    return x.dtype == torch.bfloat16 and x.is_contiguous() and not (columns % BLOCK or x.numel() // columns % BLOCK)


def kernel_format(quantiser) -> tuple[torch.dtype, bool]:
    """What a kernel asks: the codes' type, and whether scales are powers of two."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[quantiser.dtype], quantiser.force_pow_2_scales


def as_te_tensor(result: Quantised, shape: tuple[int, ...], quantiser) -> Any:
    """TransformerEngine's tensor of the logical shape; its column-wise data are the transpose. Inside of a layer
    (`quantiser.internal`) it takes its storage alone, which is no torch tensor and costs the CPU less."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    codes, transposed = result.codes, result.transposed
    parts = {
        "rowwise_data": None if codes is None else codes.view(torch.uint8).view(shape),
        "rowwise_scale_inv": result.scale_inv,
        "columnwise_data": None if transposed is None else transposed.view(torch.uint8).view(shape[-1], *shape[:-1]),
        "columnwise_scale_inv": result.transposed_scale_inv,
        "fp8_dtype": quantiser.dtype,
        "quantizer": quantiser,
        "is_2D_scaled": False,
    }
    if quantiser.internal:
        return Float8BlockwiseQTensorStorage(**parts, fake_dtype=torch.bfloat16)
    return Float8BlockwiseQTensor(shape=shape, dtype=torch.bfloat16, **parts)
