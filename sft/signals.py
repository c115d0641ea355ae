"""Stopping when asked: SIGTERM and SIGINT become a request that the loop reads at a step's end.

The first signal asks, and the run saves and leaves with exit code 75. A second one ends the process at once; what it
was writing lies aside (`.staging-…`), so the older checkpoint stays whole.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sft.errors import EXIT_STOPPED, Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun, and accelerate through it, repeat to their workers a Ctrl-C that the terminal has already sent to all of
# them: within this time it is one request, not two.
ECHO_SECONDS = 2.0
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class StopRequest:
    """Whether someone asked this process to stop. One a process; `install` needs the main thread."""

    def __init__(self, echo_seconds: float = ECHO_SECONDS) -> None:
        self.signal_name: str | None = None
        self._echo_seconds = echo_seconds
        self._asked_at = 0.0
        self._raising = 0
        self._previous: dict[signal.Signals, Any] = {}
        # `accelerate launch` of a single process dies of SIGTERM without telling its worker.
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else None

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def install(self) -> None:
        """Take over SIGTERM and SIGINT. Outside the main thread, where Python allows no handlers, nothing is done."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that `install` replaced."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """True once a signal came, or the launcher that started this process is gone."""
        if self.signal_name is None and self._launcher is not None and os.getppid() != self._launcher:
            self.signal_name = "the launcher's end"
        return self.signal_name is not None

    def check(self) -> None:
        """Raise Stopped if a stop was requested: for work that holds no state worth saving."""
        if self.requested:
            raise Stopped(f"stopped by {self.signal_name}")

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Stopped at once: for long work that publishes by itself, such as preparing data."""
        self.check()
        self._raising += 1
        try:
            yield
        finally:
            self._raising -= 1

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._asked_at = name, now
            if self._raising:
                raise Stopped(f"stopped by {name}")
            _write_line(f"{name}: stopping at the end of this step; a second signal ends at once")
        elif now - self._asked_at > self._echo_seconds:
            _write_line(f"second {name}: ending at once; the last published checkpoint is whole")
            exit_now(EXIT_STOPPED)


def exit_now(code: int, flush: Callable[[], None] | None = None) -> None:
    """End the process without running handlers, threads or destructors, which may be what hangs."""
    if flush is not None:
        flush()
    os._exit(code)


def _write_line(text: str) -> None:
    """One line to stderr. os.write, since print may be interrupted inside its own lock by this very signal."""
    try:
        os.write(2, f"sft[{os.getpid()}]: {text}\n".encode())
    except OSError:  # stderr is gone (a closed terminal); the request stands
        return
