"""The number of processes may change along the way; the order of samples, the learning rates and the losses do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from harness import Job, fault, shared

STEP = "sft.train:train_step"


def plain(folder: Path, *overrides: str) -> Job:
    """Without dropout, in float32: only the order of additions may differ."""
    return Job(folder, f"model.name={shared() / 'plain'}", *overrides)


def train_events(job: Job) -> list[dict[str, Any]]:
    return [event for event in job.events if event["event"] == "train"]


def assert_same_course(one: Job, other: Job) -> None:
    assert len(train_events(one)) == len(train_events(other)) == 8
    for a, b in zip(train_events(one), train_events(other), strict=True):
        for exact in ("step", "epoch", "batch", "learning_rate", "tokens", "trained_tokens"):
            assert a[exact] == b[exact], exact
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-6)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4)


@pytest.mark.dist
def test_two_then_one_then_two(tmp_path: Path) -> None:
    alone = plain(tmp_path / "alone")
    alone.train()
    job = plain(tmp_path / "job")
    assert job.run(world=2, faults={1: [fault(STEP, 3, "SIGTERM")]}).codes == [75, 75]
    assert job.run(faults=[fault(STEP, 2, "SIGTERM")]).codes == [75]
    job.train(world=2)
    assert [e["processes"] for e in job.events if e["event"] == "resume"] == [1, 2]
    assert_same_course(alone, job)


@pytest.mark.slow
@pytest.mark.dist
def test_three_without_an_interruption(tmp_path: Path) -> None:
    alone, three = plain(tmp_path / "alone"), plain(tmp_path / "three")
    alone.train()
    three.train(world=3)
    assert_same_course(alone, three)


def test_another_seed_is_another_course(tmp_path: Path) -> None:
    """The negative control."""
    one, other = plain(tmp_path / "one"), plain(tmp_path / "other", "run.seed=8")
    one.train()
    other.train()
    with pytest.raises(AssertionError, match="batch"):
        assert_same_course(one, other)
