"""A conversation as the template renders it: the whole text, and for each trained turn what serving would ask.

For the turn that message k answers: the served prompt is the rendering of messages[:k] with a generation prompt, the
answer is what the rendering of messages[:k+1] adds to it, through the stop token.

Rendering every beginning of a conversation costs the square of its length. Long chats are spared that where the
template provably writes its messages one after another (`locality`): then one rendering shows where each begins.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from sft.data.locality import MARK, Local, local_template
from sft.data.markers import Marking, behind_lead, marking, strings
from sft.data.proof import OWN_TOOLS, TOOL_TEMPLATES, AnswerCheck, Refusal, shown
from sft.data.reasoning import Blocks, Choice, Lead
from sft.errors import TemplateError
from sft.templating import RENDER_SECONDS, ChatTemplate, MarkedText, TemplateTimeout, deadline, generation_markers
from sft.tokenizer import PROBE_ANSWER, PROBE_NEXT, PROBE_USER, probe
from sft.types import Message

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle

CHUNK = 16  # turns rendered at a time, so that a long chat can stop early
FEW = 4  # turns up to which rendering each is cheaper than finding out what follows the last message
VERIFIED_ROWS = 8
TAG = re.compile(r"</?[A-Za-z_]+>")

Dicts = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One trained turn as text. `prompt_end`: where the prompt ends in the whole text, None where it isn't its start.

    `closed`: the answer ends with a stop token that the template wrote. `marking`: None where there are no markers.
    `lead`: set where the prompt is no beginning of the rendered turn; the answer begins with its text.
    """

    message: int
    whole: str
    prompt_end: int | None
    own_prompt: str | None
    answer: str
    closed: bool
    marking: Marking | None = None
    lead: Lead | None = None

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

    def __init__(self, chat: ChatTemplate, check: AnswerCheck, reasoning: Choice | None = None) -> None:
        self.chat = chat
        self.check = check
        self.unverified = self.unseen = VERIFIED_ROWS
        self.endings: dict[bool, tuple[str, str] | None] = {}
        plain = local_template(chat.text)
        with_tools = plain if chat.with_tools == chat.text else local_template(chat.with_tools)
        self.local: tuple[Local | None, Local | None] = (plain, with_tools)
        self.marked = tuple(generation_markers(text) == "placed" for text in (chat.text, chat.with_tools))
        self.blocks = Blocks(chat, check, reasoning, self.marked)

    def ended(self, conversations: Sequence[Dicts], tools: Tools, template: str | None = None) -> list[MarkedText]:
        """Conversations without a generation prompt, with what the template marks as generated."""
        if self.marked[bool(tools)]:
            return self.chat.render_marked(conversations, tools, template)
        texts = self.chat.render(conversations, tools, generation_prompt=False, template=template)
        return [MarkedText(text) for text in texts]

    def whole(self, messages: Dicts, tools: Tools) -> MarkedText:
        """The text of the conversation, with its messages' starts where the template is local. Raises Refusal."""
        if not messages:
            raise Refusal("bad_row", "the conversation has no messages")
        local = self.local[bool(tools)]
        try:
            if local is not None and local.fits(messages):
                whole = self.located(messages, tools, local)
                if whole is not None and not self.unseen:
                    return whole
                self.unseen = max(self.unseen - 1, 0)
                plain = self.ended([messages], tools)[0]
                if whole is not None and replace(whole, starts=None) == plain:
                    return whole
                if whole is not None:
                    self.local = (None, None)
                return plain
            return self.ended([messages], tools)[0]
        except TemplateError as error:
            said = f"the chat template refuses the conversation: {error}"
            if tools or any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
                said = f"{said.rstrip('.')}. The row has tools. {self.check.tool_cure}"
            raise Refusal("template", said) from error

    def located(self, messages: Dicts, tools: Tools, local: Local) -> MarkedText | None:
        """The text of a conversation with where each message begins, from one rendering of the marked template.

        0 for a message that the loop leaves out, such as a system message. None where a message holds such a mark.
        """
        if any(MARK in words for given in (*messages, *tools) for words in strings(given)):
            return None
        rendered = self.ended([messages], tools, local.template)[0]
        pieces = rendered.text.split(MARK)
        left_out = len(messages) - (len(pieces) - 1)
        if left_out < 0:
            return None
        starts = list(accumulate(len(piece) for piece in pieces[:-1]))
        marks = rendered.marks
        if marks is not None:  # their places, without the marks before them
            places = [start + number for number, start in enumerate(starts)]
            low_high = [(low - bisect_left(places, low), high - bisect_left(places, high)) for low, high in marks]
            marks = tuple(low_high)
        return MarkedText("".join(pieces), marks, (*[0] * left_out, *starts))

    def turns(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: MarkedText) -> Iterator[Turn]:
        """The trained turns in order, rendered as they are asked for. Raises Refusal."""
        if trained[:1] == (0,):
            raise Refusal(
                "no_prompt",
                "message 0 is an assistant message: there is no prompt to which a served model would answer so. "
                "Set train: false on it, or put the message that it answers before it.",
            )
        try:
            yield from self.found_turns(messages, tools, trained, whole)
        except TemplateError as error:
            raise Refusal("template", f"the chat template refuses a beginning of the conversation: {error}") from error

    def found_turns(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: MarkedText) -> Iterator[Turn]:
        """From one rendering where the template allows it; on the first rows from all of them as well, to be sure."""
        local = self.local[bool(tools)]
        if local is None or not local.fits(messages) or not (local.constant or len(trained) > FEW):
            yield from self.each_rendered(messages, tools, trained, whole)
            return
        early = tuple(k for k in trained if k < local.needs)
        rest = trained[len(early) :]
        found = self.one_by_one(messages, tools, rest, whole, local) if rest else None
        if found is not None and self.unverified and len(rest) < CHUNK:
            self.unverified -= 1
            if found != list(self.each_rendered(messages, tools, rest, whole)):
                self.local = (None, None)
                found = None
        if found is None:
            early, found = tuple(trained), []
        yield from self.each_rendered(messages, tools, early, whole)
        yield from found

    def each_rendered(self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: MarkedText) -> Iterator[Turn]:
        """Every prompt and every answer rendered for itself: right for any template."""
        for first in range(0, len(trained), CHUNK):
            chunk = trained[first : first + CHUNK]
            inner = [k for k in chunk if k + 1 < len(messages)]
            prompts = self.chat.render([messages[:k] for k in chunk], tools, generation_prompt=True)
            ends = dict.fromkeys(chunk, whole)
            if inner:
                ends.update(zip(inner, self.ended([messages[: k + 1] for k in inner], tools), strict=True))
            for k, prompt in zip(chunk, prompts, strict=True):
                ended = ends[k].text
                if not ended.startswith(prompt):
                    yield self.behind_block(messages, tools, k, prompt, ends[k], whole)
                    continue
                end = len(prompt)
                starts = whole.text.startswith(prompt)
                answer, closed = self.answer(messages, k, ended[end:])
                found = whole if starts and whole.text.startswith(answer, end) else ends[k]
                own = None if starts else prompt
                yield Turn(k, whole.text, end if starts else None, own, answer, closed, marking(found, end, answer))

    def one_by_one(
        self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: MarkedText, local: Local
    ) -> list[Turn] | None:
        """All turns from one rendering of the marked template; None where that doesn't bear out for this row."""
        starts = whole.starts
        if starts is None:
            return None
        ends = self.ends_of_text(messages, tools, trained, whole.text, starts, local)
        if ends is None:
            return None
        opening, closing = ends
        turns = []
        text = whole.text
        for k in trained:
            last = k + 1 == len(starts)
            end = len(text) if last else starts[k + 1]
            start = starts[k] + len(opening)
            if start > end or not text.startswith(opening, starts[k]):
                return None
            answer, closed = self.answer(messages, k, text[start:end] + ("" if last else closing))
            turns.append(Turn(k, text, start, None, answer, closed, marking(whole, start, answer)))
        return turns

    def ends_of_text(
        self, messages: Dicts, tools: Tools, trained: Sequence[int], whole: str, starts: Sequence[int], local: Local
    ) -> tuple[str, str] | None:
        """What the template writes after the last message, with a generation prompt and without.

        The same for every row where the template reads nothing there; then it is taken from a small conversation,
        once. Else from this row's own first turn, and held against its last one.
        """
        if local.constant:
            if bool(tools) not in self.endings:
                self.endings[bool(tools)] = self.constant_endings(tools, local)
            return self.endings[bool(tools)]
        if len(trained) < 2:
            return None
        return self.endings_at(messages, tools, trained[0], trained[-1], whole, starts)

    def constant_endings(self, tools: Tools, local: Local) -> tuple[str, str] | None:
        turns = local.needs // 2 + 2
        small: Dicts = [{"role": role, "content": role} for _ in range(turns) for role in ("user", "assistant")]
        try:
            text = self.located(small, tools, local)
            if text is None or text.starts is None:
                return None
            return self.endings_at(small, tools, 2 * turns - 3, 2 * turns - 3, text.text, text.starts)
        except TemplateError:
            return None  # the template takes no such conversation; it may well take the rows

    def endings_at(
        self, messages: Dicts, tools: Tools, first: int, last: int, whole: str, starts: Sequence[int]
    ) -> tuple[str, str] | None:
        prompts = self.chat.render([messages[:first], messages[:last]], tools, generation_prompt=True)
        ended = self.chat.render([messages[: first + 1]], tools, generation_prompt=False)[0]
        opening, closing = prompts[0][starts[first] :], ended[starts[first + 1] :]
        begun = [whole[: starts[k]] + opening for k in (first, last)]
        agree = begun == prompts and whole[: starts[first + 1]] + closing == ended
        return (opening, closing) if agree else None

    def answer(self, messages: Dicts, k: int, rendered: str) -> tuple[str, bool]:
        try:
            return self.check.cut(messages, k, rendered)
        except Refusal as refusal:
            raise Refusal(refusal.reason, f"message {k}: {refusal}") from refusal

    def behind_block(
        self, messages: Dicts, tools: Tools, k: int, prompt: str, ended: MarkedText, whole: MarkedText
    ) -> Turn:
        """A turn whose prompt is no beginning of it: behind a reasoning block, or a history rendered otherwise."""
        found = self.blocks.behind(messages, k, tools, prompt, ended)
        if found is None:
            raise not_after(k, prompt, ended.text)
        said = [*messages[:k], dict(found.message)]
        answer, closed = self.answer(said, k, found.ended.text[found.start :])
        lead = found.lead.text
        if self.check.stop.search(lead):
            raise Refusal("stops_within", f"message {k}: serving would stop within its reasoning, {shown(lead)}.")
        marks = behind_lead(marking(found.ended, found.start, answer), len(lead))
        return Turn(k, whole.text, None, prompt, lead + answer, closed, marks, found.lead)


