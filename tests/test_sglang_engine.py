"""SGLang's client, server and weight sync against a server that answers as SGLang does (tests/fake_sglang.py)."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_sglang import STOP, Fake, expected, running
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_model import Rank, drop, trained

from infir2.rl import sglang_engine, sglang_weights
from infir2.rl.rollout import Request, Response, Sampling
from infir2.rl.sglang_engine import Client, Server
from infir2.rl.sglang_weights import Digest, Engine, EngineError, WeightSender, digest
from infir2.stop_tokens import stop_tokens

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=-1)


def requests(count: int, new: int = 4, first: int = 0) -> list[Request]:
    return [Request(i, [i + 1, i + 2], new, seed=1000 + i) for i in range(first, first + count)]


def client_of(*fakes: Fake, **options) -> Client:
    return Client([fake.url for fake in fakes], [STOP], **{"delay": 0.01, "probe_seconds": 5} | options)


def all_of(client: Client, count: int) -> dict[int, Response]:
    return {response.id: response for response in (client.next(20) for _ in range(count))}


# Generation


def test_every_request_gets_its_response_at_once():
    """Pins: aiohttp's limit of 100 connections (SGLang throttled to it), tokens and log-probabilities mixed up, and a
    sampling parameter that does not reach the engine."""
    with running(Fake()) as (fake,):
        fake.token_seconds = 0.3
        client = client_of(fake)
        client.submit(requests(150), SAMPLING)
        found = all_of(client, 150)
        for request in requests(150):
            tokens, logprobs = expected(request.tokens, 4)
            assert found[request.id] == Response(request.id, tokens, logprobs, "length")
        assert fake.peak > 120
        sent = next(body for _, body in fake.calls if body.get("input_ids") == [1, 2])["sampling_params"]
        wanted = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "sampling_seed": 1000}
        assert sent == wanted | {"stop_token_ids": [STOP]}
        with pytest.raises(LookupError):
            client.next()
        client.close()


def test_a_prompts_samples_go_to_one_engine_and_engines_share_the_prompts():
    """Pins: a group's prompt computed once on each engine, and an engine that gets all."""
    with running(Fake(), Fake()) as fakes:
        client = client_of(*fakes)
        client.submit([Request(i, [i // 4, 1], 2, 0) for i in range(24)], SAMPLING)
        all_of(client, 24)
        prompts = [[body["input_ids"][0] for path, body in fake.calls if path == "/generate"] for fake in fakes]
        assert [len(found) for found in prompts] == [12, 12]
        assert not set(prompts[0]) & set(prompts[1])
        client.close()


def wait_until_running(fake: Fake, count: int) -> None:
    while fake.running < count:
        time.sleep(0.01)


def test_abort_returns_what_is_there():
    """Pins: tokens thrown away by an abort, a finished response lost with it, and a request that reached its engine
    just after the abort and ran to its end (the first abort is lost here)."""
    with running(Fake()) as (fake,):
        fake.token_seconds, fake.ignored_aborts = 0.02, 1
        client = client_of(fake)
        client.submit([Request(0, [5], 1, 0), *requests(8, 100_000, first=1)], SAMPLING)
        while fake.generated < 80:
            time.sleep(0.02)
        found = {response.id: response for response in client.abort()}
        assert sorted(found) == list(range(9))
        assert found[0].finish == "length"
        for request in requests(8, first=1):
            response = found[request.id]
            assert response.finish == "abort"
            assert len(response.tokens) >= 5
            assert (response.tokens, response.logprobs) == expected(request.tokens, len(response.tokens))
        assert client.abort() == []
        client.close()


def test_a_slow_abort_does_not_reach_the_next_requests():
    """Pins: returning from an abort while its message is still on the way; it would stop the next step's requests."""
    with running(Fake()) as (fake,):
        fake.token_seconds, fake.abort_delay = 0.02, 0.6
        client = client_of(fake)
        client.submit(requests(2, 100_000), SAMPLING)
        wait_until_running(fake, 2)
        client.abort()
        client.submit(requests(2, 40), SAMPLING)
        assert {response.finish for response in all_of(client, 2).values()} == {"length"}
        assert client.sent_again == 0
        client.close()


def test_requests_of_a_dead_engine_are_sent_to_another():
    """Pins: requests lost with an engine, an engine asked again after its death, and a wait without end when none is
    left."""
    with running(Fake(), Fake()) as fakes:
        fakes[0].token_seconds = 2
        client = client_of(*fakes)
        client.submit(requests(20, 10), SAMPLING)
        wait_until_running(fakes[0], 10)
        fakes[0].die()
        found = all_of(client, 20)
        assert all((found[r.id].tokens, found[r.id].logprobs) == expected(r.tokens, 10) for r in requests(20))
        assert client.sent_again == 10
        fakes[1].die()
        client.submit(requests(2), SAMPLING)
        with pytest.raises(EngineError, match="no engine is left"):
            all_of(client, 2)
        client.close()


def test_an_engine_that_falls_silent_counts_as_dead():
    """Pins: a wait without end for a node that is gone, whose connections nobody closes."""
    with running(Fake()) as (fake,):
        client = client_of(fake, probe_seconds=0.1)
        fake.silent = True
        client.submit(requests(1), SAMPLING)
        with pytest.raises(EngineError, match="no engine is left"):
            client.next(20)
        client.close()


def test_failures_are_retried_a_few_times_and_refusals_not_at_all():
    """Pins: endless retries, and a bad request sent to every engine in turn."""
    with running(Fake()) as (fake,):
        client = client_of(fake, tries=3)
        fake.failures = 2
        client.submit(requests(1), SAMPLING)
        assert client.next(20).finish == "length"
        fake.failures = 3
        client.submit(requests(1), SAMPLING)
        with pytest.raises(EngineError, match="lost 3 times"):
            client.next(20)
        fake.refuse, fake.calls[:] = "longer than the model's context length", []
        client.submit(requests(1), SAMPLING)
        with pytest.raises(EngineError, match="context length"):
            client.next(20)
        assert [path for path, _ in fake.calls] == ["/generate"]
        with pytest.raises(ValueError, match="room for 0"):
            client.submit([Request(0, [1], 0, 0)], SAMPLING)
        with pytest.raises(ValueError, match="has 0 tokens"):
            client.submit([Request(0, [], 1, 0)], SAMPLING)
        client.close()


def answer(tokens: list[int], logprobs: list, **reason) -> dict:
    scored = [[p, t, None] for p, t in zip(logprobs, tokens, strict=False)]
    return {"output_ids": tokens, "meta_info": {"finish_reason": reason, "output_token_logprobs": scored}}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (answer([3, 4], [-1.0, -1.0], type="length", length=2), "cut at 2 of 5"),
        (answer([3, 4], [-1.0], type="stop", matched=4), "do not fit"),
        (answer([3, 4], [-1.0, None], type="stop", matched=4), "do not fit"),
        (answer([], [], type="stop", matched=4), "do not fit"),
        (answer([3, 4], [-1.0, None], type="stop", matched="NaN happened"), "NaN after 2"),
        (answer([3, 4], [-1.0, -1.0], type="tool", matched=4), "ended it with"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_refused(found, why):
    """Pins: SGLang shortening a response to its KV cache without a word, calling NaN a stop, and missing
    log-probabilities read as 0."""
    with pytest.raises(EngineError, match=why):
        sglang_engine.parse(Request(1, [9], 5, 0), found, {STOP})


def test_an_abort_at_the_end_is_the_end():
    """Pins: going on after the end token. SGLang calls a request aborted before it looks at its last token."""
    cases = {"stop": [3, STOP], "length": [3, 4, 5], "abort": [3, 4]}
    for finish, tokens in cases.items():
        found = answer(tokens, [-1.0] * len(tokens), type="abort")
        assert sglang_engine.parse(Request(1, [9], 3, 0), found, {STOP}).finish == finish
    partial = answer([3, 4, 5], [-1.0, -2.0], type="abort")  # a token whose log-probability is still under way
    assert sglang_engine.parse(Request(1, [9], 9, 0), partial, {STOP}) == Response(1, [3, 4], [-1.0, -2.0], "abort")


def test_stop_tokens_are_those_of_both_files(tmp_path):
    """Pins: a response that goes on after <|im_end|>, which only generation_config.json names."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert stop_tokens(tmp_path) == {3, 4}


# The server's process


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """A function that starts a Server on a fake `sglang`, misbehaving as told; and a fake nvidia-smi."""
    package = tmp_path / "site/sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text("import fake_sglang\nfake_sglang.main()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path(__file__).parent}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/memory\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    servers = []

    def start(options: dict | None = None, **misbehaviour) -> Server:
        monkeypatch.setenv("FAKE_SGLANG", json.dumps({"memory": f"{tmp_path}/memory"} | misbehaviour))
        servers.append(Server())
        defaults = {"colocate": True, "seconds": 60}
        servers[-1].launch("a/model", ["0"], str(tmp_path / "logs/engine.log"), **defaults | (options or {}))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_memory_goes_and_comes_back_in_order(launch, monkeypatch):
    """Pins: a call that makes SGLang's scheduler end itself (release twice, resume what was not released, KV cache
    before weights), and a trainer's allocator setting that the memory saver refuses."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    names = ["CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "SGLANG_RETURN_ORIGINAL_LOGPROB"]
    server = launch({"flags": ["--mem-fraction-static", "0.5"]}, show=names)
    for wrong in (server.resume_weights, server.resume_kv):
        with pytest.raises(EngineError):
            wrong()
    assert server.release() == 4096 * 2**20
    for wrong in (server.release, server.resume_kv, server.weights):
        with pytest.raises(EngineError):
            wrong()
    server.resume_weights()
    with pytest.raises(EngineError):
        server.resume_weights()
    server.resume_kv()
    server.flush()
    server.check()
    log = server._log_file.read_text()
    flags = log.splitlines()[0].split()
    assert {"--skip-tokenizer-init", "--enable-memory-saver", "--custom-weight-loader"} <= set(flags)
    assert flags[-2:] == ["--mem-fraction-static", "0.5"]
    shown = json.loads(log.splitlines()[1].partition(" ")[2])
    assert shown == dict(zip(names, ["0", "", "0"], strict=True))


def test_memory_that_does_not_come_back_is_an_error(launch):
    """Pins: an engine whose memory saver was not preloaded: it says that it released, and holds everything."""
    server = launch(frees=False)
    with pytest.raises(EngineError, match=r"held 4.00 GiB and gave 0.00 back"):
        server.release()


def test_an_engine_that_dies_or_hangs_shows_its_last_lines(launch):
    """Pins: waiting minutes for an engine that is dead, and an error without its reason."""
    with pytest.raises(EngineError, match=r"ended with status 1; the last of .*\n(.*\n)*CUDA out of memory"):
        launch(dies="CUDA out of memory")
    with pytest.raises(EngineError, match=r"not ready after 2 s; the last of"):
        launch({"seconds": 2}, hangs=True)
    with pytest.raises(EngineError, match="is another engine's: it serves another/model"):
        launch(serves="another/model")


def test_an_engine_on_an_ipv6_node(launch):
    """Pins: a URL without brackets, in which nobody finds the port."""
    server = launch({"host": "::1"})
    assert server.url.startswith("http://[::1]:")
    with contextlib.closing(Client([server.url], [STOP])) as client:
        client.submit(requests(2), SAMPLING)
        assert len(all_of(client, 2)) == 2


def test_a_port_that_was_taken_is_no_failure(launch, tmp_path):
    """Pins: a run that ends because somebody else took the port between its choice and its use."""
    server = launch(port_taken=str(tmp_path / "taken"))
    server.check()
    os.kill(server._process.pid, 9)
    server._waiter.join(20)
    with pytest.raises(EngineError, match="ended with status -9"):
        server.check()


# Digests


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_digests_of_parts_add_up(data):
    """Pins: an engine of several ranks that can never equal the trainer, or always does."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64]))
    raw = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8)
    whole = raw.view(dtype)
    before = raw.clone()
    by_rows, by_columns = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    total = sum(
        digest(whole[a:b, c:d], (a, c), columns)
        for a, b in ((0, by_rows), (by_rows, rows))
        for c, d in ((0, by_columns), (by_columns, columns))
        if b > a and d > c
    )
    assert total % 2**64 == digest(whole)
    assert raw.equal(before)
    place = data.draw(st.integers(0, raw.numel() - 1))
    raw.view(-1)[place] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(whole) != total % 2**64


def test_digests_see_order_and_chunks(monkeypatch):
    """Pins: a sum that two exchanged elements do not change, and chunks that begin to count at 0 again."""
    tensor = torch.arange(60, dtype=torch.float32).view(12, 5)
    whole = digest(tensor)
    assert digest(tensor.flip(0)) != whole
    assert digest(tensor.view(60)) == digest(tensor.view(60, 1))
    monkeypatch.setattr(sglang_weights, "_DIGEST_CHUNK", 17)
    assert digest(tensor) == whole


# Weight sync


@pytest.fixture
def by_value(monkeypatch):
    """Send a bucket's bytes instead of a CUDA handle."""
    monkeypatch.setattr(sglang_weights, "_shared", lambda flat: flat.clone())


def sender_to(fake: Fake, bucket_bytes: int = 200_000, **options) -> WeightSender:
    return WeightSender([Engine(fake.url, 1, (0,))], device="cpu", bucket_bytes=bucket_bytes, **options)


def test_all_tensors_arrive_bit_for_bit(by_value):
    """Pins: merged projections cut at wrong rows, scales that belong to other blocks, a bucket reused too early, and
    constants of the KV cache that are lost with the weights' memory."""
    model = Rank(0, 1)
    with running(Fake(models=[model])) as (fake,):
        sender = sender_to(fake)
        first = sender.send(trained(1).items(), digests=True)
        assert first.bytes == sum(tensor.nbytes for tensor in trained(1).values())
        assert first.tensors == len(trained(1)) == len(first.digests)
        held = sglang_weights.describe(fake.url, 1, digests=True)
        sglang_weights.compare(first.digests, held)
        second = trained(2)
        name = "model.layers.1.self_attn.k_proj.weight_scale_inv"
        second[name][1, 0] *= 2
        with pytest.raises(ValueError, match=r"\d+ of the engine's"):
            sglang_weights.compare({n: Digest.of(t) for n, t in second.items()}, held)
        sent = sender.send(second.items(), digests=True)
        second[name][1, 0] *= 2
        wanted = sent.digests | {name: Digest.of(second[name])}
        with pytest.raises(ValueError, match=f"1 of the engine's .* first {name}"):
            sglang_weights.compare(wanted, sglang_weights.describe(fake.url, 1, digests=True))
        assert model.model.layers[0].self_attn.attn.k_scale == 1.0
        paths = [path for path, _ in fake.calls]
        assert paths.count("/update_weights_from_tensor") > 4
        assert not any(body["flush_cache"] for _, body in fake.calls)
        sender.close()


def change_dtype(tensors):
    return tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors: trained(1, fp8=False), "q_proj.weight' is float8_e4m3fn .* sent bfloat16"),
        (
            lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)},
            "no tensor 'model.layers.9",
        ),
        (lambda tensors: tensors | {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}, r"sent bfloat16 \(8,\)"),
        (change_dtype, "'model.norm.weight' is bfloat16 .* sent float32"),
        (drop, "did not send 2 of"),
    ],
)
def test_weights_of_another_model_are_refused(by_value, change, why):
    """Pins: SGLang's loader, which logs an unknown name, does not miss a tensor, and ends itself at a wrong dtype."""
    with running(Fake(models=[Rank(0, 1)])) as (fake,):
        sender = sender_to(fake)
        with pytest.raises(EngineError, match=why):
            sender.send(change(trained(1)).items())
        sender.send(trained(1).items())  # it lives, and takes the right ones
        assert "crashed" not in [path for path, _ in fake.calls]
        sender.close()


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (4, 2)])
def test_ranks_of_an_engine_make_up_the_trainers_tensors(tmp_path, size, kv_heads):
    """Pins: a tensor-parallel rank's part counted twice or at a wrong place, with more ranks than KV heads too, and
    the vocabulary's padding counted as weights."""
    ranks = [Rank(rank, size, kv_heads) for rank in range(size)]
    tensors = trained(3)
    for rank in ranks:
        rank.load_weights(tensors.items())
    answers = [sglang_weights._describe(rank, True)["pieces"] for rank in ranks]
    merged = sglang_weights.merge("engine", json.loads(json.dumps(answers)))
    sglang_weights.compare({name: Digest.of(tensor) for name, tensor in tensors.items()}, merged)
    with pytest.raises(EngineError, match="only a part of"):
        sglang_weights.merge("engine", json.loads(json.dumps(answers[:-1])))
    ranks[-1].model.norm.weight[3] += 1
    answers[-1] = sglang_weights._describe(ranks[-1], True)["pieces"]
    with pytest.raises(EngineError, match=r"hold different 'model\.norm\.weight'"):
        sglang_weights.merge("engine", json.loads(json.dumps(answers)))


