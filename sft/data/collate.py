"""Examples to tensors: one flat row without padding, or padded rows where isolation can't be had."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sft.types import IGNORE_INDEX, Batch, Example


def shifted(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(labels_T, weights_T) moved one to the left: what position t must predict, and how much it weighs.

    The first token of an example is never a target: nothing precedes it.
    """
    labels_T = np.full(len(example.input_ids_T), IGNORE_INDEX, dtype=np.int64)
    weights_T = np.zeros(len(example.input_ids_T), dtype=np.float32)
    labels_T[:-1] = example.labels_T[1:]
    weights_T[:-1] = example.weights_T[1:]
    return labels_T, weights_T


def flat(examples: Sequence[Example]) -> Batch:
    """One row of N tokens; positions restart at each example."""
    assert examples, "an empty micro-batch has no row; use `idle`"
    targets = [shifted(example) for example in examples]
    lengths = tuple(len(example.input_ids_T) for example in examples)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids_T for e in examples]).astype(np.int64))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))[None],
        labels=torch.from_numpy(np.concatenate([labels for labels, _ in targets]))[None],
        weights=torch.from_numpy(np.concatenate([weights for _, weights in targets]))[None],
        segment_lengths=lengths,
    )


def padded(examples: Sequence[Example], pad_id: int) -> Batch:
    """(B, T) with padding on the right; labels come from the examples, so `pad_id` may equal a stop token."""
    lengths = tuple(len(example.input_ids_T) for example in examples)
    shape = (len(examples), max(lengths))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    mask = np.zeros(shape, dtype=np.int64)
    for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :n] = example.input_ids_T
        positions[row, :n] = np.arange(n)
        labels[row, :n], weights[row, :n] = shifted(example)
        mask[row, :n] = 1
    return Batch(
        *(torch.from_numpy(array) for array in (input_ids, positions, labels, weights)),
        segment_lengths=lengths,
        attention_mask=torch.from_numpy(mask),
    )


def idle(token_id: int = 0) -> Example:
    """Two untrained tokens: what a rank without examples feeds so that collectives find all ranks."""
    return Example(np.full(2, token_id, dtype=np.int32), np.zeros(2, dtype=np.float32), "idle")


def count_targets(examples: Sequence[Example]) -> tuple[int, float]:
    """(number of trained targets, sum of their weights); an example's first token is no target."""
    return (
        int(sum(np.count_nonzero(e.weights_T[1:]) for e in examples)),
        float(sum(float(e.weights_T[1:].sum(dtype=np.float64)) for e in examples)),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies to the device, from pinned memory and without waiting on CUDA."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    return Batch(
        input_ids=move(batch.input_ids),
        positions=move(batch.positions),
        labels=move(batch.labels),
        weights=move(batch.weights),
        segment_lengths=batch.segment_lengths,
        attention_mask=None if batch.attention_mask is None else move(batch.attention_mask),
    )
