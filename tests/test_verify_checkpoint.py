"""The checker of model folders finds each fault by name, and the record of the scale format refuses to be mixed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_hf_cast import (
    CONFIG,
    LINEAR,
    edit_config,
    read_folder,
    replace_tensor,
    set_scale,
    set_scale_format,
    to_bf16,
    to_fp8,
    weights,
    with_value,
    write_folder,
)
from trainer import FP8, train

from infir2 import fp8, hf, precision, receipts

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert_torch_dist_to_hf
import measure_numerics
import verify_checkpoint

BF16 = CONFIG | {"torch_dtype": "bfloat16"}
SCALES = LINEAR + "_scale_inv"


@pytest.fixture(autouse=True)
def no_scale_fmt_in_the_environment(monkeypatch):
    monkeypatch.delenv("SCALE_FMT", raising=False)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_folder(tmp_path / "model", weights(), BF16)


@pytest.fixture
def cast(model, tmp_path) -> Path:
    assert to_fp8(model, tmp_path / "fp8") == 0
    return tmp_path / "fp8"


def report_of(folder: Path, *flags: str) -> tuple[int, dict]:
    report = folder.parent / "report.json"
    status = verify_checkpoint.main(["--model", str(folder), "--report", str(report), "--workers", "1", *flags])
    return status, json.loads(report.read_text())


@pytest.mark.parametrize("scale_fmt", fp8.SCALE_FORMATS)
def test_right_models_have_no_fault(model, tmp_path, capsys, scale_fmt):
    """BF16, its FP8 cast and the cast back pass, each against where it came from, with the errors that belong there."""
    assert to_fp8(model, tmp_path / "fp8", "--scale-fmt", scale_fmt) == 0
    assert to_bf16(tmp_path / "fp8", tmp_path / "back") == 0
    assert report_of(model)[0] == 0
    capsys.readouterr()
    status, report = report_of(tmp_path / "fp8", "--source", str(model))
    assert (status, report["faults"]) == (0, [])
    assert "14 in FP8 with " + scale_fmt in capsys.readouterr().out
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows.keys() == weights().keys()
    for name, row in rows.items():
        assert row["differing"] == 0
        assert 0.024 < row["relative_error"] < 0.03 if hf.is_fp8_linear(name) else row["relative_error"] == 0
    assert report["summary"]["largest_relative_error"] == max(row["relative_error"] for row in rows.values())
    assert report_of(tmp_path / "back", "--source", str(tmp_path / "fp8"))[0] == 0


def test_fp32_source_is_rounded_once(tmp_path):
    """Pins codes of the FP32 masters themselves, 3 % of which differ: the reference is Q(BF16(source))."""
    source = write_folder(tmp_path / "fp32", weights(dtype=torch.float32))
    assert to_fp8(source, tmp_path / "fp8") == 0
    assert report_of(tmp_path / "fp8", "--source", str(source))[0] == 0
    codes, scale_inv = fp8.quantize(weights(dtype=torch.float32)[LINEAR], fp8.BLOCK)
    replace_tensor(tmp_path / "fp8", LINEAR, codes)
    replace_tensor(tmp_path / "fp8", SCALES, scale_inv)
    status, report = report_of(tmp_path / "fp8", "--source", str(source))
    assert status == 1
    assert "elements are not Q(BF16(source))" in report["faults"][0]


def flip_code(folder: Path) -> None:
    codes = read_folder(folder)[LINEAR].clone()
    codes.view(torch.uint8)[3, 5] ^= 1
    replace_tensor(folder, LINEAR, codes)


def set_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def set_quantisation(**changes) -> Callable[[Path], None]:
    return lambda folder: set_scale_format(folder, scale_fmt="ue8m0", **changes)


NORM = "model.norm.weight"
FAULTS = {
    "one code": (flip_code, f"{LINEAR!r}: 1 of 98310 elements are not Q(BF16(source))"),
    "one norm": (lambda f: replace_tensor(f, NORM, weights()[NORM] + 0.5), f"{NORM!r}: "),
    "NaN in a norm": (lambda f: replace_tensor(f, NORM, weights()[NORM] * torch.nan), f"{NORM!r} has nan at (0,)"),
    "NaN code": (
        lambda f: replace_tensor(f, LINEAR, with_value(read_folder(f)[LINEAR].float(), 1e9).to(torch.float8_e4m3fn)),
        f"{LINEAR!r} has nan at (200, 300)",
    ),
    "FP32 scale among powers of two": (lambda f: set_scale(f, 0.3), f"'{SCALES}' holds FP32 scales, but"),
    "infinite scale": (lambda f: set_scale(f, torch.inf), f"'{SCALES}' holds scales that are not positive"),
    "FP16 scales": (lambda f: replace_tensor(f, SCALES, torch.ones(2, 3).half()), "expected torch.float32"),
    "scales of another shape": (lambda f: replace_tensor(f, SCALES, torch.ones(3, 2)), "has shape (3, 2)"),
    "no scales": (lambda f: replace_tensor(f, SCALES, None), f"lacks '{SCALES}'"),
    "missing tensor": (lambda f: replace_tensor(f, NORM, None), f"lacks '{NORM}'"),
    "wrong dtype": (set_config(torch_dtype="float16"), "config.json says dtype float16, the tensors are torch.bfl"),
    "wrong shape": (set_config(intermediate_size=512), "implies"),
    "no quantization_config": (lambda f: edit_config(f, quantization_config=None), "has no quantization_config"),
    "static activations": (set_quantisation(activation_scheme="static"), "activation_scheme is 'static'"),
    "linear left out": (set_quantisation(modules_to_not_convert=["lm_head", "mlp"]), "names 'mlp', but"),
    "other training": (set_config(infir2={"trained_scale_fmt": "fp32"}), "training used fp32 ones"),
    "another dtype": (set_config(dtype="float32"), "config.json says dtype float32, the tensors are torch.bfl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(cast, caplog, fault):
    """Each fault ends in status 1 with its name, in the log and in the report. Pins a checker that says yes."""
    make, message = FAULTS[fault]
    make(cast)
    status, report = report_of(cast, "--source", str(cast.parent / "model"))
    assert status == 1
    assert any(message in found for found in report["faults"]), report["faults"]
    assert message in caplog.text


def test_no_model_is_refused(tmp_path, cast, caplog):
    """Pins status 1 for a call with a wrong path, as if a model had been checked."""
    assert verify_checkpoint.main(["--model", str(tmp_path / "gone")]) == 2
    assert verify_checkpoint.main(["--model", str(cast), "--source", str(tmp_path)]) == 2
    assert "is not a Hugging Face model folder" in caplog.text


MLP_KEEPS = {"precision": "fp8-mlp", "trained_scale_fmt": "pow2"}


@pytest.fixture
def deep(tmp_path) -> Path:
    """Four layers, trained in fp8-mlp."""
    config = BF16 | {"num_hidden_layers": 4, "infir2": MLP_KEEPS}
    return write_folder(tmp_path / "deep", weights(config), config)


def test_layers_that_training_kept_in_bf16_stay_there(deep, tmp_path, capsys):
    """Pins: a caster that makes FP8 of layers that were never trained in it, of which no engine is told."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert to_fp8(deep, tmp_path / "fp8") == 0
    status, report = report_of(tmp_path / "fp8", "--source", str(deep))
    assert (status, report["faults"], report["summary"]["fp8_tensors"]) == (0, [], 6)
    in_fp8 = {row["name"] for row in report["tensors"] if row["dtype"] == "float8_e4m3fn"}
    assert in_fp8 == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (1, 2) for part in ("gate", "up", "down")}
    left_out = hf.HFReader(tmp_path / "fp8").config["quantization_config"]["modules_to_not_convert"]
    for name in filter(hf.is_fp8_linear, weights(BF16 | {"num_hidden_layers": 4})):
        assert should_convert_module(name.removesuffix(".weight"), left_out) == (name in in_fp8)
    assert {"model.layers.0.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj"} <= set(left_out)  # SGLang's names
    assert to_bf16(tmp_path / "fp8", tmp_path / "back") == 0
    assert report_of(tmp_path / "back", "--source", str(tmp_path / "fp8"))[0] == 0


