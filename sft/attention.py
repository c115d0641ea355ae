"""Attention over flat rows whose examples never see each other, on every device.

Registered with transformers under the name `FLAT`, through its public attention and mask interfaces. A model run
with it takes one row of N tokens (batch size 1) and the keyword arguments of `segments(...)`, which transformers'
models hand down to every attention layer. Cost follows the sum of squared segment lengths.

- CUDA, half precision, no soft cap or sink: PyTorch's variable-length attention (`torch.nn.attention.varlen`).
- CPU, bfloat16: plain products, segment by segment; long segments in blocks (`sft.longattention`).
- elsewhere: scaled dot-product attention, segment by segment.
- soft caps (Gemma 2) and sinks (gpt-oss): written out in plain operations, segment by segment; long ones in blocks.

A model whose attention ignores what is passed here, or mixes tokens in other ways (linear attention, convolutions),
is found out by `sft.isolation`, which compares with the examples run alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from sft.longattention import attend_long

FLAT = "sft_flat"
SHORT_TOKENS = 512
"""From here on computing shares anew, for the causal half, takes no longer than keeping them, for the whole square."""

Tensor = torch.Tensor


def register() -> None:
    """Makes `FLAT` known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FLAT, flat_attention)
    # A mask function must be registered beside the attention, else transformers builds no mask and padding is lost.
    AttentionMaskInterface.register(FLAT, no_mask)


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Flat rows need no mask: segments and causality are the attention's. A padding mask has no place here."""
    assert attention_mask is None, "a padded batch reached the flat attention"


class SegmentLengths:
    """The lengths of a row's segments as the host knows them, so that no layer has to ask the device.

    An object of its own, which whatever moves tensors (DDP, FSDP) leaves where it is, and which torch.compile knows by
    its type alone: a tuple would be compiled anew for each number of segments.
    """

    __slots__ = ("lengths",)

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)


def segments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a model's forward: cumulative ends (S + 1,) int32, the longest segment, and all lengths.

    All names but the last are those that transformers' models pass on to flash attention.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if device.type == "cuda":
        ends = ends.pin_memory().to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
        "segment_lengths": SegmentLengths(lengths),
    }  # fmt: skip


def flat_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    segment_lengths: SegmentLengths | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, N, D), key and value (1, K, N, D) with H a multiple of K → ((1, N, H, D), None)."""
    assert query.shape[0] == 1, "a flat row has batch size 1"
    assert attention_mask is None, "a mask reached the flat attention"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and s_aux is None and dropout == 0.0 and _varlen_serves(query, value):
        if cu_seq_lens_q is None:  # one segment: a plain forward pass of one example
            max_length_q = query.shape[2]
            cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
        assert max_length_q is not None
        out = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scale=scale, window=sliding_window)
        return out[None], None
    options = {"scale": scale, "dropout": dropout, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    out = _by_segments(query, key, value, cu_seq_lens_q, segment_lengths, **options)
    return out, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None,
    known: SegmentLengths | None,
    *,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(1, N, H, D). Not for torch.compile, which would compile anew for each number of segments."""
    attend = _attend_sdpa if softcap is None and sinks is None else _attend_plain
    # split, not slices: the gradient of a slice is a whole row of zeros for every segment
    lengths = known.lengths if known is not None else _lengths_by(ends, query.shape[2])
    rows = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    outs = [
        attend(q, k, v, scale=scale, dropout=dropout, window=window, softcap=softcap, sinks=sinks)
        for q, k, v in zip(*rows, strict=True)
    ]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def _lengths_by(ends: Tensor | None, length: int) -> list[int]:
    """For a plain forward pass of one example, and for models that hand down only what they have a name for. Waits for
    the device."""
    lengths: list[int] = [length] if ends is None else ends.diff().tolist()
    return lengths


def _attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float, window: int | None, **_: Any
) -> Tensor:
    products = query.dtype == torch.bfloat16 and query.device.type == "cpu" and dropout == 0.0
    if products and query.shape[2] > SHORT_TOKENS:
        long: Tensor = attend_long(query, key, value, scale=scale, window=window)
        return long
    mask = _window_mask(query.shape[2], window, query.device)
    if products:
        return _attend_short(query, key, value, mask, scale=scale)
    key, value = _for_each_head(query, key, value)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None
    )


def _attend_short(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, scale: float) -> Tensor:
    """Three plain products. On CPUs bfloat16 matrix kernels run them in less than half the time that the fused kernel
    takes; the T * T shares that are kept for the backward pass are small for short segments. The queries of all heads
    that share a key head (G of them) go into one product, so that nothing is repeated."""
    (heads, length, size), dtype = query.shape[1:], query.dtype
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    bias_RT = _causal_bias(length, groups, dtype) if visible is None else _bias(visible, groups, dtype)  # R = G * T
    query_KRD = query[0].reshape(kv_heads, groups * length, size)
    scores_KRT = torch.baddbmm(bias_RT.expand(kv_heads, -1, -1), query_KRD, key[0].transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores_KRT, dim=-1), value[0]).view(1, heads, length, -1)


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for every query head that shares them."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


@lru_cache(maxsize=64)
def _causal_bias(length: int, groups: int, dtype: torch.dtype) -> Tensor:
    return _bias(torch.ones(length, length, dtype=torch.bool).tril(), groups, dtype)


def _bias(visible: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(G * T, T): 0 where visible, minus infinity elsewhere, the same for each of G groups."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf")).repeat(groups, 1)


def _attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Soft cap: cap * tanh(scores / cap). Sinks: one extra column of scores a head, dropped after the softmax."""
    length = query.shape[2]
    if length > SHORT_TOKENS and dropout == 0.0:
        long: Tensor = attend_long(query, key, value, scale=scale, window=window, softcap=softcap, sinks_H=sinks)
        return long
    key, value = _for_each_head(query, key, value)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _window_mask(length, window, query.device)
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        shares = shares[..., :-1]
    return F.dropout(shares, dropout) @ value


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(T, T) bool, or None where plain causality says it all. A window of w sees itself and w - 1 tokens before."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _varlen_serves(query: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
    )


@cache
def _varlen_function() -> tuple[Callable[..., Any], frozenset[str]]:
    """The function and the names of its arguments, which differ between torch releases."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, *, scale: float, window: int | None
) -> Tensor:
    """(1, H, N, D) and (1, K, N, D) → (N, H, D)."""
    function, names = _varlen_function()
    query_NHD, key_NKD, value_NKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options: dict[str, Any] = {}
    if "window_size" in names:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        assert window is None or longest <= window, "this torch has no sliding window in varlen attention"
        options["is_causal"] = True
    if "scale" in names:
        options["scale"] = scale
    else:
        query_NHD = query_NHD * (scale * query.shape[-1] ** 0.5)
    if query_NHD.shape[1] != key_NKD.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            groups = query_NHD.shape[1] // key_NKD.shape[1]
            key_NKD, value_NKD = (t.repeat_interleave(groups, dim=1) for t in (key_NKD, value_NKD))
    out: Tensor = function(query_NHD, key_NKD, value_NKD, ends, ends, longest, longest, **options)
    return out
