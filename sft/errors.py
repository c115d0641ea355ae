"""Errors that a user can act on.

SftError (ValueError)         exit code 2: one message, no traceback
├── ConfigError               a key or value in the YAML file or on the command line
├── DataError                 a row, a file, a mapping of columns
├── TemplateError             a chat template, or what it renders
├── ModelError                a model, adapter or tokenizer that does not fit
├── DeviceError               memory, disk, devices, launch
└── ResumeError               a run folder that cannot be continued as asked
Stopped (Exception)           exit code 75: stopped on a signal, resumable
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again, the run resumes


class SftError(ValueError):
    """Something the user can fix. The message says what, where, the value and the cure."""

    said = False  # true where another rank prints the same error, which is enough


class ConfigError(SftError):
    """A key or value of the configuration."""


class DataError(SftError):
    """A row or file of the user's data."""

    bad_rows: tuple[dict[str, Any], ...] = ()
    """By kind, for scripts: {rows, where, first, detail}; empty where it is not about rows."""


class TemplateError(SftError):
    """A chat template, or a conversation it cannot render provably."""


class ModelError(SftError):
    """A model, adapter or tokenizer."""


class DeviceError(SftError):
    """Memory, disk, devices or the way processes were launched."""


class ResumeError(SftError):
    """A run folder that cannot be continued as asked."""


class Stopped(Exception):
    """The run stopped on a signal after publishing what it had; the same command resumes it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
