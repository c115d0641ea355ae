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

A message may have either spelling, `role` and `content` or `from` and `value`, whatever the others have. What a row
holds besides is told by `rest`.

Every error is a `DataError`: `file:line`, field, value (cut) and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft.data.elements import object_of, unzipped
from sft.data.jsontext import cut, name_of, parse
from sft.data.messages import (
    ROW_ARGUMENTS,
    alpaca_user_text,
    as_list,
    fail,
    row_arguments,
    text_of,
    to_message,
    to_tools,
)
from sft.data.nulls import Found, clean_calls, clean_tools, comes_of_a_table, null_turns
from sft.data.readers import Row
from sft.data.rest import told
from sft.data.rowkeys import LIST_KEYS, SYSTEM_NAMES, TOOLS_NAMES, Notes, is_empty, read_as_note
from sft.errors import DataError
from sft.types import Conversation, Message, Note, Passage, Sample

KEYS_OF_FORMATS = {
    "messages": "messages (list of {role, content})",
    "sharegpt": "conversations (list of {from, value})",
    "alpaca": "instruction, output, optionally input",
    "prompt_completion": "prompt, completion",
    "text": "text",
}
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
"""How a list of messages begins that a file holds as text, be it JSON or what Python prints."""
_ASKED = ("question", "query", "prompt", "input", "problem")
_ANSWERED = ("answer", "response", "output", "completion", "target", "solution", "chosen")
_HINTS = {
    "context": "input", "content": "text", "dialog": "messages", "dialogue": "messages", "chat": "messages",
    "traj": "messages", "turns": "messages",
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
    asked = "instruction" if "instruction" in data else next((key for key in _ASKED if key in data), "")
    answered = next((key for key in _ANSWERED if key in data), "")
    if asked and answered:
        context = {"context": "input"} if "context" in data and "input" not in data else {}
        chat = {**context, **_renamed({asked: "instruction", answered: "output"})}
        hint = f" Map its keys, perhaps with columns: {_shown(chat)}"
        if asked == "instruction":
            return hint
        plain = _renamed({asked: "prompt", answered: "completion"})
        return (
            f"{hint} (conversations, which the model's chat template renders), or for a base model {_shown(plain)}"
            " (joined as they are, without a template)"
        )
    mapping: dict[str, str] = {}
    for key in data:
        ours = _HINTS.get(key, "")
        if ours and ours not in data and ours not in mapping.values():
            mapping[key] = ours
    return (
        f" Map its keys, perhaps with columns: {_shown(mapping)}"
        if mapping
        else (" Map its keys with columns: {theirs: ours}")
    )


def _renamed(columns: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for theirs, ours in columns.items() if theirs != ours}


def _shown(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{theirs}: {ours}" for theirs, ours in columns.items()) + "}"


def _is_shared(turns: Any) -> bool:
    try:
        turns = unzipped(parse(turns) if isinstance(turns, str) else turns)
        first = object_of(turns[0]) if isinstance(turns, list) and turns else None
    except ValueError:
        return False
    return isinstance(first, dict) and "role" not in first and "from" in first


def messages(row: Row, notes: Notes) -> Conversation:
    """OpenAI's chat format. A top-level `system` text goes before messages that have none."""
    key = next((key for key in LIST_KEYS if row.data.get(key) is not None), None)
    if key is None:
        raise fail(row.source, "messages", None, "a list of {role, content} is missing", _seen(row))
    turns = as_list(row.source, key, row.data[key])
    found = [to_message(row.source, f"{key}[{i}]", turn, notes) for i, turn in enumerate(turns)]
    return _conversation(row, key, _with_system(row, found, notes), notes, turns)


def sharegpt(row: Row, notes: Notes) -> Conversation:
    """`from` and `value`; the roles of SHAREGPT_ROLES, a function call being JSON text."""
    key = next((key for key in LIST_KEYS if row.data.get(key) is not None), None)
    if key is None:
        raise fail(row.source, "conversations", None, "a list of {from, value} is missing", _seen(row))
    turns = as_list(row.source, key, row.data[key])
    found = [to_message(row.source, f"{key}[{i}]", turn, notes) for i, turn in enumerate(turns)]
    return _conversation(row, key, _with_system(row, found, notes), notes, turns)


def alpaca(row: Row, notes: Notes) -> Conversation:
    """instruction, a blank line and input → user; output → assistant; `history` pairs before, `system` first."""
    for key in ("instruction", "output"):
        if row.data.get(key) is None:
            raise fail(row.source, key, row.data.get(key), "text is missing", _seen(row))
    history = row.data.get("history")
    found: list[Message] = []
    for i, pair in enumerate([] if history in (None, "") else as_list(row.source, "history", history, empty=True)):
        if isinstance(pair, str) and pair.lstrip().startswith("["):
            pair = as_list(row.source, f"history[{i}]", pair)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise fail(row.source, f"history[{i}]", pair, "expected a pair of texts", "Write [question, answer]")
        found.append(Message("user", text_of(row.source, f"history[{i}][0]", pair[0])))
        found.append(Message("assistant", text_of(row.source, f"history[{i}][1]", pair[1])))
    found.append(Message("user", alpaca_user_text(row.source, row.data)))
    found.append(Message("assistant", text_of(row.source, "output", row.data["output"])))
    return _conversation(row, "instruction", _with_system(row, found, notes), notes)


def prompt_completion(row: Row, notes: Notes) -> Sample:
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
    completion = unzipped(completion)
    answers = [completion] if isinstance(completion, Mapping) else as_list(row.source, "completion", completion)
    asked = as_list(row.source, "prompt", prompt)
    given = [to_message(row.source, f"prompt[{i}]", m, notes) for i, m in enumerate(asked)]
    found = [to_message(row.source, f"completion[{i}]", m, notes) for i, m in enumerate(answers)]
    if not any(m.role == "assistant" for m in found):
        raise fail(row.source, "completion", answers, "has no assistant message", "The completion is what is trained")
    whole = _conversation(row, "prompt", _with_system(row, given + found, notes), notes, [*asked, *answers])
    return replace(whole, context=len(whole.messages) - len(found))


def _messages_of_text(source: str, where: str, value: Any) -> Any:
    """The list of messages whose JSON text a value is; anything else as it is, whatever it begins with."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = parse(value)
        parsed = [object_of(turn) for turn in parsed] if isinstance(parsed, list) else parsed
    except ValueError as error:
        if _MESSAGES_AS_TEXT.match(value):
            cure = "Write the messages as JSON (in Python: json.dumps)"
            raise fail(source, where, value, str(error), cure) from None
        return value
    messages = isinstance(parsed, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in parsed)
    return parsed if messages and parsed else value


def text(row: Row, notes: Notes) -> Passage:
    """Plain text."""
    value = row.data.get("text")
    if value is None or value == "":
        raise fail(row.source, "text", value, "is empty" if value == "" else "is missing", _seen(row))
    return Passage("", text_of(row.source, "text", value), row.source, "text")


def _seen(row: Row) -> str:
    return f"The row's keys: {cut(', '.join(map(str, row.data)))}. Fill the field, or map a column to it with columns"


def _with_system(row: Row, found: list[Message], notes: Notes) -> list[Message]:
    """The messages behind the system text that stands beside them, under whichever of its names."""
    for key in SYSTEM_NAMES:
        system = row.data.get(key)
        if system in (None, ""):
            continue
        content = text_of(row.source, key, system)
        if key != SYSTEM_NAMES[0]:
            notes[key] = read_as_note(row.source, key, "system", system)
        if not (found and found[0].role in ("system", "developer")):
            found = [Message("system", content), *found]
        elif found[0].content != content:
            raise fail(row.source, key, system, "differs from the first message, a system message", "Keep one")
    return found


def _tools(row: Row, notes: Notes) -> tuple[tuple[Mapping[str, Any], ...], Any]:
    """The tools of a row, under whichever of their names, and as the file holds them; where it has several, they must
    be the same."""
    made: tuple[Mapping[str, Any], ...] = ()
    held: Any = None
    for key in TOOLS_NAMES:
        tools = row.data.get(key)
        if is_empty(tools):
            continue
        found = to_tools(row.source, tools)
        if made and found != made:
            raise fail(row.source, key, tools, "differs from the tools beside it", "Keep one of them")
        if key != TOOLS_NAMES[0]:
            notes[key] = read_as_note(row.source, key, "tools", tools)
        made, held = found, tools
    return made, held


def _conversation(
    row: Row, key: str, found: list[Message], notes: Notes, turns: Sequence[Any] = ()
) -> Conversation:  # fmt: skip
    """`turns`: the last of the messages, as the file holds them."""
    if not any(m.role == "assistant" for m in found):
        roles = ", ".join(m.role for m in found[:6])
        raise fail(row.source, key, None, f"no assistant message among {roles}", "There is nothing to train on")
    made, tools = _tools(row, notes)
    arguments = row_arguments(row.source, row.data.get(ROW_ARGUMENTS))
    whole = Conversation(tuple(found), row.source, made, template_args=arguments)
    return _without_foreign_nulls(whole, tools, turns, notes)


def _without_foreign_nulls(whole: Conversation, tools: Any, turns: Sequence[Any], notes: Notes) -> Conversation:
    """`tools` and `turns` as the file holds them: what was JSON text there has no nulls but its own."""
    of_table, nulls = comes_of_a_table(tools), null_turns(turns)
    if not (of_table or nulls):
        return whole
    found = Found()
    cleaned = clean_tools(whole.tools, found) if of_table else whole.tools
    messages, first = list(whole.messages), len(whole.messages) - len(turns)
    for turn in nulls:
        message = messages[first + turn]
        messages[first + turn] = replace(message, extra=clean_calls(message, cleaned, of_table, found))
    told_of = (
        ("foreign_nulls", "nulls of a table's other rows are left out", found.left_out),
        ("nulls_kept", "null arguments of tool calls that no schema decides about are kept", found.unsure),
    )
    for why, what, names in told_of:
        if names:
            notes[why] = Note(whole.source, "altered", why, f"{what}: {_named(names)}")
    return replace(whole, messages=tuple(messages), tools=cleaned)


def _named(names: Sequence[str], most: int = 6) -> str:
    each = list(dict.fromkeys(names))
    return ", ".join(each[:most]) + (f" and {len(each) - most} more" if len(each) > most else "")


def _whole(name: str, read: Callable[[Row, Notes], Sample]) -> Callable[[Row], Sample]:
    """A format's function, which reads what it knows, and then the account of the row's other keys."""

    def read_row(row: Row) -> Sample:
        notes: Notes = {}
        return told(row, name, read(row, notes), notes)

    return read_row


FORMATS: dict[str, Callable[[Row], Sample]] = {
    read.__name__: _whole(read.__name__, read) for read in (messages, sharegpt, alpaca, prompt_completion, text)
}
