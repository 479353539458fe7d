"""Reinforcement learning from end to end on a CPU: `python -m infir2.rl`, killed and resumed. Each docstring says what
it pins."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import rl_model
import test_ray_launch
import torch
from trainer import tensors, with_megatron

from infir2.qwen2 import Shape, megatron_flags
from infir2.rl import controller, grpo
from infir2.rl.log import keep_up_to
from infir2.rl.rollout import Sample

cluster = test_ray_launch.cluster  # a fixture

REPO = Path(__file__).parents[1]
STEPS, SAVE_INTERVAL = 8, 2
PROMPTS, SAMPLES, RESPONSE = 6, 8, 16
REWARD = """
def share_of_e(sample):
    assert sample.label == "e"
    return sample.response.count("e") / max(len(sample.response), 1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for the trainer and for the engine, prompts, and a reward that can be learned: one letter's share."""
    folder = tmp_path_factory.mktemp("rl")
    rl_model.bf16_folder(folder / "hf")
    rl_model.fp8_folder(folder / "hf", folder / "fp8")
    with_megatron("convert_hf_to_torch_dist", "convert", folder / "hf", folder / "base")
    (folder / "reward.py").write_text(REWARD)
    rl_model.bf16_folder(folder / "other", layers=1)
    rl_model.fp8_folder(folder / "hf", folder / "fp32", "fp32")
    for name, count in (("train", 20), ("valid", 5)):
        lines = [json.dumps({"prompt": f"{name} {i}", "label": "e"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def flags(folder: Path, run: Path, *more: str) -> list[str]:
    return [
        *megatron_flags(Shape.from_folder(folder / "hf")),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")),
        *("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--hf-checkpoint", str(folder / "fp8")),
        *("--prompt-data", str(folder / "train.jsonl"), "--eval-prompt-data", "valid", str(folder / "valid.jsonl")),
        *("--custom-rm-path", "reward.share_of_e", "--rm-workers", "1", "--rollout-shuffle", "--seed", "1236"),
        *("--num-rollout", str(STEPS), "--rollout-batch-size", str(PROMPTS), "--over-sampling-batch-size", "9"),
        *("--n-samples-per-prompt", str(SAMPLES), "--rollout-max-prompt-len", "40", "--dynamic-sampling"),
        *("--rollout-max-response-len", str(RESPONSE), "--eps-clip", "0.2", "--eps-clip-high", "0.28"),
        *("--use-tis", "--seq-length", "64", "--max-position-embeddings", "64", "--max-tokens-per-gpu", "1024"),
        *("--global-batch-size", str(PROMPTS * SAMPLES // 2), "--calculate-per-token-loss"),
        *("--lr", "5e-3", "--lr-decay-style", "constant", "--weight-decay", "0", "--clip-grad", "1.0"),
        *("--pretrained-checkpoint", str(folder / "base"), "--load", str(run / "checkpoints")),
        *("--save", str(run / "checkpoints"), "--save-interval", str(SAVE_INTERVAL), "--eval-interval", "4"),
        *("--tensorboard-dir", str(run / "tensorboard"), "--log-interval", "1"),
        *more,
    ]


class Launch:
    """The command, started on the Ray of `environment`; its output is in RUN/output."""

    def __init__(self, folder: Path, run: Path, environment: dict[str, str], *more: str) -> None:
        run.mkdir(exist_ok=True)
        self.run, self.output = run, run / "output"
        own = {"OMP_NUM_THREADS": "1", "INFIR2_BACKEND": "cpu", "PYTHONPATH": f"{REPO / 'training'}:{folder}"}
        command = [sys.executable, "-m", "infir2.rl", "--cpu", "--metrics-file", str(run / "metrics.jsonl")]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *flags(folder, run, *more)],
                env={**environment, **own},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, status: int) -> str:
        """The output of a run that ends with this status."""
        found = self.process.wait(timeout=900)
        text = self.output.read_text(errors="replace")
        assert found == status, text[-4000:]
        return text

    def wait_for_steps(self, count: int) -> None:
        """Until this launch has done so many steps."""
        deadline = time.monotonic() + 900
        while len(re.findall(r"] step \d+ of", self.output.read_text(errors="replace"))) < count:
            assert self.process.poll() is None, self.output.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def processes(self) -> dict[str, psutil.Process]:
        """Actors by class, and everything that the controller started."""
        actors = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                title = re.match(r"ray::(Trainer|TransformersProcess)\b", " ".join(process.cmdline()))
                if title and any(str(self.run) in file.path for file in process.open_files()):
                    actors[title[1]] = process
        started = psutil.Process(self.process.pid).children(recursive=True)
        return actors | {str(process.pid): process for process in started}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def exact(path: Path) -> list[dict]:
    """Metrics without times."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("seconds/", "speed/"))}
        for line in lines_of(path)
    ]


@pytest.fixture(scope="module")
def whole(folder, cluster):
    """A run that nothing interrupts, whose engine's weights are compared with the trainer's after each step."""
    launch = Launch(folder, folder / "whole", cluster, "--check-weights")
    launch.end(0)
    return launch.run


def test_learns(whole):
    """The reward rises, engine and trainer agree, and each step and evaluation is logged once.

    Pins: a gap measured on tokens that an earlier policy sampled, held against the engine."""
    steps = [line for line in lines_of(whole / "metrics.jsonl") if "rollout/score" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    scores = [line["rollout/score"] for line in steps]
    assert np.mean(scores[-2:]) > 2 * np.mean(scores[:2]), scores
    evaluations = [line for line in lines_of(whole / "metrics.jsonl") if "eval/valid/mean" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert evaluations[-1]["eval/valid/mean"] > evaluations[0]["eval/valid/mean"]
    assert all("seconds/checking_weights" in line for line in steps)
    fresh = [line for line in steps if line["count/left_over"] < PROMPTS]  # not all of an earlier policy
    assert all(0 < line["gap/gen_kl_error"] < 0.003 for line in fresh)
    assert all("lag/gen_kl_error" in line for line in steps if line not in fresh)
    assert 3 <= len(fresh) < STEPS
    assert "above --max-gen-kl" not in (whole / "output").read_text()
    assert all(line["train/clipped"] < 0.5 for line in steps)


def test_killed_anywhere(folder, whole, cluster):
    """SIGKILL of the engine, of the trainer and of the controller, each after some steps, the first after a save:
    nothing of the run stays, a run that loses a process says which, and the same command goes on to the same metrics
    and the same bits. Once with a Ray of the run's own, as the scripts start it on one machine, which ends too.

    Pins: prompts seen twice or left out after a resume, random numbers that begin anew, ratios or Adam's moments lost,
    a controller that waits for a process that is gone; processes, a Ray, a model in memory that outlive their run.
    """
    run, own = folder / "killed", {**cluster, "RAY_ADDRESS": "local"}
    agents = []
    for victim, who, ray, steps in (
        ("TransformersProcess", "the engine", cluster, SAVE_INTERVAL + 1),
        ("Trainer", r"trainer 0 on .*", cluster, 1),
        (None, "", cluster, 1),
        (None, "", own, 2),
    ):
        launch = Launch(folder, run, ray)
        launch.wait_for_steps(steps)
        processes = launch.processes()
        assert {"Trainer", "TransformersProcess"} <= processes.keys()
        assert any("raylet" in process.name() for process in processes.values()) == (ray is own)
        os.kill(processes[victim].pid if victim else launch.process.pid, signal.SIGKILL)
        output = launch.end(1 if victim else -signal.SIGKILL)
        agents = [one for one in processes.values() if one.is_running() and one.name().endswith("Agent")]
        _, alive = psutil.wait_procs([one for one in processes.values() if one not in agents], timeout=300)
        assert not alive
        if victim:
            assert re.search(f"error: {who} is gone", output), output[-2000:]
            assert f"the last of {run}/logs/{'trainer' if victim == 'Trainer' else 'engine'}-0.log" in output
            assert "The same command resumes" in output
    assert "resuming after step" in Launch(folder, run, cluster).end(0)
    assert exact(run / "metrics.jsonl") == exact(whole / "metrics.jsonl")
    assert (run / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    ours, expected = tensors(run / "checkpoints"), tensors(whole / "checkpoints")
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
    _, alive = psutil.wait_procs(agents, timeout=900)  # Ray's own two hold nothing of ours, and notice it in a minute
    assert not alive


class Dump:
    def dump_gap(self, path, samples, kl, old, boundaries, decode):
        self.lengths = {sample.id: int(n) for sample, n in zip(samples, boundaries[1:] - boundaries[:-1], strict=True)}


def part_of_a_run(**more) -> SimpleNamespace:
    """As much of a Run as its check of the gap needs."""
    objective = grpo.Objective(0.2, 0.28, use_tis=True, tis_clip_low=0, tis_clip=2)
    settings = SimpleNamespace(max_gen_kl_steps=2)
    known = {"objective": objective, "args": settings, "folder": Path(), "log": Dump(), "decode": None}
    return SimpleNamespace(**known, above_gate=0, gate=0.003, **more)


def test_only_new_tokens_are_held_against_the_gate():
    """Of samples that step 6 went on with only its own tokens count; where it sampled none, all do, and the gate is
    not asked. Pins: an update's effect taken for the engine's fault, and a step of continued samples without a gap."""
    versions = [[[5, 3], [6, 2]], [[6, 4]], [[4, 2], [5, 1]]]
    samples = [Sample(i, tokens=[0] * sum(n for _, n in of), versions=of) for i, of in enumerate(versions)]
    old = np.repeat([-1.0, -1.5, -1.25, -1.0], [3, 2, 4, 3]).astype(np.float32)
    d = np.array([9.0] * 3 + [0.5] * 6 + [9.0] * 3, dtype=np.float32)
    batch = SimpleNamespace(boundaries=np.array([0, 5, 9, 12]), rollout=old - d)
    run = part_of_a_run()
    found, of_engine = controller.Run.check_gap(run, 6, samples, batch, old)
    assert of_engine
    assert found.mean_abs == 0.5
    assert run.above_gate == 1
    assert run.log.lengths == {0: 2, 1: 4}
    found, of_engine = controller.Run.check_gap(run, 7, samples, batch, old)
    assert not of_engine
    assert found.mean_abs == (6 * 9 + 6 * 0.5) / 12
    assert run.above_gate == 1


def test_noise_does_not_pass_the_gate():
    """Pins a run that one sample of a hundred ends, where the others agree: its gap is one that chance makes."""
    samples = [Sample(i, tokens=[0] * 10, versions=[[0, 10]]) for i in range(100)]
    old = np.full(1000, -1.0, dtype=np.float32)
    d = np.zeros(1000, dtype=np.float32)
    batch = SimpleNamespace(boundaries=np.arange(0, 1001, 10), rollout=old - d)
    batch.rollout[:10] -= 0.9  # k3 of 0.56 in a hundredth of the tokens: 0.0056, twice the gate
    run = part_of_a_run()
    found, _ = controller.Run.check_gap(run, 0, samples, batch, old)
    assert found.gen_kl_error > run.gate
    assert run.above_gate == 0
    batch.rollout[:] = old - 0.1  # of all of them: 0.0052
    controller.Run.check_gap(run, 0, samples, batch, old)
    assert run.above_gate == 1
    with pytest.raises(controller.GapError, match=r"gen_kl_error 0\.00517"):
        controller.Run.check_gap(run, 1, [replace(s, versions=[[1, 10]]) for s in samples], batch, old)


def test_gate(folder, cluster):
    """A gap above the gate in two steps ends the run with status 1 and the worst samples, token by token."""
    run = folder / "gate"
    output = Launch(folder, run, cluster, "--max-gen-kl", "1e-12", "--max-gen-kl-steps", "2").end(1)
    assert "step 2: gen_kl_error" in output
    assert [line["step"] for line in lines_of(run / "metrics.jsonl") if "gap/gen_kl_error" in line] == [1]
    worst = lines_of(run / "gap_step_0000002.jsonl")
    assert len(worst) == 8
    for sample in worst:
        d = np.subtract(sample["train_logprobs"], sample["rollout_logprobs"])
        assert len(d) == len(sample["tokens"])
        assert np.mean(np.exp(d) - 1 - d) == pytest.approx(sample["gen_kl_error"], rel=0.01, abs=1e-6)
    kl = [sample["gen_kl_error"] for sample in worst]
    assert kl == sorted(kl, reverse=True)


# Refusals


def test_missing_flags():
    """Before Ray is started."""
    done = subprocess.run(
        [sys.executable, "-m", "infir2.rl", "--cpu", "--hf-checkpoint", "x", "--num-rollout", "1"],
        env={**os.environ, "PYTHONPATH": str(REPO / "training")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: missing: --prompt-data, --rollout-batch-size" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt-data", "{folder}/unlabelled.jsonl"], r"unlabelled.jsonl, line 2: BadMessages: no label"),
        (["--eval-prompt-data", "valid", "{folder}/absent.jsonl"], r"absent.jsonl does not exist; give a .jsonl file"),
        (["--rollout-max-prompt-len", "2"], r"20 prompts of .*train.jsonl are longer than 2 tokens"),
        (["--custom-rm-path", "reward.absent"], r"reward.absent"),
    ],
)
def test_refused_before_anything_is_started(folder, tmp_path, monkeypatch, caplog, more, message):
    """Pins: minutes until SGLang and Megatron are up, for a line without a label. (A Ray would be started here.)"""
    (folder / "unlabelled.jsonl").write_text('{"prompt": "a", "label": "e"}\n{"prompt": "b"}\n')
    words = flags(folder, tmp_path, *(word.format(folder=folder) for word in more))
    monkeypatch.setattr(sys, "argv", ["rl", "--cpu", "--metrics-file", str(tmp_path / "metrics.jsonl"), *words])
    monkeypatch.setattr(controller.ray_launch, "session", None)
    monkeypatch.setattr(controller.signal, "signal", lambda *_: None)
    monkeypatch.syspath_prepend(folder)
    assert controller.main() == 2
    assert re.search(f"error: .*{message}", caplog.text), caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hf-checkpoint", "{folder}/other"], r"other is Shape\(layers=1.*; the model that is trained is"),
        (["--hf-checkpoint", "{folder}/fp32"], r"fp32 has fp32 scales, this run has pow2"),
        (["--prompt-data", "{folder}/absent.jsonl"], r"No such file.*absent.jsonl"),
        (["--rollout-max-response-len", "32"], r"a prompt of 40 and a response of 32 tokens do not fit into 64"),
        (["--global-batch-size", "36"], r"a step has 6 x 8 = 48 samples, no multiple of --global-batch-size 36"),
        (["--pipeline-model-parallel-size", "2"], "pipeline parallelism 1"),
        (["--fused-linear-cross-entropy"], "leave --fused-linear-cross-entropy out"),
        (["--n-samples-per-prompt", "1"], "must be at least 2"),
        (["--rollout-temperature", "0"], "must be above 0"),
        (["--over-sampling-batch-size", "3"], "3 is below --rollout-batch-size 6"),
        (["--rollout-temperature", "1.1"], r"belongs to another run \(rollout_temperature was 1.0, is 1.1\)"),
    ],
)
def test_refused_by_the_trainer(folder, more, message):
    """What cannot train, or would train on something else, is refused before the model is built. The controller makes
    it status 2 (`test_resumed_otherwise`)."""
    run, more = folder / "refused", [word.format(folder=folder) for word in more]
    if not run.exists():
        assert with_megatron("rl_probe", "refusal", flags(folder, run)) == ""
    found = with_megatron("rl_probe", "refusal", flags(folder, run, *more))
    assert re.search(message, found), found


def test_resumed_longer_or_from_another_path(folder, tmp_path):
    """The same prompts elsewhere, and more steps, are the same run; variables of the chat template are not.

    Pins: both refused as another run; a model whose prompts need --apply-chat-template-kwargs, which nobody took."""
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    other = ["--save", str(tmp_path / "other"), "--load", str(tmp_path / "other")]
    prompts.write_bytes((folder / "train.jsonl").read_bytes())
    cases = [
        ([], ""),
        (["--prompt-data", str(prompts)], ""),
        (["--num-rollout", "12"], ""),
        (["--num-rollout", "10"], r"belongs to another run \(train_iters was 12, is 10"),
        (["--apply-chat-template-kwargs", '{"enable_thinking": false}'], "belongs to another run .*enable_thinking"),
        (["--apply-chat-template-kwargs", '{"enable_thinking": false}', *other], ""),
    ]
    for more, message in cases:
        found = with_megatron("rl_probe", "refusal", flags(folder, run, "--num-rollout", "8", *more))
        assert re.search(message, found) if message else not found, (more, found)


def test_chat_template_kwargs_reach_the_prompts(folder, tmp_path, monkeypatch):
    """Pins: prompts rendered otherwise than they were prepared."""
    shutil.copytree(folder / "hf", tmp_path / "hf")
    path = tmp_path / "hf/tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{{ mark }}" + config["chat_template"]
    path.write_text(json.dumps(config))
    monkeypatch.setattr(controller.rewards, "pool_from", lambda args: None)
    words = [*flags(folder, tmp_path), "--tokenizer-model", str(tmp_path / "hf")]
    lengths = []
    for mark in ("", "MARK"):
        args, _ = controller.parse([*words, "--apply-chat-template-kwargs", json.dumps({"mark": mark})])
        lengths.append(len(controller.Inputs(args).prompts.tokens[0]))
    assert lengths[0] < lengths[1]


def test_resumed_otherwise(folder, whole, cluster):
    """What the trainer refuses has status 2 and is said in a line. Pins: a run that goes on with another objective."""
    output = Launch(folder, whole, cluster, "--tis-clip", "3").end(2)
    assert re.search(r"error: .* belongs to another run \(tis_clip was 2.0, is 3.0\)", output), output[-2000:]


# The log


def test_lines_of_later_steps_are_cut_off(tmp_path):
    """A resume keeps the lines up to its step, whatever characters they hold, and drops one that was not finished.

    Pins: lines cut at U+2028 or U+0085, which JSON leaves as they are in a model's text.
    """
    path = tmp_path / "rollouts.jsonl"
    lines = [json.dumps({"step": i, "text": f"a\u2028b\x85c{i}"}, ensure_ascii=False) + "\n" for i in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"step": 2, "te')
    keep_up_to(path, 2)
    assert path.read_text() == "".join(lines[:3])
    path.write_text("".join(lines[:2]) + '{"step": 2, "te')
    keep_up_to(path, 5)
    assert path.read_text() == "".join(lines[:2])
    keep_up_to(tmp_path / "absent", 1)
