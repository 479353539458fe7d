"""Compare `prepare_data.py cpt` with the way of Megatron-LM's own preprocessing, on the same text and cores.

    python tools/bench_data.py --tokenizer HF_FOLDER

The control is written as Megatron-LM's tools/preprocess_data.py does it: a pool of processes, one line after the other
through json.loads and the Hugging Face tokenizer, results into IndexedDatasetBuilder. Both run in turn, pair by pair,
and must write the same bytes. The control's clock leaves out its start (imports, loading the tokenizer in the parent);
ours is the whole command's. Then ours runs on 1, 4 and 16 times the text, with the memory of its processes sampled.

The text: Python and Markdown files of this environment and the King James Bible, in a fixed order; each document begins
with its number, so that none is a duplicate. Prints one JSON object.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infir2.data.pretraining import positive
from infir2.data.tokenizer import DocumentTokenizer
from infir2.files import json_lines
from infir2.indexed import DataError

REPO = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.05
VERSES = 30  # of the Bible in a document

log = logging.getLogger("bench_data")


# The text


def environment_texts() -> Iterator[str]:
    """Texts of files of this environment, in an order that depends only on their names."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".rst"))
    random.Random(0).shuffle(files)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError):
            continue
        if 200 < len(text) < 100_000:
            yield text


def bible_texts() -> Iterator[str]:
    """The King James Bible in pieces of VERSES verses."""
    import bible

    path = Path(bible.__file__).parent / "data" / "kjv.jsonl"
    verses = [str(json.loads(line)) for line in json_lines(path)]
    for start in range(0, len(verses), VERSES):
        yield "\n".join(verses[start : start + VERSES])


def write_corpus(path: Path, megabytes: float, times: int = 1) -> None:
    """Write `megabytes` of text `times` over as JSON lines; documents are numbered, so they all differ."""
    texts, size = [], 0.0
    pairs = itertools.zip_longest(environment_texts(), bible_texts())
    for text in (text for pair in pairs for text in pair if text is not None):
        texts.append(text)
        size += len(text.encode("utf-8")) / 1e6
        if size >= megabytes:
            break
    with path.open("w", encoding="utf-8") as file:
        for number in range(times * len(texts)):
            file.write(json.dumps({"id": number, "text": f"{number}\n{texts[number % len(texts)]}"}) + "\n")


# The two arms

_tokenizer: Any = None
_eod = 0


def _load_tokenizer(folder: str, eod_token: str) -> None:
    global _tokenizer, _eod
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(folder)
    _eod = _tokenizer.convert_tokens_to_ids(eod_token)


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = _tokenizer(json.loads(line)["text"]).input_ids
    return [*ids, _eod], len(line)


def control(corpus: Path, tokenizer: Path, prefix: Path, workers: int, eod_token: str) -> float:
    """Megatron-LM's way; returns seconds from the start of its processes to the finished index."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load_tokenizer(str(tokenizer), eod_token)
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(_tokenizer)))
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.Pool(workers, _load_tokenizer, (str(tokenizer), eod_token)) as pool,
    ):
        for ids, _ in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - started


def run_control(args: argparse.Namespace, corpus: Path, folder: Path) -> float:
    """The control in a process of its own, as a user would start it."""
    folder.mkdir()
    command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--workers", args.workers]
    command += ["--eod-token", args.eod_token, "--control", corpus, folder / "train"]
    result = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.splitlines()[-1])


def run_ours(args: argparse.Namespace, corpus: Path, folder: Path) -> tuple[float, float]:
    """`prepare_data.py cpt`; returns its wall seconds and the peak memory of all its processes in MB."""
    valid = folder.with_suffix(".valid.jsonl")
    valid.write_text('{"text": "held out"}\n', encoding="utf-8")
    command = [sys.executable, REPO / "tools" / "prepare_data.py", "cpt", "--input", corpus, "--valid-input", valid]
    command += ["--tokenizer", args.tokenizer, "--eod-token", args.eod_token, "--output", folder]
    command += ["--workers", args.workers, "--parse-special-tokens"]  # as Megatron's tokenizer does
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, peak / 1e6


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; pages that they share are counted for each."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


# The measurement


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All pairs, then the memory; the outputs of each pair must have the same bytes."""
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, args.megabytes)
    size = corpus.stat().st_size / 1e6
    pairs = []
    for number in range(args.pairs):
        control_seconds = run_control(args, corpus, folder / f"control{number}")
        seconds, _ = run_ours(args, corpus, folder / f"ours{number}")
        for suffix in ("bin", "idx"):
            found, expected = ((folder / f"{arm}{number}" / f"train.{suffix}") for arm in ("ours", "control"))
            if found.read_bytes() != expected.read_bytes():
                raise SystemExit(f"{found} and {expected} differ: the comparison is worth nothing")
        pairs.append({"control_s": control_seconds, "ours_s": seconds, "ratio": control_seconds / seconds})
        log.info("pair %d: control %.1f s, ours %.1f s, ratio %.2f", number + 1, *pairs[-1].values())
    memory = {}
    for times in args.memory:
        write_corpus(corpus, args.megabytes, times)
        seconds, peak = run_ours(args, corpus, folder / f"memory{times}")
        memory[times] = {"input_mb": corpus.stat().st_size / 1e6, "seconds": seconds, "peak_mb": peak}
        log.info("%d times the text: %.1f s, peak %.0f MB", times, seconds, peak)
    ratio = statistics.median(pair["ratio"] for pair in pairs) if pairs else None
    return {"input_mb": size, "workers": args.workers, "pairs": pairs, "median_ratio": ratio, "memory": memory}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the result as JSON. Exit status 2 for an unusable tokenizer, 1 for an arm that fails."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--eod-token", default="<|endoftext|>", metavar="TOKEN")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes of each arm (2)")
    parser.add_argument("--megabytes", type=float, default=40, metavar="N", help="text (40)")
    parser.add_argument("--pairs", type=positive, default=3, metavar="N", help="runs of both arms (3)")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[1, 4, 16], metavar="N", help="times the text (1 4 16)"
    )
    parser.add_argument("--control", type=Path, nargs=2, metavar=("CORPUS", "PREFIX"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.control:
        print(control(args.control[0], args.tokenizer, args.control[1], args.workers, args.eod_token))
        return 0
    try:
        DocumentTokenizer(args.tokenizer, args.eod_token, parse_special_tokens=True)
        with tempfile.TemporaryDirectory(prefix="bench_data.") as folder:
            print(json.dumps(measure(args, Path(folder)), indent=1))
    except DataError as error:
        log.error("%s", error)
        return 2
    except subprocess.CalledProcessError as error:
        log.error("%s ended with status %d; its last lines say why", Path(error.cmd[1]).name, error.returncode)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
