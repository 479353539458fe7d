"""The scripts: their exact command lines, and what they refuse before anything starts.

`python tests/test_scripts.py` rewrites tests/golden/argv; read the diff.
"""

import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infir2.rl import controller as rl_controller

REPO = Path(__file__).parents[1]
GOLDEN = REPO / "tests/golden"
SCRIPTS = sorted(path.stem for path in (REPO / "scripts/CPT").glob("*.sh"))
SFT_SCRIPTS = sorted(path.stem for path in (REPO / "scripts/SFT").glob("InfiR2_*.sh"))
RL_SCRIPTS = sorted(path.stem for path in (REPO / "scripts/RL").glob("InfiR2_*.sh"))


def environment(script: str, **more: str) -> dict[str, str]:
    model = next((name for name in ("7B", "1.5B", "smollm2-135m") if name in script), "tiny")
    model = f"Qwen2.5-{model}" if model.endswith("B") else model
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **keep,
        "DRY_RUN": "1",
        "INFIR2_BACKEND": "cpu" if "tiny" in script else "gpu",
        "OUTPUT_ROOT": "exp",
        "DATA_DIR": "data/cpt",
        "HF_CHECKPOINT": f"tests/golden/configs/{model}",
        "REF_LOAD": f"models/{model}_torch_dist",
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


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("InfiR2_CPT_FP8_7B", "--nnodes"),
        ("InfiR2_CPT_FP8_7B", "--rdzv_endpoint"),
        ("InfiR2_SFT_FP8_7B_stage1", "--actor-num-nodes"),
        ("InfiR2_SFT_FP8_7B_stage1", "--wait-seconds"),
    ],
)
def test_launcher_flag_without_its_value(script, flag):
    """Pins: bash's "unbound variable", with status 1."""
    done = sft(script, flag) if "SFT" in script else run(script, flag)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: {flag} needs a value")


