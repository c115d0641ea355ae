"""The best step and early stopping, by eye."""

from __future__ import annotations

import math

from sft.choice import best_step, direction, scores_of, stops_early
from sft.config import EarlyStopping

LOSSES = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5}


def test_losses_fall_and_probabilities_rise() -> None:
    assert [direction(f"eval.{name}") for name in ("loss", "perplexity", "token_accuracy", "stop_probability")] == [
        1, 1, -1, -1,
    ]  # fmt: skip
    assert best_step(LOSSES, "eval.token_accuracy") == 2


def test_the_best_is_the_earliest_of_equals_and_never_step_0() -> None:
    assert best_step(LOSSES, "eval.loss") == 4
    assert best_step({0: 1.0}, "eval.loss") is None


def test_only_what_is_there_is_chosen() -> None:
    assert best_step(LOSSES, "eval.loss", {2, 8}) == 8
    assert best_step(LOSSES, "eval.loss", {0, 5}) is None


def test_scores_come_from_evaluations_that_have_one() -> None:
    events = [
        {"event": "train", "step": 1, "loss": 9.0}, {"event": "eval", "step": 0, "loss": 1.0},
        {"event": "eval", "step": 2, "loss": None}, {"event": "eval", "step": 4, "loss": 2.0},
    ]  # fmt: skip
    scores = scores_of(events, "eval.loss")
    assert list(scores) == [0, 2, 4], "an evaluation that gave no number is one that was made"
    assert (scores[0], scores[4], math.isnan(scores[2])) == (1.0, 2.0, True)
    assert best_step({2: math.nan, 4: 2.0, 6: 2.5}, "eval.loss") == 4
    assert best_step({0: 1.0, 2: math.nan}, "eval.token_accuracy") is None


def test_patience_counts_evaluations_without_a_gain() -> None:
    def rule(patience: int, min_delta: float = 0.0) -> EarlyStopping:
        return EarlyStopping(patience=patience, min_delta=min_delta)

    falling = {0: 3.0, 2: 2.0, 4: 1.95, 6: 1.9}
    assert not stops_early(falling, rule(1))
    assert stops_early(falling, rule(2, min_delta=0.3)), "4 and 6 gain less than 0.3 on step 2"
    assert stops_early({0: 1.0, 2: 1.0, 4: 1.0}, rule(2))
    assert not stops_early({0: 1.0, 2: 1.0}, rule(2))
    assert stops_early({0: 1.0, 2: math.nan, 4: math.nan}, rule(2)), "no number is no gain"
    assert not stops_early({0: math.nan, 2: math.nan, 4: 1.0}, rule(2)), "nor does it keep a gain from counting"
