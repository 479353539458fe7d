"""The engine of a CPU, against Hugging Face's model run over whole sequences. Each docstring says what it pins."""

import json
import math
import shutil

import numpy as np
import pytest
import rl_model
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tolerances import BF16_LOGPROBS, BF16_OUTPUT, LOGITS
from transformers import Qwen2ForCausalLM

from infir2 import fp8, hf
from infir2.rl.rollout import Request, Sampling
from infir2.rl.transformers_engine import (
    Fp8Linear,
    TransformersEngine,
    end_tokens,
    inverse_cdf,
    restricted,
    to_bytes,
    uniforms,
)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return rl_model.bf16_folder(tmp_path_factory.mktemp("engine") / "bf16", scale=2.0)


@pytest.fixture(scope="module")
def in_fp8(bf16):
    return rl_model.fp8_folder(bf16, bf16.with_name("fp8"))


def stored(folder) -> dict[str, torch.Tensor]:
    reader = hf.HFReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def loaded(folder, scale_fmt: str = "pow2", **more) -> TransformersEngine:
    engine = TransformersEngine(folder, scale_fmt, **more)
    engine.load({name: to_bytes(tensor) for name, tensor in stored(folder).items()})
    return engine


def computing_in_fp32(engine: TransformersEngine) -> TransformersEngine:
    """The same weights and quantisation without BF16's rounding: what differs is then a fault."""
    engine.model.float()
    for module in engine.model.modules():
        if isinstance(module, Fp8Linear):
            module.decoded = module.decoded.float()
    return engine


@pytest.fixture(scope="module")
def engine(bf16) -> TransformersEngine:
    return computing_in_fp32(loaded(bf16))


@pytest.fixture(scope="module")
def model(bf16) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(bf16, dtype=torch.float32).eval()


def requests(count: int, longest: int = 20) -> list[Request]:
    """Prompts of 1 to 30 tokens, responses of 1 to `longest`: rows end, and are left out, at different times."""
    random = np.random.default_rng(count)
    prompts = [random.integers(3, 380, random.integers(1, 31)).tolist() for _ in range(count)]
    return [Request(i, prompt, int(random.integers(1, longest + 1)), 77 + i) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def distributions(model, request: Request, tokens: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities, FP64 [tokens, vocabulary], by one pass over the whole sequence, alone and without a cache."""
    ids = torch.tensor([request.tokens + tokens])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(request.tokens) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def differences(model, asked, responses, temperature: float) -> np.ndarray:
    """Of each token's log-probability from what the model says."""
    found = []
    for request, response in zip(asked, responses, strict=True):
        expected = distributions(model, request, response.tokens, temperature)
        chosen = expected[torch.arange(len(response.tokens)), response.tokens]
        found.append(np.array(response.logprobs) - chosen.numpy())
    return np.concatenate(found)


# Log-probabilities


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs(engine, model, temperature):
    """Each token's log-probability is the model's, given all before it and the temperature. Pins: attention to
    the padding, a cache whose rows are mixed up when some are left out, a temperature forgotten."""
    asked = requests(13)
    responses = engine.generate(asked, Sampling(temperature))
    assert [response.id for response in responses] == [request.id for request in asked]
    assert np.abs(differences(model, asked, responses, temperature)).max() <= LOGITS


def test_logprobs_in_bf16(bf16, model):
    """In BF16 they are the same up to its rounding, as often above as below."""
    asked = requests(24)
    off = differences(model, asked, loaded(bf16).generate(asked, Sampling()), 1.0)
    assert np.abs(off).mean() <= BF16_LOGPROBS
    assert abs(off.mean()) <= BF16_LOGPROBS / 3


@pytest.mark.parametrize("scale_fmt", ["pow2", "fp32"])
def test_logprobs_in_fp8(bf16, model, tmp_path, scale_fmt):
    """In FP8 they are those of Hugging Face's model with decoded weights, whose linear layers have their input
    quantised before them. Pins: weights that are not decoded again when new ones come, an input quantised a second
    time or not at all."""
    folder = rl_model.fp8_folder(bf16, tmp_path / "fp8", scale_fmt)
    asked = requests(12)
    responses = computing_in_fp32(loaded(folder, scale_fmt)).generate(asked, Sampling())
    reference = Qwen2ForCausalLM.from_pretrained(bf16, dtype=torch.float32).eval()
    tensors = stored(folder)
    for name, module in reference.named_modules():
        if hf.is_fp8_linear(f"{name}.weight"):
            codes, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
            module.weight.data = fp8.dequantize(codes, scales, fp8.BLOCK)
            module.register_forward_pre_hook(
                lambda _, inputs: fp8.fake_quantize(inputs[0][0], fp8.ROW, scale_fmt=scale_fmt)[None]
            )
    off = np.abs(differences(reference, asked, responses, 1.0))
    assert np.median(off) <= LOGITS  # a last bit can move a code, which moves all that follow: rare, and not small
    assert np.median(np.abs(differences(model, asked, responses, 1.0))) > 100 * LOGITS, "FP8 would not show"


@pytest.mark.parametrize("scale_fmt", ["pow2", "fp32"])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_fp8_linear(scale_fmt, rows):
    """Bit for bit the forward of training's emulated linear (infir2.layers): q(x) q(w)^T of fake-quantised operands;
    within BF16's rounding the product of codes and scales in FP64. A row does not depend on the other rows.

    Pins: activation tiles that cross rows, a bias before the rounding, scales of the other format.
    """
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, 256, generator=generator) * torch.logspace(-3, 2, 256)).bfloat16()
    w, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((384, 256), (384,)))
    linear = torch.nn.Linear(256, 384, dtype=torch.bfloat16)
    linear.bias.data = bias
    layer = Fp8Linear(linear, scale_fmt)
    codes, scale_inv = fp8.quantize(w, fp8.BLOCK, scale_fmt=scale_fmt)
    layer.weight.copy_(codes)
    layer.weight_scale_inv.copy_(scale_inv)
    layer.decode()
    found = layer(x[None])[0]
    operands = fp8.fake_quantize(x, fp8.ROW, scale_fmt=scale_fmt), fp8.fake_quantize(w, fp8.BLOCK, scale_fmt=scale_fmt)
    assert torch.equal(found, (operands[0] @ operands[1].t()).bfloat16() + bias)
    x_codes, x_scales = fp8.quantize(x, fp8.ROW, scale_fmt=scale_fmt)
    x_exact = x_codes.double() * x_scales.double().repeat_interleave(128, dim=1)
    w_exact = codes.double() * scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = x_exact @ w_exact.t() + bias.double()
    assert (found.double() - exact).abs().max() <= 2 * BF16_OUTPUT * exact.abs().max()


