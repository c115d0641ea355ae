"""Sweep files: what is read, what is refused and how it is said, and which points a space holds."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from sft.config import EvalMetric
from sft.errors import ConfigError
from sft.sweepfile import LoadedSweep, load_sweep
from sft.sweepspace import Dimension, grid_points

BASE = """\
model: {name: some/model}
data:
  train: [{path: rows.jsonl}]
  eval: 2
train: {max_steps: 8}
"""
HEAD = "config: base.yaml\ndir: sw\ntrials: 5\n"
SPACE = """\
space:
  optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
  model.lora.rank: [8, 16]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("rows.jsonl").write_text('{"messages": []}\n')
    return tmp_path


def write(text: str = SPACE, head: str = HEAD) -> str:
    Path("sweep.yaml").write_text(head + text)
    return "sweep.yaml"


def refusal(text: str = SPACE, head: str = HEAD, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write(text, head), overrides)
    return str(caught.value)


def only(text: str) -> Dimension:
    (dimension,) = load_sweep(write(f"space:\n  {text}\n")).space
    return dimension


def test_a_sweep_file_with_its_defaults():
    loaded = load_sweep(write())
    assert [dimension.key for dimension in loaded.space] == ["optim.lr", "model.lora.rank"]
    assert (loaded.total, loaded.direction, loaded.metric_key) == (5, "minimize", "loss")
    assert [dict(point.values) for point in loaded.first] == [{"optim.lr": 2e-4, "model.lora.rank": 16}]
    assert loaded.first[0].is_base
    assert not loaded.warnings


def test_nested_and_dotted_keys_are_the_same():
    nested = load_sweep(
        write("space:\n  optim:\n    lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n  model: {lora: {rank: [8, 16]}}\n")
    )
    dotted = load_sweep(write())
    assert [d.identity() for d in nested.space] == [d.identity() for d in dotted.space]


@pytest.mark.parametrize(
    ("text", "kind", "points"),
    [
        ("model.lora.rank: {low: 8, high: 33, step: 8}", "int", (8, 16, 24, 32)),
        ("model.lora.rank: {low: 2, high: 4}", "int", (2, 3, 4)),
        ("model.lora.dropout: {low: 0, high: 1, step: 0.25}", "float", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("model.lora.alpha: {low: 16, high: 64, step: 16, int: true}", "int", (16, 32, 48, 64)),
        ("model.lora.dropout: {low: 0.0, high: 0.3, step: 0.1}", "float", (0.0, 0.1, 0.2, 0.3)),
        ("optim.schedule: [cosine, constant]", "choice", ("cosine", "constant")),
        ("optim.betas: [[0.9, 0.95], [0.9, 0.999]]", "choice", ([0.9, 0.95], [0.9, 0.999])),
        ("optim.lr: [auto, 1.0e-4]", "choice", ("auto", 1e-4)),
        ("data.train.0.limit: [null, 100]", "choice", (None, 100)),
    ],
)  # fmt: skip
def test_dimensions(text, kind, points):
    """Whether a range holds whole numbers is the config's to say, not the way its ends are written."""
    dimension = only(text)
    assert (dimension.kind, dimension.points()) == (kind, points)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.learning_rate: [1.0e-4]", "sweep.yaml:5: unknown key 'optim.learning_rate'. Did you mean"),
        ("optim.lr: [0]", "sweep.yaml:5: 'optim.lr' is 0; wanted: auto or a number, above 0"),
        ("optim.lr: {low: 0.0, high: 1.0e-3}", "sweep.yaml:5: 'optim.lr' is 0"),
        ("optim.lr: {low: 1.0e-3, high: 1.0e-5}", "sweep.yaml:5: optim.lr: low 0.001 must lie below high 1e-05"),
        ("optim.lr: {low: 0, high: 1, log: true}", "must be above 0 on a log scale"),
        ("optim.lr: {low: 0.1, high: 1, log: true, step: 0.1}", "a log range takes no step"),
        ("optim.lr: {low: 0.1, hihg: 1}", "unknown 'hihg'. Did you mean 'high'?"),
        ("optim.lr: 0.1", "optim.lr is 0.1; wanted: a list of values, or a range"),
        ("optim.lr: []", "wanted: a list with at least one value"),
        ("model.lora.rank: [8, 8]", "8 appears twice"),
        ("model.lora.rank: {low: 1.5, high: 3}", "takes whole numbers"),
        ("model.lora.rank: [8, many]", "'model.lora.rank' is many (text); wanted: a whole number, at least 1"),
        ("model: [8, 16]", "sweep.yaml:5: 'model' is 8; wanted: a section"),
        ("run.dir: [a]", "'run.dir' cannot be searched: each trial has a run folder of its own"),
        ("data.eval: [0.1, 0.2]", "'data.eval' cannot be searched: all trials are scored on the same held-out rows"),
        ("model.lora.rank: {values: [8], when: {model.tunin: lora}}",
         "when: unknown key 'model.tunin'. Did you mean 'model.tuning'?"),
        ("model.lora.rank: {values: [8], when: {model.tuning: full}}",
         "never counts: when model.tuning is [full], but model.tuning is lora"),
        ("optim: {}", "sweep.yaml:5: optim: wanted: a list of values"),
    ],
)  # fmt: skip
def test_a_space_is_tried_on_the_config_before_any_trial(text, said):
    assert said in refusal(f"space:\n  {text}\n")


