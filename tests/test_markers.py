"""A template's own `{% generation %}` markers: used where they stand, corrected where serving says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chatcases import SHAPES, bpe_tokenizer, conversation, trained_runs
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data.encode import Encoder
from sft.data.markers import Marking, marking, unmarked_stretches
from sft.data.outcome import Encoded, EncodeSettings
from sft.data.render import message_dicts
from sft.templating import MarkedText, generation_markers
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

ON, OFF = "{% generation %}", "{% endgeneration %}"


def U(text: str) -> Message:
    return Message("user", text)


def A(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


def template(assistant: str, other: str = "{{ message['content'] }}") -> str:
    """ChatML, with what stands between the header of an assistant message and the newline behind it."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}" + assistant + "{% else %}" + other + "{{ '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


CONTENT, STOP = "{{ message['content'] }}", "{{ '<|im_end|>' }}"
EXACT = template(ON + CONTENT + STOP + OFF)


def bundle_of(folder: Path, text: str) -> TokenizerBundle:
    return load_tokenizer(str(make_tokenizer(folder, text)))


def encode(bundle: TokenizerBundle, *messages: Message, **changes: Any) -> Encoded:
    return Encoder(bundle, EncodeSettings(**changes)).encode(conversation(*messages))


def trained(bundle: TokenizerBundle, encoded: Encoded) -> list[list[str]]:
    return [
        [bundle.tokenizer.decode(e.input_ids_T[a:b]) for a, b in trained_runs(e.labels_T.tolist())]
        for e in encoded.examples
    ]


def said(encoded: Encoded) -> list[tuple[str, str, str]]:
    return [(note.action, note.reason, note.detail) for note in encoded.notes]


CHAT = (U("Hello"), A("Yes . No"), U("Are you"), A("Oh six"))


@pytest.mark.parametrize(
    ("assistant", "spans", "notes"),
    [
        (ON + CONTENT + STOP + OFF, ["Yes . No<|im_end|>", "Oh six<|im_end|>"], []),
        # the stop token lies outside: trained all the same
        (
            ON + CONTENT + OFF + STOP, ["Yes . No<|im_end|>", "Oh six<|im_end|>"],
            [("markers_corrected", "message 1: the template's generation markers lack <|im_end|>, which is trained all "
              "the same")],
        ),
        # the author leaves the first word out
        (
            "{{ message['content'].split(' ')[0] + ' ' }}" + ON + "{{ message['content'].split(' ', 1)[1] }}" + STOP
            + OFF, [". No<|im_end|>", "six<|im_end|>"],
            [("left_out_by_markers", "message 1: the template's generation markers leave 'Yes ' out, and it is not "
              "trained")],
        ),
        # the author wants the last word alone
        (
            "{{ message['content'].rsplit(' ', 1)[0] + ' ' }}" + ON + "{{ message['content'].rsplit(' ', 1)[1] }}" + OFF
            + STOP, ["No<|im_end|>", "six<|im_end|>"],
            [("left_out_by_markers", "message 1: the template's generation markers leave 'Yes . ' out, and it is not "
              "trained"),
             ("markers_corrected", "message 1: the template's generation markers lack <|im_end|>, which is trained all "
              "the same")],
        ),
        # two stretches: what lies between them is left out, but for a blank
        (
            "{% set w = message['content'].split(' ') %}" + ON + "{{ w[0] }}" + OFF
            + "{{ ' ' }}{% for word in w[1:-1] %}{{ word + ' ' }}{% endfor %}" + ON + "{{ w[-1] }}" + STOP + OFF,
            ["Yes", "No<|im_end|>", "Oh six<|im_end|>"],
            [("left_out_by_markers", "message 1: the template's generation markers leave ' . ' out, and it is not "
              "trained")],
        ),
    ],
    ids=["exact", "no stop", "first word", "last word", "middle"],
)  # fmt: skip
def test_markers_by_eye(tmp_path: Path, assistant: str, spans: Any, notes: Any) -> None:
    bundle = bundle_of(tmp_path, template(assistant))
    encoded = encode(bundle, *CHAT)
    assert trained(bundle, encoded) == [spans]
    assert [(reason, detail) for _, reason, detail in said(encoded)] == notes
    assert {action for action, _, _ in said(encoded)} <= {"altered"}


