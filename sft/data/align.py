"""Where the ids of a served prompt end within the ids of the whole conversation.

A tokenizer takes its added tokens out of a text first and encodes what lies between them on its own. So the ids of a
prompt are those of the whole text up to the prompt's last added token, then those of the short tail behind it
(`assistant\\n`), which is encoded once and remembered. Whether the whole text goes on with exactly these ids is looked
up, and where a text has no such token, or text and ids disagree on them, the prompt is encoded for real. `Encoder`
also encodes the prompts of its first rows for real, and stops trusting this file where one differs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from sft.data.control import encode, spelled_pattern

REMEMBERED = 4096
LONGEST_REMEMBERED = 64


class Aligner:
    """Finds the length in ids of a text that another text starts with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self.added = frozenset(self.ids.values())
        self.pattern = spelled_pattern(list(self.ids))
        self.tails: dict[tuple[str, str], list[int] | None] = {}
        self.trusted = bool(getattr(tokenizer, "is_fast", False)) and bool(self.ids)

    def cuts(self, text: str, ids: Sequence[int]) -> Cuts | None:
        """The added tokens of a text and its ids, paired; None where the two disagree or nothing can be trusted."""
        if not self.trusted:
            return None
        found = [(m.end(), m.group()) for m in self.pattern.finditer(text)]
        added = self.added
        places = [i for i, token in enumerate(ids) if token in added]
        if [self.ids[token] for _, token in found] != [ids[i] for i in places]:
            return None
        return Cuts([end for end, _ in found], [token for _, token in found], places)

    def prefix_length(self, text: str, prompt_end: int, ids: Sequence[int], cuts: Cuts) -> int | None:
        """How many of `ids` are those of the prompt `text[:prompt_end]`; None where its ids are no prefix of them."""
        length = self.by_cuts(text, prompt_end, ids, cuts)
        if length is not None:
            return length if length >= 0 else None
        own = encode(self.tokenizer, text[:prompt_end])
        return len(own) if list(ids[: len(own)]) == own else None

    def by_cuts(self, text: str, prompt_end: int, ids: Sequence[int], cuts: Cuts) -> int | None:
        """Length, -1 for no prefix, None for unknown."""
        last = bisect_right(cuts.ends, prompt_end) - 1
        if last < 0:
            return None
        tail = self.tail(cuts.tokens[last], text[cuts.ends[last] : prompt_end])
        if tail is None:
            return None
        start = cuts.places[last] + 1
        end = start + len(tail)
        return end if list(ids[start:end]) == tail else -1

    def tail(self, token: str, text: str) -> list[int] | None:
        """Ids of a text behind an added token."""
        key = (token, text)
        if key in self.tails:
            return self.tails[key]
        ids = encode(self.tokenizer, token + text)
        tail = ids[1:] if ids[:1] == [self.ids[token]] else None
        if len(text) <= LONGEST_REMEMBERED and len(self.tails) < REMEMBERED:
            self.tails[key] = tail
        return tail


class Cuts:
    """Added tokens of one text, in order: where each ends in the text, its string, its place in the ids."""

    __slots__ = ("ends", "places", "tokens")

    def __init__(self, ends: list[int], tokens: list[str], places: list[int]) -> None:
        self.ends, self.tokens, self.places = ends, tokens, places
