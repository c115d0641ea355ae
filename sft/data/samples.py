"""A few conversations of each side, kept to be answered at evaluations and to check what the saved model is served."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft.data.ledger import Ledger
from sft.data.passage import passage_ids
from sft.data.pipeline import RowBatch, to_sample
from sft.data.proof import Refusal
from sft.data.roles import with_roles
from sft.data.store import StoreWriter
from sft.types import Conversation, Note, Passage, Sample

if TYPE_CHECKING:
    from sft.data.encode import Encoder

SAMPLES = 16
CANDIDATES = 64
"""Rows kept in mind for samples; some turn out to be cut, or to have no prompt."""
LARGE_ROW = 100_000
"""Bytes; a larger row makes no sample worth reading, and many of them would fill the memory."""


class Picks:
    """Remembers rows for samples, chosen by content: of train sources the smallest hashes (which are held out first)
    and the largest (which are trained), of eval sources the smallest."""

    def __init__(self, num_train: int) -> None:
        self._num_train = num_train
        self._heaps: dict[str, list[tuple[int, int, RowBatch]]] = {"low": [], "high": [], "own": []}

    def offer(self, content: int, conversation: int, batch: RowBatch, row: int) -> None:
        """Each heap keeps its CANDIDATES largest keys; ties go to the earlier row."""
        if getattr(batch.rows[row], "size", 0) > LARGE_ROW:
            return
        names = ("low", "high") if batch.origin < self._num_train else ("own",)
        for name in names:
            key = content if name == "high" else -content
            heap = self._heaps[name]
            if len(heap) < CANDIDATES:
                heapq.heappush(heap, (key, -conversation, _alone_in(batch, row)))
            elif (key, -conversation) > heap[0][:2]:
                heapq.heapreplace(heap, (key, -conversation, _alone_in(batch, row)))

    def samples(self, wanted_C: NDArray[np.bool_]) -> Iterator[tuple[int, Sample]]:
        """(conversation, sample) of the wanted conversations, each once, in the order of their hashes."""
        seen: set[int] = set()
        for heap in self._heaps.values():
            for _, negative, batch in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                conversation = -negative
                if wanted_C[conversation] and conversation not in seen:
                    seen.add(conversation)
                    sample = to_sample(batch.rows[0], batch)
                    assert not isinstance(sample, Note)
                    yield conversation, sample


def _alone_in(batch: RowBatch, row: int) -> RowBatch:
    """The batch with that row only, so that the others can be forgotten."""
    return dataclasses.replace(batch, rows=[batch.rows[row]])


def pick_samples(
    writer: StoreWriter, ledger: Ledger, picks: Picks, encoder: Encoder
) -> dict[str, list[dict[str, Any]]]:
    """Up to SAMPLES of each side that were not cut."""
    cut = ledger.conversations_noted("cut")
    made: dict[str, list[dict[str, Any]]] = {}
    example_starts = np.concatenate([[0], np.cumsum(writer.read("examples"), dtype=np.int64)])
    token_starts = np.concatenate([[0], np.cumsum(writer.read("lengths"), dtype=np.int64)])
    for side in ("train", "eval"):
        made[side] = []
        wanted_C = np.zeros(writer.num_conversations, dtype=np.bool_)
        wanted_C[writer.read(side)] = True
        wanted_C[cut] = False
        for conversation, sample in picks.samples(wanted_C):
            if len(made[side]) == SAMPLES:
                break
            last = int(example_starts[conversation + 1]) - 1
            tokens = slice(int(token_starts[last]), int(token_starts[last + 1]))
            if record := sample_record(sample, writer.read("ids")[tokens], encoder):
                made[side].append(record)
    return made


def sample_record(sample: Sample, ids_T: NDArray[np.int32], encoder: Encoder) -> dict[str, Any] | None:
    """The prompt of the last answer, if that is trained, as ids and as messages, and the answer. None without a prompt.

    `ids_T`: the row's last example, which begins with that prompt; if it does not, as under `train_on: all` where a
    template renders history otherwise within a prompt, the row is no sample.
    """
    sample = with_roles(sample, encoder.settings.roles)
    last = _last_trained(sample) if isinstance(sample, Conversation) else 0
    if last is None:
        return None
    try:
        prompt_ids = served_prompt(sample, last, encoder)
    except Refusal:  # `all` trains answers, too, that serving could not ask for
        return None
    if not prompt_ids or ids_T[: len(prompt_ids)].tolist() != prompt_ids:
        return None
    if isinstance(sample, Passage):
        texts = {"prompt": sample.prompt, "reference": sample.completion}
        return {"source": sample.source, "messages": [], "tools": [], "prompt_ids": prompt_ids, **texts}
    return {
        "source": sample.source,
        "messages": [message.as_dict() for message in sample.messages[:last]],
        "tools": [dict(tool) for tool in sample.tools],
        "prompt_ids": prompt_ids,
        "reference": sample.messages[last].content,
    }


def served_prompt(sample: Sample, last: int, encoder: Encoder) -> list[int]:
    """Ids of what serving asks: before message `last` of a conversation, before a passage's completion. Raises Refusal.

    Not read off the weights, which may leave out the beginning of an answer, or nothing at all.
    """
    if isinstance(sample, Passage):
        mode, end = encoder.settings.control_tokens_in_text, encoder.bundle.end_of_text
        assert end is not None
        found = passage_ids(sample, encoder.tokenizer, encoder.control, mode=mode, policy="auto", end_of_text=end)
        return list(found.ids[: found.start])
    work = encoder.open(sample)
    (turn,) = encoder.renderer.turns(work.messages, work.tools, (last,), work.rendered)
    return encoder.ids(turn.prompt)


def _last_trained(conversation: Conversation) -> int | None:
    """The last assistant message, where it is trained."""
    for index in range(len(conversation.messages) - 1, -1, -1):
        message = conversation.messages[index]
        if message.role == "assistant":
            return index if message.train is not False and message.weight > 0 else None
    return None
