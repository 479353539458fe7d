"""What every training stage has in common: `megatron.training.pretrain`, on GPUs or on a CPU.

A stage (infir2.pretrain, infir2.sft) is a `Stage`: its flags, its data, its step. This adds the rest: the machine
(infir2.backend), the layers of the CPU (infir2.layers), the checks before training (infir2.preflight), FP32 masters at
a hand-off (infir2.masters), and proof that FP8 is on (infir2.proof).
"""

import logging
import os
import re
import socket
import sys
import time
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from infir2 import backend, precision, preflight
from infir2.indexed import DataError


class Stage:
    """A training stage. Its module is light; what needs Megatron it imports when it is called."""

    name: str  # recorded in run.json

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The stage's own flags, beside Megatron's and those of the engine."""

    def settle(self, args: Namespace) -> None:
        """Set what follows from the flags, and refuse what cannot train (ValueError). Every rank calls it, before
        Megatron validates `args`."""

    def updates(self, args: Namespace) -> int:
        """Optimizer steps of an iteration, which the learning rate counts."""
        return 1

    def tokens_per_micro_batch(self, args: Namespace) -> int:
        """Tokens of one forward pass over all ranks that share it."""
        raise NotImplementedError

    def data(self, args: Namespace) -> dict[str, Any]:
        """Check the data; what identifies it, for run.json. Rank 0 calls it, before training."""
        raise NotImplementedError

    def datasets(self, sample_counts: tuple[int, int, int], vp_stage: int | None) -> tuple:
        """Training, validation and test data. Every rank calls it, after the checkpoint is loaded."""
        raise NotImplementedError

    def forward_step(self, data_iterator, model) -> tuple:
        """One micro-batch, as Megatron's schedules call it."""
        raise NotImplementedError

    def evaluation(self) -> dict[str, Callable]:
        """What is measured at each evaluation besides the loss: arguments of `megatron.training.pretrain`."""
        return {}


# What makes steps faster or smaller; docs/performance.md has what each brought. All of `GPU_ONLY` need one.
SWITCHES = {
    backend.FUSED_QKV_ROPE: "rotate q and k in the qkv layer's output, without splitting it first; not packed samples",
    backend.FUSED_WEIGHT_GRADIENT: "add weight gradients to the FP32 ones in the GEMMs that compute them, without apex",
    backend.FUSED_EMBEDDING: "add the embedding's gradient to the FP32 one row by row, not as a BF16 matrix (CPU too)",
    backend.FUSED_SWIGLU: "quantise SwiGLU's result and its gradient in the kernels that compute them (blockwise FP8)",
    backend.RECOMPUTE_SWIGLU: "with that, compute SwiGLU's result again in the backward pass instead of keeping it",
    backend.FUSED_NORM: "quantise an RMSNorm's result in the kernel that computes it (blockwise FP8)",
    backend.RECOMPUTE_NORMS: "with that, compute an RMSNorm's result again in the backward pass instead of keeping it",
    backend.LATE_TRANSPOSES: "transpose a weight's FP8 codes when the backward pass needs them, and do not keep both",
    backend.FAST_QUANTISATION: "quantise activations and gradients by our kernel, not TransformerEngine's",
    backend.FUSED_BIAS: "add up a bias's gradient in the kernel that quantises what it comes from (blockwise FP8)",
    backend.DEEP_GEMM: "compute blockwise FP8 layers by DeepGEMM instead of cuBLAS (needs sgl-deep-gemm and nvcc)",
    backend.FLASH_ATTENTION: "compute causal attention by FlashAttention 4 instead of cuDNN (needs flash-attn-4)",
    "--check-gradients-once": "look for NaN and Inf in the gradient norm, before the optimizer uses the gradients, and "
    "not in each loss and part of the gradients, where the CPU waits for the GPU every time (CPU too)",
}
GPU_ONLY = SWITCHES.keys() - {backend.FUSED_EMBEDDING, "--check-gradients-once"}


