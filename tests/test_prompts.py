"""`prepare_data.py rl`: labels, prompts, duplicates, refusals; and `prepare_data.py inspect`.

Each test's docstring says which fault it pins.
"""

import importlib
import json
import re
import sys
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from infir2.data.prompts import is_mathematics, same_label
from infir2.receipts import read_manifest, verify

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
prepare_data = importlib.import_module("prepare_data")
corpus = importlib.import_module("quickstart_corpus")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Tokenizer folder with the quickstart's ChatML template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["What is the sum of the numbers? The answer is the sum of them."] * 9
    corpus.train_tokenizer(texts, 280).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": corpus.CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(*arguments) -> int:
    return prepare_data.main(["rl", *map(str, arguments)])


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "label",
    r"""34 -34 +5 0.5 1,000 1/2 \frac{1}{2} $\frac{1}{2}$ \boxed{7} 2\pi x^2+1 3\sqrt{13} (1,2) [0,1) 50\% 90^\circ A oo
    5.4\text{cents} \{1,2\} \emptyset \infty y=2x+1 \left(3,\frac{\pi}{2}\right) 1,2,3 2+3i
    2^{-1} 12,120,5 1.5,2""".split(),
)
def test_mathematics_is_taken(label):
    """Pins good labels refused."""
    assert is_mathematics(label)


@pytest.mark.parametrize(
    "label",
    ["the answer is 5", "no solution", "hello", r"\text{even}", r"\boxed{\text{even}}", r"\frac{1}{", "?", "-", "=",
     "日本", "1/0", "\uff11\uff12", "٣٤", "१२", "2³", "3½", "1\uff0c5", "x₁", "五", "1_000", r"1\_000", "10_2", "1 000",
     "0x1F", "1,0000", "0,05", "1.2.3", "1|2", r"1\,000", "12\u201313", "1\u202f000", r"\frac{0}{0}", "10 000", "1 2",
     "1e5", "3..4", "12\n13", "$", "2**3", "2^-1", "5+", "x -", "5&6", "1.000,5", "1, 000", "1,000,00"],
)  # fmt: skip
def test_what_a_reward_would_misread_is_refused(label):
    """Pins labels that never match, or match a wrong answer: math-verify takes words for products of letters, "10 000"
    for 0, and finds the 5 in a sentence."""
    assert not is_mathematics(label)


