"""Weight gradients added to the main gradient by the GEMM that computes them.

Without this, a layer's weight gradient is rounded to BF16, written, read again and added to the FP32 main gradient: 10
bytes of traffic a parameter and micro-batch, and a rounding that FP32 accumulation is there to avoid.

TransformerEngine's layers do it themselves under Megatron's `gradient_accumulation_fusion`. Megatron's own linear
layers, of which a GPU run has one, the output layer, call a CUDA extension of apex's, and refuse to be built without.
`infir2.backend` puts this module in that extension's place: the two functions at the end have its names.
"""

from torch import Tensor


def accumulate(gradient: Tensor, output_gradient: Tensor, x: Tensor, *, overwrite: bool = False) -> None:
    """gradient += output_gradient^T x, in place, accumulated in FP32; `overwrite` replaces what `gradient` holds.

    gradient: [N, K], contiguous, FP32 or the operands' type; output_gradient: [T, N]; x: [T, K], both of one type.
    """
    if gradient.is_cuda:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            x, output_gradient, out_dtype=gradient.dtype, layout="NT", grad=True, out=gradient, accumulate=not overwrite
        )
        return
    gradient.addmm_(output_gradient.t().to(gradient.dtype), x.to(gradient.dtype), beta=0 if overwrite else 1)


def wgrad_gemm_accum_fp32(x: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """As apex: main_grad (FP32) += output_gradient^T x."""
    accumulate(main_grad, output_gradient, x)


def wgrad_gemm_accum_fp16(x: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """As apex: the same for a main gradient in the weight's type."""
    accumulate(main_grad, output_gradient, x)
