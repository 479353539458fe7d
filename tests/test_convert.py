"""Hugging Face to torch_dist and back: bit for bit, and the same function."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rl_model import tokenizer_folder
from safetensors.torch import load_file, save_file
from test_stop_tokens import CHATML, TOKENS, model_folder
from tolerances import LOGITS
from trainer import train, with_megatron
from transformers import Qwen2Config, Qwen2ForCausalLM

from infir2 import receipts
from infir2.checkpoint import CheckpointError, TorchDist, resolve
from infir2.hf import HFReader
from infir2.qwen2 import Shape, entries, megatron_flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import convert_torch_dist_to_hf

TOOLS = Path(__file__).parents[1] / "tools"
PROMPTS = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0)).tolist()


def hf_model(folder: Path, tied: bool, shards: int, dtype=torch.float32) -> Qwen2ForCausalLM:
    """A small Qwen2 with nothing left at its default: random norms and biases, 4 heads on 2 KV groups."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=int(size * 0.7) if shards == 2 else "5GB")
    assert len(list(folder.glob("*.safetensors"))) == shards
    return model


def to_hf(checkpoint: Path, output: Path, origin: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / "convert_torch_dist_to_hf.py"), "--input-dir", str(checkpoint)]
    command += ["--output-dir", str(output), "--origin-hf-dir", str(origin), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 2])
def test_round_trip(tmp_path, tied, shards):
    """HF to torch_dist to HF is bit-exact, and Megatron computes HF's logits from what lies between.

    Pins: q, k, v rows joined in the wrong order, gate and up exchanged, RoPE's base or the norm's epsilon lost, a tied
    head written twice.
    """
    model = hf_model(tmp_path / "hf", tied, shards)
    with_megatron("convert_hf_to_torch_dist", "convert", tmp_path / "hf", tmp_path / "dist")
    flags = [*megatron_flags(Shape.from_folder(tmp_path / "hf")), "--tokenizer-type", "NullTokenizer"]
    flags += ["--seq-length", "128", "--max-position-embeddings", "128", "--micro-batch-size", "1"]
    found = with_megatron("megatron_logits", "logits", flags, str(tmp_path / "dist"), PROMPTS)
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS)).logits
    assert abs(found - expected.numpy()).max() <= LOGITS
    done = to_hf(tmp_path / "dist", tmp_path / "back", tmp_path / "hf", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    before, after = HFReader(tmp_path / "hf"), HFReader(tmp_path / "back")
    assert sorted(before.names) == sorted(after.names)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)
    with torch.no_grad():
        again = Qwen2ForCausalLM.from_pretrained(tmp_path / "back").eval()(torch.tensor(PROMPTS)).logits
    assert torch.equal(again, expected)


@pytest.fixture(scope="module")
def trained(run_flags, tmp_path_factory):
    """A BF16 run of the tests' tiny model at TP2, and an HF folder with its config."""
    run = tmp_path_factory.mktemp("trained")
    flags = ["--bf16", "--train-iters", "20", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    train(run_flags(run, *flags), run / "log", ranks=2)
    origin = run / "origin"
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=250, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=128, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ).save_pretrained(origin)  # fmt: skip
    return run


def test_masters_are_exported(trained, tmp_path):
    """The export of a run at TP2 is its FP32 masters, vocabulary padding cut, rounded once; 'model' takes the BF16.

    Pins: exports of BF16 weights where the checkpoint has more, and rows of padding that SGLang refuses.
    """
    checkpoint = trained / "checkpoints"
    for name, flags in {"masters": ["--dtype", "float32"], "model": ["--weights", "model"]}.items():
        done = to_hf(checkpoint, tmp_path / name, trained / "origin", *flags)
        assert done.returncode == 0, done.stderr
        assert "the last 6 rows of the vocabulary" in done.stderr
    stored, shape = TorchDist(checkpoint), Shape.from_folder(trained / "origin")
    fp32, bf16 = HFReader(tmp_path / "masters"), HFReader(tmp_path / "model")
    assert fp32.shape("model.embed_tokens.weight") == (250, 128)
    differing = 0
    for entry in entries(shape):
        parts = [fp32.tensor(name) for name in entry.hf]
        master = stored.read("optimizer.state.fp32_param." + entry.megatron)
        assert torch.equal(entry.join(*parts), master[: len(entry.join(*parts))])
        for name, part in zip(entry.hf, parts, strict=True):
            assert torch.equal(part.bfloat16(), bf16.tensor(name))
            differing += not torch.equal(part.bfloat16().float(), part)
    assert differing > 10, "masters that equal their rounding show nothing"


