"""Rows → encoded batches, in order, over worker processes.

The calling process reads and deals; workers bring rows to samples and encode them. Results come back in the order of
the rows whatever the number of workers, so what is stored does not depend on it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sft.data.formats import FORMATS, detect_format
from sft.data.heldout import content_hash
from sft.data.readers import BadRow, Row
from sft.data.sources import file_of, place_of, read_rows
from sft.errors import DataError, WorkerError
from sft.types import Conversation, Example, Float32Array, Int32Array, Note, Sample

if TYPE_CHECKING:
    from sft.config import Source

BATCH_ROWS = 256
BATCH_BYTES = 2**21
SMALL_ROWS = 2000
"""Below this, starting processes costs more than they bring."""
MOST_WORKERS = 64


class Encoded(Protocol):
    @property
    def examples(self) -> tuple[Example, ...]: ...
    @property
    def notes(self) -> tuple[Note, ...]: ...


class ManyEncoder(Protocol):
    def encode_many(self, samples: Sequence[Sample]) -> Sequence[Encoded]: ...


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of one source and one format; `origin` is the number of the source, `decided` where the format was found."""

    origin: int
    format: str
    decided: str
    rows: list[Row | BadRow]


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """R rows with E examples of N tokens in all. A row without examples was refused or dropped; its notes say why."""

    ids: Int32Array  # N
    weights: Float32Array  # N
    lengths: Int32Array  # E
    trained: Int32Array  # E
    names: list[str]  # E
    examples: Int32Array  # R
    hashes: NDArray[np.uint64]  # R
    notes: list[tuple[int, Note]]  # (row, note)
    templated: int  # of the R rows, those that a template renders


def encode_batch(encoder: ManyEncoder, batch: RowBatch) -> EncodedBatch:
    """Never raises for a row: what a row does not fulfil becomes a note of action `refused`."""
    samples: list[Sample] = []
    where: list[int] = []
    notes: list[tuple[int, Note]] = []
    for index, row in enumerate(batch.rows):
        sample = to_sample(row, batch)
        if isinstance(sample, Note):
            notes.append((index, sample))
        else:
            samples.append(sample)
            where.append(index)
    hashes = np.zeros(len(batch.rows), dtype=np.uint64)
    examples_R = np.zeros(len(batch.rows), dtype=np.int32)
    examples: list[Example] = []
    encoded = encoder.encode_many(samples) if samples else []
    for index, sample, result in zip(where, samples, encoded, strict=True):
        notes.extend((index, note) for note in result.notes)
        examples_R[index] = len(result.examples)
        if result.examples:
            hashes[index] = content_hash(sample)
            examples.extend(result.examples)
    return EncodedBatch(
        _joined([e.input_ids_T for e in examples], np.int32),
        _joined([e.weights_T for e in examples], np.float32),
        np.array([len(e.input_ids_T) for e in examples], dtype=np.int32),
        np.array([e.num_trained for e in examples], dtype=np.int32),
        [e.source for e in examples],
        examples_R,
        hashes,
        notes,
        sum(isinstance(sample, Conversation) for sample in samples),
    )


def _joined(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype=dtype)


def to_sample(row: Row | BadRow, batch: RowBatch) -> Sample | Note:
    """The row in its file's format, or why not."""
    if isinstance(row, BadRow):
        return Note(row.source, "refused", "bad_row", row.message)
    try:
        return FORMATS[batch.format](row)
    except DataError as error:
        detail = str(error).removeprefix(f"{row.source}: ")
        other = _other_format(row, batch.format)
        if other and batch.decided:
            detail += f" (this row looks like {other}, but {batch.decided} made the file's format {batch.format})"
        return Note(row.source, "refused", "bad_row", detail)


def _other_format(row: Row, used: str) -> str:
    try:
        found = detect_format(row.data)
    except DataError:
        return ""
    return found if found != used else ""


def default_workers() -> int:
    """One a core that this process may use: the calling process itself needs a few per cent of one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        cores = os.cpu_count() or 1
    return max(1, min(cores, MOST_WORKERS, _cgroup_cores()))


def _cgroup_cores() -> int:
    """A container on a large machine sees all of its cores and may use a few of them."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return MOST_WORKERS if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such limit here
        return MOST_WORKERS


