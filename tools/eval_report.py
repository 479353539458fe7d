#!/usr/bin/env python
"""Report on evaluations by evalscope 1.14.1: scores with intervals, differences, truncation, length, invalid answers.

    python tools/eval_report.py --run FP8=exp/eval/fp8 --run BF16=exp/eval/bf16 --compare FP8 BF16 --output exp/report

Writes scores.json, scores.md, scores.png and scores.html, which needs no network and no script; prints the Markdown.
Every number is computed from evalscope's reviews and predictions, and must agree with evalscope's own report. The unit
is the problem: infir2.evaluation.scores gives the formulas and their sources. A difference inside its interval is no
difference.

Refused, with status 2: folders that are empty, unfinished, cut or have duplicates; comparisons over other problems,
benchmarks or sampling settings; and scores of a model whose training data held problems of the benchmark
(--trained-on names the data's folders), unless --mark-overlap marks them.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from infir2.evaluation import scores
from infir2.evaluation.answers import server_error
from infir2.evaluation.scores import Estimate
from infir2.files import json_lines
from infir2.indexed import DataError
from infir2.receipts import building, read_manifest, sha256_file

TRUNCATED = "max_tokens"  # evalscope's word for the finish reason `length`
CLEAN_ACTIONS = ("drop", "fail")  # of prepare_data.py: what it found is not in the data
SAME_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "stop", "stop_seqs")
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
NO_DIFFERENCE = "no difference"

log = logging.getLogger("eval_report")

# Reading evalscope's folders


@dataclass(frozen=True)
class Result:
    """All answers of one model to one benchmark. Arrays [problems, samples], problems in the order of `problems`."""

    problems: list[str]  # SHA-256 of each prompt with its target
    prompts: list[str]
    right: np.ndarray  # 0.0 or 1.0
    truncated: np.ndarray
    invalid: np.ndarray  # no answer was extracted
    length: np.ndarray
    length_unit: str  # tokens, or characters where the server did not count tokens
    file_hashes: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One model's evaluation: a folder that evalscope made."""

    name: str
    folder: Path
    model: str
    settings: dict[str, Any]  # evalscope's generation_config
    datasets: dict[str, str]  # benchmark to the path its problems came from
    evalscope: str
    results: dict[str, Result]


def read_run(name: str, folder: Path) -> Run:
    """Read and check a folder of evalscope. Refuses what is missing, cut, doubled or does not agree with its report."""
    config = _read_config(folder)
    model = _only_model(folder)
    reports = {path.stem: json.loads(path.read_text("utf-8")) for path in (folder / "reports" / model).glob("*.json")}
    files = _files_by_benchmark(folder, model, sorted(reports))
    results = {}
    for benchmark, pairs in tqdm(sorted(files.items()), desc=name, disable=None):
        results[benchmark] = _read_result(pairs)
        _check_report(results[benchmark], reports[benchmark], f"{folder}: {benchmark}")
    resolved = config.get("resolved_benchmarks") or {}
    datasets = {key: str(value.get("dataset_id")) for key, value in resolved.items()}
    version = str(config.get("evalscope_version"))
    return Run(name, folder, model, config.get("generation_config") or {}, datasets, version, results)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "configs" / "task_config.yaml"
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist, so {folder} is no output folder of evalscope. Name the --work-dir of evalscope "
            "eval (with --no-timestamp), or run it first."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}. Run the evaluation again with --use-cache.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds no settings. Run the evaluation again with --use-cache.")
    return config


def _only_model(folder: Path) -> str:
    models = sorted(path.name for path in folder.glob("predictions/*") if path.is_dir())
    if len(models) != 1:
        raise DataError(
            f"{folder}/predictions holds {models or 'no model'}; a run is one model. Evaluate each model into a "
            "folder of its own."
        )
    return models[0]


def _files_by_benchmark(folder: Path, model: str, benchmarks: list[str]) -> dict[str, list[tuple[Path, Path]]]:
    """Predictions and reviews of each benchmark, one pair a subset: BENCHMARK_SUBSET.jsonl."""
    predictions = sorted((folder / "predictions" / model).glob("*.jsonl"))
    if not predictions:
        raise DataError(f"{folder}/predictions/{model} is empty: nothing was evaluated. Run the evaluation first.")
    files: dict[str, list[tuple[Path, Path]]] = {}
    for path in predictions:
        owners = [name for name in benchmarks if path.name.startswith(f"{name}_")]
        if not owners:
            raise DataError(
                f"{path} has no report in {folder}/reports/{model}: the evaluation did not finish. Run it again with "
                "--use-cache, which asks only for what is missing."
            )
        files.setdefault(max(owners, key=len), []).append((path, folder / "reviews" / model / path.name))
    return files


