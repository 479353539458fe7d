"""The report on evaluations: its statistics against independent ones, and what it reads, refuses and writes."""

import importlib.util
import itertools
import json
import shutil
from html.parser import HTMLParser
from math import comb
from pathlib import Path

import numpy as np
import pytest

from infir2.evaluation import scores
from infir2.indexed import DataError
from infir2.receipts import write_manifest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "evalscope"  # written by evalscope 1.14.1 against a small server
STRONG, WEAK = GOLDEN / "strong", GOLDEN / "weak"
PROBLEM = "How many edges has a cube?"

spec = importlib.util.spec_from_file_location("eval_report", ROOT / "tools" / "eval_report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


# Statistics

TRIALS = 5000
TOLERANCE = 0.015
SIZES = {"aime": (30, 32), "gpqa": (198, 8)}


def difficulties(random: np.random.Generator, size: str, mean: float, concentration: float) -> np.ndarray:
    """Probability of a right answer to each problem of each trial; concentration below 1: mostly near 0 or 1."""
    shape = (TRIALS, SIZES[size][0])
    return random.beta(mean * concentration, (1 - mean) * concentration, shape)


def covered(interval: tuple[np.ndarray, np.ndarray], truth: float) -> float:
    return float(((interval[0] <= truth) & (truth <= interval[1])).mean())


@pytest.mark.parametrize("concentration", [0.7, 1.5, 4.0])
@pytest.mark.parametrize(
    ("size", "mean"),
    [("aime", 0.2), ("aime", 0.35), ("aime", 0.5), ("aime", 0.8), ("gpqa", 0.05), ("gpqa", 0.3), ("gpqa", 0.6)],
)
def test_interval_of_the_average_covers_as_it_says(size, mean, concentration):
    """Pins intervals that are too narrow: percentiles of a bootstrap, z for t, answers taken as independent."""
    random = np.random.default_rng(1)
    samples = SIZES[size][1]
    shares = random.binomial(samples, difficulties(random, size, mean, concentration)) / samples
    assert covered(scores.wilson_intervals(shares), mean) == pytest.approx(0.95, abs=TOLERANCE)


@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize(("size", "mean"), [("aime", 0.2), ("aime", 0.5), ("gpqa", 0.1), ("gpqa", 0.5)])
def test_interval_of_the_paired_difference_covers_as_it_says(size, mean, shift):
    """Pins a difference that is not paired (covers 100 %), and one that is too narrow."""
    random = np.random.default_rng(2)
    samples = SIZES[size][1]
    one = difficulties(random, size, mean, 1.5)
    own = difficulties(random, size, mean, 1.5)
    other = np.where(random.random(one.shape) < 0.7, one, own) * (1 - shift)  # alike on most problems, both means known
    gaps = (random.binomial(samples, one) - random.binomial(samples, other)) / samples
    assert covered(scores.student_intervals(gaps), mean * shift) == pytest.approx(0.95, abs=TOLERANCE)


def test_percentile_bootstrap_would_undercover():
    """Pins the reason for another interval: should percentiles cover at 30 problems, the module's claim is wrong."""
    random = np.random.default_rng(3)
    shares = random.binomial(32, difficulties(random, "aime", 0.2, 0.7)[:1000]) / 32
    weights = random.multinomial(30, [1 / 30] * 30, size=400) / 30
    ends = np.quantile(shares @ weights.T, [0.025, 0.975], axis=1)
    assert covered((ends[0], ends[1]), 0.2) < 0.95 - TOLERANCE


def test_few_problems_are_marked_where_the_interval_fails():
    """Pins an interval that is given without warning where it covers too little."""
    random = np.random.default_rng(4)
    shares = random.binomial(32, difficulties(random, "aime", 0.05, 0.7)) / 32
    assert covered(scores.wilson_intervals(shares), 0.05) < 0.9
    marked = np.mean([scores.share(row).few_problems for row in shares[:500]])
    assert marked > 0.95
    assert not scores.share(np.tile([0.0, 1.0, 0.5], 10)).few_problems


def test_standard_error_is_that_of_a_cluster_bootstrap():
    """Pins a formula for independent answers, which is several times too small here."""
    random = np.random.default_rng(5)
    right = (random.random((30, 32)) < random.beta(0.4, 0.6, (30, 1))).astype(float)
    drawn = right[random.integers(0, 30, (20_000, 30))].mean((1, 2)).std()
    assert scores.standard_error(right.mean(1)) == pytest.approx(drawn * np.sqrt(30 / 29), rel=0.02)


def test_sampling_error_is_that_of_new_answers_to_the_same_problems():
    """Pins the divisor n for n - 1, and a mix-up with the error over problems."""
    random = np.random.default_rng(6)
    chance = random.beta(0.5, 0.5, (30, 1))
    answers = (random.random((4000, 30, 4)) < chance).astype(float)
    squares = [scores.sampling_error(right) ** 2 for right in answers]
    assert np.sqrt(np.mean(squares)) == pytest.approx(answers.mean((1, 2)).std(), rel=0.04)
    assert scores.sampling_error(answers[0, :, :1]) is None


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    """Pins 1 - (1 - p)^k, which is biased, and an overflow of binomials."""
    random = np.random.default_rng(7)
    right = random.integers(0, 2, (6, 7)).astype(float)
    for k in range(1, 8):
        expected = [np.mean([max(chosen) for chosen in itertools.combinations(row, k)]) for row in right]
        assert scores.pass_at_k(right, k) == pytest.approx(np.array(expected))
    many = np.zeros((1, 3000))
    many[0, :5] = 1
    assert scores.pass_at_k(many, 1500)[0] == pytest.approx(1 - comb(2995, 1500) / comb(3000, 1500))
    with pytest.raises(ValueError, match="pass@8"):
        scores.pass_at_k(right, 8)


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.7062), (2, 4.30265), (29, 2.04523), (197, 1.97208)])
def test_student_quantiles_are_those_of_printed_tables(degrees, value):
    assert scores.student_quantile(0.975, degrees) == pytest.approx(value, abs=2e-5)


