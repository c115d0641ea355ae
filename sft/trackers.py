"""Trackers by name, through accelerate's: TensorBoard, Weights & Biases, MLflow, Trackio.

Each continues its own run after a resume: what identifies it is kept in the run folder, so `--fresh`, which moves that
folder aside, begins a new one. Only rank 0 tracks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft.durable import read_json, write_json
from sft.secrets import mask_secrets

if TYPE_CHECKING:
    from sft.session import Session


class Trackers:
    """The trackers of a run. One that fails is named once and left out; it never stops the training, nor the others."""

    def __init__(self, session: Session) -> None:
        self._say, self._live = session.say, dict[str, Any]()
        if session.job.is_first:
            for kind in dict.fromkeys(session.config.log.trackers):
                self._try(kind, partial(self._open, kind, session))

    def _open(self, kind: str, session: Session) -> None:
        log, folder = session.config.log, session.folder.path / "trackers"
        folder.mkdir(exist_ok=True)
        file = folder / "runs.json"
        known = read_json(file) if file.exists() else {}
        name = log.name or session.folder.path.name
        tracker = start(kind, log.project, name, folder, run=known.get(kind), after_step=session.state.step)
        if kind not in known or kind == "trackio":  # which forgets the config of a run that goes on without one
            config = session.config.model_dump(mode="json")
            store_config(kind, tracker, flat_config({**config, "resolved": session.job.resolved}))
        if kind not in known:
            write_json(file, {**known, kind: identity(kind, tracker)})
        self._live[kind] = tracker

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else they learn of the failure as the process ends
            for name, tracker in list(self._live.items()):
                self._try(name, tracker.finish)

    def log(self, event: Mapping[str, Any]) -> None:
        """A train event of metrics.jsonl, its numbers named `train/…`."""
        self._log("train", ((key, value) for key, value in event.items() if key != "step"), event["step"])

    def log_eval(self, scores: Mapping[str, Any], step: int) -> None:
        self._log("eval", scores.items(), step)

    def _log(self, group: str, pairs: Iterable[tuple[str, Any]], step: int) -> None:
        numbers = {f"{group}/{key}": value for key, value in pairs if isinstance(value, int | float)}
        for name, tracker in list(self._live.items()):
            # W&B drops what comes for a step that it has seen: the evaluation that a stop put off, for one
            if name == "wandb":
                self._try(name, partial(tracker.log, {**numbers, "step": step}))
            else:
                self._try(name, partial(tracker.log, numbers, step=step))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises is its own trouble, not the training's
            self._live.pop(name, None)
            self._say(
                f"warning: log.trackers: {name} failed and is left out of this run, which goes on: "
                f"{type(error).__name__}: {error}"
            )


def start(kind: str, project: str, name: str, folder: Path, *, run: str | None, after_step: int) -> Any:
    """A started tracker of accelerate's. `run`: the identity of the run to continue, which has done `after_step`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    make = LOGGER_TYPE_TO_CLASS[kind]
    if kind == "tensorboard":
        # what a killed process logged beyond its checkpoint goes, as it does from metrics.jsonl
        tracker = make(kind, folder, **({"purge_step": after_step + 1} if run else {}))
    elif kind == "wandb":
        tracker = make(project, name=name, id=run or uuid.uuid4().hex[:12], resume="allow", dir=str(folder))
    elif kind == "mlflow":
        tracker = make(project, run_id=run, run_name=name)
    else:
        tracker = make(project, name=run or name, resume="allow" if run else "never")
    tracker.start()
    if kind == "wandb":
        tracker.tracker.define_metric("*", step_metric="step")
    return tracker


def identity(kind: str, tracker: Any) -> str:
    """By what a later process finds this run again."""
    if kind == "tensorboard":
        return kind  # its folder is the run
    run = tracker.tracker
    return str({"wandb": lambda: run.id, "mlflow": lambda: run.info.run_id, "trackio": lambda: run.name}[kind]())


def store_config(kind: str, tracker: Any, config: Mapping[str, Any]) -> None:
    if kind == "tensorboard":  # as text: its table of hyperparameters would show up as a second run
        tracker.log({"config": "\n".join(f"    {key}: {value}" for key, value in config.items())}, step=0)
    else:
        tracker.store_init_configuration(dict(config))


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim.lr": 1e-4, …}`: plain values by dotted key, lists as JSON, without credentials."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flat_config(value, f"{prefix}{key}."))
        elif isinstance(value, bool | int | float):
            flat[prefix + key] = value
        else:
            flat[prefix + key] = mask_secrets(value if isinstance(value, str) else json.dumps(value))
    return flat
