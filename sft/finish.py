"""After the last step: final/, the check that serving equals training, the model card, the report, the status."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint import publish_folder, read_tensors, verify
from sft.distributed import wait_for_all
from sft.durable import read_json, write_json, write_text
from sft.errors import EXIT_DONE
from sft.runcard import run_card
from sft.serving import check_serving, describe
from sft.session import Session, direction

SERVING_SAMPLES = 4


def finish(session: Session, *, reason: str) -> None:
    """Writes what remains of a run. A collective where the model is sharded. `reason`: why it ended early, or ""."""
    weights = _best_weights(session) or session.trained_weights(copy=False)
    if session.job.is_first:
        final, staging = session.folder.final, session.folder.path / ".staging-final"
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed here
        session.write_model(staging, weights, dtype=_saved_dtype(session))
        serving = _serve(session, staging)
        write_json(session.folder.path / "serving.json", serving)
        session.say(f"serving check: {describe(serving)}")
        write_text(staging / "README.md", run_card(session.folder.path) or "")
        publish_folder(staging, final)
        session.folder.write_status("done", code=EXIT_DONE, reason=reason, step=session.state.step)
        session.say(f"done: {final}, {_report(session.folder.path)}")
    wait_for_all()


def _report(folder: Path) -> Path:
    from sft.report import write_report  # a command of this floor, whose page every run gets

    return write_report(folder)


def _best_weights(session: Session) -> dict[str, torch.Tensor] | None:
    """The weights of the best checkpoint where `save.best` names a metric and the best is not the last."""
    best, metric = session.best_step(), session.config.save.best
    if best is None or metric is None:
        return None
    scores, sign = session.scores(metric), direction(metric)
    if session.job.is_first and 0 in scores and sign * scores[0] <= sign * scores[best]:
        session.say(
            f"WARNING: by {metric} no checkpoint is better than the model was before training ({scores[0]:.4g}); the "
            f"best of them is step {best} ({scores[best]:.4g})"
        )
    if best == session.state.step:
        return None
    folder = session.folder.checkpoints / f"step-{best:08d}"
    if session.job.is_first:
        verify(folder)
        session.say(f"final/ takes the best checkpoint by {session.config.save.best}: step {best}")
    wait_for_all()
    return _weights_of(session, folder / "model")


def _weights_of(session: Session, model_folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint's model/, under the names of the live model."""
    from sft.model import load_base

    trainee = session.job.trainee
    if session.config.model.tuning == "full":
        model = load_base(str(model_folder), dtype="auto")
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    live = {name: t.detach().clone() for name, t in get_peft_model_state_dict(trainee.model).items()}
    set_peft_model_state_dict(trainee.model, read_tensors(model_folder / "adapter_model.safetensors"))
    try:
        return session.trained_weights()
    finally:
        set_peft_model_state_dict(trainee.model, live)


def _saved_dtype(session: Session) -> torch.dtype | None:
    """final/ of a full finetune has the base model's own dtype; an adapter keeps the one it was trained in."""
    if session.config.model.tuning != "full":
        return None
    from transformers import AutoConfig

    from sft.gguf import model_source

    base = session.config.model
    dtype = AutoConfig.from_pretrained(
        model_source(base.name), revision=base.revision, trust_remote_code=base.trust_remote_code
    ).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _serve(session: Session, final: Path) -> dict[str, Any]:
    """Through the saved folder as a stranger loads it; on CUDA the live weights answer, to spare the memory."""
    samples = session.data.eval.samples[:SERVING_SAMPLES] if session.data.eval is not None else []
    live = session.job.trainee.model if session.job.device.type == "cuda" and not session.job.is_sharded else None
    if session.job.is_sharded:
        samples = []
    with torch.autocast(
        session.job.device.type,
        session.job.trainee.compute_dtype,
        enabled=live is not None and session.job.trainee.autocast,
    ):
        return check_serving(
            final,
            samples,
            max_new_tokens=max(256, session.config.eval.max_new_tokens),
            model=live,
            template_args=session.config.data.template_args,
            pinned_date=read_json(session.folder.environment)["date"],
            trust_remote_code=session.config.model.trust_remote_code,
        )
