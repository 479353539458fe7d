"""Time whole training steps, arm against arm, on this machine, through the engine that trains.

    python tools/bench_step.py --shape 1.5B --seq-length 8192 --micro-batch-size 2 --output out/1.5B-8k
    python tools/bench_step.py --shape 7B --seq-length 32768 --layers 4 --arms stock-bf16-ce bf16 fp8 --output out/7B
    python tools/bench_step.py --arm 'fp8-large=fp8 --fused-linear-cross-entropy --micro-batch-size 4' --output out/4
    python tools/bench_step.py --arm 'safe=fp8 --flash-attention-4 NVTE_ALLOW_NONDETERMINISTIC_ALGO=0' --output out/safe

An arm is a named precision, flags, and variables (NAME=VALUE). "stock" arms have none of this repository's work on
speed; the first arm is the control. Models of several arms do not fit into one GPU, so each arm is a process of
`infir2.pretrain`, and they alternate: every round runs each arm once, for `--warm-up` and then `--timed` steps. The
next process imports while the one before it runs and touches the GPU when told to. A step's time is from the start of
its first forward pass to that of the next step's, waiting for the GPU at both: data, optimizer and logging included.
Each arm's first round ends with a profiled step.

Writes OUTPUT.json after every arm, so that a run that is cut off, or an arm that fails, costs nothing else; prints
medians, quartiles, the ratios of steps with the same number in the same round, and where the time goes. Without
--data the tokens are random; every arm sees the same ones in the same order, and its losses are recorded.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from infir2 import backend, engine, files, one_rank, precision
from infir2.data.pretraining import positive
from infir2.indexed import DataError, IndexedReader, IndexedWriter
from infir2.qwen2 import Shape, megatron_flags
from infir2.speed import kernel_profile

REPO = Path(__file__).resolve().parents[1]
log = logging.getLogger("bench_step")

SHAPES = {
    "1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, True, 1e6, 1e-6, 32768),
    "7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, False, 1e6, 1e-6, 32768),
    "tiny": Shape(2, 128, 256, 2, 2, 128, 512, True, 1e6, 1e-6, 32768),
}


@dataclass(frozen=True)
class Arm:
    """One way to train: a precision of `infir2.precision`, flags, and variables of its environment, NAME=VALUE."""

    precision: str
    flags: tuple[str, ...]
    variables: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> tuple[str, "Arm"]:
        """Of NAME=PRECISION FLAG... VARIABLE=VALUE..."""
        name, _, rest = text.partition("=")
        words = shlex.split(rest)
        if not words:
            raise argparse.ArgumentTypeError(f"'{text}' is not NAME=PRECISION FLAG...")
        if not name or "/" in name:
            raise argparse.ArgumentTypeError(f"'{name}' names a folder: take letters and digits")
        if words[0] not in precision.PRECISIONS:
            raise argparse.ArgumentTypeError(f"unknown precision '{words[0]}'; known: {' '.join(precision.PRECISIONS)}")
        variables = tuple(word for word in words[1:] if re.match(r"[A-Z][A-Z0-9_]*=", word))
        return name, cls(words[0], tuple(word for word in words[1:] if word not in variables), variables)


STOCK = ("--no-gradient-accumulation-fusion",)
NATIVE = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
OURS = ("--fused-linear-cross-entropy", "--fused-weight-gradient", "--check-gradients-once")
SWIGLU, GRAPHS, DEEP_GEMM = ("--fused-swiglu-quantisation",), ("--cuda-graph-impl", "local"), ("--deep-gemm",)
FASTER = ("--flash-attention-4", "--fused-qkv-rope", "--fused-embedding-gradient")
KEEP_LESS = ("--recompute-swiglu", "--recompute-norms", "--transpose-weights-late")
FASTER_FP8 = (*OURS, *SWIGLU, *DEEP_GEMM, "--fused-norm-quantisation", "--fast-quantisation", *FASTER)
ARMS = {
    "stock-bf16": Arm("bf16", STOCK),
    "stock-bf16-ce": Arm("bf16", (*STOCK, *NATIVE)),
    "stock-fp8": Arm("fp8", STOCK),
    "stock-fp8-ce": Arm("fp8", (*STOCK, *NATIVE)),
    "stock-fp8-gather": Arm("fp8", (*STOCK, "--fp8-param-gather")),
    "stock-fp8-ce-gather": Arm("fp8", (*STOCK, *NATIVE, "--fp8-param-gather")),
    "bf16-accumulation": Arm("bf16", (*NATIVE, "--fused-weight-gradient")),
    "bf16-head": Arm("bf16", (*STOCK, "--fused-linear-cross-entropy")),
    "bf16": Arm("bf16", OURS),
    "fp8": Arm("fp8", (*OURS, *SWIGLU)),
    "bf16-graphs": Arm("bf16", (*OURS, *GRAPHS)),
    "fp8-graphs": Arm("fp8", (*OURS, *SWIGLU, *GRAPHS)),
    "bf16-faster": Arm("bf16", (*OURS, *FASTER)),
    "fp8-faster": Arm("fp8", FASTER_FP8),
    "fp8-faster-recompute": Arm("fp8", (*FASTER_FP8, "--recompute-swiglu")),
    "bf16-faster-graphs": Arm("bf16", (*OURS, *FASTER, *GRAPHS)),
    "fp8-faster-graphs": Arm("fp8", (*FASTER_FP8, *GRAPHS)),
    "fp8-faster-bias": Arm("fp8", (*FASTER_FP8, "--fused-bias-gradient")),
    "fp8-faster-bias-graphs": Arm("fp8", (*FASTER_FP8, "--fused-bias-gradient", *GRAPHS)),
    "fp8-faster-less": Arm("fp8", (*FASTER_FP8, *KEEP_LESS)),
    "fp8-faster-less-bias": Arm("fp8", (*FASTER_FP8, *KEEP_LESS, "--fused-bias-gradient")),
    "fp8-faster-less-graphs": Arm("fp8", (*FASTER_FP8, *KEEP_LESS, *GRAPHS)),
    "fp8-faster-less-bias-graphs": Arm("fp8", (*FASTER_FP8, *KEEP_LESS, "--fused-bias-gradient", *GRAPHS)),
    "fp8-faster-recompute-graphs": Arm("fp8", (*FASTER_FP8, "--recompute-swiglu", *GRAPHS)),
    "fp8-deep-gemm": Arm("fp8", (*OURS, *SWIGLU, *DEEP_GEMM)),
    "stock-bf16-ce-flash": Arm("bf16", (*STOCK, *NATIVE, "--flash-attention-4")),
    "fp8-without-swiglu": Arm("fp8", OURS),
    "stock-bf16-ce-unchecked": Arm("bf16", (*STOCK, *NATIVE, "--no-check-for-nan-in-loss-and-grad")),
    "fp8-hybrid": Arm("fp8-hybrid", OURS),
    "fp8-current": Arm("fp8-current", OURS),
    "fp8-ffn": Arm("fp8-ffn", OURS),
}
ARM_SECONDS = 600.0  # an arm that takes longer hangs
DEFAULT_ARMS = ("stock-bf16-ce", "stock-fp8-ce", "bf16", "fp8")


# One arm: a process that runs the engine


class Measured(Exception):
    """Ends the training loop: everything is measured."""


class Clock:
    """The times of steps, and after them one profiled step.

    `begin` is called before every forward pass. Seconds of the timed steps are in `seconds`, after `Measured`.
    """

    def __init__(self, warm_up: int, timed: int, trace: Path | None):
        self.warm_up, self.timed, self.trace = warm_up, timed, trace
        self.iteration, self.stamps, self.memory, self._profiler = -1, [], {}, None

    def begin(self, iteration: int) -> None:
        if iteration == self.iteration:
            return
        import torch

        self.iteration = iteration
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        done = len(self.stamps) - 1
        if done == self.warm_up and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if done == self.warm_up + self.timed:
            self._after_timed(torch)
        elif done > self.warm_up + self.timed:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.trace))
            raise Measured

    def _after_timed(self, torch) -> None:
        if torch.cuda.is_available():
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.memory = {"peak_gb": peak / 1e9, "reserved_gb": reserved / 1e9}
        if self.trace is None:
            raise Measured
        self._profiler = torch.profiler.profile(record_shapes=True)
        self._profiler.start()

    @property
    def seconds(self) -> list[float]:
        """Of the timed steps."""
        stamps = self.stamps[self.warm_up : self.warm_up + self.timed + 1]
        return [after - before for before, after in pairwise(stamps)]


def work(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Run the engine with `flags` and write what was measured to `arguments.worker`."""
    if arguments.one_rank:
        one_rank.install()  # Megatron keeps some of these functions when it is imported
    from infir2.pretrain import Pretraining

    clock = Clock(arguments.warm_up, arguments.timed, arguments.trace)
    losses: list = []

    class Timed(Pretraining):
        def settle(self, args) -> None:
            """Everything is imported now, and nothing on the GPU: wait for the word."""
            print("ready", flush=True)
            sys.stdin.readline()

        def forward_step(self, data_iterator, model) -> tuple:
            from megatron.training import get_args

            clock.begin(get_args().curr_iteration)
            output, loss = super().forward_step(data_iterator, model)

            def recorded(output):
                result = loss(output)
                losses.append((clock.iteration, result[2]["lm loss"]))
                return result

            return output, recorded

    sys.argv = ["bench_step", *flags]
    with contextlib.suppress(Measured):
        engine.main(Timed())
    _write_result(arguments, clock, losses)


