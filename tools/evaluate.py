#!/usr/bin/env python
"""Evaluate models on one benchmark: serve each, let evalscope ask and score, stop the server, report.

    python tools/evaluate.py --benchmark aime24 --dataset data/aime24 --model FP8=models/FP8 --model BF16=models/BF16 \\
        --samples 32 --max-tokens 31000 --temperature 0.65 --top-p 0.95 --output exp/eval

The scripts in scripts/eval call it with the recipe's numbers; docs/eval.md explains them. Under OUTPUT/BENCHMARK/ each
model gets a folder: `evalscope` (its work_dir), `server.log`, `request.json` (what was asked of what, by hash). Run
again, it asks only for the answers that are missing. The report is in that folder, of several models one above.

Refused, with status 2: datasets, models and servers that cannot give the score that was asked for, before anything is
started; folders that hold answers of another model or to other settings; a model's code where no sandbox can be made.
"""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2 import serving
from infir2.data.pretraining import positive
from infir2.evaluation.answers import server_error
from infir2.evaluation.benchmarks import BENCHMARKS, Benchmark, check
from infir2.files import json_lines, write_text
from infir2.indexed import DataError
from infir2.processes import GuardedProcess, exit_on_signals, without_proxy
from infir2.receipts import sha256_file
from infir2.serving import Server, ServerError

ROOT = Path(__file__).resolve().parents[1]
REPORT = "report"  # folder of reports
REQUEST_SECONDS = 18_000  # a long answer on a busy server
SERVED_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")

log = logging.getLogger("evaluate")


@dataclass(frozen=True)
class Model:
    """A model under evaluation: `served` is its name at the server, `folder` its files unless others serve it."""

    name: str
    served: str
    folder: Path | None
    output: Path

    @property
    def work_dir(self) -> Path:
        return self.output / "evalscope"

    @property
    def task_file(self) -> Path:
        return self.output / "task.json"

    def report(self, benchmark: str) -> Path:
        """What evalscope writes last."""
        return self.work_dir / "reports" / self.name / f"{benchmark}.json"


# What is asked


