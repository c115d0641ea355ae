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

from sft.data.elements import call_text, object_of, unzipped
from sft.data.jsontext import cut, name_of, parse
from sft.data.proof import REASONING_FIELDS
from sft.data.rowkeys import (
    FLAGS,
    ONLY_TEXT,
    OWN_FLAGS,
    Notes,
    as_weight,
    flag_refused,
    is_bookkeeping,
    path_of,
    read_as_note,
    refuse_masks,
    refuse_media,
    turn_keys,
    unread_note,
    yes_or_no,
)
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
_INSTEAD_OF_CONTENT = ("tool_calls", *REASONING_FIELDS)
_OF_A_CALL = frozenset(("name", "arguments", "parameters"))
ROW_ARGUMENTS = "chat_template_kwargs"
"""The column with a row's own arguments for the template, as TRL reads it."""


def fail(source: str, where: str, value: object, problem: str, cure: str) -> DataError:
    """`a.jsonl:17: messages[2].role = "usr": unknown role. Did you mean 'user'?`; a text stands in quotes: "0.5"
    is not 0.5."""
    quote = '"' if isinstance(value, str) else ""
    shown = "" if value is None else f" = {quote}{cut(value)}{quote}"
    return DataError(f"{source}: {where}{shown}: {problem}. {cure}")


def as_list(source: str, where: str, value: Any, *, empty: bool = False) -> list[Any]:
    """A list, or its JSON text (as CSV and some Parquet files hold it), or an object of lists (old Parquet files)."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = parse(value)
        except ValueError as error:
            raise fail(source, where, None, str(error), "Repair the JSON text in this field") from None
    value = list(value) if isinstance(value, tuple) else unzipped(value)
    if not isinstance(value, list):
        raise fail(source, where, value, f"is {name_of(value)}, expected a list", "Map the right column with columns")
    if not value and not empty:
        raise fail(source, where, value, "is an empty list", "Fill it, or remove the row")
    return value


def opened(source: str, where: str, value: Any) -> Any:
    """The object whose JSON text a value is; anything else as it is."""
    try:
        return object_of(value)
    except ValueError as error:
        raise fail(source, where, None, str(error), "Repair the JSON text in this field") from None


def text_of(source: str, where: str, value: Any) -> str:
    """Text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        problem = "is null" if value is None else f"is {name_of(value)}, expected text"
        raise fail(source, where, value, problem, "Write text in quotes, or remove the row")
    if not value.isascii():
        _check_utf8(source, where, value)
    return value


def content_of(source: str, where: str, value: Any, notes: Notes) -> str:
    """The text of a message; a list of `{"type": "text", "text": …}` is joined. Other keys of a part are noted."""
    if isinstance(value, list):
        value = "".join(_part(source, f"{where}[{i}]", part, notes) for i, part in enumerate(value))
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


def _part(source: str, where: str, part: Any, notes: Notes) -> str:
    part = opened(source, where, part)
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise fail(source, where, part, "expected {type: text, text: …}", ONLY_TEXT)
    if len(part) > 1 + ("type" in part):
        beside = {key: value for key, value in part.items() if key not in ("type", "text") and value is not None}
        refuse_masks(source, f"{where}.", beside, tuple(key for key in beside if key in FLAGS))
        _note_beside(source, where, beside, notes)
    return cast(str, part["text"])


def _note_beside(source: str, where: str, beside: Mapping[str, Any], notes: Notes) -> None:
    """Notes values that stand beside what is read."""
    for key, value in beside.items():
        path = f"{path_of(where)}.{key}"
        if value is not None and not is_bookkeeping(path, value):
            notes.setdefault(path, unread_note(source, path, value))


