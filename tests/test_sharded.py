"""FSDP2's pieces on CPU: training, whole state by name, and loading it back, in two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.accelerator import sharding
from sft.config import Config
from sft.errors import ConfigError, DeviceError


@pytest.mark.dist
def test_a_sharded_trainee_saves_and_loads_as_a_whole_one(model_folder: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("sharded_job.py")
    result = subprocess.run(
        [sys.executable, *command, str(script), str(model_folder)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "FSDP_VERSION": "2"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sharded state is exact") == 2
    assert result.stdout.count("mixed precision keeps float32 sums") == 2


def test_what_fsdp_cannot_do_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**optim: str) -> Config:
        return Config.model_validate({"model": {"name": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "optim": optim})

    with pytest.raises(DeviceError, match=r"fsdp_version: 2"):
        sharding(config(), "mixed")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=r"optim\.type: adamw_8bit cannot be sharded"):
        sharding(config(type="adamw_8bit"), "mixed")
    assert sharding(config(), "fp32").mixed_precision_policy.param_dtype is None