def test_the_precision_can_be_named(deep, tmp_path, caplog):
    """Pins: no way to say which layers stay in BF16 where config.json does not."""
    edit_config(deep, infir2=None)
    assert to_fp8(deep, tmp_path / "a", "--precision", "fp8-ffn") == 0
    assert report_of(tmp_path / "a", "--source", str(deep))[1]["summary"]["fp8_tensors"] == 12
    edit_config(deep, infir2=MLP_KEEPS | {"precision": "own"})
    assert to_fp8(deep, tmp_path / "b") == 2
    assert "infir2.precision is 'own'" in caplog.text
    edit_config(deep, infir2=MLP_KEEPS)
    assert to_fp8(deep, tmp_path / "c", "--precision", "fp8") == 0
    status, report = report_of(tmp_path / "c")
    assert status == 1
    assert "training in fp8-mlp kept it in BF16" in report["faults"][0]


def of_others(folder: Path, scales: torch.dtype, left_out: dict) -> None:
    """Make an FP8 folder one as Qwen and DeepSeek publish them: other types of scales, one layer in BF16."""
    for name, tensor in read_folder(folder).items():
        if name.endswith("_scale_inv"):
            replace_tensor(folder, name, tensor.to(scales))
    for name in (n for n in weights() if n.startswith("model.layers.1.self_attn") and hf.is_fp8_linear(n)):
        replace_tensor(folder, name, weights()[name])
        replace_tensor(folder, f"{name}_scale_inv", None)
    quantisation = json.loads((folder / "config.json").read_text())["quantization_config"]
    for key in ("scale_fmt", "modules_to_not_convert"):
        quantisation.pop(key, None)
    edit_config(folder, quantization_config=quantisation | left_out)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize(
    ("scale_fmt", "scales"), [("fp32", torch.bfloat16), ("fp32", torch.float32), ("pow2", torch.float8_e8m0fnu)]
)
def test_fp8_folders_of_others_are_read(model, tmp_path, caplog, key, scale_fmt, scales):
    """BF16 and E8M0 scales and some layers in BF16 are read, for what they mean. Pins a refusal of Qwen's and
    DeepSeek's own FP8 models."""
    folder = tmp_path / "fp8"
    assert to_fp8(model, folder, "--scale-fmt", scale_fmt) == 0
    kept = [f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"]
    of_others(folder, scales, {key: ["lm_head", *kept]})
    status, report = report_of(folder)
    assert (status, report["faults"], report["summary"]["scale_fmt"]) == (0, [], scale_fmt)
    assert report["summary"]["fp8_tensors"] == 10
    assert to_bf16(folder, tmp_path / "back") == 0
    back, stored = read_folder(tmp_path / "back"), read_folder(folder)
    wide = stored[SCALES].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(back[LINEAR], (stored[LINEAR].float() * wide[:256, :384]).bfloat16())
    assert torch.equal(back[f"{kept[0]}.weight"], weights()[f"{kept[0]}.weight"])
    assert report_of(tmp_path / "back", "--source", str(folder))[0] == 0
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=config | {key: ["lm_head"]})
    status, report = report_of(folder)
    assert status == 1
    assert "which is not FP8; engines would convert it" in report["faults"][0]


