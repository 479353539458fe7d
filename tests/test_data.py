"""Token files, receipts, tools/prepare_data.py and tools/quickstart_corpus.py.

Each test's docstring says which fault it pins.
"""

import hashlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from infir2.data.tokenizer import DocumentTokenizer
from infir2.indexed import DataError, IndexedReader, IndexedWriter
from infir2.receipts import building, check_cheaply, read_manifest, sha256_file, verify

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
prepare_data = importlib.import_module("prepare_data")
corpus = importlib.import_module("quickstart_corpus")

EOD = 277
TEXTS = ["In the beginning", "What is 47 + 85?\nAnswer: 132", "déjà vu, 日本", "a <|endoftext|> in the text"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """prepare_data sets these for its tokenizer; give them back afterwards."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of 280 entries; <|endoftext|> is 277."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = corpus.train_tokenizer(["the text of the test and then the thing that thinks it is hidden"] * 9, 280)
    trained.save(str(folder / "tokenizer.json"))
    return folder


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(*arguments) -> int:
    return prepare_data.main(["cpt", *map(str, arguments)])


@pytest.fixture
def command(tmp_path, tokenizer_folder) -> list:
    """A `cpt` command of 4 training and 2 validation documents, writing tmp_path/data."""
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    valid = write_jsonl(tmp_path / "valid.jsonl", ["And God said", "Answer: 7"])
    return ["--input", train, "--valid-input", valid, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]


def documents_of(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader.tokens(index).tolist() for index in range(reader.documents)]


# Token files

MEGATRON_READS = """
import json, sys
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
sets = [IndexedDataset(prefix) for prefix in sys.argv[1:]]
print(json.dumps({
    "documents": [[tokens.tolist() for tokens in data[:]] for data in sets],
    "boundaries": [data.document_indices.tolist() for data in sets],
    "types": [data.index.dtype.__name__ for data in sets],
    "optimal": {size: DType.optimal_dtype(size).__name__ for size in (300, 65499, 65500, 151936)},
}))
"""


def test_megatron_reads_what_is_written(tmp_path, command, tokenizer_folder):
    """Pins a wrong .idx layout, token type or document boundary: Megatron's own reader gives back every token.

    Megatron is imported in a process of its own, because other tests patch torch before they import it.
    """
    assert prepare(*command) == 0
    wide = [[70000, 1], [2], [131071, 65536, 65535]]
    with IndexedWriter(tmp_path / "wide.v1", 131072) as writer:
        for tokens in wide:
            writer.add_document(tokens)
    prefixes = [tmp_path / "data" / "train", tmp_path / "wide.v1"]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", MEGATRON_READS, *prefixes], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout.splitlines()[-1])

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, EOD] for text in TEXTS]
    assert found["documents"] == [expected, wide]
    assert found["boundaries"] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert found["types"] == ["uint16", "int32"]
    for size, name in found["optimal"].items():
        assert IndexedWriter(tmp_path / "type", int(size)).dtype == np.dtype(name)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab_size=st.sampled_from([2, 65499, 65500, 151936]))
def test_reader_returns_what_the_writer_took(tmp_path_factory, data, vocab_size):
    """Pins offsets and boundaries of any documents, at the sizes where the token type changes."""
    tokens = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)
    documents = data.draw(st.lists(tokens, min_size=1, max_size=12))
    prefix = tmp_path_factory.mktemp("property") / "name.with.dots"
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    reader = IndexedReader(prefix)
    assert documents_of(prefix) == documents
    assert reader.all_tokens().tolist() == [token for document in documents for token in document]
    assert reader.token_count == writer.token_count


@pytest.mark.parametrize("tokens", [[], [300], [-1], [[1, 2]], [1.0]])
def test_writer_refuses_what_it_cannot_hold(tmp_path, tokens):
    """Pins the silent wrap-around of an id above the vocabulary (65,536 would be stored as 0)."""
    with pytest.raises(DataError), IndexedWriter(tmp_path / "x", 300) as writer:
        writer.add_document(tokens)
    assert not (tmp_path / "x.idx").exists()


@pytest.mark.parametrize("damage", ["cut bin", "cut idx", "other bin", "not an index", "no idx", "empty"])
def test_reader_refuses_damaged_files(tmp_path, damage):
    """Pins training on half-written data: Megatron itself opens a .bin that is too short."""
    prefix = tmp_path / "x"
    with IndexedWriter(prefix, 300) as writer:
        for _ in range(0 if damage == "empty" else 3):
            writer.add_document([1, 2, 3])
    bin_file, idx_file = tmp_path / "x.bin", tmp_path / "x.idx"
    actions = {
        "cut bin": lambda: bin_file.write_bytes(bin_file.read_bytes()[:-1]),
        "cut idx": lambda: idx_file.write_bytes(idx_file.read_bytes()[:-1]),
        "other bin": lambda: bin_file.write_bytes(bytes(20)),
        "not an index": lambda: idx_file.write_bytes(b"PK" + bytes(60)),
        "no idx": idx_file.unlink,
        "empty": lambda: None,
    }
    actions[damage]()
    with pytest.raises(DataError, match=str(prefix)):
        IndexedReader(prefix)


# prepare_data


def test_documents_end_in_eod_and_only_there(tmp_path, command):
    """Pins documents that run into each other, and a document about <|endoftext|> that ends at the word."""
    assert prepare(*command) == 0
    for split in ("train", "valid"):
        for document in documents_of(tmp_path / "data" / split):
            assert document.index(EOD) == len(document) - 1
    parsed = [*command[:-1], tmp_path / "parsed", "--parse-special-tokens"]
    assert prepare(*parsed) == 0
    assert documents_of(tmp_path / "parsed" / "train")[3].count(EOD) == 2


def test_truncation_saved_in_a_tokenizer_is_ignored(tmp_path, tokenizer_folder):
    """Pins documents cut to a length that somebody once saved in tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    long, short = "word " * 100, "a"
    ids, lengths = DocumentTokenizer(tmp_path, "<|endoftext|>", False).encode([long, short])
    assert tokenizer.decode(ids[: lengths[0] - 1]) == long
    assert lengths[1] == 2


def test_equal_documents_share_a_split(tmp_path, tokenizer_folder):
    """Pins leakage through duplicates when a fraction is held out."""
    texts = [f"document {number % 50}" for number in range(200)]
    source = write_jsonl(tmp_path / "all.jsonl", texts)
    output = tmp_path / "data"
    options = ["--valid-fraction", 0.3, "--tokenizer", tokenizer_folder, "--keep-duplicates"]
    assert prepare("--input", source, *options, "--output", output) == 0
    train, valid = (documents_of(output / split) for split in ("train", "valid"))
    assert len(train) + len(valid) == 200
    assert {tuple(document) for document in train}.isdisjoint(tuple(document) for document in valid)


def test_training_documents_in_the_validation_split_are_dropped(tmp_path, command, capsys):
    """Pins leakage through a validation document that is also in the training files."""
    write_jsonl(tmp_path / "train.jsonl", [*TEXTS, "Answer: 7", "Answer: 7"])
    assert prepare(*command) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"in the validation split": 2}
    assert len(documents_of(tmp_path / "data" / "train")) == len(TEXTS)


