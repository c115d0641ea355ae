"""What a run says on the terminal: plain lines, and one live line where there is a terminal to keep it on. In a log
file the live line's numbers are a plain line now and then."""

from __future__ import annotations

import math
import os
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft.secrets import mask_secrets

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 30.0
"""At least, between two lines of progress where there is no terminal."""


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
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=self._total, completed=self._first, numbers="")
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

    def step(self, event: dict[str, Any]) -> None:
        """Moves the live line to a train event; without a terminal, says it in a line of its own where one is due:
        at the first event, every PLAIN_SECONDS, and at the last step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=event["step"], numbers=numbers(event))
        elif time.monotonic() >= self._next_line or event["step"] >= self._total:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            left = timedelta(seconds=round(event["seconds"] / event["step"] * (self._total - event["step"])))
            self.say(f"step {event['step']}/{self._total}  {numbers(event)}  about {left} left")


def numbers(event: dict[str, Any]) -> str:
    """`loss 1.2346  lr 2.00e-05  12,346 tok/s`"""
    loss = event["loss"]
    return (
        f"loss {'-' if loss is None else format(loss, '.4f')}  lr {event['learning_rate']:.2e}  "
        f"{event['tokens_per_second']:,.0f} tok/s"
    )
