"""Rows that bring a rendered chat template as text: `<|im_start|>user …`, `<s>[INST] …`, an answer with its `</s>`.

Under `data.control_tokens_in_text: text` their markup is spelled in ordinary characters, which is hardly meant and is
told; under `allow` it becomes tokens, and the end token that such a text brings is the only one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sft.advice import RENDERED
from sft.types import Conversation, Note

HEADER = re.compile(
    r"\s*(?:(?:<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)\s*)?"
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|start\|>|<\|start_of_role\|>|\[INST\]|<<SYS>>|"
    r"<\|START_OF_TURN_TOKEN\|>|<\|header_start\|>|<｜User｜>|<\|(?:system|user|assistant)\|>)"
)
"""How a text begins that a chat template rendered, in the families of templates that are about."""


def is_rendered(text: str, bos: str | None) -> bool:
    """Whether a text begins with a header of some template, or with BOS."""
    return HEADER.match(text) is not None or bool(bos and text.lstrip().startswith(bos))


def ends_with(text: str, stops: Sequence[str]) -> str:
    """The end token that a text brings at its end, blanks aside; empty where there is none."""
    end = text.rstrip()
    return next((stop for stop in stops if end.endswith(stop)), "")


def rendered_note(source: str, shown: str) -> Note:
    what = f"holds a rendered chat template, whose tokens become ordinary characters: {shown}"
    return Note(source, "altered", RENDERED, what)


def rendered_message(sample: Conversation, bos: str | None, stops: Sequence[str]) -> str:
    """Where a conversation's own texts hold what its template would write: the text, or nothing.

    Looked at in rows that spell control tokens only.
    """
    for message in sample.messages:
        if is_rendered(message.content, bos):
            return message.content
        if message.role == "assistant" and ends_with(message.content, stops):
            return message.content
    return ""


def one_end(sample: Conversation, stops: Sequence[str]) -> tuple[Conversation, list[Note]]:
    """The row without end tokens that its answers bring themselves, since the end of a turn is written behind them."""
    messages = list(sample.messages)
    found = ""
    for index, message in enumerate(messages):
        while message.role == "assistant" and (stop := ends_with(message.content, stops)):
            message = replace(message, content=message.content.rstrip().removesuffix(stop))
            messages[index], found = message, stop
    if not found:
        return sample, []
    note = Note(sample.source, "altered", "end_token_once", f"its answers end with {found}, which is not trained twice")
    return replace(sample, messages=tuple(messages)), [note]
