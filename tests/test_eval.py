"""Evaluation from the script to the report: servers, resuming, what is refused, and all four benchmarks end to end."""

import http.server
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from eval_local import ROOT, CountingServer, write_lines, write_livecodebench

from infir2 import serving
from infir2.evaluation import answers
from infir2.evaluation.benchmarks import BENCHMARKS, check
from infir2.indexed import DataError
from infir2.processes import GuardedProcess
from infir2.serving import Server, ServerError

sys.path.insert(0, str(ROOT / "tools"))
evaluate = importlib.import_module("evaluate")
pytest_plugins = ["eval_fixtures"]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def alive(mark: str) -> bool:
    """Whether a process, this one aside, has `mark` on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                return True
        except OSError:
            continue
    return False


# Processes

FAMILY = "sh -c 'trap \"\" TERM; sleep 60; : MARK' & exec sleep 61  # MARK"  # a child that does not listen


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_guarded_process_ends_with_its_parent(number):
    """All of its group, at whatever end of the parent. Pins servers left behind that hold GPUs."""
    mark = f"mark{time.monotonic_ns()}"
    program = f"""
import signal, subprocess, sys, time
from infir2.processes import GuardedProcess, exit_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
exit_on_signals()
with GuardedProcess(["sh", "-c", {FAMILY.replace("MARK", mark)!r}], {{}}, subprocess.DEVNULL):
    print("started", flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"started\n"
    time.sleep(0.3)
    parent.send_signal(number)
    status = parent.wait(30)
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    assert wait_for(lambda: not alive(mark))


def test_a_guarded_process_says_how_it_ended(tmp_path):
    with (tmp_path / "log").open("wb") as output:
        with GuardedProcess(["sh", "-c", "echo $COLOUR; exit 3"], {"COLOUR": "red"}, output) as process:
            assert process.wait(20) == 3
        with GuardedProcess(["sleep", "60"], {}, output) as process:
            assert process.wait(0.1) is None
        assert process.status() == -signal.SIGTERM
    assert (tmp_path / "log").read_text() == "red\n"


# Servers


class FakeServer(Server):
    """A server of a few lines of Python."""

    def command(self, models, port) -> list[str]:
        return [sys.executable, "-c", *self.arguments, str(port)]


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"message": {"content": "2"}}]}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
MODELS = [Path("/models/one")]


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("print('no memory left'); raise SystemExit(3)", "the server ended with status 3.*no memory left"),
        ("import time; print('still loading', flush=True); time.sleep(60)", "no chat in 2 s.*still loading"),
        (ANSWERS.replace("choices", "error"), "no chat in 2 s"),
    ],
)
def test_server_that_never_gets_ready(program, text, tmp_path):
    """Its last lines are shown and it is gone. Pins waiting for a dead server, and readiness without a completion."""
    mark = f"# mark{time.monotonic_ns()}"
    server = FakeServer("cpu", arguments=[f"{program}\n{mark}"], ready_seconds=2)
    with pytest.raises(ServerError, match=f"(?s){text}"), serving.serving(server, MODELS, {}, tmp_path / "log"):
        pytest.fail("it was never ready")
    assert wait_for(lambda: not alive(mark))


def test_server_is_ready_and_then_gone(tmp_path):
    mark = f"# mark{time.monotonic_ns()}"
    server = FakeServer("cpu", arguments=[ANSWERS + mark], ready_seconds=30)
    with serving.serving(server, MODELS, {}, tmp_path / "log") as (url, _):
        assert serving.complete(url, "any", {}) == "2"
        assert alive(mark)
    assert wait_for(lambda: not alive(mark))


def test_taken_port_is_refused(tmp_path):
    """Pins scores of whatever answers on that port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = FakeServer("cpu", arguments=[ANSWERS], port=other.getsockname()[1])
        with pytest.raises(DataError, match="is taken"), serving.serving(server, MODELS, {}, tmp_path / "log"):
            pytest.fail("it was served")


def test_command_lines():
    """What SGLang gets; that transformers batches; user's words last."""
    gpu = Server("gpu", tensor_parallel=4, arguments=["--attention-backend", "triton"]).command(MODELS, 8000)
    words = "-m sglang.launch_server --model-path /models/one --host 127.0.0.1 --port 8000 --tp-size 4"
    assert gpu[1:] == [*words.split(), "--attention-backend", "triton"]
    assert "--continuous-batching" in Server("cpu").command(MODELS, 8000)
    assert Server("cpu").environment()["OMP_NUM_THREADS"] == "1"


