"""Config files: what is read, what is refused and in which words, and what is written back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft.config import Config
from sft.configfile import COMMAND_LINE, LoadedConfig, dump_config, json_schema, load_config
from sft.configkeys import all_keys, wanted
from sft.errors import ConfigError
from sft.foreign import FOREIGN
from sft.report import read_config_lines
from sft.secrets import mask_secrets
from sft.unread import DEFAULT
from sft.yamltree import flow, parse_yaml

MINIMAL = "model: {name: m}\ndata: {train: [a.jsonl]}\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> LoadedConfig:
    Path("c.yaml").write_text(text, encoding="utf-8")
    return load_config("c.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


# Reading ------------------------------------------------------------------------------------------------------------


def test_only_two_keys_have_no_default() -> None:
    loaded = load(MINIMAL)
    assert loaded.config.model.name == "m"
    assert loaded.config.data.train[0].path == "a.jsonl"
    assert loaded.run_dir == Path("runs/c")
    assert loaded.config.run.dir == "runs/c"


def test_numbers_follow_yaml_1_2() -> None:
    text = MINIMAL + "optim: {lr: 2e-5, eps: 1E-8, weight_decay: .1}\nrun: {seed: 010}\nlog: {name: yes}\n"
    config = load(text).config
    assert config.optim.lr == 2e-5
    assert config.optim.eps == 1e-8
    assert config.optim.weight_decay == 0.1
    assert config.run.seed == 10
    assert config.log.name == "yes"


def test_dates_stay_text() -> None:
    text = "model: {name: m}\ndata: {train: a.jsonl, template_args: {date_string: 2024-07-26}}\n"
    assert load(text).config.data.template_args == {"date_string": "2024-07-26"}


def test_a_whole_number_serves_where_a_float_is_wanted() -> None:
    config = load(MINIMAL, "train.epochs=3", "data.eval=500", "optim.lr=1").config
    assert (config.train.epochs, config.data.eval, config.optim.lr) == (3.0, 500.0, 1.0)


@pytest.mark.parametrize("train", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]"])
def test_a_source_may_be_written_short(train: str) -> None:
    loaded = load(f"model: {{name: m}}\ndata:\n  train: {train}\n", "data.train.0.limit=7")
    assert [(source.path, source.limit) for source in loaded.config.data.train] == [("a.jsonl", 7)]
    assert loaded.origins["data.train.0.path"] == "c.yaml:3"
    assert loaded.origins["data.train.0.limit"] == COMMAND_LINE
    assert loaded.origins["data.train.0.repeat"] == DEFAULT


def test_byte_order_mark_and_crlf_are_harmless() -> None:
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfmodel: {name: m}\r\ndata: {train: a.jsonl}\r\n")
    assert load_config("c.yaml").config.model.name == "m"


def test_anchors_are_read() -> None:
    text = "model: {name: m}\ndata:\n  train:\n    - {path: a.jsonl, columns: &c {q: prompt}}\n"
    loaded = load(text + "    - {path: b.jsonl, columns: *c}\n")
    assert loaded.config.data.train[1].columns == {"q": "prompt"}


# Overrides ----------------------------------------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_and_make_sections_on_the_way() -> None:
    loaded = load(
        MINIMAL,
        "optim.lr=1e-4",
        "model.lora={rank: 8, targets: [q_proj, v_proj]}",
        "train.early_stopping.patience=2",
        "log.trackers=[tensorboard]",
        "data.train.1.path=b.jsonl",
        "model.revision=",
        "run.dir=runs/a=b",
    )
    config = loaded.config
    assert config.optim.lr == 1e-4
    assert (config.model.lora.rank, config.model.lora.targets) == (8, ["q_proj", "v_proj"])
    assert config.train.early_stopping is not None
    assert config.train.early_stopping.patience == 2
    assert config.log.trackers == ["tensorboard"]
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert loaded.run_dir == Path("runs/a=b")
    assert loaded.origins["model.lora.rank"] == COMMAND_LINE
    assert loaded.origins["model.lora.alpha"] == DEFAULT


def test_the_last_override_wins() -> None:
    assert load(MINIMAL, "run.seed=1", "run.seed=2").config.run.seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", "overrides are written key=value"),
        ("=3", "overrides are written key=value"),
        ("a..b=3", "overrides are written key=value"),
        ("data.train.2.limit=3", "'data.train' is a list of 1 item, numbered from 0; '2' is none of them"),
        ("data.train.x=3", "'x' is none of them"),
        ("optim.betas.0=0.8", "give the whole list here"),
        ("model.name.x=3", "'model.name' is m (text), so it has no 'x'"),
        ("optim.lr=[1", "not valid YAML"),
        ("optim.leer=1", "command line: unknown key 'optim.leer'. Did you mean 'lr'?"),
        ("otpim.lr=1", "command line: unknown key 'otpim'. Did you mean 'optim'?"),
        ("save.bst.x=1", "command line: unknown key 'save.bst'. Did you mean 'best'?"),
    ],
)
def test_bad_overrides_say_what_is_wrong(override: str, said: str) -> None:
    assert said in refusal(MINIMAL, override)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "modle: 3\n", "c.yaml:3: unknown key 'modle'. Did you mean 'model'?"),
        (MINIMAL + "optim:\n  shedule: linear\n", "c.yaml:4: unknown key 'optim.shedule'. Did you mean 'schedule'?"),
        (MINIMAL + "max_tokens: 9\n", "c.yaml:3: unknown key 'max_tokens'. The key is 'data.max_tokens'."),
        (MINIMAL + "lora: {rank: 3}\n", "c.yaml:3: unknown key 'lora'. The key is 'model.lora'."),
        (
            "model: {name: m}\ndata:\n  train:\n    - path: a\n      collumns: {}\n",
            "c.yaml:5: unknown key 'data.train.0.collumns'. Did you mean 'columns'?",
        ),
        (
            "model: {name: m}\ndata:\n  train: a\n  eval:\n    - path: a\n      splitt: x\n",
            "c.yaml:6: unknown key 'data.eval.0.splitt'. Did you mean 'split'?",
        ),
        (
            "model: {name: m}\ndata:\n  train:\n  - path: a\n    columns:\n      b: text\n      a: compleiton\n",
            "c.yaml:7: 'data.train.0.columns.a' is compleiton (text); wanted: messages, ",
        ),
        (
            "model: {name: m}\ndata:\n  train: a\n  eval:\n    - {path: a, columns: {a: compleiton}}\n",
            "c.yaml:5: 'data.eval.0.columns.a' is compleiton (text); wanted: messages, ",
        ),
        (MINIMAL + "save: {evry: 3}\n", "Did you mean 'every'?"),
        (MINIMAL + "zzzzzzz: 3\n", "At the top there are: run, model, data, batch, optim"),
    ],
)
def test_an_unknown_key_is_answered_with_the_right_one(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "optim.lr"),
        ("per_device_train_batch_size", "batch.examples"),
        ("gradient_accumulation_steps", "batch.examples"),
        ("num_train_epochs", "train.epochs"),
        ("lora_r", "model.lora.rank"),
        ("lora_alpha", "model.lora.alpha"),
        ("lora_target_modules", "model.lora.targets"),
        ("cutoff_len", "data.max_tokens"),
        ("max_seq_length", "data.max_tokens"),
        ("max_length", "data.max_tokens"),
        ("packing", "nothing to set: examples always lie joined"),
        ("sample_packing", "nothing to set: examples always lie joined"),
        ("bf16", "model.precision"),
        ("load_in_4bit", "model.tuning"),
        ("warmup_ratio", "optim.warmup"),
        ("lr_scheduler_type", "optim.schedule"),
        ("output_dir", "run.dir"),
        ("dataset", "data.train"),
        ("datasets", "data.train"),
        ("chat_template", "data.template"),
        ("train_on_inputs", "data.train_on"),
        ("assistant_only_loss", "data.train_on"),
        ("completion_only_loss", "data.train_on"),
        ("resume_from_checkpoint", "the same command on the same run.dir resumes"),
        ("micro_batch_size", "batch.micro_tokens"),
        ("val_set_size", "data.eval"),
        ("logging_steps", "log.every"),
        ("save_steps", "save.every"),
        ("eval_steps", "eval.every"),
        ("report_to", "log.trackers"),
        ("deepspeed", "accelerate launch --config_file"),
        ("base_model", "model.name"),
        ("sequence_len", "data.max_tokens"),
        ("model_name_or_path", "model.name"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(theirs: str, ours: str) -> None:
    said = refusal(MINIMAL + f"{theirs}: 1\n")
    assert said.startswith(f"c.yaml:3: unknown key '{theirs}'.")
    assert ours in said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("eval.steps", "eval.every"), ("save.steps", "save.every"), ("save.total_limit", "save.keep")],
)
def test_their_names_are_known_in_our_sections_too(theirs: str, ours: str) -> None:
    assert f"unknown key '{theirs}'. Here it is '{ours}'" in refusal(MINIMAL, f"{theirs}=1")


def test_every_answer_names_a_key_that_exists() -> None:
    keys = all_keys()
    assert {ours for ours, _ in FOREIGN.values() if ours and ours not in keys} == set()
    leaf_names = {key.rpartition(".")[2] for key in keys}
    assert set(FOREIGN) & leaf_names == set(), "a name of our own is answered as if it were another trainer's"


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    said = refusal(MINIMAL + "optim:\n  lr: 1\n  warmup: 0\n  lr: 2\n")
    assert said == "c.yaml:6: key 'optim.lr' appears twice, first on line 4; remove one of the two."
    assert "key 'model' appears twice, first on line 1" in refusal(MINIMAL + "model: {}\n")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!x", "!!binary", "!!set", "!!omap"])
def test_tags_are_refused_and_run_nothing(tag: str) -> None:
    said = refusal(MINIMAL + f"log:\n  name: {tag} ['touch canary']\n")
    assert said.startswith("c.yaml:4: YAML tag '")
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [1\n", "not valid YAML"),
        ("a:\n\tb: 1\n", "Indent with spaces, not tabs."),
        ("a: b: c\n", "c.yaml:1: not valid YAML: mapping values are not allowed"),
        ("a: 1\n---\nb: 2\n", "One file holds one document"),
        ("%YAML 1.1\n---\na: 1\n", "remove the %YAML line"),
        ("- a\n", "the file holds [a] (a list)"),
        ("model: &m {name: *m}\n", "'model.name' contains itself"),
        ("model: {<<: {name: m}}\n", "merge keys (<<) are not read"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("[" * 3000, "nested too deeply"),
        (f"run: {{seed: {'1' * 5000}}}", "is not a number that can be read"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(text: str, said: str) -> None:
    assert said in refusal(text)


def test_aliases_that_multiply_are_refused_quickly() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "aliases that multiply" in refusal("\n".join(levels))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.lora.rank=abc", "'model.lora.rank' is abc (text); wanted: a whole number, at least 1."),
        ("model.lora.rank=0", "'model.lora.rank' is 0; wanted: a whole number, at least 1."),
        ("model.lora.rank=true", "'model.lora.rank' is true; wanted: a whole number, at least 1."),
        ("data.max_tokens=1e3", "'data.max_tokens' is 1000; wanted: a whole number, at least 2. Write 1000."),
        ("model.tuning=qloar", "wanted: full, lora or qlora. Did you mean 'qlora'?"),
        ("optim.lr=fast", "'optim.lr' is fast (text); wanted: auto or a number, above 0."),
        ("optim.lr=.nan", "'optim.lr' is .nan; wanted: auto or a number, above 0."),
        ("optim.lr=.inf", "'optim.lr' is .inf; wanted: auto or a number, above 0."),
        ("optim.lr='2e-5'", "'optim.lr' is \"2e-5\" (text)"),
        ("optim.betas=[0.9]", "wanted: a list of two values, each a number, at least 0 and below 1."),
        ("model.compile=yes", "'model.compile' is yes (text); wanted: auto or true or false. YAML 1.2 writes true."),
        ("log.name=7", "Put it in quotes: '\"7\"' on the command line"),
        ("data.eval=1.5", "'data.eval' is 1.5; wanted: a share below 1, a whole number of rows, 0 for none, or a list"),
        ("data.eval=-1", "'data.eval' is -1; wanted: a share below 1, a whole number of rows, 0 for none, or a list"),
        ("optim.betas=[0.9, 1.0]", "'optim.betas.1' is 1; wanted: a number, at least 0 and below 1."),
        ("data.eval=true", "'data.eval' is true; wanted:"),
        ("data.train=[]", "'data.train' is [] (a list); wanted: a list of sources"),
        ("data.train=3", "'data.train' is 3; wanted: a list of sources"),
        (
            "data.train.0.columns={a: 3}",
            "'data.train.0.columns.a' is 3; wanted: messages, conversations, conversation, ",
        ),
        (
            "data.train.0.columns={a: inptu}",
            "functions, train, weight or chat_template_kwargs or null. Did you mean 'input'?",
        ),
        ("data.train.0.repeat=0", "wanted: a number, above 0."),
        ("log.trackers=wandb", "wanted: a list of tensorboard, wandb, mlflow or trackio. Write [wandb]."),
        ("model.lora.modules_to_save=lm_head", "wanted: a list of texts. Write [lm_head]."),
        ("log.trackers=[tensorbord]", "'log.trackers.0' is tensorbord (text); wanted: tensorboard, wandb"),
        ("model.lora=3", "'model.lora' is 3; wanted: a section with rank, alpha"),
        ("model=", "'model' is empty (null); wanted: a section with name"),
        ("run.seed=-1", "'run.seed' is -1; wanted: a whole number, at least 0"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_wanted(override: str, said: str) -> None:
    message = refusal(MINIMAL, override)
    assert message.startswith("command line: ")
    assert said in message
    assert "\n" not in message, "one finding, said once"


def test_a_mistake_in_a_list_is_not_told_as_one_of_the_list_as_well() -> None:
    """`data.eval` may be a number, too, which its list is not."""
    message = refusal("model: {name: m}\ndata:\n  train: a\n  eval: [{path: a, repeat: 0}]\n")
    assert message == "c.yaml:4: 'data.eval.0.repeat' is 0; wanted: a number, above 0."


def test_wrong_values_name_file_and_line() -> None:
    assert refusal(MINIMAL + "optim:\n  lr: fast\n").startswith("c.yaml:4: 'optim.lr' is fast")


def test_every_problem_is_said_at_once_in_the_order_of_the_file() -> None:
    lines = refusal(MINIMAL + "optim: {lr: fast}\npacking: true\nsave: {keep: 0}\n", "run.seed=x").splitlines()
    assert lines[0] == "c.yaml: 4 problems"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  - c.yaml:3",
        "  - c.yaml:4",
        "  - c.yaml:5",
        "  - command line",
    ]


@pytest.mark.parametrize(
    ("text", "missing", "example"),
    [
        ("data: {train: a}\n", "model", "name: HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("model: {tuning: full}\ndata: {train: a}\n", "model.name", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("model: {name: m}\n", "data", "- path: data/chats.jsonl"),
        ("model: {name: m}\ndata: {eval: 0}\n", "data.train", "- path: data/chats.jsonl"),
        ("model: {name: m}\ndata: {train: [{limit: 3}]}\n", "data.train.0.path", ""),
    ],
)
def test_what_is_missing_is_said_with_an_example(text: str, missing: str, example: str) -> None:
    said = refusal(text)
    assert f"'{missing}' is missing." in said
    assert example in said
    assert said.startswith("c.yaml")


def test_an_empty_file_misses_both() -> None:
    said = refusal("# nothing\n")
    assert "'model' is missing" in said
    assert "'data' is missing" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("save.best=eval.los", "'save.best' is eval.los (text); wanted: eval.loss, eval.perplexity"),
        ("save.best=eval.los", "Did you mean 'eval.loss'?"),
        ("save.best=train.loss", "Did you mean 'eval.loss'?"),
        ("save.best=perplexiti", "wanted: eval.loss, eval.perplexity, eval.token_accuracy or eval.stop_probability"),
        ("train.early_stopping={metric: foo}", "'train.early_stopping.metric' is foo (text); wanted: eval.loss"),
        ("train.early_stopping={metric: eval.token_acuracy}", "Did you mean 'eval.token_accuracy'?"),
        ("train.early_stopping={metric: 3}", "'train.early_stopping.metric' is 3; wanted: eval.loss"),
    ],
)
def test_a_metric_is_one_that_evaluations_have(override: str, said: str) -> None:
    assert said in refusal(MINIMAL, override)


@pytest.mark.parametrize("name", ["perplexity", "eval.perplexity"])
def test_a_metric_may_be_named_without_eval(name: str) -> None:
    config = load(MINIMAL, f"save.best={name}", f"train.early_stopping={{metric: {name}}}").config
    assert config.train.early_stopping is not None
    assert config.save.best == config.train.early_stopping.metric == "eval.perplexity"


def test_rules_across_keys_are_told() -> None:
    assert "save.best and train.early_stopping read an evaluation" in refusal(
        MINIMAL, "data.eval=0", "save.best=eval.loss"
    )
    assert "but data.eval is an empty list" in refusal(MINIMAL, "data.eval=[]", "train.early_stopping={}")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_decomposes_the_base_is_refused_on_packed_weights(init: str) -> None:
    said = refusal(MINIMAL, "model.tuning=qlora", f"model.lora.init={init}")
    assert f"c.yaml: model.lora.init is {init}" in said
    assert "Write model.lora.init: default (or gaussian, orthogonal), or model.tuning: lora." in said
    assert load(MINIMAL, f"model.lora.init={init}").config.model.lora.init == init
    assert load(MINIMAL, "model.tuning=qlora", f"model.lora.init={init}", "model.adapter=a").config.model.adapter == "a"


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_other_adapters_start_on_packed_weights(init: str) -> None:
    assert load(MINIMAL, "model.tuning=qlora", f"model.lora.init={init}").config.model.lora.init == init


def test_a_missing_file_is_told_with_its_neighbours() -> None:
    Path("lora.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"nope\.yaml: no such file\. In \.: lora\.yaml\."):
        load_config("nope.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(".")


def test_a_path_that_lies_beside_the_config_is_told_so() -> None:
    Path("project").mkdir()
    Path("project/a.jsonl").write_text("{}\n")
    Path("project/c.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config("project/c.yaml")
    assert str(caught.value).startswith("project/c.yaml:2: 'data.train.0.path' is a.jsonl, and there is no such file")
    assert "write project/a.jsonl, or run from project" in str(caught.value)
    assert load_config("project/c.yaml", ["data.train.0.path=project/a.jsonl"])


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anne")
    loaded = load(MINIMAL, "data.train=~/a.jsonl", "run.dir=~/runs/x", "model.name=~/m")
    assert loaded.config.data.train[0].path == "/home/anne/a.jsonl"
    assert (loaded.run_dir, loaded.config.model.name) == (Path("/home/anne/runs/x"), "/home/anne/m")


# Keys that are set but never read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        (["model.tuning=full", "model.lora.rank=8"], ["model.lora.rank"]),
        (["model.tuning=full", "model.adapter=x"], ["model.adapter"]),
        (["model.lora.rank=8"], []),
        (["model.quantization.type=fp4"], ["model.quantization.type"]),
        (["model.tuning=qlora", "model.quantization.type=fp4"], []),
        (["model.adapter=x", "model.lora.rank=8"], ["model.lora.rank"]),
        (["optim.decay=0.1"], ["optim.decay"]),
        (["optim.decay=0.1", "optim.schedule=wsd"], []),
        (["optim.min_lr_ratio=0.1", "optim.schedule=constant"], ["optim.min_lr_ratio"]),
        (["data.eval=0", "eval.every=5"], ["eval.every"]),
        (["eval.samples=0", "eval.max_new_tokens=5"], ["eval.max_new_tokens"]),
        (["train.max_nonfinite_skips=5"], ["train.max_nonfinite_skips"]),
        (["log.project=x"], ["log.project"]),
        (["log.project=x", "log.trackers=[wandb]"], []),
        (["train.epochs=2", "train.max_steps=5"], ["train.epochs"]),
        (["data.train.0.format=text", "data.template_args={a: 1}"], ["data.template_args"]),
        (["data.train.0.path=*.jsonl", "data.train.0.subset=main"], ["data.train.0.subset"]),
        (["data.train.0.path=org/set", "data.train.0.subset=main"], []),
        (["data.train.0.path=/", "data.train.0.subset=main", "data.train.0.split=x"], []),
        (["data.train.0.path=/", "data.train.0.revision=main"], ["data.train.0.revision"]),
        (["data.eval=[]", "eval.every=5"], ["eval.every"]),
        (["data.eval=[{path: org/set, repeat: 3}]"], ["data.eval.0.repeat"]),
        (["data.train.0.repeat=3"], []),
    ],
)
def test_a_key_that_the_mode_never_reads_is_named(overrides: list[str], unread: list[str]) -> None:
    loaded = load(MINIMAL, *overrides)
    assert [warning.split(" (")[0] for warning in loaded.unread] == unread


def test_a_kind_of_tuning_is_no_adapter() -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter.*; for a new one write model\.tuning: qlora"):
        load(MINIMAL, "model.adapter=qlora")


@pytest.mark.parametrize("key", ["optim.warmup", "eval.every", "save.every"])
def test_what_is_neither_a_share_nor_whole_steps_is_refused(key: str) -> None:
    for good in ("0", "0.5", "1", "3"):
        load(MINIMAL, f"{key}={good}")
    with pytest.raises(ConfigError, match=rf"{key}.*1\.5 is neither a share of the run \(below 1\) nor a whole number"):
        load(MINIMAL, f"{key}=1.5")


# Writing ------------------------------------------------------------------------------------------------------------


def test_the_dump_says_where_each_value_came_from() -> None:
    loaded = load(MINIMAL + "optim: {lr: 2e-5}\n", "run.seed=3")
    lines = dump_config(loaded, {"model.precision": "mixed", "device": "cpu"}).splitlines()
    assert lines[0] == "# Resolved from c.yaml. Each line says where its value came from."
    assert "  seed: 3  # command line" in lines
    assert "  lr: 2e-05  # c.yaml:3" in lines
    assert "    - path: a.jsonl  # c.yaml:2" in lines
    assert "      limit: null  # default" in lines
    assert "  precision: auto  # default; resolved to mixed" in lines
    assert lines[-1] == "# resolved: device: cpu"


def test_the_dump_loads_back_equal_and_keeps_what_was_default() -> None:
    loaded = load(
        MINIMAL,
        "data.train.0.columns={'a: b': prompt, \"it's\": completion}",
        "data.template_args={deep: {list: [1, 2.5, null, true, 'null', ''], 'on': no}}",
        'data.template_args.text="two\\nlines # not a comment"',
        "data.eval=[{path: e.jsonl, limit: 3}, f.jsonl]",
        "train.early_stopping.patience=2",
        "log.name='7'",
        "optim.lr=1e-6",
        "model.lora.rank=8",
    )
    Path("dump.yaml").write_text(dump_config(loaded, {"optim.lr": "# default"}), encoding="utf-8")
    again = load_config("dump.yaml")
    assert again.config == loaded.config
    assert again.run_dir == loaded.run_dir
    assert [warning.split(" (")[0] for warning in again.unread] == ["log.name"]
    assert {key for key, origin in again.origins.items() if origin == DEFAULT} == {
        key for key, origin in loaded.origins.items() if origin == DEFAULT
    }


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
@example("\ud800")
@example({"": "\x85\u2028\ufeff", "on": "2e-5", "~": "#"})
@example([1e300, 1e16, -0.0, 5e-324, math.inf, -math.inf])
@example("  x: y ")
def test_one_line_of_yaml_reads_back_as_it_was(value: Any) -> None:
    text = flow(value)
    assert "\n" not in text
    assert parse_yaml(f"key: {text}  # comment\n", "x").value == {"key": value}


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["required"]) == {"model", "data"}
    sections = [section for section in schema["$defs"].values() if "properties" in section]
    assert all(section["additionalProperties"] is False for section in sections)
    undescribed = [
        f"{s['title']}.{key}" for s in sections for key, value in s["properties"].items() if "description" not in value
    ]
    assert undescribed == []


def test_the_schema_takes_sources_written_short() -> None:
    keys = json_schema()["$defs"]["Data"]["properties"]
    kinds = [{"type": "string"}, {"$ref": "#/$defs/Source"}]
    assert keys["train"]["anyOf"] == [*kinds, {"type": "array", "items": {"anyOf": kinds}, "minItems": 1}]
    assert keys["eval"]["anyOf"] == [{"type": "number", "minimum": 0}, *keys["train"]["anyOf"]]


def test_what_is_wanted_can_be_said_of_every_key() -> None:
    for key in all_keys():
        words = wanted(tuple(int(part) if part.isdigit() else part for part in key.split(".")))
        assert words
        assert "a value" not in words, key


def test_the_config_is_frozen_and_strict_at_every_depth() -> None:
    from sft.configkeys import section_under

    sections = [Config, *filter(None, (section_under(field.annotation) for field in all_keys().values()))]
    for section in sections:
        settings = section.model_config
        assert (settings.get("extra"), settings.get("frozen"), settings.get("strict")) == ("forbid", True, True)


def test_no_torch_is_imported_for_a_config() -> None:
    code = "import sys; from sft.configfile import load_config as f; f('c.yaml'); print(*sys.modules)"
    Path("c.yaml").write_text(MINIMAL)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "ruamel" in out
    assert not {"torch", "transformers", "datasets", "rich", "optuna"} & set(out.split())


# Secrets ------------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrSt"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"login with {TOKEN}.", "login with ***."),
        ("postgresql://anne:s3cret@host/db", "postgresql://anne:***@host/db"),
        ("https://x-oauth-token-of-some-length@host/r", "https://***@host/r"),
        ("ssh://git@host/repo", "ssh://git@host/repo"),
        ("https://host/a?token=abcdef&x=1", "https://host/a?token=***&x=1"),
        ('"api_key": "abc123"', '"api_key": "***"'),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("WANDB_API_KEY=0123456789abcdef", "WANDB_API_KEY=***"),
        ("db_password: hunter2  # config", "db_password: ***  # config"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert mask_secrets(text, {}) == masked


@pytest.mark.parametrize(
    "text",
    ["max_tokens: 512", "micro_tokens: auto", "stop_tokens: <|im_end|>", "pad_token: <|endoftext|>", "key: value",
     "data.train.0.path: a.jsonl", "password: null", "commit 8f14e45fceea167a5a36dedd4bea2543aaaaaaaa"],
)  # fmt: skip
def test_what_is_no_credential_stays(text: str) -> None:
    assert mask_secrets(text, {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "512", "HF_TOKEN": ""}) == text


def test_values_of_telling_environment_variables_are_masked_everywhere() -> None:
    environ = {
        "MY_SERVICE_TOKEN": "opensesame",
        "DB_PASSWORD": "opensesame-too",
        "HOME": "/root",
        "PAGER": "lessismore",
    }
    assert mask_secrets("opensesame-too, opensesame, lessismore", environ) == "***, ***, lessismore"


@pytest.mark.parametrize("piece", ["x", "1", "a-", "a_1-", "x://", "token=", "1 "])
def test_a_long_text_is_masked_in_linear_time(piece: str) -> None:
    """An error may quote a file."""
    began = time.monotonic()
    mask_secrets(piece * (200_000 // len(piece)), {})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"log.name={TOKEN}", "'log.name' holds a token: tokens belong into the environment (HF_TOKEN,"),
        (f"log.name=run-{TOKEN}", "'log.name' holds a token"),
        ("data.template_args={x: swordfish-swordfish}",
         "'data.template_args.x' holds the value of the environment variable MY_TOKEN"),
        ("data.template_args={x: [{y: swordfish-swordfish}]}", "'data.template_args.x.0.y' holds the value of"),
        ("data.template_args={db_password: lux}", "'data.template_args.db_password' holds a credential, by its name"),
        ("data.train=https://anne:s3cret@host/a.jsonl", "'data.train.0.path' holds a URL with a password or token"),
        ("data.train=https://host/a.jsonl?token=s3cret", "'data.train.0.path' holds a URL with a credential in its"),
        ("log.project=0123456789abcdef0123456789abcdef01234567", "the value of the environment variable WANDB_API_KEY"),
    ],
)  # fmt: skip
def test_a_value_that_is_a_credential_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    """A run's config is written into its folder and read again, so nothing in it is masked."""
    monkeypatch.setenv("MY_TOKEN", "swordfish-swordfish")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    message = refusal(MINIMAL, override)
    assert message.startswith("command line: ")
    assert said in message
    for secret in ("swordfish", "s3cret", "lux", TOKEN, "0123456789abcdef"):
        assert secret not in message
    assert "swordfish" not in refusal(MINIMAL, "run.seed=swordfish-swordfish")