def _records(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a file of evalscope by their index. Refuses a missing, cut or doubled one."""
    if not path.is_file():
        raise DataError(f"{path} is missing: answers were not reviewed. Run the evaluation again with --use-cache.")
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(json_lines(path, errors="replace"), 1):
        try:
            record = json.loads(line)
            index = record["index"]
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}, line {number} is cut or damaged. Remove it and run the evaluation again with --use-cache."
            ) from None
        if index in found:
            raise DataError(f"{path}, line {number}: index {index} stands there twice. Evaluate into a new folder.")
        found[index] = record
    if not found:
        raise DataError(f"{path} is empty. Run the evaluation again with --use-cache.")
    return found


@dataclass(frozen=True)
class _Answer:
    problem: str
    prompt: str
    group: tuple[str, Any]  # subset and evalscope's group_id
    generation: int
    right: float
    truncated: bool
    invalid: bool
    tokens: int | None
    characters: int


def _read_result(pairs: list[tuple[Path, Path]]) -> Result:
    answers = []
    for predictions, reviews in pairs:
        predicted, reviewed = _records(predictions), _records(reviews)
        lacking = sorted(predicted.keys() ^ reviewed.keys())
        if lacking:
            raise DataError(
                f"{reviews} holds {len(reviewed)} reviews of {len(predicted)} predictions; index {lacking[0]} is on "
                "one side only. Run the evaluation again with --use-cache."
            )
        for index, review in reviewed.items():
            try:
                answers.append(_answer(predictions.stem, predicted[index], review))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise DataError(
                    f"{reviews}, index {index} is not as evalscope 1.14.1 writes it: {error!r}. Evaluate again with it."
                ) from error
    hashes = {path.name: sha256_file(path) for pair in pairs for path in pair[1:]}
    return _arranged(answers, hashes, pairs[0][0])


def _answer(subset: str, prediction: dict[str, Any], review: dict[str, Any]) -> _Answer:
    scored, output = review["sample_score"], prediction["model_output"]
    if (failure := server_error(output)) or scored["score"]["status"] != "success":
        raise DataError(
            f"{subset}, index {review['index']} has no score: {failure or scored['score']['status']}. "
            "Remove it from predictions and reviews, and run the evaluation again with --use-cache."
        )
    prompt = "\n".join(_text(message["content"]) for message in review["messages"] if message["role"] != "assistant")
    identity = hashlib.sha256(json.dumps([prompt, review["target"]]).encode()).hexdigest()
    choice, usage = output["choices"][0], output.get("usage") or {}
    return _Answer(
        problem=identity,
        prompt=prompt,
        group=(subset, scored["group_id"]),
        generation=scored["generation_index"],
        right=_zero_or_one(scored["score"], f"{subset}, index {review['index']}"),
        truncated=choice["stop_reason"] == TRUNCATED,
        invalid=not (scored["score"]["extracted_prediction"] or "").strip(),
        tokens=usage.get("output_tokens") or None,
        characters=len(_text(choice["message"]["content"])),
    )


def _text(content: Any) -> str:
    """A message's text; of one in parts all of it, reasoning included."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("reasoning") or "" for part in content or [])


def _zero_or_one(score: dict[str, Any], where: str) -> float:
    values = score["value"]
    name = score["main_score_name"] or next(iter(values), None)
    if values.get(name) not in (0, 1):
        raise DataError(
            f"{where}: the score is {values}, not right or wrong (1 or 0). This report needs such a metric."
        )
    return float(values[name])


def _arranged(answers: list[_Answer], hashes: dict[str, str], where: Path) -> Result:
    """The answers as arrays, problems sorted. Refuses groups of unequal size and problems that stand there twice."""
    groups: dict[tuple[str, Any], dict[int, _Answer]] = {}
    for answer in answers:
        group = groups.setdefault(answer.group, {})
        if answer.generation in group:
            raise DataError(f"{where}: answer {answer.generation} to problem {answer.group[1]} stands there twice.")
        group[answer.generation] = answer
    samples = max(map(len, groups.values()))
    for (subset, number), group in groups.items():
        if sorted(group) != list(range(samples)) or len({answer.problem for answer in group.values()}) != 1:
            raise DataError(
                f"{where}: problem {number} of {subset} has answers {sorted(group)}, expected 0 to {samples - 1} to "
                "one prompt. Run the evaluation again with --use-cache."
            )
    rows = sorted(([group[n] for n in range(samples)] for group in groups.values()), key=lambda row: row[0].problem)
    problems = [row[0].problem for row in rows]
    if len(set(problems)) != len(problems):
        raise DataError(f"{where}: {len(problems) - len(set(problems))} problems stand there twice. Remove them.")
    if len(rows) < 2:
        raise DataError(f"{where} holds one problem: an interval over problems needs at least 2.")

    def array(name: str) -> np.ndarray:
        return np.array([[getattr(answer, name) for answer in row] for row in rows], dtype=float)

    unit = "tokens" if all(answer.tokens is not None for answer in answers) else "characters"
    prompts = [row[0].prompt for row in rows]
    columns = [array(name) for name in ("right", "truncated", "invalid", unit)]
    return Result(problems, prompts, *columns, unit, hashes)


def _check_report(result: Result, report: dict[str, Any], where: str) -> None:
    """What evalscope reported of the benchmark must be what its reviews give: the count and the mean."""
    summary = report.get("execution_summary") or {}
    requested = summary.get("requested", result.right.size)
    if summary.get("incomplete") or summary.get("errored") or requested != result.right.size:
        raise DataError(
            f"{where}: {result.right.size} answers are there, {requested} were asked for, {summary.get('errored', 0)} "
            "failed. Run the evaluation again with --use-cache."
        )
    wanted = {"name": "accuracy", "aggregation": "mean", "dimensions": {}}
    means = [metric["score"] for metric in report["metrics"] if metric["identity"] == wanted]
    if not means or abs(means[0] - result.right.mean()) > 1e-4:
        raise DataError(
            f"{where}: evalscope's report says {means or 'nothing'} and its reviews give {result.right.mean():.4f}. "
            "One of them was changed or cut; evaluate into a new folder."
        )


# Overlap of training data with a benchmark


@dataclass(frozen=True)
class Overlap:
    """What training data held of a benchmark: the problems found, and whether the search covered the benchmark."""

    problems: set[str]  # of Result.problems
    searched: bool


def overlap_of(folder: Path, result: Result, benchmark_files: set[str]) -> Overlap:
    """The benchmark's problems in a folder of prepared data, or in a report of `prepare_data.py decontaminate`.

    A match of overlap.json is a problem of the benchmark if its excerpt stands in the prompt. `benchmark_files` are the
    SHA-256 of the benchmark's files: the search covered it if it read one of them. Refuses a changed report.
    """
    manifest = read_manifest(folder)
    path = folder / "overlap.json"
    if "overlap.json" not in manifest["outputs"]:
        return Overlap(set(), searched=False)
    if not path.is_file() or sha256_file(path) != manifest["outputs"]["overlap.json"]["sha256"]:
        raise DataError(f"{path} is missing or was changed after it was written. Prepare the data again.")
    report = json.loads(path.read_text("utf-8"))
    request = manifest["request"]
    clean = request.get("overlap_action") in CLEAN_ACTIONS or request.get("action") in CLEAN_ACTIONS
    excerpts = [] if clean else [" ".join(match["problem_excerpt"].split()) for match in report["matches"]]
    found = {
        problem
        for problem, prompt in zip(result.problems, result.prompts, strict=True)
        if any(excerpt in " ".join(prompt.split()) for excerpt in excerpts)
    }
    searched = bool(found) or any(receipt["sha256"] in benchmark_files for receipt in report["against"])
    return Overlap(found, searched)


def _benchmark_files(dataset: str | None) -> set[str]:
    """SHA-256 of a local dataset's files; none where the folder is not on this machine."""
    folder = Path(dataset or "")
    if not dataset or not folder.is_dir():
        return set()
    return {sha256_file(path) for path in folder.rglob("*") if path.suffix in (".jsonl", ".parquet")}


def overlaps(run: Run, folders: list[Path], mark: bool) -> dict[str, Overlap]:
    """Of each benchmark, over all of the run's training data. Refuses an overlap, unless it is to be marked."""
    found = {}
    for benchmark, result in run.results.items():
        files = _benchmark_files(run.datasets.get(benchmark))
        each = [overlap_of(folder, result, files) for folder in folders]
        problems = set().union(*(overlap.problems for overlap in each))
        if problems and not mark:
            raise DataError(
                f"{run.name} was trained on {len(problems)} of the {len(result.problems)} problems of {benchmark}: its "
                "score says nothing and is not published. Train without them (prepare_data.py --against ... --drop), "
                "or pass --mark-overlap to publish it with a mark."
            )
        found[benchmark] = Overlap(problems, bool(each) and all(overlap.searched for overlap in each))
    return found


# Scores and differences


@dataclass(frozen=True)
class Score:
    """One model's numbers on one benchmark."""

    problems: int
    samples: int
    average: Estimate
    sampling_error: float | None
    pass_at: dict[int, Estimate]
    truncated: Estimate
    invalid: Estimate
    length: Estimate
    length_unit: str
    longest: int
    overlap: str  # found, none, not checked
    overlapping: int
    without_overlap: Estimate | None
    file_hashes: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Difference:
    """One model less another on one benchmark, paired by problem."""

    one: str
    other: str
    estimate: Estimate
    verdict: str


def score(result: Result, overlap: Overlap) -> Score:
    """All numbers of a result; `average` is avg@n, the mean over problems and samples."""
    problems, samples = result.right.shape
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]
    clean = np.array([problem not in overlap.problems for problem in result.problems])
    without = scores.share(result.right[clean].mean(1)) if overlap.problems and clean.sum() > 1 else None
    return Score(
        problems,
        samples,
        scores.share(result.right.mean(1)),
        scores.sampling_error(result.right),
        {k: scores.share(scores.pass_at_k(result.right, k)) for k in powers},
        scores.share(result.truncated.mean(1)),
        scores.share(result.invalid.mean(1)),
        scores.amount(result.length.mean(1)),
        result.length_unit,
        int(result.length.max()),
        "found" if overlap.problems else "none" if overlap.searched else "not checked",
        len(overlap.problems),
        without,
        result.file_hashes,
    )