def test_conditions_in_a_circle():
    text = """\
space:
  model.tuning: {values: [lora, full], when: {model.lora.rank: 8}}
  model.lora.rank: {values: [8, 16], when: {model.tuning: lora}}
"""
    assert "conditions go in a circle: model.tuning → model.lora.rank → model.tuning" in refusal(text)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("config: base.yaml\ndir: sw\ntrails: 5\n", "sweep.yaml:3: unknown key 'trails'. Did you mean 'trials'?"),
        ("config: base.yaml\ndir: sw\n", "sweep.yaml: 'trials' is missing: how many should tpe try?"),
        ("config: base.yaml\ntrials: 5\n", "sweep.yaml: 'dir' is missing. E.g. dir: sweeps/lr"),
        ("config: base.yaml\ndir: sw\ntrials: 0\n",
         "sweep.yaml:3: 'trials' is 0: input should be greater than or equal to 1"),
        (HEAD + "sampler: tbe\n", "sweep.yaml:4: 'sampler' is tbe: input should be 'tpe', 'random' or 'grid'"),
        (HEAD + "pruner: {type: median, warm: 1}\n", "sweep.yaml:4: unknown key 'pruner.warm'. Did you mean 'warmup'?"),
        (HEAD + "metric: loss\n", "sweep.yaml:4: 'metric' is loss: input should be 'eval.loss', 'eval.perplexity'"),
        (HEAD + "optim: {lr: 1}\n", "unknown key 'optim'. That is the config's; change it there"),
        ("config: nobase.yaml\ndir: sw\ntrials: 5\n", "nobase.yaml: no such file. In .: base.yaml"),
        (HEAD + "first: [{optim.lr: 1.0}]\n", "sweep.yaml:4: optim.lr: 1 is not in the space: from 1e-05 to 0.001"),
        (HEAD + "first: [{lr: 1.0}]\n", "sweep.yaml:4: 'lr' is not in the space, which has: optim.lr, model.lora.rank"),
        ("config: base.yaml\ndir: sw\nsampler: grid\n",
         "a grid needs points: give optim.lr a step, or a list of values"),
    ],
)  # fmt: skip
def test_faults_of_the_file_are_said_with_their_line(head, said):
    assert said in refusal(head=head)


def test_a_sweep_needs_an_evaluation():
    Path("base.yaml").write_text(BASE.replace("eval: 2", "eval: 0"))
    assert "data.eval is 0 in base.yaml" in refusal()


def test_overrides_reach_the_sweep_or_the_base_config():
    loaded = load_sweep(
        write(), ["trials=3", "pruner=median", "pruner.warmup=4", "space.optim.lr=[1e-4]", "train.max_steps=3"]
    )
    assert loaded.total == 3
    assert (loaded.spec.pruner.type, loaded.spec.pruner.warmup) == ("median", 4)
    assert loaded.space[0].choices == (1e-4,)
    assert loaded.base.config.train.max_steps == 3
    assert "each trial has a run folder of its own" in refusal(overrides=("run.dir=x",))


CONDITIONAL = """\
space:
  model.lora.rank: {values: [8, 16], when: {model.tuning: [lora, qlora]}}
  model.tuning: [lora, qlora, full]
  optim.schedule: [cosine, constant]
"""


def test_a_grid_with_conditions_by_eye():
    loaded = load_sweep(write(CONDITIONAL, "config: base.yaml\ndir: sw\nsampler: grid\n"))
    points = list(grid_points(loaded.space, {"model.tuning": "lora", "model.lora.rank": 16}))
    assert loaded.total == len(points) == 10  # (2 tunings with 2 ranks each, and full) x 2 schedules
    assert points[0] == {"model.tuning": "lora", "model.lora.rank": 8, "optim.schedule": "cosine"}
    assert [point for point in points if point["model.tuning"] == "full"] == [
        {"model.tuning": "full", "optim.schedule": "cosine"},
        {"model.tuning": "full", "optim.schedule": "constant"},
    ]


def test_a_dimension_that_another_turns_off_is_named():
    text = CONDITIONAL.replace(", when: {model.tuning: [lora, qlora]}", "")
    (warning,) = load_sweep(write(text)).warnings
    assert "model.lora.rank is not read where model.tuning is full" in warning
    assert "add when: {model.tuning: [lora, qlora]} to it" in warning


