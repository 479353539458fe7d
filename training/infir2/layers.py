"""Transformer layers for the CPU backend: what TransformerEngine does on a GPU, in plain torch.

- `QuantisedMatmul`: the three GEMMs of a linear layer on FP8 codes. Codes and scales are those of `infir2.fp8`, the
  products are accumulated in FP32, so the forward differs from the GPU's only in the order of addition.
- Linear layers, RMSNorm and attention that understand tensor, sequence and context parallelism and packed sequences.
- `layer_spec`: hands them to Megatron's model builder.

Parameter names in checkpoints are those of TransformerEngine's layers: Megatron's own local specification maps them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from infir2 import cpu_kernels, fp8
from infir2.packing import context_parallel_index
from infir2.precision import scale_format, scale_format_of_recipe


@dataclass(frozen=True)
class Quantisation:
    """How the operands of one layer's GEMMs are quantised: formats of forward operands and of gradients, and scales.

    per_tensor: one scale for each operand as a whole (--fp8-recipe tensorwise), not for each tile.
    """

    forward: fp8.Format
    gradient: fp8.Format
    scale_fmt: str
    per_tensor: bool = False

    @classmethod
    def of(cls, recipe: str, formats: str) -> "Quantisation":
        """For Megatron's --fp8-recipe and --fp8-format. A recipe that is not emulated is a ValueError."""
        if recipe not in ("blockwise", "tensorwise"):
            raise ValueError(f"the CPU backend emulates --fp8-recipe blockwise and tensorwise; found '{recipe}'")
        gradient = fp8.E5M2 if formats == "hybrid" else fp8.E4M3
        return cls(fp8.E4M3, gradient, scale_format_of_recipe(recipe, scale_format()), recipe == "tensorwise")

    @classmethod
    def from_config(cls, config) -> "Quantisation | None":
        """Read Megatron's `TransformerConfig`; None where it asks for no FP8."""
        return None if config.fp8 is None else cls.of(config.fp8_recipe, config.fp8)

    def activation(self, x: Tensor, tile: tuple[int, int]) -> Tensor:
        return self._quantise(x, tile, self.forward)

    def weight(self, w: Tensor) -> Tensor:
        return self._quantise(w, fp8.BLOCK, self.forward)

    def output_gradient(self, g: Tensor, tile: tuple[int, int]) -> Tensor:
        return self._quantise(g, tile, self.gradient)

    def _quantise(self, x: Tensor, tile: tuple[int, int], fmt: fp8.Format) -> Tensor:
        tile = fp8.TENSOR if self.per_tensor else tile
        return fp8.fake_quantize(x, tile, fmt=fmt, scale_fmt=self.scale_fmt, out_dtype=_operand_dtype(x))


def _operand_dtype(x: Tensor) -> torch.dtype | None:
    """FP32 where BF16 products are computed in it: their operands need not be raised again. None: what holds them."""
    return torch.float32 if x.dtype == torch.bfloat16 and cpu_kernels.chosen() == "fp32" else None


