"""A conversation between its row and its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.data.layers import Given, Layers
from sft.data.markers import Stretch
from sft.data.render import Dicts, Renderer, Turn
from sft.templating import MarkedText
from sft.types import Conversation, Note


@dataclass
class Work:
    """A conversation on its way."""

    sample: Conversation
    messages: Dicts
    tools: Sequence[Mapping[str, Any]]
    weights: tuple[float, ...]
    trained: tuple[int, ...]
    renderer: Renderer
    layers: Layers
    rendered: MarkedText
    marked: bool
    ids: list[int] = field(default_factory=list)
    untrained: dict[int, list[Stretch]] = field(default_factory=dict)
    """By message, what the template's markers leave out of its answer."""
    turns: list[Turn] = field(default_factory=list)
    """Set where one sequence holds them all."""
    notes: list[Note] = field(default_factory=list)
    """Of what was changed before rendering."""

    @property
    def whole(self) -> str:
        return self.rendered.text


def given_by(work: Work, turns: Sequence[Turn], *, together: bool, whole: bool) -> Given:
    """What the examples of these turns hold: one sequence, or a prompt and its answer each. Where not the whole row was
    rendered, as under `over_long: truncate`, the row is judged by the rendering that is not cut."""
    answers = {turn.message: turn.answer for turn in turns}
    texts = [] if together else [turn.prompt + turn.answer for turn in turns]
    texts += [work.whole] if together or not whole else []
    return Given(work.sample, work.messages, work.tools, answers, texts, together=together or not whole)
