"""Rollouts with an engine that is made up: nothing is lost, doubled or mixed up. Each docstring says what it pins."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import rl_model
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.data.chat import BadMessages, ChatTokenizer, Rendering
from infir2.indexed import DataError
from infir2.rl import rewards, rollout
from infir2.rl.rewards import Score, Why
from infir2.rl.rollout import Plan, Response, RolloutError, Sampling, Source, collect

PLAN = Plan(groups=3, over_sampling=5, filter=True, rounds=20, response=9, overlong_buffer=0, seed=7, lag=1)
SAMPLING = Sampling(temperature=1.1)


class FakePrompts(rollout.Prompts):
    """`count` prompts, each of tokens and with a label that no other one has."""

    def __init__(self, count: int) -> None:
        self.tokens = [[1000 + i] * (1 + i % 3) for i in range(count)]
        self.labels = [str(1000 + i) for i in range(count)]
        self.messages = [[{"role": "user", "content": f"prompt {i}"}] for i in range(count)]
        self.metadata = [{"number": i} for i in range(count)]
        self.openings = ["<think>\n"] * count


class FakeEngine:
    """Answers in any order; what it is asked to stop may be finished, begun or not begun. It keeps its own record of
    what it gave to whom: `given` holds (version, token) by sample, `lost` counts tokens that were asked for anew."""

    def __init__(self, response: int) -> None:
        self.response = response
        self.given: dict[int, list[tuple[int, int]]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.seeds: set[tuple[int, int, int]] = set()  # with the sample, and how much of it was there

    def begin_step(self, version: int, seed: int) -> None:
        self.version, self.random = version, np.random.default_rng([seed, version])
        self.lost = self.generated = 0
        self.under_way: list = []

    def submit(self, requests, sampling) -> None:
        assert sampling == SAMPLING
        for request in requests:
            assert request.id not in {other.id for other in self.under_way}, "asked for twice"
            before = [token for _, token in self.given.setdefault(request.id, [])]
            prompt = self.prompts.setdefault(request.id, request.tokens)
            if request.tokens == prompt and before:  # begun anew
                self.lost += len(before)
                self.given[request.id] = before = []
            assert request.tokens == prompt + before
            assert request.max_new_tokens == self.response - len(before) > 0
            self.seeds.add((request.seed, request.id, len(before)))
            self.under_way.append(request)

    def _answer(self, request, stopped: bool) -> Response:
        room = request.max_new_tokens
        count = int(self.random.integers(0, room) if stopped else self.random.integers(1, room + 1))
        tokens = self.random.integers(0, 3, count).tolist()
        self.given[request.id] += [(self.version, token) for token in tokens]
        self.generated += count
        finish = "abort" if stopped else "length" if count == room else "stop"
        return Response(request.id, tokens, [-token - 0.25 for token in tokens], finish)

    def next(self) -> Response:
        return self._answer(self.under_way.pop(self.random.integers(len(self.under_way))), stopped=False)

    def abort(self) -> list[Response]:
        left, self.under_way = self.under_way, []
        self.random.shuffle(left)
        return [self._answer(request, stopped=self.random.random() < 0.7) for request in left]


def decode(tokens) -> str:
    return " ".join(map(str, tokens))


def score(samples) -> list[Score]:
    """1 for an even sum of the tokens."""
    return [Score(1.0 - sum(map(int, sample.response.split())) % 2, None, Why.CORRECT) for sample in samples]


def all_with(reward: float):
    """A reward function that does not look."""
    return lambda samples: [Score(reward, None, Why.WRONG) for _ in samples]


def step(source: Source, engine: FakeEngine, plan: Plan, version: int):
    engine.begin_step(version, plan.seed)
    return collect(source, engine, score, decode, plan, SAMPLING, version)


def contents(groups) -> list:
    return [(group.id, group.prompt, [vars(sample) for sample in group.samples]) for group in groups]


def check_record(group, engine: FakeEngine) -> None:
    """Each sample holds what the engine gave to it, token by token, with the version that gave it."""
    for sample in group.samples:
        given = engine.given.get(sample.id, [])
        if group.oldest is None:
            continue  # begun anew, not yet asked for
        assert sample.tokens == [token for _, token in given]
        assert sample.logprobs == [-token - 0.25 for token in sample.tokens]
        assert [version for version, count in sample.versions for _ in range(count)] == [v for v, _ in given]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 8), st.integers(2, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 10**6)
)
def test_nothing_is_lost_or_doubled(groups, more, samples, response, lag, seed):
    """Over 8 steps each sample that was begun is in exactly one place: trained on once, left out with its group for
    equal scores and counted, or kept for later; with the tokens that the engine gave it, and their versions.

    Pins: partial responses begun anew, finished ones of unfinished groups dropped, a group used in two steps, tokens of
    one sample in another, a policy older than allowed, the same random numbers twice.
    """
    plan = Plan(groups, groups + more, True, 100, response, 0, seed, lag)
    source = Source(FakePrompts(7), samples, seed, shuffle=True)
    engine = FakeEngine(response)
    used: Counter = Counter()
    left_out = 0
    for version in range(8):
        collected = step(source, engine, plan, version)
        assert len(collected.groups) == groups
        assert [group.id for group in collected.groups] == sorted(group.id for group in collected.groups)
        for group in collected.groups:
            assert all(sample.finish in ("stop", "length") for sample in group.samples)
            assert len({sample.score for sample in group.samples}) == 2
            assert all(version - lag <= v <= version for sample in group.samples for v, _ in sample.versions)
            used.update(sample.id for sample in group.samples)
        left_out += collected.counts["all_right"] + collected.counts["all_wrong"]
        waiting = [*source.finished, *source.waiting]
        for group in [*collected.groups, *waiting]:
            check_record(group, engine)
        assert all(group.finished for group in source.finished)
        assert not any(group.finished for group in source.waiting)
        kept = Counter(sample.id for group in waiting for sample in group.samples)
        assert set((used + kept).values()) <= {1}
        assert len(used) + len(kept) + left_out * samples == source.begun * samples
        assert max(used | kept, default=0) < source.begun * samples
        assert collected.counts["generated_tokens"] == engine.generated
        assert collected.counts["kept"] == groups
    assert len({(seed, id) for seed, id, _ in engine.seeds}) == len(engine.seeds)
    assert all(0 <= seed < 2**31 for seed, _, _ in engine.seeds)


def test_refresh_counts_what_it_gives_up():
    """With lag 0 nothing of an earlier policy is trained on, and every token given up is counted."""
    source, engine = Source(FakePrompts(5), 4, 0, shuffle=True), FakeEngine(9)
    plan = replace(PLAN, lag=0, over_sampling=8)
    stale = 0
    for version in range(6):
        before = sum(len(s.tokens) for group in (*source.finished, *source.waiting) for s in group.samples)
        collected = step(source, engine, plan, version)
        assert collected.counts["stale_tokens"] == before
        assert {v for group in collected.groups for s in group.samples for v, _ in s.versions} == {version}
        stale += before
    assert stale > 0


def test_partial_responses_go_on():
    """With a lag, what was stopped is gone on with: some samples have tokens of two policies. Pins: leftovers that are
    begun anew in every step, so that long responses never end."""
    source, engine = Source(FakePrompts(5), 4, 0, shuffle=True), FakeEngine(30)
    plan = replace(PLAN, response=30, over_sampling=12, lag=8)
    mixed = left_over = 0
    for version in range(8):
        collected = step(source, engine, plan, version)
        left_over += collected.counts["left_over"]
        assert collected.counts["stale_tokens"] == engine.lost == 0
        mixed += sum(len(sample.versions) > 1 for group in collected.groups for sample in group.samples)
    assert mixed > 0
    assert left_over > 0


def test_state_survives_json():
    """A run whose source is written as JSON and read again after every step has the same groups in the same steps.

    Pins: a finished group that is generated again, an epoch that starts anew, a log-probability that is rounded.
    """
    plan, runs = replace(PLAN, over_sampling=8, overlong_buffer=4), []
    for interrupted in (False, True):
        source, engine = Source(FakePrompts(5), 4, 3, shuffle=True), FakeEngine(9)
        runs.append([])
        for version in range(7):
            runs[-1].append(contents(step(source, engine, plan, version).groups))
            if interrupted:
                state = json.loads(json.dumps(source.state()))
                source = Source(FakePrompts(5), 4, 3, shuffle=True)
                source.restore(state)
    assert runs[0] == runs[1]


def test_hopeless():
    """Groups whose scores never differ end the step with the counts. Pins: a run that generates forever."""
    source, engine = Source(FakePrompts(5), 2, 0, shuffle=True), FakeEngine(9)
    engine.begin_step(0, 0)
    plan = replace(PLAN, rounds=4)
    with pytest.raises(RolloutError, match=r"1\d groups gave only 0 of the 3 .* \(1\d all right, 0 all wrong\)"):
        collect(source, engine, all_with(1.0), decode, plan, SAMPLING, 0)
    assert 12 <= source.begun <= 12 + PLAN.over_sampling


def test_hopeless_says_why():
    """The grounds are counted and a response is shown. Pins: a pointer to rollouts.jsonl, which was empty."""
    source, engine = Source(FakePrompts(5), 2, 0, shuffle=True), FakeEngine(9)
    engine.begin_step(0, 0)
    with pytest.raises(RolloutError, match=r"Of their responses \d+ wrong; .* ends in '[0-2 ]+', its label is '10"):
        collect(source, engine, all_with(0.0), decode, PLAN, SAMPLING, 0)


@pytest.mark.parametrize("filtered", [True, False])
def test_reward_that_fails_on_every_response(filtered):
    """Ends the run after one step's groups, with what it raised. Pins: ten rounds and "too easy or too hard"; without
    dynamic sampling training to the end on rewards of 0, status 0."""

    def broken(samples):
        scores = [Score(0.0, None, Why.ERROR, "KeyError: 'metadata'") for _ in samples]
        return [Score(0.0, None, Why.TIMED_OUT), *scores[1:]]

    source, engine = Source(FakePrompts(5), 2, 0, shuffle=True), FakeEngine(9)
    engine.begin_step(0, 0)
    with pytest.raises(RolloutError, match="failed on all of 6 responses, the first with: KeyError: 'metadata'"):
        collect(source, engine, broken, decode, replace(PLAN, filter=filtered), SAMPLING, 0)


def test_reward_that_fails_on_some_responses():
    """Costs these alone. Pins: a run that ends for one label that the reward cannot read."""

    def partly(samples):
        if samples[0].label == "1000":
            return [Score(0.0, None, Why.ERROR, "ValueError: the label") for _ in samples]
        return score(samples)

    source, engine = Source(FakePrompts(5), 4, 0, shuffle=False), FakeEngine(9)
    engine.begin_step(0, 0)
    assert len(collect(source, engine, partly, decode, PLAN, SAMPLING, 0).groups) == PLAN.groups


def test_rewards_get_all_of_a_prompt():
    """Its metadata, what its template wrote of the model's turn, its system message. Pins: metadata left out, so that
    reasoning-gym's scorers gave 0; thoughts that the template opens read as answers."""
    prompts = FakePrompts(5)
    prompts.messages[3] = [{"role": "system", "content": "Write Answer: X."}, *prompts.messages[3]]
    seen = []

    def record(samples):
        seen.extend(samples)
        return score(samples)

    engine = FakeEngine(9)
    engine.begin_step(0, 0)
    collect(Source(prompts, 4, 0, shuffle=False), engine, record, decode, PLAN, SAMPLING, 0)
    assert len(seen) >= 4 * PLAN.groups
    for sample in seen:
        number = int(sample.label) - 1000
        assert sample.prompt == f"prompt {number}"
        assert sample.metadata == {"number": number}
        assert sample.opening == "<think>\n"
        assert sample.system == ("Write Answer: X." if number == 3 else "")


