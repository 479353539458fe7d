"""The parts that make a step faster compute what the plain ones do."""

import itertools
import os
import subprocess
import sys
import weakref
from argparse import Namespace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BF16_OUTPUT, FP32_LAYOUTS, FP32_LINEAR_CROSS_ENTROPY
from torch.nn.functional import scaled_dot_product_attention as scaled_dot_product
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import Training, losses, tensors, train

from infir2 import engine, fp8
from infir2.speed import deep_gemm, flash_attention, linear_cross_entropy, weight_gradient


def problem(tokens: int, vocabulary: int, width: int, seed: int, dtype=torch.float32):
    """x, weight, target, token weight; half of the tokens are not trained."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return x, weight, target, (torch.rand(tokens, generator=generator) < 0.5).float()


def plain(x, weight, target, token_weight, factor: float):
    """Loss and gradients of x and weight by FP64 autograd."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    losses = torch.nn.functional.cross_entropy(x @ weight.t(), target, reduction="none")
    loss = (losses * token_weight).sum() * factor
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 300),
    vocabulary=st.integers(2, 70),
    width=st.integers(1, 9),
    elements=st.sampled_from([1, 2000, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_linear_cross_entropy(tokens, vocabulary, width, elements, dtype, seed):
    """Value and gradients against FP64, however the tokens fall into chunks.

    Pins: a last chunk that is smaller, a chunk that overwrites the earlier ones' weight gradient, untrained tokens.
    """
    inputs = problem(tokens, vocabulary, width, seed, dtype)
    x, weight = (t.requires_grad_() for t in inputs[:2])
    before, linear_cross_entropy.CHUNK_ELEMENTS_CPU = linear_cross_entropy.CHUNK_ELEMENTS_CPU, elements
    try:
        loss = linear_cross_entropy.linear_cross_entropy(*inputs) * 0.37
    finally:
        linear_cross_entropy.CHUNK_ELEMENTS_CPU = before
    loss.backward()
    wanted = plain(*inputs, 0.37)
    # In BF16 the logits are rounded (2^-9 of up to about 10), and then their gradients and those of x and the weight.
    tolerance = FP32_LINEAR_CROSS_ENTROPY if dtype == torch.float32 else 16 * BF16_OUTPUT
    # Of the largest element, or of what one token with a probability of 0 gives: near 1, the error of p - 1 is p's.
    sizes = 0.37 * torch.stack([torch.ones(()), weight.detach().abs().max(), x.detach().abs().max()]).double()
    for found, reference, size in zip((loss.detach(), x.grad, weight.grad), wanted, sizes, strict=True):
        assert (found - reference).abs().max() < tolerance * max(size, reference.abs().max())


def test_gradient_goes_to_the_main_gradient():
    """Added to what is there, scaled by what the loss is multiplied with; Megatron's hooks are told.

    Pins: the gradients of a step's earlier micro-batches overwritten, a tied weight's gradient added twice.
    """
    x, weight, target, token_weight = problem(200, 50, 8, 0)
    x, weight = torch.nn.Parameter(x), torch.nn.Parameter(weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.full_like(weight.data, 3.0), False
    for tied in (False, True):
        if tied:
            weight.zero_out_wgrad = True
        weight.main_grad.fill_(3)
        x.grad = weight.grad = None
        (linear_cross_entropy.linear_cross_entropy(x, weight, target, token_weight) * 0.25).backward()
        _, dx, dw = plain(x, weight, target, token_weight, 0.25)
        assert error(weight.main_grad - 3, dw) < FP32_LINEAR_CROSS_ENTROPY
        assert error(x.grad, dx) < FP32_LINEAR_CROSS_ENTROPY
        assert weight.grad_added_to_main_grad
        assert (weight.grad is None) == tied


def test_gradient_goes_there_at_once(monkeypatch):
    """Where the caller knows what the loss is multiplied by, the weight's gradient is added in the forward pass, in
    several chunks, to what is there; an evaluation adds nothing. Another factor in the backward pass must not train.
    Pins: earlier micro-batches overwritten, the factor applied twice or not at all."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS_CPU", 1)
    x, weight, target, token_weight = problem(300, 50, 8, 0)
    x, weight = torch.nn.Parameter(x), torch.nn.Parameter(weight)
    weight.main_grad, weight.zero_out_wgrad = torch.full_like(weight.data, 3.0), True
    inputs = x, weight, target, token_weight
    wanted, dx, dw = plain(*inputs, 0.25)
    with torch.no_grad():
        linear_cross_entropy.linear_cross_entropy(*inputs, factor=torch.tensor(0.25))
    assert torch.equal(weight.main_grad, torch.full_like(weight.data, 3.0))
    loss = linear_cross_entropy.linear_cross_entropy(*inputs, factor=torch.tensor(0.25))
    assert error(weight.main_grad - 3, dw) < FP32_LINEAR_CROSS_ENTROPY
    before = weight.main_grad.clone()
    (loss / 4).backward()
    assert error(loss.detach() / 4, wanted) < FP32_LINEAR_CROSS_ENTROPY
    assert error(x.grad, dx) < FP32_LINEAR_CROSS_ENTROPY
    assert torch.equal(weight.main_grad, before)
    assert weight.grad_added_to_main_grad
    x.grad = None
    (linear_cross_entropy.linear_cross_entropy(*inputs, factor=torch.tensor(0.5)) / 4).backward()
    assert x.grad.isnan().all()


def test_one_chunk_at_a_time(monkeypatch):
    """Pins a chunk's logits, a GiB on a GPU, held while the next one's are computed."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS_CPU", 1)
    inputs = problem(300, 50, 8, 0)
    chunks, held = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.mm.default:
                held.extend(one for one in chunks if one() is not None)
            result = function(*arguments, **(options or {}))
            if function is torch.ops.aten.mm.default:
                chunks.append(weakref.ref(result))
            return result

    with Watch():
        linear_cross_entropy.linear_cross_entropy(*inputs)
    assert len(chunks) == 3
    assert not held


def test_evaluation_computes_no_gradient(monkeypatch):
    """Pins: validation at the price of training."""
    monkeypatch.setattr(weight_gradient, "accumulate", None)
    inputs = problem(100, 30, 4, 1)
    wanted, _, _ = plain(*inputs, 1)
    inputs[1].requires_grad_()
    with torch.no_grad():
        found = linear_cross_entropy.linear_cross_entropy(*inputs)
    assert error(found, wanted) < FP32_LINEAR_CROSS_ENTROPY


def test_accumulate():
    """The stand-in for apex's extension adds to what is there; `overwrite` does not."""
    random = torch.Generator().manual_seed(0)
    g, x, main_grad = (torch.randn(size, generator=random) for size in ((64, 5), (64, 7), (5, 7)))
    product = g.double().t() @ x.double()
    wanted = main_grad.double() + product
    weight_gradient.wgrad_gemm_accum_fp32(x, g, main_grad)
    assert error(main_grad, wanted) < FP32_LINEAR_CROSS_ENTROPY
    main_grad.fill_(float("nan"))
    weight_gradient.accumulate(main_grad, g, x, overwrite=True)
    assert error(main_grad, product) < FP32_LINEAR_CROSS_ENTROPY


@pytest.mark.parametrize("tied", [True, False])
def test_training(tied, run_flags, tmp_path):
    """The losses and the weights of a run: plain on one rank, fused on two with tensor and sequence parallelism.

    Pins: a rank's part of the vocabulary taken for the whole, gradients of the hidden states of one rank only; a shared
    weight's gradient from the head or the embedding lost, or added twice.
    """
    shared = ["--train-iters", "6", *([] if tied else ["--untie-embeddings-and-output-weights"])]
    parallel = "--tensor-model-parallel-size 2 --sequence-parallel --fused-linear-cross-entropy".split()
    parallel.append("--fused-embedding-gradient")
    for name, ranks, flags in (("plain", 1, []), ("fused", 2, parallel)):
        run = tmp_path / name
        train(run_flags(run, *shared, *flags), run.with_suffix(".log"), ranks)
    first, second = (np.array(list(losses(tmp_path / name).values())) for name in ("plain", "fused"))
    np.testing.assert_allclose(first, second, rtol=FP32_LAYOUTS)
    before, after = (tensors(tmp_path / name / "checkpoints") for name in ("plain", "fused"))
    for name in ["embedding.word_embeddings.weight"] + ["output_layer.weight"] * (not tied):
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=FP32_LAYOUTS)


def test_embedding_gradient_under_data_parallelism(run_flags, tmp_path):
    """Two ranks with a batch's halves, whose gradients are exchanged as they become ready, train what one rank trains.
    Pins an embedding's gradient that is exchanged before the head's, or its own, has been added."""
    shared = "--train-iters 6 --fused-linear-cross-entropy".split()
    parallel = ["--overlap-grad-reduce", "--fused-embedding-gradient"]
    for name, ranks, flags in (("one", 1, []), ("two", 2, parallel)):
        run = tmp_path / name
        train(run_flags(run, *shared, *flags), run.with_suffix(".log"), ranks)
    one, two = (tensors(tmp_path / name / "checkpoints") for name in ("one", "two"))
    name = "embedding.word_embeddings.weight"
    torch.testing.assert_close(one[name], two[name], rtol=0, atol=FP32_LAYOUTS)


@pytest.mark.parametrize(
    ("flag", "needed"),
    [
        ("fused_embedding_gradient", "--fused-linear-cross-entropy"),
        ("recompute_swiglu", "--fused-swiglu-quantisation"),
        ("recompute_norms", "--fused-norm-quantisation"),
    ],
)
def test_what_needs_another_switch_is_refused(flag, needed):
    """Pins a shared weight that learns from the embedding alone: Megatron's head hands autograd its gradient, which the
    embedding's, added already, would hide. And memory that a flag was to free and did not."""
    names = (
        "fused_swiglu_quantisation recompute_swiglu fused_norm_quantisation recompute_norms fused_embedding_gradient"
    )
    flags = Namespace(**dict.fromkeys([*names.split(), "fused_linear_cross_entropy", "check_gradients_once"], False))
    engine.settle_speed(flags)
    setattr(flags, flag, True)
    with pytest.raises(ValueError, match=f"needs {needed}"):
        engine.settle_speed(flags)


def interpreted(program: str) -> str:
    """What a program with Triton kernels prints on the CPU, by Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    return done.stdout + done.stderr


def test_kernels():
    """The Triton kernels, interpreted on the CPU, against plain torch: targets outside of a rank's columns, a last
    block that is not full. Pins: arithmetic of the kernels that only a GPU would show."""
    program = """if True:
        import itertools, torch
        from infir2.speed import cross_entropy_kernels as kernels, linear_cross_entropy
        kernels._BLOCK, reference = 64, linear_cross_entropy._TorchRows
        generator = torch.Generator().manual_seed(0)
        for columns, dtype in itertools.product((50, 64, 200), (torch.float32, torch.bfloat16)):
            logits = (torch.randn(9, columns, generator=generator) * 4).to(dtype)
            target = torch.randint(-20, columns + 20, (9,), generator=generator)
            weight = torch.rand(9, generator=generator)
            ours, theirs, apart = (logits.clone() for _ in range(3))
            wanted = reference.statistics(theirs, target, weight)
            torch.testing.assert_close(kernels.statistics(ours, target, weight), wanted)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(kernels.statistics(apart, target), wanted)
            assert torch.equal(apart, logits)
            kernels.gradient_(apart, target, weight, wanted[0] + wanted[1].log())
            torch.testing.assert_close(apart, theirs)
        print("equal")
    """
    pytest.importorskip("triton")
    assert interpreted(program) == "equal\n"


@pytest.mark.parametrize("fmt", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("_swiglu", "_OPTIONS"),
        ("_swiglu_gradient", "_OPTIONS"),
        ("_rms_norm", "_LIGHT_OPTIONS"),
        ("_quantise_alone", "_LIGHT_OPTIONS"),
    ],
)
def test_quantising_kernels_compile_for_hopper(name, options, fmt):
    """Triton and its ptxas make machine code of them without a GPU. Pins PTX that the interpreter passes over: an
    instruction that Hopper has not, and codes of the other format."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from infir2.speed import quantising_kernels

    kernel = getattr(quantising_kernels, name)
    constants = ("E5M2", "LARGEST", "EXPONENT", "OVERFLOW", "POWER_OF_TWO", "SIZE")
    constexprs = dict(zip(constants, quantising_kernels._rule(fmt.dtype, power_of_two=True), strict=True))
    types = {"x": "*bf16", "dy": "*bf16", "words": "*i32", "tokens": "i32", "features": "i32"}
    types |= {"inverse": "*fp32", "sums": "*fp32", "weight": "*bf16", "columns": "i32"}
    types |= {"codes": "*fp8e5" if fmt is fp8.E5M2 else "*fp8e4nv", "scale_inv": "*fp32"}
    constexprs |= {"ROWS": True, "COLUMNS": True, "SUMS": True}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    types |= {"transposed_scale_inv": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
    source = triton.compiler.ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=getattr(quantising_kernels, options))
    assert len(compiled.asm["cubin"]) > 10_000
    wanted, other = ("e5m2x2", "e4m3x2") if fmt is fp8.E5M2 else ("e4m3x2", "e5m2x2")
    assert f"cvt.rn.satfinite.{wanted}.f32" in compiled.asm["ptx"]
    assert other not in compiled.asm["ptx"]


def test_split_rotary():
    """The qkv layer's output split and rotated as the formula says, and its gradient, in FP64. Pins heads of another
    group, another sample's angle, a last program with too few tokens, and a gradient rotated forwards."""
    program = """if True:
        import torch
        from infir2.speed import split_rotary

        generator = torch.Generator().manual_seed(0)
        for length, samples, groups, heads, size in ((5, 2, 2, 3, 8), (9, 2, 1, 1, 16), (16, 1, 2, 6, 4)):
            def random(*shape):
                return torch.randn(*shape, generator=generator)

            mixed = random(length, samples, groups, (heads + 2) * size)
            angles = random(length + 3, 1, 1, size // 2).repeat(1, 1, 1, 2) * 100
            shapes = [(length, samples, count, size) for count in (groups * heads, groups, groups)]
            found = [torch.full(shape, torch.nan) for shape in shapes]
            split_rotary._launch(mixed, *found, angles, backward=False)
            x = mixed.double().requires_grad_()
            by_head = x.view(length, samples, groups, heads + 2, size)
            angle = angles.double()[:length].view(length, 1, 1, 1, size)
            half = by_head.roll(size // 2, -1) * torch.where(torch.arange(size) < size // 2, -1, 1)
            turned = by_head * angle.cos() + half * angle.sin()
            wanted = turned[..., :heads, :].flatten(2, 3), turned[..., heads, :], by_head[..., heads + 1, :]
            gradients = [random(*shape) for shape in shapes]
            back = torch.full_like(mixed, torch.nan)
            split_rotary._launch(back, *gradients, angles, backward=True)
            (wanted_back,) = torch.autograd.grad(wanted, x, [one.double() for one in gradients])
            for one, other in zip((*found, back), (*wanted, wanted_back), strict=True):
                torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)
        print("equal")
    """
    pytest.importorskip("triton")
    assert interpreted(program) == "equal\n"


@pytest.mark.parametrize("what", ["angles of keys", "a part of each head", "wider values", "FP32"])
def test_split_rotary_leaves_the_rest(what):
    """To TransformerEngine. Pins keys that are turned by the angles of queries, and heads that are turned whole."""
    pytest.importorskip("triton")
    from infir2.speed import split_rotary

    qkv = torch.zeros(4, 1, 2, 40, dtype=torch.float32 if what == "FP32" else torch.bfloat16)
    angles = torch.zeros(4, 1, 1, 4 if what == "a part of each head" else 8)
    of_keys = angles.clone() if what == "angles of keys" else angles
    sizes = [16, 8, 16] if what == "wider values" else [24, 8, 8]
    call = split_rotary.in_place_of(lambda *args: args)
    assert call(qkv, angles, of_keys, sizes) == (qkv, angles, of_keys, sizes)


def test_quantising_kernels():
    """SwiGLU, its gradient, RMSNorm and a plain tensor, quantised along rows and columns at once. Pins a scale of the
    wrong direction, the two halves of the gradient changed, and codes of a transpose in the wrong place.

    The interpreter cuts BF16 off instead of rounding it, so the reference is cut off too, and loses carries where it
    rounds to FP8, so rows are compared before they are rounded, and of the transpose most codes.
    tests/gpu/test_speed.py compares all.
    """
    program = """if True:
        import itertools, torch
        from dataclasses import replace
        from infir2 import fp8
        from infir2.speed import quantising_kernels as kernels

        def cut(x):
            return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()

        empty = kernels.Quantised.empty

        def with_rows_in_fp32(*arguments, **ways):
            out = empty(*arguments, **ways)
            return out if out.codes is None else replace(out, codes=out.codes.float())

        kernels.Quantised.empty = with_rows_in_fp32

        def compare(found, y, fmt, scale_fmt):
            for product, scale_inv, wanted in ((*found.parts[:2], y), (*found.parts[2:], y.t().contiguous())):
                codes, scales = fp8.quantize(wanted, fp8.ROW, fmt=fmt, scale_fmt=scale_fmt)
                same = scale_inv.t() == scales
                assert same.float().mean() > 0.99  # exp may differ in its last bit, and so a few BF16 numbers
                if product.dtype != torch.float32:
                    assert (product.float() == codes.float()).float().mean() > 0.8
                    continue
                exact = product == wanted / scales.repeat_interleave(128, 1)
                assert scale_fmt == "fp32" or exact[same.repeat_interleave(128, 1)].float().mean() > 0.999
                given_back = product * scale_inv.t().repeat_interleave(128, 1)
                torch.testing.assert_close(given_back, wanted.float(), rtol=2**-7, atol=0)

        random = torch.Generator().manual_seed(0)
        for fmt, scale_fmt in itertools.product((fp8.E4M3, fp8.E5M2), fp8.SCALE_FORMATS):
            x = (torch.randn(256, 768, generator=random) * torch.logspace(-6, 1, 256)[:, None]).bfloat16()
            x[:, 5], x[128:, 500:] = 0, x[128:, 500:] * 1e-20
            dy = torch.randn(256, 384, generator=random).bfloat16()
            gate, value = x.float().chunk(2, 1)
            sigmoid = 1 / (1 + torch.exp(-gate))
            arguments = fmt.dtype, scale_fmt == "pow2"
            both = kernels.swiglu(x, *arguments)
            compare(both, cut(gate * sigmoid * value), fmt, scale_fmt)
            for ways, kept in (({"columns": False}, slice(0, 2)), ({"rows": False}, slice(2, 4))):
                alone = kernels.swiglu(x, *arguments, **ways)
                assert sum(part is not None for part in alone.parts) == 2
                for one, other in zip(alone.parts[kept], both.parts[kept], strict=True):
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            halves = dy.float() * value * sigmoid * (1 + gate * (1 - sigmoid)), dy.float() * gate * sigmoid
            compare(kernels.swiglu_gradient(dy, x, *arguments), cut(torch.cat(halves, 1)), fmt, scale_fmt)
            weight = torch.randn(768, generator=random)
            found, inverse = kernels.rms_norm(x, weight, 1e-6, *arguments)
            torch.testing.assert_close(inverse, (x.float().square().mean(1) + 1e-6) ** -0.5, rtol=1e-6, atol=0)
            compare(found, cut(x.float() * inverse[:, None] * weight), fmt, scale_fmt)
            again = kernels.rms_norm_columns(x, weight, inverse, *arguments)
            assert torch.equal(again.view(torch.uint8), found.transposed.view(torch.uint8))
            compare(kernels.quantise(x, *arguments), x, fmt, scale_fmt)
            found, sums = kernels.quantise_with_sums(x, *arguments)
            compare(found, x, fmt, scale_fmt)
            torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=2**-8, atol=1e-4)
        print("equal")
    """
    output = interpreted(program)
    assert output.splitlines()[-1] == "equal", output


@pytest.mark.parametrize("what", ["no bias", "quantised", "gathered", "BF16", "debug", "rows"])
def test_bias_gradient_leaves_the_rest(what):
    """To TransformerEngine. Pins a gradient of one rank taken for that of all, and one for a bias that is not there."""
    pytest.importorskip("triton")
    from infir2.speed import te_quantisation

    ctx = SimpleNamespace(
        fp8=what != "BF16", use_bias=what != "no bias", debug=what == "debug", backward_override=None,
        sequence_parallel=True,
    )  # fmt: skip
    gradient = torch.zeros(192 if what == "rows" else 128, 256, dtype=torch.bfloat16)
    if what == "quantised":
        gradient._rowwise_data = gradient
    quantiser = SimpleNamespace(block_scaling_dim=1, rowwise_usage=True, columnwise_usage=True, amax_epsilon=0.0)
    arguments = ctx, gradient, what == "gathered", quantiser
    found = te_quantisation.bias_gradient_in_place_of(lambda *args: args)(*arguments)
    assert all(one is other for one, other in zip(found, arguments, strict=True))


def test_weights_are_transposed_late():
    """A weight gets its column-wise copy when it is asked for, from its present rows, and one weight has one at a time.
    Pins the transpose of an earlier step's weight, of the 1 x 128 blocks of an activation, and copies that stay."""
    pytest.importorskip("triton")
    from infir2.speed import te_quantisation

    class Weight:
        """What TransformerEngine's tensor does: it makes the copy where there is none."""

        _is_2D_scaled, _columnwise_data, _columnwise_scale_inv = True, None, None

        def __init__(self, rows: str):
            self._rowwise_data = rows

        def update_usage(self, rowwise_usage=None, columnwise_usage=None):
            if columnwise_usage and self._columnwise_data is None:
                self._columnwise_data, self._columnwise_scale_inv = self._rowwise_data[::-1], 1.0

    class Quantiser:
        def __init__(self, dimensions: int):
            self.block_scaling_dim, self.usage = dimensions, []

        def set_usage(self, *, rowwise=None, columnwise=None):
            self.usage.append((rowwise, columnwise))

    Weight.update_usage = te_quantisation.late_transposes(Weight.update_usage)
    Quantiser.set_usage = te_quantisation.usage_in_place_of(Quantiser.set_usage)
    first, second, activation = Weight("ab"), Weight("cd"), Weight("xy")
    for rows in ("ab", "AB"):  # two steps
        first._rowwise_data = rows
        for weight in (second, first):
            weight.update_usage(columnwise_usage=True)
        assert first._columnwise_data == rows[::-1]
        assert second._columnwise_data is second._columnwise_scale_inv is None
        first.update_usage(rowwise_usage=True)
        assert first._columnwise_data == rows[::-1]
    activation._is_2D_scaled, activation._columnwise_data = False, "own"
    activation.update_usage(columnwise_usage=True)
    assert (activation._columnwise_data, first._columnwise_data) == ("own", "BA")
    for dimensions, wanted in ((2, False), (1, True)):
        quantiser = Quantiser(dimensions)
        quantiser.set_usage(rowwise=True, columnwise=True)
        quantiser.set_usage(columnwise=None)
        assert quantiser.usage == [(True, wanted), (None, None)]


def test_columns_are_computed_again():
    """A layer that keeps a tensor with `made_again` keeps that call, not the tensor, and its backward pass gets what
    the call gives; other inputs and the weight are kept as they are. Pins a weight's gradient from a tensor that has no
    columns, and a tensor kept all the same."""
    pytest.importorskip("triton")
    from infir2.speed import te_quantisation

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            return dy @ weight.t(), x.t() @ dy

    random = torch.Generator().manual_seed(0)
    leaf, again, weight = (torch.randn(3, 3, generator=random).requires_grad_() for _ in range(3))
    x = leaf * 2
    x.made_again = lambda: again.detach()
    kept = weakref.ref(x)
    y = te_quantisation.keeping_less(Product.apply)(x, weight)
    del x
    assert kept() is None
    dx, dw = torch.autograd.grad(y.sum(), [leaf, weight])
    torch.testing.assert_close(dw, again.t() @ torch.ones(3, 3))
    torch.testing.assert_close(dx, 2 * torch.ones(3, 3) @ weight.t())


class Blockwise:
    """What infir2.speed.deep_gemm reads of TransformerEngine's tensors, padded with NaN where that pads."""

    _fp8_dtype = SimpleNamespace(name="kFloat8E4M3")

    def __init__(self, x: torch.Tensor, *, weight: bool = False):
        self._is_2D_scaled, self.shape = weight, x.shape
        flat = x.reshape(-1, x.shape[-1])
        self._rowwise_data, rows = fp8.quantize(flat, fp8.BLOCK if weight else fp8.ROW)
        codes, columns = fp8.quantize(flat, fp8.BLOCK if weight else fp8.COLUMN)
        self.rows = fp8.dequantize(self._rowwise_data, rows, fp8.BLOCK if weight else fp8.ROW).double()
        self.columns = fp8.dequantize(codes, columns, fp8.BLOCK if weight else fp8.COLUMN).double()
        self._rowwise_data = self._rowwise_data.view(torch.uint8).view(x.shape)
        self._columnwise_data = codes.t().contiguous().view(torch.uint8).view(x.shape[-1], *x.shape[:-1])
        self._rowwise_scale_inv = padded(rows if weight else rows.t())
        self._columnwise_scale_inv = padded(columns.t() if weight else columns)

    def size(self):
        return self.shape


def padded(scales: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4), value=torch.nan).contiguous()


