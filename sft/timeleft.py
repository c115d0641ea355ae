"""How long a run still takes, all that comes after its steps included."""

from __future__ import annotations

from collections.abc import Mapping

from sft.budget import Evaluations, Work
from sft.schedule import due_steps_left


def seconds_left(
    step: int, *, work: Work, chosen: Evaluations, saves_left: int, step_seconds: float, last: Mapping[str, float]
) -> float:
    """After `step`. `step_seconds`: of a step on average. `last`: seconds of the latest stretch of each phase.

    What has not come yet is taken to cost what its tokens cost in training; answers as many tokens as they may have.
    """
    per_unit = step_seconds / max(1e-9, work.tokens_per_step * work.trained_cost)
    answers = work.answers(chosen.samples, work.max_new_tokens)
    served = work.answers(chosen.served, chosen.served_tokens)
    evaluation = last.get("evaluation", per_unit * work.held_out_tokens)
    samples = last.get("samples", per_unit * answers)
    return (
        (work.total_steps - step) * step_seconds
        + due_steps_left(step, chosen.every_steps, work.total_steps) * (evaluation + samples)
        + (evaluation if work.is_rounded else 0.0)
        + (saves_left + 1) * last.get("saving", 0.0)
        + (samples * served / answers if answers else per_unit * served)
    )