def test_without_filter():
    """Every group is used, in the order of their ids. Pins: a filter that is always on."""
    source, engine = Source(FakePrompts(5), 2, 0, shuffle=False), FakeEngine(9)
    engine.begin_step(0, 0)
    plan = replace(PLAN, filter=False, over_sampling=3)
    collected = collect(source, engine, all_with(0.0), decode, plan, SAMPLING, 0)
    assert [(group.id, group.prompt) for group in collected.groups] == [(0, 0), (1, 1), (2, 2)]
    assert collected.counts["all_wrong"] == 0


def test_overlong_penalty():
    """DAPO's equation 13 is added to the reward, and to the reward alone. Pins: a filter or a report of right answers
    that the penalty changes."""
    source, engine = Source(FakePrompts(5), 4, 0, shuffle=True), FakeEngine(9)
    collected = step(source, engine, replace(PLAN, overlong_buffer=4), 0)
    samples = [sample for group in collected.groups for sample in group.samples]
    penalty = {5: 0.0, 6: -0.25, 7: -0.5, 8: -0.75, 9: -1.0}  # a limit of 9, of which the last 4 cost
    assert {sample.score for sample in samples} == {0.0, 1.0}
    assert all(s.reward == s.score + penalty[max(5, len(s.tokens))] for s in samples)
    assert {len(sample.tokens) for sample in samples} & {7, 8, 9}


