"""How much more memory this process may take on the host, and which limit says so."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft.heap import free_bytes_in_heap

CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroups of version 1 spell "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True)
class Room:
    """`bytes` are left below `limit`. `kills`: beyond it the kernel ends the process, where another limit would only
    refuse the memory."""

    name: str
    limit: int
    bytes: int
    kills: bool


def resident_bytes() -> int:
    """Of this process, in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def rooms() -> list[Room]:
    """What is left under each limit that holds for this process: ulimit, container (cgroup), machine."""
    import psutil

    machine = psutil.virtual_memory()
    found = [Room("this machine's memory", int(machine.total), int(machine.available), kills=True)]
    addresses = int(psutil.Process().memory_info().vms) - free_bytes_in_heap()  # those that the heap can give again
    for kind, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(Room(name, soft, max(0, soft - addresses), kills=False))
    found += [
        Room("this container's memory limit", limit, max(0, limit - used), kills=True)
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
