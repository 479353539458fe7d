"""The benchmarks that scripts/eval runs: evalscope's names, how each is asked, and the local form of its problems.

evalscope loads what it can and fails late, or goes to a hub, when a folder is not as it expects; `check` says so first.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from infir2.files import json_lines
from infir2.indexed import DataError

LCB_SUBSET = "v5"
LCB_WINDOW = ("2024-08-01", "2025-02-01")
LCB_COLUMNS = (
    "question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata", "contest_date",
)  # fmt: skip
GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `count` reads a folder and returns its number of problems, or refuses its form."""

    name: str
    evalscope: str  # evalscope's name
    form: str  # of its folder, in words
    count: Callable[[Path], int]
    arguments: dict[str, Any] = field(default_factory=dict)  # evalscope's, besides those that all have
    runs_code: bool = False


def check(benchmark: Benchmark, folder: Path) -> int:
    """Number of problems in a local folder. Refuses another form, with what was found and what is needed, and problems
    that no report could be made of: one alone, and one that stands there twice."""
    try:
        count = benchmark.count(folder)
        if count < 2:
            raise ValueError("it holds one problem, and an interval over problems needs two")
        return count
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, yaml.YAMLError) as error:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder} is not a local copy of {benchmark.name}: {error}. Found: {found or 'an empty folder'}. Needed: "
            f"{benchmark.form} (docs/eval.md)."
        ) from None


def _records(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(json_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path.name}, line {number} is no JSON") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {number} is no JSON object")
        lacking = [column for column in columns if record.get(column) in (None, "")]
        if lacking:
            raise ValueError(f"{path.name}, line {number} has no {', '.join(lacking)}")
        records.append(record)
    if not records:
        raise ValueError(f"{path.name} is empty")
    return records


def _refuse_repeated(problems: Iterable[tuple[str, ...]], where: str) -> None:
    """Of problems, each as the texts that make it one: spacing does not make another."""
    first: dict[tuple[str, ...], int] = {}
    for number, problem in enumerate(problems, 1):
        before = first.setdefault(tuple(" ".join(text.split()) for text in problem), number)
        if before != number:
            raise ValueError(f"{where}: problem {number} is problem {before} again; remove one of them")


def _count_aime(folder: Path) -> int:
    records = _records(folder / "test.jsonl", ("problem", "answer"))
    for number, record in enumerate(records, 1):
        if not str(record["answer"]).strip().lstrip("-").isdigit():
            raise ValueError(f"test.jsonl, line {number}: the answer {record['answer']!r} is no integer")
    _refuse_repeated(((str(record["problem"]),) for record in records), "test.jsonl")
    return len(records)


def _count_gpqa(folder: Path) -> int:
    records = _records(folder / "train.jsonl", GPQA_COLUMNS)
    texts = [[str(record[column]) for column in GPQA_COLUMNS] for record in records]
    _refuse_repeated(((question, *sorted(choices)) for question, *choices in texts), "train.jsonl")
    return len(records)


def _count_livecodebench(folder: Path) -> int:
    """Problems in the window, both ends included, as evalscope counts them."""
    header = (folder / "README.md").read_text("utf-8").split("---")[1]
    configs = {config["config_name"]: config for config in yaml.safe_load(header)["configs"]}
    pattern = next(file["path"] for file in configs[LCB_SUBSET]["data_files"] if file["split"] == "test")
    rows = []
    for path in sorted(folder.glob(pattern)):
        lacking = set(LCB_COLUMNS) - set(pq.read_schema(path).names)
        if lacking:
            raise ValueError(f"{path.name} has no column {', '.join(sorted(lacking))}")
        rows += pq.read_table(path, columns=["contest_date", "question_content", "starter_code"]).to_pylist()
    first, last = map(datetime.fromisoformat, LCB_WINDOW)
    chosen = [row for row in rows if first <= datetime.fromisoformat(row["contest_date"]) <= last]
    if not chosen:
        raise ValueError(f"none of {len(rows)} problems is from {LCB_WINDOW[0]} to {LCB_WINDOW[1]}")
    _refuse_repeated(
        ((row["question_content"], row["starter_code"] or "") for row in chosen), f"{pattern}, in the window"
    )
    return len(chosen)


AIME_FORM = "test.jsonl with `problem` and `answer`, an integer, on each line"
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "aime24", AIME_FORM, _count_aime),
        Benchmark("aime25", "aime25", AIME_FORM, _count_aime),
        Benchmark(
            "gpqa",
            "gpqa_diamond",
            "train.jsonl with `Question`, `Correct Answer` and `Incorrect Answer 1` to `3` on each line",
            _count_gpqa,
        ),
        Benchmark(
            "livecodebenchv5",
            "live_code_bench",
            f"README.md whose YAML header names a config `{LCB_SUBSET}` with Parquet files for its split `test`, of "
            f"LiveCodeBench's columns",
            _count_livecodebench,
            {
                "subset_list": [LCB_SUBSET],
                "extra_params": {"start_date": LCB_WINDOW[0], "end_date": LCB_WINDOW[1]},
            },
            runs_code=True,
        ),
    )
}
