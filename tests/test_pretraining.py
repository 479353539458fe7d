"""prepare_data.py cpt: inputs of every kind, blends, duplicates, killed runs, and the tokenizer.

Each test's docstring says which fault it pins.
"""

import gzip
import hashlib
import importlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from infir2.data import duplicates, sources, tokenizer
from infir2.data.tokenizer import DocumentTokenizer
from infir2.indexed import DataError, IndexedReader
from infir2.receipts import read_manifest, verify

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
prepare_data = importlib.import_module("prepare_data")
corpus = importlib.import_module("quickstart_corpus")

WORDS = "in the beginning was a word and déjà vu 日本 of 47 + 85 rivers that ran\nthrough towns".split(" ")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """prepare_data sets these for its processes; give them back afterwards."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus.train_tokenizer([" ".join(WORDS)] * 9, 300).save(str(folder / "tokenizer.json"))
    return folder


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts that differ, of 1 to 60 words."""
    choice = random.Random(seed)
    return [
        " ".join([f"text {number}.{seed}", *choice.choices(WORDS, k=choice.randint(1, 60))]) for number in range(count)
    ]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def prepare(*arguments) -> int:
    return prepare_data.main(["cpt", *map(str, arguments)])


def decoded(prefix: Path, folder: Path) -> list[str]:
    """The texts of a token file."""
    reader, vocabulary = IndexedReader(prefix), Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [vocabulary.decode(reader.tokens(index)[:-1].tolist()) for index in range(reader.documents)]