def add_arguments(stage: Stage, parser: ArgumentParser) -> ArgumentParser:
    """Our own flags, beside Megatron's, whose help texts have bare percent signs (0.19.2), which argparse refuses."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    group = parser.add_argument_group("infir2")
    group.add_argument(
        "--from-scratch",
        action="store_true",
        help="allow a first launch from random weights; without it a run needs a checkpoint or --pretrained-checkpoint",
    )
    group.add_argument(
        "--fused-linear-cross-entropy",
        action=BooleanOptionalAction,
        default=False,
        help="compute the output layer and the loss together, in chunks of tokens, without holding all the logits",
    )
    for flag, what in SWITCHES.items():
        group.add_argument(flag, action="store_true", help=what)
    stage.add_arguments(group)
    return parser


def main(stage: Stage) -> None:
    """Parse, check, train. Input that cannot train ends in one line and status 2, before training starts."""
    started = time.time()
    logging.basicConfig(format="[%(name)s] %(message)s", level=logging.INFO)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # one process needs no launcher
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    try:
        scale_fmt = precision.set_scale_format()
        kind = backend.install()
        args, start = parse(stage, kind, scale_fmt)
    except (ValueError, RuntimeError, OSError, DataError) as error:
        sys.exit(refusal(error))
    train(stage, args, start, kind, scale_fmt, started)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(error: Exception) -> int:
    """Say why nothing will be trained; returns the exit status."""
    print(f"[infir2] error: {error}", file=sys.stderr, flush=True)
    return 2


def parse(stage: Stage, kind: str, scale_fmt: str) -> tuple[Namespace, preflight.Start]:
    """Megatron's arguments, checked and validated, and where to start, which every rank decides for itself. Rank 0 then
    writes run.json: no flag is refused any more."""
    from megatron.training.arguments import parse_args

    sys.argv += backend.arguments(kind)
    args = parse_args(partial(add_arguments, stage))
    preflight.refuse_missing(args, preflight.SHAPE)
    stage.settle(args)
    settle_speed(args)
    if kind == "gpu":
        refuse_attention(args.attention_backend.name)
    else:
        refuse_on_cpu(args)
    if args.rank != 0:
        start = preflight.choose_start(args)
        validate(args)
        return args, start
    start, identity = preflight.check(args, stage, kind, scale_fmt)
    validate(args)
    if args.save is not None:
        preflight.record(Path(args.save), identity, arithmetic(args), start)
    return args, start


def validate(args: Namespace) -> None:
    """Megatron's own checks, and its global state. What it refuses by whatever exception is a ValueError."""
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    try:
        validate_args(args)
        set_global_variables(args)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line  # many of its assertions have no words
        words = " ".join(str(error).split()) or line
        raise ValueError(f"Megatron refuses these flags: {type(error).__name__}: {words}") from error


def arithmetic(args: Namespace) -> dict[str, Any]:
    """What computes a run's results, for run.json: it changes no formula, but the order of sums or the kernels."""
    names = [*map(_name, SWITCHES), "fused_linear_cross_entropy", "micro_batch_size", "max_tokens_per_gpu"]
    return {name: getattr(args, name, None) for name in names}


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def refuse_on_cpu(args: Namespace) -> None:
    """Switches whose kernels are a GPU's, and would be passed over, or fail when the model is built."""
    chosen = [flag for flag in SWITCHES if flag in GPU_ONLY and getattr(args, _name(flag))]
    if chosen:
        raise ValueError(f"{', '.join(chosen)}: needs a GPU, and this run is on the CPU; leave it out")


