"""What becomes of a row: settings that decide it, examples or the reason why there are none, and the notes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.data.proof import Refusal
from sft.data.reasoning import Choice
from sft.data.rowkeys import is_bookkeeping
from sft.types import Example, Note, Rendered

_OF_KEYS = ("unread", "read_as")


@dataclass(frozen=True)
class EncodeSettings:
    """How samples become examples; the keys of `data` of the same names."""

    train_on: str = "auto"
    max_tokens: int = 2048
    over_long: str = "drop"
    control_tokens_in_text: str = "text"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    unread: str = "report"
    layers: str = "separate"
    reasoning: Choice | None = None


@dataclass(frozen=True)
class Encoded:
    """Examples of one row, and what is to be said of it. No examples iff a note is `refused` or `dropped`."""

    examples: tuple[Example, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Piece:
    """One sequence before the length rule, with the text that each of its spans must decode to."""

    rendered: Rendered
    texts: tuple[str, ...]


class TooLong(Refusal):
    """A row known to be too long before all of it was rendered."""

    def __init__(self, tokens: int) -> None:
        super().__init__("over_long", f"{tokens} tokens")
        self.tokens = tokens


def refused(source: str, refusal: Refusal, settings: EncodeSettings) -> Encoded:
    """A row that cannot be trained; `data.on_bad_row` decides what that means."""
    if isinstance(refusal, TooLong):
        return too_long(source, refusal.tokens, settings)
    return Encoded((), (Note(source, "refused", refusal.reason, str(refusal)),))


def too_long(source: str, tokens: int, settings: EncodeSettings) -> Encoded:
    """A row beyond max_tokens: dropped, or refused under over_long: error."""
    detail = f"{tokens} tokens, more than data.max_tokens: {settings.max_tokens}"
    if settings.over_long == "truncate":
        detail += ", and no trained token would remain"
    if settings.over_long == "error":
        return Encoded((), (Note(source, "refused", "over_long", detail),))
    return Encoded((), (Note(source, "dropped", "over_long", detail),))


def with_notes(encoded: Encoded, notes: tuple[Note, ...], settings: EncodeSettings) -> Encoded:
    """The outcome of a row with what is to be said of its keys: `notes`, those of its sample.

    Notes of unread keys come one a path and never of bookkeeping; with data.unread: error the row is refused for them.
    """
    if not encoded.examples or not (notes or encoded.notes):
        return encoded
    told = {(note.action, note.reason): note for note in notes}
    others = []
    for note in encoded.notes:
        if note.action not in _OF_KEYS:
            others.append(note)
        elif note.action == "read_as" or not is_bookkeeping(note.reason, note.detail):
            told.setdefault((note.action, note.reason), note)
    unread = [note for note in told.values() if note.action == "unread"]
    if unread and settings.unread == "error":
        said = ", ".join(f"{note.reason} = {note.detail}" for note in unread)
        return Encoded((), (Note(unread[0].source, "refused", "unread", f"nothing reads {said}"),))
    return Encoded(encoded.examples, (*others, *told.values()))


def spelled_note(source: str, spelled: Mapping[str, int]) -> Note:
    return Note(source, "altered", "control_tokens", f"encoded as ordinary characters: {listed(spelled)}")


def own_note(source: str, own: Mapping[str, int]) -> Note:
    return Note(source, "altered", "own_tokens", f"spelled by answers and encoded as the model's own: {listed(own)}")


def reasoning_note(source: str, message: int) -> Note:
    what = f"message {message}, an earlier answer, has reasoning that the template leaves out"
    return Note(source, "altered", "reasoning_left_out", what)


def unknown_notes(source: str, tokens: int) -> list[Note]:
    """Of so many trained tokens that stand for what the tokenizer cannot write; nothing of none."""
    what = f"{tokens} of its trained tokens stand for characters that the tokenizer does not know: they are lost"
    return [Note(source, "altered", "unknown_characters", what)] if tokens else []


def cut_note(source: str, tokens: int, limit: int) -> Note:
    what = f"{tokens} tokens cut to data.max_tokens: {limit}; a turn that lost its end is not trained to stop"
    return Note(source, "cut", "over_long", what)


def turns_note(source: str, left_out: int, messages: int, settings: EncodeSettings) -> Note:
    what = f"{left_out} of {messages} messages, behind the system prompt, left out to fit data.max_tokens: "
    return Note(source, "cut", "over_long", f"{what}{settings.max_tokens}")


def listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{token} ({count})" for token, count in counts.items())
