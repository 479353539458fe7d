"""Resuming, branching and handing off: what a run continues from, bit for bit."""

import itertools
import math
import random

import killing
import numpy as np
import pytest
import torch
from trainer import FP8, Training, losses, tensors, train

from infir2.checkpoint import TRACKER, TorchDist, complete_iterations, tracked
from infir2.events import read_scalars

STEPS, SAVE_INTERVAL, KILLS = 24, 4, 10


def learning_rate(step: int, warmup: int, end: int, decay: int, high: float = 3e-3, low: float = 3e-4) -> float:
    """The recipe's WSD schedule, from its definition: linear warmup, constant, cosine decay over the last steps."""
    if step <= warmup and warmup:
        return high * step / warmup
    if step <= end - decay:
        return high
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (step - (end - decay)) / decay))


def assert_schedule(run, wanted: dict[int, float]) -> None:
    found = read_scalars(run / "tensorboard")["learning-rate"]
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-6)


@pytest.fixture(scope="module")
def whole(run_flags, tmp_path_factory):
    """An uninterrupted FP8 run of 24 steps that keeps every 4th."""
    run = tmp_path_factory.mktemp("whole")
    train(flags_of(run_flags, run), run / "log")
    return run


def flags_of(run_flags, run, *more: str) -> list[str]:
    return run_flags(run, *FP8, "--train-iters", str(STEPS), "--save-interval", str(SAVE_INTERVAL), *more)


def assert_same_end(run, whole) -> None:
    """Losses as logged, weights, masters, Adam's moments: nothing differs."""
    mine, theirs = losses(run), losses(whole)
    assert set(mine) <= set(theirs)
    assert max(mine) == STEPS
    assert all(mine[step] == theirs[step] for step in mine)
    ours, expected = tensors(run / "checkpoints"), tensors(whole / "checkpoints")
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []


def test_killed_anywhere(run_flags, whole, tmp_path):
    """SIGKILL after a step, between a checkpoint's files, before a renaming, in the middle of a write; the same command
    goes on to the same bits.

    Pins: a resume that drops Adam's moments or the random state, a half-written checkpoint taken for a whole one, a
    tracker cut off by the kill, samples seen twice or left out.
    """
    generator, kinds = random.Random(20261121), itertools.cycle(("step", "file", "bytes", "file"))
    kills = in_save = lives = 0
    # A save comes every 4 steps, and changes 8 files and folders.
    largest = max(path.stat().st_size for path in (whole / "checkpoints").rglob("*.distcp"))
    moments = {
        "step": (1, 9),
        "file": (1, 20),
        "bytes": (largest // 10, largest - 1),
    }
    while kills < KILLS:
        run = tmp_path / f"life{lives}"
        run.mkdir()
        flags = flags_of(run_flags, run)
        for _ in range(6):  # at most; a launch that reached the end leaves nothing to kill
            kind = next(kinds)
            log = run / f"log{kills}"
            moment = f"{kind} {generator.randint(*moments[kind])}"
            status = Training(flags, log, environment={killing.VARIABLE: moment}).wait()
            if status == 0:
                break
            assert status < 0, log.read_text(errors="replace")[-3000:]
            kills += 1
            in_save += log.read_bytes().count(b"saving checkpoint") > log.read_bytes().count(b"successfully saved")
        train(flags, run / "log")
        assert_same_end(run, whole)
        lives += 1
    print(f"{kills} kills in {lives} runs, {in_save} of them while a checkpoint was being written")
    assert kills > in_save > 0


def test_schedule_and_branch(run_flags, whole, tmp_path):
    """The learning rate of every step is the formula: in a whole run, a resumed one, and a decay branch.

    The branch from step 12 warms up nothing, decays for its own 8 steps, sees the parent's samples, and is resumed by
    its own command. Pins: a schedule lost at a resume, a branch that holds the rate constant, a branch whose shorter
    --train-iters reshuffles the data.
    """
    assert_schedule(whole, {i: learning_rate(i, 4, STEPS, 6) for i in range(1, STEPS + 1)})
    run = tmp_path / "branch"
    run.mkdir()
    load = ["--load", str(whole / "checkpoints/iter_0000012"), "--override-opt_param-scheduler"]
    schedule = ["--train-iters", "20", "--lr-warmup-iters", "0", "--lr-wsd-decay-iters", "8"]
    command = [*flags_of(run_flags, run), *load, *schedule, "--data-index-iters", str(STEPS)]
    train([*command, "--exit-interval", "4"], run / "log")  # it stops at 16 and is launched again
    assert tracked(run / "checkpoints") == 16
    train(command, run / "log")
    assert_schedule(run, {i: learning_rate(i, 0, 20, 8) for i in range(13, 21)})
    # Step 13 has the parent's weights, rate and samples: its loss is the parent's, to the bit.
    assert losses(run)[13] == losses(whole)[13]


def test_tracker_is_repaired(run_flags, whole, tmp_path):
    """An empty tracker, as a kill between opening and writing leaves it, costs nothing. Pins: a start from scratch."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(whole / "checkpoints")
    (whole / "checkpoints" / TRACKER).write_text("")
    train(flags_of(run_flags, run), run / "log")
    assert tracked(whole / "checkpoints") == STEPS == complete_iterations(whole / "checkpoints")[-1]
    assert f"starting from {whole}/checkpoints/iter_00000{STEPS}" in (run / "log").read_text().replace(
        str(run), str(whole)
    )


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_masters_are_handed_on(run_flags, tmp_path, optimizer):
    """A stage that starts from a checkpoint has its parent's FP32 masters bit for bit, whatever the layout of either.

    The parent runs on two data-parallel ranks, the child at TP2; a step at learning rate 0 keeps the masters. Pins:
    masters rebuilt from BF16 weights, shards of the distributed optimizer put at the wrong place.
    """
    flags = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"] if optimizer == "distributed" else []
    parent, child = tmp_path / "parent", tmp_path / "child"
    for run in (parent, child):
        run.mkdir()
    train(run_flags(parent, "--bf16", "--train-iters", "20", *flags), parent / "log", ranks=2)
    frozen = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--train-iters", "8", "--exit-interval", "1"]
    start = ["--pretrained-checkpoint", str(parent / "checkpoints"), "--tensor-model-parallel-size", "2"]
    more = [*start, "--sequence-parallel", "--bf16", *frozen, "--save-interval", "1"]
    train(run_flags(child, *more), child / "log", ranks=2)
    before, after = TorchDist(parent / "checkpoints"), TorchDist(child / "checkpoints")
    weights = [key for key in before.keys if not key.startswith("optimizer")]
    assert len(weights) == 9
    rounded = 0
    for key in weights:
        master = before.read(before.master(key))
        assert torch.equal(master, after.read(after.master(key))), key
        rounded += torch.equal(master, master.bfloat16().float())
    assert rounded == 0, "masters that BF16 could hold would show nothing"


def test_masters_into_the_distributed_optimizer(run_flags, tmp_path):
    """The same, into shards: the child keeps its masters in the distributed optimizer's buckets on two ranks."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    for run in (parent, child):
        run.mkdir()
    train(run_flags(parent, "--bf16", "--train-iters", "20"), parent / "log")
    frozen = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--train-iters", "8", "--exit-interval", "1"]
    sharded = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--save-interval", "1"]
    start = ["--pretrained-checkpoint", str(parent / "checkpoints"), "--bf16"]
    train(run_flags(child, *start, *frozen, *sharded), child / "log", ranks=2)
    before, after = TorchDist(parent / "checkpoints"), TorchDist(child / "checkpoints")
    for key in (key for key in before.keys if not key.startswith("optimizer")):
        assert torch.equal(before.read(before.master(key)), after.read(after.master(key))), key
