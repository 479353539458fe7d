"""RMSNorm before TransformerEngine's FP8 layers, its result quantised where it is computed.

In place of `rmsnorm_fwd`, by --fused-norm-quantisation (infir2.backend). GPU only. TransformerEngine asks for a
quantised result, and for FP8 blocks computes it in BF16 first, writes it, and reads it again. What is not asked for
both ways round in blocks of 1 x 128, or has no whole tiles, goes on to it. The backward pass is its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infir2.speed import quantising_kernels
from infir2.speed.quantised_swiglu import as_te_tensor, kernel_format
from infir2.speed.quantising_kernels import BLOCK


def in_place_of(original: Callable) -> Callable:
    """A `rmsnorm_fwd` that quantises where it can."""

    def rmsnorm_fwd(x, weight, epsilon, out, quantiser, out_dtype, sm_margin, zero_centered):
        if out is not None or zero_centered or not _applies(x, quantiser):
            return original(x, weight, epsilon, out, quantiser, out_dtype, sm_margin, zero_centered)
        rows = x.reshape(-1, x.shape[-1])
        result, inverse = quantising_kernels.rms_norm(rows, weight, epsilon, *kernel_format(quantiser))
        return as_te_tensor(result, tuple(x.shape), quantiser), None, inverse

    return rmsnorm_fwd


def _applies(x: Tensor, quantiser: Any) -> bool:
    one_dimensional = getattr(quantiser, "block_scaling_dim", None) == 1
    if not one_dimensional or not (quantiser.rowwise_usage and quantiser.columnwise_usage) or quantiser.amax_epsilon:
        return False
    columns = x.shape[-1]
    return x.dtype == torch.bfloat16 and x.is_contiguous() and not (columns % BLOCK or x.numel() // columns % BLOCK)
