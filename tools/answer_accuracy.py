#!/usr/bin/env python
"""Answer held-out problems greedily with one or more models; count the right answers.

    python tools/answer_accuracy.py --model FP8=exp/A --model BF16=exp/B --problems easy=test.jsonl --output FILE.json

Problems are conversations (`messages`: a question; what follows it is not shown to the model) with the right `label`.
An answer is what stands in the last \\boxed{...} of the model's response, its thoughts left out; it counts if it equals
the label, letter for letter. Each model gets the question through its own chat template, with room for as many tokens
as --max-new-tokens.

FILE.json holds, by model and set of problems, every answer and whether it is right. Prints the shares.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from infir2.data.pretraining import positive
from infir2.evaluation.answers import after_thinking, boxed_answer
from infir2.files import json_lines, write_text
from infir2.stop_tokens import stop_tokens

BATCH = 512


def read_problems(path: Path) -> list[tuple[str, str]]:
    """Questions and labels; ValueError names the line that has none."""
    problems = []
    for number, line in enumerate(json_lines(path), 1):
        try:
            record = json.loads(line)
            question = next(m["content"] for m in record["messages"] if m["role"] == "user")
            problems.append((question, record["label"]))
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            raise ValueError(f"{path}:{number} holds no question with a label: {error!r}") from None
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


def respond(model_dir: Path, questions: list[str], max_new_tokens: int, label: str) -> list[str]:
    """Greedy responses, special tokens left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from infir2 import cpu_kernels

    cpu_kernels.install_for_generation()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    if torch.cuda.is_available():
        model = model.cuda()
    end = sorted(stop_tokens(model_dir))
    responses = []
    for start in tqdm(range(0, len(questions), BATCH), desc=label, disable=None):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
        responses += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return responses


def measure(models: dict[str, Path], sets: dict[str, Path], max_new_tokens: int, limit: int | None = None) -> dict:
    """By model and set: every answer to its first `limit` problems, whether it is right, and the labels."""
    problems = {name: read_problems(path)[:limit] for name, path in sets.items()}
    found: dict = {"labels": {name: [label for _, label in chosen] for name, chosen in problems.items()}, "models": {}}
    for model, folder in models.items():
        found["models"][model] = {}
        for name, chosen in problems.items():
            responses = respond(folder, [question for question, _ in chosen], max_new_tokens, f"{model}, {name}")
            answers = [boxed_answer(after_thinking(response)) for response in responses]
            right = [answer == label for answer, (_, label) in zip(answers, chosen, strict=True)]
            found["models"][model][name] = {"answers": answers, "right": right}
            print(f"{model}, {name}: {sum(right)} of {len(right)} right ({sum(right) / len(right):.1%})", flush=True)
    return found


def named(words: list[str]) -> dict[str, Path]:
    """NAME=PATH words as a dictionary."""
    pairs = dict(word.partition("=")[::2] for word in words)
    if len(pairs) < len(words) or not all(pairs.values()):
        raise ValueError(f"expected NAME=PATH, each name once; found {' '.join(words)}")
    return {name: Path(path) for name, path in pairs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=HF_DIR")
    parser.add_argument("--problems", action="append", required=True, metavar="NAME=JSONL")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--limit", type=positive, help="only the first problems of each set")
    args = parser.parse_args()
    try:
        found = measure(named(args.model), named(args.problems), args.max_new_tokens, args.limit)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(args.output, json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
