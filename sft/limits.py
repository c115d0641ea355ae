"""How much more memory this process may take on the host, and which limit says so."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroups of version 1 spell "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True)
class Room:
    """`bytes` are left below `limit`. `counts`: what of this process grows towards it."""

    name: str
    limit: int
    bytes: int
    counts: Literal["resident", "address space"]

    @property
    def kills(self) -> bool:
        """Beyond it the kernel ends the process, where another limit would only refuse the memory."""
        return self.counts == "resident"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of this process."""

    resident: int
    address_space: int

    def towards(self, room: Room) -> int:
        return self.resident if room.counts == "resident" else self.address_space


def footprint() -> Footprint:
    import psutil

    memory = psutil.Process().memory_info()
    return Footprint(int(memory.rss), int(memory.vms))


def rooms() -> list[Room]:
    """What is left under each limit that holds for this process: ulimit, container (cgroup), machine."""
    import psutil

    now, machine = footprint(), psutil.virtual_memory()
    found = [Room("this machine's memory", int(machine.total), int(machine.available), "resident")]
    for kind, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(Room(name, soft, max(0, soft - now.address_space), "address space"))
    found += [
        Room("this container's memory limit", limit, max(0, limit - used), "resident")
        for limit, used in _cgroup_limits(Path("/proc/self/cgroup"), CGROUPS)
    ]
    return found


def tightest() -> Room:
    """The limit under which the least is left."""
    return min(rooms(), key=lambda room: room.bytes)


def _cgroup_limits(memberships: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use without what the page cache could give back) of this process's cgroup and those above."""
    try:
        lines = memberships.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.lstrip("/")
        for folder in (own, *own.parents) if own.is_relative_to(base) else ():
            if (found := _read_limit(folder, *names)) is not None:
                yield found
            if folder == base:
                break


def _read_limit(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int] | None:
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # a cgroup seen from inside a container, or the root, which has no limit
        return None
    if not limit.isdigit() or int(limit) >= _UNLIMITED:
        return None
    return int(limit), used - int(numbers.get(cache_name, 0))


def give_back() -> None:
    """Returns freed memory to the system, so that what is measured afterwards is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class HighWater:
    """The largest footprint while it is entered, looked at every few milliseconds. MemoryError where a thread for
    that, or what it needs, is refused."""

    def __init__(self, pause_s: float = 0.002) -> None:
        self._pause_s = pause_s
        self._awake, self._done = threading.Event(), threading.Event()
        self._refused: Exception | None = None
        self._thread = threading.Thread(target=self._watch, name="high-water", daemon=True)
        self.before = self.most = Footprint(0, 0)

    def __enter__(self) -> HighWater:
        try:
            self._thread.start()
        except RuntimeError as error:  # "can't start new thread": its stack was refused
            raise MemoryError(str(error)) from error
        self._awake.wait()  # a thread brings its own stack and heap, which are not what is measured
        self.before = self.most = footprint()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._refused is not None:
            raise MemoryError("watching the memory took more than there is") from self._refused
        self._look()

    def _watch(self) -> None:
        try:
            self._look()
            self._awake.set()
            while not self._done.wait(self._pause_s):
                self._look()
        except (MemoryError, OSError) as error:
            self._refused = error
        finally:
            self._awake.set()

    def _look(self) -> None:
        now = footprint()
        self.most = Footprint(max(now.resident, self.most.resident), max(now.address_space, self.most.address_space))
