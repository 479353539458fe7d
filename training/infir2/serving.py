"""Serving a model over the OpenAI protocol while it is evaluated: SGLang on GPUs, `transformers serve` on a CPU.

A server is ready when it has completed a chat; it is gone when its `with` ends, and when we are killed.
"""

import http.client
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.data.chat import read_chat_template, special_tokens_map
from infir2.evaluation import answers
from infir2.indexed import DataError
from infir2.processes import GuardedProcess, last_lines, without_proxy
from infir2.stop_tokens import FILES, GENERATION, stop_tokens

HOST = "127.0.0.1"
# Of a server that is not there, speaks no HTTP, or answers something else.
NO_ANSWER = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)
PROBE_SECONDS = 60  # for one completion of a few tokens, once the server listens

log = logging.getLogger("serving")


class ServerError(Exception):
    """A server that did not start, or ended: the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """How to serve model folders."""

    backend: str  # gpu or cpu
    tensor_parallel: int = 1
    arguments: Sequence[str] = ()  # more of them for the server's command line
    port: int = 0  # 0: any free one
    ready_seconds: float = 1800

    def command(self, models: Sequence[Path], port: int | str) -> list[str]:
        """The server's command line. SGLang serves one model, FP8 or BF16 by its config.json; `transformers serve` any
        that it is asked for, one at a time: it is told none."""
        where = ["--host", HOST, "--port", str(port)]
        if self.backend == "gpu":
            (model,) = models
            words = [sglang_python(), "-m", "sglang.launch_server", "--model-path", str(model)]
            return [*words, *where, "--tp-size", str(self.tensor_parallel), *self.arguments]
        words = [sys.executable, "-m", "infir2.transformers_serve", "serve"]
        # Without a bound its cache takes most of the memory. 128 blocks of 256 tokens, shared by 32 requests.
        batching = "--continuous-batching --cb-block-size 256 --cb-num-blocks 128 --cb-max-batch-tokens 1024".split()
        return [*words, *where, "--device", "cpu", *batching, *self.arguments]

    def environment(self) -> dict[str, str]:
        """On a CPU one thread of OpenMP answers ten times faster than several that wait for each other."""
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **without_proxy()}
        return offline | ({"OMP_NUM_THREADS": "1"} if self.backend == "cpu" else {})


def sglang_python() -> str:
    """The Python that has SGLang: SGLANG_PYTHON, or ours."""
    return os.environ.get("SGLANG_PYTHON") or sys.executable


def check_model(model: Path, backend: str, temperature: float) -> None:
    """Refuse a folder that cannot be served, or would be served otherwise than asked for."""
    for name, what in (("config.json", "no model folder"), ("tokenizer_config.json", "without a tokenizer")):
        if not (model / name).is_file():
            raise DataError(f"{model} is {what}: it has no {name}. Export it with tools/convert_torch_dist_to_hf.py.")
    if not (model / "tokenizer.json").is_file() and not (model / "vocab.json").is_file():
        raise DataError(f"{model} is without a tokenizer: neither tokenizer.json nor vocab.json is there. Copy them.")
    tokenizer = _json_object(model / "tokenizer_config.json")
    if not tokenizer.get("chat_template") and not (model / "chat_template.jinja").is_file():
        raise DataError(
            f"{model} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), and "
            "questions are asked as a chat. Copy that of the model that it was trained from."
        )
    generation = model / GENERATION
    samples = generation.is_file() and _json_object(generation).get("do_sample")
    if backend == "cpu" and temperature > 0 and not samples:
        raise DataError(
            f"{generation} has no `do_sample: true`, without which `transformers serve` takes the likeliest token at "
            f"any temperature, and {temperature} was asked for. Set it, as tools/convert_torch_dist_to_hf.py does."
        )
    try:
        # transformers reads one of the two files, SGLang both.
        files = [GENERATION] if backend == "cpu" and generation.is_file() else FILES
        stop_tokens(model, files)
    except ValueError as error:
        raise DataError(str(error)) from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}. Copy that of the model again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object. Copy that of the model again.")
    return content


def turn_opening(model: Path) -> str:
    """What a model folder's chat template writes of the model's turn: `<think>`, or nothing. Refuses (DataError) a
    template that cannot be rendered."""
    template = read_chat_template(model)
    if "<think>" not in template:
        return ""
    from transformers.utils.chat_template_utils import render_jinja_template  # two seconds

    question = [{"role": "user", "content": "1 + 1 ="}]
    try:
        texts, _ = render_jinja_template(
            [question],
            chat_template=template,
            add_generation_prompt=True,
            **special_tokens_map(model),
        )
    except DataError:
        raise
    except Exception as error:  # a template is a program: anything can go wrong in it
        raise DataError(f"the chat template of {model} cannot be rendered: {type(error).__name__}: {error}") from error
    return answers.turn_opening(texts[0])


@contextmanager
def serving(
    server: Server, models: Sequence[Path], sampling: dict[str, Any], log_file: Path
) -> Iterator[tuple[str, GuardedProcess]]:
    """Yields the base URL (http://.../v1) of a server that has completed a chat with the first model, and its process.

    `sampling` goes with that chat: transformers' continuous batching keeps what a model's first request asks for.
    Raises ServerError if the server ends, or is not ready in time; DataError if its port is taken.
    """
    port = _free_port(server.port)
    url, command = f"http://{HOST}:{port}/v1", server.command(models, port)
    log.info("starting a server on port %d; its log: %s", port, log_file)
    begin = time.monotonic()
    with log_file.open("wb") as output, GuardedProcess(command, server.environment(), output) as process:
        while not _completes(url, str(models[0]), sampling):
            if (status := process.wait(0.5)) is not None:
                raise ended(status, log_file)
            if time.monotonic() - begin > server.ready_seconds:
                raise failure(f"the server completed no chat in {server.ready_seconds:g} s", log_file)
        if (status := process.status()) is not None:  # then somebody else's has answered
            raise ended(status, log_file)
        log.info("ready after %.0f s", time.monotonic() - begin)
        yield url, process


def ended(status: int, log_file: Path) -> ServerError:
    """The error of a server that ended by itself."""
    return failure(f"the server ended with status {status}", log_file)


def failure(what: str, log_file: Path) -> ServerError:
    """An error that shows what the server said last."""
    return ServerError(f"{what}. The end of {log_file}:\n{last_lines(log_file)}")


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise DataError(f"port {wanted} is taken ({error.strerror}). Unset PORT to get a free one.") from None
        return probe.getsockname()[1]


def _completes(url: str, model: str, sampling: dict[str, Any]) -> bool:
    try:
        complete(url, model, sampling)
    except NO_ANSWER:
        return False
    return True


def complete(url: str, model: str, sampling: dict[str, Any], key: str = "EMPTY") -> str:
    """The completion of a short chat. Raises one of NO_ANSWER if there is none."""
    chat = {"model": model, "messages": [{"role": "user", "content": "1 + 1 ="}], "max_tokens": 8, **sampling}
    answer = request(f"{url}/chat/completions", key, chat)
    return answer["choices"][0]["message"]["content"]


def request(url: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON answer to a GET, or to a POST of `body`."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    message = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(message, timeout=PROBE_SECONDS) as answer:
        return json.load(answer)


def check_running(url: str, model: str, sampling: dict[str, Any], key: str) -> None:
    """Refuse a server that somebody else runs if it does not complete a chat."""
    try:
        complete(url, model, sampling, key)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url} does not complete a chat with {model}: {error}: {error.read(500)!r}") from None
    except NO_ANSWER as error:
        raise DataError(f"no server completes a chat at API_URL={url}: {error}") from None


def only_model(url: str, key: str) -> str:
    """The name under which a server that somebody else runs serves its only model."""
    try:
        names = [entry["id"] for entry in request(f"{url}/models", key)["data"]]
    except NO_ANSWER as error:
        raise DataError(f"no server answers at API_URL={url}: {error}") from None
    if len(names) != 1:
        raise DataError(f"{url} serves {', '.join(names) or 'no model'}: set MODEL_PATH to the name of one.")
    return names[0]
