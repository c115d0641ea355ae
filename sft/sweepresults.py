"""What a sweep leaves in its folder: trials.csv, best.yaml, and sweep.json, from which report.html is drawn."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.configfile import dump_config
from sft.durable import write_json, write_text
from sft.errors import ConfigError
from sft.runfolder import RunFolder
from sft.secrets import mask_secrets
from sft.sweepfile import LoadedSweep
from sft.sweepreport import write_sweep_report
from sft.sweeprun import seed_folder, trial_folder
from sft.sweepspace import value_of
from sft.trial import num_processes
from sft.yamltree import dotted, flow, parse_yaml, read_yaml, split_line

if TYPE_CHECKING:
    from sft.sweepstore import SweepStore

_STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
_COLUMNS = ("trial", "state", "value", "seconds", "run", "reason")
_RESOLVED = re.compile(r"; resolved to (.*)$")


@dataclass(frozen=True)
class TrialRow:
    """One trial as the tables show it. `values` holds every key of the space that counts at this point."""

    trial: int
    state: str
    value: float | None
    seconds: float | None
    run: str
    reason: str
    values: dict[str, Any]
    tail: str = ""
    curves: tuple[Any, ...] = ()
    repeats: tuple[Any, ...] = ()
    begun: str = ""
    ended: str = ""
    is_base: bool = False


@dataclass(frozen=True)
class Results:
    loaded: LoadedSweep
    rows: tuple[TrialRow, ...]

    @property
    def best(self) -> TrialRow | None:
        """The best complete trial, the earliest of equals."""
        complete = [row for row in self.rows if row.state == "complete" and row.value is not None]
        sign = 1 if self.loaded.direction == "minimize" else -1
        return min(complete, key=lambda row: sign * (row.value or 0.0), default=None)

    def row(self, number: int) -> TrialRow:
        return next(row for row in self.rows if row.trial == number)

    def counts(self) -> str:
        """`12 complete, 6 pruned, 2 failed`."""
        numbers = {state: sum(row.state == state for row in self.rows) for state in _STATES.values()}
        return ", ".join(f"{number} {state}" for state, number in numbers.items() if number) or "none yet"

    def summary(self) -> list[str]:
        """What the driver says at the end."""
        folder, best = self.loaded.dir, self.best
        lines = [f"trials     {self.counts()}"]
        if best is None:
            failed = [f"  trial {row.trial}: {row.reason}" for row in self.rows if row.state == "failed"]
            return [*lines, "no trial succeeded:", *failed[:8], f"their logs: {folder}/trials/*.log"]
        assert best.value is not None
        lines.append(f"best       trial {best.trial}: {self.loaded.spec.metric} {best.value:.6g}")
        lines += [f"             {key} {_short(value)}" for key, value in best.values.items()]
        lines += [f"config     {folder}/best.yaml      train it: {train_line(self.loaded)}"]
        return [*lines, f"report     {folder}/report.html", f"table      {folder}/trials.csv"]


def train_line(loaded: LoadedSweep) -> str:
    """The command that repeats the best trial: behind the launch prefix where that starts several processes."""
    launch, file = loaded.spec.launch, (loaded.dir / "best.yaml").as_posix()
    several = num_processes(launch) > 1
    return shlex.join([*launch, "-m", "sft", "train", file] if several else ["sft", "train", file])


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else flow(value)


def write_results(loaded: LoadedSweep, store: SweepStore) -> Results:
    """Write all result files anew, each at once and whole."""
    results = Results(loaded, tuple(_row(loaded, trial) for trial in store.trials()))
    write_text(loaded.dir / "trials.csv", _table(results))
    if results.best is not None:
        write_text(loaded.dir / "best.yaml", best_config(loaded, results.best))
    write_json(loaded.dir / "sweep.json", _summary(results, store.importances()))
    write_sweep_report(loaded.dir)
    return results


def _row(loaded: LoadedSweep, trial: Any) -> TrialRow:
    notes: Mapping[str, Any] = trial.user_attrs
    values = dict(notes.get("values", {}))
    for dimension in loaded.space:  # a first point that leaves a key as the config has it
        if dimension.key not in values and _is_base(loaded, notes) and dimension.active(_base(loaded)):
            values[dimension.key] = value_of(loaded.base.config, dimension.key)
    state = _STATES[trial.state.name]
    run = trial_folder(loaded, trial.number)
    return TrialRow(
        trial=trial.number,
        state=state,
        value=trial.value if state in ("complete", "pruned") else None,
        seconds=notes.get("seconds"),
        run=run.as_posix(),
        reason=mask_secrets(str(notes.get("reason", ""))),
        values={dimension.key: values[dimension.key] for dimension in loaded.space if dimension.key in values},
        tail=mask_secrets(str(notes.get("tail", ""))),
        curves=tuple(notes.get("curves", ())),
        repeats=tuple({**repeat, "run": _run_of(repeat, run)} for repeat in notes.get("repeats", ())),
        begun=trial.datetime_start.isoformat(timespec="seconds") if trial.datetime_start else "",
        ended=trial.datetime_complete.isoformat(timespec="seconds") if trial.datetime_complete else "",
        is_base=_is_base(loaded, notes),
    )


def _run_of(repeat: Mapping[str, Any], run: Path) -> str:
    return (run if repeat["seed"] is None else run / seed_folder(repeat["seed"])).as_posix()


def _is_base(loaded: LoadedSweep, notes: Mapping[str, Any]) -> bool:
    first = notes.get("first")
    return first is not None and first < len(loaded.first) and loaded.first[first].is_base


def _base(loaded: LoadedSweep) -> dict[str, Any]:
    keys = {dimension.key for dimension in loaded.space} | {key for d in loaded.space for key, _ in d.when}
    return {key: value_of(loaded.base.config, key) for key in keys}


def _table(results: Results) -> str:
    """One line a trial. Cells that a spreadsheet would run as a formula are quoted away from it."""
    keys = [dimension.key for dimension in results.loaded.space]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*_COLUMNS, *keys])
    for row in results.rows:
        cells = [row.trial, row.state, row.value, row.seconds, row.run, row.reason]
        cells += [flow(row.values[key]) if key in row.values else None for key in keys]
        table.writerow(["" if cell is None else _harmless(cell) for cell in cells])
    return text.getvalue()


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "@", "\t", "\r")) else cell


def best_config(loaded: LoadedSweep, best: TrialRow) -> str:
    """The base config at the best point, with a run folder of its own; what `auto` became there is written out."""
    run_dir = (loaded.dir / "best").as_posix()
    point = f"trial {best.trial} of {loaded.dir.as_posix()}"
    first_run = Path(best.repeats[0]["run"]) if best.repeats else Path(best.run)
    extra: dict[str, Any] = {}
    for key, value in resolved_values(RunFolder(first_run).config).items():
        try:
            loaded.config_for({**best.values, **extra, key: value}, run_dir)
        except ConfigError:  # a note for the reader, not a value of the config
            continue
        extra[key] = value
    config = loaded.config_for({**best.values, **extra}, run_dir, origin=point)
    origins = {**config.origins, **dict.fromkeys(extra, f"what auto became in {point}")}
    head, _, rest = dump_config(replace(config, origins=origins)).partition("\n")
    seeds = f" (mean of {loaded.spec.repeats} seeds)" if loaded.spec.repeats > 1 else ""
    note = f"# Best of {loaded.dir.as_posix()}: trial {best.trial}, {loaded.spec.metric} {best.value:.6g}{seeds}."
    return f"{head}\n{note} It runs as it is: {train_line(loaded)}\n{rest}"


def resolved_values(config_file: Path) -> dict[str, Any]:
    """What `auto` became in a run, by dotted key, as its config.yaml notes it."""
    if not config_file.exists():
        return {}
    tree = read_yaml(config_file)
    lines = tree.text.split("\n")
    found: dict[str, Any] = {}
    for path, number in tree.lines.items():
        line = split_line(lines[number - 1])
        note = _RESOLVED.search(line.note) if line is not None else None
        value = tree.value
        for key in path:
            value = value[key]
        if note and value == "auto":
            found[dotted(path)] = parse_yaml(note[1], str(config_file)).value
    return found


def _summary(results: Results, importances: Mapping[str, float]) -> dict[str, Any]:
    loaded = results.loaded
    spec = loaded.spec
    return {
        "name": loaded.dir.name,
        "dir": loaded.dir.as_posix(),
        "file": loaded.path.as_posix(),
        "config": spec.config,
        "train": train_line(loaded),
        "metric": spec.metric,
        "direction": loaded.direction,
        "sampler": spec.sampler,
        "pruner": spec.pruner.type,
        "repeats": spec.repeats,
        "workers": spec.workers,
        "total": loaded.total,
        "space": [
            {
                "key": dimension.key,
                "kind": dimension.kind,
                "log": dimension.log,
                "low": dimension.low,
                "high": dimension.high,
                "choices": list(dimension.choices),
                "words": dimension.identity(),
            }
            for dimension in loaded.space
        ],
        "trials": [asdict(row) for row in results.rows],
        "best": results.best.trial if results.best else None,
        "base": next((row.trial for row in results.rows if row.is_base), None),
        "importances": dict(importances),
    }
