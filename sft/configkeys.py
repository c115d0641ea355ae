"""What the keys of the config are called, what they take, and what to say when a name or value is not one of them."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from sft.config import Config, Section
from sft.errors import did_you_mean
from sft.foreign import answer
from sft.yamltree import KeyPath, dotted

_EXAMPLES = {
    "model": "\n    model:\n      name: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, folder, or a .gguf file",
    "model.name": " E.g. name: HuggingFaceTB/SmolLM2-135M-Instruct, a folder, or a .gguf file.",
    "data": "\n    data:\n      train:\n        - path: data/chats.jsonl   # file, glob, folder or hub id",
    "data.train": "\n    train:\n      - path: data/chats.jsonl   # file, glob, folder or hub id",
}


def section_under(annotation: Any) -> type[Section] | None:
    """The section in `Section`, `Section | None`, `list[Section]` or `float | list[Section]`; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_under(part))), None)


def walk_keys(section: Section, at: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of each leaf of a config: values, open mappings, lists of values, and sections that are null."""
    for key in type(section).model_fields:
        value, path = getattr(section, key), (*at, key)
        if isinstance(value, Section):
            yield from walk_keys(value, path)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from walk_keys(item, (*path, index))
        else:
            yield path


def all_keys(section: type[Section] = Config, at: tuple[str, ...] = ()) -> dict[str, FieldInfo]:
    """Every dotted key there is, sections included; items of a list of sections carry a 0: `data.train.0.path`."""
    found: dict[str, FieldInfo] = {}
    for key, field in section.model_fields.items():
        path = (*at, key)
        found[dotted(path)] = field
        if below := section_under(field.annotation):
            found.update(all_keys(below, (*path, "0") if _is_list(field.annotation) else path))
    return found


def is_default(key: str, value: Any) -> bool:
    """Whether `value`, as plain data, is what a leaf key has where nobody sets it; False for a name that is no key."""
    field = all_keys().get(re.sub(r"\.\d+(?=\.|$)", ".0", key))  # the items of a list have one name
    return field is not None and not field.is_required() and bool(field.get_default(call_default_factory=True) == value)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(get_origin(part) is list for part in get_args(annotation))


def explain_unknown(path: KeyPath, section: type[Section]) -> str:
    """Why `path` is no key, and which one is meant: another trainer's name, one of ours elsewhere, or the nearest."""
    name, keys = str(path[-1]), all_keys()
    start = f"unknown key '{dotted(path)}'."
    elsewhere = [key for key in keys if key == name or (key.endswith("." + name) and not key.startswith("data.eval.0"))]
    spelled_out = f"{path[-2]}_{name}" if len(path) > 1 else ""  # eval.steps is what others call eval_steps
    if theirs := answer(spelled_out) or answer(name):
        return start + theirs
    if elsewhere:
        places = " or ".join(f"'{key}'" for key in elsewhere[:3])
        return f"{start} The key is {places}."
    if near := did_you_mean(name, section.model_fields):
        return start + near
    by_last_name = {key.rpartition(".")[2]: key for key in keys}
    if near := did_you_mean(name, by_last_name):
        return f"{start} Did you mean '{by_last_name[near.split(chr(39))[1]]}'?"
    here = dotted(path[:-1])
    return f"{start} {'In ' + here if here else 'At the top'} there are: {', '.join(section.model_fields)}."


def wanted(path: KeyPath) -> str:
    """What the key at `path` takes, in words: `auto or a whole number, at least 1`."""
    keys = all_keys()
    names = tuple("0" if isinstance(key, int) else key for key in path)
    field = keys.get(".".join(names))
    parent = keys.get(".".join(names[:-1]))
    if field is None and names[-1] == "0":  # an item of a list
        items = get_args(keys[".".join(names[:-1])].annotation)
        return _words(items[-1], ()) if items else "a value"
    if field is None:  # a value inside an open mapping, such as columns, or deeper in one
        return _words(get_args(parent.annotation)[-1], ()) if parent else "text"
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, limits: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(parts[0], [limit for part in parts[1:] for limit in getattr(part, "metadata", [part])])
    if origin is Literal:
        return _joined([str(part) for part in parts])
    if origin in (Union, types.UnionType):
        return _joined([_words(part, limits) for part in parts])
    if origin is list:
        lengths = [limit for limit in limits if isinstance(limit, annotated_types.MaxLen)]
        number = {2: "two values", 1: "one value"}.get(lengths[0].max_length) if lengths else None
        if section_under(annotation):
            return "a list of sources, e.g. [{path: data/chats.jsonl}]"
        return f"a list of {number}, each {_words(parts[0], ())}" if number else f"a list of {_plural(parts[0])}"
    if origin is dict:
        return "a mapping {key: value}"
    if section_under(annotation):
        return f"a section with {', '.join(annotation.model_fields)}"
    names: dict[Any, str] = {
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        type(None): "null",
    }
    return names.get(annotation, "a value") + _limits(limits)


def _plural(annotation: Any) -> str:
    words = _words(annotation, ())
    return {"text": "texts", "a number": "numbers"}.get(words, words)


def _limits(limits: Any) -> str:
    said = []
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            said.append(f"at least {limit.ge}")
        elif isinstance(limit, annotated_types.Gt):
            said.append(f"above {limit.gt}")
        elif isinstance(limit, annotated_types.Le):
            said.append(f"at most {limit.le}")
        elif isinstance(limit, annotated_types.Lt):
            said.append(f"below {limit.lt}")
    return f", {' and '.join(said)}" if said else ""


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def example(path: KeyPath) -> str:
    """What a key that has no default may look like."""
    return _EXAMPLES.get(dotted(path), "")


def cure(path: KeyPath, value: Any) -> str:
    """A hint for the commonest slips, such as yes for true, or no quotes around a number that is a name."""
    words = wanted(path)
    if isinstance(value, str):
        if value.lower() in ("yes", "no", "on", "off") and "true or false" in words:
            return f" YAML 1.2 writes {'true' if value.lower() in ('yes', 'on') else 'false'}."
        listed = words.removeprefix("a list of ")
        if listed != words and (listed == "texts" or value in listed.replace(" or ", ", ").split(", ")):
            return f" Write [{value}]."
        if " or " in words or "," in words:
            return did_you_mean(value, words.replace(" or ", ", ").split(", "))
    elif isinstance(value, bool | int | float) and "text" in words:
        return f' Put it in quotes: \'"{str(value).lower()}"\' on the command line, "{str(value).lower()}" in a file.'
    elif isinstance(value, float) and "whole number" in words and value == int(value):
        return f" Write {int(value)}."
    return ""
