"""Runs of `infir2.pretrain` for tests: real processes, forked from one that has imported Megatron already."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import launch
import torch

from infir2.checkpoint import TorchDist
from infir2.events import read_scalars

# Python 3.12's fork server does not hand sys.path to the modules that it imports first, and passes over their failure.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["zygote"])

# A model small enough for 30 ms a step that still keeps the 128 rule at TP2: 2 heads and 2 KV groups of size 128.
MODEL = (
    "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 2 --group-query-attention "
    "--num-query-groups 2 --kv-channels 128 --normalization RMSNorm --swiglu --position-embedding-type rope "
    "--rotary-base 1000000 --norm-epsilon 1e-6 --add-qkv-bias --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --vocab-size 256 --padded-vocab-size 256 --tokenizer-type NullTokenizer "
    "--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 4 "
    "--no-create-attention-mask-in-dataloader --lr 3e-3 --min-lr 3e-4 --lr-decay-style WSD "
    "--lr-wsd-decay-style cosine --lr-warmup-iters 4 --lr-wsd-decay-iters 6 --weight-decay 0.1 --clip-grad 1.0 "
    "--log-interval 1 --eval-interval 1000 --eval-iters 0 --seed 1236"
).split()
FP8 = ["--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]


class Training:
    """One launch: its processes and its log."""

    def __init__(self, argv: list[str], log: Path, ranks: int = 1, environment: dict[str, str] | None = None):
        self.log = log
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= environment or {}
        self.processes = [
            _context.Process(
                target=launch.run_rank,
                args=(argv, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log)),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 1200) -> int:
        """Exit status of the run (the first that is not 0); kills it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None or process.exitcode != 0:
                status = process.exitcode
                self.kill()
                return -1 if status is None else status
        return 0

    def kill(self) -> None:
        """SIGKILL to every process of the run, as a power cut or the kernel's out-of-memory killer would."""
        for process in self.processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has not yet made its group
                    process.kill()
            process.join()


def train(argv: list[str], log: Path, ranks: int = 1, **environment: str) -> None:
    """Run to the end; fails the test with the end of the log where the run fails."""
    status = Training(argv, log, ranks, environment).wait()
    assert status == 0, f"status {status}\n" + log.read_text(errors="replace")[-4000:]


def losses(run: Path) -> dict[int, float]:
    return read_scalars(run / "tensorboard")["lm loss"]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included."""
    stored = TorchDist(checkpoint)
    return {key: stored.read(key) for key in stored.keys}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_megatron(module: str, function: str, *arguments):
    """Result of `module.function(*arguments)` in a process that has Megatron; modules of tests/ and tools/ too."""
    ours, theirs = _context.Pipe(duplex=False)
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tools")]
    process = _context.Process(target=launch.call, args=(path, module, function, arguments, theirs))
    process.start()
    theirs.close()
    try:
        succeeded, result = ours.recv()
    except EOFError:
        raise AssertionError(f"{module}.{function} ended without a result") from None
    finally:
        process.join()
    assert succeeded, result
    return result