PATHS = (
    "data/sk-wikipedia-conversations.jsonl", "sk-wikipedia-conversations", "org/hf_conversations20250101",
    "postgres/chats/*.jsonl", "/mnt/postgres/postgres.jsonl", "data/ghp_a_very_long_folder_name/a.jsonl",
    "xoxb-archive-2025-01/a.jsonl", "a/pypi-downloads-of-2025-monthly.csv", "password: x.jsonl", "api_key=chats.jsonl",
    "secret=chats # 1.jsonl", "a  # default", "x; resolved to 3", "***.jsonl", "(masked)", "token?key=part-1.jsonl",
)  # fmt: skip
"""Names that resemble credentials, comments and masks."""


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_resembles_a_credential_is_written_as_it_is(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    loaded = load(MINIMAL, f"data.train=[{json.dumps(path)}]", f"log.name={json.dumps(path)}")
    Path("dump.yaml").write_text(dump_config(loaded), encoding="utf-8")
    again = load_config("dump.yaml")
    assert again.config == loaded.config
    assert again.config.data.train[0].path == path
    assert {key for key, place in again.origins.items() if place != DEFAULT} == {
        key for key, place in loaded.origins.items() if place != DEFAULT
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from([*PATHS, "sk-", "hf_", "ghp_", "-of-conversations", "postgres", "2025", "/", "  # ", "; ", '"'])
        | st.text(max_size=8),
        min_size=1, max_size=4,
    ).map("".join)
)  # fmt: skip
def test_what_is_written_reads_back_or_was_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    config = {"model": {"name": path}, "data": {"train": [{"path": path}], "template_args": {path: [path]}}}
    Path("c.yaml").write_text(json.dumps(config), encoding="utf-8")
    try:
        loaded = load_config("c.yaml")
    except ConfigError as error:
        said = str(error)
        assert " holds " in said or "not valid YAML" in said, said
        return
    Path("dump.yaml").write_text(dump_config(loaded, {"model.name": path}), encoding="utf-8")
    assert load_config("dump.yaml").config == loaded.config
    lines = {line.key: line.value for line in read_config_lines(Path("dump.yaml"))}
    assert parse_yaml(lines["data.train.0.path"], "x").value == loaded.config.data.train[0].path
    assert lines["train.epochs"] == "1"