# Sampling


def test_tokens_depend_on_nothing_else(engine, monkeypatch):
    """A request's tokens are the same alone, in another order and with other requests; and where it is cut in two, as a
    partial response is. Pins: random numbers by row, padding that is seen, a place counted from the prompt's end."""
    asked = requests(12)
    together = engine.generate(asked, Sampling())
    alone = [engine.generate([request], Sampling())[0] for request in asked]
    monkeypatch.setattr(engine, "batch", 5)
    backwards = engine.generate(asked[::-1], Sampling())[::-1]
    for first, *others in zip(together, alone, backwards, strict=True):
        assert all((other.id, other.tokens, other.finish) == (first.id, first.tokens, first.finish) for other in others)
        assert all(np.abs(np.subtract(first.logprobs, other.logprobs)).max() <= LOGITS for other in others)
    for request, response in zip(asked, together, strict=True):
        half = len(response.tokens) // 2
        if half:
            begun = request.tokens + response.tokens[:half]
            rest = Request(request.id, begun, request.max_new_tokens - half, request.seed)
            assert engine.generate([rest], Sampling())[0].tokens == response.tokens[half:]


def test_seeds(engine):
    """The same seed gives the same tokens, another one others. Pins: samples of a group that are all alike."""
    one = [Request(i, [5, 6, 7], 8, seed) for i, seed in enumerate([1, 2, 3, 1])]
    tokens = [tuple(response.tokens) for response in engine.generate(one, Sampling())]
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 3


def test_greedy(engine, model):
    """Temperature 0 is transformers' own greedy search."""
    for request, response in zip(asked := requests(6), engine.generate(asked, Sampling(0.0)), strict=True):
        ids = torch.tensor([request.tokens])
        wanted = model.generate(ids, max_new_tokens=request.max_new_tokens, do_sample=False, attention_mask=ids * 0 + 1)
        assert response.tokens == wanted[0, ids.shape[1] :].tolist()


