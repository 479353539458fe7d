#!/usr/bin/env python
"""Run evalscope tasks in one process: all answers first, then all reviews. For tools/evaluate.py.

    EVALSCOPE_BASE_URL=http://127.0.0.1:8000/v1 .venv-eval/bin/python tools/run_evalscope.py --ask --review TASK.json...
    .venv-eval/bin/python tools/run_evalscope.py --address FILE --ask --review TASK.json...
    .venv-eval/bin/python tools/run_evalscope.py --review TASK.json...

A TASK is evalscope's TaskConfig as JSON; its work_dir is continued where an earlier run stopped. evalscope by itself
reviews each answer as it comes, with as many processes as there are requests: too many for the cores, and its time
limit for a review could strike at right answers. Here reviews have a core each. LiveCodeBench's run in our sandbox
alone. The server's address is no part of a TASK: evalscope takes answers from another port for another task's. With
--address it is read from a file as soon as that is there, so that what takes seconds to import is imported while the
server starts.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from evalscope.api.metric import Score
from evalscope.api.registry import BENCHMARK_REGISTRY, EVALUATOR_REGISTRY
from evalscope.benchmarks.live_code_bench import testing_util
from evalscope.benchmarks.live_code_bench.live_code_bench_adapter import LiveCodeBenchAdapter
from evalscope.config import TaskConfig
from evalscope.evaluator.evaluator import DefaultEvaluator
from evalscope.run import run_task
from openai import APIStatusError

from infir2.evaluation import code_review, sandbox

LIVE_CODE_BENCH = "live_code_bench"


class AllAsked(Exception):
    """The answers are there, and are not to be reviewed now."""


class Reviewing(LiveCodeBenchAdapter):
    """LiveCodeBench whose code runs in infir2.evaluation.sandbox; the original runs it as a child of this process."""

    def match_score(self, original_prediction: str, filtered_prediction: str, reference: str, task_state: Any) -> Score:
        tests = task_state.metadata["evaluation_sample"]
        checker = Path(testing_util.__file__)
        verdict = code_review.review(filtered_prediction, tests, checker, self.review_timeout)
        score = Score(extracted_prediction=filtered_prediction, prediction=original_prediction)
        score.value = {"acc": float(verdict.right)}
        score.main_score_name = "acc"
        score.explanation = verdict.reason
        score.metadata = {"results": verdict.results, "seconds_per_test": self.review_timeout}
        return score


class Asking(DefaultEvaluator):
    """Every answer is written down as it comes; none is reviewed."""

    def _process_work_item(self, item: Any, model_prediction_dir: str) -> tuple[Any, None]:
        if not item.needs_predict:
            return item.task_state, None
        state = self._predict_sample(item.sample, model_prediction_dir)
        with self._prediction_cache_lock:
            self.cache_manager.save_prediction_cache(item.subset, state, self.benchmark.save_metadata)
        item.prediction_persisted = True
        return state, None

    def _aggregate_scores(self, *_: Any) -> None:
        raise AllAsked


def run(task: dict[str, Any]) -> None:
    """One task. evalscope continues a folder only if it is told to, and only if a task was started there."""
    work_dir = Path(task["work_dir"])
    if (work_dir / "configs" / "task_config.yaml").is_file():
        task = {**task, "use_cache": str(work_dir)}
    run_task(TaskConfig(api_key=os.environ.get("EVALSCOPE_API_KEY", "EMPTY"), **task))


def ask(task: dict[str, Any]) -> None:
    """Get the answers that are missing."""
    EVALUATOR_REGISTRY["default"] = Asking
    with contextlib.suppress(AllAsked):
        run(task)


def review(task: dict[str, Any]) -> None:
    """Review the answers that have not been, and write evalscope's report."""
    EVALUATOR_REGISTRY["default"] = DefaultEvaluator
    run({**task, "eval_batch_size": code_review.workers()})


def warm_up() -> None:
    """Import what the first review would wait for: sympy and the grammar of LaTeX, 3 s."""
    from math_verify import parse

    parse("$1$")


def await_address(file: Path) -> None:
    """Use the server whose address a line of `file` is, once it is there. We are ended if it never comes."""
    while not file.is_file():
        time.sleep(0.1)
    os.environ["EVALSCOPE_BASE_URL"] = file.read_text("utf-8").strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--review", action="store_true")
    parser.add_argument("--address", type=Path, metavar="FILE", help="wait for it; it holds the server's base URL")
    parser.add_argument("tasks", nargs="+", type=Path, metavar="TASK.json")
    args = parser.parse_args()
    for name in ("math_verify.parser", "math_verify.grader"):  # each answer warns that it has no time limit of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    BENCHMARK_REGISTRY.get(LIVE_CODE_BENCH).data_adapter = Reviewing
    tasks = [json.loads(path.read_text("utf-8")) for path in args.tasks]
    code = any(LIVE_CODE_BENCH in task["datasets"] for task in tasks)
    if args.review and code and (lacking := sandbox.missing()):
        print(f"error: code written by a model is not run here: {lacking}. Nothing was run.", file=sys.stderr)
        return 2
    if args.address:
        if args.review:
            warm_up()
        await_address(args.address)
    try:
        for task in tasks if args.ask else ():
            ask(task)
    except APIStatusError as error:  # its own text leaves out what the server said
        answer = error.response
        print(f"error: {answer.request.url} answered {answer.status_code}: {answer.text[:2000]!r}", file=sys.stderr)
        return 1
    for task in tasks if args.review else ():
        review(task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