def to_message(source: str, where: str, turn: Any, notes: Notes) -> Message:
    """One message of OpenAI's chat format, of ShareGPT's, or of both mixed. What its keys need told goes to `notes`."""
    turn = opened(source, where, turn) if isinstance(turn, str) else turn
    if not isinstance(turn, Mapping):
        raise fail(source, where, turn, f"is {name_of(turn)}", "Expected an object {role, content}")
    keys = turn_keys(tuple(turn))
    if keys.shared:
        turn = _in_our_spelling(source, where, turn)
        keys = turn_keys(tuple(turn))  # the thoughts of a call are a key more
    role = turn.get("role")
    if role not in ROLES:
        raise _unknown_role(source, where, role, turn)
    extra = _calls_of(source, where, turn, notes) if keys.calls or keys.shared else {}
    for key in keys.extra:
        if turn[key] is not None:
            extra[key] = _plain(source, f"{where}.{key}", turn[key])
    content = turn.get("content")
    if content is None and any(extra.get(key) for key in _INSTEAD_OF_CONTENT):
        content = ""
    elif role == "tool" and isinstance(content, Mapping):
        content = json.dumps(_plain(source, f"{where}.content", content), ensure_ascii=False)
    if isinstance(content, str) and content.isascii():  # nearly always; the rest is the way of content_of
        text = content
    else:
        name = f"{where}.{'value' if keys.shared and 'value' in turn else 'content'}"
        text = content_of(source, name, content, notes)
    if not (keys.flags or keys.media or keys.masks):
        return Message(cast(Role, role), text, extra)
    refuse_media(source, f"{where}.", turn, keys.media)
    refuse_masks(source, f"{where}.", turn, keys.masks)
    train, weight = _flags(source, where, turn, keys.flags, role, notes)
    return Message(cast(Role, role), text, extra, train, weight)


