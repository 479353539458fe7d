"""`prepare_data.py sft`: chat templates, loss masks, refusals, and the reader that training uses.

Each test's docstring says which fault it pins. The oracle of the loss mask is a ChatML renderer written out here; it
works on characters and bytes and knows nothing of the code under test.
"""

import gzip
import importlib
import json
import re
import signal
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, processors

from infir2.data import pipeline
from infir2.data.chat import ChatTokenizer, special_tokens_map
from infir2.data.samples import Samples
from infir2.indexed import DataError
from infir2.receipts import OWN_HASH, read_manifest, verify, write_manifest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
prepare_data = importlib.import_module("prepare_data")
corpus = importlib.import_module("quickstart_corpus")

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Templates as models have them, by their published behaviour.
TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
DEFAULT_SYSTEM = (  # Qwen2.5
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}" + TURN + "{% endfor %}" + PROMPT
)
FIRST_TURN_SYSTEM = (  # SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + TURN + "{% endfor %}" + PROMPT
)
EARLIER_THINKING_CUT = (  # Qwen3
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set text = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n')"
    " if '</think>' in message.content else '' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
MARKED = (  # {% generation %}, as TRL wants it
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
TRIMMED = (  # Llama 2: no header before the answer; the end-of-sequence token by its name; content without its spaces
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[Q] ' + message.content | trim + ' [/Q]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPACED = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None, tokenizer: Tokenizer, eos: str = STOP) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": {"content": END}}
    config |= {"chat_template": template} if template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """A byte-level BPE with pieces of line ends, half characters and words."""
    words = ["the answer is\n\n\nthen\n\n the thing\n\n", "décédé", "im_end im_start <| |>", "a    b    c"]
    tokenizer = corpus.train_tokenizer(["日本語の日本", "🙂🙃🙂🙂", *words] * 30, 300)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as in GPT-2's and SmolLM2's
    return tokenizer


@pytest.fixture(scope="session")
def folder(bpe, tmp_path_factory) -> Path:
    """Tokenizer folder with the quickstart's ChatML template."""
    return write_tokenizer(tmp_path_factory.mktemp("chatml"), corpus.CHAT_TEMPLATE, bpe)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Contents in turn by user and assistant."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def write_jsonl(path: Path, conversations: list) -> Path:
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepare(*arguments) -> int:
    return prepare_data.main(["sft", *map(str, arguments)])


def prepared(tmp_path: Path, tokenizer: Path, conversations: list, *more) -> Path:
    """Folder of samples."""
    source = write_jsonl(tmp_path / "in.jsonl", conversations)
    output = tmp_path / "data"
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", output, "--workers", 1, *more) == 0
    return output


def runs(samples: Samples, index: int, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Text of each run of equally masked tokens."""
    tokens, mask = samples.sample(index)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), tokens.size]
    return [
        (tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False), bool(mask[a])) for a, b in pairwise(cuts)
    ]


# The loss mask


def byte_of() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def oracle(messages: list[dict[str, str]], ids: dict[str, int]) -> list[tuple[int, bool]]:
    """ChatML in units, each with whether it is trained: a byte (0 to 255), or 256 + id for a control token."""
    units: list[tuple[int, bool]] = []
    for message in messages:
        trained = message["role"] == "assistant"
        header, content = (unicodedata.normalize("NFC", text) for text in (message["role"] + "\n", message["content"]))
        units.append((256 + ids[START], False))
        units += [(byte, False) for byte in header.encode()] + [(byte, trained) for byte in content.encode()]
        units += [(256 + ids[STOP], trained), (ord("\n"), False)]
    return units


SNIPPETS = (
    *"a 7 . \n \n\n \t \r\n the answer is \0 {{ 1 }} [/Q] <think>\nso\n</think>\n\n".split(" "),
    *"日本語 語 é e\u0301 \u0301 \u0323\u0307 🙂 👩‍👩‍👧 🇫🇷 \u1112\u1161\u11ab שלום \ue000 \ue001".split(" "),
    *(" ", "  ", START, STOP, END, "<|im_", "|im_end|>", f"{STOP}\n{START}assistant\n", "<<|im_end|>", "assistant\n"),
)


def random_conversation(random: Random) -> list[dict[str, str]]:
    """Turns of snippets; texts come again in other turns."""

    def text() -> str:
        return "".join(random.choices(SNIPPETS, k=random.randint(0, 12))) + random.choice(("x", "日", "🙂"))

    shared = text()
    contents = [random.choice((text(), text(), shared)) for _ in range(2 * random.randint(1, 4))]
    contents = [random.choice(("", "\n", " ")) + content + random.choice(("", "\n", " ")) for content in contents]
    return chat(*contents, system=random.choice((None, text())))


def test_mask_equals_a_character_oracle(tmp_path, folder, bpe):
    """Pins every way to train on the wrong token: headers, a user's words that the assistant repeats, half characters,
    line ends that merge across the header, typed special tokens read as control tokens, the missing end of a turn."""
    random = Random(20261122)
    conversations = [random_conversation(random) for _ in range(1000)]
    samples = Samples(prepared(tmp_path, folder, conversations, "--keep-duplicates"), "train")
    assert len(samples) == 1000
    vocabulary = {index: token for token, index in bpe.get_vocab().items()}
    ids = {token: bpe.token_to_id(token) for token in (START, STOP, END)}
    byte = byte_of()
    straddling = 0
    for index, messages in enumerate(conversations):
        tokens, mask = samples.sample(index)
        units = oracle(messages, ids)
        place = 0
        for token, trained in zip(tokens.tolist(), mask.tolist(), strict=True):
            found = [256 + token] if token in ids.values() else [byte[letter] for letter in vocabulary[token]]
            expected = units[place : place + len(found)]
            assert found == [unit for unit, _ in expected], (index, messages)
            assert trained == all(flag for _, flag in expected), (index, messages, vocabulary[token])
            straddling += not trained and any(flag for _, flag in expected)
            place += len(found)
        assert place == len(units)
    counted = read_manifest(tmp_path / "data")["counted"]
    assert counted["tokens across the beginning of a turn"] == straddling > 10
    typed = sum(m["content"].count(token) for messages in conversations for m in messages for token in ids)
    assert counted["special tokens kept as text"] == typed > 100


EXPECTED = {
    "default system": (
        DEFAULT_SYSTEM,
        chat("Hi", "Yo ", "So", "Ok"),
        [
            (f"{START}system\nYou are a helper.{STOP}\n{START}user\nHi{STOP}\n{START}assistant\n", 0),
            ("Yo <|im_end|>", 1),
            ("\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n", 0),
            ("Ok<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "own system": (
        DEFAULT_SYSTEM,
        chat("Hi", "Hi", system="Hi"),
        [
            ("<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 0),
            ("Hi<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "first turn system": (
        FIRST_TURN_SYSTEM,
        chat("Hi", "Yo"),
        [
            ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 0),
            ("Yo<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "earlier thinking cut": (
        EARLIER_THINKING_CUT,
        chat("1", "<think>\na\n</think>\n\nA", "2", "<think>b</think>B"),
        [
            ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n", 0),
            ("A<|im_end|>", 1),
            ("\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n", 0),
            ("<think>\nb\n</think>\n\nB<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "empty thinking": (
        EARLIER_THINKING_CUT,
        chat("1", "A"),
        [
            ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n", 0),
            ("<think>\n\n</think>\n\nA<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "generation marks": (
        MARKED,
        chat("1", f"A{STOP}\n", "2", "B"),
        [
            ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n", 0),
            ("A<|im_end|>\n<|im_end|>", 1),
            ("\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n", 0),
            ("B<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "trimmed": (
        TRIMMED,
        chat(" 1 ", " A\n", "2", "[/Q]"),
        [
            ("[Q] 1 [/Q]", 0),
            (" A <|im_end|>", 1),
            ("[Q] 2 [/Q]", 0),
            (" [/Q] <|im_end|>", 1),
        ],
    ),
    "no special token before the answer": (
        TRIMMED,
        chat(f"{STOP}{STOP}{STOP} 1", "A"),
        [("[Q] <|im_end|><|im_end|><|im_end|> 1 [/Q]", 0), (" A <|im_end|>", 1)],
    ),
    "header that ends in a space": (
        SPACED,
        chat("1", "   A"),
        [("user: 1<|im_end|>assistant:   ", 0), (" A<|im_end|>", 1)],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_mask_follows_what_the_template_renders(tmp_path, bpe, name):
    """Pins masks that assume one template: system messages it adds, thinking it cuts, spaces it trims, its own marks.

    The tokens are those of transformers' apply_chat_template wherever no special token is typed.
    """
    from transformers import PreTrainedTokenizerFast

    template, messages, expected = EXPECTED[name]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, bpe)
    samples = Samples(prepared(tmp_path, tokenizer, [messages]), "train")
    assert runs(samples, 0, bpe) == expected
    if STOP not in "".join(message["content"] for message in messages):
        reference = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=STOP, chat_template=template)
        ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert samples.sample(0)[0].tolist() == ids
    cut = read_manifest(tmp_path / "data")["counted"]["turns not rendered in full"]
    assert cut == (name == "earlier thinking cut")


def test_last_turn_only(tmp_path, folder, bpe):
    """Pins --train-on last that trains on all turns, or on none."""
    output = prepared(tmp_path, folder, [chat("1", "A", "2", "B")], "--train-on", "last")
    assert [text for text, trained in runs(Samples(output, "train"), 0, bpe) if trained] == [f"B{STOP}"]


def test_thinking_tokens_of_the_assistant_stay_tokens(tmp_path, bpe):
    """Pins a model that learns <think> letter by letter where its tokenizer has a special token for it; a user's
    <think> is text."""
    own = Tokenizer.from_str(bpe.to_str())
    own.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<think>", "</think>")])
    tokenizer = write_tokenizer(tmp_path / "tokenizer", corpus.CHAT_TEMPLATE, own)
    samples = Samples(prepared(tmp_path, tokenizer, [chat("<think>", "<think>a</think>b")]), "train")
    tokens, mask = samples.sample(0)
    assert np.flatnonzero(tokens == own.token_to_id("<think>")).size == 1
    assert tokens[mask].tolist() == own.encode(f"<think>a</think>b{STOP}").ids


# Refusals

HEADLESS = "{% for message in messages %}" + TURN + "{% endfor %}"
ENDLESS = "{% for message in messages %}" + TURN.replace(" + '<|im_end|>'", "") + "{% endfor %}" + PROMPT
THINKING_PROMPT = HEADLESS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
TWICE = "{% for message in messages %}" + TURN + TURN + "{% endfor %}" + PROMPT
DATED = "{{ strftime_now('%d %B') }}" + corpus.CHAT_TEMPLATE
UNFINISHED_MARKS = MARKED.replace(
    " + '<|im_end|>\\n' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
)
REFUSED_TEMPLATES = {
    "no template": (None, "has no chat template"),
    "header not in the prompt": (HEADLESS, "does not begin where the generation prompt ends"),
    "plain header not in the prompt": (
        "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}",
        r"lets an assistant write 'assistant: Answer\.",
    ),
    "no end of turn": (ENDLESS, "no special token follows"),
    "prompt is no prefix": (THINKING_PROMPT, r"differ at character \d+: '<think>"),
    "content twice": (TWICE, "does not come through as written"),
    "date": (DATED, "today's date"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "marks without the end": (UNFINISHED_MARKS, "no special token in the generation mark"),
}


@pytest.mark.parametrize("name", REFUSED_TEMPLATES)
def test_templates_that_do_not_fit_are_refused(tmp_path, bpe, caplog, name):
    """Pins masks over role headers, models that never stop, and data that changes from day to day."""
    template, message = REFUSED_TEMPLATES[name]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, bpe)
    source = write_jsonl(tmp_path / "in.jsonl", [chat("1", "A")])
    assert (
        prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data", "--on-error", "skip") == 2
    )
    assert re.search(message, caplog.records[-1].getMessage())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_special_tokens_that_take_spaces_are_refused(tmp_path, bpe, side):
    """Pins tokens other than the model sees: such tokens swallow the spaces beside them."""
    other = json.loads(bpe.to_str())
    for token in other["added_tokens"]:
        token[side] = token["content"] == STOP
    tokenizer = write_tokenizer(tmp_path / "tokenizer", corpus.CHAT_TEMPLATE, Tokenizer.from_str(json.dumps(other)))
    with pytest.raises(DataError, match="spaces beside its special tokens"):
        ChatTokenizer(tokenizer)


def test_template_arguments_and_the_jinja_file(tmp_path, bpe):
    """Pins a template other than the one that transformers picks, and --apply-chat-template-kwargs ignored."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "unused", bpe)
    (tokenizer / "chat_template.jinja").write_text("{{ date }}" + corpus.CHAT_TEMPLATE)
    output = prepared(tmp_path, tokenizer, [chat("1", "A")], "--apply-chat-template-kwargs", '{"date": "today"}')
    assert runs(Samples(output, "train"), 0, bpe)[0][0].startswith("today<|im_start|>user\n1")
    assert special_tokens_map(tokenizer) == {"eos_token": STOP, "pad_token": END}


GOOD = json.dumps({"messages": chat("1", "A")}).encode() + b"\n"
USER, ANSWER = '{"role": "user", "content": "1"}', '{"role": "assistant", "content": "A"}'
BAD_RECORDS = {
    "broken JSON": (b'{"messages": [', "broken JSON"),
    "not an object": (b"[]", "not an object"),
    "wrong encoding": ('{"messages": "é"}'.encode("latin-1"), "not valid UTF-8"),
    "missing field": (b'{"conversations": []}', "no messages: field 'messages' is missing.*conversations"),
    "not a list": (b'{"messages": "hi"}', "no messages: a str"),
    "no messages": (b'{"messages": []}', "no messages"),
    "not a message": (b'{"messages": ["hi"]}', "not a message: message 1 .* found a str"),
    "unknown speaker": (b'{"messages": [{"from": "narrator", "value": "1"}]}', "unknown role: .*'narrator'.*human"),
    "parts": (b'{"messages": [{"role": "user", "content": [{"text": "1"}]}]}', "not a message: .* is a list"),
    "unknown role": (b'{"messages": [{"role": "gpt", "content": "A"}]}', "unknown role: message 1 .*'gpt'"),
    "empty content": (b'{"messages": [%s, {"role": "assistant", "content": " \\n"}]}' % USER.encode(), "empty content"),
    "assistant first": (f'{{"messages": [{ANSWER}, {USER}]}}'.encode(), "roles out of order: .*assistant, user"),
    "no assistant": (f'{{"messages": [{USER}]}}'.encode(), "nothing to train on"),
    "tools without a name": (f'{{"messages": [{USER}, {ANSWER}], "tools": [{{}}]}}'.encode(), "tools: definitions"),
    "tools ignored": (
        f'{{"messages": [{USER}, {ANSWER}], "tools": [{{"name": "weather"}}]}}'.encode(),
        "tools: the chat template does not render the definitions of .'weather'",
    ),
    "system column": (f'{{"messages": [{USER}, {ANSWER}], "system": ["S"]}}'.encode(), "system: field 'system' is a l"),
    "record marked": (f'{{"messages": [{USER}, {ANSWER}], "weight": 0.5}}'.encode(), "unknown mark: .*0.5"),
    "empty file": (None, "empty file"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_refused_by_line(tmp_path, folder, caplog, capsys, name):
    """Pins conversations that vanish, or that are trained on although they make no sense; `skip` counts them."""
    line, message = BAD_RECORDS[name]
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_bytes(b"" if line is None else GOOD.replace(b"1", b"2") + line + b"\n")
    good.write_bytes(GOOD)
    command = ["--input", bad, good, "--tokenizer", folder, "--output", tmp_path / "data", "--workers", 1]
    where = r"bad\.jsonl" + (":2" if line is not None else "")
    assert prepare(*command) == 2
    assert re.search(f"{where}: {message}.*--on-error skip", caplog.records[-1].getMessage())
    assert not (tmp_path / "data").exists()
    assert prepare(*command, "--on-error", "skip") == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["dropped"].values()) == 1
    assert result["splits"]["train"]["documents"] == 1 + (line is not None)


def test_template_that_refuses_two_users(tmp_path, bpe, caplog):
    """Pins a template's own refusal taken for a rendering."""
    strict = (
        "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + corpus.CHAT_TEMPLATE
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer", strict, bpe)
    two_users = [*chat("1"), *chat("2", "A")]
    source = write_jsonl(tmp_path / "in.jsonl", [two_users])
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data") == 2
    assert re.search(r"in\.jsonl:1: refused by the chat template: .*must alternate", caplog.records[-1].getMessage())


@pytest.mark.parametrize("choice", ["fail", "drop", "truncate"])
def test_over_long_samples(tmp_path, folder, bpe, caplog, capsys, choice):
    """Pins samples cut or dropped without a word; one that has nothing left to train on is never kept."""
    short, long, late = chat("1", "A"), chat("2", "x" * 100), chat("y" * 100, "A")
    source = write_jsonl(tmp_path / "in.jsonl", [short, long, late])
    output = tmp_path / "data"
    command = ["--input", source, "--tokenizer", folder, "--output", output, "--max-length", 40, "--over-long", choice]
    assert prepare(*command) == (2 if choice == "fail" else 0)
    if choice == "fail":
        assert "in.jsonl:2: over-long" in caplog.records[-1].getMessage()
        return
    result = json.loads(capsys.readouterr().out)
    samples = Samples(output, "train")
    if choice == "drop":
        assert result["dropped"] == {"over-long": 2}
        assert len(samples) == 1
    else:
        assert result["dropped"] == {"nothing to train on": 1}
        assert result["counted"]["truncated samples"] == 1
        assert samples.lengths().max() == 40
        text, trained = runs(samples, 1, bpe)[-1]
        assert trained
        assert set(text) == {"x"}


# What must reach the tokens

TOOLS_TURN = (  # Qwen2.5's own way, in short: calls as JSON between marks, definitions in a system message
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}"
    "{% set call = call.function or call %}"
    "{{ '[' + call.name + ']' + call.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
THOUGHT_BEFORE = TURN.replace(  # a field for thoughts, which is cut from all turns but the last, as in Qwen3
    "message['content']",
    "(('<think>' + message.reasoning_content + '</think>') if loop.last and message.reasoning_content else '')"
    " + message['content']",
)
HEADER_IN_MARK = MARKED.replace("assistant\\n' }}{% generation %}{{ ", "assistant' }}{% generation %}{{ '\\n' + ")
CUTS_THOUGHTS = TURN.replace("message['content']", "message['content'].split('</think>')[-1]")  # as R1-Distill's


def looped(turn: str) -> str:
    """A template of this for each message."""
    return "{% for message in messages %}" + turn + "{% endfor %}" + PROMPT


def call(arguments, content="", name="weather", **more) -> list[dict]:
    """A conversation in which the assistant calls a tool, and then answers."""
    function = {"name": name, "arguments": arguments}
    calls = {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **more}
    calls |= {} if content is ... else {"content": content}
    return [*chat("How warm?"), calls, {"role": "tool", "content": "4", "tool_call_id": "c1"}, *chat("", "Four.")[1:]]


def trained_of(output: Path, tokenizer: Tokenizer, index: int = 0) -> list[str]:
    """The trained texts of a sample."""
    return [text for text, trained in runs(Samples(output, "train"), index, tokenizer) if trained]


@pytest.mark.parametrize("content", ["", None, ..., " ", "I look."])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_tool_calls_are_trained_once_whatever_their_form(tmp_path, bpe, content, arguments):
    """Pins a call refused for its empty, null or missing content, and arguments in a string that are quoted twice."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    output = prepared(tmp_path, tokenizer, [call(arguments, content)])
    said = content if isinstance(content, str) else ""
    assert trained_of(output, bpe) == [f'{said}[weather]{{"city": "Oslo"}}{STOP}', f"Four.{STOP}"]


def test_nulls_of_a_table_are_not_trained(tmp_path, bpe):
    """Pins arguments of other tools, null, in every call: Parquet gives all rows the fields of each."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    conversations = [call({"city": "Oslo"}), call({"a": 2, "b": {"c": 3}}, name="add"), chat("1", "A")]
    pq.write_table(pa.table({"messages": conversations}), tmp_path / "in.parquet")
    output = tmp_path / "data"
    assert prepare("--input", tmp_path / "in.parquet", "--tokenizer", tokenizer, "--output", output) == 0
    assert trained_of(output, bpe)[0] == f'[weather]{{"city": "Oslo"}}{STOP}'
    assert trained_of(output, bpe, 1)[0] == f'[add]{{"a": 2, "b": {{"c": 3}}}}{STOP}'


def test_nulls_of_a_table_that_became_json_are_not_trained(tmp_path, bpe, capsys):
    """Pins null arguments that the called tool does not have, in JSON that a table became; others are counted."""
    properties = {"city": {"type": "string"}, "unit": {"type": "string"}, "a": None}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    messages = call({"city": "Oslo", "unit": None, "a": None, "b": None})
    records = [{"messages": messages, "tools": tools}, {"messages": messages}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "data"
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", output) == 0
    assert trained_of(output, bpe)[0] == f'[weather]{{"city": "Oslo", "unit": null}}{STOP}'
    assert '"a"' not in texts_of(output, "train", bpe)[0]
    assert trained_of(output, bpe, 1)[0] == f'[weather]{{"city": "Oslo", "unit": null, "a": null, "b": null}}{STOP}'
    assert json.loads(capsys.readouterr().out)["counted"]["calls with null arguments"] == 2


SAID_ELSEWHERE = {
    "parameters": {"name": "weather", "parameters": {"city": "Oslo"}},
    "input": {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}},
    "text": {"name": "weather", "args": '{"city": "Oslo"}'},
    "no number": {"name": "weather", "arguments": '{"n": NaN}'},
    "too large": {"name": "weather", "arguments": '{"n": 1e400}'},
    "false": {"name": "weather", "arguments": False},
}


@pytest.mark.parametrize("name", SAID_ELSEWHERE)
@pytest.mark.parametrize("nested", [True, False])
def test_calls_that_lose_their_arguments_are_refused(tmp_path, bpe, caplog, name, nested):
    """Pins a call trained as one without arguments, because they stand in another field; and what JSON cannot say."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    conversation = call({})
    conversation[1]["tool_calls"] = [{"function": SAID_ELSEWHERE[name]} if nested else SAID_ELSEWHERE[name]]
    source = write_jsonl(tmp_path / "in.jsonl", [conversation])
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data") == 2
    assert "in.jsonl:1: tool call: " in caplog.records[-1].getMessage()


@pytest.mark.parametrize("arguments", ["", "null", "{}", None, []])
def test_calls_without_arguments(tmp_path, bpe, arguments):
    """Pins a call without arguments that is refused, whatever stands for none."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    output = prepared(tmp_path, tokenizer, [call(arguments)])
    assert trained_of(output, bpe)[0] == f"[weather]{{}}{STOP}"


def test_short_floats_of_a_table_are_trained_as_they_are_written(tmp_path, bpe):
    """Pins 0.1 in a column of 32 bits that is trained as 0.10000000149011612."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    table = pa.table({"messages": [call({"x": 0.1, "l": [2.5, None]})]})
    kind = pa.list_(pa.struct([*call_fields(table), ("tool_calls", pa.list_(short_call()))]))
    pq.write_table(table.cast(pa.schema([("messages", kind)])), tmp_path / "in.parquet")
    output = tmp_path / "data"
    assert prepare("--input", tmp_path / "in.parquet", "--tokenizer", tokenizer, "--output", output) == 0
    assert '"x": 0.1' in trained_of(output, bpe)[0]


def call_fields(table: pa.Table) -> list[pa.Field]:
    return [field for field in table.schema.field("messages").type.value_type if field.name != "tool_calls"]


def short_call() -> pa.DataType:
    arguments = pa.struct([("x", pa.float32()), ("l", pa.list_(pa.float32()))])
    function = pa.struct([("name", pa.string()), ("arguments", arguments)])
    return pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])


def test_byte_order_marks_in_messages_are_not_trained(tmp_path, folder, bpe):
    """Pins the mark of a file whose text became a message."""
    output = prepared(tmp_path, folder, [chat("\ufeff1", "\ufeffA")])
    assert trained_of(output, bpe) == [f"A{STOP}"]
    assert "\ufeff" not in texts_of(output, "train", bpe)[0]


@pytest.mark.parametrize("place", ["functions", "message", "both"])
def test_tools_elsewhere_are_rendered_or_refused(tmp_path, bpe, caplog, place):
    """Pins definitions in a column `functions`, or in a message, that are ignored."""
    tool = {"name": "weather", "parameters": {}}
    record = {"messages": call({}), **({"functions": [tool]} if place != "message" else {})}
    if place == "message":
        record["messages"] = [{"role": "system", "content": "S", "tools": [{"name": "other"}]}, *record["messages"]]
    if place == "both":
        record["tools"] = [tool]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    status = prepare("--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "data")
    assert status == (0 if place == "functions" else 2)
    if status:
        assert "in.jsonl:1: tools: " in caplog.records[-1].getMessage()
    else:
        assert json.dumps(tool) in texts_of(tmp_path / "data", "train", bpe)[0]


@pytest.mark.parametrize("column", ["list", "string", "strings", "none", "null", "empty"])
def test_tools_are_rendered(tmp_path, bpe, column):
    """Pins a column of definitions that is refused, or ignored, and one without any that is refused."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"big": 2**70}}}]
    values = {"list": tools, "string": json.dumps(tools), "strings": [json.dumps(tools[0])], "null": None, "empty": []}
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    record = {"messages": call({}), **({"tools": values[column]} if column in values else {})}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    output = tmp_path / "data"
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", output) == 0
    read = runs(Samples(output, "train"), 0, bpe)[0][0]
    assert read.startswith("<|im_start|>system\n" + json.dumps(tools[0]) if "s" in column else "<|im_start|>user\n")
    assert trained_of(output, bpe)[0] == f"[weather]{{}}{STOP}"


UNRENDERED = {
    "thoughts in a field": ([*chat("1"), {"role": "assistant", "content": "A", "reasoning_content": "Hm."}], None),
    "thoughts that the answer holds by chance": (
        [*chat("1"), {"role": "assistant", "content": "A", "thought": "a"}],
        None,
    ),
    "thoughts by another name": ([*chat("1"), {"role": "assistant", "content": "A", "thinking": "Hm."}], None),
    "a call": (call({"city": "Oslo"}, "I look."), None),
    "thoughts of the last answer": (chat("1", "<think>Hm.</think>A"), looped(CUTS_THOUGHTS)),
    "arguments": (call({"city": "Oslo"}), TOOLS_TURN.replace(" + call.arguments | tojson", "")),
}


@pytest.mark.parametrize("name", UNRENDERED)
def test_what_an_assistant_says_and_a_template_drops_is_refused(tmp_path, bpe, caplog, name):
    """Pins thoughts, tool calls and their arguments that vanish without a word."""
    conversation, template = UNRENDERED[name]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template or corpus.CHAT_TEMPLATE, bpe)
    source = write_jsonl(tmp_path / "in.jsonl", [conversation])
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data") == 2
    assert re.search(r"in\.jsonl:1: (not rendered|tool call|chat template does not)", caplog.records[-1].getMessage())


def test_what_a_template_leaves_out_on_purpose_is_counted(tmp_path, bpe, capsys):
    """Pins earlier thoughts, other fields and messages that vanish uncounted."""
    template = looped("{% if message.role != 'system' %}" + THOUGHT_BEFORE + "{% endif %}")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, bpe)
    conversation = chat("1", "A", "2", "B", system="S")
    conversation[2] |= {"reasoning_content": "Earlier.", "model": "large", "turn": 1}
    conversation[4] |= {"reasoning_content": "Last."}
    output = prepared(tmp_path, tokenizer, [conversation])
    assert trained_of(output, bpe) == [f"A{STOP}", f"<think>Last.</think>B{STOP}"]
    counted = json.loads(capsys.readouterr().out)["counted"]
    assert {key: count for key, count in counted.items() if count} == {
        "turns not rendered in full": 1,
        "fields 'model' not rendered": 1,
        "system messages not rendered in full": 1,
    }


@pytest.mark.parametrize("mark", ["loss", "weight", "loss_mask", "train"])
@pytest.mark.parametrize("no", [0, 0.0, False])
def test_marked_turns_are_not_trained(tmp_path, folder, bpe, mark, no):
    """Pins a turn marked as wrong, by the names that others use, that is trained all the same."""
    conversation = chat("2+2?", "5", "Wrong.", "4")
    conversation[1][mark], conversation[3][mark] = no, 1
    conversation[0][mark] = None
    assert trained_of(prepared(tmp_path, folder, [conversation]), bpe) == [f"4{STOP}"]


@pytest.mark.parametrize(
    ("marks", "found"),
    [({"weight": 0.5}, "0.5"), ({"loss_weight": 0}, "loss_weight"), ({"loss": 0, "train": 1}, "both|as trained and"),
     ({"mask": True}, "mask"), ({"loss": "no"}, "no"), ({"lossMask": 0}, "lossMask"), ({"isTrained": False}, "isT"),
     ({"Train-On-Turn": 0}, "Train-On"), ({"supervised": False}, "supervised"), ({"skip": True}, "skip")],
)  # fmt: skip
def test_unknown_marks_are_refused(tmp_path, folder, caplog, marks, found):
    """Pins a mark of another name or value that is ignored."""
    source = write_jsonl(tmp_path / "in.jsonl", [[*chat("1"), {**chat("", "A")[1], **marks}]])
    assert prepare("--input", source, "--tokenizer", folder, "--output", tmp_path / "data") == 2
    assert re.search(rf"in\.jsonl:1: unknown mark: message 2 .*({found})", caplog.records[-1].getMessage())


def test_fields_that_only_look_like_marks_are_taken(tmp_path, folder):
    """Pins records refused for a field whose name holds such a word: `constraint` holds `train`."""
    messages = chat("1", "A")
    messages[1]["glossary"] = True
    record = {"messages": messages, "constraints": ["short"], "loss": 1.7, "weight": 1}
    record |= {"train_loss": 0.3, "skip": False, "training_data": ["a"], "train": "web", "loss_mask": None}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", folder, "--output", tmp_path / "data") == 0


@pytest.mark.parametrize(
    "marks",
    [{"loss_mask": [0, 1]}, {"weights": [0.0, 1.0]}, {"trainable_turns": [False, True]}, {"sample_weight": 0.5},
     {"loss": "0"}, {"isTrained": False}, {"masked": True}, {"skip": 1}, {"chat_template_kwargs": {"thinking": 0}}],
)  # fmt: skip
def test_marks_of_a_whole_record_are_refused(tmp_path, folder, caplog, marks):
    """Pins marks turn by turn in a list beside the messages, by other names, and arguments of the template: ignored."""
    record = {"messages": chat("2+2?", "5", "Wrong.", "4"), **marks}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", folder, "--output", tmp_path / "data") == 2
    assert next(iter(marks)) in caplog.records[-1].getMessage()


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "systemPrompt"])
def test_system_column_and_empty_system_message(tmp_path, bpe, caplog, key):
    """Pins a `system` column that is ignored, and an empty system message that is refused or gives the default one."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", DEFAULT_SYSTEM, bpe)
    records = [{"messages": chat(f"{n}", "A"), key: system} for n, system in enumerate(["Be a sailor.", None, " "])]
    records += [{"messages": chat("4", "A", system="")}, {"messages": chat("5", "A", system="Same."), key: "Same."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "data"]
    assert prepare(*command) == 0
    texts = texts_of(tmp_path / "data", "train", bpe)
    systems = [re.match(r"(?:<\|im_start\|>)?system\n(.*?)(?:<\|im_end\|>)?\n", text)[1] for text in texts]
    assert systems == ["Be a sailor.", "You are a helper.", "You are a helper.", "", "Same."]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": chat("1", "A", system="One."), key: "Other."}))
    assert prepare(*command[:-1], tmp_path / "other") == 2
    assert "system message differ: 'Other.'" in caplog.records[-1].getMessage()


def test_sharegpt(tmp_path, folder, bpe):
    """Pins the form that most older data has, refused."""
    messages = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "1", "weight": None},
        {"from": "gpt", "value": "A", "weight": 0},
        {"from": "Prompter", "value": "2"},
        {"from": "ChatGPT", "value": "B"},
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversations": messages}))
    command = ["--input", tmp_path / "in.jsonl", "--tokenizer", folder, "--output", tmp_path / "data"]
    assert prepare(*command, "--messages-key", "conversations") == 0
    assert trained_of(tmp_path / "data", bpe) == [f"B{STOP}"]
    said = [{"from": "human", "value": "1"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TOOLS_TURN, bpe)
    output = prepared(tmp_path, tokenizer, [[*said, {"from": "observation", "value": ""}, messages[-1]]], "--output",
                      tmp_path / "calls")  # fmt: skip
    assert trained_of(tmp_path / "calls", bpe) == [f'[f]{{"a": 1}}{STOP}', f"B{STOP}"], output


def test_header_inside_a_generation_mark_is_not_trained(tmp_path, bpe):
    """Pins the line end of the header trained, where a template's mark begins before it (Qwen2.5's, in TRL)."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "{# {% generation %} #}" + HEADER_IN_MARK, bpe)
    output = prepared(tmp_path, tokenizer, [chat("1", "A", "2", "\n\nB")])
    assert "".join(trained_of(output, bpe)[0]) == f"A{STOP}"
    assert trained_of(output, bpe)[1].endswith(f"B{STOP}")
    plain = write_tokenizer(tmp_path / "plain", MARKED, bpe)
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", plain, "--output", tmp_path / "plain_data") == 0
    for name in ("train.bin", "train.mask"):
        assert (output / name).read_bytes() == (tmp_path / "plain_data" / name).read_bytes()


def test_template_that_opens_a_thought_says_what_to_use(tmp_path, bpe, caplog):
    """Pins a refusal of R1-Distill's template that leaves its user alone, and advice that does not work."""
    user, answer, begin, end = (
        f"<\uff5c{name}\uff5c>"
        for name in ("User", "Assistant", "begin\u2581of\u2581sentence", "end\u2581of\u2581sentence")
    )
    own = Tokenizer.from_str(bpe.to_str())
    own.add_special_tokens([AddedToken(token, special=True) for token in (begin, end)])
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER' + message.content }}{% else %}"
        "{{ 'ANSWER' + message.content.split('</think>')[-1] + 'END' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ANSWER<think>\\n' }}{% endif %}"
    )
    for word, token in {"USER": user, "ANSWER": answer, "END": end}.items():
        template = template.replace(word, token)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, own, eos=end)
    thoughts = chat("2+2?", "<think>\nTwo.\n</think>\n\n4", "2+3?", "<think>\nThree.\n</think>\n\n5")
    source = write_jsonl(tmp_path / "in.jsonl", [thoughts])
    command = ["--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data"]
    assert prepare(*command) == 2
    assert "chat_template.jinja" in caplog.records[-1].getMessage()
    advice = (TOOLS.parent / "docs" / "data.md").read_text(encoding="utf-8").split("```jinja\n")[1].split("```")[0]
    (tokenizer / "chat_template.jinja").write_text(advice.removesuffix("\n"), encoding="utf-8")
    assert prepare(*command) == 0
    assert trained_of(tmp_path / "data", own) == [message["content"] + end for message in thoughts[1::2]]


