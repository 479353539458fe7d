"""The machine under Megatron: a CUDA GPU, or this computer's CPU. The only module that patches torch or Megatron.

On every machine three attributes are replaced. `compile_helpers` runs `make` on a C++ file that megatron-core's wheel
ships already compiled, without the Makefile, and exits when make fails. Where samples are packed, a step's number of
micro-batches follows from their lengths: the data says it, not the batch size. And a gradient norm that is no number
ends the run before the optimizer has used the gradients.

On a CPU Megatron 0.19.2 still asks `torch.cuda` for devices, streams, events and random states. `install` answers
those questions with CPU equivalents, and `CudaToCpu` turns every request for a "cuda" tensor into one for a CPU tensor.
Nothing is pretended about the arithmetic: kernels, collectives (gloo) and checkpoints are the real ones.

Each patched attribute is a row of `TORCH_ON_CPU`, `MEGATRON_ON_CPU`, `BY_FLAG`, `BY_FLAG_ON_GPU` or `MEGATRON`;
tests/test_backend.py checks that every one still exists in the pinned releases, so an upgrade cannot turn a patch into
a silent no-op (TransformerEngine's is not there on a CPU: tests/gpu/test_speed.py needs its patch to be called).
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import queue
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from infir2 import cpu_kernels

# Flags that every CPU run needs, added to the command line by `infir2.engine`. Each belongs to the machine, not to a
# recipe: the same script then runs on both.
CPU_ARGUMENTS = (
    *("--distributed-backend", "gloo"),
    *("--transformer-impl", "local"),  # the layers of infir2.layers, not TransformerEngine's
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",  # a CUDA extension
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--disable-jit-fuser",
    *("--num-workers", "0"),
)


APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
FUSED_WEIGHT_GRADIENT = "--fused-weight-gradient"
FUSED_SWIGLU = "--fused-swiglu-quantisation"
RECOMPUTE_SWIGLU = "--recompute-swiglu"
FUSED_NORM = "--fused-norm-quantisation"
RECOMPUTE_NORMS = "--recompute-norms"
FAST_QUANTISATION = "--fast-quantisation"
LATE_TRANSPOSES = "--transpose-weights-late"
FUSED_BIAS = "--fused-bias-gradient"
DEEP_GEMM = "--deep-gemm"
FLASH_ATTENTION = "--flash-attention-4"
FUSED_QKV_ROPE = "--fused-qkv-rope"
FUSED_EMBEDDING = "--fused-embedding-gradient"


def name() -> str:
    """ "gpu" or "cpu": what `INFIR2_BACKEND` says, else whether torch sees a CUDA device."""
    chosen = os.environ.get("INFIR2_BACKEND", "")
    if chosen not in ("", "cpu", "gpu"):
        raise ValueError(f"INFIR2_BACKEND is '{chosen}'; known: cpu, gpu")
    if chosen == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("INFIR2_BACKEND=gpu, but torch sees no CUDA device; unset it to run on the CPU")
    return chosen or ("gpu" if torch.cuda.is_available() else "cpu")


def arguments(kind: str) -> tuple[str, ...]:
    """Flags that this machine needs, to be added to the command line."""
    if kind == "cpu":
        return CPU_ARGUMENTS
    return () if _fuses_weight_gradients() else ("--no-gradient-accumulation-fusion",)


def _fuses_weight_gradients() -> bool:
    """Whether gradients are added up by the GEMMs that compute them: by apex where it is, else as the flag says."""
    return importlib.util.find_spec(APEX_EXTENSION) is not None or FUSED_WEIGHT_GRADIENT in sys.argv


def install() -> str:
    """Prepare torch and Megatron for this machine, importing Megatron; returns `name()`. Safe to call twice."""
    kind = name()
    if not any(word.partition("=")[0] == "--wandb-project" for word in sys.argv):
        # Megatron imports it even so, which makes two temporary folders that a killed run would leave
        sys.modules.setdefault("wandb", None)
    if kind == "cpu":
        _install_cpu()
    elif FUSED_WEIGHT_GRADIENT in sys.argv:
        _stand_in_for_apex()
    _patch(MEGATRON)
    for flag, table in (BY_FLAG | BY_FLAG_ON_GPU if kind == "gpu" else BY_FLAG).items():
        if flag in sys.argv:
            _patch(table)
    return kind


def _stand_in_for_apex() -> None:
    """Give Megatron `infir2.speed.weight_gradient` where apex's extension is not installed: it would refuse
    --gradient-accumulation-fusion, its default, without it."""
    if APEX_EXTENSION in sys.modules or importlib.util.find_spec(APEX_EXTENSION):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron was imported before infir2.backend.install(); call install() first")
    sys.modules[APEX_EXTENSION] = importlib.import_module("infir2.speed.weight_gradient")


@functools.cache
def _install_cpu() -> None:
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron was imported before infir2.backend.install(); call install() first")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for package in ("transformer_engine", "apex"):  # where they are installed Megatron takes their CUDA optimizer
        sys.modules[package] = None
    _patch(TORCH_ON_CPU)
    cpu_kernels.install()
    CudaToCpu().__enter__()  # for the life of the process
    _patch(MEGATRON_ON_CPU)


def _patch(table: dict[str, Callable[[Any], Any]]) -> None:
    """Replace each attribute by what its row makes of the present value. A missing attribute is an AttributeError."""
    for path, make in table.items():
        owner, attribute = resolve(path)
        setattr(owner, attribute, make(getattr(owner, attribute)))


def resolve(path: str) -> tuple[Any, str]:
    """The object that holds the attribute `path` names, and the attribute's name, importing modules on the way."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ModuleNotFoundError(path)


