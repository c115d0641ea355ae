"""Proves, before the first step, that flat rows change nothing for the model at hand.

Three short examples run alone through eager attention, then joined into a flat row; logits and gradients must agree.
Sliding windows are shortened for the test, since a window that is longer than the examples hides an attention that
ignores it. The chunked head is held against the model's own logits in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sft.attention import FLAT
from sft.data.collate import flat, to_device
from sft.liger import LossKernel
from sft.loss import logits_loss_sum
from sft.trainee import Trainee, attention_inputs, loss_sum
from sft.types import Batch, Example

LENGTHS = (9, 14, 6)
WINDOW = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """Relative differences (root mean square) between a flat row and its examples alone."""

    logits: float
    gradients: float
    allowed: float  # by the arithmetic

    @property
    def flat_is_exact(self) -> bool:
        # written so that a NaN is no agreement
        return self.logits <= self.allowed and self.gradients <= 3 * self.allowed


def compare(trainee: Trainee, device: torch.device) -> Verdict:
    """Runs the comparison on the model's real weights. Leaves gradients, modes and attention as they were.

    bfloat16 arithmetic differs by rounding alone; a leak, a wrong position or a lost window differs by the size of
    the logits themselves, so that an eighth of it tells the two apart.
    """
    examples = probe(trainee, LENGTHS)
    alone = [to_device(flat([example]), device) for example in examples]
    joined = to_device(flat(examples), device)
    with _evaluation(trainee), _short_windows(trainee.causal), _no_trained_gradients(trainee):
        _set_attention(trainee.causal, "eager")
        logits_alone, gradients_alone = _join([_run(trainee, batch, mask_only=True) for batch in alone])
        _set_attention(trainee.causal, FLAT)
        logits_flat, gradients_flat = _run(trainee, joined, mask_only=False)
    return Verdict(
        logits=_relative(logits_flat, logits_alone),
        gradients=_relative(gradients_flat, gradients_alone),
        allowed=_allowed(trainee),
    )


def head_is_exact(trainee: Trainee, device: torch.device) -> bool:
    """Whether the chunked head gives the loss that the model's own logits give: no secret scale, cap or bias."""
    batch = to_device(flat(probe(trainee, LENGTHS)[:1]), device)
    with _evaluation(trainee), _no_trained_gradients(trainee):
        _set_attention(trainee.causal, "eager")
        logits, _ = _run(trainee, batch, mask_only=True)
        own = logits_loss_sum(logits.index_select(0, batch.target_index_M), batch.targets_M, batch.weights_M).item()
        with torch.no_grad():
            tensors = (batch.input_ids, batch.positions, batch.target_index_M, batch.targets_M, batch.weights_M)
            chunked = trainee(*tensors, {}).item()
    return bool(abs(chunked - own) <= _allowed(trainee) / 8 * abs(own))


def liger_agrees(trainee: Trainee, device: torch.device) -> bool:
    """Whether Liger's kernel gives the loss and the gradients of the plain path, for this model's features and head."""
    batch = to_device(flat(probe(trainee, LENGTHS)[:1]), device)
    assert batch.unit_weights
    with _evaluation(trainee), torch.no_grad():
        _set_attention(trainee.causal, "eager")
        tensors = (batch.input_ids, batch.positions, batch.target_index_M, batch.targets_M, batch.weights_M)
        features_MD = trainee(*tensors, {}, lambda features, head: features)
    plain, fused = (_loss_and_gradients(trainee, features_MD, batch, kernel) for kernel in ("plain", "liger"))
    loss, *gradients = (_relative(*pair) for pair in zip(fused, plain, strict=True))
    # Gradients are given more room: where logits are capped, the plain path rounds them once more than the kernel.
    return loss <= _allowed(trainee) / 8 and all(difference <= _allowed(trainee) for difference in gradients)


@dataclass(frozen=True, slots=True)
class CompiledVerdict:
    """Relative differences between compiled and plain layers; of gradients the largest over the kinds of weights."""

    loss: float
    gradients: float
    worst: str  # the kind of weight whose gradients differ most
    allowed: float

    @property
    def is_exact(self) -> bool:
        return self.loss <= self.allowed / 8 and self.gradients <= 3 * self.allowed


def run_once(trainee: Trainee, batch: Batch) -> None:
    """Forward and backward as in training, the gradients thrown away: compiles what is to be compiled."""
    try:
        loss_sum(trainee, trainee, batch).backward()  # type: ignore[no-untyped-call]
    finally:  # also those of half a backward pass: the first step would add to them
        trainee.zero_grad(set_to_none=True)


def compiled_difference(trainee: Trainee, batch: Batch) -> CompiledVerdict:
    """Loss and gradients of `batch` through compiled layers against those through plain ones. Leaves no gradients, and
    needs no more room than one set of them.

    A kind is the same weight of all layers: alone, the gradients of a norm's weight in bfloat16 are half rounding.
    """
    trained = {name: parameter for name, parameter in trainee.named_parameters() if parameter.requires_grad}
    targets = max(1, len(batch.targets_M))
    with _evaluation(trainee):
        try:
            compiled = loss_sum(trainee, trainee, batch) / targets
            compiled.backward()  # type: ignore[no-untyped-call]
            sizes = _norms_by_kind(trained)
            with torch.compiler.set_stance("force_eager"):
                plain = loss_sum(trainee, trainee, batch) / targets
                (-plain).backward()  # type: ignore[no-untyped-call]  # onto the others: what is left is the difference
            rests = _norms_by_kind(trained)
        finally:
            for parameter in trained.values():
                parameter.grad = None
    # Gradients that are nothing but rounding (of a bias before a softmax, say) are held against the others.
    least = max(1e-12, 0.01 * float(np.median(list(sizes.values()))))
    shares = {kind: rest / max(sizes[kind], least) for kind, rest in rests.items()}
    worst = max(shares, key=lambda kind: (np.isnan(shares[kind]), shares[kind]))
    return CompiledVerdict(
        loss=_relative(compiled.detach(), plain.detach()),
        gradients=shares[worst],
        worst=worst,
        allowed=_allowed(trainee),
    )


