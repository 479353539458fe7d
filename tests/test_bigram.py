"""tools/bigram_baseline.py against an implementation of the same formula in dictionaries."""

import importlib
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infir2.indexed import IndexedWriter
from infir2.receipts import write_manifest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
bigram = importlib.import_module("bigram_baseline")

VOCAB = 7
streams = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60)
discounts = st.sampled_from([0.05, 0.4, 0.75, 0.95])


def slow_probability(train: list[int], discount: float, previous: int, token: int) -> float:
    """p(token | previous) straight from the docstring's two lines."""
    pairs = Counter(itertools.pairwise(train))
    followers, predecessors = defaultdict(set), defaultdict(set)
    for v, w in pairs:
        followers[v].add(w)
        predecessors[w].add(v)
    n = sum(len(seen) for seen in predecessors.values())
    q = max(len(predecessors[token]) - discount, 0) / n
    q += discount * sum(bool(seen) for seen in predecessors.values()) / n / VOCAB
    led = sum(count for (v, _), count in pairs.items() if v == previous)
    if led == 0:
        return q
    return max(pairs[previous, token] - discount, 0) / led + discount * len(followers[previous]) / led * q


@given(train=streams, valid=streams, discount=discounts)
def test_loss_equals_the_slow_implementation(train, valid, discount):
    """Pins counting, smoothing and look-up, unseen pairs and unseen predecessors included."""
    fast = bigram.fit(np.array(train, dtype=np.uint16), VOCAB, discount).cross_entropy(np.array(valid, dtype=np.uint16))
    losses = [-math.log(slow_probability(train, discount, v, w)) for v, w in itertools.pairwise(valid)]
    assert fast == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@given(train=streams, discount=discounts)
def test_probabilities_sum_to_one(train, discount):
    """Pins a baseline made weak or impossible by probability that is lost or counted twice."""
    model = bigram.fit(np.array(train), VOCAB, discount)
    for previous in range(VOCAB):
        losses = [model.cross_entropy(np.array([previous, token])) for token in range(VOCAB)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=1e-12)


def prepared(folder: Path, train: list[list[int]], valid: list[list[int]]) -> Path:
    """A folder as tools/prepare_data.py leaves it."""
    folder.mkdir()
    splits = {}
    for name, documents in {"train": train, "valid": valid}.items():
        with IndexedWriter(folder / name, VOCAB) as writer:
            for document in documents:
                writer.add_document(document)
        splits[name] = {"documents": writer.document_count, "tokens": writer.token_count}
    write_manifest(folder, {"request": {}, "vocab_size": VOCAB, "splits": splits})
    return folder


def documents(seed: int, count: int) -> list[list[int]]:
    """Documents in which each token mostly follows its predecessor by one."""
    random = np.random.default_rng(seed)
    steps = random.choice([1, 2, 3], p=[0.8, 0.1, 0.1], size=(count, 30))
    return (np.cumsum(steps, axis=1) % VOCAB).tolist()


def test_baseline_is_near_the_source_and_blind_to_validation(tmp_path, capsys):
    """Pins a discount tuned on the validation split, and targets other than all tokens but the first."""
    train, valid = documents(1, 400), documents(2, 60)
    results = []
    for name, held_out in {"all": valid, "constant": [[0] * 50]}.items():
        assert bigram.main(["--data", str(prepared(tmp_path / name, train, held_out))]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["discount"] == results[1]["discount"]
    assert (results[0]["targets"], results[1]["targets"]) == (60 * 30 - 1, 49)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))
    first = math.log(3) / 30  # a document's first token follows another document
    assert entropy - 0.05 < results[0]["nats_per_token"] < entropy + first + 0.1


def test_damaged_or_tiny_folder_is_refused(tmp_path, caplog):
    """Pins a baseline of data that is not what its manifest says, and one without anything to tune on."""
    folder = prepared(tmp_path / "cut", documents(1, 4), documents(2, 4))
    (folder / "valid.bin").write_bytes(b"")
    one = prepared(tmp_path / "one", documents(1, 1), documents(2, 1))
    for data, message in {folder: "valid.bin has 0 bytes", one: "one document", tmp_path: "manifest.json"}.items():
        assert bigram.main(["--data", str(data)]) == 2
        assert message in caplog.records[-1].getMessage()
