"""The learning rate of a step, from what run.json records of a run. The standard library alone.

The formulas are those of Megatron's scheduler (megatron.core.optimizer_param_scheduler, 0.19.2). A step is an update of
the optimizer; the rate of step i is the one that Megatron sets after i updates.
"""

import math
from collections.abc import Mapping
from typing import Any

# Of the decay, from 1 to 0 while `x` goes from 0 to 1, by --lr-decay-style or --lr-wsd-decay-style.
_FALLING = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (math.cos(math.pi * x) + 1) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def learning_rate(run: Mapping[str, Any], step: int) -> float:
    """At `step`, for a run with Megatron's names: lr, min_lr, lr_decay_style, train_iters, lr_warmup_iters, ..."""
    high, low, style = run["lr"], run.get("min_lr") or 0.0, run["lr_decay_style"]
    warmup, decay, end = phases(run)
    if warmup and step <= warmup:
        init = run.get("lr_warmup_init") or 0.0
        return init + (high - init) * step / warmup
    if style == "constant":
        return high
    if step > end:
        return low
    if style == "inverse-square-root":
        return max(low, high * math.sqrt(max(warmup, 1) / max(step, 1)))
    if style == "WSD":
        falling = _FALLING[run["lr_wsd_decay_style"]]
        return low + (high - low) * (falling((step - decay) / (end - decay)) if step > decay else 1.0)
    return low + (high - low) * _FALLING[style]((step - warmup) / (end - warmup))


def phases(run: Mapping[str, Any]) -> tuple[float, float, float]:
    """Where a run's warmup ends, where its decay begins, and where that ends, in steps."""
    end = run.get("lr_decay_iters") or run["train_iters"]
    fraction = run.get("lr_warmup_fraction")
    warmup = (run.get("lr_warmup_iters") or 0) if fraction is None else fraction * end
    style = run["lr_decay_style"]
    decay = end - run["lr_wsd_decay_iters"] if style == "WSD" else end if style == "constant" else warmup
    return warmup, decay, end


def described(run: Mapping[str, Any]) -> str:
    """The phases in words: "warmup to 5000, 0.0001 to 35000, WSD decay to 1e-05 at 40000"."""
    warmup, decay, end = phases(run)
    words = [f"warmup to {warmup:g}"] if warmup else []
    if decay > warmup:
        words.append(f"{run['lr']:g} to {decay:g}")
    if end > decay:
        words.append(f"{run['lr_decay_style']} decay to {run.get('min_lr') or 0.0:g} at {end:g}")
    return ", ".join(words)
