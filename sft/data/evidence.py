"""Whether words of a row stand in its examples: as they are, or as a template may have written them.

Plain search comes first and is all that an ordinary row costs. What it does not find is looked for without regard to
blanks, and under the escapes that templates apply (JSON, HTML, Python's quotes), before it counts as left out.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from sft.data.proof import TELLING

NO_WORDS = re.compile(r"[\W_]+")


class Evidence:
    """The texts of a row's examples. Words are looked for from where the last ones were found: rows come in order."""

    def __init__(self, texts: Sequence[str]) -> None:
        *self.others, self.text = texts
        self.place = 0

    def passes(self, words: str) -> bool:
        """Whether the words stand there letter by letter."""
        at = self.text.find(words, self.place)
        if at < 0:
            at = self.text.find(words)
        if at < 0:
            return any(words in other for other in reversed(self.others))
        self.place = at + len(words)
        return True

    def holds(self, words: str) -> bool:
        """Whether the words stand there at all, be it escaped, with other blanks, or in other case."""
        if self.passes(words) or any(spelled in text for spelled in spellings(words) for text in self.texts):
            return True
        collapsed = " ".join(words.split())
        if any(collapsed in text for text in self.collapsed):
            return True
        bare = NO_WORDS.sub("", words).casefold()
        return len(bare) >= TELLING and any(bare in text for text in self.bare)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text, *self.others)

    @cached_property
    def collapsed(self) -> tuple[str, ...]:
        return tuple(" ".join(text.split()) for text in self.texts)

    @cached_property
    def bare(self) -> tuple[str, ...]:
        return tuple(NO_WORDS.sub("", text).casefold() for text in self.texts)


def spellings(words: str) -> Iterator[str]:
    """The words as templates escape them: within JSON, within JSON within JSON, in HTML, as Python prints them."""
    as_json = json.dumps(words, ensure_ascii=False)[1:-1]
    yield as_json
    yield json.dumps(as_json, ensure_ascii=False)[1:-1]
    yield json.dumps(words)[1:-1]
    yield html.escape(words)
    yield html.escape(words, quote=False)
    yield repr(words)[1:-1]


def leaves(value: Any, path: str, named: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """(key path, value) of all that is no list or object within a value: `messages[].meta.tags[]`.

    Keys below a key of `named` are names that a row makes up (properties of a schema): `*` in the path.
    """
    if isinstance(value, Mapping):
        free = path.rpartition(".")[2] in named
        for key, item in value.items():
            yield from leaves(item, f"{path}.{'*' if free else key}", named)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item, f"{path}[]", named)
    else:
        yield path, value
