"""The values that pass between floors: frozen, without behaviour beyond what their data implies.

Shapes: T tokens of one example, N tokens of a flat row, S segments of a flat row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100

Role = Literal["system", "developer", "user", "assistant", "tool"]
Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `extra` holds what else a template may read (tool_calls, reasoning_content, name, …)."""

    role: Role
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None  # None: the policy decides
    weight: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The dict that `apply_chat_template` takes."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row that a chat template renders. `source` is `file:line`. The first `context` messages are a prompt: only the
    policy `all` trains them, unless a message asks for it itself. `template_args` are given to the template for this
    row, over those of the config. `notes`: what is to be said of the row: keys unread or read under another name,
    foreign nulls."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[Mapping[str, Any], ...] = ()
    context: int = 0
    notes: tuple[Note, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passage:
    """A row without a template: text joined as it is. `prompt` is empty for plain text rows."""

    prompt: str
    completion: str
    source: str
    kind: Literal["completion", "text"] = "completion"
    weight: float = 1.0
    notes: tuple[Note, ...] = ()


Sample = Conversation | Passage


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[start, end)` of a rendered sequence that belong to what message `message` answers.

    For an assistant message: from the first token after the served generation prompt through its stop token.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence of token ids with the verified spans of the assistant messages in it."""

    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """What is trained. `weights_T[i]` weighs the loss of predicting `input_ids_T[i]`; 0 means untrained."""

    input_ids_T: Int32Array
    weights_T: Float32Array
    source: str

    @property
    def labels_T(self) -> Int32Array:
        """Aligned with the ids (not shifted), `IGNORE_INDEX` where untrained."""
        return np.where(self.weights_T > 0, self.input_ids_T, IGNORE_INDEX).astype(np.int32)

    @property
    def num_trained(self) -> int:
        """Tokens whose prediction is trained: never the first one, which nothing precedes."""
        return int(np.count_nonzero(self.weights_T[1:]))


@dataclass(frozen=True, slots=True)
class Note:
    """A row that was dropped, cut or altered, or a text of it that no example holds, for data_report.jsonl.

    Of action `unread`, the reason is the path of a key that nothing read, the detail an excerpt of its value; of
    `read_as`, the reason is `path as ours`. A row has at most one of each reason.
    """

    source: str
    action: Literal["refused", "dropped", "cut", "altered", "unread", "read_as"]  # refused: data.on_bad_row decides
    reason: str  # short, countable: "over_long", "bad_row", "unprovable", …; unread: a key path, "messages[].name"
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on a device.

    Flat: `input_ids` (1, N), `positions` (1, N) restarting at each of the S examples, no `attention_mask`.
    Padded: (B, T) with `attention_mask` (B, T), 1 at real tokens; S = B.
    Of the M targets, `target_index_M` says which position (of the B*T flattened) predicts `targets_M`, and
    `weights_M` what its loss weighs. They are known on the host, so that no device is asked for M, nor whether all
    weigh one.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    target_index_M: torch.Tensor
    targets_M: torch.Tensor
    weights_M: torch.Tensor
    segment_lengths: tuple[int, ...]
    attention_mask: torch.Tensor | None = None
    unit_weights: bool = False  # known to be all one

    @property
    def is_flat(self) -> bool:
        return self.attention_mask is None

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.segment_lengths)
