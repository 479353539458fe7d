"""The tokenizer that turns documents into ids.

Hugging Face's `tokenizers` is the reference. `fastokens` reads the same tokenizer.json and gives the same ids many
times faster, which is checked on a sample of every block of text that is prepared: a difference ends the run.
"""

import functools
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import fastokens
import numpy as np
from tokenizers import Tokenizer

from infir2.indexed import DataError
from infir2.receipts import sha256_file

LIBRARIES = ("fastokens", "tokenizers")
SAMPLES = 16  # texts of each block that both libraries encode
SAMPLE_CHARACTERS = 2000

log = logging.getLogger("prepare_data")


class DocumentTokenizer:
    """An HF folder's tokenizer, set up to turn documents into ids; `eod` is the document-end token's id.

    Refuses a folder without tokenizer.json, and a vocabulary without the document-end token. Truncation and padding
    that were saved in tokenizer.json are switched off: they would cut documents without a word. A tokenizer.json that
    fastokens cannot read is left to `tokenizers`; `library` says which one encodes.
    """

    def __init__(self, folder: Path, eod_token: str, parse_special_tokens: bool, library: str = LIBRARIES[0]) -> None:
        self.path = folder / "tokenizer.json"
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist. Give the folder of a Hugging Face fast tokenizer.")
        self.sha256 = sha256_file(self.path)
        try:
            self._reference = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path} cannot be read: {error}") from error
        self._reference.no_truncation()
        self._reference.no_padding()
        self._reference.encode_special_tokens = not parse_special_tokens
        self._parse_special_tokens = parse_special_tokens
        self.vocab_size = max(self._reference.get_vocab().values(), default=-1) + 1
        self.eod = self._document_end(eod_token)
        self._wanted = library

    def _document_end(self, eod_token: str) -> int:
        eod = self._reference.token_to_id(eod_token)
        if eod is None:
            special = [token.content for token in self._reference.get_added_tokens_decoder().values()]
            raise DataError(
                f"{self.path} has no document-end token {eod_token!r}; its special tokens are {special}. Name the "
                "right one with --eod-token."
            )
        return eod

    @functools.cached_property
    def _fast(self) -> fastokens.Tokenizer | None:
        """Loaded when it is first needed: it takes seconds, which a process that does not encode can save."""
        if self._wanted != "fastokens":
            return None
        try:
            tokenizer = fastokens.Tokenizer.from_file(str(self.path))
        except Exception as error:  # a kind of tokenizer that it does not know
            log.info("fastokens cannot read %s (%s): encoding with tokenizers, which is slower", self.path, error)
            return None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def library(self) -> str:
        """Name and version of the library that encodes."""
        name = "tokenizers" if self._fast is None else "fastokens"
        return f"{name} {version(name)}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, each with the document-end token last; and the length of each.

        Returns uint32 [sum of lengths] and int64 [texts].
        """
        ids, lengths = self._encode_fast(texts) if self._fast is not None else self._encode_reference(texts)
        return np.insert(ids, np.cumsum(lengths), self.eod), lengths + 1

    def _encode_fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._fast.encode_batch_flat(
            list(texts), add_special_tokens=False, split_special_tokens=not self._parse_special_tokens
        )
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))

    def _encode_reference(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [encoding.ids for encoding in self._reference.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.fromiter((token for row in rows for token in row), np.uint32, lengths.sum()), lengths

    def check(self, texts: Sequence[str]) -> int:
        """Encode a sample of the texts with both libraries; refuses a difference. Returns how many were compared.

        The beginnings of documents spread evenly over `texts`, half of them with other characters than ASCII as far
        as there are any, where libraries differ first.
        """
        if self._fast is None:
            return 0
        sample = _spread(texts, SAMPLES // 2) + _spread([text for text in texts if not text.isascii()], SAMPLES // 2)
        sample = [text[:SAMPLE_CHARACTERS] for text in sample]
        fast, reference = self._encode_fast(sample), self._encode_reference(sample)
        if not all(np.array_equal(found, wanted) for found, wanted in zip(fast, reference, strict=True)):
            raise DataError(
                f"fastokens and tokenizers encode differently with {self.path}, in one of the texts that begin "
                f"{[text[:40] for text in sample]}. Pass --tokenizer-library tokenizers."
            )
        return len(sample)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """Up to `count` of the texts, evenly spread."""
    return list(texts[:: max(1, -(-len(texts) // count))])
