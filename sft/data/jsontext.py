"""JSON with strict objects, and a reader of long JSON texts in bounded memory.

The standard decoder does the parsing; here is only what it lacks: duplicate keys are errors, every failure is one
sentence, and an array is walked element by element without holding the file.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from dataclasses import dataclass
from typing import IO, Any

from sft.errors import DataError

CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_STRUCTURE = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[,\]}\n]")


class DuplicateKeyError(ValueError):
    """An object that names a key twice: one of the values would be lost silently."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"the key '{cut(twice, 40)}' appears twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def cut(value: object, limit: int = 80) -> str:
    """The value as JSON of at most `limit` characters, on one line; a text without its quotes."""
    text = value if isinstance(value, str) else json.dumps(_head(value, 0), ensure_ascii=False, default=repr)
    text = text[: limit + 1].replace("\n", "\\n").replace("\r", "\\r").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _head(value: Any, depth: int) -> Any:
    """The first few items: printing a five-megabyte row to cut it afterwards would cost as much as reading it."""
    if isinstance(value, str):
        return value[:90]
    if isinstance(value, (dict, list, tuple)) and depth > 3:
        return "…"
    if isinstance(value, dict):
        return {str(key): _head(value[key], depth + 1) for key in itertools.islice(value, 6)}
    if isinstance(value, (list, tuple)):
        return [_head(item, depth + 1) for item in value[:6]]
    return value


def parse(text: str) -> Any:
    """The JSON value of a text. Raises ValueError with one sentence, also for nesting that is too deep."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        near = cut(text[max(0, error.pos - 20) : error.pos + 40], 60)
        raise ValueError(f"malformed JSON: {error.msg} at character {error.pos + 1}, near {near}") from error
    except DuplicateKeyError:
        raise
    except RecursionError:
        raise ValueError(f"nested too deeply: {cut(text, 40)}") from None


def parse_object(raw: bytes, *, last: bool) -> dict[str, Any] | str:
    """The object of one line, or what is wrong with the line and the cure. `last`: no line break follows."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = cut(raw[max(0, error.start - 20) : error.start + 20].decode("utf-8", "backslashreplace"), 60)
        return f"not UTF-8 at byte {error.start + 1}, near {at}. Save the file as UTF-8"
    return _object(text, last=last)


def _object(text: str, *, last: bool) -> dict[str, Any] | str:
    try:
        value = parse(text)
    except ValueError as error:
        if last and isinstance(error.__cause__, json.JSONDecodeError) and _ends_early(error.__cause__, text):
            return f"the file ends inside this row: it is cut after {cut(text[-40:], 40)}. Write or download it again"
        return f"{error}. Repair the row: one complete JSON object"
    if not isinstance(value, dict):
        return f"a row must be an object {{…}}, this is {name_of(value)}: {cut(text)}. Give its values names"
    return value


def _ends_early(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the parser ran out of text, rather than into something wrong."""
    return error.msg.startswith("Unterminated string") or (error.msg != "Extra data" and len(text) - error.pos < 8)


def name_of(value: object) -> str:
    """The kind of a JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN"
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"), (int, "a number"), (float, "a number"), (str, "text"), (dict, "an object"),
        (list, "a list"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class RowText:
    """An element of an array: the object, or what is wrong with it; `cut`: the file ended inside."""

    parsed: dict[str, Any] | str
    size: int
    cut: bool


class JsonText:
    """A JSON text read in chunks. Holds one value at a time; `line` is where the next character stands."""

    def __init__(self, file: IO[bytes], name: str, max_value: int) -> None:
        # Bytes that are not UTF-8 become lone surrogates, which the formats refuse with the row's line.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._file, self._name, self._max = file, name, max_value
        self._text, self._at, self._ended = "", 0, False
        self.line = 1
        self._more()
        self._at = 1 if self._text.startswith("\ufeff") else 0

    def _more(self) -> bool:
        """Reads on; what was passed is forgotten. False at the end of the file."""
        if self._ended:
            return False
        if len(self._text) - self._at > self._max:
            raise DataError(f"{self._name}:{self.line}: a row of more than {self._max >> 20} MiB, or one never closed")
        raw = self._file.read(CHUNK_BYTES)
        self._ended = not raw
        self._text, self._at = self._text[self._at :] + self._decode(raw, not raw), 0
        return True

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def space(self) -> str:
        """The next character that is no white space, not taken; empty at the end."""
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more():
                return ""

    def ahead(self) -> str:
        return cut(self._text[self._at : self._at + 60], 40)

    def take(self, character: str) -> None:
        if self.space() != character:
            raise DataError(f"{self._name}:{self.line}: expected '{character}', found {self.ahead() or 'the end'}")
        self._at += 1

    def key(self) -> str:
        """A key and its colon."""
        self.space()
        try:
            key = parse(self._piece())
        except ValueError as error:
            raise DataError(f"{self._name}:{self.line}: {error}") from error
        if not isinstance(key, str):
            raise DataError(f"{self._name}:{self.line}: expected a key in quotes, found {cut(key)}")
        self.take(":")
        return key

    def skip(self) -> None:
        self.space()
        self._piece()

    def row(self) -> RowText:
        """The next value, which should be an object. After a malformed one, reading goes on behind it."""
        try:
            value, end = DECODER.raw_decode(self._text, self._at)
            if isinstance(value, dict):
                size = end - self._at
                self._advance(end)
                return RowText(value, size, False)
        except (ValueError, RecursionError):
            pass  # malformed, or cut by the end of the chunk: the walk below tells which
        piece = self._piece()
        cut_here = self._ended and self._at >= len(self._text) and not _closed(piece)
        return RowText(_object(piece, last=cut_here), len(piece), cut_here)

    def _piece(self) -> str:
        """The text of the next value, found by its brackets and quotes alone, and taken."""
        depth, at, in_string = 0, self._at, False
        while True:
            end, depth, in_string = _walk(self._text, at, depth, in_string)
            if end is not None and (end < len(self._text) or self._ended):
                break
            passed = len(self._text) - self._at if end is None else 0
            if end is not None:
                depth, in_string = 0, False
            if not self._more():
                end = len(self._text)
                break
            at = self._at + passed
        piece = self._text[self._at : end]
        self._advance(end)
        return piece


def _walk(text: str, at: int, depth: int, in_string: bool) -> tuple[int | None, int, bool]:
    """Walks to the end of a value. (its end, or None where the text ends first; depth; inside a string?)."""
    while True:
        if in_string:
            quote = text.find('"', at)
            if quote < 0:
                return None, depth, True
            at, in_string = quote + 1, _is_escaped(text, quote)
            if not in_string and not depth:
                return at, 0, False
            continue
        if not depth and at < len(text) and text[at] not in '"{[':
            end = _SCALAR_END.search(text, at)
            return (end.start(), 0, False) if end else (None, 0, False)
        mark = _STRUCTURE.search(text, at)
        if mark is None:
            return None, depth, False
        at = mark.end()
        if mark.group() == '"':
            in_string = True
        else:
            depth += 1 if mark.group() in "{[" else -1
            if depth <= 0:
                return at, 0, False


def _is_escaped(text: str, quote: int) -> bool:
    before = quote
    while before and text[before - 1] == "\\":
        before -= 1
    return (quote - before) % 2 == 1


def _closed(piece: str) -> bool:
    return piece.rstrip().endswith(("}", "]", '"'))
