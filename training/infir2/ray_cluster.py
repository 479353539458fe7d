"""Which Ray the scripts use, and what of the caller's environment a job takes along.

`python -m infir2.ray_cluster find` prints one line: the address of a dashboard (`http://...`: jobs go there),
of a cluster that this machine is a node of (`host:6379`, `auto`: a driver joins it), or `local` (none answers: a run
starts a Ray of its own). `python -m infir2.ray_cluster runtime-env` prints the JSON for `ray job submit`.

Ray itself is not imported: that would take seconds before every run.
"""

import argparse
import http.client
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
ANSWER_SECONDS = 5

# Settings of a run, not of a machine: PATH, HOME, CUDA_VISIBLE_DEVICES and the like are each node's own.
FORWARDED_NAMES = (
    *("PYTHONPATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "SCALE_FMT", "HF_HOME"),
)
FORWARDED_PREFIXES = (
    *("INFIR2_", "NVTE_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_"),
    *("HF_HUB_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "SGLANG_"),
)
SECRET_SUFFIXES = ("_KEY", "_TOKEN", "_PASSWORD")  # a job's runtime_env is shown on the dashboard


class Refusal(Exception):
    """The run cannot be started: what was asked for, what was found, what to do."""


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run's workers get from the machine that starts it. Secrets stay behind: log in on each
    node, or write them where the library looks for them."""
    return {
        name: value
        for name, value in environment.items()
        if (name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIXES)) and not name.endswith(SECRET_SUFFIXES)
    }


def find(environment: Mapping[str, str]) -> str:
    """The address to use: RAY_ADDRESS, else a dashboard on this machine, else `local`.

    Refused: a dashboard of RAY_ADDRESS that does not answer, one that wants a token we lack, another version of Ray,
    and no Ray at all.
    """
    address = environment.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise Refusal(
            f"RAY_ADDRESS is {address}, the Ray client's; give the dashboard (http://head:8265), or on a node of the "
            "cluster head:6379"
        )
    if address.startswith(("http://", "https://")):
        if not answers(address, environment):
            raise Refusal(f"no Ray dashboard answers at RAY_ADDRESS={address}; is the head started?")
        return address
    if not address and answers(LOCAL_DASHBOARD, environment):
        return LOCAL_DASHBOARD
    if importlib.util.find_spec("ray") is None:
        raise Refusal(
            f"no Ray cluster answers at {LOCAL_DASHBOARD} and {sys.executable} has no Ray to start one; install "
            "requirements.txt, or set RAY_ADDRESS"
        )
    return address or "local"


def answers(address: str, environment: Mapping[str, str]) -> bool:
    """Whether a dashboard of our version of Ray answers at `address`. False where nothing does, or not a Ray."""
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    if token := _token(environment):
        request.add_header("Authorization", f"Bearer {token}")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a cluster is not behind the web's proxy
    try:
        with direct.open(request, timeout=ANSWER_SECONDS) as answer:
            theirs = json.load(answer)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise Refusal(
                f"the Ray cluster at {address} wants its token ({'ours is wrong' if token else 'we have none'}): copy "
                "the head's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN. RAY_ADDRESS=local starts a Ray of our own"
            ) from None
        return False
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False
    ours = importlib.metadata.version("ray")
    if theirs != ours:
        raise Refusal(
            f"the Ray cluster at {address} runs Ray {theirs}, this environment has {ours}; start the cluster from this "
            "environment, or set RAY_ADDRESS to another one (RAY_ADDRESS=local: one of our own)"
        )
    return True


def listens(address: str) -> bool:
    """Whether something listens at `host:port`; True for another form of address, which we cannot ask."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _token(environment: Mapping[str, str]) -> str:
    """The cluster's token, from where Ray itself looks for it."""
    if token := environment.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    return path.read_text().strip() if path.is_file() else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="infir2.ray_cluster", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["find", "runtime-env"])
    try:
        if parser.parse_args().what == "find":
            print(find(os.environ))
        else:
            print(json.dumps({"env_vars": forwarded(os.environ)}, sort_keys=True))
    except Refusal as error:
        print(f"[ray_cluster] error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