def compare(one: Run, other: Run) -> dict[str, Difference]:
    """Difference of two runs on each benchmark. Refuses other benchmarks, problems or sampling settings."""
    if one.results.keys() != other.results.keys():
        raise DataError(
            f"{one.name} has {sorted(one.results)} and {other.name} has {sorted(other.results)}: runs over other "
            "benchmarks are not compared. Evaluate both on the same."
        )
    settings = [key for key in SAME_SETTINGS if one.settings.get(key) != other.settings.get(key)]
    if settings:
        found = ", ".join(f"{key} {one.settings.get(key)} and {other.settings.get(key)}" for key in settings)
        raise DataError(f"{one.name} and {other.name} were sampled differently ({found}). Evaluate both the same way.")
    found = {}
    for benchmark, result in one.results.items():
        against = other.results[benchmark]
        if result.problems != against.problems:
            common = len(set(result.problems) & set(against.problems))
            raise DataError(
                f"{benchmark}: {one.name} answered {len(result.problems)} problems, {other.name} "
                f"{len(against.problems)}; {common} have the same prompt and target. Evaluate both on the same "
                "problems with one template."
            )
        estimate = scores.difference(result.right.mean(1), against.right.mean(1))
        found[benchmark] = Difference(one.name, other.name, estimate, verdict(estimate, one.name, other.name))
    return found


