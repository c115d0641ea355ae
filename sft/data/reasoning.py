"""Reasoning blocks: what a served prompt that opens or closes one says of the answer behind it.

Some templates end their prompts with more than the header of the turn: with an empty block that is closed already
(`<think></think>`, an empty thought channel), or with the beginning of one (`<think>`). Where the template renders the
complete turn otherwise, the answer is no continuation of the prompt as text. What it is instead is found by rendering:
the same turn with a reasoning that occurs nowhere else (a sentinel) shows where reasoning stands, and what the template
writes between it and the answer.

- Closed: the turn's own text follows the served prompt.
- Open: reasoning, the template's closing text and the turn follow it; without reasoning the closing text comes first,
  if `data.reasoning` allows that, since it teaches the model not to think.
- The template renders earlier messages otherwise in the prompt than before the complete turn: the served prompt counts,
  and the turn's own text follows it.

A template may leave reasoning out of complete turns altogether (QwQ, DeepSeek R1). Then the closing text is the
counterpart of the marker that the prompt opens, with the blanks of the opening: `<think>\\n` … `\\n</think>\\n\\n`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sft.data.proof import REASONING_FIELDS, AnswerCheck, Refusal, shown
from sft.data.thoughts import (
    MARKER,
    NAMES,
    beginning,
    dense,
    derived_closing,
    is_closed,
    is_opening,
    opening_of,
    opens,
    reasoning_of,
    shared_length,
    trailing_blanks,
    without_reasoning,
)
from sft.errors import TemplateError
from sft.templating import ChatTemplate, MarkedText, read_markup

FIRST, SECOND = "Qmarimba7xylophone", "Zbassoon4piccolo"  # answers that share no letter at their start
THOUGHT, OTHER_THOUGHT = "Vglockenspiel3", "Kaccordion8"

Choice = Literal["train", "context", "drop", "close"]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Kind = Literal["closed_block", "reasoning_closed", "reasoning_continued", "history"]


@dataclass(frozen=True)
class Lead:
    """How an answer follows a served prompt that is no beginning of the rendered turn.

    `text` stands before the turn's own text, of which `hidden` characters are context. `block`: what the prompt ends
    with.
    """

    kind: Kind
    text: str
    block: str
    hidden: int = 0


@dataclass(frozen=True)
class Found:
    """A turn behind its served prompt: `ended[start:]`, cut at its stop token, behind `lead.text`. `message`: as it was
    rendered, with reasoning taken out where that is in the lead."""

    lead: Lead
    ended: MarkedText
    start: int
    message: Mapping[str, Any]


@dataclass(frozen=True)
class Closing:
    """A turn rendered with a sentinel for its reasoning: the text with where that stands, and what the template writes
    between a reasoning and an answer."""

    ended: MarkedText
    place: int
    text: str

    @property
    def head(self) -> str:
        return self.ended.text[: self.place]

    @property
    def behind(self) -> int:
        return self.place + len(THOUGHT)


def written_between(text: str, thought: str, said: str) -> str | None:
    """What stands between a reasoning and the answer behind it; None where that does not come once."""
    between, found, _ = text.partition(thought)[2].partition(said)
    return between if found and text.count(said) == 1 else None


def beside(fields: Sequence[str], message: Mapping[str, Any], thought: str) -> dict[str, Any]:
    """The message with a reasoning beside its content."""
    return {**message, **dict.fromkeys(fields, thought)}


def within(message: Mapping[str, Any], thought: str) -> dict[str, Any]:
    """The message with a reasoning at the front of its content."""
    return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message.get('content') or ''}"}


class Blocks:
    """Answers behind prompts that are no beginning of the rendered turn, with one template."""

    def __init__(self, chat: ChatTemplate, check: AnswerCheck, choice: Choice | None, marked: Sequence[bool]) -> None:
        self.chat, self.check, self.choice, self.marked = chat, check, choice, marked
        self.names_reasoning = bool(NAMES.search(chat.text + chat.with_tools))
        self.reads_content = any("</think>" in read_markup(text) for text in {chat.text, chat.with_tools})
        self.small: dict[bool, str | None] = {}
        self.renders: dict[bool, bool] = {}

    # -- renderings

    def ended(self, conversations: Sequence[Messages], tools: Tools) -> list[MarkedText | None]:
        """Each conversation rendered whole; None where the template objects."""
        found: list[MarkedText | None] = []
        for messages in conversations:
            try:
                if self.marked[bool(tools)]:
                    found += self.chat.render_marked([messages], tools)
                else:
                    found += map(MarkedText, self.chat.render([messages], tools, generation_prompt=False))
            except TemplateError:
                found.append(None)
        return found

    def head(self, before: Messages, tools: Tools) -> str | None:
        """What the template renders before the answer of the next turn; None where that cannot be told."""
        texts = self.ended([[*before, {"role": "assistant", "content": s}] for s in (FIRST, SECOND)], tools)
        if texts[0] is None or texts[1] is None:
            return None
        heads = [t.text[: t.text.find(s)] if t.text.count(s) == 1 else None
                 for t, s in zip((texts[0], texts[1]), (FIRST, SECOND), strict=True)]  # fmt: skip
        return heads[0] if heads[0] == heads[1] else None

    def closing(self, before: Messages, message: Mapping[str, Any], tools: Tools) -> Closing | None:
        """The turn with a sentinel for its reasoning, in the first way in which the template renders one.

        None where it renders none before the answer, or writes something there that changes with either of them.
        """
        pairs = ((THOUGHT, FIRST), (THOUGHT, SECOND), (OTHER_THOUGHT, FIRST))
        for given in self.ways():
            asked = [[*before, given({"role": "assistant", "content": said}, thought)] for thought, said in pairs]
            texts = ["" if text is None else text.text for text in self.ended(asked, tools)]
            if any(text.count(thought) != 1 for text, (thought, _) in zip(texts, pairs, strict=True)):
                continue  # it reads reasoning otherwise
            between = {written_between(text, *pair) for text, pair in zip(texts, pairs, strict=True)}
            constant = between.pop() if len(between) == 1 else None
            if constant is None or not constant.strip():
                return None
            own = self.ended([[*before, given(message, THOUGHT)]], tools)[0]
            if own is None or own.text.count(THOUGHT) != 1:
                continue
            place = own.text.index(THOUGHT)
            behind = own.text[place + len(THOUGHT) :]
            written = beginning(behind, constant)
            if written is None and not message.get("content"):  # a call is closed in part as an answer is
                same = shared_length(behind.lstrip(), constant.lstrip())
                written = behind[: len(behind) - len(behind.lstrip()) + same]
            if written and written.strip():
                return Closing(own, place, written)
        return None

    def renders_reasoning(self, before: Messages, tools: Tools) -> bool:
        """Whether the template renders the reasoning of an answer anywhere."""
        if bool(tools) not in self.renders:
            asked = [[*before, given({"role": "assistant", "content": FIRST}, THOUGHT)] for given in self.ways()]
            self.renders[bool(tools)] = any(t is not None and THOUGHT in t.text for t in self.ended(asked, tools))
        return self.renders[bool(tools)]

    def between(self, before: Messages, message: Mapping[str, Any], tools: Tools) -> str | None:
        """What the template writes between the reasoning of a turn and its answer."""
        found = self.closing(before, without_reasoning(message), tools)
        return None if found is None else found.text

    def ways(self) -> list[Callable[[Mapping[str, Any], str], dict[str, Any]]]:
        """The ways to give a template reasoning: fields that it reads, all at once or one alone, or in the content."""
        text = self.chat.text + self.chat.with_tools
        fields = [field for field in REASONING_FIELDS if field in text]
        groups = [fields, *([field] for field in fields if len(fields) > 1)] if fields else []
        return [partial(beside, group) for group in groups] + ([within] if self.reads_content else [])

    # -- one turn

    def behind(self, messages: Messages, k: int, tools: Tools, prompt: str, ended: MarkedText) -> Found | None:
        """The turn of message k behind its served prompt; None where the prompt's end is not understood.

        `ended`: messages[:k+1] as the template renders them. Raises Refusal where the rows or `data.reasoning` do not
        go with the prompt.
        """
        before, message = messages[:k], messages[k]
        thoughts = reasoning_of(message)
        plain = without_reasoning(message) if thoughts else message
        bare = self.ended([[*before, plain]], tools)[0] if thoughts else ended
        head = self.head(before, tools)
        if bare is None or head is None:
            return None
        if thoughts and bare.text.startswith(prompt):
            return self.closed(k, thoughts, ended, bare, prompt, len(prompt), plain, dropped=False)
        length = shared_length(prompt, head)
        block = prompt[length:]
        closing = self.closing(before, plain, tools)
        rendered, asked = "" if closing is None else dense(closing.head), dense(prompt)
        generated = self.generated(before, tools, prompt)
        if closing is not None and (
            (rendered == asked and dense(head) != asked)
            or (is_opening(block) and rendered == dense(prompt[:length]))
            or (rendered.endswith(dense(generated)) and opens(generated) and not head.endswith(generated))
        ):
            return self.opened(k, thoughts, closing, prompt, plain)
        if closing is not None and asked.startswith(rendered) and bare.text.startswith(prompt[:length]):
            rest = asked[len(rendered) :]
            if rest and dense(closing.text).startswith(rest) and MARKER.search(rest):
                return self.closed(k, thoughts, ended, bare, block, self.own(head, length, block), plain)
        if bare.text.startswith(prompt[:length]):
            if is_closed(block):
                return self.closed(k, thoughts, ended, bare, block, self.own(head, length, block), plain)
            end = derived_closing(block, self.chat.text) if is_opening(block) else None
            if end is not None and closing is None and not self.renders_reasoning(before, tools):
                return self.derived(k, thoughts, bare, block, end, self.own(head, length, end), plain)
        return self.after_history(messages[: k + 1], k, tools, ended, bare, prompt, head, generated, plain)

    def generated(self, before: Messages, tools: Tools, prompt: str) -> str:
        """What the generation prompt adds to the messages; empty where that cannot be told."""
        alone = self.ended([before], tools)[0]
        return prompt[len(alone.text) :] if alone is not None and prompt.startswith(alone.text) else ""

    @staticmethod
    def own(head: str, length: int, block: str) -> int:
        """Where the turn's own text begins: behind what prompt and turn share, and behind an end of the block that the
        template writes before an answer, too."""
        written = head[length:].strip()
        return len(head) if written and block.strip().endswith(written) else length

    def closed(
        self, k: int, thoughts: str, ended: MarkedText, bare: MarkedText, block: str, start: int,
        message: Mapping[str, Any], *, dropped: bool = True,
    ) -> Found | None:  # fmt: skip
        """Behind a block that is closed already: the turn without reasoning."""
        if thoughts and (ended.text != bare.text or self.choice in ("train", "context")):
            raise Refusal(
                "not_after_prompt",
                f"message {k} has reasoning, but no reasoning can follow its generation prompt, which ends with "
                f"{shown(block[-40:])}.",
            )
        return Found(Lead("closed_block" if dropped else "history", "", block), bare, start, message)

    def opened(self, k: int, thoughts: str, closing: Closing, prompt: str, message: Mapping[str, Any]) -> Found:
        """Behind a block that the prompt opens, where the template renders reasoning."""
        block = prompt[len(prompt) - len(opening_of(prompt)) :]
        blanks, missing = trailing_blanks(prompt), trailing_blanks(closing.head)
        lead = missing[len(blanks) :] if missing.startswith(blanks) else ""
        if thoughts:
            self.check_continuing(k, block)
            hidden = len(lead) + len(thoughts) + len(closing.text) if self.choice == "context" else 0
            return Found(
                Lead("reasoning_continued", lead + thoughts, block, hidden), closing.ended, closing.behind, message
            )
        self.check_closing(k, block)
        return Found(Lead("reasoning_closed", lead, block), closing.ended, closing.behind, message)

    def derived(
        self, k: int, thoughts: str, bare: MarkedText, block: str, end: str, start: int, message: Mapping[str, Any]
    ) -> Found:
        """Behind a block that the prompt opens, where the template leaves reasoning out of every turn."""
        if thoughts:
            self.check_continuing(k, block)
            hidden = len(thoughts) + len(end) if self.choice == "context" else 0
            return Found(Lead("reasoning_continued", thoughts + end, block, hidden), bare, start, message)
        self.check_closing(k, block)
        return Found(Lead("reasoning_closed", end, block), bare, start, message)

    def check_continuing(self, k: int, block: str) -> None:
        """Raises Refusal where nobody has said what becomes of reasoning that the template does not render so."""
        if self.choice is None:
            raise Refusal(
                "not_after_prompt",
                f"message {k}: its generation prompt opens reasoning with {shown(block)}, and the template does not "
                "render the message's own so: whether it is trained is for you to say.",
            )

    def check_closing(self, k: int, block: str) -> None:
        """Raises Refusal where an answer without reasoning may not close the block."""
        if self.choice not in ("close", "drop"):
            raise Refusal(
                "not_after_prompt",
                f"message {k} has no reasoning, and its generation prompt opens a block of it with "
                f"{shown(block)}: whether the model is to think is for you to say.",
            )

    def after_history(
        self, messages: Messages, k: int, tools: Tools, ended: MarkedText, bare: MarkedText, prompt: str, head: str,
        generated: str, message: Mapping[str, Any],
    ) -> Found | None:  # fmt: skip
        """Where prompt and turn differ in earlier messages: the turn behind the same header, closed block or not."""
        between = self.small_between(tools)
        if between is None or not head.endswith(between):
            return None
        if not generated.strip():
            return self.after_words(messages, ended, prompt, head[: len(head) - len(between)])
        markers = list(MARKER.finditer(generated))
        cut = markers[-2].start() if len(markers) > 2 and is_closed(generated[markers[-2].start() :]) else None
        header, block = (generated, "") if cut is None else (generated[:cut], generated[cut:])
        if not header.strip() or not head.endswith(header + between):
            return None
        start = len(head) - len(between)
        if block:
            thoughts = reasoning_of(messages[k])
            return self.closed(k, thoughts, ended, bare, block, start, message) if bare.text.startswith(head) else None
        if not ended.text.startswith(head[:start]):
            return None
        return Found(Lead("history", "", generated), ended, start, messages[k])

    @staticmethod
    def after_words(messages: Messages, ended: MarkedText, prompt: str, head: str) -> Found | None:
        """Where the template has no header of its own for answers: behind the same last message, whole in both."""
        words = str(messages[-2].get("content") or "").strip()
        length = next((i for i, (a, b) in enumerate(zip(reversed(prompt), reversed(head), strict=False)) if a != b),
                      min(len(prompt), len(head)))  # fmt: skip
        same = prompt[len(prompt) - length :]
        if not words or words not in same or same.rstrip().endswith(words) or not ended.text.startswith(head):
            return None
        return Found(Lead("history", "", ""), ended, len(head), messages[-1])

    def small_between(self, tools: Tools) -> str | None:
        """What the template writes between the header of a turn and its answer, in a small conversation."""
        if bool(tools) not in self.small:
            asked = [{"role": "user", "content": OTHER_THOUGHT}]
            try:
                prompt = self.chat.render([asked], tools, generation_prompt=True)[0]
                head = self.head(asked, tools)
            except TemplateError:
                head = None
            same = 0 if head is None else shared_length(prompt, head)
            self.small[bool(tools)] = None if head is None else head[same:]
        return self.small[bool(tools)]
