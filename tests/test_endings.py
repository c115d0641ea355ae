"""Ends of turns in every spelling: the mark that a template writes behind an answer becomes one token, or is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML, make_model

from sft.configfile import load_config
from sft.data.encode import Encoder, EncodeSettings
from sft.prepare import load_bundle
from sft.setup import template_tokens
from sft.stops import MARKUP, call_end, closings, foreign_end
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

ENDS = ["<seed:eos>", "<｜end▁of▁sentence｜>", "[e~[", "<sep>", "<end_of_turn>", "[|endofturn|]", "</assistant>",
        "</s>", "<turn|>", "<SPECIAL_12>", "<end_of_utterance>"]  # fmt: skip
CHAT = Conversation(
    (Message("user", "Hello there"), Message("assistant", "Hi, and you?"), Message("user", "Fine."),
     Message("assistant", "Good to hear.")), "a:1",
)  # fmt: skip


def ending_with(end: str) -> str:
    """A template whose turns end so."""
    return (
        "{% for m in messages %}{{ '@' + m['role'] + ': ' + m['content'] + " + json.dumps(end, ensure_ascii=False)
        + " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '@assistant: ' }}{% endif %}"
    )  # fmt: skip


def in_a_file(folder: Path, template: str) -> str:
    file = folder / "theirs.jinja"
    file.write_text(template, encoding="utf-8")
    return str(file)


def trained(bundle: TokenizerBundle, sample: Conversation) -> list[list[str]]:
    """The tokens of each trained run, or of none the refusal."""
    encoded = Encoder(bundle, EncodeSettings()).encode(sample)
    assert encoded.examples, encoded.notes[0].detail
    runs: list[list[str]] = []
    for example in encoded.examples:
        ends = [i for i, w in enumerate(example.weights_T[:-1]) if w and not example.weights_T[i + 1]]
        for end in [*ends, *([len(example.weights_T) - 1] if example.weights_T[-1] else [])]:
            start = end
            while start and example.weights_T[start - 1]:
                start -= 1
            runs.append(bundle.tokenizer.convert_ids_to_tokens(example.input_ids_T[start : end + 1].tolist()))
    return runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bpe_tokenizer(tmp_path_factory.mktemp("base"), CHATML, None, "<|im_end|>", ()))


@pytest.mark.parametrize("end", ENDS)
def test_another_family_s_end_of_turn_becomes_a_token(base: str, tmp_path: Path, end: str) -> None:
    bundle = load_tokenizer(base, template=in_a_file(tmp_path, ending_with(end)))
    tokenizer = bundle.tokenizer
    index = tokenizer.convert_tokens_to_ids(end)
    assert (bundle.added_tokens, bundle.stop_ids[0], bundle.closes) == ((end,), index, True)
    assert tokenizer(end)["input_ids"] == [index]
    assert end in template_tokens(bundle), "so that its row is warm-started and an adapter trains it"
    runs = trained(bundle, CHAT)
    assert [run[-1] for run in runs] == [end, end]
    assert [tokenizer.convert_tokens_to_string(run[:-1]) for run in runs] == ["Hi, and you?", "Good to hear."]


@pytest.mark.parametrize("end", ["\\n### End", " END", "---", "== stop ==", "(end)"])
def test_control_words_behind_an_answer_are_no_token(base: str, tmp_path: Path, end: str) -> None:
    bundle = load_tokenizer(base, template=in_a_file(tmp_path, ending_with(end)))
    assert bundle.added_tokens == ()
    assert not bundle.closes


def test_control_a_template_that_ends_with_a_known_token_gets_no_other(base: str, tmp_path: Path) -> None:
    """What the next turn begins with is no end of this one, and a mark before the known token is its tail."""
    template = ending_with("<|im_end|>").replace("'@'", "'<next>'")
    bundle = load_tokenizer(base, template=in_a_file(tmp_path, template))
    assert bundle.added_tokens == ()
    assert bundle.tokenizer.convert_ids_to_tokens(bundle.stop_ids[0]) == "<|im_end|>"


def test_a_mark_of_the_model_s_own_template_is_named_with_the_key_that_adds_it(tmp_path: Path) -> None:
    """A vocabulary of the model's own is not grown unasked; the cure is one."""
    folder = make_model(tmp_path / "model")
    bpe_tokenizer(folder, ending_with("[e~["), None, "<|im_end|>", ())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model": {"name": str(folder)}, "data": {"train": str(rows)}}))
    bundle = load_bundle(load_config(config).config)
    (note,) = Encoder(bundle, EncodeSettings()).encode(CHAT).notes
    assert note.reason == "more_than_message"
    assert note.detail.endswith('To make [e~[ a token that ends turns, set model.new_tokens: ["[e~["].')
    cured = load_bundle(load_config(config, ['model.new_tokens=["[e~["]']).config)
    assert (cured.added_tokens, [run[-1] for run in trained(cured, CHAT)]) == (("[e~[",), ["[e~[", "[e~["])
    assert "added to the tokenizer (model.new_tokens): [e~[" in cured.notes