def test_launches_on_one_node_do_not_meet():
    """Pins: two runs on one host met at port 29400; the second died with the first one's end. And several nodes that
    were told no meeting place waited for each other at their own."""

    def meeting(*flags: str, **more: str) -> str:
        words = argv("InfiR2_CPT_FP8_7B", *flags, **more)
        return words[words.index("--rdzv-endpoint") + 1]

    assert meeting() == "localhost:0"  # a free port
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n7", "SLURM_JOB_ID": "42"}
    assert meeting(**slurm) == "localhost:0"
    assert meeting("--rdzv_endpoint", "localhost:4000") == "localhost:4000"
    done = run("InfiR2_CPT_FP8_7B", NNODES="2")
    assert done.returncode == 2
    assert "set RDZV_ENDPOINT: host:port where the 2 nodes meet" in done.stderr


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, "0 1 2 3"), ("2,3", "2 3"), ("", ""), ("-1", ""), ("3,9,1", "3"), ("GPU-5a,GPU-7c", "GPU-5a GPU-7c")],
)
def test_gpus_that_we_may_use(tmp_path, visible, found):
    """Pins: CUDA_VISIBLE_DEVICES ignored: on a shared node other people's GPUs were counted and taken."""
    executable(tmp_path / "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: x"; done\n')
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    settings |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = "source scripts/lib/common.sh; echo $(visible_gpus); gpu_count"
    done = subprocess.run(["bash", "-c", command], cwd=REPO, env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [found, str(len(found.split()))]


def test_a_resumed_run_has_one_id_at_wandb(tmp_path):
    """Pins: a new run at Weights & Biases for each launch. Another run has another id."""
    command = "source scripts/lib/common.sh; source scripts/lib/megatron.sh; NAME=x; wandb_args; echo ${WANDB_RUN_ID:-}"

    def run_id(name: str, **more: str) -> str:
        settings = {"PATH": os.environ["PATH"], "WANDB_PROJECT": "p", "RUN_DIR": str(tmp_path / name), **more}
        done = subprocess.run(
            ["bash", "-c", command], cwd=REPO, env=settings, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    first = run_id("a")
    assert len(first) == 8
    assert run_id("a") == first == (tmp_path / "a/wandb_id").read_text()
    assert run_id("b") != first
    assert run_id("c", DRY_RUN="1") == ""
    assert not (tmp_path / "c").exists()


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


# Supervised fine-tuning and reinforcement learning on Ray


def sft(script: str, *flags: str, **more: str) -> subprocess.CompletedProcess:
    """A script of scripts/RL or a file of scripts/SFT, under this interpreter. RAY_ADDRESS is local unless given."""
    settings = {"PYTHON": sys.executable, "RAY_ADDRESS": "local", "DATA_DIR": "data/sft", **more}
    settings = {"RL_DATA": "data/rl.jsonl", "EVAL_DATA": "data/eval.jsonl"} | settings
    command = ["bash", f"scripts/{'RL' if '_RL_' in script else 'SFT'}/{script}.sh", *flags]
    return subprocess.run(
        command, cwd=REPO, env=environment(script, **settings), capture_output=True, text=True, check=False
    )


def sft_argv(script: str, *flags: str, **more: str) -> list[str]:
    """The words of the command, with this machine's folders taken out."""
    done = sft(script, *flags, **more)
    assert done.returncode == 0, done.stderr
    folders = {sys.executable: "python", f"{Path(sys.executable).parent}/": "", str(REPO): "REPO"}
    words = shlex.split(done.stdout)
    for folder, name in folders.items():
        words = [word.replace(folder, name) for word in words]
    return words


@pytest.mark.parametrize("script", SFT_SCRIPTS + RL_SCRIPTS)
def test_sft_command_line(script):
    """As `test_command_line`."""
    assert by_flag(sft_argv(script)) == (GOLDEN / "argv" / script).read_text()


@pytest.mark.parametrize("fp8", [name for name in SFT_SCRIPTS + RL_SCRIPTS if "FP8" in name])
def test_sft_twin_differs_in_precision_only(fp8):
    """As `test_twin_differs_in_precision_only`."""
    words = sft_argv(fp8)
    at = words.index("--fp8-format")
    twin = [word.replace("_BF16_", "_FP8_") for word in sft_argv(fp8.replace("FP8", "BF16"))]
    assert twin == [*words[:at], *words[at + 4 :]]


def test_sft_flags_of_the_user_win_and_launcher_flags_are_taken():
    """slime's words for the layout go to the launcher, before --; all others to the program, last."""
    more = ("--actor-num-nodes=4", "--actor-num-gpus-per-node", "4", "--all-ranks-log", "--lr", "1e-6")
    words = sft_argv("InfiR2_SFT_FP8_7B_stage1", *more)
    assert words[-2:] == ["--lr", "1e-6"]
    launcher = " ".join(words[: words.index("--")])
    assert "--actor-num-nodes 4 --actor-num-gpus-per-node 4" in launcher
    assert "--all-ranks-log" in launcher


def test_sft_job():
    """With a dashboard's address the same command is the entry point of a Ray job, which takes the settings along."""
    words = sft_argv("InfiR2_SFT_FP8_7B_stage1", RAY_ADDRESS="http://head:8265", SUBMISSION_ID="one", NCCL_DEBUG="INFO")
    assert words[:3] == ["ray", "job", "submit"]
    assert words[words.index("--address") + 1] == "http://head:8265"
    settings = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert settings["SCALE_FMT"] == "pow2"
    assert settings["INFIR2_BACKEND"] == "gpu"
    assert settings["NCCL_DEBUG"] == "INFO"
    assert settings["PYTHONPATH"].startswith("REPO/training")
    assert "HOME" not in settings
    assert words[words.index("--") + 1 :] == sft_argv("InfiR2_SFT_FP8_7B_stage1")


def test_rl_engines_apart():
    """With COLOCATE=0 the engines have GPUs of their own; the controller places trainers and engines itself, so its
    flags are the program's. Pins: --colocate beside --rollout-num-gpus, weights gathered while engines ask for them."""
    words = sft_argv("InfiR2_RL_FP8_7B_stage1_4node", "--actor-num-nodes", "2", COLOCATE="0", ROLLOUT_GPUS="8")
    assert words[:3] == ["python", "-m", "infir2.rl"]
    assert words[words.index("--actor-num-nodes") + 1] == "2"
    assert words[words.index("--rollout-num-gpus") + 1] == "8"
    assert "--colocate" not in words
    assert "--overlap-param-gather" not in words
    words = sft_argv("InfiR2_RL_FP8_7B_stage1_4node", SGLANG_ARGS="--disable-cuda-graph")
    assert "--sglang-arguments=--disable-cuda-graph" in words  # apart, the parser would take it for a flag
    job = sft_argv("InfiR2_RL_FP8_7B_stage1_4node", RAY_ADDRESS="http://head:8265", SUBMISSION_ID="one")
    assert job[job.index("--") + 1 :] == sft_argv("InfiR2_RL_FP8_7B_stage1_4node")


def test_rl_engine_flags():
    """Pins: SGLANG_ARGS of one word, which begins with -- and was taken for a flag."""
    words = sft_argv("InfiR2_RL_FP8_7B_stage1_1node", SGLANG_ARGS="--disable-cuda-graph")
    assert rl_controller.parse([*words[3:], "--metrics-file", "x"])[0].sglang_arguments == "--disable-cuda-graph"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"RL_DATA": ""}, "set RL_DATA: prompts: train.jsonl of a folder"),
        ({"REF_LOAD": ""}, "set REF_LOAD: checkpoints of SFT stage 2"),
        ({"COLOCATE": "0"}, "set ROLLOUT_GPUS: how many GPUs the engines have"),
        ({"HF_CHECKPOINT": "tests/golden/configs/Qwen2.5-1.5B"}, "Qwen2.5-7B has 28 of 3584"),
    ],
)
def test_rl_refusals(more, text):
    done = sft("InfiR2_RL_FP8_7B_stage1_1node", **more)
    assert done.returncode == 2
    assert text in done.stderr


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_sft_slurm(tmp_path):
    """sbatch's file starts Ray over the allocation with the head on 6379, and the script, on the first node, joins it.

    Pins: workers told to join on the dashboard's port, 8265.
    """
    executable(tmp_path / "scontrol", "#!/bin/sh\nprintf 'n7\\nn8\\nn9\\n'\n")
    executable(
        tmp_path / "srun", '#!/bin/bash\nprintf "%q " "$@"\necho; while [[ $1 != -- ]]; do shift; done\nexec "${@:2}"\n'
    )
    script = "scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh"
    slurm = {
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[7-9]",
        "SLURM_SUBMIT_DIR": str(REPO),
        "RAY_ADDRESS": "",
    }
    more = {"HF_CHECKPOINT": "tests/golden/configs/Qwen2.5-7B", "PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm}
    done = sft("slurm", script, "--lr", "1e-6", **more)
    assert done.returncode == 0, done.stderr
    srun, launch = done.stdout.splitlines()
    assert srun.split() == [
        *"--nodes=3 --ntasks-per-node=1 --kill-on-bad-exit=1 ray symmetric-run --address n7:6379 --min-nodes 3".split(),
        *f"--num-gpus 8 -- env RAY_ADDRESS=n7:6379 bash {script} --lr 1e-6".split(),
    ]
    assert "-m infir2.ray_launch --actor-num-nodes 3 --actor-num-gpus-per-node 8 " in launch


class Dashboard(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"ray_version": "2.60.0"}')

    def log_message(self, *args): ...


@pytest.mark.parametrize(
    ("submitted", "state", "status", "text"),
    [
        (0, "Job 'one' succeeded", 0, ""),
        (1, "Job 'one' failed", 1, ""),
        (0, "Job 'one' was stopped", 2, "error: job one did not succeed: Job 'one' was stopped"),
    ],
)
def test_sft_job_status(tmp_path, submitted, state, status, text):
    """A job's failure is the script's. Pins: `ray job submit` ends with 0 when the job was stopped elsewhere."""
    executable(tmp_path / "ray", f'#!/bin/sh\ncase $2 in submit) exit {submitted} ;; status) echo "{state}" ;; esac\n')
    executable(tmp_path / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    server = http.server.HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    more = {"DRY_RUN": "0", "PYTHON": str(tmp_path / "python"), "OUTPUT_ROOT": str(tmp_path), "SUBMISSION_ID": "one"}
    done = sft("InfiR2_SFT_FP8_7B_stage1", RAY_ADDRESS=f"http://127.0.0.1:{server.server_port}", **more)
    server.shutdown()
    server.server_close()
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert (tmp_path / "InfiR2_SFT_FP8_7B_stage1/command.sh").is_file()


@pytest.mark.parametrize(
    ("url", "host"), [("http://head.cluster:8265", "head.cluster"), ("http://[fd00::1]:8265/", "fd00::1")]
)
def test_jobs_do_not_go_to_the_webs_proxy(url, host):
    """Pins: with http_proxy set, as on many clusters, `ray job submit` asked the proxy for the dashboard."""
    command = (
        f'source scripts/lib/common.sh; source scripts/lib/ray.sh; without_proxy "{url}"; echo $no_proxy $NO_PROXY'
    )
    settings = {"PATH": os.environ["PATH"], "http_proxy": "http://proxy:3128", "no_proxy": "intern"}
    done = subprocess.run(["bash", "-c", command], cwd=REPO, env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{host},intern", host]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"DATA_DIR": ""}, "set DATA_DIR: folder that tools/prepare_data.py sft wrote"),
        ({"REF_LOAD": ""}, "set REF_LOAD: checkpoints of the CPT run"),
        ({"DRY_RUN": "0"}, "this run needs 2 nodes, and no Ray cluster answers"),
        (
            {"DRY_RUN": "0", "NODES": "1", "PATH": "/usr/bin:/bin"},
            "needs 8 GPUs on each node, found 0; set GPUS_PER_NODE",
        ),
        ({"DRY_RUN": "0", "RAY_ADDRESS": "http://127.0.0.1:9"}, "no Ray dashboard answers at RAY_ADDRESS"),
    ],
)
def test_sft_refusals(more, text):
    done = sft("InfiR2_SFT_FP8_7B_stage1", **more)
    assert done.returncode == 2
    assert text in done.stderr


PARITY_PYTHON = """#!/bin/bash
case "$*" in
    *infir2.pretrain*) echo "$CUDA_VISIBLE_DEVICES $*" >>"$CALLS"; [[ $* != *"$FAILS"* ]] ;;
    *side_by_side.py*) exec REAL "$@" ;;
    *parity.py*) echo "$*" >>"$CALLS"; [[ $* != *report_1237* ]] ;;
    *) echo --word ;;
esac
"""


def parity(folder: Path, *words: str, fails: str = "nothing") -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """scripts/parity.sh on two GPUs that are not there, with a Python that writes its commands down."""
    python = PARITY_PYTHON.replace("REAL", shlex.quote(sys.executable))
    for name, text in {"nvidia-smi": "#!/bin/sh\necho 'GPU 0: a'; echo 'GPU 1: b'\n", "python": python}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("base", "base_torch_dist", "corpus", "data"):
        (folder / "out" / name).mkdir(parents=True, exist_ok=True)
    more = {"PYTHON": str(folder / "python"), "SET_UP": "0", "PARITY": str(folder / "out")}
    more |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "FAILS": fails}
    done = subprocess.run(
        ["bash", str(REPO / "scripts/parity.sh"), *words],
        env=os.environ | more,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = folder / "calls"
    return done, [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []


def test_parity(tmp_path):
    """Both precisions with both seeds, a GPU each; each seed's report has the other as its noise. Pins runs that differ
    in more than precision and seed, two runs on one GPU at once, a gate that failed unseen, and runs of other flags
    reused."""
    done, calls = parity(tmp_path, "--lr", "1e-4")
    assert done.returncode == 1, done.stderr  # the second report's
    runs, reports = calls[:4], calls[4:]
    assert sorted(words[0] for words in runs[:2]) == sorted(words[0] for words in runs[2:]) == ["0", "1"]
    found = {}
    for words in runs:
        assert words[-2:] == ["--lr", "1e-4"]
        name = Path(words[words.index("--save") + 1]).parent.name
        seed = words[words.index("--seed") + 1]
        assert name.endswith(f"_{seed}")
        found[name.split("_")[2], seed] = [word for word in words[1:] if name not in word and word != seed]
    assert sorted(found) == [("BF16", "1236"), ("BF16", "1237"), ("FP8", "1236"), ("FP8", "1237")]
    assert found["FP8", "1236"] == found["FP8", "1237"]
    assert [Path(words[words.index("--bf16-seed") + 1]).name[-4:] for words in reports] == ["1237", "1236"]
    assert len(parity(tmp_path, "--lr", "1e-4")[1]) == 6 + 2  # the reports alone
    assert len(parity(tmp_path, "--lr", "2e-4")[1]) == 6 + 2 + 6


def test_parity_takes_the_gpus_that_it_may(tmp_path, monkeypatch):
    """Pins: CUDA_VISIBLE_DEVICES overwritten by 0, 1, ..., which are other people's GPUs on a shared node."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    runs = [words for words in parity(tmp_path)[1] if "infir2.pretrain" in words]
    assert [words[0] for words in runs] == ["1"] * 4


def test_parity_stops_at_a_failed_run(tmp_path):
    """Pins a report of runs that did not end, and a run that trains on when its twin has failed."""
    done, calls = parity(tmp_path, fails="InfiR2_CPT_BF16_smollm2-135m_1236")
    assert done.returncode == 1
    assert "BF16, seed 1236 failed; the end of" in done.stderr
    assert not [words for words in calls if "tools/parity.py" in words or "1237" in words]


if __name__ == "__main__":
    for name in SFT_SCRIPTS + RL_SCRIPTS:
        (GOLDEN / "argv" / name).write_text(by_flag(sft_argv(name)))
    for name in SCRIPTS:
        (GOLDEN / "argv" / name).write_text(by_flag(argv(name)))
