"""Token-weighted scores over a held-out split, each conversation counted once across ranks.

M trained positions, D features, V vocabulary, E examples. Everything is a sum until the very end, so that ranks and
micro-batches add up to the same numbers whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from torch.nn import functional as F

from sft.data.order import deal
from sft.devices import CPU, sums_64, zeros_64
from sft.types import Batch

Tensor = torch.Tensor
Head = Callable[[Tensor], Tensor]
"""Features (m, D) of some trained positions → their logits (m, V), soft caps, scales and biases included."""
Forward = Callable[[Batch], tuple[Tensor, Head]]
"""A batch → features (M, D) at its trained positions, in the order of `targets_M`, and the head that reads them."""

CHUNK = 256  # trained positions whose logits exist at a time
DEAL_WINDOW = 4096  # examples dealt at a time: dealing is quadratic in the number of bins


@dataclass(frozen=True, slots=True)
class EvalSums:
    """Additive over batches and ranks. `stop_probability` sums over the `stops` positions whose target is a stop."""

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: float = 0.0
    stop_probability: float = 0.0
    stops: float = 0.0

    def __add__(self, other: EvalSums) -> EvalSums:
        return EvalSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, sums_6: Tensor) -> EvalSums:
        return cls(*sums_6.tolist())


def metrics(sums: EvalSums) -> dict[str, float | int | None]:
    """`loss` in nats a token; `token_accuracy` and `stop_probability` as shares; None where there is nothing to say."""
    loss = sums.loss / sums.weight if sums.weight > 0 else None
    return {
        "loss": loss,
        "perplexity": None if loss is None else _exp(loss),
        "token_accuracy": sums.correct / sums.tokens if sums.tokens else None,
        "stop_probability": sums.stop_probability / sums.stops if sums.stops else None,
        "tokens": int(sums.tokens),
    }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(
    forward: Forward,
    batches: Iterable[Batch],
    stop_ids: Sequence[int],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    chunk: int = CHUNK,
) -> EvalSums:
    """Scores `batches`, this rank's part of a split; `reduce` adds a float64 vector up over ranks.

    The caller puts the model in `inference_mode_of`. Nothing is read back from the device before the end.
    """

    def score(batch: Batch) -> Tensor:
        features_MD, head = forward(batch)
        return score_hidden(features_MD, head, batch.targets_M, batch.weights_M, stop_ids, chunk=chunk)

    return add_up(map(score, batches), reduce=reduce)


def add_up(scores: Iterable[Tensor], *, reduce: Callable[[Tensor], Tensor] | None = None) -> EvalSums:
    """The sum of what `score_hidden` said of each batch."""
    total_6: Tensor | None = None
    for sums_6 in scores:
        total_6 = sums_6 if total_6 is None else total_6 + sums_6
    if total_6 is None:
        total_6 = zeros_64(6, CPU)
    return EvalSums.of(reduce(total_6) if reduce is not None else total_6)


@torch.no_grad()
def score_hidden(
    features_MD: Tensor,
    head: Head,
    labels_M: Tensor,
    weights_M: Tensor,
    stop_ids: Sequence[int],
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The six sums of `EvalSums` as a float64 tensor, on the features' device where that has float64, else on the host;
    `chunk` rows of logits at a time."""
    device = features_MD.device
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    sums_6 = zeros_64(6, device)
    for start in range(0, len(labels_M), chunk):
        labels_m, weights_m = labels_M[start : start + chunk], weights_M[start : start + chunk]
        sums_6 += _score_chunk(head(features_MD[start : start + chunk]).float(), labels_m, weights_m, stops)
    return sums_6


def _score_chunk(logits_mV: Tensor, labels_m: Tensor, weights_m: Tensor, stops: Tensor) -> Tensor:
    trained_m = weights_m > 0
    losses_m = F.cross_entropy(logits_mV, labels_m, reduction="none")
    ends_m = torch.isin(labels_m, stops) & trained_m
    # The mass of all stop tokens: serving stops at any of them. Stop ids beyond the vocabulary have none.
    known = stops[stops < logits_mV.shape[1]]
    mass_m = (logits_mV[:, known].logsumexp(-1) - logits_mV.logsumexp(-1)).exp()
    return sums_64(
        [
            losses_m * weights_m,
            weights_m,
            (logits_mV.argmax(-1) == labels_m) & trained_m,
            trained_m,
            # where, not a product: an infinite logit elsewhere must not spoil the sum
            torch.where(ends_m, mass_m, 0.0),
            ends_m,
        ]
    )


def eval_plan(lengths_E: Sequence[int], *, rank: int, ranks: int, micro_tokens: int) -> Iterator[list[int]]:
    """The micro-batches of this rank: lists of example indices. Over all ranks each example comes exactly once.

    Every rank gets the same number of micro-batches, empty ones included (feed `collate.idle`), because sharded
    models need all ranks in each forward pass.
    """
    window = DEAL_WINDOW * ranks
    for start in range(0, len(lengths_E), window):
        for members in deal(list(lengths_E[start : start + window]), ranks, micro_tokens)[rank]:
            yield [start + index for index in members]


def keeps_training_mode(module: torch.nn.Module) -> bool:
    """bitsandbytes' own 4-bit layers (PEFT wraps them in layers of the same name, which do change mode).

    On CPUs with AVX-512 bf16 their forward pass repacks the weights when the layer is in eval mode; backward passes
    through repacked weights then lose gradients with no more than a warning.
    """
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__)


@contextmanager
def inference_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, dropout off; on leaving, every module is back in the mode it had.

    Use this wherever a model that is being trained is evaluated or generates, never `model.eval()`.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # flag by flag, since `eval()` would descend into the layers that must stay
        module.training = keeps_training_mode(module)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