def _norms_by_kind(trained: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Of the gradients, by name without numbers."""
    squares: dict[str, float] = {}
    for name, parameter in trained.items():
        kind = re.sub(r"\.\d+\b", "", name)
        norm = 0.0 if parameter.grad is None else float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        squares[kind] = squares.get(kind, 0.0) + norm**2
    return {kind: square**0.5 for kind, square in squares.items()}


def _loss_and_gradients(
    trainee: Trainee, features_MD: torch.Tensor, batch: Batch, kernel: LossKernel
) -> list[torch.Tensor]:
    """The loss by `kernel`, and its gradients by the features and by what is trained of the head, all float32."""
    leaf = features_MD.detach().requires_grad_()
    head = trainee.causal.get_output_embeddings()
    wanted = [leaf, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    before, trainee.loss_kernel = trainee.loss_kernel, kernel
    try:
        with torch.autocast(leaf.device.type, trainee.compute_dtype, enabled=trainee.autocast):
            loss = trainee.head_loss(leaf, batch.targets_M, batch.weights_M, unit_weights=batch.unit_weights)
        return [loss.detach(), *(gradient.float() for gradient in torch.autograd.grad(loss / 3, wanted))]
    finally:
        trainee.loss_kernel = before


def _allowed(trainee: Trainee) -> float:
    rounding = any(p.dtype != torch.float32 for p in trainee.parameters()) or trainee.autocast
    return 0.125 if rounding else 1e-3


def probe(trainee: Trainee, lengths: Sequence[int], *, later_half: bool = False) -> list[Example]:
    """Examples of random tokens, the same every time, all trained or the later half of each: in bfloat16 the gradients
    of an example's first tokens are mostly rounding."""
    vocabulary = trainee.causal.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)

    def example(number: int, length: int) -> Example:
        ids_T = rng.integers(0, vocabulary, size=length, dtype=np.int32)
        trained_T = np.arange(length) >= (length // 2 if later_half else 0)
        return Example(ids_T, (trained_T * (1 + number / 2)).astype(np.float32), f"probe:{number}")

    return [example(number, length) for number, length in enumerate(lengths)]


def _run(trainee: Trainee, batch: Batch, *, mask_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits and (N, D) gradients of the summed loss by the embedding's output, both float32."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = trainee.causal.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.autocast(batch.input_ids.device.type, trainee.compute_dtype, enabled=trainee.autocast):
            logits = trainee.causal(
                input_ids=batch.input_ids,
                position_ids=batch.positions,
                use_cache=False,
                **({} if mask_only else attention_inputs(batch)),
            ).logits.flatten(0, 1)
        loss = logits_loss_sum(logits.index_select(0, batch.target_index_M), batch.targets_M, batch.weights_M)
        (gradient,) = torch.autograd.grad(loss, seen[:1])
    finally:
        handle.remove()
    return logits.detach().float(), gradient.flatten(0, 1).float()


def _join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([logits for logits, _ in parts]), torch.cat([gradient for _, gradient in parts])


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.pow(2).mean().sqrt().clamp_min(1e-12)
    return float(((ours - theirs).pow(2).mean().sqrt() / scale).item())


def _set_attention(causal: Any, name: str) -> None:
    causal.set_attn_implementation(name)


@contextmanager
def _short_windows(causal: Any) -> Iterator[None]:
    """Every sliding window in configuration and modules is `WINDOW` tokens inside."""
    holders = [causal.config, causal.config.get_text_config(), *causal.modules()]
    before = [(h, h.sliding_window) for h in holders if isinstance(getattr(h, "sliding_window", None), int)]
    try:
        for holder, _ in before:
            holder.sliding_window = WINDOW
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


@contextmanager
def _evaluation(trainee: Trainee) -> Iterator[None]:
    """Dropout off, without `eval()`: that repacks 4-bit weights on some CPUs and loses their gradients."""
    before = {module: module.p for module in trainee.modules() if isinstance(module, nn.Dropout)}
    layers: list[Any] = list(trainee.modules())
    rates = {m: m.attention_dropout for m in layers if isinstance(getattr(m, "attention_dropout", None), float)}
    attention, alpha = trainee.causal.config._attn_implementation, trainee.neftune_alpha
    trainee.neftune_alpha = None
    try:
        for dropout in before:
            dropout.p = 0.0
        for layer in rates:
            layer.attention_dropout = 0.0
        yield
    finally:
        for dropout, rate in before.items():
            dropout.p = rate
        for layer, rate in rates.items():
            layer.attention_dropout = rate
        trainee.neftune_alpha = alpha
        _set_attention(trainee.causal, attention)


@contextmanager
def _no_trained_gradients(trainee: Trainee) -> Iterator[None]:
    """Gradients of weights are not wanted here: only those of the embedded row."""
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
