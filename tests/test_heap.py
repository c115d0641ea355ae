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
