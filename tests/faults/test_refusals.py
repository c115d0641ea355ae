"""A continuation that would be another training is refused with the list of what changed; so is a taken folder."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model
from harness import Job, assert_same_run, copy_of, fault, rows, shared, write_rows

from sft.checkpoint import step_of
from sft.config import Config
from sft.resume import differences, fingerprint

STEP = "sft.train:train_step"


@functools.cache
def stopped_at(step: int) -> Job:
    """A run stopped after `step`, to be copied."""
    job = Job(Path(tempfile.mkdtemp(prefix="sft-stopped-")))
    assert job.run(faults=[fault(STEP, step, "SIGTERM")]).codes == [75]
    return job


@functools.cache
def uninterrupted() -> Job:
    job = Job(Path(tempfile.mkdtemp(prefix="sft-uninterrupted-")))
    job.train()
    return job


CHANGES = {
    "run.seed": "run.seed=8",
    "batch.examples": "batch.examples=4",
    "optim.lr": "optim.lr=2e-3",
    "optim.schedule": "optim.schedule=linear",
    "optim.weight_decay": "optim.weight_decay=0.1",
    "model.tuning": "model.tuning=lora",
    "data.train_on": "data.train_on=last_assistant",
    "data.template": "data.template=chatml",
    "train.neftune_alpha": "train.neftune_alpha=5",
}


def test_every_change_is_listed_with_both_ways_out(tmp_path: Path) -> None:
    job = copy_of(stopped_at(3), tmp_path, *CHANGES.values())
    before = sorted(path.name for path in (job.run_dir / "checkpoints").iterdir())
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    for key in (*CHANGES, "run.seed: 7 -> 8", "another run.dir", "--fresh", "--allow-change run.seed"):
        assert key in outcome.output
    assert "Traceback" not in outcome.output
    assert sorted(path.name for path in (job.run_dir / "checkpoints").iterdir()) == before
    assert len([e for e in job.events if e["event"] == "train"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_each_change_alone_is_refused(tmp_path: Path, key: str) -> None:
    outcome = copy_of(stopped_at(3), tmp_path, CHANGES[key]).run()
    assert outcome.codes == [2], outcome.output
    assert key in outcome.output


def change_one_row(job: Job, folder: Path) -> str:
    changed = rows(33)
    changed[17]["messages"][0]["content"] += " friendly"
    write_rows(folder / "data.jsonl", changed)
    return f"data.train.0.path={folder / 'data.jsonl'}"


def change_the_template(job: Job, folder: Path) -> str:
    make_model(folder / "model", dropout=0.1)
    template = folder / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    return f"model.name={folder / 'model'}"


@pytest.mark.parametrize(
    ("change", "key"),
    [(change_one_row, "data.content"), pytest.param(change_the_template, "tokenizer", marks=pytest.mark.slow)],
)
def test_changed_files_are_refused(tmp_path: Path, change: Callable[[Job, Path], str], key: str) -> None:
    job = copy_of(stopped_at(3), tmp_path)
    job.overrides.append(change(job, tmp_path))
    outcome = job.run("--allow-change", "model.name")  # the path of the model, which one of them moves
    assert outcome.codes == [2], outcome.output
    assert key in outcome.output


def held_out_rows(job: Job, folder: Path, word: str) -> list[str]:
    """Overrides for held-out rows of their own, one word of which is `word`."""
    folder.mkdir(exist_ok=True)
    some = rows(4, seed=1)
    some[2]["messages"][0]["content"] += f" {word}"
    write_rows(folder / "eval.jsonl", some)
    return [f"data.eval=[{{path: {folder / 'eval.jsonl'}}}]"]


@pytest.mark.parametrize(
    "decided_by",
    [
        "",
        "save.best=eval.loss",
        pytest.param("train.early_stopping={metric: eval.loss, patience: 9}", marks=pytest.mark.slow),
    ],
)
def test_changed_held_out_rows_are_refused_where_they_decide_and_named_where_not(
    tmp_path: Path, decided_by: str
) -> None:
    job = Job(tmp_path / "job", *([decided_by] if decided_by else []))
    job.overrides += held_out_rows(job, tmp_path / "one", "sure")
    assert job.run(faults=[fault(STEP, 3, "SIGTERM")]).codes == [75]
    outcome = job.run(*held_out_rows(job, tmp_path / "other", "friendly"))
    assert "data.eval.content" in outcome.output
    assert outcome.codes == [2 if decided_by else 0], outcome.output
    if decided_by:
        job.train(*held_out_rows(job, tmp_path / "other", "friendly"), "--allow-change", "data.eval")
    consents = json.loads((job.checkpoints[0] / "state.json").read_text())["consents"]
    assert [consent["key"] for consent in consents] == ["data.eval.content"]


def test_intervals_and_paths_may_change(tmp_path: Path) -> None:
    """Another run folder, another place of the same data, other intervals: the same training."""
    job = copy_of(stopped_at(3), tmp_path, "save.every=3", "save.keep=1", "log.every=1", "eval.samples=1")
    (tmp_path / "moved.jsonl").write_bytes((shared() / "data.jsonl").read_bytes())
    job.overrides.append(f"data.train.0.path={tmp_path / 'moved.jsonl'}")
    job.train()
    assert_same_run(job, uninterrupted())


def test_auto_and_the_rate_it_stands_for_are_the_same_training() -> None:
    def of(**optim: object) -> dict[str, object]:
        sections = {"model": {"name": "m", "tuning": "lora"}, "data": {"train": [{"path": "a.jsonl"}]}, "optim": optim}
        config = Config.model_validate(sections)
        return fingerprint(
            config, data_digest="d", eval_digest=None, tokenizer_digest="t", base_digest="b", total_steps=9
        )

    assert of() == of(lr="auto") == of(lr=2e-4)
    assert differences(of(), of(lr=1e-4)) == {"optim.lr": (2e-4, 1e-4)}


@pytest.mark.slow
def test_a_consent_is_recorded(tmp_path: Path) -> None:
    job = copy_of(stopped_at(3), tmp_path, "optim.lr=2e-3")
    job.train("--allow-change", "optim.lr")
    state = json.loads((job.checkpoints[0] / "state.json").read_text())
    assert state["consents"] == [{"step": 3, "key": "optim.lr", "was": 1e-3, "now": 2e-3}]


@pytest.mark.slow
def test_more_epochs_bend_a_decaying_schedule_but_not_a_constant_one(tmp_path: Path) -> None:
    outcome = copy_of(stopped_at(3), tmp_path / "cosine", "train.epochs=3").run()
    assert outcome.codes == [2], outcome.output
    assert "8 -> 12" in outcome.output
    job = Job(tmp_path / "constant", "optim.schedule=constant")
    job.train()
    job.train("train.epochs=3")
    assert [e["step"] for e in job.events if e["event"] == "train"] == list(range(1, 13))
    longer = Job(tmp_path / "longer", "optim.schedule=constant", "train.epochs=3")
    longer.train()
    trains = [[e for e in j.numbers() if e["event"] == "train"] for j in (job, longer)]
    assert trains[0] == trains[1]


def test_a_finished_run_says_so_and_fresh_moves_it_aside(tmp_path: Path) -> None:
    job = copy_of(uninterrupted(), tmp_path)
    outcome = job.train()
    assert "complete" in outcome.output
    job.run("--fresh", faults=[fault(STEP, 1, "SIGTERM")])
    assert job.status["step"] == 1
    aside = [
        path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("run") and path != job.run_dir
    ]
    assert len(aside) == 1
    assert (aside[0] / "final" / "model.safetensors").exists()


def test_a_second_run_on_a_folder_is_told_who_is_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    first = job.start(faults=[fault(STEP, 2, "stall")])
    job.wait_for_step(1)
    second = job.run()
    assert second.codes == [2], second.output
    assert f"host {os.uname().nodename}, process {first.pids[0]}" in second.output
    assert job.status["state"] == "running"
    fresh = job.run("--fresh")
    assert fresh.codes == [2], "a living run is not moved aside"
    first.signal(signal.SIGKILL)
    first.wait()
    job.train()  # a dead owner's lock is taken over


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])


FILES = ["model/model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "model/config.json"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if (name, how) == (FILES[0], "flipped") else pytest.mark.slow)
        for name in FILES
        for how in ("flipped", "cut", "emptied", "removed")
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, how: str) -> None:
    """From 5 back to 4: the run still ends as if nothing had happened."""
    job = copy_of(stopped_at(5), tmp_path)
    assert [step_of(path) for path in job.checkpoints] == [5, 4]
    damage(job.checkpoints[0] / name, how)
    outcome = job.train()
    assert "WARNING" in outcome.output
    assert "step-00000004" in outcome.output
    assert_same_run(job, uninterrupted())


def test_no_whole_checkpoint_is_a_refusal(tmp_path: Path) -> None:
    job = copy_of(stopped_at(3), tmp_path)
    for checkpoint in job.checkpoints:
        damage(checkpoint / "state.json", "flipped")
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    assert "no checkpoint of this run is whole" in outcome.output
    assert "--fresh" in outcome.output


@pytest.mark.dist
def test_ranks_that_disagree_are_told_apart(tmp_path: Path) -> None:
    job = Job(tmp_path)
    outcome = job.run(world=2, only_rank={1: ["optim.lr=5e-3"]})
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("rank 1 does not agree with rank 0") == 1
    assert "0.005" in outcome.output


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_written_fails_at_once_on_all_ranks(tmp_path: Path, world: int) -> None:
    (tmp_path / "file").write_text("")
    job = Job(tmp_path / "job", f"run.dir={tmp_path / 'file' / 'run'}")
    outcome = job.run(world=world)
    assert outcome.codes == [2] * world, outcome.output
    assert outcome.output.count("error:") == 1
    assert "run.dir" in outcome.output


def test_too_little_disk_is_said_before_the_first_step(tmp_path: Path) -> None:
    job = Job(tmp_path)
    outcome = job.run(faults=[fault("sft.space:free_bytes", 0, "zero", "result")])
    assert outcome.codes == [2], outcome.output
    assert "save.keep + 1 = 3 checkpoints" in outcome.output
    assert "missing" in outcome.output
    assert not (job.run_dir / "metrics.jsonl").exists() or job.events == []