def test_times_beside_the_messages_are_read(tmp_path, folder):
    """Pins a traceback over a column of nanoseconds, or of years beyond Python's, that nobody asked for."""
    times = pa.array([1700000000123456789], pa.timestamp("ns", "Nowhere/Land"))
    years = pa.array([10**15], pa.timestamp("ms"))
    nested = pa.array([{"at": 1, "after": 5}], pa.struct([("at", pa.time64("ns")), ("after", pa.duration("ns"))]))
    columns = {"messages": [chat("1", "A")], "created": times, "gone": years, "info": nested}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    assert prepare("--input", tmp_path / "in.parquet", "--tokenizer", folder, "--output", tmp_path / "data") == 0


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_broken_files_of_a_tokenizer_are_refused_by_name(tmp_path, bpe, caplog, name):
    """Pins tracebacks over a template in another encoding, and over a configuration that is a list."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", corpus.CHAT_TEMPLATE, bpe)
    (tokenizer / name).write_bytes("é".encode("latin-1") if name.endswith("jinja") else b"[]")
    source = write_jsonl(tmp_path / "in.jsonl", [chat("1", "A")])
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data") == 2
    assert name in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    "damage",
    [{"chat_template": [{"name": "default"}]}, {"chat_template": ["x"]}, {"chat_template": 7}, {"eos_token": {"a": 1}},
     {"eos_token": 7}],
)  # fmt: skip
def test_damaged_entries_of_a_tokenizer_are_refused_by_name(tmp_path, bpe, caplog, damage):
    """Pins tracebacks over a configuration that was edited by hand."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", corpus.CHAT_TEMPLATE, bpe)
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    source = write_jsonl(tmp_path / "in.jsonl", [chat("1", "A")])
    assert prepare("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data") == 2
    assert str(tokenizer) in caplog.records[-1].getMessage()