def test_a_tensor_larger_than_a_bucket_is_sent(by_value):
    """Pins: an embedding that is larger than a bucket cut off at its end."""
    model = Rank(0, 1)
    with running(Fake(models=[model])) as (fake,):
        sender = sender_to(fake, bucket_bytes=1000)
        sent = sender.send(trained(4).items(), digests=True)
        sglang_weights.compare(sent.digests, sglang_weights.describe(fake.url, 1, digests=True))
        with pytest.raises(ValueError, match="no tensor to send"):
            sender.send([])
        sender.close()


def test_elements_in_a_bucket_are_aligned():
    """Pins: a bucket that the engine cannot view as what it holds."""
    bucket = sglang_weights._Bucket(torch.empty(100, dtype=torch.uint8))
    bucket.add("codes", torch.zeros(6).to(torch.float8_e4m3fn))
    assert bucket.has_room(torch.zeros(2, dtype=torch.bfloat16))
    assert not bucket.has_room(torch.zeros(2))
    assert not bucket.has_room(torch.zeros(95, dtype=torch.uint8))


def test_engines_that_do_not_fit_are_refused():
    """Pins: a rank without a handle to open, found only when the engine ends itself."""
    with pytest.raises(ValueError, match="must all share GPUs"):
        WeightSender([Engine("a", 1, (0,)), Engine("b", 1)])
    with pytest.raises(ValueError, match="2 GPUs, but 1 trainer ranks"):
        WeightSender([Engine("a", 2, (0,))])