@pytest.mark.parametrize(
    ("label", "words"),
    [("\uff11\uff12", "FULLWIDTH DIGIT ONE"), ("٣٤", "ARABIC-INDIC DIGIT THREE"), ("1_000", "underscore"),
     ("2³", "SUPERSCRIPT"), ("10 000", "digits apart"), ("1e5", "exponent"), ("0,05", "comma")],
)  # fmt: skip
def test_misread_labels_are_refused_by_name(tmp_path, folder, caplog, label, words):
    """Pins labels that pass although the reward reads another number, and refusals that do not say why."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "1+1?", "label": label}])
    command = ["--input", source, "--tokenizer", folder, "--output", tmp_path / "data"]
    assert prepare(*command) == 2
    found = caplog.records[-1].getMessage()
    assert re.search(rf"in\.jsonl:1: label does not parse: .*{words}", found)
    assert prepare(*command, "--label-kind", "text") == 0


def test_numbers_as_labels_keep_their_digits(tmp_path, folder, caplog):
    """Pins 42391158275216203514294433201 that becomes 4.239e28, in JSON, and decimals of a table refused."""
    digits = ["42391158275216203514294433201", "18446744073709551616", "-9223372036854775809", "9007199254740993",
              "3.14159265358979323846", "0.5", "7"]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "{n}", "label": {label}}}\n' for n, label in enumerate(digits)))
    command = ["--tokenizer", folder, "--output"]
    assert prepare("--input", source, *command, tmp_path / "data") == 0
    assert [line["label"] for line in lines_of(tmp_path / "data" / "train.jsonl")] == digits
    decimals = pa.array([Decimal("12345678901234567890.50")], pa.decimal128(30, 2))
    pq.write_table(pa.table({"prompt": ["1"], "label": decimals}), tmp_path / "in.parquet")
    assert prepare("--input", tmp_path / "in.parquet", *command, tmp_path / "decimals") == 0
    assert lines_of(tmp_path / "decimals" / "train.jsonl")[0]["label"] == "12345678901234567890.50"
    for number, kind in enumerate((pa.float32(), pa.float64())):
        pq.write_table(pa.table({"prompt": ["1"], "label": pa.array([0.1], kind)}), tmp_path / "in.parquet")
        assert prepare("--input", tmp_path / "in.parquet", *command, tmp_path / f"float{number}") == 0
        assert lines_of(tmp_path / f"float{number}" / "train.jsonl")[0]["label"] == "0.1"
    for number, lost in enumerate((2.0**53, float("nan"))):
        pq.write_table(pa.table({"prompt": ["1"], "label": [lost]}), tmp_path / "in.parquet")
        assert prepare("--input", tmp_path / "in.parquet", *command, tmp_path / f"none{number}") == 2
        assert "may have lost digits" in caplog.records[-1].getMessage()


def test_prompts_of_other_mathematics_are_not_merged(tmp_path, folder):
    """Pins 2³ and 23, X and x, that count as one prompt: a false dispute, or a prompt that is lost."""
    prompts = [
        "What is 2³ + 1?",
        "What is 23 + 1?",
        "Let X=2, x=3. Find X.",
        "Let X=2, x=3. Find x.",
        "what is  23 + 1?",
    ]
    labels = ["9", "24", "2", "3", "24"]
    records = [{"prompt": prompt, "label": label} for prompt, label in zip(prompts, labels, strict=True)]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    assert prepare("--input", source, "--tokenizer", folder, "--output", tmp_path / "data") == 0
    lines = lines_of(tmp_path / "data" / "train.jsonl")
    assert [line["label"] for line in lines] == labels[:4]
    assert len({line["id"] for line in lines}) == 4


def test_dapo_as_it_is_published(tmp_path, folder, caplog):
    """Pins the data set of the recipe refused: its label is a field inside another one."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": f"What is {n} + 1?", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{n}"},
        }
        for n in (1, 2, 1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    command = ["--input", tmp_path / "dapo.parquet", "--tokenizer", folder, "--output"]
    assert prepare(*command, tmp_path / "data") == 0
    assert [line["label"] for line in lines_of(tmp_path / "data" / "train.jsonl")] == ["2", "3"]
    assert prepare(*command, tmp_path / "named", "--label-key", "extra_info.index") == 0
    assert [line["label"] for line in lines_of(tmp_path / "named" / "train.jsonl")] == ["1", "2"]
    assert prepare(*command, tmp_path / "none", "--label-key", "answer") == 2
    assert "reward_model.ground_truth" in caplog.records[-1].getMessage()


def test_metadata_is_carried(tmp_path, folder):
    """Pins rewards that need more than a label (reasoning-gym's): metadata was dropped."""
    metadata = {"source_dataset": "countdown", "numbers": [3, 2**70], "nothing": None}
    values = [metadata, json.dumps(metadata), "from a book", None]
    records = [{"prompt": f"{n}?", "label": "1", "metadata": value} for n, value in enumerate(values)]
    source = write_jsonl(tmp_path / "in.jsonl", [*records, {"prompt": "last?", "label": "1"}])
    assert prepare("--input", source, "--tokenizer", folder, "--output", tmp_path / "data") == 0
    lines = lines_of(tmp_path / "data" / "train.jsonl")
    assert [line.get("metadata") for line in lines] == [metadata, metadata, None, None, None]
    assert sum("metadata" in line for line in lines) == 2
    table = pa.table({"prompt": ["1?", "2?"], "label": ["1", "2"], "extra": [{"a": {"n": 1}}, {"b": Decimal("1.5")}]})
    pq.write_table(table, tmp_path / "in.parquet")
    command = ["--input", tmp_path / "in.parquet", "--tokenizer", folder, "--output", tmp_path / "table"]
    assert prepare(*command, "--metadata-key", "extra") == 0
    assert [line["metadata"] for line in lines_of(tmp_path / "table" / "train.jsonl")] == [
        {"a": {"n": 1}},
        {"b": "1.5"},
    ]


def test_system_column_and_tools_of_prompts(tmp_path, folder, caplog):
    """Pins a `system` column that is ignored, and tools that the model would never see."""
    record = {"prompt": "1+1?", "label": "2", "system": "Be brief.", "tools": []}
    source = write_jsonl(tmp_path / "in.jsonl", [record])
    command = ["--input", source, "--tokenizer", folder, "--output"]
    assert prepare(*command, tmp_path / "data") == 0
    (line,) = lines_of(tmp_path / "data" / "train.jsonl")
    assert line["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    write_jsonl(source, [{**record, "tools": [{"name": "weather"}]}])
    assert prepare(*command, tmp_path / "none") == 2
    assert "in.jsonl:1: tools: definitions of tools are not given" in caplog.records[-1].getMessage()


def test_labels_are_compared_as_mathematics():
    """Pins a dispute between 1/2 and 0.5, and peace between 1/2 and 2."""
    assert same_label("1/2", r"\frac{1}{2}", True)
    assert same_label("1/2", "0.5", True)
    assert not same_label("1/2", "2", True)
    assert not same_label("1/2", "0.5", False)


def test_what_is_kept(tmp_path, folder):
    """Pins fields lost between a data set and training: strings, messages, numbers as labels, both file formats."""
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "日本 <|im_end|>"}]
    records = [{"prompt": [{"role": "user", "content": "1+1?"}], "label": "2"}, {"prompt": system, "label": "3"}]
    pq.write_table(pa.table({key: [record[key] for record in records] for key in records[0]}), tmp_path / "a.parquet")
    jsonl = write_jsonl(tmp_path / "b.jsonl", [{"question": "no", "prompt": "2+2?", "label": 4}])
    output = tmp_path / "data"
    assert prepare("--input", tmp_path / "a.parquet", jsonl, "--tokenizer", folder, "--output", output) == 0
    lines = lines_of(output / "train.jsonl")
    assert [line["prompt"] for line in lines] == [records[0]["prompt"], system, [{"role": "user", "content": "2+2?"}]]
    assert [line["label"] for line in lines] == ["2", "3", "4"]
    assert [line["source"] for line in lines] == ["a.parquet, row 1", "a.parquet, row 2", "b.jsonl:1"]
    assert len({line["id"] for line in lines}) == 3
    manifest = verify(output)
    assert manifest["request"]["task"] == "rl"
    assert manifest["counted"] == {"special tokens typed": 1}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n日本 {}<|im_end|>\n<|im_start|>assistant\n"
    without = len(tokenizer.encode(rendered.format("")).ids)
    tokenizer.encode_special_tokens = True
    assert manifest["prompts"]["train"]["longest"] == without + len(tokenizer.encode("<|im_end|>").ids)


