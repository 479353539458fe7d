"""Quantise and decode BF16 tensors on a CPU in one pass: `infir2.fp8.fake_quantize` as compiled code.

cpu_quantisation.c is compiled for this processor at its first use (a second) and kept in the user's cache. Where there
is no C compiler, or the compiled code cannot be loaded, `available` is false and infir2.fp8 computes the same bits in
torch, several times slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from infir2 import files

SOURCE = Path(__file__).with_suffix(".c")
# No -ffast-math: the rounding is an addition whose inverse must not be cancelled.
FLAGS = ("-O3", "-shared", "-fPIC", "-fno-fast-math", "-ffp-contract=off")
log = logging.getLogger("infir2")


def available() -> bool:
    return _library() is not None


def fake_quantize(x: Tensor, tile: tuple[int, int], fmt, out_dtype: torch.dtype) -> Tensor | None:
    """As infir2.fp8.fake_quantize with power-of-two scales, for a contiguous bfloat16 x [M, K] that the tile divides.

    fmt is an infir2.fp8.Format, out_dtype bfloat16 or float32. None where a tile's range is not ordinary (beyond
    2^-100 to 2^100, NaN, Inf): the caller has to take the longer way.
    """
    out = torch.empty(x.shape, dtype=out_dtype)
    limits = torch.finfo(fmt.dtype)
    largest = torch.empty(x.shape[1], dtype=torch.int16)
    smallest = torch.empty(x.shape[1], dtype=torch.int32)
    beyond = _library().fake_quantize(
        x.data_ptr(), out.data_ptr(), *x.shape, *tile, int(out_dtype == torch.float32),
        fmt.max, limits.smallest_normal, limits.eps, largest.data_ptr(), smallest.data_ptr(),
    )  # fmt: skip
    return None if beyond else out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.environ.get("INFIR2_CPU_QUANTISATION") == "torch":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("quantisation in torch, since %s could not be compiled: %s", SOURCE.name, error)
        return None
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.fake_quantize.argtypes = [pointer, pointer, *[size] * 4, ctypes.c_int, *[real] * 3, pointer, pointer]
    return library


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not there."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        {line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))}
        if cpu.exists()
        else ()
    )
    identity = repr((SOURCE.read_text(), compiler, FLAGS, platform.machine(), sorted(flags)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infir2"
    path = cache / f"cpu_quantisation-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            command = [compiler, *FLAGS, "-march=native", str(SOURCE), "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
    return path
