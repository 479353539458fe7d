"""What tests of reinforcement learning have ranks do, each a process that has Megatron."""

import os
import pickle
import sys
from pathlib import Path


def run(words: list[str]) -> None:
    """`words` are the trainer's flags; PROBE names a folder with `batch`. Rank 0 writes `answers` there."""
    import torch

    from infir2 import engine
    from infir2.rl import arguments as rl_arguments
    from infir2.rl.policy import Policy

    folder = Path(os.environ["PROBE"])
    batch = pickle.loads((folder / "batch").read_bytes())
    sys.argv = ["policy", *words]
    args, start = engine.parse(rl_arguments.ReinforcementLearning(), "cpu", "pow2")
    policy = Policy(args, start, "cpu", "pow2", rl_arguments.objective(args))
    before = policy.log_probabilities(batch)
    if args.global_batch_size < len(batch):
        batch = batch.with_old(before)
    metrics, seen = policy.train(batch)
    after = policy.log_probabilities(batch)
    policy.save(1)
    weights = {fp8: dict(policy.weights(fp8)) for fp8 in (False, True)}
    if args.rank == 0:
        torch.save(
            {"before": before, "metrics": metrics, "seen": seen, "after": after, "weights": weights}, folder / "answers"
        )


def refusal(words: list[str]) -> str:
    """Why a trainer refuses these flags."""
    from infir2 import engine
    from infir2.rl import arguments as rl_arguments

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    sys.argv = ["policy", *words]
    try:
        engine.parse(rl_arguments.ReinforcementLearning(), "cpu", "pow2")
    except (ValueError, OSError) as error:
        return str(error)
    return ""
