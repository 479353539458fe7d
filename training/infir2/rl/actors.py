"""The processes of reinforcement learning: Ray actors, and what the controller holds of them.

`Trainers` are one Megatron rank each, on the GPUs (or CPUs) of a placement group. `TransformersEngines` is the engine
of a CPU; SGLang's is infir2.rl.sglang_engine. An actor's output goes to a file in the run's `logs` folder. Ray ends the
actors of a controller that is gone; an actor that is lost ends the run.
"""

import faulthandler
import logging
import os
import shlex
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from infir2.ray_cluster import Refusal, forwarded
from infir2.ray_launch import START_SECONDS, Place, Worker, environments
from infir2.rl.rollout import Request, Response, Sampling

TAIL_LINES = 20


class Lost(Exception):
    """A process of the run is gone: which one, and the last of its output."""


def become(log: str, environment: dict[str, str], folder: str) -> None:
    """Make this actor a process of the run: its variables, its folder, its output in `log`."""
    os.environ.update(environment)
    os.chdir(folder)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable(sys.stderr)
    import torch

    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # torch may have been imported before


class Trainer:
    """One rank. Its methods are those of infir2.rl.policy.Policy; only rank 0 returns what is large."""

    def place(self) -> Place:
        return Worker().place()

    def free_port(self) -> int:
        return Worker().free_port()

    def prepare(self, words: list[str], environment: dict[str, str], log: str, folder: str) -> None:
        """Import, parse, check; no GPU memory is taken."""
        become(log, environment, folder)
        from infir2 import backend, engine, precision
        from infir2.rl import arguments as rl_arguments

        sys.argv = ["infir2.rl", *words]
        scale_fmt = precision.set_scale_format()
        kind = backend.install()
        args, start = engine.parse(rl_arguments.ReinforcementLearning(), kind, scale_fmt)
        import infir2.rl.policy

        self.rank = args.rank
        self._build = lambda: infir2.rl.policy.Policy(args, start, kind, scale_fmt, rl_arguments.objective(args))

    def build(self) -> Namespace:
        """Build and load; returns the arguments, `iteration` being the checkpoint's."""
        self.policy = self._build()
        return self.policy.args

    def log_probabilities(self, batch) -> Any:
        found = self.policy.log_probabilities(batch)
        return found if self.rank == 0 else None

    def train(self, batch) -> Any:
        found = self.policy.train(batch)
        return found if self.rank == 0 else None

    def save(self, iteration: int) -> None:
        self.policy.save(iteration)

    def weights(self, fp8: bool) -> dict | None:
        """The bytes of all tensors."""
        from infir2.rl.transformers_engine import to_bytes

        found = {name: to_bytes(tensor) for name, tensor in self.policy.weights(fp8)}
        return found if self.rank == 0 else None

    def connect(self, engines: list) -> None:
        """Prepare to send weights to SGLang engines (infir2.rl.sglang_weights.Engine)."""
        from infir2.rl.sglang_weights import WeightSender

        self.sender = WeightSender(engines, address=ray.util.get_node_ip_address())

    def send(self, fp8: bool, digests: bool) -> Any:
        """Send all weights; what was sent."""
        import torch

        torch.cuda.empty_cache()
        found = self.sender.send(self.policy.weights(fp8), digests=digests)
        return found if self.rank == 0 else None

    def free_cache(self) -> None:
        """Give memory that training does not use now to the engine on this GPU."""
        import torch

        torch.cuda.empty_cache()

    def digests(self, fp8: bool) -> dict[str, str] | None:
        from infir2.rl.transformers_engine import digest

        found = {name: digest(tensor) for name, tensor in self.policy.weights(fp8)}
        return found if self.rank == 0 else None


