"""What a run refuses before it trains: each fault by name, with what was found, and status 2."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from trainer import FP8, MODEL, Training, tensors, train, with_megatron

from infir2.checkpoint import CheckpointError, resolve
from infir2.preflight import Start, _check_continued_rate

REPO = Path(__file__).parents[1]
SMALL_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 256,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def refusals(commands: list[list[str]]) -> list[str]:
    """What `preflight.check` says to each command line; "" where it lets it pass. Needs Megatron loaded."""
    from megatron.training.arguments import parse_args

    from infir2 import engine, preflight, pretrain
    from infir2.indexed import DataError

    said = []
    for argv in commands:
        sys.argv = ["pretrain", *argv]
        try:
            stage = pretrain.Pretraining()
            preflight.check(parse_args(partial(engine.add_arguments, stage)), stage, "cpu", "pow2")
            said.append("")
        except (ValueError, OSError, DataError) as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def parent(run_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("parent")
    train(run_flags(run, "--bf16", "--train-iters", "20", "--save-interval", "10"), run / "log")
    return run / "checkpoints"


@pytest.fixture
def flags(corpus, tmp_path):
    """A command line that passes; later flags win."""

    def build(*more: str) -> list[str]:
        data = ["--data-path", str(corpus), "--split", "100,0,0"]
        return [*MODEL, *data, "--save", str(tmp_path / "run"), "--train-iters", "20", "--from-scratch", *more]

    return build


def damaged(parent: Path, tmp_path: Path, name: str, damage) -> str:
    folder = tmp_path / name
    shutil.copytree(parent, folder)
    damage(folder, resolve(folder))
    return str(folder)


def test_checkpoints(parent, flags, tmp_path):
    """Missing, half-written and foreign checkpoints. Pins: Megatron ends with status 0, or trains from scratch; a
    --load that is not there passed over for --pretrained-checkpoint; a damaged run.json that is not named."""
    half = damaged(parent, tmp_path, "half", lambda run, last: (last / "metadata.json").unlink())
    cut = damaged(parent, tmp_path, "cut", lambda run, last: next(last.glob("*.distcp")).write_bytes(b"x"))
    listed = damaged(parent, tmp_path, "listed", lambda run, last: (run / "run.json").write_text("[]"))
    torn = damaged(parent, tmp_path, "torn", lambda run, last: (run / "run.json").write_text('{"seed":'))
    empty = damaged(parent, tmp_path, "empty", lambda run, last: (run / "latest_checkpointed_iteration.txt").unlink())
    cases = [
        (["--pretrained-checkpoint", str(parent)], ""),
        (["--pretrained-checkpoint", str(parent / "iter_0000010")], ""),
        (["--pretrained-checkpoint", str(tmp_path / "absent")], "does not exist"),
        (["--pretrained-checkpoint", empty], "holds no checkpoint"),
        (["--load", str(tmp_path / "absent")], "holds no checkpoint"),
        (["--load", str(tmp_path / "absent"), "--pretrained-checkpoint", str(parent)], "absent holds no checkpoint"),
        (["--load", str(tmp_path / "run"), "--pretrained-checkpoint", str(parent)], ""),
        (["--pretrained-checkpoint", torn], "torn/run.json cannot be read as JSON"),
        (["--save", torn, "--load", torn], "torn/run.json cannot be read as JSON"),
        (["--pretrained-checkpoint", listed], "listed/run.json holds a list, not an object"),
        (["--load", str(parent / "iter_0000011")], "does not exist"),
        (["--pretrained-checkpoint", half], "half-written"),
        (["--pretrained-checkpoint", cut], "1 bytes long, at least"),
        (["--pretrained-checkpoint", str(parent), "--ffn-hidden-size", "384"], "is of another shape"),
        (["--pretrained-checkpoint", str(parent), "--num-layers", "3"], "is of another shape"),
        (["--pretrained-checkpoint", str(parent), "--untie-embeddings-and-output-weights"], "a tied output layer"),
        (["--load", str(parent), "--use-distributed-optimizer"], "the state of the plain optimizer"),
        (["--save", str(parent), "--load", str(parent), "--seed", "1"], "belongs to another run (seed was 1236, is 1"),
        (
            ["--save", str(parent), "--load", str(parent), "--ckpt-step", "10", "--bf16"],
            "which also holds iteration 20",
        ),
    ]
    check(flags, cases)


def set_trained_format(run: Path, scale_fmt: str | None) -> None:
    set_fact(run, scale_fmt=scale_fmt)


def set_fact(run: Path, **facts) -> None:
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | facts))


def test_scale_formats_do_not_mix(parent, flags, tmp_path):
    """An FP8 run does not start from weights that were trained in FP8 with another scale format than its own, pow2.

    Pins: a second rounding of every weight at a hand-off. BF16 weights, and a BF16 run, have no such format.
    """
    mixed = damaged(parent, tmp_path, "mixed", lambda run, last: set_trained_format(run, "fp32"))
    same = damaged(parent, tmp_path, "same", lambda run, last: set_trained_format(run, "pow2"))
    refused = "was trained in FP8 with fp32 scales, pow2 ones are asked for"
    cases = [
        ([*FP8, "--pretrained-checkpoint", mixed], refused),
        ([*FP8, "--load", mixed], "relative weight error"),
        ([*FP8, "--pretrained-checkpoint", same], ""),
        ([*FP8, "--pretrained-checkpoint", str(parent), "--save", str(tmp_path / "other")], ""),
        (["--bf16", "--pretrained-checkpoint", mixed, "--save", str(tmp_path / "third")], ""),
    ]
    check(flags, cases)


def test_shapes(flags):
    """Sizes that FP8 or the layout cannot take. Pins: tiles that cross a shard, and Megatron's alignment of 16."""
    qwen = subprocess.run(
        [sys.executable, "-m", "infir2.qwen2", str(REPO / "tests/golden/configs/Qwen2.5-1.5B")],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    cases = [
        (FP8, ""),
        ([*FP8, "--micro-batch-size", "1", "--seq-length", "64"], "is 64; change --micro-batch-size"),
        ([*FP8, "--hidden-size", "192"], "the hidden size is 192"),
        ([*FP8, "--kv-channels", "64"], "the head size is 64"),
        (["--seq-length", "256"], "--seq-length 256 is above --max-position-embeddings 128"),
        (["--tensor-model-parallel-size", "4"], "tensor parallelism 4 does not divide the 2 attention heads"),
        ([*qwen, "--tensor-model-parallel-size", "4"], "does not divide the 2 KV groups"),
        ([*qwen, *FP8, "--tensor-model-parallel-size", "4"], "rows of k and v on each tensor-parallel rank is 64"),
        (["--pipeline-model-parallel-size", "3"], "pipeline parallelism 3 does not divide the 2 layers"),
        (["--tensor-model-parallel-size", "2"], "1 processes are not a multiple of TP 2"),
    ]
    check(flags, cases)


def test_data_and_tokenizer(flags, corpus, tmp_path):
    """Corpora and tokenizers that are missing, empty, cut or do not belong. Pins: ids beyond the embedding's rows."""
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty.idx").touch()
    shutil.copy(f"{corpus}.idx", tmp_path / "cut.idx")
    (tmp_path / "cut.bin").write_bytes(Path(f"{corpus}.bin").read_bytes()[:-2])
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "config.json").write_text(json.dumps(SMALL_CONFIG))
    vocabulary = {"model": {"vocab": {"a": 0, "b": 255}}, "added_tokens": []}
    (tokenizer / "tokenizer.json").write_text(json.dumps(vocabulary))
    big = tmp_path / "big"
    shutil.copytree(tokenizer, big)
    (big / "tokenizer.json").write_text(json.dumps(vocabulary | {"added_tokens": [{"id": 256}]}))
    hf = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    cases = [
        (["--data-path", str(tmp_path / "absent")], "absent.bin does not exist"),
        (["--data-path", str(tmp_path / "empty")], "is not an index of Megatron's format"),
        (["--data-path", str(tmp_path / "cut")], "do not belong together, or one is cut"),
        ([*hf, str(tmp_path / "absent")], "absent does not exist"),
        ([*hf, str(tokenizer)], ""),
        ([*hf, str(big)], "has ids up to 256, the model's vocabulary only 256 rows"),
        ([*hf, str(tokenizer), "--rotary-base", "10000"], "rotary_base is 10000, config.json says 1000000"),
        ([*hf, str(tokenizer), "--seq-length", "512", "--max-position-embeddings", "512"], "the model's 256 positions"),
    ]
    check(flags, cases)


