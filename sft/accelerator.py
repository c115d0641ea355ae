"""What the launcher set up, as this trainer uses it: the process group, its devices, and how a model is sharded."""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.config import Config
from sft.devices import training_device
from sft.errors import ConfigError, DeviceError
from sft.watchdog import STALL_SECONDS

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

# Longer than any phase that the watchdog lets rank 0 take alone: it judges, and names the phase.
GROUP_TIMEOUT = timedelta(seconds=6 * STALL_SECONDS)


def make_accelerator(config: Config, run_dir: Path) -> Any:
    """The process group and devices as the launcher set them up; every choice that matters here is passed by hand."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    for tracker in config.log.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"log.trackers: {tracker} is not installed. Install it (pip install {tracker}) or drop it."
            )
    return Accelerator(
        # Without this, accelerate overlooks the ranks of a launch on a machine without GPUs.
        cpu=training_device().type == "cpu",
        mixed_precision="no",  # autocast is the trainee's
        fsdp_plugin=sharding(config) if is_sharded_launch() else None,
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would divide gradients behind our back.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=GROUP_TIMEOUT),
        ],
        log_with=list(config.log.trackers) or None,
        project_dir=str(run_dir),
    )


def sharding(config: Config) -> Any:
    """FSDP2 as the launcher's config file says, but for its precision, which `shard_in` gives it. Raises DeviceError
    for FSDP's first version, ConfigError for an optimizer that it cannot shard."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION") != "2":
        raise DeviceError(
            "accelerate's config asks for FSDP's first version. Set fsdp_version: 2 there, as "
            "configs/accelerate/fsdp2.yaml does."
        )
    if config.optim.type != "adamw":
        raise ConfigError(f"optim.type: {config.optim.type} cannot be sharded by FSDP. Write optim.type: adamw.")
    return FullyShardedDataParallelPlugin()


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


def is_sharded_launch() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def unused_gpus_hint(config: str) -> str | None:
    """The line that uses all GPUs, where one process runs beside idle ones."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return (
            f"{count} GPUs here, 1 in use. To use all: accelerate launch --num_processes {count} -m sft train {config}"
        )
    return None
