"""Attention in blocks equals eager softmax, forward and backward, and keeps nothing that grows with T x T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sft import attention, longattention
from sft.longattention import attend_long

Tensor = torch.Tensor
SCALE = 0.3


def inputs(length: int, heads: int = 6, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Laid out as models hand them over, heads within tokens; values of another size than keys."""
    torch.manual_seed(0)
    return tuple(
        torch.randn(1, length, count, size, dtype=dtype).transpose(1, 2).requires_grad_()
        for count, size in ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    )


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks_H: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Written out, head by head, in the words of the definition."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    hidden = torch.tensor(
        [[k > q or (window is not None and q - k >= window) for k in range(length)] for q in range(length)]
    )
    outs = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // groups].T * SCALE
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(hidden, float("-inf")).exp()
        sink = 0.0 if sinks_H is None else sinks_H[head].exp()
        outs.append(weights / (weights.sum(-1, keepdim=True) + sink) @ value[0, head // groups])
    return torch.stack(outs)[None]


def gradients(out: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sin().sum(), tensors)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 11, 40])
@pytest.mark.parametrize(("length", "block"), [(1, 8), (7, 8), (8, 8), (9, 8), (33, 8), (24, 4), (33, 64), (5, 1)])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_equals_eager_softmax(length: int, block: int, window: int | None, kv_heads: int) -> None:
    tensors = inputs(length, kv_heads=kv_heads)
    ours = attend_long(*tensors, scale=SCALE, window=window, block=block)
    theirs = eager(*tensors, window=window)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for mine, other in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("length", "block"), [(7, 8), (33, 8)])