class Trainers:
    """All ranks, called as one. What they refuse before they are built is a Refusal, a failure afterwards is Lost."""

    started = False

    def __init__(self, group: PlacementGroup, nodes: int, per_node: int, cpu: bool, logs: Path) -> None:
        resources = {"num_cpus": 1} if cpu else {"num_gpus": 1, "num_cpus": 0}
        actors = [
            ray.remote(Trainer).options(**resources, **on_node(group, node)).remote()
            for node in range(nodes)
            for _ in range(per_node)
        ]
        places = call(actors, "place")
        order = sorted(range(len(actors)), key=lambda number: places[number].order)
        self.actors = [actors[number] for number in order]
        self.places = [places[number] for number in order]
        self.logs = [str(logs / f"trainer-{rank}.log") for rank in range(len(actors))]

    def prepare(self, words: list[str], folder: str) -> None:
        variables = environments(self.places, ray.get(self.actors[0].free_port.remote()))
        ours = forwarded(os.environ)
        self._all(
            [
                actor.prepare.remote(words, {**own, **ours}, log, folder)
                for actor, own, log in zip(self.actors, variables, self.logs, strict=True)
            ]
        )

    def build(self) -> Namespace:
        """From here on nothing is the fault of what was given: a failure ends the run."""
        settings = self._all([actor.build.remote() for actor in self.actors])[0]
        self.started = True
        return settings

    def __getattr__(self, method: str):
        """Call a method of every rank; rank 0's answer."""

        def run(*arguments):
            shared = [ray.put(argument) for argument in arguments]
            return self._all([getattr(actor, method).remote(*shared) for actor in self.actors])[0]

        return run

    def _all(self, references: list) -> list:
        """Their results; the first failure ends the wait, for the other ranks may hang in a collective."""
        waiting = list(references)
        while waiting:
            ready, waiting = ray.wait(waiting)
            for reference in ready:
                rank = references.index(reference)
                try:
                    ray.get(reference)
                except (RayTaskError, RayActorError) as error:
                    raise self._failure(rank, error) from None
        return ray.get(references)

    def _failure(self, rank: int, error: Exception) -> Exception:
        cause = getattr(error, "cause", None)
        if not self.started and (
            isinstance(cause, ValueError | FileNotFoundError) or type(cause).__name__ == "DataError"
        ):
            return Refusal(str(cause))
        return lost(f"trainer {rank} on {self.places[rank]}", self.logs[rank], error)


def lost(who: str, log: str, error: Exception) -> Lost:
    """The error for an actor that failed: its own words, and the end of its log."""
    lines = Path(log).read_text(errors="replace").splitlines()[-TAIL_LINES:] if Path(log).is_file() else []
    why = "is gone" if isinstance(error, RayActorError) else "failed"
    words = str(error).strip().splitlines()[-1:]
    return Lost("\n".join([f"{who} {why}: {' '.join(words)}", f"the last of {log}:", *lines]))


def on_node(group: PlacementGroup, node: int) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)}


def call(actors: list, method: str) -> list:
    return ray.get([getattr(actor, method).remote() for actor in actors], timeout=START_SECONDS)


class TransformersProcess:
    """The actor of a transformers engine."""

    def start(self, folder: str, scale_fmt: str, environment: dict[str, str], log: str) -> tuple[str, set[int]]:
        """Returns the engine's precision, and the tokens that end a response."""
        become(log, environment, os.getcwd())
        from infir2.rl.transformers_engine import TransformersEngine

        self.engine = TransformersEngine(folder, scale_fmt)
        return self.engine.precision, self.engine.end

    def load(self, tensors: dict) -> None:
        self.engine.load(tensors)

    def digests(self) -> dict[str, str]:
        return self.engine.digests()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        return self.engine.generate(requests, sampling)


