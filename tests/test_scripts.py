"""The scripts: their exact command lines, and what they refuse before anything starts.

`python tests/test_scripts.py` rewrites tests/golden/argv; read the diff.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
GOLDEN = REPO / "tests/golden"
SCRIPTS = sorted(path.stem for path in (REPO / "scripts/CPT").glob("*.sh"))


def environment(script: str, **more: str) -> dict[str, str]:
    size = "7B" if "7B" in script else "1.5B"
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **keep,
        "DRY_RUN": "1",
        "INFIR2_BACKEND": "cpu" if "tiny" in script else "gpu",
        "OUTPUT_ROOT": "exp",
        "DATA_DIR": "data/cpt",
        "HF_CHECKPOINT": f"tests/golden/configs/Qwen2.5-{size}",
        "REF_LOAD": f"models/Qwen2.5-{size}_torch_dist",
        "ITER": "35000",
        **more,
    }


def run(script: str, *flags: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", f"scripts/CPT/{script}.sh", *flags]
    return subprocess.run(
        command, cwd=REPO, env=environment(script, **more), capture_output=True, text=True, check=False
    )


def argv(script: str, *flags: str, **more: str) -> list[str]:
    """The words of the command, the interpreter's own path cut to its name."""
    done = run(script, *flags, **more)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return [Path(words[0]).name.replace("python3", "python"), *words[1:]]


def by_flag(words: list[str]) -> str:
    """One flag with its values a line: what a diff should show."""
    return " ".join("\n" + word if word.startswith("-") else word for word in words) + "\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line(script):
    """The command is the golden one, word for word. Pins: a change to a recipe that nobody saw."""
    assert by_flag(argv(script)) == (GOLDEN / "argv" / script).read_text()


@pytest.mark.parametrize("fp8", [name for name in SCRIPTS if "FP8" in name])
def test_twin_differs_in_precision_only(fp8):
    """A BF16 control has all its FP8 run's words but the precision's, and its own folder. Pins: controls that drift."""
    bf16 = fp8.replace("FP8", "BF16")
    words = argv(fp8)
    at = words.index("--fp8-format")
    assert words[at : at + 4] == ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]
    assert [word.replace(bf16.removesuffix("_decay"), fp8.removesuffix("_decay")) for word in argv(bf16)] == [
        *words[:at],
        *words[at + 4 :],
    ]


def test_documented_load_is_the_branch():
    """`--load .../iter_0035000`, as the original documents it, is the branch from 35000.

    Pins: Megatron, given that folder, finds no tracker in it and trains from scratch.
    """
    load = "exp/InfiR2_CPT_FP8_7B/checkpoints/iter_0035000"
    words = argv("InfiR2_CPT_FP8_7B_decay", "--load", load, ITER="")
    assert words[: -len(["--load", load])] == argv("InfiR2_CPT_FP8_7B_decay")


def test_flags_of_the_user_win_and_launcher_flags_are_taken():
    words = argv("InfiR2_CPT_FP8_7B", "--train-iters", "7", "--nnodes=4", "--rdzv_endpoint", "node0:29400")
    assert words[-2:] == ["--train-iters", "7"]
    assert words[words.index("--nnodes") + 1] == "4"
    assert words[words.index("--rdzv-endpoint") + 1] == "node0:29400"


def test_slurm(tmp_path):
    """Under srun the number of nodes and the first node's name are the allocation's."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'n7\\nn8\\n'\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "42"}
    words = argv("InfiR2_CPT_FP8_7B", PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm)
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-endpoint") + 1] == "n7:29400"
    assert words[words.index("--rdzv-id") + 1] == "42"


@pytest.mark.parametrize(
    ("script", "more", "text"),
    [
        ("InfiR2_CPT_FP8_7B", {"DATA_DIR": ""}, "set DATA_DIR: folder that tools/prepare_data.py"),
        ("InfiR2_CPT_FP8_7B", {"REF_LOAD": ""}, "set REF_LOAD: torch_dist folder of the base model"),
        ("InfiR2_CPT_FP8_7B", {"HF_CHECKPOINT": "absent"}, "absent/config.json does not exist"),
        ("InfiR2_CPT_FP8_7B", {"HF_CHECKPOINT": "tests/golden/configs/Qwen2.5-1.5B"}, "Qwen2.5-7B has 28 of 3584"),
        ("InfiR2_CPT_FP8_7B", {"PRECISION": "fp9"}, "unknown precision 'fp9'; known: bf16 fp8 fp8-hybrid"),
        ("InfiR2_CPT_FP8_7B_decay", {"ITER": ""}, "set ITER: the stable-phase iteration"),
        ("InfiR2_CPT_FP8_7B", {"DRY_RUN": "0", "INFIR2_BACKEND": ""}, "needs 8 GPUs on each node, found 0"),
    ],
)
def test_refusals(script, more, text):
    """What is missing is said before anything starts, and the status is not 0."""
    done = run(script, **{"PATH": "/usr/bin:/bin", **more})
    assert done.returncode != 0
    assert text in done.stderr


if __name__ == "__main__":
    for name in SCRIPTS:
        (GOLDEN / "argv" / name).write_text(by_flag(argv(name)))
