"""`data.over_long: keep_turns`: the system prompt, the tools and the last turns of a conversation that fit.

Whole turns are left out behind the system prompt, up to a user's message, so that what is left begins as conversations
do and no tool result stands without its call. What fits is found from the end, by doubling and then by halving: that
costs a few times what is kept, however long the conversation is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sft.data.masking import message_weights
from sft.data.outcome import Encoded, EncodeSettings, turns_note
from sft.types import Conversation, Note

Encode = Callable[[Conversation], Encoded]


def is_too_long(encoded: Encoded) -> bool:
    return not encoded.examples and any(note.reason == "over_long" for note in encoded.notes)


def last_turns(sample: Conversation, whole: Encoded, settings: EncodeSettings, encode: Encode) -> Encoded:
    """The conversation with the last turns that fit, and a note of what was left out; `whole`, by which it is too
    long, where its last exchange doesn't fit either."""
    cuts = turn_starts(sample, settings.train_on)
    tried: dict[int, Encoded] = {}

    def fits(place: int) -> bool:
        if place not in tried:
            tried[place] = encode(behind(sample, cuts[place]))
        return not is_too_long(tried[place])

    low, high, step = 0, len(cuts), 1  # of places: `high` and those behind it fit, `low` may not
    while high > low and fits(max(low, high - step)):
        high = max(low, high - step)
        step *= 2
    low = max(low, high - step) + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    if high == len(cuts):
        return explained(whole)
    found = tried[high]
    if not found.examples:
        return found  # refused for another reason, which it says
    left_out = cuts[high] - opening(sample)
    return replace(found, notes=(*found.notes, turns_note(sample.source, left_out, len(sample.messages), settings)))


def opening(sample: Conversation) -> int:
    """Messages at the front that are always kept: a system prompt."""
    roles = [message.role for message in sample.messages]
    return next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))


def turn_starts(sample: Conversation, policy: str) -> tuple[int, ...]:
    """The user messages behind the first at which the rest may begin: something trained follows each."""
    first, messages = opening(sample), sample.messages
    weights = message_weights(policy, messages, sample.context)
    last = max((i for i, weight in enumerate(weights) if weight > 0), default=-1)
    return tuple(i for i in range(first + 1, last) if messages[i].role == "user" and messages[i - 1].role != "user")


def behind(sample: Conversation, cut: int) -> Conversation:
    """The system prompt and all from message `cut` on."""
    first = opening(sample)
    kept = (*sample.messages[:first], *sample.messages[cut:])
    return replace(sample, messages=kept, context=max(0, min(sample.context, first) + max(0, sample.context - cut)))


def explained(whole: Encoded) -> Encoded:
    def said(note: Note) -> Note:
        more = ", and so is its last exchange with the system prompt and tools"
        return replace(note, detail=note.detail + more) if note.reason == "over_long" else note

    return replace(whole, notes=tuple(map(said, whole.notes)))
