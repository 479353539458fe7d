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


def gradient_lies_in_the_logits() -> bool:
    """Whether a micro-batch's backward pass writes the logits' gradient over them, and copies it nowhere."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from infir2 import packed_model, packing
    from infir2.rl import policy
    from infir2.rl.grpo import Objective
    from infir2.rl.rollout import Batch

    sizes = {"get_context_parallel_world_size": 1, "get_context_parallel_rank": 0}
    sizes |= {"get_tensor_model_parallel_world_size": 1}
    policy.mpu = packed_model.mpu = SimpleNamespace(**{name: lambda size=size: size for name, size in sizes.items()})
    tokens, numbers = np.arange(5, dtype=np.int32), np.full(3, -1.0, dtype=np.float32)
    step = policy._Step(Batch([tokens], [2], np.array([0, 3]), numbers, numbers), Objective(0.2, 0.2, False, 0, 2), 1.0)
    pack = packing.pack([(tokens, np.arange(5) >= 2)], 1, 1)
    places = np.full(len(pack.tokens), -1)
    places[1:4] = np.arange(3)
    leaf, found = torch.zeros(1, len(pack.tokens), 8, requires_grad=True), {}

    def model(**_):
        logits = leaf * 1
        found["forward"] = logits.data_ptr()
        logits.register_hook(lambda gradient: found.update(backward=gradient.data_ptr()))
        return logits

    logprobs, loss = step.forward(iter([(pack, places)]), model)
    loss(logprobs)[0].backward()
    return found["forward"] == found["backward"]
