"""What a run of reinforcement learning writes down: metrics.jsonl (one line a step and one for each evaluation),
rollouts.jsonl (some of each step's samples, to be read), TensorBoard, and W&B where a project is named.

A resumed run repeats the steps since its last checkpoint: their lines are cut off first.
"""

import json
import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infir2 import files
from infir2.rl.grpo import Gap
from infir2.rl.rollout import Collected, Group, Prompts, Sample

log = logging.getLogger("rl")

WORST_SAMPLES = 8


def keep_up_to(path: Path, step: int) -> None:
    """Cut off the lines of later steps, and a line that was not finished."""
    if not path.is_file():
        return
    kept = []
    with path.open(encoding="utf-8", newline="\n") as file:  # splitlines() also cuts at characters that JSON keeps
        for line in file:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    files.write_text(path, "".join(kept))


class StepLog:
    """Open as a context manager, at the step that the run starts from."""

    def __init__(self, args: Namespace, step: int) -> None:
        self.args = args
        self.metrics_file = args.metrics_file
        self.samples_file = args.metrics_file.with_name("rollouts.jsonl")
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.metrics_file, self.samples_file):
            keep_up_to(path, step or -1)  # a run that begins anew evaluates step 0 anew too

    def __enter__(self) -> "StepLog":
        from torch.utils.tensorboard import SummaryWriter

        args = self.args
        self._metrics = self.metrics_file.open("a", encoding="utf-8")
        self._samples = self.samples_file.open("a", encoding="utf-8")
        self._board = SummaryWriter(args.tensorboard_dir) if args.tensorboard_dir else None
        self._wandb = None
        if getattr(args, "rl_wandb_project", None):
            self._wandb = self._open_wandb()
        return self

    def _open_wandb(self):
        """The run at W&B; a resumed run goes on in it, by the id that scripts/lib/megatron.sh or we wrote down."""
        import wandb

        args, path = self.args, self.metrics_file.with_name("wandb_id")
        if not path.is_file():
            files.write_text(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        folder = Path(args.wandb_save_dir or self.metrics_file.with_name("wandb"))
        folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=args.rl_wandb_project,
            entity=args.wandb_entity or None,
            name=args.wandb_exp_name or self.metrics_file.parent.name,
            dir=str(folder),
            id=path.read_text().strip(),
            resume="allow",
            config=vars(args),
        )

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(
        self,
        step: int,
        collected: Collected,
        gap: Gap,
        of_engine: bool,
        training: dict[str, float],
        seconds: dict[str, float],
        total: float,
    ) -> None:
        """What step `step`, counted from 1, did. of_engine: the gap is between trainer and engine, and not of samples
        that an earlier policy left over."""
        generated = collected.counts["generated_tokens"]
        trained = sum(len(sample.tokens) for group in collected.groups for sample in group.samples)
        values = {
            **rollout_values(collected),
            **{f"{'gap' if of_engine else 'lag'}/{name}": value for name, value in gap.as_dict().items()},
            **{f"train/{name.replace(' ', '_')}": value for name, value in training.items()},
            "speed/generated_tokens_per_second": generated / max(seconds["generation"], 1e-9),
            "speed/trained_tokens_per_second": trained / max(seconds["training"], 1e-9),
            "seconds/step": total,
            **{f"seconds/{name.replace(' ', '_')}": value for name, value in seconds.items()},
        }
        self._write(step, values)
        log.info(
            "step %d of %d: reward %.3f, length %.0f, gen_kl_error %.5f%s, %.1f s (%s)",
            step,
            self.args.num_rollout,
            values["rollout/score"],
            values["rollout/length"],
            gap.gen_kl_error,
            "" if of_engine else " (all of an earlier policy)",
            total,
            ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05),
        )

    def evaluation(self, step: int, name: str, found: dict[str, Any]) -> None:
        values = {f"eval/{name}/{key}": found[key] for key in ("mean", "truncated", "length")}
        self._write(step, values)
        log.info("evaluation at step %d, %s: %.3f", step, name, found["mean"])

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def samples(self, step: int, groups: Sequence[Group], prompts: Prompts, decode) -> None:
        """Write some groups as text."""
        for group in groups:
            told = ("score", "reward", "why", "finish")
            line = {
                "step": step,
                "prompt": prompts.messages[group.prompt],
                "label": prompts.labels[group.prompt],
                "samples": [
                    {"response": decode(sample.tokens), **{name: getattr(sample, name) for name in told}}
                    for sample in group.samples
                ],
            }
            self._samples.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._samples.flush()

    def dump_gap(
        self,
        path: Path,
        samples: Sequence[Sample],
        kl: np.ndarray,
        old: np.ndarray,
        boundaries: np.ndarray,
        decode,
    ) -> None:
        """Write the samples that trainer and engine disagree about most, token by token: of each sample its last ones,
        as many as `boundaries` say."""
        lines = []
        for index in np.argsort(-kl)[:WORST_SAMPLES].tolist():
            sample, (first, last) = samples[index], boundaries[index : index + 2]
            counted = slice(len(sample.tokens) - (last - first), None)
            lines.append(
                {
                    "sample": sample.id,
                    "gen_kl_error": float(kl[index]),
                    "response": decode(sample.tokens),
                    "tokens": sample.tokens[counted],
                    "train_logprobs": [round(float(x), 6) for x in old[first:last]],
                    "rollout_logprobs": [round(x, 6) for x in sample.logprobs[counted]],
                }
            )
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def rollout_values(collected: Collected) -> dict[str, float]:
    """Means over the samples that are trained on, and what became of the groups that were generated."""
    samples = [sample for group in collected.groups for sample in group.samples]
    scores = np.array([group.scores for group in collected.groups])
    lengths = np.array([len(sample.tokens) for sample in samples])
    counts = collected.counts
    judged = max(counts["groups"], 1)
    return {
        "rollout/score": float(scores.mean()),
        "rollout/reward": float(np.mean([sample.reward for sample in samples])),
        "rollout/pass_at_k": float((scores.max(axis=1) >= 1).mean()),
        "rollout/length": float(lengths.mean()),
        "rollout/longest": float(lengths.max()),
        "rollout/truncated": float(np.mean([sample.finish == "length" for sample in samples])),
        "rollout/all_right": counts["all_right"] / judged,
        "rollout/all_wrong": counts["all_wrong"] / judged,
        "rollout/filtered": (counts["all_right"] + counts["all_wrong"]) / judged,
        **{f"count/{name}": float(counts[name]) for name in ("groups", "left_over", "put_back", "stale_tokens")},
    }
