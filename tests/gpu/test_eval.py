"""The benchmark scripts against a real SGLang server on a Hopper GPU.

    export MODEL=exp/quickstart/InfiR2_tiny MODEL_FP8=exp/quickstart/InfiR2_tiny_FP8
    export SGLANG_ARGS="--attention-backend triton --sampling-backend pytorch --grammar-backend none ..."
    EVALSCOPE_PYTHON=... python -m pytest -s tests/gpu/test_eval.py

Where no Python has evalscope, the script is left out, and the server alone is tested; the test says so.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from eval_local import write_lines, write_livecodebench

from infir2 import serving
from infir2.evaluation import sandbox

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS, SAMPLES, MAX_TOKENS = 16, 4, 64
FOLDERS = {"aime24": "aime24", "aime25": "aime25", "gpqa": "gpqa", "livecodebenchv5": "lcb"}
EVALSCOPE = os.environ.get("EVALSCOPE_PYTHON", str(ROOT / ".venv-eval/bin/python"))

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "MODEL_FP8" not in os.environ, reason="needs a Hopper GPU, MODEL and MODEL_FP8"
)


def has_evalscope() -> bool:
    try:
        return subprocess.run([EVALSCOPE, "-c", "import evalscope"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def gpu_processes() -> set[str]:
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    command += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def gone(before: set[str]) -> bool:
    """Whether the GPU is given back."""
    deadline = time.monotonic() + 30
    while (left := gpu_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    return not left


def write_problems(benchmark: str, folder: Path) -> None:
    """PROBLEMS small problems in the benchmark's layout."""
    if benchmark == "livecodebenchv5":
        write_livecodebench(folder, ["2024-10-01"] * PROBLEMS)
    elif benchmark == "gpqa":
        wrong = {f"Incorrect Answer {n}": str(90 + n) for n in (1, 2, 3)}
        lines = [{"Question": f"What is {n} + 1?", "Correct Answer": str(n + 1), **wrong} for n in range(PROBLEMS)]
        write_lines(folder / "train.jsonl", lines)
    else:
        lines = [{"problem": f"What is {n} + 27?", "answer": str(n + 27)} for n in range(PROBLEMS)]
        write_lines(folder / "test.jsonl", lines)


@pytest.mark.parametrize("variable", ["MODEL", "MODEL_FP8"])
def test_server(variable, tmp_path):
    """SGLang gets ready by a completion, answers many at once, and gives the GPU back. Pins FP8 models not recognised,
    and children of the server that stay."""
    before, model = gpu_processes(), Path(os.environ[variable]).resolve()
    serving.check_model(model, "gpu", 0.65)
    server = serving.Server("gpu", arguments=shlex.split(os.environ.get("SGLANG_ARGS", "")))
    sampling = {"temperature": 0.65, "top_p": 0.95}
    begin = time.monotonic()
    with serving.serving(server, [model], sampling, tmp_path / "log") as (url, process):
        ready = time.monotonic() - begin
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda _: serving.complete(url, str(model), sampling), range(256)))
        assert process.status() is None
    assert all(isinstance(answer, str) for answer in answers)
    assert len(set(answers)) > 1, "256 samples of one question are the same: nothing was sampled"
    assert gone(before)
    seconds = round(time.monotonic() - begin - ready, 1)
    print(
        json.dumps({"model": variable, "ready_seconds": round(ready, 1), "chats": 256, "seconds_to_the_end": seconds})
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_script(name, tmp_path):
    """NAME_eval.sh; for AIME24 both models, side by side in one report, else the FP8 model, for a server takes a minute
    to start. Pins a chain that holds on a CPU alone."""
    if not has_evalscope():
        pytest.skip(f"{EVALSCOPE} has no evalscope: the script was not run, the server alone")
    if name == "livecodebenchv5" and (why := sandbox.missing()):
        pytest.skip(f"no sandbox can be made here, so model-written code is not run: {why}")
    before = gpu_processes()
    write_problems(name, tmp_path / FOLDERS[name])
    keys = ("MODEL", "MODEL_FP8") if name == "aime24" else ("MODEL_FP8",)
    models = [word for key in keys for word in ("--model", f"{key}={os.environ[key]}")]
    command = ["bash", str(ROOT / f"scripts/eval/{name}_eval.sh"), *models]
    command += ["--samples", str(SAMPLES), "--max-tokens", str(MAX_TOKENS)]
    settings = {"PYTHON": sys.executable, "EVALSCOPE_PYTHON": EVALSCOPE, "DATASET_LOCAL": str(tmp_path)}
    settings["INFIR2_BACKEND"] = "gpu"  # tests/conftest.py says cpu
    environment = {**os.environ, **settings, "OUTPUT": str(tmp_path / "out")}
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    folder = tmp_path / "out" / name
    report = folder / ("report" if len(keys) > 1 else f"{keys[0]}/report") / "scores.json"
    (scores,) = (one["scores"] for one in json.loads(report.read_text())["benchmarks"].values())
    for key in keys:
        assert (scores[key]["problems"], scores[key]["samples"]) == (PROBLEMS, SAMPLES)
        log = (folder / key / "server.log").read_text(errors="replace")
        assert "ServerArgs(" in log, "it was not SGLang that answered"
    assert gone(before)
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps({"benchmark": name, "seconds": seconds, "scores": scores}))
