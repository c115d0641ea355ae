"""Files that are data by their names, and what to say where one stands in the place of a config.

A config is a YAML file; `.json` and `.txt` files are looked into, since YAML may stand in either.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

DATA_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""What `sft.data.readers` reads; a test holds the two together."""
_LOOKED_INTO = (".json", ".txt", ".md", "")
_HEAD_BYTES = 1 << 16
_SECTIONS = ("model", "data", "base", "search", "run", "train", "optim", "batch", "save", "eval", "log", "seed", "dir")
_SECTION_LINE = re.compile(rf"""^\s*\{{?\s*["']?({"|".join(_SECTIONS)})["']?\s*:""", re.MULTILINE)
_AS_ROWS = "Write each text as a row of a .jsonl file (in Python: json.dumps({'text': text}), a line each)"
OTHER_KINDS = {
    ".txt": _AS_ROWS,
    ".md": _AS_ROWS,
    ".xlsx": "Save the sheet as CSV (UTF-8)", ".xls": "Save the sheet as CSV (UTF-8)",
    ".zst": "Unpack it first (zstd -d), or pack it with gzip", ".zip": "Unpack it first", ".tar": "Unpack it first",
    ".bz2": "Unpack it first, or pack it with gzip", ".xz": "Unpack it first, or pack it with gzip",
    ".feather": "Save it as Parquet", ".orc": "Save it as Parquet", ".db": "Write its rows to a .jsonl or Parquet file",
    ".pkl": "Pickles can hold code and are not read: write the rows to a .jsonl or Parquet file",
    ".pt": "Pickles can hold code and are not read: write the rows to a .jsonl or Parquet file",
}  # fmt: skip
"""Endings of files that no reader knows, and the cure."""


def kind_by_name(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`, in small letters."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def cure_of_kind(path: Path) -> str:
    """What to do with a data file that no reader knows; empty where the name tells nothing."""
    kind = kind_by_name(path)
    return f". {OTHER_KINDS[kind]}" if kind in OTHER_KINDS else ""


def told_as_data(path: Path) -> str:
    """What to say of a file or folder of data that was given as a config; empty for anything else."""
    if path.is_dir():
        held = next((f for f in sorted(path.iterdir()) if kind_by_name(f) in DATA_KINDS and _is_data(f)), None)
        return _told(path, f"a folder of data (it holds {held.name})", str(path)) if held else ""
    if not path.is_file() or not _is_data(path):
        return ""
    unread = cure_of_kind(path)
    if unread:
        return f"{path} is data, not a YAML file, and of a kind that is not read{unread}, then: " + _init("FILE.jsonl")
    return _told(path, "data, not a YAML file", str(path))


def _told(path: Path, what: str, data: str) -> str:
    return f"{path} is {what}. Let a config be written for it: {_init(data)}"


def _init(data: str) -> str:
    return f"sft init {data} --model NAME --out my.yaml, then sft check my.yaml and sft train my.yaml."


def _is_data(path: Path) -> bool:
    kind = kind_by_name(path)
    if kind not in _LOOKED_INTO:
        return kind in DATA_KINDS
    if kind == "" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    if kind != ".json":
        return bool(head.strip()) and not _SECTION_LINE.search(head)
    try:
        value, _ = json.JSONDecoder().raw_decode(head.lstrip())
    except ValueError:  # longer than the head, or no JSON at all
        return not _SECTION_LINE.search(head)
    sections = value if isinstance(value, dict) else {}
    return "base" not in sections and not any(isinstance(sections.get(section), dict) for section in _SECTIONS)
