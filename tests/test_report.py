from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagecheck import HOSTILE, check_page, chromium, rendered

from sft.errors import ConfigError
from sft.pages import count, duration, embedded_json, num_bytes, number, percent
from sft.report import (
    MOST_POINTS,
    by_section,
    flatten,
    read_config_lines,
    samples_by_prompt,
    smooth,
    subtitle,
    summarize,
    thin,
    write_report,
)

CONFIG = """\
# Resolved from my.yaml. Each line says where its value came from.
run:
  dir: runs/tiny  # default
model:
  name: base  # my.yaml:2
  tuning: lora  # default
  lora:
    rank: 8  # command line
data:
  train:
    - path: a.jsonl  # my.yaml:4
      limit: null  # default
    - path: 'b  c.jsonl'  # my.yaml:5
      limit: 3  # my.yaml:5
  eval: 0.05  # default
batch:
  examples: 4  # my.yaml:6
  micro_tokens: auto  # default; resolved to 4096
optim:
  lr: auto  # default; resolved to 0.0002
  type: adamw  # default
  schedule: cosine  # default
# resolved: steps: 20
"""


def train_event(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "event": "train", "step": step, "epoch": step / 10, "loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0,
        "tokens": 100 * step, "trained_tokens": 40 * step, "tokens_per_second": 50.0, "seconds": 2.0 * step,
    }  # fmt: skip


def eval_event(step: int, loss: float) -> dict[str, Any]:
    return {
        "event": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss),
        "token_accuracy": 0.5, "stop_probability": 0.25,
    }  # fmt: skip


def sample_event(step: int, completion: str) -> dict[str, Any]:
    sample = {
        "source": "a.jsonl:3", "prompt": f"Say {HOSTILE}", "reference": "Arr", "completion": completion, "stopped": True
    }  # fmt: skip
    return {"event": "samples", "step": step, "samples": [sample]}


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    events = [eval_event(0, 3.0), sample_event(0, "hello")]
    events += [train_event(step, 3.0 - step / 20) for step in range(1, 21)]
    events += [eval_event(10, 1.5), eval_event(20, 2.0), sample_event(20, HOSTILE)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "tr')
    (folder / "status.json").write_text(json.dumps({"state": "done", "code": 0, "reason": "", "step": 20}))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(
        json.dumps(
            {"torch": "2.13", "devices": ["cpu"], "git": {"commit": None}, "resolved": {"trained_parameters": 1234}}
        )
    )
    source = {
        "path": f"a{HOSTILE}.jsonl", "format": "messages", "rows": 12, "kept": 9, "held_out": 2,
        "dropped": {"over_long": 1}, "cut": 1, "examples": 9, "tokens": 900, "trained_tokens": 300,
    }  # fmt: skip
    (folder / "data.json").write_text(
        json.dumps(
            {
                **{key: value for key, value in source.items() if key not in ("path", "format")},
                "by_source": [source],
                "length_histogram": [{"label": "0", "title": "0 to 63 tokens", "value": 9, "from": 0, "to": 64}],
                "stop_tokens": ["<|im_end|>"], "template": "model",
            }
        )
    )  # fmt: skip
    (folder / "data_report.jsonl").write_text(
        json.dumps({"source": "a.jsonl:7", "action": "dropped", "reason": "over_long", "detail": HOSTILE}) + "\n"
    )
    return folder


def test_a_report_is_whole_self_contained_and_safe_with_any_text(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "tiny")).read_text()
    page = check_page(html)
    assert page.data["curves"]["eval_loss"] == [[0, 3.0], [10, 1.5], [20, 2.0]]
    assert len(page.data["curves"]["loss"]) == 20
    assert [bar["value"] for bar in page.data["histogram"]] == [9]
    shown = (
        "tiny", "LoRA, rank 8 · 1\u202f234 trained parameters · 4 conversations a step · adamw at 0.0002, cosine",
        "best 1.5 at step 10", "my.yaml:4", "command line", "1 over long", "Before training", "Step 20", "<|im_end|>",
        HOSTILE,
    )  # fmt: skip
    for text in shown:
        assert text in page.text, text


