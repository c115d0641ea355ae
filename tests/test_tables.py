"""What tables do to rows: JSON as a type, foreign nulls, objects of lists. Files are written by `datasets` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config import Config
from sft.data.formats import FORMATS, detect_format
from sft.data.loader import Prepared, prepare
from sft.data.nulls import allows_null
from sft.data.readers import Row, rows_of_batches
from sft.data.sources import read_rows
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation

PROMPT_OF_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": []}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


def row(number: int, calls: list[Any]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": f"Do {number}?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    return {"messages": turns}


TEXT, FLAG = {"type": "string"}, {"type": "boolean"}
ROWS = [
    row(0, [call("weather", {"city": "Paris"})]),
    row(1, [call("clock", {"time": 1690876800, "verbose": True})]),
]
TOOLS = [[tool("weather", city=TEXT)], [tool("clock", time={"type": "integer"}, verbose=FLAG)]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples(path: str) -> list[Conversation]:
    found = []
    for each in read_rows(path):
        assert isinstance(each, Row), each
        sample = FORMATS[detect_format(each.data)](each)
        assert isinstance(sample, Conversation)
        found.append(sample)
    return found


def messages(sample: Conversation) -> list[dict[str, Any]]:
    return [message.as_dict() for message in sample.messages]


def from_lines(*rows: dict[str, Any]) -> list[Conversation]:
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return samples("a.jsonl")


EXPECTED = [
    [
        {"role": "user", "content": f"Do {number}?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    for number, calls in enumerate(
        [[call("weather", {"city": "Paris"})], [call("clock", {"time": 1690876800, "verbose": True})]]
    )
]


@pytest.mark.parametrize("form", ["inferred", "calls", "turns", "saved", "hub", "texts"])
def test_what_datasets_writes_as_json_is_read_as_objects(form: str) -> None:
    """Failed before: "is text. Expected an object {role, content}", or "no tool call"."""
    from datasets import Dataset, Features, Json, List, Value

    rows = [{**row, "tools": tools} for row, tools in zip(ROWS, TOOLS, strict=True)]
    turn = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
    features = {"calls": Features({"messages": List(turn), "tools": List(Json())}),
                "turns": Features({"messages": List(Json()), "tools": List(Json())})}  # fmt: skip
    if form in features:
        data = Dataset.from_list(rows, features=features[form])
    elif form == "texts":  # the same texts where the type has been lost, as other tools write them
        data = Dataset.from_list([{key: [json.dumps(v) for v in row[key]] for key in row} for row in rows])
    else:
        data = Dataset.from_list(rows, on_mixed_types="use_json")
    if form == "saved":
        data.save_to_disk("saved")
        found = samples("saved")
    elif form == "hub":  # how the hub's sets are read
        tables = (table for table in data.with_format("arrow").iter(1))
        read = rows_of_batches((batch for table in tables for batch in table.to_batches()), "o/d[train]")
        found = [FORMATS["messages"](each) for each in read if isinstance(each, Row)]  # type: ignore[misc]
    else:
        data.to_parquet("rows.parquet")
        found = samples("rows.parquet")
    assert [messages(sample) for sample in found] == EXPECTED
    assert [list(sample.tools) for sample in found] == TOOLS


def test_text_in_a_column_of_json_stands_there_in_quotes_that_are_not_its_own() -> None:
    """Before: '"a"' with its quotes was trained, in silence. A null within JSON is the user's."""
    from datasets import Dataset

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    Dataset.from_list([{"messages": turns}], on_mixed_types="use_json").to_parquet("a.parquet")
    assert [m.content for m in samples("a.parquet")[0].messages] == ["a", "b"]

    rows = [row(0, [call("f", {"x": None, "y": "1"})]), row(1, [call("f", {"x": 1, "y": [2]})])]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet("b.parquet")
    (first, _) = samples("b.parquet")
    assert messages(first)[1]["tool_calls"] == [call("f", {"x": None, "y": "1"})]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("messages", ['{"role": "user", "content": "Hi"}', '{"role": "assistant", "content": "Ahoy"}']),
        ("messages", {"role": ["user", "assistant"], "content": ["Hi", "Ahoy"]}),
        ("messages", '{"role": ["user", "assistant"], "content": ["Hi", "Ahoy"]}'),
        ("conversations", ['{"from": "human", "value": "Hi"}', '{"from": "gpt", "value": "Ahoy"}']),
        ("conversations", {"from": ["human", "gpt"], "value": ["Hi", "Ahoy"], "weight": [None, 1.0]}),
        ("messages", [{"role": "user", "content": ['{"type": "text", "text": "Hi"}']},
                      {"role": "assistant", "content": "Ahoy"}]),
    ],
)  # fmt: skip
def test_elements_as_json_text_and_objects_of_lists(key: str, value: Any) -> None:
    (found,) = from_lines({key: value})
    assert [(m.role, m.content) for m in found.messages] == [("user", "Hi"), ("assistant", "Ahoy")]


def test_prompts_calls_functions_and_history_as_json_text() -> None:
    hi, ahoy = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
    (found,) = from_lines({"prompt": [json.dumps(hi)], "completion": {"role": ["assistant"], "content": ["Ahoy"]}})
    assert messages(found) == [hi, ahoy]
    (found,) = from_lines({"instruction": "b", "output": "B", "history": ['["a", "A"]']})
    assert [m.content for m in found.messages] == ["a", "A", "b", "B"]
    texts = {"type": "function", "function": json.dumps({"name": "f", "arguments": "{}"})}
    (found,) = from_lines({**row(0, [texts]), "tools": [{"type": "function", "function": json.dumps({"name": "f"})}]})
    assert messages(found)[1]["tool_calls"] == [call("f", {})]
    assert list(found.tools) == [{"type": "function", "function": {"name": "f"}}]


