"""Reinforcement learning: `python -m infir2.rl FLAGS`, with Megatron's own flags and those of infir2.rl.arguments.

This is the controller. It holds no weights: trainers (Megatron, infir2.rl.policy) and engines (SGLang, or a
transformers model on a CPU) are Ray actors. A step generates, scores, trains, and hands the new weights to the engines,
which hold the very codes that training computes with. How far the engines' probabilities are from the trainers' is
measured in every step, and ends the run where it says that they no longer are the same model.

A checkpoint is Megatron's, and the state of the data beside it. The same command resumes from the last one; on a CPU
the run then goes on exactly as if it had not ended.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from infir2 import files, ray_launch
from infir2.data.chat import ChatTokenizer
from infir2.indexed import DataError
from infir2.precision import scale_format
from infir2.ray_cluster import Refusal
from infir2.rl import arguments as rl_arguments
from infir2.rl import grpo, rewards, rollout
from infir2.rl.actors import Lost, SGLangEngines, Trainers, TransformersEngines
from infir2.rl.log import StepLog

log = logging.getLogger("rl")

SHOWN_SAMPLES = 4  # groups of each step that rollouts.jsonl holds
STATE_FOLDER = "rollout_state"
STORE_BYTES = 1 << 30  # a step of 2,048 responses of 16,384 tokens, 12 bytes each, is 0.4 GB


class GapError(Exception):
    """Trainer and engine no longer compute the same model."""


class Inputs:
    """What a run reads before anything is started: prompts, and the processes that score."""

    def __init__(self, args: Namespace) -> None:
        self.tokenizer = ChatTokenizer(args.tokenizer_model, args.apply_chat_template_kwargs)
        self.prompts = self._prompts(args, args.prompt_data, None)
        self.evaluations = {
            name: self._prompts(args, Path(path), args.eval_limit) for name, path in args.eval_prompt_data
        }
        self.rewards = rewards.pool_from(args)

    def _prompts(self, args: Namespace, path: Path, limit: int | None) -> rollout.Prompts:
        needs_label = rewards.needs_label(rewards.name_from(args))
        keys = {"input_key": args.input_key, "label_key": args.label_key, "needs_label": needs_label}
        return rollout.Prompts(path, self.tokenizer, **keys, longest=args.rollout_max_prompt_len, limit=limit)


class Run:
    """A run from its first step to its last. Trainers and engines are started, and hold the same weights."""

    def __init__(self, args: Namespace, inputs: Inputs, trainers: Trainers, engines) -> None:
        self.args, self.trainers, self.engines = args, trainers, engines
        self.decode = text_of(inputs.tokenizer)
        self.evaluations, self.rewards = inputs.evaluations, inputs.rewards
        self.source = rollout.Source(inputs.prompts, args.n_samples_per_prompt, args.seed, args.rollout_shuffle)
        stop = in_words(engines.stop, inputs.tokenizer)
        self.plan = replace(rl_arguments.plan(args, args.seed), stop=stop)
        self.sampling = rl_arguments.sampling(args)
        self.objective = rl_arguments.objective(args)
        precise = engines.precision
        self.gate = rl_arguments.MAX_GEN_KL[precise] if args.max_gen_kl is None else args.max_gen_kl
        self.above_gate = 0
        self.folder = args.metrics_file.parent
        self.since, self.seconds = time.perf_counter(), dict[str, float]()  # of the step that is under way
        log.info(
            "%d prompts, engine in %s, gate on gen_kl_error %g, responses end at %s",
            *(len(inputs.prompts), precise, self.gate, stop),
        )
        for form, count in inputs.prompts.asked_forms().items():
            log.info("%d prompts ask for %s: answers are read there, and in boxes", count, form)

    # The algorithm

    def train(self) -> None:
        """All steps that are left."""
        args = self.args
        first = args.iteration
        self.restore(first)
        with StepLog(args, first) as self.log:
            self.sync()
            if first == 0:
                self.evaluate(0)
            self.since, self.seconds = time.perf_counter(), {}
            for step in range(first, args.num_rollout):
                self.step(step)

    def step(self, step: int) -> None:
        """One step of the algorithm; `step` counts from 0, and is the version of the policy that generates."""
        with self.phase("generation"):
            collected = rollout.collect(
                self.source, self.engines, self.rewards.score, self.decode, self.plan, self.sampling, step
            )
        samples = [sample for group in collected.groups for sample in group.samples]
        batch = rollout.training_batch(collected.groups, self.source.prompts)
        with self.phase("release"):
            self.engines.make_room()
        with self.phase("training"):
            if len(batch.tokens) > self.args.global_batch_size:  # several updates: the ratios' denominator first
                batch = batch.with_old(self.trainers.log_probabilities(batch))
            metrics, seen = self.trainers.train(batch)
        gap, of_engine = self.check_gap(step, samples, batch, seen if batch.old is None else batch.old)
        self.sync()
        done = step + 1
        last = done == self.args.num_rollout
        if self.evaluations and (last or done % self.args.eval_interval == 0):
            self.evaluate(done)
        now = time.perf_counter()
        self.log.step(done, collected, gap, of_engine, metrics, self.seconds, now - self.since)
        self.log.samples(done, collected.groups[:SHOWN_SAMPLES], self.source.prompts, self.decode)
        self.since, self.seconds = now, {}
        if last or done % self.args.save_interval == 0:  # after the log, since a resume does not come back to this step
            with self.phase("saving"):
                self.save(done)

    def sync(self) -> None:
        """Hand the trainers' weights to the engines."""
        with self.phase("sync"):
            self.engines.update(self.trainers)
        if self.args.check_weights:
            with self.phase("checking weights"):
                self.engines.check(self.trainers)

    def check_gap(self, step: int, samples: list[rollout.Sample], batch, old: np.ndarray) -> tuple[grpo.Gap, bool]:
        """Measure the gap on the tokens that this step's policy generated, and hold it against the gate. Where all were
        left over, the gap shows the updates since too, and is no fault of the engine: it is of all tokens, and False.
        """
        versions, counts = zip(*(part for sample in samples for part in sample.versions), strict=True)
        fresh = np.repeat(versions, counts) == step
        gated = bool(fresh.any())
        if not gated:
            fresh[:] = True
        ends = np.concatenate([[0], np.cumsum(fresh)])[batch.boundaries]
        chosen = [sample for sample, count in zip(samples, np.diff(ends), strict=True) if count]
        old, ours, boundaries = old[fresh], batch.rollout[fresh], np.unique(ends)
        gap = grpo.gap(old, ours, boundaries, self.objective)
        if not gated:
            return gap, False
        if gap.gen_kl_low <= self.gate:
            self.above_gate = 0
            return gap, True
        self.above_gate += 1
        path = self.folder / f"gap_step_{step + 1:07d}.jsonl"
        self.log.dump_gap(path, chosen, grpo.sample_kl(old, ours, boundaries), old, boundaries, self.decode)
        said = (
            f"step {step + 1}: gen_kl_error {gap.gen_kl_error:.5f} (at least {gap.gen_kl_low:.5f} with its noise) is "
            f"above --max-gen-kl {self.gate:g} "
            f"(step {self.above_gate} of {self.args.max_gen_kl_steps} in a row); worst samples in {path}"
        )
        if self.above_gate >= self.args.max_gen_kl_steps:
            raise GapError(f"{said}. Compare the engine's weights with --check-weights; docs/RL.md, 'The gap'")
        log.warning("%s", said)
        return gap, True

    def evaluate(self, step: int) -> None:
        """Score the evaluation sets with settings of their own."""
        args = self.args
        chosen = rollout.Sampling(args.eval_temperature, args.eval_top_p)
        for name, prompts in self.evaluations.items():
            with self.phase("evaluation"):
                found = rollout.evaluate(
                    prompts,
                    self.engines,
                    self.rewards.score,
                    self.decode,
                    args.n_samples_per_eval_prompt,
                    args.eval_max_response_len,
                    chosen,
                    args.seed,
                )
            self.log.evaluation(step, name, found)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Its seconds go into the step's."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    # State

    def state_file(self, iteration: int) -> Path:
        return Path(self.args.save) / STATE_FOLDER / f"iter_{iteration:07d}.json"

    def save(self, iteration: int) -> None:
        """The data's state first: a checkpoint that is complete has one."""
        path = self.state_file(iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps({"source": self.source.state(), "above_gate": self.above_gate}))
        self.trainers.save(iteration)

    def restore(self, iteration: int) -> None:
        if iteration == 0:
            return
        path = self.state_file(iteration)
        if not path.is_file():
            raise Refusal(f"the checkpoint of step {iteration} has no {path}: which prompts it saw is not known")
        state = json.loads(path.read_text())
        self.source.restore(state["source"])
        self.above_gate = state["above_gate"]
        log.info("resuming after step %d: %d groups begun", iteration, self.source.begun)