# Models and datasets that are refused


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "without a tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "without a tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no model folder"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "generation_config.json").write_text("{}"), "no `do_sample: true`"),
    ],
)
def test_model_folder_is_refused(damage, text, tiny_model, tmp_path):
    """Pins a server that starts for minutes and fails, and greedy answers taken for sampled ones."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    serving.check_model(folder, "cpu", 0.65)
    damage(folder)
    with pytest.raises(DataError, match=text):
        serving.check_model(folder, "cpu", 0.65)


@pytest.mark.parametrize(
    ("end", "opening"),
    [
        ("", ""),
        ("<think>\n", "<think>\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<think> is a tag", ""),
    ],
)
def test_what_a_template_writes_of_the_turn(end, opening, tiny_model, tmp_path):
    """Pins: a thought that the template opened, without end in the response, read as the answer."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(end.replace("\n", "{{ '\\n' }}"))
    assert serving.turn_opening(folder) == opening
    for text, truncated, apart, judged in [
        ("a 7", False, False, "" if opening == "<think>\n" else "a 7"),
        ("a 7", True, False, "a 7" if "</think>" in opening else ""),
        ("a 7", True, True, "a 7"),  # the server took the thoughts out
        ("a</think>7", True, False, "7"),
        ("<think>7", False, False, ""),
    ]:
        assert answers.judged_text(text, opening, truncated, apart).strip() == judged


def test_greedy_needs_no_sampling_setting(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 258}')
    serving.check_model(folder, "cpu", 0.0)
    serving.check_model(folder, "gpu", 0.65)


def test_datasets_are_counted(datasets):
    """LiveCodeBench's window has both of its ends. Pins problems that are asked but not expected, or the other way."""
    counts = {name: check(BENCHMARKS[name], datasets / folder) for name, folder in FOLDERS.items()}
    assert counts == {"aime24": 3, "aime25": 3, "gpqa": 3, "livecodebenchv5": 3}


FOLDERS = {"aime24": "aime24", "aime25": "aime25", "gpqa": "gpqa", "livecodebenchv5": "lcb"}
PROBLEM = {"problem": "Find 1 + 1.", "answer": "2"}
OTHER = {"problem": "Find 1 + 2.", "answer": "3"}
A1 = "Incorrect Answer 1"
CHOICES = {"Question": "x", "Correct Answer": "a", A1: "b", "Incorrect Answer 2": "c", "Incorrect Answer 3": "d"}


@pytest.mark.parametrize(
    ("benchmark", "make", "text"),
    [
        ("aime24", lambda folder: None, "no such folder.*Needed: test.jsonl"),
        ("aime24", lambda folder: write_lines(folder / "train.jsonl", [PROBLEM]), "Found: train.jsonl"),
        ("aime24", lambda folder: write_lines(folder / "test.jsonl", []), "is empty"),
        (
            "aime25",
            lambda folder: write_lines(folder / "test.jsonl", [PROBLEM, {"problem": "x"}]),
            "line 2 has no answer",
        ),
        ("aime25", lambda folder: write_lines(folder / "test.jsonl", [{**PROBLEM, "answer": "1/2"}]), "is no integer"),
        (
            "gpqa",
            lambda folder: write_lines(folder / "train.jsonl", [{"Question": "x"}]),
            "line 1 has no Correct Answer",
        ),
        ("livecodebenchv5", lambda folder: write_lines(folder / "test.jsonl", [PROBLEM]), "Found: test.jsonl"),
        ("livecodebenchv5", lambda folder: write_livecodebench(folder, ["2023-01-01"]), "none of 1 problems is from"),
        (
            "aime24",
            lambda folder: write_lines(folder / "test.jsonl", [PROBLEM, OTHER, {**PROBLEM, "problem": "Find 1 +  1."}]),
            "problem 3 is problem 1 again",
        ),
        ("aime24", lambda folder: write_lines(folder / "test.jsonl", [PROBLEM]), "it holds one problem"),
        ("aime24", lambda folder: write_lines(folder / "test.jsonl", [[1]]), "line 1 is no JSON object"),
        (
            "gpqa",
            lambda folder: write_lines(folder / "train.jsonl", [CHOICES, {**CHOICES, "Correct Answer": "b", A1: "a"}]),
            "problem 2 is problem 1 again",
        ),
        (
            "livecodebenchv5",
            lambda folder: write_livecodebench(folder, ["2024-09-01"] * 2, same=True),
            "problem 2 is problem 1 again",
        ),
    ],
)
def test_dataset_of_another_form_is_refused(benchmark, make, text, tmp_path):
    """With what was found and what is needed. Pins a server started for nothing, a look at a hub, and problems that the
    report refuses, one alone or one twice, found when every answer had been paid for."""
    folder = tmp_path / "data"
    make(folder)
    with pytest.raises(DataError, match=f"(?s){text}"):
        check(BENCHMARKS[benchmark], folder)