def test_finish(engine, monkeypatch):
    """A response ends with the first end token, or where its room ends. Pins: an end token left out of the response, a
    token too many, a last token that is the end called truncation."""
    monkeypatch.setattr(engine, "end", set(range(0, 380, 7)))
    finishes = set()
    for request, response in zip(asked := requests(30), engine.generate(asked, Sampling()), strict=True):
        ends = [token % 7 == 0 and token < 380 for token in response.tokens]
        assert not any(ends[:-1])
        assert response.finish == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(response.tokens) == request.max_new_tokens
        assert len(response.tokens) == len(response.logprobs) <= request.max_new_tokens
        finishes.add(response.finish)
    assert finishes == {"stop", "length"}
    (empty,) = engine.generate([Request(3, [5], 0, 1)], Sampling())
    assert (empty.tokens, empty.logprobs, empty.finish) == ([], [], "length")


def test_end_tokens(bf16, tmp_path):
    """Those of generation_config.json and config.json; a model without one is refused, and one whose chat template ends
    a turn with another token. Pins: responses that go on past <|im_end|>, all of them truncated."""
    folder = tmp_path / "model"
    shutil.copytree(bf16, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    assert end_tokens(folder) == {end}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert end_tokens(folder) == {3, 5, end}
    (folder / "generation_config.json").unlink()
    assert end_tokens(folder) == {end}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ValueError, match="names no eos_token_id"):
        end_tokens(folder)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    with pytest.raises(ValueError, match=rf"is \[3\], but its chat template ends a turn with <\|im_end\|> \({end}\)"):
        TransformersEngine(folder, "pow2")


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=3), Sampling(0.8, top_p=0.4)], ids=["top-k", "top-p"])
def test_restricted_sampling(engine, model, sampling):
    """Only the k most likely tokens, or those before which less than p is gathered, are drawn; log-probabilities are
    those of the whole distribution. Pins: a nucleus without the token that crosses p, probabilities divided anew."""
    asked = requests(20)
    responses = engine.generate(asked, sampling)
    assert np.abs(differences(model, asked, responses, sampling.temperature)).max() <= LOGITS
    ranks = set()
    for request, response in zip(asked, responses, strict=True):
        for row, token in zip(
            distributions(model, request, response.tokens, sampling.temperature).exp(), response.tokens, strict=True
        ):
            larger = row[row > row[token]]
            assert len(larger) < 3 if sampling.top_k > 0 else larger.sum() < 0.4
            ranks.add(len(larger))
    assert len(ranks) >= 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(-1, 13), st.integers(1, 100))
def test_restricted(weights, top_k, percent):
    """Against lists written out: at the edge of top-k all equal weights stay, at that of top-p those needed."""
    top_p = 1.0 if percent == 100 else percent * 0.00987654321  # no sum of these weights is equal to it
    probabilities = [weight / sum(weights) for weight in weights]
    found = restricted(torch.tensor([probabilities], dtype=torch.float64), Sampling(1.0, top_p, top_k))[0].tolist()
    ordered = sorted(probabilities, reverse=True)
    edge = ordered[min(top_k, len(ordered)) - 1] if top_k > 0 else 0.0
    ordered = [p for p in ordered if p >= edge]
    wanted = [p for place, p in enumerate(ordered) if p and math.fsum(ordered[:place]) < top_p]
    assert sorted(filter(None, found), reverse=True) == wanted
    assert all(value in (0.0, p) for value, p in zip(found, probabilities, strict=True))


def kolmogorov(sample: np.ndarray) -> float:
    """Largest distance of the sample's distribution from that of uniform numbers, in units of 1 / sqrt(n)."""
    ordered, n = np.sort(sample), len(sample)
    return max(np.max(np.arange(1, n + 1) / n - ordered), np.max(ordered - np.arange(n) / n)) * n**0.5


