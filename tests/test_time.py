"""What `auto` became and where the time went, by the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import events, run_cli, run_here, write_config

from sft.budget import KEY
from sft.pages import duration
from sft.phases import PHASES
from sft.report import run_page, times
from sft.resume import RunState
from sft.runfolder import MetricsLog

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_short_run_says_records_and_keeps_what_it_decided(tmp_path: Path, model: Path) -> None:
    """Six steps are so few that only what is essential fits; the run that is extended goes on like that."""
    config = write_config(tmp_path, model)
    auto = ["eval.every=auto", "eval.samples=auto", "optim.schedule=constant"]
    first = run_cli("train", str(config), *auto, "train.max_steps=3")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    assert "eval.every: auto → at the start and the end alone (2 evaluations, at most " in first.stderr
    assert "eval.samples: auto → 0 answered at each evaluation" in first.stderr
    assert "the serving check lets the saved model answer 1 prompt instead of 4" in first.stderr
    assert [event["step"] for event in events(run, "eval")] == [0, 3]
    assert not events(run, "samples")
    serving = json.loads((run / "serving.json").read_text())
    assert (serving["checked"], serving["ids_equal"], serving["answered"]) == (4, 4, 1)
    recorded = json.loads((run / "environment.json").read_text())["resolved"][KEY]
    assert (recorded["every_steps"], recorded["samples"], recorded["served"]) == (0, 0, 1)
    assert "every: auto  # command line; resolved to 0" in (run / "config.yaml").read_text()

    (spent,) = events(run, "time")
    assert set(spent) == {"event", "step", "total", *PHASES}
    assert spent["total"] == pytest.approx(sum(spent[phase] for phase in PHASES), abs=0.01)
    seconds = events(run)[-1]["seconds"]
    assert seconds <= spent["steps"] <= spent["total"], "the time inside steps stays what it was"
    assert min(spent[phase] for phase in PHASES if phase != "samples") > 0
    told = first.stderr.rpartition("time: ")[2]
    assert f"serving check {duration(spent['serving_check'])}" in told

    # thirty steps would have had evaluations on the way, had they been asked for at once
    run_here(config, *auto, "train.max_steps=30", "save.every=0")
    again = json.loads((run / "environment.json").read_text())["resolved"][KEY]
    assert (again["every_steps"], again["samples"]) == (0, 0)
    assert [event["step"] for event in events(run, "eval")] == [0, 3, 30]
    (more,) = events(run, "time")
    assert more["step"] == 30
    assert all(more[phase] >= spent[phase] for phase in PHASES), "counted on over the resume"


def test_time_is_told_once_for_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in ({"event": "eval", "step": 3}, {"event": "time", "step": 2}, {"event": "time", "step": 3}):
        log.append(event)
    log.cut_after(3)
    assert [(event["event"], event["step"]) for event in log.read()] == [("eval", 3), ("time", 2)]


def test_the_report_draws_where_the_time_went(tmp_path: Path) -> None:
    seconds = dict.fromkeys(PHASES, 0.0) | {"steps": 30.0, "samples": 60.0, "serving_check": 10.0}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"event": "time", "step": 1, "steps": 1.0, "total": 1.0})
    log.append({"event": "time", "step": 9, **seconds, "total": 100.0})
    assert [(part["phase"], part["share"]) for part in times(log.read())] == [
        ("steps", 0.3), ("samples", 0.6), ("serving check", 0.1),
    ]  # fmt: skip
    page = run_page(tmp_path)
    assert 'title="samples: 1 min 0 s"' in page
    assert "1 min 40 s" in page, "the whole"
    assert times([]) == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert "<h2>Time</h2>" not in run_page(tmp_path)


def test_state_of_before_there_were_phases_is_read() -> None:
    state = RunState(3).as_dict()
    del state["phases"]
    assert RunState.from_dict(state).phases == {}