def test_no_spread_is_not_certainty():
    """Pins intervals of width zero, which would call any two models different."""
    assert scores.share(np.zeros(30)).high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert scores.share(np.ones(30)).low == pytest.approx(0.025 ** (1 / 30))
    same = scores.difference(np.full(3, 0.5), np.full(3, 0.25))
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="at least 2 problems"):
        scores.share(np.ones(1))


# Reading


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def reviews(folder: Path, benchmark: str = "aime24") -> Path:
    return next(folder.glob(f"reviews/*/{benchmark}_*.jsonl"))


def predictions(folder: Path, benchmark: str = "aime24") -> Path:
    return next(folder.glob(f"predictions/*/{benchmark}_*.jsonl"))


@pytest.fixture
def strong(tmp_path) -> Path:
    """A copy of the stronger model's folder, to be damaged."""
    return shutil.copytree(STRONG, tmp_path / "strong")


def build(*folders: Path, **options) -> report.Report:
    runs = {f"run{number}": folder for number, folder in enumerate(folders)}
    pairs = list(itertools.combinations(runs, 2))
    return report.make_report(runs, pairs, options.get("trained_on", {}), options.get("mark_overlap", False))


def test_genuine_folder_gives_what_its_records_hold():
    """Pins groups, repeats, keys (`acc`, `accuracy`), finish reasons and token counts that are read wrongly."""
    found = build(STRONG).scores
    for benchmark, key in (("aime24", "acc"), ("gpqa_diamond", "accuracy")):
        reviewed, predicted = lines(reviews(STRONG, benchmark)), lines(predictions(STRONG, benchmark))
        one = found[benchmark]["run0"]
        values = [record["sample_score"]["score"]["value"][key] for record in reviewed]
        assert one.average.value == pytest.approx(sum(values) / len(values))
        assert one.problems * one.samples == len(reviewed)
        assert one.samples == 4
        solved = {r["sample_score"]["group_id"] for r, value in zip(reviewed, values, strict=True) if value}
        assert one.pass_at[4].value == pytest.approx(len(solved) / one.problems)
        cut = [record["model_output"]["choices"][0]["stop_reason"] == "max_tokens" for record in predicted]
        assert one.truncated.value == pytest.approx(np.mean(cut))
        empty = [not record["sample_score"]["score"]["extracted_prediction"] for record in reviewed]
        assert one.invalid.value == pytest.approx(np.mean(empty))
        tokens = [record["model_output"]["usage"]["output_tokens"] for record in predicted]
        assert (one.length.value, one.length_unit) == (pytest.approx(np.mean(tokens)), "tokens")
    assert found["aime24"]["run0"].truncated.value > 0
    assert found["gpqa_diamond"]["run0"].invalid.value > 0


