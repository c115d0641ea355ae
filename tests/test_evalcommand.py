"""`sft eval` on tiny models: the numbers are those of the model's own loss, the faults are named."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chainmodel import make_chain_model
from conftest import WORDS, make_model
from transformers import AutoModelForCausalLM

from sft.configfile import LoadedConfig, load_config
from sft.errors import ConfigError, ModelError
from sft.evalcommand import evaluate_path, measure
from sft.prepare import prepare_data

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


def write_config(folder: Path, model: Path, *overrides: str) -> LoadedConfig:
    rng = random.Random(0)
    rows = [
        {"messages": [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))} for role in roles]}
        for roles in [("user", "assistant"), ("user", "assistant", "user", "assistant")] * 8
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        f"model: {{name: {model}, tuning: full, precision: fp32}}\n"
        f"data: {{train: [{folder / 'rows.jsonl'}], eval: 5}}\n"
        f"run: {{dir: {folder / 'run'}}}\n"
        "eval: {samples: 2, max_new_tokens: 6}\n"
    )
    return load_config(folder / "run.yaml", overrides)


def silent(text: str) -> None:
    pass


def own_loss(loaded: LoadedConfig, folder: Path) -> tuple[float, int]:
    """transformers' mean loss of the held-out targets, computed in float32, and their number."""
    _, prepared = prepare_data(loaded, silent)
    assert prepared.eval is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for index in range(prepared.eval.num_examples):
        example = prepared.eval.example(index)
        labels = torch.tensor(example.labels_T, dtype=torch.int64)[None]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor(example.input_ids_T, dtype=torch.int64)[None], labels=labels).loss
        trained = int((labels[:, 1:] != -100).sum())
        total, count = total + loss.item() * trained, count + trained
    return total / count, count


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_the_scores_are_those_of_the_models_own_loss(tmp_path: Path, attention: str) -> None:
    folder = make_model(tmp_path / "model")
    loaded = write_config(tmp_path, folder, f"model.attention={attention}", "batch.micro_tokens=64")
    result = measure(loaded, str(folder), say=silent)
    loss, count = own_loss(loaded, folder)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert (result["tokens"], result["conversations"]) == (count, 5)
    assert len(result["samples"]) == 2


def test_a_model_that_ends_its_turns_has_a_high_stop_probability(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_chain_model(tmp_path / "model")
    assert evaluate_path(write_config(tmp_path, folder), str(folder), as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"][0]["completion"] == "Oh hello"
    assert result["samples"][0]["stopped"]
    assert evaluate_path(write_config(tmp_path, folder), str(folder)) == 0
    printed = capsys.readouterr().out
    assert "held out           5 conversations" in printed
    assert "> Oh hello\n" in printed


def test_an_adapter_run_is_found_and_scored(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = make_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    final = tmp_path / "run" / "final"
    peft.save_pretrained(final)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (final / name).write_bytes((folder / name).read_bytes())
    loaded = write_config(tmp_path, folder, "model.tuning=lora")
    before, after = (measure(loaded, str(path), say=silent) for path in (folder, tmp_path / "run"))
    assert before["loss"] != after["loss"]
    assert before["tokens"] == after["tokens"]


def test_a_full_finetune_tells_the_loss_of_what_it_saved(tmp_path: Path) -> None:
    """Trained in float32, saved as the base is, in bfloat16: both losses are said, and each is its folder's own."""
    folder = make_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    loaded = write_config(tmp_path, folder)
    result = subprocess.run(
        [sys.executable, "-m", "sft", "train", str(loaded.path), "train.max_steps=3", "optim.lr=0.01"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    rounded = json.loads((run / "serving.json").read_text())["rounded"]
    assert rounded["loss"] == pytest.approx(own_loss(loaded, run / "final")[0], rel=1e-5)
    trained = own_loss(loaded, run / "checkpoints" / "step-00000003" / "model")[0]
    assert rounded["loss_as_trained"] == pytest.approx(trained, rel=1e-5)
    assert abs(trained / rounded["loss"] - 1) > 5e-5, "the rounding is too small to be seen here"
    told = f"final/ is saved in bfloat16: held-out loss {rounded['loss']:.4f} there, {trained:.4f} as trained"
    assert told in result.stdout + result.stderr
    assert told in (run / "final" / "README.md").read_text()


@pytest.mark.dist
def test_two_processes_score_each_conversation_once(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    alone = measure(write_config(tmp_path, folder), str(folder), say=silent)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom sft.configfile import load_config\nfrom sft.evalcommand import evaluate_path\n"
        "sys.exit(evaluate_path(load_config(sys.argv[1]), sys.argv[2], as_json=True))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0"]
    result = subprocess.run(
        [*launch, str(program), str(tmp_path / "run.yaml"), str(folder)], capture_output=True, text=True, timeout=240,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    together = json.loads(result.stdout)
    assert (together["tokens"], together["samples"]) == (alone["tokens"], alone["samples"])
    for key in ("loss", "token_accuracy", "stop_probability"):
        assert together[key] == pytest.approx(alone[key], rel=1e-6)


def test_faults_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"data\.eval: 0 holds out no rows"):
        measure(write_config(tmp_path, folder, "data.eval=0"), str(folder), say=silent)
    loaded = write_config(tmp_path, folder)
    with pytest.raises(ModelError, match="no such run or folder"):
        measure(loaded, str(loaded.run_dir), say=silent)
    other = make_model(tmp_path / "other")
    swap(other / "tokenizer.json", "hello", "world")
    with pytest.raises(ModelError, match="its tokenizer is not that of the config's model"):
        measure(loaded, str(other), say=silent)


def swap(tokenizer_json: Path, one: str, two: str) -> None:
    values: Any = json.loads(tokenizer_json.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    tokenizer_json.write_text(json.dumps(values))
