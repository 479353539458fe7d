"""Inputs of tools/prepare_data.py: files of records, read as a stream, hashed as they are read.

    .jsonl .jsonl.gz .jsonl.zst   one JSON object a line, UTF-8; numbers keep their digits (read_json)
    .parquet                      one record a row
    a folder of datasets.save_to_disk   its Arrow files, in the order of state.json
    .txt .txt.gz .txt.zst         the whole file is one record (only where text is asked for)

A source comes in blocks of a few megabytes. A block goes to a worker process, which takes it apart into records. Where
blocks begin follows from the bytes alone, so that the same input always gives the same blocks.

A byte order mark at the beginning of a line or of a text file is no part of it. A table gives every row every field
that any row has, so nulls inside its nested values say nothing and are left out; its dates and times come as strings.
"""

import gzip
import hashlib
import json
import logging
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from infir2.indexed import DataError

BLOCK_BYTES = 8 << 20  # uncompressed text in a block
READ_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
SHOWN_REJECTS = 10
LONG_NUMBER = re.compile(rb"[0-9.]{17}")  # may have more digits than orjson keeps

BYTE_ORDER_MARK = "\ufeff"  # a file that was read as UTF-8 and had one gives it to its text
BYTE_ORDER_MARKS = re.compile(rb"^(?:%b)+" % BOM_UTF8, re.MULTILINE)  # where files were joined, at any line's beginning

log = logging.getLogger("prepare_data")


class Rejects:
    """Counts what is left out, by reason; under `fail` the first bad record ends the run instead.

    `examples` holds the first messages. A `quiet` one does not log them: a worker's go to the parent by `absorb`.
    """

    def __init__(self, on_error: str, quiet: bool = False) -> None:
        self.on_error = on_error
        self.quiet = quiet
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def bad(self, where: str, reason: str, found: str) -> None:
        """Note a bad record at `where` (file, file:line or file, row N)."""
        if self.on_error == "fail":
            raise DataError(
                f"{where}: {reason}: {found}. Correct it, or pass --on-error skip to leave such records out and count "
                "them."
            )
        self.absorb({reason: 1}, [f"{where}: {reason}: {found}"])

    def absorb(self, counts: Mapping[str, int], examples: Iterable[str]) -> None:
        """Add what another process counted."""
        self.counts.update(counts)
        for example in list(examples)[: SHOWN_REJECTS - len(self.examples)]:
            self.examples.append(example)
            if not self.quiet:
                log.warning("%s; left out", example)


