"""Which messages are trained, and what each token of a rendered sequence then weighs.

A policy is one function in `POLICIES`: messages -> the weight of each message, 0 for untrained. A message's own
`train` flag overrides the policy and its `weight` scales it; both are applied here, after the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sft.data.proof import Refusal
from sft.types import Float32Array, Message, Rendered

Weights = tuple[float, ...]
Policy = Callable[[Sequence[Message]], Weights]


def assistant(messages: Sequence[Message]) -> Weights:
    """Every assistant turn."""
    return tuple(float(m.role == "assistant") for m in messages)


def last_assistant(messages: Sequence[Message]) -> Weights:
    """The last assistant turn only; earlier answers are context."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    return tuple(float(i == last) for i in range(len(messages)))


def completion(messages: Sequence[Message]) -> Weights:
    """What answers the prompt, where a row does not say what its prompt is: the turns after the last user message."""
    last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    return tuple(float(m.role == "assistant" and i > last_user) for i, m in enumerate(messages))


def everything(messages: Sequence[Message]) -> Weights:
    """Every token of every message, headers included."""
    return (1.0,) * len(messages)


POLICIES: dict[str, Policy] = {
    "auto": assistant,
    "assistant": assistant,
    "last_assistant": last_assistant,
    "completion": completion,
    "all": everything,
}


def message_weights(policy: str, messages: Sequence[Message], context: int = 0) -> Weights:
    """The weight of each message: the policy's choice, overridden by `train`, scaled by `weight`. The first `context`
    messages are a prompt, which only `all` chooses; the others are its completion, of which `completion` chooses every
    assistant turn."""
    known = context and policy == "completion"
    chosen = POLICIES["assistant" if known else policy](messages)
    if policy != "all":
        chosen = (0.0,) * context + chosen[context:]
    return tuple((c if m.train is None else float(m.train)) * m.weight for c, m in zip(chosen, messages, strict=True))


def token_weights(rendered: Rendered, weights: Sequence[float]) -> Float32Array:
    """Weight of each token (T,): that of the message whose span it lies in, 0 outside every span."""
    weights_T = np.zeros(len(rendered.input_ids), dtype=np.float32)
    for span in rendered.spans:
        weights_T[span.start : span.end] = weights[span.message]
    return weights_T


def trained_turns(messages: Sequence[Message], weights: Sequence[float]) -> tuple[int, ...]:
    """Indices of the assistant messages to train. Raises Refusal where nothing or somebody else's words would be."""
    for i, message in enumerate(messages):
        if message.train and message.role != "assistant":
            raise Refusal(
                "not_trainable",
                f"message {i} ({message.role}) says train: true, but only assistant turns are trained.",
            )
    trained = tuple(i for i, weight in enumerate(weights) if weight > 0 and messages[i].role == "assistant")
    if not trained:
        raise Refusal("nothing_trained", "no assistant message is trained: none is there, or train: false or weight: 0")
    return trained
