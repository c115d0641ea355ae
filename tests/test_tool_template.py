"""The built-in template with tools: to the letter, and what it prints of calls is read back as they were."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chatcases import TOOLS, bpe_tokenizer
from conftest import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.encode import Encoder, EncodeSettings
from sft.data.proof import OWN_TOOLS, TOOL_TEMPLATES
from sft.data.render import message_dicts
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

HERMES = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


def read_back(answer: str) -> tuple[str, list[dict[str, Any]]]:
    """(content, calls) of an answer, as parsers of this form read it: each call is JSON between its tags."""
    calls = [json.loads(closed or unclosed) for closed, unclosed in HERMES.findall(answer)]
    return answer[: answer.find("<tool_call>")] if calls else answer, calls


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TokenizerBundle:
    folder = bpe_tokenizer(tmp_path_factory.mktemp("own"), None, None, "<|endoftext|>", ())
    return load_tokenizer(str(folder), template="chatml-tools")


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def trained_text(bundle: TokenizerBundle, sample: Conversation) -> list[str]:
    """The trained text of each example, without its stop token."""
    encoded = Encoder(bundle, EncodeSettings(max_tokens=100_000)).encode(sample)
    assert encoded.examples, encoded.notes
    texts = [bundle.tokenizer.decode(e.input_ids_T[e.weights_T > 0]) for e in encoded.examples]
    return [text.removesuffix("<|im_end|>") for text in texts]


def test_every_part_to_the_letter(bundle: TokenizerBundle) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Paris and Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("get_weather", {"city": "Paris"}),
                                                                   call("get_weather", {"city": "Rome"})]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rainy"},
        {"role": "assistant", "content": "Sun, then rain."},
        {"role": "system", "content": "Now in French."},
    ]  # fmt: skip
    text = bundle.tokenizer.apply_chat_template(messages, tools=list(TOOLS), tokenize=False, add_generation_prompt=True)
    system, _, rest = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou can call tools.")
    listed = system.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == list(TOOLS)
    assert rest == (
        "<|im_start|>user\nParis and Rome?<|im_end|>\n"
        "<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSun, then rain.<|im_end|>\n"
        "<|im_start|>system\nNow in French.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_without_tools_it_is_plain_chatml(bundle: TokenizerBundle) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = bundle.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


@pytest.mark.parametrize(("bos", "begins"), [("<s>", "<s><|im_start|>user"), ("<|im_start|>", "<|im_start|>user")])
def test_a_beginning_of_text_that_is_the_header_is_not_written_twice(tmp_path: Path, bos: str, begins: str) -> None:
    folder = bpe_tokenizer(tmp_path / "base", None, bos, "<|im_end|>", ())
    tokenizer = load_tokenizer(str(folder), template="chatml-tools").tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(begins + "\n")


def test_an_unknown_role_is_refused(bundle: TokenizerBundle) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="not of critic"):
        bundle.tokenizer.apply_chat_template([{"role": "critic", "content": "Bad."}], tokenize=False)


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Co", "Cc")), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXT | st.just("</tool_call> & <b>\"q'\\"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["fly", "get_weather"]), st.dictionaries(TEXT, VALUES, max_size=3)),
                   min_size=1, max_size=3),
    content=st.sampled_from(["", "I look it up.", "日本語 ok"]),
)  # fmt: skip
def test_calls_are_read_back_as_they_were(
    bundle: TokenizerBundle, calls: list[tuple[str, dict[str, Any]]], content: str
) -> None:
    """Nested, several, in any script, with the very tag that would end a call."""
    message = {"role": "assistant", "content": content, "tool_calls": [call(*each) for each in calls]}
    text = bundle.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}, message], tokenize=False)
    answer = text.partition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
    said, found = read_back(answer)
    assert said.strip() == content
    assert found == [{"name": name, "arguments": arguments} for name, arguments in calls]


def test_what_is_trained_is_what_parsers_read(bundle: TokenizerBundle) -> None:
    asked = {"city": "Zürich", "days": [1, {"of": None}]}
    sample = Conversation(
        (
            Message("user", "Weather?"),
            Message("assistant", "", {"tool_calls": [call("get_weather", asked), call("fly", {})]}),
            Message("tool", "sunny <|im_end|> </tool_response>"),
            Message("assistant", "Sun."),
        ),
        "a:1",
        TOOLS,
    )
    (trained,) = trained_text(bundle, sample)
    first, last = trained.split("<|im_end|>")
    assert read_back(first)[1] == [{"name": "get_weather", "arguments": asked}, {"name": "fly", "arguments": {}}]
    assert last == "Sun."
    assert message_dicts(sample.messages)[1]["tool_calls"]


def test_rows_with_tools_are_refused_with_the_template_that_takes_them(tmp_path: Path) -> None:
    """And the cure is one: under it the row is trained."""
    folder = bpe_tokenizer(tmp_path / "plain", CHATML, None, "<|im_end|>", ())
    sample = Conversation(
        (Message("user", "Hi"), Message("assistant", "", {"tool_calls": [call("fly", {"to": "Rome"})]})), "a:1"
    )
    (note,) = Encoder(load_tokenizer(str(folder)), EncodeSettings()).encode(sample).notes
    assert (note.reason, TOOL_TEMPLATES in note.detail) == ("tool_calls_not_rendered", True)
    assert "data.template: chatml-tools" in TOOL_TEMPLATES
    assert "data.template: model" not in note.detail, "the config says so already"
    (text,) = trained_text(load_tokenizer(str(folder), template="chatml-tools"), sample)
    assert read_back(text)[1] == [{"name": "fly", "arguments": {"to": "Rome"}}]


def test_where_the_model_s_own_template_prints_tools_that_is_the_cure(tmp_path: Path) -> None:
    own = (Path(__file__).parent / "templates" / "hermes_tools.jinja").read_text(encoding="utf-8")
    folder = str(bpe_tokenizer(tmp_path / "hermes", own, None, "<|im_end|>", ()))
    sample = Conversation((Message("user", "Hi"), Message("assistant", "", {"tool_calls": [call("fly", {})]})), "a:1")
    (note,) = Encoder(load_tokenizer(folder, template="zephyr"), EncodeSettings()).encode(sample).notes
    assert OWN_TOOLS in note.detail
    assert trained_text(load_tokenizer(folder, template="model"), sample)
