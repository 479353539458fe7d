"""Files that are whole or absent, and lines of JSON. The standard library alone.

A file is written under a temporary name beside it and renamed when its bytes are on the disk: a reader, a kill or a
power cut sees the old file or the new one. Its permissions follow the umask.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, to be written by the caller; then it becomes `path`. After an error the
    temporary file is removed, and `path` is as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file of this text, UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a JSON-lines file, without their line feeds.

    They end at line feeds alone: `str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON leaves in strings.
    """
    text = path.read_bytes().decode("utf-8", errors)
    return text.removesuffix("\n").split("\n") if text else []
