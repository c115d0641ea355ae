"""Which device trains, and sums in float64 where the device has none.

Losses and scores are added up in float64, in which neither the order of micro-batches nor their number shows. Apple's
GPUs know no float64, some of Intel's neither: there the numbers are added on the host.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import lru_cache

import torch

Tensor = torch.Tensor
CPU = torch.device("cpu")


def training_device() -> torch.device:
    """The device of this machine that trains, evaluates and answers, as accelerate chooses it for one process: the
    accelerator that torch finds (CUDA, ROCm, Apple's, Intel's), else the CPU; the CPU too where the launch asks so."""
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on", "t")
    if asked_for_cpu or not torch.accelerator.is_available():
        return CPU
    return torch.accelerator.current_accelerator() or CPU


def device_name(device: torch.device) -> str:
    """What people call it: a GPU's own name, or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return {"cpu": "CPU", "mps": "Apple GPU"}.get(device.type, device.type)


def described(device: torch.device) -> str:
    """The device of a run for its record: a CPU with its kind and the threads in use."""
    if device.type != "cpu":
        return device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@lru_cache(maxsize=8)
def has_float64(device: torch.device) -> bool:
    """Whether the device adds in float64. Asked by trying, but for those that are known to."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.ones(2, device=device).sum(dtype=torch.float64).cpu()
    except (TypeError, RuntimeError):  # Apple's and Intel's answers
        return False
    return True


def zeros_64(count: int, device: torch.device) -> Tensor:
    """(count,) float64 zeros to add to: on the device, or on the host where the device has no float64."""
    return torch.zeros(count, dtype=torch.float64, device=sums_device(device))


def sums_device(device: torch.device) -> torch.device:
    """Where float64 sums of numbers on `device` are kept."""
    return device if has_float64(device) else CPU


def add_to(total: Tensor, values: Tensor) -> None:
    """Adds in place, in the precision of `total`. Waits for the device only where `total` is kept on the host."""
    # first to the host, then wider: one `to` may widen on the device
    total += values if values.device == total.device else values.cpu()


def sums_64(vectors: Sequence[Tensor]) -> Tensor:
    """(n,): the float64 sum of each of n vectors of one length, kept as `zeros_64` is."""
    if has_float64(vectors[0].device):
        return torch.stack([vector.sum(dtype=torch.float64) for vector in vectors])
    return torch.stack([vector.float() for vector in vectors]).cpu().sum(1, dtype=torch.float64)