def test_what_serving_supplies_is_not_trained_though_it_is_marked(tmp_path: Path) -> None:
    text = template(CONTENT + STOP + OFF).replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}",
        "{% if message['role'] == 'assistant' %}" + ON + "{{ '<|im_start|>' + message['role'] + '\\n' }}",
    ).replace("{% else %}", "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' }}")  # fmt: skip
    bundle = bundle_of(tmp_path, text)
    encoded = encode(bundle, *CHAT)
    assert trained(bundle, encoded) == [["Yes . No<|im_end|>", "Oh six<|im_end|>"]]
    assert [reason for _, reason, _ in said(encoded)] == ["markers_corrected"]
    assert "hold '<|im_start|>assistant' beside the answer" in said(encoded)[0][2]


def test_a_turn_without_a_mark_is_left_out(tmp_path: Path) -> None:
    """The author marks short answers only."""
    short = "{% if message['content'] | length < 7 %}" + ON + CONTENT + STOP + OFF + "{% else %}" + CONTENT + STOP
    bundle = bundle_of(tmp_path, template(short + "{% endif %}"))
    encoded = encode(bundle, *CHAT)
    assert trained(bundle, encoded) == [["Oh six<|im_end|>"]]
    assert said(encoded) == [
        ("altered", "left_out_by_markers", "message 1: the template's generation markers leave the turn out")
    ]
    forced = encode(bundle, U("Hello"), A("Yes . No", train=True), U("Are you"), A("Oh six"))
    assert trained(bundle, forced) == [["Yes . No<|im_end|>", "Oh six<|im_end|>"]], "the row's own word counts more"
    assert not forced.notes
    nothing = encode(bundle, U("Hello"), A("Yes . No"))
    assert [(n.action, n.reason) for n in nothing.notes] == [("refused", "nothing_trained")]
    assert "markers leave out every turn" in nothing.notes[0].detail
    whole = encode(bundle, *CHAT, train_on="all")
    assert whole.examples[0].weights_T.all(), "all means all"


def test_only_the_last_turn_marked(tmp_path: Path) -> None:
    """As transformers marks the row: what each beginning of it would be marked as doesn't count."""
    last = "{% if loop.last %}" + ON + CONTENT + STOP + OFF + "{% else %}" + CONTENT + STOP + "{% endif %}"
    bundle = bundle_of(tmp_path, template(last))
    assert trained(bundle, encode(bundle, *CHAT)) == [["Oh six<|im_end|>"]]


def test_empty_answers(tmp_path: Path) -> None:
    for number, assistant in enumerate((ON + CONTENT + STOP + OFF, ON + CONTENT + OFF + STOP)):
        bundle = bundle_of(tmp_path / str(number), template(assistant))
        assert trained(bundle, encode(bundle, U("Hello"), A(""))) == [["<|im_end|>"]]


def test_weights_and_policies_hold_within_the_marks(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, template("{{ 'Oh ' }}" + ON + CONTENT + STOP + OFF))
    (example,) = encode(bundle, U("Hello"), A("Yes", weight=0.5)).examples
    assert example.weights_T.tolist() == [0] * 9 + [0, 0, 0.5, 0.5, 0]
    assert trained(bundle, encode(bundle, *CHAT, train_on="last_assistant")) == [["Oh six<|im_end|>"]]
    cut = encode(bundle, U("Hello"), A("Yes . No"), max_tokens=12, over_long="truncate")
    assert trained(bundle, cut) == [["Yes"]]
    only_unmarked_left = encode(bundle, U("Hello"), A("Yes . No"), max_tokens=11, over_long="truncate")
    assert [(n.action, n.reason) for n in only_unmarked_left.notes] == [("dropped", "over_long")]


# -- markers in the wrong place must fire