TWO_RANKS = """
import json, sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}]
from fake_sglang import Fake, running
from sglang_model import Rank, drop, trained
from infir2.rl import sglang_weights as w
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
w._shared = lambda flat: flat.clone()
fakes = [Fake(models=[Rank(r, 2) for r in range(2)])] if rank == 0 else []
with running(*fakes):
    url = [fakes[0].url if fakes else ""]
    dist.broadcast_object_list(url, 0)
    sender = w.WeightSender([w.Engine(url[0], 2, (0, 1))], device="cpu", bucket_bytes=300_000)
    sent = sender.send(trained(5).items(), digests=True)
    if rank == 0:
        w.compare(sent.digests, w.describe(url[0], 2, digests=True))
    try:
        sender.send(drop(trained(5)).items())
    except w.EngineError as error:
        print(json.dumps([rank, str(error)]), flush=True)
    dist.barrier()
    sender.close()
"""


def test_the_ranks_of_a_trainer_send_together(tmp_path):
    """Pins: payloads in another order than the engine's ranks, and ranks that wait for ever where the one that speaks
    for them has failed."""
    script = TWO_RANKS.format(tests=str(Path(__file__).parent), folder=tmp_path)
    command = [sys.executable, "-c", script]
    runs = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    for rank, output in enumerate(outputs):
        found = json.loads(output.splitlines()[-1])
        assert found[0] == rank
        assert "did not send 2 of" in found[1]


