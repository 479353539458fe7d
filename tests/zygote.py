"""Imported once by the fork server of tests/trainer.py: every run then starts with Megatron already in memory."""

import importlib
import os
import resource
import signal
import sys
import warnings

os.environ.update(INFIR2_BACKEND="cpu", OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "0"
warnings.filterwarnings("ignore")

import killing
import torch

torch.set_num_threads(1)

from infir2 import backend

backend.install()

import torch._dynamo
import torch.utils.tensorboard  # these two take 10 s, at the first optimizer and the first writer
import transformers  # noqa: F401

from infir2 import engine, language_model, layers, masters, packed_model, pretrain, proof, sft  # noqa: F401


def run_rank(argv: list[str], environment: dict[str, str], log: str) -> None:
    """What one rank does, in a process of its own: `python -m infir2.pretrain` with its output in `log`.

    A first word that is no flag names another stage, "sft", or a module of tests/ whose `run` gets the other words.
    """
    os.setpgid(0, 0)  # a kill of the group takes helper processes too
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    killing.arm(os.environ.get(killing.VARIABLE, ""))
    if limit := os.environ.get("INFIR2_TEST_FILE_LIMIT"):  # bytes: larger files fail to be written, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    stage = pretrain.Pretraining()
    if argv[0] == "sft":
        argv, stage = argv[1:], sft.FineTuning()
    elif not argv[0].startswith("-"):
        return importlib.import_module(argv[0]).run(argv[1:])
    sys.argv = [stage.name, *argv]
    engine.main(stage)
