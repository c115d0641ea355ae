"""The end of a run: the best checkpoint in the live model, what is saved compared with it, and no second base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from jobs import events, run_here, write_config
from safetensors.torch import load_file, save_file

from sft.savedweights import let_go, load_into, saved_equals_live
from sft.trainee import Trainee

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def adapted(base: Path, seed: int, **options: Any) -> Trainee:
    from sft.config import Lora
    from sft.model import add_adapter, load_base

    model = add_adapter(load_base(str(base), dtype=torch.float32), Lora(rank=4, alpha=8, **options), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Trainee(model, compute_dtype=torch.float32, autocast=False)


def answer(trainee: Trainee) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = trainee.causal(input_ids=torch.arange(5, 30)[None]).logits
    return logits


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"modules_to_save": ["lm_head"]}, {"rslora": True}])
def test_an_adapter_is_put_back_into_the_live_model(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base", tie=False)
    best = adapted(base, 1, **options)
    best.model.save_pretrained(tmp_path / "best")
    live = adapted(base, 2, **options)
    assert not saved_equals_live(live, tmp_path / "best")
    assert not torch.equal(answer(live), answer(best))
    assert load_into(live, tmp_path / "best")
    assert torch.equal(answer(live), answer(best))


@pytest.mark.parametrize("tie", [True, False])
def test_whole_weights_are_put_back_and_compared(tmp_path: Path, tie: bool) -> None:
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", tie=tie)
    best = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in best.parameters():
            parameter.mul_(1.5)
    best.save_pretrained(tmp_path / "best")
    live = Trainee(AutoModelForCausalLM.from_pretrained(base), compute_dtype=torch.float32, autocast=False)
    assert not saved_equals_live(live, tmp_path / "best")
    assert load_into(live, tmp_path / "best")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert torch.equal(answer(live), best(input_ids=ids).logits)


def test_controls_one_weight_changed_missing_or_too_many(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", tie=False)
    live = Trainee(AutoModelForCausalLM.from_pretrained(base), compute_dtype=torch.float32, autocast=False)
    assert saved_equals_live(live, base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    changed = weights[name].clone()
    changed[0, 0] += 1e-3
    for number, wrong in enumerate(
        (weights | {name: changed}, {k: v for k, v in weights.items() if k != name}, weights | {"more": changed})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(wrong, folder / "model.safetensors")
        assert not saved_equals_live(live, folder), number
    assert not load_into(live, tmp_path / "2")
    assert saved_equals_live(live, base), "nothing was changed by files that do not fit"


def test_rounded_to_the_dtype_of_the_file_they_are_equal(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", tie=False)
    live = Trainee(AutoModelForCausalLM.from_pretrained(base), compute_dtype=torch.float32, autocast=False)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert saved_equals_live(live, tmp_path / "half")


def test_weights_are_let_go_whoever_holds_the_model(tmp_path: Path) -> None:
    trainee = adapted(make_model(tmp_path / "base", tie=False), 1)
    held = list(trainee.parameters())
    let_go(trainee)
    assert sum(parameter.untyped_storage().nbytes() for parameter in held) == 0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_best_checkpoint_is_what_final_holds_and_what_answers(tmp_path: Path, tuning: str, model: Path) -> None:
    """The rate is far too high, so the first evaluated step is better than the last."""
    metric = "eval.loss" if tuning == "full" else "eval.stop_probability"
    config = write_config(tmp_path, model, model__tuning=tuning, save__every=1, save__keep=9, save__best=metric)
    run = run_here(
        config, f"optim.lr={3 if tuning == 'full' else 1}", "optim.warmup=0", "optim.schedule=constant",
        "optim.max_grad_norm=0", "eval.every=1", "train.max_steps=3",
    )  # fmt: skip
    serving = json.loads((run / "serving.json").read_text())
    assert serving["step"] < 3
    saved = next((run / f"checkpoints/step-{serving['step']:08d}/model").glob("*.safetensors"))
    kept, final = load_file(saved), load_file(run / "final" / saved.name)
    assert set(kept) == set(final)
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    assert serving["ids_equal"] == serving["checked"] == 4
    (time,) = events(run, "time")
    assert time["serving_check"] > 0


BIG = """
import json, sys, threading
from pathlib import Path
import torch
import sft.train as loop
from sft.configfile import load_config

# Of the process alone: pages of a mapped file are the system's to take back.
peaks, ending, over = {False: 0, True: 0}, False, threading.Event()
def watch():
    while not over.wait(0.01):
        lines = Path("/proc/self/status").read_text().splitlines()
        now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peaks[ending] = max(peaks[ending], now)

def finish(session, **options):
    global ending
    ending = True
    whole(session, **options)

whole, loop.finish = loop.finish, finish
watching = threading.Thread(target=watch)
watching.start()
try:
    assert loop.train(load_config(sys.argv[1], sys.argv[2:])) == 0
finally:
    over.set()
print(json.dumps({"run": peaks[False], "end": peaks[True]}))
"""


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_end_of_a_run_takes_no_more_memory_than_the_run(tmp_path: Path, tuning: str) -> None:
    """A base of 200 MB under an adapter: a second one would show. The best checkpoint is not the last."""
    from conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    make_tokenizer(base)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=136, pad_token_id=137,
        )
    ).save_pretrained(base)  # fmt: skip
    assert (base / "model.safetensors").stat().st_size > 190e6
    metric = "eval.loss" if tuning == "full" else "eval.token_accuracy"
    config = write_config(
        tmp_path, base, model__tuning=tuning, save__every=1, save__keep=9, save__best=metric, batch__examples=1
    )
    script = tmp_path / "measured.py"
    script.write_text(BIG)
    arguments = [
        f"optim.lr={1 if tuning == 'full' else 10}", "optim.warmup=0", "optim.schedule=constant",
        "optim.max_grad_norm=0", "eval.every=1", "train.max_steps=2", "data.max_tokens=120", "data.over_long=truncate",
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(script), str(config), *arguments], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "run/serving.json").read_text())["step"] == 1, "the best is not the last"
    assert memory["end"] <= 1.1 * memory["run"], memory
