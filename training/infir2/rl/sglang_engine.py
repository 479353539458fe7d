"""SGLang engines: `Server` is one, as a process on GPUs of its node; `Client` generates with several.

A Server is a Ray actor (`ray.remote(Server)`), or an object in any process; the engine dies with it. Colocated, its
methods are called in this order, where `send` is infir2.rl.sglang_weights.WeightSender's, in the trainers:

    client.abort()                 the engines are idle
    server.release()               KV cache and weights leave the GPU; the bytes are checked
    (train)
    server.resume_weights()        room for the weights, whose contents are undefined
    sender.send(...)               all of them
    server.resume_kv()             and whatever was cached of the old weights is forgotten

With GPUs of its own: client.abort(), server.flush(), sender.send(...), server.flush().

An engine without its memory must not be asked to generate: SGLang would compute with addresses behind which there is
nothing, and its own /health generates. So nothing here calls /health.

Generation goes straight to the engines, to the one with the fewest requests, and not through sglang-router: weights,
memory and aborts need each engine's own address anyway, a group's samples belong on one engine (its prompt is computed
once), and a request that is sent again has to be counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import queue
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from infir2.processes import without_proxy
from infir2.ray_launch import TAIL_LINES, Worker
from infir2.rl import sglang_launch, sglang_weights
from infir2.rl.rollout import Request, Response, Sampling
from infir2.rl.sglang_weights import Digest, EngineError, call, in_url

log = logging.getLogger("sglang")

GIB = 2**30
READY_SECONDS = 900  # a first start compiles kernels
POLL_SECONDS = 0.5
IDLE_SECONDS = 60
PORT_TRIES = 3
# What /server_info counts as weights and KV cache includes what the allocator rounds up to, which does not come back.
FREED_SHARE = 0.8
ABORT_SECONDS = 120
ABORT_EVERY_SECONDS = 0.5


# The server


def command(
    model: Path,
    host: str,
    port: int,
    *,
    gpus: int,
    seed: int,
    colocate: bool,
    deterministic: bool,
    python: str = sys.executable,
    flags: Sequence[str] = (),
) -> list[str]:
    """What starts an engine. `flags` are SGLang's own; they come last and win.

    Tokens go in and out, so no tokenizer is loaded. There is no limit on running requests but SGLang's own, 2,048 or
    more. The radix cache stays: a group's prompt is computed once, and `Server` empties it when weights change.
    """
    words = ["--model-path", str(model), "--host", host, "--port", str(port), "--tp-size", str(gpus)]
    words += ["--random-seed", str(seed), "--skip-tokenizer-init", "--skip-server-warmup"]
    words += ["--custom-weight-loader", sglang_weights.LOADER, "--log-level-http", "warning"]
    words += ["--enable-memory-saver"] * colocate + ["--enable-deterministic-inference"] * deterministic
    return [python, "-m", "infir2.rl.sglang_launch", *words, *flags]


def environment(gpus: Sequence[str], activation_scales: str | None) -> dict[str, str]:
    """What an engine's process gets besides our own environment."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    variables = without_proxy() | {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "PYTHONPATH": f"{package}{os.pathsep}{path}" if path else package,
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",  # log-probabilities at the sampling temperature
        sglang_launch.VARIABLE: activation_scales or "",
        # The memory saver's library is preloaded, before torch could load CUDA's runtime, which it needs: the linker
        # would leave it out with a warning, and releasing memory would then do nothing.
        "LD_LIBRARY_PATH": os.pathsep.join([*_cuda_runtime(), os.environ.get("LD_LIBRARY_PATH", "")]).strip(os.pathsep),
    }
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments" in os.environ.get(name, ""):
            variables[name] = ""  # a trainer's setting, which the memory saver refuses
    return variables


