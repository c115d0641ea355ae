"""Policies, `train` flags and weights, on ids that one can count by eye."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from sft.config import Policy
from sft.data.masking import POLICIES, message_weights, token_weights, trained_turns
from sft.data.proof import Refusal
from sft.types import Message, Rendered, Span

U, A = Message("user", "u"), Message("assistant", "a")
TOOL = Message("tool", "t")
CHAT = (Message("system", "s"), U, A, TOOL, A, U, A)


def test_the_policies_are_those_of_the_config() -> None:
    assert set(POLICIES) == set(get_args(Policy))


@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        ("auto", (0, 0, 1, 0, 1, 0, 1)),
        ("assistant", (0, 0, 1, 0, 1, 0, 1)),
        ("last_assistant", (0, 0, 0, 0, 0, 0, 1)),
        ("completion", (0, 0, 0, 0, 0, 0, 1)),
        ("all", (1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_what_a_policy_trains(policy: str, weights: tuple[int, ...]) -> None:
    assert message_weights(policy, CHAT) == weights


def test_a_completion_is_every_answer_to_the_last_user() -> None:
    assert message_weights("completion", (U, A, U, A, TOOL, A)) == (0, 0, 0, 1, 0, 1)


def test_last_assistant_without_one_trains_nothing() -> None:
    assert message_weights("last_assistant", (U,)) == (0,)


def test_a_message_s_flag_overrides_and_its_weight_scales() -> None:
    messages = (U, Message("assistant", "a", train=False), U, Message("assistant", "b", weight=0.5))
    assert message_weights("assistant", messages) == (0, 0, 0, 0.5)
    messages = (U, Message("assistant", "a", train=True, weight=2.0), U, A)
    assert message_weights("last_assistant", messages) == (0, 2, 0, 1)


def test_of_a_prompt_only_all_trains_what_does_not_ask_for_it() -> None:
    assert message_weights("assistant", (U, A, U, A), 3) == (0, 0, 0, 1)
    assert message_weights("all", (U, A, U, A), 3) == (1, 1, 1, 1)
    assert message_weights("assistant", (U, Message("assistant", "a", train=True), U, A), 3) == (0, 1, 0, 1)
    assert message_weights("all", (U, Message("assistant", "a", train=False), U, A), 3) == (1, 0, 1, 1)


def test_a_completion_of_several_turns_is_trained_whole() -> None:
    assert message_weights("completion", (U, A, U, A, U, A), 3) == (0, 0, 0, 1, 0, 1)
    assert message_weights("completion", (U, A, U, A), 1) == (0, 1, 0, 1)
    assert message_weights("last_assistant", (U, A, U, A), 1) == (0, 0, 0, 1)
    assert message_weights("completion", (U, Message("assistant", "a", train=False), U, A), 1) == (0, 0, 0, 1)


def test_tokens_weigh_what_their_message_weighs() -> None:
    rendered = Rendered((9, 9, 1, 2, 9, 3, 4, 9), (Span(1, 2, 4), Span(3, 5, 7)))
    assert token_weights(rendered, (0, 0.5, 0, 1)).tolist() == [0, 0, 0.5, 0.5, 0, 1, 1, 0]
    assert token_weights(rendered, (0, 0, 0, 1)).dtype == np.float32


def test_nothing_trained_is_refused() -> None:
    with pytest.raises(Refusal, match="no assistant message is trained"):
        trained_turns((U,), (0.0,))


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_other_roles_cannot_ask_to_be_trained(role: str) -> None:
    messages = (Message(role, "x", train=True), A)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match=rf"message 0 \({role}\) says train: true"):
        trained_turns(messages, (1.0, 1.0))
