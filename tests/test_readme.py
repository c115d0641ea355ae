"""The README's commands exist with the options that it gives them, its configs load, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from sft.__main__ import app
from sft.configfile import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.removeprefix("$ ").split("#")[0].strip() for line in README.splitlines() if line.startswith("$ ")]
COMMANDS = [line for line in LINES if re.search(r"\bsft (?!FOLDER)", line) and "pip" not in line]


def test_there_are_commands_to_test() -> None:
    names = {re.split(r"\bsft ", line)[-1].split()[0] for line in COMMANDS}
    assert {"init", "check", "preview", "train", "eval", "chat", "export", "sweep"} <= names


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_of_ours(line: str) -> None:
    words = shlex.split(re.split(r"\bsft ", line)[-1])
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("scripts/", ".venv/"))])
def test_a_script_is_there(line: str) -> None:
    name = line.split()[0]
    assert name.startswith(".venv/") or (ROOT / name).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)h][^)]*)\)", README))))
def test_a_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", [b for b in BLOCKS if "space:" not in b])
def test_a_config_loads(block: str, tmp_path: Path) -> None:
    file = tmp_path / "readme.yaml"
    file.write_text(block if "model:" in block else f"model: {{name: x}}\n{block}")
    load_config(file)


@pytest.mark.parametrize("block", [b for b in BLOCKS if "space:" in b])
def test_a_sweep_loads(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.sweepfile import load_sweep

    monkeypatch.chdir(ROOT)
    file = tmp_path / "sweep.yaml"
    file.write_text(block)
    assert load_sweep(str(file)).total == 14
