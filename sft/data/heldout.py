"""Which rows are held out for evaluation: by their content, so that every seed and every run scores the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.errors import DataError
from sft.types import Conversation, Sample

SAID = frozenset(("tool_calls", "reasoning_content", "reasoning", "thinking", "name"))
"""Keys of a message beside its text that are words of the conversation; all others are bookkeeping to the split."""
CALL_IDS = frozenset(("id", "index", "call_id"))
MOST_ROWS = 500
"""Of a share: more would cost time and tell little more."""


def content_hash(sample: Sample) -> int:
    """64 bits of what the row says: its messages, tools and template arguments, or its texts; not where it stands.

    Nor does what no model learns to say count: ids and other bookkeeping of messages, the ids of calls and their
    results, `train` and `weight`. Rows that differ in these alone are one conversation, and stay on one side of the
    split.
    """
    content: Any
    if isinstance(sample, Conversation):
        # None and 1.0: a message's train and weight, in their places still, since running runs hold rows out by this.
        content = (
            [(m.role, m.content, _said(m.extra) if m.extra else {}, None, 1.0) for m in sample.messages],
            sample.tools,
        )
        if sample.template_args:  # without any, the hash of a row is what it always was
            content = (*content, json.dumps(sample.template_args, sort_keys=True))
    else:
        content = (sample.kind, sample.prompt, sample.completion)
    digest = hashlib.blake2b(repr(content).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _said(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a message holds beside its text: what it says, without the ids of calls."""
    said = {key: value for key, value in extra.items() if key in SAID}
    if isinstance(said.get("tool_calls"), list):
        said["tool_calls"] = [{key: v for key, v in call.items() if key not in CALL_IDS} for call in said["tool_calls"]]
    return said


def held_out(hashes_C: NDArray[np.uint64], wanted: float) -> NDArray[np.bool_]:
    """Mask over C rows. `wanted` below 1: that share, 1 to 500 rows; a whole number: so many rows; 0: none.

    Rows with the smallest hashes are taken. Equal rows go together, so nothing that is trained is scored; where a group
    of equal rows does not fit, the next one is tried. At least one row stays for training. Raises DataError where a
    whole number asks for all rows or more.
    """
    total = len(hashes_C)
    mask = np.zeros(total, dtype=np.bool_)
    if wanted == 0 or total == 0:
        return mask
    if wanted >= total and wanted >= 1:
        raise DataError(
            f"data.eval = {int(wanted)}: only {total} rows are left after checks, and some must be trained. "
            "Ask for fewer, or give a share such as 0.05"
        )
    count = number_held_out(total, wanted)
    _, group_C, sizes_G = np.unique(hashes_C, return_inverse=True, return_counts=True)  # groups by ascending hash
    chosen = _fitting(sizes_G, count)
    if not chosen and len(sizes_G) > 1:
        chosen = [int(np.argmin(sizes_G))]
    mask[np.isin(group_C, chosen)] = True
    return mask


def number_held_out(total: int, wanted: float) -> int:
    """How many of `total` rows `held_out` looks for; equal rows, which go together, may change it."""
    if wanted == 0 or total == 0:
        return 0
    count = int(wanted) if wanted >= 1 else min(MOST_ROWS, max(1, round(wanted * total)))
    return min(count, total - 1)


def _fitting(sizes_G: NDArray[np.int64], count: int) -> list[int]:
    chosen, taken = [], 0
    for group, size in enumerate(sizes_G.tolist()):
        if taken == count:
            break
        if taken + size <= count:
            chosen.append(group)
            taken += size
    return chosen
