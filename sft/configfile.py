"""Config files: read, override, explain, write back.

    load_config("lora.yaml", ["optim.lr=1e-4"])  ->  LoadedConfig: the Config, and where each value came from

Everything wrong with a file is said in one message, each with `file:line`, the value and the cure. No torch here.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft.config import Config, Section
from sft.configkeys import cure, example, explain_unknown, section_under, walk_keys, wanted
from sft.credentials import credentials
from sft.errors import ConfigError
from sft.secrets import mask_secrets
from sft.unread import DEFAULT, unread_keys
from sft.yamltree import KeyPath, dotted, flow, parse_yaml, read_yaml, split_line

__all__ = ["COMMAND_LINE", "DEFAULT", "LoadedConfig", "dump_config", "json_schema", "load_config", "unread_keys"]

COMMAND_LINE = "command line"
_HEADER = "# Resolved from"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config. `origins` holds every leaf key: "default", "file:line" or "command line".

    `config.run.dir` is always filled in (`run_dir` is the same as a path). `unread` are warnings on keys that were set
    but that the chosen mode never reads.
    """

    config: Config
    origins: dict[str, str]
    path: Path
    unread: tuple[str, ...]
    run_dir: Path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply `key=value` overrides and check all of it. Raises ConfigError."""
    file = Path(path)
    tree = read_yaml(file)
    raw = {} if tree.value is None else tree.value
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: the file holds {_shown(raw)}; sections such as model: and data: are wanted.")
    defaults = _lines_of_defaults(tree.text)
    where = {key: DEFAULT if line in defaults else f"{file}:{line}" for key, line in tree.lines.items() if key}
    _bare_sources(raw, where)
    for override in overrides:
        _apply(raw, where, override)
    config = _validate(raw, where, file)
    run_dir = config.run.dir or f"runs/{file.stem}"
    config = _with_home_expanded(config, run_dir)
    for key, what in credentials(config):
        raise ConfigError(
            f"{_where(key, where)}: '{dotted(key)}' holds {what}. (Run folders keep configs, to read them again.)"
        )
    _paths_beside_the_file(config, where, file)
    origins = {dotted(key): _origin(key, raw, where) for key in walk_keys(config)}
    return LoadedConfig(config, origins, file, tuple(unread_keys(config, origins)), Path(config.run.dir or run_dir))


def _lines_of_defaults(text: str) -> set[int]:
    """In a file that `dump_config` wrote: the lines whose value the user never set. Else none."""
    lines = text.split("\n") if text.startswith(_HEADER) else []
    found = set()
    for number, line in enumerate(lines, 1):
        parts = split_line(line)
        if parts is not None and re.match(rf"{DEFAULT}($|; resolved to )", parts.note):
            found.add(number)
    return found


# Overrides ----------------------------------------------------------------------------------------------------------


def _bare_sources(raw: dict[str, Any], where: dict[KeyPath, str]) -> None:
    """`data.train: a.jsonl` and `data.train: [a.jsonl]` as lists of sources, so that every source has its keys."""
    data = raw.get("data")
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        value, here = data.get(key), where.get(("data", key), COMMAND_LINE)
        if isinstance(value, str | dict):
            for old in [item for item in where if item[:2] == ("data", key) and len(item) > 2]:
                where[("data", key, 0, *old[2:])] = where[old]
            value = data[key] = [value]
            where.setdefault(("data", key, 0), here)
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, str):
                    value[index] = {"path": item}
                    where[("data", key, index, "path")] = where.get(("data", key, index), here)


def _apply(raw: dict[str, Any], where: dict[KeyPath, str], override: str) -> None:
    """Set one `a.b.0.c=value` in the tree, making sections on the way."""
    name, separator, text = override.partition("=")
    name = name.strip()
    if not separator or not name or any(not part for part in name.split(".")):
        raise ConfigError(
            f"'{override}': overrides are written key=value, e.g. optim.lr=1e-4 or data.train.0.limit=100."
        )
    globbed = text.startswith(("*", "&", "@", "%"))  # no YAML value starts so; a path or a name may
    value = text if globbed else parse_yaml(text, f"{COMMAND_LINE}, {name}").value
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    parent: Any = raw
    for depth, key in enumerate(path[:-1]):
        child = _child(parent, path[: depth + 1], override)
        if child is None:
            child = {}
            _put(parent, key, child)
            where.setdefault(path[: depth + 1], COMMAND_LINE)
        parent = child
    _child(parent, path, override)
    for old in [key for key in where if key[: len(path)] == path]:
        del where[old]
    _put(parent, path[-1], value)
    where[path] = COMMAND_LINE
    if path[0] == "data":
        _bare_sources(raw, where)


def _child(parent: Any, path: KeyPath, override: str) -> Any:
    """What lies at the end of `path`, given its parent; None where nothing does yet."""
    key = path[-1]
    if isinstance(parent, list):
        if isinstance(key, int) and key <= len(parent):
            return parent[key] if key < len(parent) else None
        has = f"{len(parent)} item{'s' * (len(parent) != 1)}, numbered from 0"
        raise ConfigError(f"{override}: '{dotted(path[:-1])}' is a list of {has}; '{key}' is none of them.")
    if isinstance(parent, dict):
        if isinstance(key, int):
            raise ConfigError(f"{override}: '{dotted(path[:-1])}' is not set in the file; give the whole list here.")
        return parent.get(key)
    raise ConfigError(f"{override}: '{dotted(path[:-1])}' is {_shown(parent)}, so it has no '{key}'.")


def _put(parent: Any, key: str | int, value: Any) -> None:
    if isinstance(parent, list) and key == len(parent):
        parent.append(value)
    else:
        parent[key] = value


# Checking -----------------------------------------------------------------------------------------------------------


def _validate(raw: dict[str, Any], where: dict[KeyPath, str], file: Path) -> Config:
    problems = dict(_unknown_keys(raw, Config, (), where))
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        for path, message in _explained(error, raw, where, file):
            problems.setdefault(path, message)
    if not problems and config is not None:
        return config
    for path in [path for path in problems if path and any(_within(other, path) for other in problems)]:
        del problems[path]  # the other branch of a union: a list with a mistake in it is no number either
    told = [problems[path] for path in sorted(problems, key=lambda path: _line(_where(path, where)))]
    if len(told) == 1:
        raise ConfigError(told[0])
    raise ConfigError(f"{file}: {len(told)} problems\n" + "\n".join(f"  - {message}" for message in told))


def _within(path: KeyPath, outer: KeyPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _unknown_keys(
    raw: Mapping[str, Any], section: type[Section], at: KeyPath, where: Mapping[KeyPath, str]
) -> Iterator[tuple[KeyPath, str]]:
    for key, value in raw.items():
        path = (*at, key)
        if key not in section.model_fields:
            yield path, f"{_where(path, where)}: {explain_unknown(path, section)}"
            continue
        below = section_under(section.model_fields[key].annotation)
        if below and isinstance(value, dict):
            yield from _unknown_keys(value, below, path, where)
        elif below and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown_keys(item, below, (*path, index), where)


def _explained(
    error: ValidationError, raw: Any, where: Mapping[KeyPath, str], file: Path
) -> Iterator[tuple[KeyPath, str]]:
    """pydantic's findings in our words. It speaks of each branch of a union; the caller keeps the first of a key."""
    for finding in error.errors(include_url=False):
        path = _real_path(finding["loc"], raw)
        at = _where(path, where)
        if finding["type"] == "missing":
            path = (*path, finding["loc"][-1])
            yield path, f"{at if at != COMMAND_LINE else file}: '{dotted(path)}' is missing.{example(path)}"
        elif finding["type"] == "value_error" and not path:
            yield (), f"{file}: {finding['ctx']['error']}."
        elif finding["type"] == "value_error":
            yield path, f"{at}: '{dotted(path)}' is {_shown(_value_at(raw, path))}; wanted: {finding['ctx']['error']}."
        elif finding["type"] != "extra_forbidden":
            value = _value_at(raw, path)
            yield path, f"{at}: '{dotted(path)}' is {_shown(value)}; wanted: {wanted(path)}.{cure(path, value)}"


