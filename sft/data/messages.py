"""The parts of a conversation, checked and brought to the form that chat templates expect.

Tool calls become `{"type": "function", "function": {"name", "arguments": object}}`, content becomes text, and whatever
a template may read is JSON: no NaN, no lone surrogates, no bytes, no bottomless nesting.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any, cast

from sft.data.jsontext import cut, name_of, parse
from sft.errors import DataError, did_you_mean
from sft.templating import RESERVED
from sft.types import Message, Role

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES: dict[str, str] = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "claude": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""Their role → ours; `call`: an assistant message whose value is a function call as JSON text."""
MAX_DEPTH = 64
"""Of tools and tool calls; templates print them with recursion."""
ROW_ARGUMENTS = "chat_template_kwargs"
"""The column with a row's own arguments for the template, as TRL reads it."""
_OWN = frozenset(("role", "content", "train", "weight", "tool_calls", "function_call", "from", "value"))


def fail(source: str, where: str, value: object, problem: str, cure: str) -> DataError:
    """`a.jsonl:17: messages[2].role = "usr": unknown role. Did you mean 'user'?`; a text stands in quotes: "0.5"
    is not 0.5."""
    quote = '"' if isinstance(value, str) else ""
    shown = "" if value is None else f" = {quote}{cut(value)}{quote}"
    return DataError(f"{source}: {where}{shown}: {problem}. {cure}")


def as_list(source: str, where: str, value: Any, *, empty: bool = False) -> list[Any]:
    """A list, or its JSON text (as CSV and some Parquet files hold it)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse(value)
        except ValueError as error:
            raise fail(source, where, None, str(error), "Repair the JSON text in this field") from None
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list):
        raise fail(source, where, value, f"is {name_of(value)}, expected a list", "Map the right column with columns")
    if not value and not empty:
        raise fail(source, where, value, "is an empty list", "Fill it, or remove the row")
    return value


def text_of(source: str, where: str, value: Any) -> str:
    """Text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        problem = "is null" if value is None else f"is {name_of(value)}, expected text"
        raise fail(source, where, value, problem, "Write text in quotes, or remove the row")
    if not value.isascii():
        _check_utf8(source, where, value)
    return value


def content_of(source: str, where: str, value: Any) -> str:
    """The text of a message; a list of `{"type": "text", "text": …}` is joined."""
    if isinstance(value, list):
        value = "".join(_part(source, f"{where}[{i}]", part) for i, part in enumerate(value))
    return text_of(source, where, value)


def _check_utf8(source: str, where: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(value[error.start]):04X}"
        raise fail(
            source, where, value[max(0, error.start - 20) : error.start + 20],
            f"character {error.start + 1} is a lone surrogate ({found}), not text",
            "The file is not valid UTF-8, or an emoji was cut in half: repair or remove the row",
        ) from None  # fmt: skip