def deep_gemm_in_fp64(left, right, out, c=None, recipe=None):
    """What DeepGEMM asks of its operands on Hopper (csrc/apis/gemm.hpp and csrc/utils/layout.hpp), and its product."""
    (codes, scales), (weight, weight_scales) = left, right
    _, block, _ = recipe
    by_row = [(codes, scales)] + [(weight, weight_scales)] * (block == 1)
    for one, its in by_row:
        assert its.shape == (len(one), one.shape[1] // 128)
        assert its.stride() == (1, -(-len(one) // 4) * 4)
    if block == 128:
        assert weight_scales.shape == (len(weight) // 128, weight.shape[1] // 128)
        assert weight_scales.is_contiguous()
        assert c is None
        assert out.dtype == torch.bfloat16
    else:
        assert c is out
        assert out.dtype == torch.float32
    left = codes.double() * scales.double().repeat_interleave(128, 1)
    right = weight.double() * weight_scales.double().repeat_interleave(128, 1).repeat_interleave(block, 0)
    out.copy_(left @ right.t() + (0 if c is None else c))


def layer_products(accumulate: bool):
    """The three products of a layer by `deep_gemm.in_place_of`, beside FP64; 3 and 5 blocks, so scales are padded."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient, main = (
        torch.randn(*shape, generator=generator) * 10.0 ** torch.randint(-3, 3, (shape[-1],), generator=generator)
        for shape in ((128, 2, 640), (384, 640), (128, 2, 384), (384, 640))
    )
    x, weight, gradient = Blockwise(x), Blockwise(weight, weight=True), Blockwise(gradient)
    bf16, fp32 = SimpleNamespace(name="kBFloat16"), SimpleNamespace(name="kFloat32")
    more = {"comm_overlap": None, "bulk_overlap": False, "alpha": 1.0}

    def original(*args, **options):
        raise AssertionError("went on to cuBLAS")

    def call(a, b, layout, out, dtype, added=False):
        rest = (None, False, None, layout != "TN", None, 0, added, True)
        transposed = (a, layout[0] == "T", b, layout[1] == "T")
        options = more | {"beta": 1.0 if added else 0.0}
        return deep_gemm.in_place_of(original)(*transposed, out, None, dtype, None, *rest, **options)[0]

    y = call(weight, x, "TN", None, bf16)
    dx = call(weight, gradient, "NN", None, bf16)
    dw = call(x, gradient, "NT", main.clone(), fp32, accumulate)
    yield y, (x.rows @ weight.rows.t()).view(128, 2, 384)
    yield dx, (gradient.rows @ weight.rows).view(128, 2, 640)
    yield dw, gradient.columns.t() @ x.columns + (main.double() if accumulate else 0)


@pytest.mark.parametrize("accumulate", [True, False])
def test_deep_gemm(accumulate, monkeypatch):
    """A layer's three products. Pins scales of the wrong operand or direction, padding that is read, a weight gradient
    that overwrites the earlier micro-batches' or adds to what a first one should overwrite."""
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(fp8_gemm_nt=deep_gemm_in_fp64))
    for found, wanted in layer_products(accumulate):
        assert found.shape == wanted.shape
        tolerance = BF16_OUTPUT if found.dtype == torch.bfloat16 else FP32_LINEAR_CROSS_ENTROPY
        assert error(found, wanted) < tolerance


@pytest.mark.parametrize("what", ["bias", "quantiser", "gelu", "beta", "e5m2", "fp32", "rows", "plain"])
def test_deep_gemm_leaves_the_rest(what, monkeypatch):
    """To cuBLAS, with all its arguments. Pins a bias forgotten, and codes of another format read as E4M3."""
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(fp8_gemm_nt=None))
    x, weight = (
        Blockwise(torch.randn(192 if what == "rows" else 128, 256)),
        Blockwise(torch.randn(128, 256), weight=True),
    )
    if what == "e5m2":
        x._fp8_dtype = SimpleNamespace(name="kFloat8E5M2")
    x = torch.randn(128, 256) if what == "plain" else x
    quantiser, bias = (object() if what == name else None for name in ("quantiser", "bias"))
    dtype = SimpleNamespace(name="kFloat32" if what == "fp32" else "kBFloat16")
    rest = (None, what == "gelu", None, False, None, 0, False, True)
    args, options = (weight, True, x, False, None, quantiser, dtype, bias, *rest), {"beta": float(what == "beta")}
    assert deep_gemm.in_place_of(lambda *args, **options: (args, options))(*args, **options) == (args, options)


class FlashAttentionInFp64:
    """What FlashAttention 4 asks of its operands, [b, s, h, d] or [t, h, d], and what it computes."""

    @staticmethod
    def parts(lengths, *tensors):
        """Of packed sequences one at a time, as [1, s, h, d]."""
        assert all(one.stride(-1) == 1 for one in tensors)
        if not lengths:
            return [tensors]
        starts = lengths["cu_seqlens_q"].tolist()
        assert lengths["cu_seqlens_k"] is lengths["cu_seqlens_q"]
        assert lengths["max_seqlen_q"] == lengths["max_seqlen_k"] == max(b - a for a, b in pairwise(starts))
        return [[one[None, a:b] for one in tensors] for a, b in pairwise(starts)]

    @staticmethod
    def attend(q, k, v, scale):
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()  # fewer queries: the last ones
        return scaled_dot_product(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)

    @classmethod
    def _flash_attn_fwd(cls, *inputs, out, return_lse, softmax_scale, causal, **lengths):
        assert return_lse
        assert causal
        for q, k, v, its in cls.parts(lengths, *inputs, out):
            its.copy_(cls.attend(q.double(), k.double(), v.double(), softmax_scale))
        return out, torch.zeros(1), None, None, None

    @classmethod
    def _flash_attn_bwd(cls, q, k, v, out, dout, lse, *, dq, dk, dv, softmax_scale, causal, deterministic, **lengths):
        assert causal
        assert deterministic == (os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0")
        for *inputs, output, gradient, its_dq, its_dk, its_dv in cls.parts(lengths, q, k, v, out, dout, dq, dk, dv):
            inputs = [one.detach().double().requires_grad_() for one in inputs]
            with torch.enable_grad():
                found = cls.attend(*inputs, softmax_scale)
            assert error(output, found.detach()) < BF16_OUTPUT, "not what the forward pass gave"
            gradients = torch.autograd.grad(found, inputs, gradient.double())
            for place, value in zip((its_dq, its_dk, its_dv), gradients, strict=True):
                place.copy_(value)


class Attention:
    """What infir2.speed.flash_attention reads of Megatron's attention."""

    num_splits, training = None, True

    def __init__(self, **other):
        plain = {"softmax_type": "vanilla", "window_size": None, "context_parallel_size": 1, "softmax_scale": None}
        off = ("qk_clip", "log_max_attention_logit", "apply_query_key_layer_scaling")
        self.config = SimpleNamespace(**{**plain, **dict.fromkeys(off, False), "attention_dropout": 0.0, **other})


def heads(*shape: int) -> list[torch.Tensor]:
    """q of 4 heads, k of 2, v of 2 that are a part of more: [*shape, heads, 64], BF16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, count, 64, generator=generator).bfloat16() for count in (4, 2, 6))
    return [q, k, v[..., 2:4, :]]


def packs(*boundaries: int, **other):
    starts = torch.tensor(boundaries, dtype=torch.int32)
    longest = max(b - a for a, b in pairwise(boundaries))
    sizes = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    return SimpleNamespace(**{"qkv_format": "thd", "cu_seqlens_q_padded": None, "cp_group": None, **sizes, **other})


@pytest.fixture
def flash_attn(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", FlashAttentionInFp64)


def attention_of_a_head(q, k, v, scale):
    """[s, d], in FP64."""
    scores = (q.double() @ k.double().t() * scale).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return scores.softmax(1) @ v.double()


@pytest.mark.parametrize("packed", [None, packs(0, 3, 4, 11)])
@pytest.mark.parametrize(("scale", "repeats"), [(None, "0"), (0.5, "1")])
def test_flash_attention(packed, scale, repeats, flash_attn, monkeypatch):
    """Output and gradients lie as Megatron has them: sequence, sample, head, dimension. Pins samples taken for
    positions, packed sequences that see the one before, gradients of k and v of half of the heads."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", repeats)
    inputs = [one.detach().requires_grad_() for one in (heads(11) if packed else heads(7, 2))]

    def refuse(*args, **options):
        raise AssertionError("went on to TransformerEngine")

    forward = flash_attention.in_place_of(refuse)
    options = {"attention_bias": None, "packed_seq_params": packed}
    found = forward(Attention(softmax_scale=scale), *inputs, None, attn_mask_type=CAUSAL, **options)
    found = [found, *torch.autograd.grad(found, inputs, torch.ones_like(found).cumsum(-1))]

    samples = [(slice(None), sample) for sample in (0, 1)]
    if packed:
        samples = [slice(*ends) for ends in pairwise(packed.cu_seqlens_q.tolist())]
    wanted = torch.zeros_like(found[0], dtype=torch.float64)
    for sample, head in itertools.product(samples, range(4)):
        q, k, v = (one[sample][:, head // shared] for one, shared in zip(inputs, (1, 2, 2), strict=True))
        wanted[sample][:, 64 * head : 64 * head + 64] = attention_of_a_head(q, k, v, scale or 1 / 8)
    wanted = [wanted, *torch.autograd.grad(wanted, inputs, torch.ones_like(wanted).cumsum(-1))]
    for one, other in zip(found, wanted, strict=True):
        assert error(one.detach(), other.detach()) < 2 * BF16_OUTPUT


class Group(SimpleNamespace):
    """A rank of a process group."""

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.at


@pytest.mark.parametrize("ranks", [2, 4])
def test_flash_attention_across_ranks(ranks, flash_attn, monkeypatch):
    """Rank by rank as Megatron divides a sequence, what the ranks hand each other by hand: output and gradients are
    those of the whole sequence. Pins pieces in another order, a piece that sees too much, parts of gradients lost."""
    inputs = [one.detach() for one in heads(8 * ranks, 2)]
    gradient = torch.randn(8 * ranks, 2, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    pieces = [one.chunk(2 * ranks) for one in (*inputs, gradient)]
    of_rank = [[torch.cat([one[r], one[2 * ranks - 1 - r]]) for one in pieces] for r in range(ranks)]
    monkeypatch.setattr(
        flash_attention, "_gather", lambda mine, group: torch.stack([torch.stack(r[1:3]) for r in of_rank])
    )
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(flash_attention, "_exchange", lambda parts, group: sent.append(parts) or parts)
    found = []
    for rank, (*operands, of_output) in enumerate(of_rank):
        operands = [one.requires_grad_() for one in operands]
        output = flash_attention.causal_across_ranks(*operands, Group(ranks=ranks, at=rank))
        found.append([output.detach(), *torch.autograd.grad(output, operands, of_output)[:1]])
    for rank in range(ranks):  # what every rank has for this one
        found[rank] += sum(parts[rank].double() for parts in sent)

    whole = [one.requires_grad_() for one in inputs]
    output = flash_attention.causal(*whole)
    wanted = [output.detach(), *torch.autograd.grad(output, whole, gradient)]
    for number, expected in enumerate(wanted):
        halves = [one[number].chunk(2) for one in found]
        together = torch.cat([*(front for front, _ in halves), *(back for _, back in reversed(halves))])
        assert error(together, expected) < 2 * BF16_OUTPUT


CAUSAL = SimpleNamespace(name="causal")
ATTENTION_OF_OTHERS = {
    "window": {"window_size": (128, 0)},
    "sink": {"softmax_type": "learnable"},
    "dropout": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize(
    "what", [*ATTENTION_OF_OTHERS, "mask", "bias", "fp32", "dimension", "cache", "padded", "ranks"]
)
def test_flash_attention_leaves_the_rest(what):
    """To TransformerEngine, with all its arguments. Pins a window, a bias or dropout forgotten, and queries against a
    cache, whose mask would be another."""
    inputs, options = (
        heads(11) if what in ("padded", "ranks") else heads(7, 2),
        {"packed_seq_params": None},
    )
    attention, mask = Attention(**ATTENTION_OF_OTHERS.get(what, {})), CAUSAL
    if what == "mask":
        mask = SimpleNamespace(name="no_mask")
    elif what == "bias":
        options["attention_bias"] = torch.ones(1)
    elif what == "fp32":
        inputs = [one.float() for one in inputs]
    elif what == "dimension":
        inputs = [one[..., :40] for one in inputs]
    elif what == "cache":
        inputs[0] = inputs[0][:1]
    elif what == "padded":
        options["packed_seq_params"] = packs(0, 11, cu_seqlens_q_padded=torch.tensor([0, 11]))
    elif what == "ranks":
        attention.config.context_parallel_size, options["packed_seq_params"] = 2, packs(0, 11)
    forward = flash_attention.in_place_of(lambda *args, **options: (args, options))
    assert forward(attention, *inputs, None, mask, **options) == ((attention, *inputs, None, mask), options)


@pytest.mark.parametrize("what", ["plain", "2D", "one way", "epsilon", "rows", "zero-centred", "out", "FP32"])
def test_quantisation_leaves_the_rest(what):
    """To TransformerEngine, with all its arguments. Pins a weight taken for itself where one is to be added, half of
    what was asked for, and rows that are no whole blocks."""
    pytest.importorskip("triton")
    from infir2.speed import te_quantisation

    x = torch.zeros(192 if what == "rows" else 128, 256, dtype=torch.float32 if what == "FP32" else torch.bfloat16)
    quantiser = SimpleNamespace(
        block_scaling_dim=2 if what == "2D" else 1,
        rowwise_usage=True,
        columnwise_usage=what != "one way",
        amax_epsilon=1e-9 if what == "epsilon" else 0.0,
    )
    out, quantiser = x if what == "out" else None, None if what == "plain" else quantiser
    arguments = (x, torch.ones(256), 1e-6, out, quantiser, "bf16", 0, what == "zero-centred")
    found = te_quantisation.norm_in_place_of(lambda *args: args)(*arguments)
    assert all(one is other for one, other in zip(found, arguments, strict=True))
    if what in ("2D", "one way", "epsilon", "rows", "FP32"):
        assert te_quantisation.quantiser_in_place_of(lambda *args: args)(quantiser, x) == (quantiser, x)


def test_gradients_are_checked_once(run_flags, tmp_path):
    """The same weights to the bit; weights that explode end the run before a step makes them NaN. Pins a check that was
    switched off and not replaced, and a broken step that is saved."""
    for name, flags in (("often", []), ("once", ["--check-gradients-once"])):
        run = tmp_path / name
        train(run_flags(run, "--train-iters", "6", *flags), run.with_suffix(".log"))
    often, once = (tensors(tmp_path / name / "checkpoints") for name in ("often", "once"))
    assert all(torch.equal(often[name], once[name]) for name in often)
    run, log = tmp_path / "broken", tmp_path / "broken.log"
    flags = "--train-iters 8 --save-interval 1 --lr 1e30 --min-lr 1e30 --lr-warmup-iters 0".split()
    assert Training(run_flags(run, *flags, "--check-gradients-once"), log).wait() != 0
    assert "the gradient norm is nan: this step was not taken" in log.read_text()
    step = int((run / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert step < 8
    stored = tensors(run / "checkpoints").values()
    assert all(tensor.isfinite().all() for tensor in stored if tensor.is_floating_point())
    assert Training(run_flags(tmp_path / "refused", "--check-gradients-once", "--clip-grad", "0"), log).wait() == 2