def _write_result(arguments: argparse.Namespace, clock: Clock, losses: list) -> None:
    import torch
    from megatron.training import get_args
    from megatron.training.training import num_floating_point_operations

    args = get_args()
    totals = _loss_of_steps(losses)
    if args.rank != 0:
        return
    result = {
        "seconds": clock.seconds,
        "losses": [float(total / count) for total, count in totals],
        "flops": num_floating_point_operations(args, args.global_batch_size),
        "tokens": args.global_batch_size * args.seq_length,
        "gpus": args.world_size,
        "vocabulary": args.padded_vocab_size // args.tensor_model_parallel_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        **clock.memory,
    }
    arguments.worker.write_text(json.dumps(result))


def _loss_of_steps(losses: list) -> list:
    """[sum of the tokens' losses, tokens] of each step, over all micro-batches of all data-parallel ranks."""
    import torch
    from megatron.core import parallel_state

    by_step: dict[int, torch.Tensor] = {}
    for iteration, value in losses:
        by_step[iteration] = by_step.get(iteration, 0) + value.float()
    totals = torch.stack(list(by_step.values()))
    torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return totals.tolist()


def leave() -> None:
    """End a worker without the exit handlers of NCCL and of data loaders, which were cut off and may wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# The driver


class Worker:
    """One arm in a process for each GPU. It imports, and waits until `go`."""

    def __init__(self, arm: Arm, arguments: argparse.Namespace, folder: Path, profiled: bool):
        self.result, self.log = folder / "result.json", folder / "log"
        self.trace = folder / "trace.json" if profiled else None
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--worker", str(self.result), "--output", "-"]
        command += ["--warm-up", str(arguments.warm_up), "--timed", str(arguments.timed)]
        if profiled:
            command += ["--trace", str(self.trace)]
        if arguments.one_rank:
            command += ["--one-rank"]
        command += ["--", *step_flags(arm, arguments)]
        port = str(20000 + os.getpid() % 20000)
        with self.log.open("w") as output:
            self.processes = [
                subprocess.Popen(
                    command if rank == 0 else _without_trace(command),
                    env=_environment(arguments, rank, port) | dict(word.split("=", 1) for word in arm.variables),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(1 if arguments.one_rank else arguments.gpus)
            ]

    def run(self, seconds: float) -> dict:
        """The worker's result, or {"error": ...}; ends it after `seconds`."""
        for process in self.processes:
            try:
                process.stdin.write("go\n")
                process.stdin.close()
            except BrokenPipeError:  # it has ended; its log says why
                pass
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {seconds:.0f} s", "log": self._tail()}
        finally:
            self.stop()
        if not self.result.exists():
            return {"error": self._reason(), "log": self._tail()}
        return json.loads(self.result.read_text())

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _reason(self) -> str:
        text = self.log.read_text(errors="replace")
        if "OutOfMemoryError" in text or "out of memory" in text:
            return "out of memory; take fewer --layers, a smaller --micro-batch-size, or a larger GPU"
        said = [line.partition("error: ")[2] for line in text.splitlines() if line.startswith("[infir2] error: ")]
        status = f"ended with status {[process.returncode for process in self.processes]}"
        return f"{status}: {said[-1]}" if said else status


