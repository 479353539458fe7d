"""Which tokens end a response, from what a model's folder says."""

import json

import pytest

from infir2 import serving
from infir2.indexed import DataError
from infir2.stop_tokens import end_of_turn, stop_tokens

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADERS = "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
EOS = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ eos_token }}{% endfor %}"
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
)
THINKS += "{{ m.content }}<|im_end|>\n{% endfor %}"
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
TEXT_BEFORE = CHATML.replace("<|im_end|>", "\n[end]<|im_end|>")
TOKENS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<think>", "</think>")


def model_folder(folder, template, config=None, generation=None, tokenizer="tokenizer.json"):
    folder.mkdir(exist_ok=True)
    added = [{"id": 100 + number, "content": token, "special": True} for number, token in enumerate(TOKENS)]
    settings = {"eos_token": "<|end|>"} | ({"chat_template": template} if template else {})
    if tokenizer == "tokenizer.json":
        (folder / tokenizer).write_text(json.dumps({"added_tokens": added}))
    else:
        (folder / "vocab.json").write_text("{}")
        settings["added_tokens_decoder"] = {str(token["id"]): {"content": token["content"]} for token in added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "do_sample": True}))
    return folder


KINDS = [(CHATML, 102), (HEADERS, 105), (EOS, 100), (THINKS, 102), (NEEDS_SYSTEM, 102), (PARTS, 102)]
KINDS += [(TEXT_BEFORE, 102)]


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("template", "end"), KINDS)
def test_a_template_that_ends_turns_with_no_stop_token_is_refused(tmp_path, template, end, tokenizer):
    """Pins: a base whose end of text is another token than the end of a turn; engines generate past each answer."""
    folder = model_folder(tmp_path / "m", template, config=7, generation=[7, 8], tokenizer=tokenizer)
    assert end_of_turn(folder).id == end
    with pytest.raises(ValueError, match=rf"is \[7, 8\], but its chat template ends a turn with .* \({end}\)"):
        stop_tokens(folder)
    for backend in ("cpu", "gpu"):
        with pytest.raises(DataError, match="ends a turn with"):
            serving.check_model(folder, backend, 0.6)
    assert stop_tokens(model_folder(folder, template, config=7, generation=[end, 7], tokenizer=tokenizer)) == {7, end}
    for backend in ("cpu", "gpu"):
        serving.check_model(folder, backend, 0.6)


def test_transformers_reads_one_file_and_sglang_both(tmp_path):
    """Pins: `transformers serve` knows the tokens of generation_config.json alone where there is one."""
    folder = model_folder(tmp_path / "m", CHATML, config=102, generation=100)
    serving.check_model(folder, "gpu", 0.6)
    with pytest.raises(DataError, match=r"Set eos_token_id in generation_config.json to \[100, 102\]"):
        serving.check_model(folder, "cpu", 0.6)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0].content }}", "{% if %}"])
def test_a_template_that_says_nothing_of_its_end_is_no_reason_to_refuse(tmp_path, template):
    assert stop_tokens(model_folder(tmp_path / "m", template, config=[7, 8])) == {7, 8}


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "names no eos_token_id"), *((value, "expected a token's id") for value in ("<|end|>", [[7]], -1, 7.0))],
)
def test_what_is_no_id_is_refused(tmp_path, value, found):
    with pytest.raises(ValueError, match=found):
        stop_tokens(model_folder(tmp_path / "m", None, config=value))


@pytest.mark.parametrize("added", [[{"content": "<|im_end|>"}], [7], {"a": 1}])
def test_damaged_added_tokens_are_refused_by_file(tmp_path, added):
    """Pins: a traceback over a tokenizer.json that was cut or edited."""
    folder = model_folder(tmp_path / "m", CHATML, config=102)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        stop_tokens(folder)
