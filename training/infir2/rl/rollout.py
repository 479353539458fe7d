"""Rollouts: from prompts to a step's groups of scored samples. Knows nothing of how text is generated or trained on.

`Prompts` is the data, `Source` its order and what was left over, `collect` dynamic sampling: more groups are begun than
a step needs, those whose rewards do not differ are left out, and what is not finished when there are enough is
stopped. Nothing of that is lost: finished groups wait for the next step, unfinished samples are gone on with there,
each token with the policy that sampled it. Counts of everything are in `Collected`.

An engine is what has the three methods of `Engine`.
"""

import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from infir2.data.chat import BadMessages, ChatTokenizer, check_messages, label_text
from infir2.data.samples import epoch_order
from infir2.evaluation import answers
from infir2.indexed import DataError
from infir2.rl import grpo, rewards

logger = logging.getLogger(__name__)


TELLING_RESPONSES = 256  # cut ones, from which on that is no chance


class RolloutError(Exception):
    """Generation cannot go on: what was found, and what to do."""


# What is exchanged with an engine


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k -1 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


@dataclass(frozen=True)
class Request:
    """One response to generate after `tokens` (the prompt, and what was generated before)."""

    id: int
    tokens: list[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Response:
    """New tokens (the end token included, where it was sampled), and the log-probability of each at the sampling
    temperature. finish: "stop" (the end token), "length" (no room left), "abort" (stopped: go on from here)."""

    id: int
    tokens: list[int]
    logprobs: list[float]
    finish: str


class Engine(Protocol):
    """Generates. Responses come in any order; every request gets exactly one."""

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None: ...

    def next(self) -> Response:
        """A response that is finished; waits for one."""

    def abort(self) -> list[Response]:
        """Stop everything that is under way, and return it, with the responses that `next` has not given yet."""


# Prompts


class Prompts:
    """Prompts with labels (`tools/prepare_data.py rl`), rendered by a model's chat template and tokenised.

    A record holds `input_key`, a string or a list of messages (or a conversation, `messages`), `label_key`, and, where
    the reward needs more than a label, an object `metadata`; without `needs_label` that may stand alone. Refuses
    (DataError) other records, an empty prompt, and prompts longer than `longest` tokens: data is cleaned before
    training, not during it. `openings`: what of the model's turn the template wrote, for each prompt.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: ChatTokenizer,
        *,
        input_key: str,
        label_key: str,
        longest: int,
        limit: int | None,
        needs_label: bool = True,
    ) -> None:
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(f"{path} {found}; give a .jsonl file that tools/prepare_data.py rl wrote")
        self.path, self.needs_label = path, needs_label
        self.labels: list[str | None] = []
        self.messages: list[list[dict]] = []
        self.metadata: list[dict[str, Any] | None] = []
        renderings = []
        with path.open("rb") as file:  # of text, splitlines() also cuts at characters that JSON keeps
            for number, line in enumerate(itertools.islice(file, limit), 1):
                try:
                    messages, label, metadata = self._record(json.loads(line), input_key, label_key)
                    renderings.append(tokenizer.prompt_rendering(messages))
                except (ValueError, KeyError, TypeError, BadMessages) as error:
                    raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
                self.messages.append(messages)
                self.labels.append(label)
                self.metadata.append(metadata)
        if not renderings:
            raise DataError(f"{path} holds no prompts")
        self.openings = [answers.turn_opening(rendering.text) for rendering in renderings]
        self.tokens = [encoded.tokens.tolist() for encoded in tokenizer.encode(renderings)]
        long = [number for number, tokens in enumerate(self.tokens, 1) if len(tokens) > longest]
        if long:
            raise DataError(
                f"{len(long)} prompts of {path} are longer than {longest} tokens, the first in line {long[0]} "
                f"({len(self.tokens[long[0] - 1])}); raise --rollout-max-prompt-len or leave them out: "
                f"tools/prepare_data.py rl --max-prompt-length {longest} --over-long drop"
            )

    def _record(self, record: Any, input_key: str, label_key: str) -> tuple[list[dict], str | None, dict | None]:
        if not isinstance(record, dict):
            raise TypeError(f"a {type(record).__name__}, not an object")
        if input_key not in record and "messages" in record:  # a conversation: what stands before its answer
            record[input_key] = list(itertools.takewhile(lambda m: m["role"] != "assistant", record["messages"]))
        for key, option in ((input_key, "--input-key"), (label_key, "--label-key")):
            if key not in record and (key == input_key or self.needs_label):
                raise ValueError(f"no {key!r} among {', '.join(map(repr, record)) or 'no fields'}; {option} names it")
        prompt = record[input_key]
        messages = check_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        metadata = record.get("metadata")
        if not isinstance(metadata, dict | None):
            raise TypeError(f"metadata is a {type(metadata).__name__}, not an object")
        label = record.get(label_key)
        if label is None and metadata is not None and not self.needs_label:
            return messages, None, metadata
        return messages, label_text(label), metadata

    def __len__(self) -> int:
        return len(self.tokens)

    def asked_forms(self) -> Counter[str]:
        """How many prompts ask for an answer in each of the forms that rewards read, a box aside."""
        return Counter(
            form.name
            for messages in self.messages
            for form in answers.asked_forms("\n".join(message["content"] for message in messages))
        )

    def response(self, prompt: int, text: str, truncated: bool) -> rewards.Sample:
        """A response to a prompt, to be scored."""
        *before, question = self.messages[prompt]
        return rewards.Sample(
            question["content"],
            text,
            self.labels[prompt],
            self.metadata[prompt],
            truncated=truncated,
            opening=self.openings[prompt],
            system="\n".join(message["content"] for message in before if message["role"] == "system"),
        )


# Samples


@dataclass
class Sample:
    """One response. versions: [policy's step, how many tokens it sampled], in order. Its random numbers follow from
    `id`, which no other sample of the run has."""

    id: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length"; None while it is unfinished
    score: float = 0.0  # by the reward function
    reward: float = 0.0  # what is trained on: the score, and what its length costs
    why: str = ""

    def add(self, response: Response, version: int) -> None:
        """Append what an engine that held policy `version` generated."""
        self.tokens += response.tokens
        self.logprobs += response.logprobs
        if response.tokens:
            self.versions.append([version, len(response.tokens)])
        self.finish = None if response.finish == "abort" else response.finish


@dataclass
class Group:
    """The samples of one prompt. `prompt` is its number in the data."""

    id: int
    prompt: int
    samples: list[Sample]

    @property
    def finished(self) -> bool:
        return all(sample.finish for sample in self.samples)

    @property
    def oldest(self) -> int | None:
        """The oldest policy that any token is of; None before the first token."""
        return min((version for sample in self.samples for version, _ in sample.versions), default=None)

    @property
    def scores(self) -> np.ndarray:
        return np.array([sample.score for sample in self.samples])

    def restart(self) -> int:
        """Forget what was generated; returns how many tokens that was."""
        lost = sum(len(sample.tokens) for sample in self.samples)
        self.samples = [Sample(sample.id) for sample in self.samples]
        return lost


class Source:
    """Which groups come next: those left over, then new ones in the order of the epochs. Its whole state is `state`."""

    def __init__(self, prompts: Prompts, samples_per_prompt: int, seed: int, shuffle: bool) -> None:
        self.prompts, self.samples_per_prompt = prompts, samples_per_prompt
        self.seed, self.shuffle = seed, shuffle
        self.begun = 0  # groups begun so far, over all epochs
        self.waiting: deque[Group] = deque()  # begun, not finished
        self.finished: deque[Group] = deque()  # finished, not used

    def take(self, count: int) -> list[Group]:
        """The next `count` groups to generate."""
        taken = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        return taken + [self._new() for _ in range(count - len(taken))]

    def _new(self) -> Group:
        epoch, place = divmod(self.begun, len(self.prompts))
        if self.shuffle:
            place = int(self._order(epoch)[place])
        first = self.begun * self.samples_per_prompt
        group = Group(self.begun, place, [Sample(first + i) for i in range(self.samples_per_prompt)])
        self.begun += 1
        return group

    def _order(self, epoch: int) -> np.ndarray:
        cached = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != epoch:
            cached = self._cached_order = (epoch, epoch_order(len(self.prompts), epoch, self.seed))
        return cached[1]

    def put_back(self, groups: Iterable[Group]) -> None:
        """Keep groups that were begun for the next step."""
        for group in groups:
            (self.finished if group.finished else self.waiting).append(group)

    def refresh(self, version: int, lag: int) -> int:
        """Begin anew what holds tokens of a policy more than `lag` steps before `version`; returns tokens given up."""
        everything = [*self.finished, *self.waiting]
        self.finished.clear()
        self.waiting.clear()
        lost = 0
        for group in everything:
            if group.oldest is not None and version - group.oldest > lag:
                lost += group.restart()
        self.put_back(everything)
        return lost

    def state(self) -> dict[str, Any]:
        groups = [asdict(group) for group in (*self.finished, *self.waiting)]
        return {"begun": self.begun, "groups": groups}

    def restore(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]
        groups = [Group(g["id"], g["prompt"], [Sample(**sample) for sample in g["samples"]]) for g in state["groups"]]
        self.put_back(groups)


# Dynamic sampling


@dataclass
class Collected:
    """A step's groups, in the order of their ids; counts of groups and tokens."""

    groups: list[Group]
    counts: Counter


@dataclass(frozen=True)
class Plan:
    """What a step needs. filter: keep only groups whose scores differ. rounds: how many times the groups of a step may
    be generated before that is called hopeless. response: tokens at most; overlong_buffer: of which DAPO's penalty
    takes the last ones, 0 for none."""

    groups: int
    over_sampling: int
    filter: bool
    rounds: int
    response: int
    overlong_buffer: int
    seed: int
    lag: int
    stop: str = ""  # the tokens that end a response, in words


def collect(
    source: Source,
    engine: Engine,
    score: Callable[[Sequence[rewards.Sample]], list[rewards.Score]],
    decode: Callable[[list[int]], str],
    plan: Plan,
    sampling: Sampling,
    version: int,
) -> Collected:
    """Generate and score until `plan.groups` groups can be trained on. RolloutError where they do not come."""
    counts: Counter = Counter(stale_tokens=source.refresh(version, plan.lag))
    kept: list[Group] = []
    under_way: dict[int, Group] = {}  # by sample
    open_requests: Counter = Counter()  # of each group's id
    verdicts = Verdicts()

    def judge(group: Group) -> None:
        verdicts.add(*_score(group, source.prompts, score, decode, plan))
        counts["groups"] += 1
        counts["ended"] += sum(sample.finish != "length" for sample in group.samples)
        counts["differing"] += grpo.has_spread(group.scores)
        if counts["groups"] == plan.groups:
            verdicts.refuse_broken_reward()
        if plan.filter and not grpo.has_spread(group.scores):
            counts["all_right" if group.scores.min() >= 1 else "all_wrong"] += 1
        else:
            kept.append(group)
        few = plan.filter and counts["groups"] * len(group.samples) < TELLING_RESPONSES  # the next may be other ones
        if counts["groups"] >= plan.groups and not few and _all_truncated(counts):
            raise RolloutError(_says_all_truncated(counts, plan))

    while source.finished and len(kept) < plan.groups:
        counts["left_over"] += 1
        judge(source.finished.popleft())
    while len(kept) < plan.groups:
        if len(kept) + len(open_requests) < plan.groups:
            if counts["groups"] >= plan.rounds * plan.groups:
                raise RolloutError(_hopeless(counts, len(kept), plan, verdicts))
            begun = source.take(plan.over_sampling)
            _begin(begun, engine, source.prompts, plan, sampling, under_way)
            open_requests.update(group.id for group in begun for sample in group.samples if sample.finish is None)
        response = engine.next()
        group = under_way.pop(response.id)
        open_requests[group.id] -= 1
        if not open_requests[group.id]:
            del open_requests[group.id]
        _sample(group, response.id).add(response, version)
        counts["generated_tokens"] += len(response.tokens)
        if group.finished:
            judge(group)
    for response in engine.abort():
        _sample(under_way[response.id], response.id).add(response, version)
        counts["generated_tokens"] += len(response.tokens)
    left = {group.id: group for group in under_way.values()}
    source.put_back(left[id] for id in sorted(left))
    counts["kept"], counts["put_back"] = len(kept), len(left)
    return Collected(sorted(kept, key=lambda group: group.id), counts)


def _begin(groups, engine, prompts, plan: Plan, sampling: Sampling, under_way: dict[int, Group]) -> None:
    requests = []
    for group in groups:
        prompt = prompts.tokens[group.prompt]
        for sample in group.samples:
            if sample.finish is None:
                under_way[sample.id] = group
                room = plan.response - len(sample.tokens)
                # a partial response goes on with other numbers than those it began with
                seed = request_seed(plan.seed, sample.id, len(sample.tokens))
                requests.append(Request(sample.id, prompt + sample.tokens, room, seed))
    engine.submit(requests, sampling)


def request_seed(*numbers: int) -> int:
    """A seed below 2^31 for one request, from the run's seed and what the request is of."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _sample(group: Group, id: int) -> Sample:
    return next(sample for sample in group.samples if sample.id == id)


def _score(group: Group, prompts: Prompts, score, decode, plan: Plan) -> tuple[list, list]:
    responses = [
        prompts.response(group.prompt, decode(sample.tokens), sample.finish == "length") for sample in group.samples
    ]
    results = score(responses)
    for sample, result in zip(group.samples, results, strict=True):
        sample.score, sample.why = float(result.reward), str(result.why)
        sample.reward = sample.score
        if plan.overlong_buffer:
            sample.reward += rewards.overlong_penalty(len(sample.tokens), plan.response, plan.overlong_buffer)
    return responses, results


def _all_truncated(counts: Counter) -> bool:
    """No response ended by itself, and nothing can be learned from their scores."""
    return not counts["ended"] and not counts["differing"]


def _says_all_truncated(counts: Counter, plan: Plan) -> str:
    return (
        f"all responses of {counts['groups']} groups were cut at {plan.response} tokens, and no scores differ; the "
        f"tokens that end a response are {plan.stop}. If the model ends its turns with another token, name it as "
        "eos_token_id in generation_config.json of --hf-checkpoint; else raise --rollout-max-response-len"
    )


class Verdicts:
    """How many responses were judged on what grounds, and the first response of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, tuple[rewards.Sample, rewards.Score]] = {}

    def add(self, responses: Sequence[rewards.Sample], scores: Sequence[rewards.Score]) -> None:
        for response, score in zip(responses, scores, strict=True):
            self.counts[str(score.why)] += 1
            self.first.setdefault(str(score.why), (response, score))

    def refuse_broken_reward(self) -> None:
        """RolloutError if the reward could score none: it is at fault, not what the model writes."""
        if self.counts and not self.counts.keys() - {rewards.Why.ERROR, rewards.Why.TIMED_OUT}:
            score = self.first[min(self.first)][1]  # an error says more than a time limit
            raise RolloutError(
                f"the reward failed on all of {self.counts.total()} responses, the first with: "
                f"{score.detail or score.why}. Correct the reward or its data, or raise --rm-deadline; "
                "infir2.rl.rewards.find_reward(NAME)(Sample(...)) tries it"
            )

    def __str__(self) -> str:
        why = self.counts.most_common(1)[0][0]
        response = self.first[why][0]
        return (
            f"{', '.join(f'{number} {why}' for why, number in self.counts.most_common())}; the first response that is "
            f"{why!r} ends in {response.response[-200:]!r}, its label is {str(response.label)[:80]!r}"
        )


def _hopeless(counts: Counter, kept: int, plan: Plan, verdicts: Verdicts) -> str:
    if _all_truncated(counts):
        return _says_all_truncated(counts, plan)
    return (
        f"{counts['groups']} groups gave only {kept} of the {plan.groups} whose samples' scores differ "
        f"({counts['all_right']} all right, {counts['all_wrong']} all wrong). Of their responses {verdicts}. The "
        "prompts are too easy or too hard for this model, or the reward does not find its answers (docs/RL.md, "
        "'Rewards'). "
        "--max-sampling-rounds allows more"
    )


def evaluate(
    prompts: Prompts, engine: Engine, score, decode, samples: int, response: int, sampling: Sampling, seed: int
) -> dict[str, Any]:
    """Mean score, truncation and length over `samples` responses to every prompt; scores: [prompts][samples]."""
    requests = [
        Request(i * samples + j, tokens, response, request_seed(seed, i * samples + j))
        for i, tokens in enumerate(prompts.tokens)
        for j in range(samples)
    ]
    engine.submit(requests, sampling)
    found = {response.id: response for response in (engine.next() for _ in requests)}
    ordered = [found[request.id] for request in requests]
    responses = [
        prompts.response(i // samples, decode(response.tokens), response.finish == "length")
        for i, response in enumerate(ordered)
    ]
    scored = score(responses)
    verdicts = Verdicts()
    verdicts.add(responses, scored)
    verdicts.refuse_broken_reward()
    values = [float(result.reward) for result in scored]
    return {
        "mean": float(np.mean(values)),
        "truncated": float(np.mean([r.finish == "length" for r in ordered])),
        "length": float(np.mean([len(r.tokens) for r in ordered])),
        "generated_tokens": sum(len(r.tokens) for r in ordered),
        "scores": np.reshape(values, (len(prompts), samples)).tolist(),
    }


# What the trainers get


@dataclass(frozen=True)
class Batch:
    """A step's samples. tokens: each one's prompt and response, int32; prompts: length of each prompt. The others hold
    one float32 for each response token of all samples in order: `boundaries` [samples + 1] says whose.

    `rollout`: log-probabilities by the engine; `advantages`; `old`: by the trainer before the step's first update, or
    None where the step has one update, whose own forward pass gives them.
    """

    tokens: list[np.ndarray]
    prompts: list[int]
    boundaries: np.ndarray
    rollout: np.ndarray
    advantages: np.ndarray
    old: np.ndarray | None = None

    def with_old(self, old: np.ndarray) -> "Batch":
        return replace(self, old=old)

    def __len__(self) -> int:
        return len(self.tokens)

    # as infir2.data.samples.Samples, for packing

    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.tokens])

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.tokens[index]
        return tokens, np.arange(len(tokens)) >= self.prompts[index]


def training_batch(groups: Sequence[Group], prompts: Prompts) -> Batch:
    """The groups' samples in order, with their advantages."""
    advantages = grpo.group_advantages(np.array([[s.reward for s in group.samples] for group in groups]))
    samples = [(prompts.tokens[group.prompt], sample) for group in groups for sample in group.samples]
    lengths = [len(sample.tokens) for _, sample in samples]
    return Batch(
        tokens=[np.array(prompt + sample.tokens, dtype=np.int32) for prompt, sample in samples],
        prompts=[len(prompt) for prompt, _ in samples],
        boundaries=np.concatenate([[0], np.cumsum(lengths)]),
        rollout=np.concatenate([sample.logprobs for _, sample in samples]).astype(np.float32),
        advantages=np.repeat(advantages.ravel(), lengths).astype(np.float32),
    )
