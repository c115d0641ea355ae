"""Causal attention within one long example in plain products, a block of queries at a time.

On CPUs the plain bfloat16 products reach more of the machine than the fused kernel does. A block of queries meets only
the keys that it may see: the prefix up to its own end, or the part of it within the window. For the backward pass only
query, key and value are kept, O(T), and each block's shares are computed anew, as FlashAttention-2 does
(arXiv:2307.08691), by the same operations, so that they are the same to the bit.

Suffixes: K key heads, G query heads that share one of them, T tokens, D head size (that of the values may differ),
B queries of a block, R = G * B, which go into one product, L keys that a block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

BLOCK = 128

Tensor = torch.Tensor


class Block(NamedTuple):
    """Queries `rows` see keys within `keys`, which end where the queries end."""

    rows: slice
    keys: slice


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_long(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None, block: int = BLOCK
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D) of one dtype, H a multiple of K → (1, H, T, D of the values).

    A window of w sees itself and w - 1 tokens before. Not for torch.compile, which would unroll the blocks and compile
    anew for each length. Differentiable once.
    """
    groups = query.shape[1] // key.shape[1]
    # contiguous once: every key is read by many blocks
    query_KGTD = query[0].contiguous().view(key.shape[1], groups, *query.shape[2:])
    key_KTD, value_KTD = key[0].contiguous(), value[0].contiguous()
    out_KGTD: Tensor = _LongAttention.apply(query_KGTD, key_KTD, value_KTD, scale, window, block)  # type: ignore[no-untyped-call]
    return out_KGTD.flatten(0, 1)[None]


class _LongAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_KGTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, window: int | None, block: int
    ) -> Tensor:
        ctx.save_for_backward(query_KGTD, key_KTD, value_KTD)
        ctx.settings = (scale, window, block)
        out_KGTD = query_KGTD.new_empty(*query_KGTD.shape[:3], value_KTD.shape[-1])
        for part in _blocks(query_KGTD.shape[2], window, block):
            shares_KRL = _shares(_rows(query_KGTD, part), key_KTD, part, scale, window)
            _put_rows(out_KGTD, part, torch.bmm(shares_KRL, value_KTD[:, part.keys]))
        return out_KGTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_KGTD: Tensor) -> tuple[Tensor | None, ...]:
        query_KGTD, key_KTD, value_KTD = ctx.saved_tensors
        scale, window, block = ctx.settings
        grad_query_KGTD = torch.empty_like(query_KGTD)
        # many blocks add to one key's gradient: in float32 at least
        wide = torch.promote_types(key_KTD.dtype, torch.float32)
        grad_key_KTD, grad_value_KTD = (torch.zeros_like(kept, dtype=wide) for kept in (key_KTD, value_KTD))
        for part in _blocks(query_KGTD.shape[2], window, block):
            query_KRD, grad_KRD = _rows(query_KGTD, part), _rows(grad_out_KGTD, part)
            shares_KRL = _shares(query_KRD, key_KTD, part, scale, window)
            grad_value_KTD[:, part.keys] += torch.bmm(shares_KRL.mT, grad_KRD)
            grad_shares_KRL = torch.bmm(grad_KRD, value_KTD[:, part.keys].mT)
            # shares * (grad - sum of shares * grad), the sum in float32
            grad_scores_KRL = torch._softmax_backward_data(grad_shares_KRL, shares_KRL, -1, shares_KRL.dtype)
            _put_rows(grad_query_KGTD, part, _scaled_bmm(grad_scores_KRL, key_KTD[:, part.keys], scale))
            grad_key_KTD[:, part.keys] += _scaled_bmm(grad_scores_KRL.mT, query_KRD, scale)
        return grad_query_KGTD, grad_key_KTD.to(key_KTD.dtype), grad_value_KTD.to(value_KTD.dtype), None, None, None


def _blocks(length: int, window: int | None, block: int) -> Iterator[Block]:
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield Block(slice(start, end), slice(first, end))


def _shares(query_KRD: Tensor, key_KTD: Tensor, part: Block, scale: float, window: int | None) -> Tensor:
    """(K, R, L): the softmax of the visible scores, in the dtype of the query; its sums are in float32 at least."""
    scores_KRL = _scaled_bmm(query_KRD, key_KTD[:, part.keys].mT, scale)
    rows = part.rows.stop - part.rows.start
    scores_KGBL = scores_KRL.view(scores_KRL.shape[0], -1, rows, scores_KRL.shape[-1])
    places_B1 = torch.arange(part.rows.start, part.rows.stop)[:, None]
    _hide(scores_KGBL[..., part.rows.start - part.keys.start :], places_B1 < places_B1.T)
    if window is not None and part.rows.stop - window > part.keys.start:  # the last rows no longer see the first keys
        first_seen_by_all = part.rows.stop - window
        passed = torch.arange(part.keys.start, first_seen_by_all) <= places_B1 - window
        _hide(scores_KGBL[..., : first_seen_by_all - part.keys.start], passed)
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
