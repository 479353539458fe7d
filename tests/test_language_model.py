"""What pre-training's datasets hand to the model, against the stored tokens."""

import numpy as np
import pytest
from trainer import with_megatron

from infir2.indexed import IndexedWriter

LENGTH, VOCABULARY, DOCUMENT_END, TURN_END = 32, 64, 61, 63


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Prefix of a corpus whose documents end with DOCUMENT_END, some of them empty but for it, and its documents."""
    prefix, draw = tmp_path_factory.mktemp("stored") / "train", np.random.default_rng(0)
    documents = [np.append(draw.integers(0, 60, size), DOCUMENT_END) for size in draw.integers(0, 40, 200)]
    with IndexedWriter(prefix, vocab_size=VOCABULARY) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix, documents


def batches(prefix: str, cache: str, pad: int | None, eos: int, workers: int, first: int) -> list[dict]:
    """Samples from `first` on, through a loader as Megatron makes it, with the dataset's own order: which stored tokens
    each sample is made of. `pad`, `eos`: the tokenizer's. Needs Megatron."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from infir2.language_model import StoredTokens

    tokenizer = Tokenizer(pad, eos)
    config = GPTDatasetConfig(
        random_seed=1236, sequence_length=LENGTH, blend=([prefix], None), split="1,0,0", path_to_cache=cache,
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    low = StoredTokens.build_low_level_dataset(prefix, config)
    dataset = StoredTokens(low, prefix, np.arange(200, dtype=np.int32), 240, Split.train, config)
    dataset[0]  # makes it read its order
    order = dataset.document_index, dataset.shuffle_index
    chosen = torch.utils.data.Subset(dataset, range(first, 240))
    loader = torch.utils.data.DataLoader(chosen, batch_size=None, num_workers=workers)
    return [
        {name: value.numpy() for name, value in sample.items()} | {"documents": order[0], "place": order[1][first + i]}
        for i, sample in enumerate(loader)
    ]


class Tokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    vocab_size = VOCABULARY

    def __init__(self, pad: int | None, eos: int):
        self.pad, self.eod, self.unique_identifiers = pad, eos, {"class": "test"}
        self.special_tokens_dict = {"eos_token": eos, "pad_token": pad}


KINDS = {  # (pad, eos)
    "pad is the document end, eos another: Qwen2.5-Instruct": (DOCUMENT_END, TURN_END),
    "both are the document end: Qwen2.5's base": (DOCUMENT_END, DOCUMENT_END),
    "pad is a token of its own": (62, DOCUMENT_END),
    "pad is a word": (5, DOCUMENT_END),
    "no pad": (None, DOCUMENT_END),
}


def all_batches(prefix: str, cache: str, pad: int | None, eos: int) -> dict[tuple[int, int], list[dict]]:
    """`batches` by workers and first sample. Needs Megatron."""
    return {at: batches(prefix, cache, pad, eos, *at) for at in ((0, 0), (2, 0), (2, 77))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_what_is_stored(stored, tmp_path, kind):
    """Tokens and labels are the stored ones, every position is trained, whatever the tokenizer calls pad, with several
    workers, and from a later sample on, as after a resume.

    Pins: document ends that become token 0 and are not learned, a mask of the first sample in all later ones.
    """
    prefix, documents = stored
    loaded = with_megatron("test_language_model", "all_batches", str(prefix), str(tmp_path), *KINDS[kind])
    for (_, first), found in loaded.items():
        assert len(found) == 240 - first
        stream = np.concatenate([documents[i] for i in found[0]["documents"]])
        for sample in found:
            start = sample["place"] * LENGTH
            wanted = stream[start : start + LENGTH + 1]
            assert np.array_equal(sample["tokens"], wanted[:-1])
            assert np.array_equal(sample["labels"], wanted[1:])
            assert sample["loss_mask"].all()
        assert sum((sample["labels"] == DOCUMENT_END).sum() for sample in found) > 100
