"""Each row format, by literals that can be checked by eye; and what is refused, with file, field, value and cure."""

from __future__ import annotations

import json
import math
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.config import RowField, RowFormat
from sft.data.formats import FORMATS, detect_format
from sft.data.messages import ROLES, SHAREGPT_ROLES
from sft.data.readers import ROW_FIELDS, Row
from sft.errors import DataError
from sft.types import Conversation, Message, Passage

USER, AHOY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def conversation(name: str, **data: Any) -> Conversation:
    sample = FORMATS[name](Row("a.jsonl:7", data))
    assert isinstance(sample, Conversation)
    assert sample.source == "a.jsonl:7"
    return sample


def turns(sample: Conversation) -> list[dict[str, Any]]:
    return [message.as_dict() for message in sample.messages]


def refused(name: str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        FORMATS[name](Row("a.jsonl:7", data))
    message = str(caught.value)
    assert message.startswith("a.jsonl:7: "), message
    assert len(message) < 400, message
    return message


def test_every_format_of_the_config_has_a_function() -> None:
    assert {"auto", *FORMATS} == set(get_args(RowFormat))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"messages": [USER, AHOY]}, "messages"),
        ({"conversations": [USER, AHOY]}, "messages"),
        ({"conversation": json.dumps([USER, AHOY])}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "sharegpt"),
        ({"instruction": "Add", "input": "", "output": "2"}, "alpaca"),
        ({"prompt": "1+1=", "completion": "2"}, "prompt_completion"),
        ({"prompt": "unused", "messages": [USER, AHOY]}, "messages"),
        ({"text": "abc", "id": 3}, "text"),
    ],
)
def test_the_format_is_found_by_the_keys(data: dict[str, Any], name: str) -> None:
    assert detect_format(data) == name


def test_columns_lead_to_what_formats_read() -> None:
    """Every name that a format asks a row for, and no other."""
    asked: set[str] = set()

    class Recorded(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

    chat = [USER, AHOY]
    for name, data in {
        "messages": {"conversation": chat}, "sharegpt": {"conversation": [{"from": "gpt", "value": "Hi"}]},
        "alpaca": {"instruction": "Hi", "output": "Ahoy"},
        "prompt_completion": {"prompt": [USER], "completion": [AHOY]},
        "text": {"text": "Hi", "train": True, "weight": 1},
    }.items():  # fmt: skip
        FORMATS[name](Row("a.jsonl:7", Recorded(data)))
    assert asked - {"system_prompt", "available_tools"} == set(get_args(RowField))  # those have names of ours
    assert asked > ROW_FIELDS


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ("question answer",
         "{question: instruction, answer: output} (conversations, which the model's chat template renders), or for a "
         "base model {question: prompt, answer: completion} (joined as they are, without a template)"),
        ("prompt response", "{prompt: instruction, response: output} (conversations, which the model's chat template "
         "renders), or for a base model {response: completion} (joined"),
        ("context question answer id", "{context: input, question: instruction, answer: output}"),
        ("instruction context response", "{context: input, response: output}"),
        ("dialog", "{dialog: messages}"),
        ("content", "{content: text}"),
        ("x", "{theirs: ours}"),
    ],
)  # fmt: skip
def test_no_format_lists_the_keys_and_suggests_columns(keys: str, hint: str) -> None:
    """Pairs as a conversation first: followed on a chat model, prompt and completion are glued without a template."""
    row = dict.fromkeys(keys.split(), "x")
    with pytest.raises(DataError) as caught:
        detect_format(row)
    assert f"keys {keys.replace(' ', ', ')}. " in str(caught.value)
    assert f"columns: {hint}" in str(caught.value)


@pytest.mark.parametrize(
    "keys", ["question answer", "prompt response", "context question answer", "instruction target"]
)
def test_suggested_columns_make_the_row_fit(keys: str) -> None:
    row = dict.fromkeys(keys.split(), "x")
    with pytest.raises(DataError) as caught:
        detect_format(row)
    for hint in re.findall(r"\{(\w[^{}]*)\}", str(caught.value).partition("perhaps")[2]):
        columns = dict(pair.split(": ") for pair in hint.split(", "))
        renamed = {columns.get(key, key): value for key, value in row.items()}
        FORMATS[detect_format(renamed)](Row("a.jsonl:1", renamed))


