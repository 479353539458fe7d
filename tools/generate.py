#!/usr/bin/env python
"""Answer prompts with a Hugging Face model folder, on a CPU or GPU.

    python tools/generate.py --model exp/quickstart/InfiR2_tiny --chat --prompt "What is 27 + 45?"
    python tools/generate.py --model exp/quickstart/InfiR2_tiny --prompt "In the beginning"

Prints one JSON object: the model and, for each prompt, its greedy continuation.
"""

import argparse
import json
import sys
from pathlib import Path

from infir2.data.pretraining import positive
from infir2.hf import HFReader
from infir2.stop_tokens import eos_tokens, stop_tokens


def generate(model_dir: Path, prompts: list[str], max_new_tokens: int, chat: bool) -> list[dict[str, str]]:
    """Greedy continuations of the prompts, as they are, or with `chat` as a user's message in the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from infir2 import cpu_kernels

    cpu_kernels.install_for_generation()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    except Exception as error:  # of any kind, and of many lines
        said = " ".join(str(error).split())[:500]
        raise ValueError(f"transformers cannot load {model_dir}: {type(error).__name__}: {said}") from None
    if torch.cuda.is_available():
        model = model.cuda()
    # Text that is no chat ends with the document, and a pad token is never within one.
    known = stop_tokens(model_dir) if chat else eos_tokens(model_dir)
    stop = sorted((known | {tokenizer.eos_token_id, tokenizer.pad_token_id}) - {None})
    answers = []
    for prompt in prompts:
        text = prompt
        if chat:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop or None,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append({"prompt": prompt, "answer": tokenizer.decode(new, skip_special_tokens=True)})
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    parser.add_argument("--chat", action="store_true", help="prompts are a user's messages, in the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    args = parser.parse_args()
    try:
        HFReader(args.model)  # refuses what is no model folder, by name
        answers = generate(args.model, args.prompt, args.max_new_tokens, args.chat)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"model": str(args.model), "answers": answers}, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
