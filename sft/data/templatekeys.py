"""Which keys of a message a chat template reads. Others are brought to a name that it reads, or are noted as unread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sft.data.proof import REASONING_FIELDS
from sft.data.rowkeys import Notes, is_bookkeeping, is_empty, read_as_note, unread_note
from sft.templating import parse
from sft.types import Conversation, Message

if TYPE_CHECKING:
    from sft.templating import ChatTemplate

_READ_ANYWAY = frozenset(("role", "content", "tool_calls", "type", "function", "name", "arguments"))
"""Of messages and calls: whether they come through is not a matter of their names."""


@dataclass(frozen=True, slots=True)
class Words:
    """The names by which a template may look into a message; `everything`: it prints messages as they are."""

    names: frozenset[str]
    everything: bool

    def reads(self, key: str) -> bool:
        return self.everything or key in self.names


@lru_cache(maxsize=64)
def words_of(template: str) -> Words:
    """What `message.key`, `message['key']`, `message.get('key')` and `'key' in message` name anywhere in a template."""
    from jinja2 import nodes

    tree = parse(template)
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    messages = {"messages", "message"}
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(n.name == "messages" for n in loop.iter.find_all(nodes.Name)):
            messages.add(loop.target.name)
        if isinstance(loop.target, nodes.Name) and isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages":
            messages.add(loop.target.name)
    printed = [node.node for node in tree.find_all(nodes.Filter) if node.name in ("tojson", "items", "string")]
    printed += [
        node.node.node
        for node in tree.find_all(nodes.Call)
        if isinstance(node.node, nodes.Getattr) and node.node.attr in ("items", "values", "keys")
    ]
    whole = any(isinstance(node, nodes.Name) and node.name in messages for node in printed)
    return Words(frozenset(names), whole)


class TemplateKeys:
    """The keys of messages as one template reads them. `read` is cheap where messages have role and content alone."""

    def __init__(self, chat: ChatTemplate) -> None:
        self.words = (words_of(chat.text), words_of(chat.with_tools))
        self.decided: dict[tuple[bool, tuple[str, ...]], tuple[str, ...]] = {}

    def unread(self, keys: tuple[str, ...], tools: bool) -> tuple[str, ...]:
        """Of the keys of a message or a call, those that the template reads not by name."""
        found = self.decided.get((tools, keys))
        if found is None:
            words = self.words[tools]
            found = tuple(key for key in keys if key not in _READ_ANYWAY and not words.reads(key))
            if len(self.decided) < 10_000:  # keys that are data would fill the memory
                self.decided[tools, keys] = found
        return found

    def read(self, sample: Conversation) -> Conversation:
        """The conversation with reasoning under the name that the template reads, and notes about other keys."""
        if not any(message.extra for message in sample.messages):
            return sample
        notes: Notes = {note.reason: note for note in sample.notes}
        tools = bool(sample.tools)
        messages = list(sample.messages)
        for i, message in enumerate(messages):
            if not message.extra:
                continue
            for key in self.unread(tuple(message.extra), tools):
                if key in REASONING_FIELDS:
                    messages[i] = message = self.renamed(sample.source, message, key, tools, notes)
                elif not _is_said(key, message, sample):
                    _note(sample.source, f"messages[].{key}", message.extra[key], notes)
            for call in message.extra.get("tool_calls", ()):
                for key in self.unread(tuple(call), tools):
                    _note(sample.source, f"messages[].tool_calls[].{key}", call[key], notes)
        if len(notes) == len(sample.notes) and all(a is b for a, b in zip(messages, sample.messages, strict=True)):
            return sample
        return replace(sample, messages=tuple(messages), notes=tuple(notes.values()))

    def renamed(self, source: str, message: Message, key: str, tools: bool, notes: Notes) -> Message:
        """The message with its reasoning under a name that the template reads; left to `layers` where there is none."""
        value = message.extra[key]
        ours = next((name for name in REASONING_FIELDS if self.words[tools].reads(name)), "")
        if is_empty(value):
            return message
        if not ours and isinstance(value, str):
            return message  # `layers` refuses or counts reasoning that is not printed
        if not ours or not isinstance(value, str) or message.extra.get(ours) not in (None, "", value):
            _note(source, f"messages[].{key}", value, notes)
            return message
        extra: Mapping[str, Any] = {
            ours if name == key else name: v for name, v in message.extra.items() if name != ours
        }
        note = read_as_note(source, f"messages[].{key}", ours, value)
        notes.setdefault(note.reason, note)
        return replace(message, extra=extra)


def _note(source: str, path: str, value: Any, notes: Notes) -> None:
    if not is_empty(value) and not is_bookkeeping(path, value):
        notes.setdefault(path, unread_note(source, path, value))


def _is_said(key: str, message: Message, sample: Conversation) -> bool:
    """Whether a tool result's name only repeats that of a call."""
    if key != "name" or message.role != "tool":
        return False
    calls = (call for other in sample.messages for call in other.extra.get("tool_calls", ()))
    return any(call["function"]["name"] == message.extra[key] for call in calls)
