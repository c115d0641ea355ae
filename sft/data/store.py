"""Prepared examples on disk: flat arrays that every process maps into memory, published whole or not at all.

    <key>/manifest.json       names, types and sizes of the arrays; what it describes is complete
          ids.bin …           the arrays of ARRAYS, one after the other
          report.json         counts
          samples.json        a few conversations of each split, for generation and for the check of serving
          data_report.jsonl   one note a line
          digests.json        of the tokens of its sides, so that they are read once

Shapes: C conversations (rows), E examples, N tokens. A conversation holds one example or several.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sft.durable import NO_SPACE, flush_to_disk
from sft.errors import DiskError
from sft.types import Example, Int32Array

MANIFEST, REPORT, SAMPLES, NOTES = "manifest.json", "report.json", "samples.json", "data_report.jsonl"
DIGESTS = "digests.json"
ARRAYS: dict[str, str] = {
    "ids": "<i4",  # N
    "weights": "<f4",  # N
    "lengths": "<i4",  # E
    "trained": "<i4",  # E: trained tokens, but for a first one
    "names": "|u1",  # the sources of the examples as UTF-8, one after the other
    "name_lengths": "<i4",  # E
    "examples": "<i4",  # C: examples of the conversation
    "origins": "<i4",  # C: number of the data source
    "hashes": "<u8",  # C: content_hash
    "train": "<i8",  # conversations that are trained
    "eval": "<i8",  # conversations that are held out
}


class StoreWriter:
    """Appends to the arrays in a folder that nobody else knows yet. Memory stays flat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_conversations = 0
        self._counts = dict.fromkeys(ARRAYS, 0)
        with ExitStack() as stack:
            self._files: dict[str, IO[bytes]] = {
                name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS
            }
            self._stack = stack.pop_all()

    def append(self, **arrays: NDArray[Any]) -> None:
        """Appends to the named arrays; `examples` counts the conversations."""
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, dtype=ARRAYS[name])
            self._files[name].write(data.tobytes())
            self._counts[name] += data.size
        self.num_conversations += len(arrays.get("examples", ()))

    def read(self, name: str) -> NDArray[Any]:
        """What was appended so far."""
        self._files[name].flush()
        return _mapped(self.folder, name, self._counts[name])

    def finish(self, report: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
        """Writes the rest and the manifest, and flushes every file to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        _write(self.folder / REPORT, report)
        _write(self.folder / SAMPLES, samples)
        arrays = {name: {"dtype": ARRAYS[name], "count": count} for name, count in self._counts.items()}
        _write(self.folder / MANIFEST, {"version": 1, "arrays": arrays})

    def close(self) -> None:
        self._stack.close()


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _mapped(folder: Path, name: str, count: int) -> NDArray[Any]:
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=ARRAYS[name])
    return np.memmap(folder / f"{name}.bin", dtype=ARRAYS[name], mode="r", shape=(count,))


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that becomes `path` at the end of the block, or vanishes with its exception.

    Where another process published `path` meanwhile, its folder stays and this one vanishes: both hold the same.
    """
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        yield folder
        flush_to_disk(folder)
        if path.exists() and not is_published(path):  # damaged after it was published
            shutil.rmtree(path)
        try:
            folder.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_published(path):
                raise
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_staged(path: Path) -> None:
    """Removes what killed processes left of staging `path`. Only for the holder of its lock."""
    for folder in path.parent.glob(f".{path.name}.????????"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, or a folder that refuses to be written, into a DiskError."""
    try:
        yield
    except OSError as error:
        folder, free = path.parent, ""
        if error.errno in NO_SPACE:
            if folder.is_dir():
                free = f" ({shutil.disk_usage(folder).free >> 20} MiB free)"
            raise DiskError(
                f"no space left for prepared data in {folder}{free}: {error.strerror}. Free some, or choose another "
                "disk for the cache"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DiskError(
                f"cannot write prepared data into {folder}: {error.strerror}. Choose another folder for the cache"
            ) from error
        raise


def is_published(path: Path) -> bool:
    """Whether the folder is whole: its manifest is there and every array has the size it states."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (path / f"{name}.bin").stat().st_size == manifest["arrays"][name]["count"] * np.dtype(dtype).itemsize
            for name, dtype in ARRAYS.items()
        ) and all((path / name).is_file() for name in (REPORT, SAMPLES, NOTES))
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Store:
    """The arrays of a published folder, mapped."""

    def __init__(self, path: Path) -> None:
        assert is_published(path), f"{path} is no published store"
        self.path = path
        counts = {n: a["count"] for n, a in _read(path / MANIFEST)["arrays"].items()}
        self.arrays = {name: _mapped(path, name, counts[name]) for name in ARRAYS}
        self.token_starts = _starts(self.arrays["lengths"])
        self.name_starts = _starts(self.arrays["name_lengths"])
        self.example_starts = _starts(self.arrays["examples"])

    def example(self, index: int) -> Example:
        tokens = slice(int(self.token_starts[index]), int(self.token_starts[index + 1]))
        name = slice(int(self.name_starts[index]), int(self.name_starts[index + 1]))
        return Example(
            np.asarray(self.arrays["ids"][tokens]),
            np.asarray(self.arrays["weights"][tokens]),
            self.arrays["names"][name].tobytes().decode("utf-8", "surrogateescape"),
        )


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Split:
    """Conversations of one side of the store, numbered from 0; examples are mapped, not held.

    All examples of a conversation come in the same step. `origins_C` numbers the source of each, `repeats_S` says how
    often the conversations of a source come in one epoch.
    `samples`: up to 16 of `{"source", "messages", "tools", "prompt_ids", "reference"}`, messages without the answer.
    """

    def __init__(
        self, store: Store, conversations_C: NDArray[np.int64], repeats: Sequence[float], samples: list[dict[str, Any]]
    ) -> None:
        self._store = store
        self.samples = samples
        counts_C = store.arrays["examples"][conversations_C]
        self._starts_C = _starts(counts_C)
        first_C = store.example_starts[conversations_C]
        within_E = np.arange(self._starts_C[-1]) - np.repeat(self._starts_C[:-1], counts_C)
        self._index_E: NDArray[np.int64] = np.repeat(first_C, counts_C) + within_E
        self.origins_C: Int32Array = store.arrays["origins"][conversations_C]
        self.repeats_S = tuple(repeats)

    @property
    def num_conversations(self) -> int:
        return len(self.origins_C)

    @property
    def num_examples(self) -> int:
        return len(self._index_E)

    @cached_property
    def lengths_E(self) -> Int32Array:
        """Tokens of each example."""
        lengths: Int32Array = self._store.arrays["lengths"][self._index_E]
        return lengths

    @cached_property
    def trained_E(self) -> Int32Array:
        """Trained tokens of each example."""
        trained: Int32Array = self._store.arrays["trained"][self._index_E]
        return trained

    def digest(self) -> str:
        """16 digits of SHA-256 over how often each source comes and over every token and weight, in their order.

        Remembered beside the arrays for as long as their files are what they were; arrays whose files are gone, as of
        data that was prepared only to be looked at, stay readable and are not.
        """
        repeats_S = np.asarray(self.repeats_S, dtype=np.float32)
        hasher = hashlib.sha256(repeats_S[self.origins_C].tobytes() + self.origins_C.tobytes())
        hasher_of_rows = hashlib.sha256(self._index_E.tobytes())
        name = f"{hasher.hexdigest()[:16]} {hasher_of_rows.hexdigest()[:16]}"
        files = _file_states(self._store.path)
        known = _known_digests(self._store.path, files) if files else {}
        if name not in known:
            known[name] = self._digest_of_tokens(hasher)
            if files:
                _remember(self._store.path, {"files": files, "digests": known})
        return known[name]

    def _digest_of_tokens(self, hasher: hashlib._Hash) -> str:
        store = self._store
        starts_E, ends_E = (4 * store.token_starts[self._index_E + i] for i in (0, 1))  # bytes of int32 and float32
        if len(store.arrays["ids"]):
            ids, weights = (memoryview(np.asarray(store.arrays[n])).cast("B") for n in ("ids", "weights"))
            for start, end in zip(starts_E.tolist(), ends_E.tolist(), strict=True):
                hasher.update(ids[start:end])
                hasher.update(weights[start:end])
        return hasher.hexdigest()[:16]

    @property
    def first_examples_C(self) -> NDArray[np.int64]:
        """The first example of each conversation."""
        return self._starts_C[:-1]

    def conversation_examples(self, conversation: int) -> range:
        """The examples of a conversation."""
        return range(int(self._starts_C[conversation]), int(self._starts_C[conversation + 1]))

    def example(self, index: int) -> Example:
        """One example; its arrays are read-only views of the file."""
        return self._store.example(int(self._index_E[index]))


def _file_states(path: Path) -> dict[str, list[int]]:
    """Size and time of each array's file; nothing where the folder is gone."""
    if not path.is_dir():
        return {}
    states = {name: (path / f"{name}.bin").stat() for name in ARRAYS}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _known_digests(path: Path, files: Mapping[str, Any]) -> dict[str, str]:
    try:
        found = _read(path / DIGESTS)
        return dict(found["digests"]) if found["files"] == files else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(path: Path, value: Any) -> None:
    part = path / f".{DIGESTS}.{uuid.uuid4().hex[:8]}"
    try:
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path / DIGESTS)
    except OSError:  # a full or read-only disk: computed again next time
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` leaves: the splits, and the report of counts that `data.json` repeats.

    `report["rows"] == report["kept"] + sum(report["dropped"].values()) + report["held_out"]`, by source too.
    """

    key: str
    path: Path
    train: Split
    eval: Split | None
    report: dict[str, Any]


def open_prepared(path: Path, repeats: Sequence[float]) -> Prepared:
    """Maps a published folder. `repeats`: of each data source, train then eval."""
    store = Store(path)
    samples = _read(path / SAMPLES)
    train = Split(store, store.arrays["train"], repeats, samples["train"])
    held = Split(store, store.arrays["eval"], [1.0] * len(repeats), samples["eval"])
    return Prepared(path.name, path, train, held if held.num_conversations else None, _read(path / REPORT))
