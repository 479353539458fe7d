"""The casters and the folders they read and write: right, or refused by name with nothing left behind."""

import errno
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infir2 import files, fp8, hf

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bf16_cast_fp8
import fp8_cast_bf16

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
SIDE_FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"do_sample": true}',
    "added_tokens.json": "{}",
    "modeling_custom.py": "x = 1",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
}
LINEAR = "model.layers.1.mlp.down_proj.weight"


def weights(config: dict = CONFIG, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Seeded weights of a tiny Qwen2, with shapes written out here and not taken from the code under test."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = 128 * config["num_attention_heads"]
    kv = 128 * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        layer |= {"self_attn.q_proj.weight": (q, h), "self_attn.q_proj.bias": (q,), "self_attn.o_proj.weight": (h, q)}
        layer |= {"self_attn.k_proj.weight": (kv, h), "self_attn.k_proj.bias": (kv,)}
        layer |= {"self_attn.v_proj.weight": (kv, h), "self_attn.v_proj.bias": (kv,)}
        layer |= {"mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h), "mlp.down_proj.weight": (h, f)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(1)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def write_folder(path: Path, tensors: dict[str, torch.Tensor], config: dict = CONFIG, shards: int = 1) -> Path:
    """A Hugging Face folder by the safetensors library alone."""
    path.mkdir()
    for name, text in SIDE_FILES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def read_folder(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def to_fp8(source: Path, target: Path, *flags: str) -> int:
    return bf16_cast_fp8.main(["--input-bf16-hf-path", str(source), "--output-fp8-hf-path", str(target), *flags])


def to_bf16(source: Path, target: Path, *flags: str) -> int:
    return fp8_cast_bf16.main(["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(target), *flags])


@pytest.fixture(autouse=True)
def no_scale_fmt_in_the_environment(monkeypatch):
    monkeypatch.delenv("SCALE_FMT", raising=False)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_folder(tmp_path / "model", weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_fmt", fp8.SCALE_FORMATS)
def test_cast_holds_the_codes_of_the_bf16_weights(tmp_path, dtype, scale_fmt):
    """Pins Q(bf16(master)): quantising FP32 masters themselves changes 3 % of the codes. And norms stay BF16."""
    tensors = weights(dtype=dtype)
    source = write_folder(tmp_path / "model", tensors)
    assert to_fp8(source, tmp_path / "fp8", "--scale-fmt", scale_fmt) == 0
    result = read_folder(tmp_path / "fp8")
    linears = [n for n in tensors if n.startswith("model.layers") and n.endswith("proj.weight")]
    assert set(result) == set(tensors) | {n + "_scale_inv" for n in linears}
    for name, tensor in tensors.items():
        bf16 = tensor.to(torch.bfloat16)
        if name in linears:
            codes, scale_inv = fp8.quantize(bf16, fp8.BLOCK, scale_fmt=scale_fmt)
            assert torch.equal(result[name].view(torch.uint8), codes.view(torch.uint8))
            assert result[name + "_scale_inv"].dtype == torch.float32
            assert torch.equal(result[name + "_scale_inv"], scale_inv)
        else:
            assert result[name].dtype == torch.bfloat16
            assert torch.equal(result[name], bf16)


def test_folder_is_complete(model, tmp_path, capsys):
    """Pins tokenizer and template files left out, stray weights copied along, and a config of the wrong dtype."""
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    (model / ".gitattributes").write_text("*.bin lfs")
    assert to_fp8(model, tmp_path / "fp8") == 0
    out = capsys.readouterr().out
    assert "14 tensors in FP8 E4M3 with pow2 scales, 12 in BF16" in out
    assert "verified, relative error of the FP8 weights 2.6" in out
    files = {str(f.relative_to(tmp_path / "fp8")) for f in (tmp_path / "fp8").rglob("*") if f.is_file()}
    assert files == {*SIDE_FILES, "config.json", "model.safetensors"}
    for name, text in SIDE_FILES.items():
        assert (tmp_path / "fp8" / name).read_text() == text
    with safe_open(tmp_path / "fp8" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
        "scale_fmt": "ue8m0",
    }
    assert config == CONFIG | {"torch_dtype": "bfloat16"}


def test_power_of_two_cast_there_and_back_moves_no_value(model, tmp_path):
    """Pins pow2 -> BF16 -> pow2 as lossless: all values equal, and all codes but where a block's largest is 224."""
    assert to_fp8(model, tmp_path / "fp8") == to_bf16(tmp_path / "fp8", tmp_path / "bf16") == 0
    assert to_fp8(tmp_path / "bf16", tmp_path / "again") == 0
    first, bf16, again = (read_folder(tmp_path / n) for n in ("fp8", "bf16", "again"))
    assert set(bf16) == set(weights())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    for name in filter(hf.is_fp8_linear, bf16):
        scale = name + "_scale_inv"
        values = fp8.dequantize(first[name], first[scale], fp8.BLOCK)
        assert torch.equal(values, bf16[name].float())
        assert torch.equal(values, fp8.dequantize(again[name], again[scale], fp8.BLOCK))
        for i, j in torch.cartesian_prod(*map(torch.arange, first[scale].shape)).tolist():
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            largest = first[name][block].float().abs().max()
            same = torch.equal(first[name][block].view(torch.uint8), again[name][block].view(torch.uint8))
            assert same == (largest != 224)
            assert again[scale][i, j] == first[scale][i, j] / (1 if same else 2)
    assert to_bf16(tmp_path / "again", tmp_path / "bf16 again") == 0
    for name, tensor in read_folder(tmp_path / "bf16 again").items():
        assert torch.equal(tensor, bf16[name])


def test_fp32_scales_come_back_within_one_bf16_rounding(model, tmp_path):
    """Pins the scale format's way through config.json: FP32 scales have no scale_fmt and are read as such."""
    assert to_fp8(model, tmp_path / "fp8", "--scale-fmt", "fp32") == 0
    assert "scale_fmt" not in json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert to_bf16(tmp_path / "fp8", tmp_path / "bf16") == 0
    first, bf16 = read_folder(tmp_path / "fp8"), read_folder(tmp_path / "bf16")
    exact = fp8.dequantize(first[LINEAR], first[LINEAR + "_scale_inv"], fp8.BLOCK)
    assert torch.equal(bf16[LINEAR], exact.to(torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_one_file_give_the_same(tmp_path, tied):
    """Pins single-file input, which the original refused, and a head that is tied or its own."""
    config = CONFIG | {"tie_word_embeddings": tied}
    tensors = weights(config)
    single = write_folder(tmp_path / "single", tensors, config)
    sharded = write_folder(tmp_path / "sharded", tensors, config, shards=3)
    assert to_fp8(single, tmp_path / "a") == to_fp8(sharded, tmp_path / "b", "--workers", "3", "--no-verify") == 0
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert set(a) == set(b)
    assert ("lm_head.weight" in a) != tied
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def test_writer_shards_and_indexes_as_hugging_face(model, tmp_path):
    """Pins shards numbered from 0, a stale total_size, and entries missing from the index."""
    reader = hf.HFReader(model)
    with hf.HFWriter(tmp_path / "out", like=reader, shard_bytes=200_000) as writer:
        for name in reader.names:
            writer.add(name, reader.tensor(name))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    expected = weights()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert set(index["weight_map"]) == set(expected)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], expected[name])
    sizes = {file: sum(expected[n].nbytes for n, f in index["weight_map"].items() if f == file) for file in files}
    assert all(size <= 200_000 or list(index["weight_map"].values()).count(f) == 1 for f, size in sizes.items())
    again = hf.HFReader(tmp_path / "out")
    assert set(again.names) == set(expected)


@pytest.mark.parametrize("scale_fmt", fp8.SCALE_FORMATS)
def test_a_model_of_zeros_is_cast(tmp_path, scale_fmt):
    """Pins a traceback, a division by the size of the weights, at the end of the cast."""
    source = write_folder(tmp_path / "model", {name: torch.zeros_like(tensor) for name, tensor in weights().items()})
    assert to_fp8(source, tmp_path / "fp8", "--scale-fmt", scale_fmt) == 0
    assert to_bf16(tmp_path / "fp8", tmp_path / "bf16") == 0
    assert not any(tensor.any() for tensor in read_folder(tmp_path / "bf16").values())


def test_wrong_codes_are_found(model, tmp_path, monkeypatch, caplog):
    """Pins a caster whose codes do not mean the weight: one block's scale off by two is refused by name."""
    right = fp8.quantize

    def wrong(x, *args, **kwargs):
        codes, scale_inv = right(x, *args, **kwargs)
        scale_inv[0, -1] *= 2
        return codes, scale_inv

    monkeypatch.setattr(fp8, "quantize", wrong)
    assert to_fp8(model, tmp_path / "out") == 2
    assert "is off by" in caplog.text
    assert not (tmp_path / "out").exists()


def test_writer_keeps_data_aligned(tmp_path):
    """Pins an FP32 tensor behind an odd number of BF16 ones, which torch cannot map from the file."""
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.arange(5.0),
        "c": torch.ones(7).to(torch.float8_e5m2),
    }
    with hf.HFWriter(tmp_path / "out") as writer:
        writer.config["quantization_config"] = {}
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    reader = hf.HFReader(tmp_path / "out")
    assert all(torch.equal(reader.tensor(n).float(), t.float()) for n, t in tensors.items())


def test_header_that_is_full_starts_a_shard(tmp_path):
    """Pins the room reserved for the header: many small tensors must not run over it into the data."""
    with hf.HFWriter(tmp_path / "out") as writer:
        for i in range(2000):
            writer.add(f"a.rather.long.name.of.a.tensor.{i}", torch.full((2,), i, dtype=torch.float32))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    tensors = read_folder(tmp_path / "out")
    assert all(torch.equal(tensors[name], torch.full((2,), float(name.split(".")[-1]))) for name in tensors)
    assert list(hf.HFReader(tmp_path / "out").names) == [f"a.rather.long.name.of.a.tensor.{i}" for i in range(2000)]


@pytest.mark.parametrize("scale_fmt", fp8.SCALE_FORMATS)
def test_transformers_reads_the_folder(model, tmp_path, scale_fmt):
    """Pins a quantization_config that engines refuse or misread: transformers knows "ue8m0" and "float", not "fp32"."""
    transformers = pytest.importorskip("transformers")
    assert to_fp8(model, tmp_path / "fp8", "--scale-fmt", scale_fmt) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "fp8")
    quantisation = transformers.FineGrainedFP8Config(**config.quantization_config)
    assert quantisation.scale_fmt == {"pow2": "ue8m0", "fp32": "float"}[scale_fmt]
    assert list(quantisation.weight_block_size) == [128, 128]
    pytest.importorskip("accelerate")  # transformers loads no quantised model without it
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")  # without a GPU it dequantises
    result = read_folder(tmp_path / "fp8")
    expected = fp8.dequantize(result[LINEAR], result[LINEAR + "_scale_inv"], fp8.BLOCK, torch.bfloat16)
    assert torch.equal(loaded.state_dict()[LINEAR].to(torch.bfloat16), expected)


def test_command_line_switches_agree(model, tmp_path, monkeypatch, capsys):
    """Pins type=bool, which reads "False" as true; SCALE_FMT as the default; and two switches that disagree."""
    assert to_fp8(model, tmp_path / "a", "--force-pow-2-scale", "False") == 0
    assert to_fp8(model, tmp_path / "b", "--force-pow-2-scale", "True") == 0
    monkeypatch.setenv("SCALE_FMT", "fp32")
    assert to_fp8(model, tmp_path / "c") == 0
    words = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"].get("scale_fmt") for n in "abc"
    ]
    assert words == [None, "ue8m0", None]
    for flags in (["--force-pow-2-scale", "yes"], ["--force-pow-2-scale", "True", "--scale-fmt", "fp32"]):
        with pytest.raises(SystemExit):
            to_fp8(model, tmp_path / "d", *flags)
    assert "--force-pow-2-scale asks for pow2 and --scale-fmt for fp32" in capsys.readouterr().err
    monkeypatch.setenv("SCALE_FMT", "e8m0")
    assert to_fp8(model, tmp_path / "d") == 2
    assert not (tmp_path / "d").exists()


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = read_folder(folder)
    del tensors[name]
    save_file(tensors | ({name: tensor} if tensor is not None else {}), folder / "model.safetensors")


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[200, 300] = value
    return tensor


def truncate(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def rename_last_shard(folder: Path) -> None:
    next(folder.glob("*-00003-of-00003.safetensors")).rename(folder / "lost.safetensors")


def hold_twice(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    save_file(second | {next(iter(first)): next(iter(first.values()))}, files[1])


def set_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    return lambda folder: replace_tensor(folder, name, change and change(weights()[name]))


def set_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def set_index(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        file.write_text(file.read_text().replace(old, new))

    return edit


SINGLE_FAULTS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "list for config": (lambda f: (f / "config.json").write_text("[]"), "config.json holds JSON of type list"),
    "config without a size": (
        lambda f: (f / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}'),
        "config.json lacks",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "cut in data": (lambda f: truncate(f, 500_000), "model.safetensors (500000 bytes) is truncated"),
    "cut in header": (lambda f: truncate(f, 100), "model.safetensors (100 bytes) is truncated"),
    "empty file": (lambda f: truncate(f, 0), "model.safetensors (0 bytes) is truncated"),
    "NaN": (set_weight(LINEAR, lambda w: with_value(w, torch.nan)), f"{LINEAR!r} has nan in tile (1, 2)"),
    "Inf": (set_weight(LINEAR, lambda w: with_value(w, -torch.inf)), f"{LINEAR!r} has inf in tile (1, 2)"),
    "NaN in norm": (set_weight("model.norm.weight", lambda w: w * torch.nan), "'model.norm.weight' has nan at (0,)"),
    "integers": (set_weight(LINEAR, lambda w: w.char()), f"{LINEAR!r} is torch.int8"),
    "double": (set_weight(LINEAR, lambda w: w.double()), f"{LINEAR!r} is torch.float64"),
    "complex": (set_weight(LINEAR, lambda w: w + 0j), f"{LINEAR!r} has type C64"),
    "missing tensor": (set_weight(LINEAR, None), f"lacks {LINEAR!r}"),
    "FP8 tensor": (set_weight(LINEAR, lambda w: w.to(torch.float8_e4m3fn)), "is FP8 already"),
    "wrong shape": (set_config(intermediate_size=512), "has shape (384, 256)"),
    "more layers": (set_config(num_hidden_layers=3), "lacks 'model.layers.2."),
    "fewer layers": (set_config(num_hidden_layers=1), "holds 'model.layers.1."),
    "untied without head": (set_config(tie_word_embeddings=False), "lacks 'lm_head.weight'"),
    "other vocabulary": (set_config(vocab_size=321), "'model.embed_tokens.weight' has shape (320, 256)"),
    "architecture": (set_config(architectures=["LlamaForCausalLM"]), "this tool knows: Qwen2ForCausalLM"),
    "other head": (set_config(architectures=["Qwen2ForSequenceClassification"]), "this tool knows: Qwen2ForCausalLM"),
    "FP8 config": (set_config(quantization_config={}), "has a quantization_config, but no tensor is FP8"),
    "another head than the tied one": (
        lambda f: save_file(read_folder(f) | {"lm_head.weight": torch.ones(320, 256)}, f / "model.safetensors"),
        "'lm_head.weight' is not 'model.embed_tokens.weight'",
    ),
    "size in a string": (set_config(vocab_size="320"), "has vocab_size '320'; expected a positive whole number"),
    "size that is true": (set_config(num_hidden_layers=True), "has num_hidden_layers True; expected a positive"),
    "heads in no groups": (set_config(num_attention_heads=3, head_dim=128, num_key_value_heads=2), "3 heads are no"),
    "uneven heads": (set_config(num_attention_heads=3, num_key_value_heads=3), "is no multiple of 3 heads"),
    "epsilon in a string": (set_config(rms_norm_eps="1e-6"), "rms_norm_eps '1e-6'; expected a positive number"),
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
VARIANTS = [  # fields of config.json by which the network would compute something else
    {"hidden_act": "gelu"},
    {"hidden_act": "relu2"},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": "dynamic"},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e6}},
    {"rope_parameters": SECTIONS},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # and rope_theta says 1e6
    {"rope_theta": 1000000.5},
    {"rope_theta": 0},
    {"partial_rotary_factor": 0.5},
    {"use_sliding_window": True, "sliding_window": 4096},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"attention_dropout": 0.1},
    {"hidden_dropout": 0.1},
    {"attention_bias": False},
    {"mlp_bias": True},
    {"is_causal": False},
    {"scale_emb": 12},
    {"scale_depth": 1.4},
    {"dim_model_base": 256},
    {"embedding_multiplier": 12.0},
    {"residual_multiplier": 0.22},
    {"attention_multiplier": 0.0078125},
    {"logits_scaling": 8.0},
    {"logit_scale": 0.0625},
    {"query_pre_attn_scalar": 256},
    {"final_logit_softcapping": 30.0},
    {"attn_logit_softcapping": 50.0},
    {"mup_width_multiplier": 2},
    {"use_qk_norm": True},
    {"num_experts": 8},
    {"num_nextn_predict_layers": 2},
    {"use_mrope": True},
    {"layer_types": 5},
    {"clip_qkv": 8},
    {"num_kv_shared_layers": 1},
    {"kv_lora_rank": 512},
    {"pruned_heads": {"0": [1]}},
    {"is_encoder_decoder": True},
    {"qkv_bias": False},
    {"pre_norm": False},
    {"dual_chunk_attention_config": {"chunk_size": 262144}},
    {"auto_map": {"AutoModelForCausalLM": "modeling_custom.Other"}},
    {"model_type": "qwen3"},
    {"architectures": None, "model_type": "llama"},
    {"architectures": ["Qwen2ForCausalLM", "Other"]},
]
HARMLESS = {
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "full_attention"],
    "attention_dropout": 0.0,
    "embedding_multiplier": 1.0,
    "mlp_bias": False,
    "use_mrope": False,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "qkv_bias": True,
    "num_experts": 0,
    "final_logit_softcapping": None,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "use_cache": True,
    "transformers_version": "4.51.3",
    "_name_or_path": "Qwen/Qwen2.5-7B",
    "_attn_implementation_autoset": True,
    "unsloth_version": "2025.1",
    "output_attentions": False,
}
MAP = '"weight_map": {'
SHARD_FAULTS = {
    "missing shard": (rename_last_shard, "model-00003-of-00003.safetensors, which does not exist"),
    "index without map": (set_index(MAP, '"map": {'), "has no weight_map"),
    "index with a repeated key": (set_index(MAP, MAP + '"x": "y", "x": "y", '), "'x' appears twice"),
    "index names what no file holds": (
        set_index(MAP, MAP + '"x": "model-00001-of-00003.safetensors", '),
        "places 'x' in model-00001-of-00003.safetensors, which does not hold it",
    ),
    "index leaves a tensor out": (
        set_index('"model.norm.weight"', '"model.norm.weights"'),
        "holds 'model.norm.weight', which",
    ),
    "tensor in two files": (hold_twice, "is in two files: model-00001-of-00003.safetensors and"),
    "single file beside shards": (
        lambda f: shutil.copy(next(f.glob("*.safetensors")), f / "model.safetensors"),
        "holds both model.safetensors and",
    ),
}


def assert_refused(run, source: Path, target: Path, message: str, caplog) -> None:
    before = {f.name for f in target.parent.iterdir()}
    assert run(source, target) == 2
    assert message in caplog.text
    assert str(target.parent) in caplog.messages[-1]  # which folder, or which disk
    assert {f.name for f in target.parent.iterdir()} == before


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_bad_input_is_refused_by_name(model, tmp_path, caplog, fault):
    """Pins half-written or silently wrong output for broken input: a message, status 2, and no new file."""
    make, message = SINGLE_FAULTS[fault]
    make(model)
    assert_refused(to_fp8, model, tmp_path / "out", message, caplog)


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(fields))
def test_another_network_is_refused(model, tmp_path, caplog, fields):
    """Pins: a config.json whose network is not the one that Megatron computes, taken for a plain Qwen2."""
    edit_config(model, **fields)
    assert_refused(to_fp8, model, tmp_path / "out", "config.json", caplog)


def test_fields_that_change_nothing_are_no_reason_to_refuse(model, tmp_path):
    edit_config(model, **HARMLESS)
    assert to_fp8(model, tmp_path / "out") == 0
    edit_config(model, architectures=None)
    assert to_fp8(model, tmp_path / "again") == 0


def test_a_tied_head_that_is_stored_too_is_taken(tmp_path):
    tensors = weights()
    model = write_folder(tmp_path / "model", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert to_fp8(model, tmp_path / "out") == 0


def kill_while_casting(model: Path, output: Path) -> None:
    child = os.fork()
    if child == 0:
        reader = hf.HFReader(model)
        with hf.HFWriter(output, like=reader) as writer:
            writer.add(LINEAR, reader.tensor(LINEAR))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_cast_leaves_nothing_behind_the_next_one(model, tmp_path, monkeypatch, caplog):
    """Pins: `.NAME.partial-PID` that stays for good, and "File exists" where process ids repeat; a second cast to the
    same folder that writes into the first."""
    kill_while_casting(model, tmp_path / "out")
    assert to_fp8(model, tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}
    with files.building(tmp_path / "again"):
        assert_refused(to_fp8, model, tmp_path / "again", "another process is building", caplog)


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_bad_shards_are_refused_by_name(tmp_path, caplog, fault):
    """Pins an index believed without a look into the files."""
    make, message = SHARD_FAULTS[fault]
    folder = write_folder(tmp_path / "model", weights(), shards=3)
    make(folder)
    assert_refused(to_fp8, folder, tmp_path / "out", message, caplog)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "head size is 64"),
        ({"intermediate_size": 320}, "ffn size on each tensor-parallel rank is 320"),
    ],
)
def test_the_128_rule_is_refused_by_size(tmp_path, caplog, changes, message):
    """Pins blocks that cross from one head or one matrix of a merged one into the next."""
    config = CONFIG | changes
    tensors = weights(CONFIG | {"intermediate_size": config["intermediate_size"]})
    folder = write_folder(tmp_path / "model", tensors, config)
    assert_refused(to_fp8, folder, tmp_path / "out", message, caplog)


def set_scale(folder: Path, value: float) -> None:
    name = LINEAR + "_scale_inv"
    scale_inv = read_folder(folder)[name]
    scale_inv[0, 0] = value
    replace_tensor(folder, name, scale_inv)


def set_scale_format(folder: Path, **word: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("scale_fmt", None)
    config["quantization_config"] |= word
    (folder / "config.json").write_text(json.dumps(config))


FP8_FAULTS = {
    "FP32 scale among powers of two": (lambda f: set_scale(f, 0.3), f"'{LINEAR}_scale_inv' holds FP32 scales, but"),
    "NaN scale": (lambda f: set_scale(f, torch.nan), "holds scales that are not positive numbers"),
    "zero scale": (lambda f: set_scale(f, 0.0), "holds scales that are not positive numbers"),
    "FP16 scales": (
        lambda f: replace_tensor(f, LINEAR + "_scale_inv", torch.ones(2, 3).half()),
        f"'{LINEAR}_scale_inv' is torch.float16; expected torch.float32",
    ),
    "scales of another shape": (
        lambda f: replace_tensor(f, LINEAR + "_scale_inv", torch.ones(3, 2)),
        f"'{LINEAR}_scale_inv' has shape (3, 2)",
    ),
    "no scales": (lambda f: replace_tensor(f, LINEAR + "_scale_inv", None), f"lacks '{LINEAR}_scale_inv'"),
    "one weight in BF16": (lambda f: replace_tensor(f, LINEAR, weights()[LINEAR]), f"{LINEAR!r} is torch.bfloat16"),
    "NaN code": (
        lambda f: replace_tensor(f, LINEAR, torch.full((256, 384), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        f"{LINEAR!r} has nan",
    ),
    "no quantization_config": (lambda f: edit_config(f, quantization_config=None), "has no quantization_config"),
    "other blocks": (lambda f: set_scale_format(f, weight_block_size=[64, 64]), "weight_block_size is [64, 64]"),
    "unknown scale format": (lambda f: set_scale_format(f, scale_fmt="e5m3"), "scale_fmt is 'e5m3'"),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_bad_fp8_input_is_refused_by_name(model, tmp_path, caplog, fault):
    """Pins scale formats mixed in one model, FP16 scales, and FP8 weights without the scales that make them numbers."""
    make, message = FP8_FAULTS[fault]
    assert to_fp8(model, tmp_path / "fp8") == 0
    make(tmp_path / "fp8")
    assert_refused(to_bf16, tmp_path / "fp8", tmp_path / "out", message, caplog)


def test_power_of_two_scales_without_their_word_are_refused(tmp_path, caplog):
    """Pins a pow2 model whose config.json lost scale_fmt: taken for FP32 scales it would be requantised with a loss."""
    config = CONFIG | {"intermediate_size": 1024}
    model = write_folder(tmp_path / "model", weights(config), config)
    assert to_fp8(model, tmp_path / "fp8") == 0
    set_scale_format(tmp_path / "fp8")
    assert_refused(to_bf16, tmp_path / "fp8", tmp_path / "out", 'add "scale_fmt": "ue8m0"', caplog)


def test_fp8_model_is_not_cast_again(model, tmp_path, caplog):
    """Pins a second quantisation of codes as if they were weights."""
    assert to_fp8(model, tmp_path / "fp8") == 0
    assert_refused(to_fp8, tmp_path / "fp8", tmp_path / "out", "is FP8 already", caplog)
    assert_refused(to_bf16, model, tmp_path / "out", "has no quantization_config", caplog)


def test_output_that_exists_is_left_alone(model, tmp_path, caplog):
    """Pins overwriting a model."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert_refused(to_fp8, model, tmp_path / "out", "out exists; choose another output folder", caplog)
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_full_disk_is_refused_first_and_cleaned_up_later(model, tmp_path, caplog, monkeypatch):
    """Pins a run that fills the disk: refused before it starts, and if the space goes meanwhile, nothing stays."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert_refused(to_fp8, model, tmp_path / "out", "the disk has 0.00 GB free", caplog)

    with Path("/dev/full").open("wb", buffering=0) as full_disk:

        def store_on_full_disk(shard, offset, data):
            os.pwrite(full_disk.fileno(), data, offset)

        monkeypatch.setattr(hf._Shard, "store", store_on_full_disk)
        assert_refused(to_fp8, model, tmp_path / "out", "No space left on device", caplog)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.EIO, "broken disk")])
def test_interrupted_write_leaves_nothing(model, tmp_path, error):
    """Pins half a model under the final name after Ctrl-C."""
    reader = hf.HFReader(model)

    def write() -> None:
        with hf.HFWriter(tmp_path / "out", like=reader) as writer:
            writer.add(LINEAR, reader.tensor(LINEAR))
            raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError, OSError)):
        write()
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_verification_finds_damage(model, tmp_path, caplog, monkeypatch):
    """Pins a check that compares the cast with itself: one flipped bit on the way to disk must be found."""
    stored = hf.fp8_tensors(LINEAR, weights()[LINEAR], "pow2")[LINEAR]
    right = hf._Shard.store
    for damaged, tensor in ((LINEAR, stored), ("model.embed_tokens.weight", weights()["model.embed_tokens.weight"])):
        wanted = hf._bytes(tensor)

        def damage(shard, offset, data, wanted=wanted):
            digest = right(shard, offset, data)
            if np.array_equal(data, wanted):
                os.pwrite(shard.file.fileno(), bytes([data[1000] ^ 1]), offset + 1000)
            return digest

        monkeypatch.setattr(hf._Shard, "store", damage)
        message = f"{damaged!r} is not in the files as it was written"
        assert_refused(to_fp8, model, tmp_path / "out", message, caplog)
        caplog.clear()


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    """Pins pieces that land in the wrong place or are left out of the check."""
    tensors = {"a": torch.arange(999, dtype=torch.int32), "b": torch.arange(50.0), "c": torch.empty(0)}
    monkeypatch.setattr(hf, "_PIECE_BYTES", 128)
    monkeypatch.setattr(hf, "_IN_FLIGHT_BYTES", 500)
    with hf.HFWriter(tmp_path / "out", workers=4) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.verify()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_writer_refuses_what_would_not_load(tmp_path):
    """Pins FP8 weights under a BF16 config and the reverse, a tensor added twice, and an empty model."""

    def write(config: dict, *tensors: torch.Tensor) -> None:
        with hf.HFWriter(tmp_path / "a") as writer:
            writer.config = config
            for tensor in tensors:
                writer.add("w", tensor)

    with pytest.raises(ValueError, match="1 FP8 tensors but its config"):
        write({}, torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="no FP8 tensor but its config"):
        write({"quantization_config": {}}, torch.zeros(2))
    with pytest.raises(ValueError, match="'w' was added twice"):
        write({}, torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="complex64 cannot be written"):
        write({}, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="no tensor was added"):
        write({})
    assert list(tmp_path.iterdir()) == []


def test_symlinked_files_are_copied(model, tmp_path):
    """Pins folders of a hub cache, whose files are links to blobs: the output must stand alone."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in [f for f in model.iterdir() if f.is_file()]:
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert to_fp8(model, tmp_path / "fp8") == 0
    assert not any(f.is_symlink() for f in (tmp_path / "fp8").rglob("*"))
    assert (tmp_path / "fp8" / "merges.txt").read_text() == "a b"