def settle_speed(args: Namespace) -> None:
    """What the flags that make a step faster need. Whatever they say, a gradient norm is checked (infir2.backend)."""
    if args.fused_swiglu_quantisation and args.te_precision_config_file:
        raise ValueError(
            f"{backend.FUSED_SWIGLU} is for models whose layers are all in FP8, and "
            f"{args.te_precision_config_file} names each layer's precision. Leave one of them out."
        )
    for wanted, flag, needed, basis in (
        (args.recompute_swiglu, backend.RECOMPUTE_SWIGLU, args.fused_swiglu_quantisation, backend.FUSED_SWIGLU),
        (args.recompute_norms, backend.RECOMPUTE_NORMS, args.fused_norm_quantisation, backend.FUSED_NORM),
    ):
        if wanted and not needed:
            raise ValueError(f"{flag} needs {basis}: only what that computes is computed again")
    if args.fused_embedding_gradient and not args.fused_linear_cross_entropy:
        raise ValueError(
            f"{backend.FUSED_EMBEDDING} needs --fused-linear-cross-entropy: the gradient of another head that shares "
            "the embedding's weight would be lost"
        )
    if not args.check_gradients_once:
        return
    if args.clip_grad <= 0:
        raise ValueError(
            f"--check-gradients-once needs the gradient norm: --clip-grad is {args.clip_grad}, not above 0"
        )
    args.check_for_nan_in_loss_and_grad = False


def refuse_attention(chosen: str) -> None:
    """Under `flash`, and perhaps under `auto`, TransformerEngine calls FlashAttention 4 where it is installed, whose
    output is then zero everywhere (infir2.speed.flash_attention)."""
    if chosen in ("flash", "auto") and any(metadata.distributions(name="flash-attn-4")):
        raise ValueError(
            f"--attention-backend {chosen}: flash-attn-4 is installed, and what TransformerEngine gets of it is zero "
            f"(NVIDIA/TransformerEngine#3528). Take fused for it; {backend.FLASH_ATTENTION} calls it right."
        )


def train(stage: Stage, args: Namespace, start: preflight.Start, kind: str, scale_fmt: str, started: float) -> None:
    """Train as `args` say."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    set_startup_timestamps(program_start=started, main_entry=time.time())
    model, proof = model_config(args, kind, scale_fmt)

    def datasets(sample_counts, vp_stage=None):
        """Megatron asks for datasets once the checkpoint is loaded: the moment to set the masters."""
        restore_masters(args, proof.models, start)
        return stage.datasets(sample_counts, vp_stage)

    datasets.is_distributed = True  # read by Megatron: every rank calls it
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets, ModelType.encoder_or_decoder, stage.forward_step, **stage.evaluation())


def model_config(args: Namespace, kind: str, scale_fmt: str) -> tuple[Any, Any]:
    """Megatron's description of the model with this machine's layers, and the proof of its FP8."""
    from megatron.training.argument_utils import gpt_config_from_args

    from infir2.proof import Fp8Proof

    model = gpt_config_from_args(args)
    model.transformer.fused_single_qkv_rope = args.fused_qkv_rope  # Megatron has no flag for it
    proof = Fp8Proof(args, kind, scale_fmt)
    model.post_wrap_hooks.append(proof.attach)
    if kind == "gpu" and args.fused_swiglu_quantisation:
        from infir2.speed import quantised_swiglu

        model.post_wrap_hooks.append(partial(quantised_swiglu.attach, recompute=args.recompute_swiglu))
    if kind == "gpu" and args.recompute_norms:
        from infir2.speed import te_quantisation

        model.post_wrap_hooks.append(te_quantisation.attach_norms)
    if kind == "cpu":
        from infir2 import layers

        model.transformer_layer_spec = layers.layer_spec
    return model, proof


def restore_masters(args: Namespace, models: list, start: preflight.Start) -> None:
    """At a hand-off, set the FP32 masters to the parent's. To be called when its checkpoint is loaded."""
    from megatron.training import print_rank_0

    from infir2.masters import load_masters

    if args.bf16 and start.folder is not None and not start.resumes:
        count = load_masters(models, start.folder)
        print_rank_0(f"[infir2] FP32 masters: {count} tensors from {start.folder}, the others from the weights")
