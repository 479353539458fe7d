"""Start a program on Ray, one worker a GPU: what torchrun does, on a cluster that Ray holds.

    python -m infir2.ray_launch --actor-num-nodes 2 --actor-num-gpus-per-node 8 -- infir2.sft FLAGS

RAY_ADDRESS says which cluster; inside a Ray job it is set. Without it a Ray of this run's own is started on this
machine, and ends with it.

One Ray actor holds each GPU (or CPU, with --cpu) and starts `python -m MODULE FLAGS` as a process in a session of its
own, with torch.distributed's variables set. Rank 0's output is this program's. The first worker that fails ends the
run: its rank, node, status and last lines are printed, every other process is killed, and its status is ours.

No training process may outlive its run, so its end does not depend on anybody's goodwill:

- the run ends (a failure, Ctrl-C, SIGTERM, `ray job stop`): each actor kills its process's group;
- this program is killed: Ray ends the actors of a driver that is gone;
- an actor is killed: a shell that waits on a pipe from the actor kills the group (`_GUARD`), and the kernel kills the
  process itself (`_BECOME`).
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infir2.ray_cluster import Refusal, forwarded, listens

log = logging.getLogger("ray_launch")

POLL_SECONDS = 1.0  # each look costs the worker and us milliseconds of CPU, on which a small model trains
SETTLE_SECONDS = 0.5  # after a failure is seen: long enough to learn of an earlier one, whose consequence it may be
CONNECT_SECONDS = 60  # a cluster that is there answers within a few; Ray itself would wait for ten minutes
START_SECONDS = 300  # for actors to come up on busy nodes with slow file systems
STOP_SECONDS = 10
TAIL_LINES = 40

# argv: the actor's process id, then a command. Waits for a byte on stdin, which says that the guard is there, then
# becomes that command, to be killed by the kernel when the actor dies. Ray blocks signals in its processes, and a mask
# survives exec: it is cleared. A program of its own and not Popen's preexec_fn, which is unsafe in a threaded process.
_BECOME = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if not os.read(0, 1) or os.getppid() != int(sys.argv[1]):
    sys.exit("the Ray actor is gone")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[2], sys.argv[2:])
"""

# $1: a process group. Kills it when the actor's end of the pipe closes, unless a line came first. In the background, so
# that it is no child of the actor: Ray kills those.
_GUARD = 'exec 3<&0; { read -r _ <&3 || kill -s KILL -- "-$1"; } >/dev/null 2>&1 &'


@dataclass(frozen=True)
class Place:
    """Where a worker is. `gpu` is Ray's id of its device, empty on a CPU."""

    node: str
    ip: str
    host: str
    pid: int
    gpu: str
    cores: int

    def __str__(self) -> str:
        return f"{self.host} ({self.ip})"

    @property
    def order(self) -> tuple:
        """Workers of a node follow each other, by device: local ranks are then contiguous, as Megatron needs."""
        return int(ipaddress.ip_address(self.ip)), self.node, len(self.gpu), self.gpu, self.pid


@dataclass(frozen=True)
class Report:
    """What is new from a worker: its lines; its exit status, None while it runs; when it ended, by its node's clock."""

    lines: list[str]
    status: int | None
    ended_at: float | None


