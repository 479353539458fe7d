"""Whether code written by a model passes a problem's tests: LiveCodeBench's own checker, run in a sandbox.

The checker is `run_test` of LiveCodeBench, as evalscope carries it: an answer is right if it passes every test, each
within the time limit; its rules for reading input and comparing output are not rewritten here. It runs the code in its
own process, so code that sets out to deceive it can (as anywhere LiveCodeBench is run); nothing else is within reach.

This file is also the program inside the box (`_check`), where it needs Python, numpy and that one file of evalscope.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

START_SECONDS = 10  # for Python and numpy on a busy machine


@dataclass(frozen=True)
class Verdict:
    """Whether the code is right, each test's result in LiveCodeBench's numbers (above 0 is passed), and why not."""

    right: bool
    results: list[int]
    reason: str


def review(code: str, tests: str, checker: Path, seconds: float) -> Verdict:
    """Check `code` against LiveCodeBench's `tests` (JSON: inputs, outputs, fn_name), `seconds` for each of them.

    `checker` is evalscope's testing_util.py. As in LiveCodeBench all tests together have (seconds + 1) each; what is
    not done then has failed. Raises infir2.evaluation.sandbox.SandboxError where code cannot be run safely.
    """
    from infir2.evaluation import sandbox  # not there inside the box

    limits = sandbox.Limits(START_SECONDS + (seconds + 1) * len(json.loads(tests)["inputs"]))
    request = {"code": code, "tests": tests, "checker": str(checker), "seconds": seconds}
    readable = [*sandbox.python_files(), Path(__file__), checker]
    command = [sys.executable, "-I", __file__]
    outcome = sandbox.run(command, json.dumps(request).encode(), limits, readable)
    try:
        answer = json.loads(outcome.output)
        results, reason = [int(result) for result in answer["results"]], str(answer["reason"])
    except (ValueError, LookupError, TypeError):
        ended = f"{outcome.exceeded} limit" if outcome.exceeded else f"status {outcome.status}"
        return Verdict(False, [], f"ended without a result: {ended}")
    right = bool(results) and all(result > 0 for result in results)
    return Verdict(right, results, "" if right else reason)


def workers() -> int:
    """How many reviews may run at once: one a core, as far as memory goes."""
    from infir2.evaluation.sandbox import Limits

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // Limits(0).memory))


def _check() -> None:
    """Inside the box: read a request, run its code without stdin, stdout and stderr, write the results."""
    request = json.load(sys.stdin.buffer)
    checker = _load(Path(request["checker"]))
    channel, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    reason = ""
    try:
        tests = {"input_output": request["tests"]}
        results, about = checker.run_test(tests, test=request["code"], timeout=request["seconds"])
        reason = str(about.get("error_message") or about.get("error") or "")
        results = [int(result) for result in results]
    except BaseException as error:  # of the code's making
        results, reason = [-4], repr(error)
    os.write(channel, json.dumps({"results": results, "reason": reason[:500]}).encode())
    os._exit(0)


def _load(path: Path) -> ModuleType:
    """The checker's module without the rest of evalscope, whose import takes seconds; it needs a logger and a clock."""
    silent = SimpleNamespace(info=lambda *_: None)
    for name, content in {"io_utils": {"current_time": None}, "logger": {"get_logger": lambda: silent}}.items():
        sys.modules[f"evalscope.utils.{name}"] = module = ModuleType(name)
        vars(module).update(content)
    spec = importlib.util.spec_from_file_location("testing_util", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _check()