@pytest.mark.parametrize("present", [["metrics.jsonl"], ["status.json"], ["status.json", "config.yaml"]])
def test_a_run_that_failed_early_has_a_page_too(tmp_path: Path, present: list[str]) -> None:
    folder = write_run(tmp_path / "run")
    for file in folder.iterdir():
        if file.name not in present:
            file.unlink()
    if "status.json" in present:
        failed = {"state": "failed", "code": 2, "reason": f"out of memory {HOSTILE}", "step": 0}
        (folder / "status.json").write_text(json.dumps(failed))
    page = check_page(write_report(folder).read_text())
    assert ("out of memory" in page.text) == ("status.json" in present)


def test_another_folder_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a run nor a sweep.*run\.dir"):
        write_report(tmp_path)


def test_config_lines_keep_origins_and_number_list_items(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = read_config_lines(tmp_path / "config.yaml")
    found = {line.key: (line.value, line.origin, line.resolved) for line in lines}
    assert found["model.lora.rank"] == ("8", "command line", "")
    assert found["data.train.0.path"] == ("a.jsonl", "my.yaml:4", "")
    assert found["data.train.1.path"] == ("'b  c.jsonl'", "my.yaml:5", "")
    assert found["data.train.1.limit"] == ("3", "my.yaml:5", "")
    assert found["data.eval"] == ("0.05", "default", "")
    assert found["optim.lr"] == ("auto", "default", "0.0002")
    assert found["steps"] == ("20", "resolved", "")
    assert list(by_section(lines)) == ["run", "model", "data", "batch", "optim", "steps"]


def test_config_lines_of_a_real_dump_are_its_origins(tmp_path: Path) -> None:
    from sft.configfile import dump_config, load_config

    (tmp_path / "my.yaml").write_text("model: {name: x}\ndata:\n  train: [a.jsonl, {path: b.jsonl, limit: 2}]\n")
    loaded = load_config(tmp_path / "my.yaml", ["optim.lr=1e-4", "data.template_args.date='# 1 May'"])
    (tmp_path / "config.yaml").write_text(dump_config(loaded, {"model.precision": "fp32"}))
    lines = {line.key: line for line in read_config_lines(tmp_path / "config.yaml")}
    assert lines["model.precision"].resolved == "fp32"
    assert lines["optim.lr"].origin == "command line"
    assert "# 1 May" in lines["data.template_args"].value
    assert {key: line.origin for key, line in lines.items() if key in loaded.origins} == {
        key: origin for key, origin in loaded.origins.items() if key in lines
    }
    leaves = {key for key in loaded.origins if not any(other.startswith(key + ".") for other in loaded.origins)}
    assert leaves - lines.keys() <= {key for key in leaves if key.startswith("data.template_args.")}


def test_summary_names_first_last_and_best() -> None:
    events = [eval_event(0, 3.0), train_event(1, 2.0), eval_event(1, 1.0), train_event(2, None), eval_event(2, 1.5)]
    summary = summarize(events)
    assert (summary.first["loss"], summary.last["loss"], summary.best["step"]) == (3.0, 1.5, 1)
    assert (summary.steps, summary.tokens, summary.trained_tokens, summary.seconds) == (2, 200, 80, 4.0)
    assert summarize([]).best == {}


def test_samples_of_one_prompt_stand_together_in_order() -> None:
    (entry,) = samples_by_prompt([sample_event(0, "a"), train_event(1, 1.0), sample_event(5, "b")])
    assert [(take["step"], take["text"]) for take in entry["completions"]] == [(0, "a"), (5, "b")]


def test_subtitle_of_a_full_finetune_has_no_rank() -> None:
    assert subtitle({"model.tuning": "full", "model.lora.rank": "16", "batch.examples": "32"}) == (
        "full finetune · 32 conversations a step"
    )


def test_smoothing_keeps_a_straight_line_to_its_ends() -> None:
    line = [(step, 2.0 * step) for step in range(100)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    assert smooth(line[:5]) == []
    noisy = [(step, 5.0 + (-1) ** step) for step in range(100)]
    assert all(abs(value - 5) < 0.6 for _, value in smooth(noisy) if value is not None)
    gap = [*line[:40], *((step, None) for step in range(40, 60)), *line[60:]]
    assert [value is None for _, value in smooth(gap)][38:62] == [False] * 4 + [True] * 16 + [False] * 4
    assert smooth([(step, None) for step in range(100)])[50] == (50, None)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300), st.integers(2, 40))
