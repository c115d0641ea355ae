"""What settings change of a row before its template gets it: joined layers, reasoning left out, end tokens once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from sft.data.outcome import EncodeSettings
from sft.data.rendered import one_end
from sft.data.thoughts import drop_reasoning
from sft.types import Conversation, Message, Note

LAYERS = ("system", "developer")
"""Roles that instruct, in the order of their authority."""
MERGE = "merge_into_system"


def as_given(sample: Conversation, settings: EncodeSettings, stops: Sequence[str]) -> tuple[Conversation, list[Note]]:
    """The row as the template gets it, and what was changed. `stops`: tokens that end an answer."""
    changed: list[Note] = []
    if settings.layers == MERGE and (joined := merge_layers(sample)) is not sample:
        changed.append(merged_note(sample))
        sample = joined
    if settings.reasoning == "drop":
        sample, dropped = drop_reasoning(sample)
        changed += [dropped_note(sample.source, dropped)] if dropped else []
    if settings.control_tokens_in_text == "allow":
        sample, ended = one_end(sample, stops)
        changed += ended
    return sample, changed


def leading(sample: Conversation) -> list[Message]:
    """The system and developer messages with which a row begins."""
    return list(takewhile(lambda message: message.role in LAYERS, sample.messages))


def merge_layers(sample: Conversation) -> Conversation:
    """The row with the system and developer messages at its start joined into one system message, those of higher
    authority first. The row itself where there is nothing to join. Later ones stay where they were said."""
    layers = leading(sample)
    if not layers or (len(layers) == 1 and layers[0].role == "system"):
        return sample
    ordered = sorted(layers, key=lambda message: LAYERS.index(message.role))
    extra = {key: value for message in reversed(ordered) for key, value in message.extra.items()}
    content = "\n\n".join(message.content.strip() for message in ordered if message.content.strip())
    joined = replace(ordered[0], role="system", content=content, extra=extra)
    context = max(sample.context - len(layers) + 1, 0) if sample.context else 0
    return replace(sample, messages=(joined, *sample.messages[len(layers) :]), context=context)


def merged_note(before: Conversation) -> Note:
    roles = " and ".join(message.role for message in leading(before))
    return Note(before.source, "altered", "layers_merged", f"{roles} joined into one system message")


def dropped_note(source: str, messages: int) -> Note:
    return Note(source, "altered", "reasoning_dropped", f"data.reasoning: drop left out the reasoning of {messages} of "
                                                        "its messages")  # fmt: skip
