"""A run keeps the day on which it began, whatever the day and the zone in which it goes on."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from conftest import CHATML, CLOCKS, clock_at, make_model
from jobs import events, losses, run_here, write_config
from transformers import AutoTokenizer

from sft.check import inspect
from sft.configfile import load_config
from sft.opening import pinned_date
from sft.runfolder import RunFolder

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DATED = (
    "{% set words = " + repr(WORDS) + " %}{{ words[(strftime_now('%d') | int) % 10] + ' ' + "
    "words[(strftime_now('%m') | int) % 10] + ' ' }}" + CHATML
)
"""Opens each conversation with the day and the month."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return write_config(tmp_path, folder, optim__schedule="constant", eval__samples=0)


def test_a_run_goes_on_as_of_its_first_day(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with clock_at("2026-12-31T12:00:00", "UTC"):
        whole = run_here(config, f"run.dir={tmp_path}/whole", "train.max_steps=3")
    later = CLOCKS["a leap day"], CLOCKS["the 9th, where the day begins"]
    for steps, clock in enumerate((("2026-12-31T23:59:57", "UTC"), *later), 1):
        with clock_at(*clock):
            run = run_here(config, f"train.max_steps={steps}")
            assert json.loads((run / "environment.json").read_text())["date"] == "2026-12-31"
            found = inspect(load_config(config, [f"train.max_steps={steps}"]), say=lambda line: None)
            assert found.problems == [], "check asks as of that day, too"
            serving = json.loads((run / "serving.json").read_text())
            assert serving["ids_equal"] == serving["checked"] == 4
            assert serving["date"] == "2026-12-31"
    assert losses(run) == losses(whole)
    assert [event["step"] for event in events(run)] == [1, 2, 3]


def test_control_a_run_of_another_day_trains_other_tokens(tmp_path: Path, config: Path) -> None:
    found = []
    for day in ("2026-12-31T12:00:00", "2027-01-01T12:00:00"):
        with clock_at(day, "UTC"):
            found.append(losses(run_here(config, f"run.dir={tmp_path}/{day[:10]}", "train.max_steps=1")))
    assert found[0] != found[1]


@pytest.mark.usefixtures("moved_clock")
def test_a_run_begins_on_the_day_of_its_own_zone(tmp_path: Path) -> None:
    before = date.today()
    found = date.fromisoformat(pinned_date(RunFolder(tmp_path), fresh=True))
    assert before <= found <= date.today()
    assert abs(datetime.now() - datetime.combine(found, datetime.min.time())) < timedelta(days=1, seconds=5)
