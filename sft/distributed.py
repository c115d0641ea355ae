"""The few collectives that the loop needs, each a no-op in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sft.devices import sums_device

# A gloo group joins its threads where its last reference goes, and holds Python's lock meanwhile; a thread that still
# frees the last collective's tensors waits for that lock, and neither goes on. DDP holds a reference, which goes with
# the model. One more is kept until the interpreter ends, when the threads have long been idle.
_LEFT: list[Any] = []


class LostContact(RuntimeError):
    """Another rank ended, so this one cannot go on. Not the cause: that rank says it, or the system's log does."""

    said = True  # in one line, where it is raised, rather than with a traceback that points at the wrong place


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sums in float64, the same on every rank."""
    if not is_distributed():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=sums_device(device))
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def from_first_rank(value: Any) -> Any:
    """What rank 0 holds, given to all. Plain data only: it travels as JSON, never as a pickle."""
    return gather(value)[0]


def gather(value: Any) -> list[Any]:
    """Every rank's plain value, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    import json

    device = _collective_device()
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()], device=device))
    longest = max(int(size.item()) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [
        json.loads(bytes(part[: int(size.item())].cpu().tolist()).decode())
        for part, size in zip(parts, sizes, strict=True)
    ]


def wait_for_all() -> None:
    if is_distributed():
        dist.barrier()


def leave() -> None:
    """Ends the process group after all ranks are done, rather than wherever the interpreter happens to exit."""
    if is_distributed():
        dist.barrier()
        _LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
