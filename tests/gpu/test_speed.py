"""The parts that make a step faster, on one Hopper GPU: the same values as the plain ones, and what they take.

python -m pytest -o addopts= -s tests/gpu/test_speed.py
"""

import functools
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tolerances import BF16_OUTPUT, FP32_LINEAR_CROSS_ENTROPY

from infir2 import fp8
from infir2.speed import deep_gemm, flash_attention, linear_cross_entropy, weight_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
VOCABULARY, WIDTH = 151936, 1536  # Qwen2.5-1.5B's head


def problem(tokens: int, vocabulary: int, width: int):
    """x, weight, target, token weight in BF16, of the sizes a trained model has: logits of about 3."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(vocabulary, width, generator=generator, device="cuda") * 3 / width**0.5).bfloat16()
    target = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    return x, weight, target, (torch.rand(tokens, generator=generator, device="cuda") < 0.8).float()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def milliseconds(function) -> float:
    """Median of ten calls after three."""
    times = []
    for number in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("columns", [1000, 8192, VOCABULARY])
@pytest.mark.parametrize("first", [0, -500])
def test_kernels(columns, first):
    """The Triton kernels against plain torch; targets outside of this rank's columns; both ways of being called."""
    from infir2.speed import cross_entropy_kernels as kernels

    reference = linear_cross_entropy._TorchRows
    generator = torch.Generator(device="cuda").manual_seed(columns)
    logits = (torch.randn(300, columns, generator=generator, device="cuda") * 4).bfloat16()
    target = torch.randint(first, columns + first, (300,), generator=generator, device="cuda")
    token_weight = torch.rand(300, generator=generator, device="cuda").round()
    ours, theirs = logits.clone(), logits.clone()
    for found, wanted in zip(
        kernels.statistics(ours, target, token_weight), reference.statistics(theirs, target, token_weight), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=FP32_LINEAR_CROSS_ENTROPY, atol=FP32_LINEAR_CROSS_ENTROPY)
    assert error(ours, theirs) < BF16_OUTPUT
    apart = logits.clone()
    maximum, total, _ = kernels.statistics(apart, target)
    assert torch.equal(apart, logits)
    kernels.gradient_(apart, target, token_weight, maximum + total.log())
    assert error(apart, theirs) < BF16_OUTPUT


def plain(x, weight, target, token_weight):
    losses = torch.nn.functional.cross_entropy(
        (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)), target, reduction="none"
    )
    loss = (losses * token_weight).sum()
    loss.backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("at_once", [False, True])
def test_linear_cross_entropy(at_once, monkeypatch):
    """Loss and gradients against FP64, in several chunks: no further from it than the plain path in BF16. `at_once`:
    the weight's gradient added to a main gradient in the forward pass."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS", 384 * VOCABULARY)
    inputs = problem(1000, VOCABULARY, WIDTH)
    leaves = [
        [t.detach().to(dtype).requires_grad_() for t in inputs[:2]]
        for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    ]
    exact = plain(*leaves[0], *inputs[2:])
    in_bf16 = plain(*leaves[1], *inputs[2:])
    x, weight = leaves[2]
    if at_once:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
    factor = torch.ones((), device="cuda") if at_once else None
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, *inputs[2:], factor=factor)
    loss.backward()
    of_weight = weight.main_grad if at_once else weight.grad
    for name, found, control, wanted in zip(
        ("loss", "dx", "dW"), (loss.detach(), x.grad, of_weight), in_bf16, exact, strict=True
    ):
        print(json.dumps({"what": name, "error": error(found, wanted), "plain path's": error(control, wanted)}))
        assert error(found, wanted) < max(1.1 * error(control, wanted), FP32_LINEAR_CROSS_ENTROPY)


@pytest.mark.parametrize("overwrite", [False, True])
def test_accumulate(overwrite):
    """The weight gradient of two micro-batches in FP32: TransformerEngine's GEMM adds to what is there."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, g = (torch.randn(2048, size, generator=generator, device="cuda").bfloat16() for size in (1536, 896))
    main_grad = torch.randn(896, 1536, generator=generator, device="cuda") * 100
    wanted = (0 if overwrite else main_grad.double()) + g.double().t() @ x.double()
    weight_gradient.accumulate(main_grad, g, x, overwrite=overwrite)
    assert error(main_grad, wanted) < FP32_LINEAR_CROSS_ENTROPY


