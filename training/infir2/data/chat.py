"""A tokenizer's own chat template: what it renders, which part of it an assistant has to produce, and its tokens.

**What is trained.** The rendering of messages[:k] with the generation prompt is what a model is given when it has to
write turn k. The trained part of turn k begins where that prompt ends, and ends with the end-of-turn token that follows
the turn's content. It holds the content, what the template itself puts beside it there (an empty <think> block, tool
calls), and the end-of-turn token; not the role header, not the line end after the end-of-turn token. Where a template
marks the assistant's text with {% generation %}, its marks are followed instead, up to the last special token in them;
what they hold of the generation prompt is not trained. A turn that is marked `"loss": 0` (MARKS) is not trained.

**What must come out.** What an assistant says (content, tool calls, thoughts in a field of their own) and the
definitions of tools have to be in the rendering: a conversation of which a template drops some is refused, or counted
where templates do so on purpose (thoughts of earlier turns).

**How it is found.** Never by searching for the content, which may occur elsewhere. A private-use character is put after
the last visible character of each assistant turn; where it comes out in the rendering is where the content ends. The
parts must fit: without these characters the rendering is the plain one, and each prompt is a prefix of it. A
conversation for which they do not fit is refused. A turn of tool calls carries the character in the last one's name.

**Tokens.** Special tokens that the template writes become control tokens; what lies between two of them is tokenised
as one text. Special tokens that somebody typed into a message stay text: a private-use character keeps them from being
recognised, and is taken out again before tokenisation. Only <think> and </think> are taken for what they are, in an
assistant's turn. A token that holds characters from both sides of a trained part's beginning is not trained: the model
is given a part of it.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from infir2.data.sources import BYTE_ORDER_MARK, LongFloat, read_json
from infir2.indexed import DataError
from infir2.receipts import sha256_file

ROLES = ("system", "user", "assistant", "tool")
THINKING = ("<think>", "</think>")
# Fields of a message that say whether its turn is trained: 0 or false for no, 1 or true for yes.
MARKS = ("loss", "loss_mask", "step_loss_mask", "weight", "train", "training", "trainable")
NOT_TRAINED = frozenset("masked ignore ignored skip skipped exclude excluded".split())
MARK_WORDS = NOT_TRAINED | frozenset(
    "loss losses weight weights mask masks train trained training trainable supervise supervised learn learned "
    "learnable backprop gradient gradients".split()
)
# What a mark's name may hold besides, where it is a whole record's: `training_data` or `loss_curve` is none.
BESIDE_A_MARK = frozenset("is in include compute calculate on no this sample example turn turns message messages "
                          "token completion assistant response answer labels".split())  # fmt: skip
# Fields in which an assistant says something, and those that only say where it belongs.
SAID = ("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts", "thinking_blocks",
        "reasoning_details", "reasoning_text", "analysis", "tool_plan", "refusal", "function_call")  # fmt: skip
ADDRESSES = ("role", "content", "tool_calls", "tool_call_id", "name", "id", *MARKS)
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "observation": "tool", "function_response": "tool", "prompter": "user", "bot": "assistant",
            "chatgpt": "assistant", "model": "assistant", "tool_response": "tool"}  # fmt: skip
# A record's fields, in any spelling of their words, that hold a system message's text, and definitions of tools.
SYSTEM = ("system", "system_prompt", "system_message", "system_content")
TOOLS = ("tools", "functions")
# A tool call's fields, and those in which others than OpenAI give the arguments.
CALL = ("name", "arguments", "id", "type", "function", "index")
ARGUMENTS = ("parameters", "params", "input", "inputs", "args", "kwargs")
LONG_ENOUGH = 20  # characters of a field that come up in a turn because the template renders the field
HEADER_CHARACTERS = 100  # a generation prompt's last special token, name of the role and <think> are shorter
PRIVATE_USE = range(0xE000, 0xF900)
PROBE = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
OWN_TEMPLATE = (
    "Put a template into the folder's chat_template.jinja that writes all that an assistant says right after its "
    "generation prompt (docs/data.md, Chat templates)"
)

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Span = tuple[int, int]
Part = tuple[str | int, int, int]
Counts = dict[str, int]


class BadMessages(Exception):
    """A conversation that cannot be used: `reason`, under which it is counted, and what was `found`."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"{reason}: {found}")
        self.reason = reason
        self.found = found