def _cuda_runtime() -> list[str]:
    """Folders of libcudart that pip installed; a system's own is found without."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sorted({str(file.parent) for root in roots for file in Path(root).glob("*/lib/libcudart.so.*")})


class Server(Worker):
    """One engine. Methods block; Ray calls one at a time. EngineError, with the end of the log, where it fails."""

    def launch(
        self,
        model: str,
        gpus: Sequence[str],
        log_file: str,
        *,
        host: str = "127.0.0.1",
        seed: int = 1,
        colocate: bool = False,
        deterministic: bool = False,
        activation_scales: str | None = None,
        python: str = sys.executable,
        flags: Sequence[str] = (),
        seconds: float = READY_SECONDS,
    ) -> str:
        """Start an engine for the Hugging Face folder `model`; returns its URL when it has generated a token.

        gpus: as CUDA_VISIBLE_DEVICES has them; tensor parallelism over all. host: an address of this node that
        controller and trainers reach. It unpickles what it is sent: only an address that others do not reach is safe.
        colocate: `release` and `resume_...` work. deterministic: `Request.seed` counts (SGLang ignores it otherwise),
        at some cost in speed. activation_scales: of an FP8 model, "pow2" or "fp32" as training had them, bit for bit;
        None leaves SGLang its own. python: the one that has SGLang; it needs torch besides, as ours has it.
        """
        self._activation_scales = activation_scales
        self._model, self._gpus, self._colocate = model, list(gpus), colocate
        self._log_file, self._tail = Path(log_file), deque(maxlen=TAIL_LINES)
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        options = {
            "gpus": len(gpus),
            "seed": seed,
            "colocate": colocate,
            "deterministic": deterministic,
            "python": python,
        }
        for _ in range(PORT_TRIES - 1):
            try:
                return self._try(host, seconds, flags=flags, **options)
            except EngineError:
                if not any("address already in use" in line for line in self._tail):
                    raise
        return self._try(host, seconds, flags=flags, **options)

    def _try(self, host: str, seconds: float, **options) -> str:
        """Start on a port that is free now; somebody else may take it before SGLang does."""
        port, self._ended = self.free_port(), None
        self._tail.clear()
        self._released, self._weights = False, True
        self.url = f"http://{in_url(host)}:{port}"
        self.start(
            command(Path(self._model), host, port, **options),
            environment(self._gpus, self._activation_scales),
            os.getcwd(),
        )
        try:
            self._until_ready(seconds)
        except EngineError:
            self.stop()
            raise
        return self.url

    def _until_ready(self, seconds: float) -> None:
        """Until the engine has generated; /model_info answers long before it can."""
        deadline = time.monotonic() + seconds
        body = {"input_ids": [0, 1, 2, 3], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        while True:
            try:
                call(self.url, "/generate", body, max(1.0, deadline - time.monotonic()))
                break
            except EngineError as error:
                self.check()
                if time.monotonic() > deadline:
                    raise EngineError(f"{error}; not ready after {seconds:g} s; {self._last_lines()}") from None
                time.sleep(POLL_SECONDS)
        self.check()
        if (found := call(self.url, "/model_info")["model_path"]) != self._model:
            raise EngineError(f"{self.url} is another engine's: it serves {found}, not {self._model}")

    def check(self) -> None:
        """EngineError if the engine's process has ended. Also writes what it printed to its log."""
        report = self.poll()
        self._tail.extend(report.lines)
        if report.lines:
            with self._log_file.open("a") as file:
                file.writelines(f"{line}\n" for line in report.lines)
        self._ended = report.status if report.status is not None else self._ended
        if self._ended is not None:
            raise EngineError(f"the engine at {self.url} ended with status {self._ended}; {self._last_lines()}")

    def _last_lines(self) -> str:
        return "\n".join([f"the last of {self._log_file}:", *self._tail])

    def _call(self, path: str, body: dict | None = None, seconds: float = 120):
        try:
            return call(self.url, path, body, seconds)
        except EngineError:
            time.sleep(POLL_SECONDS)  # a process that fell is seen by now
            self.check()
            raise

    def flush(self) -> None:
        """Wait until the engine is idle, and forget what it cached. Responses arrive just before that."""
        self._call(f"/flush_cache?timeout={IDLE_SECONDS}", {}, IDLE_SECONDS + 30)

    def release(self) -> int:
        """Give KV cache, weights and (with SGLANG_MEMORY_SAVER_CUDA_GRAPH=1) CUDA graphs back; returns bytes freed.

        EngineError if the GPUs did not get at least FREED_SHARE of what SGLang says it held.
        """
        self._refuse(not self._colocate, "was started without colocate, so releasing would do nothing")
        self._refuse(self._released, "has released its memory already")
        self.flush()  # SGLang ends itself if it is not idle
        held, before = self.memory_held(), self.memory_used()
        self._call("/release_memory_occupation", {"tags": ["kv_cache", "weights", "cuda_graph"]})
        self._released, self._weights = True, False
        freed = before - self.memory_used()
        if freed < FREED_SHARE * held:
            raise EngineError(
                f"the engine at {self.url} held {held / GIB:.2f} GiB and gave {freed / GIB:.2f} back; does its log say "
                "that torch_memory_saver could not be preloaded?"
            )
        return freed

    def resume_weights(self) -> None:
        """Take memory for the weights again. What is in it is undefined until all weights are sent."""
        self._refuse(not self._released or self._weights, "has not released its weights")
        self._call("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]})
        self._weights = True

    def resume_kv(self) -> None:
        """Take memory for the KV cache again, and forget what was cached. The engine can generate now."""
        self._refuse(not self._released or not self._weights, "must release, then resume its weights, first")
        self._call("/resume_memory_occupation", {"tags": ["kv_cache"]})
        self._released = False
        self.flush()

    def _refuse(self, wrong: bool, why: str) -> None:
        if wrong:  # SGLang would end itself
            raise EngineError(f"the engine at {self.url} {why}")

    def memory_used(self) -> int:
        """Bytes in use on this engine's GPUs, by all processes, as the driver counts them."""
        program = shutil.which("nvidia-smi")
        if program is None:
            raise EngineError("nvidia-smi is not there; it counts the GPU memory that an engine gives back")
        query = [program, "-i", ",".join(self._gpus), "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        return sum(map(int, lines)) * 2**20

    def memory_held(self) -> int:
        """Bytes of weights and KV cache, by SGLang's own account, over all of its GPUs."""
        usage = self._call("/server_info")["internal_states"][0]["memory_usage"]
        return int((usage["weight"] + usage["kvcache"]) * GIB) * len(self._gpus)

    def weights(self, digests: bool = False) -> dict[str, Digest]:
        """Every tensor that the engine holds, by its Hugging Face name; with digests, to compare with the trainer's."""
        self._refuse(not self._weights, "has released its weights")
        return sglang_weights.describe(self.url, len(self._gpus), digests=digests)


# The client


class _Lost(Exception):
    """A request that an engine did not answer, or answered with a failure of its own: it may be sent again."""


@dataclass(eq=False)
class _Engine:
    url: str
    up: bool = True
    load: int = 0  # requests that it has
    posts: set[asyncio.Task] = field(default_factory=set)


class Client:
    """Generates with engines; infir2.rl.rollout.Engine. Its methods are for one thread; requests wait in another.

    stop: every token that ends a response, `stop_tokens` of the model and any others. A request that an engine loses
    (it died, or failed inside) is sent to another one, `tries` times in all, then `next` raises EngineError; so it does
    where no engine is left. An engine that does not answer three questions, `probe_seconds` apart, counts as dead.
    What was generated of a lost request is generated again.
    """

    def __init__(
        self, urls: Sequence[str], stop: Sequence[int], *, tries: int = 3, probe_seconds: float = 20, delay: float = 1
    ) -> None:
        if not urls or not stop:
            raise ValueError(f"needs engines and tokens that end a response; got {list(urls)} and {list(stop)}")
        self._engines = [_Engine(url.rstrip("/")) for url in urls]
        self._stop, self._tries, self._probe_seconds, self._delay = set(stop), tries, probe_seconds, delay
        self._finished: queue.Queue[Response | Exception] = queue.Queue()
        self._outstanding, self._aborting = 0, False
        self._tasks: set[asyncio.Task] = set()
        self.sent_again = 0  # requests, over the client's life
        _raise_open_files()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="sglang-client").start()
        self._run(self._open())

    async def _open(self) -> None:
        # no limit on connections, whose default is 100, nor on time, whose default is 5 minutes; and each is used once:
        # a server closes idle ones at a moment when the next request may be on its way
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=60)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self._prober = asyncio.create_task(self._probe())

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # infir2.rl.rollout.Engine

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Send requests. Those of one prompt go to one engine. ValueError for an empty prompt or no room."""
        for request in requests:
            if not request.tokens or request.max_new_tokens < 1:
                raise ValueError(
                    f"request {request.id} has {len(request.tokens)} tokens and room for {request.max_new_tokens}; "
                    "it needs at least one of each"
                )
        self._run(self._begin(list(requests), sampling))
        self._outstanding += len(requests)

    def next(self, seconds: float | None = None) -> Response:
        """A response that is finished; waits for one (TimeoutError after `seconds`). LookupError if none will come.
        EngineError for a request that was refused or lost too often; it does not come again."""
        if not self._outstanding:
            raise LookupError("no request is outstanding")
        try:
            found = self._finished.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no response within {seconds} s; {self._outstanding} are outstanding") from None
        self._outstanding -= 1
        if isinstance(found, Exception):
            raise found
        return found

    def abort(self) -> list[Response]:
        """Stop everything; returns all that `next` has not: what was finished, and what was not, with finish "abort"
        and the tokens so far (none from an engine that died). Returns when the engines have answered."""
        self._run(self._stop_all())
        left = [self._finished.get_nowait() for _ in range(self._outstanding)]
        self._outstanding = 0
        for failure in (found for found in left if isinstance(found, Exception)):
            raise failure
        return left

    def close(self) -> None:
        async def end() -> None:
            self._prober.cancel()
            for task in self._tasks:
                task.cancel()
            await self._session.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    # in the loop's thread

    def _lightest(self) -> _Engine:
        up = [engine for engine in self._engines if engine.up]
        if not up:
            raise EngineError(f"no engine is left: {', '.join(engine.url for engine in self._engines)} do not answer")
        return min(up, key=lambda engine: engine.load)

    async def _begin(self, requests: list[Request], sampling: Sampling) -> None:
        homes: dict[tuple[int, ...], _Engine] = {}
        for request in requests:
            prompt = tuple(request.tokens)
            engine = homes[prompt] = homes.get(prompt) or self._lightest()
            engine.load += 1  # now, so that the next choice sees it
            task = asyncio.create_task(self._serve(request, sampling, engine))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: Request, sampling: Sampling, engine: _Engine) -> None:
        """Get one response, from one engine after the other, and put it, or why there is none, into the queue."""
        try:
            found = await self._get(request, sampling, engine)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            found = error
        self._finished.put(found)

    async def _get(self, request: Request, sampling: Sampling, engine: _Engine) -> Response:
        tries = 0
        while True:
            tries += 1
            try:
                if not self._aborting:
                    return await self._generate(request, sampling, engine)
            except _Lost as error:
                log.warning("request %d: %s", request.id, error)
                if tries == self._tries and not self._aborting:
                    raise EngineError(f"request {request.id} was lost {tries} times, the last time: {error}") from None
            finally:
                engine.load -= 1
            if self._aborting:
                return Response(request.id, [], [], "abort")
            self.sent_again += 1
            await asyncio.sleep(self._delay)
            engine = self._lightest()
            engine.load += 1

    async def _generate(self, request: Request, sampling: Sampling, engine: _Engine) -> Response:
        body = {
            "input_ids": request.tokens,
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": request.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "sampling_seed": request.seed,
                "stop_token_ids": sorted(self._stop),
            },
        }
        post = asyncio.create_task(self._post(engine, "/generate", body))
        engine.posts.add(post)
        try:
            status, text = await post
        except (aiohttp.ClientError, OSError) as error:
            if engine.up and not await self._answers(engine):
                self._lose(engine)
            raise _Lost(f"{engine.url} did not answer: {error!r}") from None
        except asyncio.CancelledError:
            if engine.up and not self._aborting:
                raise  # it is this request that was cancelled, not its engine
            raise _Lost(f"{engine.url} does not answer any more") from None
        finally:
            post.cancel()
            engine.posts.discard(post)
        return self._judge(request, engine, status, text)

    def _judge(self, request: Request, engine: _Engine, status: int, text: bytes) -> Response:
        if status != 200:
            words = f"{engine.url} answered {status}: {text[:1000].decode(errors='replace')}"
            if status >= 500 or self._aborting:  # a request that was not begun when all were aborted is a 400
                raise _Lost(words)
            raise EngineError(f"request {request.id}: {words}")
        response = parse(request, orjson.loads(text), self._stop)
        if response.finish == "abort" and not self._aborting:
            raise _Lost(f"{engine.url} gave it up")
        return response

    async def _post(self, engine: _Engine, path: str, body: dict) -> tuple[int, bytes]:
        async with self._session.post(engine.url + path, data=orjson.dumps(body), headers=_JSON) as answer:
            return answer.status, await answer.read()

    async def _answers(self, engine: _Engine) -> bool:
        timeout = aiohttp.ClientTimeout(total=self._probe_seconds)
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._session.get(engine.url + "/model_info", timeout=timeout) as answer:
                return answer.status == 200
        return False

    def _lose(self, engine: _Engine) -> None:
        """Count an engine as dead; its requests go to others."""
        if engine.up:
            engine.up = False
            log.warning("%s is lost with %d requests", engine.url, engine.load)
            for post in list(engine.posts):
                post.cancel()

    async def _probe(self) -> None:
        """A node that is gone closes no connection: ask engines that owe responses whether they are there."""
        silent = dict.fromkeys(self._engines, 0)
        while True:
            await asyncio.sleep(self._probe_seconds)
            for engine in [engine for engine in self._engines if engine.up and engine.load]:
                silent[engine] = 0 if await self._answers(engine) else silent.get(engine, 0) + 1
                if silent[engine] >= 3:
                    self._lose(engine)

    async def _abort_all(self, engine: _Engine) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            await asyncio.wait_for(self._post(engine, "/abort_request", {"abort_all": True}), self._probe_seconds)

    async def _stop_all(self) -> None:
        """Abort until all have returned: a request that was on its way when its engine aborted would run to its end."""
        self._aborting, deadline = True, time.monotonic() + ABORT_SECONDS
        aborts: list[asyncio.Task] = []
        try:
            while self._tasks:
                engines = [engine for engine in self._engines if engine.up and engine.load]
                aborts += (asyncio.create_task(self._abort_all(engine)) for engine in engines)
                await asyncio.wait(self._tasks, timeout=ABORT_EVERY_SECONDS)
                if time.monotonic() > deadline:
                    for engine in engines:
                        self._lose(engine)
            await asyncio.gather(*aborts)  # one that arrives late would abort what is submitted next
        finally:
            self._aborting = False


_JSON = {"Content-Type": "application/json"}


def parse(request: Request, answer: dict, stop: set[int]) -> Response:
    """A response from SGLang's /generate. EngineError where it is not what was asked for."""
    tokens, meta = answer["output_ids"], answer["meta_info"]
    reason, scored = meta["finish_reason"], meta.get("output_token_logprobs") or []
    finish = reason["type"]
    if finish == "abort":
        count = min(len(tokens), len(scored))
        tokens, scored = tokens[:count], scored[:count]
    logprobs = [logprob for logprob, *_ in scored]
    if reason.get("matched") == "NaN happened":
        raise EngineError(f"request {request.id}: the engine computed NaN after {len(tokens)} tokens")
    if [token for _, token, *_ in scored] != tokens or None in logprobs or (not tokens and finish != "abort"):
        raise EngineError(f"request {request.id}: tokens and log-probabilities do not fit: {str(answer)[:500]}")
    if finish == "length" and len(tokens) < request.max_new_tokens:
        raise EngineError(
            f"request {request.id} was cut at {len(tokens)} of {request.max_new_tokens} new tokens after "
            f"{len(request.tokens)}: the engine's KV cache holds no more; raise --mem-fraction-static"
        )
    if finish == "abort" and tokens:  # SGLang looks at an aborted request's end no more
        finish = "stop" if tokens[-1] in stop else "length" if len(tokens) >= request.max_new_tokens else "abort"
    if finish not in ("stop", "length", "abort"):
        raise EngineError(f"request {request.id}: the engine ended it with {reason}")
    return Response(request.id, tokens, logprobs, finish)


def _raise_open_files() -> None:
    """A connection for each request is an open file; the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
