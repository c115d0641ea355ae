"""The keys of rows: what is read, what is bookkeeping, and what is another trainer's name for something here.

Every key of every row is (a) read, (b) in BOOKKEEPING, or (c) reported by its path: `parent_id`, `messages[].mood`,
`messages[].tool_calls[].function.thought`. A key without a value (null, blank, an empty list) says nothing.
What a set of keys means is decided once per set: rows of one file have the same few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sft.data.jsontext import cut, name_of
from sft.errors import DataError
from sft.types import Note

BOOKKEEPING = frozenset(
    (
        "id", "_id", "idx", "index", "uuid", "row_id", "example_id", "sample_id", "conversation_id", "conv_id",
        "dialog_id", "message_id", "prompt_id", "turn_id", "tool_call_id", "__index_level_0__",
        "source", "source_id", "dataset", "dataset_name", "dataset_id", "subset", "split", "license", "url",
        "language", "lang", "locale", "score", "scores", "rating", "quality", "model", "generator",
        "timestamp", "time", "date", "created", "created_at", "updated_at", "create_time", "update_time",
        "hash", "md5", "sha256", "num_turns", "num_tokens", "token_count", "length", "metadata", "meta", "version",
    )
)  # fmt: skip
"""Says where a row comes from, not what is trained; at any level. docs/DATA.md lists the same names."""
LONG_BOOKKEEPING = 200
"""Characters; a longer text under such a name (`source` beside `target`) is no bookkeeping."""
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
ONLY_TEXT = "Only text can be trained"

Means = Literal["train", "untrained", "weight"]
FLAGS: dict[str, Means] = {
    "train": "train",  # ours, and what axolotl's documentation names message_field_training
    "weight": "weight",  # ours; OpenAI's and mistral-finetune's 0 or 1 of an assistant message, OpenChat's number
    "loss": "train",  # ms-swift, LLaMA-Factory, XTuner
    "training": "train",  # axolotl, the other usual name of message_field_training
    "trainable": "train",  # tinker-cookbook, TrainOnWhat.CUSTOMIZED
    "loss_mask": "train",  # verl's and Megatron's name: 1 is trained
    "step_loss_mask": "train",  # slime: 1 is trained
    "masked": "untrained",  # torchtune's Message: true is not trained
    "loss_weight": "weight",  # LLaMA-Factory's v1, XTuner
}
"""Of a turn: the name, and what it means here. A value that is no such value is refused, never guessed."""
OWN_FLAGS = frozenset(("train", "weight"))
ROW_FLAGS = ("train", "weight", "loss", "loss_mask", "loss_weight", "trainable")
"""Those that a whole row may carry. `masked` and `training` of a row are as often said of its private data, or its
split, and are reported."""
MASKS_WITHIN = frozenset(
    (
        "train_detail",  # axolotl's message_field_training_detail: offsets within a message
        "training_detail",  # its other usual name
        "token_weights",  # tinker-cookbook's and others' list of a number for each token
        "loss_scale",  # ms-swift's, a number for each part
        "completion_mask", "assistant_masks", "assistant_mask",  # TRL's columns of tokenized rows
    )
)  # fmt: skip
"""Masks finer than a message: they cannot be kept, so rows that bring one are refused."""
SYSTEM_NAMES = ("system", "system_prompt")  # OpenOrca's, mistral-finetune's
TOOLS_NAMES = ("tools", "functions", "available_tools")  # OpenAI's older one; mistral-finetune's
ONLY_LAST = "only_last"  # mistral-finetune: true trains the last answer alone
MASKED_ROLE = "mask"  # NeMo: who is not trained, by default the user
USER_NAMES = frozenset(("user", "human", "prompter"))
_OWN_OF_TURNS = frozenset(("role", "content", "tool_calls", "function_call", "from", "value"))
_BESIDE = frozenset((*SYSTEM_NAMES, *TOOLS_NAMES, "chat_template_kwargs"))
LIST_KEYS = ("messages", "conversations", "conversation")
READ: dict[str, frozenset[str]] = {
    "messages": _BESIDE,
    "sharegpt": _BESIDE,
    "alpaca": frozenset(("instruction", "input", "output", "history")) | _BESIDE,
    "prompt_completion": frozenset(("prompt", "completion")) | _BESIDE,
    "passage": frozenset(("prompt", "completion")),  # prompt and completion that are strings
    "text": frozenset(("text",)),
}
"""By format, which keys of a row its function looks at, but for the list of messages, its flags and its media."""

_LIST = re.compile(r"^(?:conversations?|prompt|completion)\[(?=\d)")

Notes = dict[str, Note]
"""By key path, what is to be said of a row's keys: at most one note a path."""


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What the keys of a row mean, but for those that its format reads."""

    flags: tuple[str, ...]
    media: tuple[str, ...]
    masks: tuple[str, ...]
    bookkeeping: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return not (self.flags or self.media or self.masks or self.bookkeeping or self.unread)


@lru_cache(maxsize=8192)
def row_keys(keys: tuple[str, ...], name: str) -> RowKeys:
    """Sorts the keys of a row of a format (a key of READ)."""
    rest = [key for key in keys if key not in READ[name]]
    lists = [key for key in rest if key in LIST_KEYS]
    if name in ("messages", "sharegpt") and len(lists) == 1:
        rest.remove(lists[0])
    flags = (*ROW_FLAGS, ONLY_LAST, MASKED_ROLE)
    known = (*flags, *MEDIA, *MASKS_WITHIN, *BOOKKEEPING)
    return RowKeys(
        tuple(key for key in rest if key in flags),
        tuple(key for key in rest if key in MEDIA),
        tuple(key for key in rest if key in MASKS_WITHIN),
        tuple(key for key in rest if key in BOOKKEEPING),
        tuple(key for key in rest if key not in known),
    )


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """What the keys of a message mean: `extra` are those that a template may read."""

    shared: bool
    calls: bool
    flags: tuple[str, ...]
    media: tuple[str, ...]
    masks: tuple[str, ...]
    extra: tuple[str, ...]


@lru_cache(maxsize=8192)
def turn_keys(keys: tuple[str, ...]) -> TurnKeys:
    """Sorts the keys of a message. `shared`: it has a key of ShareGPT's spelling."""
    rest = [key for key in keys if key not in _OWN_OF_TURNS]
    return TurnKeys(
        "from" in keys or "value" in keys,
        "tool_calls" in keys or "function_call" in keys,
        tuple(key for key in rest if key in FLAGS),
        tuple(key for key in rest if key in MEDIA),
        tuple(key for key in rest if key in MASKS_WITHIN),
        tuple(key for key in rest if key not in FLAGS and key not in MEDIA and key not in MASKS_WITHIN),
    )


