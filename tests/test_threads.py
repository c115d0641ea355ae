"""The number of threads decides the last bits on a CPU: it is recorded, and kept where a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jobs import run_here, write_config

from sft.report import read_config_lines


@pytest.fixture(autouse=True)
def as_before(own_cache: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def recorded(run: Path) -> tuple[str, str]:
    (line,) = [line for line in read_config_lines(run / "config.yaml") if line.key == "run.threads"]
    return line.value, line.resolved


def test_threads_are_recorded_and_kept_when_the_run_goes_on(tmp_path: Path, model_folder: Path) -> None:
    config = write_config(tmp_path, model_folder, optim__schedule="constant", data__eval=0)
    torch.set_num_threads(3)
    run = run_here(config, "train.max_steps=1")
    assert recorded(run) == ("auto", "3")
    torch.set_num_threads(1)  # as if started again with another OMP_NUM_THREADS
    run_here(config, "train.max_steps=2")
    assert torch.get_num_threads() == 3
    assert recorded(run) == ("auto", "3")
    run_here(config, "train.max_steps=3", "run.threads=2")  # it moves no weight but by its last bits: free to change
    assert torch.get_num_threads() == 2
