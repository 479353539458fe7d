"""The flags of reinforcement learning, with slime's names, and what follows from them.

The controller reads these alone. The trainers read them beside Megatron's, as every stage does: `ReinforcementLearning`
is that stage.
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from infir2 import engine, hf, packing, qwen2, receipts, serving
from infir2.data.pipeline import json_object
from infir2.rl import rewards
from infir2.rl.grpo import Objective
from infir2.rl.rollout import Plan, Sampling

MAX_GEN_KL = {"fp8": 0.003, "bf16": 0.002}  # by the engine's precision; docs/RL.md has the sources


def add_arguments(parser: ArgumentParser) -> None:
    """Everything that is not Megatron's, except how many trainers there are (`add_cluster_arguments`)."""
    add = parser.add_argument
    add("--hf-checkpoint", type=Path, help="Hugging Face folder of the engine's model: BF16, or block FP8")

    add("--prompt-data", type=Path, help=".jsonl of prompts and labels (tools/prepare_data.py rl)")
    add("--input-key", default="prompt", help="field with the prompt, or its messages")
    add("--label-key", default="label", help="field with the right answer")
    add(
        "--apply-chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="""variables for the chat template, such as '{"enable_thinking": false}'""",
    )
    add("--rollout-shuffle", action="store_true", help="another order in each epoch")
    add("--rollout-max-prompt-len", type=int, default=2048, help="tokens; longer prompts are refused")

    add("--num-rollout", type=int, help="steps: each generates, and trains on what was generated")
    add("--rollout-batch-size", type=int, help="prompts of a step")
    add("--n-samples-per-prompt", type=int, default=8)
    add("--rollout-max-response-len", type=int, help="tokens")
    add("--rollout-temperature", type=float, default=1.0)
    add("--over-sampling-batch-size", type=int, help="prompts begun at once (--rollout-batch-size)")
    add("--dynamic-sampling", action=BooleanOptionalAction, default=False, help="train only on differing scores")
    add("--max-sampling-rounds", type=int, default=10, help="give up after this many batches without enough groups")
    add("--max-policy-lag", type=int, default=1, help="steps after which what was left over is generated again")

    rewards.add_arguments(parser)
    add("--overlong-buffer-len", type=int, default=0, help="last tokens of a response that DAPO's penalty covers")

    add("--advantage-estimator", choices=["grpo"], default="grpo")
    add("--eps-clip", type=float, default=0.2)
    add("--eps-clip-high", type=float, help="(--eps-clip)")
    add("--use-tis", action="store_true", help="truncated importance sampling: correct for the engine's probabilities")
    add("--tis-clip", type=float, default=2.0)
    add("--tis-clip-low", type=float, default=0.0)
    add("--use-dynamic-batch-size", action="store_true", help="pack up to --max-tokens-per-gpu; always on")
    add("--max-tokens-per-gpu", type=int, help="tokens of a micro-batch on each GPU (times CP)")

    add("--max-gen-kl", type=float, help=f"gate on the gap between trainer and engine {MAX_GEN_KL}")
    add("--max-gen-kl-steps", type=int, default=3, help="steps above the gate, one after the other, that end the run")
    add("--check-weights", action="store_true", help="after each sync compare the engine's weights with the trainer's")

    add("--eval-prompt-data", nargs=2, action="append", default=[], metavar=("NAME", "PATH"))
    add("--eval-limit", type=int, help="only the first prompts of each evaluation set")
    add("--n-samples-per-eval-prompt", type=int, default=1)
    add("--eval-max-response-len", type=int, help="tokens (--rollout-max-response-len)")
    add("--eval-temperature", type=float, default=0.0)
    add("--eval-top-p", type=float, default=1.0)

    add("--metrics-file", type=Path, help=".jsonl, one line a step (beside --save)")


def add_cluster_arguments(parser: ArgumentParser) -> None:
    """Where trainers and engines run. The controller alone reads these."""
    add = parser.add_argument
    add("--actor-num-nodes", type=int, default=1)
    add("--actor-num-gpus-per-node", type=int, default=1, help="trainers on each node")
    add("--cpu", action="store_true", help="a trainer takes a CPU; the engine is a transformers model on a CPU")
    add("--colocate", action="store_true", help="engines on the trainers' GPUs, in turns with them")
    add("--rollout-num-gpus", type=int, help="GPUs of engines that are apart from the trainers")
    add("--rollout-num-gpus-per-engine", type=int, default=1)
    add("--engine-seed", type=int, default=1236, help="of SGLang's random numbers; they do not repeat even so")
    add("--sglang-python", default=serving.sglang_python(), help="the Python that has SGLang (SGLANG_PYTHON, or ours)")
    add("--sglang-mem-fraction-static", type=float, default=0.7)
    add(
        "--sglang-activation-scales",
        choices=["trainer", "sglang"],
        default="trainer",
        help="of an FP8 engine: as in training, bit for bit, or FP32 ones as SGLang has them",
    )
    add("--sglang-arguments", default="", help="more flags for SGLang's server, in one word")
    add("--wait-seconds", type=float, default=30, help="for nodes to join and GPUs to be free")


def check(args: Namespace) -> None:
    """Refuse (ValueError) what cannot train, and fill in what follows from other flags."""
    required = "hf_checkpoint prompt_data num_rollout rollout_batch_size rollout_max_response_len max_tokens_per_gpu"
    required += " tokenizer_model"
    if missing := [name for name in required.split() if getattr(args, name) is None]:
        raise ValueError("missing: " + ", ".join("--" + name.replace("_", "-") for name in missing))
    if args.n_samples_per_prompt < 2:
        raise ValueError("--n-samples-per-prompt must be at least 2: a group's mean is its baseline")
    if args.rollout_temperature <= 0:
        raise ValueError("--rollout-temperature must be above 0: greedy samples of a group are all the same")
    args.eps_clip_high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    args.over_sampling_batch_size = args.over_sampling_batch_size or args.rollout_batch_size
    if args.over_sampling_batch_size < args.rollout_batch_size:
        raise ValueError(
            f"--over-sampling-batch-size {args.over_sampling_batch_size} is below --rollout-batch-size "
            f"{args.rollout_batch_size}"
        )
    args.eval_max_response_len = args.eval_max_response_len or args.rollout_max_response_len
    if not 0 <= args.overlong_buffer_len <= args.rollout_max_response_len:
        raise ValueError(f"--overlong-buffer-len {args.overlong_buffer_len} is not within the response length")


def objective(args: Namespace) -> Objective:
    return Objective(args.eps_clip, args.eps_clip_high, args.use_tis, args.tis_clip_low, args.tis_clip)


def plan(args: Namespace, seed: int) -> Plan:
    return Plan(
        groups=args.rollout_batch_size,
        over_sampling=args.over_sampling_batch_size,
        filter=args.dynamic_sampling,
        rounds=args.max_sampling_rounds,
        response=args.rollout_max_response_len,
        overlong_buffer=args.overlong_buffer_len,
        seed=seed,
        lag=args.max_policy_lag,
    )


def sampling(args: Namespace) -> Sampling:
    """Of training: the whole distribution, since the loss uses the probability of every token under it."""
    return Sampling(args.rollout_temperature)


def engine_precision(folder: Path, scale_fmt: str) -> str:
    """ "fp8" or "bf16": what the model in `folder` is. ValueError for FP8 with other scales than training's."""
    reader = hf.HFReader(folder)
    config = reader.config
    if "quantization_config" not in config:
        return "bf16"
    found = hf.scale_format_of(config)
    if found != scale_fmt:
        raise ValueError(
            f"--hf-checkpoint {folder} has {found} scales, this run has {scale_fmt}; cast the model again with "
            "tools/bf16_cast_fp8.py, or set SCALE_FMT"
        )
    if kept := [name for name in reader.names if hf.is_fp8_linear(name) and reader.dtype(name) not in hf.FP8_DTYPES]:
        raise ValueError(
            f"--hf-checkpoint {folder} keeps {kept[0]!r} in BF16, the trainers hand over every linear layer in FP8; "
            "cast the model again with tools/bf16_cast_fp8.py --precision fp8, or give a BF16 folder"
        )
    return "fp8"


class ReinforcementLearning(engine.Stage):
    """The trainers' stage: no data of its own, the controller sends each step's."""

    name = "reinforcement learning"

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_arguments(parser)

    def settle(self, args: Namespace) -> None:
        check(args)
        if args.pipeline_model_parallel_size > 1:
            raise ValueError("samples pack to different lengths, which pipeline parallelism 1 alone takes; use TP")
        if args.fused_linear_cross_entropy:
            raise ValueError(
                "leave --fused-linear-cross-entropy out: it sums the tokens' losses, and each one is needed"
            )
        if not args.calculate_per_token_loss:
            raise ValueError("pass --calculate-per-token-loss: every token of the batch weighs the same")
        if args.overlap_param_gather:
            raise ValueError("drop --overlap-param-gather: the engines need all weights right after the step")
        samples = args.rollout_batch_size * args.n_samples_per_prompt
        args.global_batch_size = args.global_batch_size or samples
        if samples % args.global_batch_size:
            raise ValueError(
                f"a step has {args.rollout_batch_size} x {args.n_samples_per_prompt} = {samples} samples, no multiple "
                f"of --global-batch-size {args.global_batch_size}"
            )
        longest = args.rollout_max_prompt_len + args.rollout_max_response_len
        room = min(args.seq_length, args.max_tokens_per_gpu * args.context_parallel_size)
        if longest > room + 1:
            raise ValueError(
                f"a prompt of {args.rollout_max_prompt_len} and a response of {args.rollout_max_response_len} tokens "
                f"do not fit into {room}, the smaller of --seq-length and --max-tokens-per-gpu x CP"
            )
        args.micro_batch_size = 1  # how many samples share a micro-batch follows from their lengths
        args.train_iters = args.num_rollout
        if args.lr_decay_iters is None:
            args.lr_decay_iters = args.num_rollout * (samples // args.global_batch_size)
        args.dataloader_type = "external"
        args.eval_iters = 0
        # The controller writes to W&B; Megatron would open an empty run of its own in the last trainer.
        args.rl_wandb_project, args.wandb_project = args.wandb_project, ""

    def updates(self, args: Namespace) -> int:
        return args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size

    def tokens_per_micro_batch(self, args: Namespace) -> int:
        return packing.total_multiple(args.tensor_model_parallel_size, args.context_parallel_size)

    def data(self, args: Namespace) -> dict[str, Any]:
        """What fixes the results, for run.json; refuses an engine of another model or scale format."""
        from infir2.precision import scale_format

        folder = args.hf_checkpoint
        found, wanted = qwen2.Shape.from_folder(folder), qwen2.Shape.from_folder(Path(args.tokenizer_model))
        if found != wanted:
            raise ValueError(f"--hf-checkpoint {folder} is {found}; the model that is trained is {wanted}")
        names = (
            "n_samples_per_prompt rollout_batch_size rollout_max_response_len rollout_temperature dynamic_sampling "
            "over_sampling_batch_size rm_type custom_rm_path overlong_buffer_len eps_clip eps_clip_high use_tis "
            "tis_clip tis_clip_low rollout_shuffle apply_chat_template_kwargs input_key label_key"
        )
        return {
            "engine_precision": engine_precision(folder, scale_format()),
            "prompt_data": {str(args.prompt_data): receipts.sha256_file(args.prompt_data)},
            **{name: getattr(args, name) for name in names.split()},
        }
