"""The emulated FP8 linear layer beside TransformerEngine's on a Hopper GPU: the error table of docs/numerics.md.

bash scripts/test.sh --gpu
"""

import json

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")

SHAPES = {  # tokens, inner, outer: linear layers of Qwen2.5-1.5B and 7B
    "1.5B qkv": (4096, 1536, 2048),
    "1.5B fc1": (4096, 1536, 17920),
    "1.5B fc2": (4096, 8960, 1536),
    "7B fc2": (4096, 18944, 3584),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def by_transformer_engine(x, w, g) -> list[torch.Tensor]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Format

    linear = te.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        linear.weight.copy_(w)
    leaf = x.clone().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling(fp8_format=Format.E4M3)):
        y = linear(leaf)
    y.backward(g)
    return [y.detach(), leaf.grad, linear.weight.grad]


def by_emulation(x, w, g, dtype: torch.dtype) -> list[torch.Tensor]:
    """Our layer's three products in `dtype`; FP64 gives the exact products of the same codes."""
    from infir2 import fp8

    q = lambda t, tile: fp8.fake_quantize(t, tile).to(dtype)  # noqa: E731
    wq = q(w, fp8.BLOCK)
    return [q(x, fp8.ROW) @ wq.t(), q(g, fp8.ROW) @ wq, q(g, fp8.COLUMN).t() @ q(x, fp8.COLUMN)]


@pytest.mark.parametrize("layer", SHAPES)
def test_linear_layer(layer):
    """Outputs and both gradients: what quantisation costs, and how far the GPU's sums are from exact ones.

    Pins: operands that differ from TransformerEngine's, which would be a hundred times the difference of summation.
    """
    tokens, inner, outer = SHAPES[layer]
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16()  # noqa: E731
    x, w, g = make(tokens, inner), make(outer, inner) * 0.02, make(tokens, outer) * 1e-3
    x[:, :4] *= 20  # outlier channels
    real, ours, codes = by_transformer_engine(x, w, g), by_emulation(x, w, g, torch.bfloat16), []
    codes = by_emulation(x, w, g, torch.float64)
    exact = [x.double() @ w.double().t(), g.double() @ w.double(), g.double().t() @ x.double()]
    for name, te, emulated, product, truth in zip(("y", "dx", "dw"), real, ours, codes, exact, strict=True):
        row = {
            "layer": layer,
            "tensor": name,
            "quantisation": relative(product, truth),
            "te_sum": relative(te, product),
            "emulated_sum": relative(emulated, product),
            "te_to_emulated": relative(te, emulated),
            "bf16": relative(truth.bfloat16(), truth),
        }
        print(json.dumps(row))
        assert row["te_to_emulated"] < 4e-3  # BF16 outputs round at 1.7e-3 each (norm); operands off by a scale: 2e-2