class Worker:
    """The actor: one process, its output and its end. Ray calls one method at a time, in the actor's main thread, which
    matters: the kernel's kill-on-death follows the thread that started the process."""

    def place(self) -> Place:
        """Where this actor was put."""
        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        node = ray.get_runtime_context().get_node_id()
        cores = len(os.sched_getaffinity(0))
        return Place(node, ray.util.get_node_ip_address(), socket.gethostname(), os.getpid(), ",".join(ids), cores)

    def free_port(self) -> int:
        """A TCP port of this node that nothing listens on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, command: list[str], environment: dict[str, str], folder: str) -> None:
        """Start `command` in `folder`. A file that this node does not see is a FileNotFoundError."""
        for path in (folder, command[0]):
            if not Path(path).exists():
                raise FileNotFoundError(path)
        self._lines: deque[str] = deque()
        self._report_end: tuple[int, float] | None = None
        self._process = subprocess.Popen(
            [command[0], "-I", "-S", "-c", _BECOME, str(os.getpid()), *command],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        guard = ["sh", "-c", _GUARD, "sh", str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self._guard.wait()  # its shell has put it in the background
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(b"\n")

    def _wait(self) -> None:
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # not yet reaped: its group is still its own
        ended_at = time.time()
        self._kill()  # what it leaves behind would hold the GPU, and the pipe
        reader.join(STOP_SECONDS)
        with contextlib.suppress(BrokenPipeError), self._guard.stdin as pipe:
            pipe.write(b"\n")
        self._report_end = (self._process.wait(), ended_at)

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.append(line.decode(errors="replace").rstrip("\n"))

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def poll(self) -> Report:
        """What is new since the last call. The report that has a status is the last one with lines."""
        status, ended_at = self._report_end or (None, None)
        return Report([self._lines.popleft() for _ in range(len(self._lines))], status, ended_at)

    def stop(self) -> None:
        """Kill the process and all of its group; returns when they are dead."""
        if hasattr(self, "_process"):
            if self._report_end is None:
                self._kill()
            self._waiter.join(STOP_SECONDS)


def environments(places: Sequence[Place], port: int) -> list[dict[str, str]]:
    """torch.distributed's variables for each worker; `places` in rank order, `port` free on the first one's node.

    Ray shows an actor only its own GPU. Megatron calls `torch.cuda.set_device(LOCAL_RANK)` and lets the GPUs of a node
    address each other, so every worker is shown all of its node's GPUs of this run, in local rank order, as torchrun
    would.
    """
    result = []
    for rank, place in enumerate(places):
        peers = [other for other in places if other.node == place.node]
        variables = {
            "RANK": rank,
            "LOCAL_RANK": peers.index(place),
            "WORLD_SIZE": len(places),
            "LOCAL_WORLD_SIZE": len(peers),
            "MASTER_ADDR": places[0].ip,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": max(1, place.cores // len(peers)),  # Ray's own default is 1
        }
        if place.gpu:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(peer.gpu for peer in peers)
        result.append({name: str(value) for name, value in variables.items()})
    return result


# The cluster


def own_ray() -> bool:
    """Whether this run starts a Ray of its own."""
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


@contextlib.contextmanager
def session(workers: int, cpu: bool, store_bytes: int = 100 * 2**20) -> Iterator[None]:
    """Connected to RAY_ADDRESS, or to a Ray of our own with room for `workers`; disconnected, and ended, afterwards.

    store_bytes: shared memory of a Ray of our own, for what actors hand each other; lines of text need little."""
    with contextlib.ExitStack() as stack:
        address, options = os.environ.get("RAY_ADDRESS"), {}
        if own_ray():
            # A short path: it will hold sockets, whose paths end at 107 bytes.
            folder = tempfile.TemporaryDirectory(prefix="infir2-ray-", dir="/tmp", ignore_cleanup_errors=True)
            address, options = "local", _own_options(stack.enter_context(folder), workers, cpu, store_bytes)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns unless it is set
        _connect(address, options)
        stack.callback(ray.shutdown)
        yield


def _connect(address: str | None, options: dict[str, object]) -> None:
    """`ray.init`. Ray gives up on its own processes after 30 s, which a busy machine may need: it gets more tries."""
    if address != "local":
        return _join(address)
    for last in (False, False, True):
        try:
            _init(address, options)
            return
        except Exception as error:  # Ray raises bare ones too; versions that differ are a RuntimeError that names both
            ray.shutdown()
            words = " ".join(str(error).split())
            if "timed out during startup" in words and not last:
                log.warning("Ray did not start within 30 s; trying again")
                continue
            raise Refusal(f"cannot start Ray: {words}") from None


def _init(address: str, options: dict[str, object]) -> None:
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)


def _join(address: str) -> None:
    """Join a cluster that must be there."""
    if not listens(address):
        raise Refusal(f"no Ray cluster listens at RAY_ADDRESS={address}; start it (docs/SFT.md), or unset RAY_ADDRESS")
    hint = "" if "RAY_AUTH_MODE" in os.environ else "; if the cluster has a token, export RAY_AUTH_MODE=token"
    try:
        with _waiting(f"no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s{hint}"):
            _init(address, {})
    except Exception as error:  # Ray raises bare ones too; versions that differ are a RuntimeError that names both
        ray.shutdown()
        raise Refusal(f"cannot use Ray at {address}: {' '.join(str(error).split())}{hint}") from None


@contextlib.contextmanager
def _waiting(refusal: str) -> Iterator[None]:
    """For a wait in Ray's own code, during which no Python handler runs: a thread ends this program at a signal, and
    with `refusal` after CONNECT_SECONDS. Nothing is there yet that would have to be ended."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)

    def watch() -> None:
        if not select.select([reader], [], [], CONNECT_SECONDS)[0]:
            log.error("error: %s", refusal)
            os._exit(2)
        if number := os.read(reader, 1):
            os._exit(128 + number[0])
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        for number, handler in handlers.items():  # Ray has set its own
            signal.signal(number, handler)


