"""A conversation on its way from a row to examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.data.markers import Stretch
from sft.data.render import Dicts, Turn
from sft.templating import MarkedText
from sft.types import Conversation


@dataclass
class Work:
    """A rendered row, and what is found out of it."""

    sample: Conversation
    messages: Dicts
    tools: Sequence[Mapping[str, Any]]
    weights: tuple[float, ...]
    trained: tuple[int, ...]
    rendered: MarkedText
    marked: bool
    spelled: dict[str, int]
    dropped: int = 0
    """Messages whose reasoning was left out."""
    ids: list[int] = field(default_factory=list)
    untrained: dict[int, list[Stretch]] = field(default_factory=dict)
    """By message, what of its answer is not trained: the template's markers leave it out, or it is context."""
    turns: list[Turn] = field(default_factory=list)
    """Set where one sequence holds them all."""

    @property
    def whole(self) -> str:
        return self.rendered.text