def test_refusals(trained, tmp_path):
    """Each fault of a checkpoint is refused by name, and nothing is left under the output's name.

    Pins: half-written checkpoints that convert to garbage.
    """
    checkpoint = resolve(trained / "checkpoints")

    def refused(folder: Path, text: str) -> None:
        done = to_hf(folder, tmp_path / "out", trained / "origin")
        assert done.returncode != 0
        assert text in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "absent", "does not exist")
    broken = tmp_path / "broken"
    broken.mkdir()
    refused(broken, "holds no checkpoint")
    copy = tmp_path / "iter_0000020"
    subprocess.run(["cp", "-r", str(checkpoint), str(copy)], check=True)
    (copy / "metadata.json").unlink()
    refused(copy, "half-written")
    (copy / "metadata.json").write_text("{}")
    data = next(copy.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    refused(copy, "bytes long, at least")


def test_index_is_not_executed(tmp_path, trained):
    """Pins: `.metadata` unpickled with every class in reach, so that a downloaded checkpoint could run code."""
    folder = tmp_path / "iter_0000020"
    subprocess.run(["cp", "-r", str(resolve(trained / "checkpoints")), str(folder)], check=True)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match="no index needs"):
        TorchDist(folder)
    assert not (tmp_path / "pwned").exists()


def mbridge_names(names: list[str]) -> dict[str, list[str]]:
    """What mbridge's Qwen2 bridge calls each Megatron tensor. Called in a process that has Megatron."""
    from mbridge.models.qwen2 import Qwen2Bridge

    bridge = object.__new__(Qwen2Bridge)  # its constructor needs a GPU build of Megatron; the names do not
    bridge.hf_config = type("Config", (), {"tie_word_embeddings": False})
    return {name: bridge._weight_name_mapping_mcore_to_hf(name) for name in names}


def test_names_are_mbridge_s():
    """Our map of tensor names is that of mbridge's Qwen2 bridge, which other tools of the field use."""
    shape = Shape.from_folder(Path(__file__).parent / "golden/configs/Qwen2.5-7B")
    ours = {entry.megatron: list(entry.hf) for entry in entries(shape)}
    assert ours == with_megatron("test_convert", "mbridge_names", list(ours))


# Another model's folder, and folders that are not of one piece


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A folder with an untied Qwen2, and its checkpoint beside it, in BF16."""
    folder = tmp_path_factory.mktemp("untied")
    hf_model(folder / "hf", False, 1, torch.bfloat16)
    with_megatron("convert_hf_to_torch_dist", "convert", folder / "hf", folder / "dist")
    return folder


@pytest.fixture
def both(untied, tmp_path):
    """A copy of it."""
    shutil.copytree(untied, tmp_path / "both")
    return tmp_path / "both"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def export(folder: Path, dtype: str = "bfloat16") -> Path:
    """The checkpoint in `folder` as a Hugging Face folder, with the origin beside it."""
    kind = convert_torch_dist_to_hf.DTYPES[dtype]
    convert_torch_dist_to_hf.convert(folder / "dist", folder / "out", folder / "hf", kind, "masters")
    return folder / "out"


def as_a_run(folder: Path, **facts) -> None:
    """Make the checkpoint a run's: run.json in place of source.json."""
    (folder / "dist" / "source.json").unlink()
    shape = Shape.from_folder(folder / "hf").megatron_arguments()
    identity = {name: value for name, value in shape.items() if name not in ("kv_channels", "vocab_size")}
    (folder / "dist" / "run.json").write_text(json.dumps(identity | {"scale_fmt": None} | facts))


def without_a_record(folder: Path) -> None:
    (folder / "dist" / "source.json").unlink()


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHOWN = {  # by the tensors themselves
    "tied": {"tie_word_embeddings": True},
    "fewer rows": {"vocab_size": 372},
    "more rows": {"vocab_size": 501},
    "fewer layers": {"num_hidden_layers": 2, "layer_types": None},
    "more layers": {"num_hidden_layers": 4, "layer_types": None},
    "wider": {"intermediate_size": 128},
    "larger heads": {"head_dim": 32},
}
TOLD = {"RoPE": {"rope_parameters": ROPE}, "epsilon": {"rms_norm_eps": 1e-5}, "heads": {"num_attention_heads": 8}}
TOLD["heads"] |= {"num_key_value_heads": 4, "head_dim": 8}  # 8 + 2 x 4 heads of 8 have the rows of 4 + 2 x 2 of 16


