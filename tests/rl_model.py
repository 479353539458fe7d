"""A very small Qwen2 model in the forms that reinforcement learning takes, with a tokenizer that has chat markers."""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

VOCABULARY = 384  # the tokenizer's 280 and room, a multiple of 128


def tokenizer_folder(folder: Path) -> Path:
    """A byte-level tokenizer with the quickstart's ChatML template."""
    corpus = importlib.import_module("quickstart_corpus")
    folder.mkdir(parents=True)
    texts = ["What is the sum of the numbers? The answer is the sum of them."] * 9
    corpus.train_tokenizer(texts, 280).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": corpus.CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bf16_folder(folder: Path, *, layers: int = 2, heads: int = 2, scale: float = 1.0) -> Path:
    """Tokenizer and random BF16 weights: hidden 128, ffn 256, heads of 128. `scale` sharpens its distributions."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = json.loads((tokenizer_folder(folder) / "tokenizer.json").read_text())
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=128, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6, tie_word_embeddings=True,
        initializer_range=0.05, eos_token_id=end, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.model.norm.weight.mul_(scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def fp8_folder(bf16: Path, folder: Path, scale_fmt: str = "pow2") -> Path:
    """`bf16` as the project's caster casts it."""
    importlib.import_module("bf16_cast_fp8").cast(bf16, folder, scale_fmt)
    return folder