def test_uniforms():
    """Over seeds at one place, over places of one seed, and over seeds that are numbered on, the numbers are uniform
    (a larger distance has a probability of 1e-4) and neighbours do not go together. Pins: a weak mix of two counters,
    whose tokens at neighbouring places are alike, a sum of them, which makes samples shifted copies of each other."""
    n = 100_000
    numbers = np.arange(n, dtype=np.uint64)
    for seeds, places in ((numbers, 0 * numbers), (0 * numbers + np.uint64(9), numbers), (numbers, numbers)):
        found = uniforms(seeds, places)
        assert found.min() >= 0
        assert found.max() < 1
        assert kolmogorov(found) < 2.23
        for step in (1, 2, 8):
            assert abs(np.corrcoef(found[step:], found[:-step])[0, 1]) < 4 / n**0.5
    seeds, places = (axis.ravel() for axis in np.meshgrid(numbers[:50], numbers[:50]))
    assert len(np.unique(uniforms(seeds, places))) == 2500  # seed 1 at place 2 is not seed 2 at place 1


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations above its mean."""
    freedom = len(counts) - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / (2 * freedom) ** 0.5


def test_inverse_cdf():
    """Indices come as often as their weights say, those of weight 0 never, at the ends of [0, 1) neither."""
    weights = torch.tensor([0, 0.02, 0.3, 0, 0.08, 0.25, 0.05, 0.3, 0, 0], dtype=torch.float64) * 3
    n = 100_000
    uniform = torch.from_numpy(uniforms(np.arange(n, dtype=np.uint64), np.full(n, 7, dtype=np.uint64)))
    counts = np.bincount(inverse_cdf(weights.expand(n, -1), uniform).numpy(), minlength=10)
    held = weights.numpy() > 0
    assert not counts[~held].any()
    assert chi_square(counts[held], n * weights.numpy()[held] / 3) < 4
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(weights.expand(2, -1), ends).tolist() == [1, 7]


def test_first_tokens_are_distributed_as_the_model_says(engine, model):
    """4,000 samples of one prompt, binned: a chi-square far from its mean would show a bias of the whole path."""
    prompt, n = [9, 8, 7], 4000
    found = engine.generate([Request(i, prompt, 1, 1000 + i) for i in range(n)], Sampling(0.5))
    expected = n * distributions(model, Request(0, prompt, 1, 0), [0], 0.5).exp()[0].numpy()
    counts = np.bincount([response.tokens[0] for response in found], minlength=len(expected))
    common = expected >= 10
    assert common.sum() >= 20
    counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert chi_square(counts, expected) < 4


# Weights


def test_load_refuses(in_fp8):
    """Other tensors than the engine's are refused by name. Pins: a tensor that keeps its old value unnoticed."""
    engine = TransformersEngine(in_fp8, "pow2")
    tensors = {name: to_bytes(tensor) for name, tensor in stored(in_fp8).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"do not have the same tensors: .*up_proj.weight"):
        engine.load({key: data for key, data in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"do not have the same tensors: .*extra"):
        engine.load(tensors | {"extra": tensors[name]})
    with pytest.raises(ValueError, match=r"bytes for a tensor of torch.float8_e4m3fn"):
        engine.load(tensors | {name: tensors[name][:-1]})


def test_other_scales_are_refused(in_fp8):
    with pytest.raises(ValueError, match="has pow2 scales, training has fp32"):
        TransformersEngine(in_fp8, "fp32")


def test_digests(in_fp8):
    """They are of every tensor's bytes, and of one bit more or less. Pins: weights compared by a sum, or not at all."""
    engine, tensors = loaded(in_fp8), stored(in_fp8)
    before = engine.digests()
    assert before == {name: xxhash.xxh3_128_hexdigest(to_bytes(tensor).tobytes()) for name, tensor in tensors.items()}
    for changed in ("o_proj.weight", "o_proj.weight_scale_inv", "q_proj.bias", "model.norm.weight"):
        name = next(name for name in tensors if name.endswith(changed))
        data = {key: to_bytes(tensor).copy() for key, tensor in tensors.items()}
        data[name][-1] ^= 1
        engine.load(data)
        after = engine.digests()
        assert [key for key in before if before[key] != after[key]] == [name]


def test_new_weights_are_used(in_fp8):
    """What is generated after a second load is what an engine with only those weights generates."""
    other = {name: to_bytes(tensor) for name, tensor in stored(in_fp8).items()}
    swapped = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    for suffix in ("", "_scale_inv"):
        first, second = (name + suffix for name in swapped)
        other[first], other[second] = other[second], other[first]
    engine, fresh = loaded(in_fp8), TransformersEngine(in_fp8, "pow2")
    before = engine.generate(requests(4), Sampling())
    engine.load(other)
    fresh.load(other)
    after = engine.generate(requests(4), Sampling())
    assert after == fresh.generate(requests(4), Sampling())
    assert after != before