def check(flags, cases: list[tuple[list[str], str]]) -> None:
    for (more, wanted), found in zip(
        cases, with_megatron("test_preflight", "refusals", [flags(*more) for more, _ in cases]), strict=True
    ):
        assert wanted in found if wanted else not found, f"{more}: {found!r}"


def test_nothing_to_start_from(flags):
    """Pins: "continual" pre-training that began from random weights, because no base was ever loaded."""
    words = flags()
    words.remove("--from-scratch")
    assert "nothing to start from" in with_megatron("test_preflight", "refusals", [words])[0]


def test_missing_flags(flags):
    """Pins: `infir2.pretrain` without flags, or with --load alone, ended in a TypeError; so did a run without
    --kv-channels, in the check of the disk."""
    words = flags()
    at = words.index("--kv-channels")
    commands = [[], ["--load", "x"], words[:at] + words[at + 2 :], flags("--lr-warmup-iters", "20")]
    commands += [flags("--min-lr", "1"), flags("--min-lr", "-1"), flags("--lr-decay-style", "WSD")]
    commands[-1].remove("--lr-wsd-decay-iters")
    commands[-1].remove("6")
    found = with_megatron("test_preflight", "refusals", commands)
    assert all("missing: --num-layers, --hidden-size" in said for said in found[:2]), found
    assert found[2] == ""
    assert "the warmup takes 20 of 20 steps" in found[3]
    assert "--min-lr 1 is not between 0 and --lr 0.003" in found[4]
    assert "--min-lr -1 is not between 0 and --lr 0.003" in found[5]
    assert "WSD needs --lr-wsd-decay-iters" in found[6]