def not_after(k: int, prompt: str, ended: str) -> Refusal:
    same = next((i for i, (a, b) in enumerate(zip(prompt, ended, strict=False)) if a != b), len(ended))
    return Refusal(
        "not_after_prompt",
        f"message {k} cannot follow its generation prompt: the served prompt goes on with {shown(prompt[same:])} "
        f"where the template renders the turn with {shown(ended[same:])}.",
    )


def framing(chat: ChatTemplate) -> str:
    """What the template writes around messages: of a question, and of the header of its answer all but what looks like
    an answer's own markup (`<think>`). Empty where it takes no such conversation."""
    question: list[dict[str, Any]] = [{"role": "user", "content": PROBE_USER}]
    try:
        with deadline(RENDER_SECONDS, "the chat template"):
            plain, prompt = (chat.render([question], generation_prompt=given)[0] for given in (False, True))
            between = probe(chat)[1].rpartition(PROBE_ANSWER)[2]
    except (TemplateError, TemplateTimeout):
        return ""
    header = prompt.removeprefix(plain)
    return f"{plain}\0{between}\0{TAG.sub('', header)}"


def answer_check(bundle: TokenizerBundle, chat: ChatTemplate, control: re.Pattern[str], *, allow: bool) -> AnswerCheck:
    """What a small conversation tells about the template: its headers, whether it knows generation prompts."""
    stops = bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids))
    with deadline(RENDER_SECONDS, "the chat template"):
        alone, followed = probe(chat)
        question: list[dict[str, Any]] = [{"role": "user", "content": PROBE_USER}]
        own_header, supplied = "", ""
        try:
            plain, prompt = (chat.render([question], generation_prompt=given)[0] for given in (False, True))
            if prompt == plain and alone.startswith(plain):
                own_header = alone[len(plain) : alone.rindex(PROBE_ANSWER)]
            elif prompt.startswith(plain):
                supplied = prompt[len(plain) :]
        except TemplateError:
            pass  # a template that wants a system message first; each row checks its own turns
    between = followed[followed.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :].partition(PROBE_NEXT)[0]
    for stop in stops:
        between = between.rpartition(stop)[2]
    header = between.strip()
    return AnswerCheck(
        stops, control, closes=bundle.closes, tail=bundle.tail,
        headers=[header] if control.search(header) else [],
        own_header=own_header if control.search(own_header) else "",
        supplied=supplied if control.search(supplied) else "",
        allow=allow, tool_cure=OWN_TOOLS if bundle.own_prints_tools else TOOL_TEMPLATES,
        foreign_end=bundle.foreign_end,
    )  # fmt: skip
