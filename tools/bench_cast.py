"""Time the FP8 caster against a plain copy of the same files, and on a GPU against the usual way to cast.

    python tools/bench_cast.py --folder /tmp/bench                     # Qwen2.5-1.5B's shape, 3.1 GB of BF16
    python tools/bench_cast.py --folder /tmp/bench --device cuda

Arms, each a process of its own, in turn, `--rounds` times:

    copy     safetensors' load_file and save_file, shard by shard
    cast     tools/bf16_cast_fp8.py as users run it, with its verification
    no_verify   the same with --no-verify
    usual    (GPU) shard by shard: load it whole onto the GPU, quantise tensor by tensor, waiting for each, save it

Prints each arm's seconds (imports and the GPU's start apart), its peak memory, and the ratios round by round. The
model's weights are random; its files stay in --folder for another run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bf16_cast_fp8
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from infir2 import files, fp8, hf
from infir2.data.pretraining import positive
from infir2.qwen2 import Shape

QWEN2_5_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}


def make_model(folder: Path, layers: int) -> None:
    """A folder of Qwen2.5-1.5B's shape with random BF16 weights, in shards of 1 GB."""
    config = QWEN2_5_1_5B | {"num_hidden_layers": layers}
    generator = torch.Generator().manual_seed(0)
    tensors = hf.qwen2_tensors(Shape.from_config(config)).items()
    with hf.HFWriter(folder, shard_bytes=10**9) as writer:
        writer.config = config
        for name, shape in tqdm(tensors, desc="making the model", disable=None):
            writer.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator))


def copy(source: Path, target: Path, device: str) -> None:
    """The control: what reading and writing the same files costs, until they are on the disk."""
    with files.building(target) as folder:
        for shard in sorted(source.glob("*.safetensors")):
            save_file(load_file(shard), folder / shard.name)


def cast(source: Path, target: Path, device: str, verify: bool = True) -> None:
    workers = min(8, os.cpu_count()) if device == "cuda" else torch.get_num_threads()
    bf16_cast_fp8.cast(source, target, "pow2", verify=verify, workers=workers, device=device)


def no_verify(source: Path, target: Path, device: str) -> None:
    cast(source, target, device, verify=False)


def usual(source: Path, target: Path, device: str) -> None:
    """The control on a GPU: whole shards in memory, one tensor after the other, waiting for each."""
    with files.building(target) as folder:
        for shard in sorted(source.glob("*.safetensors")):
            results = {}
            for name, tensor in load_file(shard, device=device).items():
                if hf.is_fp8_linear(name):
                    results[name], results[hf.scale_name(name)] = fp8.quantize(tensor, fp8.BLOCK, check_finite=False)
                    torch.cuda.synchronize()
                else:
                    results[name] = tensor
            save_file(results, folder / shard.name)


ARMS: dict[str, Callable[[Path, Path, str], None]] = {
    "copy": copy,
    "cast": cast,
    "no_verify": no_verify,
    "usual": usual,
}


def run_arm(arm: str, source: Path, target: Path, device: str) -> float:
    """Seconds of one arm, in this process."""
    if device == "cuda":
        fp8.quantize(torch.ones(128, 128, device=device, dtype=torch.bfloat16), fp8.BLOCK)
        torch.cuda.synchronize()
    started = time.perf_counter()
    ARMS[arm](source, target, device)
    return time.perf_counter() - started


def measure(arm: str, source: Path, folder: Path, device: str) -> dict[str, float]:
    """Seconds and peak memory in GB of one arm, in a new process."""
    target = folder / f"out-{arm}"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--device", device, "--arm", arm]
    command += ["--layers", source.name.removeprefix("model-")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"arm {arm} ended with status {process.returncode}; run it alone: {' '.join(command)}")
    shutil.rmtree(target)
    return {"seconds": float(process.stdout.read()), "peak_gb": peak / 1e9}


def _anonymous_bytes(pid: int) -> int:
    """Memory of a process that is its own: pages of mapped files can be dropped at any time."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="room for the model and the casts, on a real disk")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=positive, default=28)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = args.folder / f"model-{args.layers}"
    if args.arm:
        print(run_arm(args.arm, source, args.folder / f"out-{args.arm}", args.device))
        return
    if not source.exists():
        try:
            make_model(source, args.layers)
        except OSError as error:
            parser.exit(2, f"error: no room for a model below --folder {args.folder}: {error}\n")
    arms = [arm for arm in ARMS if arm != "usual" or args.device == "cuda"]
    control = "usual" if args.device == "cuda" else "copy"
    rounds = []
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        rounds.append({arm: measure(arm, source, args.folder, args.device) for arm in arms})
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB of BF16, {torch.get_num_threads()} threads, {args.device}, torch {torch.__version__}")
    for arm in arms:
        ratios = [one[arm]["seconds"] / one[control]["seconds"] for one in rounds]
        seconds = statistics.median(one[arm]["seconds"] for one in rounds)
        peak = max(one[arm]["peak_gb"] for one in rounds)
        by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{arm:10} {seconds:7.2f} s, own memory at most {peak:.2f} GB; {control} takes 1, this takes", end=" ")
        print(f"{statistics.median(ratios):.2f} ({by_round})")
    print(json.dumps({"device": args.device, "bytes": size, "rounds": rounds}))


if __name__ == "__main__":
    main()