def test_rows_of_a_converted_vocabulary_are_all_kept(both):
    """Pins: an origin with a few rows less, by which the last tokens are cut off as if they were padding."""
    edit_json(both / "hf" / "config.json", vocab_size=490)
    with pytest.raises(ValueError, match=r"vocab_size is 490 in .*, 500 in source.json"):
        export(both)


@pytest.mark.parametrize("record", [without_a_record, as_a_run, lambda folder: None], ids=["none", "run", "source"])
@pytest.mark.parametrize("other", SHOWN | TOLD)
def test_another_model_is_no_origin(both, record, other):
    """Pins: an export with another model's RoPE base or epsilon, with a layer, rows or the head left out: status 0."""
    record(both)
    export(both)
    shutil.rmtree(both / "out")
    edit_json(both / "hf" / "config.json", **(SHOWN | TOLD)[other])
    if record is without_a_record and other in TOLD:
        export(both)  # nothing beside the checkpoint tells
        return
    with pytest.raises(ValueError, match=r"is not the model|no place|layers|implies|has no "):
        export(both)
    assert not (both / "out").exists()


def test_a_run_of_another_model_is_refused_with_status_2(both, capsys, monkeypatch):
    """Pins: status 1, which says that a run broke, for a wrong call."""
    as_a_run(both, rotary_base=5)
    words = ["--input-dir", both / "dist", "--output-dir", both / "out", "--origin-hf-dir", both / "hf"]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    assert convert_torch_dist_to_hf.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rotary_base is 1000000 in" in line
    assert "5 in run.json. Give the folder" in line


def refusals(folder: Path, names: list[str]) -> dict[str, str]:
    """What convert_hf_to_torch_dist says of folders. Called in a process that has Megatron."""
    import convert_hf_to_torch_dist

    found = {}
    for name in names:
        sys.argv = ["convert", "--input-dir", str(folder / name), "--output-dir", str(folder / "out")]
        with open(folder / f"{name}.err", "w") as file, contextlib.redirect_stderr(file):
            status = convert_hf_to_torch_dist.main()
        found[name] = f"{status}: {(folder / f'{name}.err').read_text()}"
    return found


def change_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def rename(tensors: dict) -> None:
    tensors["model.layers.0.mlp.Gate_proj.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


FOLDERS = {
    "lacks a tensor": (change_tensors(lambda t: t.pop("model.norm.weight")), "lacks 'model.norm.weight'"),
    "lacks the head": (change_tensors(lambda t: t.pop("lm_head.weight")), "lacks 'lm_head.weight'"),
    "renamed": (change_tensors(rename), "lacks 'model.layers.0.mlp.gate_proj.weight'"),
    "one more": (change_tensors(lambda t: t.update(more=torch.ones(1))), "holds 'more'"),
    "narrower": (config(intermediate_size=64), "has shape (96, 64)"),
    "more rows": (config(vocab_size=600), "has shape (500, 64)"),
    "another head": (config(tie_word_embeddings=True), "'lm_head.weight' is not 'model.embed_tokens.weight'"),
    "no vocabulary": (config(vocab_size=None), "lacks 'vocab_size'"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers 0; expected a positive whole number"),
}


def test_folders_that_are_not_of_one_piece_are_refused(untied, tmp_path):
    """Pins: rows left out or read from nowhere, a tied head thrown away, tracebacks."""
    for name, (damage, _) in FOLDERS.items():
        damage(shutil.copytree(untied / "hf", tmp_path / name))
    found = with_megatron("test_convert", "refusals", tmp_path, list(FOLDERS))
    for name, (_, message) in FOLDERS.items():
        assert found[name].startswith("2: error: "), found[name]
        assert message in found[name]
        assert found[name].count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_checkpoint_are_refused(both):
    """Pins: tracebacks for a damaged index, or for damaged bytes in a file of tensors."""
    (folder,) = (both / "dist").glob("release")
    whole, generator, seen = (folder / ".metadata").read_bytes(), random.Random(0), set()
    for _ in range(300):
        damaged = bytearray(whole)
        start = generator.randrange(len(whole))
        damaged[start : start + 4] = generator.randbytes(4)
        (folder / ".metadata").write_bytes(damaged[: generator.choice([start + 1, None])])
        try:
            TorchDist(both / "dist")
        except CheckpointError as error:
            seen.add(type(error.__cause__))
    assert len(seen) > 2, "the damage does not reach several places of the reader"
    (folder / ".metadata").write_bytes(whole)
    data = next(folder.glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(CheckpointError, match="is damaged"):
        export(both)


# What ends a response


def chat(folder: Path, **eos) -> None:
    """Give the origin a tokenizer whose template ends a turn with <|im_end|>, 102, and these stop tokens."""
    model_folder(folder / "template", CHATML)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "template" / name, folder / "hf" / name)
    edit_json(folder / "hf" / "config.json", eos_token_id=eos.get("config"))
    (folder / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos.get("generation")}))


