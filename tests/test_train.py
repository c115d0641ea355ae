"""The loop: equal to transformers' Trainer, equal whatever the layout, and what each mode trains and saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from jobs import events, losses, relative, run_cli, run_here, write_config
from safetensors.torch import load_file

from sft.choice import best_step, scores_of
from sft.errors import ConfigError, ModelError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_losses_equal_those_of_transformers_trainer(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, data__train_on="last_assistant")
    # a constant rate: transformers' schedules count from 0 and ours from 1, so theirs spend a step of warm-up at rate 0
    run = run_here(config, "optim.schedule=constant", "optim.warmup=0")
    assert relative(losses(run), trainer_losses(config, model, tmp_path)) < 1e-5


def trainer_losses(config: Path, model: Path, folder: Path) -> list[float]:
    """transformers' own loop over our steps, as padded batches in our order: its loss, optimizer and schedule."""
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from sft.batches import Join, StepFeed
    from sft.configfile import load_config
    from sft.opening import make_plan
    from sft.prepare import prepare_data

    loaded = load_config(config)
    _, data = prepare_data(loaded, lambda text: None)
    plan = make_plan(loaded.config, data)
    feed = StepFeed(data.train, plan, seed=0, rank=0, world=1, micro_tokens=10**6, join=Join(True, 0))
    batches = []
    for step in range(1, plan.total_steps + 1):
        examples = [
            data.train.example(e) for c in feed.conversations(step) for e in data.train.conversation_examples(c)
        ]
        width = max(len(e.input_ids_T) for e in examples)
        rows = {"input_ids": [], "labels": [], "attention_mask": []}  # type: dict[str, list[Any]]
        for e in examples:
            pad = width - len(e.input_ids_T)
            rows["input_ids"].append([*e.input_ids_T.tolist(), *[0] * pad])
            rows["labels"].append([*e.labels_T.tolist(), *[-100] * pad])
            rows["attention_mask"].append([1] * len(e.input_ids_T) + [0] * pad)
        batches.append({key: torch.tensor(value) for key, value in rows.items()})
    seen: list[float] = []

    class Recorded(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(batches, batch_size=None)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            seen.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), learning_rate=1e-3, lr_scheduler_type="constant",
        max_steps=plan.total_steps, max_grad_norm=1.0, weight_decay=0.0, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Recorded(AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=batches).train()
    return seen


def test_every_layout_trains_the_same(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model)
    one_row = losses(run_here(config))
    many = run_here(config, f"run.dir={tmp_path}/many", "batch.micro_tokens=100")
    assert max(e["micro_batches"] for e in events(many)) >= 4
    assert relative(losses(many), one_row) < 1e-6
    padded = run_here(config, f"run.dir={tmp_path}/padded", "model.attention=padded")
    assert relative(losses(padded), one_row) < 1e-6


@pytest.mark.dist
def test_two_processes_train_the_same(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model)
    alone = losses(run_here(config))
    for micro_tokens in (100, 4000):
        run = tmp_path / f"two-{micro_tokens}"
        result = run_cli("train", str(config), f"run.dir={run}", f"batch.micro_tokens={micro_tokens}", processes=2)
        assert result.returncode == 0, result.stderr
        assert relative(losses(run), alone) < 1e-6
        assert (
            relative([e["loss"] for e in events(run, "eval")], [e["loss"] for e in events(tmp_path / "run", "eval")])
            < 1e-6
        )


