"""Which folder is a run's, what continues and what is refused, and what status.json says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import events, run_here, write_config

from sft.errors import DataError, ResumeError, SftError

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
