"""Causal attention within one long example in plain products, a block of queries at a time.

On CPUs the plain bfloat16 products reach more of the machine than the fused kernel does, and on every device they serve
soft caps and sinks, which no fused kernel knows, without a matrix of size T x T. A block of queries meets only the keys
that it may see: the prefix up to its own end, or the part of it within the window. For the backward pass only query,
key and value are kept, O(T), and each block's shares are computed anew, as FlashAttention-2 does (arXiv:2307.08691), by
the same operations, so that they are the same to the bit.

Suffixes: K key heads, G query heads that share one of them, T tokens, D head size (that of the values may differ),
B queries of a block, R = G * B, which go into one product, L keys that a block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 128
CUDA_BLOCK = 512  # fewer, larger kernels

Tensor = torch.Tensor


class Settings(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None
    block: int


class Block(NamedTuple):
    """Queries `rows` see keys within `keys`, which end where the queries end."""

    rows: slice
    keys: slice


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_long(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D) of one dtype, H a multiple of K → (1, H, T, D of the values).

    A window of w sees itself and w - 1 tokens before. Soft cap: cap * tanh(scores / cap). Sinks: one extra score a
    head, dropped after the softmax. Not for torch.compile, which would unroll the blocks and compile anew for each
    length. Differentiable once.
    """
    groups = query.shape[1] // key.shape[1]
    # contiguous once: every key is read by many blocks
    query_KGTD = query[0].contiguous().view(key.shape[1], groups, *query.shape[2:])
    key_KTD, value_KTD = key[0].contiguous(), value[0].contiguous()
    sinks_KG = None if sinks_H is None else sinks_H.to(query.dtype).view(key.shape[1], groups)
    block = block or (CUDA_BLOCK if query.is_cuda else BLOCK)
    settings = Settings(scale, window, softcap, block)
    out_KGTD: Tensor = _LongAttention.apply(query_KGTD, key_KTD, value_KTD, sinks_KG, settings)  # type: ignore[no-untyped-call]
    return out_KGTD.flatten(0, 1)[None]


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_KGTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        sinks_KG: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        ctx.save_for_backward(query_KGTD, key_KTD, value_KTD, sinks_KG)
        ctx.settings = settings
        out_KGTD = query_KGTD.new_empty(*query_KGTD.shape[:3], value_KTD.shape[-1])
        for part in _blocks(query_KGTD.shape[2], settings):
            scores_KRL = _scores(_rows(query_KGTD, part), key_KTD, part, settings)
            shares_KRL = _softmax(scores_KRL, sinks_KG)[..., : scores_KRL.shape[-1]]
            _put_rows(out_KGTD, part, torch.bmm(shares_KRL, value_KTD[:, part.keys]))
        return out_KGTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_KGTD: Tensor) -> tuple[Tensor | None, ...]:
        query_KGTD, key_KTD, value_KTD, sinks_KG = ctx.saved_tensors
        settings: Settings = ctx.settings
        grad_query_KGTD = torch.empty_like(query_KGTD)
        # many blocks add to the gradients of one key and one sink: in float32 at least
        wide = torch.promote_types(key_KTD.dtype, torch.float32)
        grad_key_KTD, grad_value_KTD = (torch.zeros_like(kept, dtype=wide) for kept in (key_KTD, value_KTD))
        grad_sinks_KG = None if sinks_KG is None else torch.zeros_like(sinks_KG, dtype=wide)
        for part in _blocks(query_KGTD.shape[2], settings):
            query_KRD, grad_KRD = _rows(query_KGTD, part), _rows(grad_out_KGTD, part)
            scores_KRL = _scores(query_KRD, key_KTD, part, settings)
            shares = _softmax(scores_KRL, sinks_KG)  # (K, R, L), or L + 1 with a sink
            shares_KRL = shares[..., : scores_KRL.shape[-1]]
            grad_value_KTD[:, part.keys] += torch.bmm(shares_KRL.mT, grad_KRD)
            grad_shares_KRL = torch.bmm(grad_KRD, value_KTD[:, part.keys].mT)
            if grad_sinks_KG is not None:
                grad_shares_KRL = F.pad(grad_shares_KRL, (0, 1))  # nothing is read from a sink
            # shares * (grad - sum of shares * grad), the sum in float32
            grad_scores_KRL = torch._softmax_backward_data(grad_shares_KRL, shares, -1, shares.dtype)
            if grad_sinks_KG is not None:
                grad_sinks_KG += grad_scores_KRL[..., -1].view(*grad_sinks_KG.shape, -1).sum(-1, dtype=wide)
                grad_scores_KRL = grad_scores_KRL[..., :-1]
            if settings.softcap is not None:  # the slope of tanh; the hidden scores are minus infinity
                tanh_KRL = scores_KRL.clamp_(min=-settings.softcap).div_(settings.softcap)
                grad_scores_KRL = grad_scores_KRL * (1 - tanh_KRL * tanh_KRL)
            _put_rows(grad_query_KGTD, part, _scaled_bmm(grad_scores_KRL, key_KTD[:, part.keys], settings.scale))
            grad_key_KTD[:, part.keys] += _scaled_bmm(grad_scores_KRL.mT, query_KRD, settings.scale)
        grad_sinks = None if grad_sinks_KG is None else grad_sinks_KG.to(sinks_KG.dtype)
        return grad_query_KGTD, grad_key_KTD.to(key_KTD.dtype), grad_value_KTD.to(value_KTD.dtype), grad_sinks, None


