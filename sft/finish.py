"""After the last step: final/, the check that serving equals training, the model card, the report, the status."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from sft.budget import SERVED_PROMPTS
from sft.checkpoint import complete_checkpoints, publish_folder, step_of, verify
from sft.choice import best_step, direction
from sft.distributed import from_first_rank, wait_for_all
from sft.durable import finite, read_json, write_json, write_text
from sft.errors import EXIT_DONE, ResumeError
from sft.runcard import run_card
from sft.savedweights import free_training_memory, let_go, load_into, saved_equals_live
from sft.serving import check_serving, describe
from sft.session import Session


def finish(session: Session, *, reason: str) -> None:
    """Writes what remains of a run. A collective where the model is sharded. `reason`: why it ended early, or ""."""
    best = _best_step(session)
    free_training_memory(session.job)  # what follows needs no more host memory than the run did
    rounded = _round_as_saved(session) if best is None else None
    final, staging = session.folder.final, session.folder.path / ".staging-final"
    with session.progress.phase("saving", "writing final/"):
        weights = session.trained_weights(copy=False) if best is None else {}
        is_live = best is None
        if session.job.is_first:
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed here
            if best is None:
                session.write_model(staging, weights, dtype=_saved_dtype(session))
            else:
                is_live = _write_best(session, session.folder.checkpoints / f"step-{best:08d}" / "model", staging)
        del weights
    if session.job.is_first:
        serving = {
            **_serve(session, staging, is_live=is_live),
            "step": best or session.state.step,
            "rounded": rounded,
        }
        write_json(session.folder.path / "serving.json", serving)
        session.say(f"serving check: {describe(serving)}")
        session.progress.phases.enter("saving")
        write_text(staging / "README.md", run_card(session.folder.path) or "")
        publish_folder(staging, final)
        session.record_time()
        session.folder.write_status("done", code=EXIT_DONE, reason=reason, step=session.state.step)
        session.say(f"done: {final}, {_report(session.folder.path)}")
    wait_for_all()


def _round_as_saved(session: Session) -> dict[str, Any] | None:
    """Rounds the weights to the dtype that final/ keeps, and scores them once more: what is reported last is what is
    saved. A short run at a small learning rate can lose much of its gain there. None where nothing is rounded, or
    nothing is held out. A collective; a sharded model is left as it is."""
    dtype, trainee = _saved_dtype(session), session.job.trainee
    kept = {parameter.dtype for parameter in trainee.parameters()}
    if dtype is None or kept <= {dtype} or session.job.is_sharded or session.data.eval is None:
        return None
    trained = session.scores("eval.loss").get(session.state.step, math.nan)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.copy_(parameter.to(dtype))
    scores = session.score_held_out()
    assert scores is not None
    name = str(dtype).removeprefix("torch.")
    losses = {"loss": scores["loss"], "loss_as_trained": trained}
    return {"dtype": name, **finite(losses), "step": session.state.step}


def _report(folder: Path) -> Path:
    from sft.report import write_report  # a command of this floor, whose page every run gets

    return write_report(folder)


def _best_step(session: Session) -> int | None:
    """The step of the best checkpoint where `save.best` names a metric and the best is not the last."""
    metric, last = session.config.save.best, session.state.step
    if metric is None:
        return None
    scores = session.scores(metric)
    best: int | None = from_first_rank(_best_whole(session, metric, scores) if session.job.is_first else None)
    if best is None:
        return None
    sign = direction(metric)
    if 0 in scores and sign * scores[0] <= sign * scores[best]:
        session.say(
            f"WARNING: by {metric} no checkpoint is better than the model was before training ({scores[0]:.4g}); the "
            f"best of them is step {best} ({scores[best]:.4g})"
        )
    if best == last:
        return None
    session.say(f"final/ takes the best checkpoint by {metric}: step {best}")
    return best


def _best_whole(session: Session, metric: str, scores: dict[int, float]) -> int | None:
    """The best step whose checkpoint verifies, or the last, whose weights are here. Says which ones it passes over."""
    last = session.state.step
    there = {step_of(path): path for path in complete_checkpoints(session.folder.checkpoints)}
    while (best := best_step(scores, metric, {*there, last})) not in (None, last):
        assert best is not None
        try:
            verify(there[best])
            return best
        except ResumeError as error:
            session.say(f"WARNING: step {best} is the best by {metric}, but its checkpoint is damaged: {error}")
            del there[best]
    return best


def _write_best(session: Session, model_folder: Path, target: Path) -> bool:
    """final/ from a checkpoint's model/, which is the same but for the dtype of a full finetune. Whether the live model
    holds those weights then: they are put there, so that no second model is loaded."""
    is_live = not session.job.is_sharded and load_into(session.job.trainee, model_folder)
    if session.config.model.tuning != "full":
        shutil.copytree(model_folder, target)
        return is_live
    if is_live:
        weights = session.trained_weights(copy=False)
    else:
        from sft.model import load_base

        weights = {name: t.detach() for name, t in load_base(str(model_folder), dtype="auto").state_dict().items()}
    session.write_model(target, weights, dtype=_saved_dtype(session))
    return is_live


def _saved_dtype(session: Session) -> torch.dtype | None:
    """final/ of a full finetune has the base model's own dtype; an adapter keeps the one it was trained in."""
    if session.config.model.tuning != "full":
        return None
    dtype: torch.dtype = getattr(torch, session.job.resolved["saved_dtype"])
    return dtype


def _serve(session: Session, final: Path, *, is_live: bool) -> dict[str, Any]:
    """Through the saved folder as a stranger has it: its tokenizer, its template, its stops.

    On a CPU the model is the folder's own, loaded after the live one has gone. On a GPU, where there may be no room for
    the base in 16 bits, the live weights answer, after each of them was compared with what the folder's files hold.
    """
    job, samples = session.job, session.data.eval.samples if session.data.eval is not None else []
    samples = [] if job.is_sharded else samples[:SERVED_PROMPTS]
    model = None
    with session.progress.phase("serving_check", "checking that what is served is what was trained") as tick:
        if job.device.type != "cpu" and is_live and samples and saved_equals_live(job.trainee, final):
            model = job.trainee.model
        elif samples:
            let_go(job.trainee)
        with torch.autocast(
            job.device.type, job.trainee.compute_dtype, enabled=model is not None and job.trainee.autocast
        ):
            return check_serving(
                final,
                samples,
                max_new_tokens=session.evals.served_tokens,
                answered=session.evals.served,
                model=model,
                device=job.device,
                template_args=session.config.data.template_args,
                pinned_date=read_json(session.folder.environment)["date"],
                trust_remote_code=session.config.model.trust_remote_code,
                tick=tick,
            )
