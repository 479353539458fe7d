"""An HTTP server that answers as SGLang 0.5.17 does, for tests: in a thread (`running`), or as `sglang.launch_server`.

It generates token 10 + (sum of the prompt + place) % 80, with log-probability -place - 0.5. torch is imported where it
is needed: tests start this program several times.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

from aiohttp import web

STOP = 7


def expected(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    return [10 + (sum(prompt) + i) % 80 for i in range(count)], [-i - 0.5 for i in range(count)]


class TorchOnly(pickle.Unpickler):
    """SGLang's SafeUnpickler, whose list of modules is a little longer."""

    def find_class(self, module, name):
        if not (module + ".").startswith(("torch.", "builtins.", "collections.")):
            raise RuntimeError(f"Blocked unsafe class loading ({module}.{name})")
        return super().find_class(module, name)


class Fake:
    """One engine. Attributes are what tests set or look at."""

    def __init__(self, model_path: str = "model", models=()) -> None:
        self.model_path, self.models = model_path, models  # one model for each tensor-parallel rank
        self.calls: list[tuple[str, dict]] = []
        self.token_seconds = 0.0
        self.failures = 0  # how many of the next /generate answer 500
        self.refuse = ""  # /generate answers 400 with this
        self.silent = False  # nothing is answered
        self.abort_delay, self.ignored_aborts = 0.0, 0
        self.change = lambda answer: answer
        self.running, self.peak, self.generated = 0, 0, 0
        self.held = {"weight": 1.0, "kvcache": 3.0}  # GiB
        self.released: set[str] = set()
        self.memory_file: Path | None = None
        self.frees = True
        self._abort = asyncio.Event()
        self.transports = set()
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        self.transports.add(request.transport)
        while self.silent:
            await asyncio.sleep(0.05)
        body = json.loads(await request.read() or b"{}")
        self.calls.append((request.path, body | dict(request.query)))
        method = getattr(self, "do" + request.path.replace("/", "_"), None)
        if method is None:
            return web.Response(status=404)
        try:
            return web.json_response(await method(body))
        except ValueError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        except AssertionError as error:  # SGLang's scheduler ends itself on any exception
            self.calls.append(("crashed", {"why": str(error)}))
            return web.json_response({}, status=500)

    async def do_generate(self, body: dict) -> dict:
        assert not self.released, "generated without memory"
        if self.failures:
            self.failures -= 1
            raise AssertionError("a failure inside")
        if self.refuse:
            raise ValueError(self.refuse)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return self.change(await self._generate(body))
        finally:
            self.running -= 1

    async def _generate(self, body: dict) -> dict:
        count, aborted = body["sampling_params"]["max_new_tokens"], self._abort
        tokens, logprobs, reason = [], [], {"type": "length", "length": count}
        for token, logprob in zip(*expected(body["input_ids"], count), strict=True):
            if aborted.is_set():
                reason = {"type": "abort", "message": "Aborted"}
                break
            tokens, logprobs = [*tokens, token], [*logprobs, logprob]
            self.generated += 1
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            if token in body["sampling_params"].get("stop_token_ids", ()):
                reason = {"type": "stop", "matched": token}
                break
        scored = [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)]
        return {"output_ids": tokens, "meta_info": {"finish_reason": reason, "output_token_logprobs": scored}}

    async def do_abort_request(self, body: dict) -> None:
        await asyncio.sleep(self.abort_delay)
        if self.ignored_aborts:
            self.ignored_aborts -= 1
            return
        self._abort.set()
        self._abort = asyncio.Event()

    async def do_model_info(self, body: dict) -> dict:
        return {"model_path": self.model_path}

    async def do_server_info(self, body: dict) -> dict:
        return {"internal_states": [{"memory_usage": self.held}]}

    async def do_flush_cache(self, body: dict) -> dict:
        return {}

    async def do_release_memory_occupation(self, body: dict) -> None:
        assert not self.running, "release_memory_occupation should be called only when server is idle."
        self.released |= set(body["tags"])
        self._write_memory()

    async def do_resume_memory_occupation(self, body: dict) -> None:
        assert set(body["tags"]) <= self.released, "resumed what was not released"
        self.released -= set(body["tags"])
        self._write_memory()

    def _write_memory(self) -> None:
        if self.memory_file:
            held = {"weights": 1024, "kv_cache": 3072}
            used = 500 + sum(size for tag, size in held.items() if tag not in self.released or not self.frees)
            self.memory_file.write_text(f"{used}\n")

    async def do_update_weights_from_tensor(self, body: dict) -> dict:
        from infir2.rl import sglang_weights

        assert "weights" not in self.released, "weights have no memory"
        assert body["load_format"] == sglang_weights.LOADER
        payloads = [base64.b64decode(word, validate=True) for word in body["serialized_named_tensors"]]
        for model, payload in zip(self.models, payloads, strict=True):
            sglang_weights.load(model, TorchOnly(io.BytesIO(payload)).load())
        return {"success": True, "message": "Success"}

    async def do_init_weights_update_group(self, body: dict) -> dict:
        from infir2.rl import sglang_weights

        meeting = (body["master_address"], body["master_port"], body["rank_offset"], body["world_size"])
        self.group = await asyncio.to_thread(sglang_weights.join, *meeting, body["backend"])
        return {"success": True}

    async def do_update_weights_from_distributed(self, body: dict) -> dict:
        import torch

        assert body["load_format"] == "flattened_bucket"
        kinds = [(getattr(torch, dtype), shape) for dtype, shape in zip(body["dtypes"], body["shapes"], strict=True)]
        parts = [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
        flat = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8)
        await asyncio.to_thread(torch.distributed.broadcast, flat, 0, self.group)
        pieces = zip(flat.split([part.nbytes for part in parts]), kinds, strict=True)
        tensors = [piece.view(dtype).view(shape) for piece, (dtype, shape) in pieces]  # refuses a start off its width
        self.models[0].load_weights(list(zip(body["names"], tensors, strict=True)))
        return {"success": True}


