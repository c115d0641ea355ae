"""A model that brings code of its own: the whole path where it may run, and not a step where it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_model
from jobs import run_cli, write_config

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_whole_path_and_no_step_of_it_without_the_user_s_word(tmp_path: Path, tuning: str) -> None:
    model = make_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text(CODE)
    config = write_config(tmp_path, model, model__tuning=tuning, model__trust_remote_code=True, train__max_steps=2)
    env, run = {"SFT_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}, str(tmp_path / "run")
    trust = "--trust-remote-code"
    for command in (
        ["train", str(config)],
        ["eval", str(config), "--json"],
        ["export", run, "--out", str(tmp_path / "out"), trust],
        *([["export", run, "--out", str(tmp_path / "merged"), "--merge", trust]] if tuning == "lora" else []),
        ["chat", str(tmp_path / "out"), trust],
    ):
        done = run_cli(*command, env=env)
        assert done.returncode == 0, (command, done.stderr)

    for command in (["chat", run], ["eval", str(config), "model.trust_remote_code=false"]):
        refused = run_cli(*command, env=env)
        assert refused.returncode == 2, (command, refused.stderr)
        assert "brings code of its own, which was not run" in refused.stderr
        assert trust in refused.stderr