# Resuming

SAMPLES, PROBLEMS = 2, 8


@pytest.fixture
def aime(tmp_path) -> Path:
    """Eight problems in AIME's form."""
    records = [{"problem": f"Find {n} + 7.", "answer": str(n + 7)} for n in range(PROBLEMS)]
    write_lines(tmp_path / "local/aime24/test.jsonl", records)
    return tmp_path / "local"


def start(script: str, evalscope: Path, local: Path, output: Path, *flags: str, **more: str) -> subprocess.Popen:
    """A script of scripts/eval under this interpreter; its output in files beside `output`."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "EVALSCOPE_PYTHON": str(evalscope),
        "DATASET_LOCAL": str(local),
        "OUTPUT": str(output),
        "INFIR2_BACKEND": "cpu",
        **more,
    }
    output.mkdir(parents=True, exist_ok=True)
    with (output / f"{script}.out").open("w") as out, (output / f"{script}.err").open("w") as err:
        command = ["bash", str(ROOT / f"scripts/eval/{script}.sh"), *flags]
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err)


def read_scores(folder: Path, benchmark: str) -> dict:
    return json.loads((folder / "scores.json").read_text())["benchmarks"][benchmark]["scores"]


def test_interrupted_run_asks_for_what_is_missing(evalscope, aime, counting_server, tmp_path):
    """Killed with SIGKILL after 5 answers, the last of them cut in mid-line: 12 of 16 are asked for again, no more.

    The score is that of the answers that the server gives, which is known. A third run asks nothing and starts no
    evalscope. Pins answers asked twice or left out, evalscope running on alone, and its refusal of another port.
    """
    flags = ("--samples", str(SAMPLES), "--temperature", "0", "--concurrency", "1", "--max-tokens", "32")
    settings = {"API_URL": counting_server.url, "MODEL_PATH": "any", "NAME": "one"}
    output = tmp_path / "out"

    counting_server.stall_after = 5
    first = start("aime24_eval", evalscope, aime, output, *flags, **settings)
    assert counting_server.stalled.wait(120), (output / "aime24_eval.err").read_text()[-3000:]
    first.kill()
    first.wait()
    assert wait_for(lambda: not alive(str(output / "aime24")))
    (predictions,) = (output / "aime24/one/evalscope/predictions").rglob("*.jsonl")
    text = predictions.read_bytes()
    assert text.count(b"\n") == 5
    predictions.write_bytes(text[:-40])

    counting_server.requests.clear()
    counting_server.stall_after = None
    other = CountingServer()  # the same behind another port, as a server of our own would be
    second = start("aime24_eval", evalscope, aime, output, *flags, **{**settings, "API_URL": other.url})
    assert second.wait(180) == 0, (output / "aime24_eval.err").read_text()[-3000:]
    assert len(other.requests) == PROBLEMS * SAMPLES - 4
    assert not counting_server.requests
    questions = [json.loads(line)["problem"] for line in (aime / "aime24/test.jsonl").read_text().splitlines()]
    right = sum(CountingServer.number(question) == index + 7 for index, question in enumerate(questions))
    assert 0 < right < PROBLEMS
    found = read_scores(output / "aime24/one/report", "aime24")
    assert found["one"]["average"]["value"] == pytest.approx(right / PROBLEMS)

    other.requests.clear()
    third = start("aime24_eval", Path("/absent"), aime, output, *flags, **{**settings, "API_URL": other.url})
    assert third.wait(60) == 0, (output / "aime24_eval.err").read_text()[-3000:]
    assert not other.requests
    other.http.shutdown()


ASKED = ("--samples", str(SAMPLES), "--temperature", "0", "--concurrency", "4", "--max-tokens", "32")


def asked(script: str, evalscope: Path, aime: Path, server: CountingServer, output: Path) -> tuple[int, str]:
    """Status and messages of an evaluation by `server`, whose address has a slash at its end."""
    settings = {"API_URL": f"{server.url}/", "MODEL_PATH": "any", "NAME": "one"}
    process = start(script, evalscope, aime, output, *ASKED, **settings)
    return process.wait(180), (output / f"{script}.err").read_text()


def test_what_a_server_refuses_is_no_answer(evalscope, aime, counting_server, tmp_path):
    """All refused ends with status 1, the server's words and no score. Pins: the text of a refusal (of a prompt that is
    too long, say) scored as the answer, and an evaluation of a server that refused everything: 0.0 %, status 0.

    The same server, well again but for two questions that it refuses once more, is asked for what is missing: these two
    are asked for again, and the score is that of the answers."""
    questions = [f"Find {n} + 7." for n in range(PROBLEMS)]
    counting_server.refusals = dict.fromkeys(questions, float("inf"))
    status, said = asked("aime24_eval", evalscope, aime, counting_server, tmp_path)
    assert status == 1, said[-3000:]
    assert "requests failed so far, the first with: http://" in said
    assert "answered 400" in said
    assert "maximum context length is 7 tokens" in said
    assert not list(tmp_path.rglob("scores.json"))
    assert not any(path.read_text() for path in tmp_path.rglob("predictions/**/*.jsonl"))

    counting_server.refusals = dict.fromkeys(questions[:2], 1)
    status, said = asked("aime24_eval", evalscope, aime, counting_server, tmp_path)
    assert status == 0, said[-3000:]
    assert "2 requests failed in pass 1" in said
    assert len(counting_server.requests) == PROBLEMS * SAMPLES
    right = sum(CountingServer.number(question) == index + 7 for index, question in enumerate(questions))
    found = read_scores(tmp_path / "aime24/one/report", "aime24")
    assert found["one"]["average"]["value"] == pytest.approx(right / PROBLEMS)


def test_thoughts_and_line_separators(evalscope, aime, counting_server, tmp_path):
    """Answers count after the end of thoughts alone, and may hold U+2028; run again, the evaluation is still finished.
    Pins: a thought cut at the maximum of tokens whose last number fits; a finished evaluation called damaged."""

    def reply(question: str) -> tuple[str, str]:
        number = int(question.split()[1])
        thought = f"thus\u2028\\boxed{{{number + 7}}}"
        return [
            (f"{thought}</think>So\u2028\\boxed{{{number + 7}}}.", "stop"),  # right
            (thought, "length"),
            (f"<think>{thought}", "stop"),
            (f"{thought}</think>So\x85\\boxed{{{number}}}.", "stop"),
        ][number % 4]

    counting_server.reply = reply
    for _ in range(2):
        status, said = asked("aime24_eval", evalscope, aime, counting_server, tmp_path)
        assert status == 0, said[-3000:]
        found = read_scores(tmp_path / "aime24/one/report", "aime24")["one"]
        assert found["average"]["value"] == pytest.approx(1 / 4)
        assert len(counting_server.requests) == PROBLEMS * SAMPLES


def folder_with(tmp_path: Path, predictions: str, reviews: str) -> evaluate.Model:
    model = evaluate.Model("one", "one", None, tmp_path / "one")
    for kind, text in (("predictions", predictions), ("reviews", reviews)):
        path = model.work_dir / kind / "one" / "aime24_default.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return model


def test_repair_drops_what_was_cut(tmp_path):
    """And the reviews of answers that are not there: evalscope would add another and the report would see two."""
    model = folder_with(tmp_path, '{"index": 0}\n{"index": 1}\n{"inde', '{"index": 2}\n{"index": 0}\n{"index": 1}')
    evaluate.repair(model)
    kept = {path.parts[-3]: path.read_text() for path in model.work_dir.rglob("*.jsonl")}
    assert kept == {"predictions": '{"index": 0}\n{"index": 1}\n', "reviews": '{"index": 0}\n'}
    assert evaluate.answers(model) == 2


def test_repair_drops_errors_and_keeps_line_separators(tmp_path):
    """Pins: a server's refusal that was written down as an answer and stays one; an answer with U+2028 in it counted
    twice, and refused as damaged."""
    answer = '{"index": 0, "model_output": {"choices": [{"stop_reason": "stop"}]}, "text": "a\u2028b\x85"}\n'
    errors = [
        '{"index": 1, "model_output": {"choices": [{"stop_reason": "model_length"}]}}\n',
        '{"index": 2, "model_output": {"choices": []}}\n',
        '{"index": 3, "model_output": {"choices": [{"stop_reason": "unknown"}]}}\n',
        '{"index": 4, "model_output": {"error": "gone"}}\n',
    ]
    reviews = "".join(f'{{"index": {index}, "text": "\u2028"}}\n' for index in range(5))
    model = folder_with(tmp_path, answer + "".join(errors), reviews)
    assert evaluate.answers(model) == 5
    evaluate.repair(model)
    assert evaluate.answers(model) == 1
    kept = {path.parts[-3]: path.read_text() for path in model.work_dir.rglob("*.jsonl")}
    assert kept == {"predictions": answer, "reviews": '{"index": 0, "text": "\u2028"}\n'}


def test_damage_elsewhere_is_refused(tmp_path):
    """Pins an answer that is dropped although nothing was cut."""
    model = folder_with(tmp_path, '{"index": 0}\n{"inde\n{"index": 2}\n', "")
    with pytest.raises(DataError, match="line 2 is damaged"):
        evaluate.repair(model)


@pytest.mark.parametrize("change", ["weights", "temperature", "dataset"])
def test_folder_of_another_request_is_refused(change, tiny_model, aime, tmp_path):
    """Pins a score put together from two models' answers, or from two settings'."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    words = [*"--benchmark aime24 --samples 2 --max-tokens 9 --top-p 1 --model".split(), f"one={folder}"]
    words += ["--dataset", str(aime / "aime24"), "--output", str(tmp_path / "out"), "--temperature"]

    def prepare(temperature: str) -> None:
        args = evaluate.parse([*words, temperature])
        (model,) = evaluate.find_models(args)
        task = evaluate.make_task(args, model)
        evaluate.open_folder(model, task, evaluate.make_request(args, model, task))

    prepare("0.5")
    prepare("0.5")
    if change == "weights":
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
    if change == "dataset":
        write_lines(aime / "aime24/test.jsonl", [PROBLEM, OTHER])
    where = {"weights": "model.model.safetensors", "temperature": "temperature", "dataset": "dataset.test.jsonl"}
    with pytest.raises(DataError, match=f"what differs: .*{where[change]}"):
        prepare("0.7" if change == "temperature" else "0.5")


