"""Control tokens that the messages of a row spell: marked as ordinary characters, or taken for the model's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sft.data.control import ControlTokens, found_in
from sft.data.outcome import listed, own_note
from sft.data.proof import Refusal
from sft.errors import DataError
from sft.types import Note

Dicts = list[dict[str, Any]]


def spelled_in(messages: Dicts, tools: Sequence[Mapping[str, Any]], control: ControlTokens, mode: str) -> Counter[str]:
    """How often messages and tools spell each control token; nothing under `allow`. Raises Refusal under `error`."""
    spelled = Counter[str]()
    if mode == "allow":
        return spelled
    for message in messages:
        spelled.update(control.spelled(message, answer=message["role"] == "assistant"))
    for tool in tools:
        spelled.update(control.spelled(tool, answer=False))
    if spelled and mode == "error":
        raise Refusal(
            "control_tokens",
            f"the text spells control tokens: {listed(spelled)}. "
            "Set data.control_tokens_in_text: text to read them as ordinary characters.",
        )
    return spelled


def marked(messages: Dicts, tools: Dicts, control: ControlTokens) -> tuple[Dicts, Dicts]:
    """Messages and tools with what they spell marked. Raises Refusal."""
    try:
        return (
            [control.mark(message, answer=message["role"] == "assistant") for message in messages],
            [control.mark(tool, answer=False) for tool in tools],
        )
    except DataError as error:
        raise Refusal("control_tokens", str(error)) from error


def own_tokens(source: str, messages: Dicts, control: ControlTokens) -> list[Note]:
    """A note where answers spell tokens that the model writes itself, and are encoded as these."""
    own = Counter(found_in([message for message in messages if message["role"] == "assistant"], control.own))
    return [own_note(source, own)] if own else []
