"""The evaluation scripts: their exact commands and tasks, what they refuse, how a Slurm array shares the work.

`python tests/test_eval_scripts.py` rewrites tests/golden/eval; read the diff.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from eval_local import write_datasets

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/eval"
SCRIPTS = ["aime24_eval", "aime25_eval", "gpqa_eval", "livecodebenchv5_eval"]
SETTINGS = {
    "DRY_RUN": "1",
    "PYTHON": sys.executable,
    "INFIR2_BACKEND": "gpu",
    "OUTPUT": "/out",
}
MODELS = ("FP8", "a", "b", "b c")
PLACE = Path()  # holds data and models; the commands show them as /data and /models


@contextmanager
def placed() -> Iterator[None]:
    """Problems and folders that can be served, as far as is looked at before a server starts."""
    global PLACE
    with tempfile.TemporaryDirectory() as folder:
        PLACE = Path(folder)
        write_datasets(PLACE / "data")
        for name in MODELS:
            model = PLACE / "models" / name
            model.mkdir(parents=True)
            for file in ("config.json", "tokenizer.json"):
                (model / file).write_text("{}")
            (model / "generation_config.json").write_text('{"eos_token_id": 0}')
            (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        SETTINGS.update(DATASET_LOCAL=str(PLACE / "data"), MODEL_PATH=str(PLACE / "models/FP8"))
        yield


@pytest.fixture(scope="module", autouse=True)
def _placed():
    with placed():
        yield


def run(script: str, *flags: str, **more: str) -> subprocess.CompletedProcess:
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", f"scripts/eval/{script}.sh", *flags]
    environment = {**keep, **SETTINGS, **more}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def printed(script: str, *flags: str, **more: str) -> str:
    """The commands and evalscope's task, with this machine's folders taken out."""
    done = run(script, *flags, **more)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    names = {sys.executable: "python", f"{Path(sys.executable).parent}/": "", str(ROOT): "REPO", f"{PLACE}/": "/"}
    for folder, name in names.items():
        text = text.replace(folder, name)
    # A checkout whose path holds a space is quoted by the shell.
    return re.sub(r"'((?:REPO|python)[^' ]*)'", r"\1", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_and_task(script):
    """They are the golden ones, word for word. Pins: a change to the recipe's numbers or prompts that nobody saw."""
    assert printed(script) == (GOLDEN / script).read_text()


def test_recipe():
    """Pins golden files that were rewritten with other numbers."""
    numbers = {"aime24": (31000, 32), "aime25": (31000, 32), "gpqa": (26000, 8), "livecodebenchv5": (27000, 8)}
    for benchmark, (tokens, samples) in numbers.items():
        task = printed(f"{benchmark}_eval")
        for key, value in (("max_tokens", tokens), ("repeats", samples), ("temperature", 0.65), ("top_p", 0.95)):
            assert f'"{key}": {value}' in task


def test_settings_and_flags():
    """TP, SGLANG_ARGS, NAME and TRAINED_ON arrive; flags of the user win."""
    more = {"TP": "4", "SGLANG_ARGS": "--attention-backend triton", "NAME": "mine", "TRAINED_ON": "/a:/b c"}
    text = printed("aime24_eval", "--samples", "3", MARK_OVERLAP="1", **more)
    assert "--tp-size 4 --attention-backend triton\n" in text
    assert '"repeats": 3' in text
    assert "--trained-on mine=/a --trained-on 'mine=/b c' --mark-overlap --output /out/aime24/mine/report" in text


def test_a_running_server_is_used():
    """Pins: the few requests at once that a CPU of ours takes, asked of somebody else's server."""
    text = printed("gpqa_eval", API_URL="http://host:1/v1", INFIR2_BACKEND="")
    assert '"eval_batch_size": 128' in text
    assert "sglang" not in text
    assert "run_evalscope.py --ask --review /out/gpqa/FP8/task.json" in text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"DATASET_LOCAL": ""}, "set DATASET_LOCAL: folder that holds aime24/"),
        ({"MODEL_PATH": ""}, "set MODEL_PATH: Hugging Face folder"),
        ({"DRY_RUN": "0", "TP": "4", "PATH": "/usr/bin:/bin"}, "needs 4 GPUs on each node, found 0; set TP"),
        ({"NAME": "a/b"}, "with a NAME that can be a folder's"),
        (
            {"NAME": "report"},
            "'report' cannot be the folder of a model ('report' is the report's). Choose another NAME",
        ),
        ({"NAME": "step=10"}, "the name step=10 has an equals sign"),
        ({"MODEL_PATH": "/absent"}, "/absent is no model folder: it has no config.json"),
        ({"DATASET_LOCAL": "/absent"}, "/absent/aime24 is not a local copy of aime24"),
        ({"API_URL": "http://host:1/v1", "MODEL_PATH": "", "TRAINED_ON": "/a"}, "TRAINED_ON is of MODEL_PATH"),
    ],
)
def test_refusals(more, text):
    """Pins: a dry run of a model or of problems that are not there, status 0; a model named report, whose answers the
    report of several models removed; training data that nobody looked at."""
    done = run("aime24_eval", **more)
    assert done.returncode == 2
    assert text in done.stderr


