"""Flat rows equal one by one: logits, losses and gradients, for the attention shapes of current models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sft import attention
from sft.data.collate import count_targets, flat, padded
from sft.isolation import compare, head_is_exact
from sft.trainee import Trainee, loss_sum
from sft.types import Example

attention.register()
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tiny(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.FLAT)


def trainee(kind: str, **changes: Any) -> Trainee:
    return Trainee(tiny(kind, **changes), compute_dtype=torch.float32, autocast=False).train()


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(0, 97, n, dtype=np.int32),
            (rng.random(n) < 0.6).astype(np.float32) * rng.choice([0.5, 1.0], n).astype(np.float32),
            f"t:{i}",
        )
        for i, n in enumerate(lengths)
    ]


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 7}),
    ("qwen3", {}),
    ("gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 8}),
    ("gemma3_text", {"sliding_window": 7, "query_pre_attn_scalar": 8}),
    ("phi3", {}),
    ("cohere", {}),
    ("granite", {"logits_scaling": 4.0}),
    ("olmo2", {}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=[kind for kind, _ in KINDS])
def test_current_models_prove_exact(kind: str, changes: dict[str, Any]) -> None:
    verdict = compare(trainee(kind, **changes), CPU)
    assert verdict.flat_is_exact, verdict
    assert head_is_exact(trainee(kind, **changes), CPU)


def test_flat_row_equals_examples_one_by_one_and_padded() -> None:
    model = trainee("mistral", sliding_window=7)
    members = examples([3, 40, 11, 2, 25])
    total, grads = run(model, [flat(members)])
    alone, alone_grads = run(model, [flat([e]) for e in members])
    model.causal.set_attn_implementation("sdpa")
    pad, pad_grads = run(model, [padded(members, 0)])
    assert total == pytest.approx(alone, rel=1e-6) == pytest.approx(pad, rel=1e-6)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, alone_grads[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, pad_grads[name], rtol=1e-4, atol=1e-6)


def run(model: Trainee, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@given(st.lists(st.integers(2, 20), min_size=2, max_size=6), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_no_token_sees_another_example(lengths: list[int], seed: int) -> None:
    model = LLAMA
    members = examples(lengths, seed)
    batch = flat(members)
    with torch.no_grad():
        before = logits(model, batch)
        changed = [members[0], *examples(lengths, seed + 100)[1:]]
        after = logits(model, flat(changed))
    assert torch.equal(before[: lengths[0]], after[: lengths[0]])


def logits(model: Trainee, batch: Any) -> torch.Tensor:
    out = model.causal(
        input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False,
        **attention.segments(batch.segment_lengths, CPU),
    )  # fmt: skip
    result: torch.Tensor = out.logits[0]
    return result


LLAMA = trainee("llama")


def test_control_an_attention_that_ignores_segments_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import sft.isolation as isolation

    monkeypatch.setattr(
        isolation, "attention_inputs", lambda batch: attention.segments([sum(batch.segment_lengths)], CPU)
    )
    assert not compare(trainee("llama"), CPU).flat_is_exact


def test_control_an_ignored_window_is_caught() -> None:
    model = trainee("mistral", sliding_window=100)
    plain = attention.flat_attention
    from transformers import AttentionInterface

    def blind(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    AttentionInterface.register(attention.FLAT, blind)
    try:
        assert not compare(model, CPU).flat_is_exact
    finally:
        attention.register()


def test_control_a_head_that_scales_in_secret_is_caught() -> None:
    model = trainee("granite", logits_scaling=4.0)
    model.transform = type(model.transform)()
    assert not head_is_exact(model, CPU)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_short_segments_in_half_precision_equal_the_fused_kernel(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 33, 8, requires_grad=True) for heads in (6, kv_heads, kv_heads))
    visible = attention._window_mask(33, window, CPU)
    short = attention._attend_short(query, key, value, visible, scale=0.3)
    fused = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(short, fused, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(short.sin().sum(), (query, key, value))
    for ours, theirs in zip(grads, torch.autograd.grad(fused.sin().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_comparison_leaves_no_trace() -> None:
    model = trainee("mistral", sliding_window=7, attention_dropout=0.1)
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    compare(model, CPU)
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert model.causal.config.sliding_window == 7
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.1}
    assert model.causal.config._attn_implementation == attention.FLAT


def test_collate_by_eye() -> None:
    first = Example(np.array([5, 6, 7], np.int32), np.array([0, 1, 0.5], np.float32), "a")
    second = Example(np.array([8, 9], np.int32), np.array([1, 1], np.float32), "b")
    batch = flat([first, second])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.target_index_M.tolist() == [0, 1, 3]
    assert batch.targets_M.tolist() == [6, 7, 9]
    assert batch.weights_M.tolist() == [1, 0.5, 1]
    assert count_targets([first, second]) == (3, 2.5)
    rows = padded([first, second], pad_id=0)
    assert rows.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert rows.attention_mask is not None
    assert rows.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert rows.target_index_M.tolist() == [0, 1, 3]
    assert rows.targets_M.tolist() == [6, 7, 9]


def test_loss_equals_transformers_own() -> None:
    """Oracle: the labels argument of a transformers model, for one example whose every token is trained."""
    model = LLAMA
    example = Example(np.arange(3, 23, dtype=np.int32), np.ones(20, np.float32), "t")
    total, _ = run(model, [flat([example])])
    ids = torch.from_numpy(example.input_ids_T.astype(np.int64))[None]
    assert total / 19 == pytest.approx(float(model.causal(input_ids=ids, labels=ids).loss.detach()), rel=1e-6)


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gemma2", {"sliding_window": 7}), ("gpt2", {})])
def test_no_layer_asks_the_device_for_the_lengths(kind: str, changes: dict[str, Any]) -> None:
    """Ends that cannot be read (a meta tensor has no numbers) change nothing, where no fused kernel takes them."""
    model = trainee(kind, **changes).eval()  # GPT-2 drops at random
    batch = flat(examples([5, 1, 23, 600]) if kind == "llama" else examples([5, 1, 23, 40]))
    inputs = (batch.input_ids, batch.positions, batch.target_index_M, batch.targets_M, batch.weights_M)
    options = attention.segments(batch.segment_lengths, CPU)
    expected = model(*inputs, options)
    unreadable = torch.empty_like(options["cu_seq_lens_q"], device="meta")
    hidden = {**options, "cu_seq_lens_q": unreadable, "cu_seq_lens_k": unreadable}
    assert torch.equal(model(*inputs, hidden), expected)
    with pytest.raises((NotImplementedError, RuntimeError)):  # control: without the host's lengths they are read
        model(*inputs, {key: value for key, value in hidden.items() if key != "segment_lengths"})
    del options["segment_lengths"]
    assert torch.equal(model(*inputs, options), expected), "a model that drops the name is read as before"