def test_manifest_says_what_went_in_and_came_out(tmp_path, command, tokenizer_folder):
    """Pins receipts that do not match the files: hashes are recomputed here from the bytes."""
    assert prepare(*command) == 0
    manifest = read_manifest(tmp_path / "data")
    for origin in ("train", "valid"):
        data = (tmp_path / f"{origin}.jsonl").read_bytes()
        receipt = {"path": str(tmp_path / f"{origin}.jsonl"), "bytes": len(data)}
        assert manifest["inputs"][origin] == [{**receipt, "sha256": hashlib.sha256(data).hexdigest()}]
        for suffix in ("bin", "idx"):
            data = (tmp_path / "data" / f"{origin}.{suffix}").read_bytes()
            found = manifest["outputs"][f"{origin}.{suffix}"]
            assert found == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["tokenizer"]["sha256"] == sha256_file(tokenizer_folder / "tokenizer.json")
    assert (manifest["vocab_size"], manifest["eod"]) == (280, EOD)
    assert manifest["splits"]["valid"]["documents"] == 2


def test_verify_finds_every_changed_byte(tmp_path, command, capsys):
    """Pins data that changed after it was written."""
    assert prepare(*command) == 0
    assert prepare_data.main(["verify", str(tmp_path / "data")]) == 0
    verify(tmp_path / "data")
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        path = tmp_path / "data" / name
        original = path.read_bytes()
        for place in range(0, len(original), 3):
            path.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
            with pytest.raises(DataError):
                verify(tmp_path / "data")
        path.write_bytes(original)
    assert prepare_data.main(["verify", str(tmp_path / "data")]) == 0


