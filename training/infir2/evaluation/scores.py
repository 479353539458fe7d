r"""Statistics of benchmark scores: means over problems with intervals, pass@k, paired differences. Pure numpy.

A benchmark has P problems, each answered n times. The n answers to one problem depend on each other through its
difficulty, so the problem is the unit (the cluster), and everything is computed from one number for each problem: the
share of its answers that are right, its pass@k, the difference of two models' shares.

    standard error   s / sqrt(P), with s the standard deviation of the problems' numbers (ddof 1). It holds both the
                     choice of problems and the sampling of answers. Miller 2024, "Adding Error Bars to Evals",
                     arXiv 2411.00640: the clustered standard error, for clusters of one size. It is the
                     limit of a bootstrap that draws whole problems, times sqrt(P / (P - 1)), so none is drawn.
    sampling error   the part of it that remains over the same problems, and that more answers would reduce:
                     sqrt(sum_i p_i (1 - p_i) / (n - 1)) / P. (Same paper, resampling.)
    interval, mean   Wilson's score interval with the effective number of answers N = m (1 - m) / standard error^2 and
                     Student's t with P - 1 degrees of freedom (N as in Korn and Graubard 1998, Survey Methodology 24,
                     193-201). It stays within [0, 1] and leans towards the middle, as the error does.
    interval, paired mean difference +- t * standard error of the problems' differences (Miller, paired analysis).

Why not percentiles of a bootstrap: at 30 problems they are too narrow by sqrt(29 / 30) times t over z (2.045 against
1.960), and do not lean: they cover 92 to 93 % where 95 % are claimed. Means near 0 or 1 hang on a few problems: at 30
problems and a mean of 0.1 Wilson's interval covers 93 %, at 0.05 86 to 91 %. `Estimate.few_problems` says so.
"""

from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEW = 6.0  # problems' worth of right, or of wrong, answers below which the interval covers less than it claims


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its standard error and CONFIDENCE interval, all in the unit of the values."""

    value: float
    standard_error: float
    low: float
    high: float
    few_problems: bool = False  # the interval is too narrow: too few problems carry the value


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, to about 8 digits; `degrees` >= 1 degrees of freedom.

    With t = sqrt(degrees) tan(a) the density is proportional to cos(a)^(degrees - 1), bounded on a bounded range.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(probability, mass / mass[-1], angles)))


def wilson_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the interval for the mean of `values` [..., problems], each in [0, 1]; arrays [...].

    Values that are all 0 or all 1 have no spread to go by: the far end is then what CONFIDENCE allows for the share of
    problems that are otherwise (Clopper and Pearson 1934). Problems that are all alike in between count as one each.
    """
    problems = values.shape[-1]
    mean = values.mean(-1)
    spread = mean * (1 - mean)
    variance = values.var(-1, ddof=1) / problems
    answers = np.divide(spread, variance, out=np.full_like(mean, problems), where=variance > 1e-18)
    t = student_quantile((1 + CONFIDENCE) / 2, problems - 1)
    centre = (mean + t**2 / (2 * answers)) / (1 + t**2 / answers)
    half = t / (1 + t**2 / answers) * np.sqrt(spread / answers + (t / (2 * answers)) ** 2)
    unseen = unseen_share(problems)
    low = np.where(mean >= 1, 1 - unseen, np.maximum(centre - half, 0))
    high = np.where(mean <= 0, unseen, np.minimum(centre + half, 1))
    return np.where(mean <= 0, 0.0, low), np.where(mean >= 1, 1.0, high)


def student_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the t interval for the mean of `values` [..., problems]; arrays [...]."""
    problems = values.shape[-1]
    mean = values.mean(-1)
    half = student_quantile((1 + CONFIDENCE) / 2, problems - 1) * values.std(-1, ddof=1) / np.sqrt(problems)
    return mean - half, mean + half


def unseen_share(problems: int) -> float:
    """Largest share of problems of a kind that CONFIDENCE allows where none of `problems` was of that kind."""
    return 1 - ((1 - CONFIDENCE) / 2) ** (1 / problems)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values` [problems]."""
    return float(values.std(ddof=1) / np.sqrt(values.size))


def sampling_error(right: np.ndarray) -> float | None:
    """The part of the standard error that comes from sampling answers; `right` [problems, samples]. None for one."""
    problems, samples = right.shape
    if samples < 2:
        return None
    share = right.mean(1)
    return float(np.sqrt((share * (1 - share) / (samples - 1)).sum()) / problems)


def share(values: np.ndarray) -> Estimate:
    """Mean of shares of problems, `values` [problems] in [0, 1]. Refuses fewer than two problems."""
    _refuse_one(values)
    low, high = wilson_intervals(values)
    mean = float(values.mean())
    few = bool(values.size * min(mean, 1 - mean) < FEW)
    return Estimate(mean, standard_error(values), float(low), float(high), few)


def amount(values: np.ndarray) -> Estimate:
    """Mean of amounts of any size, such as lengths, `values` [problems]. Refuses fewer than two problems."""
    _refuse_one(values)
    low, high = student_intervals(values)
    return Estimate(float(values.mean()), standard_error(values), float(low), float(high))


def difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Mean of one less other over the same problems, shares [problems] in the same order.

    Where all problems differ by the same amount (none, mostly), the interval is what CONFIDENCE allows for the share of
    problems that would not. Refuses arrays of different sizes.
    """
    if one.shape != other.shape:
        raise ValueError(f"a paired difference needs the same problems, found {one.shape} and {other.shape}")
    _refuse_one(one)
    gap = one - other
    low, high = student_intervals(gap)
    if np.ptp(gap) == 0:
        half = unseen_share(gap.size) * (1 + abs(gap[0]))
        low, high = gap[0] - half, gap[0] + half
    few = int(np.count_nonzero(gap)) < FEW
    return Estimate(float(gap.mean()), standard_error(gap), float(max(low, -1)), float(min(high, 1)), few)


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k answers is right, for each problem; `right` [problems, samples], 0 or 1.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) for c right of n answers, as the product of Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. Refuses k > n.
    """
    samples = right.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} answers to a problem")
    wrong = samples - right.sum(1, keepdims=True)
    totals = np.arange(samples - k + 1, samples + 1)
    return 1 - np.clip((wrong - samples + totals) / totals, 0, None).prod(1)


def _refuse_one(values: np.ndarray) -> None:
    if values.size < 2:
        raise ValueError(f"an interval over problems needs at least 2 problems, found {values.size}")
