"""The language model's head and its loss in one operation that never holds all the logits.

With 152 thousand columns the logits of 16,384 tokens are 5 GB in BF16 and 10 GB in FP32, and a plain cross entropy
reads and writes them a dozen times: more memory than anything else in a step, and a tenth of its time. Here the tokens
go through the head in chunks: logits, loss, the gradient of the logits in the same memory, and from it at once the
gradients of the input and of the weight. Nothing is computed twice, the backward pass only scales.

That works because the operation returns the weighted sum of the tokens' losses, one number, so that all that is missing
until the backward pass is one factor f, what the sum is multiplied by on its way into the training loss. With
p = softmax(x W^T) and token weights w (the loss mask):

    loss = sum_t w_t (log sum_v exp(l_tv) - l_t,target)        dl_tv = f w_t (p_tv - [v = target_t])
    dx = dl W                                                  dW = dl^T x

A caller who knows f beforehand gives it: dW is then added to the weight's main gradient at once, and no second FP32
matrix of the weight's size is held, written and read. The backward pass looks whether it was right.

The maths is the plain path's: logits in the model's type, everything on them in FP32, their gradient rounded once to
that type. Only dW differs: it is accumulated in FP32 and never rounded to BF16.

Under tensor parallelism each rank has some of the vocabulary's rows; the ranks exchange three numbers a token.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from infir2.speed import weight_gradient

CHUNK_ELEMENTS = 2**29  # logits held at once: 1 GiB in BF16
CHUNK_ELEMENTS_CPU = 2**21  # those of a chunk stay in cache


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, group=None, factor: Tensor | None = None
) -> Tensor:
    """Sum over tokens of token_weight x cross entropy of x weight^T, FP32, a scalar.

    x: [T, K]; weight: [V, K], this rank's rows of the vocabulary; target: int64 [T], in the whole vocabulary;
    token_weight: [T]; `group`: the tensor-parallel group, None for one rank. x is the same on all of its ranks, and so
    is the result; the gradient of x is this rank's part of a sum. The gradient of a weight with a main gradient
    (Megatron's `main_grad`) is added there; with `factor`, FP32, a scalar, d(training loss) / d(this sum), already by
    this call. A backward pass that brings another factor gives x a gradient of NaN.
    """
    chunk = _chunk(len(x), len(weight), CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS_CPU)
    if getattr(getattr(weight, "main_grad", None), "dtype", None) != torch.float32:
        factor = None  # chunks would be added up in fewer bits
    training = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(x, weight, target, token_weight.float(), group, factor, chunk, training)


def output_processor(*, hidden_states, output_layer, output_weight, labels, loss_mask, factor=None, **_) -> Tensor:
    """For `GPTModel.forward(..., output_processor=)`: the sum of the trained tokens' losses in place of the logits.

    hidden_states: [s, b, K], or [s / TP, b, K] under sequence parallelism; labels, loss_mask: [b, s]; `factor`: as of
    `linear_cross_entropy`.
    """
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    for hook in output_layer._forward_pre_hooks.values():  # of Megatron's DDP: they wait for gathered parameters
        hook(output_layer, ())
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        x = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
    else:
        x = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    weight = output_layer.weight if output_weight is None else output_weight
    tokens = (t.transpose(0, 1).flatten() for t in (labels, loss_mask))
    return linear_cross_entropy(x.flatten(0, 1), weight, *tokens, group if group.size() > 1 else None, factor)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, token_weight, group, factor, chunk: int, training: bool) -> Tensor:
        needs_x, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if needs_x else None
        at_once = needs_weight and factor is not None
        dw = torch.empty(weight.shape, dtype=torch.float32, device=x.device) if needs_weight and not at_once else None
        into = weight.main_grad if at_once else dw
        scale = token_weight if factor is None else token_weight * factor
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(len(x), chunk):
            logits = x[rows] @ weight.t()
            gradient_weight = scale[rows] if needs_x or needs_weight else None
            loss += _losses_and_gradient(logits, target[rows], gradient_weight, group) @ token_weight[rows]
            if needs_x:
                torch.matmul(logits, weight, out=dx[rows])
            if needs_weight:
                weight_gradient.accumulate(into, logits, x[rows], overwrite=not at_once and rows.start == 0)
            del logits  # or the next chunk's would be there beside them
        ctx.save_for_backward(dx, dw, factor)
        ctx.weight = weight  # not saved as a tensor: its main_grad is asked for, and may be written in between
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, brought: Tensor):
        dx, dw, factor = ctx.saved_tensors
        if factor is not None:
            brought = torch.where((brought / factor - 1).abs() < 1e-5, 1.0, torch.nan)
        dx = None if dx is None else (dx * brought).to(dx.dtype)
        dw = _hand_over(ctx.weight, dw, brought) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None, None, None, None


def _hand_over(weight: Tensor, dw: Tensor | None, factor: Tensor) -> Tensor | None:
    """Add `factor` x dw to the weight's main gradient, or return it where the weight has none. None has been added.

    Megatron's gradient hooks want a gradient from autograd even then, whose values they do not read. A tied weight's
    comes from the embedding.
    """
    if not hasattr(weight, "main_grad"):
        return (dw * factor).to(weight.dtype)
    if dw is not None:
        weight.main_grad.addcmul_(dw, factor)
    weight.grad_added_to_main_grad = True
    return None if hasattr(weight, "zero_out_wgrad") else torch.empty_like(weight)  # which only a tied one has


def _chunk(tokens: int, vocabulary: int, elements: int) -> int:
    """Tokens of a chunk: as equal as multiples of 128 allow, with at most `elements` logits unless 128 tokens have
    more."""
    count = math.ceil(tokens * vocabulary / elements)
    return math.ceil(tokens / count / 128) * 128


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def _losses_and_gradient(logits: Tensor, target: Tensor, gradient_weight: Tensor | None, group) -> Tensor:
    """Each token's loss, FP32 [t]; with `gradient_weight` [t] the logits [t, V] become their gradient, in place."""
    rows = _kernels() if logits.is_cuda else _TorchRows
    if group is None:
        return _loss(*rows.statistics(logits, target, gradient_weight))
    first = group.rank() * logits.shape[1]
    target = target - first
    statistics = _reduce(*rows.statistics(logits, target), group)
    if gradient_weight is not None:
        rows.gradient_(logits, target, gradient_weight, statistics[0] + statistics[1].log())
    return _loss(*statistics)


def _loss(maximum: Tensor, total: Tensor, of_target: Tensor) -> Tensor:
    return maximum + total.log() - of_target


def _reduce(maximum: Tensor, total: Tensor, of_target: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of whole rows from those of each rank's columns."""
    whole = maximum.clone()
    torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX, group=group)
    sums = torch.stack([total * (maximum - whole).exp(), of_target])
    torch.distributed.all_reduce(sums, group=group)
    return whole, *sums


def _kernels():
    from infir2.speed import cross_entropy_kernels

    return cross_entropy_kernels


class _TorchRows:
    """The operations of cross_entropy_kernels in plain torch: for the CPU, and as the kernels' reference."""

    @staticmethod
    def statistics(logits: Tensor, target: Tensor, token_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row: the maximum, the sum of exp(logit - maximum), the target's logit (0 if it is not a column).

        With `token_weight`, the logits are replaced by their gradient as by `gradient_`.
        """
        values = logits.float()
        maximum = values.amax(-1)
        total = (values - maximum[:, None]).exp_().sum(-1)
        here = (target >= 0) & (target < logits.shape[1])
        of_target = values.gather(1, torch.where(here, target, 0)[:, None])[:, 0] * here
        if token_weight is not None:
            _TorchRows.gradient_(logits, target, token_weight, maximum + total.log())
        return maximum, total, of_target

    @staticmethod
    def gradient_(logits: Tensor, target: Tensor, token_weight: Tensor, log_sum: Tensor) -> None:
        """Replace the logits by token_weight x (exp(logit - log_sum) - [column is the target])."""
        values = (logits.float() - log_sum[:, None]).exp_()
        here = (target >= 0) & (target < logits.shape[1])
        values[here.nonzero()[:, 0], target[here]] -= 1
        logits.copy_(values.mul_(token_weight[:, None]))