def test_server_that_does_not_answer_is_refused(evalscope, aime, tmp_path):
    process = start("aime24_eval", evalscope, aime, tmp_path / "out", API_URL="http://127.0.0.1:9/v1", MODEL_PATH="x")
    assert process.wait(60) == 2
    assert (
        "no server completes a chat at API_URL=http://127.0.0.1:9/v1" in (tmp_path / "out/aime24_eval.err").read_text()
    )


def test_what_a_server_answers_to_a_question_is_shown(evalscope, tmp_path):
    """Pins "Error code: 503" and no more: the client's own error leaves out an answer that is no JSON."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(503, "the gate is shut")

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        program = f"""if True:
            import sys, openai, run_evalscope
            client = openai.OpenAI(base_url="http://127.0.0.1:{server.server_port}/v1", api_key="any", max_retries=0)
            run_evalscope.run_task = lambda _: client.chat.completions.create(model="any", messages=[])
            sys.argv += ["--ask", {str(tmp_path / "task.json")!r}]
            sys.exit(run_evalscope.main())
        """
        (tmp_path / "task.json").write_text(json.dumps({"work_dir": str(tmp_path), "datasets": ["aime24"]}))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tools:{ROOT}/training"}
        done = subprocess.run([evalscope, "-c", program], env=environment, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == 1, done.stderr
    assert f":{server.server_port}/v1/chat/completions answered 503: " in done.stderr
    assert "the gate is shut" in done.stderr


# End to end


def test_four_benchmarks_of_a_tiny_model(evalscope, datasets, tiny_model, tmp_path):
    """A real server, evalscope and the report, without a network: the first script with a server of its own, which
    ends with it; the others at the same time with one that runs. Pins a chain whose parts only fit on paper, and one
    that asks the web's proxy for a server on this machine."""
    flags = ("--samples", "2", "--max-tokens", "8")
    output = tmp_path / "out"
    proxy = {"ALL_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": "example.org"}
    own = start("aime24_eval", evalscope, datasets, output, *flags, MODEL_PATH=str(tiny_model), **proxy)
    assert own.wait(300) == 0, (output / "aime24_eval.err").read_text()[-3000:]
    assert not alive(str(output))
    sampling = {"temperature": 0.65, "top_p": 0.95}
    with serving.serving(Server("cpu"), [tiny_model], sampling, tmp_path / "log") as (url, _):
        more = {"MODEL_PATH": str(tiny_model), "API_URL": url, "NAME": "tiny", **proxy}
        scripts = ["aime25_eval", "gpqa_eval", "livecodebenchv5_eval"]
        running = {name: start(name, evalscope, datasets, output, *flags, **more) for name in scripts}
        for name, process in running.items():
            assert process.wait(300) == 0, (output / f"{name}.err").read_text()[-3000:]
    for name, benchmark in BENCHMARKS.items():
        found = read_scores(output / name / "tiny/report", benchmark.evalscope)["tiny"]
        assert (found["problems"], found["samples"]) == (3, 2)
        assert found["length"]["value"] <= 8
        assert (output / name / "tiny/report/scores.html").stat().st_size > 10_000
