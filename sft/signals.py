"""Stopping when asked: SIGTERM, SIGINT and SIGHUP (the terminal was closed) become a request that the loop reads at a
step's end.

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
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
        self._terminal: list[int] = []
        # `accelerate launch` of a single process dies of SIGTERM without telling its worker.
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else None

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def install(self) -> None:
        """Take over the signals. Outside the main thread, where Python allows no handlers, nothing is done."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._terminal = [descriptor for descriptor in (0, 1, 2) if _is_terminal(descriptor)]
            for number in _SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run outlives its terminal
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

    def _let_go_of_terminal(self) -> None:
        """Whatever is printed to a terminal that is gone would raise, in the middle of the save."""
        if self._terminal:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in self._terminal:
                os.dup2(nowhere, descriptor)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._let_go_of_terminal()
        if self.signal_name is None:
            self.signal_name, self._asked_at = name, now
            if self._raising:
                raise Stopped(f"stopped by {name}")
            _write_line(f"{name}: stopping at the end of this step; a second signal ends at once")
        elif now - self._asked_at > self._echo_seconds:
            _write_line(f"second {name}: ending at once; the last published checkpoint is whole")
            exit_now(EXIT_STOPPED)


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:  # closed
        return False


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
