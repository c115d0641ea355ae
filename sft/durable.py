"""Files that survive a power cut: written aside, flushed to disk, renamed into place.

A rename is atomic and a flushed folder remembers it, so a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sft.errors import ConfigError, DiskError, ResumeError

# The disk, a quota or a limit on file sizes ran out. EFBIG is what RLIMIT_FSIZE and small file systems answer.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder. For a folder this makes the names in it durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of folders; their renames are durable or not, we cannot change it.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Replace `path` by `value` as JSON, atomically and durably. NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically and durably. A lone surrogate is written as `?`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def read_json(path: Path) -> Any:
    """The value in a JSON file. ResumeError with the place of the fault when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ResumeError(f"{path}: the file is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResumeError(f"{path}: not readable as JSON ({error}).") from error


def make_folder(folder: Path) -> None:
    """With its parents, and where a link leads to what does not exist yet."""
    (folder.resolve() if folder.is_symlink() else folder).mkdir(parents=True, exist_ok=True)


def check_nameable(key: str, folder: Path) -> None:
    """ConfigError where the system can have no folder of that name."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # what writes there says so
    except (OSError, ValueError) as error:  # too long; a NUL byte
        shown = str(folder) if len(str(folder)) < 200 else f"{str(folder)[:100]}…"
        raise ConfigError(f"{key}: {shown!r} can be no folder here ({error!s:.60}). Choose another name.") from error


def check_writable(folder: Path) -> None:
    """Create `folder` and write one file in it, now, rather than fail after hours. DiskError when that is refused."""
    probe = folder / f".writable-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        make_folder(folder)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> DiskError:
    """What to tell a user whose folder refuses a write."""
    if error.errno in NO_SPACE:
        return DiskError(f"{path}: no space left ({error.strerror}). Free some, or choose another run.dir.")
    return DiskError(
        f"{path}: cannot be written ({error.strerror}). Choose another run.dir, or make that folder writable."
    )


def finite(value: Any) -> Any:
    """`value` as JSON knows it: NaN and infinities become null, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def as_readable_as(reference: Path, files: Iterable[Path]) -> None:
    """The same permissions for all: safetensors lets nobody but its owner read what it writes."""
    for file in files:
        file.chmod(reference.stat().st_mode)