def verdict(estimate: Estimate, one: str, other: str) -> str:
    """Which is better, or that the interval of the difference does not exclude zero."""
    if estimate.low <= 0 <= estimate.high:
        return NO_DIFFERENCE
    return f"{one if estimate.value > 0 else other} is better"


@dataclass(frozen=True)
class Report:
    """Everything that is written: scores by benchmark and run, differences by benchmark."""

    runs: list[Run]
    scores: dict[str, dict[str, Score]]
    differences: dict[str, list[Difference]]


def make_report(
    folders: dict[str, Path], pairs: Sequence[tuple[str, str]], trained_on: dict[str, list[Path]], mark_overlap: bool
) -> Report:
    """Read, check and compute. `pairs` are names of runs to compare, `trained_on` folders of data by run."""
    runs = {name: read_run(name, folder) for name, folder in folders.items()}
    found: dict[str, dict[str, Score]] = {}
    for name, run in runs.items():
        marks = overlaps(run, trained_on.get(name, []), mark_overlap)
        for benchmark, result in run.results.items():
            found.setdefault(benchmark, {})[name] = score(result, marks[benchmark])
    differences: dict[str, list[Difference]] = {}
    for one, other in pairs:
        for benchmark, difference in compare(runs[one], runs[other]).items():
            differences.setdefault(benchmark, []).append(difference)
    return Report(list(runs.values()), dict(sorted(found.items())), differences)


