"""How often a run is evaluated, how many prompts it answers and how long its serving check may be, where `auto` says.

Decided before step 1 by arithmetic on computed tokens, never by a clock: every machine, every number of processes,
every resume and every trial of a sweep decide alike. A cost is counted in forward passes of one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sft.config import Config
from sft.schedule import share_or_steps

SHARE = 0.1
"""Of the run's computed tokens: what evaluations, samples and the serving check may cost together."""
TRAINED_COST = {"full": 3.0, "lora": 2.0, "qlora": 2.0}
"""Of a token that is trained: forward, backward to the activations and, in a full finetune, to the weights."""
GENERATED_COST = 10.0
"""Of a generated token, measured with SmolLM2-135M on a CPU, four prompts at a time (docs/BENCHMARKS.md)."""
MOST_EVALUATIONS, ENOUGH_EVALUATIONS = 10, 4
MOST_SAMPLES = 4
SERVED_PROMPTS, SERVED_TOKENS = 4, 256

# What runs did whose record names no choice: the defaults of before there was `auto`.
FORMER_EVERY, FORMER_SAMPLES = 0.1, 4
KEY = "evaluations"  # among what a run records


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to compute. `prompts`: tokens of each held-out prompt that can be answered."""

    total_steps: int
    tokens_per_step: float
    trained_cost: float
    held_out_tokens: int
    prompts: tuple[int, ...]
    max_new_tokens: int
    is_rounded: bool = False  # final/ may be rounded, and is scored once more

    @property
    def training(self) -> float:
        return self.total_steps * self.tokens_per_step * self.trained_cost

    def answers(self, prompts: int, max_new_tokens: int) -> float:
        """At most: an answer that ends early costs less."""
        known = self.prompts[:prompts]
        return sum(known) + len(known) * max_new_tokens * GENERATED_COST


@dataclass(frozen=True, slots=True)
class Evaluations:
    """When a run is evaluated and what is answered. `every_steps` 0: at the start and the end alone."""

    every_steps: int
    samples: int
    served: int = SERVED_PROMPTS  # prompts that the serving check lets the saved model answer
    served_tokens: int = SERVED_TOKENS
    share: float = 0.0  # of the run's computed tokens, at most

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Evaluations:
        """Of a record; what a later version added is left out."""
        return Evaluations(**{key: values[key] for key in Evaluations.__slots__ if key in values})


def evaluations_after_start(every_steps: int, total_steps: int) -> int:
    """How many come after that of step 0, the one at the end among them."""
    return math.ceil(total_steps / every_steps) if every_steps else 1


def decide(config: Config, work: Work) -> Evaluations:
    """The evaluations of a run. What the user set is obeyed and not counted; the rest fits into SHARE of the run.

    Preferred, in this order: four answered prompts in the serving check; a curve of at least ENOUGH_EVALUATIONS; the
    most samples; the most evaluations. Where `save.best` or `train.early_stopping` decide by evaluations, enough of
    them come whatever they cost.
    """
    every, wanted, total = config.eval.every, config.eval.samples, work.total_steps
    served_tokens = max(SERVED_TOKENS, config.eval.max_new_tokens)
    fixed = None if every == "auto" else share_or_steps(every, total)
    needed = needed_evaluations(config, total)
    chosen: Evaluations | None = None
    for number, samples, served in _candidates(fixed is not None, wanted, needed, total):
        steps = _interval(number, total) if fixed is None else fixed
        chosen = Evaluations(steps, samples, served, served_tokens)
        if _counted(chosen, work, config) <= SHARE / (1 - SHARE) * work.training:
            break
    assert chosen is not None
    return replace(chosen, share=_share(chosen, work))


def _share(chosen: Evaluations, work: Work) -> float:
    rest = cost(chosen, work)
    return round(rest / (work.training + rest), 4)


def needed_evaluations(config: Config, total_steps: int) -> int:
    """After step 0, at least: best checkpoints and patience mean nothing without some on the way."""
    early = config.train.early_stopping
    if config.save.best is None and early is None:
        return 1
    return min(total_steps, max(ENOUGH_EVALUATIONS, early.patience + 1 if early else 0))


def cost(chosen: Evaluations, work: Work) -> float:
    """Of all that is not training, at most."""
    number = 1 + evaluations_after_start(chosen.every_steps, work.total_steps)
    return (
        (number + work.is_rounded) * work.held_out_tokens
        + number * work.answers(chosen.samples, work.max_new_tokens)
        + work.answers(chosen.served, chosen.served_tokens)
    )


def _counted(chosen: Evaluations, work: Work, config: Config) -> float:
    """Without what the user asked for."""
    number = 1 + evaluations_after_start(chosen.every_steps, work.total_steps)
    losses = (number if config.eval.every == "auto" else 2) + work.is_rounded
    samples = chosen.samples if config.eval.samples == "auto" else 0
    return (
        losses * work.held_out_tokens
        + number * work.answers(samples, work.max_new_tokens)
        + work.answers(chosen.served, chosen.served_tokens)
    )


def _candidates(is_fixed: bool, samples: int | str, needed: int, total: int) -> Iterator[tuple[int, int, int]]:
    """(evaluations after step 0, samples, prompts of the serving check), the best first, the cheapest last.

    `is_fixed`: the user says when to evaluate, so their number is not tried out.
    """
    most = max(needed, min(MOST_EVALUATIONS, total))
    enough = max(needed, min(ENOUGH_EVALUATIONS, total))
    curve, few, any_number = (
        ((1,), (1,), (1,))
        if is_fixed
        else (range(most, enough - 1, -1), range(enough, needed - 1, -1), range(most, needed - 1, -1))
    )
    some = tuple(range(MOST_SAMPLES, 0, -1)) if samples == "auto" else (int(samples),)
    fewest = 0 if samples == "auto" else int(samples)
    yield from ((number, sample, SERVED_PROMPTS) for sample in some for number in curve)
    for served in (SERVED_PROMPTS, 2, 1):
        yield from ((number, sample, served) for sample in some for number in few)
    for served in (SERVED_PROMPTS, 2, 1):
        yield from ((number, fewest, served) for number in any_number)


def _interval(number: int, total: int) -> int:
    return 0 if number == 1 else math.ceil(total / number)


def kept(config: Config, recorded: Mapping[str, Any], work: Work) -> Evaluations:
    """Of a run that is continued: as it began, but for what the user sets now. Runs of before there was a record of
    it go on with the defaults of then."""
    served_tokens = max(SERVED_TOKENS, config.eval.max_new_tokens)
    began = (
        Evaluations.from_dict(recorded[KEY])
        if KEY in recorded
        else Evaluations(share_or_steps(FORMER_EVERY, work.total_steps), FORMER_SAMPLES)
    )
    every, samples = config.eval.every, config.eval.samples
    chosen = Evaluations(
        began.every_steps if every == "auto" else share_or_steps(every, work.total_steps),
        began.samples if samples == "auto" else samples,
        began.served,
        served_tokens,
    )
    return replace(chosen, share=_share(chosen, work))


def told(chosen: Evaluations, config: Config, work: Work) -> list[str]:
    """What `auto` became, a line each; the serving check where it was shortened."""
    lines: list[str] = []
    number = evaluations_after_start(chosen.every_steps, work.total_steps)
    share = f"{chosen.share:.0%}" if chosen.share >= 0.01 else "less than 1 %"
    share = share.replace("%", " %") if " " not in share else share
    how = f"at most {share} of the run's computed tokens, with samples and the serving check"
    if config.eval.every == "auto":
        when = f"every {chosen.every_steps:,} steps" if number > 1 else "at the start and the end alone"
        lines.append(f"eval.every: auto → {when} ({1 + number} evaluations, {how})")
    if config.eval.samples == "auto":
        lines.append(f"eval.samples: auto → {chosen.samples} answered at each evaluation")
    if chosen.served < min(SERVED_PROMPTS, len(work.prompts)):
        lines.append(
            f"the serving check lets the saved model answer {chosen.served} prompt{'s' * (chosen.served > 1)} instead "
            f"of {min(SERVED_PROMPTS, len(work.prompts))}, since this run is short"
        )
    return lines


def work_of(
    config: Config, *, total_steps: int, tokens_per_step: float, held_out_tokens: int, prompts: Sequence[int]
) -> Work:
    """`prompts`: tokens of each held-out prompt, as the data have them."""
    return Work(
        total_steps=total_steps,
        tokens_per_step=tokens_per_step,
        trained_cost=TRAINED_COST[config.model.tuning],
        held_out_tokens=held_out_tokens,
        prompts=tuple(prompts),
        max_new_tokens=config.eval.max_new_tokens,
        is_rounded=config.model.tuning == "full",
    )