def _blocks(length: int, settings: Settings) -> Iterator[Block]:
    for start in range(0, length, settings.block):
        end = min(start + settings.block, length)
        first = 0 if settings.window is None else max(0, start - settings.window + 1)
        yield Block(slice(start, end), slice(first, end))


def _scores(query_KRD: Tensor, key_KTD: Tensor, part: Block, settings: Settings) -> Tensor:
    """(K, R, L): capped, minus infinity where hidden."""
    scores_KRL = _scaled_bmm(query_KRD, key_KTD[:, part.keys].mT, settings.scale)
    if settings.softcap is not None:
        scores_KRL.div_(settings.softcap).tanh_().mul_(settings.softcap)
    rows, window, device = part.rows.stop - part.rows.start, settings.window, query_KRD.device
    scores_KGBL = scores_KRL.view(scores_KRL.shape[0], -1, rows, scores_KRL.shape[-1])
    places_B1 = torch.arange(part.rows.start, part.rows.stop, device=device)[:, None]
    _hide(scores_KGBL[..., part.rows.start - part.keys.start :], places_B1 < places_B1.T)
    if window is not None and part.rows.stop - window > part.keys.start:  # the last rows no longer see the first keys
        first_seen_by_all = part.rows.stop - window
        passed = torch.arange(part.keys.start, first_seen_by_all, device=device) <= places_B1 - window
        _hide(scores_KGBL[..., : first_seen_by_all - part.keys.start], passed)
    return scores_KRL


def _softmax(scores_KRL: Tensor, sinks_KG: Tensor | None) -> Tensor:
    """(K, R, L), or (K, R, L + 1) with the sink's share; in the dtype of the scores, summed in float32 at least."""
    if sinks_KG is not None:
        rows = scores_KRL.shape[1] // sinks_KG.shape[1]
        scores_KRL = torch.cat([scores_KRL, sinks_KG.repeat_interleave(rows, dim=1)[..., None]], dim=-1)
    return torch.softmax(scores_KRL, dim=-1)


def _hide(scores: Tensor, hidden: Tensor) -> None:
    scores.masked_fill_(hidden, float("-inf"))


def _rows(tensor_KGTD: Tensor, part: Block) -> Tensor:
    """(K, R, D): a block's rows, head after head."""
    return tensor_KGTD[:, :, part.rows].flatten(1, 2)


def _put_rows(tensor_KGTD: Tensor, part: Block, rows_KRD: Tensor) -> None:
    block_KGBD = tensor_KGTD[:, :, part.rows]
    block_KGBD.copy_(rows_KRD.view(block_KGBD.shape))


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, rounded once."""
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=scale)
