"""report.html of a sweep, drawn from the sweep.json beside it and nothing else. No torch, no storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.durable import read_json, write_text
from sft.errors import ConfigError
from sft.pages import render_page
from sft.yamltree import flow

MOST_POINTS = 300  # of one trial's curve on the page


def write_sweep_report(folder: Path) -> Path:
    """Write report.html into a sweep's folder and return it. Raises ConfigError where there is no sweep.json."""
    if not (folder / "sweep.json").is_file():
        raise ConfigError(f"{folder}: there is no sweep.json here yet; run the sweep first: sft sweep SWEEP.")
    target = folder / "report.html"
    write_text(target, sweep_page(read_json(folder / "sweep.json"), folder))
    return target


def sweep_page(sweep: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML. `folder` is where it will lie, for its links to the runs."""
    trials = [_shown(trial, sweep, folder) for trial in sweep["trials"]]
    best = next((trial for trial in trials if trial["trial"] == sweep["best"]), None)
    base = next((trial for trial in trials if trial["trial"] == sweep.get("base")), None)
    counts = {state: sum(trial["state"] == state for trial in trials) for state in _STATES}
    return render_page(
        "sweep.html",
        sweep=sweep,
        trials=trials,
        keys=[dimension["key"] for dimension in sweep["space"]],
        best=best,
        base=base if base and base["state"] == "complete" else None,
        counts=counts,
        others=", ".join(f"{number} {state}" for state, number in counts.items() if number and state != "complete"),
        seconds=sum(trial["seconds"] or 0.0 for trial in trials),
        importances=sorted(sweep["importances"].items(), key=lambda item: -item[1]),
        data={
            "metric": sweep["metric"],
            "minimize": sweep["direction"] == "minimize",
            "best": sweep["best"],
            "space": sweep["space"],
            "trials": [{key: trial[key] for key in ("trial", "state", "value", "values", "curve")} for trial in trials],
        },
    )


_STATES = ("complete", "pruned", "failed", "running", "waiting")


def _shown(trial: Mapping[str, Any], sweep: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A trial with what the page needs besides: its link, its values in words, the curve of its first run."""
    run = Path(trial["repeats"][0]["run"] if trial["repeats"] else trial["run"])
    inside = run.relative_to(sweep["dir"]) if run.is_relative_to(sweep["dir"]) else run
    page = inside / "report.html"
    curve = trial["curves"][0] if trial["curves"] else []
    return {
        **trial,
        "link": (page if (folder / page).is_file() else inside).as_posix(),
        "words": {key: _words(value) for key, value in trial["values"].items()},
        "curve": _thinned([[step, value] for step, value in curve]),
    }


def _words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else flow(value)


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most `MOST_POINTS`, the last one always among them."""
    every = max(1, -(-len(points) // MOST_POINTS))
    return [point for index, point in enumerate(points) if index % every == 0 or index == len(points) - 1]
