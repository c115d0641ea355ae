"""Keeps freed memory in the process, for training on a CPU.

glibc gives large blocks back to the kernel when they are freed and takes them anew, page by page, each page zeroed by
the kernel. A training step frees and takes its activations all the time: on two cores this cost up to half of a step's
time. With both thresholds out of reach (mallopt(3)), a step after the first two takes no page any more.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """True where the C library is one that can. Resident memory then stays at its peak until the process ends."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # macOS, musl
        return False
    set_both = [mallopt(option, LARGEST_INT) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)]
    return set_both == [1, 1]
