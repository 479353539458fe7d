"""Products of FP8 blocks by DeepGEMM, in place of cuBLAS.

TransformerEngine computes every linear layer through one function, `transformer_engine_torch.generic_gemm`. By
--deep-gemm (infir2.backend) this module stands before it and passes to DeepGEMM (on PyPI: sgl-deep-gemm) what that
computes: E4M3 with FP32 scales of 1 x 128 blocks, or of 128 x 128 on the weight's side. Operands lie as DeepGEMM reads
them, so nothing is copied but the few scales of a weight that TransformerEngine pads. The rest goes on to cuBLAS. The
maths is the same: products of 128 are added up in the tensor cores, their sums in FP32.

The three products of a layer with weight W [N, K], input X [T, K] and output gradient G [T, N]:

    forward           Y  [T, N] = X W^T     BF16                       layout TN, operands W, X
    input gradient    dX [T, K] = G W       BF16                       layout NN, operands W, G
    weight gradient   dW [N, K] += G^T X    FP32, the main gradient    layout NT, operands X, G
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
Operand = tuple[Tensor, Tensor]  # codes [rows, depth], scales: [rows, depth / 128], or a block of 128 rows each


def in_place_of(original: Callable) -> Callable:
    """A `generic_gemm` that asks DeepGEMM where it can."""

    def generic_gemm(a, transpose_a, b, transpose_b, out, quantiser, out_dtype, bias, *rest, **options):
        _, gelu, _, _, _, _, accumulate, _ = rest
        more = (bias is not None, quantiser, gelu, options.get("comm_overlap"), options.get("bulk_overlap"))
        factors = options.get("alpha", 1.0), options.get("beta") or 0.0
        result = None
        if not any(more) and factors == (1.0, float(accumulate)) and _is_blockwise(a, b):
            if transpose_b:
                result = _weight_gradient(a, b, out, accumulate)
            elif not accumulate:
                result = _with_weight(a, transpose_a, b, out, out_dtype)
        if result is not None:
            return result, None, None, None
        return original(a, transpose_a, b, transpose_b, out, quantiser, out_dtype, bias, *rest, **options)

    return generic_gemm


def _is_blockwise(*operands: Any) -> bool:
    """Whether all are TransformerEngine's block-scaled tensors in E4M3."""
    return all(hasattr(one, "_is_2D_scaled") and one._fp8_dtype.name == "kFloat8E4M3" for one in operands)


def _with_weight(weight: Any, transposed: bool, x: Any, out: Tensor | None, out_dtype: Any) -> Tensor | None:
    """x W^T (`transposed`) or x W in BF16; None where DeepGEMM does not compute it."""
    if not weight._is_2D_scaled or x._is_2D_scaled or getattr(out_dtype, "name", "kBFloat16") != "kBFloat16":
        return None
    left, right = _rows(x), _rows(weight) if transposed else _columns(weight)
    if (out is not None and out.dtype != torch.bfloat16) or not _whole(left, right):
        return None
    if out is None:
        out = torch.empty(*x.size()[:-1], len(right[0]), dtype=torch.bfloat16, device=left[0].device)
    import deep_gemm

    deep_gemm.fp8_gemm_nt(left, right, out.view(-1, out.shape[-1]), recipe=(1, BLOCK, BLOCK))
    return out


def _weight_gradient(x: Any, gradient: Any, out: Tensor | None, accumulate: bool) -> Tensor | None:
    """out (+)= gradient^T x in FP32; None where DeepGEMM does not compute it."""
    if x._is_2D_scaled or gradient._is_2D_scaled or out is None or out.dtype != torch.float32:
        return None
    left, right = _columns(gradient), _columns(x)
    if not _whole(left, right) or _cublas_is_faster(*out.shape):
        return None
    if not accumulate:
        out.zero_()  # of 1 x 128 blocks on both sides DeepGEMM can only add
    import deep_gemm

    deep_gemm.fp8_gemm_nt(left, right, out, c=out, recipe=(1, 1, BLOCK))
    return out


def _cublas_is_faster(outputs: int, inputs: int) -> bool:
    """Whether a weight gradient [outputs, inputs] is one of the large ones. Of 16,384 tokens, on an H200, DeepGEMM
    takes 0.75 of cuBLAS's time for 2048 x 1536 and 1536 x 1536, 0.95 (in a step 1.01) for 1536 x 8960, 1.00 to 1.09
    for five larger ones."""
    return outputs * inputs > 2**23


def _whole(left: Operand, right: Operand) -> bool:
    """Whether all sizes are whole blocks: others were not tried."""
    return not any(size % BLOCK for size in (*left[0].shape, *right[0].shape))


def _rows(tensor: Any) -> Operand:
    """As the tensor lies: [rows, depth]."""
    codes = tensor._rowwise_data.view(torch.float8_e4m3fn)
    return _operand(codes.view(-1, codes.shape[-1]), tensor._rowwise_scale_inv, tensor._is_2D_scaled)


def _columns(tensor: Any) -> Operand:
    """Its transpose, which TransformerEngine keeps as a copy: [features, tokens or outputs]."""
    codes = tensor._columnwise_data.view(torch.float8_e4m3fn)
    return _operand(codes.view(codes.shape[0], -1), tensor._columnwise_scale_inv, tensor._is_2D_scaled)


def _operand(codes: Tensor, scales: Tensor, two_dimensional: bool) -> Operand:
    """TransformerEngine pads the last dimension of scales to whole fours. Those of 1 x 128 blocks it keeps transposed,
    which is what DeepGEMM's copies into shared memory want; those of 128 x 128 blocks DeepGEMM takes without gaps."""
    if two_dimensional:
        return codes, scales[:, : -(-codes.shape[1] // BLOCK)].contiguous()
    return codes, scales.t()[: codes.shape[0]]