class TransformersEngines:
    """The engine of a CPU: one process, which generates a batch of requests when the next response is asked for."""

    BATCH = 256

    def __init__(self, logs: Path) -> None:
        self.actor = ray.remote(TransformersProcess).options(num_cpus=1).remote()
        self.log = str(logs / "engine-0.log")
        self.pending: deque[Request] = deque()
        self.finished: deque[Response] = deque()
        self.sampling = Sampling()

    def start(self, folder: Path, scale_fmt: str, seed: int) -> None:
        """Begin to start; `wait` waits. Its random numbers come with the requests."""
        environment = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        self.started = self.actor.start.remote(str(folder.resolve()), scale_fmt, environment, self.log)

    def wait(self) -> None:
        """A folder that the engine refuses is a Refusal."""
        try:
            self.precision, self.stop = ray.get(self.started)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise Refusal(str(error.cause)) from None
            raise lost("the engine", self.log, error) from None
        except RayActorError as error:
            raise lost("the engine", self.log, error) from None

    def connect(self, trainers: Trainers) -> None:
        """Weights come through Ray."""

    def update(self, trainers: Trainers) -> None:
        """Take the trainers' weights."""
        self._get(self.actor.load.remote(trainers.weights(self.precision == "fp8")))

    def check(self, trainers: Trainers) -> None:
        """Lost unless every tensor that is generated with equals the trainer's, bit for bit."""
        wanted, held = trainers.digests(self.precision == "fp8"), self._get(self.actor.digests.remote())
        if wrong := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
            raise Lost(f"{len(wrong)} of the engine's {len(wanted)} tensors are not the trainer's: {wrong[:3]}")

    def make_room(self) -> None:
        """Trainer and engine each have memory of their own here."""

    def close(self) -> None:
        ray.kill(self.actor)

    # infir2.rl.rollout.Engine

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self.pending.extend(requests)
        self.sampling = sampling

    def next(self) -> Response:
        if not self.finished:
            batch = [self.pending.popleft() for _ in range(min(self.BATCH, len(self.pending)))]
            self.finished.extend(self._get(self.actor.generate.remote(batch, self.sampling)))
        return self.finished.popleft()

    def abort(self) -> list[Response]:
        """Responses that are finished and were not asked for; requests that were not begun, with nothing generated."""
        left = [*self.finished, *(Response(request.id, [], [], "abort") for request in self.pending)]
        self.finished.clear()
        self.pending.clear()
        return left

    def _get(self, reference: ray.ObjectRef):
        try:
            return ray.get(reference)
        except (RayTaskError, RayActorError) as error:
            raise lost("the engine", self.log, error) from None


