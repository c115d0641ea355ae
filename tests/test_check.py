from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft.check import check, inspect
from sft.checkmachine import _judge_memory
from sft.checkview import blocks, large, print_picture
from sft.configfile import LoadedConfig, load_config
from sft.errors import EXIT_DONE, EXIT_USER, DataError, ResumeError
from sft.memory import Memory
from sft.picture import Picture, as_object
from sft.train import train

pytestmark = pytest.mark.usefixtures("own_cache")


def row(number: int = 0, answer: str = "hello world") -> dict[str, Any]:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    question = f"Hello {words[number % 10]} {words[number // 10 % 10]}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def config_for(tmp_path: Path, model: Path | str, *files: Path | str, overrides: tuple[str, ...] = ()) -> LoadedConfig:
    file = tmp_path / "my.yaml"
    sources = json.dumps([str(path) for path in files])
    file.write_text(
        f"run: {{dir: {tmp_path}/run}}\nmodel: {{name: {model}}}\ndata: {{train: {sources}, eval: 4}}\n"
        "batch: {examples: 8}\n"
    )
    return load_config(file, overrides)


def look(loaded: LoadedConfig) -> Picture:
    return inspect(loaded, say=lambda line: None)


def the_problem(loaded: LoadedConfig) -> str:
    (problem,) = look(loaded).problems
    return problem


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", *(row(number) for number in range(40)))