class QuantisedMatmul(torch.autograd.Function):
    """y = q(x) q(w)^T, dx = q(g) q(w), dw = q(g)^T q(x), each operand in tiles along its GEMM's inner dimension, or
    with one scale where the quantisation is per tensor.

    x: [..., K], w: [N, K], both of one floating type; tokens (the product of x's leading sizes) and K multiples of 128.
    As in TransformerEngine, x is kept only as its column-wise codes, and the weight's 128x128 blocks serve both GEMMs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, quantisation: Quantisation) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        if x_TK.shape[0] % 128:
            raise ValueError(
                f"FP8 needs a multiple of 128 tokens on each rank, found {x_TK.shape[0]}; "
                "change --micro-batch-size or --seq-length"
            )
        with _no_torch_function():
            w_NK = quantisation.weight(w)
            y_TN = _matmul(quantisation.activation(x_TK, fp8.ROW), w_NK.t(), x.dtype)
            ctx.save_for_backward(quantisation.activation(x_TK, fp8.COLUMN) if w.requires_grad else None, w_NK)
        ctx.quantisation = quantisation
        return y_TN.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TK, w_NK = ctx.saved_tensors
        g_TN = g.reshape(-1, g.shape[-1])
        dx = dw = None
        with _no_torch_function():
            if ctx.needs_input_grad[0]:
                dx = _matmul(ctx.quantisation.output_gradient(g_TN, fp8.ROW), w_NK, g.dtype)
                dx = dx.view(*g.shape[:-1], w_NK.shape[1])
            if ctx.needs_input_grad[1]:
                dw = _matmul(ctx.quantisation.output_gradient(g_TN, fp8.COLUMN).t(), x_TK, g.dtype)
        return dx, dw, None


# Quantisation is thousands of small operations a step; passing each through the CPU backend's mode doubles their time.
_no_torch_function = torch._C.DisableTorchFunction


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in FP32, in `dtype`. The operands may differ in type: with FP32 scales they are FP32."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return (a @ b).to(dtype)


class _QuantisedLinear:
    """Replaces the GEMM of Megatron's parallel linear layers; their communication stays Megatron's."""

    quantisation: Quantisation

    def _forward_impl(
        self, input, weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None, **_
    ):
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = QuantisedMatmul.apply(input, weight, self.quantisation)
        return output if bias is None else output + bias


class QuantisedColumnParallelLinear(_QuantisedLinear, tensor_parallel.ColumnParallelLinear):
    def __init__(self, *args, quantisation: Quantisation, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantisation = quantisation


class QuantisedRowParallelLinear(_QuantisedLinear, tensor_parallel.RowParallelLinear):
    def __init__(self, *args, quantisation: Quantisation, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantisation = quantisation


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32 and rounded before the product, as Hugging Face's Qwen2."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over the TP group

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class FinalRMSNorm(RMSNorm):
    """The block's last norm. TransformerEngine's keeps an (empty) extra state in checkpoints, and asks for it."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state) -> None: ...


