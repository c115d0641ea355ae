"""Row → `Conversation` or `Passage`. A row format is one function in `FORMATS`.

    messages            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}
                        also under `conversations` or `conversation`; `tools` and `chat_template_kwargs`
                        beside it; OpenAI's chat format
    sharegpt            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]}
                        `system` and `tools` beside it
    alpaca              {"instruction": "Translate", "input": "hello", "output": "ahoy"}, `system`, `history`
    prompt_completion   {"prompt": "2+2=", "completion": "4"}: joined as they are; or two lists of messages: a
                        conversation of which the completion is trained; as JSON text, too, as CSV files hold them
    text                {"text": "all of it is trained"}

Every error is a `DataError`: `file:line`, field, value (cut) and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sft.data.jsontext import cut, name_of, parse
from sft.data.messages import (
    ROW_ARGUMENTS,
    alpaca_user_text,
    as_list,
    fail,
    row_arguments,
    shared_message,
    text_of,
    to_message,
    to_tools,
)
from sft.data.readers import Row
from sft.errors import DataError
from sft.types import Conversation, Message, Passage, Sample

LIST_KEYS = ("messages", "conversations", "conversation")
KEYS_OF_FORMATS = {
    "messages": "messages (list of {role, content})",
    "sharegpt": "conversations (list of {from, value})",
    "alpaca": "instruction, output, optionally input",
    "prompt_completion": "prompt, completion",
    "text": "text",
}
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
"""How a list of messages begins that a file holds as text, be it JSON or what Python prints."""
_HINTS = {
    "question": "prompt", "query": "prompt", "input": "prompt", "context": "input", "answer": "completion",
    "response": "completion", "output": "completion", "target": "completion", "chosen": "completion", "content": "text",
    "dialog": "messages", "dialogue": "messages", "chat": "messages", "traj": "messages", "turns": "messages",
}  # fmt: skip


def detect_format(data: Mapping[str, Any]) -> str:
    """The name of the format whose keys the row has. Raises DataError listing the keys seen and those wanted."""
    for key in LIST_KEYS:
        if data.get(key) is not None:
            return "sharegpt" if _is_shared(data[key]) else "messages"
    if data.get("prompt") is not None and "completion" in data:
        return "prompt_completion"
    if data.get("instruction") is not None and "output" in data:
        return "alpaca"
    if data.get("text") is not None:
        return "text"
    wanted = "; ".join(f"{name}: {keys}" for name, keys in KEYS_OF_FORMATS.items())
    raise DataError(
        f"no format fits a row with the keys {', '.join(map(str, data)) or '(none)'}. Formats and their keys: {wanted}."
        f"{_columns_hint(data)}"
    )


def _columns_hint(data: Mapping[str, Any]) -> str:
    """Which `columns` would make the row fit, where the keys give it away."""
    hints = dict(_HINTS, response="output", answer="output") if "instruction" in data else _HINTS
    mapping: dict[str, str] = {}
    for key in data:
        ours = hints.get(key, "")
        if ours and ours not in data and ours not in mapping.values():
            mapping[key] = ours
    if not mapping:
        return " Map its keys with columns: {theirs: ours}"
    return " Map its keys, perhaps with columns: {" + ", ".join(f"{a}: {b}" for a, b in mapping.items()) + "}"


def _is_shared(turns: Any) -> bool:
    if isinstance(turns, str):
        try:
            turns = parse(turns)
        except ValueError:
            return False
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "role" not in first and "from" in first


def messages(row: Row) -> Conversation:
    """OpenAI's chat format. A top-level `system` text goes before messages that have none."""
    key = next((key for key in LIST_KEYS if row.data.get(key) is not None), None)
    if key is None:
        raise fail(row.source, "messages", None, "a list of {role, content} is missing", _seen(row))
    turns = as_list(row.source, key, row.data[key])
    found = [to_message(row.source, f"{key}[{i}]", turn) for i, turn in enumerate(turns)]
    return _conversation(row, key, _with_system(row, found))


def sharegpt(row: Row) -> Conversation:
    """`from` and `value`; the roles of SHAREGPT_ROLES, a function call being JSON text."""
    key = next((key for key in LIST_KEYS if row.data.get(key) is not None), None)
    if key is None:
        raise fail(row.source, "conversations", None, "a list of {from, value} is missing", _seen(row))
    turns = as_list(row.source, key, row.data[key])
    found = [shared_message(row.source, f"{key}[{i}]", turn) for i, turn in enumerate(turns)]
    return _conversation(row, key, _with_system(row, found))