class CudaToCpu(TorchFunctionMode):
    """Rewrites every request for a CUDA tensor into a request for a CPU tensor."""

    _LEGACY_TYPE = {  # Megatron sorts gradients by Tensor.type() and expects the CUDA names
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.float64: "torch.cuda.DoubleTensor",
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return self._LEGACY_TYPE.get(args[0].dtype) or func(*args)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _Stream:
    """A stream on a machine where every operation has finished when it returns."""

    device, cuda_stream = torch.device("cpu"), 0

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, *args): ...
    def wait_event(self, *args): ...
    def synchronize(self): ...

    def query(self):
        return True

    def record_event(self, *args):
        return _Event()

    def __enter__(self):
        return self

    def __exit__(self, *args): ...


class _Event:
    def __init__(self, *args, **kwargs): ...
    def record(self, *args): ...
    def wait(self, *args): ...
    def synchronize(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Device:
    """Stands where `torch.cuda.get_device_properties` returns; 9.0 is Hopper, which Megatron's FP8 checks ask for."""

    major, minor, name = 9, 0, "cpu"
    total_memory = multi_processor_count = 1


def _returning(make_value: Callable[[], Any]) -> Callable[[Any], Any]:
    """A row for a function that gives `make_value()`. Each row gets a function of its own: dynamo refuses aliases."""
    return lambda original: lambda *args, **kwargs: make_value()


_nothing = _returning(lambda: None)


def _identity_compile(original):
    def compile(model=None, *args, **kwargs):
        return model if model is not None else (lambda wrapped: wrapped)

    return compile


TORCH_ON_CPU: dict[str, Callable[[Any], Any]] = {
    "torch.cuda.device_count": _returning(lambda: 1),
    "torch.cuda.current_device": _returning(lambda: "cpu"),
    "torch.cuda.set_device": _nothing,
    "torch.cuda.synchronize": _nothing,
    "torch.cuda.empty_cache": _nothing,
    "torch.cuda.ipc_collect": _nothing,
    "torch.cuda.manual_seed_all": _nothing,  # torch.manual_seed() itself calls it: seeding here would recurse
    "torch.cuda.manual_seed": lambda original: lambda seed: torch.default_generator.manual_seed(seed),
    "torch.cuda.current_stream": _returning(_Stream),
    "torch.cuda.default_stream": _returning(_Stream),
    "torch.cuda.stream": _returning(contextlib.nullcontext),
    "torch.cuda.Stream": lambda original: _Stream,
    "torch.cuda.Event": lambda original: _Event,
    "torch.cuda.get_rng_state": _returning(torch.get_rng_state),
    "torch.cuda.random.get_rng_state": _returning(torch.get_rng_state),
    "torch.cuda.set_rng_state": lambda original: lambda state, *args, **kwargs: torch.set_rng_state(state),
    "torch.cuda.random.set_rng_state": lambda original: lambda state, *args, **kwargs: torch.set_rng_state(state),
    "torch.cuda.get_device_properties": _returning(_Device),
    "torch.cuda.get_device_capability": _returning(lambda: (_Device.major, _Device.minor)),
    "torch.compile": _identity_compile,  # Megatron compiles small functions at import; Inductor would need a compiler
}


def _of_layers(function: str) -> Callable[[Any], Any]:
    """A row for a function of infir2.layers, which needs Megatron."""
    return lambda original: getattr(importlib.import_module("infir2.layers"), function)


MEGATRON_ON_CPU: dict[str, Callable[[Any], Any]] = {
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": _returning(torch.get_rng_state),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": (
        lambda original: lambda state, *args, **kwargs: torch.set_rng_state(state)
    ),
    "megatron.training.training.initialize_megatron": lambda original: functools.partial(original, allow_no_cuda=True),
    "megatron.core.transformer.attention.apply_rotary_pos_emb": _of_layers("apply_rotary_pos_emb"),
    "megatron.core.transformer.mlp.bias_swiglu_impl": _of_layers("bias_swiglu_impl"),
    # Its warm-up draws random numbers, how many depends on TP and CP: layouts would start from different states.
    "megatron.training.training.set_jit_fusion_options": _nothing,
    # A synchronous save needs no manager process for its results; spawning one takes 6 to 9 s at the first save.
    "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue": _returning(queue.Queue),
}


def _compile_helpers(original):
    def compile_helpers():
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()

    return compile_helpers


def _micro_batches_of_the_data(original):
    """Let data that knows how many micro-batches its next step has (`micro_batches()`) overrule Megatron's number."""

    def get_forward_backward_func(*args, **kwargs):
        forward_backward = original(*args, **kwargs)

        @functools.wraps(forward_backward)
        def run(*, data_iterator, num_microbatches: int, **rest):
            data = getattr(data_iterator, "iterable", None)  # Megatron wraps it, to replay a step
            if hasattr(data, "micro_batches") and not data_iterator.replaying:
                num_microbatches = data.micro_batches()
            elif hasattr(data, "micro_batches"):
                num_microbatches = len(data_iterator.saved_microbatches)
            return forward_backward(data_iterator=data_iterator, num_microbatches=num_microbatches, **rest)

        return run

    return get_forward_backward_func


def _refuse_broken_gradients(original):
    """A norm of NaN or Inf is an error: in BF16 no loss scale could have caused it, and clipping by it would make every
    weight NaN. fp16 looks for Inf itself, before it asks for a norm."""

    def get_grad_norm_fp32(*args, **kwargs):
        norm = original(*args, **kwargs)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}: this step was not taken. The last checkpoint is from before it; look at "
                "the losses that led here before you start again."
            )
        return norm

    return get_grad_norm_fp32


