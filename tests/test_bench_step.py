"""The benchmark of steps: where a kernel's time is counted, ratios of paired steps, and the command end to end."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infir2.speed.kernel_profile import Kernel, categories, category, read_trace, summary

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tools"))
bench_step = importlib.import_module("bench_step")

VOCABULARY = 151936

# Names as cuBLAS, cuDNN, TransformerEngine 2.20.2, torch 2.11 and Triton give them.
NAMES = {
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT": "gemm",
    "nvjet_qqtst_128x256_128x5_2x1_v_bz_TNN": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(cublasLt::params)": "gemm",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, true, 128>(float*)": "attention",
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
    "void transformer_engine::(anonymous namespace)::block_scaled_1d_cast_transpose_kernel<true, float, __nv_bfloat16, "
    "__nv_fp8_e4m3>(__nv_bfloat16 const*)": "quantisation",
    "void transformer_engine::(anonymous namespace)::block_scaled_cast_transpose_kernel<true, float, __nv_bfloat16, "
    "__nv_fp8_e4m3>(__nv_bfloat16 const*)": "quantisation",
    "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>(__nv_bfloat16 const*)": (
        "quantisation"
    ),
    "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits>": ("norm"),
    "void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>(__nv_bfloat16 const*, int const*)": "rope",
    "void transformer_engine::fused_qkv_rope_backward_kernel<__nv_bfloat16>(__nv_bfloat16 const*)": "rope",
    "_split_and_rotate": "rope",
    "void transformer_engine::gated_act_kernel<8, float>(__nv_bfloat16 const*)": "activation",
    "triton_poi_fused_mul_silu_split_0": "activation",
    "_rows": "cross entropy",
    "void transformer_engine::multi_tensor_apply_kernel<transformer_engine::multi_tensor_adam::AdamFunctorMaster>": (
        "optimizer"
    ),
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "Memset (Device)": "copy",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": ("elementwise"),
    "_quantise_alone": "quantisation",
    "_rms_norm": "norm",
    "_inverse_rms": "norm",
    "ln_tma_bwd_kernel": "norm",  # cuDNN's
}


@pytest.mark.parametrize("name", NAMES)
def test_kernel_names(name):
    assert category(Kernel(name, 0, 1), VOCABULARY) == NAMES[name]


@pytest.mark.parametrize(
    ("operator", "shapes", "wanted"),
    [
        (("aten::copy_",), ((8192, 2, VOCABULARY),), "cross entropy"),
        (("_VocabParallelCrossEntropyBackward", "aten::mul_"), ((8192, 2),), "cross entropy"),
        (("aten::add_",), ((VOCABULARY, 1536),), "elementwise"),  # the head's weight, not logits
        (("SwiGLUFunction", "triton_poi_fused_0"), (), "activation"),
    ],
)
def test_generic_kernels_by_operator_and_shape(operator, shapes, wanted):
    """Pins: copies of logits counted with all other copies."""
    kernel = Kernel("void at::native::vectorized_elementwise_kernel<4>", 0, 1, operator, shapes)
    assert category(kernel, VOCABULARY) == wanted


def test_copies_after_the_gradient_norm_are_the_optimizers():
    names = ["Memset", "nvjet_tst", "at::native::copy", "multi_tensor_l2norm", "at::native::copy", "ncclDevKernel"]
    found = categories([Kernel(name, number, 1) for number, name in enumerate(names)], VOCABULARY)
    assert found == ["copy", "gemm", "elementwise", "optimizer", "optimizer", "communication"]


def test_trace(tmp_path):
    """Operators by external id and nesting, times in milliseconds, overlap counted once, gaps not at all."""

    def event(cat, name, ts, dur, ident, tid=1, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid} | {
            "args": {"External id": ident, **args}
        }

    events = [
        event("cpu_op", "Outer", 0, 100, 1, **{"Input Dims": [[4, 4], [], [[2], [2]]]}),
        event("cpu_op", "aten::copy_", 10, 20, 2, **{"Input Dims": [[3, 7], [3, 7], []]}),
        event("cpu_op", "Other", 150, 20, 3, tid=2),
        event("kernel", "nvjet", 1000, 2000, 1, tid=7),
        event("kernel", "at::native::copy", 2000, 3000, 2, tid=8),
        event("kernel", "unknown", 7000, 1000, 99, tid=8),
        {"ph": "i", "name": "mark", "ts": 0},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    kernels = read_trace(path)
    assert [kernel.operator for kernel in kernels] == [("Outer",), ("Outer", "aten::copy_"), ()]
    assert kernels[0].shapes == ((4, 4),)
    assert kernels[1].shapes == ((3, 7), (3, 7))
    found = summary(kernels, vocabulary=7)
    assert found["milliseconds"]["gemm"] == 2
    assert found["milliseconds"]["cross entropy"] == 3
    assert found["milliseconds"]["elementwise"] == 1
    assert (found["busy"], found["span"]) == (5, 7)
    assert found["largest"][0]["operator"] == ("Outer", "aten::copy_")
    gap = {"after": "at::native::copy", "before": "unknown", "ms": 2, "longest": 2, "count": 1}
    assert found["gaps"] == [gap]


def test_ratios_are_of_steps_of_the_same_round():
    """A slower second round of both arms leaves the ratio as it is. Pins: medians of rounds that do not correspond."""
    control = {"rounds": [{"seconds": [1.0, 2.0]}, {"seconds": [10.0, 20.0]}, {"error": "out of memory"}]}
    arm = {"rounds": [{"seconds": [0.5, 1.0]}, {"seconds": [5.0, 10.0]}, {"seconds": [3.0]}]}
    assert bench_step.paired_ratios(arm, control) == [0.5] * 4


def test_stock_arms_have_none_of_our_work():
    """Pins: a control that is slowed or sped up by what it is compared with."""
    arguments = bench_step.parse(["--output", "x"])
    arguments.backend, arguments.cache = "gpu", "cache"
    for name, arm in bench_step.ARMS.items():
        words = bench_step.step_flags(arm, arguments)
        if name.startswith("stock"):
            assert "--no-gradient-accumulation-fusion" in words
            assert not [word for word in words if word.startswith(("--fused-", "--check-gradients", "--deep-gemm"))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arm", "x=fp9"], "unknown precision 'fp9'; known: bf16"),
        (["--rounds", "0"], "must be at least 1, found 0"),
        (["--timed", "0"], "must be at least 1, found 0"),
        (["--data", "nowhere"], "nowhere.bin does not exist"),
        (["--flags=--tensor-model-parallel-size"], "--flags: --tensor-model-parallel-size '' is no number"),
        (["--flags", "--tensor-model-parallel-size 0"], "--flags: --tensor-model-parallel-size '0' is no number"),
        (["--flags", "--tensor-model-parallel-size 2"], "--gpus 1 is no multiple of the 2 that share a model"),
        (["--output", "/dev/null/x"], "File exists: '/dev/null'"),
    ],
)
def test_wrong_calls(monkeypatch, capsys, tmp_path, words, message):
    """One line and status 2. Pins: tracebacks."""
    monkeypatch.setattr(sys, "argv", ["bench_step", "--output", str(tmp_path / "x"), *words])
    with pytest.raises(SystemExit) as end:
        bench_step.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_arms_on_a_cpu():
    """Without what needs a GPU, which the engine refuses there. Pins: default arms that cannot be measured."""
    arguments = bench_step.parse(["--output", "x"])
    arguments.backend, arguments.cache = "cpu", "cache"
    words = bench_step.step_flags(bench_step.ARMS["fp8-faster"], arguments)
    assert "--fused-linear-cross-entropy" in words
    assert not set(words) & bench_step.engine.GPU_ONLY


def test_command(tmp_path):
    """One arm that works and one that cannot, on the CPU: the failure is reported, the other measured.

    Pins: a failing arm that ends the command, losses or times that are lost.
    """
    command = [sys.executable, str(REPO / "tools/bench_step.py"), "--shape", "tiny", "--seq-length", "128"]
    command += ["--micro-batches", "1", "--rounds", "1", "--warm-up", "1", "--timed", "2", "--no-profile"]
    command += ["--arm", "bad=bf16 --no-such-flag", "--arm", "good=bf16 --fused-linear-cross-entropy"]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "training"), "INFIR2_BACKEND": "cpu"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "report")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "status" in report["arms"]["bad"]["rounds"][0]["error"]
    good = report["arms"]["good"]["rounds"][0]
    assert len(good["seconds"]) == 2
    assert all(5 < loss < 8 for loss in good["losses"])
    assert "bad: ended with status" in done.stdout


def test_nothing_measured(tmp_path):
    """Status 1, and why. Pins: a report of nothing that ended with 0, and a refusal that only a worker's log held."""
    command = [sys.executable, str(REPO / "tools/bench_step.py"), "--shape", "tiny", "--seq-length", "128"]
    command += [
        "--rounds",
        "1",
        "--warm-up",
        "1",
        "--timed",
        "1",
        "--no-profile",
        "--arm",
        "x=bf16 --lr-warmup-iters 9",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "training"), "INFIR2_BACKEND": "cpu"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "report")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "x: ended with status [2]: the warmup takes 9 of 5 steps" in done.stdout


def test_variables_of_an_arm():
    """Pins: a variable handed to the engine as a flag, a flag with a value taken for a variable."""
    name, arm = bench_step.Arm.parse("safe=fp8 --flash-attention-4 NVTE_X=0 --log-interval=2")
    assert (name, arm) == ("safe", bench_step.Arm("fp8", ("--flash-attention-4", "--log-interval=2"), ("NVTE_X=0",)))
