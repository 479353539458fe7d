"""A real SGLang engine that shares its GPU with a trainer: memory, weights, log-probabilities.

    python -m pytest -s tests/gpu/test_sglang_engine.py

The model is random, in the shape of Qwen2.5-1.5B, in FP8 with power-of-two scales. With two GPUs the process group is
tested as well. Figures are printed as JSON.
"""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch

from infir2 import hf
from infir2.qwen2 import Shape
from infir2.rl import sglang_weights
from infir2.rl.rollout import Request, Sampling
from infir2.rl.sglang_engine import Client, Server
from infir2.rl.sglang_weights import Digest, Engine, EngineError, WeightSender

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU and SGLang")

SHAPE = Shape(28, 1536, 8960, 12, 2, 128, 151936, True, 1e6, 1e-6, 4096)
STOP = 151645
FLAGS = [
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--fp8-gemm-backend", "triton", "--disable-cuda-graph", "--mem-fraction-static", "0.4"),
]
GREEDY = Sampling(temperature=0)


def masters(seed: int) -> dict[str, torch.Tensor]:
    """A trainer's BF16 weights, on the GPU."""
    random = torch.Generator("cuda").manual_seed(seed)
    found = {}
    for name, size in hf.qwen2_tensors(SHAPE).items():
        noise = torch.randn(size, generator=random, device="cuda") * 0.02
        found[name] = (noise + 1 if "norm" in name else noise).to(torch.bfloat16)
    return found


def quantised(weights: dict[str, torch.Tensor]):
    """As a trainer sends them: name and tensor, one after the other."""
    for name, weight in weights.items():
        yield from hf.fp8_tensors(name, weight, "pow2").items()


def digests(weights: dict[str, torch.Tensor]) -> dict[str, Digest]:
    return {name: Digest.of(tensor) for name, tensor in quantised(weights)}


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    with hf.HFWriter(folder) as writer:
        writer.config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": SHAPE.layers,
            "hidden_size": SHAPE.hidden,
            "intermediate_size": SHAPE.ffn,
            "num_attention_heads": SHAPE.heads,
            "num_key_value_heads": SHAPE.kv_heads,
            "vocab_size": SHAPE.vocab,
            "max_position_embeddings": SHAPE.max_positions,
            "rms_norm_eps": SHAPE.norm_eps,
            "rope_theta": SHAPE.rope_base,
            "tie_word_embeddings": SHAPE.tied,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "eos_token_id": STOP,
            "quantization_config": hf.fp8_quantization_config("pow2"),
        }
        for name, tensor in quantised(weights):
            writer.add(name, tensor)


def launch(folder: Path, gpu: str, **options) -> tuple[Server, Client]:
    server, started = Server(), time.perf_counter()
    log = folder.parent / f"engine-{gpu}.log"
    try:
        url = server.launch(str(folder), [gpu], str(log), flags=FLAGS, seconds=400, **options)
    except EngineError:
        server.stop()
        raise
    show("start", seconds=time.perf_counter() - started)
    return server, Client([url], [STOP])


def show(what: str, **figures) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


@pytest.fixture(scope="module")
def first():
    return masters(1)