def test_a_base_config_outside_the_space_is_tried_first_all_the_same_but_for_a_grid():
    space = "space:\n  model.lora.rank: [32, 64]\n  optim.schedule: [cosine, constant]\n"
    (first,) = load_sweep(write(space)).first
    assert first.is_base
    assert dict(first.values) == {"optim.schedule": "cosine"}
    loaded = load_sweep(write(space, "config: base.yaml\ndir: sw\nsampler: grid\n"))
    assert loaded.first == ()
    assert "the base config is no point of the grid" in loaded.warnings[0]


def test_accuracies_are_maximized_unless_said_otherwise():
    head = HEAD + "metric: eval.token_accuracy\n"
    assert load_sweep(write(head=head)).direction == "maximize"
    assert load_sweep(write(head=head + "direction: minimize\n")).direction == "minimize"


def test_a_trial_config_keeps_the_places_of_the_base():
    loaded = load_sweep(write())
    loaded.dir.mkdir()
    loaded.freeze()
    Path("base.yaml").write_text("nothing: left")  # the sweep goes on with what it began with
    config = loaded.config_for({"optim.lr": 3e-4, "model.lora.rank": 8}, "sw/trials/0001", seed=7)
    assert (config.config.optim.lr, config.config.model.lora.rank, config.config.run.seed) == (3e-4, 8, 7)
    assert config.origins["optim.lr"] == "the sweep"
    assert config.origins["train.max_steps"] == "base.yaml:5"


def test_the_sweep_that_ships(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    loaded = load_sweep("configs/sweep.yaml")
    assert loaded.warnings == ()
    assert {dimension.key for dimension in loaded.space} >= {"optim.lr", "model.lora.rank"}
    assert (loaded.total, loaded.spec.workers, loaded.spec.pruner.type) == (14, 2, "median")


def test_the_metrics_are_those_of_an_evaluation():
    from sft.evaluate import EvalSums, metrics

    assert {f"eval.{name}" for name in metrics(EvalSums(1, 1, 1, 1, 1, 1))} - {"eval.tokens"} == set(
        get_args(EvalMetric)
    )


def test_what_the_command_line_sets_is_said_to_come_from_there():
    nested = "space:\n  optim: {lr: [1.0e-4]}\n"
    assert only_of(load_sweep(write(nested), ["space.optim.lr=[1e-3]"])).choices == (1e-3,)
    assert refusal(nested, overrides=("space.optim.lr=1e-3",)).startswith(
        "command line: optim.lr is 0.001; wanted: a list"
    )
    assert refusal(overrides=("trials=0",)).startswith("command line: 'trials' is 0:")
    twice = "space:\n  optim: {lr: [1.0e-4]}\n  optim.lr: [1.0e-3]\n"
    assert refusal(twice) == "sweep.yaml:6: optim.lr is searched already at sweep.yaml:5; leave one of the two."


def only_of(loaded: LoadedSweep) -> Dimension:
    (dimension,) = loaded.space
    return dimension


def test_what_any_trial_needs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sft.needed

    monkeypatch.setattr(sft.needed, "find_spec", lambda name: None)
    space = "space:\n  optim.type: [adamw, adamw_8bit]\n  model.tuning: [lora, qlora]\n"
    assert [str(error).split(" needs ")[0] for error in load_sweep(write(space)).lacking()] == [
        "model.tuning: qlora", "optim.type: adamw_8bit",
    ]  # fmt: skip
    assert load_sweep(write()).lacking() == []


@pytest.mark.parametrize("place", ["space:\n  model.name: [m, hf_AbCdEfGhIjKlMnOpQrSt]\n", SPACE])
def test_no_trial_s_config_holds_a_credential(place: str) -> None:
    overrides = () if "hf_" in place else ("log.name=hf_AbCdEfGhIjKlMnOpQrSt",)
    said = refusal(place, overrides=overrides)
    assert " holds a token: " in said
    assert "AbCdEf" not in said


def test_where_a_pruner_decides_every_trial_is_evaluated_at_the_same_shares(tmp_path):
    assert load_sweep(write()).base.config.eval.every == "auto"
    pruned = load_sweep(write(head=HEAD + "pruner: median\n"))
    assert pruned.base.config.eval.every == 0.1
    Path("sw").mkdir()
    pruned.freeze()
    trial = pruned.config_for({"optim.lr": 1e-4, "model.lora.rank": 8}, tmp_path / "run")
    assert trial.config.eval.every == 0.1
    Path("base.yaml").write_text(BASE + "eval: {every: 0.25}\n")
    assert load_sweep(write(head=HEAD + "pruner: median\n")).base.config.eval.every == 0.25
