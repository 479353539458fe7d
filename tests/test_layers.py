"""The emulated FP8 linear layer against a plain computation of its three GEMMs."""

import itertools

import torch
from tolerances import BF16_OUTPUT
from trainer import with_megatron

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
