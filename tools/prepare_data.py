"""Turn text, conversations and prompts into training data, with receipts of what went in and what came out.

    python tools/prepare_data.py cpt --input corpus.jsonl --tokenizer HF_FOLDER --output DIR --valid-fraction 0.01
    python tools/prepare_data.py sft --input conversations.jsonl --tokenizer HF_FOLDER --output DIR
    python tools/prepare_data.py rl --input prompts.parquet --tokenizer HF_FOLDER --output DIR
    python tools/prepare_data.py inspect DIR -n 5
    python tools/prepare_data.py decontaminate --input data.jsonl --against aime24/test.jsonl --output DIR
    python tools/prepare_data.py verify DIR

Each prints its result as JSON. docs/data.md describes them.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor

from infir2.indexed import DataError

COMMANDS = {
    "cpt": ("infir2.data.pretraining", "text to token files for continual pre-training"),
    "sft": ("infir2.data.conversations", "conversations to tokens and loss masks for supervised fine-tuning"),
    "rl": ("infir2.data.prompts", "prompts and labels for reinforcement learning"),
    "inspect": ("infir2.data.inspection", "show what is trained on"),
    "decontaminate": ("infir2.data.overlap", "find records that overlap with evaluation sets"),
    "verify": ("infir2.receipts", "recompute every hash of a prepared folder"),
}

log = logging.getLogger("prepare_data")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line to namespace; `arguments` keeps what was typed, for the manifest.

    Only the chosen command's module is imported: it adds its options (`add_arguments`) and does the work (`run`).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments, argparse.Namespace(arguments=list(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; prints its result as JSON. Exit status 2 on any refusal, 1 if a worker process was lost."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(levelname)s: %(message)s")
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        print(json.dumps(args.run(args), ensure_ascii=False))
    except (DataError, OSError) as error:
        log.error("%s", error)
        return 2
    except BrokenExecutor:
        log.error("a worker process was killed, most often for lack of memory. Run again with fewer --workers.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
