"""report.html of a sweep, drawn from the sweep.json beside it."""

from __future__ import annotations

from pathlib import Path


def write_sweep_report(folder: Path) -> Path:
    return folder / "report.html"
