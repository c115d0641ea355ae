"""Liger's fused linear cross entropy on CUDA, where it is installed: a kernel makes the loss of a chunk of logits and
their gradient in place, where the plain path of `sft.loss` writes and reads float32 copies of them.

It sums losses without weights and knows no logit scale; whatever needs those takes the plain path. Shapes as in
`sft.loss`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch

from sft.loss import chunk_rows

LossKernel = Literal["plain", "liger"]
KEY = "loss_kernel"  # among what a run records, and for --allow-change
OLDEST = (0, 8, 4)  # before it soft caps counted the padding of the last block; `chunk_mem_const` came with 0.8.3


def unavailable(device_type: str, *, is_sharded: bool) -> str | None:
    """Why the plain path is taken without a word: what this machine or launch is. None where Liger is there."""
    if device_type != "cuda":
        return f"liger-kernel needs CUDA, this is {device_type}"
    if is_sharded:
        return "a sharded model keeps to the plain path"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'sft[liger]'"
    return None


def unfit() -> str | None:
    """What is wrong with the installed liger-kernel; None where nothing is."""
    try:
        version = importlib.metadata.version("liger-kernel")
        if _release(version) < OLDEST:
            return f"liger-kernel {version} is too old: pip install 'sft[liger]'"
        _function()
    except Exception as error:  # a Triton that does not fit shows itself by all kinds
        return f"liger-kernel cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
    return None


def lost(recorded: Mapping[str, Any], device_type: str, *, is_sharded: bool) -> str | None:
    """Why a run that was trained with Liger cannot continue with it here; None where it can, or never did.

    A run that began on the plain path stays there, whatever was installed since.
    """
    if recorded.get(KEY) != "liger":
        return None
    return unavailable(device_type, is_sharded=is_sharded) or unfit()


def serves(hidden_MD: torch.Tensor, weight_VD: torch.Tensor) -> bool:
    """Whether Liger can take these. It divides by M, and trains a head only along with what lies below it."""
    return len(hidden_MD) > 0 and (hidden_MD.requires_grad or not weight_VD.requires_grad)


def fused_loss_sum(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """`linear_loss_sum` with all weights one, of logits capped by `softcap`. A float32 scalar with gradients.

    Under autocast the head is handed over as it is kept, in float32, so that its gradient is summed and returned in
    float32.
    """
    rows = chunk_rows(weight_VD.shape[0], hidden_MD.device)
    loss: torch.Tensor = _function()(
        hidden_MD, weight_VD, targets_M, reduction="sum", softcap=softcap, accum_dtype=torch.float32,
        chunk_mem_const=chunk_factor(len(hidden_MD), hidden_MD.shape[1], weight_VD.shape[0], rows),
    )  # fmt: skip
    return loss


def chunk_factor(targets: int, dim: int, vocabulary: int, rows: int) -> int:
    """Liger's measure of a chunk, for chunks of about `rows` targets (it rounds up to a power of two).

    Its own choice, logits of the size of all features, makes dozens of chunks, each of which reads the head and sums a
    gradient of its size.
    """
    chunks = -(-targets // rows)
    return -(-vocabulary // (dim * chunks))


def _function() -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
