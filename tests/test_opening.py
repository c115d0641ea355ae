"""Which folder is a run's, what continues and what is refused, and what status.json says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import events, run_here, write_config

from sft.errors import DataError, ResumeError, SftError
from sft.resume import changes_of, check_names

pytestmark = pytest.mark.usefixtures("own_cache")


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def test_a_complete_run_without_its_checkpoints_is_complete(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Removed to free the disk: final/ is what they were for."""
    config = write_config(tmp_path, model)
    run = run_here(config)
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    run_here(config)
    assert "complete at step 6. --fresh starts over." in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("steps", [6, 8])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path: Path, model: Path, steps: int) -> None:
    config = write_config(tmp_path, model, optim__schedule="constant", optim__warmup=0)
    run = run_here(config)
    shutil.rmtree(run / "checkpoints")
    if steps == 6:
        shutil.rmtree(run / "final")
    with pytest.raises(ResumeError, match=r"came to step 6, but .*checkpoints holds no checkpoint.*--fresh"):
        run_here(config, f"train.max_steps={steps}")
    assert [e["step"] for e in events(run)] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_written_between_or_over_a_user_s_files(tmp_path: Path, model: Path) -> None:
    """data.json is a name of ours too; only the status says that a folder is a run's."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("data.json", "config.yaml"):
        (folder / name).write_text("precious")
    with pytest.raises(ResumeError, match=r"mine is no run folder: it holds config\.yaml, data\.json"):
        run_here(write_config(tmp_path, model), f"run.dir={folder}")
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == ["config.yaml", "data.json"]
    assert (folder / "data.json").read_text() == "precious"


def test_what_keeps_a_run_from_starting_stands_in_its_status(tmp_path: Path, model: Path) -> None:
    """Launchers turn every exit code into 1."""
    config = write_config(tmp_path, model)
    rows = tmp_path / "rows.jsonl"
    good = rows.read_text()
    rows.write_text(good + "{\n")
    with pytest.raises(DataError):
        run_here(config)
    found = status(tmp_path / "run")
    assert (found["state"], found["code"], found["step"]) == ("failed", 2, 0)
    assert "rows.jsonl:25" in found["reason"]
    rows.write_text(good)
    run_here(config, "train.max_steps=2", "optim.schedule=constant")
    with pytest.raises(ResumeError):
        run_here(config, "train.max_steps=2", "optim.schedule=constant", "optim.lr=1")
    assert status(tmp_path / "run")["state"] == "done", "a complete run stays complete"


def test_another_base_under_the_same_name_is_refused(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, model__tuning="lora", optim__schedule="constant")
    run_here(config, "train.max_steps=2")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(SftError, match=r"model\.weights: "):
        run_here(config, "train.max_steps=4")


def test_more_steps_of_a_decaying_run_are_consented_to_by_the_key_that_was_changed(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model)
    run_here(config, "train.max_steps=2")
    told = (
        r"\n  train\.max_steps: 2 -> 3 \(train\.steps: 2 -> 3\)\n"
        r"(.*\n)*.*all the same: --allow-change train\.max_steps$"
    )
    for allowed in ([], ["train.epochs"], ["optim.lr"]):
        with pytest.raises(ResumeError, match=told):
            run_here(config, "train.max_steps=3", allow_change=allowed)
    run_here(config, "train.max_steps=3", allow_change=["train.max_steps"])
    with pytest.raises(ResumeError, match=r"--allow-change optim\.lr --allow-change train\.max_steps$"):
        run_here(config, "train.max_steps=4", "optim.lr=1")
    run = run_here(config, "train.max_steps=4", allow_change=["train.steps"])
    assert [e["step"] for e in events(run)] == [1, 2, 3, 4]


def test_steps_that_come_of_something_else_are_not_the_length_s(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, train__max_steps=None, train__epochs=1, batch__examples=10)
    run_here(config)
    with pytest.raises(ResumeError, match=r"--allow-change batch\.examples --allow-change train\.steps$"):
        run_here(config, "batch.examples=5", allow_change=["train.max_steps", "train.epochs"])
    told = r"train\.epochs: 1(\.0)? -> 2(\.0)? \(train\.steps: 2 -> 4\)"
    with pytest.raises(ResumeError, match=told):
        run_here(config, "train.epochs=2")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.max_step", r"unknown key 'train\.max_step'\. Did you mean 'train\.max_steps'\?"),
        ("data.contents", r"unknown key 'data\.contents'\. Did you mean 'data\.content'\?"),
        ("loss_kernal", r"Did you mean 'loss_kernel'\?"),
        ("lr", r"unknown key 'lr'\. The key is 'optim\.lr'\."),
        ("learning_rate", r"unknown key 'learning_rate'\. Here it is 'optim\.lr'"),
        ("data.train.1.paht", r"Did you mean 'data\.train\.0\.path'\?"),
    ],
)
def test_unknown_keys_to_allow_are_refused_before_anything_moves(
    tmp_path: Path, model: Path, key: str, hint: str
) -> None:
    with pytest.raises(ResumeError, match=f"--allow-change: .*{hint}"):
        run_here(write_config(tmp_path, model), allow_change=["optim.lr", key])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_keys_of_the_config_and_of_the_fingerprint_may_be_allowed() -> None:
    check_names(
        ["optim", "optim.lr", "train.steps", "train.epochs", "data.eval", "data.eval.content", "data.train.3.path",
         "data.template_args.enable_thinking", "data.train.1.columns.prompt", "model.lora.rank", "tokenizer",
         "model.weights"]
    )  # fmt: skip
    check_names(["loss_kernel"], derived=["loss_kernel"])


def test_a_change_of_course_stands_in_the_metrics_the_page_and_the_card(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, optim__schedule="constant")
    run = run_here(config, "train.max_steps=2")
    assert "changed at step" not in (run / "report.html").read_text() + (run / "final/README.md").read_text()
    run_here(config, "train.max_steps=4", "optim.lr=5e-4", allow_change=["optim.lr"])
    run_here(config, "train.max_steps=5", "optim.lr=5e-4")
    change = {"step": 2, "key": "optim.lr", "was": 1e-3, "now": 5e-4}
    assert [event["changes"] for event in events(run, "resume")] == [[change], [change]]
    assert "<div>changed at step 2: optim.lr 0.001 -&gt; 0.0005</div>" in (run / "report.html").read_text()
    assert "\n- changed at step 2: optim.lr 0.001 -> 0.0005\n" in (run / "final/README.md").read_text()


def test_a_change_whose_steps_were_lost_and_that_is_not_asked_for_again_is_none() -> None:
    change = {"step": 2, "key": "optim.lr", "was": 1e-3, "now": 5e-4}
    resumed = {"event": "resume", "step": 2}
    assert changes_of([{"event": "train", "step": 2}, {**resumed, "changes": [change]}]) == [change]
    assert changes_of([{**resumed, "changes": [change]}, resumed, {"event": "train", "step": 3}]) == []
    assert changes_of([]) == []
