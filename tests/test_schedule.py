"""Plans, what falls due, and learning rates, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from sft.schedule import evaluation_steps, is_due, learning_rate, plan, share_or_steps


def test_a_plan_locates_every_conversation_once_an_epoch() -> None:
    p = plan(10, 4, epochs=2, max_steps=None)
    assert (p.steps_per_epoch, p.total_steps) == (3, 6)
    assert [p.locate(s) for s in range(1, 7)] == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8), (1, 8, 10)]
    assert [p.epoch_at(s) for s in (0, 1, 3, 6)] == [0.0, 0.4, 1.0, 2.0]


def test_max_steps_cuts_or_extends() -> None:
    assert plan(10, 4, epochs=1, max_steps=2).total_steps == 2
    assert plan(10, 4, epochs=1, max_steps=7).locate(7) == (2, 0, 4)


def test_fractions_of_an_epoch() -> None:
    assert plan(100, 10, epochs=0.5, max_steps=None).total_steps == 5
    assert plan(3, 10, epochs=0.1, max_steps=None).total_steps == 1


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.1, 10), (0.001, 1), (1, 1), (7, 7)])
def test_shares_and_steps(value: float, steps: int) -> None:
    assert share_or_steps(value, 100) == steps


def test_what_falls_due() -> None:
    assert [s for s in range(11) if is_due(s, 0.25, 10)] == [2, 4, 6, 8, 10]
    assert [s for s in range(11) if is_due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(11) if is_due(s, 0, 10)] == [10]


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [
        (0.1, 14, tuple(range(1, 15))), (0.1, 26, (3, 6, 9, 12, 15, 18, 21, 24, 26)), (0.25, 8, (2, 4, 6, 8)),
        (0.3, 10, (3, 6, 9, 10)), (5, 12, (5, 10, 12)), (50, 12, (12,)), (0, 12, (12,)), (1, 3, (1, 2, 3)),
    ],
)  # fmt: skip
def test_evaluations_fall_where_the_trainer_counts_them(every: float, total: int, steps: tuple[int, ...]) -> None:
    """Not one a tenth of the run: of 14 steps at 0.1, each is one."""
    assert evaluation_steps(every, total) == steps
    assert steps == tuple(step for step in range(1, total + 1) if is_due(step, every, total))


def rates(schedule: str, total: int = 10, **options: float) -> list[float]:
    return [
        round(learning_rate(s, total_steps=total, peak=1.0, schedule=schedule, **options), 4)  # type: ignore[arg-type]
        for s in range(1, total + 1)
    ]


def test_constant_and_linear() -> None:
    assert rates("constant", 3) == [1, 1, 1]
    assert rates("linear", 4) == [1, 0.75, 0.5, 0.25]


def test_warmup_ends_at_the_peak() -> None:
    assert rates("linear", 6, warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("constant", 10, warmup=0.2) == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_cosine_is_half_way_at_half_time() -> None:
    assert rates("cosine", 4) == [1, round(0.5 * (1 + math.cos(math.pi / 4)), 4), 0.5, 0.1464]


def test_wsd_holds_then_decays() -> None:
    assert rates("wsd", 10, decay=0.4) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_the_floor_of_a_decay() -> None:
    assert rates("linear", 2, min_ratio=0.5) == [1, 0.75]