def test_soft_caps_and_sinks_equal_eager(
    length: int, block: int, with_sinks: bool, softcap: float | None, window: int | None
) -> None:
    tensors = inputs(length)
    if with_sinks:
        tensors = (*tensors, torch.linspace(-1, 2, 6, dtype=torch.float64, requires_grad=True))

    def ours(query: Tensor, key: Tensor, value: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        return attend_long(query, key, value, scale=SCALE, window=window, softcap=softcap, sinks_H=sinks_H, block=block)

    mine, other = ours(*tensors), eager(*tensors, window=window, softcap=softcap)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    for one, two in zip(gradients(mine, tensors), gradients(other, tensors), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    if with_sinks or softcap:  # the control: they matter
        assert (other - eager(*tensors[:3], window=window)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_segments_with_caps_and_sinks_equal_short_ones(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the flat attention, in blocks and written out at once."""
    tensors = (*inputs(600, dtype=dtype), torch.linspace(-1, 2, 6, requires_grad=True))

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks_H: Tensor) -> Tensor:
        return attention._attend_plain(
            query, key, value, scale=SCALE, dropout=0.0, window=100, softcap=softcap, sinks=sinks_H
        )

    def kept(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, tensors[3])

    found = []
    for threshold in (512, 600):
        monkeypatch.setattr(attention, "SHORT_TOKENS", threshold)
        out = attend(*tensors)
        found.append((out, *gradients(out, tensors), kept_bytes(kept, 600)))
    *blocks, few = found[0]
    *whole, many = found[1]
    assert few * 20 < many
    for mine, other in zip(blocks, whole, strict=True):
        assert (mine - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_by_differences(window: int | None) -> None:
    def attend(*tensors: Tensor) -> Tensor:
        return attend_long(*tensors, scale=SCALE, window=window, block=4)

    assert torch.autograd.gradcheck(attend, inputs(10, heads=3, kv_heads=1))


@pytest.mark.parametrize("window", [None, 300])
def test_float32_and_bfloat16_equal_the_fused_kernel(window: int | None) -> None:
    """Scores are rounded to bfloat16, as eager attention and short segments round them, which the fused kernel does
    not: no nearer to the truth than 1 %, with scores as wide as these."""
    exact = inputs(700, dtype=torch.float32)
    visible = attention._window_mask(700, window, torch.device("cpu"))

    def fused(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=visible, is_causal=visible is None, scale=SCALE, enable_gqa=True
        )

    truth = (fused(exact), *gradients(fused(exact), exact))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        tensors = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in exact)
        out = attend_long(*tensors, scale=SCALE, window=window)
        assert out.dtype == dtype
        for mine, other in zip((out, *gradients(out, tensors)), truth, strict=True):
            assert (mine.float() - other).norm() / other.norm() < limit


def test_control_a_window_too_wide_by_one_is_noticed() -> None:
    tensors = inputs(33)
    wrong = attend_long(*tensors, scale=SCALE, window=6, block=8)
    assert (wrong - eager(*tensors, window=5)).abs().max() > 1e-2


def test_control_a_mask_that_hides_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longattention, "_hide", lambda scores, hidden: None)
    tensors = inputs(9)
    assert (attend_long(*tensors, scale=SCALE, block=8) - eager(*tensors)).abs().max() > 1e-2


def kept_bytes(attend: Any, length: int) -> int:
    """Of what the backward pass keeps, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tensors = inputs(length, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(*tensors)
    assert out.requires_grad
    return sum(storages.values())


def test_what_is_kept_grows_with_the_length_and_not_with_its_square() -> None:
    def long(*tensors: Tensor) -> Tensor:
        return attend_long(*tensors, scale=SCALE)

    def short(*tensors: Tensor) -> Tensor:
        return attention._attend_short(*tensors, None, scale=SCALE)

    assert kept_bytes(long, 600) == 600 * (6 * 8 + 2 * 8 + 2 * 5) * 2
    assert kept_bytes(long, 1200) == 2 * kept_bytes(long, 600)
    assert kept_bytes(short, 1200) > 3 * kept_bytes(short, 600), "the control keeps T x T shares"


def test_the_same_to_the_bit_again_under_checkpointing_autocast_and_without_gradients() -> None:
    tensors = inputs(600, dtype=torch.bfloat16)

    def attend(*tensors: Tensor) -> Tensor:
        return attend_long(*tensors, scale=SCALE)

    out = attend(*tensors)
    grads = gradients(out, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        again = checkpoint(attend, *tensors, use_reentrant=False)
    assert torch.equal(again, out)
    assert all(map(torch.equal, gradients(again, tensors), grads))
    with torch.no_grad():
        assert torch.equal(attend(*tensors), out)
    with torch.inference_mode():
        assert torch.equal(attend(*tensors), out)


def test_the_flat_attention_takes_it_for_long_segments_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment alone, under torch.func.functional_call too, and only where it is faster."""
    lengths: list[int] = []

    def noted(query: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        lengths.append(query.shape[2])
        return attend_long(query, *rest, **options)

    monkeypatch.setattr(attention, "attend_long", noted)
    row = [part[..., :5] for part in inputs(513 + 512 + 600, dtype=torch.bfloat16)]
    options = attention.segments([513, 512, 600], torch.device("cpu"))
    module = Flat(options)
    out = torch.func.functional_call(module, {}, tuple(row))
    assert lengths == [513, 600]
    for part, whole in zip(torch.split(out, [513, 512, 600], dim=1), pieces(row, [513, 512, 600]), strict=True):
        alone = attention._attend_sdpa(*whole, scale=5**-0.5, dropout=0.0, window=400)
        assert torch.equal(part, alone.transpose(1, 2))
    module(*(part.float() for part in row))
    assert lengths == [513, 600, 513, 600], "in float32 the fused kernel is as fast"


class Flat(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.flat_attention(self, query, key, value, None, sliding_window=400, **self.options)[0]


def pieces(row: list[Tensor], lengths: list[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, lengths, dim=2) for tensor in row), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_inside_compiled_layers_and_checkpoints_of_them() -> None:
    """A break in the graph, no error, and lengths that differ do not exhaust the compiler."""
    from torch._dynamo.utils import counters

    counters.clear()
    for length in (520, 600, 700):
        module = Flat(attention.segments([length], torch.device("cpu")))
        row = tuple(part[..., :5] for part in inputs(length, dtype=torch.bfloat16))
        compiled = torch.compile(module, backend="aot_eager")
        out = checkpoint(compiled, *row, use_reentrant=False)
        plain = module(*row)
        assert torch.equal(out, plain)
        assert all(map(torch.equal, gradients(out, row), gradients(plain, row)))
    assert counters["stats"]["unique_graphs"] > 0
    assert not [reason for reason in counters["graph_break"] if "limit" in str(reason)], "it was given up"
