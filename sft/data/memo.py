"""Digests of files, remembered by what the system says of them, so that a start doesn't read every byte again.

A file is known by name, device, inode, size, and its times of modification and of change to the nanosecond. The time
of change is the system's own: no program sets it back, so a rewrite of equal size with its old date is seen as well. A
file that changed in the last seconds is not remembered, since another change within the clock's step would look alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

SETTLED_SECONDS = 2.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


def remembered(
    memo: Path,
    begun: str,
    files: Sequence[tuple[str, Path]],
    whole: Callable[[], str],
    now: Callable[[], float] = time.time,
) -> str:
    """The digest that `whole` computes of (name, file) pairs and of what `begun` stands for, or the one remembered.

    A folder that cannot be read or written only costs the time.
    """
    before = _identity(files)
    key = hashlib.sha256(json.dumps([begun, before]).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    try:
        found = (memo / key).read_text(encoding="ascii")
        if _DIGEST.fullmatch(found):
            return found
    except (OSError, ValueError):
        pass
    digest = whole()
    if _identity(files) == before and all(now() - seconds > SETTLED_SECONDS for seconds in _changed(files)):
        _write(memo, key, digest)
    return digest


def _identity(files: Sequence[tuple[str, Path]]) -> list[list[str | int]]:
    states = [(name, file.stat()) for name, file in files]
    return [
        [name, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        for name, state in states
    ]


def _changed(files: Sequence[tuple[str, Path]]) -> list[float]:
    return [max(state.st_mtime, state.st_ctime) for state in (file.stat() for _, file in files)]


def _write(memo: Path, key: str, digest: str) -> None:
    part = memo / f".{key}.{uuid.uuid4().hex[:8]}"
    try:
        memo.mkdir(parents=True, exist_ok=True)
        part.write_text(digest, encoding="ascii")
        os.replace(part, memo / key)
    except OSError:  # a disk that is full or read-only: read again next time
        part.unlink(missing_ok=True)
