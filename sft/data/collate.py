"""Examples to tensors: one flat row without padding, or padded rows where isolation can't be had."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sft.types import Batch, Example

Int64Array = NDArray[np.int64]


def predictors(example: Example) -> Int64Array:
    """Positions t whose next token is trained. The first token of an example is no target: nothing precedes it."""
    return np.flatnonzero(example.weights_T[1:]).astype(np.int64)


def flat(examples: Sequence[Example]) -> Batch:
    """One row of N tokens; positions restart at each example."""
    assert examples, "an empty micro-batch has no row; use `idle`"
    lengths = tuple(len(example.input_ids_T) for example in examples)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return _batch(
        input_ids=np.concatenate([e.input_ids_T for e in examples]).astype(np.int64)[None],
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])[None],
        examples=examples,
        starts=starts,
        attention_mask=None,
    )


def padded(examples: Sequence[Example], pad_id: int) -> Batch:
    """(B, T) with padding on the right; targets come from the examples, so `pad_id` may equal a stop token."""
    assert examples, "an empty micro-batch has no row; use `idle`"
    shape = (len(examples), max(len(example.input_ids_T) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        n = len(example.input_ids_T)
        input_ids[row, :n] = example.input_ids_T
        positions[row, :n] = np.arange(n)
        mask[row, :n] = 1
    return _batch(
        input_ids=input_ids,
        positions=positions,
        examples=examples,
        starts=np.arange(len(examples)) * shape[1],
        attention_mask=torch.from_numpy(mask),
    )


def _batch(
    *,
    input_ids: Int64Array,
    positions: Int64Array,
    examples: Sequence[Example],
    starts: Int64Array,
    attention_mask: torch.Tensor | None,
) -> Batch:
    index = [predictors(example) for example in examples]
    weights_M = np.concatenate([e.weights_T[i + 1] for e, i in zip(examples, index, strict=True)])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        target_index_M=torch.from_numpy(np.concatenate([i + s for i, s in zip(index, starts, strict=True)])),
        targets_M=torch.from_numpy(
            np.concatenate([e.input_ids_T[i + 1] for e, i in zip(examples, index, strict=True)]).astype(np.int64)
        ),
        weights_M=torch.from_numpy(weights_M),
        segment_lengths=tuple(len(example.input_ids_T) for example in examples),
        attention_mask=attention_mask,
        unit_weights=bool((weights_M == 1).all()),
    )


def idle(token_id: int = 0) -> Example:
    """Two untrained tokens: what a rank without examples feeds so that collectives find all ranks."""
    return Example(np.full(2, token_id, dtype=np.int32), np.zeros(2, dtype=np.float32), "idle")


def count_targets(examples: Sequence[Example]) -> tuple[int, float]:
    """(number of trained targets, sum of their weights); an example's first token is no target."""
    return (
        sum(e.num_trained for e in examples),
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
        target_index_M=move(batch.target_index_M),
        targets_M=move(batch.targets_M),
        weights_M=move(batch.weights_M),
        segment_lengths=batch.segment_lengths,
        attention_mask=None if batch.attention_mask is None else move(batch.attention_mask),
        unit_weights=batch.unit_weights,
    )