# Splits, receipts, processes


def texts_of(output: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    samples = Samples(output, split)
    return [tokenizer.decode(samples.sample(index)[0].tolist()) for index in range(len(samples))]


def test_answers_to_one_question_share_a_split(tmp_path, folder, bpe):
    """Pins leakage through another answer to the same question, in another case or spacing."""
    conversations = [chat(f"{'Q' if n % 2 else ' q'} {n % 40}", f"answer {n}") for n in range(240)]
    output = prepared(tmp_path, folder, conversations, "--valid-fraction", 0.3)
    questions = [
        {re.search(r"user\n ?q (\d+)", text.lower())[1] for text in texts_of(output, split, bpe)}
        for split in ("train", "valid")
    ]
    assert questions[0].isdisjoint(questions[1])
    assert len(questions[0] | questions[1]) == 40
    assert min(map(len, questions)) > 4


def test_duplicates_and_validation_questions_are_left_out(tmp_path, folder, capsys):
    """Pins a sample that counts twice, and a training sample with a validation question."""
    valid = write_jsonl(tmp_path / "valid.jsonl", [chat("hello", "A")])
    conversations = [chat("1", "A"), chat("1", "A"), chat("1", "B"), chat(" Hello", "C"), chat("1", "A", system="s")]
    prepared(tmp_path, folder, conversations, "--valid-input", valid)
    result = json.loads(capsys.readouterr().out)
    assert result["dropped"] == {"duplicate": 1, "in the validation split": 1}
    assert [result["splits"][split]["documents"] for split in ("train", "valid")] == [3, 1]


def test_near_duplicates_and_evaluation_problems_are_left_out(tmp_path, folder, bpe, capsys):
    """Pins a conversation that comes again with a word changed, and an evaluation problem that is trained on."""
    problem = "Find the number of ordered pairs of positive integers whose product is 1728 and whose sum is odd."
    long = " ".join(f"word{n} is followed by the next one" for n in range(60))
    (tmp_path / "aime.jsonl").write_text(json.dumps({"problem": problem}))
    conversations = [chat("1", long), chat("2", "A"), chat("1", long + " x"), chat(f"Now: {problem.upper()} Go.", "B")]
    options = ["--near-duplicates", 0.8, "--against", tmp_path / "aime.jsonl", "--drop"]
    output = prepared(tmp_path, folder, conversations, *options)
    dropped = json.loads(capsys.readouterr().out)["dropped"]
    assert dropped == {"near duplicate": 1, "overlaps with an evaluation set": 1}
    kept = texts_of(output, "train", bpe)
    assert [text.count("word59") for text in kept] == [1, 0]
    assert "in.jsonl:4" in (output / "overlap.txt").read_text()
    verify(output)


def test_file_formats_do_not_change_the_bytes(tmp_path, folder):
    """Pins records lost or reordered by a format: gzip, Parquet and JSON lines of one data set give the same files."""
    conversations = [chat(f"question {n}", f"A {n}", system="日本" if n % 2 else None) for n in range(50)]
    outputs = {}
    for name in ("in.jsonl", "in.jsonl.gz", "in.parquet"):
        source = write_jsonl(tmp_path / "in.jsonl", conversations)
        if name.endswith("gz"):
            (tmp_path / name).write_bytes(gzip.compress(source.read_bytes()))
        if name.endswith("parquet"):
            pq.write_table(pa.table({"messages": conversations}), tmp_path / name)
        output = tmp_path / f"{name}.data"
        command = ["--input", tmp_path / name, "--tokenizer", folder, "--output", output]
        assert prepare(*command, "--valid-fraction", 0.1) == 0
        verify(output)
        outputs[name] = read_manifest(output)["outputs"]
    assert outputs["in.jsonl"] == outputs["in.jsonl.gz"] == outputs["in.parquet"]


def test_processes_and_kills_do_not_change_the_bytes(tmp_path, folder):
    """Pins an order that depends on the processes, half a folder after SIGKILL, and workers that outlive it."""
    conversations = [{"messages": chat(f"question {n}", f"A {n}"), "pad": "x" * 5000} for n in range(600)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in conversations))
    assert source.stat().st_size > 2 * pipeline.BLOCK_BYTES
    options = ["--input", source, "--tokenizer", folder, "--valid-fraction", "0.1", "--output"]
    command = [sys.executable, TOOLS / "prepare_data.py", "sft", *options, tmp_path / "two", "--workers", "2"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / ".two.partial" / "train.bin").exists() and killed.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)  # the workers are starting
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert wait_until_gone(killed.pid)
    subprocess.run(command, check=True, capture_output=True)
    assert prepare(*options, tmp_path / "one", "--workers", 1) == 0
    assert read_manifest(tmp_path / "one")["outputs"] == read_manifest(tmp_path / "two")["outputs"]