def test_length_is_in_characters_where_tokens_were_not_counted(strong):
    """Pins tokens and characters in one mean, and reasoning that is not counted."""
    path = predictions(strong)
    records = lines(path)
    records[0]["model_output"]["usage"] = None
    write_lines(path, records)
    one = build(strong).scores["aime24"]["run0"]
    texts = []
    for record in records:
        content = record["model_output"]["choices"][0]["message"]["content"]
        parts = [content] if isinstance(content, str) else [p.get("text") or p["reasoning"] for p in content]
        texts.append("".join(parts))
    assert one.length_unit == "characters"
    assert one.length.value == pytest.approx(np.mean([len(text) for text in texts]))


def test_order_of_the_files_does_not_matter(strong):
    """Pins pairing by line: evalscope writes answers as they come."""
    for path in (reviews(strong), predictions(strong)):
        write_lines(path, lines(path)[::-1])
    found = build(STRONG, strong)
    assert found.scores["aime24"]["run0"].average == found.scores["aime24"]["run1"].average
    assert found.differences["aime24"][0].estimate.value == 0
    assert found.differences["aime24"][0].verdict == "no difference"


def cut_line(folder: Path) -> None:
    path = reviews(folder)
    path.write_text(path.read_text()[:-40])


def drop_review(folder: Path) -> None:
    write_lines(reviews(folder), lines(reviews(folder))[:-1])


def drop_both(folder: Path) -> None:
    for path in (reviews(folder), predictions(folder)):
        write_lines(path, [record for record in lines(path) if record["index"] != 5])


def double_review(folder: Path) -> None:
    write_lines(reviews(folder), lines(reviews(folder)) + lines(reviews(folder))[:1])


def double_generation(folder: Path) -> None:
    records = lines(reviews(folder))
    records[0]["sample_score"]["generation_index"] = records[1]["sample_score"]["generation_index"]
    write_lines(reviews(folder), records)


def same_problem_twice(folder: Path) -> None:
    records = lines(reviews(folder))
    first = next(record for record in records if record["sample_score"]["group_id"] == 0)
    for record in records:
        if record["sample_score"]["group_id"] == 1:
            record["messages"][0], record["target"] = first["messages"][0], first["target"]
    write_lines(reviews(folder), records)


def other_score(folder: Path) -> None:
    records = lines(reviews(folder))
    value = records[0]["sample_score"]["score"]["value"]
    value["acc"] = 1 - value["acc"]
    write_lines(reviews(folder), records)


def half_right(folder: Path) -> None:
    records = lines(reviews(folder))
    records[0]["sample_score"]["score"]["value"]["acc"] = 0.5
    write_lines(reviews(folder), records)


def failed_score(folder: Path) -> None:
    records = lines(reviews(folder))
    records[0]["sample_score"]["score"]["status"] = "unavailable"
    write_lines(reviews(folder), records)


def foreign_record(folder: Path) -> None:
    write_lines(reviews(folder), [{"index": record["index"]} for record in lines(reviews(folder))])


def no_reports(folder: Path) -> None:
    shutil.rmtree(folder / "reports")


def no_reviews(folder: Path) -> None:
    reviews(folder).unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def no_predictions(folder: Path) -> None:
    for path in folder.glob("predictions/*/*"):
        path.unlink()


