"""The whole path through the command line, as a user walks it, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_model
from jobs import events, run_cli, write_config


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_from_init_to_chat(tmp_path: Path, tuning: str) -> None:
    model = make_model(tmp_path / "model")
    config = write_config(tmp_path, model, model__tuning=tuning, train__max_steps=40, save__every=5, eval__every=20)
    env = {"SFT_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "run"

    suggested = run_cli("init", str(tmp_path / "rows.jsonl"), "--model", str(model), env=env)
    assert suggested.returncode == 0, suggested.stderr
    assert "format: messages" in suggested.stdout

    checked = run_cli("check", str(config), "--json", env=env)
    found = json.loads(checked.stdout)
    assert (checked.returncode, found["problems"]) == (0, [])
    assert found["rows"] == 24
    assert found["steps"] == 40

    shown = run_cli("preview", str(config), "-n", "2", "--json", env=env)
    example = json.loads(shown.stdout.splitlines()[0])
    assert [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100] == [
        label for label in example["labels"] if label != -100
    ]
    assert all(span.endswith("<|im_end|>") for span in example["trained"])

    training = subprocess.Popen(
        [sys.executable, "-m", "sft", "train", str(config)], env={**os.environ, **env}, stderr=subprocess.PIPE
    )
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert training.poll() is None, training.communicate()[1].decode()
        time.sleep(0.02)
    training.send_signal(signal.SIGKILL)
    training.communicate()
    again = run_cli("train", str(config), env=env)
    assert again.returncode == 0, again.stderr
    assert [event["step"] for event in events(run)] == list(range(1, 41))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert run_cli("train", str(config), env=env).returncode == 0

    scored = run_cli("eval", str(config), "--model", str(run), "--json", env=env)
    assert json.loads(scored.stdout)["loss"] == pytest.approx(events(run, "eval")[-1]["loss"], rel=1e-4)

    merge = ["--merge"] if tuning == "lora" else []
    exported = run_cli("export", str(run), "--out", str(tmp_path / "out"), *merge, env=env)
    assert exported.returncode == 0, exported.stderr
    generate_with_plain_transformers(tmp_path / "out")

    answer = subprocess.run(
        [sys.executable, "-m", "sft", "chat", str(run)], input="Hello world\n", capture_output=True, text=True,
        env={**os.environ, **env}, timeout=200,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert run_cli("report", str(run), env=env).returncode == 0


def generate_with_plain_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello world"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
