"""What ends a run of reinforcement learning, and as what: a refusal of what was given (status 2), or a run that broke
(status 1, the same command resumes). Without Ray's processes."""

import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError

from infir2.ray_cluster import Refusal
from infir2.rl import actors, controller
from infir2.rl.log import StepLog
from infir2.rl.sglang_weights import Digest, EngineError


class Remote:
    """An actor's method: `remote` calls it at once; what it raises is raised by `ray.get`, as Ray does."""

    def __init__(self, function) -> None:
        self.function = function

    def remote(self, *arguments):
        try:
            return "result", self.function(*arguments)
        except Exception as error:
            return "error", RayTaskError("actor", "Traceback\n" + repr(error), error)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def get(found):
        if isinstance(found, list):
            return [get(one) for one in found]
        kind, value = found
        if kind == "error":
            raise value
        return value

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda waiting: (waiting, []))


def raising(error: Exception):
    def function(*_):
        raise error

    return Remote(function)


def engines(**methods) -> actors.SGLangEngines:
    """SGLang's engines, of which two actors are known."""
    found = actors.SGLangEngines.__new__(actors.SGLangEngines)
    found.actors = [SimpleNamespace(**methods) for _ in range(2)]
    found.logs, found.colocate, found.precision = ["log", "log"], True, "fp8"
    return found


def test_an_engine_with_other_weights_is_a_lost_run():
    """Pins: the gravest finding, that trainer and engine are not the same model, ended as the user's wrong input."""
    ours, theirs = Digest("bfloat16", (2,), 5), Digest("bfloat16", (2,), 6)
    found = engines(weights=Remote(lambda digests: {"model.norm.weight": theirs}))
    found.sent = SimpleNamespace(digests={"model.norm.weight": ours})
    with pytest.raises(actors.Lost, match=r"engine 0: 1 of the engine's 1 tensors are not the trainer's, first model"):
        found.check(None)
    found.sent.digests = {"model.embed_tokens.weight": ours}
    with pytest.raises(actors.Lost, match="2 tensors are in only one of trainer and engine"):
        found.check(None)


@pytest.mark.parametrize("method", ["next", "abort", "submit"])
def test_a_dead_engine_is_a_lost_run(method):
    """Pins: a traceback where no engine answered any more. The engine that ended says its last words."""

    def fail(*_):
        raise EngineError("request 3 was lost 3 times")

    words = [[], None] if method == "submit" else []
    found = engines(check=raising(EngineError("the engine at http://a ended with status 1; CUDA out of memory")))
    found.client = SimpleNamespace(**{method: fail})
    with pytest.raises(actors.Lost, match="engine 0: the engine at http://a ended with status 1; CUDA out of memory"):
        getattr(found, method)(*words)
    found.actors = [SimpleNamespace(check=Remote(lambda: None))] * 2
    with pytest.raises(actors.Lost, match="the engines: request 3 was lost 3 times"):
        getattr(found, method)(*words)


@pytest.mark.parametrize("wanted", [False, True])
def test_digests_are_made_where_they_are_compared(wanted):
    """Pins: a hash of every tensor after every step, which nobody asked for."""
    asked = []
    found = engines(resume_weights=Remote(lambda: None), resume_kv=Remote(lambda: None))
    found.check_weights = wanted
    found.update(SimpleNamespace(free_cache=lambda: None, send=lambda fp8, digests: asked.append(digests)))
    assert asked == [wanted]


def trainers(**methods) -> actors.Trainers:
    found = actors.Trainers.__new__(actors.Trainers)
    found.actors, found.places, found.logs = [SimpleNamespace(**methods)], ["host"], ["log"]
    return found


def test_trainers_refuse_until_they_are_built():
    """Pins: an error in the middle of training, such as a weight that is NaN, ended as the user's wrong input."""
    wrong = ValueError("model.norm.weight is NaN")
    with pytest.raises(Refusal, match="is NaN"):
        trainers(build=raising(wrong)).build()
    found = trainers(build=Remote(lambda: Namespace(iteration=3)), weights=raising(wrong))
    assert found.build().iteration == 3
    with pytest.raises(actors.Lost, match=r"trainer 0 on host failed: .*is NaN"):
        found.weights(True)


@pytest.mark.parametrize("where", ["wait", "generate", "load"])
def test_a_transformers_engine_refuses_at_its_start(where):
    """As the trainers. Pins: tensors that engine and trainer do not share called the user's wrong input."""
    found = actors.TransformersEngines.__new__(actors.TransformersEngines)
    found.log, found.precision = "log", "fp8"
    wrong = ValueError("trainer and fp8 engine do not have the same tensors")
    found.actor = SimpleNamespace(generate=raising(wrong), load=raising(wrong))
    found.started = raising(wrong).remote()
    found.pending, found.finished = actors.deque([1]), actors.deque()
    found.sampling = None
    call = {
        "wait": found.wait,
        "generate": found.next,
        "load": lambda: found.update(SimpleNamespace(weights=lambda fp8: {})),
    }[where]
    with pytest.raises(Refusal if where == "wait" else actors.Lost, match="do not have the same tensors"):
        call()


def test_an_error_of_a_step_has_status_1(monkeypatch, tmp_path, caplog):
    """Pins: any ValueError in the middle of a run ended with status 2, as if its flags had been wrong."""

    class Part:
        actors = ()

        def __init__(self, *_):
            self.build = lambda: Namespace()

        def __getattr__(self, name):
            return lambda *_: None

    class Broken:
        def __init__(self, *_):
            pass

        def train(self):
            raise ValueError("could not broadcast")

    settings = Namespace(actor_num_nodes=1, actor_num_gpus_per_node=1, cpu=True, wait_seconds=0, engine_seed=1)
    settings.metrics_file, settings.hf_checkpoint, settings.colocate = tmp_path / "metrics.jsonl", Path(), False
    for name, part in {"Trainers": Part, "TransformersEngines": Part, "Run": Broken}.items():
        monkeypatch.setattr(controller, name, part)
    monkeypatch.setattr(controller, "parse", lambda words: (settings, words))
    monkeypatch.setattr(controller, "Inputs", lambda args: None)
    monkeypatch.setattr(controller.ray_launch, "reserve", lambda *_: None)
    monkeypatch.setattr(controller.ray_launch, "session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(controller.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["infir2.rl"])
    assert controller.main() == 1
    assert "ValueError: could not broadcast" in caplog.text
    assert "The same command resumes" in caplog.text


def test_weights_and_biases(monkeypatch, tmp_path):
    """Pins: metrics that never reached Weights & Biases; and a new run there after each resume."""
    opened, logged = [], []

    class Wandb:
        def init(self, **options):
            opened.append(options)
            return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    args = Namespace(metrics_file=tmp_path / "run/metrics.jsonl", tensorboard_dir=None, rl_wandb_project="p")
    args.wandb_entity, args.wandb_exp_name, args.wandb_save_dir = "", "", ""
    for step in (0, 4):
        with StepLog(args, step) as log:
            log.evaluation(step, "valid", {"mean": 0.5, "truncated": 0.0, "length": 7.0})
    assert [options["id"] for options in opened] == [opened[0]["id"]] * 2
    assert {(options["project"], options["name"], options["resume"]) for options in opened} == {("p", "run", "allow")}
    assert [step for step, _ in logged] == [0, 4]
    assert json.loads(args.metrics_file.read_text().splitlines()[-1])["step"] == 4