# Tables, the same for Markdown and the page


@dataclass(frozen=True)
class Table:
    """A caption, a header and rows of text; the first column names, the others are numbers or words."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def percent(estimate: Estimate) -> str:
    """Value and interval in percent: 63.3 (45.1 - 78.2), with * where the interval is too narrow."""
    interval = f"{100 * estimate.low:.1f}{DASH}{100 * estimate.high:.1f}"
    return f"{100 * estimate.value:.1f} ({interval}){'*' if estimate.few_problems else ''}"


def amount(estimate: Estimate) -> str:
    """Value and interval of a length, with a decimal where it is short."""
    digits = 0 if estimate.value >= 100 else 1
    low, high = (f"{end:,.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{estimate.value:,.{digits}f} ({low}{DASH}{high})"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", MINUS)


def score_table(found: dict[str, Score]) -> Table:
    rows = [
        (
            name + ("\N{DAGGER}" if one.overlapping else ""),
            f"{one.problems} \N{MULTIPLICATION SIGN} {one.samples}",
            percent(one.average),
            f"{100 * one.average.standard_error:.2f}",
            DASH if one.sampling_error is None else f"{100 * one.sampling_error:.2f}",
            f"{one.overlapping} of {one.problems}" if one.overlapping else one.overlap,
        )
        for name, one in found.items()
    ]
    samples = {one.samples for one in found.values()}
    average = f"avg@{samples.pop()}, %" if len(samples) == 1 else "avg@n, %"
    header = (
        "model",
        "problems \N{MULTIPLICATION SIGN} samples",
        average,
        "standard error",
        "by sampling",
        "overlap",
    )
    return Table("Score", header, rows)


def pass_table(found: dict[str, Score]) -> Table:
    powers = sorted({k for one in found.values() for k in one.pass_at})
    shown = powers[1:]  # pass@1 is the average
    rows = [
        (name, *(percent(one.pass_at[k]) if k in one.pass_at else DASH for k in shown)) for name, one in found.items()
    ]
    return Table("At least one of k answers right", ("model", *(f"pass@{k}, %" for k in shown)), rows)


def answer_table(found: dict[str, Score]) -> Table:
    rows = [
        (
            name,
            percent(one.truncated),
            percent(one.invalid),
            amount(one.length),
            f"{one.longest:,}",
            one.length_unit,
        )
        for name, one in found.items()
    ]
    return Table("Answers", ("model", "truncated, %", "no answer found, %", "mean length", "longest", "unit"), rows)


def difference_table(found: list[Difference]) -> Table:
    rows = [
        (
            f"{one.one} {MINUS} {one.other}",
            signed(one.estimate.value),
            f"{signed(one.estimate.low)} to {signed(one.estimate.high)}" + ("*" if one.estimate.few_problems else ""),
            f"{100 * one.estimate.standard_error:.2f}",
            one.verdict,
        )
        for one in found
    ]
    return Table("Difference, paired by problem", ("models", "points", "interval", "standard error", "verdict"), rows)


def tables(report: Report, benchmark: str) -> Iterator[Table]:
    """The tables of one benchmark."""
    found = report.scores[benchmark]
    yield score_table(found)
    if benchmark in report.differences:
        yield difference_table(report.differences[benchmark])
    if any(one.samples > 1 for one in found.values()):
        yield pass_table(found)
    yield answer_table(found)


def notes(report: Report) -> list[str]:
    """What a reader must know, only where it applies."""
    every = [one for found in report.scores.values() for one in found.values()]
    gaps = [one.estimate for found in report.differences.values() for one in found]
    shares = [part for one in every for part in (one.average, one.truncated, one.invalid, *one.pass_at.values())]
    said = [
        "Intervals: 95 %, over problems and samples. avg@n, pass@k and shares: Wilson's interval with the effective "
        "number of answers and Student's t; differences and lengths: Student's t over problems. Standard errors are "
        "clustered by problem (Miller 2024, arXiv 2411.00640), in points; \u201cby sampling\u201d is the error over "
        "the same problems, which more answers would reduce. pass@k: the unbiased estimator of Chen et al. 2021 (arXiv "
        "2107.03374)."
    ]
    if gaps:
        said.append(
            f"A difference whose interval holds zero is called {NO_DIFFERENCE}. Each has its own 95 %: of twenty equal "
            "pairs about one would be called different."
        )
    if any(estimate.few_problems for estimate in [*shares, *gaps]):
        said.append("* Fewer than 6 problems carry the number: the interval covers less than 95 %.")
    for benchmark, found in report.scores.items():
        for name, one in found.items():
            if one.overlapping:
                clean = f"; without them {percent(one.without_overlap)} %" if one.without_overlap else ""
                said.append(
                    f"\N{DAGGER} {name} was trained on {one.overlapping} of the {one.problems} problems of {benchmark}"
                    f"{clean}. The score does not measure what the model can do."
                )
    if any(one.overlap == "not checked" for one in every):
        said.append(
            "Overlap \u201cnot checked\u201d: no training data was named whose search covered the benchmark's file, so "
            "its problems may have been trained on."
        )
    return said


def run_table(report: Report) -> Table:
    rows = []
    for run in report.runs:
        settings = ", ".join(f"{key} {run.settings[key]}" for key in SAME_SETTINGS if run.settings.get(key) is not None)
        rows.append((run.name, run.model, settings, run.evalscope, str(run.folder)))
    return Table("Runs", ("name", "model", "sampling", "evalscope", "folder"), rows)


# JSON and Markdown


def as_json(report: Report) -> str:
    """Shares are fractions of 1, not percent; lengths in their unit."""
    content = {
        "format": 1,
        "confidence": scores.CONFIDENCE,
        "runs": [
            {"name": run.name, "folder": str(run.folder), "model": run.model, "evalscope": run.evalscope}
            | {"settings": run.settings}
            for run in report.runs
        ],
        "benchmarks": {
            benchmark: {
                "scores": {name: dataclasses.asdict(one) for name, one in found.items()},
                "differences": [dataclasses.asdict(one) for one in report.differences.get(benchmark, [])],
            }
            for benchmark, found in report.scores.items()
        },
        "notes": notes(report),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def as_markdown(report: Report) -> str:
    lines = ["# Evaluation", ""]
    for benchmark in report.scores:
        lines += [f"## {benchmark}", ""]
        for table in tables(report, benchmark):
            lines += [f"{table.caption}:", "", *_markdown_table(table), ""]
    lines += ["## Runs", "", *_markdown_table(run_table(report)), ""]
    return "\n".join(lines + [note.replace("*", "\\*") + "\n" for note in notes(report)])


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"

    return [line(table.header), "|" + " --- |" * len(table.header), *map(line, table.rows)]


def _plain(text: str) -> str:
    """Text from a file on one line, control characters replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


