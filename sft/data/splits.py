"""Which files of a folder are a split's, and a subset's: by the README of a clone, by folders, by names.

    data/train_sft-00000-of-00001.parquet   split train_sft; as the hub names it
    train.jsonl, dev/x.jsonl                train, validation

A folder whose README lists `configs`, as that of a clone of a hub's dataset does, is read as the README says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sft.errors import ConfigError, DataError, did_you_mean
from sft.yamltree import parse_yaml

SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
FILES_NAMED = 10
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
_NUMBERS = re.compile(r"[-_.]?(?:part|shard|chunk|piece|of)?[-_.]?\d+", re.IGNORECASE)
_CONFIGS = re.compile(r"^configs:.*?(?=^[^\s\-#]|\Z)", re.MULTILINE | re.DOTALL)
_README_BYTES = 1 << 22


@dataclass(frozen=True)
class Choice:
    """The files that are read; those that are not with their split; and those of other subsets, or of none."""

    files: tuple[Path, ...]
    left_out: tuple[tuple[Path, str], ...] = ()
    of_no_subset: tuple[Path, ...] = ()


def choose(files: Sequence[Path], folder: Path, split: str, subset: str | None) -> Choice:
    """The files of a split and a subset among a folder's. Raises DataError, with what there is, where none fits."""
    configs, every = readme_configs(folder), files
    named: dict[Path, str] | None = None
    if configs:
        files, named = _of_config(files, folder, configs, subset)
    elif subset is not None:
        files = _in_folder(files, folder, subset)
    labels = named or {file: split_label(file.relative_to(folder)) for file in files}
    others = tuple(file for file in every if file not in set(files))
    if split.lower() in SPLIT_WORDS and not any(labels.values()):
        return Choice(tuple(files), (), others)
    chosen = _of_split(files, labels, folder, split)
    told = {file: labels[file] if family(labels[file]) == family(split) else family(labels[file]) for file in files}
    return Choice(tuple(chosen), tuple((f, told[f] or "train") for f in files if f not in set(chosen)), others)


def split_label(relative: Path) -> str:
    """The split that a file's name or folder tells: `train_sft` of train_sft-00000-of-00001.parquet, `test` of
    dev/../test.jsonl; empty where it tells none."""
    for part in reversed(relative.parts):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_WORDS]
        if words:
            name = part.partition(".")[0] if part == relative.name else part
            name = _SHARD.sub("", name) if _SHARD.search(name) else _NUMBERS.sub("", name)
            return name if name.lower().startswith(words[0]) else words[0]
    return ""


def family(label: str) -> str:
    """train, test or validation; a label without such a word is itself, and no label is train."""
    words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", label.lower()) if word in SPLIT_WORDS]
    return words[0] if words else label or "train"


def _of_split(files: Sequence[Path], labels: Mapping[Path, str], folder: Path, split: str) -> list[Path]:
    """Files of the split of that name; else of the one that begins so; else of its family.

    Otherwise a folder with train.jsonl and test.jsonl would silently train on its test rows. Which of several splits
    that begin so (train_sft, train_gen) is meant is not for us to choose.
    """
    asked = split.lower()
    exact = [file for file in files if labels[file].lower() == asked]
    if asked in SPLIT_WORDS:
        kin = [file for file in files if family(labels[file]) == SPLIT_WORDS[asked]]
        more = {labels[file] for file in kin if _tells(labels[file])}  # train_sft, beside train or none
        plain = any(labels[file].lower() in SPLIT_WORDS for file in kin)
        chosen = [file for file in kin if not (plain and labels[file] in more)]
    else:
        chosen = exact or [file for file in files if _begins(file.relative_to(folder), labels[file], asked)]
        more, plain = {labels[file] for file in chosen if labels[file].lower() != asked}, bool(exact)
    if not chosen:
        near = did_you_mean(split, sorted({label for label in labels.values() if label}))
        raise DataError(
            f"{folder}: no file for split '{split}' among {_listed(files, labels, folder)}.{near} Set split to one of "
            "them, or name the file itself"
        )
    if len(more) > 1 and not plain:
        names = sorted(more)
        raise DataError(
            f"{folder}: several splits begin with '{split}': {', '.join(names)}. Set split to one of them "
            f"(split: {names[0]}), or name the files (path: '{folder}/**/{names[0]}*'); to read several, write a "
            "source each"
        )
    return chosen


def _tells(label: str) -> bool:
    """Whether a label says more than its family's word: train_sft does, training and test do not."""
    return bool(label) and label.lower() not in SPLIT_WORDS and family(label) != label


