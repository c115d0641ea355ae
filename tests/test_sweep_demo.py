"""scripts/sweep_demo, on a tiny model: a sweep that is killed on the way, its winner repeated, its picture taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pagecheck import chromium
from test_sweep import here  # noqa: F401
from test_sweep_real import prepared  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).parent.parent / "scripts/sweep_demo.py"
PICTURE = ["--picture", "sweep.png"] if chromium() else []


def test_a_sweep_is_killed_checked_and_drawn(prepared):  # noqa: F811
    command = [sys.executable, str(SCRIPT), "sweep.yaml", *PICTURE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("--- ")]
    assert [line.split(":")[0] for line in said if "holds" in line] == ["--- holds"] * 4
    assert sum("SIGKILL" in line for line in said) == 3
    if PICTURE:
        assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "sw is there already" in again.stderr