def test_new_tokens_that_are_there_already_are_not_added(base: str) -> None:
    assert load_tokenizer(base, new_tokens=["<|im_end|>", "<mine>"]).added_tokens == ("<mine>",)


CALLING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['tool_calls'] %}"
    "{{ '<|a|>' + (m['tool_calls'][0]['function'] | tojson) + 'END_OF_CALL' }}{% else %}"
    "{{ '<|' + m['role'][0] + '|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)


def called() -> Conversation:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    return Conversation(
        (Message("user", "Weather?"), Message("assistant", "", {"tool_calls": [call]}), Message("tool", "sunny"),
         Message("assistant", "Sun.")), "a:1",
    )  # fmt: skip


@pytest.mark.parametrize("end", ["<|eom_id|>", "<|call|>", "<tool_call|><|tool_response>"])
def test_a_turn_that_calls_tools_may_end_otherwise(base: str, tmp_path: Path, end: str) -> None:
    bundle = load_tokenizer(base, template=in_a_file(tmp_path, CALLING.replace("END_OF_CALL", end)))
    last = end.rpartition("><")[2]
    last = f"<{last}" if not last.startswith("<") else last
    assert [run[-1] for run in trained(bundle, called())] == [last, "<|im_end|>"]
    assert bundle.tokenizer.convert_tokens_to_ids(last) in bundle.stop_ids
    assert any(note.startswith(f"{last} ends a turn of the template that calls tools") for note in bundle.notes)


@pytest.mark.parametrize("end", ["</tool_call>", "<|im_end|>", "", "</call><|im_end|>\\n"])
def test_control_what_closes_a_call_ends_no_turn(base: str, tmp_path: Path, end: str) -> None:
    bundle = load_tokenizer(base, template=in_a_file(tmp_path, CALLING.replace("END_OF_CALL", end)))
    assert set(bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids))) == {"<|im_end|>"}


def test_where_marks_stand() -> None:
    texts = ("Q?A.<sep>\n", "Q?A.<sep>\n<u>More?")
    assert closings(texts, "A.") == ("<sep>\n", "<sep>\n")
    assert foreign_end(texts, "A.", ["<|im_end|>", " "]) == "<sep>"
    assert foreign_end(texts, "A.", ["<sep>"]) == ""
    assert foreign_end(("Q?A.", "Q?A.<u>More?"), "A.", []) == "", "the next turn's header"
    assert foreign_end(("Q?A.<end>", "Q?A.<mid>More?"), "A.", []) == "<end>"
    assert call_end('f("high")<x><|call|> \n', "high", [], ["<|im_end|>"]) == "<|call|>"
    assert call_end('f("high")<|call|><|im_end|>', "high", [], ["<|im_end|>"]) == ""
    assert call_end("no argument", "high", [], []) == ""
    matched: Any = MARKUP.match("<a b>")
    assert matched is None
