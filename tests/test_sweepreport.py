"""The page of a sweep: whole, safe with any text, and alive in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pagecheck import HOSTILE, check_page, chromium, rendered

from sft.errors import ConfigError
from sft.sweepreport import write_sweep_report


def trial(number: int, state: str, value: float | None, **values: Any) -> dict[str, Any]:
    keys = {"optim.lr": 1e-4 * (number + 1), "model.tuning": "lora", "model.lora.rank": 8} | values
    keys = {key: item for key, item in keys.items() if item is not None}
    return {
        "trial": number, "state": state, "value": value, "seconds": 61.0, "run": f"sweeps/x/trials/{number:04d}",
        "reason": HOSTILE if state == "failed" else "", "values": keys, "tail": HOSTILE if state == "failed" else "",
        "curves": [[[0, 4.0], [5, 3.5], [10, value]]] if value else [], "repeats": [], "begun": "", "ended": "",
    }  # fmt: skip


SPACE = [
    {"key": "optim.lr", "kind": "float", "log": True, "low": 1e-5, "high": 1e-2, "choices": []},
    {"key": "model.tuning", "kind": "choice", "log": False, "low": 0, "high": 0, "choices": ["lora", "full", HOSTILE]},
    {"key": "model.lora.rank", "kind": "int", "log": False, "low": 4, "high": 64, "choices": []},
]
TRIALS = [
    trial(0, "complete", 3.2),
    trial(1, "complete", 2.9, **{"model.tuning": "full", "model.lora.rank": None}),
    trial(2, "pruned", 3.6),
    trial(3, "failed", None, **{"model.tuning": HOSTILE}),
    trial(4, "complete", 900.0),
    trial(5, "complete", 3.1),
    trial(6, "complete", 3.0),
    trial(7, "running", None),
]


def write(folder: Path, trials: list[dict[str, Any]], best: int | None, **changes: Any) -> str:
    sweep = {
        "name": "x", "dir": "sweeps/x", "file": "sweep.yaml", "config": "base.yaml", "metric": "eval.loss",
        "train": "sft train sweeps/x/best.yaml",
        "direction": "minimize", "sampler": "tpe", "pruner": "median", "repeats": 1, "workers": 2, "total": len(trials),
        "space": SPACE, "trials": trials, "best": best, "base": 0,
        "importances": {"optim.lr": 0.75, "model.tuning": 0.25},
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(sweep | changes))
    return write_sweep_report(folder).read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    page = check_page(write(tmp_path, TRIALS, 1))
    assert "2.9" in page.text
    assert "sft train sweeps/x/best.yaml" in page.text
    assert "5 complete" not in page.text
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert "trials/0001" in links
    assert {"trials.csv", "best.yaml"} <= set(links)
    assert page.data["best"] == 1
    assert page.data["trials"][1]["values"] == {"optim.lr": 2e-4, "model.tuning": "full"}


def test_a_run_that_has_a_page_is_linked_to_it(tmp_path):
    (tmp_path / "trials/0001").mkdir(parents=True)
    (tmp_path / "trials/0001/report.html").touch()
    page = check_page(write(tmp_path, TRIALS, 1))
    assert "trials/0001/report.html" in [attributes.get("href") for _, attributes in page.elements]


@pytest.mark.parametrize(
    "trials",
    [[], TRIALS[3:4], TRIALS[2:3], TRIALS[:1], [TRIALS[7]]],
    ids=["none", "failed", "pruned", "one", "running"],
)
def test_sweeps_with_little_to_show_have_pages_too(tmp_path, trials):
    best = trials[0]["trial"] if trials and trials[0]["state"] == "complete" else None
    check_page(write(tmp_path, trials, best, importances={}))


def test_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(ConfigError, match=r"no sweep.json here"):
        write_sweep_report(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_in_a_browser_everything_is_drawn_and_nothing_is_said_on_the_console(tmp_path):
    write(tmp_path, TRIALS, 1)
    page = rendered(tmp_path / "report.html")
    assert page.count("<svg") == 3 + len(SPACE)
    assert "<title>owned" not in page
    for number in (0, 1, 4, 5, 6):
        assert page.count(f'data-trial="{number}"') >= 5, number  # history, parallel, curve, slices, table
    assert "NaN" not in page.split("<script")[0]
    write(tmp_path, [], None, importances={})
    assert "No trial has a value yet." in rendered(tmp_path / "report.html")
    write(tmp_path, TRIALS[:1], 0, importances={})
    assert "NaN" not in rendered(tmp_path / "report.html").split("<script")[0]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_a_key_with_one_value_has_no_axis_and_equal_values_one_colour(tmp_path):
    fixed = {"key": "optim.type", "kind": "choice", "log": False, "low": 0, "high": 0, "choices": ["adamw"]}
    trials = [trial(n, "complete", 2.5, **{"optim.type": "adamw"}) for n in range(4)]
    write(tmp_path, trials, 0, space=[*SPACE, fixed], importances={})
    page = rendered(tmp_path / "report.html")
    assert page.count("<svg") == 3 + len(SPACE)
    assert "color-mix(in oklch, var(--c1) 100%" in page
    assert "color-mix(in oklch, var(--c1) 0%" not in page


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
def test_a_user_sorts_and_filters(tmp_path):
    write(tmp_path, TRIALS, 1)
    page = rendered(tmp_path / "report.html", "document.querySelectorAll('table.trials th')[2].click()")
    rows = [part.split('"')[0] for part in page.split('<tr data-trial="')[1:]]
    assert rows == ["1", "6", "5", "0", "2", "4", "3", "7"]  # by value; those without one last
    page = rendered(
        tmp_path / "report.html",
        "document.querySelector('tr[data-trial=\"5\"]').dispatchEvent(new PointerEvent('pointerenter'))",
    )
    assert 'class="mark dim"' in page
