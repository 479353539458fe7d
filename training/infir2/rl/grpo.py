"""The mathematics of reinforcement learning: advantages, the loss of a token, the gap between trainer and engine.

GRPO (Shao et al. 2024, arXiv 2402.03300) with DAPO's changes (Yu et al. 2025, arXiv 2503.14476): a group's rewards are
the baseline of each of its samples; the clip is wider above than below; every token of the global batch weighs the
same. Truncated importance sampling (Yao et al. 2025) corrects for the engine, whose probabilities are not the
trainer's: other kernels, and in FP8 other roundings.

Three policies give a token its log-probability, in nats: `new`, the model being trained, which the gradient goes
through; `old`, the trainer's model that the step began with; `rollout`, the engine that sampled the token.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0  # nats; exp of more than 88 is infinite in FP32, and 0 times infinity in its gradient NaN
SPREAD = 1e-6  # standard deviation of rewards above which a group can teach something


def has_spread(rewards: np.ndarray) -> bool:
    """Whether a group's rewards, [samples], differ. Where they do not, every advantage is 0."""
    return len(rewards) > 1 and bool(np.std(rewards, ddof=1) > SPREAD)


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(reward - the group's mean) / (the group's standard deviation + 1e-6), unbiased; float64 [groups, samples]."""
    mean = rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, ddof=1, keepdims=True) if rewards.shape[1] > 1 else 0.0
    return (rewards - mean) / (deviation + 1e-6)


@dataclass(frozen=True)
class Objective:
    """`eps_clip`, `eps_clip_high`: a token's ratio stops to matter below 1 - eps_clip and above 1 + eps_clip_high.
    `use_tis`: weigh tokens by old / rollout probability, cut to [tis_clip_low, tis_clip]."""

    eps_clip: float
    eps_clip_high: float
    use_tis: bool
    tis_clip_low: float
    tis_clip: float

    def loss(self, new: Tensor, old: Tensor, rollout: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each token, and whether its ratio and its importance weight were clipped; all [tokens], float32.

        loss = w max(-r A, -clip(r) A) with r = exp(new - old), w = clip(exp(old - rollout)). Only `new` has a gradient;
        none from a token whose new - old is beyond LARGEST_LOG_RATIO either way.
        """
        ratio = torch.exp((new - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
        clipped = ratio.clamp(1 - self.eps_clip, 1 + self.eps_clip_high)
        loss = torch.maximum(-ratio * advantage, -clipped * advantage)
        is_clipped = -clipped * advantage > -ratio * advantage
        if not self.use_tis:
            return loss, is_clipped, torch.zeros_like(is_clipped)
        weight = torch.exp(old - rollout)
        truncated = weight.clamp(self.tis_clip_low, self.tis_clip)
        return loss * truncated, is_clipped, truncated != weight


class TokenLogprobs(torch.autograd.Function):
    """Log-probability of each label at a temperature, and the entropy of each distribution, from logits.

    logits: [tokens, vocabulary / TP], in the model's type; labels: int64 [tokens]; `group`: the tensor-parallel
    processes that hold the other parts of the vocabulary, None where there are none. Returns two float32 [tokens] in
    nats; the entropy has no gradient. Computed in FP32, CHUNK tokens at a time: the engine divides by the temperature
    in FP32 too. The backward writes the gradient over the logits, which nothing else may use.
    """

    CHUNK = 1024

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, temperature: float, group=None) -> tuple[Tensor, Tensor]:
        first = 0 if group is None else group.rank() * logits.shape[1]
        local = labels - first
        held = (local >= 0) & (local < logits.shape[1])
        local = torch.where(held, local, 0)
        largest = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        sums = torch.empty(3, len(labels), dtype=torch.float32, device=logits.device)  # of exp, of x exp, the label's x
        for rows in _chunks(len(labels), TokenLogprobs.CHUNK):
            x = logits[rows].float() / temperature
            sums[2, rows] = x.gather(1, local[rows, None])[:, 0]
            largest[rows] = x.amax(dim=1)
            exponential = torch.exp(x - largest[rows, None])
            sums[0, rows] = exponential.sum(dim=1)
            sums[1, rows] = x.mul_(exponential).sum(dim=1)
        sums[2] *= held
        if group is not None:
            ours = largest.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
            sums[:2] *= torch.exp(ours - largest)
            torch.distributed.all_reduce(sums, group=group)
        normalizer = largest + torch.log(sums[0])
        entropy = normalizer - sums[1] / sums[0]
        ctx.logits, ctx.temperature = logits, temperature
        ctx.save_for_backward(local, held, normalizer)
        ctx.mark_non_differentiable(entropy)
        return sums[2] - normalizer, entropy

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, None, None]:
        local, held, normalizer = ctx.saved_tensors
        logits, temperature = ctx.logits, ctx.temperature
        ctx.logits = None
        for rows in _chunks(len(logits), TokenLogprobs.CHUNK):
            scaled = (gradient[rows] / temperature)[:, None]
            probability = torch.exp(logits[rows].float() / temperature - normalizer[rows, None])
            result = probability.mul_(-scaled)
            result.scatter_add_(1, local[rows, None], scaled * held[rows, None])
            logits[rows] = result.to(logits.dtype)
        return logits, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@dataclass(frozen=True)
