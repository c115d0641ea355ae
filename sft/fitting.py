"""The largest micro-batch that fits into memory, found with passes like those of a step.

`largest` is the search, a function of measurements alone; `StepMemory` measures: on CUDA by the allocator's peaks, on
a CPU by the process's growth under the limits that hold for it.
"""

from __future__ import annotations

import errno
import gc
import math
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from sft.data.collate import flat, padded, to_device
from sft.heap import give_back, keep_freed_memory
from sft.limits import resident_bytes, rooms
from sft.trainee import Trainee, loss_sum
from sft.types import Batch, Example

SHARE = 0.9  # of what is free: allocators lose some to gaps
GRAIN = 64
SECONDS = 60.0
_FAILURES = 5
_CPU_MEMORY = re.compile(r"(?i)DefaultCPUAllocator|can't allocate memory|cannot allocate memory|std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by CUDA, by torch's CPU allocator, to Python itself, or by the system to a call."""
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or (isinstance(error, RuntimeError) and _CPU_MEMORY.search(str(error)) is not None)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


@dataclass(frozen=True, slots=True)
class Used:
    """What a pass took: `bytes` for its micro-batch, and the `share` of the room that it needed, all in all."""

    bytes: int
    share: float


@dataclass(frozen=True, slots=True)
class Fit:
    """`tokens` fit. `proven`: passes of that size, or a larger one, were run; else it is drawn from smaller ones."""

    tokens: int
    proven: bool
    bytes_per_token: float


Attempt = Callable[[int], Used | None]


def largest(
    attempt: Attempt,
    *,
    floor: int,
    ceiling: int,
    share: float = SHARE,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Fit | None:
    """The most tokens from `floor` to `ceiling` for which `attempt` succeeds and needs at most `share` of the room.

    `attempt` runs passes over so many tokens; None where memory was refused. Sizes grow at most twofold at a time (to
    128 tokens from the smallest) and only where a straight line through the last two measurements says that they fit,
    so memory is hardly ever exceeded. Where the first pass takes half of the share already, the line starts at zero
    and errs low. None where not even `floor` fits.
    """
    began = clock()
    first = attempt(floor)
    if first is None:
        return None
    took = clock() - began
    points = [(0, Used(0, 0.0)), (floor, first)]
    failures = 0
    while True:
        (n0, u0), (n1, u1) = points[-2:]
        slope = (u1.share - u0.share) / (n1 - n0)
        room = n1 + int((share - u1.share) / slope) if slope > 0 else 2 * n1
        if len(points) == 2 and u1.share < share / 2:  # one measurement draws no line: much of it may be fixed
            room = max(2 * n1, 2 * GRAIN)
        wanted = _rounded(min(room, max(2 * n1, 2 * GRAIN), ceiling), n1)
        if wanted - n1 < max(GRAIN // 2, n1 // 20) and not (wanted == ceiling > n1):
            return Fit(_within(points, floor, share), True, _per_token(points))
        if clock() - began + took * wanted / n1 > seconds:
            guess = min(ceiling, n1 + int(max(0, room - n1) * share))
            return Fit(_rounded(guess, n1), False, _per_token(points))
        started = clock()
        used = attempt(wanted)
        took = clock() - started
        if used is not None:
            points.append((wanted, used))
            continue
        failures += 1
        ceiling = n1 + int(0.7 * (wanted - n1))
        took *= n1 / wanted
        if failures == _FAILURES:
            return Fit(_within(points, floor, share), True, _per_token(points))


def _rounded(tokens: int, least: int) -> int:
    return max(least, tokens - tokens % GRAIN) if tokens > GRAIN else max(least, tokens)


def _within(points: Sequence[tuple[int, Used]], floor: int, share: float) -> int:
    """The last size that ran; where that took more than its share, a smaller one on the line below it."""
    (n0, u0), (n1, u1) = points[-2:]
    most = (1 + share) / 2
    if u1.share <= most or n1 == floor:
        return n1
    return _rounded(max(floor, n0 + int((n1 - n0) * (most - u0.share) / (u1.share - u0.share))), floor)


def _per_token(points: Sequence[tuple[int, Used]]) -> float:
    (n0, u0), (n1, u1) = points[-2:]
    return max(0.0, (u1.bytes - u0.bytes) / (n1 - n0))


@dataclass(frozen=True)
class StepMemory:
    """An `Attempt`: the passes of a step over `tokens` tokens, all trained, in examples of `longest` tokens.

    `missing_bytes`: of optimizer states that are not there yet; they are held during the passes. `passes`: from the
    second on, gradients lie beside the activations. Gradients go to stand-ins of the parameters, so no wrapper (DDP)
    waits for other ranks; `through` is for a sharded model, which all ranks must run together.
    """

    trainee: Trainee
    device: torch.device
    flat_rows: bool
    longest: int | None
    missing_bytes: int = 0
    passes: int = 2
    through: nn.Module | None = None

    def __call__(self, tokens: int) -> Used | None:
        try:
            return self._on_cuda(tokens) if self.device.type == "cuda" else self._on_host(tokens)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # lets go of the tensors that fill the memory
            if self.through is not None:
                reset: Any = getattr(self.through, "reset_iter_state", None)
                if reset is not None:  # FSDP2's state, which a broken pass leaves in the middle
                    reset()
                self.through.zero_grad(set_to_none=True)
            return None

    def _on_cuda(self, tokens: int) -> Used:
        device = self.device
        release(device)
        before = torch.cuda.memory_allocated(device)
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        ballast = torch.empty(self.missing_bytes, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        self._run(tokens)
        peak = torch.cuda.max_memory_allocated(device) - before
        return Used(peak - len(ballast), peak / max(room, 1))

    def _on_host(self, tokens: int) -> Used | None:
        keep_freed_memory()
        release(self.device)
        free = rooms()
        if any(room.kills and self.missing_bytes > SHARE * room.bytes for room in free):
            return None
        before = resident_bytes()
        ballast = torch.ones(self.missing_bytes, dtype=torch.uint8)
        self._run(tokens)
        grown = resident_bytes() - before  # what the passes freed has stayed: this is their peak
        return Used(grown - len(ballast), max(grown / max(room.bytes, 1) for room in free))

    def _run(self, tokens: int) -> None:
        batch = to_device(self._batch(tokens), self.device)
        if self.through is not None:
            for _ in range(self.passes):
                loss_sum(self.through, self.trainee, batch).backward()  # type: ignore[no-untyped-call]
            self.through.zero_grad(set_to_none=True)
            return
        stand_ins = _stand_ins(self.trainee)

        def stand_in(*inputs: Any) -> torch.Tensor:
            loss: torch.Tensor = functional_call(self.trainee, stand_ins, inputs, tie_weights=False)
            return loss

        for _ in range(self.passes):
            loss_sum(stand_in, self.trainee, batch).backward()  # type: ignore[no-untyped-call]

    def _batch(self, tokens: int) -> Batch:
        longest = min(tokens, self.longest or tokens)
        lengths = [longest] * (tokens // longest)
        if self.flat_rows and tokens % longest > 1:
            lengths.append(tokens % longest)
        examples = [Example(np.ones(n, np.int32), np.ones(n, np.float32), "measure") for n in lengths]
        return flat(examples) if self.flat_rows else padded(examples, 0)


def _stand_ins(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that share the trained parameters' memory and take gradients of their own.

    Each module once and each of its parameters by name, tied ones alike: `functional_call` would not put back what it
    finds twice.
    """
    once: dict[int, torch.Tensor] = {}
    named: dict[str, torch.Tensor] = {}
    for name, inner in module.named_modules():
        for own, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                tensor = once.setdefault(id(parameter), parameter.detach().requires_grad_())
                named[f"{name}.{own}" if name else own] = tensor
    return named


def release(device: torch.device) -> None:
    """Gives freed memory back, so that what is free can be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_back()


def peak_gib(device: torch.device) -> float:
    """The most memory so far: of this process on its GPU, or, without one, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return most_resident_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform) / 2**30


def most_resident_bytes(maxrss: int, platform: str) -> int:
    """ru_maxrss in bytes: macOS counts it so (getrusage(2)), Linux in KiB."""
    return maxrss if platform == "darwin" else maxrss * 1024


def local_bytes(tensor: torch.Tensor) -> int:
    """Of this rank's part, where the tensor is sharded."""
    from torch.distributed.tensor import DTensor

    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(part.numel()) * int(part.element_size())


def optimizer_bytes(kind: str, trained_bytes: int, trained_numbers: int) -> int:
    """Two moments of each trained number: in its own precision, in 8 bits, or paged out of the way."""
    return {"adamw": 2 * trained_bytes, "adamw_8bit": math.ceil(2.1 * trained_numbers)}.get(kind, 0)
