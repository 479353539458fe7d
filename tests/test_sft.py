"""Fine-tuning through Megatron on the CPU: packing is invisible, layouts agree, kills are invisible."""

import json
import re
from argparse import Namespace

import killing
import numpy as np
import pytest
import torch
from tolerances import FP32_LAYOUTS, FP32_PACKING
from trainer import FP8, MODEL, Training, tensors, train

from infir2 import receipts
from infir2.events import read_scalars
from infir2.indexed import DataError, IndexedWriter
from infir2.sft import FineTuning

SAMPLES, BATCH, EPOCHS = 48, 8, 2
STEPS = SAMPLES * EPOCHS // BATCH
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
CP2 = ["--context-parallel-size", "2"]
PACKED = ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "256"]


def write_samples(folder, seed: int = 0) -> None:
    """Conversations that can be learned: start and step (the question), then the count (trained), 5 to 90 tokens."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    splits = {}
    for split, count in (("train", SAMPLES), ("valid", 11)):
        masks = []
        with IndexedWriter(folder / split, vocab_size=256) as writer:
            for _ in range(count):
                start, step, length = generator.integers(1, 16), generator.integers(1, 16), generator.integers(2, 88)
                writer.add_document([100 + start, 200 + step, 0, *(start + step * np.arange(length)) % 16])
                masks.append(np.r_[0, 0, 0, np.ones(length)].astype(np.uint8))
        (folder / f"{split}.mask").write_bytes(np.concatenate(masks).tobytes())
        splits[split] = {"documents": count, "tokens": int(sum(map(len, masks)))}
    facts = {"request": {"task": "sft"}, "tokenizer": {"path": "none", "sha256": "0"}, "vocab_size": 256}
    receipts.write_manifest(folder, {**facts, "splits": splits})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "data"
    write_samples(folder)
    return folder


@pytest.fixture(scope="module")
def base(run_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("base")
    train(run_flags(run, "--train-iters", "20", "--save-interval", "1", "--exit-interval", "1"), run / "log")
    return run / "checkpoints"


@pytest.fixture(scope="module")
def sft_flags(data, base):
    """A function from a run's folder to the command of a fine-tuning run there."""

    def flags(run, *more: str) -> list[str]:
        run.mkdir(exist_ok=True)
        return [
            *("sft", *MODEL, "--sft-data", str(data), "--num-epoch", str(EPOCHS), "--calculate-per-token-loss"),
            *("--global-batch-size", str(BATCH), "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"),
            *("--pretrained-checkpoint", str(base), "--load", str(run / "checkpoints")),
            *("--save", str(run / "checkpoints"), "--save-interval", "1000", "--tensorboard-dir", str(run / "tb")),
            *more,
        ]

    return flags


