"""Which micro-batches this rank feeds at a step, built ahead of time on a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sft.data.collate import count_targets, flat, idle, padded
from sft.data.order import Int64Array, deal, deal_padded, epoch_order
from sft.resume import digest_of
from sft.schedule import Plan
from sft.types import Batch, Example

if TYPE_CHECKING:
    from sft.data.loader import Split


@dataclass(frozen=True, slots=True)
class StepData:
    """A step as this rank sees it. Counts are of the whole step, over all ranks: every rank reads the same cache."""

    step: int
    batches: tuple[Batch, ...]
    sources: tuple[tuple[str, ...], ...]  # of each micro-batch's examples
    tokens: int
    trained_tokens: int
    weight: float
    digest: str  # of the conversations, in order


class StepFeed:
    """Serves steps in order, the next one prepared while this one computes."""

    def __init__(
        self, split: Split, plan: Plan, *, seed: int, rank: int, world: int, micro_tokens: int, join: Join
    ) -> None:
        self._split, self._plan, self._seed = split, plan, seed
        self._rank, self._world, self._micro_tokens, self._join = rank, world, micro_tokens, join
        self._order: tuple[int, Int64Array] | None = None

    def steps(self, first: int) -> Iterator[StepData]:
        """Steps `first` to the last of the plan."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: Future[StepData] | None = None
            for step in range(first, self._plan.total_steps + 1):
                current = ahead.result() if ahead is not None else self.build(step)
                ahead = pool.submit(self.build, step + 1) if step < self._plan.total_steps else None
                yield current

    def conversations(self, step: int) -> Int64Array:
        """The conversations of a step: a function of seed and step alone."""
        epoch, start, end = self._plan.locate(step)
        if self._order is None or self._order[0] != epoch:
            split = self._split
            self._order = (epoch, epoch_order(split.origins_C, split.repeats_S, seed=self._seed, epoch=epoch))
        return self._order[1][start:end]

    def build(self, step: int) -> StepData:
        conversations = self.conversations(step)
        indices = [e for c in conversations for e in self._split.conversation_examples(int(c))]
        examples = [self._split.example(e) for e in indices]
        batches, sources = make_batches(examples, self._rank, self._world, self._micro_tokens, self._join)
        trained, weight = count_targets(examples)
        return StepData(
            step=step,
            batches=batches,
            sources=sources,
            tokens=sum(len(example.input_ids_T) for example in examples),
            trained_tokens=trained,
            weight=weight,
            digest=digest_of(np.ascontiguousarray(conversations).tobytes()),
        )


@dataclass(frozen=True, slots=True)
class Join:
    """How examples become a batch: one flat row, or padded rows with `pad_id`."""

    flat_rows: bool
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        members = list(examples) or [idle(self.pad_id)]
        return flat(members) if self.flat_rows else padded(members, self.pad_id)

    @property
    def deal(self) -> Callable[[Sequence[int], int, int], list[list[list[int]]]]:
        return deal if self.flat_rows else deal_padded


def make_batches(
    examples: Sequence[Example], rank: int, world: int, micro_tokens: int, join: Join
) -> tuple[tuple[Batch, ...], tuple[tuple[str, ...], ...]]:
    """This rank's micro-batches of `examples`, and the sources in each."""
    lengths = [len(example.input_ids_T) for example in examples]
    dealt = join.deal(lengths, world, micro_tokens)[rank]
    return (
        tuple(join([examples[i] for i in members]) for members in dealt),
        tuple(tuple(examples[i].source for i in members) for members in dealt),
    )
