"""How many processes an `accelerate launch` line asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.launch import is_launcher, processes_in


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("python /bin/accelerate launch --num_processes 3 -m sft train a.yaml", 3),
        ("/bin/accelerate-launch --num_processes=2 -m sft train a.yaml", 2),
        ("python -m accelerate.commands.launch --num_processes 4 --main_process_port 1 -m sft train a.yaml", 4),
        ("accelerate launch -m sft train a.yaml", None),
        ("torchrun --nproc_per_node 2 -m sft train a.yaml", None),
        ("bash -c something", None),
    ],
)
def test_the_number_of_processes(line: str, count: int | None) -> None:
    assert processes_in(line.split()) == count


def test_the_number_in_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 5\nuse_cpu: true\n"
    )
    assert processes_in(["accelerate", "launch", "--config_file", str(file), "-m", "sft"]) == 5


@pytest.mark.parametrize(
    ("line", "launches"),
    [
        ("python /bin/accelerate launch --num_processes 3 -m sft train a.yaml", True),
        ("/bin/accelerate-launch --num_processes=2 -m sft train a.yaml", True),
        ("python -m accelerate.commands.launch -m sft train a.yaml", True),
        ("python /lib/accelerate/commands/launch.py -m sft train a.yaml", True),
        ("accelerate launch -m sft train a.yaml", True),
        ("accelerate config", False),
        ("python train.py launch", False),
        ("tmux new-session bash", False),
        ("bash", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(line: str, launches: bool) -> None:
    assert is_launcher(line.split()) is launches
