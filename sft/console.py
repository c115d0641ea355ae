"""What a run says on the terminal: plain lines, and one live line where there is a terminal to keep it on. In a log
file the live line's numbers are a plain line now and then."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft.secrets import mask_secrets

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 30.0
"""At least, between two lines of progress where there is no terminal."""
WORTH_A_LINE_SECONDS = 5.0
"""What is over sooner is not announced where there is no terminal."""

Tick = Callable[[int], None]
"""Told how much is done."""


def open_streams() -> None:
    """Gives a process that was started without stdin, stdout or stderr ones that lead nowhere: else the next file it
    opens, a checkpoint perhaps, is taken for its stderr."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))


def speak(text: str) -> None:
    """A line on stderr. Where nobody listens any more (`… 2>&1 | head`, a lost terminal) the rest goes nowhere: what
    a run says must not end it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Console:
    """Says things on rank 0's stderr; the live line shows only on a terminal. Results go elsewhere, to files."""

    def __init__(self, *, enabled: bool, total_steps: int = 0, first_step: int = 0) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None
        self._total, self._first = total_steps, first_step
        self._next_line = -math.inf  # on the monotonic clock

    def __enter__(self) -> Console:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[left]}"),
                console=RichConsole(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self._head(self._first), total=self._total, completed=self._first, numbers="", left=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        if not self._enabled:
            return
        text = mask_secrets(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            speak(text)

    def step(self, event: dict[str, Any], seconds_left: float) -> None:
        """Moves the live line to a train event; without a terminal, says it in a line of its own where one is due:
        at the first event, every PLAIN_SECONDS, and at the last step."""
        if self._progress is not None:
            self._progress.update(
                self._task, description=self._head(event["step"]), completed=event["step"], numbers=numbers(event),
                left=about_left(seconds_left),
            )  # fmt: skip
        elif time.monotonic() >= self._next_line or event["step"] >= self._total:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self.say(f"step {event['step']}/{self._total}  {numbers(event)}  {about_left(seconds_left)}")

    @contextmanager
    def phase(self, what: str, total: int | None = None, expected: float | None = None) -> Iterator[Tick]:
        """While something long goes on: a live line below that of the steps. Without a terminal, a line as it begins,
        unless it is `expected` to be over in a moment, and one now and then.

        `total`: how far it goes, where that is known; what is given takes the number that is done. `expected`: seconds,
        from the last time.
        """
        if not self._enabled:
            yield lambda done: None
            return
        started = time.monotonic()

        def left(done: int) -> str:
            passed = time.monotonic() - started
            if total and done:
                return about_left(passed / done * max(0, total - done))
            return "" if expected is None else about_left(max(0.0, expected - passed))

        if self._progress is not None:
            progress = self._progress
            task = progress.add_task(what, total=total, numbers=f"0/{total:,}" if total else "", left=left(0))

            def move(done: int) -> None:
                progress.update(task, completed=done, numbers=f"{done:,}/{total:,}" if total else "", left=left(done))

            try:
                yield move
            finally:
                progress.remove_task(task)
            return
        next_line = started + PLAIN_SECONDS
        if expected is None or expected >= WORTH_A_LINE_SECONDS:
            self.say(f"{what} …{f'  {left(0)}' if expected is not None else ''}")

        def tell(done: int) -> None:
            nonlocal next_line
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + PLAIN_SECONDS
                self.say(f"{what}: {done:,}{f'/{total:,}' if total else ''}  {left(done)}".rstrip())

        yield tell

    def refresh(self) -> None:
        """Draws the live line now, rather than with its next tenth of a second."""
        if self._progress is not None:
            self._progress.refresh()

    def _head(self, step: int) -> str:
        return f"step {step}/{self._total}"


def about_left(seconds: float) -> str:
    """`about 0:01:30 left`"""
    return f"about {timedelta(seconds=round(seconds))} left"


def numbers(event: dict[str, Any]) -> str:
    """`loss 1.2346  lr 2.00e-05  12,346 tok/s`"""
    loss = event["loss"]
    return (
        f"loss {'-' if loss is None else format(loss, '.4f')}  lr {event['learning_rate']:.2e}  "
        f"{event['tokens_per_second']:,.0f} tok/s"
    )
