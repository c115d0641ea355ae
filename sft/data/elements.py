"""What stands for an object, or for a list of objects, in files of other tools: JSON text, objects of lists, thoughts.

'{"role": "user", …}'                       an object as JSON text
{"role": ["user", …], "content": ["Hi", …]}  a list of objects as `datasets`' old Sequence stores it
'<think>\\nHm.\\n</think>\\n\\n{"name": …}'    a function call behind thoughts, as reasoning models' sets have it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.data.jsontext import parse

_NAMES = ("role", "from", "name", "function")
"""Of a message, of a tool, of a call: one of them is there, and no list."""
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def object_of(value: Any) -> Any:
    """The object whose JSON text a value is; anything else as it is. Raises ValueError on `{` and malformed JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    return parse(value)


def unzipped(value: Any) -> Any:
    """The list of objects that an object of equally long lists is; anything else as it is. Nulls stand for no key."""
    if not isinstance(value, Mapping) or not any(isinstance(value.get(name), list) for name in _NAMES):
        return value
    lists = {key: items for key, items in value.items() if items is not None}
    if not all(isinstance(items, list) for items in lists.values()) or len({len(v) for v in lists.values()}) != 1:
        return value
    keys = list(lists)
    return [
        {key: item for key, item in zip(keys, items, strict=True) if item is not None}
        for items in zip(*lists.values(), strict=True)
    ]


@dataclass(frozen=True)
class CallText:
    """The parts of the text of a function call: JSON texts of calls, and what stands before and between them."""

    calls: tuple[str, ...]
    reasoning: str = ""
    content: str = ""


def call_text(value: str) -> CallText:
    """Takes thoughts in `<think>` and calls in `<tool_call>` apart; a text that begins as JSON is one of calls."""
    if value.lstrip().startswith(("{", "[")):
        return CallText((value,))
    thought = _THOUGHT.match(value)
    rest = value[thought.end() :] if thought else value
    reasoning = thought[1].strip("\n") if thought else ""
    calls = tuple(_CALL.findall(rest))
    return CallText(calls, reasoning, _CALL.sub("", rest).strip()) if calls else CallText((rest,), reasoning)
