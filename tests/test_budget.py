"""Evaluations, samples and the serving check within a tenth of the run, by arithmetic alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.budget import GENERATED_COST, SHARE, Evaluations, Work, cost, decide, evaluations_after_start, kept, told
from sft.config import Config, Data, EarlyStopping, Eval, Model, Save, Source, Train
from sft.schedule import due_steps_left, is_due


def config(*, early: int | None = None, best: Any = None, **evaluation: Any) -> Config:
    rule = None if early is None else EarlyStopping(patience=early)
    return Config(
        model=Model(name="m"), data=Data(train=[Source(path="a.jsonl")]), eval=Eval(**evaluation),
        save=Save(best=best), train=Train(early_stopping=rule),
    )  # fmt: skip


def work(steps: int = 1000, tokens: float = 10_000, held_out: int = 50_000, prompts: int = 16) -> Work:
    return Work(steps, tokens, 2.0, held_out, (100,) * prompts, 128)


def test_a_long_run_is_evaluated_ten_times_with_four_samples() -> None:
    chosen = decide(config(), work())
    assert (chosen.every_steps, chosen.samples, chosen.served, chosen.served_tokens) == (100, 4, 4, 256)
    assert told(chosen, config(), work())[0].startswith(
        "eval.every: auto → every 100 steps (11 evaluations, at most 3 %"
    )


def test_a_short_run_has_a_curve_before_it_has_many_samples() -> None:
    # 60 steps of 1,000 tokens are 120,000 units; a ninth of that, 13,333, is what the rest may cost
    short = work(steps=60, tokens=1_000, held_out=400, prompts=8)
    chosen = decide(config(), short)
    assert cost(chosen, short) <= 120_000 / 9
    assert evaluations_after_start(chosen.every_steps, 60) >= 1
    assert chosen.share <= SHARE


def test_a_tiny_run_keeps_what_is_essential() -> None:
    tiny = work(steps=2, tokens=100, held_out=10_000)
    chosen = decide(config(), tiny)
    assert (chosen.every_steps, chosen.samples, chosen.served) == (0, 0, 1)
    assert told(chosen, config(), tiny)[-1] == (
        "the serving check lets the saved model answer 1 prompt instead of 4, since this run is short"
    )


def test_what_the_user_sets_is_obeyed_and_not_counted() -> None:
    tiny = work(steps=12, tokens=50_000, held_out=1_000)
    obeyed = decide(config(every=1, samples=7), tiny)
    assert (obeyed.every_steps, obeyed.samples, obeyed.served) == (1, 7, 4)
    assert decide(config(every=0.5), tiny).every_steps == 6
    assert decide(config(every=0), tiny).every_steps == 0
    assert decide(config(samples=0), tiny).samples == 0
    dear = decide(config(every=1), work(steps=12, tokens=50_000, held_out=1_000_000))
    assert (dear.every_steps, dear.samples) == (1, 0), "what is left to auto still fits beside the mandatory losses"


@pytest.mark.parametrize(("early", "best", "least"), [(None, "eval.loss", 4), (3, None, 4), (6, None, 7)])
def test_what_decides_by_evaluations_gets_some_on_the_way(early: int | None, best: Any, least: int) -> None:
    dear = work(steps=50, tokens=100, held_out=1_000_000)
    chosen = decide(config(early=early, best=best), dear)
    assert evaluations_after_start(chosen.every_steps, 50) >= least
    assert evaluations_after_start(decide(config(), dear).every_steps, 50) == 1


works = st.builds(
    Work,
    total_steps=st.integers(1, 100_000),
    tokens_per_step=st.floats(10, 1e6),
    trained_cost=st.sampled_from([2.0, 3.0]),
    held_out_tokens=st.integers(0, 10**7),
    prompts=st.lists(st.integers(1, 4000), max_size=16).map(tuple),
    max_new_tokens=st.integers(1, 2048),
    is_rounded=st.booleans(),
)


@given(works)
def test_all_of_it_fits_into_a_tenth_or_is_the_least(todo: Work) -> None:
    chosen = decide(config(max_new_tokens=todo.max_new_tokens), todo)
    within = cost(chosen, todo) <= SHARE * (todo.training + cost(chosen, todo)) * (1 + 1e-9)
    least = (evaluations_after_start(chosen.every_steps, todo.total_steps), chosen.samples, chosen.served) == (1, 0, 1)
    assert within or least
    assert 0 <= chosen.samples <= 4
    assert evaluations_after_start(chosen.every_steps, todo.total_steps) <= 10


@given(works, st.floats(1, 50))
def test_a_longer_run_never_loses_samples_and_curve(todo: Work, factor: float) -> None:
    """Nothing is compared but tokens: what fits into a run fits into a longer one."""
    longer = Work(
        todo.total_steps, todo.tokens_per_step * factor, todo.trained_cost, todo.held_out_tokens, todo.prompts,
        todo.max_new_tokens, todo.is_rounded,
    )  # fmt: skip
    chosen = decide(config(), todo)
    if chosen.share <= SHARE:
        assert decide(config(), longer).share <= SHARE


@given(st.integers(1, 300), st.integers(0, 320))
def test_evaluations_are_counted_as_they_fall_due(total: int, every: int) -> None:
    due = [step for step in range(1, total + 1) if is_due(step, every, total)]
    assert evaluations_after_start(every, total) == len(due)
    for step in range(total + 1):
        assert due_steps_left(step, every, total) == len([other for other in due if other > step])


def test_a_resumed_run_goes_on_as_it_began() -> None:
    recorded = {"evaluations": Evaluations(7, 2, 1).as_dict() | {"of_a_later_version": 1}}
    again = kept(config(), recorded, work(steps=10))
    assert (again.every_steps, again.samples, again.served) == (7, 2, 1)
    changed = kept(config(every=3, samples=1), recorded, work(steps=10))
    assert (changed.every_steps, changed.samples) == (3, 1)


def test_a_run_of_before_there_was_auto_keeps_the_defaults_of_then() -> None:
    again = kept(config(), {"flat_rows": True}, work(steps=200))
    assert (again.every_steps, again.samples, again.served) == (20, 4, 4)


def test_a_generated_token_costs_more_than_one_that_is_read() -> None:
    assert GENERATED_COST > 1
    one = Work(1, 1.0, 3.0, 0, (10,), 5)
    assert one.answers(1, 5) == 10 + 5 * GENERATED_COST
    assert one.answers(4, 5) == one.answers(1, 5), "there is one prompt"