def test_numbers_and_folders(flags, tmp_path):
    """Pins: tracebacks minutes after the start, when Megatron divides by an interval, seeds, or writes its index; the
    vocabulary of a damaged tokenizer that is not named."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"model": []}')
    (tmp_path / "file").touch()
    cases = [
        (["--eval-interval", "0"], "--eval-interval 0; expected 1 or more"),
        (["--log-interval", "0"], "--log-interval 0; expected 1 or more"),
        (["--eval-iters", "-1"], "--eval-iters -1; expected 0 or more"),
        (["--seed", "0"], "--seed 0; expected 1 or more"),
        (["--train-iters", "0", "--lr-warmup-iters", "0"], "--train-iters 0; expected 1 or more"),
        (["--data-cache-path", str(tmp_path / "file/cache")], f"'{tmp_path / 'file/cache'}'"),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tokenizer")],
            "tokenizer/tokenizer.json is no tokenizer with a vocabulary",
        ),
    ]
    check(flags, cases)


def test_branches(parent, flags, tmp_path):
    """A branch goes on where the parent's learning rate is, with the parent's Adam and order of samples.

    The parent has 20 steps: warmup to 4, stable to 14, decay to 20. Pins: a decay branch of an iteration of the warmup
    or of the parent's own decay, whose learning rate jumps; one with another --min-lr, which Megatron refuses by a
    traceback when the model is built; one whose samples are not the parent's, or run out.
    """
    decay = ["--lr-warmup-iters", "0", "--lr-wsd-decay-iters", "4"]

    def branch(iteration: int, end: int, *more: str) -> list[str]:
        load = ["--load", str(parent), "--ckpt-step", str(iteration), "--save", str(tmp_path / f"branch{iteration}")]
        return [*load, *decay, "--train-iters", str(end), *more]

    shutil.copytree(parent / "iter_0000010", parent / "iter_0000002")  # which weights it holds does not matter here
    jump = "the learning rate would jump: at iteration"
    phases = "(warmup to 4, 0.003 to 14, WSD decay to 0.0003 at 20)"
    cases = [
        (branch(10, 14), ""),
        (branch(20, 24), f"{jump} 20 {parent} has 0.0003 {phases}"),
        (branch(2, 8), f"{jump} 2 {parent} has 0.0015 {phases}, this run 0.003 (0.003 to 4, WSD decay"),
        (branch(10, 12, "--lr-wsd-decay-iters", "8"), f"{jump} 10"),
        (branch(10, 14, "--min-lr", "0"), "other learning rates (min_lr was 0.0003, is 0.0); keep them, or"),
        (branch(10, 14, "--lr", "1e-3"), "other learning rates (lr was 0.003, is 0.001)"),
        (branch(10, 14, "--data-index-iters", "40"), "made for 20 iterations in"),
        (branch(10, 800), "ends after 282 samples, --train-iters 800 needs 3200: take 70 iterations"),
    ]
    check(flags, cases)
    shutil.rmtree(parent / "iter_0000002")


SHIPPED = {  # the recipe's: warmup to 5000, stable to 35000, decay to 40000
    "lr": 1e-4, "min_lr": 1e-5, "lr_decay_style": "WSD", "lr_wsd_decay_style": "cosine", "lr_wsd_decay_iters": 5000,
    "lr_warmup_iters": 5000, "train_iters": 40000, "decoupled_lr": None, "decoupled_min_lr": None,
}  # fmt: skip


@pytest.mark.parametrize("iteration", [1, 3000, 4999, 5000, 5001, 20000, 34999, 35000, 35001, 35010, 36000, 40000])
def test_decay_branches_of_the_recipe(tmp_path, iteration):
    """Only iterations of the stable phase, to the last one. Pins: a branch of the parent's own warmup or decay."""
    start = Start(tmp_path / f"iter_{iteration:07d}", resumes=True)
    branch = SHIPPED | {"lr_warmup_iters": 0, "train_iters": iteration + 5000}
    if 5000 <= iteration <= 35000:
        _check_continued_rate(start, SHIPPED, branch, 1)
        return
    with pytest.raises(
        CheckpointError, match=r"would jump: at iteration .* \(warmup to 5000, 0.0001 to 35000, WSD decay"
    ):
        _check_continued_rate(start, SHIPPED, branch, 1)


