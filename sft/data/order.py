"""Which conversations a step sees, and how its examples spread over ranks and micro-batches.

Pure functions of (seed, epoch, step): resuming needs no state, and the number of processes changes who computes an
example, never which examples a step sees.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sft.types import Int32Array

Int64Array = NDArray[np.int64]


def conversations_per_epoch(origins_C: Int32Array, repeats_S: Sequence[float]) -> int:
    """How many conversations one epoch holds once each comes as often as its source's `repeat` says."""
    return len(epoch_members(origins_C, repeats_S, seed=0, epoch=0))


def epoch_members(origins_C: Int32Array, repeats_S: Sequence[float], *, seed: int, epoch: int) -> Int64Array:
    """The conversations of an epoch, in the order of the data; `repeat: 1.5` comes once or twice.

    `origins_C` numbers the source of each conversation, `repeats_S` holds what each source was given. How many come
    from a source does not depend on seed and epoch: of its C conversations, with f the fraction of its `repeat`,
    round(f * C) come once more, chosen anew each epoch.
    """
    times_C = np.floor(np.asarray(repeats_S, dtype=np.float64)).astype(np.int64)[origins_C]
    rng = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    for origin, repeat in enumerate(repeats_S):
        sharing = np.flatnonzero(origins_C == origin)
        extra = rng.permutation(sharing)[: round(repeat % 1 * len(sharing))]
        times_C[extra] += 1
    return np.repeat(np.arange(len(origins_C)), times_C)


def epoch_order(origins_C: Int32Array, repeats_S: Sequence[float], *, seed: int, epoch: int) -> Int64Array:
    """The conversations of an epoch, shuffled by (seed, epoch)."""
    members = epoch_members(origins_C, repeats_S, seed=seed, epoch=epoch)
    return np.random.Generator(np.random.PCG64([seed, epoch, 0])).permutation(members)


def deal(lengths_E: Sequence[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """Spread a step's examples: result[rank][micro] lists indices into `lengths_E`.

    Ranks are filled longest example first, each to the rank with the least work so far (LPT, Graham 1969: at most
    4/3 of the best possible, far closer with many examples). Every rank then gets the same number of micro-batches,
    which collectives inside forward passes need (FSDP): the smallest number for which all of them stay within
    `micro_tokens`, unless a single example is longer. A rank may get empty micro-batches.
    """
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for index in _longest_first(lengths_E):
        tokens, rank = heapq.heappop(load)
        by_rank[rank].append(index)
        heapq.heappush(load, (tokens + lengths_E[index], rank))
    packed = [pack([lengths_E[i] for i in members], micro_tokens) for members in by_rank]
    count = max(1, *(len(bins) for bins in packed))
    return [
        [[members[i] for i in bin_] for bin_ in bins] + [[] for _ in range(count - len(bins))]
        for members, bins in zip(by_rank, packed, strict=True)
    ]


def deal_padded(
    lengths_E: Sequence[int], ranks: int, micro_tokens: int, max_padding: float = 0.05
) -> list[list[list[int]]]:
    """As `deal`, for batches that are padded to their longest example: neighbours in length share a micro-batch.

    A micro-batch takes at most `micro_tokens` positions, padding included, and at most `max_padding` of it is padding.
    """
    by_rank = [[i for bin_ in bins for i in bin_] for bins in deal(lengths_E, ranks, micro_tokens=2**62)]
    grouped = []
    for members in by_rank:
        bins: list[list[int]] = []
        real = 0
        for index in sorted(members, key=lambda i: (-lengths_E[i], i)):
            width = lengths_E[bins[-1][0]] if bins else 0
            area = width * (len(bins[-1]) + 1) if bins else 0
            if bins and area <= micro_tokens and real + lengths_E[index] >= (1 - max_padding) * area:
                bins[-1].append(index)
                real += lengths_E[index]
            else:
                bins.append([index])
                real = lengths_E[index]
        grouped.append(bins)
    count = max(1, *(len(bins) for bins in grouped))
    return [bins + [[] for _ in range(count - len(bins))] for bins in grouped]


def pack(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Fewest bins of at most `micro_tokens` by first-fit-decreasing, then levelled so that no bin is left a stump.

    An example longer than `micro_tokens` has a bin of its own. Indices within a bin ascend.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        slot = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if slot is None:
            bins.append([])
            room.append(micro_tokens)
            slot = len(bins) - 1
        bins[slot].append(index)
        room[slot] -= lengths[index]
    return [sorted(bin_) for bin_ in _levelled(lengths, micro_tokens, len(bins)) or bins]


def _levelled(lengths: Sequence[int], micro_tokens: int, count: int) -> list[list[int]] | None:
    """The same number of bins filled evenly, or None where that would overfill one."""
    load = [(0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in _longest_first(lengths):
        tokens, slot = heapq.heappop(load)
        if bins[slot] and tokens + lengths[index] > micro_tokens:
            return None
        bins[slot].append(index)
        heapq.heappush(load, (tokens + lengths[index], slot))
    return bins if all(bins) else None


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
