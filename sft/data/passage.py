"""Rows without a template: text as it is, beginning as the tokenizer begins texts, ending with end-of-text.

Prompt and completion are tokenised apart, since a model that is given the prompt alone is given exactly these ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.data.control import ControlTokens, encode, encode_after, encode_marked
from sft.data.proof import Refusal, check_characters
from sft.errors import DataError
from sft.types import Passage


@dataclass(frozen=True)
class PassageIds:
    """Ids of a passage; what follows `start` is trained and must decode to `text`."""

    ids: tuple[int, ...]
    start: int
    text: str
    spelled: Mapping[str, int] = field(default_factory=dict)


def passage_ids(
    passage: Passage, tokenizer: Any, control: ControlTokens, *, mode: str, policy: str, end_of_text: int
) -> PassageIds:
    """Ids of a passage under a control token mode and a mask policy. Raises Refusal."""
    if passage.kind == "text" and policy in ("completion", "assistant", "last_assistant"):
        raise Refusal(
            "nothing_trained", f"a text row has nothing that data.train_on: {policy} trains. Set train_on: auto or all."
        )
    check_characters(passage.prompt + passage.completion)
    spelled: dict[str, int] = {}
    if mode != "allow":
        for token in control.spelled([passage.prompt, passage.completion], answer=False):
            spelled[token] = spelled.get(token, 0) + 1
    if spelled and mode == "error":
        tokens = ", ".join(spelled)
        raise Refusal("control_tokens", f"the text spells control tokens: {tokens}. Set control_tokens_in_text: text.")
    front = opening(tokenizer)
    prompt = ids_of(tokenizer, control, passage.prompt, bool(spelled), behind=False)
    completion = ids_of(tokenizer, control, passage.completion, bool(spelled), behind=bool(prompt))
    if mode == "allow" and front and (prompt or completion)[: len(front)] == front:
        front = []  # the text brings its own BOS: one, never two
    ids = (*front, *prompt, *completion, end_of_text)
    end = tokenizer.convert_ids_to_tokens(end_of_text)
    if policy == "all" or passage.kind == "text":
        return PassageIds(ids, len(front), passage.prompt + passage.completion + end, spelled)
    return PassageIds(ids, len(front) + len(prompt), passage.completion + end, spelled)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: BOS, or nothing."""
    bare, dressed = encode(tokenizer, "a"), tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []


def ids_of(tokenizer: Any, control: ControlTokens, text: str, marked: bool, *, behind: bool) -> list[int]:
    if not text:
        return []
    if not marked:
        return encode_after(tokenizer, text) if behind else encode(tokenizer, text)
    try:
        text = control.mark(text, answer=False)
        return encode_marked(tokenizer, control, text, behind=behind)
    except DataError as error:
        raise Refusal("control_tokens", str(error)) from error
