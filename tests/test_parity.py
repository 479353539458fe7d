"""tools/parity.py on pairs of runs made up here: every number in them is known, and each fault is put in on purpose."""

import importlib
import json
import math
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dist
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from infir2 import fp8
from infir2.precision import MLP_ONLY, flags
from infir2.receipts import sha256_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
parity = importlib.import_module("parity")

STEPS, LAYERS = 40, 2
POW2 = parity.Scheme(fp8.E4M3, fp8.BLOCK, "pow2")
FP32 = parity.Scheme(fp8.E4M3, fp8.BLOCK, "fp32")
SHAPES = {"self_attention.linear_qkv": (384, 128), "self_attention.linear_proj": (128, 128)}
SHAPES |= {"mlp.linear_fc1": (256, 128), "mlp.linear_fc2": (128, 128)}


def write_events(folder: Path, curves: dict[str, dict[int, float]], wall_time: float, suffix: str = "") -> None:
    """One event file, as each start of a run leaves one: an entry a second from `wall_time` on."""
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for tag, curve in curves.items():
        for step, value in curve.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=wall_time + step, summary=summary))
    writer.close()


def curves(held_out: float) -> dict[str, dict[int, float]]:
    """A run whose held-out loss ends at `held_out`, after 3 at half of its steps."""
    steps = range(1, STEPS + 1)
    return {
        "lm loss": {step: 5 - step / 32 for step in steps},
        "lm loss validation": {STEPS // 2: 3.0, STEPS: held_out},
        "grad-norm": {step: 1 + step / 64 for step in steps},
        "learning-rate": dict.fromkeys(steps, 0.125),
        "iteration-time": dict.fromkeys(steps[1:], 0.5),
    }


def weights() -> dict[str, torch.Tensor]:
    """Stacked layers as torch_dist holds them, in BF16."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"decoder.layers.{name}.weight": torch.randn(LAYERS, *shape, generator=generator).bfloat16()
        for name, shape in SHAPES.items()
    }


def facts_of(precision: str, folder: Path) -> dict:
    in_fp8 = precision != "bf16"
    data = {"train_data_path": [str(folder.parent / "data/train")], "valid_data_path": None}
    return {
        "stage": "pretraining",
        "train_iters": STEPS,
        "seed": 1236,
        "lr": 0.125,
        "num_layers": LAYERS,
        "hidden_size": 128,
        "padded_vocab_size": 256,
        "global_batch_size": 8,
        "seq_length": 128,
        "lr_decay_style": "cosine",
        "bf16": True,
        "fp8": "e4m3" if in_fp8 else None,
        "fp8_recipe": "blockwise" if in_fp8 else "delayed",
        "first_last_layers_bf16": False,
        "scale_fmt": "pow2" if in_fp8 else None,
        "te_precision_config": None,
        "backend": "cpu",
        "data": data,
        "data_manifests": {str(folder.parent / "data/train"): "aa11"},
        "parent": {"folder": "/elsewhere/base/release", "sha256": "cc33"},
    }


def write_run(folder: Path, precision: str, held_out: float, more: tuple[str, ...] = (), **changes) -> Path:
    """A run that has ended, as scripts/CPT leave one; `changes` go into run.json, `more` onto its command line."""
    in_fp8 = precision != "bf16"
    (folder / "checkpoints").mkdir(parents=True)
    write_facts(folder, facts_of(precision, folder) | changes)
    words = ["/elsewhere/bin/python", "-m", "infir2.pretrain", *flags(precision), "--micro-batch-size", "8"]
    words += ["--eval-interval", "20", "--save", str(folder / "checkpoints"), *more]
    (folder / "command.sh").write_text(" ".join(words))
    (folder / "commit").write_text("abc1234\n")
    said = f"backend cpu, {'FP8' if in_fp8 else 'BF16'}: {4 * LAYERS if in_fp8 else 0} of {4 * LAYERS}"
    (folder / "log.txt").write_text(f"[infir2] {said} linear layers in FP8\n")
    write_events(folder / "tensorboard", curves(held_out), 1000.0)
    if in_fp8:
        write_checkpoint(folder, weights())
    return folder


def write_facts(folder: Path, facts: dict) -> None:
    (folder / "checkpoints/run.json").write_text(json.dumps(facts))


def change_facts(folder: Path, **changes) -> None:
    path = folder / "checkpoints/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    place = folder / f"checkpoints/iter_{STEPS:07d}"
    torch_dist.save(tensors, checkpoint_id=str(place), no_dist=True)
    index = pickle.loads((place / ".metadata").read_bytes())
    index.storage_meta.checkpoint_id = None  # a Path, which Megatron's writer does not leave there
    (place / ".metadata").write_bytes(pickle.dumps(index))
    (place / "metadata.json").write_text("{}")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An FP8 run that ends at 2.2578125 nats, 1/128 above its BF16 twin at 2.25."""
    return write_run(tmp_path / "FP8", "fp8", 2.2578125), write_run(tmp_path / "BF16", "bf16", 2.25)


def run(pair: tuple[Path, Path], *more: str | Path) -> tuple[int, Path]:
    """Exit status and output folder."""
    output = pair[0].parent / "parity"
    words = ["--fp8", pair[0], "--bf16", pair[1], "--output", output, *more]
    return parity.main(list(map(str, words))), output


def refusal(pair: tuple[Path, Path], capsys, *more: str | Path) -> str:
    """The one line that a refused pair gets; nothing is written."""
    status, output = run(pair, *more)
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert (status, printed.out, len(errors), output.exists()) == (2, "", 1, False), printed
    return errors[0]


# Quantisation


def test_counts_by_hand():
    """Pins SNR over changes other than quantisation's, zeros counted as underflow, and rounding counted as a cut."""
    weight = torch.zeros(128, 256)
    # The left block's scale is 1: 440 becomes 448, 1.0625 (a tie) 1, and 2^-11 0.
    weight[0, :5] = torch.tensor([-448.0, 440.0, 1.0625, 1.0, 2.0**-11])
    weight[5, 200] = 3.0  # scale 128: 384, exactly
    found = parity.count(weight, POW2)
    assert (found.elements, found.nonzero, found.lost) == (128 * 256, 6, 1)
    assert (found.at_max, found.blocks, found.blocks_at_max) == (2, 2, 1)
    signal = 448**2 + 440**2 + 1.0625**2 + 1 + 2.0**-22 + 9
    noise = 64 + 0.0625**2 + 2.0**-22
    assert found.snr == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
    assert found.underflow == 1 / 6
    assert found.saturation == 2 / (128 * 256)


def e4m3(values: np.ndarray) -> np.ndarray:
    """Nearest E4M3 numbers, ties to even, in float64: written without infir2.fp8."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(values / step) * step, -448, 448)


@pytest.mark.parametrize("scheme", [POW2, FP32], ids=lambda scheme: scheme.scale_fmt)
def test_counts_agree_with_numpy(scheme):
    """Pins one scale for the whole weight, the other scale format, a skipped rounding to BF16, and ragged edges."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 1, 300)
    exact = weight.bfloat16().double().numpy()
    used, at_max = np.empty_like(exact), 0
    for top in range(0, 200, 128):
        for left in range(0, 300, 128):
            block = exact[top : top + 128, left : left + 128]
            scale = 448 / np.abs(block).max()
            scale = 2 ** np.floor(np.log2(scale)) if scheme.scale_fmt == "pow2" else float(np.float32(scale))
            codes = e4m3(block * scale)
            at_max += int((np.abs(codes) == 448).sum())
            used[top : top + 128, left : left + 128] = codes / scale
    found = parity.count(weight, scheme)
    assert found.snr == pytest.approx(10 * math.log10((exact**2).sum() / ((used - exact) ** 2).sum()), abs=1e-4)
    assert found.lost == int(((used == 0) & (exact != 0)).sum()) > 0
    assert (found.at_max, found.blocks) == (at_max, 6)
    assert found.blocks_at_max == 6 or scheme is POW2  # FP32 scales bring every block's largest element there


def test_counts_add_up():
    """Pins a layer's SNR as a mean of decibels: sums are added, and a weight that is exact in FP8 has no SNR."""
    rough, exact = torch.full((128, 128), 1.0625), torch.full((128, 128), 16.0)
    rough[0, 0] = 448.0
    one, other = parity.count(rough, POW2), parity.count(exact, POW2)
    assert other.snr is None
    both = one + other
    assert both.snr == pytest.approx(10 * math.log10((one.signal + other.signal) / one.noise))
    assert both.elements == 2 * 128 * 128


# The gate and the noise


def evaluation(gap: float, noise: float | None, step: int = 40):
    return parity.Evaluation(step, 2.0 + gap, 2.0, None if noise is None else 2.0 - noise)


@pytest.mark.parametrize(("gap", "within"), [(0.0099, True), (0.0101, False), (-0.5, True), (0.5, False)])
def test_the_gate(gap, within):
    """Pins a gate on the magnitude, where a better FP8 run would fail, and one in per cent."""
    last = evaluation(gap, None)
    assert parity.within_gate(last) is within
    words = parity.gate_words(last)
    assert words.startswith("Within the gate" if within else "Above the gate")
    assert ("below BF16's" in words) == (gap < 0)


def test_a_loss_below_the_limit_is_said():
    """Pins a pass at a loss of 0.004 nats shown as if it were one at 2."""
    assert "the gate says little" in parity.gate_words(parity.Evaluation(40, 0.006, 0.004, None))
    assert "the gate says little" not in parity.gate_words(evaluation(0.006, None))


@pytest.mark.parametrize(
    ("noises", "said", "unsaid"),
    [
        ((None, None), "noise is unknown: no second BF16 seed", "one draw"),
        ((0.001, 0.002), "gap is above the seeds' noise: two BF16 seeds end 0.0020", "more than the gap"),
        ((0.001, 0.02), "gap is not above the seeds' noise: two BF16 seeds end 0.0200", "At step"),
        ((0.03, 0.002), "At step 20 they were 0.0300 apart, more than the gap at the end", "unknown"),
    ],
)
def test_the_noise(noises, said, unsaid):
    """Pins no second seed read as no noise, and one lucky evaluation read as the noise's size."""
    words = parity.noise_words([evaluation(0.005, noises[0], 20), evaluation(0.005, noises[1])])
    assert said in words
    assert unsaid not in words
    assert ("one draw" in words) == (noises[0] is not None)


def test_a_negative_gap_is_held_against_the_noise():
    """Pins a comparison of signed gaps, by which an FP8 run far below BF16 is always inside the noise."""
    assert "gap is above the seeds' noise" in parity.noise_words([evaluation(-0.05, 0.01)])


# The report


def test_a_pair_within_the_gate(pair, tmp_path, capsys):
    """Pins wrong runs in columns, the gap's sign, the evaluation taken as final, and a curve that lost its steps."""
    second = write_run(tmp_path / "SEED", "bf16", 2.2421875, ("--seed", "7"), seed=7)
    status, output = run(pair, "--bf16-seed", second)
    content = json.loads((output / "parity.json").read_text())
    assert (status, content["gate"]["gap_nats"], content["gate"]["noise_nats"]) == (0, 1 / 128, 1 / 128)
    assert [one["gap"] for one in content["evaluations"]] == [0.0, 1 / 128]
    assert [one["label"] for one in content["runs"]] == ["FP8", "BF16", "BF16, second seed"]
    assert content["runs"][0]["grad_norm"]["32"] == 1.5
    last = [[run["loss"][str(step)] for step in range(STEPS - 3, STEPS + 1)] for run in content["runs"][:2]]
    assert content["training_gap_nats"] == {"steps": 4, "mean": pytest.approx(np.mean(last[0]) - np.mean(last[1]))}
    assert content["commands"]["other"] == []
    assert [flag for flag, _, _ in content["commands"]["precision"]] == ["--fp8-format", "--fp8-recipe"]
    assert len(content["weights"]["layers"]) == 4 * LAYERS
    markdown = (output / "parity.md").read_text()
    assert markdown == capsys.readouterr().out
    assert "| 40 | 2.2578 | 2.2500 | +0.0078 | 2.2422 | 0.0078 |" in markdown
    assert "- precision alone differs: **yes**" in markdown
    assert "Activations and gradients are not measured" in markdown
    assert "Memory was not recorded" in markdown
    assert "+ --fp8-format e4m3\n+ --fp8-recipe blockwise\n" in markdown
    assert (output / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_without_weights(pair):
    """Pins a report that dies, or shows an SNR that was not measured, where the checkpoints are gone."""
    shutil.rmtree(pair[0] / f"checkpoints/iter_{STEPS:07d}")
    assert run(pair)[0] == 2
    status, output = run(pair, "--no-weights")
    content = json.loads((output / "parity.json").read_text())
    assert (status, content["weights"]) == (0, {})
    for name in ("parity.md", "parity.html"):
        assert not re.search("SNR|saturation", (output / name).read_text(), re.IGNORECASE)


def test_the_weights_are_those_of_each_layer(pair):
    """Pins every layer measured on the first one's weights: each equals its own tensor, counted alone."""
    _, output = run(pair)
    layers = json.loads((output / "parity.json").read_text())["weights"]["layers"]
    for entry in layers:
        weight = weights()[f"decoder.layers.{entry['module']}.weight"][entry["layer"]]
        assert entry["snr_db"] == parity.count(weight, POW2).snr
    assert len({entry["snr_db"] for entry in layers}) == len(layers)


def test_the_page_stands_alone(pair):
    """Pins scripts, fetches, and words of a run's files that become markup."""
    path = pair[0] / "command.sh"
    path.write_text(path.read_text() + " --wandb-exp-name '<script>alert(1)</script>'")
    _, output = run(pair)
    page = (output / "parity.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert set(re.findall(r"https?://[^\"' ]*", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in page
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_a_pair_above_the_gate(tmp_path):
    """Pins a report that ends well whatever it found."""
    pair = write_run(tmp_path / "FP8", "fp8", 2.3), write_run(tmp_path / "BF16", "bf16", 2.25)
    status, output = run(pair)
    assert status == 1
    assert json.loads((output / "parity.json").read_text())["gate"]["within"] is False


def test_another_flag_is_not_precision(tmp_path):
    """Pins "precision alone differs" said of runs that another flag tells apart; of a repeated flag the last counts."""
    more = ("--micro-batch-size", "4", "--lr-warmup-iters", "3")
    pair = write_run(tmp_path / "FP8", "fp8", 2.25, more), write_run(tmp_path / "BF16", "bf16", 2.25, more[2:])
    status, output = run(pair)
    content = json.loads((output / "parity.json").read_text())
    assert status == 1
    assert content["commands"]["other"] == [["--micro-batch-size", "4", "8"]]
    assert "precision alone differs: **no** (differing: --micro-batch-size)" in (output / "parity.md").read_text()


def test_another_commit_is_not_precision(pair):
    """Pins runs of different code that pass as twins."""
    (pair[1] / "commit").write_text("fffffff\n")
    status, output = run(pair)
    assert status == 1
    assert "differing: commit" in (output / "parity.md").read_text()


def test_memory_and_time_of_two_starts(pair):
    """Pins the last value taken for the peak, a break between two starts counted as time, MiB taken for MB."""
    folder = pair[1] / "tensorboard"
    write_events(folder, {"mem-max-allocated-bytes": {1: 3e9, 5: 2e9}}, 9000.0, ".later")
    (pair[0] / "log.txt").write_text(
        "[Rank 0] memory (MB) | allocated: 1.00 | max allocated: 1000.00 | reserved: 9.0\n"
    )
    found = [parity.read_run("run", one) for one in pair]
    assert [one.peak_bytes for one in found] == [1000 * 2**20, 3e9]
    assert [one.memory_source.split(",")[0] for one in found] == ["log.txt", "TensorBoard"]
    # A file's first entry is its version, written as the file is opened: now, in a test.
    assert found[1].starts == 2
    assert found[0].starts == 1
    times = {1000.0: [10.0, 13.5], 9000.0: [70.0, 75.0]}

    class Loader:
        def __init__(self, path):
            self.times = times[9000.0 if path.endswith(".later") else 1000.0]

        def Load(self):
            return [Event(wall_time=time) for time in self.times]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorboard.backend.event_processing.event_file_loader.EventFileLoader", Loader)
        assert parity.wall_seconds(folder) == (8.5, 2)


def test_a_cpu_has_no_peak():
    """Pins the 0 that Megatron prints on a CPU shown as a measurement."""
    assert parity.peak_memory({}, "memory (MB) | allocated: 0.00 | max allocated: 0.00 | x")["peak_bytes"] is None


# Refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.25}, "lr is 0.125, and 0.25"),
        ({"seed": 7}, "seed is 1236, and 7"),
        ({"hidden_size": 256}, "hidden_size is 128, and 256"),
        ({"stage": "fine-tuning"}, "stage is pretraining"),
        ({"backend": "gpu"}, "backend is cpu, and gpu"),
        ({"fp8": "e4m3"}, "is no BF16 run: fp8 e4m3"),
        ({"bf16": False}, "is no BF16 run"),
        ({"train_iters": 80}, "has not ended: its last held-out loss is of step 40, of 80"),
        ({"parent": None}, "began from /elsewhere/base/release, the other from random weights"),
    ],
)
def test_runs_that_are_not_twins(pair, capsys, changes, said):
    """Pins each way in which two runs compared would say nothing of precision."""
    change_facts(pair[1], **changes)
    assert said in refusal(pair, capsys)


def test_data_is_known_by_its_receipt(pair, capsys):
    """Pins the same data elsewhere refused, and other data under the same path let through."""
    moved = {"data": {"train_data_path": ["/other/train"], "valid_data_path": None}}
    change_facts(pair[1], **moved, data_manifests={"/other/train": "aa11"})
    assert run(pair)[0] == 0
    shutil.rmtree(pair[0].parent / "parity")
    capsys.readouterr()
    change_facts(pair[1], **moved, data_manifests={"/other/train": "bb22"})
    assert "not twins: data is" in refusal(pair, capsys)
    other_split = {"data": {"train_data_path": ["/other/valid"], "valid_data_path": None}}
    change_facts(pair[1], **other_split, data_manifests={"/other/valid": "aa11"})
    assert "not twins: data is" in refusal(pair, capsys)


def test_other_held_out_batches(pair, capsys):
    """Pins losses over different text compared."""
    path = pair[1] / "command.sh"
    path.write_text(path.read_text() + " --eval-iters 3")
    assert "--eval-iters is not given, and 3" in refusal(pair, capsys)


def test_another_schedule_that_run_json_does_not_hold(pair, capsys):
    """Pins schedules that only the learning rate of the steps tells apart."""
    write_events(pair[1] / "tensorboard", {"learning-rate": {9: 0.0625}}, 9000.0, ".later")
    assert "the learning rate of step 9 is 0.125, and 0.0625" in refusal(pair, capsys)


@pytest.mark.parametrize("tag", ["lm loss", "lm loss validation", "grad-norm"])
def test_a_loss_that_is_no_number(pair, capsys, tag):
    """Pins NaN, which is neither above the gate nor within it."""
    write_events(pair[0] / "tensorboard", {tag: {STEPS: math.nan}}, 9000.0, ".later")
    assert f"'{tag}' is nan at step 40" in refusal(pair, capsys)


def test_the_two_runs_swapped(pair, capsys):
    """Pins a gap with its sign turned around."""
    assert "was not trained in FP8: 0 of 8 linear layers" in refusal(pair[::-1], capsys)


def test_flags_that_asked_for_fp8_in_vain(pair, capsys):
    """Pins FP8 believed of a run that said it ran none."""
    (pair[0] / "log.txt").write_text("[infir2] backend cpu, FP8: 0 of 8 linear layers in FP8\n")
    assert "was not trained in FP8" in refusal(pair, capsys)


def test_a_second_seed_that_is_the_first(pair, tmp_path, capsys):
    """Pins noise of 0 from a run compared with itself, and a second seed that differs in more."""
    assert "has the seed of" in refusal(pair, capsys, "--bf16-seed", pair[1])
    other = write_run(tmp_path / "SEED", "bf16", 2.25, seed=7, lr=0.5)
    assert "lr is 0.125, and 0.5" in refusal(pair, capsys, "--bf16-seed", other)


@pytest.mark.parametrize(
    "name", ["checkpoints/run.json", "command.sh", "commit", "tensorboard", "checkpoints/iter_0000040"]
)
def test_a_part_that_is_missing(pair, capsys, name):
    """Pins a traceback, or a report without a part, where a run's folder is not whole."""
    path = pair[0] / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert path.name in refusal(pair, capsys)


def test_run_json_that_is_cut(pair, capsys):
    """Pins a traceback where a file is damaged."""
    (pair[1] / "checkpoints/run.json").write_text('{"train_iters": 4')
    assert f"{pair[1]} cannot be read" in refusal(pair, capsys)


def test_a_weight_that_is_no_number(pair, capsys):
    """Pins an SNR of NaN in the JSON."""
    broken = weights()
    broken["decoder.layers.mlp.linear_fc2.weight"][1, 3, 4] = math.nan
    shutil.rmtree(pair[0] / f"checkpoints/iter_{STEPS:07d}")
    write_checkpoint(pair[0], broken)
    assert "decoder.layers.1.mlp.linear_fc2.weight" in refusal(pair, capsys)


# Chains of stages


def chain(tmp_path: Path, **changes) -> tuple[Path, Path]:
    """A pair whose runs began from parents of their own, which are twins but for `changes` in BF16's."""
    found = []
    for precision, held_out in (("fp8", 2.25), ("bf16", 2.25)):
        parent = tmp_path / f"{precision}_stage1"
        (parent / "checkpoints").mkdir(parents=True)
        write_facts(parent, facts_of(precision, parent) | (changes if precision == "bf16" else {}))
        start = {"folder": str(parent / "checkpoints/iter_0000300"), "sha256": precision}
        found.append(write_run(tmp_path / f"{precision}_stage2", precision, held_out, parent=start))
    return found[0], found[1]


def test_parents_that_are_twins(tmp_path):
    """Pins a second stage refused for its parent, and one whose page does not say that the gap is the chain's."""
    status, output = run(chain(tmp_path))
    assert status == 0
    assert "the gap is the chain's" in (output / "parity.md").read_text()


def test_parents_that_have_moved(tmp_path):
    """Pins parents looked for only where they were trained."""
    chain(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    pair = tmp_path / "new/fp8_stage2", tmp_path / "new/bf16_stage2"
    for folder in pair:  # the data is known by its receipt alone
        assert json.loads((folder / "checkpoints/run.json").read_text())["parent"]["folder"].startswith(
            str(tmp_path / "old")
        )
    assert run(pair)[0] == 0


def test_parents_that_are_not_twins(tmp_path, capsys):
    """Pins a difference of an earlier stage counted as precision's."""
    assert "of their parents, lr is 0.125, and 0.5" in refusal(chain(tmp_path, lr=0.5), capsys)


def test_parents_that_are_gone(tmp_path):
    """Pins "precision alone differs" where that cannot be known."""
    pair = chain(tmp_path)
    shutil.rmtree(tmp_path / "bf16_stage1")
    status, output = run(pair)
    assert status == 1
    assert "the parents' run.json is gone" in (output / "parity.md").read_text()


# Which layers are in FP8


def test_layers_that_stay_in_bf16(tmp_path):
    """Pins weights that were never quantised shown with an SNR."""
    by_module = {"te_precision_config": sha256_file(MLP_ONLY), "first_last_layers_bf16": True, "num_layers": 4}
    folder = write_run(tmp_path / "FP8", "fp8-mlp", 2.25, **by_module)
    (folder / "log.txt").write_text("[infir2] backend cpu, FP8: 4 of 16 linear layers in FP8\n")
    found = parity.linears_in_fp8(parity.read_run("FP8", folder))
    assert found == [(1, "fc1"), (1, "fc2"), (2, "fc1"), (2, "fc2")]
    (folder / "log.txt").write_text("[infir2] backend cpu, FP8: 8 of 16 linear layers in FP8\n")
    with pytest.raises(parity.ReportError, match="has 8 linear layers in FP8, its flags say 4"):
        parity.linears_in_fp8(parity.read_run("FP8", folder))
    change_facts(folder, te_precision_config="another file")
    with pytest.raises(parity.ReportError, match="which layers were in FP8 is not known"):
        parity.linears_in_fp8(parity.read_run("FP8", folder))


def test_schemes():
    """Pins gradients' E5M2 taken for the weights', blocks for a whole tensor's scale, and an unknown recipe guessed."""
    hybrid = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "scale_fmt": "fp32"}
    assert parity.scheme_of(hybrid) == parity.Scheme(fp8.E4M3, fp8.TENSOR, "fp32")
    with pytest.raises(parity.ReportError, match="mxfp8"):
        parity.scheme_of(hybrid | {"fp8_recipe": "mxfp8"})
