"""File, folder, glob or hub id → rows that know their `file:line`.

    read_rows(Place("data/a.jsonl", columns={"question": "prompt"}))  →  Row("data/a.jsonl:1", {"prompt": …}), …

Files are read by `readers`, line by line in bounded memory; a hub id goes through `datasets`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.memo import remembered
from sft.data.readers import READERS, BadRow, Row, Rows, kind_of, read_file, rows_of_batches
from sft.data.splits import choose
from sft.datanames import cure_of_kind
from sft.errors import DataError, did_you_mean
from sft.hub import cure

if TYPE_CHECKING:
    from sft.config import Source

__all__ = ["BadRow", "Place", "Row", "file_of", "files_left_out", "place_of", "read_rows", "source_files",
           "source_fingerprint"]  # fmt: skip

HEAD_ROWS = 100
"""A column that none of the first rows has does not exist."""
FILES_NAMED = 5
"""Of files that are left out."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows come from, and which of them: what the config says of a source, but its format and its share."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    limit: int | None = None


def place_of(source: Source) -> Place:
    return Place(source.path, source.split, source.subset, source.revision, source.columns, source.limit)


def read_rows(place: Place | str) -> Rows:
    """The rows of a source in order, its columns renamed (theirs → ours), at most `limit` of them.

    Raises DataError where the source or a column does not exist or a file is unreadable as a whole; a row that is
    unreadable comes as `BadRow`. `split` picks among the files of a folder whose names say train, test, validation.
    """
    place = Place(place) if isinstance(place, str) else place
    columns = place.columns
    named = [ours for ours in columns.values() if ours is not None]
    twice = sorted({ours for ours in named if named.count(ours) > 1})
    if twice:
        raise DataError(f"columns: two columns are mapped to '{twice[0]}': {dict(columns)}. Map one of them")
    files = source_files(place.path, place.split, place.subset)
    if files:
        names = {theirs: ours or theirs for theirs, ours in columns.items()}
        rows: Rows = itertools.chain.from_iterable(read_file(file, _shown(file), names) for file in files)
    else:
        rows = _read_hub(place)
    return itertools.islice(_renamed(rows, columns, place.path), place.limit)


def file_of(source: str) -> str:
    """`a.jsonl` of `a.jsonl:17`: where a row's neighbours are, which share its format."""
    return source.rpartition(":")[0] or source