class Gap:
    """How far trainer and engine are from each other on the tokens that the engine sampled, d = old - rollout.

    mean_abs, p99_abs, max_abs: of |d|, nats. gen_kl_error: the mean of exp(d) - 1 - d, the k3 estimator of
    KL(rollout || train) (Schulman 2020), with its standard error over samples. token_mult_prob_error: the mean of
    exp|d|. tis_clipped: share of tokens whose importance weight was cut.
    """

    mean_abs: float
    p99_abs: float
    max_abs: float
    gen_kl_error: float
    gen_kl_standard_error: float
    token_mult_prob_error: float
    tis_clipped: float

    @property
    def gen_kl_low(self) -> float:
        """The lower end of gen_kl_error's 95 % interval; the estimate itself where one sample gives no interval."""
        return self.gen_kl_error - 1.96 * np.nan_to_num(self.gen_kl_standard_error)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def gap(old: np.ndarray, rollout: np.ndarray, boundaries: np.ndarray, objective: Objective) -> Gap:
    """`old`, `rollout`: [tokens] of all samples; `boundaries`: [samples + 1], where each begins, and the end."""
    d = old.astype(np.float64) - rollout
    k3 = np.expm1(d) - d
    weight = np.exp(d)
    cut = (weight < objective.tis_clip_low) | (weight > objective.tis_clip)
    return Gap(
        mean_abs=float(np.abs(d).mean()),
        p99_abs=float(np.quantile(np.abs(d), 0.99)),
        max_abs=float(np.abs(d).max()),
        gen_kl_error=float(k3.mean()),
        gen_kl_standard_error=_standard_error(k3, boundaries),
        token_mult_prob_error=float(np.exp(np.abs(d)).mean()),
        tis_clipped=float(cut.mean()) if objective.use_tis else 0.0,
    )


def _standard_error(values: np.ndarray, boundaries: np.ndarray) -> float:
    """Of the mean of all values, whose samples, not whose tokens, are independent (a ratio estimator's)."""
    lengths = np.diff(boundaries)
    if len(lengths) < 2:
        return float("nan")
    residual = _sums(values, boundaries) - values.mean() * lengths
    return float(np.sqrt(len(lengths) / (len(lengths) - 1) * np.square(residual).sum()) / lengths.sum())


def sample_kl(old: np.ndarray, rollout: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Each sample's own `gen_kl_error`, [samples]: which ones make the gap."""
    d = old.astype(np.float64) - rollout
    return _sums(np.expm1(d) - d, boundaries) / np.maximum(np.diff(boundaries), 1)


def _sums(values: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Of each sample's values; 0 for one without any."""
    return np.diff(np.concatenate([[0.0], np.cumsum(values)])[boundaries])