@dataclass(frozen=True)
class Block:
    """Consecutive records of one source; can be sent to another process.

    `first` numbers its first record, from 1 (lines or rows). `size` is the part of the source's bytes that it stands
    for. `fingerprint` is the SHA-256 of the source's bytes as far as they decide this block.
    """

    path: Path
    first: int
    size: int
    fingerprint: str
    payload: bytes

    def records(self, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (where, record); what is no record goes to `rejects`."""
        for where, record, _ in self.entries(rejects):
            yield where, record

    def entries(self, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
        """As `records`, each with its line of JSON as it stands in the file; None where it stands in no line."""
        raise NotImplementedError


class LineBlock(Block):
    """Lines of JSON."""

    def entries(self, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
        for number, marked in enumerate(self.payload.split(b"\n"), start=self.first):
            line = BYTE_ORDER_MARKS.sub(b"", marked)
            if line and not line.isspace():  # a blank line holds no record
                where = f"{self.path}:{number}"
                record = parse_json(line, where, rejects)
                if record is not None:
                    yield where, record, line


@dataclass(frozen=True)
class TextBlock(Block):
    """A whole text file, as one record {text_key: text}."""

    text_key: str

    def entries(self, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
        try:
            text = BYTE_ORDER_MARKS.sub(b"", self.payload).decode("utf-8")
        except UnicodeError as error:
            return rejects.bad(str(self.path), "not valid UTF-8", str(error))
        if "\0" in text:
            return rejects.bad(str(self.path), "not text", f"a zero byte at {text.index(chr(0))}: UTF-16, or binary")
        yield str(self.path), {self.text_key: text}, None


class TableBlock(Block):
    """Rows of a table; the payload is an Arrow stream."""

    def entries(self, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
        number = self.first
        for batch in map(_as_written, map(_with_times_as_strings, pa.ipc.open_stream(self.payload))):
            for row in range(batch.num_rows):
                where = f"{self.path}, row {number}"
                number += 1
                try:
                    values = [column[row].as_py(maps_as_pydicts="strict") for column in batch]
                except UnicodeError as error:
                    rejects.bad(where, "not valid UTF-8", str(error))
                except (ValueError, KeyError, OverflowError, pa.ArrowException) as error:
                    rejects.bad(where, "unreadable value", str(error))
                else:
                    yield where, dict(zip(batch.schema.names, map(_without_nulls, values), strict=True)), None


def _with_times_as_strings(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with dates and times of every depth as strings (UTC): Python has no nanoseconds, and few years."""
    for target in (_in_utc, _as_string):  # a time zone may be unknown here; an instant is not
        types = [_mapped(field.type, target) for field in batch.schema]
        if types != batch.schema.types:
            columns = [column.cast(kind) for column, kind in zip(batch, types, strict=True)]
            batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    return batch


def _as_written(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with floats of 16 and 32 bits at every depth as those of 64 bits that are written alike: 0.1 as 0.1."""
    types = [_mapped(field.type, _in_64_bits) for field in batch.schema]
    if types == batch.schema.types:
        return batch
    columns = list(batch)
    for target in (_in_32_bits, _in_digits):
        columns = [column.cast(_mapped(column.type, target)) for column in columns]
    columns = [column.cast(kind) for column, kind in zip(columns, types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _in_64_bits(kind: pa.DataType) -> pa.DataType:
    return pa.float64() if pa.types.is_floating(kind) else kind


def _in_32_bits(kind: pa.DataType) -> pa.DataType:
    return pa.float32() if pa.types.is_float16(kind) else kind


def _in_digits(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_float32(kind) else kind


def _in_utc(kind: pa.DataType) -> pa.DataType:
    return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz is not None else kind


def _as_string(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) and not pa.types.is_interval(kind) else kind


def _mapped(kind: pa.DataType, target: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `target` applied to all that it is made of."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_mapped(field.type, target)) for field in kind])
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_mapped(kind.value_type, target)))
    return target(kind)


def _without_nulls(value: Any) -> Any:
    """The value without the fields of its objects, at any depth, that are None."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


class LongFloat(float):
    """A number of more digits than a float holds: as a string it has them all."""

    digits: str

    def __new__(cls, digits: str) -> Self:
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    def __getnewargs__(self) -> tuple[str]:
        return (self.digits,)

    def __str__(self) -> str:
        return self.digits


def read_json(text: bytes) -> Any:
    """The value of a JSON text. Integers are exact whatever their size; a fraction that no float holds is a LongFloat.

    Raises ValueError (UnicodeError for what is not UTF-8) or RecursionError. orjson makes floats of integers above 64
    bits and refuses a few things that Python's json takes (NaN, for one), so json reads what it cannot.
    """
    if not LONG_NUMBER.search(text):
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            pass
    value = json.loads(text.decode("utf-8"), parse_float=_float)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # JSON can spell half a surrogate pair
    return value


def _float(digits: str) -> float:
    value = float(digits)
    return value if Decimal(digits) == Decimal(repr(value)) else LongFloat(digits)


def parse_json(line: bytes, where: str, rejects: Rejects) -> dict[str, Any] | None:
    """The object on one line, or None after noting what is wrong with it."""
    try:
        record = read_json(line)
    except UnicodeError as error:
        return rejects.bad(where, "not valid UTF-8", str(error))
    except json.JSONDecodeError as error:
        return rejects.bad(where, "broken JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits, brackets 1,000 deep
        return rejects.bad(where, "broken JSON", str(error))
    if not isinstance(record, dict):
        return rejects.bad(where, "not an object", f"the line is a {type(record).__name__}, not an object")
    return record


class Source:
    """One input file. `blocks` or `records` reads it once, from beginning to end, and hashes it; then `receipt`.

    With `text_key` only that field is read where the format allows it.
    """

    def __init__(self, path: Path, text_key: str | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        if not path.is_file():
            raise DataError(f"{path} does not exist or is not a file.")
        self.path = path
        self.text_key = text_key
        self.block_bytes = block_bytes
        self.bytes = 0
        self._hash = hashlib.sha256()

    def receipt(self) -> dict[str, Any]:
        """Path, size and SHA-256 of what was read; complete once `blocks` or `records` is exhausted."""
        return {"path": str(self.path), "bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def records(self, rejects: Rejects, progress: tqdm | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (where, record) over the source; `progress` counts bytes."""
        for where, record, _ in self.entries(rejects, progress):
            yield where, record

    def entries(
        self, rejects: Rejects, progress: tqdm | None = None
    ) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
        """As `records`, with the lines of Block.entries."""
        for block in self.blocks(rejects):
            yield from block.entries(rejects)
            if progress is not None:
                progress.update(block.size)

    def blocks(self, rejects: Rejects) -> Iterator[Block]:
        """Yield the source in blocks; an empty one goes to `rejects`. Refuses a damaged file."""
        self.bytes, self._hash = 0, hashlib.sha256()
        try:
            yield from self._blocks(rejects)
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} cannot be read: {error}. Replace it by a whole one.") from error
        if self.bytes == 0:
            rejects.bad(str(self.path), "empty file", "0 bytes")

    def _blocks(self, rejects: Rejects) -> Iterator[Block]:
        raise NotImplementedError

    def _hashed(self, data: bytes) -> bytes:
        self._hash.update(data)
        self.bytes += len(data)
        return data


class _HashingFile:
    """The reading half of a file, which hashes what passes; as pyarrow wants it."""

    closed = False

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._source = source
        self._file = file

    def close(self) -> None:
        """Nothing: who opened the file closes it."""

    def read(self, size: int) -> bytes:
        return self._source._hashed(self._file.read(size))


class StreamSource(Source):
    """A file of bytes, compressed or not."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the decompressed bytes."""
        size = min(READ_BYTES, self.block_bytes)
        with self.path.open("rb") as file:
            hashing = _HashingFile(self, file)
            stream: Any = hashing
            if self.path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=hashing)  # takes zeros at the end, with which some writers fill a block
            elif self.path.suffix == ".zst":
                stream = pa.CompressedInputStream(pa.PythonFile(hashing, mode="r"), "zstd")
            while piece := stream.read(size):
                yield piece
            while hashing.read(READ_BYTES):
                pass


class LinesSource(StreamSource):
    """JSON lines. A block ends at the first line end after `block_bytes`."""

    def _blocks(self, rejects: Rejects) -> Iterator[Block]:
        first, start = 1, 0
        held: list[bytes] = []
        size = 0
        for piece in self.pieces():
            size += len(piece)
            cut = piece.rfind(b"\n") + 1 if size >= self.block_bytes else 0
            held.append(piece[:cut] if cut else piece)
            if cut:
                payload = b"".join(held)
                yield LineBlock(self.path, first, self.bytes - start, self._hash.hexdigest(), payload)
                first, start = first + payload.count(b"\n"), self.bytes
                held, size = [piece[cut:]], len(piece) - cut
        if size:
            yield LineBlock(self.path, first, self.bytes - start, self._hash.hexdigest(), b"".join(held))


class TextSource(StreamSource):
    """One document."""

    def _blocks(self, rejects: Rejects) -> Iterator[Block]:
        text = b"".join(self.pieces())
        if text:
            yield TextBlock(self.path, 1, self.bytes, self._hash.hexdigest(), text, str(self.text_key))


class TableSource(Source):
    """Parquet, or an Arrow stream as `datasets` writes it. Hashed first, then read by columns."""

    def _blocks(self, rejects: Rejects) -> Iterator[Block]:
        with self.path.open("rb") as file:
            while self._hashed(file.read(READ_BYTES)):
                pass
        if self.bytes == 0:
            return
        fingerprint, first, size = self._hash.hexdigest(), 1, self.bytes
        for batch in self._batches():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield TableBlock(self.path, first, size, fingerprint, sink.getvalue().to_pybytes())
            first, size = first + batch.num_rows, 0
        if first == 1:
            rejects.bad(str(self.path), "empty file", "0 rows")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def _columns(self, names: list[str]) -> list[str]:
        """The columns to read: all where the wanted one is missing, so that the refusal can name them."""
        return [self.text_key] if self.text_key in names else names


class ParquetSource(TableSource):
    """A Parquet file."""

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            row_bytes = sum(group.total_byte_size for group in groups) / max(1, file.metadata.num_rows)
            rows = max(1, int(self.block_bytes / max(1.0, row_bytes)))
            names = list(file.schema_arrow.names)
            yield from file.iter_batches(batch_size=rows, columns=self._columns(names))


class ArrowSource(TableSource):
    """One Arrow stream of a `datasets` folder; a block is one of its record batches."""

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            columns = self._columns(list(stream.schema.names))
            for batch in stream:
                if batch.num_rows:
                    yield batch.select(columns)


KINDS: dict[str, type[Source]] = {".jsonl": LinesSource, ".txt": TextSource, ".parquet": ParquetSource}


def open_sources(paths: Iterable[Path], text_key: str | None = None, block_bytes: int = BLOCK_BYTES) -> list[Source]:
    """The sources of the paths given, in order; a `datasets` folder gives one for each of its Arrow files.

    `text_key` names the only field that is wanted; without it .txt is refused, which has no fields.
    """
    return [source for path in paths for source in _open(path, text_key, block_bytes)]


def _open(path: Path, text_key: str | None, block_bytes: int) -> list[Source]:
    if path.is_dir():
        return [ArrowSource(file, text_key, block_bytes) for file in _arrow_files(path)]
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSIONS else path.suffixes
    kind = KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None or (kind is ParquetSource and path.suffix in COMPRESSIONS):
        raise DataError(
            f"{path} is neither .jsonl, .txt (or either with .gz or .zst) nor .parquet, nor a folder of "
            "datasets.save_to_disk. Convert it to one of them."
        )
    if kind is TextSource and text_key is None:
        raise DataError(f"{path} is plain text, but records with fields are wanted. Give .jsonl or .parquet.")
    return [kind(path, text_key, block_bytes)]


def _splits(path: Path) -> list[str]:
    """The names in a dataset_dict.json; none where it does not tell them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["splits"]
    except (ValueError, LookupError, TypeError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _arrow_files(folder: Path) -> list[Path]:
    """The Arrow files of a `datasets` folder, in its order."""
    if (folder / "dataset_dict.json").is_file():
        splits = _splits(folder / "dataset_dict.json")
        raise DataError(f"{folder} holds the splits {splits}. Name one: {folder}/{(splits or ['SPLIT'])[0]}")
    state = folder / "state.json"
    if not state.is_file():
        raise DataError(f"{folder} has no state.json, so it is no folder of datasets.save_to_disk. Name its files.")
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in found["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{state} cannot be read: {error!r}. Save the dataset again.") from error
    if found.get("_indices_files"):
        raise DataError(
            f"{folder} holds an index over its rows. Apply it (flatten_indices) and save the dataset again."
        )
    return files
