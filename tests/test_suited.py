"""`sft init` on models whose templates lack something: its config passes `sft check`, or asks one question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML, make_model

from sft.check import inspect
from sft.configfile import load_config
from sft.init import suggest_config
from sft.suited import named_settings

SILENT = CHATML.replace("message['content']", "(message['content'] if message['role'] != 'developer' else '')")
FOREIGN = CHATML.replace("<|im_end|>", "[e~[")
CALL = {"type": "function", "function": {"name": "fly", "arguments": {"to": "Rome"}}}


def row(number: int, kind: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"role": "user", "content": f"Hello {number}"}
    answer: dict[str, Any] = {"role": "assistant", "content": "There."}
    if kind == "tools":
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        return {"messages": [asked, called, {"role": "tool", "content": "ok"}, answer]}
    opening = [{"role": "developer", "content": "Be brief."}] if kind == "developer" else []
    return {"messages": [*opening, asked, answer]}


def suggested(folder: Path, template: str | None, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """(The text, what it sets, the problems that sft check finds, what init says on the console)."""
    monkeypatch.chdir(folder)
    model = make_model(folder / "model")
    bpe_tokenizer(model, template, None, "<|im_end|>", ())
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = suggest_config("rows.jsonl", str(model))
    (folder / "my.yaml").write_text(found.text, encoding="utf-8")
    loaded = load_config("my.yaml")
    return found.text, loaded.config, inspect(loaded, say=lambda line: None).problems, found.troubles


@pytest.mark.parametrize(
    ("template", "kind", "expected"),
    [
        (CHATML, "plain", {}),
        (CHATML, "tools", {"template": "chatml-tools"}),
        (None, "tools", {"template": "chatml-tools"}),
        (SILENT, "developer", {"layers": "merge_into_system"}),
        (FOREIGN, "plain", {"new_tokens": ["[e~["]}),
    ],
)
def test_the_suggested_config_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, kind: str, expected: dict[str, Any]
) -> None:
    """Also where the rows that need something come late."""
    rows = [*(row(n, "plain") for n in range(300)), *(row(n, kind) for n in range(300, 320))]
    _, config, problems, troubles = suggested(tmp_path, template, rows, monkeypatch)
    assert (problems, troubles) == ([], ())
    settings = {"template": config.data.template, "layers": config.data.layers, "new_tokens": config.model.new_tokens}
    assert settings == {"template": "model", "layers": "separate", "new_tokens": []} | expected


def test_what_no_key_cures_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else can decide to train without the system prompt."""
    silent = SILENT.replace("!= 'developer'", "not in ('system', 'developer')")
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row(n, "plain")["messages"]]} for n in range(40)]
    text, config, problems, (trouble,) = suggested(tmp_path, silent, rows, monkeypatch)
    assert "  # Some rows are refused: message 0 (system) says 'Be brief.', which the template leaves out" in text
    assert trouble.startswith("some rows are refused: message 0 (system) says 'Be brief.'")
    assert (config.data.layers, config.data.template) == ("separate", "model")
    assert any("'Be brief.', which the template leaves out" in problem for problem in problems)


def test_rows_of_which_many_are_too_long_keep_their_last_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"messages": [m for n in range(60) for m in row(n, "plain")["messages"]]}
    text, config, problems, _ = suggested(tmp_path, CHATML, [long] * 40, monkeypatch)
    assert (config.data.over_long, problems) == ("keep_turns", [])
    assert "of others the last turns are trained" in text


def test_lines_to_paste_are_read_out_of_a_refusal() -> None:
    told = (
        "No. What works for it, as tried: `data.reasoning: close` (it closes); or `data.reasoning: train` with "
        '`data.template_args: {enable_thinking: true}` (x). Set model.new_tokens: ["[e~["]. data.template: the one.'
    )
    assert named_settings(told) == [
        {"data.reasoning": "close"}, {"model.new_tokens": ["[e~["]}, {"data.template": "the"},
        {"data.reasoning": "train", "data.template_args": {"enable_thinking": True}},
    ]  # fmt: skip
    assert named_settings("Repair the row.") == []
