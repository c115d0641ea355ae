"""What a row holds beside what its format reads: flags of the whole row, media, and keys that nothing reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sft.data.jsontext import cut
from sft.data.readers import Row
from sft.data.rowkeys import (
    FLAGS,
    LIST_KEYS,
    MASKED_ROLE,
    ONLY_LAST,
    USER_NAMES,
    Notes,
    as_weight,
    flag_refused,
    is_bookkeeping,
    is_empty,
    read_as_note,
    refuse_masks,
    refuse_media,
    row_keys,
    unread_note,
    yes_or_no,
)
from sft.errors import DataError
from sft.types import Conversation, Message, Passage, Sample


def told(row: Row, name: str, sample: Sample, notes: Notes) -> Sample:
    """The sample of a row of format `name`, with the flags of the row applied and notes about its other keys.

    `notes` are those of its messages. Raises DataError for media, masks within messages and flags that are none.
    """
    if name == "prompt_completion" and isinstance(sample, Passage):
        name = "passage"
    keys = row_keys(tuple(row.data), name)
    if not keys.nothing:
        refuse_media(row.source, "", row.data, keys.media)
        refuse_masks(row.source, "", row.data, keys.masks)
        for key in keys.flags:
            if row.data[key] is not None:
                sample = _flagged(row, key, row.data[key], sample, notes)
        for key in keys.bookkeeping:
            value = row.data[key]
            if isinstance(value, str) and not is_bookkeeping(key, value):
                _note_unread(row, key, value, sample, notes)
        for key in keys.unread:
            if not (key in LIST_KEYS and key == _list_read(row, name)):
                _note_unread(row, key, row.data[key], sample, notes)
    return replace(sample, notes=tuple(notes.values())) if notes else sample


def _list_read(row: Row, name: str) -> str:
    """Which of the names of a list of messages was read, where a row has several."""
    present = (key for key in LIST_KEYS if name in ("messages", "sharegpt") and row.data.get(key) is not None)
    return next(present, "")


def _note_unread(row: Row, key: str, value: Any, sample: Sample, notes: Notes) -> None:
    """Notes a key that nothing reads, unless it says nothing or repeats a text of the example."""
    if is_empty(value) or (isinstance(value, str) and _repeats(sample, value.strip())):
        return
    notes.setdefault(key, unread_note(row.source, key, value))


def _repeats(sample: Sample, value: str) -> bool:
    """Whether a value is one of the texts of the example, blanks around it aside."""
    if isinstance(sample, Conversation):
        return any(value in message.content and value == message.content.strip() for message in sample.messages)
    return value in (sample.prompt.strip(), sample.completion.strip())


def _flagged(row: Row, key: str, value: Any, sample: Sample, notes: Notes) -> Sample:
    """The sample as a flag of its row wants it: `train`, `weight`, `only_last`, NeMo's `mask`.

    A list under such a name is a mask of tokens, which is refused. A number under `loss` is a measurement, and a word
    under any of them something else again: not read.
    """
    if key == MASKED_ROLE:
        return _masked(row, value, sample, notes)
    if isinstance(value, (list, tuple)):
        refuse_masks(row.source, "", row.data, (key,))
    if FLAGS.get(key) == "weight":
        weight = as_weight(_number(value))
        if weight is None:
            told = flag_refused(row.source, key, value, "weight")
            raise DataError(f"{told}; if it is no weight of the loss, columns: {{{key}: null}} leaves it out")
        notes[key] = read_as_note(row.source, key, "weight of the whole row", value)
        return _weighted(sample, weight)
    answer = yes_or_no(value)
    measured = isinstance(value, float) or (key == "loss" and str(value).strip().lower() not in ("true", "false"))
    if answer is None or measured:
        _note_unread(row, key, value, sample, notes)
        return sample
    if key == ONLY_LAST:
        if isinstance(sample, Conversation):
            notes[key] = read_as_note(row.source, key, "train of the last answer alone", value)
            return _last_alone(sample) if answer else sample
        _note_unread(row, key, value, sample, notes)
        return sample
    notes[key] = read_as_note(row.source, key, "train of the whole row", value)
    return sample if answer else _untrained(sample)


def _number(value: Any) -> Any:
    """The number of a text, as CSV files hold it; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _weighted(sample: Sample, weight: float) -> Sample:
    if weight == 1:
        return sample
    if isinstance(sample, Passage):
        return replace(sample, weight=sample.weight * weight)
    return replace(sample, messages=tuple(replace(m, weight=m.weight * weight) for m in sample.messages))


def _untrained(sample: Sample) -> Sample:
    if isinstance(sample, Passage):
        return replace(sample, weight=0.0)
    return replace(sample, messages=tuple(_off(message) for message in sample.messages))


def _last_alone(sample: Conversation) -> Conversation:
    last = max(i for i, message in enumerate(sample.messages) if message.role == "assistant")
    return replace(sample, messages=tuple(m if i == last else _off(m) for i, m in enumerate(sample.messages)))


def _off(message: Message) -> Message:
    """Untrained, unless the message itself says otherwise."""
    return replace(message, train=False) if message.train is None and message.role == "assistant" else message


def _masked(row: Row, value: Any, sample: Sample, notes: Notes) -> Sample:
    """NeMo's `mask` names who is not trained: the user, as here, or nobody knows what."""
    if isinstance(sample, Conversation) and isinstance(value, str):
        if value.strip().lower() in USER_NAMES:
            return sample
        if value.strip().lower() in ("assistant", "gpt", "model", "bot", "chatgpt"):
            raise DataError(
                f'{row.source}: mask = "{cut(value)}": asks to train the user\'s turns. Only assistant turns are '
                "trained: swap the roles, or take it out"
            )
    if isinstance(value, (list, tuple)):
        refuse_masks(row.source, "", row.data, (MASKED_ROLE,))
    _note_unread(row, MASKED_ROLE, value, sample, notes)
    return sample
