"""FSDP2's pieces on CPU: training, whole state by name, and loading it back, in two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.dist
def test_a_sharded_trainee_saves_and_loads_as_a_whole_one(model_folder: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("sharded_job.py")
    result = subprocess.run(
        [sys.executable, *command, str(script), str(model_folder)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sharded state is exact") == 2
