"""An evaluation that gives no number: it was made all the same, once, and nothing is chosen by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from jobs import events, run_here, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.runcard import run_card

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model that knows no number for the word `seven`, which the held-out rows alone hold."""
    folder = make_model(tmp_path / "model", tie=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        seven = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("seven")
        model.get_input_embeddings().weight[seven] = float("nan")
    model.save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl").read_text().replace("seven", "six")
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "held.jsonl").write_text(rows.replace("six", "seven"))
    file = tmp_path / "nan.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path}/run}}\nmodel: {{name: {folder}, tuning: full, precision: fp32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval: [{tmp_path}/held.jsonl]}}\nbatch: {{examples: 5}}\n"
        "optim: {schedule: constant}\neval: {every: 1, samples: 1, max_new_tokens: 4}\nsave: {every: 1}\n"
    )
    return file


def test_no_step_is_evaluated_twice_for_want_of_a_number(config: Path) -> None:
    run_here(config, "train.max_steps=2")
    run = run_here(config, "train.max_steps=4")
    assert [event["step"] for event in events(run, "eval")] == [0, 1, 2, 3, 4]
    assert [event["step"] for event in events(run, "samples")] == [0, 1, 2, 3, 4]
    assert {event["loss"] for event in events(run, "eval")} == {None}
    assert (run / "report.html").stat().st_size > 1000
    assert "nan" not in (run_card(run) or "").lower()


def test_nothing_is_chosen_by_what_is_no_number(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here(config, "train.max_steps=4", "save.best=eval.loss", "train.early_stopping={patience: 2}")
    assert [event["step"] for event in events(run)] == [1], "two evaluations without a gain: those of steps 0 and 1"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("done", "early stopping")
    assert json.loads((run / "serving.json").read_text())["step"] == 1, "the last, as no evaluation speaks for another"
    run_here(config, "train.max_steps=4", "save.best=eval.loss", "train.early_stopping={patience: 2}")
    assert "complete at step 1" in capsys.readouterr().err
