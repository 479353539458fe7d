"""Targets of forked processes. Light to import: only the fork server has Megatron in memory (tests/zygote.py)."""

import importlib
import traceback


def run_rank(argv: list[str], environment: dict[str, str], log: str) -> None:
    """One rank of `infir2.pretrain`."""
    import zygote

    zygote.run_rank(argv, environment, log)


def call(path: list[str], module: str, function: str, arguments: tuple, pipe) -> None:
    """Call a function in a process with Megatron loaded; sends (True, result) or (False, traceback)."""
    import sys

    sys.path[:0] = path
    try:
        pipe.send((True, getattr(importlib.import_module(module), function)(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
