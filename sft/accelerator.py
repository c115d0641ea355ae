"""What the launcher set up, as this trainer uses it: the process group, its devices, and how a model is sharded."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.config import Config
from sft.devices import training_device
from sft.needed import is_sharded_launch
from sft.watchdog import STALL_SECONDS

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

# Longer than any phase that the watchdog lets rank 0 take alone: it judges, and names the phase.
GROUP_TIMEOUT = timedelta(seconds=6 * STALL_SECONDS)


def make_accelerator(config: Config, run_dir: Path) -> Any:
    """The process group and devices as the launcher set them up; every choice that matters here is passed by hand."""
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        FullyShardedDataParallelPlugin,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    return Accelerator(
        # Without this, accelerate overlooks the ranks of a launch on a machine without GPUs.
        cpu=training_device().type == "cpu",
        mixed_precision="no",  # autocast is the trainee's
        fsdp_plugin=FullyShardedDataParallelPlugin() if is_sharded_launch() else None,
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would divide gradients behind our back.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=GROUP_TIMEOUT),
        ],
        log_with=list(config.log.trackers) or None,
        project_dir=str(run_dir),
    )


def shard_in(accelerator: Any, precision: str) -> None:
    """Gives FSDP the precision of the run before `prepare` shards the model; where nothing is sharded, nothing.

    The group of ranks is made before the run folder is read, and the folder may hold another precision than `auto`
    would choose on this device.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.mixed_precision_policy = sharded_precision(precision)


def sharded_precision(precision: str) -> MixedPrecisionPolicy:
    """Gathered weights in bf16 for `mixed`, gradients summed in float32, losses left as they are.

    accelerate's own setting would round all three.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "mixed" else None,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )


def unused_gpus_hint(config: str) -> str | None:
    """The line that uses all GPUs, where one process runs beside idle ones."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return (
            f"{count} GPUs here, 1 in use. To use all: accelerate launch --num_processes {count} -m sft train {config}"
        )
    return None