# The figure. Okabe and Ito's colours; the page replaces each by a CSS variable of the same name.

LIGHT = {"ink": "#1f2328", "muted": "#656d76", "grid": "#e4e7eb", "shade": "#f3f4f7"}
LIGHT |= {"a": "#0072b2", "b": "#d55e00", "c": "#00795a", "d": "#6f4a8e", "e": "#8a6d00", "f": "#b0477e"}
DARK = {"ink": "#e6e8eb", "muted": "#9aa4af", "grid": "#30363d", "shade": "#1b212a"}
DARK |= {"a": "#62b5ee", "b": "#ff9b5e", "c": "#3fc79a", "d": "#c3a1e0", "e": "#e0bd4a", "f": "#f28fc0"}
SERIES = "abcdef"
MOST_BANDS = 2  # intervals of more models over one another cannot be told apart; the tables hold them


def draw(report: Report) -> Any:
    """For each benchmark avg@n with its interval on the left, pass@k over k on the right."""
    from matplotlib.figure import Figure

    heights = [max(1.5, 0.34 * len(found) + 0.9) for found in report.scores.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1.25, 1))
    colours = {run.name: LIGHT[SERIES[number % len(SERIES)]] for number, run in enumerate(report.runs)}
    for row, (benchmark, found) in enumerate(report.scores.items()):
        _draw_scores(figure.add_subplot(grid[row, 0]), benchmark, found, colours)
        _draw_pass(figure.add_subplot(grid[row, 1]), found, colours)
    return figure