def two_models(folder: Path) -> None:
    (folder / "predictions/other").mkdir()


DAMAGES = {
    cut_line: "line 24 is cut",
    drop_review: "23 reviews of 24 predictions",
    drop_both: "has answers",
    double_review: "stands there twice",
    double_generation: "stands there twice",
    same_problem_twice: "1 problems stand there twice",
    other_score: "evalscope's report says",
    half_right: "not right or wrong",
    failed_score: "has no score: unavailable",
    foreign_record: "not as evalscope 1.14.1 writes it",
    no_reports: "did not finish",
    no_reviews: "is missing",
    empty: "no output folder of evalscope",
    no_predictions: "nothing was evaluated",
    two_models: "a run is one model",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_refused(strong, tmp_path, capsys, damage):
    """Pins a score of what is there, without what is not; and a traceback, or a report half written."""
    damage(strong)
    assert report.main(["--run", f"a={strong}", "--output", str(tmp_path / "out")]) == 2
    assert DAMAGES[damage] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["strong"]


def test_whole_problem_missing_everywhere_is_refused(strong):
    """Pins a cache cut at a problem's end, of which only evalscope's own count tells."""
    for path in (reviews(strong), predictions(strong)):
        write_lines(path, [record for record in lines(path) if record["index"] // 4 != 5])
    with pytest.raises(DataError, match="20 answers are there, 24 were asked for"):
        build(strong)


def test_runs_that_cannot_be_compared_are_refused(strong):
    """Pins a difference over other problems, another template, other benchmarks or other sampling."""
    path = reviews(strong)
    records = lines(path)
    original = path.read_text()
    for record in records:
        record["messages"][0]["content"] += " Be brief."
    write_lines(path, records)
    with pytest.raises(DataError, match="; 0 have the same prompt"):
        build(strong, WEAK)
    path.write_text(original)
    config = strong / "configs" / "task_config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("max_tokens: 24", "max_tokens: 48"))
    with pytest.raises(DataError, match="max_tokens 48 and 24"):
        build(strong, WEAK)
    config.write_text(settings)
    for path in strong.glob("*/strong/gpqa*"):
        path.unlink()
    with pytest.raises(DataError, match="other benchmarks"):
        build(strong, WEAK)


def test_verdict_names_the_better_only_outside_the_interval():
    """Pins a verdict by the sign of the difference alone, or of the wrong side."""
    assert report.verdict(scores.Estimate(0.1, 0.04, 0.02, 0.18), "A", "B") == "A is better"
    assert report.verdict(scores.Estimate(-0.1, 0.04, -0.18, -0.02), "A", "B") == "B is better"
    for low, high in ((-0.01, 0.2), (-0.2, 0.01), (0.0, 0.2)):
        assert report.verdict(scores.Estimate(0.1, 0.04, low, high), "A", "B") == "no difference"


# Overlap


def prepared(folder: Path, action: str | None, matches: list[str], against: str = "0" * 64) -> Path:
    """A folder of data whose search for evaluation sets found these problems."""
    folder.mkdir()
    if action:
        entries = [{"where": "train:1", "problem": "test.jsonl:5", "problem_excerpt": text} for text in matches]
        content = {"against": [{"path": "test.jsonl", "sha256": against}], "matches": entries}
        (folder / "overlap.json").write_text(json.dumps(content))
    request = {"task": "decontaminate", "action": action} if action == "report" else {"overlap_action": action}
    write_manifest(folder, {"request": request})
    return folder


def test_score_of_a_model_trained_on_the_benchmark_is_refused_or_marked(tmp_path, capsys):
    """Pins a contaminated score that is published without a word, in any of the files."""
    data = prepared(tmp_path / "data", "report", [PROBLEM])
    command = ["--run", f"a={STRONG}", "--run", f"b={WEAK}", "--trained-on", f"a={data}", "--output"]
    assert report.main([*command, str(tmp_path / "out")]) == 2
    assert "a was trained on 1 of the 6 problems of aime24" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert report.main([*command, str(tmp_path / "out"), "--mark-overlap"]) == 0
    content = json.loads((tmp_path / "out" / "scores.json").read_text())["benchmarks"]
    one = content["aime24"]["scores"]["a"]
    assert (one["overlap"], one["overlapping"]) == ("found", 1)
    values = [
        record["sample_score"]["score"]["value"]["acc"]
        for record in lines(reviews(STRONG))
        if PROBLEM not in record["messages"][0]["content"]
    ]
    assert one["without_overlap"]["value"] == pytest.approx(np.mean(values))
    assert content["aime24"]["scores"]["b"]["overlap"] == "not checked"
    assert content["gpqa_diamond"]["scores"]["a"]["overlapping"] == 0
    for name in ("scores.md", "scores.html"):
        assert "a was trained on 1 of the 6 problems of aime24" in (tmp_path / "out" / name).read_text()


def test_data_that_was_cleaned_or_never_searched_is_told_apart(tmp_path, strong):
    """Pins `no overlap` said of data that nobody searched, and a refusal of data whose overlaps were dropped."""
    dataset = tmp_path / "aime"
    dataset.mkdir()
    (dataset / "test.jsonl").write_text("{}")
    config = strong / "configs" / "task_config.yaml"
    config.write_text(config.read_text().replace("dataset_id: data/aime24", f"dataset_id: {dataset}"))
    sha = report.sha256_file(dataset / "test.jsonl")
    searched = prepared(tmp_path / "dropped", "drop", [PROBLEM], sha)
    unsearched = prepared(tmp_path / "unsearched", None, [])
    elsewhere = prepared(tmp_path / "elsewhere", "fail", [])
    for folders, expected in (([searched], "none"), ([unsearched], "not checked"), ([elsewhere], "not checked")):
        assert build(strong, trained_on={"run0": folders}).scores["aime24"]["run0"].overlap == expected
    both = build(strong, trained_on={"run0": [searched, unsearched]})
    assert both.scores["aime24"]["run0"].overlap == "not checked"
    (searched / "overlap.json").write_text("{}")
    with pytest.raises(DataError, match="was changed"):
        build(strong, trained_on={"run0": [searched]})


# What is written


class Page(HTMLParser):
    """A page's tags, the targets of its attributes, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.targets, self.words = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.targets += [value for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.words += data


def test_files_agree_and_the_page_stands_alone(tmp_path, capsys):
    """Pins a request to the network, a script, a name that becomes mark-up, and files that say different things."""
    name, out = "<script>x</script>", tmp_path / "out"
    words = ["--run", f"{name}={STRONG}", "--run", f"b={WEAK}", "--compare", name, "b", "--output", str(out)]
    assert report.main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["scores.html", "scores.json", "scores.md", "scores.png"]
    page = Page((out / "scores.html").read_text())
    assert not page.tags & {"script", "iframe", "object", "embed", "img"}
    assert [target for target in page.targets if not target.startswith(("#", "data:"))] == []
    assert "url(http" not in (out / "scores.html").read_text()
    assert "@import" not in (out / "scores.html").read_text()
    assert "no difference" in page.words
    assert name in page.words
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "scores.json").read_text())["benchmarks"]
    markdown = (out / "scores.md").read_text()
    assert capsys.readouterr().out.strip() == markdown.strip()
    for found in content.values():
        for one in found["scores"].values():
            average = one["average"]
            shown = f"{100 * average['value']:.1f} ({100 * average['low']:.1f}\u2013{100 * average['high']:.1f})"
            assert shown in markdown
            assert shown in page.words
    assert report.main(words) == 2  # the folder exists


@pytest.mark.parametrize(
    "words", [["--compare", "a"], ["--compare", "a", "c"], ["--compare", "a", "a"], ["--run", "a=x"], ["--run", "x"]]
)
def test_wrong_names_are_refused(words, capsys):
    """Pins a traceback at a name that is not there, or a run that silently replaces another."""
    with pytest.raises(SystemExit) as stopped:
        report.main(["--run", "a=x", "--run", "b=y", "--output", "z", *words])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
