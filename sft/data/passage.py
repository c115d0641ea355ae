"""Rows without a template: text as it is, beginning as the tokenizer begins texts, ending with end-of-text.

Prompt and completion are tokenised apart, since a model that is given the prompt alone is given exactly these ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft.data.control import ControlTokens, encode, encode_after, encode_marked
from sft.data.outcome import Encoded, EncodeSettings, cut_note, spelled_note, too_long, unknown_notes
from sft.data.proof import Decoder, Refusal, check_characters, shown
from sft.data.rendered import ends_with, is_rendered, rendered_note
from sft.errors import DataError
from sft.types import Example, Passage


@dataclass(frozen=True)
class PassageIds:
    """Ids of a passage; what follows `start` is trained and must decode to `text`."""

    ids: tuple[int, ...]
    start: int
    text: str
    spelled: Mapping[str, int] = field(default_factory=dict)


def encoded_passage(
    sample: Passage, tokenizer: Any, control: ControlTokens, decoder: Decoder, settings: EncodeSettings, *,
    stops: Sequence[int],
) -> Encoded:  # fmt: skip
    """The example of a row without a template, proven and cut to length. `stops[0]` ends it. Raises Refusal."""
    if not sample.weight:
        raise Refusal("nothing_trained", "the row asks not to be trained: train: false or weight: 0")
    found = passage_ids(sample, tokenizer, control, mode=settings.control_tokens_in_text, policy=settings.train_on,
                        stops=stops)  # fmt: skip
    decoded = decoder([found.ids[found.start :]])[0]
    if not decoder.same(decoded, found.text):
        raise Refusal("unprovable", f"expected the trained tokens to decode to {shown(found.text)}, found "
                                    f"{shown(decoded)}. The tokenizer does not give this text back.")  # fmt: skip
    notes = [spelled_note(sample.source, found.spelled)] if found.spelled else []
    if settings.control_tokens_in_text == "text" and (text := rendered_text(sample, tokenizer, stops)):
        notes.append(rendered_note(sample.source, shown(text)))
    notes += unknown_notes(sample.source, decoder.unknown(found.ids[found.start :], found.text))
    length, limit = len(found.ids), settings.max_tokens
    if length > limit and (settings.over_long != "truncate" or found.start >= limit):
        return too_long(sample.source, length, settings)
    if length > limit:
        notes.append(cut_note(sample.source, length, limit))
    weights_T = np.zeros(length, dtype=np.float32)
    weights_T[found.start :] = sample.weight
    ids_T = np.asarray(found.ids, dtype=np.int32)
    return Encoded((Example(ids_T[:limit], weights_T[:limit], sample.source),), tuple(notes))


def rendered_text(sample: Passage, tokenizer: Any, stops: Sequence[int]) -> str:
    """The text of a row that holds a rendered chat template, else nothing."""
    if is_rendered(sample.prompt or sample.completion, tokenizer.bos_token):
        return sample.prompt or sample.completion
    return sample.completion if ends_with(sample.completion, tokenizer.convert_ids_to_tokens(list(stops))) else ""


def passage_ids(
    passage: Passage, tokenizer: Any, control: ControlTokens, *, mode: str, policy: str, stops: Sequence[int]
) -> PassageIds:
    """Ids of a passage under a control token mode and a mask policy. It ends with `stops[0]`; where control tokens are
    allowed and the text brings any of `stops` at its end, with that alone. Raises Refusal."""
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
    completed, end_ids, end = passage.completion, [stops[0]], tokenizer.convert_ids_to_tokens(stops[0])
    if mode == "allow" and ends_with(completed, tokenizer.convert_ids_to_tokens(list(stops))):
        completed, end_ids, end = completed.rstrip(), [], ""
    completion = ids_of(tokenizer, control, completed, bool(spelled), behind=bool(prompt))
    if mode == "allow" and front and (prompt or completion)[: len(front)] == front:
        front = []  # the text brings its own BOS: one, never two
    ids = (*front, *prompt, *completion, *end_ids)
    if policy == "all" or passage.kind == "text":
        return PassageIds(ids, len(front), passage.prompt + completed + end, spelled)
    return PassageIds(ids, len(front) + len(prompt), completed + end, spelled)


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
