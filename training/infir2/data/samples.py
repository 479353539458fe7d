"""Samples for supervised fine-tuning, as `tools/prepare_data.py sft` writes them; read with numpy alone.

    FOLDER/SPLIT.bin, .idx   one document a sample: the tokens of the rendered conversation (infir2.indexed)
    FOLDER/SPLIT.mask        uint8, one for each token of SPLIT.bin in order: 1 where the token itself is trained

A model predicts token t from the tokens before it, so a trainer that shifts its labels by one shifts the mask alike.
"""

from pathlib import Path

import numpy as np

from infir2.indexed import DataError, IndexedReader
from infir2.receipts import check_cheaply


def mask_path(prefix: Path) -> Path:
    """PREFIX.mask."""
    return prefix.with_name(prefix.name + ".mask")


def epoch_order(samples: int, epoch: int, seed: int) -> np.ndarray:
    """The order of epoch `epoch`, a permutation, int64 [samples]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)


class Samples:
    """Read-only, memory-mapped view of one split.

    Refuses a folder that fails receipts.check_cheaply, that is of another task or lacks the split, a mask of another
    length than the tokens, and, where `tokenizer_sha256` (of tokenizer.json) is given, another tokenizer.
    """

    def __init__(self, folder: Path, split: str, tokenizer_sha256: str | None = None) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = check_cheaply(self.folder)
        self._check_manifest(tokenizer_sha256)
        self._reader = IndexedReader(self.folder / split)
        path = mask_path(self.folder / split)
        size = path.stat().st_size if path.is_file() else None
        if size != self._reader.token_count:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path} {found}, but there are {self._reader.token_count} tokens. Prepare the data again.")
        self._mask = np.memmap(path, mode="r", dtype=np.uint8)
        self._lengths = self._reader.lengths()
        self._starts = np.cumsum(self._lengths) - self._lengths

    def _check_manifest(self, tokenizer_sha256: str | None) -> None:
        task = self.manifest["request"].get("task")
        if task != "sft":
            raise DataError(f"{self.folder} was prepared for {task!r}. Give a folder of `prepare_data.py sft`.")
        splits = self.manifest.get("splits", {})
        if self.split not in splits:
            raise DataError(f"{self.folder} has no split {self.split!r}, only {', '.join(splits)}.")
        found = self.manifest["tokenizer"]["sha256"]
        if tokenizer_sha256 not in (None, found):
            raise DataError(
                f"{self.folder} was prepared with {self.manifest['tokenizer']['path']} (SHA-256 {found}), but the "
                f"model's tokenizer.json has {tokenizer_sha256}. Prepare the data with the model's tokenizer."
            )

    def __len__(self) -> int:
        return self._lengths.size

    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 of shape [samples]."""
        return self._lengths

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [length]) and whether each is trained (bool [length])."""
        tokens = self._reader.tokens(index).astype(np.int64)
        start = self._starts[index]
        return tokens, self._mask[start : start + tokens.size].astype(bool)

    def prompt_and_target(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The last trained run of tokens, and all tokens before it: (prompt, target), int64 each."""
        tokens, mask = self.sample(index)
        end = int(np.flatnonzero(mask)[-1]) + 1
        untrained = np.flatnonzero(~mask[:end])
        start = int(untrained[-1]) + 1 if untrained.size else 0
        return tokens[:start], tokens[start:end]