def _without_trace(command: list[str]) -> list[str]:
    """For ranks other than 0: nothing but rank 0's trace is read, but all of them run the profiled step."""
    if "--trace" not in command:
        return command
    at = command.index("--trace") + 1
    return [*command[:at], os.devnull, *command[at + 1 :]]


def _environment(arguments: argparse.Namespace, rank: int, port: str) -> dict[str, str]:
    """As scripts/lib/megatron.sh sets it."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(arguments.gpus), "RANK": str(rank)}
    shared |= {"LOCAL_RANK": str(rank), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(REPO / "training"), os.environ.get("PYTHONPATH", "")])
    shared["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment = {**os.environ, **shared}
    environment.pop(precision.TE_FP32_SCALES, None)  # SCALE_FMT sets it
    return environment


def step_flags(arm: Arm, arguments: argparse.Namespace) -> list[str]:
    """The flags of `infir2.pretrain` for one arm: the recipe's, as scripts/lib/cpt.sh gives them, without files."""
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = replace(shape, layers=arguments.layers)
    steps = arguments.warm_up + arguments.timed + 3
    words = [*megatron_flags(shape), *precision.flags(arm.precision)]
    if arguments.backend == "gpu":
        words += "--transformer-impl transformer_engine --attention-backend fused --num-workers 4".split()
        words += "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
    words += ["--tokenizer-type", "NullTokenizer", "--seed", "1236", "--from-scratch"]
    words += ["--seq-length", str(arguments.seq_length), "--max-position-embeddings", str(arguments.seq_length)]
    words += ["--micro-batch-size", str(arguments.micro_batch_size)]
    words += ["--global-batch-size", str(global_batch(arguments))]
    words += "--lr 1e-5 --min-lr 1e-6 --lr-decay-style WSD --lr-wsd-decay-style cosine --lr-warmup-iters 0".split()
    words += ["--train-iters", str(steps), "--lr-wsd-decay-iters", "1", "--eval-iters", "0", "--eval-interval", "1000"]
    words += "--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0".split()
    words += ["--no-create-attention-mask-in-dataloader", "--log-interval", "1", "--log-throughput"]
    if arguments.one_rank:
        words += ["--fake-process-group"]
    words += ["--data-path", str(arguments.data), "--split", "100,0,0", "--data-cache-path", str(arguments.cache)]
    return words + _on_this_machine([*arm.flags, *arguments.flags], arguments.backend)


