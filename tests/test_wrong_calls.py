"""Wrong calls of the tools: one line that names what was wrong, and status 2; never a traceback."""

import importlib
import re
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
PROBLEMS = '{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "2"}\n'
TOKENIZER = {"tokenizer.json": "{}", "config.json": "{}"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the calls run: folders and files that are not what a tool expects."""
    contents = {
        "text": "x\n",
        "zero": "",
        "list/config.json": "[]",
        "object/config.json": "{}",
        "aime/test.jsonl": PROBLEMS,
        "damaged.json": '{"arms":',
        "cut/tokenizer_config.json": "{",
        "listed/tokenizer_config.json": "[]",
        "generation/tokenizer_config.json": '{"chat_template": "x"}',
        "generation/generation_config.json": "[",
    }
    for name in ("cut", "listed", "generation"):
        contents |= {f"{name}/{file}": text for file, text in TOKENIZER.items()}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOOLS))
    return tmp_path


EVALUATE = (
    "evaluate --benchmark aime24 --dataset aime --output out --samples 2 --max-tokens 9 --temperature 1 --top-p 1"
)
CALLS = {
    "bench_cast --folder text": "no room for a model below --folder text: .*File exists",
    "bench_cast --folder new --layers 0": "--layers: must be at least 1, found 0",
    "bench_cast --folder new --rounds 0": "--rounds: must be at least 1, found 0",
    "bench_data --tokenizer empty --pairs 0": "--pairs: must be at least 1, found 0",
    "bench_data --tokenizer empty": "empty/tokenizer.json does not exist",
    "side_by_side --run a log no-such-command": "a: .*No such file or directory: 'no-such-command'; give --run",
    "side_by_side --run a empty true": "a: .*Is a directory: 'empty'",
    "side_by_side --run a text/log true": "a: .*File exists: 'text'",
    "side_by_side --run a log 'echo": 'a: the command "\'echo" cannot be read: No closing quotation',
    "side_by_side --run a log ": "a: the command '' is empty",
    "generate --model none --prompt a": "none is not a folder; expected a Hugging Face model folder",
    "generate --model list --prompt a": "list/config.json holds JSON of type list; expected an object",
    "generate --model object --prompt a": "object holds neither model.safetensors nor",
    "generate --model object --prompt a --max-new-tokens 0": "must be at least 1, found 0",
    "plan --shape tiny --tensor-parallel 0": "--tensor-parallel: must be at least 1, found 0",
    "plan --shape tiny --layers 0": "--layers: must be at least 1, found 0",
    "plan --shape tiny --compare damaged.json": "damaged.json is not what tools/bench_step.py writes: JSONDecodeError",
    "plan --shape tiny --compare object/config.json": "config.json is not what .* writes: KeyError: 'arms'",
    "plan --shape tiny --compare list/config.json": "config.json is not what .* writes: TypeError",
    "bigram_baseline --data none": "none/manifest.json does not exist",
    "bigram_baseline --data zero": "zero/manifest.json cannot be read",
    "package_corpus --output text": "text/manifest.json cannot be read",
    "package_corpus --output text/x": "text/x was not made: .*File exists",
    "make_base_model --tokenizer empty --output-dir out": "empty holds no tokenizer",
    "answer_accuracy --model a=none --problems e=zero --output o --limit 0": "must be at least 1, found 0",
    "answer_accuracy --model a=none --problems e=zero --output o": "zero holds no problems",
    f"{EVALUATE} --model a=none --dry-run": "none is no model folder: it has no config.json",
    f"{EVALUATE} --model a=cut --dry-run": "cut/tokenizer_config.json cannot be read as JSON",
    f"{EVALUATE} --model a=listed --dry-run": "listed/tokenizer_config.json holds a list, not an object",
    f"{EVALUATE} --model a=generation --dry-run": "generation/generation_config.json cannot be read as JSON",
    f"{EVALUATE} --model a=cut --samples 0": "--samples: must be at least 1, found 0",
    f"{EVALUATE} --model a=cut --top-p 7": "--top-p: must be from 0 to 1, found 7",
    f"{EVALUATE} --api-url http://x/v1?key=2": "--api-url 'http://x/v1.key=2' is no address of a server; expected",
    f"{EVALUATE} --api-url localhost:8000": "--api-url 'localhost:8000' is no address of a server; expected http://",
    f"{EVALUATE} --api-url http://[::1/v1": "no server answers at API_URL=",
    f"{EVALUATE} --api-url http://127.0.0.1:9/v1//": "no server answers at API_URL=http://127.0.0.1:9/v1: ",
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_call(folder, monkeypatch, capsys, caplog, call):
    """Pins: tracebacks, and status 1, which says that a run broke, for what the user gave."""
    tool, *words = call.split(" ")
    monkeypatch.setattr(sys, "argv", [tool, *words])
    try:
        status = importlib.import_module(tool).main()
    except SystemExit as end:
        status = end.code
    assert status == 2
    lines = [*capsys.readouterr().err.strip().splitlines(), *caplog.messages]
    assert any(re.search(CALLS[call], line) for line in lines), lines
