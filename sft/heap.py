"""The C library's heap: freed memory that stays in the process, for training on a CPU, and what is free in it.

glibc gives large blocks back to the kernel when they are freed and takes them anew, page by page, each page zeroed by
the kernel. A training step frees and takes its activations all the time: on two cores this cost up to half of a step's
time. With both thresholds out of reach (mallopt(3)), a step after the first two takes no page any more. One arena
serves all threads: each further one would reserve 64 MiB of address space, and keep what was freed there from others.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h
LARGEST_INT = 2**31 - 1
NEVER = -1


def keep_freed_memory() -> bool:
    """True where the C library is one that can. Resident memory then stays at its peak until the process ends, or
    until `give_back`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # macOS, musl
        return False
    options = {M_MMAP_THRESHOLD: LARGEST_INT, M_TRIM_THRESHOLD: NEVER, M_ARENA_MAX: 1}
    return [mallopt(option, value) for option, value in options.items()] == [1, 1, 1]


def give_back() -> None:
    """Returns freed memory to the system, so that what is measured afterwards is in use. Its addresses stay taken."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2 (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def free_bytes_in_heap() -> int:
    """Bytes that were freed and can be had again without an address more; 0 where the C library does not tell."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc from 2.33 on
    if tell is None:
        return 0
    tell.restype = _MallocInfo
    return int(tell().fordblks)
