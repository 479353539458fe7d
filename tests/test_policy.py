"""The trainer of reinforcement learning, against Hugging Face's model and a loss written out here. Each docstring says
what it pins."""

import importlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import rl_model
import torch
from tolerances import FP32_LAYOUTS, FP32_LOGPROBS, LOGITS
from trainer import FP8, train, with_megatron
from transformers import Qwen2ForCausalLM

from infir2 import hf
from infir2.checkpoint import TorchDist
from infir2.qwen2 import Shape, entries, megatron_flags
from infir2.rl.rollout import Batch

TEMPERATURE, LEARNING_RATE, TIS_CLIP = 1.1, 1e-3, 2.0
SAMPLES = 16
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
CP2 = ["--context-parallel-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `hf` and `base`, the same model for Hugging Face and for Megatron, and `batch`."""
    folder = tmp_path_factory.mktemp("policy")
    rl_model.bf16_folder(folder / "hf", scale=1.5)
    with_megatron("convert_hf_to_torch_dist", "convert", folder / "hf", folder / "base")
    (folder / "prompts.jsonl").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch(folder, model) -> Batch:
    """Random prompts and responses, 1 to 60 tokens; the engine's log-probabilities are the model's with noise."""
    random = np.random.default_rng(5)
    prompts = random.integers(1, 31, SAMPLES).tolist()
    lengths = random.integers(1, 61, SAMPLES)
    lengths[3], prompts[3] = 1, 1
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    advantages = np.repeat(random.normal(0, 1, SAMPLES), lengths).astype(np.float32)
    tokens = [random.integers(0, 380, n + m).astype(np.int32) for n, m in zip(prompts, lengths, strict=True)]
    batch = Batch(tokens, prompts, boundaries, np.zeros(0, dtype=np.float32), advantages)
    with torch.no_grad():
        exact = torch.cat(list(log_probabilities(model, batch, range(SAMPLES)))).numpy()
    batch = replace(batch, rollout=(exact + random.normal(0, 0.5, len(exact))).astype(np.float32))
    (folder / "batch").write_bytes(pickle.dumps(batch))
    return batch


def log_probabilities(model, batch: Batch, samples):
    """Of each response's tokens, float32, sample by sample, as Hugging Face's model gives them to whole sequences."""
    for index in samples:
        ids = torch.from_numpy(batch.tokens[index].astype(np.int64))
        first = batch.prompts[index]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
        yield torch.log_softmax(logits / TEMPERATURE, dim=-1).gather(1, ids[first:, None])[:, 0]


def losses(model, batch: Batch, samples, old: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token of these samples, GRPO with truncated importance sampling; and which are clipped."""
    new = torch.cat(list(log_probabilities(model, batch, samples)))
    places = np.concatenate([np.arange(*batch.boundaries[i : i + 2]) for i in samples])
    advantage, rollout = (torch.from_numpy(x[places]) for x in (batch.advantages, batch.rollout))
    old = new.detach() if old is None else old[places]
    ratio = torch.exp(new - old)
    outside = torch.where(advantage > 0, ratio > 1.28, ratio < 0.8) & (advantage != 0)
    edge = torch.where(advantage > 0, 1.28, 0.8)
    weight = torch.exp(old - rollout).clamp(max=TIS_CLIP)
    return -weight * advantage * torch.where(outside, edge, ratio), outside


def flags(folder, run, *more: str) -> list[str]:
    """The trainer's command: no weight decay and no clipping, so that Adam's first moment is 0.1 x the gradient."""
    run.mkdir(exist_ok=True)
    return [
        *("rl_probe", *megatron_flags(Shape.from_folder(folder / "hf")), "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(folder / "hf"), "--hf-checkpoint", str(folder / "hf")),
        *("--prompt-data", str(folder / "prompts.jsonl"), "--num-rollout", "4", "--rollout-batch-size", "4"),
        *("--n-samples-per-prompt", "4", "--rollout-max-prompt-len", "30", "--rollout-max-response-len", "60"),
        *("--rollout-temperature", str(TEMPERATURE), "--eps-clip", "0.2", "--eps-clip-high", "0.28", "--use-tis"),
        *("--max-tokens-per-gpu", "256", "--seq-length", "128", "--max-position-embeddings", "128"),
        *("--calculate-per-token-loss", "--lr", str(LEARNING_RATE), "--lr-decay-style", "constant"),
        *("--weight-decay", "0", "--adam-beta1", "0.9", "--adam-beta2", "0.98", "--clip-grad", "0"),
        *("--pretrained-checkpoint", str(folder / "base"), "--load", str(run / "checkpoints")),
        *("--save", str(run / "checkpoints"), "--save-interval", "1000", "--seed", "1"),
        *more,
    ]


def answers(folder, run, batch: Batch, ranks: int, *more: str) -> dict:
    """What tests/rl_probe.py found; `batch` is in its file."""
    command = flags(folder, run, *more)
    (run / "batch").write_bytes(pickle.dumps(batch))
    train(command, run / "log", ranks, PROBE=str(run))
    return torch.load(run / "answers", weights_only=False)


def gradients(run, shape: Shape) -> dict[str, torch.Tensor]:
    """By Megatron's names."""
    stored = TorchDist(run / "checkpoints")
    return {e.megatron: 10 * stored.read(f"optimizer.state.exp_avg.{e.megatron}") for e in entries(shape)}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float, what: str) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        difference = (found[name] - expected).norm() / expected.norm()
        assert difference <= tolerance, f"{what}: {name} differs by {difference:.1e}"


def test_one_update(folder, model, batch, tmp_path):
    """Log-probabilities, loss and every gradient are those of Hugging Face's model and the loss above; at DP2, TP2 with
    sequence parallelism and CP2 too.

    Pins: log-probabilities at another token's place, prompts that are trained on, a mean over samples, a temperature
    that the gradient forgets, a weight or an advantage of another token, ranks that count tokens twice.
    """
    shape = Shape.from_folder(folder / "hf")
    model.zero_grad()
    loss, _ = losses(model, batch, range(SAMPLES), None)
    loss.mean().backward()
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {e.megatron: e.join(*(parameters[name] for name in e.hf)) for e in entries(shape)}
    with torch.no_grad():
        before = torch.cat(list(log_probabilities(model, batch, range(SAMPLES)))).numpy()
    size = float(loss.detach().abs().mean())
    one = answers(folder, tmp_path / "one", batch, 1)
    assert np.abs(one["before"] - before).max() <= LOGITS
    assert np.abs(one["seen"] - before).max() <= LOGITS
    assert abs(one["metrics"]["policy loss"] - float(loss.detach().mean())) <= LOGITS * size
    weight = np.exp(before - batch.rollout)
    assert one["metrics"]["tis clipped"] == pytest.approx((weight > TIS_CLIP).mean(), abs=1e-6)
    assert 0 < one["metrics"]["tis clipped"] < 0.3
    assert one["metrics"]["clipped"] == one["metrics"]["policy kl"] == 0
    assert_close(found := gradients(tmp_path / "one", shape), expected, LOGITS, "Hugging Face")
    for name, more in {"dp2": [], "tp2": TP2, "cp2": CP2}.items():
        other = answers(folder, tmp_path / name, batch, 2, *more)
        for what in ("before", "seen"):
            assert np.abs(other[what] - one[what]).max() <= FP32_LOGPROBS, (name, what)
        assert abs(other["metrics"]["policy loss"] - one["metrics"]["policy loss"]) <= FP32_LAYOUTS * size, name
        assert other["metrics"]["entropy"] == pytest.approx(one["metrics"]["entropy"], rel=FP32_LAYOUTS)
        assert_close(gradients(tmp_path / name, shape), found, FP32_LAYOUTS, name)


def test_several_updates(folder, batch, tmp_path):
    """With 4 samples to an update, ratios are to the policy that the step began with, and every update sees what the
    ones before it did. The same steps of torch's Adam on Hugging Face's model are the oracle.

    Pins: ratios that are always 1, samples of one update in another, an update left out.
    """
    model = Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    with torch.no_grad():
        old = torch.cat(list(log_probabilities(model, batch, range(SAMPLES))))
    seen, means, shares = [], [], []
    for first in range(0, SAMPLES, 4):
        optimizer.zero_grad()
        samples = range(first, first + 4)
        loss, clipped = losses(model, batch, samples, old)
        with torch.no_grad():
            seen += log_probabilities(model, batch, samples)
        loss.mean().backward()
        optimizer.step()
        means.append(float(loss.detach().mean()))
        shares.append(float(clipped.float().mean()))
    found = answers(folder, tmp_path / "run", batch, 1, "--global-batch-size", "4")
    moved = np.abs(torch.cat(seen).numpy() - old.numpy()).max()
    assert moved > 0.2
    assert np.abs(found["seen"] - torch.cat(seen).numpy()).max() <= 0.01 * moved
    assert found["metrics"]["policy loss"] == pytest.approx(np.mean(means), rel=1e-3)
    assert found["metrics"]["clipped"] == pytest.approx(np.mean(shares), abs=2 / len(old))
    assert found["metrics"]["clipped"] > 0.02


def test_weights_are_the_checkpoint_s(folder, batch, tmp_path):
    """What the engines get, in BF16 and in FP8, is bit for bit what the converter and the caster make of the checkpoint
    that is saved at that moment: every tensor, at TP1 and at TP2.

    Pins: weights of the step before, shards joined along the wrong dimension, scales of a shard, q, k, v mixed up.
    """
    importlib.import_module("bf16_cast_fp8")
    converter = importlib.import_module("convert_torch_dist_to_hf")
    for name, (ranks, more) in {"tp1": (1, []), "tp2": (2, TP2)}.items():
        run = tmp_path / name
        found = answers(folder, run, batch, ranks, *FP8, *more)["weights"]
        converter.convert(run / "checkpoints", run / "bf16", folder / "hf", torch.bfloat16, "masters")
        for fp8, made in {False: run / "bf16", True: rl_model.fp8_folder(run / "bf16", run / "fp8")}.items():
            reader, before = hf.HFReader(made), hf.HFReader(folder / "hf")
            assert found[fp8].keys() == set(reader.names)
            for tensor in reader.names:
                ours, theirs = found[fp8][tensor], reader.tensor(tensor)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.contiguous().view(torch.uint8), theirs.view(torch.uint8)), (name, tensor)
        changed = [n for n in before.names if not torch.equal(before.tensor(n), hf.HFReader(run / "bf16").tensor(n))]
        assert len(changed) > 20, "a step that changes nothing shows nothing"


def test_gradient_of_the_logits_is_not_copied():
    """Pins: `logits[0]`, whose backward pass allocates the whole gradient of the logits again and copies into it."""
    assert with_megatron("rl_probe", "gradient_lies_in_the_logits")
