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

A server's error is never an answer. evalscope asks up to five times where a server is busy or gone; what fails even so,
or is refused, is counted, left out, and asked for again when the others are answered. More than MOST_FAILED of the
requests, or one that fails in each of PASSES, and this ends with status 1. A response is judged from its last thought
on; one whose thought has no end has no answer (infir2.evaluation.answers). `turn_opening` in a TASK is what the model's
chat template writes of its turn.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalscope.api.benchmark.adapters.default_data_adapter import DefaultDataAdapter
from evalscope.api.metric import Score
from evalscope.api.registry import BENCHMARK_REGISTRY, EVALUATOR_REGISTRY
from evalscope.benchmarks.live_code_bench import testing_util
from evalscope.benchmarks.live_code_bench.live_code_bench_adapter import LiveCodeBenchAdapter
from evalscope.config import TaskConfig
from evalscope.evaluator.evaluator import DefaultEvaluator
from evalscope.models.openai_compatible import OpenAICompatibleAPI
from evalscope.run import run_task
from openai import APIStatusError

from infir2.evaluation import answers, code_review, sandbox

LIVE_CODE_BENCH = "live_code_bench"
MOST_FAILED = 0.05  # share of a pass's requests that may fail, or FEW of them
FEW = 3
PASSES = 3


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


class ServerFailed(Exception):
    """Requests that got no answer: how many, and what the first one got."""


class Asking(DefaultEvaluator):
    """Every answer is written down as it comes; none is reviewed. What got none is in `failed`."""

    failed: list[Exception] = []  # a new one for each pass

    def _run_pool(self, context: Any) -> dict:
        self.asked = sum(item.needs_predict for item in context.work_items)
        return super()._run_pool(context)

    def _process_work_item(self, item: Any, model_prediction_dir: str) -> tuple[Any, None]:
        if not item.needs_predict:
            return item.task_state, None
        try:
            state = self._predict_sample(item.sample, model_prediction_dir)
            if reason := answers.server_error(state.output.model_dump()):
                raise ValueError(reason)
        except Exception as error:
            self.failed.append(error)
            if len(self.failed) > max(FEW, MOST_FAILED * self.asked):
                raise ServerFailed(f"{len(self.failed)} of {self.asked} requests failed so far") from error
            return None, None
        with self._prediction_cache_lock:
            self.cache_manager.save_prediction_cache(item.subset, state, self.benchmark.save_metadata)
        item.prediction_persisted = True
        return state, None

    def _persist_result(self, item: Any, task_state: Any, sample_score: None) -> None:
        if task_state is not None:
            super()._persist_result(item, task_state, sample_score)

    def _aggregate_scores(self, *_: Any) -> None:
        raise AllAsked


def raise_it(_: Any, error: Exception) -> None:
    """In place of evalscope's, which takes what some refusals say for an answer."""
    raise error


def said(error: BaseException) -> str:
    """What a server said; the client's own error leaves that out."""
    if not isinstance(error, APIStatusError):
        return f"{type(error).__name__}: {error}"
    answer = error.response
    return f"{answer.request.url} answered {answer.status_code}: {answer.text[:2000]!r}"


def judged(opening: str) -> Callable:
    """evalscope's `filter_prediction`, of what is to be judged."""

    def filter_prediction(self: DefaultDataAdapter, prediction: str, task_state: Any) -> str:
        choice = task_state.output.choices[0]
        parts = choice.message.content if isinstance(choice.message.content, list) else []
        apart = any(part.type == "reasoning" for part in parts)
        text = answers.judged_text(prediction, opening, choice.stop_reason == "max_tokens", apart)
        return self.extract_answer(text, task_state)

    return filter_prediction


def run(task: dict[str, Any]) -> None:
    """One task. evalscope continues a folder only if it is told to, and only if a task was started there."""
    task = dict(task)
    DefaultDataAdapter.filter_prediction = judged(task.pop("turn_opening", ""))
    work_dir = Path(task["work_dir"])
    if (work_dir / "configs" / "task_config.yaml").is_file():
        task["use_cache"] = str(work_dir)
    run_task(TaskConfig(api_key=os.environ.get("EVALSCOPE_API_KEY", "EMPTY"), **task))


def ask(task: dict[str, Any]) -> None:
    """Get the answers that are missing. Raises ServerFailed if they do not come."""
    EVALUATOR_REGISTRY["default"] = Asking
    for number in range(1, PASSES + 1):
        Asking.failed = []
        with contextlib.suppress(AllAsked):
            run(task)
        if not Asking.failed:
            return
        print(f"{len(Asking.failed)} requests failed in pass {number} of {PASSES}", file=sys.stderr)
    raise ServerFailed(f"{len(Asking.failed)} requests failed in each of {PASSES} passes")


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
    OpenAICompatibleAPI.handle_bad_request = raise_it
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
    except ServerFailed as error:
        print(f"error: {error}, the first with: {said(Asking.failed[0])}. See to the server.", file=sys.stderr)
        return 1
    except APIStatusError as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 1
    for task in tasks if args.review else ():
        review(task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
