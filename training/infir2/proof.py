"""Proof that FP8 is on: a run says how many linear layers run in FP8, and stops if that is not so.

Megatron with `--transformer-impl local` ignores `--fp8-format` silently, and TransformerEngine's modules compute in
BF16 outside an FP8 context. So the number is stated when the model is built, and after the first forward pass compared
with what the layers say they did.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.utils import unwrap_model
from torch.nn import Module

from infir2 import cpu_kernels
from infir2.precision import scale_format_of_recipe

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class Fp8Proof:
    """States and checks a model's FP8. `attach` is a post-wrap hook for Megatron's model builder."""

    def __init__(self, args, backend: str, scale_fmt: str):
        self.args, self.backend, self.scale_fmt = args, backend, scale_fmt
        self.models: list = []

    def attach(self, models: list) -> list:
        """Print the statement and watch the first forward. RuntimeError where FP8 was asked for and none would run."""
        self.models = models
        linears = [module for model in models for _, module in _linears(model)]
        in_fp8 = len(self._should_run_in_fp8())
        if self.args.rank == 0:
            print(f"[infir2] {self._precision()}: {in_fp8} of {len(linears)} linear layers in FP8", flush=True)
            if self.backend == "cpu":
                print(f"[infir2] {cpu_kernels.describe()}", flush=True)
        if self.args.fp8 and not in_fp8:
            raise RuntimeError("--fp8-format asks for FP8, but no linear layer of this model would run in it")
        for model in models:
            self._check_after_first_forward(model)
        return models

    def _precision(self) -> str:
        where = "backend gpu (TransformerEngine)" if self.backend == "gpu" else "backend cpu"
        if not self.args.fp8:
            return f"{where}, BF16" if self.args.bf16 else f"{where}, FP32"
        emulated = "emulated " if self.backend == "cpu" else ""
        scale_fmt = scale_format_of_recipe(self.args.fp8_recipe, self.scale_fmt)
        chosen = self.args.te_precision_config_file
        by_module = f", by module as in {Path(chosen).name}" if chosen else ""
        return f"{where}, {emulated}FP8 {self.args.fp8} {self.args.fp8_recipe}, scales {scale_fmt}{by_module}"

    def _should_run_in_fp8(self) -> list[Module]:
        if not self.args.fp8:
            return []
        return [
            module
            for model in self.models
            for layer, module in _linears(model)
            if _should_run_in_fp8(module, not is_first_last_bf16_layer(layer.config, layer.layer_number - 1))
        ]

    def _check_after_first_forward(self, model: Module) -> None:
        def check(*_):
            handle.remove()
            wanted = {id(module) for module in self._should_run_in_fp8()}
            wrong = [m for _, m in _linears(model) if _ran_in_fp8(m) != (id(m) in wanted)]
            if wrong:
                raise RuntimeError(
                    f"{len(wrong)} linear layers did not run in the precision asked for, for example {wrong[0]}"
                )

        handle = model.register_forward_hook(check)


def _linears(model: Module) -> Iterator[tuple[Module, Module]]:
    """Pairs of a transformer layer and one of its linear layers."""
    for layer in unwrap_model(model).decoder.layers:
        for name, module in layer.named_modules():
            if name.endswith(LINEARS):
                yield layer, module


def _should_run_in_fp8(module: Module, layer_in_fp8: bool) -> bool:
    """Whether the flags put this linear layer in FP8. `layer_in_fp8`: whether its transformer layer is.

    An emulated layer has its quantisation, chosen when it was built. Megatron's TransformerEngine layers know what
    --te-precision-config-file says of them. Megatron's plain layers cannot run in FP8.
    """
    if hasattr(module, "quantisation"):
        return True
    return hasattr(module, "fp8_meta") and module.will_execute_quantized(layer_in_fp8)


def _ran_in_fp8(module: Module) -> bool:
    """Whether the last forward quantised. TransformerEngine's modules keep that in `fp8`."""
    return hasattr(module, "quantisation") or bool(getattr(module, "fp8", False))