def _part(source: str, where: str, part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise fail(source, where, part, "expected {type: text, text: …}", "Only text can be trained")
    return cast(str, part["text"])


def to_message(source: str, where: str, turn: Any) -> Message:
    """One message of OpenAI's chat format."""
    if not isinstance(turn, Mapping):
        raise fail(source, where, turn, f"is {name_of(turn)}", "Expected an object {role, content}")
    role = turn.get("role")
    if role not in ROLES:
        raise _unknown_role(source, where, role, turn)
    calls = turn.get("tool_calls") or turn.get("function_call")
    extra: dict[str, Any] = {}
    if calls:
        if role != "assistant":
            raise fail(source, f"{where}.tool_calls", calls, f"on a {role} message", "Only the assistant calls tools")
        extra["tool_calls"] = _to_calls(source, f"{where}.tool_calls", calls)
    if len(turn) > 2:
        for key, value in turn.items():
            if key not in _OWN and value is not None:
                extra[key] = _plain(source, f"{where}.{key}", value)
    content = turn.get("content")
    if content is None and (extra.get("tool_calls") or extra.get("reasoning_content") or extra.get("thinking")):
        content = ""
    elif role == "tool" and isinstance(content, Mapping):
        content = json.dumps(_plain(source, f"{where}.content", content), ensure_ascii=False)
    return Message(
        cast(Role, role),
        content_of(source, f"{where}.content", content),
        extra,
        _train(source, where, turn.get("train")),
        _weight(source, where, turn.get("weight")),
    )


def _unknown_role(source: str, where: str, role: Any, turn: Mapping[str, Any]) -> DataError:
    if role is None:
        cure = "Set format: sharegpt for {from, value}" if "from" in turn else f"Give one of {', '.join(ROLES)}"
        return fail(source, f"{where}.role", None, f"is missing, the keys are {cut(', '.join(turn))}", cure)
    if not isinstance(role, str):
        return fail(source, f"{where}.role", role, f"is {name_of(role)}", f"Give one of {', '.join(ROLES)}")
    ours = SHAREGPT_ROLES.get(role.lower(), "")
    ours = "assistant with tool_calls" if ours == "call" else ours
    hint = f" Did you mean '{ours}'?" if ours else did_you_mean(role.lower(), ROLES)
    return fail(source, f"{where}.role", role, "unknown role", f"Known: {', '.join(ROLES)}.{hint}")


def shared_message(source: str, where: str, turn: Any) -> Message:
    """One message of ShareGPT's format. Keys beside `from` and `value` are treated as in the chat format."""
    if not isinstance(turn, Mapping):
        raise fail(source, where, turn, f"is {name_of(turn)}", "Expected an object {from, value}")
    speaker = turn.get("from")
    role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        hint = did_you_mean(speaker.lower(), SHAREGPT_ROLES) if isinstance(speaker, str) else ""
        problem = "is missing" if speaker is None else "unknown speaker"
        raise fail(source, f"{where}.from", speaker, problem, f"Known: {', '.join(SHAREGPT_ROLES)}.{hint}")
    value = turn.get("value")
    if role == "call":
        if isinstance(value, str):
            value = _parsed(source, f"{where}.value", value)
        return to_message(source, where, {**turn, "role": "assistant", "content": None, "tool_calls": value})
    if not isinstance(value, (str, list)) and not (role == "tool" and isinstance(value, Mapping)):
        text_of(source, f"{where}.value", value)  # raises, naming their field
    return to_message(source, where, {**turn, "role": role, "content": value})


def _to_calls(source: str, where: str, calls: Any) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = _parsed(source, where, calls)
    calls = [calls] if isinstance(calls, Mapping) else as_list(source, where, calls)
    return [_to_call(source, f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _to_call(source: str, where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise fail(source, where, call, "no tool call", "Expected {type: function, function: {name, arguments}}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(source, f"{where}.function.arguments", arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        problem = f"is {name_of(arguments)}"
        raise fail(source, f"{where}.function.arguments", arguments, problem, "Expected an object, or its JSON text")
    made = {"name": text_of(source, f"{where}.function.name", function["name"])}
    beside = {} if call is function else {key: v for key, v in call.items() if key != "function" and v is not None}
    rest = cast("dict[str, Any]", _plain(source, where, beside))
    called = {**made, "arguments": _plain(source, f"{where}.function.arguments", arguments)}
    return {"type": "function", **rest, "function": called}


def to_tools(source: str, tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tools as a list or its JSON text; each as `{"type": "function", "function": {name, description, parameters}}`."""
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        tools = _parsed(source, "tools", tools)
    listed = [tools] if isinstance(tools, Mapping) else as_list(source, "tools", tools, empty=True)
    return tuple(_to_tool(source, f"tools[{i}]", tool) for i, tool in enumerate(listed))


def _to_tool(source: str, where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _parsed(source, where, tool)
    if not isinstance(tool, Mapping):
        raise fail(source, where, tool, f"is {name_of(tool)}", "Expected {type: function, function: {name, …}}")
    plain = cast("dict[str, Any]", _plain(source, where, tool))
    function = plain.get("function", plain)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise fail(source, where, tool, "has no name", "Expected {type: function, function: {name, …}}")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _parsed(source, f"{where}.function.parameters", function["parameters"])
    return plain if function is not plain else {"type": "function", "function": plain}


def row_arguments(source: str, value: Any) -> dict[str, Any]:
    """The arguments of a row, given as an object or as its JSON text. Raises DataError for names that are not the
    row's to give."""
    if isinstance(value, str):
        value = _parsed(source, ROW_ARGUMENTS, value) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise fail(
            source, ROW_ARGUMENTS, value, f"is {name_of(value)}, expected an object", "Write {enable_thinking: false}"
        )
    for name, given in value.items():
        if name in RESERVED:
            raise fail(source, f"{ROW_ARGUMENTS}.{name}", given, "is not for a row to set", RESERVED[name])
    arguments: dict[str, Any] = _plain(source, ROW_ARGUMENTS, value)
    return {name: given for name, given in arguments.items() if given is not None}


def _parsed(source: str, where: str, value: str) -> Any:
    try:
        return _plain(source, where, parse(value))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise fail(source, where, None, str(error), "Repair the JSON text in this field") from None


def _plain(source: str, where: str, value: Any, depth: int = 0) -> Any:
    """The value as plain JSON, copied; dates become ISO text. Raises on what no template can print the same twice."""
    if isinstance(value, str):
        if not value.isascii():
            _check_utf8(source, where, value)
        return value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise fail(source, where, value, "is no number that JSON can write", "Write a number or null")
    if depth >= MAX_DEPTH:
        raise fail(source, where, None, f"nested deeper than {MAX_DEPTH} levels", "Flatten it, or remove the row")
    if isinstance(value, Mapping):
        items = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise fail(source, where, value, "has a key that is no text", "Use text as keys")
            items[_plain(source, where, key)] = _plain(source, where, item, depth + 1)
        return items
    if isinstance(value, (list, tuple)):
        return [_plain(source, where, item, depth + 1) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise fail(source, where, value, f"is {name_of(value)}", "Only text, numbers, lists and objects can be rendered")


def _train(source: str, where: str, value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise fail(source, f"{where}.train", value, f"is {name_of(value)}", "Write true or false")


def _weight(source: str, where: str, value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise fail(source, f"{where}.weight", value, "is no weight", "Write a number from 0 on, e.g. 0.5")
    return float(value)


def alpaca_user_text(source: str, data: Mapping[str, Any]) -> str:
    """The instruction, and where there is an input, a blank line and the input."""
    instruction = text_of(source, "instruction", data["instruction"])
    given = data.get("input")
    return instruction if given in (None, "") else f"{instruction}\n\n{text_of(source, 'input', given)}"