def _ours(path: str, **flags: str) -> Callable[[Any], Any]:
    """A row for `module.function` of infir2.speed; `flags`: options that a flag switches on."""

    def make(original):
        module, function = path.split(".")
        options = {name: flag in sys.argv for name, flag in flags.items()}
        return getattr(importlib.import_module(f"infir2.speed.{module}"), function)(original, **options)

    return make


def _deep_gemm(original):
    _need("deep_gemm", f"{DEEP_GEMM} needs DeepGEMM, which is not installed: {_FAST_LIBRARIES}")
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.path.exists("/usr/local/cuda/bin/nvcc")):
        raise ValueError(
            f"{DEEP_GEMM} compiles its kernels with nvcc, which is not found: put CUDA 13's on PATH or set CUDA_HOME, "
            "or leave the flag out (LIBRARIES=0 before a script)"
        )
    return _ours("deep_gemm.in_place_of")(original)


def _flash_attention(original):
    _need(
        "flash_attn.cute",
        f"{FLASH_ATTENTION} needs FlashAttention 4, which is not installed: {_FAST_LIBRARIES}",
    )
    return _ours("flash_attention.in_place_of")(original)


_FAST_LIBRARIES = "install requirements-gpu.txt again, or leave the flag out (LIBRARIES=0 before a script)"


def _need(module: str, message: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that should hold it is not there
        found = None
    if found is None:
        raise ValueError(message)


BY_FLAG: dict[str, dict[str, Callable[[Any], Any]]] = {
    FUSED_EMBEDDING: {"torch.nn.functional.embedding": _ours("embedding_gradient.in_place_of")},
}

_FP8_BLOCKS = "transformer_engine.pytorch.tensor.float8_blockwise_tensor"
BY_FLAG_ON_GPU: dict[str, dict[str, Callable[[Any], Any]]] = {
    FUSED_SWIGLU: {
        "megatron.core.transformer.mlp.bias_swiglu_impl": _ours(
            "quantised_swiglu.in_place_of", recompute=RECOMPUTE_SWIGLU
        ),
    },
    FUSED_NORM: {
        "transformer_engine.pytorch.module._common.tex.rmsnorm_fwd": _ours(
            "te_quantisation.norm_in_place_of", recompute=RECOMPUTE_NORMS
        ),
    },
    FAST_QUANTISATION: {
        f"{_FP8_BLOCKS}.Float8BlockQuantizer.quantize_impl": _ours("te_quantisation.quantiser_in_place_of"),
    },
    FUSED_BIAS: {
        "transformer_engine.pytorch.module.base.TransformerEngineBaseModule.grad_output_preprocess": _ours(
            "te_quantisation.bias_gradient_in_place_of"
        ),
    },
    LATE_TRANSPOSES: {
        f"{_FP8_BLOCKS}.Float8BlockQuantizer.set_usage": _ours("te_quantisation.usage_in_place_of"),
        f"{_FP8_BLOCKS}.Float8BlockwiseQTensorStorage.update_usage": _ours("te_quantisation.late_transposes"),
    },
    DEEP_GEMM: {"transformer_engine.pytorch.cpp_extensions.gemm.tex.generic_gemm": _deep_gemm},
    FUSED_QKV_ROPE: {
        "megatron.core.transformer.attention.apply_fused_qkv_rotary_pos_emb": _ours("split_rotary.in_place_of"),
    },
    FLASH_ATTENTION: {
        "megatron.core.extensions.transformer_engine.TEDotProductAttention.forward": _flash_attention,
    },
}

MEGATRON: dict[str, Callable[[Any], Any]] = {
    "megatron.core.datasets.utils.compile_helpers": _compile_helpers,
    "megatron.core.optimizer.optimizer.get_grad_norm_fp32": _refuse_broken_gradients,
    "megatron.training.training.get_forward_backward_func": _micro_batches_of_the_data,
}
