"""The CPU backend's patches and flags fit the pinned releases."""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from trainer import with_megatron

from infir2 import backend


def missing_attributes() -> list[str]:
    missing = []
    by_flag = [path for table in backend.BY_FLAG_ON_GPU.values() for path in table if path.startswith("megatron")]
    for path in (*backend.TORCH_ON_CPU, *backend.MEGATRON_ON_CPU, *by_flag, *backend.MEGATRON):
        owner, attribute = backend.resolve(path)
        if not hasattr(owner, attribute) and not in_source(path):
            missing.append(path)
    return missing


def in_source(path: str) -> bool:
    """Whether a Megatron module defines or imports what `path` names where TransformerEngine is installed."""
    module = next(name for name in sorted(sys.modules, reverse=True) if path.startswith(f"{name}."))
    names = set()
    for node in ast.walk(ast.parse(Path(sys.modules[module].__file__).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            names.add(node.name)
    return names.issuperset(path.removeprefix(f"{module}.").split("."))


def test_every_patched_attribute_exists():
    """Pins: an upgrade that renames an attribute turns its patch into one that nobody reads."""
    assert with_megatron("test_backend", "missing_attributes") == []


@pytest.mark.parametrize(("make", "wanted"), [("_deep_gemm", "DeepGEMM"), ("_flash_attention", "FlashAttention 4")])
def test_a_missing_package_is_asked_for(make, wanted, monkeypatch):
    """Pins a run that stops in its first step, for want of a package, instead of before it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs {wanted}.*LIBRARIES=0"):
        getattr(backend, make)(None)


def test_every_switch_finds_what_it_puts_in_place(monkeypatch):
    """Pins a row that names a function which is not there: a run on a CPU would not notice."""
    pytest.importorskip("triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    for table in (*backend.BY_FLAG.values(), *backend.BY_FLAG_ON_GPU.values()):
        for make in table.values():
            assert callable(make(lambda: None))


def test_deep_gemm_needs_a_compiler(monkeypatch):
    """Pins the same for nvcc."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("os.path.exists", lambda name: False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(ValueError, match="nvcc"):
        backend._deep_gemm(None)


def test_attention_of_zeros_is_refused(tmp_path, monkeypatch):
    """Pins a run whose attention is zero everywhere and whose loss says nothing (NVIDIA/TransformerEngine#3528)."""
    from infir2 import engine

    engine.refuse_attention("flash")
    (tmp_path / "flash_attn_4-4.0.0.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.0.dist-info/METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    engine.refuse_attention("fused")
    for chosen in ("flash", "auto"):
        with pytest.raises(ValueError, match="--flash-attention-4 calls it right"):
            engine.refuse_attention(chosen)


def known_flags() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    from infir2 import engine, pretrain, sft
    from infir2.rl import arguments as rl_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve"))
    for stage in (pretrain.Pretraining(), sft.FineTuning(), rl_arguments.ReinforcementLearning()):
        parser = engine.add_arguments(stage, parser)
    rl_arguments.add_cluster_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_every_flag_exists():
    """Each flag in the scripts' golden command lines and in the backends' own is one that Megatron 0.19.2 parses.

    Pins: flags of another release, which argparse refuses only on the cluster.
    """
    from infir2 import backend

    golden = Path(__file__).parent / "golden/argv"
    words = {word for path in golden.glob("*") for word in path.read_text().split()}
    launcher = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    launcher |= {"--", "--actor-num-nodes", "--actor-num-gpus-per-node", "--cpu", "--cwd"}  # infir2.ray_launch
    used = {word.partition("=")[0] for word in words if word.startswith("--")} - launcher
    used |= {word for kind in ("cpu", "gpu") for word in backend.arguments(kind) if word.startswith("--")}
    assert len(used) > 50
    assert used - with_megatron("test_backend", "known_flags") == set()


@pytest.mark.parametrize("flags", [[], ["--wandb-project=x"]])
def test_wandb_is_imported_where_it_is_used(flags, tmp_path):
    """Pins: two folders of wandb in the temporary folder after each killed run, which had no use for it."""
    program = "import os, signal, sys; from infir2 import backend; backend.install(); import megatron.core.timers\n"
    program += "print('wandb', bool(sys.modules.get('wandb')), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert f"wandb {bool(flags)}" in done.stdout, done.stderr
    assert bool(list(tmp_path.glob("*wandb*"))) == bool(flags)


def test_what_killed_processes_leave():
    """Their temporary files lie in a folder that goes with the tests. Pins: two folders of wandb, which Megatron
    imports, left in /tmp by each process that a test killed."""
    program = "import os, signal, tempfile; print(tempfile.mkdtemp(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    left = Path(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
    )
    assert left.is_dir()
    assert left.parent == Path(os.environ["TMPDIR"])
    assert left.parent.parent == Path(tempfile.gettempdir())
