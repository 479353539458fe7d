"""The quantiser equals TransformerEngine bit for bit, by digests and vectors that TransformerEngine made on a GPU."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infir2 import fp8
from infir2.fp8 import SCALE_FORMATS

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make_te_vectors as te

DIGESTS, VECTORS = te.FOLDER / "te_fp8.json", te.FOLDER / "te_fp8.npz"
pytestmark = pytest.mark.skipif(
    not DIGESTS.exists(), reason=f"{DIGESTS.name} does not exist: run tests/golden/make_te_vectors.py on a Hopper GPU"
)


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(DIGESTS.read_text())


@pytest.mark.parametrize("dtype", te.DTYPES)
@pytest.mark.parametrize("kind", te.KINDS)
@pytest.mark.parametrize("layout_name", te.LAYOUTS)
def test_codes_and_scales_are_transformer_engines(golden, layout_name, kind, dtype):
    """Pins training against every tool: one differing bit here means that two stages see different weights."""
    layout = te.LAYOUTS[layout_name]
    parts = list(te.inputs(kind, layout, te.DTYPES[dtype]))
    key = f"{layout_name}/{kind}/{dtype}"
    assert te.sha256(parts) == golden["inputs"][key], "this machine made other inputs; the quantiser was not tested"
    for fmt, scale_fmt in itertools.product(te.FORMATS, SCALE_FORMATS):
        results = [fp8.quantize(x, layout.tile, fmt=fmt, scale_fmt=scale_fmt) for x in parts]
        codes, scale_inv = zip(*results, strict=True)
        expected = golden["cases"][f"{key}/{fmt.name}/{scale_fmt}"]
        assert {"codes": te.sha256(codes), "scale_inv": te.sha256(scale_inv)} == expected


@pytest.mark.parametrize("layout_name", te.RAW_LAYOUTS)
def test_raw_vectors_show_where_a_difference_begins(layout_name):
    """The same on stored vectors: these name the tile and the code where a digest only says that something differs."""
    layout = te.RAW_LAYOUTS[layout_name]
    vectors = np.load(VECTORS)
    for kind, dtype in itertools.product(te.RAW_KINDS, te.DTYPES):
        key = f"{layout_name}/{kind}/{dtype}"
        x = torch.from_numpy(vectors[f"input/{key}"]).view(te.DTYPES[dtype])
        for fmt, scale_fmt in itertools.product(te.FORMATS, SCALE_FORMATS):
            name = f"{key}/{fmt.name}/{scale_fmt}"
            codes = torch.from_numpy(vectors[f"codes/{name}"]).view(fmt.dtype)
            scale_inv = torch.from_numpy(vectors[f"scale_inv/{name}"]).view(torch.float32)
            ours = fp8.quantize(x, layout.tile, fmt=fmt, scale_fmt=scale_fmt)
            assert te.first_difference(x, layout.tile, ours, (codes, scale_inv)) == "", name


def test_vectors_are_enough(golden):
    """Pins a silent loss of cases: 10,000 tiles of every kind and scale format, at most 2 MB of raw vectors."""
    for (name, layout), kind, scale_fmt in itertools.product(te.LAYOUTS.items(), te.KINDS, SCALE_FORMATS):
        cases = [c for c in golden["cases"] if c.startswith(f"{name}/{kind}/") and c.endswith(scale_fmt)]
        assert len(cases) == len(te.DTYPES) * len(te.FORMATS)
        if name in ("row", "column", "block"):
            assert len(cases) * te.tile_count(layout) >= 10_000
    assert golden["made_by"]["transformer_engine"].startswith(te.VERSION)
    assert VECTORS.stat().st_size <= te.RAW_BYTES