def first_step(flags: list[str], run, ranks: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first step, and its gradients: Adam's first moments are 0.1 times them, --clip-grad 0."""
    more = ["--exit-interval", "1", "--clip-grad", "0", "--lr-warmup-iters", "0", "--weight-decay", "0"]
    train([*flags, *more], run / "log", ranks)
    stored = tensors(run / "checkpoints")
    moments = {name: value for name, value in stored.items() if name.startswith("optimizer.state.exp_avg.")}
    assert len(moments) == 9
    return read_scalars(run / "tb")["lm loss"][1], moments


LAYOUTS = {
    "packed": (1, PACKED),
    "two to a micro-batch": (1, ["--micro-batch-size", "2"]),
    "packed dp2": (2, PACKED),
    "packed tp2": (2, [*PACKED, *TP2]),
    "packed cp2": (2, [*PACKED, *CP2]),
}


def test_packing_is_invisible(sft_flags, tmp_path):
    """Loss and every gradient of a step are those of one sample at a time, packed and at DP2, TP2 and CP2 too.

    Pins: attention or positions that cross from one conversation into the next, a mean over micro-batches instead of
    over tokens, padding that counts, a context-parallel rank with the wrong tokens.
    """
    one = ["--micro-batch-size", "1"]
    expected_loss, expected = first_step(sft_flags(tmp_path / "one", *one), tmp_path / "one", 1)
    for name, (ranks, flags) in LAYOUTS.items():
        loss, gradients = first_step(sft_flags(tmp_path / name, *flags), tmp_path / name, ranks)
        assert abs(loss - expected_loss) <= FP32_PACKING * expected_loss, f"{name}: {loss} {expected_loss}"
        for key, wanted in expected.items():
            difference = (gradients[key] - wanted).norm() / wanted.norm()
            assert difference <= FP32_LAYOUTS, f"{name}: {key} differs by {difference:.1e}"


def test_whole_runs_agree_and_learn(sft_flags, tmp_path):
    """Losses over two epochs agree between layouts, validation loss falls, and exact match is what argmax says.

    Pins: samples that come in another order at DP2, a validation that sees other samples each time.
    """
    runs = {}
    for name, (ranks, flags) in {"one": (1, PACKED), "dp2": (2, PACKED)}.items():
        run = tmp_path / name
        more = ["--eval-interval", "6", "--eval-exact-match", "8"]
        train([*sft_flags(run, *flags, *more)], run / "log", ranks)
        runs[name] = read_scalars(run / "tb")
        assert f"exact match at iteration {STEPS}" in (run / "log").read_text()
    one, two = (np.array(list(runs[name]["lm loss"].values())) for name in ("one", "dp2"))
    assert len(one) == STEPS
    np.testing.assert_allclose(one, two, rtol=1e-4)
    validation = list(runs["one"]["lm loss validation"].values())
    assert validation[-1] < validation[0]
    assert 0.3 < min(runs["one"]["packing/efficiency"].values()) <= 1


def test_fp8_runs_packed(sft_flags, tmp_path):
    """FP8 is on in fine-tuning, and packed batches keep its 128 rule whatever their lengths, with recomputation too."""
    run = tmp_path / "run"
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    train(sft_flags(run, *FP8, *PACKED, *recompute, "--exit-interval", "3"), run / "log")
    assert "8 of 8 linear layers in FP8" in (run / "log").read_text()
    assert len(read_scalars(run / "tb")["lm loss"]) == 3


def test_killed_in_the_middle_of_an_epoch(sft_flags, tmp_path):
    """SIGKILL after a step and within a save; the same command goes on with the next sample, to the same bits.

    Pins: an epoch that begins again after a resume, a shuffle that depends on when the run was started.
    """
    flags = [*FP8, *PACKED, "--save-interval", "2"]
    whole = tmp_path / "whole"
    train(sft_flags(whole, *flags), whole / "log")
    run = tmp_path / "run"
    command = sft_flags(run, *flags)
    for moment in ("step 3", "file 12", "step 1"):
        assert Training(command, run / "log", environment={killing.VARIABLE: moment}).wait() < 0
    train(command, run / "log")
    mine, theirs = (read_scalars(path / "tb")["lm loss"] for path in (run, whole))
    assert all(mine[step] == theirs[step] for step in mine)
    ours, expected = tensors(run / "checkpoints"), tensors(whole / "checkpoints")
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
    parent = json.loads((run / "checkpoints/run.json").read_text())["parent"]
    assert parent["folder"].endswith("iter_0000001")


def test_refusals(sft_flags, data, tmp_path):
    """Each input that would train on the wrong thing ends before training, in a line that says what was found."""
    faults = {
        "budget": ([*PACKED[:2], "64"], "samples of .* are longer than --max-tokens-per-gpu x CP allows"),
        "positions": (["--seq-length", "64"], "samples of .* are longer than --seq-length allows"),
        "pipeline": (["--pipeline-model-parallel-size", "2"], "pipeline parallelism 1"),
        "no data": (["--sft-data", str(tmp_path / "none")], "none/manifest.json does not exist"),
        "no step": (["--global-batch-size", "1000"], "make no step"),
        "rope": (["--rotary-base", "10000"], "was trained with rotary_base 1000000, this run has 10000"),
        "vocabulary": (["--padded-vocab-size", "128", "--vocab-size", "128"], "has ids up to 256"),
    }
    for name, (flags, message) in faults.items():
        run = tmp_path / name
        assert Training(sft_flags(run, *flags), run / "log").wait() == 2, name
        assert re.search(message, (run / "log").read_text()), (name, (run / "log").read_text()[-1000:])


def test_another_tokenizer_is_refused(data, tmp_path):
    """Pins tokens of one vocabulary trained into a model of another."""
    (tmp_path / "tokenizer.json").write_text("{}")
    args = Namespace(sft_data=data, tokenizer_model=str(tmp_path), seq_length=128, eval_iters=1)
    args.use_dynamic_batch_size = False
    with pytest.raises(DataError, match="was prepared with none"):
        FineTuning().data(args)


@pytest.mark.parametrize(
    ("ranks", "exact_match", "message"),
    [(16, 0, "has 11 samples, fewer than the 16 data-parallel ranks"), (8, 4, "--eval-exact-match has 4 samples")],
)
def test_evaluation_smaller_than_the_ranks(data, ranks, exact_match, message):
    """Before training. Pins: a run that failed at its first evaluation, hours in."""
    args = Namespace(sft_data=data, tokenizer_model=None, seq_length=128, eval_iters=1, use_dynamic_batch_size=False)
    args.tensor_model_parallel_size, args.context_parallel_size, args.world_size = 2, 1, 2 * ranks
    args.padded_vocab_size, args.eval_exact_match = 256, exact_match
    with pytest.raises(ValueError, match=message):
        FineTuning().data(args)
    args.world_size, args.eval_exact_match = 2 * 11, 11
    assert FineTuning().data(args)["sft_data"] == str(data)