@pytest.mark.dist
def test_accelerate_launch_starts_the_processes_it_is_asked_for(tmp_path: Path, model: Path) -> None:
    import os
    import subprocess
    import sys

    config = write_config(tmp_path, model, train__max_steps=2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, "-m", "sft", "train", str(config)], capture_output=True, text=True, timeout=200,
        env={k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2


def test_control_a_mean_of_means_differs(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts are uneven enough to tell: dividing each micro-batch by its own count fails the test above."""
    import sft.train as loop

    config = write_config(tmp_path, model)
    one_row = losses(run_here(config))
    plain = loop.loss_sum
    monkeypatch.setattr(loop, "loss_sum", lambda m, t, b, s=None: plain(m, t, b, s) / max(1, len(b.targets_M)) * 50)
    many = run_here(config, f"run.dir={tmp_path}/many", "batch.micro_tokens=100")
    assert relative(losses(many), one_row) > 1e-3


@pytest.mark.parametrize("tie", [True, False])
def test_full_finetuning_leaves_a_plain_model(tmp_path: Path, tie: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_model(tmp_path / "base", tie=tie)
    run = run_here(write_config(tmp_path, base))
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    assert final.dtype == torch.float32
    assert not torch.equal(final.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    assert AutoTokenizer.from_pretrained(run / "final").chat_template
    assert final.generation_config.eos_token_id == [
        AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    ]
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    first, last = events(run, "eval")[0], events(run, "eval")[-1]
    assert (first["step"], last["step"]) == (0, 6)
    assert last["loss"] < first["loss"]


def test_an_adapter_alone_is_trained_and_saved(tmp_path: Path, model: Path) -> None:
    run = run_here(write_config(tmp_path, model, model__tuning="lora"), "optim.lr=1e-2")
    names = set(load_file(run / "final/adapter_model.safetensors"))
    assert names
    assert all("lora_" in name for name in names)
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert not (checkpoint / "model/model.safetensors").exists(), "the frozen base is in no checkpoint"
    assert events(run, "eval")[-1]["loss"] < events(run, "eval")[0]["loss"]


def test_training_goes_on_from_an_adapter(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, model__tuning="lora")
    first = run_here(config, "optim.lr=1e-2")
    more = run_here(config, f"run.dir={tmp_path}/more", f"model.adapter={first}/final", "optim.lr=1e-2")
    assert events(more, "eval")[0]["loss"] == pytest.approx(events(first, "eval")[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "option",
    ["dora: true", "rslora: true", "init: gaussian", "init: pissa", "modules_to_save: [lm_head]", "dropout: 0.2"],
)
def test_lora_options_train(tmp_path: Path, option: str) -> None:
    key, value = option.split(": ")
    base = make_model(tmp_path / "base", tie=False)
    run = run_here(write_config(tmp_path, base, model__tuning="lora"), f"model.lora.{key}={value}", "optim.lr=1e-2")
    assert events(run, "eval")[-1]["loss"] < events(run, "eval")[0]["loss"]


def big_enough_for_nf4(folder: Path) -> Path:
    """bitsandbytes packs blocks of 64 weights, and on some CPUs wants rows that are multiples of 64."""
    from conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=136, pad_token_id=137,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_qlora_trains_on_cpu_also_after_an_evaluation(tmp_path: Path) -> None:
    from sft.model import load_trained

    base = big_enough_for_nf4(tmp_path / "base")
    config = write_config(tmp_path, base, model__tuning="qlora", model__precision="auto", train__max_steps=12)
    run = run_here(config, "optim.lr=1e-2", "optim.schedule=constant")
    scores = [event["loss"] for event in events(run, "eval")]
    assert scores[0] > scores[1] > scores[-1], "the loss falls, after evaluations too"
    assert all(event["grad_norm"] > 0 for event in events(run))
    assert set(load_file(run / "final/adapter_model.safetensors"))
    ids = torch.arange(20)[None]
    first, second = (load_trained(run / "final", dtype=torch.float32)[0](input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_qlora_adapter_reloads_with_the_logits_it_was_saved_with(tmp_path: Path) -> None:
    from sft.config import Lora, Quantization
    from sft.evaluate import inference_mode_of
    from sft.model import add_adapter, load_base

    folder, ids = big_enough_for_nf4(tmp_path / "base"), torch.arange(20)[None]

    def base() -> Any:
        return load_base(str(folder), dtype=torch.bfloat16, quantization=Quantization(), device=torch.device("cpu"))

    def logits(model: Any) -> torch.Tensor:
        with inference_mode_of(model):
            return model(input_ids=ids).logits

    model = add_adapter(base(), Lora(rank=4, alpha=8), seed=0).train()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = add_adapter(base(), Lora(), seed=1, adapter=str(tmp_path / "adapter")).train()
    assert torch.equal(logits(again), before)
    assert not torch.equal(logits(add_adapter(base(), Lora(rank=4, alpha=8), seed=0).train()), before)


def test_new_tokens_train_and_reload_with_an_adapter(tmp_path: Path) -> None:
    """A base model without ChatML tokens: they take spare rows, start from the end of text, and come back with LoRA."""
    from conftest import make_tokenizer
    from transformers import AutoTokenizer

    from sft.model import load_trained

    base = make_model(tmp_path / "base", tie=False)
    strip_chatml(base)
    config = write_config(tmp_path, base, model__tuning="lora", data__template="chatml")
    run = run_here(config, "optim.lr=1e-2")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert max(start, end) < 256, "spare rows of the vocabulary first"
    saved = load_file(run / "final/adapter_model.safetensors")
    assert {name.split(".")[-1] for name in saved if "lora_" not in name} == {"trainable_tokens_delta"}
    assert len([name for name in saved if "trainable_tokens_delta" in name]) == 2, "embedding and untied head"
    model, _ = load_trained(run)
    ids = torch.tensor([[start, 5, 6, end, start]])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert events(run, "eval")[-1]["stop_probability"] > events(run, "eval")[0]["stop_probability"]
    assert make_tokenizer  # the conftest's own, with the tokens, is what the other tests use


@pytest.mark.dist
def test_new_tokens_train_on_two_processes(tmp_path: Path) -> None:
    """The head is wrapped there, and an idle rank must give DDP its gradients all the same."""
    base = make_model(tmp_path / "base", tie=False)
    strip_chatml(base)
    config = write_config(tmp_path, base, model__tuning="lora", data__template="chatml")
    alone = losses(run_here(config))
    result = run_cli("train", str(config), f"run.dir={tmp_path}/two", processes=2)
    assert result.returncode == 0, result.stderr
    assert relative(losses(tmp_path / "two"), alone) < 1e-6


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_an_adapter_without_the_template_s_tokens_is_refused(tmp_path: Path) -> None:
    """Rows that are neither trained nor saved would make the run's own evaluation differ from its result's."""
    from sft.config import Lora
    from sft.model import add_adapter, load_base

    base = make_model(tmp_path / "base", tie=False)
    strip_chatml(base)
    add_adapter(load_base(str(base)), Lora(rank=4), seed=0).save_pretrained(tmp_path / "plain")
    config = write_config(tmp_path, base, model__tuning="lora", data__template="chatml")
    with pytest.raises(ModelError, match=r"model\.adapter: .*<\|im_start\|> <\|im_end\|>.*--merge"):
        run_here(config, f"run.dir={tmp_path}/refused", f"model.adapter={tmp_path}/plain")
    first = run_here(config, "optim.lr=1e-2")
    more = run_here(config, f"run.dir={tmp_path}/more", f"model.adapter={first}/final", "train.max_steps=1")
    assert events(more, "eval")[0]["loss"] == pytest.approx(events(first, "eval")[-1]["loss"], rel=1e-5)


def test_a_base_model_without_template_trains_on_text(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    strip_chatml(base)
    rows = [{"prompt": f"{word} ", "completion": "Hello you"} for word in ("one", "two", "three", "four") * 4]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_here(write_config(tmp_path, base), f"data.train=[{tmp_path}/pairs.jsonl]", "optim.lr=1e-2")
    assert losses(run)[-1] < losses(run)[0]
    card = (run / "final/README.md").read_text()
    assert "Chat template: none" in card
    assert not [word for word in ("apply_chat_template", "sft chat") if word in card]
    serving = json.loads((run / "serving.json").read_text())
    assert (serving["checked"], serving["ids_equal"]) == (4, 4)


def strip_chatml(folder: Path) -> None:
    """Rewrites the tokenizer without <|im_start|> and <|im_end|>, as a base model's is."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = [
        {**token, "id": 135} for token in values["added_tokens"] if token["content"] == "<|endoftext|>"
    ]
    path.write_text(json.dumps(values))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "eos_token_id": 135, "pad_token_id": 135}))


