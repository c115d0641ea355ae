"""Cross entropy on trained positions only, in chunks: the full matrix of logits never exists.

M targets, D hidden size, V vocabulary. Results are sums; the caller divides by the weight of the whole step ("count,
then divide": a mean of micro-batch means weighs short answers too much).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor
# Of float32 logits at a time. On a CPU: small enough for caches, large enough for full-speed products. Each chunk reads
# the head, and sums a gradient of its size where it is trained: on a GPU, whose products outrun its memory, chunks are
# a share of the memory there is (1.2 GiB of 80).
CPU_CHUNK_BYTES = 96 * 2**20
GPU_CHUNK_SHARE = 1 / 64


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What models do to logits after the head: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Targets whose float32 logits make one chunk on this device."""
    size = CPU_CHUNK_BYTES
    if device.type == "cuda":
        size = max(size, int(GPU_CHUNK_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return max(16, size // (4 * vocabulary))


def chunks(targets: int, rows: int) -> Iterator[slice]:
    """As few parts of at most `rows` as it takes, nearly equal: a small rest would pass over the head once more,
    at a small product's rate."""
    number = math.ceil(targets / rows)
    for index in range(number):
        yield slice(index * targets // number, (index + 1) * targets // number)


def linear_loss_sum(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """Sum over M of weight * cross entropy of `hidden @ weight.T`: a float32 scalar with gradients.

    Gradients are computed chunk by chunk while the chunk's logits are at hand, so that nothing of size (M, V) is kept
    and no product is done twice (the idea of Liger's fused linear cross entropy, arXiv:2410.10989). Frozen weights
    cost no product.
    """
    loss: Tensor = _LinearLossSum.apply(hidden_MD, weight_VD, targets_M, weights_M)  # type: ignore[no-untyped-call]
    return loss


def head_loss_sum(
    hidden_MD: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, targets_M: Tensor, weights_M: Tensor
) -> Tensor:
    """As `linear_loss_sum` for any `head` from (m, D) to logits (m, V): a chunk is run again in backward."""

    def chunk_loss(hidden_mD: Tensor, targets_m: Tensor, weights_m: Tensor) -> Tensor:
        return (F.cross_entropy(head(hidden_mD).float(), targets_m, reduction="none") * weights_m).sum()

    total = hidden_MD.new_zeros((), dtype=torch.float32) + 0.0 * hidden_MD.float().sum()
    if len(targets_M) == 0:  # the head takes part all the same: DDP and FSDP wait for the gradients of what it trains
        return total + 0.0 * head(hidden_MD.new_zeros(1, hidden_MD.shape[-1])).float().sum()
    rows = chunk_rows(vocabulary, hidden_MD.device)
    for part in chunks(len(targets_M), rows):
        total = total + checkpoint(chunk_loss, hidden_MD[part], targets_M[part], weights_M[part], use_reentrant=False)
    return total


def logits_loss_sum(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """From logits that a model's own forward pass made: (M, V) → float32 scalar."""
    if len(targets_M) == 0:
        return 0.0 * logits_MV.float().sum()
    return (F.cross_entropy(logits_MV.float(), targets_M, reduction="none") * weights_M).sum()


class _LinearLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        compute = hidden_MD.dtype
        weight = weight_VD.to(compute)
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        grad_hidden = torch.zeros_like(hidden_MD) if needs_hidden else None
        grad_weight: Tensor | None = None
        rows = chunk_rows(weight.shape[0], weight.device)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for part in chunks(len(targets_M), rows):
                hidden_mD, targets_m1, weights_m = hidden_MD[part], targets_M[part, None], weights_M[part]
                logs_mV = torch.log_softmax(hidden_mD @ weight.T, dim=-1, dtype=torch.float32)
                total -= (logs_mV.gather(1, targets_m1)[:, 0] * weights_m).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # d loss / d logits = w * (softmax - onehot), written over the logarithms
                grad_mV = logs_mV.exp_()
                grad_mV.scatter_add_(1, targets_m1, torch.full_like(targets_m1, -1, dtype=torch.float32))
                grad_mV = grad_mV.mul_(weights_m[:, None]).to(compute)
                if grad_hidden is not None:
                    grad_hidden[part] = grad_mV @ weight
                if needs_weight:
                    product_VD = grad_mV.T @ hidden_mD
                    # the sum over chunks is kept in the weight's own dtype
                    grad_weight = (
                        product_VD.to(weight_VD.dtype) if grad_weight is None else grad_weight.add_(product_VD)
                    )
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD)
        # Not saved for backward but held: backward scales them in place, since a copy of the head's gradient is a whole
        # pass over memory. So a graph can be walked once only.
        ctx.grads = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_total,), ready = grads, ctx.grads
        assert ready is not None, "linear_loss_sum was walked backward twice"
        ctx.grads = None
        hidden, weight = (None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in ready)
        return hidden, weight, None, None
