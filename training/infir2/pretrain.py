"""Continual pre-training: `python -m infir2.pretrain FLAGS`, with Megatron's own flags, on GPUs or on a CPU.

What this adds to `megatron.training.pretrain`: the machine (infir2.backend), the layers of the CPU (infir2.layers), the
checks before training (infir2.preflight), FP32 masters at a hand-off (infir2.masters), and proof that FP8 is on.
"""

import logging
import os
import socket
import sys
import time

from infir2 import backend, precision, preflight
from infir2.indexed import DataError


def add_arguments(parser):
    """Our own flags, beside Megatron's."""
    group = parser.add_argument_group("infir2")
    group.add_argument(
        "--from-scratch",
        action="store_true",
        help="allow a first launch from random weights; without it a run needs a checkpoint or --pretrained-checkpoint",
    )
    group.add_argument(
        "--data-index-iters",
        type=int,
        help="size the training set's index for this many iterations instead of --train-iters: a branch passes its "
        "parent's number, and so sees the samples that the parent would have seen",
    )
    return parser


def main() -> None:
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
        args, start = parse(kind, scale_fmt)
    except (ValueError, RuntimeError, OSError, DataError) as error:
        sys.exit(refusal(error))
    train(args, start, kind, scale_fmt, started)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(error: Exception) -> int:
    """Say why nothing will be trained; returns the exit status."""
    print(f"[infir2] error: {error}", file=sys.stderr, flush=True)
    return 2


def parse(kind: str, scale_fmt: str):
    """Megatron's arguments, checked and validated, and where to start, which every rank decides for itself."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    sys.argv += backend.arguments(kind)
    args = parse_args(add_arguments)
    start = preflight.check(args, kind, scale_fmt) if args.rank == 0 else preflight.choose_start(args)
    validate_args(args)
    set_global_variables(args)
    return args, start


def train(args, start: preflight.Start, kind: str, scale_fmt: str, started: float) -> None:
    """Train as `args` say."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, print_rank_0, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from infir2 import language_model
    from infir2.masters import load_masters
    from infir2.proof import Fp8Proof

    set_startup_timestamps(program_start=started, main_entry=time.time())
    model = gpt_config_from_args(args)
    proof = Fp8Proof(args, kind, scale_fmt)
    model.post_wrap_hooks.append(proof.attach)
    if kind == "cpu":
        from infir2 import layers

        model.transformer_layer_spec = layers.layer_spec

    def datasets(sample_counts, vp_stage=None):
        """Megatron asks for datasets once the checkpoint is loaded: the moment to set the masters."""
        if args.bf16 and start.folder is not None and not start.resumes:
            count = load_masters(proof.models, start.folder)
            print_rank_0(f"[infir2] FP32 masters: {count} tensors from {start.folder}, the others from the weights")
        return language_model.build_datasets(sample_counts, vp_stage)

    datasets.is_distributed = True
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets, ModelType.encoder_or_decoder, language_model.forward_step)


if __name__ == "__main__":  # keep the top level light: checkpoint writers may start processes that import it again
    main()