@pytest.mark.parametrize(
    "broken",
    [
        template(CONTENT + STOP, ON + "{{ message['content'] }}" + OFF),  # the user's words
        template(ON + CONTENT + STOP + OFF, ON + "{{ message['content'] }}" + OFF),  # theirs as well
        ON + template(CONTENT + STOP) + OFF,  # everything
        template(ON + "{{ messages[0]['content'] }}" + OFF + CONTENT + STOP),
    ],
    ids=["the user's", "both", "everything", "repeated"],
)
def test_markers_around_another_s_words_refuse_the_row(tmp_path: Path, broken: str) -> None:
    bundle = bundle_of(tmp_path, broken)
    encoded = encode(bundle, U("How many helicopters ?"), A("Yes . No"), U("Hello"), A("six"))
    (note,) = encoded.notes
    assert not encoded.examples
    assert (note.action, note.reason) == ("refused", "marked_elsewhere")
    assert "message 0 (user): " in note.detail
    assert "data.template" in note.detail


def test_short_words_of_another_s_are_found_where_a_stretch_is_no_more_than_them(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, template(CONTENT + STOP, ON + "{{ message['content'] }}" + OFF))
    assert encode(bundle, U("Hello"), A("six")).notes[0].reason == "marked_elsewhere"
    echo = bundle_of(tmp_path / "2", EXACT)
    assert trained(echo, encode(echo, U("Hello"), A("Hello"))) == [["Hello<|im_end|>"]], "an echo is no fault"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (EXACT, "placed"),
        (template(CONTENT + STOP), "absent"),
        ("{% macro say(m) %}" + ON + "{{ m }}" + OFF + "{% endmacro %}" + template("{{ say(message.content) }}" + STOP),
         "unplaced"),
        (template("{% set x %}" + ON + CONTENT + OFF + "{% endset %}{{ x }}" + STOP), "unplaced"),
        (template("{% filter trim %}" + ON + CONTENT + OFF + "{% endfilter %}" + STOP), "unplaced"),
        (template(ON + ON + CONTENT + OFF + STOP + OFF), "unplaced"),
        (template("{%- generation -%}" + CONTENT + STOP + "{%- endgeneration -%}"), "placed"),
    ],
    ids=["exact", "absent", "macro", "set", "filter", "nested", "trimming"],
)  # fmt: skip
def test_markers_whose_places_cannot_be_told_are_not_used_and_that_is_said(
    tmp_path: Path, text: str, where: str
) -> None:
    assert generation_markers(text) == where
    bundle = bundle_of(tmp_path, text)
    assert any("are not used" in note for note in bundle.notes) == (where == "unplaced")
    assert trained(bundle, encode(bundle, *CHAT)) == [["Yes . No<|im_end|>", "Oh six<|im_end|>"]]


def test_transformers_misplaces_markers_in_a_macro(tmp_path: Path) -> None:
    """Why those are not used: its positions count what was written before the macro alone."""
    macro = "{% macro say(m) %}{{ 'Oh ' }}" + ON + "{{ m }}" + OFF + "{% endmacro %}"
    bundle = bundle_of(tmp_path, macro + template("{{ say(message.content) }}" + STOP))
    theirs = bundle.tokenizer.apply_chat_template(
        message_dicts(CHAT[:2]), return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, mark in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mark]
    assert bundle.tokenizer.decode(marked) != "Yes . No"


# -- arithmetic


@pytest.mark.parametrize(
    ("marks", "inside", "outside"),
    [
        (((4, 9),), ((0, 5),), ""),
        (((0, 9),), ((0, 5),), "head"),
        (((4, 12),), ((0, 5),), "end"),
        (((0, 2), (5, 7), (8, 9)), ((1, 3), (4, 5)), ""),
        (((0, 4), (9, 12)), (), ""),  # neighbours
        (((4, 4),), ((0, 0),), ""),  # an empty one at its place
    ],
)
def test_marks_around_an_answer(marks: Any, inside: Any, outside: str) -> None:
    assert marking(MarkedText("headanswrend", marks), 4, "answr") == Marking(inside, outside)
    assert marking(MarkedText("headanswrend"), 4, "answr") is None


def test_an_empty_answer_needs_its_mark_to_stand_there() -> None:
    assert marking(MarkedText("headend", ((4, 4),)), 4, "") == Marking(((0, 0),), "")
    assert marking(MarkedText("headend", ((0, 3),)), 4, "") == Marking((), "")


