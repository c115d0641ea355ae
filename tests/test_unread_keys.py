"""Every key of every row is read, known as bookkeeping, or named: by eye, as a property, and by the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import write_config

from sft.advice import columns_unread
from sft.config import Config
from sft.data.encode import Encoder
from sft.data.formats import FORMATS
from sft.data.ledger import MOST_KEYS, OTHER_KEYS
from sft.data.loader import prepare
from sft.data.outcome import Encoded, EncodeSettings, with_notes
from sft.data.readers import Row
from sft.data.rowkeys import BOOKKEEPING, FLAGS, MASKS_WITHIN, MEDIA, is_bookkeeping, path_of
from sft.data.store import Prepared
from sft.errors import DataError
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Note, Sample

HI, AHOY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
REASONING = CHATML.replace(
    "+ message['content']",
    "+ ('(' + message.reasoning_content + ')' if message.reasoning_content else '') + message['content'] "
    "+ (message.tool_calls | tojson if message.tool_calls else '')",
)
"""Prints reasoning under one name only, and calls."""


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> TokenizerBundle:
    folder = tmp_path_factory.mktemp("reasoning")
    return load_tokenizer(str(bpe_tokenizer(folder, REASONING, None, "<|im_end|>", ())))


def sample(name: str = "messages", **data: Any) -> Sample:
    return FORMATS[name](Row("a.jsonl:7", data))


def chat(*messages: dict[str, Any], **beside: Any) -> Conversation:
    made = sample("messages", messages=list(messages), **beside)
    assert isinstance(made, Conversation)
    return made


def refusal(name: str = "messages", **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        sample(name, **data)
    message = str(caught.value)
    assert message.startswith("a.jsonl:7: "), message
    assert len(message) < 400, message
    return message


def told(made: Sample | Encoded) -> list[tuple[str, str]]:
    return [(note.action, note.reason) for note in made.notes if note.action in ("unread", "read_as")]


# Flags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "train", "weight"),
    [
        ("loss", False, False, 1), ("loss", True, True, 1), ("loss", 0, False, 1), ("loss", "false", False, 1),
        ("training", False, False, 1), ("trainable", False, False, 1), ("loss_mask", 0, False, 1),
        ("step_loss_mask", 0, False, 1), ("step_loss_mask", 1.0, True, 1), ("masked", True, False, 1),
        ("masked", False, True, 1), ("loss_weight", 0.5, None, 0.5), ("weight", 0, None, 0), ("train", 0, False, 1),
        ("loss", None, None, 1),
    ],
)  # fmt: skip
def test_a_flag_of_a_turn_means_what_its_trainer_means(flag: str, value: Any, train: Any, weight: float) -> None:
    for turns in ([HI, {**AHOY, flag: value}], [HI, {"from": "gpt", "value": "Ahoy", flag: value}]):
        made = chat(*turns)
        assert (made.messages[1].train, made.messages[1].weight) == (train, weight)
        assert made.messages[1].extra == {}
        ours = {"masked": "train, turned about", "loss_weight": "weight"}.get(flag, "train")
        foreign = flag not in ("train", "weight") and value is not None
        assert told(made) == ([("read_as", f"messages[].{flag} as {ours}")] if foreign else [])


def test_the_turn_that_is_not_to_be_learned_is_not_trained(reasoning: TokenizerBundle) -> None:
    wrong = {"role": "assistant", "content": "WRONG0", "loss": False}
    made = chat(HI, wrong, HI, {"role": "assistant", "content": "Right 0."})
    (example,) = Encoder(reasoning, EncodeSettings()).encode(made).examples
    trained = reasoning.tokenizer.decode(example.input_ids_T[example.weights_T > 0])
    assert trained == "Right 0.<|im_end|>"


@pytest.mark.parametrize("flag", sorted(set(FLAGS) - {"weight", "loss_weight"}))
@pytest.mark.parametrize("value", ["no", 2, 0.5, [0, 1], {"a": 1}])
def test_what_is_no_yes_or_no_is_refused_with_what_to_write(flag: str, value: Any) -> None:
    message = refusal(messages=[HI, {**AHOY, flag: value}])
    assert f"messages[1].{flag} = " in message
    assert "Write train: true or train: false" in message


def test_flags_that_contradict_or_ask_for_others_words_are_refused() -> None:
    assert "contradicts another flag" in refusal(messages=[HI, {**AHOY, "train": True, "loss": False}])
    assert "contradicts another flag" in refusal(messages=[HI, {**AHOY, "weight": 1, "loss_weight": 0}])
    assert chat(HI, {**AHOY, "train": False, "masked": True}).messages[1].train is False
    for flag, value, off in (("loss", True, "false"), ("masked", False, "true"), ("loss_weight", 1, "0")):
        message = refusal(messages=[{**HI, flag: value}, AHOY])
        assert "asks to train a user message" in message
        assert f"set it to {off}" in message
    assert chat({**HI, "loss": False}, AHOY).messages[0].train is False


@pytest.mark.parametrize("mask", sorted(MASKS_WITHIN))
def test_masks_within_a_message_are_refused_by_name(mask: str) -> None:
    assert f"messages[1].{mask} = " in refusal(messages=[HI, {**AHOY, mask: [{"begin_offset": 0}]}])
    assert f"{mask} = " in refusal(messages=[HI, AHOY], **{mask: [0, 1]})
    assert told(chat(HI, {**AHOY, mask: None})) == []
    part = {"type": "text", "text": "Ahoy", "train": False}
    message = refusal(messages=[HI, {"role": "assistant", "content": [part]}])
    assert "messages[1].content[0].train = false: a mask within a message" in message
    assert "loss_mask = [0, 1]: a mask" in refusal("text", text="a b", loss_mask=[0, 1])


def test_flags_of_a_whole_row() -> None:
    assert [m.weight for m in chat(HI, {**AHOY, "weight": 0.5}, weight=2).messages] == [2, 1]
    assert [m.train for m in chat(HI, AHOY, HI, {**AHOY, "train": True}, loss=False).messages] == [
        None, False, None, True,
    ]  # fmt: skip
    assert [m.train for m in chat(HI, AHOY, HI, AHOY, only_last=True).messages] == [None, False, None, None]
    assert told(chat(HI, AHOY, trainable=1)) == [("read_as", "trainable as train of the whole row")]
    assert sample("text", text="a", weight="0.5").weight == 0.5  # type: ignore[union-attr]
    assert "columns: {weight: null}" in refusal("text", text="a", weight="5 kg")
    assert told(chat(HI, AHOY, mask="User")) == []
    assert "asks to train the user's turns" in refusal(messages=[HI, AHOY], mask="Assistant")


@pytest.mark.parametrize(("key", "value"), [("loss", 2.31), ("loss", 1), ("loss", 0.0), ("train", "dev"),
                                            ("masked", True), ("training", 1)])  # fmt: skip
def test_what_a_row_s_column_need_not_mean_is_reported(key: str, value: Any) -> None:
    made = chat(HI, AHOY, **{key: value})
    assert told(made) == [("unread", key)]
    assert [m.train for m in made.messages] == [None, None]


def test_the_weight_of_a_text_weighs_its_tokens(reasoning: TokenizerBundle) -> None:
    encoder = Encoder(reasoning, EncodeSettings())
    (example,) = encoder.encode(sample("text", text="Ahoy", weight=0.5)).examples
    assert set(example.weights_T.tolist()) == {0.5}
    for made in (sample("text", text="Ahoy", train=False), chat(HI, AHOY, weight=0)):
        (note,) = [n for n in encoder.encode(made).notes if n.action == "refused"]
        assert note.reason == "nothing_trained"
    whole = Encoder(reasoning, EncodeSettings(train_on="all")).encode(chat(HI, AHOY, weight=0.5))
    assert set(whole.examples[0].weights_T.tolist()) == {0.5}


# Spellings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_both_spellings_may_stand_in_one_list_and_in_one_message(name: str) -> None:
    mixed = [
        {"role": "system", "value": "Be kind"},
        {"from": "human", "content": "Hi"},
        {"role": "assistant", "from": "gpt", "content": "Ahoy", "value": "Ahoy"},
        {"role": "user", "content": "Hi"},
        {"from": "gpt", "value": "Ahoy"},
    ]
    made = sample(name, conversations=mixed)
    assert isinstance(made, Conversation)
    assert [m.as_dict() for m in made.messages] == [{"role": "system", "content": "Be kind"}, HI, AHOY, HI, AHOY]
    assert made.notes == ()
    for turn, expected in (
        (
            {"role": "user", "from": "gpt", "value": "Hi"},
            "messages[0].from = \"gpt\": is not the role beside it, 'user'",
        ),
        ({"role": "user", "content": "Hi", "value": "Ho"}, 'messages[0].value = "Ho": differs from content beside it'),
        ({"role": "usr", "value": "Hi"}, 'messages[0].role = "usr": unknown speaker'),
    ):
        assert expected in refusal(name, messages=[turn, AHOY])


def test_system_and_tools_under_their_other_names() -> None:
    tool = {"name": "f", "description": "d"}
    made = chat(HI, AHOY, system_prompt="Be kind", available_tools=[tool])
    assert made.messages[0].as_dict() == {"role": "system", "content": "Be kind"}
    assert made.tools == ({"type": "function", "function": tool},)
    assert told(made) == [("read_as", "system_prompt as system"), ("read_as", "available_tools as tools")]
    assert "system_prompt" in refusal(messages=[HI, AHOY], system="Be kind", system_prompt="Be rude")
    assert "differs from the tools" in refusal(messages=[HI, AHOY], tools=[tool], functions=[{"name": "g"}])
    assert len(chat(HI, AHOY, tools=[tool], functions=[tool]).tools) == 1
    assert told(sample("text", text="a", system_prompt="b")) == [("unread", "system_prompt")]


def test_calls_keep_their_id_and_name_what_they_lose() -> None:
    call = {"id": "c1", "name": "f", "arguments": {}, "thought": "hm"}
    made = chat(HI, {"role": "assistant", "tool_calls": [call]})
    assert made.messages[1].extra["tool_calls"][0]["id"] == "c1"
    assert told(made) == [("unread", "messages[].tool_calls[].thought")]
    nested = {"type": "function", "function": {"name": "f", "arguments": {}, "thought": "hm"}}
    assert told(chat(HI, {"role": "assistant", "tool_calls": [nested]})) == [
        ("unread", "messages[].tool_calls[].function.thought")
    ]
    other = {"name": "g", "arguments": {}}
    assert "differs from tool_calls" in refusal(messages=[HI, {**AHOY, "tool_calls": [call], "function_call": other}])


def test_reasoning_is_given_under_the_name_that_the_template_reads(reasoning: TokenizerBundle) -> None:
    encoder = Encoder(reasoning, EncodeSettings())
    for name in ("reasoning_content", "thinking", "reasoning"):
        encoded = encoder.encode(chat(HI, {**AHOY, name: "hm"}))
        ids_T = encoded.examples[0].input_ids_T
        assert "(hm)Ahoy" in reasoning.tokenizer.decode(ids_T)
        foreign = name != "reasoning_content"
        assert told(encoded) == ([("read_as", f"messages[].{name} as reasoning_content")] if foreign else [])
    both = encoder.encode(chat(HI, {**AHOY, "reasoning_content": "hm", "thinking": "so"}))
    assert ("unread", "messages[].thinking") in told(both)


# Media --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(MEDIA))
def test_rows_with_more_than_text_are_refused_and_empty_columns_are_not(key: str) -> None:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("messages", {"messages": [HI, AHOY]}),
        ("alpaca", {"instruction": "Hi", "output": "Ahoy"}),
        ("prompt_completion", {"prompt": "Hi", "completion": "Ahoy"}),
        ("text", {"text": "Hi"}),
    ]
    for name, row in rows:
        for value in ("img/0.png", ["img/0.png"], {"bytes": None, "path": "a.png"}):
            message = refusal(name, **row, **{key: value})
            assert message.startswith(f"a.jsonl:7: {key} = ")
            assert message.endswith("Only text can be trained")
        for nothing in (None, [], "", [None], {"bytes": None, "path": None}):
            assert told(sample(name, **row, **{key: nothing})) == []
    assert f"messages[0].{key} = " in refusal(messages=[{**HI, key: ["a.png"]}, AHOY])
    assert chat({**HI, key: []}, AHOY).messages[0].extra == {}


# What is reported ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "unread"),
    [
        ("text", {"text": "a", "role": "user", "parent_id": "p"}, ["role", "parent_id"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "system": "c", "tools": [{"name": "f"}]},
         ["system", "tools"]),
        ("alpaca", {"instruction": "a", "output": "b", "documents": ["d"], "kind": "qa"}, ["documents", "kind"]),
        ("messages", {"messages": [HI, AHOY], "conversations": [HI], "history": [["a", "b"]]},
         ["conversations", "history"]),
        ("messages", {"messages": [HI, AHOY], "prompt": " Hi\n", "note": "", "answer": None, "list": []}, []),
        ("messages", {"messages": [HI, AHOY], "source": "web", "metadata": {"a": "b"}, "score": 3}, []),
        ("messages", {"messages": [HI, AHOY], "source": "a long document " * 20}, ["source"]),
        ("messages", {"messages": [HI, {"role": "assistant", "content": [{"text": "Ahoy", "note": "x"}]}]},
         ["messages[].content[].note"]),
    ],
)  # fmt: skip
def test_keys_by_eye(name: str, row: dict[str, Any], unread: list[str]) -> None:
    assert told(sample(name, **row)) == [("unread", path) for path in unread]


def test_keys_of_messages_are_held_against_the_template(reasoning: TokenizerBundle, tokenizer_folder: Path) -> None:
    plain = load_tokenizer(str(tokenizer_folder))
    turn = {**AHOY, "mood": "gay", "id": "m1", "loss": True}
    for bundle in (reasoning, plain):
        encoded = Encoder(bundle, EncodeSettings()).encode(chat(HI, turn, HI, turn))
        assert told(encoded) == [("read_as", "messages[].loss as train"), ("unread", "messages[].mood")]
    assert plain.chat is not None
    for reads in (
        "{{ messages[0].mood }}",
        "{{ messages[0]['mood'] }}",
        "{% for m in messages %}{{ m|tojson }}{% endfor %}",
    ):
        chat_of = replace(plain.chat, text=reads + plain.chat.text, with_tools=reads + plain.chat.text)
        encoded = Encoder(replace(plain, chat=chat_of), EncodeSettings()).encode(chat({**HI, "mood": "gay"}, AHOY))
        assert told(encoded) == []


def test_notes_of_others_come_once_a_path_and_never_of_bookkeeping() -> None:
    examples = (object(),)
    mine = (Note("a:1", "unread", "messages[].mood", "x"),)
    theirs = tuple(Note("a:1", "unread", path, "y") for path in ("messages[].mood", "messages[].id", "tools[].strict"))
    made = with_notes(Encoded(examples, theirs), mine, EncodeSettings())  # type: ignore[arg-type]
    assert [(note.reason, note.detail) for note in made.notes] == [("messages[].mood", "x"), ("tools[].strict", "y")]
    strict = with_notes(Encoded(examples, theirs), mine, EncodeSettings(unread="error"))  # type: ignore[arg-type]
    assert strict.examples == ()
    assert [(n.action, n.reason, n.detail) for n in strict.notes] == [
        ("refused", "unread", "nothing reads messages[].mood = x, tools[].strict = y")
    ]


WORDS = ["zebra", "quartz", "violin", "mango", "cactus", "ember", "lagoon", "pixel"]
texts = st.lists(st.sampled_from(WORDS), min_size=4, max_size=7).map(" ".join)
values = st.recursive(
    texts | st.integers(2, 99) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "note", "id"]), inner, max_size=2)
    ),
    max_leaves=4,
)
names = st.sampled_from(
    ["mood", "note", "parent_id", "prompt", "system", "system_prompt", "documents", "thinking", "reasoning", "text",
     "history", "conversations", "input", "instruction", "role", "label", *sorted(BOOKKEEPING)[:6]]
)  # fmt: skip
extras = st.dictionaries(names, values, max_size=3)


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A row of any format, with keys and nested texts that nobody asked for, on every level."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    if name == "text":
        return name, {**draw(extras), "text": draw(texts)}
    if name == "prompt_completion" and draw(st.booleans()):
        return name, {**draw(extras), "prompt": draw(texts), "completion": draw(texts)}
    if name == "alpaca":
        return name, {**draw(extras), "instruction": draw(texts), "output": draw(texts)}
    function = {**draw(extras), "name": "f", "arguments": {"x": draw(texts)}}
    call = draw(st.sampled_from([function, {**draw(extras), "type": "function", "function": function}]))
    part = {**draw(extras), "type": "text", "text": draw(texts)}
    asked = {**draw(extras), "role": "user", "content": draw(st.sampled_from([part["text"], [part]]))}
    answer = {**draw(extras), "role": "assistant", "content": draw(texts)}
    if draw(st.booleans()):
        answer["tool_calls"] = [call]
    if name == "sharegpt":
        asked = {"from": "human", "value": asked.pop("content"), **{k: v for k, v in asked.items() if k != "role"}}
    if name == "prompt_completion":
        return name, {**draw(extras), "prompt": [asked], "completion": [answer]}
    return name, {**draw(extras), "messages": [asked, answer]}


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every text of a row."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, f"{where}[{i}]")


def lost(row: dict[str, Any], rendered: str, notes: tuple[Note, ...]) -> list[str]:
    """Paths of texts that are neither in the example nor named nor bookkeeping."""
    named = {note.reason.partition(" as ")[0] for note in notes if note.action in ("unread", "read_as")}
    found = []
    for where, text in leaves(row):
        paths = (path_of(where), where)  # `prompt` may be a list of messages, or a column that nobody reads
        above = [p[:end] for p in paths for end in range(1, len(p) + 1) if p[end : end + 1] in ("", ".", "[")]
        known = any(step in named or is_bookkeeping(step) for step in above)
        if text not in ("user", "assistant", "human", "text", "function", "f") and text not in rendered and not known:
            found.append(where)
    return found


@settings(max_examples=150, deadline=None)
@given(made=rows())
def test_every_text_is_in_the_example_or_named_or_bookkeeping(
    reasoning: TokenizerBundle, made: tuple[str, dict[str, Any]]
) -> None:
    name, row = made
    try:
        encoded = Encoder(reasoning, EncodeSettings()).encode(FORMATS[name](Row("a.jsonl:7", row)))
        strict = Encoder(reasoning, EncodeSettings(unread="error")).encode(FORMATS[name](Row("a.jsonl:7", row)))
    except DataError:
        return  # refused, with its line and field
    if not encoded.examples:
        return
    rendered = "\n".join(reasoning.tokenizer.decode(example.input_ids_T) for example in encoded.examples)
    assert lost(row, rendered, encoded.notes) == []
    reasons = [note.reason for note in encoded.notes]
    assert len(reasons) == len(set(reasons))
    assert bool(strict.examples) == all(note.action != "unread" for note in encoded.notes)


def test_the_property_notices_a_text_that_is_lost() -> None:
    row = {"messages": [{**HI, "mood": "gay"}, AHOY], "note": {"a": ["zebra"]}, "id": "i"}
    assert lost(row, "Hi Ahoy", ()) == ["messages[0].mood", "note.a[0]"]
    assert lost(row, "Hi Ahoy", (Note("a:1", "unread", "note"), Note("a:1", "unread", "messages[].mood"))) == []


def test_the_documents_list_what_is_bookkeeping() -> None:
    text = Path(__file__).parent.parent.joinpath("docs/DATA.md").read_text(encoding="utf-8")
    listed = text.partition("- **bookkeeping**")[2].partition("- **named**")[0]
    assert set(listed.split("`")[1::2]) == BOOKKEEPING
    table = text.partition("| theirs | read as |")[2].partition("\n\n")[0]
    assert set(FLAGS) <= set(table.split("`"))


# The whole way ------------------------------------------------------------------------------------------------------


def run(bundle: TokenizerBundle, tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> tuple[Prepared, list[str]]:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "columns": data.pop("columns", {})}
    said: list[str] = []
    config = Config(model={"name": "m"}, data={"train": source, "eval": 0, **data})  # type: ignore[arg-type]
    return prepare(config, bundle, cache_dir=tmp_path / "cache", workers=0, say=said.append), said


def many(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {**AHOY, "masked": i == 0}, HI, AHOY],
         **({"parent_id": f"p{i}"} if i >= 2 else {})}
        for i in range(count)
    ]  # fmt: skip


def test_the_report_counts_rows_and_names_the_first(reasoning: TokenizerBundle, tmp_path: Path) -> None:
    prepared, said = run(reasoning, tmp_path, many())
    file = tmp_path / "a.jsonl"
    (unread,), (read_as,) = prepared.report["unread"], prepared.report["read_as"]
    assert (unread["key"], unread["rows"], unread["share"]) == ("parent_id", 6, 0.75)
    assert (unread["source"], unread["at"], unread["example"]) == (str(file), f"{file}:3", "p2")
    assert "columns: {parent_id: null}" in unread["cure"]
    assert (read_as["key"], read_as["read_as"], read_as["rows"]) == ("messages[].masked", "train, turned about", 8)
    assert f"not read: parent_id, 6 rows (75%) of {file}, e.g. {file}:3: p2. {unread['cure']}" in said
    lines = [json.loads(line) for line in (prepared.path / "data_report.jsonl").read_text().splitlines()]
    assert {(line["action"], line["reason"], line["rows"], line["line"]) for line in lines} == {
        ("unread", "parent_id", 6, 3), ("read_as", "messages[].masked as train, turned about", 8, 1),
    }  # fmt: skip


def test_rows_whose_keys_are_data_do_not_fill_memory_or_page(reasoning: TokenizerBundle, tmp_path: Path) -> None:
    made = [{"messages": [HI, AHOY], f"key{i}": "x"} for i in range(MOST_KEYS + 50)]
    report = run(reasoning, tmp_path, made)[0].report
    assert len(report["unread"]) == MOST_KEYS + 1
    assert {entry["key"]: entry["rows"] for entry in report["unread"]}[OTHER_KEYS] == 50
    assert len(list(columns_unread(report))) == 13


def test_error_refuses_such_rows_and_null_leaves_the_column_out(reasoning: TokenizerBundle, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(reasoning, tmp_path, many(), unread="error")
    message = str(caught.value)
    assert message.startswith("6 bad rows of 8:")
    assert "a.jsonl:3-8 (6 rows), the first: nothing reads parent_id = p2" in message
    assert "set data.unread: report" in message
    prepared, _ = run(reasoning, tmp_path, many(), unread="error", columns={"parent_id": None})
    assert prepared.report["kept"] == 8
    assert prepared.report["unread"] == []
    with pytest.raises(DataError, match=r"no column 'parent'.*Did you mean 'parent_id'"):
        run(reasoning, tmp_path, many(), columns={"parent": None})
    skipped, _ = run(reasoning, tmp_path, many(), unread="error", on_bad_row="skip", max_dropped=1.0)
    assert skipped.report["dropped"] == {"unread": 6}


def test_the_commands_name_them(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check, its JSON, prepare, preview and train, as one types them."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    with (tmp_path / "rows.jsonl").open("w") as stream:
        for i in range(12):
            answer = {"role": "assistant", "content": "one two", "loss": i > 0}
            row = {"messages": [{"role": "user", "content": f"Hello {i}"}, answer, HI, AHOY], "parent_id": "seven"}
            stream.write(json.dumps(row) + "\n")
    config = str(write_config(tmp_path, model_folder, train__max_steps=1, eval__samples=0))

    def sft(*arguments: str) -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-m", "sft", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout, done.stderr

    named = f"parent_id, 12 rows (100%) of {tmp_path}/rows.jsonl, e.g. {tmp_path}/rows.jsonl:1: seven"
    picture = json.loads(sft("check", config, "--json")[0])
    assert [entry["key"] for entry in picture["unread"]] == ["parent_id"]
    assert [(entry["key"], entry["read_as"]) for entry in picture["read_as"]] == [("messages[].loss", "train")]
    shown = sft("check", config)[0]
    assert "columns not read:" in shown
    assert named in shown
    assert "No problems" in shown
    assert f"not read: {named}" in sft("prepare", config)[0]
    assert "not read: parent_id, e.g." in sft("preview", config)[1]
    trained = "".join(sft("train", config))
    assert trained.count(f"not read: {named}") == 1
    report = json.loads((tmp_path / "run/data.json").read_text())
    assert [entry["key"] for entry in report["unread"]] == ["parent_id"]
    page = (tmp_path / "run/report.html").read_text()
    assert "Columns not read" in page
    assert "parent_id" in page
