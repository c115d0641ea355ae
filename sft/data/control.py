"""Control tokens that a message merely spells, and the token ids of text that must not become one.

A spelled control token is wrapped in two private characters before rendering (`mark`), survives the template, and is
encoded as ordinary characters afterwards (`encode_marked`). The pieces around it are encoded as transformers' own
`apply_chat_template(sanitize_control_tokens=True)` encodes them, so that training and sanitised serving agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sft.errors import DataError

OPEN, CLOSE = "\U000f5f7c", "\U000f5f7d"  # private use, plane 15: in no tokenizer and no sane text
HTML = re.compile(r"</?(?:h[1-6]|table|caption|thead|tbody|tfoot|t[rhd]|blockquote|strong|em|[biusp]|sub|sup|code|"
                  r"ul|ol|li|a|br|hr|div|span|img|pre)/?>")  # fmt: skip

MARKUP = re.compile(r"[<\[{(|].*[>\]})|]", re.DOTALL)


def spelled_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


@dataclass(frozen=True)
class ControlTokens:
    """Which strings are control tokens of a tokenizer, and which of them an assistant message may hold as markup."""

    everywhere: re.Pattern[str]
    in_answers: re.Pattern[str]
    own: re.Pattern[str]
    """Those that an answer may spell as the model's own, though no template reads them there."""
    marked: re.Pattern[str]

    def mark(self, value: Any, *, answer: bool) -> Any:
        """`value` (a string, or lists and dicts of them) with every spelled control token wrapped."""
        pattern = self.in_answers if answer else self.everywhere
        if isinstance(value, str):
            if OPEN in value or CLOSE in value:
                raise DataError("the text holds the private characters U+F5F7C or U+F5F7D, which mark control tokens")
            return pattern.sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.mark(item, answer=answer) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, answer=answer) for item in value]
        return value

    def spelled(self, value: Any, *, answer: bool) -> list[str]:
        """The control tokens that the strings in `value` spell."""
        return found_in(value, self.in_answers if answer else self.everywhere)


def found_in(value: Any, pattern: re.Pattern[str]) -> list[str]:
    """What a pattern matches in the strings of `value`, a string or lists and dicts of them."""
    if isinstance(value, str):
        return pattern.findall(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [token for item in value for token in found_in(item, pattern)]


def control_tokens(
    tokenizer: Any, written: str, read: str, stop_ids: Sequence[int], framing: str = ""
) -> ControlTokens:
    """Special tokens, and other added tokens that look like markup rather than like words, blanks or HTML.

    `written` is the literal text of the template, `read` the part of it by which it looks into messages, `framing`
    what it writes around messages.
    In an assistant message those are excepted, unless serving stops at them, by which the template looks into
    messages (`'</think>' in content`), with their counterparts; and those that the tokenizer does not call special
    (`<think>`, `<tool_call>`), since a model writes them as such, unless they frame messages.
    """
    added = tokenizer.added_tokens_decoder
    control = [
        token.content
        for token in added.values()
        if token.content.strip("\u2581 \t\r\n") and (
            token.special or token.content in written
            or (MARKUP.fullmatch(token.content) and not HTML.fullmatch(token.content))
        )
    ]  # fmt: skip
    stops = {tokenizer.convert_ids_to_tokens(i) for i in stop_ids}
    special = {token.content for token in added.values() if token.special}
    looked_at = {token for token in control if token not in stops and (token in read or counterpart(token) in read)}
    own = {
        token for token in control
        if token not in stops and token not in special and token not in looked_at and token not in framing
    }  # fmt: skip
    excepted = looked_at | own
    every = spelled_pattern(control)
    return ControlTokens(
        every,
        spelled_pattern([token for token in control if token not in excepted]),
        spelled_pattern(sorted(own)),
        re.compile(f"{OPEN}({every.pattern}){CLOSE}|[{OPEN}{CLOSE}]"),
    )


def counterpart(token: str) -> str:
    """`</think>` for `<think>` and the other way round."""
    return token.replace("</", "<", 1) if token.startswith("</") else token.replace("<", "</", 1)


def unmark(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def encode_marked(tokenizer: Any, control: ControlTokens, text: str, *, behind: bool = False) -> list[int]:
    """Ids of a text with marks: what is marked as ordinary characters, the rest as always.

    `behind`: the text follows another one, rather than beginning a sequence.
    A template's string methods may part two marks; a lone one is dropped, and still breaks the text there.
    Raises DataError where the tokenizer has no other way to write a marked token.
    """
    pieces = control.marked.split(text)
    ids = encode_after(tokenizer, pieces[0]) if behind else encode(tokenizer, pieces[0])
    for index, piece in enumerate(pieces[1:], start=1):
        if piece:
            ids += as_characters(tokenizer, piece) if index % 2 else encode_after(tokenizer, piece)
    return ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, nothing added at its ends: what `apply_chat_template` makes of a rendered text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text. Fast tokenizers are asked without character offsets, which cost as much as the ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [encode(tokenizer, text) for text in texts]
    encode(tokenizer, "")  # sets truncation, padding and the reading of special tokens as the tokenizer is configured
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_after(tokenizer: Any, text: str, fits: Callable[[list[int]], bool] | None = None) -> list[int]:
    """Ids of a text that stands in the middle of another: no blank is put before it, as some tokenizers do at a start.

    A newline goes first and its ids are taken off again; where it merges with the text, or what remains does not
    decode back (`fits`), other characters and an added token are tried.
    """
    fronts = ["\n"]
    if fits is not None:
        fronts += ["\t", ".", "a", *[t.content for t in tokenizer.added_tokens_decoder.values() if t.special][:1]]
    for front in fronts:
        before, ids = encode(tokenizer, front), encode(tokenizer, front + text)
        if ids[: len(before)] == before and (fits is None or fits(ids[len(before) :])):
            return ids[len(before) :]
    return encode(tokenizer, text)


def as_characters(tokenizer: Any, token: str) -> list[int]:
    """Ids that spell a control token without being one. Raises DataError where the vocabulary has no other way."""
    newline, ids = spell(tokenizer, "\n"), spell(tokenizer, "\n" + token)
    ids = ids[len(newline) :] if ids[: len(newline)] == newline else spell(tokenizer, token)
    if tokenizer.convert_tokens_to_ids(token) in ids:
        raise DataError(f"the text spells {token!r}, and the tokenizer can write that only as the control token")
    return ids


def spell(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by the tokenizer's steps without its added tokens.

    `split_special_tokens` is not enough: it still emits added tokens that are not special, such as `<think>`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [text]
    if backend.pre_tokenizer is not None:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]