def test_all_zero_model(tmp_path, capsys):
    """Pins a division by zero."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    model = write_folder(tmp_path / "zero", zeros, BF16)
    assert to_fp8(model, tmp_path / "fp8") == 0
    assert "relative error of the FP8 weights 0.00%" in capsys.readouterr().out
    assert report_of(tmp_path / "fp8", "--source", str(model))[0] == 0
    assert to_bf16(tmp_path / "fp8", tmp_path / "back") == 0


def test_all_faults_are_reported(cast):
    """Pins a check that stops at the first of several faults."""
    flip_code(cast)
    replace_tensor(cast, NORM, weights()[NORM] + 0.5)
    report = report_of(cast, "--source", str(cast.parent / "model"))[1]
    assert len(report["faults"]) == 2


def test_total_size(tmp_path):
    """Pins an index whose total_size is that of another model, by which engines plan their memory."""
    folder = write_folder(tmp_path / "model", weights(), BF16, shards=3)
    assert report_of(folder)[0] == 0
    index = folder / hf.INDEX
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    status, report = report_of(folder)
    assert status == 1
    assert "says total_size 1" in report["faults"][0]


def test_logits(cast, caplog):
    """Logits of the dequantised model are the source's up to rounding, and an exchange of two tensors is seen."""
    source = ["--source", str(cast.parent / "model"), "--logits"]
    status, report = report_of(cast, *source)
    assert status == 0
    assert 0 < report["logits"]["relative_error"] < 0.3
    tensors = read_folder(cast)
    replace_tensor(cast, "model.embed_tokens.weight", tensors["model.embed_tokens.weight"].flip(0))
    status, report = report_of(cast, *source)
    assert status == 1
    assert "logits differ by" in caplog.text
    with pytest.raises(SystemExit):
        report_of(cast, "--logits")


# The scale format of training, recorded and refused


def record(folder: Path, trained: str | None) -> None:
    edit_config(folder, infir2={"trained_scale_fmt": trained, "iteration": 20, "weights": "masters"})


@pytest.mark.parametrize(("trained", "other"), [("pow2", "fp32"), ("fp32", "pow2")])
def test_cast_refuses_another_scale_format(model, tmp_path, caplog, monkeypatch, trained, other):
    """The recorded format is the default; the other one is refused with the error it would add, and can be forced.

    Pins weights served with scales that training never saw.
    """
    record(model, trained)
    assert to_fp8(model, tmp_path / "default") == 0
    assert hf.scale_format_of(hf.HFReader(tmp_path / "default").config) == trained
    assert to_fp8(model, tmp_path / "a", "--scale-fmt", other) == 2
    assert "relative weight error" in caplog.text
    assert "'model.layers.0.mlp.down_proj.weight': a second rounding, 2." in caplog.text
    assert "pass --allow-mixed-scales" in caplog.text
    assert not (tmp_path / "a").exists()
    assert to_fp8(model, tmp_path / "b", "--scale-fmt", other, "--allow-mixed-scales") == 0
    assert report_of(tmp_path / "b")[0] == 1
    assert report_of(tmp_path / "b", "--allow-mixed-scales")[0] == 0
    monkeypatch.setenv("SCALE_FMT", other)
    assert to_fp8(model, tmp_path / "c") == 2
    record(model, None)
    assert to_fp8(model, tmp_path / "d") == 0