def test_time_and_memory_of_the_head():
    """16,384 tokens forward and backward, beside the head's three GEMMs alone: prints both."""
    x, weight, target, token_weight = problem(16384, VOCABULARY, WIDTH)
    x, weight = x.requires_grad_(), torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    weight.zero_out_wgrad = True
    factor = torch.tensor(1e-4, device="cuda")

    def step():
        loss = linear_cross_entropy.linear_cross_entropy(x, weight, target, token_weight, factor=factor)
        (loss * factor).backward()

    def gemms():
        for rows in x.detach().split(3328):
            logits = rows @ weight.detach().t()
            logits @ weight.detach()
            weight_gradient.accumulate(weight.main_grad, logits, rows)

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    found = {"ms": milliseconds(step), "its GEMMs alone, ms": milliseconds(gemms), "extra peak GB": peak / 1e9}
    print(json.dumps(found | {"logits in BF16, GB": 16384 * VOCABULARY * 2 / 1e9}))
    assert peak < 16384 * VOCABULARY * 2


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


@pytest.mark.parametrize("scale_fmt", fp8.SCALE_FORMATS)
@pytest.mark.parametrize("fmt", [fp8.E4M3, fp8.E5M2])
def test_quantising_kernels(fmt, scale_fmt):
    """Codes and scales of infir2.fp8 from the same BF16 numbers, zeros and the smallest among them. Those may differ in
    a last bit where exp does, and so may one code in a thousand; more would be another rule. What is no number stays
    none: a saturated code would hide it from the gradient norm."""
    from infir2.speed import quantising_kernels

    random = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(512, 1024, generator=random, device="cuda").bfloat16()
    dy = torch.randn(512, 512, generator=random, device="cuda").bfloat16()
    x[3], x[4], x[:, 5], x[:, 6], x[5] = 0, x[4] * 1e-20, 0, x[:, 6] * 1e-30, x[5] * 1e10
    leaf = x.float().requires_grad_()
    y = swiglu(leaf)
    y.backward(dy.float())
    arguments = fmt.dtype, scale_fmt == "pow2"
    found = quantising_kernels.swiglu(x, *arguments), quantising_kernels.swiglu_gradient(dy, x, *arguments)
    for one, wanted in zip(found, (y.detach().bfloat16(), leaf.grad.bfloat16()), strict=True):
        for codes, scale_inv, tensor in ((*one.parts[:2], wanted), (*one.parts[2:], wanted.t().contiguous())):
            right, scales = fp8.quantize(tensor, fp8.ROW, fmt=fmt, scale_fmt=scale_fmt)
            assert (scale_inv.t() != scales).float().mean() < 0.02
            same = (scale_inv.t() == scales).repeat_interleave(128, 1)
            assert (codes.view(torch.uint8) != right.view(torch.uint8))[same].float().mean() < 0.001
    x[7, 3], x[8, 4] = torch.nan, torch.inf
    for one in (quantising_kernels.swiglu(x, *arguments), quantising_kernels.swiglu_gradient(dy, x, *arguments)):
        for row, column in ((7, 3), (8, 4)):
            assert one.codes.float()[row, column].isnan()
            assert one.transposed.float()[column, row].isnan()


def test_time_of_quantising_kernels():
    """At 1.5B's size, beside a copy: prints bytes a second of each, those that the maths needs."""
    from infir2.speed import quantising_kernels

    tokens, features = 16384, 8960
    x = torch.randn(tokens, 2 * features, device="cuda").bfloat16()
    dy = torch.randn(tokens, features, device="cuda").bfloat16()
    target = torch.empty_like(x)
    calls = {
        "copy": (lambda: target.copy_(x), 8),
        "forward": (lambda: quantising_kernels.swiglu(x, torch.float8_e4m3fn, True), 6),
        "backward": (lambda: quantising_kernels.swiglu_gradient(dy, x, torch.float8_e4m3fn, True), 10),
    }
    found = {name: milliseconds(call) for name, (call, _) in calls.items()}
    rates = {name: tokens * features * calls[name][1] / ms / 1e6 for name, ms in found.items()}
    print(json.dumps({"ms": found, "GB/s": rates}))
    assert rates["forward"] > 0.5 * rates["copy"]
    assert rates["backward"] > 0.4 * rates["copy"]