def _own_options(folder: str, workers: int, cpu: bool, store_bytes: int) -> dict[str, object]:
    """A Ray for one run: no dashboard, free ports only, so that several fit on a machine. Its token is new and is never
    written: Ray would make ~/.ray/auth_token, which changes how later clusters of this user start."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise
    options = {"include_dashboard": False, "num_cpus": workers, "_temp_dir": folder, "object_store_memory": store_bytes}
    return options | ({"num_gpus": 0} if cpu else {})


def reserve(nodes: int, per_node: int, kind: str, wait_seconds: float) -> PlacementGroup:
    """`per_node` GPUs or CPUs on each of `nodes` nodes, waiting for nodes to join and for other jobs to end.

    One bundle a node, on nodes that differ: with one bundle a worker Ray may split 16 GPUs 8 + 4 + 4, and a
    tensor-parallel group would cross nodes.
    """
    deadline = time.monotonic() + wait_seconds
    asked = f"asked for {nodes} x {per_node} {kind}s (nodes x {kind}s on each)"
    while sum(count >= per_node for _, count in found(kind)) < nodes:
        if time.monotonic() > deadline:
            have = "; ".join(f"{node}: {count:g}" for node, count in found(kind)) or "no node"
            total = sum(count for _, count in found(kind))
            raise Refusal(f"{asked}; found {total:g} {kind}s after {wait_seconds:g} s: {have}")
        time.sleep(0.5)
    group = placement_group([{kind: per_node}] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(max(5, int(deadline - time.monotonic()))):
        ray.util.remove_placement_group(group)
        free = ray.available_resources().get(kind, 0)
        raise Refusal(f"{asked}; the cluster has them, but only {free:g} {kind}s are free: see `ray status`")
    return group


def found(kind: str) -> list[tuple[str, float]]:
    """Each node that is alive, in words, and how many `kind` (GPU or CPU) Ray has there, in use or not."""
    return [
        (f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["Resources"].get(kind, 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


# The run


@dataclass(eq=False)
class Rank:
    """A worker as the driver sees it."""

    number: int
    actor: ray.actor.ActorHandle
    place: Place
    tail: deque[str]
    status: int | None = None
    ended_at: float | None = None
    reason: str = ""  # why its actor is gone, in Ray's words

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0)


def create(group: PlacementGroup, nodes: int, per_node: int, kind: str) -> list[Rank]:
    """The workers' actors, in rank order. A worker takes one GPU and no CPU, or one CPU."""
    resources = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
    actors = [
        ray.remote(Worker).options(
            **resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node),
        )
        for node in range(nodes)
        for _ in range(per_node)
    ]
    actors = [actor.remote() for actor in actors]
    places = ray.get([actor.place.remote() for actor in actors], timeout=START_SECONDS)
    ordered = sorted(zip(actors, places, strict=True), key=lambda pair: pair[1].order)
    return [Rank(number, actor, place, deque(maxlen=TAIL_LINES)) for number, (actor, place) in enumerate(ordered)]


def start(ranks: list[Rank], command: list[str], folder: str) -> None:
    """Start the program on every worker."""
    port = ray.get(ranks[0].actor.free_port.remote())
    variables = environments([rank.place for rank in ranks], port)
    ours = forwarded(os.environ)
    for rank in ranks:
        log.info("rank %d: %s%s", rank.number, rank.place, f", GPU {rank.place.gpu}" if rank.place.gpu else "")
    started = [
        rank.actor.start.remote(command, {**own, **ours}, folder) for rank, own in zip(ranks, variables, strict=True)
    ]
    for rank, reference in zip(ranks, started, strict=True):
        try:
            ray.get(reference, timeout=START_SECONDS)
        except RayTaskError as error:
            raise Refusal(
                f"{error.cause} is not there on {rank.place}; code, Python, data and checkpoints must be on a file "
                "system that every node sees, under one path"
            ) from None


