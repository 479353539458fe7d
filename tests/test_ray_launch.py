"""The Ray launcher: what a worker gets, and that no worker outlives its run. One small Ray serves the whole module."""

import contextlib
import http.server
import json
import os
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from infir2 import ray_cluster, serving
from infir2.indexed import DataError
from infir2.ray_launch import Place, environments
from infir2.rl import sglang_weights

REPO = Path(__file__).parents[1]
PYTHONPATH = f"{REPO / 'training'}:{{}}"

CLUSTER = """
import sys, ray
from infir2.ray_launch import session
with session(2, cpu=True):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""

# Every rank records its environment and the processes of its tree, then does what its argument says.
PROGRAM = """
import json, os, pathlib, subprocess, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = os.environ["RANK"]
child = subprocess.Popen(["sleep", "600"]) if what != "end" else None
record = {"environment": dict(os.environ), "cwd": os.getcwd(), "pids": [os.getpid()] + ([child.pid] if child else [])}
(folder / f".{rank}").write_text(json.dumps(record))
os.rename(folder / f".{rank}", folder / rank)
print(f"rank {rank} is here", flush=True)
while what == "raise" and not (folder / "0").exists():
    time.sleep(0.05)
if what == "raise" and rank == "1":
    raise ValueError("loss is not finite")