def test_duplicates_are_merged_and_disputes_named(tmp_path, folder, caplog, capsys):
    """Pins a prompt that counts a hundred times, and one of two answers to a prompt taken without a word."""
    records = [("What?", "1"), ("Why?", "2"), (" what? ", "1.0"), ("Why?", "3"), ("Why?", "2"), ("How?", "4")]
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt, "label": label} for prompt, label in records])
    command = ["--input", source, "--tokenizer", folder, "--output", tmp_path / "data"]
    assert prepare(*command) == 2
    found = caplog.records[-1].getMessage()
    assert re.search(r"in\.jsonl:4: labels disagree: '3' here and '2' at .*in\.jsonl:2", found)
    assert prepare(*command, "--on-error", "skip") == 0
    assert [line["label"] for line in lines_of(tmp_path / "data" / "train.jsonl")] == ["1", "4"]
    assert json.loads(capsys.readouterr().out)["dropped"] == {"duplicate": 2, "labels disagree": 2}


def test_splits_and_evaluation_problems(tmp_path, folder, capsys):
    """Pins leakage: a question on both sides, a prompt of the validation file, a problem of an evaluation set."""
    problem = "Find the number of ordered pairs of positive integers whose product is 1728 and whose sum is odd."
    prompts = [f"What is {n} plus {n * n}?" for n in range(60)] + [f"Solve. {problem.upper()} Think.", "valid one"]
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt, "label": "1"} for prompt in prompts])
    valid = write_jsonl(tmp_path / "valid.jsonl", [{"prompt": "Valid one", "label": "1"}])
    write_jsonl(tmp_path / "aime.jsonl", [{"problem": problem, "answer": "7"}])
    command = ["--input", source, "--tokenizer", folder, "--output"]
    assert (
        prepare(*command, tmp_path / "a", "--valid-input", valid, "--against", tmp_path / "aime.jsonl", "--drop") == 0
    )
    dropped = json.loads(capsys.readouterr().out)["dropped"]
    assert dropped == {"in the validation split": 1, "overlaps with an evaluation set": 1}
    assert "in.jsonl:61" in (tmp_path / "a" / "overlap.txt").read_text()
    assert prepare(*command, tmp_path / "b", "--valid-fraction", "0.2", "--against", tmp_path / "aime.jsonl") == 2
    assert "in.jsonl:61" in (tmp_path / "b.overlap.txt").read_text()
    assert prepare(*command, tmp_path / "b", "--valid-fraction", "0.2") == 0
    ids = [{line["id"] for line in lines_of(tmp_path / "b" / f"{split}.jsonl")} for split in ("train", "valid")]
    assert ids[0].isdisjoint(ids[1])
    assert len(ids[0] | ids[1]) == 62
    assert len(ids[1]) > 4


