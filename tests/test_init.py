"""`sft init`: what it sees in data and model, and that what it prints is a config."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from sft.configfile import LoadedConfig, load_config
from sft.errors import DataError, ModelError
from sft.glance import glance_at_model
from sft.init import (
    DataGlance,
    suggest_columns,
    suggest_config,
    suggest_epochs_and_batch,
    suggest_eval,
    suggest_max_tokens,
    suggest_tuning,
)
from sft.opening import make_plan
from sft.prepare import load_bundle


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(path: str, rows: list[Any]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def suggested(data: str, model: Path | str) -> tuple[str, LoadedConfig]:
    text = suggest_config(data, str(model)).text
    Path("my.yaml").write_text(text, encoding="utf-8")
    return text, load_config("my.yaml")


CHAT = {"messages": [{"role": "user", "content": "How many ?"}, {"role": "assistant", "content": "just 6"}]}


def test_chat_rows_and_a_small_model(model_folder: Path) -> None:
    data = write_rows("chats.jsonl", [CHAT] * 400)
    text, loaded = suggested(data, model_folder)
    config = loaded.config
    assert (config.data.train[0].path, config.data.train[0].format) == ("chats.jsonl", "messages")
    assert config.model.name == str(model_folder)
    assert config.model.tuning == "full"
    assert config.data.max_tokens == 256
    assert config.data.template == "model"
    assert (config.train.epochs, config.batch.examples) == (3, 8)
    assert config.save.best == "eval.loss"
    assert loaded.unread == ()
    assert "# Data: 400 rows, format messages." in text
    assert "made for 512 tokens, brings its chat template." in text
    assert "#   assistant   just 6" in text


def test_a_model_without_template_is_given_one(tmp_path: Path) -> None:
    from conftest import make_tokenizer

    base = make_tokenizer(tmp_path / "base", template=None)
    text, loaded = suggested(write_rows("a.jsonl", [CHAT] * 20), base)
    assert loaded.config.data.template == "chatml"
    assert "brings no chat template" in text


@pytest.mark.parametrize("rows", [{"text": "How many ?"}, {"prompt": "How", "completion": " many"}])
def test_plain_rows_for_a_model_without_template_can_be_checked(tmp_path: Path, rows: dict[str, str]) -> None:
    folder = make_tokenizer(tmp_path / "base", template=None)
    _, loaded = suggested(write_rows("rows.jsonl", [rows] * 30), folder)
    assert loaded.config.data.template == "model"
    assert load_bundle(loaded.config).template_name == "none"


def test_an_adapter_is_trained_on_and_a_run_stands_for_its_model(tmp_path: Path, model_folder: Path) -> None:
    final = tmp_path / "runs/x/final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder)}))
    data = write_rows("chats.jsonl", [CHAT] * 30)
    for name in ("runs/x", "runs/x/final"):
        _, loaded = suggested(data, name)
        model = loaded.config.model
        assert (model.name, model.adapter, model.tuning) == (str(model_folder), "runs/x/final", "lora")
        assert loaded.unread == ()
    (final / "adapter_config.json").unlink()
    shutil.copytree(model_folder, final, dirs_exist_ok=True)
    _, loaded = suggested(data, "runs/x")
    assert (loaded.config.model.name, loaded.config.model.adapter) == ("runs/x/final", None)


def test_a_path_to_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"--model \./none: there is no such file or folder"):
        suggest_config(write_rows("chats.jsonl", [CHAT]), "./none")


def test_a_model_that_cannot_be_seen_is_said_and_the_rest_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    text, loaded = suggested(write_rows("a.jsonl", [CHAT] * 20), "nobody/nothing")
    assert "# Model: not looked at." in text
    assert "# Could not be seen from here: model.name: no tokenizer could be loaded from 'nobody/nothing'" in text
    assert "tokens, guessed from characters" in text
    assert loaded.config.model.tuning == "lora"
    (trouble,) = suggest_config("a.jsonl", "nobody/nothing").troubles
    assert trouble.startswith("model not looked at: model.name: no tokenizer could be loaded from 'nobody/nothing'")
    assert "\n" not in trouble


def test_questions_and_answers_become_conversations(tokenizer_folder: Path) -> None:
    data = write_rows("qa.jsonl", [{"question": "How many ?", "answer": "just 6", "id": 3}] * 30)
    text, loaded = suggested(data, tokenizer_folder)
    assert loaded.config.data.train[0].columns == {"question": "instruction", "answer": "output"}
    assert loaded.config.data.train[0].format == "alpaca"
    assert "without the chat template: columns: {question: prompt, answer: completion}" in text


def test_rows_that_cannot_be_used_are_shown(tokenizer_folder: Path) -> None:
    data = write_rows("a.jsonl", [CHAT] * 30 + [{"messages": []}, {"x": 1}])
    text, loaded = suggested(data, tokenizer_folder)
    assert "# 2 of them cannot be used, such as:" in text
    assert "a.jsonl:31" in text
    assert loaded.config.data.on_bad_row == "error"
    troubles = suggest_config(data, str(tokenizer_folder)).troubles
    assert troubles[-1].startswith("2 of 32 rows cannot be used, such as a.jsonl:31: ")


def test_several_formats_stay_auto(tokenizer_folder: Path) -> None:
    write_rows("d/a.jsonl", [CHAT] * 30)
    write_rows("d/b.jsonl", [{"text": "Hello world"}] * 10)
    text, loaded = suggested("d", tokenizer_folder)
    assert loaded.config.data.train[0].format == "auto"
    assert "format messages (30), text (10)" in text


def test_a_test_file_becomes_the_evaluation(tokenizer_folder: Path) -> None:
    write_rows("d/train.jsonl", [CHAT] * 30)
    write_rows("d/test.jsonl", [CHAT] * 10)
    _, loaded = suggested("d", tokenizer_folder)
    evaluation = loaded.config.data.eval
    assert isinstance(evaluation, list)
    assert [(source.path, source.split, source.limit) for source in evaluation] == [("d", "test", 500)]


def test_next_to_no_data_is_not_held_out(tokenizer_folder: Path) -> None:
    _, loaded = suggested(write_rows("a.jsonl", [CHAT] * 3), tokenizer_folder)
    assert loaded.config.data.eval == 0
    assert loaded.config.save.best is None


def test_hostile_names_and_texts_stay_in_their_comment(tokenizer_folder: Path) -> None:
    hostile = "x\nmodel: {name: evil}\u2028run: {dir: /}\x85log: {name: 1}"
    row = {"messages": [{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile}]}
    _, loaded = suggested(write_rows("a: #b.jsonl", [row] * 5), tokenizer_folder)
    assert loaded.config.model.name == str(tokenizer_folder)
    assert loaded.config.data.train[0].path == "a: #b.jsonl"
    assert loaded.origins["run.dir"] == "default"


def test_data_that_fits_no_format_is_refused_with_the_formats() -> None:
    with pytest.raises(DataError, match=r"no row fits a format.*the keys x.*prompt_completion"):
        suggest_config(write_rows("a.jsonl", [{"x": 1}]), "nobody/nothing")
    with pytest.raises(DataError, match="no such file"):
        suggest_config("nope.jsonl", "nobody/nothing")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (CHAT, {}),
        ({"text": "a"}, {}),
        ({"prompt": "a", "completion": "b"}, {}),
        ({"Question": "a", "Answer": "b"}, {"Question": "instruction", "Answer": "output"}),
        ({"instruction": "a", "context": "c", "response": "b"}, {"context": "input", "response": "output"}),
        ({"traj": CHAT["messages"], "reward": 1}, {"traj": "messages"}),
        ({"content": "a"}, {"content": "text"}),
        ({"x": 1}, {}),
    ],
)
def test_columns_are_suggested_only_where_they_help(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert suggest_columns(row) == columns


def test_without_a_chat_model_pairs_stay_pairs() -> None:
    pairs = suggest_columns({"question": "a", "answer": "b"}, chat=False)
    assert pairs == {"question": "prompt", "answer": "completion"}


def test_sizes_come_from_headers(model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    glance = glance_at_model(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert glance.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (glance.context, glance.has_template, glance.problems) == (512, True, ())


def test_a_cut_weights_file_is_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tokenizer_folder, broken)
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"\x00" * 4)
    assert "is no safetensors file" in " ".join(glance_at_model(str(broken)).problems)


@pytest.mark.parametrize(("lengths", "context", "size"), [([10], None, 256), ([300] * 99 + [9000], None, 512),
    ([1900], None, 4096), ([9000], None, 12288), ([9000], 8192, 8192)])  # fmt: skip
def test_max_tokens_fit_nearly_all(lengths: list[int], context: int | None, size: int) -> None:
    assert suggest_max_tokens(sorted(lengths * 10), context) == size


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(10, 3, 8), (900, 3, 16), (7_500, 2, 64), (19_000, 2, 128), (1_000_000, 1, 128)]
)
def test_small_data_is_seen_more_often_in_smaller_steps(rows: int, epochs: int, batch: int) -> None:
    assert suggest_epochs_and_batch(rows) == (epochs, batch)


@pytest.mark.parametrize(("parameters", "tuning"), [(None, "lora"), (135e6, "full"), (8e9, "lora"), (32e9, "qlora")])
def test_tuning_follows_the_size(parameters: int | None, tuning: str) -> None:
    assert suggest_tuning(parameters) == tuning


@pytest.mark.parametrize(("rows", "whole", "held_out"), [(3, True, 0), (50, True, 5), (300, True, 0.05),
    (20_000, True, 500), (5_000, False, 500)])  # fmt: skip
def test_what_is_held_out(rows: int, whole: bool, held_out: float) -> None:
    assert suggest_eval(DataGlance(rows, whole, {}, Counter(), [])) == held_out


def test_what_it_prints_can_be_prepared_and_checked(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.prepare import prepare_command, prepare_data

    monkeypatch.setenv("SFT_CACHE", str(Path("cache").absolute()))
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"question": f"How many {a} {b} ?", "answer": f"just {b} {a} ."} for a in words for b in words if a != b]
    text, loaded = suggested(write_rows("qa.jsonl", rows), model_folder)
    bundle, prepared = prepare_data(loaded, lambda line: None)
    assert prepared.report["rows"] == 90
    assert prepared.report["dropped"] == {}
    assert prepared.eval is not None
    assert prepared.train.num_conversations + prepared.eval.num_conversations == 90
    assert bundle.template_name == "model"
    assert f"# about {make_plan(loaded.config, prepared).total_steps} steps" in text
    assert prepare_command(loaded) == 0
    said = capsys.readouterr().out
    assert "template: model; generation stops at <|im_end|>" in said
    assert str(prepared.path) in said
    check = pytest.importorskip("sft.check")
    assert check.check(loaded, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("{{ 1 // 0 }}", ""),
        ("{{ 'a' * 100000000000 }}", ""),
        ("{{ messages[99].content.x }}", ""),
        (ENDLESS, "the chat template ran longer than 1 s and was stopped"),
    ],
)
def test_a_template_that_fails_or_loops_on_a_row_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    """Before: four kinds of errors were caught, and nothing was bounded."""
    monkeypatch.setattr("sft.init.RENDER_SECONDS", 1.0)
    guarded = "{% if 'helicopters' in messages[-2].content|string %}" + does + "{% endif %}"
    folder = make_tokenizer(tmp_path / "odd", template=CHATML + guarded)
    odd = {"messages": [{"role": "user", "content": "How many helicopters ?"}, {"role": "assistant", "content": "6"}]}
    data = write_rows("a.jsonl", [odd] * 30)
    began = time.monotonic()
    text, _ = suggested(data, folder)
    assert time.monotonic() - began < 20
    assert ("Could not be seen from here: the chat template" in text) is bool(said)
    assert said in text
    assert "brings its chat template" in text


def test_a_template_that_always_fails_is_as_none(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "odd", template=CHATML + "{{ 1 // 0 }}")
    text, _ = suggested(write_rows("a.jsonl", [CHAT] * 30), folder)
    assert "brings no chat template" in text
