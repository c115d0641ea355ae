"""FSDP2's pieces on CPU: training, whole state by name, and loading it back, in two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft.accelerator import shard_in
from sft.needed import lacking


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


def test_what_fsdp_cannot_do_here_is_refused() -> None:
    def said(optimizer: str = "adamw", **environ: str) -> list[str]:
        return list(map(str, lacking(tunings=["full"], optimizers=[optimizer], environ=environ)))

    first, second = (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"},
    )
    assert "fsdp_version: 2" in said(**first)[0]
    assert said("adamw_8bit", **second) == [
        "optim.type: adamw_8bit cannot be sharded by FSDP. Write optim.type: adamw."
    ]
    assert len(said("adamw_8bit", **first)) == 2
    assert said(**second) == said("adamw_8bit") == []


def test_fsdp_is_given_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for accelerate's Accelerator, which takes a plugin for FSDP only where there are GPUs."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.mixed_precision_policy is None
    for precision, gathered in (("fp32", None), ("mixed", torch.bfloat16), ("bf16", None)):
        shard_in(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), precision)
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (gathered, torch.float32, None)
    shard_in(SimpleNamespace(state=SimpleNamespace()), "mixed")  # no plugin: one process, or DDP