OTHER_GPU = """
import sys
sys.path[:0] = [{tests!r}]
from fake_sglang import Fake, running
from sglang_model import Rank, drop, trained
model = Rank(0, 1)
with running(Fake(models=[model])) as (fake,):
    print(fake.url, flush=True)
    sys.stdin.readline()
"""


def test_weights_go_through_a_process_group_where_gpus_are_not_shared():
    """Pins: the engine and rank 0 waiting for each other when the group is made, and buckets laid out otherwise than
    SGLang cuts them. (gloo here; SGLang's side of the group is that of `join`.)"""
    script = OTHER_GPU.format(tests=str(Path(__file__).parent))
    engine = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = engine.stdout.readline().strip()
        sender = WeightSender([Engine(url)], device="cpu", bucket_bytes=300_000, seconds=60)
        sent = sender.send(trained(6).items(), digests=True)
        sglang_weights.compare(sent.digests, sglang_weights.describe(url, 1, digests=True))
        bad = trained(6) | {"model.layers.9.x": torch.ones(2)}
        with pytest.raises(EngineError):
            sender.send(bad.items())
    finally:
        engine.kill()
        engine.wait()


def test_threads_end():
    """Pins: a client whose thread keeps a finished run alive."""
    with running(Fake()) as (fake,):
        before = threading.active_count()
        client = client_of(fake)
        assert threading.active_count() == before + 1
        client.close()
        for _ in range(100):
            if threading.active_count() == before:
                break
            time.sleep(0.02)
        assert threading.active_count() == before


