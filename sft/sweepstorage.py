"""Where a sweep's trials are kept, and the guard that lets one driver at a time decide.

A journal file in the sweep's folder, or a database. The guard is a file lock, or an advisory lock of the database: the
system releases both when their holder dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from sft.errors import StorageError
from sft.secrets import MASK, mask_secrets

JOURNAL = "study.journal"
_GUARD_SECONDS = 60

Guard = Callable[[], AbstractContextManager[None]]


class _JournalLock:
    """Optuna's own lock of a journal, behind a kernel lock that dies with its holder.

    Whoever holds the kernel lock and still meets a symlink lock knows that its owner is dead, or a dashboard that
    needs it for a moment; so a short patience is enough. A link that leads nowhere (the folder was moved after its
    owner was killed) is taken away at once: Optuna would wait for it without end.
    """

    def __init__(self, path: Path) -> None:
        # absolute: the link holds this path, and a relative one would lead nowhere from the folder it lies in
        self._inner = JournalFileSymlinkLock(str(path.absolute()), grace_period=3)
        self._link = path.with_name(path.name + ".lock")
        self._path = path.with_name(path.name + ".flock")
        self._descriptor = -1

    def acquire(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        if self._link.is_symlink() and not self._link.exists():
            self._link.unlink(missing_ok=True)
        return bool(self._inner.acquire())

    def release(self) -> None:
        try:
            self._inner.release()
        finally:
            os.close(self._descriptor)


class JournalFile(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, whose last line a kill may have torn: cut off, under the lock, before the next append."""

    def __init__(self, path: Path) -> None:
        self._sft_path, self._sft_lock = path, _JournalLock(path)
        super().__init__(str(path), lock_obj=self._sft_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._sft_lock.acquire()
        try:
            with open(self._sft_path, "rb+") as stream:
                stream.seek(_whole_lines(stream))
                stream.truncate()
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            self._sft_lock.release()


def _whole_lines(stream: Any) -> int:
    """Where the last whole line of a journal ends; a line counts when it ends and is JSON."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = _line_start(stream, end)
        stream.seek(start)
        line = stream.read(end - start)
        if line.endswith(b"\n") and _is_json(line):
            return int(end)
        end = start
    return 0


def _line_start(stream: Any, end: int) -> int:
    """Where the line that ends at `end` begins, looking back block by block."""
    at = end - 1
    while at > 0:
        block = min(4096, at)
        stream.seek(at - block)
        found = stream.read(block).rfind(b"\n")
        if found >= 0:
            return int(at - block + found + 1)
        at -= block
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def open_storage(url: str | None, folder: Path) -> tuple[BaseStorage, Guard]:
    """The storage and its guard. Raises StorageError that never shows the password."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFile(folder / JOURNAL)), lambda: _file_guard(folder / ".sweep.lock")
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":  # which driver that means is another with each SQLAlchemy
            parsed = parsed.set(drivername="postgresql+psycopg")
        kind = parsed.get_backend_name()
        with _database_guard(parsed, "tables")():  # two drivers that begin at once would both create them
            storage = RDBStorage(
                parsed.render_as_string(hide_password=False),
                engine_kwargs={"pool_pre_ping": True} if kind != "sqlite" else {},
            )
    except ModuleNotFoundError as error:
        raise StorageError(
            f"storage: {mask_secrets(url)} needs the package {error.name}"
            + ('; for PostgreSQL: pip install "psycopg[binary]".' if "psycopg" in str(error.name) else ".")
        ) from None
    except SQLAlchemyError as error:
        raise StorageError(f"storage: {mask_secrets(url)} cannot be opened: {without_password(error, url)}") from None
    except (ImportError, optuna.exceptions.StorageInternalError) as error:
        raise StorageError(f"storage: {mask_secrets(url)} cannot be used: {without_password(error, url)}") from None
    return storage, _database_guard(parsed, folder.as_posix())


def without_password(error: BaseException, url: str | None) -> str:
    """The error in one line, without the password of a storage URL."""
    text = " ".join(str(getattr(error, "orig", None) or error).split())
    if url is not None:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        with suppress(ArgumentError):
            if password := make_url(url).password:
                text = text.replace(password, MASK)
    return mask_secrets(text)


@contextmanager
def _file_guard(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _database_guard(url: Any, name: str) -> Guard:
    """One driver at a time, by the means of the database. Its server frees the lock when a holder's connection ends."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    kind = url.get_backend_name()
    if kind == "sqlite":
        if not url.database or url.database == ":memory:":
            raise StorageError("storage: a database in memory does not outlive its driver; name a file, or leave null.")
        beside = Path(f"{url.database}.lock")
        beside.parent.mkdir(parents=True, exist_ok=True)
        return lambda: _file_guard(beside)
    key = int.from_bytes(hashlib.sha256(f"sft-sweep:{name}".encode()).digest()[:8], "big", signed=True)
    lock = {
        "postgresql": (
            # a holder that hangs loses the lock with its connection
            f"SET LOCAL idle_in_transaction_session_timeout = '{_GUARD_SECONDS}s'",
            f"SET LOCAL lock_timeout = '{2 * _GUARD_SECONDS}s'",
            f"SELECT pg_advisory_xact_lock({key})",
        ),
        "mysql": (f"SELECT GET_LOCK('sft-sweep-{key}', {2 * _GUARD_SECONDS})",),
        "mariadb": (f"SELECT GET_LOCK('sft-sweep-{key}', {2 * _GUARD_SECONDS})",),
    }.get(kind)
    if lock is None:
        raise StorageError(f"storage: {kind} is not supported; use postgresql, mysql, sqlite, or null for a file.")
    engine = create_engine(url, poolclass=NullPool)

    @contextmanager
    def guard() -> Iterator[None]:
        with engine.connect() as connection, connection.begin():
            for statement in lock:
                connection.execute(text(statement))
            yield

    return guard


def is_storage_error(error: BaseException) -> bool:
    """Whether the storage could not be reached, for now or for good; the data in it are whole."""
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, optuna.exceptions.StorageInternalError | SQLAlchemyError)