@given(st.integers(1, 30), st.integers(0, 1000))
def test_epochs(count, seed):
    """Every epoch has every prompt once; groups and samples are numbered on. Pins: prompts seen twice, epochs alike."""
    source = Source(FakePrompts(count), 3, seed, shuffle=True)
    groups = source.take(2 * count) + source.take(count)
    epochs = [[group.prompt for group in groups[i * count : (i + 1) * count]] for i in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 10 or epochs[0] != epochs[1]
    assert [sample.id for group in groups for sample in group.samples] == list(range(9 * count))
    again = Source(FakePrompts(count), 3, seed, shuffle=True).take(3 * count)
    assert [group.prompt for group in again] == [prompt for epoch in epochs for prompt in epoch]


# What the trainers get, and evaluation


def test_training_batch():
    """Samples in order, with their own prompts, log-probabilities and group's advantages. Pins: a score trained on in
    place of the reward, an advantage of another group."""
    prompts = FakePrompts(3)
    samples = [
        rollout.Sample(i, tokens=[i] * length, logprobs=[-i - 0.5] * length, reward=reward, score=9.0)
        for i, (length, reward) in enumerate([(2, 1.0), (3, 0.0), (1, -0.5), (4, 0.5)])
    ]
    batch = rollout.training_batch([rollout.Group(0, 2, samples[:2]), rollout.Group(1, 0, samples[2:])], prompts)
    assert [tokens.tolist() for tokens in batch.tokens] == [
        [1002, 1002, 1002, 0, 0], [1002, 1002, 1002, 1, 1, 1], [1000, 2], [1000, 3, 3, 3, 3],
    ]  # fmt: skip
    assert batch.boundaries.tolist() == [0, 2, 5, 6, 10]
    assert batch.rollout.tolist() == [-0.5] * 2 + [-1.5] * 3 + [-2.5] + [-3.5] * 4
    unit = 0.5**0.5  # of two values, a distance of 1 apart: half of it over its own square root of a half
    assert batch.advantages == pytest.approx([unit] * 2 + [-unit] * 4 + [unit] * 4, abs=1e-5)
    assert batch.rollout.dtype == batch.advantages.dtype == np.float32
    tokens, trained = batch.sample(1)
    assert tokens[trained].tolist() == [1, 1, 1]
    assert batch.lengths().tolist() == [5, 6, 2, 5]


def test_evaluate():
    """Responses that come in any order are scored against their own prompt's label, each with its own seed. Pins: an
    answer judged by another problem's label, samples of a prompt that are all the same."""
    prompts = FakePrompts(6)
    seeds = set()

    class Echo:
        """Answers with the prompt's first token, the last sample of each prompt at length."""

        def submit(self, requests, sampling):
            assert sampling == SAMPLING
            seeds.update(request.seed for request in requests)
            self.requests = list(requests)

        def next(self):
            request = self.requests.pop(len(self.requests) // 2)
            long = request.id % 3 == 2
            tokens = [request.tokens[0]] * (request.max_new_tokens if long else 1)
            return Response(request.id, tokens, [0.0] * len(tokens), "length" if long else "stop")

    def judge(samples):
        return [Score(float(s.response == s.label) - 2.0 * s.truncated, None, Why.CORRECT) for s in samples]

    def failing(samples):
        return [Score(0.0, None, Why.ERROR, "KeyError: 'metadata'") for _ in samples]

    with pytest.raises(RolloutError, match="failed on all of 18 responses"):
        rollout.evaluate(prompts, Echo(), failing, decode, 3, 4, SAMPLING, seed=1)
    seeds.clear()
    found = rollout.evaluate(prompts, Echo(), judge, decode, 3, 4, SAMPLING, seed=1)
    assert found["scores"] == [[1.0, 1.0, -2.0]] * 6
    assert len(seeds) == 18
    assert (found["mean"], found["truncated"], found["length"]) == (0.0, pytest.approx(1 / 3), 2.0)
    assert found["generated_tokens"] == 36


# Prompts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    return ChatTokenizer(rl_model.tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "tokenizer"))


def prompts_of(path, tokenizer, **more) -> rollout.Prompts:
    settings = {"input_key": "prompt", "label_key": "label", "longest": 40, "limit": None, **more}
    return rollout.Prompts(path, tokenizer, **settings)


def test_prompts(tokenizer, tmp_path):
    """Text and messages are rendered with the generation prompt; a line of JSON may hold any character.

    Pins: a file cut into lines at U+2028, which JSON leaves as it is.
    """
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]
    records = [{"prompt": "What\u2028is 1 + 1?", "label": 2}, {"prompt": messages, "label": "3"}]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    prompts = prompts_of(path, tokenizer)
    assert prompts.labels == ["2", "3"]
    assert [tokenizer.decode(tokens) for tokens in prompts.tokens] == [
        "<|im_start|>user\nWhat\u2028is 1 + 1?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert len(prompts_of(path, tokenizer, limit=1)) == 1
    assert prompts.openings == ["", ""]


def test_prompts_carry_metadata_and_forms(tokenizer, tmp_path):
    """Pins: an item's metadata left out; prompts whose form nobody is told."""
    path = tmp_path / "prompts.jsonl"
    asking = "The last line is of the form Answer: X. 1 + 1?"
    records = [{"prompt": asking, "label": 2, "metadata": {"numbers": [1, 1]}}, {"prompt": "1 + 2", "label": "3"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = prompts_of(path, tokenizer, longest=100)
    assert prompts.metadata == [{"numbers": [1, 1]}, None]
    assert prompts.asked_forms() == {"Answer: X": 1}


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"prompt": " ", "label": "2"}', "line 2: BadMessages: empty content"),
        ('{"prompt": [], "label": "2"}', "line 2: BadMessages: no messages"),
        ('{"prompt": "1 + 1"}', "line 2: ValueError: no 'label' among 'prompt'; --label-key names it"),
        ('{"label": "2"}', "line 2: ValueError: no 'prompt' among 'label'; --input-key names it"),
        ("{}", "line 2: ValueError: no 'prompt' among no fields"),
        ('{"prompt": 5, "label": "2"}', "line 2: BadMessages: no messages"),
        ('{"prompt": [{"role": "user"}], "label": "2"}', "line 2: BadMessages: "),
        ('{"messages": [{"content": "1 + 1"}], "label": "2"}', "line 2: KeyError: 'role'"),
        ('{"prompt": "1 + 1", "label": null, "metadata": {}}', "line 2: .*label"),
        ("\udcff", "line 2: UnicodeDecodeError"),
        ("", "line 2: JSONDecodeError"),
        ('{"prompt": "1 + 1", "label": ""}', "line 2: .*label"),
        ('{"prompt": "1 + 1", "label": null}', "line 2: .*label"),
        ("[1]", "line 2: TypeError: a list, not an object"),
        ('{"prompt": "1 + 1", "label": "2", "metadata": "{}"}', "line 2: TypeError: metadata is a str, not an object"),
        ('{"prompt": "1 +', "line 2: JSONDecodeError"),
        (json.dumps({"prompt": "9 + " * 50, "label": "2"}), r"1 prompts of .* longer than 40 .* line 2 \(\d+\)"),
    ],
)
def test_prompts_refused(tokenizer, tmp_path, second_line, message):
    """A record that cannot be trained on is refused with its line before anything starts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 + 1", "label": "2"}\n' + second_line + "\n", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        prompts_of(path, tokenizer)


def test_prompts_that_the_template_refuses(tokenizer, tmp_path, monkeypatch):
    """Pins: what the rendering finds wrong with a record, a system message that does not reach the tokens, ending in a
    traceback without the line."""

    def refused(messages):
        if messages[0]["content"] == "no":
            raise BadMessages("text left out", "the template does not write it")
        return Rendering("text", [], "", 0, 0, {})

    monkeypatch.setattr(tokenizer, "prompt_rendering", refused)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "yes", "label": "2"}\n{"prompt": "no", "label": "2"}\n')
    with pytest.raises(DataError, match="line 2: BadMessages: text left out: the template does not write it"):
        prompts_of(path, tokenizer)


def test_prompts_without_a_label(tokenizer, tmp_path):
    """An item of reasoning-gym whose answer is null is scored by its metadata. Pins: such items refused."""
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": "1", "label": None, "metadata": {"n": 1}}, {"prompt": "2", "metadata": {}}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = prompts_of(path, tokenizer, needs_label=rewards.needs_label("reasoning-gym:graph_color"))
    assert prompts.labels == [None, None]
    assert prompts.metadata == [{"n": 1}, {}]
    assert prompts.response(0, "x", False).label is None
    for name in ("deepscaler", "math-verify"):
        with pytest.raises(DataError, match=r"line 1: .*label"):
            prompts_of(path, tokenizer, needs_label=rewards.needs_label(name))
    path.write_text('{"prompt": "1"}\n')
    with pytest.raises(DataError, match=r"line 1: .*label"):
        prompts_of(path, tokenizer, needs_label=False)


def test_no_prompts(tokenizer, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        prompts_of(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(DataError, match="is a folder"):
        prompts_of(tmp_path, tokenizer)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no prompts"):
        prompts_of(tmp_path / "empty.jsonl", tokenizer)


class Endless(FakeEngine):
    """Never samples a token that ends a response."""

    def _answer(self, request, stopped: bool) -> Response:
        tokens = [2] * request.max_new_tokens
        self.generated += len(tokens)
        return Response(request.id, tokens, [-1.0] * len(tokens), "length")


@pytest.mark.parametrize(("filter", "samples"), [(True, 128), (False, 4)])
def test_all_responses_cut(filter, samples):
    """A step whose responses are all cut, and whose scores say nothing, ends the run with the tokens that would have
    ended them. Pins: a wrong end-of-turn token, by which every right answer scored 0: ten full rounds, then "the
    prompts are too easy or too hard"; without dynamic sampling no word at all."""
    source, engine = Source(FakePrompts(5), samples, 0, shuffle=True), Endless(9)
    engine.begin_step(0, 0)
    plan = replace(PLAN, rounds=10, filter=filter, stop="151643 <|endoftext|>")
    with pytest.raises(RolloutError, match=r"(?s)cut at \d+ tokens.*are 151643 <\|endoftext\|>\. If the model"):
        collect(source, engine, all_with(0.0), decode, plan, SAMPLING, 0)
    assert engine.generated <= 2 * 3 * samples * 9  # two rounds at most, and not ten


def test_cost_of_a_response(monkeypatch):
    """Pins: all outstanding requests counted again for every response, seconds of a step at 6,144 of them."""
    looked_at = Counter()

    class Counted(rollout.Group):
        def __getattribute__(self, name):
            looked_at[name] += 1
            return super().__getattribute__(name)

    monkeypatch.setattr(rollout, "Group", Counted)
    engine = FakeEngine(9)
    engine.begin_step(0, 0)
    plan = replace(PLAN, groups=50, over_sampling=50, filter=False)
    collect(Source(FakePrompts(5), 4, 0, shuffle=True), engine, score, decode, plan, SAMPLING, 0)
    assert looked_at["id"] < 10 * 50 * 4