def test_order_of_samples_ends_where_preflight_says(run_flags, tmp_path):
    """All of the samples that an index holds can be trained on: what is refused is one step more."""
    flags = run_flags(tmp_path, "--data-index-iters", "3", "--train-iters", "70")
    train(flags, tmp_path / "log")
    assert Training([*flags, "--train-iters", "71"], tmp_path / "log").wait() == 2


def test_length_and_place_may_change(parent, flags, corpus, tmp_path):
    """The same run, longer, or with its data at another path: what else differs is refused.

    Pins: a run that could not be made longer; one refused because its corpus was named by another path; Adam's epsilon
    that changed unnoticed."""
    constant = damaged(parent, tmp_path, "constant", lambda run, last: set_fact(run, lr_decay_style="constant"))
    own = ["--save", constant, "--load", constant, "--bf16", "--lr-decay-style", "constant"]
    path = Path(os.path.relpath(corpus))
    cases = [
        ([*own, "--train-iters", "30"], ""),
        ([*own, "--data-path", str(path)], ""),
        ([*own, "--train-iters", "10"], "belongs to another run (train_iters was 20, is 10)"),
        ([*own, "--adam-eps", "1e-6"], "belongs to another run (adam_eps was 1e-08, is 1e-06)"),
        (
            ["--bf16", "--save", str(parent), "--load", str(parent), "--train-iters", "30"],
            "the learning rate would jump",
        ),
    ]
    check(flags, cases)