def test_cheap_check_finds_missing_and_cut_files(tmp_path, command):
    """Pins a start of training on a folder that is not complete."""
    assert prepare(*command) == 0
    folder = tmp_path / "data"
    (folder / "cache").mkdir()  # Megatron's, no part of the data
    check_cheaply(folder)
    path = folder / "valid.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"valid\.bin has \d+ bytes"):
        check_cheaply(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"valid\.bin is missing"):
        check_cheaply(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        check_cheaply(folder)


GOOD = b'{"text": "fine"}\n'
BAD_INPUTS = {
    "broken JSON": (GOOD + b'{"text": "cut', r"in\.jsonl:2: broken JSON: .* at column 10"),
    "long number": (GOOD + b'{"text": ' + b"9" * 5000 + b"}", r"in\.jsonl:2: broken JSON"),
    "missing field": (GOOD * 2 + b'{"content": "x"}\n', r"in\.jsonl:3: no text: field 'text' is missing.*content"),
    "not an object": (b'["text"]\n', r"in\.jsonl:1: not an object: the line is a list"),
    "not a string": (b'{"text": null}\n', r"in\.jsonl:1: no text: .*NoneType"),
    "wrong encoding": (GOOD + '{"text": "é"}'.encode("latin-1"), r"in\.jsonl:2: not valid UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', r"in\.jsonl:1: not valid UTF-8"),
    "empty document": (GOOD + b'\n{"text": " \\n"}', r"in\.jsonl:3: empty document"),
    "empty file": (b"", r"in\.jsonl: empty file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_by_file_and_line(tmp_path, command, caplog, capsys, name):
    """Pins records that vanish without a word, and half an output left behind; `skip` counts instead."""
    content, message = BAD_INPUTS[name]
    (tmp_path / "in.jsonl").write_bytes(content)
    bad = ["--input", tmp_path / "in.jsonl", tmp_path / "train.jsonl", *command[2:], "--keep-duplicates"]
    before = sorted(tmp_path.iterdir())
    assert prepare(*bad) == 2
    assert re.search(message + r".*--on-error skip", caplog.records[-1].getMessage())
    assert sorted(tmp_path.iterdir()) == before

    assert prepare(*bad, "--on-error", "skip") == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["dropped"].values()) == 1
    assert result["splits"]["train"]["documents"] == len(TEXTS) + content.count(GOOD)


def test_empty_corpus_and_unknown_inputs_are_refused(tmp_path, command, caplog):
    """Pins an output without documents, which Megatron would report as a division by zero."""
    (tmp_path / "in.jsonl").write_bytes(b"[]\n")
    (tmp_path / "in.csv").write_bytes(b"text\n")
    for source, message in {"in.jsonl": "no documents", "in.csv": "neither", "gone.jsonl": "does not exist"}.items():
        assert prepare("--input", tmp_path / source, *command[2:], "--on-error", "skip") == 2
        assert message in caplog.records[-1].getMessage()
    assert not (tmp_path / "data").exists()


def test_tokenizer_without_document_end_is_refused(tmp_path, command, caplog):
    """Pins documents joined without a boundary, or with another token taken for it."""
    assert prepare(*command, "--eod-token", "</s>") == 2
    assert "no document-end token '</s>'" in caplog.records[-1].getMessage()
    assert "<|endoftext|>" in caplog.records[-1].getMessage()


def test_text_file_is_one_document(tmp_path, command):
    """Pins a .txt taken apart by lines."""
    (tmp_path / "book.txt").write_text("first line\n\nsecond line\n", encoding="utf-8")
    assert prepare("--input", tmp_path / "book.txt", *command[2:]) == 0
    assert len(documents_of(tmp_path / "data" / "train")) == 1


def test_second_run_reuses_and_another_request_is_refused(tmp_path, command, caplog, capsys):
    """Pins work done twice, and a folder silently kept although its inputs changed."""
    assert prepare(*command) == 0
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert prepare(*command) == 0
    assert [json.loads(line)["reused"] for line in capsys.readouterr().out.splitlines()] == [False, True]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == written

    write_jsonl(tmp_path / "train.jsonl", [*TEXTS, "one more"])
    assert prepare(*command) == 2
    assert "inputs differ" in caplog.records[-1].getMessage()
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    (tmp_path / "data" / "train.bin").write_bytes(b"")
    assert prepare(*command) == 2
    assert "train.bin has 0 bytes" in caplog.records[-1].getMessage()


def test_threads_do_not_change_the_bytes(tmp_path, command, tokenizer_folder):
    """Pins an order of documents that depends on the number of workers."""
    write_jsonl(tmp_path / "train.jsonl", [f"document {number} " * (number % 7 + 1) for number in range(500)])
    for workers in ("1", "3"):
        output = tmp_path / workers
        script = [sys.executable, TOOLS / "prepare_data.py", "cpt", *command[:-1], output, "--workers", workers]
        subprocess.run(script, check=True, capture_output=True)
    one, three = (read_manifest(tmp_path / workers)["outputs"] for workers in ("1", "3"))
    assert one == three


def test_full_disk_leaves_nothing(tmp_path, command):
    """Pins a half-written output after a failed write (a file size limit stands in for the full disk)."""
    write_jsonl(tmp_path / "train.jsonl", [f"document {number}" for number in range(2000)])
    before = sorted(tmp_path.iterdir())
    result = subprocess.run(
        [sys.executable, TOOLS / "prepare_data.py", "cpt", *command],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert result.returncode == 2
    assert b"data was not made" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_leftovers_of_a_killed_run_are_replaced(tmp_path, command):
    """Pins bytes of a killed run in the next run's output, and two processes that build one folder."""
    leftover = tmp_path / ".data.partial"
    (leftover / "folder").mkdir(parents=True)
    (leftover / "train.bin").write_bytes(b"half")
    with building(tmp_path / "data"), pytest.raises(DataError, match="another process"), building(tmp_path / "data"):
        pass
    (tmp_path / "data").rmdir()
    assert prepare(*command) == 0
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "manifest.json", "train.bin", "train.idx", "valid.bin", "valid.idx",
    ]  # fmt: skip
    assert not leftover.exists()


# Quickstart corpus


def shrink() -> None:
    """Fewer problems, so that the corpus is made in seconds."""
    corpus.ADDITIONS = 300
    corpus.SLOW_TEMPLATES = frozenset(range(100)) - {4, 6, 62, 97}
    for options in corpus.GYM_TASKS.values():
        options["size"] = 100


def digest_of_small_corpus() -> str:
    """Hash of both splits' texts; run in another process."""
    shrink()
    splits = corpus.split_documents(corpus.collect(1236), 1236)
    return hashlib.sha256("\0".join(document.text for split in splits for document in split).encode()).hexdigest()


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    shrink()
    output = tmp_path_factory.mktemp("quickstart") / "corpus"
    assert corpus.main(["--output", str(output), "--vocab-size", "600"]) == 0
    return output


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpus_is_the_same_in_another_process(small_corpus):
    """Pins an order that depends on Python's hash seed, and a tokenizer that depends on threads."""
    code = "import test_data; print(test_data.digest_of_small_corpus())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    folder = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    texts = texts_of(small_corpus / "train.jsonl") + texts_of(small_corpus / "valid.jsonl")
    assert result.stdout.strip() == hashlib.sha256("\0".join(texts).encode()).hexdigest()
    again = corpus.train_tokenizer(texts_of(small_corpus / "train.jsonl"), 600)
    saved = Tokenizer.from_file(str(small_corpus / "tokenizer" / "tokenizer.json"))
    assert json.loads(again.to_str())["model"] == json.loads(saved.to_str())["model"]


def test_corpus_splits_are_disjoint_and_every_source_is_held_out(small_corpus):
    """Pins a validation loss over problems or chapters that were trained on."""
    train, valid = (texts_of(small_corpus / f"{split}.jsonl") for split in ("train", "valid"))
    questions = [
        {text.split("\n")[0].lower() for text in texts if text.startswith("Question")} for texts in (train, valid)
    ]
    assert questions[0].isdisjoint(questions[1])
    assert set(train).isdisjoint(valid)
    assert len(set(train)) == len(train)
    for record in json.loads((small_corpus / "sources.json").read_text(encoding="utf-8")):
        assert record["licence"]
        assert record["version"]
        assert 0 < record["held_out_documents"] < record["documents"] / 20


def test_split_refuses_a_shared_problem():
    """Pins the check itself: the same problem, in the same words but for case and spacing, on both sides."""
    documents = [corpus.Document(text, "prose") for text in ("One  text", *map(str, range(48)), "one text")]
    collected = {"prose": corpus.Collected(documents, corpus.Counter())}
    with pytest.raises(DataError, match="both splits"):
        corpus.split_documents(collected, seed=0)


def test_corpus_tokenizer_loads_and_round_trips(small_corpus, tmp_path):
    """Pins a tokenizer that Hugging Face reads otherwise, alone or beside a Qwen2 config.json, and a lost byte."""
    from transformers import AutoTokenizer

    folder = small_corpus / "tokenizer"
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    beside = tmp_path / "model"
    beside.mkdir()
    for path in folder.iterdir():
        (beside / path.name).write_bytes(path.read_bytes())
    (beside / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    texts = [*texts_of(small_corpus / "valid.jsonl"), "\x00 日本 1234\r\n\t  x", "<|im_start|>user\nhi<|im_end|>"]
    for place in (folder, beside):
        loaded = AutoTokenizer.from_pretrained(place, local_files_only=True)
        assert len(loaded) == 600
        assert loaded.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [597, 598, 599]
        assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
        for text in texts:
            ids = loaded(text)["input_ids"]
            assert ids == raw.encode(text).ids
            assert loaded.decode(ids) == text
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "47 + 85?"}]
        assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n47 + 85?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_corpus_second_run_reuses(small_corpus, capsys, caplog):
    """Pins a quickstart that makes its text again, or keeps a corpus of another seed."""
    command = ["--output", str(small_corpus), "--vocab-size", "600"]
    assert corpus.main(command) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True
    assert corpus.main([*command, "--seed", "1"]) == 1
    assert "seed differ" in caplog.records[-1].getMessage()


@given(a=st.integers(0, 999), b=st.integers(0, 999))
def test_written_addition(a, b):
    """Pins a worked step that is wrong: the written digits, read upwards, are the sum."""
    steps = corpus.column_addition(a, b)
    digits = "".join(step.partition("write ")[2][0] for step in reversed(steps))
    assert int(digits) == a + b
    for step in steps:
        if "=" in step:
            terms, _, total = step.split(": ")[1].partition(",")[0].partition(" = ")
            assert sum(map(int, terms.split(" + "))) == int(total.rstrip("."))


@pytest.mark.parametrize(
    ("solution", "right"),
    [
        ("no marks", True),
        ("<<3*40=120>>120 and <<(1,200+5)/2=602.5>>602.5", True),
        ("<<2/3=0.6666667>>", True),
        ("<<58/100*50=28>>28", False),
        ("<<1/0=0>>", False),
        ("<<x+1=2>>", False),
    ],
)
def test_wrong_steps_are_found(solution, right):
    """Pins 58 % of 50 worked out as 28, which a template's integer arithmetic yields."""
    assert corpus.steps_hold(solution) is right


@pytest.mark.parametrize("size", [259, 5000])
def test_impossible_vocabulary_is_refused(size):
    """Pins a vocabulary smaller than asked for, which a model of the asked size would not fit."""
    with pytest.raises(DataError, match="vocab"):
        corpus.train_tokenizer(["too little text"], size)


# Package corpus


def test_package_corpus(tmp_path, monkeypatch, capsys):
    """Pins tests of packages in the text, a file of two packages in both splits, and a corpus made anew each time."""
    packages = importlib.import_module("package_corpus")
    sources = [packages.code_of(name, "BSD") for name in ("mpmath", "networkx", "mpmath")]
    monkeypatch.setattr(packages, "SOURCES", sources)
    output = tmp_path / "corpus"
    assert packages.main(["--output", str(output)]) == 0
    train, valid = (texts_of(output / f"{split}.jsonl") for split in ("train", "valid"))
    assert train, valid
    assert len({*train, *valid}) == len(train) + len(valid)
    mpmath = Path(str(metadata.distribution("mpmath").locate_file("mpmath")))
    assert (mpmath / "libmp/libmpf.py").read_text("utf-8").strip() in train + valid
    assert (mpmath / "tests/test_basic_ops.py").read_text("utf-8").strip() not in train + valid
    by_name = [record["documents"] for record in json.loads((output / "sources.json").read_text())]
    assert by_name[2] == 0
    assert sum(by_name) == len(train) + len(valid)
    assert not json.loads(capsys.readouterr().out)["reused"]
    assert packages.main(["--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["reused"]
    monkeypatch.setattr(packages, "SOURCES", [packages.code_of("not-installed", "BSD")])
    assert packages.main(["--output", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