if what != "end":
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster():
    """The environment that joins a Ray of two CPUs and no GPU."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH.format(""), **token}
    environment.pop("RAY_ADDRESS", None)
    holder = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    address = holder.stdout.readline().strip()
    assert address, "no Ray could be started"
    yield {**environment, "RAY_ADDRESS": address}
    holder.stdin.close()
    assert holder.wait(timeout=300) == 0


class Run:
    """A launched program that writes its records into `folder`."""

    def __init__(self, cluster, folder, what, *flags):
        (folder / "program.py").write_text(PROGRAM)
        (folder / "out").mkdir()
        self.folder = folder / "out"
        words = [*("--actor-num-gpus-per-node", "2"), *flags, "--", "program", what, str(self.folder)]
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "infir2.ray_launch", *words],
            env={**cluster, "PYTHONPATH": PYTHONPATH.format(folder), "SCALE_FMT": "fp32", "NOT_FORWARDED": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def records(self) -> list[dict]:
        """Both ranks' records, once both are there."""
        files = [self.folder / "0", self.folder / "1"]
        wait_until(lambda: all(file.exists() for file in files) or self.driver.poll() is not None)
        return [json.loads(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Status, output and messages."""
        output, messages = self.driver.communicate(timeout=300)
        return self.driver.returncode, output, messages


@pytest.fixture
def start(cluster, tmp_path):
    runs = []

    def start(what, *flags):
        runs.append(Run(cluster, tmp_path, what, *flags))
        return runs[-1]

    yield start
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.driver.pid, signal.SIGKILL)


def wait_until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_end(records, seconds: float) -> None:
    pids = [pid for record in records for pid in record["pids"]]
    assert len(pids) == 4
    wait_until(lambda: not any(map(alive, pids)), seconds)


def test_workers_get_their_environment(start):
    """Two ranks on one node, one rendezvous, the caller's settings and folder; rank 0's output alone is printed."""
    run = start("end", "--cpu")
    status, output, messages = run.end()
    assert status == 0, messages
    assert output == "rank 0 is here\n"
    first, second = (record["environment"] for record in run.records())
    for rank, found in enumerate((first, second)):
        assert (found["RANK"], found["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert found["SCALE_FMT"] == "fp32"
        assert int(found["OMP_NUM_THREADS"]) >= 1
    assert "NOT_FORWARDED" not in first
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"]
    assert {record["cwd"] for record in run.records()} == {str(run.folder.parent)}


def test_worker_that_raises_ends_the_run(start):
    """Its status is the run's, its traceback is shown though it is not rank 0, and rank 0, which would wait for it for
    ever, is killed with its child. Pins: a run that hangs in a collective until the NCCL timeout, without a cause."""
    run = start("raise", "--cpu")
    records = run.records()
    status, _, messages = run.end()
    assert status == 1
    assert "error: rank 1 on" in messages
    assert "exited with status 1; the last of its output" in messages
    assert messages.rstrip().endswith("ValueError: loss is not finite")
    assert_all_end(records, seconds=120)


def test_killed_worker_ends_the_run(start):
    """SIGKILL, as the kernel sends it when memory runs out: the run names the rank and the signal, within seconds."""
    run = start("sleep", "--cpu")
    records = run.records()
    os.kill(records[1]["pids"][0], signal.SIGKILL)
    killed = time.monotonic()
    status, _, messages = run.end()
    assert time.monotonic() - killed < 300
    assert status == 128 + signal.SIGKILL
    assert "error: rank 1 on" in messages
    assert "was killed by SIGKILL" in messages
    assert_all_end(records, seconds=120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_no_worker_outlives_the_driver(start, number):
    """`ray job stop` sends the first, a crash is like the second. Pins: training processes that go on holding GPUs, and
    writing checkpoints into the folder of the run that replaces them; and children of a worker that lived on when its
    actor died just after starting it, before its guard stood."""
    run = start("sleep", "--cpu")
    records = run.records()
    run.driver.send_signal(number)
    run.end()
    assert run.driver.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert_all_end(records, seconds=120)


def test_too_few_gpus_are_counted(start):
    """Asked for GPUs that are not there, it says how many there are, on which nodes, instead of waiting for ever."""
    run = start("end", "--wait-seconds", "1", "--actor-num-gpus-per-node", "8")
    status, _, messages = run.end()
    assert status == 2
    assert "asked for 1 x 8 GPUs (nodes x GPUs on each); found 0 GPUs after 1 s: " in messages
    assert os.uname().nodename in messages


def test_ranks_follow_nodes_and_devices():
    """Local ranks are contiguous and index CUDA_VISIBLE_DEVICES, which is the same list for all of a node's workers.

    Pins: Ray shows each actor its own GPU alone, where Megatron's set_device(LOCAL_RANK) fails for all but the first;
    and device 10 sorted before 2.
    """
    seen = [("b", "10.0.0.10", "2"), ("a", "10.0.0.9", "10"), ("b", "10.0.0.10", "0"), ("a", "10.0.0.9", "2")]
    places = [Place(node, ip, f"host-{node}", pid, gpu, cores=16) for pid, (node, ip, gpu) in enumerate(seen)]
    found = environments(sorted(places, key=lambda place: place.order), port=4242)
    assert [(one["RANK"], one["LOCAL_RANK"], one["CUDA_VISIBLE_DEVICES"]) for one in found] == [
        ("0", "0", "2,10"),
        ("1", "1", "2,10"),
        ("2", "0", "0,2"),
        ("3", "1", "0,2"),
    ]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"], one["OMP_NUM_THREADS"]) for one in found} == {
        ("10.0.0.9", "4242", "8")
    }


# Which Ray is used


@contextlib.contextmanager
def dashboard(version: str, token: str = ""):
    """An HTTP server that answers /api/version as a Ray dashboard does; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = not token or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(200 if allowed and self.path == "/api/version" else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": version}).encode())

        def log_message(self, *args): ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_which_ray(monkeypatch, tmp_path):
    """A dashboard that answers is used; none means a Ray of our own; RAY_ADDRESS decides."""
    nothing = "http://127.0.0.1:9"
    monkeypatch.setattr(ray_cluster, "LOCAL_DASHBOARD", nothing)
    assert ray_cluster.find({}) == "local"
    assert ray_cluster.find({"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    with dashboard("2.60.0", token="right") as address:
        monkeypatch.setattr(ray_cluster, "LOCAL_DASHBOARD", address)
        assert ray_cluster.find({"RAY_AUTH_TOKEN": "right"}) == address
        assert ray_cluster.find({"RAY_AUTH_TOKEN": "right", "RAY_ADDRESS": "local"}) == "local"
        (tmp_path / "token").write_text("right\n")
        assert ray_cluster.find({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}) == address


@pytest.mark.parametrize(
    ("version", "token", "environment", "text"),
    [
        ("2.49.1", "", {}, "runs Ray 2.49.1, this environment has 2.60.0"),
        ("2.60.0", "right", {"RAY_AUTH_TOKEN": "wrong"}, "wants its token (ours is wrong)"),
    ],
)
def test_cluster_that_cannot_be_used(version, token, environment, text):
    with dashboard(version, token) as address, pytest.raises(ray_cluster.Refusal) as refusal:
        ray_cluster.find({"RAY_ADDRESS": address, **environment})
    assert text in str(refusal.value)
    with pytest.raises(ray_cluster.Refusal, match="no Ray dashboard answers at RAY_ADDRESS"):
        ray_cluster.find({"RAY_ADDRESS": address})  # it is gone now


def test_what_speaks_no_http_is_no_dashboard(monkeypatch):
    """Pins: a traceback where another program has Ray's port."""

    class Greeting(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"220 ready\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(ray_cluster, "LOCAL_DASHBOARD", address)
        assert ray_cluster.find({}) == "local"
        with pytest.raises(ray_cluster.Refusal, match="no Ray dashboard answers at RAY_ADDRESS"):
            ray_cluster.find({"RAY_ADDRESS": address})
        with pytest.raises(DataError, match="no server answers at API_URL"):
            serving.only_model(address, "EMPTY")
        with pytest.raises(DataError, match="no server completes a chat at API_URL"):
            serving.check_running(address, "x", {}, "EMPTY")
        server.shutdown()


JOIN = """
from infir2 import ray_launch
ray_launch.CONNECT_SECONDS = {seconds}
ray_launch.logging.basicConfig()
ray_launch._exit_on_signals()
with ray_launch.session(1, cpu=True):
    pass
"""


def joining(address: str, seconds: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH.format(""), "RAY_ADDRESS": address}
    command = [sys.executable, "-c", JOIN.format(seconds=seconds)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nothing_listens(host):
    """Pins: RAY_ADDRESS of a cluster that is gone, for which Ray waits for six minutes and more."""
    done = joining(f"{host}:1", 600)
    assert f"Refusal: no Ray cluster listens at RAY_ADDRESS={host}:1" in done.communicate(timeout=120)[1]


def test_a_cluster_that_does_not_answer():
    """It listens, and is no Ray, or hangs. Pins: the same wait; and SIGTERM, which Ray's wait did not heed."""
    with socket.create_server(("", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = joining(address, 3)
        assert f"no Ray cluster answers at {address} within 3 s" in done.communicate(timeout=120)[1]
        assert done.returncode == 2
    with socket.create_server(("", 0)) as listener:
        done = joining(f"127.0.0.1:{listener.getsockname()[1]}", 600)
        connections = [listener.accept()[0] for _ in range(2)]  # ours, then Ray's
        done.terminate()
        done.communicate(timeout=120)
        assert done.returncode == 128 + signal.SIGTERM
        assert len(connections) == 2


def test_addresses_of_ipv6_nodes():
    """Pins: an engine's URL and a rendezvous without brackets, in which a port cannot be told from the address."""
    assert sglang_weights.in_url("fd00::1") == "[fd00::1]"
    assert sglang_weights.in_url("10.0.0.1") == "10.0.0.1"
    group = sglang_weights.join("::1", free_port(), 0, 1, "gloo")
    assert group.size() == 1
    torch.distributed.destroy_process_group(group)


def free_port() -> int:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
        return probe.getsockname()[1]


def test_a_job_takes_settings_along_but_no_machine_and_no_secret():
    """Pins: the head's PATH and CUDA_VISIBLE_DEVICES on every node; keys on the dashboard."""
    ours = {"NCCL_DEBUG": "INFO", "SCALE_FMT": "pow2", "PYTHONPATH": "/x", "WANDB_MODE": "offline"}
    others = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "WANDB_API_KEY": "k", "HF_HUB_TOKEN": "t", "HOME": "/root"}
    assert ray_cluster.forwarded({**ours, **others}) == ours