@pytest.mark.parametrize("flags", [("--model", "one={}/models/a"), ("--model=one={}/models/a",)])
def test_models_of_flags(flags):
    """They are the only ones, in both spellings. Pins: --model=NAME=FOLDER beside MODEL_PATH's, and MARK_OVERLAP=1 and
    TRAINED_ON that were forgotten there."""
    flags = [flag.format(PLACE) for flag in flags]
    text = printed("aime24_eval", *flags, MARK_OVERLAP="1")
    assert "--run one=/out/aime24/one/evalscope --mark-overlap --output /out/aime24/one/report" in text
    assert "FP8" not in text
    done = run("aime24_eval", *flags, TRAINED_ON="/a")
    assert done.returncode == 2
    assert "give --trained-on NAME=FOLDER" in done.stderr


def test_values_that_begin_with_a_dash():
    """Pins: SGLANG_ARGS of one word, which the parser took for a flag of its own."""
    assert "--tp-size 1 --disable-cuda-graph\n" in printed("aime24_eval", SGLANG_ARGS="--disable-cuda-graph")


@pytest.mark.parametrize("script", ["aime24_eval", "all_eval", "slurm"])
def test_library_is_found(script, tmp_path):
    """Beside the script wherever the job was submitted from, and where it was submitted from for Slurm's copy. Pins:
    SLURM_SUBMIT_DIR of an allocation that was started elsewhere taken for the repository."""
    path = ROOT / ("scripts/SFT" if script == "slurm" else "scripts/eval") / f"{script}.sh"
    copy = shutil.copy(path, tmp_path / "slurm_script")
    for file, submitted in ((path, tmp_path), (copy, ROOT)):
        environment = {**os.environ, **SETTINGS, "SLURM_SUBMIT_DIR": str(submitted), "MODEL_PATH": ""}
        done = subprocess.run(
            ["bash", file], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert (
            "error: set MODEL_PATH" in done.stderr
            or "name the checkpoints" in done.stderr
            or "set SLURM" in done.stderr
        )


def test_every_benchmark_of_every_checkpoint():
    """By bash all of them, checkpoints side by side; trailing flags go to each."""
    text = printed("all_eval", f"FP8={PLACE}/models/a", f"BF16={PLACE}/models/b c", "--samples", "3")
    for script in SCRIPTS:
        folder = f"/out/{script.removesuffix('_eval')}"
        runs = f"--run FP8={folder}/FP8/evalscope --run BF16={folder}/BF16/evalscope --compare FP8 BF16"
        assert f"{runs} --output {folder}/report" in text
    assert text.count('"repeats": 3') == 8
    assert "--model-path '/models/b c'" in text


def test_array_covers_every_pair_once():
    """Three elements from index 5 for eight pairs. Pins pairs that no element takes, or two."""
    found, elements, first = [], 3, 5
    for element in range(first, first + elements):
        slurm = {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_TASK_MIN": str(first)}
        slurm |= {"SLURM_ARRAY_TASK_COUNT": str(elements), "SLURM_SUBMIT_DIR": str(ROOT)}
        text = printed("all_eval", f"one={PLACE}/models/a", f"two={PLACE}/models/b", **slurm)
        found += [line.split()[-1].removesuffix(":") for line in text.splitlines() if "run_evalscope.py --ask" in line]
    names = [script.removesuffix("_eval") for script in SCRIPTS]
    assert sorted(found) == sorted(f"/out/{name}/{model}/task.json" for name in names for model in ("one", "two"))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with placed():
        for name in SCRIPTS:
            (GOLDEN / name).write_text(printed(name))
