"""The CPU backend's patches and flags fit the pinned releases."""

import argparse
from pathlib import Path

import pytest
from trainer import with_megatron

from infir2 import backend


def missing_attributes() -> list[str]:
    missing = []
    by_flag = [path for table in backend.BY_FLAG_ON_GPU.values() for path in table if path.startswith("megatron")]
    for path in (*backend.TORCH_ON_CPU, *backend.MEGATRON_ON_CPU, *by_flag, *backend.MEGATRON):
        owner, attribute = backend.resolve(path)
        if not hasattr(owner, attribute):
            missing.append(path)
    return missing


def test_every_patched_attribute_exists():
    """Pins: an upgrade that renames an attribute turns its patch into one that nobody reads."""
    assert with_megatron("test_backend", "missing_attributes") == []


def test_deep_gemm_is_asked_for(monkeypatch):
    """Pins a run that stops in its first step, for want of a package, instead of before it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sgl-deep-gemm"):
        backend._deep_gemm(None)


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
    used = {word for word in words if word.startswith("--")} - launcher
    used |= {word for kind in ("cpu", "gpu") for word in backend.arguments(kind) if word.startswith("--")}
    assert len(used) > 50
    assert used - with_megatron("test_backend", "known_flags") == set()
