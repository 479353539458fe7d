"""The emulated FP8 linear layer against a plain computation of its three GEMMs."""

import functools
import itertools

import pytest
import torch
from tolerances import BF16_OUTPUT
from trainer import losses, train, with_megatron

from infir2.precision import flags

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def oracle(x: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, pow2: bool) -> torch.Tensor:
    """What a GEMM's operand must be: each tile scaled by its largest magnitude, cast, scaled back. In FP64."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i, j in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], columns)):
        tile = x[i : i + rows, j : j + columns]
        amax = tile.abs().max().float()
        scale = torch.tensor(MAX[dtype]) / amax if amax > 0 else torch.tensor(1.0)
        if pow2:
            scale = torch.ldexp(torch.tensor(1.0), torch.frexp(scale).exponent - 1)
        code = (tile.float() * scale).to(dtype)
        out[i : i + rows, j : j + columns] = code.double() / scale.double()
    return out


def differences(case: tuple) -> list[float]:
    """Largest difference of y, dx and dw to the oracle, relative to the largest element. Needs Megatron loaded."""
    from infir2 import fp8, layers

    (tokens, inner, outer), gradient, pow2, dtype, magnitude = case
    generator = torch.Generator().manual_seed(tokens + inner)
    x, w, g = (
        (torch.randn(*shape, generator=generator) * magnitude).to(dtype)
        for shape in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    x[:, 0], x[1], w[:128, :128] = 30 * magnitude, 0, 0  # an outlier channel, a token and a block of zeros
    formats = {torch.float8_e4m3fn: fp8.E4M3, torch.float8_e5m2: fp8.E5M2}
    quantisation = layers.Quantisation(fp8.E4M3, formats[gradient], "pow2" if pow2 else "fp32")
    leaf, weight = x.view(2, tokens // 2, inner).requires_grad_(), w.requires_grad_()
    y = layers.QuantisedMatmul.apply(leaf, weight, quantisation)
    y.backward(g.view_as(y))
    x, w = x.detach(), w.detach()
    e4m3 = (torch.float8_e4m3fn, pow2)
    weight_operand = oracle(w, 128, 128, *e4m3)
    wanted = [
        oracle(x, 1, 128, *e4m3) @ weight_operand.t(),
        oracle(g, 1, 128, gradient, pow2) @ weight_operand,
        oracle(g, 128, 1, gradient, pow2).t() @ oracle(x, 128, 1, *e4m3),
    ]
    found = [y.detach().reshape(tokens, outer), leaf.grad.reshape(tokens, inner), weight.grad]
    return [((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, wanted, strict=True)]


def per_tensor_differences() -> list[float]:
    """As `differences`, for --fp8-recipe tensorwise --fp8-format hybrid, read from Megatron's configuration."""
    from types import SimpleNamespace

    from infir2 import layers

    quantisation = layers.Quantisation.from_config(SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise"))
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((256, 384), (128, 384), (256, 128)))
    x[:, 0] *= 50
    leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = layers.QuantisedMatmul.apply(leaf, weight, quantisation)
    y.backward(g)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    qx, qw, qg = (oracle(t, *t.shape, dtype, False) for t, dtype in ((x, e4m3), (w, e4m3), (g, e5m2)))
    wanted = [qx @ qw.t(), qg @ qw, qg.t() @ qx]
    found = [y.detach(), leaf.grad, weight.grad]
    return [((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, wanted, strict=True)]


def all_differences(cases: list[tuple]) -> list[list[float]]:
    return [differences(case) for case in cases]


def test_three_gemms():
    """Forward, input gradient and weight gradient are products of correctly tiled operands, for both gradient formats,
    both scale formats, BF16 and FP32, and magnitudes far from 1.

    Pins: a weight gradient from row-wise codes, blocks cut along the wrong dimension, a scale applied twice.
    """
    shapes = [(256, 128, 384), (128, 384, 256)]
    grid = (shapes, list(MAX), (True, False), (torch.bfloat16, torch.float32), (1e-4, 300.0))
    cases = list(itertools.product(*grid))
    for case, found in zip(cases, with_megatron("test_layers", "all_differences", cases), strict=True):
        tolerance = BF16_OUTPUT if case[3] == torch.bfloat16 else 1e-5
        assert max(found) <= tolerance, (case, found)


def test_per_tensor_scales():
    """Precision fp8-current: each operand has one FP32 scale, the same codes serve two GEMMs, gradients are in E5M2.

    Pins: power-of-two scales taken from SCALE_FMT, which TransformerEngine's current scaling does not use.
    """
    assert max(with_megatron("test_layers", "per_tensor_differences")) <= BF16_OUTPUT


PRECISIONS = {  # of the 16 linear layers of 4 transformer layers
    "fp8-current": "emulated FP8 hybrid tensorwise, scales fp32: 16 of 16",
    "fp8-mlp": "emulated FP8 e4m3 blockwise, scales pow2, by module as in fp8_mlp.yaml: 4 of 16",
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_named_precision_trains(run_flags, tmp_path, precision):
    """A run states how many linear layers its precision puts in FP8, and learns: fp8-mlp leaves fc1 and fc2 of the
    middle layers.

    Pins: a choice by module that one backend reads and the other ignores.
    """
    more = ["--num-layers", "4", "--train-iters", "12", "--lr-warmup-iters", "2"]
    train(run_flags(tmp_path, *flags(precision), *more), tmp_path / "log")
    assert f"[infir2] backend cpu, {PRECISIONS[precision]} linear layers in FP8" in (tmp_path / "log").read_text()
    found = losses(tmp_path)
    assert found[12] < found[1]


def test_unknown_precision_lists_the_known():
    with pytest.raises(ValueError, match="known: bf16 fp8 fp8-hybrid fp8-current fp8-mlp"):
        flags("fp9")


def choices(recipe: dict, in_fp8: bool) -> str:
    """What infir2.layers makes of one recipe for a layer that is in FP8 by default, or in BF16."""
    from types import SimpleNamespace

    from megatron.core.quantization.quant_config import RecipeConfig

    from infir2 import layers

    matcher = {"type": "glob", "pattern": "*.linear_qkv", "config": "chosen", "enabled": True}
    content = {"configs": {"chosen": {"training_recipe": recipe}}, "matchers": {"one": matcher}}
    config = SimpleNamespace(quant_recipe=RecipeConfig.from_config_dict(content))
    default = layers.Quantisation.of("blockwise", "e4m3") if in_fp8 else None
    try:
        found = layers.chosen_quantisation(config, 0, default, "self_attention.linear_qkv")
        assert layers.chosen_quantisation(config, 0, default, "mlp.linear_fc1") is default
    except ValueError as error:
        return str(error)
    return "bf16" if found is None else "tensorwise" if found.per_tensor else "blockwise"


def test_recipes_by_module():
    """The rules of Megatron's TransformerEngine layers: no recipe is BF16, and BF16 layers stay so unless told."""
    cases = [
        (({}, True), "bf16"),
        (({}, False), "bf16"),
        (({"fp8_quantization_recipe": "tensorwise"}, True), "tensorwise"),
        (({"fp8_quantization_recipe": "tensorwise"}, False), "bf16"),
        (({"fp8_quantization_recipe": "tensorwise", "override_nonquantized_autocast": True}, False), "tensorwise"),
        (({"override_quantized_autocast": False}, True), "blockwise"),
        (({"fp4_quantization_recipe": "nvfp4"}, True), "the CPU backend emulates a training_recipe of"),
        (({"fp8_quantization_recipe": "mxfp8"}, True), "emulates --fp8-recipe blockwise and tensorwise"),
    ]
    for arguments, wanted in cases:
        assert wanted in with_megatron("test_layers", "choices", *arguments), arguments


def refusal() -> str:
    from infir2 import fp8, layers

    try:
        layers.QuantisedMatmul.apply(
            torch.ones(96, 128), torch.ones(128, 128), layers.Quantisation(fp8.E4M3, fp8.E4M3, "pow2")
        )
    except ValueError as error:
        return str(error)
    return ""


def test_tokens_are_a_multiple_of_128():
    """Pins: Megatron's own alignment helper, which says 16."""
    assert "found 96" in with_megatron("test_layers", "refusal")


def packed_attention_and_rotation(lengths: list[int], seed: int) -> list[float]:
    """Largest relative difference of CoreAttention's and the rotation's results and gradients on a pack to each
    sequence computed alone: attention in FP64 from its definition, the rotation by Megatron's own function."""
    from types import SimpleNamespace

    import numpy as np
    from megatron.core.models.common.embeddings import rope_utils

    from infir2 import layers

    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    generator = torch.Generator().manual_seed(seed)
    total, boundaries = sum(lengths), np.cumsum([0, *lengths]).tolist()
    q, k, v = (torch.randn(total, heads, 32, generator=generator).bfloat16() for heads in (4, 2, 2))
    angles = torch.outer(torch.arange(max(lengths) + 1.0), 10.0 ** -torch.linspace(0, 3, 16))
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    g = torch.randn(total, 4 * 32, generator=generator).bfloat16()
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32))
    core = layers.CoreAttention(None, 1, None, None, softmax_scale=0.2, pg_collection=SimpleNamespace(cp=alone))
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    rotate = functools.partial(layers.apply_rotary_pos_emb, cu_seqlens=packed.cu_seqlens_q, cp_group=alone)
    out = core(rotate(ours[0], freqs), rotate(ours[1], freqs), ours[2], packed_seq_params=packed)
    out.backward(g)
    theirs = [t.clone().requires_grad_() for t in (q, k, v)]
    parts = []
    for start, end in itertools.pairwise(boundaries):
        one = [t[start:end, None] for t in theirs]
        one[:2] = (rope_utils._apply_rotary_pos_emb_bshd(t, freqs[: end - start]) for t in one[:2])
        a, b, c = (t[:, 0].double() for t in one)
        b, c = (t.repeat_interleave(2, dim=1) for t in (b, c))
        scores = torch.einsum("qhd,khd->hqk", a, b) * 0.2
        scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c).flatten(1))
    wanted = torch.cat(parts)
    wanted.backward(g.double())
    pairs = [(out, wanted), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return [((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs]


def test_packed_sequences_are_attended_to_alone():
    """Sequences of one pack, of lengths far apart and alike: results and gradients are those of each alone.

    Pins: a sequence that sees the padding of its group or its neighbour, a position counted through the pack, a token's
    gradient lost or counted twice where a group is padded.
    """
    for seed, lengths in enumerate([[1, 2], [5, 3], [31, 32, 33, 64, 65], [1, 200, 2, 199, 128], [7] * 9]):
        found = with_megatron("test_layers", "packed_attention_and_rotation", lengths, seed)
        assert max(found) <= 2 * BF16_OUTPUT, (lengths, found)


def rotation_is_megatrons() -> bool:
    """Whether the unpacked rotation and its gradient are those of Megatron's function, bit for bit."""
    from megatron.core.models.common.embeddings import rope_utils

    from infir2 import layers

    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(48, 3, 2, 64, generator=generator).bfloat16() for _ in range(2))
    angles = torch.outer(torch.arange(48.0), 10.0 ** -torch.linspace(0, 4, 32))
    freqs = torch.cat([angles, angles], dim=-1)[:, None, None]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = layers.apply_rotary_pos_emb(ours, freqs), rope_utils._apply_rotary_pos_emb_bshd(theirs, freqs)
    out.backward(g)
    wanted.backward(g)
    return torch.equal(out, wanted) and torch.equal(ours.grad, theirs.grad)


def swiglu_differences() -> list[float]:
    """Of SwiGLU and its gradient to FP64, relative to the largest element."""
    from infir2 import layers

    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(40, 2, 96, generator=generator).bfloat16() * 4, torch.randn(40, 2, 48, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out = layers.bias_swiglu_impl(ours, None)
    gate, up = theirs.chunk(2, dim=-1)
    wanted = gate * torch.sigmoid(gate) * up
    out.backward(g.bfloat16())
    wanted.backward(g.bfloat16().double())
    pairs = [(out, wanted), (ours.grad, theirs.grad)]
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def test_swiglu():
    assert max(with_megatron("test_layers", "swiglu_differences")) <= 2 * BF16_OUTPUT  # two roundings


def test_rotation_is_megatrons():
    assert with_megatron("test_layers", "rotation_is_megatrons")