@pytest.mark.parametrize(
    ("inside", "left"),
    [
        (((0, 9),), []),
        (((2, 9),), [(0, 2)]),
        (((0, 3), (4, 9)), []),
        (((0, 2), (5, 7)), [(2, 5), (7, 9)]),
        ((), [(0, 9)]),
    ],
)  # fmt: skip
def test_what_is_left_out(inside: Any, left: Any) -> None:
    assert unmarked_stretches("abc efghi", inside) == left


# -- transformers' own mask


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerBundle]:
    """Byte-level BPE; markers around answers, around content alone, and around what follows the thoughts."""
    think = "{% set parts = message['content'].split('</think>') %}" \
            "{% if parts | length > 1 %}{{ parts[0] + '</think>' }}{% endif %}"  # fmt: skip
    think += ON + "{{ parts[-1] }}" + STOP + OFF
    kinds = {"exact": EXACT, "content": template(ON + CONTENT + OFF + STOP), "thoughts": template(think)}
    bundles = {}
    for name, text in kinds.items():
        folder = tmp_path_factory.mktemp(name)
        bpe_tokenizer(folder, text + "{# <think> #}", None, "<|im_end|>", ())
        bundles[name] = load_tokenizer(str(folder))
    return bundles


def held_against_transformers(bundle: TokenizerBundle, sample: Conversation, encoded: Encoded) -> None:
    """Ours is theirs and the stop tokens, where one sequence serves all turns and no character needs several tokens."""
    theirs = bundle.tokenizer.apply_chat_template(
        message_dicts(sample.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encoded.examples
    if theirs["input_ids"] != example.input_ids_T.tolist():
        return
    stops = [
        i for start, end in trained_runs(example.labels_T.tolist()) for i in range(start, end)
        if example.input_ids_T[i] in bundle.stop_ids
    ]  # fmt: skip
    expected = {i for i, mark in enumerate(theirs["assistant_masks"]) if mark} | set(stops)
    assert set(example.weights_T.nonzero()[0].tolist()) == expected


WORDS = st.lists(st.sampled_from(["Hello", " ", "\n", "thinking about", ".", "{}", "assistant", "é"]), max_size=4).map(
    "".join
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4), kind=st.sampled_from(["exact", "thoughts"])
)
def test_return_assistant_tokens_mask_agrees(
    merging: dict[str, TokenizerBundle], turns: list[tuple[str, str, str]], kind: str
) -> None:
    messages = []
    for question, thought, answer in turns:
        thoughts = f"<think>{thought}x</think>" if thought else ""
        messages += [U(question), A(thoughts + answer)]
    sample = conversation(*messages)
    encoded = Encoder(merging[kind], EncodeSettings()).encode(sample)
    if len(encoded.examples) == 1 and not any("é" in text for turn in turns for text in turn):
        held_against_transformers(merging[kind], sample, encoded)
    for example in encoded.examples:
        for start, end in trained_runs(example.labels_T.tolist()):
            text = merging[kind].tokenizer.decode(example.input_ids_T[start:end])
            assert text.endswith("<|im_end|>")
            assert kind == "exact" or "think>" not in text


@pytest.mark.parametrize("kind", ["exact", "content"])
@pytest.mark.parametrize("shape", SHAPES)
def test_markers_around_whole_answers_change_no_label(
    merging: dict[str, TokenizerBundle], tmp_path: Path, shape: str, kind: str
) -> None:
    bundle = merging[kind]
    plain = bundle.tokenizer.chat_template.replace(ON, "").replace(OFF, "")
    folder = bpe_tokenizer(tmp_path, plain, None, "<|im_end|>", ())
    without = Encoder(load_tokenizer(str(folder)), EncodeSettings()).encode(SHAPES[shape])
    encoded = Encoder(bundle, EncodeSettings()).encode(SHAPES[shape])
    assert [e.labels_T.tolist() for e in encoded.examples] == [e.labels_T.tolist() for e in without.examples]


def test_thoughts_left_out_of_emoji(merging: dict[str, TokenizerBundle]) -> None:
    """Characters of several tokens, at the border of what is left out and across it."""
    bundle = merging["thoughts"]
    encoded = encode(bundle, U("Hello"), A("<think>é🙂</think>🙂 é"))
    assert trained(bundle, encoded) == [["🙂 é<|im_end|>"]]
    assert [note.reason for note in encoded.notes] == ["left_out_by_markers"]