def in_words(tokens: Iterable[int], tokenizer: ChatTokenizer) -> str:
    """Ids with their texts: "151643 <|endoftext|>, 151645 <|im_end|>"."""
    return ", ".join(f"{token} {tokenizer.decode([token])}" for token in sorted(tokens))


def text_of(tokenizer: ChatTokenizer):
    """A function from a response's tokens to its text, without the end-of-turn token; other special tokens stay."""
    end = tokenizer.special_tokens[tokenizer.end_of_turn]

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] == end else tokens)

    return decode


# The command line


def parse(words: list[str]) -> tuple[Namespace, list[str]]:
    """The controller's flags, and the words for the trainers: theirs and Megatron's."""
    cluster = ArgumentParser(prog="infir2.rl", add_help=False, allow_abbrev=False)
    rl_arguments.add_cluster_arguments(cluster)
    args, rest = cluster.parse_known_args(words)
    parser = ArgumentParser(prog="infir2.rl", parents=[cluster], description=__doc__.split("\n\n")[0])
    rl_arguments.add_arguments(parser)
    parser.add_argument("--tokenizer-model", type=Path, metavar="DIR", help="the trainers'")
    parser.parse_known_args(rest, namespace=args)
    rl_arguments.check(args)
    return args, rest


def run(args: Namespace, inputs: Inputs, words: list[str]) -> None:
    """On the Ray that we are connected to."""
    shape = (args.actor_num_nodes, args.actor_num_gpus_per_node)
    wait = 0 if ray_launch.own_ray() else args.wait_seconds
    group = ray_launch.reserve(*shape, "CPU" if args.cpu else "GPU", wait)
    logs = args.metrics_file.parent / "logs"
    if not args.cpu and not args.colocate:  # SGLang sets these for itself, and both sides of a group must agree
        os.environ.update(NCCL_CUMEM_ENABLE="0", NCCL_NVLS_ENABLE="0")
    trainers = Trainers(group, *shape, args.cpu, logs)
    engines = TransformersEngines(logs) if args.cpu else SGLangEngines(args, trainers, group, logs)
    try:
        engines.start(args.hf_checkpoint, scale_format(), args.engine_seed)
        trainers.prepare(words, os.getcwd())
        engines.wait()
        settings = trainers.build()
        engines.connect(trainers)
        settings.metrics_file = args.metrics_file
        try:
            Run(settings, inputs, trainers, engines).train()
        except (ValueError, OSError, DataError) as error:  # what was given is checked: this is no refusal of it
            raise Lost(traceback.format_exc().strip()) from error
    finally:
        engines.close()
        for actor in trainers.actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def main() -> int:
    """Parse, connect, run. What cannot run ends in one line and status 2, a run that broke in status 1."""
    logging.basicConfig(format="[%(name)s] %(message)s", level=logging.INFO)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        args, words = parse(sys.argv[1:])
        if args.metrics_file is None:
            raise ValueError("missing: --metrics-file")
        args.metrics_file = args.metrics_file.resolve()
        inputs = Inputs(args)
        with ray_launch.session(args.actor_num_gpus_per_node + 1, args.cpu, STORE_BYTES):
            run(args, inputs, words)
    except (Refusal, ValueError, DataError, rewards.RewardError, FileNotFoundError) as error:
        log.error("error: %s", error)
        return 2
    except (Lost, GapError, rollout.RolloutError, ray.exceptions.RayError) as error:
        log.error("error: %s. The same command resumes from the last checkpoint.", error)
        return 1
    return 0