def feed_forward(function, less: bool = False, tokens: int = 16384, hidden: int = 1536, ffn: int = 8960):
    """A layer's feed-forward part of the 1.5B shape in blockwise FP8: result, gradients, milliseconds, bytes kept."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    from infir2.speed import quantised_swiglu, te_quantisation

    torch.manual_seed(0)
    fc1 = te.LayerNormLinear(hidden, 2 * ffn, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16)
    fc2 = te.Linear(ffn, hidden, bias=False, params_dtype=torch.bfloat16)
    if less:
        fc1.forward, fc2.forward = (te_quantisation.keeping_less(layer.forward) for layer in (fc1, fc2))
    else:
        fc2.forward = quantised_swiglu._letting_go(fc2.forward)
    x = torch.randn(tokens // 2, 2, hidden, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(tokens // 2, 2, hidden, device="cuda").bfloat16()
    kept = []

    def step():
        before = torch.cuda.memory_allocated()
        with te.autocast(enabled=True, recipe=Float8BlockScaling()):
            result = fc2(function(fc1(x)))
        kept.append(torch.cuda.memory_allocated() - before)
        result.backward(dy)
        return result.detach()

    result = step()
    gradients = [t.grad.clone() for t in (x, fc1.weight, fc2.weight)]
    return result, gradients, milliseconds(step), kept[-1]


def test_swiglu_between_fp8_layers():
    """The feed-forward part with SwiGLU's quantisation in its kernel, against the plain one: the same FP8 maths."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    from infir2.speed import quantised_swiglu

    plain = feed_forward(lambda x: bias_swiglu_impl(x, None))
    ours = feed_forward(lambda x: quantised_swiglu.in_place_of(bias_swiglu_impl)(x, None))
    row = {"plain_ms": plain[2], "ours_ms": ours[2], "plain_mb": plain[3] / 1e6, "ours_mb": ours[3] / 1e6}
    row["errors"] = [error(a, b) for a, b in zip([ours[0], *ours[1]], [plain[0], *plain[1]], strict=True)]
    print(json.dumps(row))
    assert max(row["errors"]) < BF16_OUTPUT
    assert ours[3] <= plain[3] * 1.01


def test_swiglu_computed_again():
    """The same bits with SwiGLU's result computed again for fc2's weight gradient, and a byte less kept for each of its
    elements. Pins columns of another tensor, and a tensor that something else still holds. Prints ms of both."""
    from infir2.speed import quantised_swiglu

    kept, again = (
        feed_forward(lambda x, way=way: quantised_swiglu.in_place_of(None, recompute=way)(x, None), less=way)
        for way in (False, True)
    )
    print(json.dumps({"kept_ms": kept[2], "again_ms": again[2], "kept_mb": kept[3] / 1e6, "again_mb": again[3] / 1e6}))
    for one, other in zip([kept[0], *kept[1]], [again[0], *again[1]], strict=True):
        assert torch.equal(one, other)
    assert again[3] <= kept[3] - 0.99 * 16384 * 8960


