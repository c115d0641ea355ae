"""Progress is arithmetic: the plan of steps, the learning rate at a step, what falls due at a step.

Nothing here is stateful, so a resumed run needs one integer. Steps count from 1; step 0 is "before training".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sft.config import Config, ScheduleName

AUTO_LR = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


def peak_learning_rate(config: Config) -> float:
    """`optim.lr`, or what auto stands for."""
    return AUTO_LR[config.model.tuning] if config.optim.lr == "auto" else config.optim.lr


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run divides. An epoch's last step may hold fewer conversations than the others."""

    conversations_per_epoch: int
    conversations_per_step: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.conversations_per_epoch / self.conversations_per_step)

    def locate(self, step: int) -> tuple[int, int, int]:
        """(epoch from 0, first conversation in it, one past the last) that `step` (from 1) trains."""
        assert 1 <= step <= self.total_steps, f"step {step} of {self.total_steps}"
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        start = index * self.conversations_per_step
        return epoch, start, min(start + self.conversations_per_step, self.conversations_per_epoch)

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step`, such as 1.5."""
        if step == 0:
            return 0.0
        epoch, _, end = self.locate(step)
        return epoch + end / self.conversations_per_epoch


def plan(conversations_per_epoch: int, conversations_per_step: int, epochs: float, max_steps: int | None) -> Plan:
    """`epochs` passes, or `max_steps` if that is given: it may cut the epochs short or go beyond them."""
    assert conversations_per_epoch > 0
    steps = max(1, round(math.ceil(conversations_per_epoch / conversations_per_step) * epochs))
    return Plan(conversations_per_epoch, conversations_per_step, max_steps or steps)


def share_or_steps(value: float, total_steps: int) -> int:
    """A config value that is a share of the run below 1 and a number of steps from 1 on; 0 stays 0."""
    if value == 0:
        return 0
    return max(1, round(value * total_steps)) if value < 1 else int(value)


def is_due(step: int, every: float, total_steps: int) -> bool:
    """Whether something that comes `every` share of the run, or `every` steps, falls on `step`; always at the end."""
    if step == total_steps:
        return True
    interval = share_or_steps(every, total_steps)
    return interval > 0 and step > 0 and step % interval == 0


def evaluation_steps(every: float, total_steps: int) -> tuple[int, ...]:
    """The steps after which the model is evaluated, the last one always among them; the evaluation before step 1 comes
    on top. The trainer goes by this, and so does a sweep that counts how many a trial has."""
    interval = share_or_steps(every, total_steps) or total_steps
    return (*range(interval, total_steps, interval), total_steps)


def due_steps_left(step: int, every: float, total_steps: int) -> int:
    """How many of the steps after `step` are due, as `is_due` has it."""
    if step >= total_steps:
        return 0
    interval = share_or_steps(every, total_steps)
    if interval == 0:
        return 1
    return total_steps // interval - step // interval + (total_steps % interval > 0)


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    schedule: ScheduleName,
    warmup: float = 0.0,
    decay: float = 0.2,
    min_ratio: float = 0.0,
) -> float:
    """The rate that `step` (from 1) is taken with.

    Warm-up is linear and ends at the peak on its last step. `wsd` (warmup-stable-decay, arXiv:2404.06395) holds the
    peak, then decays linearly over the last `decay` share of the steps. Decays reach `min_ratio * peak` on the step
    after the last, so that no step is taken at zero.
    """
    warmup_steps = share_or_steps(warmup, total_steps) if warmup else 0
    if step <= warmup_steps:
        return peak * step / warmup_steps
    after = step - warmup_steps - 1
    span = max(1, total_steps - warmup_steps)
    floor = peak * min_ratio
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return floor + (peak - floor) * (1 - after / span)
    if schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * after / span))
    decay_steps = max(1, round(decay * total_steps))
    into_decay = step - 1 - (total_steps - decay_steps)
    return peak if into_decay <= 0 else floor + (peak - floor) * (1 - into_decay / decay_steps)
