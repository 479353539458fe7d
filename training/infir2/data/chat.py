"""A tokenizer's own chat template: what it renders, which part of it an assistant has to produce, and its tokens.

**What is trained.** The rendering of messages[:k] with the generation prompt is what a model is given when it has to
write turn k. The trained part of turn k begins where that prompt ends, and ends with the end-of-turn token that follows
the turn's content. It holds the content, what the template itself puts beside it there (an empty <think> block, tool
calls), and the end-of-turn token; not the role header, not the line end after the end-of-turn token. Where a template
marks the assistant's text with {% generation %}, its marks are followed instead, up to the last special token in them.

**How it is found.** Never by searching for the content, which may occur elsewhere. A private-use character is put after
the last visible character of each assistant turn; where it comes out in the rendering is where the content ends. The
parts must fit: without these characters the rendering is the plain one, and each prompt is a prefix of it. A
conversation for which they do not fit is refused.

**Tokens.** Special tokens that the template writes become control tokens; what lies between two of them is tokenised
as one text. Special tokens that somebody typed into a message stay text: a private-use character keeps them from being
recognised, and is taken out again before tokenisation. Only <think> and </think> are taken for what they are, in an
assistant's turn. A token that holds characters from both sides of a trained part's beginning is not trained: the model
is given a part of it.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from infir2.indexed import DataError
from infir2.receipts import sha256_file

ROLES = ("system", "user", "assistant", "tool")
THINKING = ("<think>", "</think>")
PRIVATE_USE = range(0xE000, 0xF900)
PROBE = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]

Messages = list[dict[str, Any]]
Span = tuple[int, int]
Part = tuple[str | int, int, int]


class BadMessages(Exception):
    """A conversation that cannot be used: `reason`, under which it is counted, and what was `found`."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"{reason}: {found}")
        self.reason = reason
        self.found = found