@pytest.mark.parametrize("what", ["norms", "weights"])
def test_layers_keep_less(what, monkeypatch):
    """The same bits with SwiGLU's column-wise copy, and a norm's or those of weights, made in the backward pass. Prints
    ms of both. Pins a copy of another tensor or an earlier step, and one that something else still holds."""
    import transformer_engine.pytorch.cpp_extensions as tex
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as te_blocks

    from infir2.speed import quantised_swiglu, te_quantisation

    def run(less: bool):
        with monkeypatch.context() as patch:
            norm = te_quantisation.norm_in_place_of(tex.rmsnorm_fwd, recompute=less and what == "norms")
            patch.setattr("transformer_engine.pytorch.module._common.tex.rmsnorm_fwd", norm)
            if less and what == "weights":
                usage = te_quantisation.usage_in_place_of(te_blocks.Float8BlockQuantizer.set_usage)
                patch.setattr(te_blocks.Float8BlockQuantizer, "set_usage", usage)
                storage = te_blocks.Float8BlockwiseQTensorStorage
                patch.setattr(storage, "update_usage", te_quantisation.late_transposes(storage.update_usage))
            return feed_forward(lambda x: quantised_swiglu.in_place_of(None, recompute=less)(x, None), less=less)

    all_kept, less = run(False), run(True)
    row = {"kept_ms": all_kept[2], "again_ms": less[2], "kept_mb": all_kept[3] / 1e6, "again_mb": less[3] / 1e6}
    print(json.dumps({"what": what} | row))
    for one, other in zip([all_kept[0], *all_kept[1]], [less[0], *less[1]], strict=True):
        assert torch.equal(one, other)
    freed = 16384 * 1536 if what == "norms" else 3 * 1536 * 8960
    assert less[3] <= all_kept[3] - 0.99 * (16384 * 8960 + freed)


@pytest.mark.parametrize("columns", [1536, 3584])
def test_quantised_norm(columns):
    """TransformerEngine's RMSNorm with a quantised result and ours: the same codes and scales but for sums in another
    order. Pins a row's factor on another row, and a weight left out. Prints ms of both."""
    import transformer_engine.pytorch.cpp_extensions as tex
    from transformer_engine.pytorch import Float8BlockQuantizer
    from transformer_engine.pytorch.constants import TE_DType

    from infir2.speed import te_quantisation

    torch.manual_seed(0)
    x = (torch.randn(16384, columns, device="cuda") * torch.logspace(-2, 2, 16384, device="cuda")[:, None]).bfloat16()
    weight = torch.rand(columns, device="cuda").bfloat16() + 0.5
    quantiser = Float8BlockQuantizer(TE_DType[torch.float8_e4m3fn], rowwise=True, columnwise=True, block_scaling_dim=1)
    arguments = (x, weight, 1e-6, None, quantiser, TE_DType[torch.bfloat16], 0, False)
    functions = {"TransformerEngine": tex.rmsnorm_fwd, "ours": te_quantisation.norm_in_place_of(None)}
    (wanted, _, factors), (found, _, ours) = (function(*arguments) for function in functions.values())
    torch.testing.assert_close(ours, factors.view(-1), rtol=1e-5, atol=0)
    names = [f"_{way}wise_{what}" for way in ("row", "column") for what in ("data", "scale_inv")]
    same = {one: float((getattr(found, one) == getattr(wanted, one)).float().mean()) for one in names}
    found_ms = {name: milliseconds(functools.partial(function, *arguments)) for name, function in functions.items()}
    print(json.dumps({"columns": columns, "same": same, "ms": found_ms}))
    assert min(same.values()) > 0.999


@pytest.mark.parametrize("columns", [1536, 4608])
def test_fast_quantisation(columns):
    """The bits of TransformerEngine's quantiser, of what may be in a gradient. Prints ms of ten calls of both."""
    from transformer_engine.pytorch import Float8BlockQuantizer
    from transformer_engine.pytorch.constants import TE_DType

    from infir2.speed import te_quantisation

    torch.manual_seed(0)
    x = (
        torch.randn(8192, 2, columns, device="cuda") * torch.logspace(-9, 3, 8192, device="cuda")[:, None, None]
    ).bfloat16()
    x[3], x[:, :, 5], x[7:9] = 0, 0, x[7:9] * 1e-30
    quantiser = Float8BlockQuantizer(TE_DType[torch.float8_e4m3fn], rowwise=True, columnwise=True, block_scaling_dim=1)
    original = Float8BlockQuantizer.quantize_impl
    functions = {"TransformerEngine": original, "ours": te_quantisation.quantiser_in_place_of(None)}
    wanted, found = (function(quantiser, x) for function in functions.values())
    for name in [f"_{way}wise_{what}" for way in ("row", "column") for what in ("data", "scale_inv")]:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    quantiser.internal = True
    inside = functions["ours"](quantiser, x)
    assert not isinstance(inside, torch.Tensor)
    assert type(inside) is type(original(quantiser, x))

    def ten(function):
        return milliseconds(lambda: [function(quantiser, x) for _ in range(10)])

    print(json.dumps({"columns": columns, "ms": {name: ten(function) / 10 for name, function in functions.items()}}))


