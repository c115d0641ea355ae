"""What a template leaves out of a row is refused, or named; what it prints in its own way is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatcases import CALL, TOOLS, answer, bpe_tokenizer, conversation, family, system, user
from conftest import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.encode import Encoder, EncodeSettings
from sft.data.evidence import Evidence, leaves
from sft.data.joined import MERGE, merge_layers
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

TEMPLATES = Path(__file__).parent / "templates"
TURN = "'<|im_start|>' + m.role + '\n' + {words} + '<|im_end|>\n'"
END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
Load = Callable[[str], TokenizerBundle]


def template(roles: str, words: str = "m.content", before: str = "") -> str:
    """ChatML that prints messages of some roles only."""
    loop = "{% for m in messages %}{% if m.role in " + roles + " %}{{ " + TURN.format(words=words) + " }}{% endif %}"
    return before + loop + "{% endfor %}" + END


NO_DEVELOPER = template("['system', 'user', 'assistant']")
NO_SYSTEM = template("['user', 'assistant']")
REASONS = NO_DEVELOPER.replace("m.content", "('<think>' + m.reasoning + '</think>' if m.reasoning else '') + m.content")
"""Of the names for reasoning the one that transformers does not fill from the others."""
DEVELOPER = Message("developer", "Answer only in French.")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, TokenizerBundle] = {}

    def bundle(text: str) -> TokenizerBundle:
        if text not in made:
            folder = tmp_path_factory.mktemp("bundle")
            made[text] = load_tokenizer(str(bpe_tokenizer(folder, text, None, "<|im_end|>", ())))
        return made[text]

    return bundle


def encoded(bundle: TokenizerBundle, sample: Conversation, **changes: Any) -> Any:
    return Encoder(bundle, EncodeSettings(**changes)).encode(sample)


def said(found: Any) -> list[tuple[str, str]]:
    return [(note.action, note.reason) for note in found.notes]


def text_of(bundle: TokenizerBundle, found: Any) -> str:
    return "\0".join(bundle.tokenizer.decode(example.input_ids_T) for example in found.examples)


# -- instructions


@pytest.mark.parametrize("front", [(DEVELOPER,), (system("Be brief."), DEVELOPER), (DEVELOPER, system("Be brief."))])
def test_a_developer_message_that_is_dropped_is_refused_and_merging_it_cures(
    load: Load, front: tuple[Message, ...]
) -> None:
    bundle, sample = load(NO_DEVELOPER), conversation(*front, user("Hello 0"), answer("Bonjour 0"))
    refused = encoded(bundle, sample)
    assert said(refused) == [("refused", "layer_left_out")]
    assert "'Answer only in French.'" in refused.notes[0].detail
    assert "`data.layers: merge_into_system`" in refused.notes[0].detail
    merged = encoded(bundle, sample, layers=MERGE)
    assert said(merged) == [("altered", "layers_merged")]
    words = "Answer only in French." if len(front) == 1 else "Be brief.\n\nAnswer only in French."
    assert f"<|im_start|>system\n{words}<|im_end|>" in text_of(bundle, merged)
    printed = encoded(load(CHATML), sample)
    assert said(printed) == [], "control: a template that prints the role"


def test_nothing_is_merged_where_there_is_one_system_message(load: Load) -> None:
    sample = conversation(system("Be brief."), user("Hello 0"), answer("Bonjour 0"))
    assert said(encoded(load(NO_DEVELOPER), sample, layers=MERGE)) == []
    assert merge_layers(sample) is sample


def test_a_cure_that_does_not_work_is_not_offered(load: Load) -> None:
    front = conversation(system("Be brief."), DEVELOPER, user("Hello 0"), answer("Bonjour 0"))
    late = conversation(user("Hello 0"), answer("Hi."), DEVELOPER, user("Hello 1"), answer("Bonjour 1"))
    for bundle, sample in ((load(NO_SYSTEM), front), (load(NO_DEVELOPER), late)):
        (note,) = encoded(bundle, sample).notes
        assert note.reason == "layer_left_out"
        assert "data.layers" not in note.detail
        assert "data.template" in note.detail


def test_a_template_that_objects_to_a_layer_is_told_the_cure_that_works(load: Load) -> None:
    raising = "{% if m.role == 'developer' %}{{ raise_exception('no such role') }}{% endif %}{% if m.role in"
    objects = NO_DEVELOPER.replace("{% if m.role in", raising)
    sample = conversation(DEVELOPER, user("Hello 0"), answer("Bonjour 0"))
    (note,) = encoded(load(objects), sample).notes
    assert note.reason == "template"
    assert "no such role" in note.detail
    assert "`data.layers: merge_into_system`" in note.detail
    assert said(encoded(load(objects), sample, layers=MERGE)) == [("altered", "layers_merged")]


def test_the_context_of_a_prompt_shrinks_with_its_layers() -> None:
    sample = replace(conversation(system("a"), DEVELOPER, user("b"), answer("c")), context=3)
    assert [m.role for m in merge_layers(sample).messages[: merge_layers(sample).context]] == ["system", "user"]


@pytest.mark.parametrize("words", ["", " \n\t"])
def test_a_layer_without_words_is_none(load: Load, words: str) -> None:
    sample = conversation(Message("developer", words), user("Hello 0"), answer("Bonjour 0"))
    assert said(encoded(load(NO_DEVELOPER), sample)) == []


@pytest.mark.parametrize("words", ["Hello", "Hello there, how are you today, friend?"])
def test_words_that_stand_elsewhere_by_chance_do_not_hide_what_is_dropped(load: Load, words: str) -> None:
    sample = conversation(Message("developer", words), user(f"{words} 0"), answer(f"{words} 1"))
    encoder = Encoder(load(NO_DEVELOPER), EncodeSettings())
    assert [said(encoder.encode(sample)) for _ in range(3)] == [[("refused", "layer_left_out")]] * 3
    assert said(encoded(load(CHATML), sample)) == []


@pytest.mark.parametrize(
    "words", ["m.content|trim", "m.content|upper", "m.content|replace('French', 'Frisian')",
              "m.content|replace(' ', '  ')", "m.content|e", "m.content|tojson", "m.content[:12]"],
)  # fmt: skip
def test_a_template_that_changes_words_leaves_none_out(load: Load, words: str) -> None:
    changed = "(" + words + " if m.role == 'developer' else m.content)"
    bundle = load(template("['developer', 'user', 'assistant']", changed))
    for content in ("Answer only in French.", '  "Answer" <only>\n\nin\tFrench & well. '):
        sample = conversation(Message("developer", content), user("Hello 0"), answer("Bonjour 0"))
        assert said(encoded(bundle, sample)) == []


@pytest.mark.parametrize("name", ["mistral_merged_system", "qwen3_style", "llama3_dated", "command_r_style"])
def test_a_system_message_that_stands_elsewhere_is_there(tmp_path: Path, name: str) -> None:
    """Moved into a user's turn, or to the front; and rows that become an example a turn."""
    text = (TEMPLATES / f"{name}.jinja").read_text()
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, text, *family(name))), pinned_date="2026-01-02")
    turns = [m for i in range(3) for m in (user(f"Hello {i}"), answer(f"Hi {i}"))]
    assert said(encoded(bundle, conversation(system("Talk like a pirate."), *turns))) == []


