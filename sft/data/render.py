"""A conversation as the template renders it: the whole text, and for each trained turn what serving would ask.

For the turn that message k answers: the served prompt is the rendering of messages[:k] with a generation prompt, the
answer is what the rendering of messages[:k+1] adds to it, through the stop token.

Rendering every beginning of a conversation costs the square of its length. Long chats are spared that where the
template provably writes its messages one after another (`locality`): then one rendering shows where each begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sft.data.locality import MARK, Local, local_template
from sft.data.proof import AnswerCheck, Refusal, shown
from sft.errors import TemplateError
from sft.templating import ChatTemplate
from sft.types import Message

CHUNK = 16  # turns rendered at a time, so that a long chat can stop early
FEW = 4  # turns up to which rendering each is cheaper

Dicts = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One trained turn as text. `prompt_end`: where the prompt ends in the whole text, None where it isn't its start.

    `closed`: the answer ends with a stop token that the template wrote.
    """

    message: int
    whole: str
    prompt_end: int | None
    own_prompt: str | None
    answer: str
    closed: bool

    @property
    def prompt(self) -> str:
        return self.own_prompt if self.own_prompt is not None else self.whole[: self.prompt_end]

    @property
    def served_from_whole(self) -> bool:
        """Whether the whole text goes on behind the prompt with exactly this answer and its stop token."""
        return self.closed and self.prompt_end is not None and self.whole.startswith(self.answer, self.prompt_end)


def message_dicts(messages: Sequence[Message]) -> Dicts:
    """What templates get: as `apply_chat_template` does it, a key without a value is left out."""
    return [{k: v for k, v in m.as_dict().items() if v is not None} for m in messages]


class Renderer:
    """Renders conversations with one template and checks the turns as texts."""

    def __init__(self, chat: ChatTemplate, check: AnswerCheck) -> None:
        self.chat = chat
        self.check = check

    @cached_property
    def local(self) -> tuple[Local | None, Local | None]:
        """The template with a mark where each message begins, without and with tools; None where that isn't proven."""
        plain = local_template(self.chat.text)
        return plain, plain if self.chat.with_tools == self.chat.text else local_template(self.chat.with_tools)

    def whole(self, messages: Dicts, tools: Tools) -> str:
        """The text of the conversation. Raises Refusal with the template's own objection."""
        if not messages:
            raise Refusal("bad_row", "the conversation has no messages")
        try:
            return self.chat.render([messages], tools, generation_prompt=False)[0]
        except TemplateError as error:
            raise Refusal("template", f"the chat template refuses the conversation: {error}") from error

    def turns(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: str) -> Iterator[Turn]:
        """The trained turns in order, rendered as they are asked for. Raises Refusal."""
        if trained[:1] == (0,):
            raise Refusal(
                "no_prompt",
                "message 0 is an assistant message: there is no prompt to which a served model would answer so. "
                "Set train: false on it, or put the message that it answers before it.",
            )
        try:
            if len(trained) > FEW and (found := self.one_by_one(messages, tools, trained, whole)):
                yield from found
                return
            yield from self.each_rendered(messages, tools, trained, whole)
        except TemplateError as error:
            raise Refusal("template", f"the chat template refuses a beginning of the conversation: {error}") from error

    def each_rendered(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: str) -> Iterator[Turn]:
        """Every prompt and every answer rendered for itself: right for any template."""
        for first in range(0, len(trained), CHUNK):
            chunk = trained[first : first + CHUNK]
            inner = [k for k in chunk if k + 1 < len(messages)]
            prompts = self.chat.render([messages[:k] for k in chunk], tools, generation_prompt=True)
            ends = dict.fromkeys(chunk, whole)
            if inner:
                ended = self.chat.render([messages[: k + 1] for k in inner], tools, generation_prompt=False)
                ends.update(zip(inner, ended, strict=True))
            for k, prompt in zip(chunk, prompts, strict=True):
                if not ends[k].startswith(prompt):
                    raise self.not_after(k, prompt, ends[k])
                starts = whole.startswith(prompt)
                answer, closed = self.answer(messages, k, ends[k][len(prompt) :])
                yield Turn(k, whole, len(prompt) if starts else None, None if starts else prompt, answer, closed)

    def one_by_one(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: str) -> list[Turn] | None:
        """All turns from one rendering, where the template is local; None where that cannot be shown for this row."""
        local = self.local[bool(tools)]
        if local is None or not local.fits(messages, trained[0]):
            return None
        marked = self.chat.render([messages], tools, generation_prompt=False, template=local.template)[0]
        pieces = marked.split(MARK)
        missing = len(messages) - (len(pieces) - 1)  # messages before the loop's first, such as a system message
        if "".join(pieces) != whole or not 0 <= missing <= trained[0]:
            return None
        starts, place = [0] * missing, 0
        for piece in pieces[:-1]:
            place += len(piece)
            starts.append(place)
        first, last = trained[0], trained[-1]
        prompts = self.chat.render([messages[:first], messages[:last]], tools, generation_prompt=True)
        ended = self.chat.render([messages[: first + 1]], tools, generation_prompt=False)[0]
        opening, closing = prompts[0][starts[first] :], ended[starts[first + 1] :]
        begun = [whole[: starts[k]] + opening for k in (first, last)]
        if begun != prompts or whole[: starts[first + 1]] + closing != ended:
            return None
        turns = []
        for k in trained:
            end = starts[k + 1] if k + 1 < len(starts) else len(whole)
            behind = closing if k + 1 < len(starts) else ""
            start = starts[k] + len(opening)
            if start > end or not whole.startswith(opening, starts[k]):
                return None
            answer, closed = self.answer(messages, k, whole[start:end] + behind)
            turns.append(Turn(k, whole, start, None, answer, closed))
        return turns

    def answer(self, messages: Dicts, k: int, rendered: str) -> tuple[str, bool]:
        try:
            return self.check.cut(messages, k, rendered)
        except Refusal as refusal:
            raise Refusal(refusal.reason, f"message {k}: {refusal}") from refusal

    def not_after(self, k: int, prompt: str, ended: str) -> Refusal:
        same = next((i for i, (a, b) in enumerate(zip(prompt, ended, strict=False)) if a != b), len(ended))
        cure = (
            "The template knows data.template_args: {enable_thinking: true or false}, which may agree with this data."
            if "enable_thinking" in self.chat.text
            else "Choose a template whose prompt begins as the data's answers do."
        )
        return Refusal(
            "not_after_prompt",
            f"message {k} cannot follow its generation prompt: the served prompt goes on with {shown(prompt[same:])} "
            f"where the template renders the turn with {shown(ended[same:])}. {cure}",
        )
