"""Fixtures of the tests of evaluation: evalscope's environment, local datasets, a tiny model, a server that counts."""

import subprocess
from pathlib import Path

import pytest
from eval_local import ROOT, CountingServer, write_datasets


@pytest.fixture(scope="session")
def evalscope() -> Path:
    """The Python of .venv-eval, made as the scripts make it."""
    command = "source scripts/lib/eval.sh && set_up_evalscope && echo $EVALSCOPE_PYTHON"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def checker(evalscope) -> Path:
    """LiveCodeBench's checker, in evalscope."""
    return next(
        evalscope.parents[1].glob("lib/python*/site-packages/evalscope/benchmarks/live_code_bench/testing_util.py")
    )


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    """A DATASET_LOCAL."""
    folder = tmp_path_factory.mktemp("datasets")
    write_datasets(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Qwen2 of 4 layers of nothing learned, that can be served: bytes as tokens, a chat template, sampling on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)} | special, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=259, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **sizes
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, eos_token_id=258, pad_token_id=256)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def counting_server():
    server = CountingServer()
    yield server
    server.http.shutdown()
    server.http.server_close()