def alpaca(row: Row) -> Conversation:
    """instruction, a blank line and input → user; output → assistant; `history` pairs before, `system` first."""
    for key in ("instruction", "output"):
        if row.data.get(key) is None:
            raise fail(row.source, key, row.data.get(key), "text is missing", _seen(row))
    history = row.data.get("history")
    found: list[Message] = []
    for i, pair in enumerate([] if history in (None, "") else as_list(row.source, "history", history, empty=True)):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise fail(row.source, f"history[{i}]", pair, "expected a pair of texts", "Write [question, answer]")
        found.append(Message("user", text_of(row.source, f"history[{i}][0]", pair[0])))
        found.append(Message("assistant", text_of(row.source, f"history[{i}][1]", pair[1])))
    found.append(Message("user", alpaca_user_text(row.source, row.data)))
    found.append(Message("assistant", text_of(row.source, "output", row.data["output"])))
    return _conversation(row, "instruction", _with_system(row, found))


def prompt_completion(row: Row) -> Sample:
    """Two texts → Passage, joined as they are. Two lists of messages, or their JSON text → a conversation of which the
    completion is trained: messages of the prompt are its context."""
    for key in ("prompt", "completion"):
        value = row.data.get(key)
        if value is None:
            raise fail(row.source, key, value, "is missing", _seen(row))
    prompt, completion = (_messages_of_text(row.source, key, row.data[key]) for key in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Passage(text_of(row.source, "prompt", prompt), text_of(row.source, "completion", completion), row.source)
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = f"prompt is {name_of(prompt)} and completion is {name_of(completion)}"
        raise fail(row.source, "prompt", row.data["prompt"], kinds, "Make both text, or both lists of {role, content}")
    answers = [completion] if isinstance(completion, Mapping) else as_list(row.source, "completion", completion)
    told = [to_message(row.source, f"prompt[{i}]", m) for i, m in enumerate(as_list(row.source, "prompt", prompt))]
    found = [to_message(row.source, f"completion[{i}]", m) for i, m in enumerate(answers)]
    if not any(m.role == "assistant" for m in found):
        raise fail(row.source, "completion", answers, "has no assistant message", "The completion is what is trained")
    whole = _conversation(row, "prompt", _with_system(row, told + found))
    return replace(whole, context=len(whole.messages) - len(found))


def _messages_of_text(source: str, where: str, value: Any) -> Any:
    """The list of messages whose JSON text a value is; anything else as it is, whatever it begins with."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = parse(value)
    except ValueError as error:
        if _MESSAGES_AS_TEXT.match(value):
            cure = "Write the messages as JSON (in Python: json.dumps)"
            raise fail(source, where, value, str(error), cure) from None
        return value
    messages = isinstance(parsed, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in parsed)
    return parsed if messages and parsed else value


def text(row: Row) -> Passage:
    """Plain text."""
    value = row.data.get("text")
    if value is None or value == "":
        raise fail(row.source, "text", value, "is empty" if value == "" else "is missing", _seen(row))
    return Passage("", text_of(row.source, "text", value), row.source, "text")


def _seen(row: Row) -> str:
    return f"The row's keys: {cut(', '.join(map(str, row.data)))}. Fill the field, or map a column to it with columns"


def _with_system(row: Row, found: list[Message]) -> list[Message]:
    system = row.data.get("system")
    if system in (None, ""):
        return found
    content = text_of(row.source, "system", system)
    if found and found[0].role in ("system", "developer"):
        if found[0].content != content:
            raise fail(row.source, "system", system, "differs from the first message, a system message", "Keep one")
        return found
    return [Message("system", content), *found]


def _conversation(row: Row, key: str, found: list[Message]) -> Conversation:
    if not any(m.role == "assistant" for m in found):
        roles = ", ".join(m.role for m in found[:6])
        raise fail(row.source, key, None, f"no assistant message among {roles}", "There is nothing to train on")
    tools = row.data.get("tools")
    if tools is None:
        tools = row.data.get("functions")
    arguments = row_arguments(row.source, row.data.get(ROW_ARGUMENTS))
    return Conversation(tuple(found), row.source, to_tools(row.source, tools) if tools else (), template_args=arguments)


FORMATS: dict[str, Callable[[Row], Sample]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text,
}
