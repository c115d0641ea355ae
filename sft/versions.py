"""The versions of what computes: ranks must agree on them, and a run records them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def versions() -> dict[str, str]:
    """What decides numbers beside the config."""
    import importlib.metadata as metadata
    import platform

    names: Sequence[str] = (
        "torch", "transformers", "accelerate", "peft", "bitsandbytes", "liger-kernel", "datasets", "numpy",
    )  # fmt: skip
    found = {name: _version(metadata, name) for name in names}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _version(metadata: Any, name: str) -> str | None:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the folder that a run is started in; None where there is none."""
    import subprocess

    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the record says null
    return answer.stdout.strip() or None if answer.returncode == 0 else None
