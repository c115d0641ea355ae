"""Freed memory stays in the process: counted in page faults, in processes of their own since it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from sft.heap import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for round in range(30):
    if round == 25:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)  # 64 MiB: 16,384 pages of 4 KiB
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 16384)
"""


def run(mode: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True
    ).stdout.split()


def test_blocks_that_were_freed_are_used_again() -> None:
    """Some are taken before the pieces fit; of the last five none."""
    kept, taken = run("keep")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(taken) == 0


def test_control_without_it_every_page_is_taken_anew() -> None:
    assert run("plain") == ["None", "5"]


FREE = """
import numpy
from sft.heap import free_bytes_in_heap, give_back, keep_freed_memory
from sft.limits import resident_bytes
kept = keep_freed_memory()
blocks = [numpy.ones(1_000_000, dtype=numpy.uint8) for _ in range(50)]
pinned = numpy.ones(1_000_000, dtype=numpy.uint8)  # behind them, so that their addresses stay
resident, free = resident_bytes(), free_bytes_in_heap()
del blocks
print(kept, (free_bytes_in_heap() - free) // 10**6, (resident - resident_bytes()) // 10**6)
give_back()
print((free_bytes_in_heap() - free) // 10**6, (resident - resident_bytes()) // 10**6)
"""


def test_what_was_freed_is_free_in_the_heap_and_resident_until_it_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True).stdout.split()
    if found[0] == "False":
        pytest.skip("this C library has no mallopt")
    free, given, free_after, given_after = (int(megabytes) for megabytes in found[1:])
    assert 49 <= free <= 51
    assert -5 <= given <= 5  # the system itself takes and gives a page now and then
    assert 45 <= free_after <= 51
    assert 40 <= given_after <= 55
