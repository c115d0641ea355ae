"""Killed at any system call of a save or a rotation, a run keeps its newest, its best and `keep` whole checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_in_save.py")


def cut_everywhere(variant: str, cut: str) -> tuple[list[str], int]:
    """(violations, number of places) of a store killed at each place in turn."""
    done = subprocess.run([sys.executable, PROGRAM, variant, cut], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), int(done.stderr.split()[0])


@pytest.mark.parametrize("cut", ["kill", "power"])
def test_no_cut_leaves_half_a_checkpoint_or_loses_a_whole_one(cut: str) -> None:
    found, places = cut_everywhere("real", cut)
    assert found == []
    assert places > 80  # two saves and two rotations: each open, flush, rename and removal


@pytest.mark.parametrize(
    ("variant", "cut", "complaint"),
    [
        ("manifest_after_the_rename", "kill", "half a checkpoint"),
        ("rotation_before_publishing", "kill", "fewer than 2 left"),
        ("removal_in_place", "kill", "half a checkpoint"),
        ("no_flush", "power", "half a checkpoint"),
        ("folders_not_flushed", "power", "half a checkpoint"),
    ],
)
def test_a_careless_store_is_caught(variant: str, cut: str, complaint: str) -> None:
    """The negative controls: each shortcut that publishing avoids is seen by the test above."""
    found, _ = cut_everywhere(variant, cut)
    assert any(complaint in line for line in found)
