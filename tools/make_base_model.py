#!/usr/bin/env python
"""Make the quickstart's base model: a tiny Qwen2.5-architecture model with random weights, in Hugging Face's format.

    python tools/make_base_model.py --tokenizer exp/quickstart/corpus/tokenizer --output-dir exp/quickstart/base

No small pretrained base ships in a package, so this one has learned nothing. Its sizes keep the 128 rule of
docs/numerics.md: hidden 128, ffn 384, 2 heads of size 128 that share one KV group.
"""

import argparse
import sys
from pathlib import Path

from infir2 import files


def make(tokenizer_dir: Path, output: Path, layers: int, seed: int) -> int:
    """Write the model and the tokenizer to the new folder `output`; returns the number of parameters. ValueError for a
    folder without a tokenizer."""
    files.refuse_existing(output)
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = read_tokenizer(tokenizer_dir)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=(len(tokenizer) + 127) // 128 * 128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # GPT-2's rule, Megatron's default: what writes into the residual stream starts smaller
        for block in model.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.mul_((2 * layers) ** -0.5)
    model = model.to(torch.bfloat16)
    model.generation_config.do_sample = True
    with files.building(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.num_parameters()


def read_tokenizer(folder: Path):
    """The tokenizer of a Hugging Face folder, as transformers reads it."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ValueError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json is there")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # which one depends on what is damaged
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error!r:.300}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1236)
    args = parser.parse_args()
    if args.layers < 1:
        parser.error(f"--layers {args.layers}; expected 1 or more")
    try:
        parameters = make(args.tokenizer, args.output_dir, args.layers, args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {parameters:,} parameters, random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
