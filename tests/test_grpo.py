"""The mathematics of reinforcement learning, against plain FP64 written out here. Each docstring says what it pins."""

import math
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import BF16_OUTPUT, FP32_LOGPROBS

from infir2.rl.grpo import Objective, TokenLogprobs, gap, group_advantages, has_spread, sample_kl

PLAIN = Objective(0.2, 0.28, use_tis=False, tis_clip_low=0.0, tis_clip=2.0)
TIS = Objective(0.2, 0.28, use_tis=True, tis_clip_low=0.5, tis_clip=2.0)

# Advantages

scores = st.integers(-2000, 2000).map(lambda x: x / 1000)


@given(st.integers(2, 8).flatmap(lambda n: st.lists(st.lists(scores, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_advantages(rewards):
    """(r - mean) / (std + 1e-6) with n - 1 in the deviation, each group for itself. Pins: a biased deviation, a
    baseline over the batch, a division by 0 where all rewards are equal."""
    found = group_advantages(np.array(rewards))
    for group, advantages in zip(rewards, found, strict=True):
        mean = math.fsum(group) / len(group)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
        assert advantages == pytest.approx([(r - mean) / (deviation + 1e-6) for r in group], abs=1e-6)


@given(st.lists(scores, min_size=1, max_size=8))
def test_spread(rewards):
    """Whether some two rewards differ. Pins: a group of one kept, equal rewards kept whose mean is rounded."""
    assert has_spread(np.array(rewards)) == (max(rewards) > min(rewards))


# The loss


def loss_by_hand(objective: Objective, new: float, old: float, rollout: float, advantage: float) -> tuple:
    """One token's loss, whether it is clipped, whether its weight is cut: by cases, as the papers state them."""
    ratio = math.exp(new - old)
    low, high = 1 - objective.eps_clip, 1 + objective.eps_clip_high
    clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    loss = -advantage * (min(max(ratio, low), high) if clipped else ratio)
    if not objective.use_tis:
        return loss, clipped, False
    weight = math.exp(old - rollout)
    cut = weight < objective.tis_clip_low or weight > objective.tis_clip
    return loss * min(max(weight, objective.tis_clip_low), objective.tis_clip), clipped, cut


logprob = st.floats(-3, 0, width=32)


@pytest.mark.parametrize("objective", [PLAIN, TIS], ids=["plain", "tis"])
@given(st.lists(st.tuples(logprob, logprob, logprob, scores), min_size=1, max_size=20))
def test_loss(objective, tokens):
    """Every token's loss, in the FP32 that training uses, is FP64's to 1e-6. Pins: a clip on the wrong side, a negative
    advantage clipped above, a weight that is not cut, a weight with rollout and old exchanged."""
    columns = [torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True)]
    wanted = [loss_by_hand(objective, *token) for token in zip(*(column.tolist() for column in columns), strict=True)]
    losses, clipped, cut = (list(column) for column in zip(*wanted, strict=True))
    found = [column.tolist() for column in objective.loss(*columns)]
    assert found[0] == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert found[1:] == [clipped, cut]


@pytest.mark.parametrize("objective", [PLAIN, TIS], ids=["plain", "tis"])
@given(st.floats(-2000, 2000, width=32), st.floats(-2000, 2000, width=32), scores)
def test_gradient_is_finite(objective, to_old, to_rollout, advantage):
    """However far the policies are from each other. Pins: NaN at a log-ratio of 90, whose exponential is infinite."""
    new = torch.zeros(1, requires_grad=True)
    loss, _, _ = objective.loss(new, torch.tensor([-to_old]), torch.tensor([-to_rollout]), torch.tensor([advantage]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize("objective", [PLAIN, TIS], ids=["plain", "tis"])
def test_gradient_is_the_policy_gradient(objective):
    """Where all ratios are 1, d loss / d new = -advantage x weight. Pins: a weight of new / rollout, through which a
    gradient flows; a clip that takes the gradient at a ratio of 1."""
    old, rollout, advantage = torch.tensor(np.random.default_rng(0).normal(-1, 1, (3, 500)))
    new = old.clone().requires_grad_()
    objective.loss(new, new.detach(), rollout, advantage)[0].sum().backward()
    weight = (old - rollout).exp().clamp(0.5, 2.0) if objective.use_tis else 1.0
    assert new.grad.numpy() == pytest.approx((-advantage * weight).numpy(), rel=1e-6)


# Log-probabilities


def random_logits(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, and weights of the log-probabilities in a sum whose gradient is taken."""
    generator = torch.Generator().manual_seed(tokens)
    logits = 4 * torch.randn(tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return logits, labels, torch.randn(tokens, generator=generator)


def in_fp64(logits, labels, weight, temperature):
    """Log-probabilities, entropies and the gradient of (weight x log-probabilities).sum(), by torch's own autograd."""
    logits = logits.detach().double().requires_grad_()
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    chosen = logprobs.gather(1, labels[:, None])[:, 0]
    (chosen * weight).sum().backward()
    return chosen.detach(), -(logprobs.exp() * logprobs).sum(dim=1).detach(), logits.grad


def largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "temperature"), [(1, 7, 1.0), (1024, 33, 0.6), (1025, 40, 1.1), (2049, 5, 1.0)]
)
def test_token_logprobs(tokens, vocabulary, temperature, dtype):
    """Values, entropies and gradients are log_softmax's in FP64, for the logits as they are. Pins: a temperature left
    out of the gradient, a token lost between two chunks, sums in BF16."""
    logits, labels, weight = random_logits(tokens, vocabulary)
    logits = logits.to(dtype)
    expected, entropies, gradient = in_fp64(logits, labels, weight, temperature)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = TokenLogprobs.apply(leaf * 1, labels, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert largest(logprobs - expected) <= FP32_LOGPROBS
    assert largest(entropy - entropies) <= FP32_LOGPROBS
    assert not entropy.requires_grad
    (logprobs * weight).sum().backward()
    rounding = BF16_OUTPUT * gradient.abs() if dtype == torch.bfloat16 else 0
    assert ((leaf.grad - gradient).abs() <= FP32_LOGPROBS + rounding).all()


class Ranks:
    """Processes of a tensor-parallel group as threads; `all_reduce` stands in for torch.distributed's."""

    def __init__(self, size: int) -> None:
        self.barrier, self.local, self.shared = threading.Barrier(size), threading.local(), [None] * size

    def rank(self) -> int:
        return self.local.rank

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None) -> None:
        assert group is self
        self.shared[self.rank()] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(self.shared)
        self.barrier.wait()
        tensor.copy_(total.amax(dim=0) if op == torch.distributed.ReduceOp.MAX else total.sum(dim=0))

    def run(self, function) -> list:
        """function(rank) on every rank; their results."""
        results = [None] * len(self.shared)

        def one(rank: int) -> None:
            self.local.rank = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(self.shared))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


def test_split_vocabulary(monkeypatch):
    """Two ranks that hold half of the vocabulary each have the values of one that holds all, and their half of its
    gradient. Pins: a label of the other rank taken for one of ours, a maximum that each rank has for itself."""
    ranks = Ranks(2)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    logits, labels, weight = random_logits(1500, 64)
    logits[:, 40] += 60  # the other rank's exponentials vanish beside it
    expected, entropies, gradient = in_fp64(logits, labels, weight, 0.8)

    def one(rank: int):
        leaf = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
        logprobs, entropy = TokenLogprobs.apply(leaf * 1, labels, 0.8, ranks)
        (logprobs * weight).sum().backward()
        return logprobs.detach(), entropy, leaf.grad

    found = ranks.run(one)
    for (logprobs, entropy, half), wanted in zip(found, gradient.chunk(2, dim=1), strict=True):
        assert largest(logprobs - expected) <= FP32_LOGPROBS * expected.abs().max()
        assert largest(entropy - entropies) <= FP32_LOGPROBS * expected.abs().max()
        assert largest(half - wanted) <= FP32_LOGPROBS
    assert torch.equal(found[0][0], found[1][0])


# The gap


def test_gap():
    """Every field is what its definition says, computed sample by sample; empty samples at any place are nothing.

    Pins: an empty sample that is given its neighbour's first token, or that ends in an error; k3 of the other
    direction; a share of cut tokens that counts other bounds than the loss.
    """
    random = np.random.default_rng(1)
    lengths = [0, 3, 1, 0, 0, 7, 40, 2, 0]
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    old, rollout = random.normal(-2, 0.6, (2, sum(lengths))).astype(np.float32)
    found = gap(old, rollout, boundaries, TIS)
    d = [float(a) - float(b) for a, b in zip(old, rollout, strict=True)]
    k3 = [math.exp(x) - 1 - x for x in d]
    mean = math.fsum(k3) / len(k3)
    samples = [k3[first:last] for first, last in pairwise(boundaries)]
    assert found.gen_kl_error == pytest.approx(mean, rel=1e-9)
    assert found.mean_abs == pytest.approx(math.fsum(map(abs, d)) / len(d), rel=1e-9)
    assert found.max_abs == max(map(abs, d))
    place, low, high = 0.99 * (len(d) - 1), *sorted(map(abs, d))[-2:]
    assert found.p99_abs == pytest.approx(low + (place % 1) * (high - low), rel=1e-9)  # of 53, between the last two
    assert found.token_mult_prob_error == pytest.approx(math.fsum(math.exp(abs(x)) for x in d) / len(d), rel=1e-9)
    cut = [loss_by_hand(TIS, a, a, b, 1.0)[2] for a, b in zip(old, rollout, strict=True)]
    assert 0 < found.tis_clipped == sum(cut) / len(d)
    assert gap(old, rollout, boundaries, PLAIN).tis_clipped == 0
    residuals = [math.fsum(sample) - mean * len(sample) for sample in samples]
    factor = len(samples) / (len(samples) - 1)
    wanted = math.sqrt(factor * math.fsum(x * x for x in residuals)) / len(k3)
    assert found.gen_kl_standard_error == pytest.approx(wanted, rel=1e-9)
    of_samples = [math.fsum(sample) / max(len(sample), 1) for sample in samples]
    assert sample_kl(old, rollout, boundaries) == pytest.approx(of_samples, abs=1e-12)
    assert math.isnan(gap(old, rollout, np.array([0, len(old)]), TIS).gen_kl_standard_error)


def test_standard_error_covers():
    """Intervals of 1.96 standard errors hold the true value in about 95 % of 400 simulated steps, in which the tokens
    of a sample are alike. Pins: an error that takes tokens for independent (which covers half)."""
    random = np.random.default_rng(2)
    between, within = 0.08, 0.03
    truth = math.exp((between**2 + within**2) / 2) - 1  # the mean of exp(d) - 1 - d for a normal d of mean 0
    covered = covered_by_tokens = 0
    for _ in range(400):
        lengths = random.integers(5, 60, 150)
        d = np.repeat(random.normal(0, between, 150), lengths) + random.normal(0, within, lengths.sum())
        found = gap(d, np.zeros_like(d), np.concatenate([[0], np.cumsum(lengths)]), PLAIN)
        off = abs(found.gen_kl_error - truth)
        covered += off <= 1.96 * found.gen_kl_standard_error
        covered_by_tokens += off <= 1.96 * np.std(np.exp(d) - 1 - d) / np.sqrt(len(d))
    assert 0.91 <= covered / 400 <= 0.98
    assert covered_by_tokens / 400 < 0.7