@pytest.fixture(scope="module")
def folder(first, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang") / "model"
    write(folder, first)
    return folder


@pytest.fixture(scope="module")
def colocated(folder):
    """Server, client and sender; the engine holds `first` before each test."""
    server, client = launch(folder, "0", colocate=True)
    sender = WeightSender([Engine(server.url, 1, (0,))])
    yield server, client, sender
    sender.close()
    client.close()
    server.stop()


def generate(client: Client, sampling: Sampling, new: int = 24, count: int = 8) -> list:
    """Responses to `count` fixed prompts, in their order."""
    prompts = torch.randint(0, SHAPE.vocab, (count, 32), generator=torch.Generator().manual_seed(0)).tolist()
    client.submit([Request(i, prompt, new, seed=i) for i, prompt in enumerate(prompts)], sampling)
    found = {response.id: response for response in (client.next(300) for _ in prompts)}
    return [(prompts[i], found[i]) for i in range(count)]


def greedy(server: Server, client: Client) -> list:
    """Responses to a few prompts, one at a time from an empty cache: GEMMs of another size round otherwise."""
    server.flush()
    prompts = torch.randint(0, SHAPE.vocab, (4, 32), generator=torch.Generator().manual_seed(7)).tolist()
    found = []
    for i, prompt in enumerate(prompts):
        client.submit([Request(i, prompt, 24, seed=0)], GREEDY)
        found.append(client.next(300))
    return found


def test_log_probabilities_are_those_of_the_sampling_temperature(colocated):
    """Those of generation equal those of scoring the same tokens at temperature 1, and differ from them at 0.5.

    Pins: importance weights of another distribution than the one that was sampled from.
    """
    server, client, _ = colocated
    means = {}
    for temperature in (1.0, 0.5):
        differences = []
        for prompt, response in generate(client, Sampling(temperature), new=32):
            body = {"input_ids": prompt + response.tokens, "return_logprob": True, "logprob_start_len": 0}
            body["sampling_params"] = {"max_new_tokens": 1, "temperature": 0}
            rows = sglang_weights.call(server.url, "/generate", body)["meta_info"]["input_token_logprobs"]
            scored = rows[len(prompt) :]
            assert [row[1] for row in scored] == response.tokens
            differences += [abs(row[0] - p) for row, p in zip(scored, response.logprobs, strict=True)]
        means[temperature] = sum(differences) / len(differences)
    show("mean |generated - scored| log-probability", **{str(t): value for t, value in means.items()})
    # random weights: prefill and decode round differently, and many tokens are about equally likely (measured: 0.12)
    assert means[1.0] < 0.25
    assert means[0.5] > 2 * means[1.0]


def test_memory_goes_weights_come_and_nothing_else_changes(colocated, first):
    """Released memory is there for others, and is used; then other weights arrive bit for bit, then the first ones
    again, which generate what they did before.

    Pins: memory that is not given back; weights, rotary tables or constants that are undefined after a release; codes
    or scales that are not the trainer's; a cache of other weights' keys and values.
    """
    server, client, sender = colocated
    second = masters(2)
    before = greedy(server, client)
    sglang_weights.compare(digests(first), server.weights(digests=True))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    freed = server.release()
    gained = torch.cuda.mem_get_info()[0] - free
    show("release", freed_gib=freed / 2**30, gained_gib=gained / 2**30)
    assert gained > 0.95 * freed > 20 * 2**30
    torch.empty(math.floor(0.9 * freed), dtype=torch.uint8, device="cuda").fill_(0xA5)
    torch.cuda.empty_cache()
    seconds = {}
    for name, weights in (("second", second), ("first", first)):
        if name == "first":
            server.release()
        times = [time.perf_counter()]
        server.resume_weights()
        times.append(time.perf_counter())
        sent = sender.send(quantised(weights), digests=True)
        held = server.weights(digests=True)
        sglang_weights.compare(sent.digests, held)
        times.append(time.perf_counter())
        server.resume_kv()
        times.append(time.perf_counter())
        seconds[name] = [b - a for a, b in itertools.pairwise(times)]
        if name == "second":
            with pytest.raises(ValueError, match="are not the trainer's"):
                sglang_weights.compare(digests(first), held)
            assert [r.tokens for r in greedy(server, client)] != [r.tokens for r in before]
    show("seconds of resume weights, sync with hashes, resume KV cache", **seconds)
    again = greedy(server, client)
    assert [r.tokens for r in again] == [r.tokens for r in before]
    for x, y in zip(again, before, strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-3)


def test_one_changed_code_is_found(colocated, first):
    """Pins: a comparison that cannot fail."""
    server, _, sender = colocated
    wrong = dict(quantised(first))
    name = "model.layers.17.self_attn.v_proj.weight"
    wrong[name].view(torch.uint8)[200, 1000] ^= 1
    server.flush()
    sender.send(wrong.items())
    with pytest.raises(ValueError, match=f"1 of the engine's .* first {name}"):
        sglang_weights.compare(digests(first), server.weights(digests=True))
    sender.send(quantised(first))
    sglang_weights.compare(digests(first), server.weights(digests=True))


def test_another_models_weights_are_refused_and_the_engine_lives(colocated, first):
    """Pins: an engine that ends itself, or takes BF16 for FP8, without a word to the trainer."""
    server, client, sender = colocated
    server.flush()
    with pytest.raises(EngineError, match="sent bfloat16"):
        sender.send(first.items())
    sender.send(quantised(first))
    server.flush()
    generate(client, GREEDY)


def test_a_sync_takes_at_most_two_seconds(colocated, first):
    """Quantising included. Pins: a handle or a request for each tensor."""
    server, _, sender = colocated
    server.flush()
    syncs = [sender.send(quantised(first)) for _ in range(4)]
    ready = list(quantised(first))
    only = [sender.send(ready) for _ in range(3)]
    server.flush()
    show(
        "sync",
        gigabytes=syncs[0].bytes / 1e9,
        tensors=syncs[0].tensors,
        seconds=[sync.seconds for sync in syncs],
        seconds_quantised_before=[sync.seconds for sync in only],
    )
    assert max(sync.seconds for sync in syncs[1:]) <= 2.0


def test_an_aborted_engine_can_release_at_once(colocated, first):
    """Pins: SGLang ending itself because responses arrive before it is idle."""
    server, client, sender = colocated
    prompts = torch.randint(0, SHAPE.vocab, (64, 16)).tolist()
    client.submit([Request(i, prompt, 3000, i) for i, prompt in enumerate(prompts)], Sampling())
    time.sleep(3)
    started = time.perf_counter()
    partial = client.abort()
    show("abort", seconds=time.perf_counter() - started, tokens=sum(len(r.tokens) for r in partial))
    assert len(partial) == 64
    assert {r.finish for r in partial} == {"abort"}
    assert min(len(r.tokens) for r in partial) > 0
    server.release()
    server.resume_weights()
    sender.send(quantised(first))
    server.resume_kv()
    going_on = [Request(r.id, prompts[r.id] + r.tokens, 4, r.id) for r in partial[:8]]
    client.submit(going_on, Sampling())
    assert all(client.next(60).finish == "length" for _ in going_on)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_go_to_another_gpu(folder, first, monkeypatch):
    """Pins: a process group that SGLang's side does not join, and buckets that it cuts otherwise."""
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "0")
    server, client = launch(folder, "1")
    try:
        torch.cuda.set_device(0)
        sender = WeightSender([Engine(server.url)])
        second = masters(3)
        server.flush()
        syncs = [sender.send(quantised(second), digests=True), sender.send(quantised(second))]
        sglang_weights.compare(syncs[0].digests, server.weights(digests=True))
        show("sync through NCCL", seconds=[sync.seconds for sync in syncs])
        server.flush()
        generate(client, GREEDY)
        sender.close()
    finally:
        client.close()
        server.stop()


@pytest.mark.parametrize("scale_fmt", ["pow2", "fp32"])
@pytest.mark.parametrize("column_major", [False, True])
def test_activations_are_quantised_as_in_training(scale_fmt, column_major):
    """Codes and scales are infir2.fp8's, bit for bit, subnormals and zeros included. Pins: division by a reciprocal,
    flushed subnormals, another rounding."""
    from infir2 import fp8
    from infir2.rl.sglang_launch import quantiser

    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-130, 100, (1001, 7), generator=generator).repeat_interleave(128, 1)
    x = torch.randn(1001, 896, generator=generator) * torch.exp2(exponents.float())
    x = x.bfloat16().index_fill(0, torch.tensor([5]), 0).cuda()
    codes, scale_inv = quantiser(scale_fmt)(x, 128, column_major_scales=column_major, scale_tma_aligned=column_major)
    wanted_codes, wanted_scale_inv = fp8.quantize(x.cpu(), fp8.ROW, scale_fmt=scale_fmt)
    assert torch.equal(codes.cpu().view(torch.uint8), wanted_codes.view(torch.uint8))
    assert torch.equal(scale_inv.cpu(), wanted_scale_inv)
    assert not column_major or scale_inv.stride() == (1, 1004)
