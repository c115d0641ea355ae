"""Nulls that a table put into tools and tool calls for the keys of other rows, as `Dataset.to_json` writes them.

A property of a JSON schema is never null, so tools with such a property come out of a table. Their nulls are left out,
as those of Parquet files are, and so are nulls of arguments that the tool's schema rules out. A null that the schema
allows stays. Where no schema decides, it stays too and the row is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.types import Message

_TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array"))
_COMBINED = ("anyOf", "oneOf")


@dataclass
class Found:
    """Names of keys whose null was left out, and of those where nothing tells whether it is meant."""

    left_out: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)


def null_turns(turns: Sequence[Any]) -> list[int]:
    """Which turns, as a file holds them, have tool calls with a null argument. JSON text is no table's: not these."""
    return [
        index
        for index, turn in enumerate(turns)
        if isinstance(turn, Mapping) and turn.get("tool_calls") and any(_null_arguments(turn["tool_calls"]))
    ]


def _null_arguments(calls: Any) -> Iterator[bool]:
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield _holds_null(function.get("arguments", function.get("parameters")))


def _holds_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(map(_holds_null, value))


def comes_of_a_table(tools: Any) -> bool:
    """Whether a schema among the tools, as a file holds them, has a property that is null."""
    if isinstance(tools, Mapping):
        properties = tools.get("properties")
        if isinstance(properties, Mapping) and any(item is None for item in properties.values()):
            return True
        return any(map(comes_of_a_table, tools.values()))
    return isinstance(tools, (list, tuple)) and any(map(comes_of_a_table, tools))


def clean_tools(tools: Sequence[Mapping[str, Any]], found: Found) -> tuple[Mapping[str, Any], ...]:
    """Tools of a table without their nulls."""
    return tuple(_without(tool, "tools", found) for tool in tools)


def _without(value: Any, name: str, found: Found) -> Any:
    if isinstance(value, Mapping):
        found.left_out += [f"{name}.{key}" for key, item in value.items() if item is None]
        return {key: _without(item, key, found) for key, item in value.items() if item is not None}
    return [_without(item, name, found) for item in value] if isinstance(value, list) else value


def clean_calls(message: Message, tools: Sequence[Mapping[str, Any]], of_table: bool, found: Found) -> dict[str, Any]:
    """The `extra` of a message, the arguments of its calls without the nulls that the tools' schemas rule out."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools if "function" in tool}
    calls = []
    for call in message.extra["tool_calls"]:
        function = call["function"]
        name = function["name"]
        arguments = _arguments(function["arguments"], schemas.get(name), of_table, name, found)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message.extra, "tool_calls": calls}


def _arguments(value: Any, schema: Any, of_table: bool, name: str, found: Found) -> Any:
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_arguments(item, items, of_table, name, found) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, item in value.items():
        under = f"{name}.{key}"
        if item is not None:
            kept[key] = _arguments(item, _property(schema, key), of_table, under, found)
            continue
        allowed = allows_null(schema, key)
        if allowed is False or (allowed is None and of_table):
            found.left_out.append(under)
            continue
        kept[key] = None
        if allowed is None:
            found.unsure.append(under)
    return kept


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def allows_null(schema: Any, key: str) -> bool | None:
    """Whether an object of this JSON schema may hold null under a key; None where the schema does not say."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or not properties:
        return None
    if properties.get(key) is None:
        return None if schema.get("additionalProperties") or schema.get("patternProperties") else False
    return _takes_null(properties[key])


def _takes_null(schema: Any) -> bool | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema or isinstance(schema.get("enum"), list):
        return (None in schema["enum"]) if "const" not in schema else schema["const"] is None
    if schema.get("nullable") is True or ("default" in schema and schema["default"] is None):
        return True
    for word in _COMBINED:
        if isinstance(schema.get(word), list):
            each = [_takes_null(one) for one in schema[word]]
            return True if True in each else None if None in each else False
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "null" in kinds:
        return True
    return False if kinds and all(isinstance(kind, str) and kind in _TYPES for kind in kinds) else None
