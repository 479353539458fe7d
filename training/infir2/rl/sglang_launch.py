"""`sglang.launch_server`, its FP8 engine quantising activations bit for bit as training does.

    ACTIVATION_SCALES=pow2 python -m infir2.rl.sglang_launch --model-path DIR ...

SGLang 0.5.17 on Hopper scales activations by FP32 numbers, amax / 448, whatever the format of the weights' scales.
Where training took powers of two, trainer and engine then round each activation differently. Its linear layers look
their quantiser up by name in one module; these names are replaced here. ACTIVATION_SCALES: pow2 or fp32; unset, SGLang
stays as it is. SGLang's processes import this module again (multiprocessing's spawn), so each one is changed.
"""

import os
import runpy
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "ACTIVATION_SCALES"
_MODULE = "sglang.srt.layers.quantization.fp8_utils"
_QUANTISERS = ("per_token_group_quant_fp8", "sglang_per_token_group_quant_fp8")
# Quantises into rows that it pads for one CUTLASS kernel.
_UNKNOWN = "sglang_per_token_group_quant_fp8_row_padded"


def quantiser(scale_fmt: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What replaces SGLang's quantiser of 128 neighbours: its arguments, its results, its scales' layouts."""
    from infir2.rl.activation_kernels import GROUP, quantize_

    def quantise(
        x: Tensor,
        group_size: int,
        eps: float = 1e-10,
        column_major_scales: bool = False,
        scale_tma_aligned: bool = False,
        scale_ue8m0: bool = False,
        **more,
    ) -> tuple[Tensor, Tensor]:
        if group_size != GROUP or scale_ue8m0 or x.dim() != 2 or any(more.values()):
            raise NotImplementedError(
                f"activations in groups of {group_size}, {x.dim()} dimensions, packed scales {scale_ue8m0}, {more}: "
                f"training has no such format; unset {VARIABLE}"
            )
        rows, groups = x.shape[0], x.shape[1] // GROUP
        codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        if column_major_scales:
            held = (rows + 3) // 4 * 4 if scale_tma_aligned else rows  # TMA reads 16 bytes at a time
            scale_inv = torch.empty(groups, held, dtype=torch.float32, device=x.device).t()[:rows]
        else:
            scale_inv = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
        quantize_(x, codes, scale_inv, scale_fmt)
        return codes, scale_inv

    return quantise


def replace(module: ModuleType, scale_fmt: str) -> None:
    """Put our quantiser where SGLang's linear layers find theirs. RuntimeError where this SGLang has other names."""
    if missing := [name for name in (*_QUANTISERS, _UNKNOWN) if not hasattr(module, name)]:
        raise RuntimeError(f"{_MODULE} has no {', '.join(missing)}: this SGLang is not 0.5.17; unset {VARIABLE}")

    def unknown(*_, **__):
        raise NotImplementedError(f"{VARIABLE} does not know this --fp8-gemm-backend; take triton or deep_gemm")

    for name in _QUANTISERS:
        setattr(module, name, quantiser(scale_fmt))
    setattr(module, _UNKNOWN, unknown)


class _AfterImport(MetaPathFinder):
    """Replaces once SGLang imports the module itself: imported earlier, it could take memory on a GPU not its own."""

    def __init__(self, scale_fmt: str) -> None:
        self.scale_fmt = scale_fmt

    def find_spec(self, fullname, path, target=None):
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            replace(module, self.scale_fmt)

        spec.loader.exec_module = execute_and_replace
        return spec


if __name__ in ("__main__", "__mp_main__") and (found := os.environ.get(VARIABLE)):
    sys.meta_path.insert(0, _AfterImport(found))

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