def test_record_must_be_known(model, tmp_path, caplog):
    record(model, "e8m0")
    assert to_fp8(model, tmp_path / "out") == 2
    assert "trained_scale_fmt is 'e8m0'" in caplog.text


@pytest.mark.parametrize("trained", ["pow2", "fp32", None])
def test_export_records_the_run(tmp_path, trained):
    """What is recorded is run.json's scale format, the iteration, and which weights were taken."""
    iteration = tmp_path / "iter_0000020"
    iteration.mkdir()
    assert convert_torch_dist_to_hf.training_record(iteration, True) is None
    (tmp_path / "run.json").write_text(json.dumps({"scale_fmt": trained}))
    wanted = {"trained_scale_fmt": trained, "iteration": 20, "weights": "masters"}
    assert convert_torch_dist_to_hf.training_record(iteration, True) == wanted
    assert convert_torch_dist_to_hf.training_record(iteration, False) == wanted | {"weights": "model"}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        convert_torch_dist_to_hf.training_record(iteration, True)


@pytest.mark.parametrize("name", [*precision.PRECISIONS, "own"])
def test_export_records_which_layers_were_trained_in_bf16(tmp_path, name):
    """Pins: a caster that cannot know which layers were never trained in FP8."""
    words = precision.PRECISIONS["fp8-mlp" if name == "own" else name].flags
    value = dict(zip(words, (*words[1:], ""), strict=True))
    table = value.get("--te-precision-config-file")
    run = {
        "scale_fmt": None,
        "fp8": value.get("--fp8-format"),
        "fp8_recipe": value.get("--fp8-recipe", "delayed"),  # Megatron's default
        "first_last_layers_bf16": "--first-last-layers-bf16" in value,
        "te_precision_config": table and ("0" * 64 if name == "own" else receipts.sha256_file(Path(table))),
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert precision.of_run(run) == (None if name == "own" else name)
    record = convert_torch_dist_to_hf.training_record(tmp_path / "iter_0000020", True)
    assert record.get("precision") == {"fp8-mlp": "fp8-mlp", "fp8-ffn": "fp8-ffn", "own": "without a name"}.get(name)


def test_format_follows_the_weights(run_flags, tmp_path, caplog):
    """From a run with FP32 scales to its export to its FP8 model, without a word said about scales on the way."""
    run = tmp_path / "run"
    run.mkdir()
    environment = {"SCALE_FMT": "fp32", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    train(run_flags(run, *FP8, "--train-iters", "11", "--exit-interval", "1"), run / "log", **environment)
    config = BF16 | {
        "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 256
    }  # fmt: skip
    origin = write_folder(tmp_path / "origin", {"model.norm.weight": torch.ones(128)}, config)
    bfloat16 = convert_torch_dist_to_hf.DTYPES["bfloat16"]
    convert_torch_dist_to_hf.convert(run / "checkpoints", tmp_path / "hf", origin, bfloat16, "masters")
    wanted = {"trained_scale_fmt": "fp32", "iteration": 1, "weights": "masters"}
    assert hf.HFReader(tmp_path / "hf").config["infir2"] == wanted
    assert to_fp8(tmp_path / "hf", tmp_path / "refused", "--scale-fmt", "pow2") == 2
    assert "was trained in FP8 with fp32 scales, pow2 ones are asked for" in caplog.text
    assert to_fp8(tmp_path / "hf", tmp_path / "fp8") == 0
    status, report = report_of(tmp_path / "fp8", "--source", str(tmp_path / "hf"))
    assert (status, report["summary"]["scale_fmt"]) == (0, "fp32")


def test_measured_costs(tmp_path, capsys):
    """The tables of docs/numerics.md on a model's weights: one format twice adds nothing, two formats add about 3 %."""
    source = write_folder(tmp_path / "fp32", weights(dtype=torch.float32))
    assert measure_numerics.main(["--model", str(source)]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    mixed = {tuple(row[:2]): row[2:] for row in rows if len(row) == 4 and row[0] in fp8.SCALE_FORMATS}
    assert mixed["pow2", "pow2"] == mixed["fp32", "fp32"] == ["0.00%", "0.00%"]
    for pair in (("pow2", "fp32"), ("fp32", "pow2")):
        assert 2.5 < float(mixed[pair][0].rstrip("%")) < 3.0
    again = [row for row in rows if len(row) == 6 and row[1] == "pow2"]
    assert [row[-1] for row in again] == ["0.00%", "0.00%"]
