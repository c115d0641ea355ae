"""What a sweep says while it runs: on a terminal one live line a trial, elsewhere one line a finished trial."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft.pages import duration
from sft.secrets import mask_secrets
from sft.sweepfile import LoadedSweep
from sft.yamltree import flow

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

    from sft.sweepresults import Results
    from sft.sweeprun import TrialRun
    from sft.sweepstore import SweepStore

_EVERY = 0.5  # seconds between redraws


class View:
    """A context manager around the driver's loop. Everything goes to stderr."""

    def __init__(self, loaded: LoadedSweep, store: SweepStore) -> None:
        self._loaded, self._total = loaded, loaded.total
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._waiting_for: list[int] = []
        self._began = time.monotonic()
        self._results: Results | None = None
        trials = store.trials()
        self._done_before = self._done = sum(trial.state.is_finished() for trial in trials)
        self._times: list[float] = []
        complete = [t.value for t in trials if t.state.name == "COMPLETE" and t.value is not None]
        worst_first = sorted(complete, reverse=loaded.direction == "minimize")
        self._best: tuple[float | None, int | None] = (worst_first[-1] if complete else None, None)
        if self._best[0] is not None:
            self._best = (self._best[0], next(t.number for t in trials if t.value == self._best[0]))

    def __enter__(self) -> View:
        spec = self._loaded.spec
        begin = f"continuing, {self._done} of {self._total} trials done" if self._done else f"{self._total} trials"
        print(
            f"sweep {self._loaded.dir}: {begin}, {spec.sampler}, {spec.workers} side by side, "
            f"{self._loaded.direction} {spec.metric}",
            file=sys.stderr,
            flush=True,
        )
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        text = mask_secrets(text)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def finished(self, number: int, results: Results) -> None:
        """One line for a trial that has ended."""
        row, best = results.row(number), results.best
        self._done = sum(r.state in ("complete", "pruned", "failed") for r in results.rows)
        if best is not None:
            self._best = (best.value, best.trial)
        metric = self._loaded.spec.metric
        what = row.reason if row.value is None else f"{metric} {row.value:.6g}"
        mark = ", best so far" if best is not None and best.trial == number else ""
        took = f", {duration(row.seconds)}" if row.seconds else ""
        self.say(
            f"[{self._done}/{self._total}] trial {number} {row.state}: {what}{took}{mark}   {point_words(row.values)}"
        )

    def wait_for_others(self, numbers: Sequence[int]) -> None:
        """Other drivers still run these; said when it changes."""
        if list(numbers) != self._waiting_for:
            self._waiting_for = list(numbers)
            self.say(f"waiting for trials of other drivers: {', '.join(map(str, numbers))}")

    def update(self, running: Sequence[tuple[int, TrialRun]]) -> None:
        """Redraw, where there is a terminal to draw on."""
        now = time.monotonic()
        if self._live is None or now < self._drawn_at + _EVERY:
            return
        self._drawn_at = now
        self._live.update(self._picture(running), refresh=True)

    def _picture(self, running: Sequence[tuple[int, TrialRun]]) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for number, run in sorted(running, key=lambda item: item[0]):
            table.add_row(*self._cells(number, run))
        return Group(table, Text(self._headline(running), style="bold"))

    def _cells(self, number: int, run: TrialRun) -> list[str]:
        curve = run.repeat.curve
        last = curve.points[-1][1] if curve.points else None
        return [
            f"trial {number}",
            f"step {curve.step}" if curve.step or curve.points else "starting",
            f"{self._loaded.spec.metric} {last:.5g}" if last is not None else "",
            duration(time.monotonic() - run.started),
            f"repeat {run.index + 1}/{len(run.repeats)}" if len(run.repeats) > 1 else "",
            run.devices.words(),
            point_words(run.claim.values),
        ]

    def _headline(self, running: Sequence[tuple[int, TrialRun]]) -> str:
        parts = [f"{self._done}/{self._total} trials"]
        value, trial = self._best
        if value is not None:
            parts.append(f"best {self._loaded.spec.metric} {value:.6g} (trial {trial})")
        if (left := self._seconds_left(running)) is not None:
            parts.append(f"about {duration(left)} left")
        return " · ".join(parts)

    def _seconds_left(self, running: Sequence[tuple[int, TrialRun]]) -> float | None:
        """From the rate at which this session has finished trials; nothing before the first one."""
        now = time.monotonic()
        finished = self._done - self._done_before
        if finished <= 0:
            return None
        ages = [now - run.started for _, run in running]
        workers = max(1, len(running))
        each = max((now - self._began) * workers - sum(ages), 1.0) / finished
        left = sum(max(each - age, each / 10) for age in ages) + (self._total - self._done - len(ages)) * each
        return max(0.0, float(left)) / workers


def point_words(values: dict[str, Any]) -> str:
    """`optim.lr 0.000213  model.lora.rank 8`."""
    return "  ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else flow(value)
