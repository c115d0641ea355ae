"""What a user hardly meant is said, and what is meant is not."""

from __future__ import annotations

import pytest

from sft.advice import advice_on_steps, beyond_context, unread_arguments, unread_template
from sft.config import Config
from sft.schedule import plan


def config(**sections: dict[str, object]) -> Config:
    return Config.model_validate({"model": {"name": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, **sections})


@pytest.mark.parametrize(
    ("warmup", "said"), [(0.03, False), (99, False), (100, True), (500, True), (0.5, False), (0, False)]
)
def test_a_warm_up_as_long_as_the_run_is_told(warmup: float, said: bool) -> None:
    advice = list(advice_on_steps(config(optim={"warmup": warmup}), plan(3200, 32, 1, None), 3200))
    assert [text[:12] for text in advice] == (["optim.warmup"] if said else [])


def test_a_step_larger_than_the_data_is_told() -> None:
    (said,) = advice_on_steps(config(batch={"examples": 64}), plan(10, 64, 3, None), 10)
    assert said == "batch.examples: a step takes 64 conversations, the data has 10: each epoch is one step"


def test_examples_beyond_the_model_s_context_are_told() -> None:
    assert beyond_context({"max_position_embeddings": 2048}, 2048, 4096) is None
    assert beyond_context({}, 10**6, 4096) is None, "a model that names no context"
    said = beyond_context({"text_config": {"max_position_embeddings": 2048}}, 3000, 4096)
    assert said == (
        "data.max_tokens: 4,096 lets examples of 3,000 tokens in, but the model's context ends at 2,048. "
        "Set data.max_tokens: 2048."
    )


def test_arguments_that_no_template_reads_are_told() -> None:
    template = "{% if enable_thinking %}<think>{% endif %}"
    assert list(unread_arguments(template, {"enable_thinking": False})) == []
    assert list(unread_arguments(template, {"thinking": 1})) == [], "a part of a name may be read: no false alarm"
    (said,) = unread_arguments(template, {"date_string": "1 May"})
    assert said == "data.template_args.date_string: the template in use never reads date_string"


@pytest.mark.parametrize(
    ("templated", "data", "said"),
    [
        (0, {"template": "chatml", "template_args": {"a": 1}}, ["data.template", "data.template_args"]),
        (1, {"template": "chatml", "template_args": {"a": 1}}, []),
        (0, {}, []),
        (0, {"template": "chatml", "train": [{"path": "a.jsonl", "format": "text"}]}, []),  # unread_keys says so
    ],
)
def test_a_template_that_no_row_is_rendered_with_is_told(
    templated: int, data: dict[str, object], said: list[str]
) -> None:
    advice = unread_template(config(data={"train": [{"path": "a.jsonl"}], **data}).data, {"templated": templated})
    assert [text.split(":")[0] for text in advice] == said