def test_a_saved_sequence_of_the_old_kind_with_calls() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = {"type": ["function"], "function": [{"name": "f", "arguments": "{}"}]}
    turns = {"role": ["user", "assistant"], "content": ["Hi", ""], "tool_calls": [None, calls]}
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), "a.parquet")
    (found,) = samples("a.parquet")
    assert messages(found)[1] == {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}


# Nulls --------------------------------------------------------------------------------------------------------------


def exported(rows: list[dict[str, Any]]) -> list[Conversation]:
    from datasets import Dataset

    Dataset.from_list(rows).to_json("rows.jsonl")
    assert "null" in Path("rows.jsonl").read_text()
    return samples("rows.jsonl")


def test_foreign_nulls_of_to_json_are_left_out_and_noted() -> None:
    """Before: `"time": null, "verbose": null` were trained as arguments and printed as properties."""
    found = exported([{**row, "tools": tools} for row, tools in zip(ROWS, TOOLS, strict=True)])
    assert [messages(sample)[1]["tool_calls"] for sample in found] == [turns[1]["tool_calls"] for turns in EXPECTED]
    assert [sample.tools[0]["function"]["parameters"]["properties"] for sample in found] == [
        {"city": TEXT},
        {"time": {"type": "integer"}, "verbose": FLAG},
    ]
    for sample in found:
        (note,) = sample.notes
        assert (note.action, note.reason) == ("altered", "foreign_nulls")
    assert "weather.time, weather.verbose" in found[0].notes[0].detail


def test_a_null_that_the_row_s_own_schema_allows_stays() -> None:
    unit = {"type": ["string", "null"]}
    rows = [
        {**row(0, [call("weather", {"city": "Paris", "unit": None})]),
         "tools": [tool("weather", city=TEXT, unit=unit)]},
        {**row(1, [call("clock", {"zone": "UTC"})]), "tools": [tool("clock", zone=TEXT)]},
    ]  # fmt: skip
    Path("a.jsonl").write_text("")
    found = exported(rows)
    assert messages(found[0])[1]["tool_calls"] == [call("weather", {"city": "Paris", "unit": None})]
    assert messages(found[1])[1]["tool_calls"] == [call("clock", {"zone": "UTC"})]


def test_without_a_table_s_mark_only_what_a_schema_rules_out_goes() -> None:
    arguments = {"city": "Paris", "unit": None, "other": None, "free": None, "none": None}
    tools = [
        tool("weather", city=TEXT, unit=TEXT, free={"description": "?"}, none={"type": "string", "nullable": True})
    ]
    (found,) = from_lines({**row(0, [call("weather", arguments)]), "tools": tools})
    assert messages(found)[1]["tool_calls"] == [call("weather", {"city": "Paris", "free": None, "none": None})]
    assert {note.reason: note.detail.partition(": ")[2] for note in found.notes} == {
        "foreign_nulls": "weather.unit, weather.other",
        "nulls_kept": "weather.free",
    }


def test_nulls_in_json_text_are_their_writer_s() -> None:
    arguments = '{"city": "Paris", "unit": null}'
    (found,) = from_lines({**row(0, [call("weather", arguments)]), "tools": [tool("weather", city=TEXT, unit=TEXT)]})
    assert messages(found)[1]["tool_calls"] == [call("weather", {"city": "Paris", "unit": None})]
    assert found.notes == ()


def test_nulls_without_a_schema_stay_and_are_noted() -> None:
    (found,) = from_lines(row(0, [call("weather", {"city": "Paris", "deep": {"unit": None}})]))
    assert messages(found)[1]["tool_calls"] == [call("weather", {"city": "Paris", "deep": {"unit": None}})]
    assert [note.reason for note in found.notes] == ["nulls_kept"]


@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"type": "string"}, False),
        ({"type": ["string", "null"]}, True),
        ({"type": "null"}, True),
        ({"type": "string", "nullable": True}, True),
        ({"type": "string", "default": None}, True),
        ({"enum": ["a", None]}, True),
        ({"enum": ["a"]}, False),
        ({"const": 1}, False),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, False),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/x"}]}, None),
        ({"$ref": "#/x"}, None),
        ({}, None),
        ({"type": "str, optional"}, None),
        (True, None),
    ],
)
def test_what_a_schema_says_of_null(schema: Any, allowed: bool | None) -> None:
    assert allows_null({"type": "object", "properties": {"x": schema}}, "x") is allowed
    assert allows_null({"type": "object", "properties": {"x": schema}}, "y") is False
    assert allows_null({"properties": {"x": schema}, "additionalProperties": {}}, "y") is False
    assert allows_null({"properties": {"x": schema}, "additionalProperties": True}, "y") is None
    assert allows_null({"type": "object"}, "x") is None


@pytest.fixture
def bundle(tokenizer_folder: Path) -> TokenizerBundle:
    Path("calls.jinja").write_text(PROMPT_OF_CALLS)
    return load_tokenizer(str(tokenizer_folder), template="calls.jinja")


def prepared(bundle: TokenizerBundle, said: list[str]) -> Prepared:
    config = Config(model={"name": "m"}, data={"train": [{"path": "a.jsonl"}], "eval": 0})  # type: ignore[arg-type]
    return prepare(config, bundle, cache_dir=Path("cache"), workers=0, say=said.append)


def test_kept_nulls_are_counted_and_warned_of(bundle: TokenizerBundle) -> None:
    from_lines(row(0, [call("weather", {"city": None})]), row(1, [call("weather", {"city": "Paris"})]))
    said: list[str] = []
    assert prepared(bundle, said).report["altered"]["nulls_kept"] == 1
    assert any(line.startswith("in 1 rows, tool calls hold null arguments") for line in said)