def _calls_of(source: str, where: str, turn: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """`{"tool_calls": […]}` of a message, or nothing."""
    calls, older = turn.get("tool_calls"), turn.get("function_call")
    if not calls and not older:
        return {}
    if turn["role"] != "assistant":
        shown = calls or older
        raise fail(
            source, f"{where}.tool_calls", shown, f"on a {turn['role']} message", "Only the assistant calls tools"
        )
    found = _to_calls(source, f"{where}.tool_calls", calls or older, notes)
    if calls and older and _to_calls(source, f"{where}.function_call", older, {}) != found:
        raise fail(source, f"{where}.function_call", older, "differs from tool_calls beside it", "Keep one")
    return {"tool_calls": found}


def _in_our_spelling(source: str, where: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message that has `from` or `value`, with role, content and tool calls instead; with both spellings, they must
    say the same. `value` stays, for error messages."""
    speaker, role = turn.get("from"), turn.get("role")
    name, told = ("role", role) if speaker is None and role is not None else ("from", speaker)
    ours = SHAREGPT_ROLES.get(told.lower()) if isinstance(told, str) else None
    if ours is None:
        hint = did_you_mean(told.lower(), SHAREGPT_ROLES) if isinstance(told, str) else ""
        problem = "is missing" if told is None else "unknown speaker"
        raise fail(source, f"{where}.{name}", told, problem, f"Known: {', '.join(SHAREGPT_ROLES)}.{hint}")
    if role is not None and role != speaker:
        meant = SHAREGPT_ROLES.get(role.lower()) if isinstance(role, str) else None
        if meant != ours and (meant, ours) != ("assistant", "call"):
            raise fail(
                source, f"{where}.from", speaker, f"is not the role beside it, '{cut(role)}'", "Keep one of them"
            )
    value, content = turn.get("value"), turn.get("content")
    if value not in (None, "") and content not in (None, "", value):
        raise fail(source, f"{where}.value", value, "differs from content beside it", "Keep one of them")
    value = content if value is None or (value == "" and content is not None) else value
    if ours != "call":
        return {**turn, "role": ours, "content": value}
    if isinstance(value, str):
        return {**turn, "role": "assistant", **_called_in_text(source, f"{where}.value", value)}
    return {**turn, "role": "assistant", "content": None, "tool_calls": value or turn.get("tool_calls")}


def _flags(
    source: str, where: str, turn: Mapping[str, Any], keys: tuple[str, ...], role: str, notes: Notes
) -> tuple[bool | None, float]:
    """(train, weight) of a message, from our flags and those of other trainers, which must agree."""
    train: bool | None = None
    weight: float | None = None
    for key in keys:
        value, means = turn[key], FLAGS[key]
        if value is None:
            continue
        name = f"{where}.{key}"
        found = as_weight(value) if means == "weight" else yes_or_no(value)
        if found is None:
            raise flag_refused(source, name, value, means)
        if means == "untrained":
            found = not found
        if key not in OWN_FLAGS:
            if role != "assistant" and found:
                cure = f"Only assistant turns are trained: take {key} off it, or set it to {_off(means)}"
                raise fail(source, name, value, f"asks to train a {role} message", cure)
            path = path_of(name)
            ours = "weight" if means == "weight" else "train" if means == "train" else "train, turned about"
            notes.setdefault(path, read_as_note(source, path, ours, value))
        before = weight if means == "weight" else train
        if before is not None and before != found:
            raise fail(source, name, value, "contradicts another flag of the message", "Keep one of them")
        if means == "weight":
            weight = float(found)
        else:
            train = bool(found)
    return train, 1.0 if weight is None else weight


def _off(means: str) -> str:
    return {"weight": "0", "untrained": "true"}.get(means, "false")


def _unknown_role(source: str, where: str, role: Any, turn: Mapping[str, Any]) -> DataError:
    if role is None:
        cure = f"Give one of {', '.join(ROLES)}"
        return fail(source, f"{where}.role", None, f"is missing, the keys are {cut(', '.join(turn))}", cure)
    if not isinstance(role, str):
        return fail(source, f"{where}.role", role, f"is {name_of(role)}", f"Give one of {', '.join(ROLES)}")
    ours = SHAREGPT_ROLES.get(role.lower(), "")
    ours = "assistant with tool_calls" if ours == "call" else ours
    hint = f" Did you mean '{ours}'?" if ours else did_you_mean(role.lower(), ROLES)
    return fail(source, f"{where}.role", role, "unknown role", f"Known: {', '.join(ROLES)}.{hint}")


def _called_in_text(source: str, where: str, value: str) -> dict[str, Any]:
    """What the text of a function call says: calls, and thoughts and words before them, if any."""
    found = call_text(value)
    calls: list[Any] = []
    for text in found.calls:
        call = _parsed(source, where, text, "Write {name, arguments} as JSON, thoughts before it in <think>…</think>")
        calls += call if isinstance(call, list) else [call]
    reasoning = {"reasoning_content": found.reasoning} if found.reasoning else {}
    return {"content": found.content or None, "tool_calls": calls, **reasoning}


def _to_calls(source: str, where: str, calls: Any, notes: Notes) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = _parsed(source, where, calls)
    calls = unzipped(calls)
    calls = [calls] if isinstance(calls, Mapping) else as_list(source, where, calls)
    return [_to_call(source, f"{where}[{i}]", call, notes) for i, call in enumerate(calls)]


def _to_call(source: str, where: str, call: Any, notes: Notes) -> dict[str, Any]:
    call = opened(source, where, call)
    function = opened(source, f"{where}.function", call.get("function", call)) if isinstance(call, Mapping) else None
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
    within = {key: v for key, v in function.items() if key not in _OF_A_CALL}
    if call is function:  # a call without the wrapper, whose id belongs on it
        beside = {key: v for key, v in (("id", within.pop("id", None)),) if v is not None}
        within.pop("type", None)
    if function.get("arguments") is not None and function.get("parameters") not in (None, function["arguments"]):
        within["parameters"] = function["parameters"]
    if within:
        _note_beside(source, where if call is function else f"{where}.function", within, notes)
    rest = cast("dict[str, Any]", _plain(source, where, beside))
    called = {**made, "arguments": _plain(source, f"{where}.function.arguments", arguments)}
    return {"type": "function", **rest, "function": called}


def to_tools(source: str, tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tools as a list or its JSON text; each as `{"type": "function", "function": {name, description, parameters}}`."""
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        tools = _parsed(source, "tools", tools)
    tools = unzipped(tools)
    listed = [tools] if isinstance(tools, Mapping) else as_list(source, "tools", tools, empty=True)
    return tuple(_to_tool(source, f"tools[{i}]", tool) for i, tool in enumerate(listed))


def _to_tool(source: str, where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _parsed(source, where, tool)
    if not isinstance(tool, Mapping):
        raise fail(source, where, tool, f"is {name_of(tool)}", "Expected {type: function, function: {name, …}}")
    plain = cast("dict[str, Any]", _plain(source, where, tool))
    function = plain.get("function", plain)
    if isinstance(function, str):
        function = plain["function"] = _parsed(source, f"{where}.function", function)
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


def _parsed(source: str, where: str, value: str, cure: str = "Repair the JSON text in this field") -> Any:
    try:
        return _plain(source, where, parse(value))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise fail(source, where, None, str(error), cure) from None


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


def alpaca_user_text(source: str, data: Mapping[str, Any]) -> str:
    """The instruction, and where there is an input, a blank line and the input."""
    instruction = text_of(source, "instruction", data["instruction"])
    given = data.get("input")
    return instruction if given in (None, "") else f"{instruction}\n\n{text_of(source, 'input', given)}"