@contextlib.contextmanager
def running(*fakes: Fake):
    """Serve each fake in a thread of its own. `fake.die()` ends it as SIGKILL would: its connections are reset."""
    with contextlib.ExitStack() as stack:
        for fake in fakes:
            stack.enter_context(_serving(fake))
        yield fakes


@contextlib.contextmanager
def _serving(fake: Fake):
    loop, ready = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(fake.app(), shutdown_timeout=0)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    async def die() -> None:
        for site in list(runner.sites):
            await site.stop()
        for transport in fake.transports - {None}:
            transport.abort()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop)
    assert ready.wait(10)
    fake.die = lambda: asyncio.run_coroutine_threadsafe(die(), loop).result(20)
    try:
        yield
    finally:
        fake.silent = False
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def main() -> None:
    """What `python -m sglang.launch_server` becomes in tests. FAKE_SGLANG, JSON, says how it misbehaves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args, flags = parser.parse_known_args()
    settings = json.loads(os.environ.get("FAKE_SGLANG", "{}"))
    print("flags", *flags, flush=True)
    print("environment", json.dumps({name: os.environ.get(name) for name in settings.get("show", ())}), flush=True)
    if (marker := settings.get("port_taken")) and not Path(marker).exists():
        Path(marker).touch()
        sys.exit(f"[Errno 98] error while attempting to bind on address {args.port}: address already in use")
    if "dies" in settings:
        sys.exit(settings["dies"])
    while settings.get("hangs"):
        time.sleep(1)
    fake = Fake(settings.get("serves", args.model_path))
    fake.frees = settings.get("frees", True)
    fake.memory_file = Path(settings["memory"]) if "memory" in settings else None
    fake._write_memory()
    web.run_app(fake.app(), host=args.host, port=args.port, print=None, access_log=None)