def test_bias_gradient(monkeypatch):
    """A layer's bias in blockwise FP8: its gradient as near to FP64's as TransformerEngine's, everything else the same
    bits. Prints ms of both."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from infir2.speed import te_quantisation

    torch.manual_seed(0)
    layer = te.LayerNormLinear(1536, 2048, normalization="RMSNorm", params_dtype=torch.bfloat16)
    x = torch.randn(8192, 2, 1536, device="cuda").bfloat16().requires_grad_()
    gradient = (torch.randn(8192, 2, 2048, device="cuda") + 0.1).bfloat16()

    def step():
        layer.zero_grad()
        x.grad = None
        with te.autocast(enabled=True, recipe=Float8BlockScaling()):
            result = layer(x)
        result.backward(gradient)

    found = []
    for replace in (None, te_quantisation.bias_gradient_in_place_of):
        if replace:
            new = replace(TransformerEngineBaseModule.grad_output_preprocess)
            monkeypatch.setattr(TransformerEngineBaseModule, "grad_output_preprocess", new)
        step()
        found.append([x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone(), milliseconds(step)])
    theirs, ours = found
    wanted = gradient.double().sum((0, 1))
    print(json.dumps({"errors": [error(one[2], wanted) for one in found], "ms": [theirs[3], ours[3]]}))
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
    assert error(ours[2], wanted) < max(1.1 * error(theirs[2], wanted), BF16_OUTPUT)


TOKENS = 16384
LAYERS = {  # outputs, inputs of each linear layer
    "1.5B": {"qkv": (2048, 1536), "proj": (1536, 1536), "fc1": (17920, 1536), "fc2": (1536, 8960)},
    "7B": {"qkv": (4608, 3584), "proj": (3584, 3584), "fc1": (37888, 3584), "fc2": (3584, 18944)},
}


def layer_products(outputs: int, inputs: int):
    """By product: a call that computes it by TransformerEngine's `general_gemm` from blockwise FP8, the same in BF16,
    and in FP64 from the FP8 operands' values. Weight gradients are added to `main`, which comes last."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import Float8BlockQuantizer
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    def quantised(tensor, dimensions):
        return Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=dimensions)(
            tensor
        )

    generator = torch.Generator(device="cuda").manual_seed(0)
    x, weight, gradient = (
        torch.randn(*size, generator=generator, device="cuda").bfloat16()
        for size in ((TOKENS, inputs), (outputs, inputs), (TOKENS, outputs))
    )
    q, qw, qg = quantised(x, 1), quantised(weight, 2), quantised(gradient, 1)
    main = torch.ones(outputs, inputs, device="cuda")
    into = {"out_dtype": torch.float32, "out": main, "accumulate": True}
    bf16 = torch.bfloat16
    calls = {
        "forward": lambda: general_gemm(qw, q, out_dtype=bf16, layout="TN")[0],
        "input gradient": lambda: general_gemm(qw, qg, out_dtype=bf16, layout="NN", grad=True)[0],
        "weight gradient": lambda: general_gemm(q, qg, layout="NT", grad=True, **into)[0],
    }
    in_bf16 = {
        "forward": lambda: general_gemm(weight, x, out_dtype=bf16, layout="TN")[0],
        "input gradient": lambda: general_gemm(weight, gradient, out_dtype=bf16, layout="NN", grad=True)[0],
        "weight gradient": lambda: general_gemm(x, gradient, layout="NT", grad=True, **into)[0],
    }
    exact = {
        "forward": lambda: q.dequantize(dtype=torch.float32).double() @ qw.dequantize(dtype=torch.float32).double().t(),
        "input gradient": lambda: (
            qg.dequantize(dtype=torch.float32).double() @ qw.dequantize(dtype=torch.float32).double()
        ),
        "weight gradient": lambda: main.double() + columns(qg).double().t() @ columns(q).double(),
    }
    return calls, in_bf16, exact, main


def columns(tensor) -> torch.Tensor:
    """The values of the column-wise copy, which differ from the row-wise ones'."""
    codes = tensor._columnwise_data.view(torch.float8_e4m3fn).float()
    scales = tensor._columnwise_scale_inv[:, : codes.shape[0]].t().repeat_interleave(128, 1)
    return (codes * scales).t()


def library_of_deep_gemm(monkeypatch):
    """The module that holds `generic_gemm`; from here on DeepGEMM computes every product that it can."""
    pytest.importorskip("deep_gemm")
    import transformer_engine.pytorch  # noqa: F401  it loads the next
    import transformer_engine_torch

    monkeypatch.setattr(deep_gemm, "_cublas_is_faster", lambda outputs, inputs: False)
    return transformer_engine_torch


@pytest.mark.parametrize("layer", LAYERS["1.5B"])
def test_deep_gemm(layer, monkeypatch):
    """A layer's three products by DeepGEMM and by cuBLAS, from FP64: about as far, for tensor cores add FP8 products up
    with some 14 bits. The calls must have got there."""
    tex = library_of_deep_gemm(monkeypatch)
    calls, _, exact, main = layer_products(*LAYERS["1.5B"][layer])

    def refuse(*args, **options):
        raise AssertionError("went on to cuBLAS")

    for product, call in calls.items():
        errors = {}
        for name, function in (("cublas", tex.generic_gemm), ("deep_gemm", deep_gemm.in_place_of(refuse))):
            main.fill_(1)
            wanted = exact[product]()
            with monkeypatch.context() as patch:
                patch.setattr(tex, "generic_gemm", function)
                errors[name] = error(call(), wanted)
        print(json.dumps({"layer": layer, "product": product, "errors": errors}))
        assert errors["deep_gemm"] < max(1.25 * errors["cublas"], FP32_LINEAR_CROSS_ENTROPY)


@pytest.mark.parametrize("shape", LAYERS)
def test_time_of_deep_gemm(shape, monkeypatch):
    """Every product of a layer at 16,384 tokens, by cuBLAS and by DeepGEMM in FP8 and by cuBLAS in BF16: prints ms and
    TFLOP/s. Their sum is what a step spends; DeepGEMM must not lose it."""
    tex = library_of_deep_gemm(monkeypatch)

    def time_of(call) -> float:
        """Of one call among ten: a small one ends before the next is launched."""
        return milliseconds(lambda: [call() for _ in range(10)]) / 10

    original, sums = tex.generic_gemm, {"bf16": 0.0, "cublas": 0.0, "deep_gemm": 0.0}
    for layer, (outputs, inputs) in LAYERS[shape].items():
        calls, in_bf16, _, _ = layer_products(outputs, inputs)
        for product in calls:
            found = {"bf16": time_of(in_bf16[product]), "cublas": time_of(calls[product])}
            with monkeypatch.context() as patch:
                patch.setattr(tex, "generic_gemm", deep_gemm.in_place_of(original))
                found["deep_gemm"] = time_of(calls[product])
            rates = {name: round(2e-9 * TOKENS * outputs * inputs / ms) for name, ms in found.items()}
            print(json.dumps({"layer": layer, "product": product, "ms": found, "TFLOP/s": rates}))
            sums = {name: sums[name] + ms for name, ms in found.items()}
    print(json.dumps({"shape": shape, "a layer's products, ms": sums}))
    assert sums["deep_gemm"] < sums["cublas"]


def attention(length: int, samples: int, heads: int, groups: int, dimension: int = 128, boundaries=None):
    """q, k, v of causal attention in BF16, [s, b, h, d] or, where `boundaries` [n + 1] are given, packed [t, h, d]; a
    gradient of the output; and one call each of cuDNN by TransformerEngine and of FlashAttention 4 by ours, which give
    the output and the gradients of q, k, v. v is a part of a larger tensor, as Megatron hands it on."""
    import transformer_engine.pytorch as te
    from megatron.core.packed_seq_params import PackedSeqParams

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (length,) if boundaries else (length, samples)
    q, k, gradient, mixed = (
        torch.randn(*shape, *rest, generator=generator, device="cuda").bfloat16()
        for rest in ((heads, dimension), (groups, dimension), (heads * dimension,), (3 * groups, dimension))
    )
    inputs = [one.requires_grad_() for one in (q, k, mixed[..., groups : 2 * groups, :])]
    options, packed = {"qkv_format": "thd" if boundaries else "sbhd"}, None
    if boundaries:
        starts = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
        longest = max(after - before for before, after in pairwise(boundaries))
        sizes = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts, "max_seqlen_q": longest, "max_seqlen_kv": longest}
        packed = PackedSeqParams(qkv_format="thd", **sizes)
        options |= sizes
    options["attn_mask_type"] = "padding_causal" if boundaries else "causal"
    module = te.DotProductAttention(heads, dimension, num_gqa_groups=groups)

    def both_ways(function):
        def call():
            output = function()
            return output.detach(), *torch.autograd.grad(output, inputs, gradient)

        return call

    cudnn = both_ways(lambda: module(*inputs, **options))
    return inputs, gradient, cudnn, both_ways(lambda: flash_attention.causal(*inputs, packed).flatten(-2))


