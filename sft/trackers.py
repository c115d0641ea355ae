"""Trackers by name, through accelerate: TensorBoard, Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.resume import digest_of

if TYPE_CHECKING:
    from sft.session import Session


class Trackers:
    """Trackers by name, through accelerate. One that fails is named once and never stops the training."""

    def __init__(self, session: Session) -> None:
        self._session, self._on = session, bool(session.config.log.trackers)
        log = session.config.log
        if self._on:
            name = log.name or session.folder.path.name
            run_id = digest_of(str(session.folder.path.resolve()).encode())
            self._try(
                lambda: session.job.accelerator.init_trackers(
                    log.project, init_kwargs={"wandb": {"name": name, "id": run_id, "resume": "allow"}}
                )
            )

    def log(self, event: dict[str, Any]) -> None:
        numbers = {f"train/{k}": v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
        self._try(lambda: self._session.job.accelerator.log(numbers, step=event["step"]))

    def log_eval(self, scores: dict[str, Any], step: int) -> None:
        numbers = {f"eval/{k}": v for k, v in scores.items() if v is not None}
        self._try(lambda: self._session.job.accelerator.log(numbers, step=step))

    def finish(self) -> None:
        # each tracker by itself: accelerate's end_training would end the process group, too
        for tracker in self._session.job.accelerator.trackers if self._on else ():
            self._try(tracker.finish)

    def _try(self, action: Any) -> None:
        if not self._on:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises is its own trouble, not the training's
            self._on = False
            self._session.say(f"warning: the tracker failed and is switched off: {type(error).__name__}: {error}")