def check_messages(value: Any) -> Messages:
    """The conversation in `value`, without fields that are None, as lists of tool calls with objects for arguments.

    Raises BadMessages unless it is a list of objects with a known `role` and a `content` of visible text, in which the
    first assistant follows a user. ShareGPT's `from` and `value` are taken for role and content. The content may be
    empty of a system message, of a tool's answer, and of an assistant that calls tools, where it may also be missing.
    """
    if not isinstance(value, list) or not value:
        raise BadMessages("no messages", f"a {type(value).__name__} where a list of messages is wanted: {value!r:.80}")
    messages = [_check_message(f"message {number}", message) for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles[: roles.index("assistant") if "assistant" in roles else None]:
        raise BadMessages("roles out of order", f"no user before the first assistant: {', '.join(roles[:8])}")
    return messages


def _check_message(where: str, value: Any) -> dict[str, Any]:
    message = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else {}
    if {"from", "value"} <= message.keys() and "role" not in message:
        message = _from_sharegpt(where, message)
    if message.get("tool_calls") and message.get("role") == "assistant":
        message = {**message, "content": message.get("content", ""), "tool_calls": _tool_calls(where, message)}
    else:
        message.pop("tool_calls", None)  # an empty list calls nothing
    if not {"role", "content"} <= message.keys():
        found = sorted(message) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise BadMessages("not a message", f"{where} must have role and content, found {found}")
    if isinstance(message["content"], str):
        message["content"] = message["content"].lstrip(BYTE_ORDER_MARK)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadMessages("unknown role", f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadMessages("not a message", f"the content of {where} is a {type(content).__name__}, not a string")
    if not content.strip() and role not in ("system", "tool") and "tool_calls" not in message:
        raise BadMessages("empty content", f"{where} ({role}) says nothing")
    try:
        content.encode("utf-8")
    except UnicodeError as error:
        raise BadMessages("not valid UTF-8", f"{where}: {error}") from None
    _check_marks(where, message)
    return message


def _from_sharegpt(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with role and content for ShareGPT's `from` and `value`; a `function_call` becomes a tool call."""
    speaker, said = str(message["from"]).lower(), message["value"]
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": said, **rest}
    if speaker not in SHAREGPT:
        known = ", ".join([*SHAREGPT, "function_call"])
        raise BadMessages("unknown role", f"{where} is from {speaker!r}; known: {known}")
    return {"role": SHAREGPT[speaker], "content": said, **rest}


def _tool_calls(where: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, each with its arguments as an object; what is JSON in a string is decoded."""
    calls = decoded(message["tool_calls"], f"tool_calls of {where}", "tool call")
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        nested = isinstance(call, dict) and isinstance(call.get("function"), dict)
        function = call["function"] if nested else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadMessages("tool call", f"{where} calls a tool without a name: {call!r:.80}")
        _refuse_other_fields(where, {**call, **function})
        function = {**function, "arguments": _arguments(where, function.get("arguments"))}
        checked.append({**call, "function": function} if nested else function)
    return checked


def _refuse_other_fields(where: str, call: dict[str, Any]) -> None:
    """Refuses a call that says something outside its name and `arguments`, which templates do not render."""
    others = {
        key: value
        for key, value in call.items()
        if key not in CALL and value and (key in ARGUMENTS or isinstance(value, dict | list))
    }
    if others:
        raise BadMessages(
            "tool call", f"{where} calls a tool with {others!r:.80}: what it is called with is `arguments`"
        )


def _arguments(where: str, value: Any) -> dict[str, Any]:
    """The arguments of a call as an object, {} for none; numbers in it are as they were written."""
    if isinstance(value, str) and not value.strip():
        return {}
    arguments = decoded(value, f"arguments of {where}", "tool call")
    if arguments is None or arguments == []:
        return {}
    if not isinstance(arguments, dict):
        found = f"the arguments of {where} are a {type(arguments).__name__}, not an object: {arguments!r:.80}"
        raise BadMessages("tool call", found)
    for leaf in _leaves(arguments):
        if isinstance(leaf, float) and (isinstance(leaf, LongFloat) or not isfinite(leaf)):
            found = f"the arguments of {where} hold {leaf!s:.40}, which a float of JSON does not hold"
            raise BadMessages("tool call", found)
    return arguments


def decoded(value: Any, what: str, reason: str) -> Any:
    """The value of JSON in a string, as other APIs give it; what is no string as it is. Raises BadMessages."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value.encode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadMessages(reason, f"{what} are a string that is no JSON ({error}): {value!r:.80}") from None


def _check_marks(where: str, message: dict[str, Any]) -> None:
    """Refuses marks of a name or value that is not known, yes and no at once, and yes for what is only read."""
    marks = {key: message[key] for key in message if not MARK_WORDS.isdisjoint(_words(key))}
    unknown = {key: value for key, value in marks.items() if key not in MARKS or value not in (0, 1)}
    if unknown:
        found = f"{where} has {unknown!r:.80}; known are {', '.join(MARKS)}, 0 or false and 1 or true"
        raise BadMessages("unknown mark", found)
    if len({bool(value) for value in marks.values()}) > 1:
        raise BadMessages("unknown mark", f"{where} is marked as trained and as not trained: {marks!r}")
    if message["role"] != "assistant" and any(marks.values()):
        found = f"{where} ({message['role']}) is marked {marks!r}, but only assistants' turns are trained"
        raise BadMessages("unknown mark", found)


def check_record(record: dict[str, Any]) -> None:
    """Refuses (BadMessages) a record that says, for all of it or turn by turn, that it is not trained, or weighed; and
    one with arguments of its own for the template."""
    marks = {key: value for key, value in record.items() if _is_mark(key) and _leaves_out(key, value)}
    if marks:
        raise BadMessages("unknown mark", f"the record has {marks!r:.80}: mark its turns, or leave it out of the data")
    if record.get("chat_template_kwargs"):
        found = f"the record has chat_template_kwargs {record['chat_template_kwargs']!r:.80}, which would be ignored"
        raise BadMessages("template arguments", f"{found}: prepare such records apart, --apply-chat-template-kwargs")


def _words(key: str) -> list[str]:
    """The words of a field's name, as of loss_mask, lossMask or Loss-Mask."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())


def _is_mark(key: str) -> bool:
    words = set(_words(key))
    return key in MARKS or (not MARK_WORDS.isdisjoint(words) and words <= MARK_WORDS | BESIDE_A_MARK)


def _leaves_out(key: str, value: Any) -> bool:
    """Whether a record's mark leaves something out, or weighs it; a number may also be what somebody measured."""
    words = set(_words(key))
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, int | float) for one in value)
    if isinstance(value, str):
        value = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}.get(value.strip().lower())
    if not isinstance(value, int | float | Decimal):
        return False
    if words & {"weight", "weights"}:
        return value != 1
    if words & (NOT_TRAINED | {"no"}):
        return value == 1
    return value == 0 or (value == 1 and key not in MARKS and bool(words & {"mask", "masks"}))  # which is which?


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a checked assistant's message is trained, by its marks."""
    return all(message.get(mark, 1) for mark in MARKS)


def check_tools(value: Any) -> Tools:
    """The definitions of tools in a record's `tools`, a list or JSON in a string; [] for none. Raises BadMessages."""
    tools = (decoded(value, "tools", "tools") if value else []) or []
    if not isinstance(tools, list):
        raise BadMessages("tools", f"definitions of tools are a list, found a {type(tools).__name__}")
    tools = [decoded(tool, "tools", "tools") for tool in tools]
    if not all(isinstance(tool, dict) and isinstance(_tool_name(tool), str) for tool in tools):
        raise BadMessages("tools", f"definitions of tools are objects with a name, found {tools!r:.80}")
    return tools


def tools_of(record: dict[str, Any]) -> Tools:
    """The definitions of tools in a record, or in a message; [] for none. Raises BadMessages."""
    found = {key: tools for key in TOOLS if (tools := check_tools(record.get(key)))}
    if len(found) > 1:
        raise BadMessages("tools", f"definitions of tools are in {' and in '.join(found)}: keep one of them")
    return next(iter(found.values()), [])


def without_nulls_of_tables(messages: Messages, tools: Tools) -> tuple[Messages, Tools]:
    """Both without what a table that became JSON left in them: parameters that are null, and null arguments that the
    called tool's definition does not have. Tables give all tools the fields of each."""
    tools = [_with_properties(tool) for tool in tools]
    known = {_tool_name(tool): properties for tool in tools if (properties := _properties(tool)) is not None}

    def cleaned(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": cleaned(call["function"])}
        if call["name"] not in known:
            return call
        own = known[call["name"]]
        kept = {key: value for key, value in call["arguments"].items() if value is not None or key in own}
        return {**call, "arguments": kept}

    return [
        {**m, "tool_calls": list(map(cleaned, m["tool_calls"]))} if "tool_calls" in m else m for m in messages
    ], tools


def _properties(tool: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters in a tool's definition by name; None where it does not tell them."""
    schema = _function(tool).get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else None


def _with_properties(tool: dict[str, Any]) -> dict[str, Any]:
    """The definition without parameters that are null, which no schema is."""
    properties = _properties(tool)
    if properties is None or None not in properties.values():
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _with_properties(tool["function"])}
    kept = {key: value for key, value in properties.items() if value is not None}
    return {**tool, "parameters": {**tool["parameters"], "properties": kept}}


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def _tool_name(tool: dict[str, Any]) -> Any:
    return _function(tool).get("name")


def with_system(messages: Messages, record: dict[str, Any]) -> Messages:
    """The conversation with the text of the record's `system` (or another of SYSTEM) as its system message.

    Raises BadMessages for what is no string, and where the messages begin with another system message.
    """
    for key in (key for key in record if "_".join(_words(key)) in SYSTEM):
        system = record[key]
        if system is None or (isinstance(system, str) and not system.strip()):
            continue
        if not isinstance(system, str):
            raise BadMessages("system", f"field {key!r} is a {type(system).__name__}, not a string")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise BadMessages("system", f"field {key!r} and the system message differ: {system!r:.80}")
    return messages


def label_text(value: Any) -> str:
    """A label as a string, a number with all its digits. Raises BadMessages for what is neither a string nor a number,
    for an empty one, and for a float that may have lost digits."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadMessages("no label", f"the label is a {type(value).__name__}, not a string or a number")
    if type(value) is float:
        if not abs(value) < 2**53:  # NaN too
            found = (
                f"the label is the float {value!r}, which may have lost digits; give an integer, or digits as a string"
            )
            raise BadMessages("no label", found)
        value = Decimal(repr(value))
    text = f"{value:f}" if isinstance(value, Decimal) else str(value).strip()
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
    left_out: Counts = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """Tokens (int32 [length]) and whether each is trained (uint8 [length], 0 or 1); with counts for the receipt.

    `straddling`: tokens across the beginning of a trained part. `typed_special_tokens`: kept as text.
    `shortened_turns`: trained turns of which the template does not render all that is said (earlier thinking).
    `left_out`: what else the template does not render, by name: messages, fields of trained turns.
    """

    tokens: np.ndarray
    mask: np.ndarray
    straddling: int
    typed_special_tokens: int
    shortened_turns: int
    left_out: Counts


class ChatTokenizer:
    """A Hugging Face folder's tokenizer and chat template.

    Refuses a folder without tokenizer.json or chat template, a template whose parts do not fit (see the module) or that
    does not close an assistant's turn with a special token, and a tokenizer that reads the text beside a special token
    otherwise than alone. `template_arguments` are passed to the template, as apply_chat_template would.
    """

    def __init__(self, folder: Path, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.path = folder / "tokenizer.json"
        self.sha256, self._tokenizer = read_tokenizer(self.path)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: index for index, token in added if token.special}
        if not self.special_tokens:
            raise DataError(f"{self.path} has no special tokens: no turn can end. Give the tokenizer of a chat model.")
        self._special = _any_of(self.special_tokens)
        self._special_but_thinking = _any_of(self.special_tokens.keys() - set(THINKING))
        self.template = read_chat_template(folder)
        self.template_sha256 = sha256(self.template.encode("utf-8")).hexdigest()
        code = re.sub(r"\{#.*?#\}", "", self.template, flags=re.DOTALL)
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", code) is not None
        self._arguments = {
            **special_tokens_map(folder),
            "strftime_now": partial(_no_clock, folder),
            **(template_arguments or {}),
        }
        self._header_in_mark = ""
        self._knows = cache(self._renders_field)
        self.end_of_turn = ""  # any, until the probe has found it
        self.end_of_turn = self._probe(folder)

    def _probe(self, folder: Path) -> str:
        """The end-of-turn token, from a short conversation; refuses what the class refuses."""
        try:
            rendering = self.rendering(PROBE)
            if self._marked:
                self._header_in_mark = self._prompt_in_mark(rendering)
                rendering = self.rendering(PROBE)
            (start, end) = rendering.spans[-1]
        except (BadMessages, IndexError) as error:
            found = error if isinstance(error, BadMessages) else "it marks nothing"
            raise DataError(f"the chat template of {folder} cannot be used: {found}. {OWN_TEMPLATE}.") from error
        answer = rendering.text[start:end]
        known = re.fullmatch(rf"(?:\s|{'|'.join(THINKING)})*{re.escape(PROBE[-1]['content'])}\s*(\S+)", answer)
        if known is None or known[1] not in self.special_tokens:
            raise DataError(
                f"the chat template of {folder} lets an assistant write {answer!r}, where the content and one special "
                f"token are expected: its generation prompt must hold the whole header of the turn. {OWN_TEMPLATE}."
            )
        self._check_tokenizer(known[1])
        return known[1]

    def _prompt_in_mark(self, probe: Rendering) -> str:
        """What the generation mark begins with of the prompt that the model is given, such as a line end."""
        prompt = self.render(PROBE[:1], generation_prompt=True)
        return probe.text[probe.spans[-1][0] : len(prompt)] if probe.text.startswith(prompt) else ""

    def _renders_field(self, name: str) -> bool:
        """Whether the template renders this field of an assistant's last message."""
        said = "Thought?"
        try:
            return said in self.render([PROBE[0], {**PROBE[1], name: said}])
        except BadMessages:
            return False

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

    def render(self, messages: Messages, tools: Tools | None = None, generation_prompt: bool = False) -> str:
        """The conversation as transformers' apply_chat_template renders it. Raises BadMessages where it refuses."""
        return self._render(messages, tools, generation_prompt)[0]

    def _render(
        self, messages: Messages, tools: Tools | None, generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template  # two seconds

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools or None,
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

    def rendering(self, messages: Messages, last_only: bool = False, tools: Tools | None = None) -> Rendering:
        """The conversation with the spans that are trained: of all assistant turns, or of the last one, but for those
        that are marked as not trained. `tools` are the definitions that the template gets."""
        end_mark, shield = self._unused_characters(messages, tools)
        messages, tools, typed = self._shielded(messages, tools, shield)
        text, marked = self._render(messages, tools, marks=self._marked)
        ends = self._ends_of_turns(messages, tools, text, end_mark)
        turns = list(
            self._marked_turns(text, marked, ends) if self._marked else self._turns(messages, tools, text, ends)
        )
        turns = [(span, turn) for span, turn in (turns[-1:] if last_only else turns) if is_trained(messages[turn])]
        for (start, end), _ in turns:
            if not text.endswith(self.end_of_turn, start, end):
                found = f"a turn ends in {text[start:end][-20:]!r}, not in {self.end_of_turn}"
                raise BadMessages("no end of turn", found)
        self._check_tools_rendered(text, [*(tools or []), *(tool for m in messages for tool in tools_of(m))])
        texts = {turn: text[self._header(text, start) : end] for (start, end), turn in turns}
        left_out = Counter(self._left_out(messages, text, texts))
        shortened = left_out.pop("", 0)
        return Rendering(text, [span for span, _ in turns], shield, typed, shortened, dict(left_out))

    def prompt_rendering(self, messages: Messages) -> Rendering:
        """The conversation as a prompt: what an assistant is given when it has to answer. Nothing of it is trained."""
        _, shield = self._unused_characters(messages, None)
        messages, _, typed = self._shielded(messages, None, shield)
        text = self.render(messages, generation_prompt=True)
        left_out = Counter(self._left_out(messages, text, {}))
        return Rendering(text, [], shield, typed, 0, dict(left_out))

    def _unused_characters(self, messages: Messages, tools: Tools | None) -> tuple[str, str]:
        """Two private-use characters that neither the messages nor the template hold."""
        taken = self.template + json.dumps([messages, tools], ensure_ascii=False, default=str)
        unused = (character for character in map(chr, PRIVATE_USE) if character not in taken)
        return next(unused), next(unused)

    def _shielded(self, messages: Messages, tools: Tools | None, shield: str) -> tuple[Messages, Tools | None, int]:
        """Copies in which `shield` breaks up every special token, and how many there were."""
        count = 0

        def shielded(special: re.Pattern[str], text: str) -> str:
            nonlocal count
            while special.search(text):  # again, because a special token may begin inside another one
                text, found = special.subn(lambda match: match[0][0] + shield + match[0][1:], text)
                count += found
            return text

        copies = []
        for message in messages:
            special = self._special_but_thinking if message["role"] == "assistant" else self._special
            copies.append(_map_strings(message, partial(shielded, special)))
        return copies, _map_strings(tools, partial(shielded, self._special)), count

    def _ends_of_turns(self, messages: Messages, tools: Tools | None, text: str, end_mark: str) -> dict[int, int]:
        """Where the last that each assistant's message says ends in `text`, by the message's place."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        with_marks = self.render([_with_end_mark(message, end_mark) for message in messages], tools)
        ends = [match.start() - number for number, match in enumerate(re.finditer(end_mark, with_marks))]
        if len(ends) != len(turns) or with_marks.replace(end_mark, "") != text:
            calls = any("tool_calls" in message for message in messages)
            found = f"what {len(turns)} assistant turns say{', or call,' * calls} does not come through as written"
            raise BadMessages("chat template does not round-trip", f"{found}. {OWN_TEMPLATE}")
        return dict(zip(turns, ends, strict=True))

    def _turns(
        self, messages: Messages, tools: Tools | None, text: str, ends: dict[int, int]
    ) -> Iterator[tuple[Span, int]]:
        """Span and place of each assistant turn, from prompts and ends."""
        for turn, mark in ends.items():
            start = self._prompt_end(messages[:turn], tools, text)
            end = self._special.search(text, mark)
            inside = [match[0] for match in self._special.finditer(text, start, mark) if match[0] not in THINKING]
            if start > mark or inside:
                found = f"message {turn + 1} does not begin where the generation prompt ends; between them: {inside}"
                raise BadMessages("chat template does not round-trip", found)
            if end is None:
                raise BadMessages("no end of turn", f"no special token follows message {turn + 1}")
            yield (start, end.end()), turn

    def _prompt_end(self, messages: Messages, tools: Tools | None, text: str) -> int:
        """Length of the prompt after which the assistant writes; it must be how `text` begins."""
        prompt = self.render(messages, tools, generation_prompt=True)
        if not text.startswith(prompt):
            place = next(place for place in range(len(prompt)) if prompt[place] != text[place : place + 1])
            found = (
                f"the prompt for message {len(messages) + 1} and the whole conversation differ at character {place}: "
                f"{prompt[place : place + 40]!r} and {text[place : place + 40]!r}"
            )
            raise BadMessages("chat template does not round-trip", found)
        return len(prompt)

    def _marked_turns(self, text: str, marked: list[Span], ends: dict[int, int]) -> Iterator[tuple[Span, int]]:
        """What stands between {% generation %} marks, without what they hold of the generation prompt, up to the last
        special token there; and the place of the message that it is."""
        for start, end in marked:
            special = [match.end() for match in self._special.finditer(text, start, end)]
            if not special:
                raise BadMessages("no end of turn", f"no special token in the generation mark {text[start:end]!r:.80}")
            inside = [turn for turn, place in ends.items() if start <= place <= end]
            if len(inside) != 1:
                found = f"the generation mark {text[start:end]!r:.80} holds {len(inside)} assistant turns"
                raise BadMessages("chat template does not round-trip", found)
            given = len(self._header_in_mark) * text.startswith(self._header_in_mark, start)
            yield (start + given, special[-1]), inside[0]

    # What must come out

    def _header(self, text: str, start: int) -> int:
        """Where the header of the turn that is trained from `start` begins, or a little after: a prompt may end in an
        open <think>, which is then part of what the content says."""
        begin = max(0, start - HEADER_CHARACTERS)
        specials = [match.end() for match in self._special.finditer(text, begin, start) if match[0] not in THINKING]
        return specials[-1] if specials else start

    def _check_tools_rendered(self, text: str, tools: Tools | None) -> None:
        missing = [name for name in map(_tool_name, tools or []) if not _holds(text, name)]
        if missing:
            raise BadMessages("tools", f"the chat template does not render the definitions of {missing!r:.80}")

    def _left_out(self, messages: Messages, text: str, trained: dict[int, str]) -> Iterator[str]:
        """Names of what the template leaves out, "" for a trained turn of which it cuts something on purpose.

        `trained` holds the text of trained turns, with their headers, by place; the others are looked for in all of
        `text`. Raises BadMessages where the last answer is cut, and for fields in which an assistant says something
        that this template never renders.
        """
        for place, message in enumerate(messages):
            where = f"message {place + 1}"
            if message["role"] != "assistant":
                if not _holds(text, message["content"]):
                    yield f"{message['role']} messages not rendered in full"
                continue
            turn = trained.get(place, text)
            whole = _holds(turn, message["content"])
            if place in trained and not whole and place == len(messages) - 1:
                found = f"{where}, the last answer, is rendered as {turn!r:.80} only. {OWN_TEMPLATE}"
                raise BadMessages("not rendered in full", found)
            for call in message.get("tool_calls", []):
                function = call.get("function", call)
                if not all(_holds(turn, part) for part in _strings_in([function["name"], function["arguments"]])):
                    raise BadMessages("tool call", f"{where}: the chat template does not render all of {call!r:.80}")
                if place in trained and None in _leaves(function["arguments"]):
                    yield "calls with null arguments"
            for name in (name for name in message if name not in ADDRESSES):
                parts = [part for part in _leaves(message[name]) if isinstance(part, str) and part.strip()]
                if all(_holds(turn, part) for part in parts) and (self._knows(name) or _by_no_chance(parts)):
                    continue
                if self._knows(name):
                    whole = False  # as templates cut the thoughts of earlier turns
                elif name in SAID:
                    found = (
                        f"{where} has {name!r}, which the chat template does not render: write it into the content "
                        "(thoughts between <think> and </think>), or leave the field out"
                    )
                    raise BadMessages("not rendered", found)
                elif place in trained:
                    yield f"fields {name!r} not rendered"
            if place in trained and not whole:
                yield ""

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
            rendering.left_out,
        )


def read_chat_template(folder: Path) -> str:
    """The default chat template of a Hugging Face folder: chat_template.jinja, else that in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise DataError(f"{path} cannot be read: {error}. Save it as UTF-8.") from error
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
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
            name: value.get("content") if isinstance(value, dict) else value for name, value in values.items() if value
        }
        if wrong := [name for name, value in found.items() if not isinstance(value, str)]:
            raise DataError(
                f"{folder / file}: {wrong[0]} is no token but {values[wrong[0]]!r:.80}. Copy the file again."
            )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds a {type(found).__name__}, not an object. Give the folder of a Hugging Face model."
        )
    return found


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


def _no_clock(folder: Path, pattern: str) -> str:
    raise DataError(
        f"the chat template of {folder} writes today's date, so that the same data would give other bytes tomorrow. "
        "Set the date with --apply-chat-template-kwargs (the template names the variable), or take it out of it."
    )


def _with_end_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """An assistant's message with `mark` after the last visible character of its content, or, where it calls tools, of
    the last one's name; others as they are."""
    if message["role"] != "assistant":
        return message
    if "tool_calls" not in message:
        content = message["content"]
        visible = len(content.rstrip())
        return {**message, "content": content[:visible] + mark + content[visible:]}
    *before, last = message["tool_calls"]
    function = last.get("function", last)
    function = {**function, "name": function["name"] + mark}
    return {**message, "tool_calls": [*before, {**last, "function": function} if "function" in last else function]}


def _holds(text: str, content: str) -> bool:
    """Whether `text` holds all of `content`, as it is or as in a string of JSON, white space aside."""
    if content.strip() in text:
        return True
    spellings = (content, json.dumps(content, ensure_ascii=False)[1:-1])
    squeezed = "".join(text.split())
    return any("".join(spelling.split()) in squeezed for spelling in spellings)


def _by_no_chance(parts: list[str]) -> bool:
    """Whether these strings, found in a text, are not there by chance, as "4" is in an answer or its header."""
    return all(len(part.strip()) >= LONG_ENOUGH for part in parts)


def _strings_in(value: Any) -> Iterator[str]:
    """Every string and whole number in a value, keys aside."""
    return (str(leaf) for leaf in _leaves(value) if isinstance(leaf, str | int) and not isinstance(leaf, bool))


def _leaves(value: Any) -> Iterator[Any]:
    """What lists and objects in a value hold, at any depth."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`value` with `function` applied to every string in it, keys too."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): _map_strings(part, function) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_strings(part, function) for part in value]
    return value