def make_task(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """evalscope's TaskConfig, without the server's address, and for run_evalscope.py what the model's chat template
    writes of its turn; of a server that somebody else runs that is not known."""
    benchmark = BENCHMARKS[args.benchmark]
    dataset = {
        "local_path": str(args.dataset.resolve()),
        **benchmark.arguments,
    }
    if args.system_prompt is not None:
        dataset["system_prompt"] = args.system_prompt
    if args.prompt_template is not None:
        dataset["prompt_template"] = args.prompt_template
    return {
        "model": model.served,
        "model_id": model.name,
        "eval_type": "openai_api",
        "datasets": [benchmark.evalscope],
        "dataset_args": {benchmark.evalscope: dataset},
        "repeats": args.samples,
        "generation_config": {
            **sampling(args),
            "max_tokens": args.max_tokens,
            "timeout": REQUEST_SECONDS,
            "stream": False,
        },
        "eval_batch_size": args.concurrency,
        "work_dir": str(model.work_dir),
        "no_timestamp": True,
        "turn_opening": serving.turn_opening(model.folder) if model.folder else "",
    }


def sampling(args: argparse.Namespace) -> dict[str, float]:
    return {"temperature": args.temperature, "top_p": args.top_p}


def make_request(args: argparse.Namespace, model: Model, task: dict[str, Any]) -> dict[str, Any]:
    """All that decides the answers and scores: settings, and the benchmark's and the model's files by hash."""
    decides = {key: value for key, value in task.items() if key not in ("eval_batch_size", "work_dir", "no_timestamp")}
    files = {} if model.folder is None else hashes(model.folder, SERVED_FILES)
    return {"task": decides, "dataset": hashes(args.dataset, ("**/*",)), "model": files}


def hashes(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files of a folder that match, by their path in it."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


# What is there already


def open_folder(model: Model, task: dict[str, Any], request: dict[str, Any]) -> None:
    """Make the model's folder, or continue one of the same request. Refuses another's, and lines that are damaged."""
    record = model.output / "request.json"
    if record.is_file():
        before = json.loads(record.read_text("utf-8"))
        if changed := sorted(_differences(before, request)):
            raise DataError(
                f"{model.output} holds answers to another request; what differs: {', '.join(changed)}. Choose another "
                "OUTPUT or NAME, or remove that folder."
            )
        repair(model)
    else:
        if model.output.is_dir() and model.work_dir.exists():
            raise DataError(f"{model.work_dir} was not made by this program. Choose another OUTPUT or NAME.")
        model.output.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(request, indent=1, ensure_ascii=False))
    write_text(model.task_file, json.dumps(task, indent=1, ensure_ascii=False))


def _differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from _differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
    elif before != after:
        yield name


def repair(model: Model) -> None:
    """Make what a killed run left fit to be continued: drop lines that were cut, errors of a server in an answer's
    place, and reviews of what is dropped."""
    for predictions in sorted((model.work_dir / "predictions" / model.name).glob("*.jsonl")):
        indices = _keep(predictions, lambda record: not server_error(record.get("model_output") or {}))
        reviews = model.work_dir / "reviews" / model.name / predictions.name
        if reviews.is_file():
            _keep(reviews, lambda record, indices=indices: record["index"] in indices)


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> set[int]:
    """Remove the lines of a file of evalscope that are not wanted, and the last one if it was cut; returns the indices
    of the others. Refuses other damage."""
    lines, cut = json_lines(path, errors="replace"), not path.read_bytes().endswith(b"\n")
    kept: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        try:
            if last and cut:
                raise ValueError("no end of line")
            record = json.loads(line)
            if wanted(record):
                kept[record["index"]] = line
            else:
                log.warning("%s, line %d is dropped: no answer of the model, or a review of none", path, number)
        except (ValueError, LookupError, TypeError, AttributeError):
            if not last:
                raise DataError(f"{path}, line {number} is damaged. Remove that line and run again.") from None
            log.warning("%s ended in the middle of a line, which is dropped: its answer is asked for again", path)
    if len(kept) < len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept.values()))
    return set(kept)


def answers(model: Model) -> int:
    """How many answers are there."""
    files = (model.work_dir / "predictions" / model.name).glob("*.jsonl")
    return sum(len(json_lines(path)) for path in files)


# Asking and scoring


def evaluate(args: argparse.Namespace, models: Sequence[Model]) -> None:
    """Bring every model's folder to a finished evaluation; does only what is missing."""
    benchmark = BENCHMARKS[args.benchmark]
    asked_for = check(benchmark, args.dataset) * args.samples
    for model in models:
        task = make_task(args, model)
        open_folder(model, task, make_request(args, model, task))
    unanswered = [model for model in models if answers(model) < asked_for]
    for group in groups(args, unanswered):
        if args.api_url:
            run_evalscope(args, phases(benchmark), group)
        else:
            serve_and_ask(args, phases(benchmark), group)
    unscored = [
        model
        for model in models
        if not model.report(benchmark.evalscope).is_file() or (benchmark.runs_code and model in unanswered)
    ]
    if unscored:
        run_evalscope(args, ["--review"], unscored)


def phases(benchmark: Benchmark) -> list[str]:
    """What evalscope does while the server runs. A model's code runs when it has ended, and without its memory."""
    return ["--ask"] if benchmark.runs_code else ["--ask", "--review"]


def groups(args: argparse.Namespace, models: Sequence[Model]) -> list[Sequence[Model]]:
    """Models that one server takes: SGLang holds one; `transformers serve` loads any as it is asked for it."""
    if args.backend == "gpu" and not args.api_url:
        return [[model] for model in models]
    return [models] if models else []


def serve_and_ask(args: argparse.Namespace, what: Sequence[str], models: Sequence[Model]) -> None:
    """Start a server for the models and, while it gets ready, evalscope, which then does `what`. Ends both."""
    folders, log_file = [model.folder for model in models], models[0].output / "server.log"
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "address"
        with (
            evalscope_process(args, ["--address", str(address), *what], models) as evalscope,
            serving.serving(server(args), folders, sampling(args), log_file) as (url, process),
        ):
            write_text(address, url)
            await_end(evalscope, process, log_file)


