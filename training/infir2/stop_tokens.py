"""Which tokens end a response: for the engines of RL, for evaluation, and in what an export writes.

A model's folder names them as `eos_token_id`, in generation_config.json and config.json. A base whose text ends with
one token and that was fine-tuned with a chat template, which ends a turn with another one, must name both: an engine
that knows the first alone generates past the end of each answer, up to its limit.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from infir2.data.chat import PROBE, read_chat_template, special_tokens_map
from infir2.indexed import DataError

GENERATION = "generation_config.json"
FILES = (GENERATION, "config.json")


class Token(NamedTuple):
    """A token's text and id."""

    text: str
    id: int


def stop_tokens(folder: Path | str, files: Iterable[str] = FILES) -> set[int]:
    """Ids of the tokens that end a response, from `files` of a Hugging Face folder. ValueError where they name none, or
    not the one with which the folder's chat template ends a turn."""
    found = eos_tokens(folder, files)
    where = f"{folder} names no eos_token_id" if not found else f"eos_token_id of {folder} is {sorted(found)}"
    end = end_of_turn(folder)
    if end is not None and end.id not in found:
        raise ValueError(
            f"{where}, but its chat template ends a turn with {end.text} ({end.id}): an answer would go on past its "
            f"end. Set eos_token_id in {' and '.join(files)} to {sorted({*found, end.id})}"
        )
    if not found:
        raise ValueError(f"{where}; a response could not end. Set it in {GENERATION}")
    return found


def eos_tokens(folder: Path | str, files: Iterable[str] = FILES) -> set[int]:
    """Ids that `files` of a folder name as `eos_token_id`, without a look at the chat template."""
    found: set[int] = set()
    for name in files:
        path = Path(folder) / name
        if path.is_file():
            found |= as_ids(_read(path).get("eos_token_id"), path)
    return found


def as_ids(value: Any, where: Path | str) -> set[int]:
    """The ids in an `eos_token_id`: one, a list, or none."""
    ids = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise ValueError(f"{where} has eos_token_id {value!r}; expected a token's id, or a list of them")
    return set(ids)


def token_id(folder: Path | str, text: str) -> int | None:
    """Id of an added token of the folder's tokenizer.json; None where it has no such token."""
    return _added_tokens(Path(folder)).get(text)


def end_of_turn(folder: Path | str) -> Token | None:
    """The first added token that the folder's chat template writes after an assistant's answer. None without a
    template, and for one that cannot be rendered here or writes none."""
    folder = Path(folder)
    tokens = _added_tokens(folder)
    if not tokens:
        return None
    try:
        template, names = read_chat_template(folder), special_tokens_map(folder)
    except DataError:
        return None
    answer = PROBE[-1]["content"]
    text = next((text for text in _renderings(template, names) if answer in text), "")
    longest_first = sorted(tokens, key=len, reverse=True)
    after = re.search("|".join(map(re.escape, longest_first)), text.rpartition(answer)[2])
    return Token(after[0], tokens[after[0]]) if after else None


def _renderings(template: str, names: dict[str, str]) -> Iterator[str]:
    """What a template makes of a short conversation; of one with a system message, and of one in parts, which some
    templates ask for. What it refuses is left out."""
    from transformers.utils.chat_template_utils import render_jinja_template  # two seconds

    system = {"role": "system", "content": "System."}
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PROBE]
    for messages in (PROBE, [system, *PROBE], parts):
        try:
            yield render_jinja_template([messages], chat_template=template, **names)[0][0]
        except Exception:  # a template is a program: anything can go wrong in it
            continue


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beside the vocabulary, and their ids: from tokenizer.json, or else from tokenizer_config.json."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    path = path if path.is_file() else config
    found = _read(path) if path.is_file() else {}
    try:
        if path != config:
            return {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        return {token["content"]: int(number) for number, token in (found.get("added_tokens_decoder") or {}).items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the added tokens in {path} cannot be read ({error!r}); copy it again") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds JSON of type {type(found).__name__}; expected an object")
    return found
