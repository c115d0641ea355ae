"""Errors that a user can act on.

SftError (ValueError)         exit code 2: one message, no traceback
├── ConfigError               a key or value in the YAML file or on the command line
├── DataError                 a row, a file, a mapping of columns
├── TemplateError             a chat template, or what it renders
├── ModelError                a model, adapter or tokenizer that does not fit
├── DeviceError               memory and devices
├── DiskError                 a disk that is full, or refuses to be written
├── NumericsError             a loss or a gradient that is no number
├── LaunchError               how processes were started, and whether they agree
├── WorkerError               a process that prepares data and died
├── StorageError              the storage of a sweep
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
    """Memory, or what a device can do."""


class DiskError(SftError):
    """A disk that is full, or a folder that refuses to be written."""


class NumericsError(SftError):
    """A loss or a gradient that is not finite."""


class LaunchError(SftError):
    """The way processes were launched, or ranks that do not agree."""


class WorkerError(SftError):
    """A process that prepares data, and died."""


class StorageError(SftError):
    """The storage of a sweep, which cannot be opened or used."""


class ResumeError(SftError):
    """A run folder that cannot be continued as asked."""


class Stopped(Exception):
    """The run stopped on a signal after publishing what it had; the same command resumes it."""


def error_named(kind: str, message: str) -> SftError:
    """The error of the family whose class is named `kind`: as another process met it."""
    kinds = {cls.__name__: cls for cls in SftError.__subclasses__()}
    return kinds.get(kind, SftError)(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
