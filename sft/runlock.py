"""One run folder, one run: the second is told who the first is.

`.lock` in the run folder names its owner: host, pid, the process's start time, the boot and the pid namespace. It is
made by a hard link, which is atomic on network file systems too. A dead owner is known by its pid and start time
(pids are used again); where that cannot tell (another container, a reboot) the kernel's flock does, which no dead
process holds. An owner on another host cannot be judged and is respected.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sft.durable import cannot_write, make_folder
from sft.errors import ResumeError

_GUARD_SECONDS = 10.0


class RunLock:
    """Held from start to end of a run, by rank 0. A context manager."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / ".lock"
        self._descriptor: int | None = None
        self._nonce = ""

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, a dead owner's too.

        ResumeError names a living owner; DiskError a folder that cannot be written.
        """
        assert self._descriptor is None, "acquired twice"
        try:
            make_folder(self._run_dir)
            with self._guard():
                self._sweep()
                if os.path.lexists(self._path):
                    self._evict_dead_owner()
                self._create()
        except OSError as error:
            raise cannot_write(self._run_dir, error) from error

    def release(self) -> None:
        """Give the lock back, if it is still ours. Twice is harmless."""
        if self._descriptor is None:
            return
        with suppress(OSError), self._guard():  # OSError: the folder was moved
            if _read_owner(self._path).get("nonce") == self._nonce:
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def while_held(self, move: Callable[[], Path | None]) -> Path | None:
        """Runs `move`, which renames the run folder, while nobody else can own it. Ends without the lock."""
        self.acquire()
        try:
            moved = move()
            if moved is not None:
                (moved / self._path.name).unlink(missing_ok=True)
            return moved
        finally:
            self.release()

    def _create(self) -> None:
        self._nonce = os.urandom(8).hex()
        aside = self._run_dir / f".lock-{self._nonce}"
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, json.dumps({**_myself(), "nonce": self._nonce}).encode())
            os.fsync(descriptor)
            _try_flock(descriptor)
            os.link(aside, self._path)
        except FileExistsError:  # another host was faster
            os.close(descriptor)
            raise self._taken(_read_owner(self._path)) from None
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            aside.unlink(missing_ok=True)
        self._descriptor = descriptor

    def _sweep(self) -> None:
        """Remove what a process killed inside `_create` has left."""
        for aside in self._run_dir.glob(".lock-" + "[0-9a-f]" * 16):
            aside.unlink(missing_ok=True)

    def _evict_dead_owner(self) -> None:
        owner = _read_owner(self._path)
        if not self._is_dead(owner):
            raise self._taken(owner)
        self._path.unlink(missing_ok=True)

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if not {"host", "pid", "start_time", "boot", "pid_namespace"} <= owner.keys():
            return self._nobody_holds()
        me = _myself()
        if owner["host"] != me["host"]:
            return False
        if owner["boot"] == me["boot"] and owner["pid_namespace"] == me["pid_namespace"]:
            return not _is_alive(int(owner["pid"]), owner["start_time"])
        return self._nobody_holds()

    def _nobody_holds(self) -> bool:
        """The kernel's word: a living owner keeps an flock on the file."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                return _try_flock(descriptor)
            finally:
                os.close(descriptor)
        return True

    def _taken(self, owner: dict[str, Any]) -> ResumeError:
        return ResumeError(
            f"{self._run_dir}: another run is at work here: host {owner.get('host', '?')}, "
            f"process {owner.get('pid', '?')}, since {owner.get('since', '?')}. "
            "Wait for it, stop it, or choose another run.dir. "
            f"If you know that it is dead (a lost machine), delete {self._path}."
        )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """One process of this machine at a time looks, decides and replaces."""
        descriptor = os.open(self._run_dir / ".lock-guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + _GUARD_SECONDS
            while not _try_flock(descriptor) and time.monotonic() < deadline:
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)


def forget_other_host(run_dir: Path) -> None:
    """Removes the lock of an owner on another host. Only for who knows by other means that it is gone."""
    path = run_dir / ".lock"
    if _read_owner(path).get("host", socket.gethostname()) != socket.gethostname():
        path.unlink(missing_ok=True)


def _try_flock(descriptor: int) -> bool:
    """True when we hold it, or when this file system knows no flock: then the owner's pid alone must tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _read_owner(path: Path) -> dict[str, Any]:
    """What the lock says; {} when it is gone, torn or not ours to read (a link is not followed)."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            owner = json.loads(file.read(4096))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_time": start_time(os.getpid()),
        "boot": _read_text(Path("/proc/sys/kernel/random/boot_id")),
        "pid_namespace": _pid_namespace(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_alive(pid: int, began: int | None) -> bool:
    """Whether the process whose `start_time` was `began` still runs; when the system won't say, it does."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there is one, of another user
    return began is None or start_time(pid) in (None, began)


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to a process's start: with the pid, its identity. None where /proc does not tell, and -1
    for remains that nobody has collected yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return -1 if fields[0] in "ZX" else int(fields[19])


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