def test_messages() -> None:
    sample = conversation("messages", messages=[{"role": "system", "content": "Be kind"}, USER, AHOY])
    assert turns(sample) == [{"role": "system", "content": "Be kind"}, USER, AHOY]
    assert sample.tools == ()


def test_messages_with_tools_calls_reasoning_and_results() -> None:
    sample = conversation(
        "messages",
        messages=[
            USER,
            {"role": "assistant", "content": None, "reasoning_content": "Add.", "refusal": None,
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
            {"role": "assistant", "content": "2", "tool_calls": None},
        ],
        tools=json.dumps([TOOL]),
    )  # fmt: skip
    assert turns(sample) == [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [{**CALL, "id": "c1"}]},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    assert sample.tools == (TOOL,)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "parameters": {"a": 1}},
    ],
)
def test_tool_calls_come_out_alike(call: dict[str, Any]) -> None:
    for calls in ([call], json.dumps([call])):
        sample = conversation("messages", messages=[USER, {"role": "assistant", "tool_calls": calls}])
        assert sample.messages[1].extra["tool_calls"] == [CALL]
    if "function" not in call:
        sample = conversation("messages", messages=[USER, {"role": "assistant", "function_call": call}])
        assert sample.messages[1].extra == {"tool_calls": [CALL]}


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], TOOL, json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_come_out_alike(tools: object) -> None:
    assert conversation("messages", messages=[USER, AHOY], tools=tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools: object) -> None:
    assert conversation("messages", messages=[USER, AHOY], tools=tools).tools == ()


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "hoy"}]
    assert conversation("messages", messages=[USER, {"role": "assistant", "content": parts}]).messages[1] == Message(
        "assistant", "Ahoy"
    )
    bare = {"role": "user", "content": ["A"]}
    assert 'content[0] = "A": expected {type: text' in refused("messages", messages=[bare, AHOY])
    image = [{"type": "image_url", "image_url": "x"}]
    assert "messages[0].content[0]" in refused("messages", messages=[{"role": "user", "content": image}, AHOY])


def test_train_and_weight_of_a_message() -> None:
    sample = conversation("messages", messages=[USER, {**AHOY, "train": False}, USER, {**AHOY, "weight": 0.5}])
    assert [(m.train, m.weight) for m in sample.messages] == [(None, 1), (False, 1), (None, 1), (None, 0.5)]
    assert sample.messages[1].extra == {}
    for key, value in (("train", "no"), ("weight", -1), ("weight", True), ("weight", math.nan), ("weight", "1")):
        shown = f"messages[1].{key} = {json.dumps(value)}: is "  # "1" in quotes, which 1 is not
        assert shown in refused("messages", messages=[USER, {**AHOY, key: value}])


def test_a_system_text_beside_the_messages_comes_first_once() -> None:
    assert turns(conversation("messages", messages=[USER, AHOY], system="Be kind"))[0]["content"] == "Be kind"
    first = {"role": "system", "content": "Be kind"}
    assert len(conversation("messages", messages=[first, USER, AHOY], system="Be kind").messages) == 3
    assert "differs from the first message" in refused("messages", messages=[first, USER, AHOY], system="Be rude")


def test_empty_and_blank_content_stays_as_it_is() -> None:
    empty, blank = {"role": "user", "content": ""}, {"role": "assistant", "content": " \n"}
    sample = conversation("messages", messages=[empty, blank])
    assert [m.content for m in sample.messages] == ["", " \n"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "usr", "content": "x"}], 'messages[0].role = "usr": unknown role. Known: system, developer, user, '
         "assistant, tool. Did you mean 'user'?"),
        ([USER, {"role": "gpt", "content": "x"}], "Did you mean 'assistant'?"),
        ([USER, {"role": "Assistant", "content": "x"}], "Did you mean 'assistant'?"),
        ([{"content": "x"}], "messages[0].role: is missing, the keys are content"),
        ([USER, {"role": "assistant"}], "messages[1].content: is null"),
        ([USER, {"role": "assistant", "content": 7}], "messages[1].content = 7: is a number, expected text"),
        ([USER, {"role": "assistant", "content": math.nan}], "is NaN"),
        ([USER, {"role": "assistant", "content": "a\ud800b"}], "lone surrogate (U+D800)"),
        ([USER, "Ahoy"], 'messages[1] = "Ahoy": is text'),
        ([USER, None], "messages[1]: is null"),
        ([], "is an empty list"),
        ("Ahoy", 'messages = "Ahoy": is text, expected a list'),
        ('[{"role"', "malformed JSON"),
        ([USER], "no assistant message among user"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{**USER, "tool_calls": [CALL]}, AHOY], "on a user message"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[1].tool_calls[0]"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments: malformed JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "arguments = [1]: is a"),
        ([USER, {**AHOY, "note": {"a": math.inf}}], "messages[1].note = Infinity"),
        ([USER, {**AHOY, "note": b"x"}], "is a bytes"),
    ],
)  # fmt: skip
def test_messages_refused(messages: object, expected: str) -> None:
    assert expected in refused("messages", messages=messages)


