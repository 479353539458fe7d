"""Held-out loss of a bigram model, the mark that a language model trained on the same tokens has to pass.

    python tools/bigram_baseline.py --data DIR

DIR is a folder of tools/prepare_data.py. Fits interpolated Kneser-Ney on the training split (Kneser and Ney, 1995;
Chen and Goodman, 1998, section 2.7):

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d * N(v) / c(v) * q(w)
    q(w)     = max(n(w) - d, 0) / n       + d * U / n / V

c counts token pairs; N(v) is how many different tokens follow v, n(w) how many different tokens precede w; n is the sum
of n(w), U the number of w with n(w) > 0, V the vocabulary size. An unseen v leaves q(w). The discount d is the best of
a grid on every twentieth training document, with the model fitted on the others; then the model is fitted on all.

Prints JSON: nats per token over all validation tokens but the first of the stream, each given its predecessor, document
ends included. One epoch of Megatron's GPTDataset over the same split gives a model these targets, in its own order of
documents and but for a last, partial sample.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infir2.indexed import DataError, IndexedReader
from infir2.receipts import MANIFEST, check_cheaply, sha256_file

DISCOUNTS = tuple(step / 20 for step in range(1, 20))
TUNING_EVERY = 20

log = logging.getLogger("bigram_baseline")


@dataclass(frozen=True)
class Bigram:
    """A fitted model. `seen` holds the pairs of the training stream as v * V + w, ascending."""

    seen: np.ndarray  # int64 [pairs]
    seen_probability: np.ndarray  # float64 [pairs]: max(c(v, w) - d, 0) / c(v)
    escape: np.ndarray  # float64 [V]: d * N(v) / c(v), or 1 for a v that never led a pair
    lower: np.ndarray  # float64 [V]: q(w)

    def cross_entropy(self, stream: np.ndarray) -> float:
        """Mean of -ln p over all tokens of `stream` but the first; `stream` is [tokens], at least two."""
        previous, current = stream[:-1].astype(np.int64), stream[1:].astype(np.int64)
        pairs = previous * self.lower.size + current
        places = np.searchsorted(self.seen, pairs).clip(max=self.seen.size - 1)
        direct = np.where(self.seen[places] == pairs, self.seen_probability[places], 0.0)
        return float(-np.log(direct + self.escape[previous] * self.lower[current]).mean())


def fit(stream: np.ndarray, vocab_size: int, discount: float) -> Bigram:
    """Fit the model above to `stream`, token ids of shape [tokens], at least two; 0 < discount < 1."""
    ids = stream.astype(np.int64)
    seen, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    before, after = np.divmod(seen, vocab_size)
    pairs_led = np.bincount(before, weights=counts, minlength=vocab_size)  # c(v)
    followers = np.bincount(before, minlength=vocab_size)  # N(v)
    predecessors = np.bincount(after, minlength=vocab_size)  # n(w)
    spread = discount * np.count_nonzero(predecessors) / vocab_size
    return Bigram(
        seen=seen,
        seen_probability=(counts - discount) / pairs_led[before],
        escape=np.where(pairs_led > 0, discount * followers / np.maximum(pairs_led, 1), 1.0),
        lower=(np.maximum(predecessors - discount, 0) + spread) / predecessors.sum(),
    )


def tune(train: IndexedReader, vocab_size: int) -> float:
    """The discount with the lowest loss on every twentieth training document. Refuses a split of one document."""
    if train.documents < 2:
        raise DataError(f"{train.prefix} has one document; a discount needs two or more. Prepare more text.")
    documents = [train.tokens(index) for index in range(train.documents)]
    tuning = np.concatenate(documents[::TUNING_EVERY])
    rest = np.concatenate([tokens for index, tokens in enumerate(documents) if index % TUNING_EVERY])
    return min(DISCOUNTS, key=lambda discount: fit(rest, vocab_size, discount).cross_entropy(tuning))


def baseline(data: Path) -> dict[str, Any]:
    """Loss of the tuned model on the validation split of a prepared folder, and what it was measured on."""
    vocab_size = check_cheaply(data)["vocab_size"]
    train, valid = (IndexedReader(data / split) for split in ("train", "valid"))
    if min(train.token_count, valid.token_count) < 2:
        raise DataError(f"{data} has a split of fewer than two tokens; there is no pair to predict. Prepare more text.")
    discount = tune(train, vocab_size)
    model = fit(train.all_tokens(), vocab_size, discount)
    return {
        "nats_per_token": round(model.cross_entropy(valid.all_tokens()), 6),
        "targets": valid.token_count - 1,
        "train_tokens": train.token_count,
        "vocab_size": vocab_size,
        "discount": discount,
        "manifest_sha256": sha256_file(data / MANIFEST),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the baseline as JSON. Exit status 2 on any refusal."""
    logging.basicConfig(format="%(name)s: %(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of tools/prepare_data.py")
    args = parser.parse_args(arguments)
    try:
        print(json.dumps(baseline(args.data)))
    except (DataError, OSError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