# Values ---------------------------------------------------------------------------------------------------------------


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, a blank text, a list or an object of nothing but such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    return value is None


def yes_or_no(value: Any) -> bool | None:
    """The truth that a flag can only mean: a boolean, 0, 1, or the text of one; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def as_weight(value: Any) -> float | None:
    """A number from 0 on; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        return None
    return float(value)


def refuse_media(source: str, prefix: str, data: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises DataError where a picture, a film or a sound is there."""
    for key in keys:
        if not is_empty(data[key]):
            raise DataError(f"{source}: {prefix}{key} = {cut(data[key])}: is not empty. {ONLY_TEXT}")


def refuse_masks(source: str, prefix: str, data: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raises DataError where a mask within a message is there: what it leaves out would be trained."""
    for key in keys:
        if data[key] is not None and data[key] != []:
            raise DataError(
                f"{source}: {prefix}{key} = {cut(data[key])}: a mask within a message cannot be kept. Write train: "
                "true or false on whole messages, split the message in two, or take the key out"
            )


def flag_refused(source: str, where: str, value: Any, means: Means) -> DataError:
    """The refusal of a flag that is no flag, with what to write."""
    quote = '"' if isinstance(value, str) else ""
    if means == "weight":
        problem, cure = "is no weight", "Write weight: and a number from 0 on, e.g. 0.5"
    else:
        opposite = " (true: not trained)" if means == "untrained" else ""
        problem, cure = f"is {name_of(value)}, no yes or no{opposite}", "Write train: true or train: false"
    return DataError(f"{source}: {where} = {quote}{cut(value)}{quote}: {problem}. {cure}")


# What is said ---------------------------------------------------------------------------------------------------------


def path_of(where: str) -> str:
    """`messages[].name` of `messages[3].name`; a list of messages is called so whatever the row calls it."""
    return re.sub(r"\[\d+\]", "[]", _LIST.sub("messages[", where))


def unread_note(source: str, path: str, value: Any) -> Note:
    """Says that nothing reads the value under a key path."""
    return Note(source, "unread", path, excerpt(value))


def read_as_note(source: str, path: str, ours: str, value: Any) -> Note:
    """Says that a key was read under one of our names. Its reason is `path as ours`."""
    return Note(source, "read_as", f"{path} as {ours}", excerpt(value))


def excerpt(value: Any) -> str:
    """`cut`, but fast for the short values that most columns hold."""
    if isinstance(value, str) and len(value) <= 80 and value.isascii() and value.isprintable():
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else cut(value)


def is_bookkeeping(path: str, value: Any = None) -> bool:
    """Whether the last key of a path says where a row comes from and not what is trained."""
    if isinstance(value, str) and len(value) > LONG_BOOKKEEPING:
        return False
    return path.rpartition(".")[2].removesuffix("[]") in BOOKKEEPING


CURES = {
    "documents": "No template is given documents here: put their text into a message",
    "enable_thinking": "Write chat_template_kwargs: {enable_thinking: true or false} beside the messages",
    "reasoning": "Text pairs have no reasoning: write messages, and reasoning_content on the assistant's",
    **dict.fromkeys(
        ("input_ids", "labels", "attention_mask", "token_ids"),
        "Rows are tokenised here, from their text: remove it, or write the text alone",
    ),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "Nothing is learned of preferences here"),
    **dict.fromkeys(
        (*SYSTEM_NAMES, *TOOLS_NAMES, "chat_template_kwargs", "history", "input"),
        "Rows of text have no template that prints it: write messages, or instruction and output",
    ),
}
"""By key of a row; where none is listed, `cure_of` says what always helps."""


def cure_of(path: str) -> str:
    """What to do about a key that nothing reads."""
    if "." in path or "[" in path:
        return "The template in use reads no key of that name: put its text into content, or take it out"
    return CURES.get(path) or (
        f"If it belongs into the example, map it: columns: {{{path}: …}}; if not, columns: {{{path}: null}} says so"
    )