def test_neftune_trains_and_evaluates_without_noise(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model)
    plain = run_here(config)
    noisy = run_here(config, f"run.dir={tmp_path}/noisy", "train.neftune_alpha=5")
    assert events(plain, "eval")[0]["loss"] == events(noisy, "eval")[0]["loss"]
    assert losses(plain)[0] != losses(noisy)[0]


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, model: Path, attention: str) -> None:
    config = write_config(tmp_path, model, model__attention=attention)
    plain = run_here(config)
    saved = run_here(config, f"run.dir={tmp_path}/saved", "model.gradient_checkpointing=true")
    assert relative(losses(saved), losses(plain)) < 1e-6


def test_the_best_checkpoint_becomes_final(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a rate far too high: the loss rises, so that the best evaluation is not the last
    config = write_config(tmp_path, model, save__best="eval.loss", eval__every=1)
    run = run_here(config, "optim.lr=3", "optim.warmup=0", "optim.schedule=constant", "optim.max_grad_norm=0")
    scores = {e["step"]: e["loss"] for e in events(run, "eval") if e["step"] > 0}
    best = min(scores, key=lambda step: scores[step])
    assert best != 6
    checkpoint = load_file(run / f"checkpoints/step-{best:08d}/model/model.safetensors")
    final = load_file(run / "final/model.safetensors")
    assert checkpoint.keys() == final.keys()
    assert all(torch.equal(checkpoint[name], final[name]) for name in final)
    assert "by eval.loss no checkpoint is better than the model was before training" in capsys.readouterr().err


RISING = ("optim.lr=3", "optim.warmup=0", "optim.schedule=constant", "optim.max_grad_norm=0", "eval.every=1")


def test_a_best_step_without_checkpoint_is_named_and_passed_over(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """save.best is a key that may change: the steps before it were not kept for it."""
    config = write_config(tmp_path, model, save__every=3, save__keep=5)
    run_here(config, *RISING, "train.max_steps=4")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    before = {e["step"]: e["loss"] for e in events(tmp_path / "run", "eval") if e["step"] > 0}
    lost = min(before, key=lambda step: before[step])
    assert lost in (1, 2)
    run = run_here(config, *RISING, "train.max_steps=6", "save.best=eval.loss")
    assert f"by eval.loss step {lost} was the best so far, but it has no checkpoint" in capsys.readouterr().err
    scores = {e["step"]: e["loss"] for e in events(run, "eval")}
    best = min((3, 4, 5, 6), key=lambda step: scores[step])
    checkpoint = load_file(run / f"checkpoints/step-{best:08d}/model/model.safetensors")
    final = load_file(run / "final/model.safetensors")
    assert all(torch.equal(checkpoint[name], final[name]) for name in final)
    assert json.loads((run / "serving.json").read_text())["step"] == best


@pytest.mark.parametrize(("tuning", "metric"), [("full", "eval.loss"), ("lora", "eval.stop_probability")])
def test_a_damaged_best_checkpoint_is_passed_over(
    tmp_path: Path, model: Path, tuning: str, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both get worse in these few steps, so that the best is the first."""
    config = write_config(tmp_path, model, model__tuning=tuning, save__every=1, save__keep=9, save__best=metric)
    settings = (*RISING, "optim.lr=1") if tuning == "lora" else RISING
    run = run_here(config, *settings, "train.max_steps=3")
    first = best_step(scores_of(events(run, "eval"), metric), metric)
    assert first == json.loads((run / "serving.json").read_text())["step"] != 3
    file = next((run / f"checkpoints/step-{first:08d}/model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    run_here(config, *settings, "train.max_steps=4")
    second = best_step(scores_of(events(run, "eval"), metric), metric, {1, 2, 3, 4} - {first})
    assert f"step {first} is the best by {metric}, but its checkpoint is damaged" in capsys.readouterr().err
    assert json.loads((run / "serving.json").read_text())["step"] == second
    kept, final = (load_file(f / file.name) for f in (run / f"checkpoints/step-{second:08d}/model", run / "final"))
    assert kept.keys() == final.keys()
    assert all(torch.equal(kept[name], final[name]) for name in final)


def test_precision_stays_as_the_run_began(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine without fast bf16, continued on one that has it."""
    config = write_config(tmp_path, model, model__precision="auto")
    constant = ("optim.schedule=constant", "optim.warmup=0")
    sharded: list[str] = []
    monkeypatch.setattr("sft.session.shard_in", lambda accelerator, precision: sharded.append(precision))
    for steps, auto in ((3, "fp32"), (6, "mixed")):
        monkeypatch.setattr(
            "sft.session.resolve_precision", lambda wanted, device, auto=auto: auto if wanted == "auto" else wanted
        )
        run = run_here(config, *constant, f"train.max_steps={steps}")
    assert "precision stays fp32, as this run began; auto would choose mixed here" in capsys.readouterr().err
    assert json.loads((run / "environment.json").read_text())["resolved"]["precision"] == "fp32"
    assert sharded == ["fp32", "fp32"], "FSDP computes in what the weights are kept in"
    whole = run_here(config, *constant, f"run.dir={tmp_path}/whole", "model.precision=fp32")
    assert losses(run) == losses(whole)


def test_early_stopping_ends_a_run_that_is_then_complete(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, eval__every=1, train__early_stopping={"patience": 2})
    run = run_here(config, *RISING)
    steps = events(run)[-1]["step"]
    assert steps < 6
    assert json.loads((run / "status.json").read_text())["reason"] == "early stopping"
    run_here(config, *RISING)
    assert events(run)[-1]["step"] == steps
    run_here(config, *RISING, "train.early_stopping=null")
    assert events(run)[-1]["step"] == 6, "without the rule there is more to do"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_cut_run_in_mixed_precision_goes_on_exactly(tmp_path: Path, model: Path, tuning: str) -> None:
    """Trained weights are float32 beside a bfloat16 base: a resumed run that rounded them would show here."""
    config = write_config(tmp_path, model, model__tuning=tuning, model__precision="mixed", optim__schedule="constant")
    whole = run_here(config, "optim.lr=1e-2")
    run_here(config, f"run.dir={tmp_path}/cut", "optim.lr=1e-2", "train.max_steps=2")
    cut = run_here(config, f"run.dir={tmp_path}/cut", "optim.lr=1e-2")
    assert losses(cut) == losses(whole)


def test_more_steps_at_a_constant_rate_do_not_warm_up_again(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, optim__schedule="constant", optim__warmup=0.5, optim__lr=1.0)
    run_here(config, "train.max_steps=4")
    run = run_here(config, "train.max_steps=10")
    assert [event["learning_rate"] for event in events(run)] == [0.5] + [1.0] * 9


@pytest.mark.parametrize("name", ["adamw_8bit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_eight_bit_optimizer_resumes(tmp_path: Path, model: Path, name: str) -> None:
    config = write_config(tmp_path, model, optim__type=name, optim__schedule="constant")
    whole = run_here(config)
    run_here(config, f"run.dir={tmp_path}/cut", "train.max_steps=2")
    cut = run_here(config, f"run.dir={tmp_path}/cut")
    assert losses(cut) == losses(whole)


def test_a_tracker_that_is_not_installed_is_said_before_training(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="trackio is not installed"):
        run_here(write_config(tmp_path, model), "log.trackers=[trackio]")