def _real_path(loc: Sequence[Any], raw: Any) -> KeyPath:
    """pydantic's location without the names of union branches in it."""
    path: list[str | int] = []
    here: Any = raw
    for key in loc:
        if (isinstance(here, dict) and key in here) or (
            isinstance(here, list) and isinstance(key, int) and key < len(here)
        ):
            here = here[key]
        else:
            continue
        path.append(key)
    return tuple(path)


def _has(parent: Any, key: str | int) -> bool:
    if isinstance(parent, list):
        return isinstance(key, int) and key < len(parent)
    return isinstance(parent, dict) and key in parent


def _value_at(raw: Any, path: KeyPath) -> Any:
    for key in path:
        raw = raw[key]
    return raw


def _origin(path: Sequence[Any], raw: Any, where: Mapping[KeyPath, str]) -> str:
    """Where a key was set: its own place, or that of the nearest thing above it that was given whole."""
    for key in path:
        if (isinstance(raw, dict) and key in raw) or (
            isinstance(raw, list) and isinstance(key, int) and key < len(raw)
        ):
            raw = raw[key]
        else:
            return DEFAULT
    return _where(tuple(path), where)


def _where(path: KeyPath, where: Mapping[KeyPath, str]) -> str:
    for depth in range(len(path), 0, -1):
        if path[:depth] in where:
            return where[path[:depth]]
    return next(iter(where.values()), COMMAND_LINE).rpartition(":")[0] or COMMAND_LINE


