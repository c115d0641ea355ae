"""Every config that ships is a config, says nothing that is not read, and the reference knows every key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sft.config import Config, EarlyStopping
from sft.configfile import COMMAND_LINE, load_config
from sft.configkeys import walk_keys
from sft.unread import DEFAULT
from sft.yamltree import dotted, read_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("configs/*.yaml"))
REFERENCE = ROOT / "configs/reference.yaml"
ACCELERATE = sorted(ROOT.glob("configs/accelerate/*.yaml"))


def test_what_is_promised_is_there() -> None:
    assert {path.stem for path in SHIPPED} >= {"quickstart", "full", "lora", "qlora", "base-to-chat", "reference"}
    assert {path.stem for path in ACCELERATE} == {"ddp", "fsdp2"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_it_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    if re.search(r"^(sampler|space):", text, re.MULTILINE):
        pytest.skip("a sweep, which tests of sweeps read")
    loaded = load_config(path.relative_to(ROOT))
    assert loaded.run_dir == Path("runs") / path.stem
    if path != REFERENCE:
        assert loaded.unread == ()
        assert text.startswith("#"), "a shipped config says what it is for"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_data_files_it_names_exist(path: Path) -> None:
    for name in re.findall(r"path: (\S+\.jsonl)", path.read_text()):
        assert path == REFERENCE or (ROOT / name).is_file(), name


@pytest.mark.parametrize(("name", "tuning"), [("full", "full"), ("lora", "lora"), ("qlora", "qlora")])
def test_there_is_one_for_each_tuning(name: str, tuning: str) -> None:
    assert load_config(ROOT / f"configs/{name}.yaml").config.model.tuning == tuning


def test_the_reference_has_every_key_once_with_its_default_and_a_comment() -> None:
    loaded = load_config(REFERENCE)
    unset = [key for key, origin in loaded.origins.items() if origin == DEFAULT]
    assert unset == []
    defaults = Config.model_validate({"model": {"name": "m"}, "data": {"train": ["a"]}})
    for path in walk_keys(defaults):
        if path not in (("run", "dir"), ("model", "name"), ("data", "train", 0, "path")):
            ours, theirs = loaded.config.model_dump(), defaults.model_dump()
            for key in path:
                ours, theirs = ours[key], theirs[key]
            assert ours == theirs, dotted(path)
    lines = REFERENCE.read_text().splitlines()
    tree = read_yaml(REFERENCE)
    assert tree.value["run"]["dir"] is None
    for path, number in tree.lines.items():
        if path and isinstance(path[-1], str) and len(path) > 1:
            assert re.search(r" # \S.*", lines[number - 1]), f"line {number} has no comment: {lines[number - 1]}"


def test_the_reference_shows_what_a_null_section_may_hold() -> None:
    line = next(line for line in REFERENCE.read_text().splitlines() if "early_stopping:" in line)
    for key, value in EarlyStopping().model_dump().items():
        assert f"{key}: {value}" in line


def test_the_reference_lists_every_choice() -> None:
    schema = json.dumps(Config.model_json_schema())
    text = REFERENCE.read_text()
    choices = {
        choice for group in re.findall(r'"enum": \[([^\]]*)\]', schema) for choice in re.findall(r'"(\w+)"', group)
    }
    assert {choice for choice in choices if not re.search(rf"\b{choice}\b", text)} == set()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert settings.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem]
    assert settings.mixed_precision == "no", "the config's model.precision decides"
    if path.stem == "fsdp2":
        assert settings.fsdp_config["fsdp_version"] == 2
        assert settings.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


def test_any_key_of_a_shipped_config_can_be_overridden() -> None:
    loaded = load_config(REFERENCE, ["optim.lr=1e-4", "data.train.0.limit=100"])
    assert (loaded.origins["optim.lr"], loaded.origins["data.train.0.limit"]) == (COMMAND_LINE, COMMAND_LINE)