def _on_this_machine(flags: list[str], backend: str) -> list[str]:
    """On a CPU without the switches that need a GPU: an arm then has what is left of it."""
    return [flag for flag in flags if backend == "gpu" or flag not in engine.GPU_ONLY]


def global_batch(arguments: argparse.Namespace) -> int:
    """Samples of a step: --micro-batches on each group of GPUs that shares a model."""
    words = arguments.flags
    shared = 1
    for flag in ("--tensor-model-parallel-size", "--context-parallel-size", "--pipeline-model-parallel-size"):
        if flag in words:
            size = "".join(words[words.index(flag) + 1 :][:1])
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"--flags: {flag} '{size}' is no number of GPUs")
            shared *= int(size)
    if arguments.gpus % shared:
        raise ValueError(f"--gpus {arguments.gpus} is no multiple of the {shared} that share a model by --flags")
    return arguments.micro_batch_size * arguments.micro_batches * arguments.gpus // shared


def random_corpus(prefix: Path, tokens: int, vocabulary: int) -> Path:
    """Random tokens at `prefix` (.bin, .idx), in documents of 4,096."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=vocabulary) as writer:
        for _ in range(-(-tokens // 4096) + 1):
            writer.add_document(generator.integers(0, vocabulary, 4096))
    return prefix


def measure(arms: dict[str, Arm], arguments: argparse.Namespace, folder: Path, report: dict) -> None:
    """Fill `report["arms"]`, round by round, and write it after each arm. Stops starting arms when time is short."""
    turns = [(number, name) for number in range(arguments.rounds) for name in arms]
    started, longest = time.monotonic(), 0.0

    def start(turn: tuple[int, str]) -> Worker:
        number, name = turn
        profiled = arguments.profile and number == 0
        return Worker(arms[name], arguments, folder / f"{number}-{name}", profiled)

    worker = start(turns[0])
    for place, (number, name) in enumerate(turns):
        now = time.monotonic()
        left = arguments.seconds - (now - started)
        if left < longest:
            log.warning(
                "%.0f s are left, an arm took up to %.0f: stopping before round %d of %s", left, longest, number, name
            )
            worker.stop()
            report["cut_short"] = f"before round {number} of {name}"
            break
        following = start(turns[place + 1]) if place + 1 < len(turns) else None
        result = worker.run(min(left, ARM_SECONDS))
        longest = max(longest, time.monotonic() - now)
        log.info("round %d, %s: %s", number, name, _one_line(result))
        entry = report["arms"].setdefault(name, asdict(arms[name]) | {"rounds": []})
        entry["rounds"].append(result)
        _write(report, arguments.output)
        if worker.trace and worker.trace.exists() and "error" not in result:
            entry["profile"] = profile(worker.trace, result)
            _write(report, arguments.output)
        worker = following


def profile(trace: Path, result: dict) -> dict:
    """The summary of a trace; `idle` is what the median step, which was not profiled, has more than kernels."""
    found = kernel_profile.summary(kernel_profile.read_trace(trace), result["vocabulary"])
    found["idle"] = max(0.0, statistics.median(result["seconds"]) * 1e3 - found["busy"])
    trace.unlink()
    return found


def _one_line(result: dict) -> str:
    if "error" in result:
        return result["error"]
    return f"{statistics.median(result['seconds']) * 1e3:.1f} ms, peak {result.get('peak_gb', 0):.1f} GB"


def _write(report: dict, output: Path) -> None:
    path = output.with_name(output.name + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(report, indent=1))


# What is printed


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 % of values, interpolated."""
    return tuple(float(value) for value in np.percentile(values, [25, 50, 75]))


