"""YAML 1.2 text as plain values that remember their lines.

Plain means plain: mappings with text keys, lists, text, numbers, true/false, null. No tags, so nothing in a file can
name code; no duplicate keys, because the one that would silently win is rarely the one the reader saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.datanames import told_as_data
from sft.errors import ConfigError

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MAX_NODES = 100_000  # aliases of aliases grow exponentially; no honest config comes near this


@dataclass(frozen=True)
class Tree:
    """Values of one document, and the line of each: `lines[("data", "train", 0, "path")] == 12`."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    text: str = ""


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0)` as `data.train.0`."""
    return ".".join(str(key) for key in path)


def leaves(value: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is neither a mapping nor a list, with its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))
    else:
        yield at, value


def read_yaml(path: Path) -> Tree:
    """The one document in a file. Raises ConfigError that names file and line, also where the file is one of data."""
    if data := told_as_data(path):
        raise ConfigError(data)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.{_yaml_files_nearby(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a YAML file is wanted.{_yaml_files_nearby(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Tree:
    """The one document in `text`; `name` stands in messages, as `name:line`. Raises ConfigError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    if re.match(r"\s*%YAML\s+(?!1\.2\b)", text):
        raise ConfigError(f"{name}:1: files are read as YAML 1.2; remove the %YAML line.")
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        what = " ".join(part for part in (error.context, error.problem) if part).replace("\n", " ")
        raise ConfigError(f"{where}: not valid YAML: {what}.{_syntax_cure(what)}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{name}: not valid YAML: {what}.") from None
    builder = _Builder(name)
    return Tree(builder.build(node, ()) if node is not None else None, builder.lines, text)


class _Builder:
    """Walks the composed nodes once, refusing what a config has no use for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.open: set[int] = set()  # ids of the nodes being built: an alias to one of them is a circle

    def build(self, node: Any, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if len(self.lines) > _MAX_NODES:
            raise self.refuse(line, f"more than {_MAX_NODES} values; aliases that multiply?")
        if id(node) in self.open:
            raise self.refuse(line, f"'{dotted(path)}' contains itself through an alias")
        tag = str(node.tag)
        kind = tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
        if isinstance(node.value, str):
            return self.scalar(kind, node.value, line)
        self.open.add(id(node))
        try:
            if kind == "map":
                return {key: self.build(value, (*path, key)) for key, value in self.pairs(node, path)}
            if kind == "seq":
                return [self.build(value, (*path, index)) for index, value in enumerate(node.value)]
        except RecursionError:
            raise self.refuse(line, "nested too deeply") from None
        finally:
            self.open.discard(id(node))
        raise self.refuse_tag(line, tag)

    def pairs(self, node: Any, path: KeyPath) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node.value, str):
                raise self.refuse(line, "a key must be plain text, not a list or mapping")
            if str(key_node.tag) == _TAG + "merge":
                raise self.refuse(line, "merge keys (<<) are not read; write the keys out")
            key = _joined(key_node.value)
            if key in seen:
                full = dotted((*path, key))
                raise self.refuse(line, f"key '{full}' appears twice, first on line {seen[key]}; remove one of the two")
            seen[key] = line
            self.lines[(*path, key)] = line
            yield key, value_node

    def scalar(self, kind: str, text: str, line: int) -> Any:
        if kind in ("str", "timestamp"):  # dates stay text: JSON, templates and Hugging Face settings know no other
            return _joined(text)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text, 0) if re.match(r"[-+]?0[xob]", text) else int(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except ValueError:  # e.g. an integer of more digits than Python converts
            raise self.refuse(line, f"{text[:40]} is not a number that can be read") from None
        raise self.refuse_tag(line, kind)

    def refuse(self, line: int, message: str) -> ConfigError:
        return ConfigError(f"{self.name}:{line}: {message}.")

    def refuse_tag(self, line: int, tag: str) -> ConfigError:
        shown = tag.removeprefix(_TAG)
        return self.refuse(line, f"YAML tag '{shown}' is refused: values are plain text, numbers, lists and mappings")


def _joined(text: str) -> str:
    """JSON writes characters beyond the first 65,536 as two escapes, which YAML reads as two: as one again."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _syntax_cure(problem: str) -> str:
    if "\\t" in problem or "\t" in problem:
        return " Indent with spaces, not tabs."
    if "mapping values are not allowed" in problem:
        return " A text with ': ' in it needs quotes; or a line above is indented otherwise."
    if "undefined alias" in problem:
        return " A text that starts with * needs quotes: '*.jsonl'."
    if "another document" in problem:
        return " One file holds one document: remove the '---' between."
    return ""


def _yaml_files_nearby(path: Path) -> str:
    folder = path.parent
    found = sorted(file.name for file in folder.glob("*.y*ml"))[:8] if folder.is_dir() else []
    return f" In {folder}: {', '.join(found)}." if found else ""


# Writing ------------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z/~.](?:[\w./~+-]|://)*")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def flow(value: Any) -> str:
    """A value on one line of YAML that `parse_yaml` reads back as it was."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    return str(value) if isinstance(value, int) else _quoted(str(value))


def _quoted(text: str) -> str:
    """Plain where plain text reads back as the same text, else in double quotes."""
    if _PLAIN.fullmatch(text) and parse_plain(text) == text:
        return text
    import json

    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


@dataclass(frozen=True)
class Line:
    """`  - key: value  # note` in its parts; `indent` counts spaces, `note` and `value` may be empty."""

    indent: int
    is_item: bool
    key: str
    value: str
    note: str


_KEY_LINE = re.compile(r"^(?P<indent> *)(?P<item>- )?(?P<key>[^\s:#]+):(?: (?P<rest>.*))?$")
_QUOTED_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[^"]')


def split_line(text: str) -> Line | None:
    """One line of a file that writes a key a line, each value as `flow` gives it; None for a comment.

    Quotes are heeded: a value may hold what looks like a note.
    """
    match = _KEY_LINE.match(text)
    if match is None:
        return None
    rest, at = match["rest"] or "", 0
    while at < len(rest) and not rest.startswith("  # ", at):
        part = _QUOTED_PART.match(rest, at)
        at = part.end() if part else at + 1
    return Line(len(match["indent"]), bool(match["item"]), match["key"], rest[:at], rest[at + 4 :])


def parse_plain(text: str) -> Any:
    """What YAML makes of an unquoted word: `true` a boolean, `1e3` a number, `x` a text."""
    return parse_yaml(text, "value").value
