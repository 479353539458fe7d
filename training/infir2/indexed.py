"""Token files in Megatron's .bin/.idx format, written and read with numpy alone.

Importing Megatron takes ten seconds or more, so tools that only touch tokens use this module. The layout is that of
megatron-core 0.19.2 (megatron/core/datasets/indexed_dataset.py), little endian:

    PREFIX.bin    the tokens of all documents, one after the other, uint16 or int32
    PREFIX.idx    9 bytes   magic b"MMIDIDX" and two zero bytes
                  uint64    version, 1
                  uint8     code of the token type: 4 is int32, 8 is uint16
                  uint64    S, number of sequences
                  uint64    D + 1, number of document boundaries
                  int32[S]  tokens in each sequence
                  int64[S]  byte offset of each sequence in PREFIX.bin
                  int64[D + 1]  first sequence of each document, then S

The writer makes every document one sequence, as Megatron's own preprocessing does without sentence splitting.
"""

import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
INDEX_ENTRIES = 1 << 20  # of the index, handled at once
TYPE_CODES = {dtype: code for code, dtype in TOKEN_TYPES.items()}


class DataError(Exception):
    """Data that must not be used or cannot be made: the message says what was wrong, what was found, what to do."""


def bin_path(prefix: Path) -> Path:
    """PREFIX.bin; `Path.with_suffix` would cut a dot out of the prefix itself."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """PREFIX.idx."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Token type as Megatron picks it (DType.optimal_dtype): uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Writes PREFIX.bin document by document, and PREFIX.idx when the `with` block ends without an error.

    Without its .idx nothing reads a .bin, so an interrupted write is never taken for a finished one. Memory does not
    grow with the corpus: lengths wait in an unnamed file beside PREFIX.bin.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.document_count = 0
        self.token_count = 0
        self._bin = bin_path(prefix).open("wb")
        self._lengths = tempfile.TemporaryFile(dir=prefix.parent)  # noqa: SIM115 - closed by __exit__

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document. Refuses an empty one and any id outside [0, vocab_size), which would wrap around."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            found = f"found {ids.dtype} of shape {ids.shape}"
            raise DataError(f"{self.prefix}: a document must be a non-empty row of token ids, {found}")
        self.add_documents(ids, np.array([ids.size]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose ids follow each other in `tokens`; `lengths`, integers [documents], cuts them.

        Refuses what `add_document` refuses, and lengths that do not add up to the tokens.
        """
        if lengths.size == 0:
            return
        if tokens.ndim != 1 or lengths.min() < 1 or lengths.sum() != tokens.size:
            raise DataError(
                f"{self.prefix}: {lengths.size} documents of {lengths.sum()} tokens were given as {tokens.size} tokens"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            document = self.document_count + np.searchsorted(np.cumsum(lengths), np.argmax(tokens == wrong), "right")
            raise DataError(
                f"document {document} of {self.prefix} holds token id {wrong}, outside the vocabulary of "
                f"{self.vocab_size}. Use the tokenizer that this vocabulary size belongs to."
            )
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.document_count += lengths.size
        self.token_count += tokens.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._bin, self._lengths:
            if kind is None:
                self._bin.flush()
                self._write_index()

    def _write_index(self) -> None:
        count, start = self.document_count, 0
        with idx_path(self.prefix).open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, TYPE_CODES[self.dtype], count, count + 1))
            for lengths in self._stored_lengths():
                file.write(lengths.tobytes())
            for lengths in self._stored_lengths():
                ends = start + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
                start = int(ends[-1])
            for first in range(0, count + 1, INDEX_ENTRIES):
                file.write(np.arange(first, min(first + INDEX_ENTRIES, count + 1), dtype="<i8").tobytes())

    def _stored_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while piece := self._lengths.read(4 * INDEX_ENTRIES):
            yield np.frombuffer(piece, "<i4")


class IndexedReader:
    """Read-only view of PREFIX.bin/.idx, memory-mapped; takes files written here or by Megatron.

    Refuses missing, empty, cut or mismatched files when it is opened.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            if not path.is_file():
                raise DataError(f"{path} does not exist. Give a prefix PREFIX with both PREFIX.bin and PREFIX.idx.")
        sequences, boundaries = self._read_header()
        self._read_index(sequences, boundaries)

    def _read_header(self) -> tuple[int, int]:
        """Number of sequences and of document boundaries; sets the token type."""
        path = idx_path(self.prefix)
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{path} is not an index of Megatron's format. Write it again with tools/prepare_data.py.")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != 1 or code not in TOKEN_TYPES:
            raise DataError(f"{path} has version {version} and type code {code}; known: version 1, codes 4 and 8.")
        size = HEADER.size + 12 * sequences + 8 * boundaries
        if path.stat().st_size != size:
            raise DataError(f"{path} should have {size} bytes, found {path.stat().st_size}. Write it again.")
        if sequences == 0:
            raise DataError(f"{self.prefix} holds no documents.")
        self.dtype = TOKEN_TYPES[code]
        return sequences, boundaries

    def _read_index(self, sequences: int, boundaries: int) -> None:
        raw = np.memmap(idx_path(self.prefix), mode="r", offset=HEADER.size, dtype=np.uint8)
        lengths = raw[: 4 * sequences].view("<i4")
        offsets = raw[4 * sequences : 12 * sequences].view("<i8")
        self._first_sequence = raw[12 * sequences :].view("<i8")
        self.token_count = int(lengths.sum(dtype=np.int64))
        found = bin_path(self.prefix).stat().st_size
        if found != self.token_count * self.dtype.itemsize or self._first_sequence[-1] != sequences:
            raise DataError(
                f"{self.prefix}.idx describes {self.token_count} tokens of {self.dtype.itemsize} bytes, but "
                f"{self.prefix}.bin has {found} bytes: they do not belong together, or one is cut. Write them again."
            )
        self._sequence_offsets = offsets
        self.documents = boundaries - 1
        self._tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype)

    def tokens(self, document: int) -> np.ndarray:
        """Tokens of one document, its end token included: a view of shape [length]."""
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.prefix} has documents 0 to {self.documents - 1}, asked for {document}")
        return self._tokens[self._start(document) : self._start(document + 1)]

    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end token included, int64 [documents]."""
        ends = np.append(self._sequence_offsets, self.token_count * self.dtype.itemsize)
        return np.diff(ends[self._first_sequence]) // self.dtype.itemsize

    def _start(self, document: int) -> int:
        sequence = self._first_sequence[document]
        if sequence == self._sequence_offsets.size:
            return self.token_count
        return int(self._sequence_offsets[sequence]) // self.dtype.itemsize

    def all_tokens(self) -> np.ndarray:
        """The whole stream, documents in file order: a view of shape [token_count]."""
        return self._tokens