def encode_stream(
    batches: Iterable[RowBatch], make_encoder: Callable[[], ManyEncoder], workers: int | None = None
) -> Iterator[tuple[RowBatch, EncodedBatch]]:
    """Each batch with its result, in order. `make_encoder` must be picklable: a worker may be a fresh interpreter.

    `workers` 0: in this process; None: one a core, or none for few rows. Raises WorkerError where a worker dies.
    """
    stream = iter(batches)
    if workers is None:
        head: list[RowBatch] = []
        rows = 0
        for batch in stream:
            head.append(batch)
            rows += len(batch.rows)
            if rows >= SMALL_ROWS:
                break
        stream = itertools.chain(head, stream)
        workers = default_workers() if rows >= SMALL_ROWS else 0
        workers = 0 if workers == 1 else workers
    encoder = make_encoder()  # with workers too: an error in making it is raised here and not in another process
    if workers == 0:
        for batch in stream:
            yield batch, encode_batch(encoder, batch)
    else:
        yield from _over_workers(stream, make_encoder, workers)


def _over_workers(
    batches: Iterator[RowBatch], make_encoder: Callable[[], ManyEncoder], workers: int
) -> Iterator[tuple[RowBatch, EncodedBatch]]:
    context = multiprocessing.get_context("fork" if _may_fork() else "spawn")
    started = (make_encoder, os.getpid())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=started)
    waiting: deque[tuple[RowBatch, Future[EncodedBatch]]] = deque()
    try:
        with warnings.catch_warnings():  # forking beside the tokenizers' idle threads is what _may_fork decided on
            warnings.simplefilter("ignore", DeprecationWarning)
            for batch in itertools.islice(batches, 2 * workers):
                waiting.append((batch, pool.submit(_work, batch)))
        while waiting:
            batch, future = waiting.popleft()
            result = future.result()
            following = next(batches, None)
            if following is not None:
                waiting.append((following, pool.submit(_work, following)))
            yield batch, result
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process that prepares data died (killed, or out of memory?). Prepare on its own with `sft prepare`, "
            "with more memory free"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _may_fork() -> bool:
    """Forking starts workers at once. It is unsafe beside threads that hold locks, CUDA or a process group."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (torch.cuda.is_initialized() or grouped)


_encoder: ManyEncoder | None = None


def _start_worker(make_encoder: Callable[[], ManyEncoder], parent: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _encoder = make_encoder()


def _die_with(parent: int) -> None:
    """Ends this worker when its parent was killed: the pool's queue alone would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(batch: RowBatch) -> EncodedBatch:
    assert _encoder is not None
    return encode_batch(_encoder, batch)


@dataclass
class Dealer:
    """Deals rows into batches of one file and format, and finds out the formats that are `auto`."""

    say: Callable[[str], None]
    formats: dict[str, str]  # file → format, filled on the way

    def read(self, source: Source, origin: int, most: int | None = None) -> Iterator[RowBatch]:
        """The rows of the config's source number `origin`, at most so many."""
        rows = itertools.islice(read_rows(place_of(source)), most)
        return self.deal(rows, origin, source.format, {ours for ours in source.columns.values() if ours is not None})

    def deal(
        self, rows: Iterable[Row | BadRow], origin: int, wanted: str, mapped: Collection[str] = ()
    ) -> Iterator[RowBatch]:
        """Batches in order. With `auto`, a file's first row that fits a format decides for the file.

        `mapped` are the names that the user's `columns` gave: a format that they make up goes before others.
        """
        auto = wanted == "auto"
        batch, file, size = RowBatch(origin, wanted, "", []), "", 0
        for row in rows:
            own = file_of(row.source)
            if own != file or len(batch.rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                if batch.rows:
                    yield batch
                kept = own == file
                batch = replace(batch, rows=[]) if kept or not auto else RowBatch(origin, "auto", "", [])
                file, size = own, 0
            if isinstance(row, Row):
                size += row.size
                if batch.format == "auto":
                    batch, row = self._decide(batch, row, file, mapped)
                else:
                    self.formats.setdefault(file, batch.format)
            batch.rows.append(row)
        if batch.rows:
            yield batch

    def _decide(self, batch: RowBatch, row: Row, file: str, mapped: Collection[str]) -> tuple[RowBatch, Row | BadRow]:
        try:
            found = _mapped_format(row, mapped) or detect_format(row.data)
            FORMATS[found](row)
        except DataError as error:
            return batch, BadRow(row.source, str(error).removeprefix(f"{row.source}: "))
        self.formats[file] = found
        self.say(f"{file}: format {found}, as {row.source} shows")
        return replace(batch, format=found, decided=row.source), row


def _mapped_format(row: Row, mapped: Collection[str]) -> str:
    """The format that the mapped columns make up by themselves, or an empty string."""
    try:
        return detect_format({key: row.data[key] for key in mapped if key in row.data}) if mapped else ""
    except DataError:
        return ""