def plain_attention(q, k, v, gradient):
    """The same in FP32 for [s, b, h, d], without a kernel."""
    q, k, v = (one.detach().float().requires_grad_() for one in (q, k, v))
    wide = [one.repeat_interleave(q.shape[2] // one.shape[2], 2).permute(1, 2, 0, 3) for one in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(len(q), len(q), device="cuda").triu(1).bool(), -torch.inf)
    output = (scores.softmax(3) @ wide[2]).permute(2, 0, 1, 3).flatten(2)
    output.backward(gradient.float())
    return output.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize(
    ("length", "samples", "heads", "groups", "dimension", "boundaries"),
    [
        (1024, 2, 12, 2, 128, None),
        (200, 3, 4, 4, 128, None),  # no whole tiles
        (512, 2, 9, 3, 64, None),
        (1000, 1, 12, 2, 128, [0, 1, 300, 301, 900, 1000]),
        (512, 1, 9, 3, 64, [0, 512]),
    ],
)
def test_flash_attention(length, samples, heads, groups, dimension, boundaries, monkeypatch):
    """FlashAttention 4 is as near to FP32 as cuDNN, output and gradients. Pins an output of zeros, which is what
    TransformerEngine gets of it; heads in the wrong order; sequences that see the one before."""
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    inputs, gradient, cudnn, flash = attention(length, samples, heads, groups, dimension, boundaries)
    if boundaries:
        parts = [
            plain_attention(*(one[start:end, None] for one in (*inputs, gradient)))
            for start, end in pairwise(boundaries)
        ]
        wanted = [torch.cat(one)[:, 0] for one in zip(*parts, strict=True)]
    else:
        wanted = plain_attention(*inputs, gradient)
    errors = {
        name: [error(one, other) for one, other in zip(call(), wanted, strict=True)]
        for name, call in (("cudnn", cudnn), ("flash", flash))
    }
    print(json.dumps({"packed": bool(boundaries), "dimension": dimension, "errors of output, dq, dk, dv": errors}))
    assert max(errors["flash"]) < max(1.25 * max(errors["cudnn"]), BF16_OUTPUT)


@pytest.mark.parametrize("repeats", ["0", "1"])
def test_flash_attention_across_ranks(repeats, monkeypatch):
    """The pieces of a rank of four against the whole sequence, in this process; the time of each rank's attention
    beside a quarter of the whole's. Pins fewer queries than keys taken for the first ones."""
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", repeats)
    ranks, length = 4, 32768
    inputs, gradient, _, flash = attention(length, 1, 28, 4)
    wanted = flash()
    gradient = gradient.view(length, 1, 28, 128)
    pieces = [one.detach().chunk(2 * ranks) for one in (*inputs, gradient)]
    of_rank = [[torch.cat([one[r], one[2 * ranks - 1 - r]]) for one in pieces] for r in range(ranks)]
    gathered = torch.stack([torch.stack(one[1:3]) for one in of_rank])
    sent, found, times = [], [], []
    monkeypatch.setattr(flash_attention, "_gather", lambda mine, group: gathered)
    monkeypatch.setattr(flash_attention, "_exchange", lambda parts, group: sent.append(parts) or parts)
    for rank, (*operands, of_output) in enumerate(of_rank):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        operands = [one.requires_grad_() for one in operands]

        def call(operands=operands, of_output=of_output, group=group):
            output = flash_attention.causal_across_ranks(*operands, group)
            return output.detach(), torch.autograd.grad(output, operands, of_output)[0]

        found.append([*call(), sent[-1]])
        times.append(milliseconds(call))
        sent.clear()
    total = [sum(one[2][rank].float() for one in found) for rank in range(ranks)]
    found = [[output, dq, *of_keys] for (output, dq, _), of_keys in zip(found, total, strict=True)]
    errors = []
    for number, expected in enumerate(wanted):
        halves = [one[number].chunk(2) for one in found]
        together = torch.cat([*(front for front, _ in halves), *(back for _, back in reversed(halves))])
        errors.append(error(together.view_as(expected), expected))
    print(json.dumps({"repeats": repeats == "0", "errors": errors, "ms": times, "a quarter": milliseconds(flash) / 4}))
    assert max(errors) < BF16_OUTPUT


def test_time_of_flash_attention(monkeypatch):
    """Prints ms and TFLOP/s of both, forward and backward, at the recipe's lengths, and with the backward that repeats.
    Of that, ten calls give the same bits."""
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    for length, samples, heads, groups in ((8192, 2, 12, 2), (32768, 1, 12, 2), (8192, 2, 28, 4), (32768, 1, 28, 4)):
        found = {}
        for suffix, allowed in ("", "1"), (" that repeats", "0"):
            monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", allowed)
            _, _, cudnn, flash = attention(length, samples, heads, groups)
            found |= {name + suffix: milliseconds(call) for name, call in (("cudnn", cudnn), ("flash", flash))}
        first = flash()
        assert all(torch.equal(a, b) for _ in range(9) for a, b in zip(first, flash(), strict=True))
        rates = {name: round(7e-9 * length**2 * samples * heads * 128 / ms) for name, ms in found.items()}
        print(json.dumps({"length": length, "heads": heads, "ms": found, "TFLOP/s": rates}))


@pytest.mark.parametrize(("groups", "heads"), [(2, 6), (4, 7), (1, 6)])
def test_split_rotary(groups, heads):
    """The qkv layer's output of 1.5B, 7B, and a rank of two: split, rotated and back as in FP32, to BF16's rounding;
    prints what the kernel takes, one way."""
    from infir2.speed import split_rotary

    length, samples, size = 8192, 2, 128
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(length, samples, count, size) for count in (groups * heads, groups, groups)]
    gradients = [torch.randn(*shape, generator=generator, device="cuda").bfloat16() for shape in shapes]
    mixed = torch.randn(length, samples, groups, (heads + 2) * size, generator=generator, device="cuda").bfloat16()
    mixed.requires_grad_()
    rates = 1e6 ** -(torch.arange(0, size, 2, device="cuda") / size)
    angles = torch.outer(torch.arange(length, device="cuda"), rates).repeat(1, 2)[:, None, None]

    x = mixed.detach().float().requires_grad_()
    by_head = x.view(length, samples, groups, heads + 2, size)
    half = by_head.roll(size // 2, -1) * torch.where(torch.arange(size, device="cuda") < size // 2, -1, 1)
    turned = by_head * angles.double().cos().float()[:, :, None] + half * angles.double().sin().float()[:, :, None]
    wanted = turned[..., :heads, :].flatten(2, 3), turned[..., heads, :], by_head[..., heads + 1, :]
    wanted = [*wanted, *torch.autograd.grad(wanted, x, [one.float() for one in gradients])]
    parts = split_rotary.in_place_of(None)(mixed, angles, angles, [heads * size, size, size])
    found = [*parts, *torch.autograd.grad(parts, mixed, gradients)]
    errors = [error(one.detach(), other) for one, other in zip(found, wanted, strict=True)]
    launch = functools.partial(split_rotary._launch, mixed.detach(), *gradients, angles, backward=False)
    ms = milliseconds(lambda: [launch() for _ in range(10)]) / 10
    rate = 2 * mixed.nbytes / ms / 1e9
    print(json.dumps({"groups": groups, "heads": heads, "errors": errors, "ms": ms, "TB/s": rate}))
    assert max(errors) < BF16_OUTPUT
