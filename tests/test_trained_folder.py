"""Which weights of a run are the newest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sft.model import trained_folder
from sft.runfolder import RunFolder, State


@pytest.mark.parametrize(
    ("state", "step", "newest"),
    [
        ("done", 6, "final"),
        ("done", 9, "final"),  # done again, or a copy that mixed up the times
        ("running", 6, "final"),  # went on, but nothing is saved yet
        ("running", 9, "checkpoints/step-00000009/model"),
        ("failed", 9, "checkpoints/step-00000009/model"),
        (None, 9, "final"),  # no status: nothing says that it went on
    ],
)
def test_an_extended_run_is_ahead_of_its_final(tmp_path: Path, state: State | None, step: int, newest: str) -> None:
    """final/ was written at step 6, its time as a clock would show it."""
    for number in {6, step}:
        folder = tmp_path / "checkpoints" / f"step-{number:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (1000 + number * 10,) * 2)
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # never completed
    (tmp_path / "final").mkdir()
    os.utime(tmp_path / "final", (1065, 1065))
    if state is not None:
        RunFolder(tmp_path).write_status(state, code=None, reason="", step=step)
    assert trained_folder(tmp_path) == str(tmp_path / newest)