def write_dataset(folder: Path, texts: list[str]) -> None:
    """A folder as datasets.save_to_disk leaves it: two Arrow streams and their order."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[: len(texts) // 2], texts[len(texts) // 2 :]), strict=True):
        table = pa.table({"id": [1] * len(part), "text": part})
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def write_all_kinds(folder: Path) -> tuple[list[Path], list[str]]:
    """One input of each kind, and the texts in their order."""
    parts = [some_texts(30, seed) for seed in range(6)]
    (folder / "a.jsonl").write_bytes(jsonl(parts[0]))
    data = jsonl(parts[1])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))  # two members
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as stream:
        stream.write(jsonl(parts[2]))
    pq.write_table(pa.table({"id": [1] * 30, "text": parts[3]}), folder / "d.parquet", row_group_size=11)
    write_dataset(folder / "e", parts[4])
    (folder / "f.txt").write_text("\n".join(parts[5]), encoding="utf-8")
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e", "f.txt"]
    return [folder / name for name in names], [*(text for part in parts[:5] for text in part), "\n".join(parts[5])]


def test_every_kind_of_input_gives_its_texts_in_order(tmp_path, tokenizer_folder):
    """Pins records lost or mixed up between formats and at the edges of blocks, and hashes that are not the files'."""
    paths, texts = write_all_kinds(tmp_path)
    command = ["--input", *paths, "--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder]
    (tmp_path / "v.jsonl").write_bytes(jsonl(["held out"]))
    digests = set()
    for block_bytes in (1, 1000, 10**7):
        output = tmp_path / f"data{block_bytes}"
        assert prepare(*command, "--output", output, "--block-bytes", block_bytes, "--workers", 1) == 0
        assert decoded(output / "train", tokenizer_folder) == texts
        manifest = read_manifest(output)
        digests.add(json.dumps(manifest["outputs"]))
        files = [*paths[:4], *sorted((tmp_path / "e").glob("*.arrow")), paths[5]]
        assert [Path(receipt["path"]) for receipt in manifest["inputs"]["train"]] == files
        for receipt in manifest["inputs"]["train"]:
            data = Path(receipt["path"]).read_bytes()
            assert receipt["bytes"] == len(data)
            assert receipt["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(digests) == 1
    histogram = manifest["splits"]["train"]["documents_by_length"]
    lengths = [IndexedReader(output / "train").tokens(index).size for index in range(len(texts))]
    assert histogram == {
        str(low): count for low in (2**k for k in range(30)) if (count := sum(low <= n < 2 * low for n in lengths))
    }


def test_damaged_and_other_files_are_refused(tmp_path, tokenizer_folder, caplog, capsys):
    """Pins a cut archive read as a short one, columns that are not there, and an empty table taken for data."""
    paths, texts = write_all_kinds(tmp_path)
    rest = ["--valid-fraction", 0.5, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    whole = {path: path.read_bytes() for path in (paths[1], paths[2], paths[3])}
    for path, data in whole.items():
        path.write_bytes(data[: len(data) // 2])
        for mode in ("fail", "skip"):  # how many records are gone is not known, so that none can be counted
            assert prepare("--input", path, *rest, "--on-error", mode) == 2
            assert f"{path} cannot be read" in caplog.records[-1].getMessage()
        path.write_bytes(data)
    (tmp_path / "e" / "data-00001-of-00002.arrow").unlink()
    assert prepare("--input", paths[4], *rest) == 2
    assert "does not exist" in caplog.records[-1].getMessage()

    pq.write_table(pa.table({"content": ["x", "y"], "id": [1, 2]}), tmp_path / "other.parquet")
    assert prepare("--input", tmp_path / "other.parquet", *rest) == 2
    assert "other.parquet, row 1: no text: field 'text' is missing, found ['content', 'id']" in caplog.text
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    mixed = pa.table({"text": ["one", None, " ", *texts]})
    pq.write_table(mixed, tmp_path / "mixed.parquet")
    inputs = ["--input", tmp_path / "other.parquet", tmp_path / "empty.parquet", tmp_path / "mixed.parquet"]
    assert prepare(*inputs, *rest, "--on-error", "skip") == 0
    dropped = json.loads(capsys.readouterr().out)["dropped"]
    assert dropped == {"no text": 3, "empty document": 1, "empty file": 1}


def test_byte_order_marks_are_no_text(tmp_path, tokenizer_folder):
    """Pins a mark that is trained (.txt) or refuses the first record (.jsonl); also after joined files, and packed."""
    mark, lines = b"\xef\xbb\xbf", [jsonl([text]) for text in ("a b", "c d", "e f")]
    (tmp_path / "a.jsonl").write_bytes(mark + lines[0] + lines[1] + mark + lines[2] + mark)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + lines[0].replace(b"a b", b"a c")))
    (tmp_path / "c.txt").write_bytes(mark + b"g \xef\xbb\xbf h")
    (tmp_path / "v.txt").write_bytes(mark + b"valid")
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    rest = ["--valid-input", tmp_path / "v.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    assert prepare("--input", *inputs, *rest) == 0
    assert decoded(tmp_path / "data" / "train", tokenizer_folder) == ["a b", "c d", "e f", "a c", "g \ufeff h"]
    assert decoded(tmp_path / "data" / "valid", tokenizer_folder) == ["valid"]


def test_byte_order_marks_inside_are_no_text(tmp_path, tokenizer_folder):
    """Pins marks that are trained: of joined text files, doubled ones, and of a file whose text became a record."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + mark + jsonl(["\ufeffa b"]) + b'{"text": "\\ufeffc d"}\n')
    (tmp_path / "b.txt").write_bytes(mark + b"e\n" + mark + b"f\r\n" + mark + b"g")
    pq.write_table(pa.table({"text": ["\ufeffh i"]}), tmp_path / "c.parquet")
    (tmp_path / "v.txt").write_bytes(b"valid")
    inputs = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.parquet")]
    rest = ["--valid-input", tmp_path / "v.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    assert prepare("--input", *inputs, *rest) == 0
    assert decoded(tmp_path / "data" / "train", tokenizer_folder) == ["a b", "c d", "e\nf\r\ng", "h i"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_texts_of_other_encodings_are_refused(tmp_path, tokenizer_folder, caplog, encoding):
    """Pins UTF-16 without a byte order mark, which is UTF-8 too, with a zero byte after each letter: trained so."""
    (tmp_path / "in.txt").write_bytes("plain words".encode(encoding))
    (tmp_path / "v.txt").write_bytes(b"valid")
    rest = ["--valid-input", tmp_path / "v.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    assert prepare("--input", tmp_path / "in.txt", *rest) == 2
    assert re.search(r"in\.txt: not (text|valid UTF-8): ", caplog.records[-1].getMessage())


@pytest.mark.parametrize("members", [1, 2])
def test_gzip_with_zeros_at_its_end(tmp_path, tokenizer_folder, caplog, members):
    """Pins whole archives refused for the zeros with which some writers fill a block; a cut one is refused."""
    texts = some_texts(40)
    packed = b"".join(gzip.compress(jsonl(texts[start::members])) for start in range(members)) + b"\0" * 1000
    (tmp_path / "in.jsonl.gz").write_bytes(packed)
    (tmp_path / "v.jsonl").write_bytes(jsonl(["valid"]))
    rest = ["--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder]
    assert prepare("--input", tmp_path / "in.jsonl.gz", *rest, "--output", tmp_path / "data") == 0
    expected = [text for start in range(members) for text in texts[start::members]]
    assert decoded(tmp_path / "data" / "train", tokenizer_folder) == expected
    assert read_manifest(tmp_path / "data")["inputs"]["train"][0]["sha256"] == hashlib.sha256(packed).hexdigest()
    for number, damaged in enumerate((packed[: len(packed) // 4], packed.rstrip(b"\0") + b"tail")):
        (tmp_path / "in.jsonl.gz").write_bytes(damaged)
        assert prepare("--input", tmp_path / "in.jsonl.gz", *rest, "--output", tmp_path / f"none{number}") == 2
        assert "in.jsonl.gz cannot be read" in caplog.records[-1].getMessage()


def test_dataset_dict_names_its_splits(tmp_path, tokenizer_folder, caplog):
    """Pins a folder of several splits read as one, and a folder that is none."""
    (tmp_path / "set").mkdir()
    rest = ["--valid-fraction", 0.5, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    assert prepare("--input", tmp_path / "set", *rest) == 2
    assert "has no state.json" in caplog.records[-1].getMessage()
    for damaged in ("{", "[]", '{"splits": 7}', "{}"):
        (tmp_path / "set" / "dataset_dict.json").write_text(damaged)
        assert prepare("--input", tmp_path / "set", *rest) == 2
        assert f"Name one: {tmp_path}/set/SPLIT" in caplog.records[-1].getMessage()
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert prepare("--input", tmp_path / "set", *rest) == 2
    assert "['train', 'test']" in caplog.records[-1].getMessage()


# Blends and duplicates


def test_blend_has_a_prefix_for_each_source_and_a_list_of_weights(tmp_path, tokenizer_folder, caplog):
    """Pins sources that are mixed up, weights that are lost on the way to Megatron, and names that collide."""
    web, maths = some_texts(20, 1), some_texts(10, 2)
    (tmp_path / "web.jsonl").write_bytes(jsonl([*web, maths[0]]))
    (tmp_path / "maths.jsonl").write_bytes(jsonl([*maths, web[3], web[3].upper(), maths[5]]))
    (tmp_path / "v.jsonl").write_bytes(jsonl([web[0], web[0]]))
    sources_given = ["--input", "web=0.7", tmp_path / "web.jsonl", "--input", "maths=0.3", tmp_path / "maths.jsonl"]
    rest = ["--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    assert prepare(*sources_given, *rest) == 0
    assert (tmp_path / "data" / "train.blend").read_text().split() == ["0.7", "train-web", "0.3", "train-maths"]
    script = f"source '{TOOLS.parent}/scripts/lib/cpt.sh'; train_data; printf '%s\\n' \"${{TRAIN_DATA[@]}}\""
    environment = {**os.environ, "DATA_DIR": str(tmp_path / "data")}
    words = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert words.split() == ["0.7", f"{tmp_path}/data/train-web", "0.3", f"{tmp_path}/data/train-maths"]
    assert decoded(tmp_path / "data" / "train-web", tokenizer_folder) == [*web[1:], maths[0]]
    assert decoded(tmp_path / "data" / "train-maths", tokenizer_folder) == maths[1:]
    manifest = verify(tmp_path / "data")
    assert manifest["weights"] == {"web": 0.7, "maths": 0.3}
    verify(tmp_path / "data", inputs=True)
    with (tmp_path / "web.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match=r"web\.jsonl was changed"):
        verify(tmp_path / "data", inputs=True)
    assert manifest["dropped"] == {"duplicate": 2, "duplicate of another source": 3, "in the validation split": 1}
    assert sum(manifest["dropped_by_script"]["duplicate"].values()) == 2

    for wrong in (["web=0", "x"], ["web=1"], ["valid=1", "x"], [str(tmp_path / "web.jsonl")]):
        assert prepare("--input", *wrong, "--input", "maths=1", tmp_path / "maths.jsonl", *rest) == 2
        assert "NAME=WEIGHT FILE" in caplog.records[-1].getMessage()


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.integers(0, 12), max_size=60), at_once=st.integers(1, 9))
def test_first_occurrences(keys, at_once):
    """Pins duplicates missed at the edges of the ranges that are sorted one at a time; a dict is the oracle."""
    spread = [(key * 0x1555555555555555) % 2**64 for key in keys]
    digests = np.array([(high // 2, high) for high in spread], duplicates.DIGEST)
    seen: dict[int, int] = {}
    expected = [(number, seen[key]) for number, key in enumerate(keys) if seen.setdefault(key, number) != number]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
        patch.setattr(duplicates, "READ_AT_ONCE", 4)
        repeats, firsts = duplicates.first_occurrences(digests)
    assert sorted(zip(repeats.tolist(), firsts.tolist(), strict=True)) == expected


def jaccard(one: str, other: str) -> float:
    """Similarity of the sets of five consecutive words, by definition."""
    sets = []
    for text in (one, other):
        words = text.lower().split()
        sets.append({tuple(words[at : at + 5]) for at in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates(tmp_path, tokenizer_folder):
    """Pins near duplicates that stay, others that go, and a choice that differs from run to run or by workers."""
    choice = random.Random(4)
    originals = [" ".join(f"w{choice.randint(0, 5000)}" for _ in range(300)) for _ in range(60)]
    edited = []
    for number, text in enumerate(originals):
        words = text.split()
        for at in choice.sample(range(300), 1 + number):  # from a small change to a third of the words
            words[at] = "new"
        edited.append(" ".join(words))
    (tmp_path / "v.jsonl").write_bytes(jsonl(originals[:5]))
    (tmp_path / "t.jsonl").write_bytes(jsonl(originals[5:] + edited))
    rest = ["--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder, "--near-duplicates", 0.7]
    for workers in (1, 2):
        output = tmp_path / f"data{workers}"
        assert prepare("--input", tmp_path / "t.jsonl", *rest, "--output", output, "--workers", workers,
                       "--block-bytes", 50_000) == 0  # fmt: skip
    assert read_manifest(output)["outputs"] == read_manifest(tmp_path / "data1")["outputs"]
    kept = set(decoded(output / "train", tokenizer_folder))
    assert set(originals[5:]) <= kept
    for one, other in zip(originals, edited, strict=True):
        if abs(jaccard(one, other) - 0.7) > 0.15:  # 128 permutations estimate it to 0.04
            assert (other in kept) == (jaccard(one, other) < 0.7)
    dropped = read_manifest(output)["dropped"]
    assert dropped["near duplicate in the validation split"] >= 4
    assert sum(dropped.values()) == 120 - 5 - len(kept)


JAPANESE = "日本語の文章では単語の間に空白を置かないので、五つの単語ではなく五つの文字で比べる。"
UNSPACED = {"Chinese": range(0x4E00, 0x9FFF), "Japanese": [*map(ord, set(JAPANESE))], "Thai": range(0xE01, 0xE2F)}
UNSPACED |= {"Khmer": range(0x1780, 0x17A3), "Javanese": range(0xA984, 0xA9B3), "Balinese": range(0x1B05, 0x1B34)}


@pytest.mark.parametrize("script", UNSPACED)
def test_near_duplicates_without_spaces(tmp_path, tokenizer_folder, script):
    """Pins near duplicates of scripts without spaces between words, of which none was found; others stay."""
    choice = random.Random(5)
    texts = ["".join(map(chr, choice.choices(list(UNSPACED[script]), k=400))) for _ in range(4)]
    near = [text[:200] + "!" + text[201:] for text in texts[:2]]
    (tmp_path / "in.jsonl").write_bytes(jsonl([*texts, *near]))
    (tmp_path / "v.jsonl").write_bytes(jsonl(["another text"]))
    command = ["--input", tmp_path / "in.jsonl", "--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder]
    assert prepare(*command, "--near-duplicates", 0.8, "--output", tmp_path / "data") == 0
    assert decoded(tmp_path / "data" / "train", tokenizer_folder) == texts
    assert read_manifest(tmp_path / "data")["dropped"] == {"near duplicate": 2}


def test_words_are_compared_as_before():
    """Pins signatures of texts with spaces that change: what is left out of a corpus would change with them."""
    text = duplicates.normalised("The Über-long words of a text, 12 of them, привет мир, 1 + 1 = 2 and so on")
    words = text.split(" ")
    shingles = [" ".join(words[at : at + 5]) for at in range(len(words) - 4)]
    expected = duplicates.RMinHash.digests_from_token_sets([shingles], duplicates.PERMUTATIONS, duplicates.SEED)
    assert duplicates.signatures([text]).tolist() == [list(row) for row in expected]


@pytest.mark.parametrize(
    ("one", "other"),
    [("2³ + 1", "23 + 1"), ("3½", "31/2"), ("3½", "31\u20442"), ("x₁", "x1"), ("10⁻³", "10-3"), ("①", "1"),
     ("\U0001d431 = 1", "x = 1"), ("Ⅳ", "IV"), ("5 m²", "5 m2"), ("ª", "a"), ("㎡", "m2")],
)  # fmt: skip
def test_normal_form_keeps_different_mathematics_apart(one, other):
    """Pins a power taken for digits that follow each other, and the like: NFKC makes them equal."""
    assert duplicates.normalised(one) != duplicates.normalised(other)
    assert duplicates.nearly_as_written(one) != duplicates.nearly_as_written(other)


def test_normal_form_joins_what_is_the_same():
    """Pins duplicates missed over width, composition, case or space."""
    for form in (duplicates.normalised, duplicates.nearly_as_written):
        assert form("\uff11\uff12 \uff21\uff22\u3000ｶﾞ\u00a0ﬁn") == form("12  AB ガ fin")
        assert form("Cafe\u0301\n Is") == form("café is")
    assert duplicates.normalised("ABC x") == duplicates.normalised("abc X")
    for one, other in (("Find X", "find x"), ("AB = 1", "ab = 1"), ("Äx", "äX"), ("5 Mg", "5 mg"), ("5Mg", "5mg")):
        assert duplicates.nearly_as_written(one) != duplicates.nearly_as_written(other)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("déjà vu 日本", "LATIN"),
        ("これは日本", "HIRAGANA"),
        ("Привет мир", "CYRILLIC"),
        ("1 + 1 = 2", "none"),
        ("汉字", "CJK"),
    ],
)
def test_script_of(text, script):
    """Pins the tally by script of what was removed."""
    assert duplicates.script_of(text) == script


def test_overlap_with_evaluation_sets(tmp_path, tokenizer_folder, caplog):
    """Pins contaminated documents that are trained on, a refusal without a report, and a report of other documents."""
    problem = "Find the number of ordered pairs of integers $(a,b)$ with $a+b\\leq 2{,}024$ and $a$ prime."
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": problem}))
    texts = some_texts(40)
    texts[17] += f" Problem 3. {problem.upper()} Solution: "
    (tmp_path / "t.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "v.jsonl").write_bytes(jsonl(["held out"]))
    command = ["--input", tmp_path / "t.jsonl", "--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder,
               "--output", tmp_path / "data", "--against", tmp_path / "eval.jsonl"]  # fmt: skip
    assert prepare(*command) == 2
    assert "1 records overlap with 1 problems" in caplog.records[-1].getMessage()
    assert f"{tmp_path / 't.jsonl'}:18 holds" in (tmp_path / "data.overlap.txt").read_text()
    assert not (tmp_path / "data").exists()
    assert prepare(*command, "--drop", "--block-bytes", 500, "--workers", 1) == 0
    assert decoded(tmp_path / "data" / "train", tokenizer_folder) == texts[:17] + texts[18:]
    manifest = verify(tmp_path / "data")
    assert manifest["dropped"] == {"overlaps with an evaluation set": 1}
    (match,) = json.loads((tmp_path / "data" / "overlap.json").read_text())["matches"]
    assert (match["where"], match["document"]) == (
        f"{tmp_path / 't.jsonl'}:18",
        18,
    )  # after one of the validation split


def test_corpus_smaller_than_a_sample_is_refused(tmp_path, tokenizer_folder, caplog):
    """Pins a corpus that Megatron would repeat within one sample."""
    (tmp_path / "t.jsonl").write_bytes(jsonl(some_texts(9)))
    (tmp_path / "v.jsonl").write_bytes(jsonl(["held out"]))
    command = ["--input", tmp_path / "t.jsonl", "--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder]
    assert prepare(*command, "--output", tmp_path / "data", "--seq-length", 4096) == 2
    assert "valid split is smaller than one sample of 4097 tokens" in caplog.records[-1].getMessage()
    assert prepare(*command, "--output", tmp_path / "data", "--seq-length", 2) == 0


# Killed runs, and bytes that change


def wait_for(path: Path, pattern: str, count: int, process: subprocess.Popen) -> None:
    """Return once `count` files match, or the process has ended."""
    while process.poll() is None and len(list(path.glob(pattern))) < count:
        time.sleep(0.01)


def test_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, tokenizer_folder):
    """Pins a run that was killed in either pass or while joining and that, run again, gives other bytes, begins from
    zero, or takes half-written blocks; its processes end with it."""
    texts = some_texts(3000)
    (tmp_path / "t.jsonl").write_bytes(jsonl(texts + texts[:50]))
    near = ["--near-duplicates", "0.9"]
    command = [sys.executable, str(TOOLS / "prepare_data.py"), "cpt", "--input", str(tmp_path / "t.jsonl"), *near,
               "--valid-fraction", "0.1", "--tokenizer", str(tokenizer_folder), "--block-bytes", "4000"]  # fmt: skip
    undisturbed = [*command, "--output", str(tmp_path / "whole"), "--workers", "1"]
    subprocess.run(undisturbed, check=True, capture_output=True)
    work = tmp_path / ".killed.partial"
    command += ["--output", str(tmp_path / "killed"), "--workers", "2"]
    stamps: dict[str, int] = {}
    for pattern, count in (("survey/*.json", 40), ("tokens/*.json", 40), ("output/train.bin", 1)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(work, pattern, count, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        first = work / "survey" / "00000000.json"
        assert stamps.setdefault("first block", first.stat().st_mtime_ns) == first.stat().st_mtime_ns
        (work / "survey" / "00000001.digests").write_bytes(b"half")  # as a machine that loses power leaves it
    subprocess.run(command, check=True, capture_output=True)
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")
    )
    manifests = [json.loads(data.pop("manifest.json")) for data in (whole, killed)]
    assert whole == killed
    for manifest in manifests:
        del manifest["command"], manifest["manifest_sha256"]  # they name the folder
    assert manifests[0] == manifests[1]
    assert not work.exists()
    work.mkdir()  # as a run leaves it that is killed between the last two steps
    again = subprocess.run(command, check=True, capture_output=True)
    assert json.loads(again.stdout)["reused"] is True
    assert not work.exists()


def test_changed_byte_is_found_anywhere(tmp_path, tokenizer_folder):
    """Pins a byte changed in any output that verify does not find, in the manifest itself as well."""
    (tmp_path / "t.jsonl").write_bytes(jsonl(some_texts(40)))
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"problem": "Find the number of rivers that ran through 17 towns."})
    )
    output = tmp_path / "data"
    twice = ["--input", "a=1", tmp_path / "t.jsonl", "--input", "b=2.5", tmp_path / "t.jsonl", "--keep-duplicates"]
    rest = ["--valid-fraction", 0.2, "--tokenizer", tokenizer_folder, "--against", tmp_path / "eval.jsonl"]
    assert prepare(*twice, *rest, "--output", output) == 0
    verify(output)
    choice = random.Random(0)
    names = {path.name for path in output.iterdir()}
    assert names > {"manifest.json", "train.blend", "overlap.json", "overlap.txt", "train-b.idx", "valid.bin"}
    for path in output.iterdir():
        original = path.read_bytes()
        places = (
            range(len(original))
            if path.name == "train.blend"
            else choice.sample(range(len(original)), min(40, len(original)))
        )
        if path.name == "manifest.json":
            places = range(0, len(original), 7)
        for place in places:
            changed = original[place] ^ (1 << choice.randrange(8))
            path.write_bytes(original[:place] + bytes([changed]) + original[place + 1 :])
            with pytest.raises(DataError):
                verify(output)
        path.write_bytes(original)
    verify(output)


# The tokenizer


ODD_TEXT = st.text() | st.text("ab 1'sT\n\r\té日🙂\u0301<|endoftext|>")


@pytest.mark.parametrize("parse", [False, True])
def test_fast_tokenizer_equals_the_reference(tokenizer_folder, parse):
    """Pins ids that differ from those of Hugging Face's tokenizers, special tokens in the text included."""
    ours = DocumentTokenizer(tokenizer_folder, "<|endoftext|>", parse)
    slow = DocumentTokenizer(tokenizer_folder, "<|endoftext|>", parse, "tokenizers")
    assert [encoder.library.split()[0] for encoder in (ours, slow)] == ["fastokens", "tokenizers"]
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    reference.encode_special_tokens = not parse

    @settings(max_examples=150, deadline=None)
    @given(texts=st.lists(ODD_TEXT, min_size=1, max_size=5))
    def holds(texts):
        expected = [[*reference.encode(text, add_special_tokens=False).ids, ours.eod] for text in texts]
        for encoder in (ours, slow):
            ids, lengths = encoder.encode(texts)
            assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected

    holds()


def test_every_character_is_encoded_as_the_reference_does(tokenizer_folder):
    """Pins libraries that go by different versions of Unicode: each character, between letters, digits and itself."""
    ours = DocumentTokenizer(tokenizer_folder, "<|endoftext|>", False)
    codes = [*range(0xD800), *range(0xF900, 0x12000), *range(0x1D000, 0x20000), *range(0x20000, 0x110000, 499)]
    texts = [f"a{chr(code)}b {chr(code)}1{chr(code)}'s" for code in codes]
    for found, expected in zip(ours._encode_fast(texts), ours._encode_reference(texts), strict=True):
        assert np.array_equal(found, expected)


def test_difference_between_the_libraries_ends_the_run(tmp_path, tokenizer_folder, caplog, monkeypatch):
    """Pins a check of the fast tokenizer that cannot fail: here it gives one wrong id for a text of every block."""
    encode = tokenizer.DocumentTokenizer._encode_fast

    def wrong(self, texts):
        ids, lengths = encode(self, texts)
        return ids + (np.arange(ids.size) == ids.size - 1).astype(np.uint32), lengths

    (tmp_path / "t.jsonl").write_bytes(jsonl(some_texts(40)))
    command = ["--input", tmp_path / "t.jsonl", "--valid-fraction", 0.2, "--tokenizer", tokenizer_folder]
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.DocumentTokenizer, "_encode_fast", wrong)
        assert prepare(*command, "--output", tmp_path / "data") == 2
    assert "encode differently" in caplog.records[-1].getMessage()
    assert prepare(*command, "--output", tmp_path / "data") == 0
    receipt = read_manifest(tmp_path / "data")["encoded_by"]
    assert receipt["libraries"][0].startswith("fastokens ")
    assert receipt["documents_compared"] > 0


def test_id_above_the_vocabulary_is_refused(tmp_path, tokenizer_folder, caplog, monkeypatch):
    """Pins an id that no row of the embedding has, stored by its lowest 16 bits."""
    monkeypatch.setattr(
        tokenizer.DocumentTokenizer, "_encode_fast", lambda self, texts: (np.array([70000], np.uint32), np.array([1]))
    )
    (tmp_path / "t.jsonl").write_bytes(jsonl(["one"]))
    (tmp_path / "v.jsonl").write_bytes(jsonl(["two"]))
    command = ["--input", tmp_path / "t.jsonl", "--valid-input", tmp_path / "v.jsonl", "--tokenizer", tokenizer_folder]
    assert prepare(*command, "--output", tmp_path / "data") == 2
    assert "gives id 70000, outside its vocabulary" in caplog.records[-1].getMessage()


NUMBERS = ["18446744073709551616", "-9223372036854775809", "18446744073709551615", "1" * 400, "0.1", "-1.5e-7", "12.50"]
LONG = ["0.1000000000000000055511151231257827", "3.14159265358979323846", "1234567890.123456789", "1e400"]


@pytest.mark.parametrize("digits", NUMBERS + LONG)
def test_numbers_keep_their_digits(digits):
    """Pins integers above 64 bits that become floats, and digits that a float lacks."""
    for text in (digits, f'{{"a": [{digits}]}}'):
        value = sources.read_json(text.encode())
        value = value if text == digits else value["a"][0]
        assert value == json.loads(digits)
        assert type(value) in (int, float, sources.LongFloat)
        assert digits not in LONG or str(value) == digits
        assert pickle.loads(pickle.dumps(value)) == value
        assert str(pickle.loads(pickle.dumps(value))) == str(value)


def test_bench_data_names_a_bad_tokenizer(tmp_path, caplog, tokenizer_folder):
    """Pins a traceback, after minutes, for a folder without tokenizer or a document end that it lacks."""
    bench = importlib.import_module("bench_data")
    assert bench.main(["--tokenizer", str(tmp_path)]) == 2
    assert "tokenizer.json does not exist" in caplog.records[-1].getMessage()
    assert bench.main(["--tokenizer", str(tokenizer_folder), "--eod-token", "none"]) == 2
    assert "no document-end token 'none'" in caplog.records[-1].getMessage()


def test_blocks_hold_whole_lines(tmp_path):
    """Pins lines cut at the end of a block, and line numbers that start again with each block."""
    lines = [f'{{"text": "{"x" * (number % 50)}"}}' for number in range(500)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (source,) = sources.open_sources([tmp_path / "t.jsonl"], "text", 700)
    blocks = list(source.blocks(sources.Rejects("fail")))
    assert len(blocks) > 10
    records = [item for block in blocks for item in block.records(sources.Rejects("fail"))]
    assert [where for where, _ in records] == [f"{tmp_path / 't.jsonl'}:{number}" for number in range(1, 501)]
    assert [record["text"] for _, record in records] == ["x" * (number % 50) for number in range(500)]
    assert sum(block.size for block in blocks) == (tmp_path / "t.jsonl").stat().st_size