def _begins(relative: Path, label: str, asked: str) -> bool:
    parts = [*relative.parts[:-1], relative.name.partition(".")[0]]
    starts = (re.match(re.escape(asked) + r"(?![A-Za-z0-9])", part.lower()) for part in (label, *parts))
    return any(starts) or asked in (part.lower() for part in relative.parts[:-1])


def _listed(files: Sequence[Path], labels: Mapping[Path, str], folder: Path) -> str:
    named = ", ".join(f"{file.relative_to(folder)} ({labels[file] or 'none'})" for file in files[:FILES_NAMED])
    return named + (f" and {len(files) - FILES_NAMED:,} more" if len(files) > FILES_NAMED else "")


def _in_folder(files: Sequence[Path], folder: Path, subset: str) -> list[Path]:
    """The files below a folder of the subset's name: data/{all,magpie,everyday}/…"""
    found = [file for file in files if subset in file.relative_to(folder).parts[:-1]]
    if found:
        return found
    held = sorted({part for file in files for part in file.relative_to(folder).parts[:-1]})
    what = (
        f"its folders are {', '.join(held[:FILES_NAMED])}"
        if held
        else "it holds no folders, and no README with configs"
    )
    raise DataError(
        f"{folder}: no subset '{subset}': {what}.{did_you_mean(subset, held)} Set subset to one, or leave it out"
    )


# The README of a clone ----------------------------------------------------------------------------------------------


def readme_configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The `configs` in the head of a README.md, by name; empty where there are none."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            text = file.read(_README_BYTES)
    except OSError:
        return {}
    head = text.split("\n---", 1)[0].removeprefix("\ufeff") if text.lstrip("\ufeff").startswith("---") else ""
    found = _CONFIGS.search(head)
    if found is None:
        return {}
    try:
        listed = parse_yaml(found[0], "README.md").value["configs"]
    except (ConfigError, TypeError, KeyError):  # not ours to mend: names decide then
        return {}
    configs = listed if isinstance(listed, list) else []
    return {
        str(config.get("config_name", "default")): config
        for config in configs
        if isinstance(config, dict) and config.get("data_files") is not None
    }


def _of_config(
    files: Sequence[Path], folder: Path, configs: Mapping[str, Mapping[str, Any]], subset: str | None
) -> tuple[list[Path], dict[Path, str] | None]:
    """The files of one config with the split of each, None where the README leaves the splits to names.

    Where none of the patterns matches a file here, the README speaks of others, and all files go on to names.
    """
    present = {name: list(_matched(files, folder, config)) for name, config in configs.items()}
    present = {name: matched for name, matched in present.items() if matched}
    if subset is not None and subset not in present:
        names = ", ".join(present) or ", ".join(configs)
        raise DataError(
            f"{folder}: no subset '{subset}' with files here; its README names {names}."
            f"{did_you_mean(subset, present)} Set subset to one of them"
        )
    if not present:
        return list(files), None
    default = [name for name, config in configs.items() if name in present and config.get("default") is True]
    name = subset or next(iter([*default, *(n for n in present if n == "default" or len(present) == 1)]), "")
    if not name:
        raise DataError(
            f"{folder}: its README names several subsets: {', '.join(present)}. Set subset to one of them (a "
            "source each to read several)"
        )
    labels = dict(present[name])
    return list(labels), labels if all(labels.values()) else None


def _matched(files: Sequence[Path], folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """(file, split) for each file that the config's patterns match; split empty where they name none."""
    base = str(config.get("data_dir") or "").strip("/")
    seen: set[Path] = set()
    for split, pattern in _patterns(config["data_files"]):
        whole = f"{base}/{pattern}" if base else pattern
        for file in files:
            if file not in seen and _matches(file.relative_to(folder).as_posix(), whole):
                seen.add(file)
                yield file, split


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) of what `data_files` may be: a text, a list, a mapping, a list of {split, path}."""
    if isinstance(data_files, str):
        yield "", data_files
    elif isinstance(data_files, Mapping):
        for split, paths in data_files.items():
            yield from ((str(split), path) for path in _texts(paths))
    elif isinstance(data_files, list):
        for entry in data_files:
            if isinstance(entry, Mapping):
                yield from ((str(entry.get("split", "")), path) for path in _texts(entry.get("path")))
            elif isinstance(entry, str):
                yield "", entry


def _texts(paths: Any) -> Iterable[str]:
    return [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]


def _matches(relative: str, pattern: str) -> bool:
    """As a shell would: `*` within a folder, `**` over folders; a folder's name stands for what lies below."""
    pattern = str(PurePosixPath(pattern))
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = "".join(words.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(f"{found}(?:/.*)?", relative) is not None