def watch(ranks: list[Rank], all_ranks_log: bool) -> int:
    """Print what the workers print until all have ended, or one has failed; returns the exit status."""
    pending = {rank.actor.poll.remote(): rank for rank in ranks}
    while pending and not any(rank.failed for rank in ranks):
        collect(pending, all_ranks_log)
        time.sleep(POLL_SECONDS)
    if not any(rank.failed for rank in ranks):
        return 0
    time.sleep(SETTLE_SECONDS)
    collect(pending, all_ranks_log)
    first = min((rank for rank in ranks if rank.failed), key=lambda rank: rank.ended_at)
    log.error("%s", describe(first, streamed=first.number == 0 or all_ranks_log))
    return first.status if first.status > 0 else 128 - first.status


def collect(pending: dict[ray.ObjectRef, Rank], all_ranks_log: bool) -> None:
    """Take the reports that are there, and ask again those that still run. A node that hangs holds up nobody else."""
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=1) if pending else ([], [])
    for reference in sorted(ready, key=lambda reference: pending[reference].number):
        rank = pending.pop(reference)
        try:
            report = ray.get(reference)
        except RayActorError as error:
            rank.status, rank.ended_at, rank.reason = 1, time.time(), " ".join(str(error).split())
            continue
        rank.tail.extend(report.lines)
        for line in report.lines if rank.number == 0 or all_ranks_log else ():
            print(f"[rank {rank.number}] {line}" if all_ranks_log else line, flush=True)
        rank.status, rank.ended_at = report.status, report.ended_at
        if rank.status is None:
            pending[rank.actor.poll.remote()] = rank


def describe(rank: Rank, streamed: bool) -> str:
    """Why the run ended: the worker that failed first, its end, its last lines unless they were just printed."""
    if rank.reason:
        end = f"was lost with its Ray actor or node: {rank.reason}"
    elif rank.status < 0:
        end = f"was killed by {signal.Signals(-rank.status).name}"
        if rank.status == -signal.SIGKILL:
            end += " (the kernel does that when memory runs out)"
    else:
        end = f"exited with status {rank.status}"
    head = f"error: rank {rank.number} on {rank.place} {end}; "
    if streamed:
        return head + "its output is above"
    return "\n".join([head + f"the last of its output ({TAIL_LINES} lines at most):", *rank.tail])


def stop(ranks: list[Rank]) -> None:
    """Kill what still runs; returns when it is dead, or its node does not answer."""
    if references := [rank.actor.stop.remote() for rank in ranks]:
        ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)
    for rank in ranks:
        ray.kill(rank.actor)


# The command line


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="infir2.ray_launch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--actor-num-nodes", type=_positive, default=1, metavar="N")
    parser.add_argument(
        "--actor-num-gpus-per-node", type=_positive, default=1, metavar="G", help="workers on each node"
    )
    parser.add_argument("--cpu", action="store_true", help="a worker takes a CPU, not a GPU")
    parser.add_argument("--all-ranks-log", action="store_true", help="print every rank's output, not rank 0's alone")
    parser.add_argument("--wait-seconds", type=float, default=30, help="for nodes to join and GPUs to be free (30)")
    parser.add_argument(
        "--cwd", default=os.getcwd(), help="folder that workers start in, the same on every node (here)"
    )
    parser.add_argument("module", help="what to start, as for python -m; put -- before it")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return int(word)


def launch(args: argparse.Namespace) -> int:
    """Run on the cluster that we are connected to; returns the exit status."""
    kind = "CPU" if args.cpu else "GPU"
    shape = (args.actor_num_nodes, args.actor_num_gpus_per_node, kind)
    group = reserve(*shape, 0 if own_ray() else args.wait_seconds)  # our own has all the nodes it will have
    ranks: list[Rank] = []
    try:
        ranks = create(group, *shape)
        start(ranks, [sys.executable, "-m", args.module, *args.flags], args.cwd)
        return watch(ranks, args.all_ranks_log)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not leave workers behind
            signal.signal(number, signal.SIG_IGN)
        stop(ranks)
        ray.util.remove_placement_group(group)


def _exit_on_signals() -> None:
    """SIGTERM and SIGHUP end the run as Ctrl-C does. What nohup ignores stays ignored."""

    def leave(number, frame):
        log.info("%s: ending the run", signal.Signals(number).name)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def main() -> int:
    """Parse, connect, run. What cannot run ends in one line and status 2."""
    args = parse_arguments(sys.argv[1:])
    logging.basicConfig(format="[%(name)s] %(message)s", level=logging.INFO)
    _exit_on_signals()
    try:
        with session(args.actor_num_gpus_per_node, args.cpu):
            _exit_on_signals()  # Ray has set its own
            return launch(args)
    except Refusal as error:
        log.error("error: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
