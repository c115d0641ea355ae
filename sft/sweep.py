"""`sft sweep`: a study of runs, several at a time, that may be killed anywhere and goes on where it was.

The driver below is one loop without threads: beat, look at every worker, hand out what is free, show it, sleep. All it
knows of training is the command `sft train` and the files of a run folder. Several drivers may share one storage.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from sft.durable import NO_SPACE, check_writable
from sft.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, DiskError
from sft.needed import refuse
from sft.secrets import mask_secrets
from sft.sweepfile import LoadedSweep, load_sweep
from sft.sweeprun import Finished, TrialRun
from sft.trial import Devices, divide_devices, train_command, usable_cores, visible_gpus

if TYPE_CHECKING:
    from sft.sweepstore import Claim, SweepStore
    from sft.sweepview import View

_TICK = 0.2
_CLAIM_AGAIN = 1.0  # seconds between looks for a trial to take over
_UNREACHABLE_SAID_EVERY = 30.0


def sweep(path: str, overrides: Sequence[str] = ()) -> int:
    """Run or continue the sweep of a file. 0: done; 1: no trial succeeded; 75: stopped on a signal.

    Raises the SftError family before the first trial.
    """
    loaded = load_sweep(path, overrides)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    devices = divide_devices(loaded.spec.workers, visible_gpus(os.environ), usable_cores())
    train_command(loaded.spec.launch, loaded.base_file, 0)  # a launcher that is not there is said now
    refuse(loaded.lacking())
    check_writable(loaded.dir)
    from sft.sweepresults import write_results
    from sft.sweepstore import open_store
    from sft.sweepview import View

    store = open_store(loaded)
    loaded.freeze()
    try:
        with View(loaded, store) as view, _Signals() as signals:
            code = Driver(loaded, store, devices, view, signals).run()
        results = write_results(loaded, store)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DiskError(
            f"{loaded.dir}: its disk is full ({error.strerror}). Running trials stop with a checkpoint where one fits; "
            f"free some space, and the same command goes on: sft sweep {path}"
        ) from error
    if code == EXIT_STOPPED:
        print(mask_secrets(f"stopped; the same command goes on: sft sweep {path}"), file=sys.stderr)
        return EXIT_STOPPED
    for line in results.summary():
        print(mask_secrets(line))
    return EXIT_DONE if results.best is not None else EXIT_FAILED


class _Signals:
    """SIGINT and SIGTERM: the first asks the sweep to stop cleanly, the second to stop now."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class Driver:
    """Runs trials on this machine until the sweep is complete."""

    loaded: LoadedSweep
    store: SweepStore
    devices: list[Devices]
    view: View
    signals: _Signals
    running: dict[int, tuple[Claim, TrialRun]] = field(default_factory=dict)  # by worker
    _ports: set[int] = field(default_factory=set)
    _beat_at: float = 0.0
    _claim_at: float = 0.0
    _said_at: float = -1e9
    _released: bool = False

    def run(self) -> int:
        """0 when the sweep is complete, 75 when it was stopped."""
        from sft.sweepstorage import is_storage_error

        while True:
            try:
                if (code := self._turn()) is not None:
                    return code
            except Exception as error:
                if not is_storage_error(error):
                    for _, run in self.running.values():
                        run.stop("release")
                    raise
                self._say_unreachable(error)
                if self.signals.count > 1:
                    return EXIT_STOPPED
                time.sleep(1.0)
            time.sleep(_TICK)

    def _turn(self) -> int | None:
        if self.signals.count:
            self._stop_all()
        self._beat()
        for worker, (claim, run) in list(self.running.items()):
            finished = run.poll()
            if finished is not None:
                self._finish(claim, run, finished)
                del self.running[worker]
                self._claim_at = 0.0
        if self.signals.count:
            if not self.running:
                self.store.beat(leaving=True)
                return EXIT_STOPPED
        elif self._fill() and not self.running:
            return self._complete()
        self.view.update([(claim.number, run) for claim, run in self.running.values()])
        return None

    def _stop_all(self) -> None:
        if self.running and not self._released:
            self.view.say(f"stopping {len(self.running)} running trial(s) at their next step; once more to stop now")
        self._released = True
        for _, run in self.running.values():
            run.stop("release")
            if self.signals.count > 1:
                run.kill()

    def _beat(self) -> None:
        """Renew the lease; the trials hear of it only when the storage has it."""
        now = time.monotonic()
        if now < self._beat_at:
            return
        self.store.beat()
        self._beat_at = now + self.loaded.spec.lease / 6
        for claim, run in self.running.values():
            if self.store.owns(claim):
                run.beat()
            else:  # we were silent for so long that another driver has it now
                run.stop("lost")
                run.kill()

    def _fill(self) -> bool:
        """Give every free worker a trial. True when there was none to give."""
        now = time.monotonic()
        free = [worker for worker in range(len(self.devices)) if worker not in self.running]
        if now < self._claim_at:
            return False
        for worker in free:
            claim = self.store.claim({claim.number for claim, _ in self.running.values()})
            if claim is None:
                self._claim_at = now + _CLAIM_AGAIN
                return True
            run = TrialRun(
                self.loaded, claim, self.devices[worker], self.store.mark(claim.number), dict(os.environ), self._ports
            )
            self.running[worker] = (claim, run)
        return False

    def _complete(self) -> int | None:
        """Done, unless other drivers still run trials: then wait, in case they die."""
        unfinished = [trial for trial in self.store.trials() if not trial.state.is_finished()]
        begun = [trial for trial in unfinished if trial.state.name == "RUNNING"]
        if begun:
            self.view.wait_for_others([trial.number for trial in begun])
            return None
        self.store.beat(leaving=True)
        return EXIT_DONE

    def _finish(self, claim: Claim, run: TrialRun, finished: Finished) -> None:
        from optuna.trial import TrialState

        from sft.sweepresults import write_results

        if finished.state == "lost":
            self.view.say(f"trial {claim.number}: another driver has taken it over")
            return
        if finished.state == "released":
            self.store.release(claim)
            return
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[
            finished.state
        ]
        notes = {
            "reason": finished.reason,
            "tail": finished.tail if finished.state == "failed" else "",
            "seconds": round(run.seconds, 3),
            "curves": [[list(point) for point in repeat.curve.points] for repeat in run.repeats],
            "repeats": [{"seed": repeat.seed, "value": repeat.value} for repeat in run.repeats],
        }
        if self.store.finish(claim, state, finished.value, notes):
            results = write_results(self.loaded, self.store)
            self.view.finished(claim.number, results)

    def _say_unreachable(self, error: Exception) -> None:
        from sft.sweepstorage import without_password

        now = time.monotonic()
        if now - self._said_at > _UNREACHABLE_SAID_EVERY:
            self._said_at = now
            said = without_password(error, self.loaded.spec.storage)
            self.view.say(f"the storage cannot be reached, trying again: {said}")
