"""Numbers that are none, and parts of a step that train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Job, bits, fault, rows, shared, write_rows
from safetensors.torch import load_file

STEP = "sft.train:train_step"
LOSS = "sft.train:loss_sum"  # one call a micro-batch
NORM = "sft.train:torch.nn.utils.clip_grad_norm_"  # one call a step


def trains(job: Job) -> list[dict[str, Any]]:
    return [event for event in job.events if event["event"] == "train"]


@pytest.mark.parametrize("where", [LOSS, pytest.param(NORM, marks=pytest.mark.slow)])
def test_a_loss_or_gradient_that_is_no_number_takes_no_step(tmp_path: Path, where: str) -> None:
    job = Job(tmp_path, "batch.micro_tokens=4096", "save.every=1")  # one micro-batch a step
    outcome = job.run(faults=[fault(where, 3, "nan", "result")])
    assert outcome.codes == [2], outcome.output
    told = (
        "the loss is not finite on rank 0 (rows " if where == LOSS else "a gradient is not finite, though every loss is"
    )
    assert f"error: step 3: {told}" in outcome.output
    assert where == NORM or "data.jsonl:" in outcome.output
    assert "on_nonfinite" in outcome.output
    assert job.checkpoints[0].name == "step-00000002"
    assert (job.status["state"], job.status["step"]) == ("failed", 2)


@pytest.mark.parametrize("what", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_skipped_step_changes_no_weight_and_is_counted(tmp_path: Path, what: str) -> None:
    job = Job(tmp_path, "batch.micro_tokens=4096", "train.on_nonfinite=skip", "save.every=1", "save.keep=8")
    job.train(faults=[fault(LOSS, 3, what, "result")])
    assert [event["step"] for event in trains(job) if event.get("skipped")] == [3]
    assert trains(job)[2]["loss"] is None
    assert len(trains(job)) == 8
    two, three, four = (
        load_file(str(job.run_dir / "checkpoints" / f"step-0000000{step}" / name))
        for step in (2, 3, 4)
        for name in ("model/model.safetensors",)
    )
    assert all(bits(two[name]) == bits(three[name]) for name in two)
    assert any(bits(three[name]) != bits(four[name]) for name in two)
    state = (job.checkpoints[0] / "state.json").read_text()
    assert '"nonfinite_skips": 1' in state


def test_skips_are_bounded(tmp_path: Path) -> None:
    job = Job(tmp_path, "batch.micro_tokens=4096", "train.on_nonfinite=skip", "train.max_nonfinite_skips=2")
    outcome = job.run(faults=[fault(LOSS, 0, "nan", "result")])
    assert outcome.codes == [2], outcome.output
    assert "after 2 skipped steps (train.max_nonfinite_skips)" in outcome.output
    assert len(trains(job)) == 2


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_one_rank_s_number_is_everyone_s(tmp_path: Path, mode: str) -> None:
    job = Job(tmp_path, "batch.micro_tokens=4096", f"train.on_nonfinite={mode}")
    outcome = job.run(world=2, faults={1: [fault(LOSS, 3, "nan", "result")]})
    if mode == "skip":
        assert outcome.codes == [0, 0], outcome.output
        assert len([event for event in trains(job) if event.get("skipped")]) == 1
        return
    assert outcome.codes == [2, 2], outcome.output
    assert "step 3: the loss is not finite on rank 1 (rows " in outcome.output
    assert "on rank 0" not in outcome.output
    assert "step 3: the loss is not finite on rank 1" in job.status["reason"]
    assert outcome.output.count("Traceback") == 0
    assert outcome.output.count("error:") == 1


def test_rows_and_micro_batches_without_trained_tokens_are_harmless(tmp_path: Path) -> None:
    """Weights of zero or `train: false` leave nothing to learn in some rows: dropped with a count, or carried along."""
    some = rows(33)
    for row in some[:12]:
        row["messages"][-1]["weight"] = 0.5
    write_rows(tmp_path / "data.jsonl", some)
    job = Job(tmp_path, f"data.train.0.path={tmp_path / 'data.jsonl'}", "batch.micro_tokens=40")
    job.train()
    assert all(event["loss"] is not None for event in trains(job))


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_without_examples_is_harmless(tmp_path: Path, world: int) -> None:
    """One conversation a step: all ranks but one have nothing to do, and all take the same steps."""
    alone = Job(tmp_path / "alone", "batch.examples=1", "train.max_steps=4", f"model.name={shared() / 'plain'}")
    several = Job(tmp_path / "several", "batch.examples=1", "train.max_steps=4", f"model.name={shared() / 'plain'}")
    alone.train()
    several.train(world=world)
    for one, other in zip(trains(alone), trains(several), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