def sft_data(folder: Path, end: str) -> dict:
    """What run.json says of fine-tuning data that ends turns with `end`."""
    (folder / "data").mkdir()
    receipts.write_manifest(folder / "data", {"request": {}, "chat_template": {"sha256": "", "end_of_turn": end}})
    sha256 = receipts.sha256_file(folder / "data" / "manifest.json")
    return {"sft_data": str(folder / "data"), "data_manifests": {str(folder / "data"): sha256}}


@pytest.mark.parametrize("fine_tuned", [True, False])
@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ({"config": 100, "generation": 100}, [102, 100]),
        ({"config": 100, "generation": [100, 99]}, [102, 99, 100]),
        ({"generation": [102]}, 102),
        ({}, 102),
    ],
)
def test_the_export_names_the_end_of_a_turn(both, named, wanted, fine_tuned):
    """Pins: a fine-tuned model whose configs name the base's end of text alone: every answer runs to the limit. And a
    converter that is said to set do_sample, and does not."""
    chat(both, **named)
    as_a_run(both, **(sft_data(both, "<|im_end|>") if fine_tuned else {}))
    out = export(both)
    generation, config = (json.loads((out / name).read_text()) for name in ("generation_config.json", "config.json"))
    assert generation["eos_token_id"] == config["eos_token_id"] == wanted
    assert generation["do_sample"] is True
    model = Qwen2ForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == wanted
    assert model.generation_config.do_sample


def test_the_end_of_a_turn_is_that_of_the_fine_tuning_before(both):
    """Pins: a model of reinforcement learning, and an origin without a chat template, of which no stop token is known
    but the base's."""
    chat(both, config=100)
    edit_json(both / "hf" / "tokenizer_config.json", chat_template=None)
    tuned = both / "tuned"
    tuned.mkdir()
    (tuned / "run.json").write_text(json.dumps(sft_data(both, "<|im_end|>")))
    as_a_run(both, parent={"folder": str(tuned / "iter_0000010")})
    found = json.loads((export(both) / "generation_config.json").read_text())
    assert found["eos_token_id"] == [102, 100]


def test_data_that_ends_turns_otherwise_than_the_template_is_refused(both):
    """Pins: an export with a chat template that the model was not trained on."""
    chat(both, config=100)
    facts = sft_data(both, TOKENS[5])
    as_a_run(both, **facts)
    with pytest.raises(ValueError, match=r"data ends a turn with <\|eot\|>, .* ends it with <\|im_end\|>"):
        export(both)
    (both / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="has no such token"):
        export(both)


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_one_dtype(both, keys):
    """Pins: FP32 weights beside `torch_dtype: bfloat16`."""
    config = json.loads((both / "hf" / "config.json").read_text())
    config.pop("dtype")
    (both / "hf" / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "bfloat16")))
    found = json.loads((export(both, "float32") / "config.json").read_text())
    assert {key: found[key] for key in ("dtype", "torch_dtype") if key in found} == dict.fromkeys(keys, "float32")


def test_a_value_beyond_fp16_is_refused(both):
    """Pins: infinite weights from `--dtype float16`."""
    damage = change_tensors(lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    damage(both / "hf")
    shutil.rmtree(both / "dist")
    with_megatron("convert_hf_to_torch_dist", "convert", both / "hf", both / "dist")
    with pytest.raises(ValueError, match=r"'model.norm.weight' has inf"):
        export(both, "float16")


def test_a_base_is_made_of_a_tokenizer_or_refused(tmp_path, capsys, monkeypatch):
    """Pins: a traceback for a folder without a tokenizer or with a damaged one; weights that their maker alone can
    read."""
    import make_base_model

    def main(tokenizer: Path) -> int:
        words = ["make", "--tokenizer", str(tokenizer), "--output-dir", str(tmp_path / "out"), "--layers", "1"]
        monkeypatch.setattr(sys, "argv", words)
        return make_base_model.main()

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    for folder, message in ((empty, "holds no tokenizer"), (tmp_path / "gone", "holds no"), (broken, "cannot be read")):
        assert main(folder) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "out").exists()
    tokenizer_folder(tmp_path / "tokenizer")
    assert main(tmp_path / "tokenizer") == 0
    (tmp_path / "plain").touch()
    assert {(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "plain").stat().st_mode & 0o777
    }