class SGLangEngines:
    """SGLang servers, one actor each: on the trainers' GPUs in turns with them, or on GPUs of their own."""

    def __init__(self, args: Namespace, trainers: Trainers, group: PlacementGroup, logs: Path) -> None:
        from infir2.rl import sglang_engine

        self.colocate, self.gpus = args.colocate, args.rollout_num_gpus_per_engine
        self.flags = shlex.split(args.sglang_arguments)
        self.flags += ["--mem-fraction-static", str(args.sglang_mem_fraction_static)]
        self.python = args.sglang_python
        self.own_scales = args.sglang_activation_scales == "sglang"
        self.check_weights = args.check_weights
        server = ray.remote(sglang_engine.Server)
        if self.colocate:
            self.ranks = shared_gpus(trainers.places, self.gpus)
            nodes = sorted({place.node for place in trainers.places})  # only to count them
            options = [{"num_cpus": 0, **on_same_node(trainers.places[ranks[0]])} for ranks in self.ranks]
            self.devices = [[trainers.places[rank].gpu for rank in ranks] for ranks in self.ranks]
            self.hosts = [trainers.places[ranks[0]].ip if len(nodes) > 1 else "127.0.0.1" for ranks in self.ranks]
        else:
            count, rest = divmod(args.rollout_num_gpus or 0, self.gpus)
            if not count or rest:
                raise Refusal(
                    f"--rollout-num-gpus {args.rollout_num_gpus} is no multiple of --rollout-num-gpus-per-engine "
                    f"{self.gpus}; without --colocate the engines need GPUs of their own"
                )
            self.own = placement_group([{"GPU": self.gpus}] * count, strategy="PACK")
            if not self.own.wait(max(5, int(args.wait_seconds))):
                raise Refusal(f"{args.rollout_num_gpus} GPUs for engines are not free beside the trainers'")
            options = [{"num_cpus": 0, "num_gpus": self.gpus, **on_node(self.own, i)} for i in range(count)]
            self.ranks = [()] * count
        self.actors = [server.options(**option).remote() for option in options]
        if not self.colocate:
            places = call(self.actors, "place")
            self.devices = [place.gpu.split(",") for place in places]
            self.hosts = [place.ip for place in places]
        self.logs = [str(logs / f"engine-{number}.log") for number in range(len(self.actors))]
        self.client = None

    def start(self, folder: Path, scale_fmt: str, seed: int) -> None:
        """Begin to start; `wait` waits."""
        from infir2.rl.arguments import engine_precision
        from infir2.stop_tokens import stop_tokens

        self.precision, self.folder = engine_precision(folder, scale_fmt), folder.resolve()
        self.stop = stop_tokens(folder)
        scales = None if self.own_scales or self.precision == "bf16" else scale_fmt
        activations = "" if self.precision == "bf16" else f", their activations' scales {scales or 'FP32, of SGLang'}"
        logging.getLogger("rl").info("the engines' weights are %s%s", self.precision, activations)
        options = {"colocate": self.colocate, "activation_scales": scales, "flags": self.flags, "python": self.python}
        self.started = [
            actor.launch.remote(str(self.folder), gpus, log, host=host, seed=seed + number, **options)
            for number, (actor, gpus, log, host) in enumerate(
                zip(self.actors, self.devices, self.logs, self.hosts, strict=True)
            )
        ]

    def wait(self) -> None:
        """Until every engine has generated a token; colocated ones then give their memory back."""
        from infir2.rl.sglang_engine import Client

        self.urls = self._all(self.started)
        self.client = Client(self.urls, sorted(self.stop))
        self.make_room()

    def connect(self, trainers: Trainers) -> None:
        from infir2.rl.sglang_weights import Engine

        trainers.connect([Engine(url, self.gpus, ranks) for url, ranks in zip(self.urls, self.ranks, strict=True)])

    def make_room(self) -> None:
        """Give the GPUs' memory to the trainers."""
        self._each("release" if self.colocate else "flush")

    def update(self, trainers: Trainers) -> None:
        """Take the trainers' weights. Colocated, the engines have no memory before, and can generate afterwards."""
        if self.colocate:
            trainers.free_cache()
            self._each("resume_weights")
        self.sent = trainers.send(self.precision == "fp8", self.check_weights)
        self._each("resume_kv" if self.colocate else "flush")

    def check(self, trainers: Trainers) -> None:
        """Lost unless every tensor of every engine is the trainers', bit for bit."""
        from infir2.rl.sglang_weights import compare

        for number, held in enumerate(self._all([actor.weights.remote(True) for actor in self.actors])):
            try:
                compare(self.sent.digests, held)
            except ValueError as error:
                raise Lost(f"engine {number}: {error}") from None

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        with self._client_errors():
            self.client.submit(requests, sampling)

    def next(self) -> Response:
        with self._client_errors():
            return self.client.next()

    def abort(self) -> list[Response]:
        with self._client_errors():
            return self.client.abort()

    @contextmanager
    def _client_errors(self) -> Iterator[None]:
        """What no engine answers ends the run; where one has ended, with that one's last lines."""
        from infir2.rl.sglang_weights import EngineError

        try:
            yield
        except EngineError as error:
            self._each("check")
            raise Lost(f"the engines: {error}") from None

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
        for actor in self.actors:
            ray.kill(actor)
        if not self.colocate:
            ray.util.remove_placement_group(self.own)

    def _each(self, method: str) -> list:
        return self._all([getattr(actor, method).remote() for actor in self.actors])

    def _all(self, references: list) -> list:
        for number, reference in enumerate(references):
            try:
                ray.get(reference)
            except RayActorError as error:
                raise lost(f"engine {number}", self.logs[number], error) from None
            except RayTaskError as error:
                raise Lost(f"engine {number}: {error.cause}") from None
        return ray.get(references)


def shared_gpus(places: Sequence[Place], per_engine: int) -> list[tuple[int, ...]]:
    """Which trainer ranks share each engine's GPUs: the ranks of a node, in order, `per_engine` at a time. A Refusal
    where they do not come out."""
    engines = []
    for node in dict.fromkeys(place.node for place in places):
        ranks = [rank for rank, place in enumerate(places) if place.node == node]
        if len(ranks) % per_engine:
            raise Refusal(f"a node's {len(ranks)} trainers are no multiple of {per_engine} GPUs an engine")
        engines += [tuple(ranks[i : i + per_engine]) for i in range(0, len(ranks), per_engine)]
    return engines


def on_same_node(place: Place) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False)}