def files_left_out(path: str, split: str = "train", subset: str | None = None) -> Iterator[str]:
    """Says which files of a folder are not read, since they belong to another split. Nothing where all are read.

    Raises DataError where nothing is found.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return
    choice = choose(_found_in(folder, path), folder, split, subset)
    left, others = choice.left_out, choice.of_no_subset
    if others:
        named = ", ".join(str(file.relative_to(folder)) for file in others[:FILES_NAMED])
        named += f" and {len(others) - FILES_NAMED:,} more" if len(others) > FILES_NAMED else ""
        yield f"{path}: left out, since they belong to another subset, or to none: {named}"
    if left:
        named = ", ".join(f"{file.relative_to(folder)} ({label})" for file, label in left[:FILES_NAMED])
        named += f" and {len(left) - FILES_NAMED:,} more" if len(left) > FILES_NAMED else ""
        yield (
            f"{path}: left out, since by their names they belong to another split than '{split}': {named}. "
            "To read one, name the file itself as a source"
        )


def source_files(path: str, split: str = "train", subset: str | None = None) -> list[Path]:
    """The files of a source, sorted; empty for a hub id. Raises DataError where nothing is found."""
    expanded = Path(path).expanduser()
    if expanded.is_file():
        if not kind_of(expanded):
            raise DataError(f"{path}: no reader for this kind of file{cure_of_kind(expanded)}. Known: {_kinds()}")
        return [expanded]
    if expanded.is_dir():
        return list(choose(_found_in(expanded, path), expanded, split, subset).files)
    if glob.has_magic(path):
        matched = sorted(Path(f) for f in glob.glob(str(expanded), recursive=True))
        found = [f for f in matched if f.is_file() and kind_of(f)]
        if not found:
            other = next((c for f in matched if (c := cure_of_kind(f))), "")
            raise DataError(
                f"{path}: matches {len(matched)} paths, none of them a data file{other}. Known kinds: {_kinds()}"
            )
        return found
    if _HUB_ID.fullmatch(path) and not kind_of(expanded):
        return []
    raise DataError(f"{path}: no such file or folder, seen from {Path.cwd()}.{_nearest(expanded)}")


def _found_in(folder: Path, path: str) -> list[Path]:
    found = [f for f in sorted(folder.rglob("*")) if f.is_file() and _wanted(f.relative_to(folder))]
    if not found:
        other = next((c for f in sorted(folder.rglob("*")) if f.is_file() and (c := cure_of_kind(f))), "")
        raise DataError(f"{path}: no data files in this folder{other}. Known kinds: {_kinds()}")
    return found


def _shown(file: Path) -> str:
    return file.as_posix()


def _kinds() -> str:
    return ", ".join(READERS) + " (.gz for text)"


def _wanted(relative: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in relative.parts)
    return not hidden and bool(kind_of(relative)) and not relative.name.startswith(("cache-", "dataset_info", "state."))


def _nearest(path: Path) -> str:
    beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" Did you mean '{path.parent / near[0]}'?" if near else " Check data.train[].path"


def _renamed(rows: Rows, columns: Mapping[str, str | None], path: str) -> Rows:
    """The rows with columns renamed, in place of a namesake where a row has both; without those that are mapped to
    null. The first rows must have them all."""
    if not columns:
        yield from rows
        return
    head: list[Row | BadRow] = list(itertools.islice(rows, HEAD_ROWS))
    good = [row for row in head if isinstance(row, Row)]
    seen = list(dict.fromkeys(key for row in good for key in row.data))
    for theirs in columns:
        if good and theirs not in seen:
            raise DataError(
                f"{path}: no column '{theirs}' in the first {len(good)} rows; columns seen: {', '.join(seen)}."
                f"{did_you_mean(theirs, seen)} columns maps their names to ours, e.g. {{question: prompt}}"
            )
    for row in itertools.chain(head, rows):
        if isinstance(row, Row):
            renamed = {ours: value for key, value in row.data.items() if (ours := columns.get(key)) is not None}
            kept = {key: value for key, value in row.data.items() if key not in renamed and key not in columns}
            yield Row(row.source, {**kept, **renamed}, row.size)
        else:
            yield row


def _load_hub(place: Place) -> Any:
    import datasets

    path, split, subset, revision = place.path, place.split, place.subset, place.revision
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(path, name=subset, split=split, revision=revision, streaming=False)
    except Exception as error:  # datasets raises its own, HTTP's, the hub's and the file system's errors
        asked = ", ".join(
            f"{name} '{value}'"
            for name, value in (("split", split), ("subset", subset), ("revision", revision))
            if value
        )
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(told or error).split("Example of usage")[0].split())[:300].rstrip(".")
        raise DataError(
            f"{path}: there is no such file here, and of the hub's dataset ({asked}) this is said: "
            f"{reason or type(error).__name__}. {_hub_cure(place, reason)}"
        ) from error
    if revision is not None and datasets.config.HF_HUB_OFFLINE:
        _require_cached_revision(data, path, revision)
    return data


def _hub_cure(place: Place, reason: str) -> str:
    path = place.path
    cures = {
        "Unknown split": "Set split to one of them",
        "BuilderConfig": "Set subset to one of them",
        "Config name is missing": "Set subset to one of them",
        "config": "Set subset to one of them, or connect to the hub",  # of the configs in the cache, offline
        "gated": "Ask for access on its page, then log in (hf auth login, or HF_TOKEN in the environment)",
        "Revision": "Set revision to a branch, tag or commit that it has",
        "doesn't exist": "Check the name; a private dataset needs a login (hf auth login, or HF_TOKEN)",
        "JSON parse error": "Its rows do not fit one table: download them ('hf download --repo-type dataset "
        f"{path} --local-dir DIR') and give DIR as path, where each row is read by itself",
        "scripts are no longer supported": "Look for a revision with Parquet files (refs/convert/parquet), or download "
        "its rows and name the files",
    }
    whatever = "Check path, split, subset, revision and the network; or download it and name the files"
    found = next((cured for said, cured in cures.items() if said in reason), whatever)
    return cure(path, reason, found, revision=place.revision, dataset=True)


def _require_cached_revision(data: Any, path: str, revision: str) -> None:
    """Offline, `datasets` serves the version it prepared last, whatever revision was asked for."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset"), "refs", revision)
    commit = reference.read_text().strip() if reference.is_file() else revision
    prepared = {part for file in data.cache_files for part in Path(file["filename"]).parts if _COMMIT.fullmatch(part)}
    if commit not in prepared:
        held = f"commit {prepared.pop()}" if prepared else "a version that names no commit"
        raise DataError(
            f"{path}: revision '{revision}' cannot be had without the hub: of its local cache, datasets serves {held}. "
            "Connect, or set revision to that commit"
        )


def _read_hub(place: Place) -> Rows:
    data = _load_hub(place).with_format("arrow")
    tables = (table for table in data.iter(1024))
    batches = itertools.chain.from_iterable(table.to_batches() for table in tables)
    yield from rows_of_batches(batches, f"{place.path}[{place.split}]")


def source_fingerprint(place: Place | str, memo: Path | None = None) -> str:
    """SHA-256 over the settings and over the bytes of every file: changes with any row, not with a file's date.

    `memo`: a folder that remembers it by what the system says of the files, so that each is read once.
    """
    place = Place(place) if isinstance(place, str) else place
    settings = json.dumps([*astuple(place)], sort_keys=True)
    digest = hashlib.sha256(settings.encode("utf-8", "surrogatepass"))
    files: Iterable[Path] = source_files(place.path, place.split, place.subset)
    if not files:
        data = _load_hub(place)
        files = [Path(cached["filename"]) for cached in data.cache_files]
        digest.update(f"{data.num_rows} {data.features} {data._fingerprint if not files else ''}".encode())

    def whole() -> str:
        for file in files:
            digest.update(f"\n{_shown(file)} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            for block in _blocks(file):
                digest.update(block)
        return digest.hexdigest()

    named = [(_shown(file), file) for file in files]
    return remembered(memo, digest.hexdigest(), named, whole) if memo and named else whole()


def _blocks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}. Check its permissions") from error