def seconds(entry: dict) -> list[float]:
    """All timed steps of an arm."""
    return [value for one in entry["rounds"] for value in one.get("seconds", [])]


def paired_ratios(entry: dict, control: dict) -> list[float]:
    """Time over the control's, of steps with the same number in the same round."""
    rounds = zip(entry["rounds"], control["rounds"], strict=False)
    return [
        a / b for one, other in rounds for a, b in zip(one.get("seconds", []), other.get("seconds", []), strict=False)
    ]


def table(report: dict) -> str:
    """Markdown: one line an arm, its time against the first arm and against "bf16"; then milliseconds by category."""
    entries = {name: entry for name, entry in report["arms"].items() if seconds(entry)}
    lines = [
        f"{name}: {one['error']}" for name, entry in report["arms"].items() for one in entry["rounds"] if "error" in one
    ]
    if not entries:
        return "\n".join([*lines, "nothing was measured"])
    controls = [name for name in dict.fromkeys([next(iter(entries)), "bf16"]) if name in entries]
    header = [
        "arm",
        "ms, median (quartiles)",
        *(f"of {name}" for name in controls),
        "tokens/s/GPU",
        "TFLOP/s/GPU",
        "peak GB",
        "reserved GB",  # a CUDA graph's memory is not in the peak
    ]
    lines += ["", _row(header), _row(["---"] * len(header))]
    lines += [_row(_arm_cells(name, entries, controls)) for name in entries]
    profiles = {name: entry["profile"] for name, entry in entries.items() if "profile" in entry}
    if profiles:
        lines += ["", _row(["ms of one step", *profiles]), _row(["---"] * (len(profiles) + 1))]
        for category in kernel_profile.CATEGORIES:
            lines.append(_row([category, *(f"{one['milliseconds'][category]:.1f}" for one in profiles.values())]))
        lines.append(_row(["idle", *(f"{one['idle']:.1f}" for one in profiles.values())]))
    return "\n".join(lines)