def server(args: argparse.Namespace) -> Server:
    return Server(args.backend, args.tensor_parallel, shlex.split(args.server_args), args.port, args.ready_seconds)


def evalscope_command(args: argparse.Namespace, what: Sequence[str], models: Sequence[Model]) -> list[str]:
    return [args.evalscope, str(ROOT / "tools/run_evalscope.py"), *what, *(str(model.task_file) for model in models)]


def evalscope_process(args: argparse.Namespace, what: Sequence[str], models: Sequence[Model]) -> GuardedProcess:
    environment = {"EVALSCOPE_BASE_URL": args.api_url, "EVALSCOPE_API_KEY": args.api_key, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT / "training")  # infir2 is not installed beside evalscope
    if not args.api_url:
        environment |= without_proxy()
    return GuardedProcess(evalscope_command(args, what, models), environment, sys.stderr.fileno())


def run_evalscope(args: argparse.Namespace, what: Sequence[str], models: Sequence[Model]) -> None:
    """Run evalscope, with the server at --api-url or without one."""
    with evalscope_process(args, what, models) as evalscope:
        await_end(evalscope)


def await_end(evalscope: GuardedProcess, server: GuardedProcess | None = None, log_file: Path | None = None) -> None:
    """Wait for evalscope. Its failure is ours, and so is a server's that ends first; `log_file` is that one's."""
    while (status := evalscope.wait(0.5)) is None:
        if server is not None and (ended := server.status()) is not None:
            raise serving.ended(ended, log_file)
    if status:
        what = f"evalscope ended with status {status}; its messages are above. Run again: what is there is kept"
        raise serving.failure(what, log_file) if log_file else ServerError(f"{what}.")


# The report


def report_folder(args: argparse.Namespace, models: Sequence[Model]) -> Path:
    return (models[0].output if len(models) == 1 else models[0].output.parent) / REPORT


def report_command(args: argparse.Namespace, models: Sequence[Model]) -> list[str]:
    words = [sys.executable, str(ROOT / "tools/eval_report.py")]
    for model in models:
        words += ["--run", f"{model.name}={model.work_dir}"]
    if len(models) > 1:
        words += ["--compare", *(model.name for model in models)]
    for pair in args.trained_on:
        words += ["--trained-on", pair]
    if args.mark_overlap:
        words.append("--mark-overlap")
    return [*words, "--output", str(report_folder(args, models))]


def report(args: argparse.Namespace, models: Sequence[Model]) -> int:
    """Make the report anew: it follows from evalscope's folders, and an old one may be of fewer answers."""
    shutil.rmtree(report_folder(args, models), ignore_errors=True)
    return subprocess.run(report_command(args, models), check=False).returncode


# The command line


def find_models(args: argparse.Namespace) -> list[Model]:
    """The models of the command line. Refuses folders that cannot be served as asked."""
    output = args.output.resolve() / args.benchmark
    if not args.api_url:
        if not args.model:
            raise DataError("no model: name one with --model NAME=FOLDER, or a server with --api-url")
        found = [Model(name, str(folder.resolve()), folder.resolve(), output / name) for name, folder in args.model]
        for model in found:
            serving.check_model(model.folder, args.backend, args.temperature)
        return found
    if args.dry_run and not args.model:
        return [Model("MODEL", "MODEL", None, output / "MODEL")]
    pairs = args.model or [_only_model(args)]
    found = [Model(name, str(served), None, output / name) for name, served in pairs]
    for model in found if not args.dry_run else ():
        serving.check_running(args.api_url, model.served, sampling(args), args.api_key)
    return found


def _only_model(args: argparse.Namespace) -> tuple[str, str]:
    served = serving.only_model(args.api_url, args.api_key)
    try:
        return check_name(Path(served).name), served
    except ValueError as error:
        raise DataError(f"the server's model: {error}. Name it: --model NAME={served}.") from None