def test_thinning_keeps_extremes_order_and_the_ends_of_the_axis(values: list[float | None], most: int) -> None:
    points = list(enumerate(values))
    thinned = thin(points, most)
    known = [value for value in values if value is not None]
    assert set(thinned) <= set(points)
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    assert thinned[-1] == points[-1]
    assert len(thinned) <= most + 1
    if known:
        left = [value for _, value in thinned if value is not None]
        assert (min(left), max(left)) == (min(known), max(known))


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(train_event(step, 1 + step % 7)) + "\n" for step in range(1, 20001))
    html = write_report(folder).read_text()
    assert len(check_page(html).data["curves"]["loss"]) <= MOST_POINTS + 1
    assert len(html) < 400_000


def test_embedded_json_cannot_leave_its_script() -> None:
    text = embedded_json({"a": [HOSTILE, float("nan")], 1: math.inf})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": [HOSTILE, None], "1": None}


def test_a_lone_surrogate_in_a_row_does_not_stop_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(json.dumps(sample_event(0, "half \ud83d of a pair")) + "\n")
    assert "half ? of a pair" in check_page(write_report(folder).read_text(encoding="utf-8")).text


def test_numbers_as_people_read_them() -> None:
    thin_space = "\u202f"
    assert count(1234567) == f"1{thin_space}234{thin_space}567"
    assert [number(x) for x in (1.23456, 0.0002, 3.2e-5, 0, None, math.nan)] == [
        "1.235", "2e-4", "3.2e-5", "0", "–", "–"
    ]  # fmt: skip
    assert percent(0.4567) == f"45.7{thin_space}%"
    assert [duration(x) for x in (4.2, 75, 3700, None)] == ["4.2 s", "1 min 15 s", "1 h 1 min", "–"]
    assert [num_bytes(x) for x in (12, 2048, 98 * 2**20, 1.5 * 2**30)] == ["12 B", "2.0 KiB", "98.0 MiB", "1.5 GiB"]


def test_flatten_keeps_plain_lists_together() -> None:
    assert dict(flatten({"a": {"b": [1, 2]}, "c": None, "d": [{"e": 1}], "f": {}})) == {
        "a.b": "1, 2", "c": "–", "d.0.e": "1", "f": "{}"
    }  # fmt: skip


@pytest.mark.slow
def test_a_browser_draws_the_report(tmp_path: Path) -> None:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    dom = rendered(write_report(write_run(tmp_path / "tiny")))
    assert dom.count("<svg") == 6
    assert "<title>tiny · sft</title>" in dom


@pytest.mark.slow
def test_a_browser_draws_what_there_is(tmp_path: Path) -> None:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    folder = write_run(tmp_path / "gaps")
    events = [train_event(step, 2.0 if step % 3 == 0 else None) for step in range(1, 10)]  # between gaps: dots
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    loss = rendered(write_report(folder)).split('aria-label="Loss per trained token"')[1].split("</svg>")[0]
    assert loss.count("<circle") == 3
    (folder / "metrics.jsonl").unlink()  # failed before the first step: no course, and no word on the console
    assert "Course" not in rendered(write_report(folder)).split("<script")[0]


@pytest.mark.slow
def test_hover_and_switches_in_a_browser(tmp_path: Path) -> None:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    play = (
        "const s = document.querySelector('#chart-loss svg'), r = s.getBoundingClientRect();"
        "s.dispatchEvent(new PointerEvent('pointermove', {clientX: r.right - 8, clientY: r.top + 50}));"
        "document.getElementById('defaults').click();"
    )
    dom = rendered(write_report(write_run(tmp_path / "tiny")), play)
    assert "<b>step 20</b>" in dom
    assert '<span style="color: var(--c2);">held out</span><b>2</b>' in dom
    assert '<section id="config" class="">' in dom
