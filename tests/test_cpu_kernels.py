"""BF16 products in FP32: which processors, which results. Each case in a process of its own: the kernels stay."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BF16_OUTPUT

from infir2 import cpu_kernels

PROGRAM = """
import torch, torch.nn.functional as F
from infir2 import cpu_kernels

def run():
    draw = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=draw).bfloat16().requires_grad_()
    x, w, b, m = new(2, 48, 64), new(96, 64), new(96), new(2, 64, 80)
    q, k, v = new(2, 4, 48, 32), new(2, 2, 48, 32), new(2, 2, 48, 32)
    linear = F.linear(x, w, b)
    batched = x @ m
    attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    seen = torch.arange(48)[:, None] - torch.arange(48)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=-seen.abs().bfloat16(), enable_gqa=True)
    added = torch.baddbmm(m[:, :48, :80] * 0 + 1, x, m)
    for out in (linear, batched, attention, masked, added):
        (out.float() ** 2).sum().backward(retain_graph=True)
    return [linear, batched, attention, masked, added, *(t.grad for t in (x, w, b, q, k, v, m))]

plain = run()
wide = [torch.randn(4, 8), torch.randn(8, 4, dtype=torch.float64)]
before = [t @ t.mT for t in wide]
cpu_kernels.install()
cpu_kernels.install()
raised = run()
assert all(torch.equal(a, t @ t.mT) for a, t in zip(before, wide))
assert all(t.dtype == torch.bfloat16 for t in raised)
print(max(((a.double() - b.double()).abs().max() / a.double().abs().max()).item() for a, b in zip(plain, raised)))
print(cpu_kernels.describe())
"""


def run(**environment: str) -> tuple[float, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    difference, said = done.stdout.splitlines()[-2:]
    return float(difference), said


def test_products_are_raised():
    """Products, attention and their gradients are those of torch's own kernels but for the order of addition; the
    other types are left alone. Pins: a gradient that is not rounded back to BF16, an operand that is left in BF16."""
    difference, said = run(INFIR2_CPU_MATMUL="fp32")
    assert 0 < difference <= 4 * BF16_OUTPUT  # attention's gradients add up two rounded products
    assert said == "CPU: BF16 products are computed in FP32 and rounded to BF16 (INFIR2_CPU_MATMUL says so)"


def test_products_are_left_where_the_processor_has_them():
    assert run(INFIR2_CPU_MATMUL="bf16")[0] == 0


@pytest.mark.parametrize(
    ("flags", "allowed", "wanted"),
    [
        ("fpu avx2 fma", "", "fp32"),  # Zen 3, most laptops
        ("avx2 avx512f avx512bw avx512_vnni", "", "fp32"),
        ("avx2 avx512f avx512_bf16", "", "bf16"),
        ("avx512_bf16 amx_bf16 amx_tile", "avx512_core_amx", "bf16"),
        ("avx512_bf16 amx_bf16 amx_tile", "AVX512_CORE", "fp32"),
        ("avx512_bf16", "AVX2", "fp32"),
        ("asimd bf16 i8mm", "", "bf16"),  # Arm
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, flags, allowed, wanted):
    """Pins: BF16 products on a processor that has no instructions for them, 36 to 100 times slower."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(cpu_kernels, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("INFIR2_CPU_MATMUL", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed or "DEFAULT")
    assert cpu_kernels.chosen() == wanted
    assert "the processor decides" in cpu_kernels.describe()


def test_an_unknown_choice_lists_the_known(monkeypatch):
    monkeypatch.setenv("INFIR2_CPU_MATMUL", "fp16")
    with pytest.raises(ValueError, match="INFIR2_CPU_MATMUL is 'fp16'; known: fp32, bf16"):
        cpu_kernels.chosen()


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_attention_of_one_new_token(batch, groups, share, length, masked, seed):
    """Attention by groups against FP64 by the formula, some places masked. Pins: heads in another order, a mask that is
    left out."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, t, 16, generator=draw).bfloat16()
        for n, t in ((groups * share, 1), (groups, length), (groups, length))
    )
    seen = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    if masked:
        seen[..., : length - 1] = torch.rand(batch, 1, 1, length - 1, generator=draw) < 0.5
    found, _ = cpu_kernels._attend(None, q, k, v, seen if masked else None, scaling=0.3)
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double().repeat_interleave(share, 1)) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ v.double().repeat_interleave(share, 1)).transpose(1, 2)
    assert (found - expected).abs().max() <= BF16_OUTPUT * v.double().abs().max()
