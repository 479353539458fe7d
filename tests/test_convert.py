"""Hugging Face to torch_dist and back: bit for bit, and the same function."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import LOGITS
from trainer import train, with_megatron
from transformers import Qwen2Config, Qwen2ForCausalLM

from infir2.checkpoint import CheckpointError, TorchDist, resolve
from infir2.hf import HFReader
from infir2.qwen2 import Shape, entries, megatron_flags

TOOLS = Path(__file__).parents[1] / "tools"
TOKENS = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0)).tolist()


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
    found = with_megatron("megatron_logits", "logits", flags, str(tmp_path / "dist"), TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits
    assert abs(found - expected.numpy()).max() <= LOGITS
    done = to_hf(tmp_path / "dist", tmp_path / "back", tmp_path / "hf", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    before, after = HFReader(tmp_path / "hf"), HFReader(tmp_path / "back")
    assert sorted(before.names) == sorted(after.names)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)
    with torch.no_grad():
        again = Qwen2ForCausalLM.from_pretrained(tmp_path / "back").eval()(torch.tensor(TOKENS)).logits
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
