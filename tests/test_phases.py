"""Every second of a run belongs to one phase, and what is left counts all that is to come."""

from __future__ import annotations

import pytest

from sft.budget import GENERATED_COST, Evaluations, Work
from sft.phases import PHASES, Phases, describe
from sft.timeleft import seconds_left


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_phases_add_up_to_the_clock() -> None:
    clock = Clock()
    phases = Phases(started=90.0, clock=clock)  # ten seconds of imports
    with phases.during("preparing"):
        clock.now += 5
    phases.enter("steps")
    clock.now += 20
    with phases.during("evaluation"):
        clock.now += 3
        with phases.during("samples"):  # not counted twice
            clock.now += 7
        clock.now += 1
    clock.now += 4
    assert phases.seconds() == {
        "loading": 10.0, "preparing": 5.0, "steps": 24.0, "evaluation": 4.0, "samples": 7.0, "saving": 0.0,
        "serving_check": 0.0,
    }  # fmt: skip
    assert sum(phases.seconds().values()) == clock.now - 90.0
    assert (phases.last["evaluation"], phases.last["samples"]) == (4.0, 7.0)


def test_a_phase_that_fails_is_left_too() -> None:
    clock = Clock()
    phases = Phases(clock=clock)

    def fail() -> None:
        with phases.during("saving"):
            clock.now += 2
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fail()
    clock.now += 1
    assert (phases.seconds()["saving"], phases.seconds()["loading"]) == (2.0, 1.0)


def test_a_resumed_run_counts_on() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    phases.continue_from({"steps": 30.0, "of_a_later_version": 5.0})
    phases.enter("steps")
    clock.now += 2
    assert phases.seconds()["steps"] == 32.0
    assert set(phases.seconds()) == set(PHASES)


def test_the_whole_in_a_line_the_longest_first() -> None:
    seconds = dict.fromkeys(PHASES, 0.0) | {"steps": 101.0, "samples": 240.0, "serving_check": 169.0}
    assert describe(seconds) == "8 min 30 s: samples 4 min 0 s, serving check 2 min 49 s, steps 1 min 41 s"


def test_time_left_counts_what_comes_after_the_steps() -> None:
    work = Work(10, 100.0, 2.0, 50, (10,) * 4, 20, is_rounded=True)
    chosen = Evaluations(every_steps=4, samples=2, served=4, served_tokens=40)
    last = {"evaluation": 3.0, "samples": 8.0, "saving": 1.0}
    # 4 steps of 2 s; evaluations at 8 and 10; one more of the rounded weights; two saves and final/; the serving check
    answers = 2 * (10 + 20 * GENERATED_COST)
    served = 4 * (10 + 40 * GENERATED_COST)
    expected = 4 * 2.0 + 2 * 11.0 + 3.0 + 3 * 1.0 + 8.0 * served / answers
    found = seconds_left(6, work=work, chosen=chosen, saves_left=2, step_seconds=2.0, last=last)
    assert found == pytest.approx(expected)


def test_before_anything_was_measured_tokens_tell_what_it_will_take() -> None:
    work = Work(10, 100.0, 2.0, 50, (10,) * 4, 20)
    chosen = Evaluations(every_steps=0, samples=1, served=1, served_tokens=40)
    unit = 2.0 / 200  # seconds of a step over what it computes
    expected = 9 * 2.0 + unit * (50 + 10 + 20 * GENERATED_COST) + unit * (10 + 40 * GENERATED_COST)
    found = seconds_left(1, work=work, chosen=chosen, saves_left=1, step_seconds=2.0, last={})
    assert found == pytest.approx(expected)
    assert seconds_left(10, work=Work(10, 100.0, 2.0, 0, (), 20), chosen=chosen, saves_left=0, step_seconds=2.0,
                        last={}) == 0.0  # fmt: skip
