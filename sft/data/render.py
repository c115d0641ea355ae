"""A conversation as the template renders it: the whole text, and for each trained turn what serving would ask.

For the turn that message k answers: the served prompt is the rendering of messages[:k] with a generation prompt, the
answer is what the rendering of messages[:k+1] adds to it, through the stop token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.data.proof import AnswerCheck, Refusal, shown
from sft.errors import TemplateError
from sft.templating import ChatTemplate
from sft.types import Message

CHUNK = 16  # turns rendered at a time, so that a long chat can stop early

Dicts = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn as text. `closed`: the answer ends with a stop token that the template wrote."""

    message: int
    prompt: str
    answer: str
    closed: bool


def message_dicts(messages: Sequence[Message]) -> Dicts:
    """What templates get: as `apply_chat_template` does it, a key without a value is left out."""
    return [{k: v for k, v in m.as_dict().items() if v is not None} for m in messages]


class Renderer:
    """Renders conversations with one template and checks the turns as texts."""

    def __init__(self, chat: ChatTemplate, check: AnswerCheck) -> None:
        self.chat = chat
        self.check = check

    def whole(self, messages: Dicts, tools: Sequence[Mapping[str, Any]]) -> str:
        """The text of the conversation. Raises Refusal with the template's own objection."""
        if not messages:
            raise Refusal("bad_row", "the conversation has no messages")
        try:
            return self.chat.render([messages], tools, generation_prompt=False)[0]
        except TemplateError as error:
            raise Refusal("template", f"the chat template refuses the conversation: {error}") from error

    def turns(
        self, messages: Dicts, tools: Sequence[Mapping[str, Any]], trained: Sequence[int], whole: str
    ) -> Iterator[Turn]:
        """The trained turns in order, rendered as they are asked for. Raises Refusal."""
        for first in range(0, len(trained), CHUNK):
            chunk = trained[first : first + CHUNK]
            if chunk[0] == 0:
                raise Refusal(
                    "no_prompt",
                    "message 0 is an assistant message: there is no prompt to which a served model would answer so. "
                    "Set train: false on it, or put the message that it answers before it.",
                )
            inner = [k for k in chunk if k + 1 < len(messages)]
            try:
                prompts = self.chat.render([messages[:k] for k in chunk], tools, generation_prompt=True)
                ended = self.chat.render([messages[: k + 1] for k in inner], tools, generation_prompt=False)
            except TemplateError as error:
                raise Refusal(
                    "template", f"the chat template refuses a beginning of the conversation: {error}"
                ) from error
            ends = dict(zip(inner, ended, strict=True))
            for k, prompt in zip(chunk, prompts, strict=True):
                yield self.turn(messages, k, prompt, ends.get(k, whole))

    def turn(self, messages: Dicts, k: int, prompt: str, ended: str) -> Turn:
        if not ended.startswith(prompt):
            same = next((i for i, (a, b) in enumerate(zip(prompt, ended, strict=False)) if a != b), len(ended))
            raise Refusal(
                "not_after_prompt",
                f"message {k} cannot follow its generation prompt: the served prompt goes on with "
                f"{shown(prompt[same:])} where the template renders the turn with {shown(ended[same:])}. "
                "A template argument may help (data.template_args), or another template.",
            )
        try:
            answer, closed = self.check.cut(messages, k, ended[len(prompt) :])
        except Refusal as refusal:
            raise Refusal(refusal.reason, f"message {k}: {refusal}") from refusal
        return Turn(k, prompt, answer, closed)