def _line(where: str) -> int:
    """For sorting: the line in `file:line`, the command line last."""
    number = where.rpartition(":")[2]
    return int(number) if number.isdigit() else 1_000_000


def _shown(value: Any) -> str:
    """A value as one would write it, cut, without credentials."""
    names = {dict: "a section", list: "a list", str: "text", bool: "true or false", type(None): "empty"}
    text = mask_secrets(flow(value))
    text = text if len(text) <= 60 else text[:57] + "..."
    kind = names.get(type(value))
    return "empty (null)" if value is None else f"{text} ({kind})" if kind in ("text", "a section", "a list") else text


# Paths --------------------------------------------------------------------------------------------------------------


def _with_home_expanded(config: Config, run_dir: str) -> Config:
    """Paths with a leading ~ expanded, and run.dir filled in."""

    def sources(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [source.model_copy(update={"path": os.path.expanduser(source.path)}) for source in value]

    model, data = config.model, config.data
    adapter = model.adapter and os.path.expanduser(model.adapter)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": os.path.expanduser(run_dir)}),
            "model": model.model_copy(update={"name": os.path.expanduser(model.name), "adapter": adapter}),
            "data": data.model_copy(
                update={
                    "train": sources(data.train),
                    "eval": sources(data.eval),
                    "template": os.path.expanduser(data.template),
                }
            ),
        }
    )


def _paths_beside_the_file(config: Config, where: Mapping[KeyPath, str], file: Path) -> None:
    """Relative paths start at the current directory, as in the shell; say so where one only exists beside the file."""
    named: list[tuple[KeyPath, str | None]] = [
        (("model", "name"), config.model.name),
        (("model", "adapter"), config.model.adapter),
        (("data", "template"), config.data.template),
    ]
    named += [(("data", "train", i, "path"), source.path) for i, source in enumerate(config.data.train)]
    if isinstance(config.data.eval, list):
        named += [(("data", "eval", i, "path"), source.path) for i, source in enumerate(config.data.eval)]
    for path, value in named:
        if not value or os.path.isabs(value) or "://" in value or file.parent.resolve() == Path.cwd():
            continue
        beside = file.parent / value
        looks_like_path = "." in Path(value).name or value.startswith(".") or "*" in value
        if looks_like_path and not _exists(Path(value)) and _exists(beside):
            raise ConfigError(
                f"{_where(path, where)}: '{dotted(path)}' is {value}, and there is no such file from here"
                f" ({Path.cwd()}). It lies beside the config: write {beside}, or run from {file.parent}."
            )


def _exists(path: Path) -> bool:
    return path.exists() or bool(glob.glob(str(path)))


# Writing ------------------------------------------------------------------------------------------------------------


def dump_config(loaded: LoadedConfig, resolved: Mapping[str, Any] | None = None) -> str:
    """The whole config as YAML, each line with where its value came from and what `auto` became.

    `resolved` maps dotted keys to values. Keys of it that no config key matches are listed in comments at the end.
    Loads back, with `load_config`, to an equal config: nothing is masked, and `load_config` lets no credential in.
    """
    left = dict(resolved or {})
    lines = [f"{_HEADER} {loaded.path}. Each line says where its value came from."]
    values = loaded.config.model_dump(mode="json")
    lines += _dumped(values, Config, (), loaded.origins, left)
    lines += [f"# resolved: {key}: {flow(value)}" for key, value in left.items()]
    return "\n".join(lines) + "\n"


def _dumped(
    values: Mapping[str, Any], section: type[Section], at: KeyPath, origins: Mapping[str, str], left: dict[str, Any]
) -> Iterator[str]:
    indent = "  " * len(at)
    for key, value in values.items():
        path = (*at, key)
        below = section_under(section.model_fields[key].annotation)
        if below and isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _dumped(value, below, path, origins, left)
        elif below and isinstance(value, list) and value:
            yield f"{indent}{key}:"
            for index, item in enumerate(value):
                inner = list(_dumped(item, below, (*path, index), origins, left))
                first = inner[0].lstrip()
                yield " " * (len(inner[0]) - len(first) - 2) + "- " + first
                yield from inner[1:]
        else:
            name = dotted(path)
            note = origins.get(name, DEFAULT)
            note += f"; resolved to {flow(left.pop(name))}" if name in left else ""
            yield f"{indent}{key}: {flow(value)}  # {note}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the config, for editors: every key with its description, default and choices."""
    schema = Config.model_json_schema()
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    sources = {"anyOf": [*source["anyOf"], {"type": "array", "items": source, "minItems": 1}]}
    keys = schema["$defs"]["Data"]["properties"]  # a bare path is read as a source, which the types do not tell
    keys["train"] = {"description": keys["train"]["description"], **sources}
    keys["eval"]["anyOf"] = [{"type": "number", "minimum": 0}, *sources["anyOf"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sft config"}