def test_bottomless_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = {"a": deep}
    assert "nested deeper" in refused("messages", messages=[USER, AHOY], tools=[{"name": "f", "parameters": deep}])


def test_sharegpt() -> None:
    sample = conversation(
        "sharegpt",
        conversations=[
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Ahoy", "weight": 0},
        ],
        system="Be kind",
        tools=json.dumps([TOOL]),
    )
    assert turns(sample) == [
        {"role": "system", "content": "Be kind"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        AHOY,
    ]
    assert sample.tools == (TOOL,)
    assert sample.messages[-1].weight == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('<think>\nAdd.\n</think>\n\n{"name": "add", "arguments": {"a": 1}}',
         {"content": "", "reasoning_content": "Add.", "tool_calls": [CALL]}),
        ('<think>Add.</think>[{"name": "add", "arguments": {"a": 1}}]',
         {"content": "", "reasoning_content": "Add.", "tool_calls": [CALL]}),
        ('<think>\n\n</think>\n\n{"name": "add", "arguments": {"a": 1}}', {"content": "", "tool_calls": [CALL]}),
        ('<think>A.</think>\nI add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
         '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
         {"content": "I add.", "reasoning_content": "A.", "tool_calls": [CALL, CALL]}),
        ('{"name": "f", "arguments": {"a": "<think>1</think>"}}',
         {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments":
                                                                          {"a": "<think>1</think>"}}}]}),
    ],
)  # fmt: skip
def test_a_function_call_behind_thoughts(value: str, expected: dict[str, Any]) -> None:
    """As LLaMA-Factory's sets for reasoning models have it. Before: malformed JSON."""
    turns_ = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]
    sample = conversation("sharegpt", conversations=turns_)
    assert turns(sample)[1] == {"role": "assistant", **expected}


def test_thoughts_without_their_tags_are_answered_with_the_form() -> None:
    turns_ = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": 'Add. {"name": "add"}'}]
    assert "thoughts before it in <think>…</think>" in refused("sharegpt", conversations=turns_)


@pytest.mark.parametrize(
    ("conversations", "expected"),
    [
        ([{"from": "humn", "value": "x"}], 'conversations[0].from = "humn": unknown speaker'),
        ([{"value": "x"}], "conversations[0].from: is missing"),
        ([{"from": "human", "value": None}], "conversations[0].value: is null"),
        ([{"from": "human", "value": {"a": 1}}], "conversations[0].value"),
        ([{"from": "human", "value": "x"}], "no assistant message"),
        ([{"from": "human", "value": "x"}, {"from": "function_call", "value": "add()"}], "malformed JSON"),
    ],
)
def test_sharegpt_refused(conversations: object, expected: str) -> None:
    assert expected in refused("sharegpt", conversations=conversations)


def test_sharegpt_roles_lead_to_ours() -> None:
    assert set(SHAREGPT_ROLES.values()) - {"call"} == set(ROLES)


def test_alpaca() -> None:
    plain = conversation("alpaca", instruction="Greet", input="", output="Ahoy")
    assert turns(plain) == [{"role": "user", "content": "Greet"}, AHOY]
    full = conversation(
        "alpaca", instruction="Greet", input="Tom", output="Ahoy", system="Be kind", history=[["Hi", "Aye"]]
    )
    assert [(m.role, m.content) for m in full.messages] == [
        ("system", "Be kind"), ("user", "Hi"), ("assistant", "Aye"), ("user", "Greet\n\nTom"), ("assistant", "Ahoy"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"instruction": "Greet"}, "output: text is missing"),
        ({"instruction": "Greet", "output": None}, "output: text is missing"),
        ({"instruction": "Greet", "output": 3}, "output = 3: is a number"),
        ({"instruction": "Greet", "output": ["x", "y"]}, 'output = ["x", "y"]: is a list'),
        ({"instruction": "Greet", "output": "x", "history": [["a"]]}, "history[0]"),
        ({"instruction": "Greet", "output": "x", "input": {}}, "input"),
    ],
)
def test_alpaca_refused(data: dict[str, Any], expected: str) -> None:
    assert expected in refused("alpaca", **data)