def _style(axes: Any, direction: str) -> None:
    axes.set_facecolor("none")
    axes.grid(axis=direction, color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT["muted"], labelsize=9.5, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])


def _draw_scores(axes: Any, benchmark: str, found: dict[str, Score], colours: dict[str, str]) -> None:
    _style(axes, "x")
    for place, (name, one) in enumerate(found.items()):
        average, colour = one.average, colours[name]
        axes.plot([100 * average.low, 100 * average.high], [place, place], color=colour, linewidth=2.2)
        axes.plot(100 * average.value, place, "o", color=colour, markersize=6.5, clip_on=False)
        label = f"{100 * average.value:.1f}"
        where = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": LIGHT["ink"]}
        axes.annotate(label, (100 * average.value, place), xytext=(0, 6), **where)
    names = [name + ("\N{DAGGER}" if one.overlapping else "") for name, one in found.items()]
    axes.set_yticks(range(len(found)), names, color=LIGHT["ink"])
    axes.set_ylim(len(found) - 0.5, -0.75)
    axes.set_xlim(0, 100)
    axes.set_title(benchmark, loc="left", fontsize=11, color=LIGHT["ink"])
    axes.set_xlabel("average over answers, % right, 95 % interval", color=LIGHT["muted"], fontsize=9.5)


def _draw_pass(axes: Any, found: dict[str, Score], colours: dict[str, str]) -> None:
    _style(axes, "y")
    for name, one in found.items():
        powers = list(one.pass_at)
        estimates = list(one.pass_at.values())
        if len(found) <= MOST_BANDS:
            low, high = ([100 * getattr(estimate, end) for estimate in estimates] for end in ("low", "high"))
            axes.fill_between(powers, low, high, color=colours[name], alpha=0.13, linewidth=0)
        values = [100 * estimate.value for estimate in estimates]
        axes.plot(powers, values, "o-", color=colours[name], linewidth=1.6, markersize=4, clip_on=False)
    every = sorted({k for one in found.values() for k in one.pass_at})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, map(str, every))
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_title("pass@k, %", loc="left", fontsize=11, color=LIGHT["ink"])
    axes.set_xlabel("k answers", color=LIGHT["muted"], fontsize=9.5)