class _GatherSequence(torch.autograd.Function):
    """All-gather along dimension 0 over the context-parallel group; the backward sums the gradients and slices."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        shards = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(shards, x.contiguous(), group=group)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        g = g.contiguous()
        torch.distributed.all_reduce(g, group=ctx.group)
        return g.chunk(ctx.group.size())[ctx.group.rank()], None


class CoreAttention(torch.nn.Module):
    """Causal grouped-query attention, [s, b, heads, d] or packed [tokens, heads, d] with `packed_seq_params`.

    Packed sequences of similar length are attended to together, padded behind their ends, where causal attention does
    not look. Under context parallelism each rank holds two chunks of every sequence
    (`packing.context_parallel_index`), and keys and values are gathered: simple, and exact. The arithmetic is FP32,
    rounded once: on a CPU that is no slower than BF16.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_
    ):
        super().__init__()
        self.context_group, self.scale = pg_collection.cp, softmax_scale

    def forward(self, query, key, value, attention_mask=None, packed_seq_params=None, **_):
        size = self.context_group.size()
        if query.dim() == 4:
            if size > 1:
                key, value = self._gathered([0, query.shape[0] * size], key, value)
            batch = [t.permute(1, 2, 0, 3) for t in (query, key, value)]
            return self._attend(*batch).permute(2, 0, 1, 3).flatten(2)
        boundaries = tuple(packed_seq_params.cu_seqlens_q.tolist())
        if size > 1:
            key, value = self._gathered(boundaries, key, value)
        groups, place = _of_similar_length(boundaries, size)
        found = []
        for ours, whole in groups:
            batch = [_rows(tensor, at).transpose(1, 2) for tensor, at in ((query, ours), (key, whole), (value, whole))]
            found.append(self._attend(*batch).transpose(1, 2).flatten(0, 1))
        return torch.cat(found).index_select(0, place).flatten(1)

    def _gathered(self, boundaries: list[int], *tensors: Tensor) -> list[Tensor]:
        """Every rank's part of each tensor, in the order of the whole pack."""
        size = self.context_group.size()
        order = torch.from_numpy(
            np.argsort(np.concatenate([context_parallel_index(boundaries, size, rank) for rank in range(size)]))
        )
        return [_GatherSequence.apply(t, self.context_group)[order] for t in tensors]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries of each sequence to all of its keys: [sequences, heads, length, d]."""
        size, rank, length = self.context_group.size(), self.context_group.rank(), key.shape[2]
        mask = None
        if size > 1:
            at = torch.from_numpy(context_parallel_index([0, length], size, rank))
            mask = at[:, None] >= torch.arange(length)
        raised = (t.float() for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            *raised, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.to(query.dtype)


def _rows(tensor: Tensor, at: Tensor) -> Tensor:
    """tensor[at]: [*at.shape, ...]. The backward of `index_select` is many times faster than that of an index."""
    return tensor.index_select(0, at.flatten()).view(*at.shape, *tensor.shape[1:])


@functools.lru_cache(maxsize=2)  # every layer asks for the same
def _of_similar_length(boundaries: tuple[int, ...], size: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The sequences of a pack in groups that are attended to together.

    For each group the rows of this rank's queries, int64 [sequences, longest / size], and of the pack's keys
    [sequences, longest]; a shorter sequence repeats its last row behind its end. Then, for each of this rank's tokens,
    where it stands in the groups' rows laid one after the other. Lengths of a group differ by less than 32;
    under context parallelism, where a token's place depends on the length, they are equal.
    """
    lengths = np.diff(boundaries)
    groups, place, rows = [], np.empty(boundaries[-1] // size, dtype=np.int64), 0
    keys = -(-lengths // 32) if size == 1 else lengths
    for chosen in (np.flatnonzero(keys == key) for key in np.unique(keys)):
        longest, last = lengths[chosen].max(), lengths[chosen, None] - 1
        whole = np.minimum(np.arange(longest), last) + np.array(boundaries)[chosen, None]
        ours = np.minimum(np.arange(longest // size), last // size) + np.array(boundaries)[chosen, None] // size
        # Backwards: of a row that is repeated the first stays.
        place[ours.ravel()[::-1]] = np.arange(rows + ours.size)[rows:][::-1]
        rows += ours.size
        groups.append((torch.from_numpy(ours), torch.from_numpy(whole)))
    return groups, torch.from_numpy(place)


@functools.lru_cache(maxsize=2)
def _positions(boundaries: tuple[int, ...], size: int, rank: int) -> Tensor:
    """Where in its sequence each of this rank's tokens stands, int64 [tokens]."""
    at = context_parallel_index(boundaries, size, rank)
    starts = np.array(boundaries)
    return torch.from_numpy(at - starts[np.searchsorted(starts, at, side="right") - 1])


class _Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin, each product and the sum rounded, as Megatron's unfused RoPE; without its copies."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(g, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., d]; cos, sin: its two halves' common factors, [..., d / 2]."""
    with _no_torch_function():
        first, second = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        one, two = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=one).sub_(second * sin)
        torch.mul(second, cos, out=two).add_(first * sin)
    return out


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, config=None, cu_seqlens: Tensor | None = None, mscale: float = 1.0, cp_group=None, **_
) -> Tensor:
    """RoPE, in place of Megatron's function of this name: all sequences of a pack at once, not one after the other.

    t: [s, b, heads, d], or packed [tokens, heads, d] with `cu_seqlens`. freqs: [s, 1, 1, d], the angles of each place.
    """
    angles = freqs[..., : freqs.shape[-1] // 2]
    if cu_seqlens is not None:
        places = _positions(tuple(cu_seqlens.tolist()), cp_group.size(), cp_group.rank())
        angles = angles[places, 0]
    return _Rotation.apply(t, (angles.cos() * mscale).to(t.dtype), (angles.sin() * mscale).to(t.dtype))


class _SwiGLU(torch.autograd.Function):
    """silu(a) * b of x = [a, b], [..., 2 n] to [..., n]. The gradient takes 4 operations, not 9."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with _no_torch_function():
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with _no_torch_function():
            gate, up = x.chunk(2, dim=-1)
            out = torch.empty_like(x)
            of_gate, of_up = out.chunk(2, dim=-1)
            torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=of_gate)
            torch.mul(F.silu(gate), g, out=of_up)
        return out


def bias_swiglu_impl(x: Tensor, bias: Tensor | None, *_) -> Tensor:
    """SwiGLU, in place of Megatron's function of this name. x: [..., 2 ffn]."""
    return _SwiGLU.apply(x if bias is None else x + bias)


def layer_spec(model_config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, for `GPTModelConfig.transformer_layer_spec`.

    `first_last_layers_bf16` and --te-precision-config-file choose by layer, as on the GPU. Clears `config.fp8`
    afterwards: with it set, Megatron 0.19.2 calls TransformerEngine's checkpoint function under
    --recompute-granularity full.
    """
    config = model_config.transformer
    quantisation = Quantisation.from_config(config)
    count = get_num_layers_to_build(config, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage)
    layers = []
    for index in range(count):
        by_default = None if is_first_last_bf16_layer(config, first + index) else quantisation
        layers.append(_layer(config, functools.partial(chosen_quantisation, config, index, by_default)))
    config.fp8 = None
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=FinalRMSNorm)


def chosen_quantisation(config, index: int, by_default: Quantisation | None, module: str) -> Quantisation | None:
    """The quantisation of linear layer `module` ("mlp.linear_fc1") in the stage's layer `index`; None is BF16.

    What --te-precision-config-file says, read as Megatron's TransformerEngine layers read it (TEQuantizationRecipe,
    core 0.19.2): no recipe named is BF16, and a layer that is in BF16 by default stays so unless it says otherwise.
    """
    path = f"decoder.layers.{index}.{module}"
    chosen = get_quant_config_or_none(path, config.quant_recipe)
    if chosen is None:
        return by_default
    recipe = chosen.config["training_recipe"]
    emulated = {
        "fp8_quantization_recipe",
        "fp8_format",
        "override_quantized_autocast",
        "override_nonquantized_autocast",
    }
    if "evaluation_recipe" in chosen.config or set(recipe) - emulated:
        raise ValueError(
            f"--te-precision-config-file asks for {chosen.config} in {path}; the CPU backend emulates a "
            f"training_recipe of {', '.join(sorted(emulated))}"
        )
    if by_default is None and not recipe.get("override_nonquantized_autocast", False):
        return None
    if by_default is not None and not recipe.get("override_quantized_autocast", True):
        return by_default
    name = recipe.get("fp8_quantization_recipe")
    return None if name is None else Quantisation.of(name, recipe.get("fp8_format", "e4m3"))


def _layer(config, quantisation_of: Callable[[str], Quantisation | None]) -> ModuleSpec:
    def linear(module: str, plain: type, quantised: type):
        quantisation = quantisation_of(module)
        return plain if quantisation is None else functools.partial(quantised, quantisation=quantisation)

    column = (tensor_parallel.ColumnParallelLinear, QuantisedColumnParallelLinear)
    row = (tensor_parallel.RowParallelLinear, QuantisedRowParallelLinear)
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv = linear("self_attention.linear_qkv", *column)
    attention.linear_proj = linear("self_attention.linear_proj", *row)
    attention.core_attention = CoreAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    mlp = MLPSubmodules(linear_fc1=linear("mlp.linear_fc1", *column), linear_fc2=linear("mlp.linear_fc2", *row))
    layer.submodules.mlp = functools.partial(MLP.as_mlp_submodule, submodules=mlp)
    return layer