def test_prompt_and_completion_as_text_are_joined_as_they_are() -> None:
    sample = FORMATS["prompt_completion"](Row("a.jsonl:7", {"prompt": " 1+1=", "completion": "2 "}))
    assert sample == Passage(" 1+1=", "2 ", "a.jsonl:7", "completion")


def test_prompt_and_completion_as_messages_train_the_completion() -> None:
    sample = conversation("prompt_completion", prompt=[USER, AHOY, USER], completion=[AHOY])
    assert (turns(sample), sample.context) == ([USER, AHOY, USER, AHOY], 3)
    assert conversation("prompt_completion", system="Be brief.", prompt=[USER], completion=[AHOY]).context == 2
    assert turns(conversation("prompt_completion", prompt=[USER], completion=AHOY)) == [USER, AHOY]


@pytest.mark.parametrize("both", [True, False])
def test_messages_as_json_text_are_messages(both: bool) -> None:
    """As CSV and many Parquet files hold them."""
    prompt, completion = json.dumps([USER, AHOY, USER]), json.dumps([AHOY], indent=1) if both else [AHOY]
    sample = conversation("prompt_completion", prompt=prompt, completion=completion)
    assert (turns(sample), sample.context) == ([USER, AHOY, USER, AHOY], 3)


@pytest.mark.parametrize(
    "text", ["[INST] Hi [/INST]", "[1, 2]", "[]", '[{"name": "role"}]', '["role"]', '[{"role": "user"}, 3]', "[", "[{"]
)
def test_text_that_begins_like_a_list_stays_text(text: str) -> None:
    for prompt, completion in ((text, "x"), ("x", text), (text, text)):
        sample = FORMATS["prompt_completion"](Row("a.jsonl:7", {"prompt": prompt, "completion": completion}))
        assert sample == Passage(prompt, completion, "a.jsonl:7", "completion")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"prompt": "x"}, "completion: is missing"),
        ({"prompt": "x", "completion": None}, "completion: is missing"),
        ({"prompt": "x", "completion": [AHOY]}, "prompt is text and completion is a list"),
        ({"prompt": json.dumps([USER]), "completion": "x"}, "prompt is a list and completion is text. Make both"),
        ({"prompt": "x", "completion": json.dumps([AHOY])}, "prompt is text and completion is a list. Make both"),
        ({"prompt": str([USER]), "completion": str([AHOY])}, "malformed JSON: "),
        ({"prompt": json.dumps([USER])[:-3], "completion": "x"}, "Write the messages as JSON (in Python: json.dumps)"),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([USER])}, "has no assistant message"),
        ({"prompt": json.dumps([{**USER, "role": "usr"}]), "completion": json.dumps([AHOY])}, "Did you mean 'user'?"),
        ({"prompt": [USER], "completion": [USER]}, "has no assistant message"),
        ({"prompt": 3, "completion": 4}, "expected a list"),
    ],
)
def test_prompt_completion_refused(data: dict[str, Any], expected: str) -> None:
    assert expected in refused("prompt_completion", **data)


def test_text() -> None:
    assert FORMATS["text"](Row("a.jsonl:7", {"text": "abc"})) == Passage("", "abc", "a.jsonl:7", "text")
    for value, expected in ((None, "is missing"), ("", "is empty"), (3, "is a number")):
        assert expected in refused("text", text=value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text", "type", "tool_calls", "function", "name",
                         "arguments", "train", "weight", "user", "assistant"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(FORMATS)),
    data=st.dictionaries(
        st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text",
                         "system", "tools", "history"]), JSON, max_size=5),
)  # fmt: skip
def test_whatever_a_row_holds_it_is_a_sample_or_a_data_error(name: str, data: dict[str, Any]) -> None:
    try:
        sample = FORMATS[name](Row("a.jsonl:7", data))
    except DataError as error:
        message = str(error)
    else:
        message = "a.jsonl:7: "
        assert isinstance(sample, (Conversation, Passage))
        if isinstance(sample, Conversation):
            json.dumps(turns(sample), allow_nan=False).encode()
    assert message.startswith("a.jsonl:7: ")
    assert message.encode()