def show(args: argparse.Namespace, models: Sequence[Model]) -> None:
    """What would be run, in order."""
    benchmark = BENCHMARKS[args.benchmark]
    for group in groups(args, models):
        if not args.api_url:
            print(shlex.join(server(args).command([model.folder for model in group], "PORT")))
        print(shlex.join(evalscope_command(args, phases(benchmark), group)))
    if benchmark.runs_code:
        print(shlex.join(evalscope_command(args, ["--review"], models)))
    print(shlex.join(report_command(args, models)))
    for model in models:
        print(f"{model.task_file}:\n{json.dumps(make_task(args, model), indent=1, ensure_ascii=False)}")


def check_name(name: str) -> str:
    """Refuse (ValueError) a name that cannot be a model's folder beside the reports."""
    if not name or "/" in name or name.startswith(".") or name.lower() == REPORT:
        raise ValueError(f"{name!r} cannot be the folder of a model ({REPORT!r} is the report's)")
    return name


def named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    try:
        if equals and folder:
            return check_name(name), Path(folder)
        raise ValueError("no name, or no folder")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FOLDER, with a NAME that can be a folder's: {error}. Choose another NAME."
        ) from None


def _api_url(parser: argparse.ArgumentParser, text: str) -> str:
    """The address that /chat/completions is added to."""
    url = text.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    if url and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
        parser.error(f"--api-url {text!r} is no address of a server; expected http://HOST:PORT/v1, without ? and #")
    return url


def _between(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, found {text}")
        return value

    return number


def parse(words: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--benchmark", choices=list(BENCHMARKS), required=True)
    add("--dataset", type=Path, required=True, help="folder of the benchmark's problems")
    add("--model", type=named, action="append", default=[], metavar="NAME=DIR", help="Hugging Face folder; repeat")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--samples", type=positive, required=True, help="answers to each problem")
    add("--max-tokens", type=positive, required=True, help="of an answer")
    add("--temperature", type=_between(0, 100), required=True)
    add("--top-p", type=_between(0, 1), required=True)
    add("--system-prompt", help="the benchmark's own in evalscope otherwise")
    add("--prompt-template", help="of the user's message; {question} is the problem; evalscope's own otherwise")
    add("--concurrency", type=int, default=0, help="requests at once (128; 32 to a CPU of ours)")
    add("--backend", choices=["gpu", "cpu"], default="cpu", help="SGLang or transformers serve")
    add("--tensor-parallel", type=positive, default=1, metavar="GPUS")
    add("--server-args", default="", help="more of the server's arguments, as one word")
    add("--port", type=int, default=0, help="of the server (a free one)")
    add("--ready-seconds", type=float, default=1800, help="how long a server may take to complete its first chat")
    add("--api-url", default="", help="http://HOST:PORT/v1 of a running server; --model NAME=MODEL names its models")
    add("--evalscope", default=str(ROOT / ".venv-eval/bin/python"), help="the Python that has evalscope")
    add("--trained-on", type=named, action="append", default=[], metavar="NAME=DIR", help="as for eval_report.py")
    add("--mark-overlap", action="store_true", help="as for eval_report.py")
    add("--dry-run", action="store_true", help="check, and print the commands and evalscope's task")
    args = parser.parse_args(words)
    args.trained_on = [f"{name}={folder}" for name, folder in args.trained_on]
    args.api_url = _api_url(parser, args.api_url)
    args.concurrency = args.concurrency or (32 if args.backend == "cpu" and not args.api_url else 128)
    args.api_key = os.environ.get("API_KEY") or "EMPTY"
    names = [name for name, _ in args.model]
    if len(set(names)) != len(names):
        parser.error(f"--model names must differ, found {', '.join(names)}")
    return args


def main(words: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s", stream=sys.stderr)
    args = parse(words)
    exit_on_signals()
    direct = [os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, direct))
    try:
        check(BENCHMARKS[args.benchmark], args.dataset)
        models = find_models(args)
        if args.dry_run:
            show(args, models)
            return 0
        evaluate(args, models)
    except (DataError, OSError) as error:
        log.error("error: %s", error)
        return 2
    except ServerError as error:
        log.error("error: %s", error)
        return 1
    return report(args, models)


if __name__ == "__main__":
    sys.exit(main())
