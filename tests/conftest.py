import os
import tempfile

tempfile.gettempdir()  # this process keeps the usual one
# A process that is killed leaves its temporary files (wandb makes two folders when it is imported, and Megatron imports
# it): those of all that the tests start are in here, and go with the tests.
_OF_CHILDREN = tempfile.TemporaryDirectory(prefix="infir2-tests-", ignore_cleanup_errors=True)
os.environ["TMPDIR"] = _OF_CHILDREN.name
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", INFIR2_BACKEND="cpu")

import numpy as np
import pytest
from trainer import MODEL

from infir2.indexed import IndexedWriter

LONGEST = (
    *("test_rl", "test_eval", "test_resume", "test_convert", "test_training", "test_ray_launch", "test_speed"),
    *("test_sft", "test_sglang_engine", "test_language_model", "test_bench_step", "test_eval_scripts"),
)


def pytest_collection_modifyitems(items):
    """The longest files first: a file stays on one worker, and the short ones fill up what is left at the end."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefix of a tokenised corpus that can be learned: documents that count in 16 tokens, start and step random."""
    prefix = tmp_path_factory.mktemp("corpus") / "train"
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=256) as writer:
        for _ in range(300):
            start, step = random.integers(1, 16, 2)
            writer.add_document((start + step * np.arange(random.integers(40, 200))) % 16)
    return prefix


@pytest.fixture(scope="session")
def run_flags(corpus, tmp_path_factory):
    """A function from a run's folder to the flags of a run there, on the session's corpus."""
    cache = tmp_path_factory.mktemp("cache")

    def flags(run, *more: str) -> list[str]:
        return [
            *MODEL,
            *("--data-path", str(corpus), "--split", "100,0,0", "--data-cache-path", str(cache)),
            *("--load", str(run / "checkpoints"), "--save", str(run / "checkpoints"), "--save-interval", "1000"),
            *("--tensorboard-dir", str(run / "tensorboard"), "--from-scratch"),
            *more,
        ]

    return flags
