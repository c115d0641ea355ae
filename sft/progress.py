"""What a run is doing: timed by phase, and shown while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sft.console import Console, Tick
from sft.phases import Phases


@dataclass(frozen=True)
class Progress:
    console: Console
    phases: Phases

    @contextmanager
    def phase(self, name: str, what: str, total: int | None = None) -> Iterator[Tick]:
        """In phase `name` for a while, shown as `what`; what is given takes how much of `total` is done."""
        with (
            self.phases.during(name),
            self.console.phase(what, total, expected=self.phases.last.get(name)) as tick,
        ):
            yield tick