def png(report: Report) -> bytes:
    """The figure as a PNG of 1800 pixels' width."""
    buffer = io.BytesIO()
    draw(report).savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def svg(report: Report) -> str:
    """The figure as an SVG element whose colours are the page's CSS variables."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scores"}):
        draw(report).savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for variable, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{variable})")
    label = "Average score and pass@k of each model with intervals; the tables hold the same numbers"
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


# The page


def page(report: Report) -> str:
    """The HTML page. Everything that comes from a file is escaped; nothing is fetched."""
    sections = []
    for benchmark in report.scores:
        parts = "".join(map(_html_table, tables(report, benchmark)))
        sections.append(f"<section><h2>{_safe(benchmark)}</h2>{parts}</section>\n")
    fields = {
        "light": _css_variables(LIGHT),
        "dark": _css_variables(DARK),
        "verdicts": "".join(_verdict_items(report)),
        "figure": svg(report),
        "sections": "".join(sections),
        "runs": _html_table(run_table(report)),
        "notes": "".join(f"<p>{_safe(note)}</p>" for note in notes(report)),
    }
    return Template(PAGE).substitute(fields)


def _safe(text: str) -> str:
    return escape(_plain(text))


def _css_variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _verdict_items(report: Report) -> Iterator[str]:
    for benchmark, found in report.differences.items():
        for one in found:
            style = "same" if one.verdict == NO_DIFFERENCE else "other"
            words = f"{benchmark}: {one.one} {MINUS} {one.other}"
            numbers = (
                f"{signed(one.estimate.value)} points ({signed(one.estimate.low)} to {signed(one.estimate.high)})"
                f"{'*' if one.estimate.few_problems else ''}"
            )
            yield f'<li class="{style}"><b>{_safe(one.verdict)}</b><span>{_safe(words)}</span><i>{numbers}</i></li>\n'


def _html_table(table: Table) -> str:
    """Numbers to the right, words to the left, decided by each column's first cell."""
    words = {
        column
        for column in range(len(table.header))
        if column == 0 or not re.match(rf"[-+{MINUS}{DASH}\d]", table.rows[0][column]) or table.caption == "Runs"
    }

    def line(cells: Sequence[str], tag: str) -> str:
        inner = [f"<{tag}{'' if n in words else ' class=n'}>{_safe(cell)}</{tag}>" for n, cell in enumerate(cells)]
        return f"<tr>{''.join(inner)}</tr>\n"

    body = "".join(line(row, "td") for row in table.rows)
    return (
        f'<div class="scroll"><table><caption>{_safe(table.caption)}</caption><thead>{line(table.header, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Evaluation</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; $light }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; $dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { margin: 0 0 1.2rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .4rem; font-size: 1.25rem; }
ul { list-style: none; margin: 0 0 2rem; padding: 0; }
li { display: grid; grid-template-columns: 11rem 1fr auto; gap: .2rem 1rem; align-items: center; padding: .5rem 0;
  border-top: 1px solid var(--grid); }
li b { border-radius: 1rem; padding: 0 .8rem; text-align: center; font-size: .85rem; background: var(--shade); }
li.other b { background: var(--a); color: var(--page); }
li i { font-style: normal; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin: 1rem 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; line-height: 1.45; }
caption { text-align: left; font-weight: 600; padding-bottom: .2rem; }
th { color: var(--muted); font-size: .82rem; font-weight: 500; text-align: left; }
th, td { padding: .4rem 1.2rem .4rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
footer p { margin: .5rem 0; max-width: 48rem; }
@media (max-width: 40rem) { li { grid-template-columns: 1fr; } li b { justify-self: start; }
  .figure { overflow-x: auto; } .figure svg { min-width: 40rem; } }
</style>
</head>
<body>
<h1>Evaluation</h1>
<ul>$verdicts</ul>
<div class="figure">$figure</div>
$sections
$runs
<footer>$notes</footer>
</body>
</html>
"""


# The command


def write(report: Report, output: Path) -> None:
    """Make the folder `output` whole or not at all. Refuses one that exists and is not empty."""
    with building(output) as folder:
        (folder / "scores.json").write_text(as_json(report), encoding="utf-8")
        (folder / "scores.md").write_text(as_markdown(report), encoding="utf-8")
        (folder / "scores.html").write_text(page(report), encoding="utf-8")
        (folder / "scores.png").write_bytes(png(report))


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=FOLDER of the command line."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=named_folder, action="append", required=True, metavar="NAME=DIR", help="output of evalscope eval")
    add("--compare", nargs="+", action="append", default=[], metavar="NAME", help="the first less each of the others")
    add(
        "--trained-on",
        type=named_folder,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder of data that a run's model was trained on, or its report by prepare_data.py decontaminate; repeat",
    )
    add("--mark-overlap", action="store_true", help="publish scores of models trained on the benchmark, with a mark")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    args = parser.parse_args(arguments)
    names = [name for name, _ in args.run]
    if len(set(names)) != len(names):
        parser.error(f"--run names must differ, found {', '.join(names)}")
    used = {name for group in args.compare for name in group} | {name for name, _ in args.trained_on}
    if used - set(names):
        parser.error(f"{', '.join(sorted(used - set(names)))}: no such --run; there are {', '.join(names)}")
    if any(len(set(group)) < 2 or len(set(group)) < len(group) for group in args.compare):
        parser.error("--compare needs at least two names, each once")
    return args


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = parse(arguments)
    pairs = [(group[0], other) for group in args.compare for other in group[1:]]
    trained_on: dict[str, list[Path]] = {}
    for name, folder in args.trained_on:
        trained_on.setdefault(name, []).append(folder)
    try:
        report = make_report(dict(args.run), pairs, trained_on, args.mark_overlap)
        write(report, args.output)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_markdown(report))
    log.info("%s", args.output / "scores.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