def test_a_question_that_is_dropped_is_refused(load: Load) -> None:
    first = NO_DEVELOPER.replace("{% if m.role in", "{% if not (m.role == 'user' and loop.index0 > 1) and m.role in")
    sample = conversation(user("Hello 0"), answer("Hi."), user("And what is it now?"), answer("Well."))
    (note,) = encoded(load(first), sample).notes
    assert note.reason in ("message_left_out", "not_after_prompt")


# -- tools and results


def test_tools_and_results_that_are_dropped_are_refused(load: Load) -> None:
    asked = (user("Is get_weather right for Paris?"), answer("It is."))
    assert said(encoded(load(CHATML), conversation(*asked, tools=TOOLS))) == [("refused", "tools_left_out")]
    called = "m.content + (m.tool_calls|tojson if m.tool_calls else '')"
    bundle = load(template("['user', 'assistant']", called, "{{ tools|tojson if tools else '' }}"))
    row = (user("What is the weather?"), answer("", tool_calls=[CALL]))
    result = Message("tool", "sunny, 21 degrees", {"name": "get_weather", "tool_call_id": "call00001"})
    found = encoded(bundle, conversation(*row, result, answer("It is sunny, 21 degrees."), tools=TOOLS))
    assert said(found) == [("refused", "tool_result_left_out")]
    assert said(encoded(bundle, conversation(*asked, tools=TOOLS))) == [], "control: tools are printed"
    printing = load(template("['user', 'assistant', 'tool']", called, "{{ tools|tojson if tools else '' }}"))
    assert said(encoded(printing, conversation(*row, result, answer("It is sunny."), tools=TOOLS))) == []


def test_words_of_tools_that_are_dropped_are_named(load: Load) -> None:
    names = "{% for t in tools or [] %}{{ t.function.name + '\n' }}{% endfor %}"
    found = encoded(load(template("['user', 'assistant']", before=names)),
                    conversation(user("Hello"), answer("Hi."), tools=TOOLS))  # fmt: skip
    assert said(found) == [
        ("unread", "tools[].function.description"),
        ("unread", "tools[].function.parameters.properties.*.description"),
        ("unread", "tools[].function.parameters.required[]"),
    ]