def wait_until_gone(session: int) -> bool:
    """Whether every process of a session ends within two minutes."""
    for _ in range(2400):
        left = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True).stdout
        if all("Z" in line for line in left.splitlines()):
            return True
        time.sleep(0.05)
    return False


# The reader


def test_reader_gives_prompt_and_target(tmp_path, folder, bpe):
    """Pins a prompt that holds the answer, or a target of an earlier turn."""
    samples = Samples(prepared(tmp_path, folder, [chat("1", "A", "2", "BC")]), "train")
    prompt, target = samples.prompt_and_target(0)
    assert bpe.decode(prompt.tolist(), skip_special_tokens=False).endswith(f"user\n2{STOP}\n{START}assistant\n")
    assert bpe.decode(target.tolist(), skip_special_tokens=False) == f"BC{STOP}"
    assert (prompt.dtype, target.dtype, samples.lengths().dtype) == (np.int64,) * 3
    tokens, mask = samples.sample(0)
    assert (mask.dtype, samples.lengths().tolist()) == (bool, [tokens.size])


@pytest.mark.parametrize("damage", ["mask", "task", "split", "tokenizer"])
def test_reader_refuses(tmp_path, folder, damage):
    """Pins training on half a mask, on another task's data, or on another tokenizer's ids."""
    output = prepared(tmp_path, folder, [chat("1", "A")])
    facts = {key: part for key, part in read_manifest(output).items() if key not in ("format", "outputs", OWN_HASH)}
    if damage == "mask":
        (output / "train.mask").write_bytes(b"\1")
    if damage == "task":
        facts["request"]["task"] = "cpt"
    write_manifest(output, facts)
    sha256 = {"tokenizer": "0" * 64}.get(damage, facts["tokenizer"]["sha256"])
    message = {"mask": r"train\.mask has 1 bytes", "task": "prepared for 'cpt'", "split": "no split 'valid'"}
    with pytest.raises(DataError, match=message.get(damage, "model's tokenizer")):
        Samples(output, "valid" if damage == "split" else "train", sha256)
