"""Instructions that a template would lose are refused, and `data.roles` says what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML, make_tokenizer

from sft.data.encode import Encoder, EncodeSettings
from sft.data.roles import lost_roles, with_roles
from sft.data.samples import sample_record
from sft.templating import ChatTemplate
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message, Passage

LOOP = "{% for message in messages %}"
UNLESS = LOOP + "{% if message['role'] != 'developer' %}"
NO_DEVELOPER = CHATML.replace(LOOP, UNLESS).replace("{% endfor %}", "{% endif %}{% endfor %}")
NO_SYSTEM = NO_DEVELOPER.replace("!= 'developer'", "not in ('developer', 'system')")
REFUSING = "{% if messages[0]['role'] == 'developer' %}{{ raise_exception('No developer here') }}{% endif %}" + CHATML


def chat(role: str = "developer") -> Conversation:
    return Conversation(
        (Message(role, "Hello"), Message("user", "one"), Message("assistant", "two")), "a:1", context=2,  # type: ignore[arg-type]
    )  # fmt: skip


def bundle(folder: Path, template: str) -> TokenizerBundle:
    return load_tokenizer(str(make_tokenizer(folder / "words", template)))


def test_which_roles_a_template_loses() -> None:
    assert lost_roles(ChatTemplate(CHATML, CHATML)) == set()
    assert lost_roles(ChatTemplate(NO_DEVELOPER, NO_DEVELOPER)) == {"developer"}
    assert lost_roles(ChatTemplate(NO_SYSTEM, NO_SYSTEM)) == {"developer", "system"}
    assert lost_roles(ChatTemplate(REFUSING, REFUSING)) == set(), "it says so itself"


def test_a_lost_instruction_refuses_the_row_and_names_the_keys(tmp_path: Path) -> None:
    loses = bundle(tmp_path, NO_DEVELOPER)
    (note,) = Encoder(loses, EncodeSettings()).encode(chat()).notes
    assert (note.action, note.reason) == ("refused", "message_left_out")
    assert note.detail == (
        "message 0: the template prints no developer message, so 'Hello' would be lost. To give it as a system "
        "message, set data.roles: {developer: system}. To leave such messages out, as it does, set data.roles: "
        "{developer: null}."
    )
    for roles, prompt in (({"developer": "system"}, "systemHellouserone"), ({"developer": None}, "userone")):
        encoder = Encoder(loses, EncodeSettings(roles=roles))
        (example,) = encoder.encode(chat()).examples
        text = loses.tokenizer.decode(example.input_ids_T[example.weights_T == 0])
        for mark in ("<|im_start|>", "<|im_end|>", "\n", " "):
            text = text.replace(mark, "")
        assert text == f"{prompt}assistant"
        record = sample_record(chat(), example.input_ids_T, encoder)
        assert record is not None, "a sample is asked as the rows are served"
        assert [m["role"] for m in record["messages"]] == [r or "" for r in roles.values() if r] + ["user"]


def test_where_system_messages_are_lost_as_well_there_is_no_renaming(tmp_path: Path) -> None:
    (note,) = Encoder(bundle(tmp_path, NO_SYSTEM), EncodeSettings()).encode(chat("system")).notes
    assert note.detail.endswith(
        "would be lost. To leave such messages out, as it does, set data.roles: {system: null}."
    )
    (note,) = Encoder(bundle(tmp_path, NO_SYSTEM), EncodeSettings()).encode(chat()).notes
    assert "{developer: system}" not in note.detail


def test_a_template_that_objects_to_developers_is_given_system_messages(tmp_path: Path) -> None:
    refusing = bundle(tmp_path, REFUSING)
    (note,) = Encoder(refusing, EncodeSettings()).encode(chat()).notes
    assert note.reason == "template"
    assert note.detail.endswith("As system messages it takes them: set data.roles: {developer: system}.")
    assert Encoder(refusing, EncodeSettings(roles={"developer": "system"})).encode(chat()).examples


@pytest.mark.parametrize("blank", ["", " \n"])
def test_control_an_empty_instruction_is_no_loss(tmp_path: Path, blank: str) -> None:
    folder = bpe_tokenizer(tmp_path / "bpe", NO_DEVELOPER, None, "<|im_end|>", ())
    sample = Conversation((Message("developer", blank), Message("user", "a"), Message("assistant", "b")), "a:1")
    assert Encoder(load_tokenizer(str(folder)), EncodeSettings()).encode(sample).examples


def test_context_is_counted_anew_where_messages_are_left_out() -> None:
    kept = with_roles(chat(), {"developer": None})
    assert isinstance(kept, Conversation)
    assert (len(kept.messages), kept.context) == (2, 1)
    passage = Passage("a", "b", "a:1")
    assert with_roles(passage, {"developer": None}) is passage