def check_messages(value: Any) -> Messages:
    """The conversation in `value`, without fields that are None. Raises BadMessages unless it is a list of objects with
    a known `role` and a `content` of visible text, in which the first assistant follows a user."""
    if not isinstance(value, list) or not value:
        raise BadMessages("no messages", f"a {type(value).__name__} where a list of messages is wanted: {value!r:.80}")
    messages = [_check_message(number, message) for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles[: roles.index("assistant") if "assistant" in roles else None]:
        raise BadMessages("roles out of order", f"no user before the first assistant: {', '.join(roles[:8])}")
    return messages


def _check_message(number: int, message: Any) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        found = sorted(message) if isinstance(message, dict) else f"a {type(message).__name__}"
        raise BadMessages("not a message", f"{where} must have role and content, found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadMessages("unknown role", f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadMessages("not a message", f"the content of {where} is a {type(content).__name__}, not a string")
    if not content.strip():
        raise BadMessages("empty content", f"{where} ({role}) says nothing")
    try:
        content.encode("utf-8")
    except UnicodeError as error:
        raise BadMessages("not valid UTF-8", f"{where}: {error}") from None
    return {key: part for key, part in message.items() if part is not None}


def label_text(value: Any) -> str:
    """A label as a string. Raises BadMessages for what is neither a string nor a number, and for an empty one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadMessages("no label", f"the label is a {type(value).__name__}, not a string or a number")
    text = str(value).strip()
    if not text:
        raise BadMessages("no label", "the label is empty")
    return text


@dataclass(frozen=True)
class Rendering:
    """Text of a conversation, in which `shield` breaks up special tokens that are not the template's, and the spans of
    it that are trained; with what happened on the way."""

    text: str
    spans: list[Span]
    shield: str
    typed_special_tokens: int
    shortened_turns: int


@dataclass(frozen=True)
class Encoded:
    """Tokens (int32 [length]) and whether each is trained (uint8 [length], 0 or 1); with counts for the receipt.

    `straddling`: tokens across the beginning of a trained part. `typed_special_tokens`: kept as text.
    `shortened_turns`: trained turns of which the template does not render the whole content (earlier thinking).
    """

    tokens: np.ndarray
    mask: np.ndarray
    straddling: int
    typed_special_tokens: int
    shortened_turns: int


class ChatTokenizer:
    """A Hugging Face folder's tokenizer and chat template.

    Refuses a folder without tokenizer.json or chat template, a template whose parts do not fit (see the module) or that
    does not close an assistant's turn with a special token, and a tokenizer that reads the text beside a special token
    otherwise than alone. `template_arguments` are passed to the template, as apply_chat_template would.
    """

    def __init__(self, folder: Path, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.path = folder / "tokenizer.json"
        self.sha256, self._tokenizer = read_tokenizer(self.path)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: index for index, token in added if token.special}
        if not self.special_tokens:
            raise DataError(f"{self.path} has no special tokens: no turn can end. Give the tokenizer of a chat model.")
        self._special = _any_of(self.special_tokens)
        self._special_but_thinking = _any_of(self.special_tokens.keys() - set(THINKING))
        self.template = read_chat_template(folder)
        self.template_sha256 = sha256(self.template.encode("utf-8")).hexdigest()
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._arguments = {**special_tokens_map(folder), "strftime_now": _no_clock, **(template_arguments or {})}
        self.end_of_turn = ""  # any, until the probe has found it
        self.end_of_turn = self._probe(folder)

    def _probe(self, folder: Path) -> str:
        """The end-of-turn token, from a short conversation; refuses what the class refuses."""
        try:
            rendering = self.rendering(PROBE)
            (start, end) = rendering.spans[-1]
        except (BadMessages, IndexError) as error:
            raise DataError(f"the chat template of {folder} cannot be used: {error or 'it marks nothing'}") from error
        answer = rendering.text[start:end]
        known = re.fullmatch(rf"(?:\s|{'|'.join(THINKING)})*{re.escape(PROBE[-1]['content'])}\s*(\S+)", answer)
        if known is None or known[1] not in self.special_tokens:
            raise DataError(
                f"the chat template of {folder} lets an assistant write {answer!r}, where the content and one special "
                "token are expected: its generation prompt must hold the whole header of the turn."
            )
        self._check_tokenizer(known[1])
        return known[1]

    def _check_tokenizer(self, special: str) -> None:
        text = f"a {special} a{special}\na"
        self._tokenizer.encode_special_tokens = False
        whole = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        parts = self.encode([Rendering(text, [], "\0", 0, 0)])[0].tokens.tolist()
        if whole != parts:
            raise DataError(
                f"{self.path} reads {text!r} as {whole}, but part by part as {parts}: spaces beside its special tokens "
                "count as theirs, or a text's beginning is special. Such tokenizers are not supported."
            )

    # Rendering

    def render(self, messages: Messages, generation_prompt: bool = False) -> str:
        """The conversation as transformers' apply_chat_template renders it. Raises BadMessages where it refuses."""
        return self._render(messages, generation_prompt)[0]

    def _render(
        self, messages: Messages, generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template  # two seconds

        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **self._arguments,
            )
        except DataError:
            raise
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise BadMessages("refused by the chat template", f"{type(error).__name__}: {error}") from error
        return texts[0], spans[0] if marks else []

    def rendering(self, messages: Messages, last_only: bool = False) -> Rendering:
        """The conversation with the spans that are trained: of all assistant turns, or of the last one."""
        end_mark, shield = self._unused_characters(messages)
        messages, typed = self._shielded(messages, shield)
        if self._marked:
            text, turns = self._marked_turns(messages)
        else:
            text = self.render(messages)
            turns = list(self._unmarked_turns(messages, text, end_mark))
        turns = turns[-1:] if last_only else turns
        for (start, end), _ in turns:
            if not text.endswith(self.end_of_turn, start, end):
                found = f"a turn ends in {text[start:end][-20:]!r}, not in {self.end_of_turn}"
                raise BadMessages("no end of turn", found)
        shortened = sum(not _holds(text[start:end], content) for (start, end), content in turns)
        return Rendering(text, [span for span, _ in turns], shield, typed, shortened)

    def prompt_rendering(self, messages: Messages) -> Rendering:
        """The conversation as a prompt: what an assistant is given when it has to answer. Nothing of it is trained."""
        _, shield = self._unused_characters(messages)
        messages, typed = self._shielded(messages, shield)
        return Rendering(self.render(messages, generation_prompt=True), [], shield, typed, 0)

    def _unused_characters(self, messages: Messages) -> tuple[str, str]:
        """Two private-use characters that neither the messages nor the template hold."""
        taken = self.template + json.dumps(messages, ensure_ascii=False, default=str)
        unused = (character for character in map(chr, PRIVATE_USE) if character not in taken)
        return next(unused), next(unused)

    def _shielded(self, messages: Messages, shield: str) -> tuple[Messages, int]:
        """A copy in which `shield` breaks up every special token, and how many there were."""
        count = 0

        def shielded(text: str, special: re.Pattern[str]) -> str:
            nonlocal count
            while special.search(text):  # again, because a special token may begin inside another one
                text, found = special.subn(lambda match: match[0][0] + shield + match[0][1:], text)
                count += found
            return text

        copies = []
        for message in messages:
            special = self._special_but_thinking if message["role"] == "assistant" else self._special
            copies.append(_map_strings(message, lambda text, special=special: shielded(text, special)))
        return copies, count

    def _unmarked_turns(self, messages: Messages, text: str, end_mark: str) -> Iterator[tuple[Span, str]]:
        """Span and content of each assistant turn, from prompts and marked ends."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        with_marks = self.render([_with_end_mark(message, end_mark) for message in messages])
        marks = [match.start() - number for number, match in enumerate(re.finditer(end_mark, with_marks))]
        if len(marks) != len(turns) or with_marks.replace(end_mark, "") != text:
            found = f"the content of {len(turns)} assistant turns does not come through as written"
            raise BadMessages("chat template does not round-trip", found)
        for turn, mark in zip(turns, marks, strict=True):
            start = self._prompt_end(messages[:turn], text)
            end = self._special.search(text, mark)
            inside = [match[0] for match in self._special.finditer(text, start, mark) if match[0] not in THINKING]
            if start > mark or inside:
                found = f"message {turn + 1} does not begin where the generation prompt ends; between them: {inside}"
                raise BadMessages("chat template does not round-trip", found)
            if end is None:
                raise BadMessages("no end of turn", f"no special token follows message {turn + 1}")
            yield (start, end.end()), messages[turn]["content"]

    def _prompt_end(self, messages: Messages, text: str) -> int:
        """Length of the prompt after which the assistant writes; it must be how `text` begins."""
        prompt = self.render(messages, generation_prompt=True)
        if not text.startswith(prompt):
            place = next(place for place in range(len(prompt)) if prompt[place] != text[place : place + 1])
            found = (
                f"the prompt for message {len(messages) + 1} and the whole conversation differ at character {place}: "
                f"{prompt[place : place + 40]!r} and {text[place : place + 40]!r}"
            )
            raise BadMessages("chat template does not round-trip", found)
        return len(prompt)

    def _marked_turns(self, messages: Messages) -> tuple[str, list[tuple[Span, str]]]:
        """Rendering, and what stands between {% generation %} marks, up to the last special token there."""
        text, marked = self._render(messages, marks=True)
        turns = []
        for start, end in marked:
            special = [match.end() for match in self._special.finditer(text, start, end)]
            if not special:
                raise BadMessages("no end of turn", f"no special token in the generation mark {text[start:end]!r:.80}")
            turns.append(((start, special[-1]), ""))
        return text, turns

    # Tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones as they are written."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Tokens and mask of each rendering."""
        parts = [list(self._parts(rendering)) for rendering in renderings]
        texts = [text for pieces in parts for text, _, _ in pieces if isinstance(text, str)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        return [self._joined(rendering, pieces, encodings) for rendering, pieces in zip(renderings, parts, strict=True)]

    def _parts(self, rendering: Rendering) -> Iterator[Part]:
        """(text without shields, or id of a special token; from and to in the rendering)."""
        place = 0
        for match in self._special.finditer(rendering.text):
            if place < match.start():
                yield rendering.text[place : match.start()].replace(rendering.shield, ""), place, match.start()
            yield self.special_tokens[match[0]], match.start(), match.end()
            place = match.end()
        if place < len(rendering.text):
            yield rendering.text[place:].replace(rendering.shield, ""), place, len(rendering.text)

    def _joined(self, rendering: Rendering, parts: list[Part], encodings: Iterator[Any]) -> Encoded:
        """Put the parts' tokens together; `encodings` gives those of each text. A trained span ends where a special
        token ends, so it can begin inside a text, but not end there."""
        tokens: list[int] = []
        mask: list[np.ndarray] = []
        straddling = 0
        for part, start, end in parts:
            ids = [part] if isinstance(part, int) else (encoding := next(encodings)).ids
            span = next((span for span in rendering.spans if span[0] < end and start < span[1]), None)
            first = len(ids) if span is None else 0
            if span is not None and span[0] > start:  # a text in which a trained part begins
                place = len(rendering.text[start : span[0]].replace(rendering.shield, ""))
                offsets = encoding.offsets
                first = bisect_left(offsets, (place, 0))
                straddling += first > 0 and offsets[first - 1][1] > place
            tokens += ids
            mask.append(np.arange(len(ids)) >= first)
        return Encoded(
            np.asarray(tokens, dtype=np.int32),
            np.concatenate(mask).astype(np.uint8),
            straddling,
            rendering.typed_special_tokens,
            rendering.shortened_turns,
        )


def read_chat_template(folder: Path) -> str:
    """The default chat template of a Hugging Face folder: chat_template.jinja, else that in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise DataError(
            f"{folder} has no chat template, neither chat_template.jinja nor a default in tokenizer_config.json. Give "
            "the tokenizer of a chat model, or put the template there that the model is to learn."
        )
    return template


def special_tokens_map(folder: Path) -> dict[str, str]:
    """The tokens that templates know by name (bos_token, eos_token, ...), from a Hugging Face folder's files."""
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        entries = _read_json(folder / file)
        values = {name: entries.get(name) for name in names}
        found |= {
            name: value["content"] if isinstance(value, dict) else value for name, value in values.items() if value
        }
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_tokenizer(path: Path) -> tuple[str, Tokenizer]:
    """SHA-256 of tokenizer.json, and its tokenizer with truncation, padding and the reading of special tokens off."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the folder of a Hugging Face fast tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = processors.Sequence([])  # byte-level ones cut white space off the offsets
    tokenizer.encode_special_tokens = True
    return sha256_file(path), tokenizer


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the leftmost, longest of `tokens`, as the tokenizer does; one of a single character is never found."""
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _no_clock(pattern: str) -> str:
    raise DataError(
        "the chat template writes today's date, so that the same data would give other bytes tomorrow. Set the date "
        "with --apply-chat-template-kwargs (the template names the variable), or take the date out of the template."
    )


def _with_end_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """An assistant's message with `mark` after its last visible character; others as they are."""
    if message["role"] != "assistant":
        return message
    content = message["content"]
    visible = len(content.rstrip())
    return {**message, "content": content[:visible] + mark + content[visible:]}


def _holds(text: str, content: str) -> bool:
    """Whether `text` holds all of `content`, white space aside."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`value` with `function` applied to every string in it, keys aside."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_strings(part, function) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_strings(part, function) for part in value]
    return value
