"""Reasoning in messages, and markers of reasoning in texts: `<think>`, `<|START_THINKING|>`, a thought channel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft.data.control import CLOSE, OPEN
from sft.data.proof import REASONING_FIELDS
from sft.types import Conversation, Message

MARKER = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\n]{1,40}\]|◁[^◁▷]{1,20}▷")
NAMES = re.compile("think|thought|reason|analysis", re.IGNORECASE)
LABELS = ("", "think", "thinking", "thought", "thoughts", "reasoning", "analysis")
ENDS = re.compile(r"[<\[◁]/|[<\[]\|?(?:END|end)[_ ]|<[^|].*\|>")
WORDS = re.compile(r"[\w ,.:;'’-]{1,80}")
COUNTERPARTS = (("<", "</"), ("[", "[/"), ("◁", "◁/"), ("START", "END"), ("start", "end"), ("BEGIN", "END"),
                ("begin", "end"), ("<|", "<"))  # fmt: skip
THINK, THINK_END = re.compile(f"{OPEN}?<think>{CLOSE}?"), re.compile(f"{OPEN}?</think>{CLOSE}?")


def split_content(content: str) -> tuple[str, str]:
    """(Reasoning, answer) of a content that spells `<think>…</think>` at its front; ("", content) of any other."""
    ends = list(THINK_END.finditer(content))
    if not ends:
        return "", content
    end = ends[-1]
    within, words = content[: end.start()], content[end.end() :]
    begun = THINK.match(within.lstrip())
    if begun is None and (THINK.search(within) or THINK_END.search(within)):
        return "", content
    thoughts = within.lstrip()[begun.end() :] if begun else within
    return thoughts.strip(), words.lstrip("\n")


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message brings, beside its content or at the front of it; empty where there is none."""
    for field in REASONING_FIELDS:
        value = message.get(field)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return split_content(message.get("content") or "")[0]


def without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without what `reasoning_of` finds."""
    rest = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    if isinstance(content := rest.get("content"), str):
        rest["content"] = split_content(content)[1]
    return rest


def drop_reasoning(sample: Conversation) -> tuple[Conversation, int]:
    """The conversation without reasoning, and of how many messages it was taken."""
    messages, dropped = [], 0
    for message in sample.messages:
        if message.role == "assistant" and reasoning_of(message.as_dict()):
            plain = without_reasoning(message.as_dict())
            extra = {key: value for key, value in plain.items() if key not in ("role", "content")}
            messages.append(Message(message.role, plain["content"], extra, message.train, message.weight))
            dropped += 1
        else:
            messages.append(message)
    return (replace(sample, messages=tuple(messages)), dropped) if dropped else (sample, 0)


def counterparts(marker: str) -> list[str]:
    """`</think>` for `<think>`, `<|END_THINKING|>` for `<|START_THINKING|>`, `<channel|>` for `<|channel>`."""
    found = [marker.replace(a, b, 1) for a, b in COUNTERPARTS if a in marker]
    found += ["<" + marker[2:-1] + "|>"] if marker.startswith("<|") and not marker.endswith("|>") else []
    return [other for other in found if other != marker]


def is_closed(block: str) -> bool:
    """Whether a text is a reasoning block with nothing in it: a start and an end marker, and a label at most."""
    block = block.strip()
    markers = list(MARKER.finditer(block))
    if len(markers) != 2 or markers[0].start() or markers[1].end() != len(block) or not NAMES.search(block):
        return False
    first, second = markers
    between = block[first.end() : second.start()].strip()
    return between in LABELS and second.group() in counterparts(first.group())


def is_opening(block: str) -> bool:
    """Whether a text is one marker, or one line of words, that names reasoning."""
    block = block.strip()
    return bool(NAMES.search(block) and (WORDS.fullmatch(block) or (MARKER.fullmatch(block) and not ENDS.match(block))))


def derived_closing(block: str, template: str) -> str | None:
    """The closing text of a block of which the template shows the opening alone; None where it never reads one."""
    marker = block.strip()
    if not MARKER.fullmatch(marker):
        return None
    end = next((other for other in counterparts(marker) if other in template), None)
    broken = block.endswith("\n")
    return None if end is None else f"\n{end}\n\n" if broken else end


def shared_length(one: str, other: str) -> int:
    """How far two texts are the same, never ending within a marker of either."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for match in MARKER.finditer(text, max(0, length - 64)):
            if match.start() < length < match.end():
                length = match.start()
    return length


def dense(text: str) -> str:
    """A text without its blanks, which templates set otherwise in prompts than in turns."""
    return "".join(text.split())


def beginning(text: str, wanted: str) -> str | None:
    """The beginning of a text that is another but for blanks, with the blanks at its end where they are the same."""
    if text.startswith(wanted):
        return wanted
    place = 0
    for character in dense(wanted):
        place += len(text) - place - len(text[place:].lstrip())
        if not text.startswith(character, place):
            return None
        place += 1
    blanks = trailing_blanks(wanted)
    return text[: place + len(blanks)] if text.startswith(blanks, place) else text[:place]


def trailing_blanks(text: str) -> str:
    return text[len(text.rstrip()) :]


def opening_of(prompt: str) -> str:
    """The last marker of a prompt, or the line behind it, with the blanks at its end."""
    text = prompt.rstrip()
    begun = max((match.start() for match in MARKER.finditer(text, max(0, len(text) - 96))), default=0)
    return prompt[max(begun, text.rfind("\n") + 1) :]


def opens(prompt: str) -> bool:
    """Whether a prompt ends with an opening."""
    return is_opening(opening_of(prompt))
