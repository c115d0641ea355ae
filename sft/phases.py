"""Where the time of a run goes: every second of the first rank belongs to one phase, over resumes too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sft.pages import duration

PHASES = ("loading", "preparing", "steps", "evaluation", "samples", "saving", "serving_check")
"""loading: libraries, weights and what is proven of them; preparing: data; steps: training and what it logs;
evaluation: held-out losses; samples: held-out prompts answered; saving: checkpoints, as far as the loop waits for
them, and final/; serving_check: the saved folder asked as a stranger would."""


class Phases:
    """A clock that is always in one phase, at first `loading`."""

    def __init__(self, started: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`started`: on `clock`, where the process began before this was made."""
        self._clock, self._phase = clock, PHASES[0]
        self._since = clock() if started is None else started
        self._own = dict.fromkeys(PHASES, 0.0)  # of this process
        self._before: Mapping[str, float] = {}  # of the processes that this one continues
        self.last: dict[str, float] = {}
        """Seconds of the latest stretch of each phase in this process."""

    def enter(self, phase: str) -> None:
        """Leaves the phase that is on, for good."""
        now = self._clock()
        self._own[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """In `phase` for a while, then back. What is entered inside is not counted twice."""
        outer, before = self._phase, self._own[phase]
        self.enter(phase)
        before = before if outer != phase else self._own[phase]
        try:
            yield
        finally:
            self.enter(outer)
            self.last[phase] = self._own[phase] - before

    def continue_from(self, recorded: Mapping[str, float]) -> None:
        """Goes on from what the run took until its checkpoint."""
        self._before = dict(recorded)

    def seconds(self) -> dict[str, float]:
        """Of each phase until now, over the whole run."""
        self.enter(self._phase)
        return {phase: round(self._before.get(phase, 0.0) + own, 3) for phase, own in self._own.items()}


def describe(seconds: Mapping[str, float]) -> str:
    """`8 min 30 s: samples 4 min 0 s, steps 1 min 41 s, …`, the longest first."""
    parts = sorted(((time, phase) for phase, time in seconds.items() if time >= 0.05), reverse=True)
    named = ", ".join(f"{phase.replace('_', ' ')} {duration(time)}" for time, phase in parts)
    return f"{duration(sum(seconds.values()))}: {named}"
