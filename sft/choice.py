"""What evaluations decide: the best step, and whether to stop early. Progress is read from metrics.jsonl, never
remembered, so that a resumed run decides as the uninterrupted one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sft.config import EarlyStopping


def direction(metric: str) -> int:
    """1 where lower is better (losses), -1 where higher is."""
    return 1 if metric.rpartition(".")[2] in ("loss", "perplexity") else -1


def scores_of(events: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """{step: value} of an evaluation metric such as eval.loss, for every step that was evaluated: NaN where that gave
    no number, which is null in metrics.jsonl."""
    name = metric.removeprefix("eval.")
    found = {event["step"]: event.get(name) for event in events if event["event"] == "eval"}
    return {int(step): math.nan if value is None else float(value) for step, value in found.items()}


def best_step(scores: Mapping[int, float], metric: str, among: Collection[int] | None = None) -> int | None:
    """The step with the best score, the earliest of equals; None where no score is a number. Step 0, which has no
    checkpoint, does not count.

    `among`: only these steps, whose weights are there to be taken.
    """
    sign = direction(metric)
    taken = [step for step, value in scores.items() if step > 0 and value == value and (among is None or step in among)]
    return min(taken, key=lambda step: (sign * scores[step], step)) if taken else None


def stops_early(scores: Mapping[int, float], rule: EarlyStopping) -> bool:
    """Whether the last `patience` evaluations brought no gain of more than `min_delta`; NaN is no gain."""
    sign = direction(rule.metric)
    best, since = math.inf, 0
    for _, value in sorted(scores.items()):
        if sign * value < best - rule.min_delta:
            best, since = sign * value, 0
        else:
            since += 1
    return since >= rule.patience