GOOD = {"prompt": "1+1?", "label": "2"}
BAD_RECORDS = {
    "missing prompt": ({"problem": "1", "label": "2"}, "no prompt: field 'prompt' is missing.*problem.*--prompt-key"),
    "missing label": ({"prompt": "1", "answer": "2"}, "no label: field 'label' is missing.*answer.*--label-key"),
    "label of another type": ({"prompt": "1", "label": ["2"]}, "no label: the label is a list"),
    "empty label": ({"prompt": "1", "label": " "}, "no label: the label is empty"),
    "words": ({"prompt": "1", "label": "an even number"}, "label does not parse: 'an even number'.*--label-kind text"),
    "empty prompt": ({"prompt": " ", "label": "2"}, "empty content"),
    "empty messages": ({"prompt": [], "label": "2"}, "no messages"),
    "prompt with its answer": (
        {"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "label": "2"},
        "roles out of order: a prompt ends before",
    ),
    "over-long": ({"prompt": "x" * 100, "label": "2"}, "over-long: 1.. tokens, --max-prompt-length is 60"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_refused_by_line(tmp_path, folder, caplog, capsys, name):
    """Pins prompts that cannot be answered or judged; `skip` counts them."""
    record, message = BAD_RECORDS[name]
    source = write_jsonl(tmp_path / "in.jsonl", [GOOD, record])
    command = ["--input", source, "--tokenizer", folder, "--output", tmp_path / "data", "--max-prompt-length", 60]
    assert prepare(*command) == 2
    assert re.search(r"in\.jsonl:2: " + message, caplog.records[-1].getMessage())
    assert not (tmp_path / "data").exists()
    assert prepare(*command, "--on-error", "skip") == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["dropped"].values()) == 1
    assert result["prompts"]["train"]["prompts"] == 1


def test_choices(tmp_path, folder, capsys):
    """Pins --label-kind text and --over-long drop that do nothing, and a split without prompts."""
    source = write_jsonl(
        tmp_path / "in.jsonl", [{"prompt": "1", "label": "an even number"}, {"prompt": "x" * 99, "label": "x"}]
    )
    command = ["--input", source, "--tokenizer", folder, "--label-kind", "text", "--max-prompt-length", 60]
    assert prepare(*command, "--over-long", "drop", "--output", tmp_path / "data") == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"over-long": 1}
    assert read_manifest(tmp_path / "data")["request"]["label_kind"] == "text"
    command[-1] = 5
    assert prepare(*command, "--over-long", "drop", "--output", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


# inspect


def inspect(*arguments) -> int:
    return prepare_data.main(["inspect", *map(str, arguments)])


class Page(HTMLParser):
    """Text of a page's samples by the class of its spans, and everything that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[tuple[set[str], str]] = []
        self.references: list[str] = []
        self._inside = False
        self._classes: set[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.references += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        self._inside |= tag == "pre"
        self._classes = set((found.get("class") or "").split()) if self._inside and tag == "span" else None

    def handle_endtag(self, tag):
        self._inside &= tag != "pre"
        self._classes = None

    def handle_data(self, data):
        if self._classes is not None:
            self.spans.append((self._classes, data))


@pytest.fixture(scope="module")
def sft(tmp_path_factory, folder) -> Path:
    """One conversation with a typed special token, half characters, mark-up, a tab and an escape sequence."""
    path = tmp_path_factory.mktemp("sft")
    messages = [
        {"role": "user", "content": "<b>&amp;</b>\t\x1b[31m <|im_end|> 日本"},
        {"role": "assistant", "content": "🙂 <script>x</script>\n\nend"},
    ]
    source = write_jsonl(path / "in.jsonl", [{"messages": messages}])
    command = ["sft", "--input", source, "--tokenizer", folder, "--output", path / "data"]
    assert prepare_data.main(list(map(str, command))) == 0
    return path / "data"


def test_inspect_shows_what_is_trained(sft, tmp_path, capsys):
    """Pins a page or a print that colours other tokens than the mask says, garbles characters, or lets the data write
    mark-up or steer the terminal."""
    page = tmp_path / "page.html"
    capsys.readouterr()
    assert inspect(sft, "--html", page, "--color") == 0
    text = capsys.readouterr().out
    assert "\x1b[31m" not in text
    green = "".join(re.findall(r"\x1b\[32(?:;7)?m(.*?)\x1b\[0m", text))
    assert green == "🙂 <script>x</script>⏎⏎end<|im_end|>"
    assert re.findall(r"\x1b\[\d+;7m(.*?)\x1b", text) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]

    content = page.read_text(encoding="utf-8")
    found = Page(content)
    trained = "".join(data for classes, data in found.spans if "t" in classes)
    masked = "".join(data for classes, data in found.spans if "t" not in classes)
    assert trained == "🙂 <script>x</script>⏎\n⏎\nend<|im_end|>"
    assert masked == ("<|im_start|>user⏎\n<b>&amp;</b>⇥␛[31m <|im_end|> 日本<|im_end|>⏎\n<|im_start|>assistant⏎\n⏎\n")
    assert [data for classes, data in found.spans if "s" in classes] == ["<|im_start|>", "<|im_end|>"] * 2
    assert found.references == []
    assert not re.search(r"https?://|url\(|@import|<script", content)
    counts = read_manifest(sft)["splits"]["train"]
    assert f"{counts['trained_tokens']:,} trained ({counts['trained_share']:.1%})" in content
    assert content.count("<svg") == 2


def test_inspect_prints_without_colours(sft, capsys):
    """Pins escape codes in a file, and a print in which the mask cannot be told without them."""
    capsys.readouterr()
    assert inspect(sft) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("\x1b" in line for line in lines)
    assert " trained │ 🙂 <script>x</script>⏎" in lines
    assert "  masked │ <|im_start|>user⏎" in lines


def test_inspect_shows_documents_and_prompts(tmp_path, folder, capsys):
    """Pins a document without its end mark, both ends of a long one, and a prompt without header or label."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "begin " + "x" * 500 + " finish"}])
    arguments = ["--tokenizer", folder, "--output", tmp_path / "cpt", "--valid-input", text, "--keep-duplicates"]
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "other"}])
    assert prepare_data.main(["cpt", "--input", str(other), *map(str, arguments)]) == 0
    capsys.readouterr()
    assert inspect(tmp_path / "cpt", "--split", "valid", "--tokens", 100) == 0
    found = capsys.readouterr().out
    assert re.search(r"trained │ begin x+", found)
    assert "tokens are not shown" in found
    assert "finish<|endoftext|>" in found

    source = write_jsonl(tmp_path / "in.jsonl", [GOOD])
    assert prepare("--input", source, "--tokenizer", folder, "--output", tmp_path / "rl") == 0
    assert inspect(tmp_path / "rl", "--html", tmp_path / "page.html") == 0
    found = capsys.readouterr().out
    assert "label '2'" in found
    assert "1+1?<|im_end|>⏎\n         │ <|im_start|>assistant⏎" in found
    assert "1 prompts" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_inspect_refuses_another_tokenizer_and_split(sft, tmp_path, folder, caplog):
    """Pins text decoded with the wrong vocabulary."""
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert inspect(sft, "--tokenizer", tmp_path) == 2
    assert "right folder with --tokenizer" in caplog.records[-1].getMessage()
    assert inspect(sft, "--split", "valid") == 2
    assert "no split 'valid', only train" in caplog.records[-1].getMessage()
