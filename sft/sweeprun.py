"""One trial in the hands of a driver: from its claim to its outcome, over repeats, stops and restarts.

Nothing here waits: `poll` looks, acts and returns, so that one loop serves all workers.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sft import keeper
from sft.config import Config
from sft.configfile import dump_config
from sft.durable import read_json, write_text
from sft.errors import ConfigError, SftError
from sft.runfolder import RunFolder
from sft.runlock import forget_other_host
from sft.schedule import evaluation_steps
from sft.sweepfile import LoadedSweep
from sft.trial import (
    Curve,
    Devices,
    Outcome,
    TrialProcess,
    free_port,
    log_tail,
    num_processes,
    read_outcome,
    train_command,
    trial_environment,
)

Intent = Literal["", "prune", "fail", "release", "lost"]

STOP_SECONDS = 600.0  # for a checkpoint of a large model to reach a slow disk
_RESTARTS = 3  # of a trial that somebody else stopped, without a step in between
_ORPHAN_SECONDS = 60.0


class Claimed(Protocol):
    """What a run needs of a claim on the storage."""

    number: int
    values: dict[str, Any]
    adopted: bool

    def report(self, value: float, evaluation: int, evaluations: int | None) -> bool: ...


@dataclass(frozen=True)
class Finished:
    """The end of a trial. `state` released: given back, to be continued later."""

    state: Literal["complete", "pruned", "failed", "released", "lost"]
    value: float | None = None
    reason: str = ""
    tail: str = ""


@dataclass
class Repeat:
    """One run of the trial's point with one seed (None: the config's own)."""

    seed: int | None
    run_dir: Path
    curve: Curve
    value: float | None = None

    @property
    def config_file(self) -> Path:
        return self.run_dir.with_name(self.run_dir.name + ".yaml")

    @property
    def log(self) -> Path:
        return self.run_dir.with_name(self.run_dir.name + ".log")


@dataclass
class TrialRun:
    """A trial at work on one worker's devices."""

    loaded: LoadedSweep
    claim: Claimed
    devices: Devices
    mark: str
    environ: dict[str, str]
    ports: set[int]
    started: float = field(default_factory=time.monotonic)
    intent: Intent = ""
    reason: str = ""
    repeats: list[Repeat] = field(default_factory=list)
    index: int = 0
    process: TrialProcess | None = None
    _port: int = 0
    _since: float = 0.0
    _kill_at: float = math.inf
    _reported: int = 0
    _restarts: int = 0
    _step_at_start: int = 0
    _orphans_until: float | None = None
    _checked_orphans_at: float = 0.0
    _finished: Finished | None = None
    _config: Config | None = None
    _planned: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        folder = trial_folder(self.loaded, self.claim.number)
        seed, count = self.loaded.base.config.run.seed, self.loaded.spec.repeats
        for offset in range(count):
            run_dir = folder if count == 1 else folder / seed_folder(seed + offset)
            curve = Curve(RunFolder(run_dir).metrics, self.loaded.metric_key)
            self.repeats.append(Repeat(None if count == 1 else seed + offset, run_dir, curve))
        if self.claim.adopted:
            self._orphans_until = time.monotonic() + _ORPHAN_SECONDS
            if not keeper.is_kept(self.mark):  # else its keeper is stopping it; a second signal would cut that short
                keeper.stop_marked(self.mark)
        else:
            RunFolder(folder).move_aside()  # of a sweep whose storage was deleted

    @property
    def repeat(self) -> Repeat:
        return self.repeats[self.index]

    @property
    def seconds(self) -> float:
        """Training time as the trainer counts it, resumes included."""
        return sum(repeat.curve.seconds for repeat in self.repeats)

    # Asking

    def beat(self) -> None:
        if self.process is not None:
            self.process.beat()

    def stop(self, intent: Intent, reason: str = "", patience: float = STOP_SECONDS) -> None:
        """Ask for a clean stop, once; `intent` says what the trial then is."""
        if self.intent:
            return
        self.intent, self.reason = intent, reason
        self._kill_at = time.monotonic() + patience
        if self.process is not None:
            self.process.stop()

    def kill(self) -> None:
        self._kill_at = 0.0
        if self.process is not None:
            self.process.kill()

    # Looking

    def poll(self) -> Finished | None:
        """What became of the trial; None while it is at work. The same answer again once it has ended."""
        if self._finished is None:
            self._finished = self._look()
            if self._finished is not None:
                self.ports.discard(self._port)
        return self._finished

    def _look(self) -> Finished | None:
        if self._orphans_until is not None and not self._orphans_gone():
            return None
        if self.process is None:
            if self.intent:
                return self._ended_on_request()
            try:
                self._start()
            except SftError as error:
                return Finished("failed", reason=str(error))
            return None
        self._watch()
        code = self.process.poll()
        if code is None:
            if time.monotonic() > self._kill_at:
                self.process.kill()
            return None
        finished = self._judge(read_outcome(self.repeat.run_dir, code, self.repeat.curve, self.repeat.log, self._since))
        self.process = None  # only now: where the storage could not be told, the next look judges again
        return finished

    def _orphans_gone(self) -> bool:
        assert self._orphans_until is not None
        now = time.monotonic()
        if now < self._checked_orphans_at + 0.3:
            return False
        self._checked_orphans_at = now
        if keeper.is_at_work(self.mark):
            if now > self._orphans_until:
                keeper.kill_marked(self.mark)
            return False
        self._orphans_until = None
        return True

    def _start(self) -> None:
        """Start the current repeat, or go past those that an earlier driver has finished."""
        repeat = self.repeat
        repeat.curve.refresh()
        if self.claim.adopted and _status(repeat.run_dir) == "done" and repeat.curve.points:
            repeat.value = repeat.curve.points[-1][1]
            if repeat.value is not None and self.index + 1 < len(self.repeats):
                self.index += 1
                self._start()
                return
        if self.claim.adopted:
            forget_other_host(
                repeat.run_dir
            )  # the lease has run out: that machine's keeper has ended it, or it is gone
        config = self.loaded.config_for(self.claim.values, repeat.run_dir, repeat.seed)
        self._config, self._planned = config.config, None
        repeat.config_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(repeat.config_file, dump_config(config))
        spec = self.loaded.spec
        self.ports.discard(self._port)
        self._port = free_port(self.ports)
        self.ports.add(self._port)
        env = trial_environment(self.environ, self.devices, num_processes(spec.launch), self._port)
        self._since, self._step_at_start = time.time(), repeat.curve.step
        command = train_command(spec.launch, repeat.config_file, self._port)
        self.process = TrialProcess(command, env, self.devices, repeat.log, self.mark, spec.lease)

    def _watch(self) -> None:
        """Report new evaluations of the first repeat; stop what is pruned, overdue, or beyond hope."""
        repeat, spec = self.repeat, self.loaded.spec
        repeat.curve.refresh()
        if self.intent:
            return
        if spec.timeout is not None and time.monotonic() - self.started > spec.timeout:
            self.stop("fail", f"not done after {spec.timeout:g} s (timeout)")
            return
        for evaluation, (step, value) in enumerate(repeat.curve.counted, 1):
            if value is None or not math.isfinite(value):
                self.stop("fail", f"{spec.metric} is not finite at step {step}")
                return
            if self._report(evaluation, value) and step != self._plan()[0]:  # nothing is gained by pruning at the end
                self.stop("prune", f"pruned at step {step}", patience=120.0)
                return

    def _report(self, evaluation: int, value: float) -> bool:
        """Tell the storage of an evaluation of the first repeat. True when the pruner gives the trial up."""
        if self.index > 0 or evaluation <= self._reported:
            return False
        gives_up = self.claim.report(value, evaluation, self._plan()[1])
        self._reported = evaluation
        return gives_up

    def _plan(self) -> tuple[int | None, int | None]:
        """(steps, evaluations after step 0) of the whole run, as its trainer planned them; None before it has said.

        Where a pruner decides, the sweep gives every trial the same `eval.every`; `auto` is left to runs that nothing
        is reported of.
        """
        every = self._config.eval.every if self._config is not None else "auto"
        if self._planned is None and self._config is not None and every != "auto":
            total = self._config.train.max_steps or planned_steps(self.repeat.run_dir)
            if total is not None:
                self._planned = total, len(evaluation_steps(every, total))
        return self._planned or (None, None)

    def _judge(self, outcome: Outcome) -> Finished | None:
        if outcome.state == "done":
            for evaluation, (_, value) in enumerate(self.repeat.curve.counted, 1):
                if value is not None:  # the last ones came while nobody looked
                    self._report(evaluation, value)
            self.repeat.value = outcome.value
            if self.index + 1 < len(self.repeats):
                if self.intent:
                    return self._ended_on_request()
                self.index += 1
                return None
            values = [repeat.value for repeat in self.repeats if repeat.value is not None]
            return Finished("complete", statistics.fmean(values))
        if self.intent:
            return self._ended_on_request()
        if outcome.state == "stopped":
            self._restarts = 1 if self.repeat.curve.step > self._step_at_start else self._restarts + 1
            if self._restarts <= _RESTARTS:
                return None  # somebody else stopped it: it goes on from its checkpoint
            return Finished("failed", reason=f"{outcome.reason}, again and again", tail=outcome.tail)
        return Finished("failed", reason=outcome.reason, tail=outcome.tail)

    def _ended_on_request(self) -> Finished:
        tail = log_tail(self.repeat.log)
        if self.intent == "prune":
            return Finished("pruned", reason=self.reason)
        if self.intent == "fail":
            return Finished("failed", reason=self.reason, tail=tail)
        return Finished("lost" if self.intent == "lost" else "released")


def trial_folder(loaded: LoadedSweep, number: int) -> Path:
    return loaded.dir / "trials" / f"{number:04d}"


def seed_folder(seed: int) -> str:
    """The folder of one of several repeats, inside the trial's."""
    return f"seed-{seed}"


def planned_steps(run_dir: Path) -> int | None:
    """The steps that a run planned, as its environment.json says; None where it does not."""
    try:
        found = read_json(RunFolder(run_dir).environment)
    except (SftError, OSError):
        return None
    steps = found.get("total_steps") if isinstance(found, dict) else None
    return steps if isinstance(steps, int) else None


def _status(run_dir: Path) -> str:
    try:
        return str(RunFolder(run_dir).read_status().get("state", ""))
    except (SftError, ConfigError):
        return ""