def test_what_computes_is_recorded(run_flags, tmp_path):
    """Pins: speed switches that changed at a resume unnoticed, and flags that Megatron refuses and yet left a run.json
    behind, so that the command with the right flags was refused."""
    run = tmp_path / "run"
    run.mkdir()
    flags = run_flags(run, "--bf16", "--train-iters", "20", "--save-interval", "2", "--exit-interval", "2")
    wrong = Training([*flags, "--global-batch-size", "5"], run / "log")
    assert wrong.wait() == 2
    assert "error: Megatron refuses these flags: AssertionError: " in (run / "log").read_text()
    assert not (run / "checkpoints/run.json").exists()
    train(flags, run / "log")
    assert json.loads((run / "checkpoints/run.json").read_text())["arithmetic"]["check_gradients_once"] is False
    train([*flags, "--check-gradients-once"], run / "log")
    assert "last launch: check_gradients_once was False, is True" in (run / "log").read_text()
    assert json.loads((run / "checkpoints/run.json").read_text())["arithmetic"]["check_gradients_once"] is True


def test_longer_run_is_the_longer_run(run_flags, tmp_path):
    """A run that stops in its stable phase and is then made longer ends as one that was longer from the start.

    Pins: --train-iters that could not be raised; an order of samples, or a schedule, that stays the shorter one's.
    """
    more = ["--bf16", "--lr-decay-style", "constant", "--save-interval", "6"]
    for name, lengths in {"longer": (6, 10), "whole": (10,)}.items():
        (tmp_path / name).mkdir()
        for length in lengths:
            train(run_flags(tmp_path / name, *more, "--train-iters", str(length)), tmp_path / name / "log")
    ours, wanted = (tensors(tmp_path / name / "checkpoints") for name in ("longer", "whole"))
    assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []


def test_no_evaluation(run_flags, corpus, tmp_path):
    """Pins: --eval-iters 0 beside a validation set ended in Megatron's assertion, when the run had begun."""
    more = ["--train-data-path", str(corpus), "--valid-data-path", str(corpus), "--train-iters", "6"]
    flags = run_flags(tmp_path, *more)
    at = flags.index("--data-path")
    train(flags[:at] + flags[at + 4 :], tmp_path / "log")


def test_gpu_switches_on_a_cpu(flags, tmp_path):
    """Pins: --fused-qkv-rope on a CPU ended in an assertion of the model; others did nothing, silently."""
    for number, switch in enumerate(("--fused-qkv-rope", "--fused-weight-gradient", "--deep-gemm")):
        log = tmp_path / str(number)
        assert Training(flags(switch), log).wait() == 2
        assert f"error: {switch}: needs a GPU, and this run is on the CPU" in log.read_text()


def test_help(tmp_path):
    """Pins: a bare percent sign in one of Megatron's help texts, by which --help of every stage died."""
    for number, stage in enumerate(([], ["sft"])):
        log = tmp_path / str(number)
        assert Training([*stage, "--help"], log).wait() == 0
        assert "--from-scratch" in log.read_text()


def test_status_is_two(flags, tmp_path):
    """A refusal ends the program with status 2 and one line."""
    log = tmp_path / "log"
    assert Training(flags("--data-path", "absent"), log).wait() == 2
    assert "[infir2] error: absent.bin does not exist" in log.read_text()


def test_full_disk(run_flags, tmp_path):
    """A disk that fills during a save ends the run with an error; the checkpoint before stays whole, and a later
    launch goes on from it. (A limit on file size stands in for the disk: the writes fail the same way.)"""
    run = tmp_path / "run"
    run.mkdir()
    flags = run_flags(run, "--bf16", "--train-iters", "20", "--save-interval", "5")
    train([*flags, "--exit-interval", "5"], run / "log")
    assert Training(flags, run / "log", environment={"INFIR2_TEST_FILE_LIMIT": "100000"}).wait() not in (0, -1)
    train(flags, run / "log")
    assert "starting from " + str(run / "checkpoints/iter_0000005") in (run / "log").read_text()