def _arm_cells(name: str, entries: dict, controls: list[str]) -> list[str]:
    entry = entries[name]
    low, middle, high = quartiles([value * 1e3 for value in seconds(entry)])
    ratios = []
    for control in controls:
        values = paired_ratios(entry, entries[control])
        ratios.append("{1:.3f} ({0:.3f}-{2:.3f})".format(*quartiles(values)) if values else "-")
    one = next(one for one in entry["rounds"] if "seconds" in one)
    rate = 1e3 / middle / one["gpus"]
    peak, reserved = (max(one.get(key, 0.0) for one in entry["rounds"]) for key in ("peak_gb", "reserved_gb"))
    return [
        name,
        f"{middle:.1f} ({low:.1f}-{high:.1f})",
        *ratios,
        f"{one['tokens'] * rate:.0f}",
        f"{one['flops'] * rate / 1e12:.1f}",
        f"{peak:.2f}",
        f"{reserved:.2f}",
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# The command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape has, for one that does not fit")
    parser.add_argument("--seq-length", type=positive, default=8192)
    parser.add_argument("--micro-batch-size", type=positive, default=1)
    parser.add_argument("--micro-batches", type=positive, default=4, help="in a step, on each GPU")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[], help=f"default: {' '.join(DEFAULT_ARMS)}")
    parser.add_argument("--arm", action="append", type=Arm.parse, default=[], metavar="'NAME=PRECISION FLAG...'")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--warm-up", type=positive, default=4, help="steps before the timed ones, in each round")
    parser.add_argument("--timed", type=positive, default=12, help="timed steps in each round")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--gpus", type=positive, default=1, help="processes, one a GPU")
    parser.add_argument("--one-rank", action="store_true", help="of the --gpus, on one GPU, without communication")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags for every arm, in one word")
    parser.add_argument("--data", type=Path, help="prefix of a corpus (.bin, .idx); default: random tokens")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no arm that would end after so many")
    parser.add_argument("--output", type=Path, required=True, help="where OUTPUT.json goes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:at])
    arguments.rest = argv[at + 1 :]
    return arguments


def main() -> None:
    logging.basicConfig(format="[%(name)s] %(message)s", level=logging.INFO, stream=sys.stderr)
    arguments = parse()
    if arguments.worker:
        work(arguments, arguments.rest)
        leave()
    try:
        report = run(arguments)
    except (ValueError, RuntimeError, OSError, DataError) as error:
        sys.exit(engine.refusal(error))
    print(table(report))
    sys.exit(0 if any(map(seconds, report["arms"].values())) else 1)


def run(arguments: argparse.Namespace) -> dict:
    """Measure all arms. Refuses (ValueError, OSError, DataError) what no arm could be measured with."""
    arguments.backend = backend.name()
    if arguments.data is not None:
        IndexedReader(arguments.data)
    global_batch(arguments)
    arms = {name: ARMS[name] for name in arguments.arms} | dict(arguments.arm)
    arms = arms or {name: ARMS[name] for name in DEFAULT_ARMS}
    with tempfile.TemporaryDirectory(prefix="bench_step") as temporary:
        folder = Path(temporary)
        arguments.cache = folder / "cache"
        report = _header(arguments)
        if arguments.data is None:
            samples = global_batch(arguments) * (arguments.warm_up + arguments.timed + 4)
            # A rank alone has the first rows of a divided embedding, and nothing of the others.
            words = SHAPES[arguments.shape].vocab // (arguments.gpus if arguments.one_rank else 1)
            arguments.data = random_corpus(folder / "random", samples * arguments.seq_length, words)
        _write(report, arguments.output)
        measure(arms, arguments, folder, report)
    return report


def _header(arguments: argparse.Namespace) -> dict:
    shape = SHAPES[arguments.shape]
    found = subprocess.run(
        ["git", "-C", str(REPO), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    layers = arguments.layers or shape.layers
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": found.stdout.strip() or "unknown",
        "shape": arguments.shape,
        "layers": layers if layers == shape.layers else f"{layers} of {shape.layers}",
        "data": str(arguments.data) if arguments.data else "random tokens",
        "arms": {},
    }


if __name__ == "__main__":
    main()