def test_arguments_of_a_trained_call_that_are_dropped_are_refused(load: Load) -> None:
    called = "m.content + (m.tool_calls[0].function.name if m.tool_calls else '')"
    names = load(template("['user', 'assistant']", called, "{{ tools|tojson if tools else '' }}"))
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": 'São Paulo, "SP"'}}}
    found = encoded(names, conversation(user("Where?"), answer("", tool_calls=[call]), tools=TOOLS))
    assert said(found) == [("refused", "tool_calls_not_rendered")]
    whole = load(template("['user', 'assistant']", "m.content + (m.tool_calls|tojson if m.tool_calls else '')",
                          "{{ tools|tojson if tools else '' }}"))  # fmt: skip
    assert said(encoded(whole, conversation(user("Where?"), answer("", tool_calls=[call]), tools=TOOLS))) == []


# -- reasoning and other keys


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_reasoning_under_a_name_that_the_template_does_not_read(load: Load, key: str) -> None:
    sample = conversation(user("2+2?"), answer("four", **{key: "two and two"}))
    bundle = load(REASONS)
    found = encoded(bundle, sample)
    assert said(found) == [("read_as", f"messages[].{key} as reasoning")]
    (example,) = found.examples
    assert "<think>two and two</think>four" in bundle.tokenizer.decode(example.input_ids_T)
    assert said(encoded(load(REASONS), conversation(user("2+2?"), answer("four", reasoning="two and two")))) == []
    (note,) = encoded(load(CHATML), sample).notes
    assert "the reasoning in the content, as <think>" in note.detail, "tried, and works where no key is read"


def test_reasoning_of_an_earlier_answer_is_counted(load: Load) -> None:
    turns = (user("2+2?"), replace(answer("four", reasoning="two and two"), train=False), user("3+3?"), answer("six"))
    found = encoded(load(CHATML), conversation(*turns))
    assert said(found) == [("altered", "reasoning_left_out")]


def test_other_keys_of_messages_are_named_once(load: Load) -> None:
    extra = {"name": "Zebediah", "meta": {"tags": ["violet", "umber"]}, "score": 3, "id": "x1", "empty": " "}
    sample = conversation(Message("user", "Hello", extra), answer("Hi."), Message("user", "Yes", extra), answer("No."))
    found = encoded(load(CHATML), sample)
    assert said(found) == [
        ("unread", "messages[].name"), ("unread", "messages[].meta.tags[]")
    ]  # fmt: skip
    assert "Zebediah" in found.notes[0].detail
    named = load(template("['user', 'assistant']", "(m.name + ': ' if m.name else '') + m.content"))
    assert ("unread", "messages[].name") not in said(encoded(named, sample)), "control"


def test_a_row_that_is_cut_is_judged_by_all_of_it(load: Load) -> None:
    turns = [m for i in range(40) for m in (user(f"Question {i}?"), answer(f"Reply {i}."))]
    for text, expected in ((NO_DEVELOPER, ["over_long"]), (CHATML, ["over_long"])):
        found = encoded(load(text), conversation(system("Be brief."), *turns), max_tokens=64, over_long="truncate")
        assert [note.reason for note in found.notes] == expected
    found = encoded(load(NO_DEVELOPER), conversation(DEVELOPER, *turns), max_tokens=64, over_long="truncate")
    assert said(found) == [("refused", "layer_left_out")]


def test_a_row_that_is_trained_whole_is_judged_too(load: Load) -> None:
    sample = conversation(DEVELOPER, user("Hello 0"), answer("Bonjour 0"))
    assert said(encoded(load(NO_DEVELOPER), sample, train_on="all")) == [("refused", "layer_left_out")]
    assert said(encoded(load(CHATML), sample, train_on="all")) == []


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=40), st.sampled_from(("plain", "json")))
def test_whatever_the_words_they_are_found(load: Load, words: str, how: str) -> None:
    """A property: what a template prints, plainly or as JSON, is never reported."""
    printed = "m.content" if how == "plain" else "(m.content if m.role != 'tool' else m.content|tojson)"
    bundle = load(template("['user', 'assistant', 'tool', 'developer']", printed))
    sample = conversation(Message("developer", words), user(words), answer("", tool_calls=[]),
                          Message("tool", words), answer("Hi."))  # fmt: skip
    sample = replace(sample, messages=tuple(replace(m, extra={}) for m in sample.messages))
    assert not [n for n in encoded(bundle, sample).notes if n.reason.endswith("left_out") or n.action == "unread"]


def test_evidence_is_found_in_any_order_and_leaves_have_paths() -> None:
    evidence = Evidence(["one two", "three four five"])
    assert all(evidence.passes(words) for words in ("five", "three", "two", "four"))
    assert not evidence.passes("six")
    assert not evidence.holds("six seven eight nine")
    assert list(leaves({"a": [{"b": 1}], "c": {"x": {"d": "e"}}}, "k", frozenset(("c",)))) == [
        ("k.a[].b", 1), ("k.c.*.d", "e")
    ]  # fmt: skip
