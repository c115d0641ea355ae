"""How much disk a run needs, said before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

from sft.errors import DiskError


def free_bytes(folder: Path) -> int:
    """Bytes free for this user on the disk of `folder`, or of the nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`, links not followed; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except FileNotFoundError:  # rotated away while we looked
            continue
    return total


def needed_bytes(checkpoint_bytes: int, keep: int, final_bytes: int = 0) -> int:
    """`keep` checkpoints stay while one more is staged; `final/` comes on top."""
    return (keep + 1) * checkpoint_bytes + final_bytes


def check_space(run_dir: Path, checkpoint_bytes: int, keep: int, *, final_bytes: int = 0) -> None:
    """DiskError when the disk cannot hold `keep + 1` checkpoints and the final model.

    What the run folder already holds in checkpoints (a resumed run) counts as available.
    """
    needed = needed_bytes(checkpoint_bytes, keep, final_bytes)
    available = free_bytes(run_dir) + folder_bytes(run_dir / "checkpoints") + folder_bytes(run_dir / "final")
    if available < needed:
        raise DiskError(
            f"{run_dir}: too little disk space. The run needs {human(needed)} "
            f"(save.keep + 1 = {keep + 1} checkpoints of "
            f"{human(checkpoint_bytes)}{f', final/ {human(final_bytes)}' if final_bytes else ''}), "
            f"{human(available)} are available: {human(needed - available)} missing. "
            "Free some, lower save.keep, or choose a run.dir on another disk."
        )


def human(count: float) -> str:
    """`1536` -> `1.5 kB`-style sizes, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