def test_json_holds_the_promised_keys_and_the_counts_add_up(
    tmp_path: Path, model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(config_for(tmp_path, model_folder, data), as_json=True) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    promised = [
        "rows", "kept", "dropped", "examples", "tokens", "trained_tokens", "steps", "template", "stop_tokens",
        "problems",
    ]  # fmt: skip
    assert list(found)[:10] == promised
    assert (found["rows"], found["kept"], found["held_out"], found["dropped"]) == (40, 40, 4, {})
    assert found["tokens"] == 36 * 18  # each row: 4 + 5 + 2 + 6 + newline
    assert found["trained_tokens"] == 36 * 4  # hello, blank, world, stop
    assert found["steps"] == 5  # 36 conversations, 8 a step
    assert (found["template"], found["stop_tokens"], found["problems"]) == ("model", ["<|im_end|>"], [])
    assert found["parameters"] == 256 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert found["memory"]["total"] == sum(v for key, v in found["memory"].items() if key != "total")


def test_a_repeat_that_leaves_an_epoch_empty_is_a_problem(tmp_path: Path, model_folder: Path, data: Path) -> None:
    loaded = config_for(tmp_path, model_folder, data, overrides=("data.train.0.repeat=0.001",))
    said = the_problem(loaded)
    assert said.startswith("data.train.0.repeat is 0.001: with 36 conversations to train on, an epoch would hold none.")
    with pytest.raises(DataError) as caught:
        train(loaded)
    assert str(caught.value) == said
    enough = config_for(tmp_path, model_folder, data, overrides=("data.train.0.repeat=0.03",))
    assert look(enough).problems == []


def test_no_weights_are_needed_but_their_absence_is_a_problem(tmp_path: Path, model_folder: Path, data: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = config_for(tmp_path, folder, data)
    picture = look(loaded)
    assert picture.problems == [
        f"model.name: there are no *.safetensors in {folder}. Weights are read from safetensors only; "
        "save the model again with save_pretrained."
    ]
    assert picture.report["kept"] == 36
    assert picture.memory is not None


def test_all_that_is_wrong_is_said_at_once(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(
        tmp_path / "bad.jsonl", row(), "{", {"messages": [{"role": "user", "content": 3}]}, row(1), row(2), row(3)
    )
    loaded = config_for(
        tmp_path, model_folder, bad, tmp_path / "nope.jsonl", overrides=("log.trackers=[wandb]", "data.eval=0")
    )
    assert check(loaded) == EXIT_USER
    output = capsys.readouterr().out
    for text in (
        "data.train.1.path",
        "nope.jsonl: no such file",
        "2 bad rows of 6",
        "bad.jsonl:2",
        "bad.jsonl:3",
        "wandb is not installed",
    ):
        assert text in output, text
    assert "3 problems to solve before training." in output


def test_counts_are_there_although_rows_are_bad(tmp_path: Path, model_folder: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", *(row(number) for number in range(20)), "{")
    found = as_object(look(config_for(tmp_path, model_folder, bad)))
    assert (found["rows"], found["kept"], found["held_out"], found["dropped"]) == (21, 20, 4, {"bad_row": 1})
    assert found["steps"] == 2
    assert len(found["problems"]) == 1


def test_bad_rows_are_told_by_kind(tmp_path: Path, model_folder: Path) -> None:
    """Before: twenty lines of "the same", and nothing of it in --json."""
    rows = [{"question": "a", "answer": "b"}] * 25 + ["{"]
    bad = write(tmp_path / "bad.jsonl", *(row(number) for number in range(20)), *rows)
    for model in (model_folder, tmp_path / "nowhere"):
        found = as_object(look(config_for(tmp_path, model, bad)))
        problem = found["problems"][-1]
        assert f"\n  {bad}:21-45 (25 rows): messages: a list of " in problem
        assert problem.count(str(bad)) == 2
        assert [(kind["rows"], kind["where"]) for kind in found["bad_rows"]] == [(25, f"{bad}:21-45"), (1, f"{bad}:46")]
    assert as_object(look(config_for(tmp_path, model_folder, write(bad, row()))))["bad_rows"] == []


def test_rows_are_read_although_the_model_is_missing(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", row(), "{")
    picture = look(config_for(tmp_path, tmp_path / "nowhere", bad))
    assert picture.rows == 2
    model, rows = picture.problems
    assert model.startswith(f"model.name: '{tmp_path}/nowhere' has no config.json that this machine can reach.")
    assert f"{bad}:2: " in rows
    found = as_object(picture)
    assert (found["rows"], found["kept"], found["dropped"]) == (2, 0, {"bad_row": 1, "not_prepared": 1})


def test_everything_dropped_is_a_problem_with_counts(tmp_path: Path, model_folder: Path, data: Path) -> None:
    picture = look(config_for(tmp_path, model_folder, data, overrides=("data.max_tokens=5",)))
    (problem,) = picture.problems
    assert "40 of 40 rows (100.0%) were dropped" in problem
    assert "raise data.max_tokens" in problem
    found = as_object(picture)
    assert (found["rows"], found["kept"], found["dropped"]) == (40, 0, {"not_prepared": 40})


def test_rows_that_a_template_refuses_are_not_counted_as_good(tmp_path: Path, model_folder: Path) -> None:
    refused = {"messages": [*row()["messages"], {"role": "assistant", "content": "again"}]}
    rows = write(tmp_path / "a.jsonl", refused, refused)
    overrides = ("data.template=chatml", "data.eval=0")
    picture = look(config_for(tmp_path, model_folder, rows, overrides=overrides))
    (problem,) = picture.problems
    assert problem.startswith("2 bad rows of 2:")
    assert ("data", "2 rows read; none could be prepared", "") in list(blocks(picture))
    write(rows, refused, "{")
    picture = look(config_for(tmp_path, model_folder, rows, overrides=overrides))
    assert ("data", "2 rows read, 1 of them unreadable; none could be prepared", "") in list(blocks(picture))


def test_a_base_model_without_template_is_told_so(tmp_path: Path, model_folder: Path, data: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    assert "Set data.template: chatml" in the_problem(config_for(tmp_path, folder, data))
    assert look(config_for(tmp_path, folder, data, overrides=("data.template=chatml",))).problems == []


def edited(model_folder: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(model_folder, target)
    config = target / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return target


def test_examples_beyond_the_context_are_a_problem(tmp_path: Path, model_folder: Path, data: Path) -> None:
    folder = edited(model_folder, tmp_path / "short", max_position_embeddings=16)
    assert the_problem(config_for(tmp_path, folder, data)).endswith("context ends at 16. Set data.max_tokens: 16.")


def test_unknown_kinds_of_model(tmp_path: Path, model_folder: Path, data: Path) -> None:
    custom = edited(
        model_folder, tmp_path / "own", model_type="own_kind", auto_map={"AutoModelForCausalLM": "modeling.Own"}
    )
    problem = next(p for p in look(config_for(tmp_path, custom, data)).problems if "trust_remote_code" in p)
    assert "Read that code, then set model.trust_remote_code: true" in problem
    encoder = edited(model_folder, tmp_path / "encoder", model_type="t5")
    assert any(
        "is an encoder-decoder, and only decoder-only" in p for p in look(config_for(tmp_path, encoder, data)).problems
    )


def test_a_grown_vocabulary_is_noted(tmp_path: Path, model_folder: Path, data: Path) -> None:
    folder = edited(model_folder, tmp_path / "small", vocab_size=64)
    picture = look(config_for(tmp_path, folder, data))
    assert any("the model's embedding 64 rows: it is grown" in note for note in picture.notes)


def test_missing_packages(tmp_path: Path, model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sft.needed

    monkeypatch.setattr(sft.needed, "find_spec", lambda name: None)
    overrides = ("model.tuning=qlora", "optim.type=adamw_8bit", "log.trackers=[tensorboard]")
    problems = look(config_for(tmp_path, model_folder, data, overrides=overrides)).problems
    assert [problem.split(":")[0] for problem in problems] == ["model.tuning", "optim.type", "log.trackers"]


def test_an_adapter_that_is_none(tmp_path: Path, model_folder: Path, data: Path) -> None:
    problem = the_problem(config_for(tmp_path, model_folder, data, overrides=(f"model.adapter={tmp_path}",)))
    assert problem.startswith("model.adapter: ")


@pytest.mark.parametrize("key", ["targets", "modules_to_save"])
def test_modules_that_the_model_lacks_are_a_problem(tmp_path: Path, model_folder: Path, data: Path, key: str) -> None:
    lora = ("model.tuning=lora", f"model.lora.{key}=[q_projj]")
    problem = the_problem(config_for(tmp_path, model_folder, data, overrides=lora))
    assert problem.startswith(f"model.lora.{key}: no module of this model is named 'q_projj'. Did you mean 'q_proj'?")
    right = ("model.tuning=lora", "model.lora.targets=[q_proj, v_proj]", "model.lora.modules_to_save=[lm_head]")
    assert look(config_for(tmp_path, model_folder, data, overrides=right)).problems == []


def test_rows_that_are_trained_and_scored_are_named(tmp_path: Path, model_folder: Path) -> None:
    train = write(tmp_path / "a.jsonl", *(row(number) for number in range(30)), row(0))
    scored = write(tmp_path / "b.jsonl", *(row(number) for number in range(28, 60)))
    warnings = look(config_for(tmp_path, model_folder, train, overrides=(f"data.eval={scored}",))).warnings
    assert warnings == [
        "data.eval: 2 of 32 evaluation rows are trained on as well: their loss says little",
        "data.train: 1 of 31 rows are copies of other rows",
    ]


def test_empty_answers_are_counted_in_a_warning(tmp_path: Path, model_folder: Path, data: Path) -> None:
    def warned(file: Path) -> list[str]:
        return [text for text in look(config_for(tmp_path, model_folder, file)).warnings if "empty" in text]

    assert warned(data) == []
    mixed = write(tmp_path / "empty.jsonl", *(row(number, "" if number < 3 else "one") for number in range(20)))
    (warning,) = warned(mixed)
    assert warning.startswith("in 3 of 20 examples a single token is trained")


def test_what_is_unwise_is_a_warning(tmp_path: Path, model_folder: Path, data: Path) -> None:
    overrides = ("batch.examples=64", "optim.decay=0.1")
    picture = look(config_for(tmp_path, model_folder, data, overrides=overrides))
    assert picture.problems == []
    unread, noisy, few = picture.warnings
    assert unread.startswith("optim.decay (command line) is set but not read")
    assert few == "batch.examples: a step takes 64 conversations, the data has 36: each epoch is one step"
    assert noisy.startswith("data.eval: 4 held-out conversations")


def test_a_template_that_no_row_needs_is_a_warning(tmp_path: Path, model_folder: Path, data: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", *({"prompt": f"Hello {i}", "completion": " Yes"} for i in range(40)))
    for file, warned in ((pairs, True), (data, False)):
        picture = look(config_for(tmp_path, model_folder, file, overrides=("data.template=chatml",)))
        assert any(text.startswith("data.template: all rows are text") for text in picture.warnings) is warned


def test_files_left_out_of_a_folder_are_noted(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("tools", "dev_tools"):
        write(folder / f"{name}.jsonl", *(row(number) for number in range(20)))
    notes = look(config_for(tmp_path, model_folder, folder)).notes
    assert any("dev_tools.jsonl (validation)" in note for note in notes)


def test_trained_tokens_are_those_that_training_counts(tmp_path: Path, model_folder: Path) -> None:
    """Rows whose first token is trained, though nothing predicts it."""
    texts = write(tmp_path / "texts.jsonl", *({"text": "Hello world" + " one" * (number % 5)} for number in range(20)))
    chats = write(tmp_path / "chats.jsonl", *(row(number) for number in range(20)))
    overrides = ("data.train_on=all", "data.eval=8", "eval.every=0", "eval.samples=0", "save.every=0")
    loaded = config_for(tmp_path, model_folder, texts, chats, overrides=overrides)
    report = look(loaded).report
    whole = report["tokens"] + report["eval"]["tokens"]
    assert report["trained_tokens"] + report["eval"]["trained_tokens"] == whole - 40
    assert train(loaded) == EXIT_DONE
    events = [json.loads(line) for line in (loaded.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    scored = [event for event in events if event["event"] == "eval"]
    assert trained[-1]["trained_tokens"] == report["trained_tokens"]
    assert scored[-1]["tokens"] == report["eval"]["trained_tokens"]


def test_a_tiny_share_of_trained_tokens_is_a_warning(tmp_path: Path, model_folder: Path) -> None:
    long = [row(number) for number in range(30)]
    for one in long:
        one["messages"][0]["content"] += " one" * 200
    picture = look(config_for(tmp_path, model_folder, write(tmp_path / "a.jsonl", *long)))
    assert picture.warnings[0].startswith("only 0.96% of the tokens are trained (data.train_on: auto).")


def test_too_little_memory(tmp_path: Path, model_folder: Path, data: Path) -> None:
    picture = look(config_for(tmp_path, model_folder, data, overrides=("model.tuning=full",)))
    memory = Memory(weights=40 * 2**30, gradients=20 * 2**30, optimizer=20 * 2**30, activations=2**30, logits=0)
    for available, devices, problems, warnings in ((100, 1, 0, 0), (80, 1, 0, 1), (70, 1, 1, 0), (70, 2, 0, 1)):
        fresh = Picture(picture.config, picture.path, picture.run_dir)
        _judge_memory(fresh, memory, available * 2**30, devices)
        assert (len(fresh.problems), len(fresh.warnings)) == (problems, warnings), available
    _judge_memory(picture, memory, 70 * 2**30, 1)
    assert "need about 80.0 GiB, and CPU has 70.0 GiB free. Use model.tuning: lora or qlora" in picture.problems[-1]


def test_too_little_disk(tmp_path: Path, model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sft.space

    monkeypatch.setattr(sft.space, "free_bytes", lambda folder: 1000)
    assert "too little disk space" in the_problem(config_for(tmp_path, model_folder, data))


SHORT = ("train.max_steps=3", "eval.samples=0", "save.every=1", "optim.schedule=constant", "model.precision=fp32")


@pytest.fixture
def run_there(tmp_path: Path, model_folder: Path, data: Path, own_cache: None) -> LoadedConfig:
    """A config beside the run that finished by it."""
    loaded = config_for(tmp_path, model_folder, data, overrides=SHORT)
    assert train(loaded) == EXIT_DONE
    return loaded


def test_a_run_that_is_there_is_noted(tmp_path: Path, model_folder: Path, data: Path, run_there: LoadedConfig) -> None:
    assert any("holds a finished run (step 3): sft train leaves it as it is" in note for note in look(run_there).notes)
    longer = look(config_for(tmp_path, model_folder, data, overrides=(*SHORT, "train.max_steps=5")))
    assert any("a run that finished at step 3: sft train continues it to step 5" in note for note in longer.notes)
    assert longer.problems == []
    status = json.loads((run_there.run_dir / "status.json").read_text())
    (run_there.run_dir / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
    assert any("a run that is stopped at step 3: sft train continues it" in note for note in look(run_there).notes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            ("optim.lr=0.5", "model.lora.rank=3", "eval.samples=1"),
            ["model.lora.rank: 16 -> 3", "optim.lr: 0.0002 -> 0.5"],
        ),
        (("data.train_on=all",), ["data.content: ", "data.train_on: auto -> all"]),
        (("data.train.0.limit=30", "save.best=eval.loss"), ["data.content: ", "data.eval.content: "]),
    ],
)  # fmt: skip
def test_changes_that_training_would_refuse_are_problems_in_its_words(
    tmp_path: Path, model_folder: Path, data: Path, run_there: LoadedConfig, changes: tuple[str, ...], named: list[str]
) -> None:
    changed = config_for(tmp_path, model_folder, data, overrides=(*SHORT, *changes))
    said = the_problem(changed)
    with pytest.raises(ResumeError) as refused:
        train(changed)
    assert str(refused.value) == said
    assert [line for line in said.splitlines() if line.startswith("  ")] == [
        next(line for line in said.splitlines() if line.startswith("  " + start)) for start in named
    ]
    bad = write(tmp_path / "bad.jsonl", "{")
    partial = look(config_for(tmp_path, model_folder, data, bad, overrides=(*SHORT, "optim.lr=0.5")))
    assert len(partial.problems) == 2, "rows that cannot be read, and the change; not what the missing rows change"
    assert "optim.lr: 0.0002 -> 0.5" in partial.problems[1]
    assert "content" not in partial.problems[1]


def test_lost_checkpoints_are_a_problem_in_training_s_words(run_there: LoadedConfig) -> None:
    shutil.rmtree(run_there.run_dir / "checkpoints")
    shutil.rmtree(run_there.run_dir / "final")
    said = the_problem(run_there)
    assert "this run came to step 3, but " in said
    with pytest.raises(ResumeError) as refused:
        train(run_there)
    assert str(refused.value) == said


def test_the_picture_on_paper(tmp_path: Path, model_folder: Path, data: Path) -> None:
    stream = io.StringIO()
    print_picture(look(config_for(tmp_path, model_folder, data)), stream)
    lines = {line[:11].strip(): line[11:] for line in stream.getvalue().splitlines() if line[:11].strip()}
    assert list(lines) == [
        "config", "model", "tuning", "data", "held out", "lengths", "template", "stops at", "steps", "memory", "disk",
        "warning",
    ]  # fmt: skip
    assert lines["held out"] == "4 conversations, 72 tokens, 16 of them scored"
    assert lines["template"] == (
        "model, data.train_on: auto; proven for all 40 examples: each trained span decodes to its message"
    )
    assert lines["steps"] == ("5 of 8 conversations, about 144 tokens each; 1 epoch of 5; checkpoint every 1")
    assert stream.getvalue().splitlines()[-1].strip().startswith("No problems. Look at the data: sft preview ")
    assert "\x1b[" not in stream.getvalue()


def test_large_numbers() -> None:
    assert [large(n) for n in (999, 27_168, 134_515_008, 8_030_261_248)] == ["999", "27.2 k", "134.5 M", "8.0 B"]


def sharded(model_folder: Path, to: Path) -> Path:
    from transformers import AutoModelForCausalLM

    folder = edited(model_folder, to)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def test_missing_and_cut_files_of_weights_are_problems(tmp_path: Path, model_folder: Path, data: Path) -> None:
    folder = sharded(model_folder, tmp_path / "shards")
    config = config_for(tmp_path, folder, data)
    whole = look(config)
    assert whole.problems == []
    assert whole.parameters == look(config_for(tmp_path, model_folder, data)).parameters
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) >= 2
    kept = (folder / names[1]).read_bytes()
    (folder / names[1]).unlink()
    assert the_problem(config) == (
        f"model.name: {folder} lacks {names[1]} (1 of the {len(names)} files that model.safetensors.index.json lists). "
        "Fetch what is missing, or the model again."
    )
    (folder / names[1]).write_bytes(kept[:-1])
    assert f"{names[1]} was cut: it has {len(kept) - 1:,} bytes, and {len(kept):,} by its header" in the_problem(config)
    (folder / names[1]).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is no safetensors file, or was cut. Fetch it again." in the_problem(config)
    (folder / names[1]).write_bytes(kept)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "has no weight_map" in the_problem(config)
    index.unlink()
    assert "but neither model.safetensors nor model.safetensors.index.json" in the_problem(config)


def test_a_missing_shard_ends_check_with_2(tmp_path: Path, model_folder: Path, data: Path) -> None:
    from jobs import run_cli

    folder = sharded(model_folder, tmp_path / "shards")
    missing = sorted(folder.glob("*.safetensors"))[-1]
    missing.unlink()
    config_for(tmp_path, folder, data)
    result = run_cli("check", str(tmp_path / "my.yaml"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert missing.name in "".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize("targets", ["[embed_tokens,q_proj]", "'.*(embed_tokens|q_proj)'", "[lm_head]"])
def test_a_tied_pair_that_is_trained_apart_is_noted(
    tmp_path: Path, model_folder: Path, data: Path, targets: str
) -> None:
    overrides = ("model.tuning=lora", f"model.lora.targets={targets}")
    picture = look(config_for(tmp_path, model_folder, data, overrides=overrides))
    assert picture.problems == []
    assert any("embed_tokens and lm_head of this model share their weights" in note for note in picture.notes)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("t5", "is an encoder-decoder, and only decoder-only language models are trained"),
        ("mistral3", "is a vision-language model, which transformers"),
        ("swin", "does not know as a causal language model"),
    ],
)
def test_loading_and_checking_say_the_same_of_models_that_are_no_language_models(
    tmp_path: Path, model_folder: Path, data: Path, kind: str, told: str
) -> None:
    """`train` said "Give a hub id that this machine can reach" of a folder that was there, and named no cure."""
    from transformers import AutoConfig

    from sft.errors import ModelError
    from sft.model import load_base

    folder = tmp_path / kind
    shutil.copytree(model_folder, folder)
    (folder / "config.json").unlink()
    AutoConfig.for_model(kind).save_pretrained(folder)
    (problem,) = [p for p in look(config_for(tmp_path, folder, data)).problems if told in p]
    with pytest.raises(ModelError) as caught:
        load_base(str(folder))
    assert str(caught.value) == problem
    assert "newer transformers" not in problem or kind == "swin"
