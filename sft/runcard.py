"""A run folder seen from outside: which run a path belongs to, and its model card from what the run has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.choice import best_step, scores_of
from sft.configfile import load_config
from sft.durable import read_json
from sft.modelcard import model_card, public_name
from sft.resume import changes_of, told
from sft.runfolder import RunFolder, read_events
from sft.secrets import mask_yaml
from sft.serving import describe


def run_card(run: Path, *, merged: bool = False) -> str | None:
    """The card as Markdown; None where `run` holds no complete record."""
    folder = RunFolder(run)
    if not (folder.config.is_file() and folder.data.is_file() and folder.metrics.is_file()):
        return None
    config = load_config(folder.config).config
    events = list(read_events(folder.metrics))
    evaluations = {event["step"]: event for event in events if event["event"] == "eval"}
    steps = [event for event in events if event["event"] == "train"]
    answers = [event for event in events if event["event"] == "samples"]
    environment = read_json(folder.environment) if folder.environment.is_file() else {}
    resolved = environment.get("resolved", {})
    serving = read_json(run / "serving.json") if (run / "serving.json").is_file() else None
    last: dict[str, Any] = steps[-1] if steps else {}
    card = model_card(
        config.model_dump(mode="json"),
        read_json(folder.data),
        before=evaluations.get(0),
        after=evaluations.get(saved_step(events, config.save.best, serving)),
        best=config.save.best,
        serving=None if serving is None else describe(serving),
        samples=answers[-1]["samples"] if answers else (),
        steps=last.get("step"),
        tokens=last.get("tokens"),
        seconds=last.get("seconds"),
        environment=environment.get("versions"),
        resolved={"optim.lr": resolved.get("lr"), "model.precision": resolved.get("precision")},
        merged=merged,
        changes=[told(change, _public) for change in changes_of(events)],
    )
    return mask_yaml(card)


def _public(value: Any) -> Any:
    return public_name(value) if isinstance(value, str) else value


def run_of(path: Path) -> RunFolder | None:
    """The run that `path` belongs to: itself, its final/, a checkpoint of it or that checkpoint's model/."""
    for folder in (path, *path.parents[:3]):
        run = RunFolder(folder)
        if run.config.is_file() and run.metrics.is_file():
            return run
    return None


def saved_step(events: list[dict[str, Any]], metric: str | None, serving: dict[str, Any] | None) -> int:
    """The step whose weights final/ holds: as was recorded with it, else the best by `metric`, else the last; -1 where
    none was evaluated."""
    recorded = (serving or {}).get("step")
    if recorded is not None:
        return int(recorded)
    best = best_step(scores_of(events, metric), metric) if metric else None
    evaluated = [int(event["step"]) for event in events if event["event"] == "eval" and event["step"] > 0]
    return best if best is not None else max(evaluated, default=-1)
