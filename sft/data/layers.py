"""What a chat template leaves out of a row: each text of the row is in its examples, or it is named.

A template that does not know a role, a key or tools writes nothing in their place and says nothing. Where the answers
depend on what is missing (instructions, tools, results, reasoning of a trained answer) the row is refused; the rest
becomes a note of action `unread`, one for each key path of the row.

Two tests decide. The words are looked for in the examples (`evidence`). And the first time that a message of some role
stands at such a place, its words are replaced by a sentinel in one more rendering: words that are found may stand there
for another reason, and words that are not found may have been changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sft.data.evidence import Evidence, leaves
from sft.data.outcome import reasoning_note
from sft.data.proof import REASONING_FIELDS, TOOL_TEMPLATES, Refusal, left_out, shown
from sft.data.render import Dicts, Renderer, Tools
from sft.errors import TemplateError
from sft.templating import reads
from sft.types import Conversation, Note

BOOKKEEPING = frozenset(("id", "tool_call_id", "call_id", "index", "uuid", "message_id", "parent_id", "timestamp"))
OF_CALLS = frozenset((*BOOKKEEPING, "type"))
FREE_KEYS = frozenset(("properties", "$defs", "definitions", "arguments"))
MOST_TOOL_LISTS = 64
LAST_TURNS = 8
REASONS = {
    "system": "layer_left_out",
    "developer": "layer_left_out",
    "user": "message_left_out",
    "tool": "tool_result_left_out",
}
SENTINEL = re.compile(r"vqxk(\d+)kxqv")


class Shape(NamedTuple):
    """What decides whether a template prints a message, as far as is known without reading it."""

    role: str
    first: bool
    behind: str
    with_tools: bool
    last_question: bool


@dataclass
class Given:
    """A row and what its examples hold. `answers`: by trained message, the text of its turn as it is trained."""

    sample: Conversation
    messages: Dicts
    tools: Tools
    answers: Mapping[int, str]
    texts: Sequence[str]
    proven: bool = True
    """Whether the trained turns have been held against their messages already."""
    together: bool = True
    notes: dict[str, Note] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.sample.source

    def unread(self, path: str, words: Any, why: str = "") -> None:
        self.notes.setdefault(path, Note(self.source, "unread", path, shown(str(words)) + why))


class Layers:
    """What one template is known to print, and the judgement of rows by it."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.printed: dict[Shape, bool] = {}
        self.prints_tools: bool | None = None
        self.tool_blocks: dict[str, str] = {}
        self.names = reads(renderer.chat.text) | reads(renderer.chat.with_tools)
        self.written = renderer.chat.text + renderer.chat.with_tools

    def judge(self, given: Given) -> list[Note]:
        """Notes of what no example holds. Raises Refusal where the answers depend on it."""
        evidence = Evidence(given.texts)
        self.judge_messages(given, evidence)
        if given.tools:
            self.judge_tools(given, evidence)
        for index, message in enumerate(given.messages):
            if len(message) > 2:
                self.judge_extras(given, evidence, index, message)
            if message["role"] == "assistant" and (len(message) > 2 or "</think>" in message["content"]):
                self.judge_reasoning(given, evidence, index, message)
        for name, value in given.sample.template_args.items():
            if name not in self.names:
                given.unread(f"chat_template_kwargs.{name}", value, ": the template never reads it")
        return list(given.notes.values())

    # -- messages

    def judge_messages(self, given: Given, evidence: Evidence) -> None:
        messages, answers = given.messages, given.answers
        last_trained = max(answers, default=len(messages))
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        missing: list[int] = []
        unknown: dict[Shape, int] = {}
        behind = ""
        for index, message in enumerate(messages):
            role, before, behind = message["role"], behind, message["role"]
            if index in answers and given.proven:
                continue
            words = message["content"].strip()
            if not words:
                continue
            if role == "assistant" and "</think>" in words:
                words = words.rpartition("</think>")[2].strip()
            if not given.together and index > last_trained:
                if not evidence.passes(words):
                    given.unread("messages[].content", words, ": it stands behind the last trained answer")
                continue
            shape = Shape(role, not index, before, bool(given.tools), index >= last_user)
            if not evidence.passes(words) and not evidence.holds(words):
                missing.append(index)
            elif (known := self.printed.get(shape)) is None:
                unknown.setdefault(shape, index)
            elif not known:
                missing.append(index)
        if missing or unknown:
            self.judge_by_sentinels(given, missing, unknown)

    def judge_by_sentinels(self, given: Given, missing: Sequence[int], unknown: Mapping[Shape, int]) -> None:
        """Replaces words by sentinels where they were not found, or where this template was not yet seen to print such
        a message."""
        there = self.sentinels_printed(given, (*missing, *unknown.values()))
        for shape, index in unknown.items():
            self.printed[shape] = there is None or index in there
        for index in sorted(missing if there is None else {*missing, *unknown.values()} - there):
            message = given.messages[index]
            if message["role"] == "assistant":
                given.unread("messages[].content", message["content"], ": the template leaves this answer out")
                continue
            raise Refusal(
                REASONS.get(message["role"], "message_left_out"),
                f"message {index} ({message['role']}) says {shown(message['content'])}, which the template leaves out: "
                f"its answers would be trained without it."
                + (f" {TOOL_TEMPLATES}" if message["role"] == "tool" else ""),
            )

    def sentinels_printed(self, given: Given, indices: Sequence[int]) -> set[int] | None:
        """Those of the messages whose words, replaced by a sentinel, are printed; None where that can't be rendered."""
        messages = [dict(message) for message in given.messages]
        for index in indices:
            messages[index]["content"] = sentinel(index)
        try:
            texts = self.rendered(messages, given)
        except TemplateError:
            return None
        return {int(number) for text in texts for number in SENTINEL.findall(text)}

    def rendered(self, messages: Dicts, given: Given) -> list[str]:
        """The texts that a row's examples would be made of, in lower case."""
        chat = self.renderer.chat
        if given.together or not given.answers:
            texts = chat.render([messages], given.tools, generation_prompt=False)
        else:
            prompts = [messages[:k] for k in sorted(given.answers)[-LAST_TURNS:]]
            texts = chat.render(prompts, given.tools, generation_prompt=True)
        return [text.lower() for text in texts]

    # -- tools

    def judge_tools(self, given: Given, evidence: Evidence) -> None:
        """All words of the tools; a list of tools that came before is known by the text that it was printed as."""
        key = repr(given.tools)
        if self.prints_tools and self.tool_blocks.get(key, "\0") in evidence.text:
            return
        names = [tool["function"]["name"] for tool in given.tools if "name" in tool.get("function", ())]
        lost = [name for name in names if not evidence.holds(name)]
        if not lost and not self.prints_tools and self.tools_are_printed(given) is False:
            lost = names
        if lost:
            raise Refusal(
                "tools_left_out",
                f"the row has tools ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), and the template prints "
                f"no {lost[0]}: its answers would be trained without. {TOOL_TEMPLATES}",
            )
        whole = True
        for path, value in leaves(given.tools, "tools", FREE_KEYS):
            words = value.strip() if isinstance(value, str) and not path.endswith(".type") else ""
            if words and not evidence.holds(words):
                given.unread(path, words)
                whole = False
        if whole and (block := printed_whole(given.tools, evidence.text)):
            if len(self.tool_blocks) >= MOST_TOOL_LISTS:
                self.tool_blocks.clear()
            self.tool_blocks[key] = block

    def tools_are_printed(self, given: Given) -> bool | None:
        """Whether tools whose names are sentinels are printed, which is then known; None where that can't be told."""
        renamed = [{**tool, "function": {**tool["function"], "name": sentinel(0)}} for tool in given.tools]
        try:
            texts = self.rendered(given.messages, replace(given, tools=renamed))
        except TemplateError:
            return None
        self.prints_tools = any(sentinel(0) in text for text in texts)
        return self.prints_tools

    # -- other keys of a message

    def judge_extras(self, given: Given, evidence: Evidence, index: int, message: Mapping[str, Any]) -> None:
        answer = given.answers.get(index)
        reasoning = thoughts_of(message) if message["role"] == "assistant" else None
        for key, value in message.items():
            if key == "tool_calls":
                self.judge_calls(given, evidence if answer is None else Evidence([answer]), index, value)
            elif key not in ("role", "content") and key not in BOOKKEEPING:
                if key in REASONING_FIELDS and isinstance(value, str) and value == reasoning:
                    continue  # judged by what it is
                self.judge_leaves(given, evidence, value, f"messages[].{key}", known=key in self.written)

    def judge_leaves(self, given: Given, evidence: Evidence, value: Any, path: str, *, known: bool) -> None:
        for where, leaf in leaves(value, path):
            if isinstance(leaf, str):
                if leaf.strip() and not evidence.holds(leaf.strip()):
                    given.unread(where, leaf)
            elif leaf is not None and not known:
                given.unread(where, leaf)

    def judge_reasoning(self, given: Given, evidence: Evidence, index: int, message: Mapping[str, Any]) -> None:
        """Of an earlier answer it is counted, since many templates drop it; of a trained one it is what was to be
        learned. Where all is trained, the last answer is the one that is asked for."""
        answer = given.answers.get(index)
        if answer is None or (not given.proven and index != max(given.answers)):
            if all(left_out(message, text) for text in evidence.texts):
                given.notes.setdefault("reasoning", reasoning_note(given.source, index))
        elif left_out(message, answer):
            raise self.reasoning_refusal(given, index)

    def reasoning_refusal(self, given: Given, index: int) -> Refusal:
        return Refusal(
            "reasoning_left_out",
            f"message {index} has reasoning, {shown(str(thoughts_of(given.messages[index])))}, which the template "
            "leaves out of the answer that is trained.",
        )

    def judge_calls(self, given: Given, evidence: Evidence, index: int, calls: Sequence[Mapping[str, Any]]) -> None:
        for path, value in leaves(calls, "messages[].tool_calls", FREE_KEYS):
            key = path.rpartition(".")[2].rstrip("[]")
            if not isinstance(value, str) or not value.strip() or (key in OF_CALLS and ".arguments." not in path):
                continue
            if evidence.holds(value.strip()):
                continue
            if index in given.answers and ".function." in path:
                raise Refusal(
                    "tool_calls_not_rendered",
                    f"message {index}: expected {shown(value)} in the turn, which calls a tool with it. "
                    f"{TOOL_TEMPLATES}",
                )
            given.unread(path, value)


def sentinel(index: int) -> str:
    """A word that no row holds, in lower case."""
    return f"vqxk{index}kxqv"


def printed_whole(tools: Tools, text: str) -> str:
    """The stretch of a text that holds all tools as JSON; empty where they are written otherwise."""
    dumped = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    places = [text.find(one) for one in dumped]
    if min(places) < 0:
        return ""
    return text[min(places) : max(place + len(one) for place, one in zip(places, dumped, strict=True))]


def thoughts_of(message: Mapping[str, Any]) -> Any:
    """The reasoning that a message brings beside its content, else what stands within it."""
    beside = next((message[key] for key in REASONING_FIELDS if message.get(key)), None)
    return beside if beside is not None else message["content"].rpartition("</think>")[0].replace("<think>", "").strip()