# The launcher


def test_every_process_of_the_server_gets_the_quantiser(tmp_path):
    """Pins: a replacement that only the parent has, where the processes that compute are its spawned children, and one
    that imports SGLang's modules before SGLang does."""
    package = tmp_path / "sglang"
    layers = package / "srt/layers/quantization"
    layers.mkdir(parents=True)
    names = "per_token_group_quant_fp8 sglang_per_token_group_quant_fp8 sglang_per_token_group_quant_fp8_row_padded"
    (layers / "fp8_utils.py").write_text("\n".join(f"def {name}(): pass" for name in names.split()))
    (package / "launch_server.py").write_text(
        "import multiprocessing, sys, child\n"
        "if __name__ == '__main__':\n"
        "    assert 'sglang.srt.layers.quantization.fp8_utils' not in sys.modules, 'imported before SGLang did'\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child.show)\n"
        "    process.start(), process.join()\n"
        "    print(sys.argv[1:])\n"
    )
    (tmp_path / "child.py").write_text(
        "def show():\n"
        "    from sglang.srt.layers.quantization import fp8_utils\n"
        f"    print(*(getattr(fp8_utils, name).__module__ for name in {names.split()}), flush=True)\n"
    )
    for scales, found in (("pow2", "__mp_main__"), ("", "sglang.srt.layers.quantization.fp8_utils")):
        environment = environment_of_launcher(tmp_path, scales)
        command = [sys.executable, "-m", "infir2.rl.sglang_launch", "--flag"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines() == [" ".join([found] * 3), "['--flag']"], done.stderr


def environment_of_launcher(site: Path, scales: str) -> dict[str, str]:
    package = str(Path(sglang_engine.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{package}", "ACTIVATION_SCALES": scales}


def test_scales_of_activations():
    """The kernel in Triton's interpreter, whose FP8 cast is wrong (1.9 becomes 1): scales equal, codes in their places,
    columns padded where that is asked for. tests/gpu compares bit for bit."""
    pytest.importorskip("triton")
    program = (
        "import torch; from infir2 import fp8; from infir2.rl import sglang_launch\n"
        "x = (torch.randn(6, 384) * torch.exp2(torch.randint(-90, 90, (6, 3)).repeat_interleave(128, 1))).bfloat16()\n"
        "x[1, :128] = 0\n"
        "for scale_fmt in ('pow2', 'fp32'):\n"
        "    for column_major in (False, True):\n"
        "        quantise = sglang_launch.quantiser(scale_fmt)\n"
        "        codes, found = quantise(x, 128, column_major_scales=column_major, scale_tma_aligned=column_major)\n"
        "        assert found.stride() == ((1, 8) if column_major else (3, 1))\n"
        "        wanted, scales = fp8.quantize(x, fp8.ROW, scale_fmt=scale_fmt)\n"
        "        assert torch.equal(found, scales)\n"
        "        assert (codes.float().sign() * wanted.float().sign() >= 0).all()\n"
        "print('equal')\n"
    )
    environment = environment_of_launcher(Path(), "") | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr
