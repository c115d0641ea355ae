"""What a config, its data and its model make of each other that a user would hardly have meant: told, not refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sft.schedule import Plan, share_or_steps

if TYPE_CHECKING:
    from sft.config import Config, Data


def advice_on_steps(config: Config, plan: Plan, conversations: int) -> Iterator[str]:
    """Of a plan of steps over so many training conversations."""
    step, total = config.batch.examples, plan.total_steps
    if conversations < step:
        yield f"batch.examples: a step takes {step} conversations, the data has {conversations}: each epoch is one step"
    warmup = share_or_steps(config.optim.warmup, total)
    if warmup >= total > 1:
        yield (
            f"optim.warmup: {warmup:,} of the run's {total:,} steps warm up: the learning rate reaches its peak at the "
            "end, if at all. Write a share such as 0.03"
        )


def beyond_context(settings: Mapping[str, Any], longest: int, max_tokens: int) -> str | None:
    """Says that examples are longer than the positions a model knows. `settings`: its config.json."""
    context = settings.get("text_config", settings).get("max_position_embeddings")
    if not isinstance(context, int) or longest <= context:
        return None
    return (
        f"data.max_tokens: {max_tokens:,} lets examples of {longest:,} tokens in, but the model's context ends at "
        f"{context:,}. Set data.max_tokens: {context}."
    )


def unread_arguments(template: str | None, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Of `data.template_args`, those whose names the template's text never mentions."""
    for name in arguments:
        if template is not None and name not in template:
            yield f"data.template_args.{name}: the template in use never reads {name}"


def unread_template(data: Data, report: Mapping[str, Any]) -> Iterator[str]:
    """Of the keys that choose a template, those that are set although no row was rendered. `report`: of the data.

    Where the config itself says that all rows are text, its reader has said so already.
    """
    if report["templated"] or all(source.format == "text" for source in data.train):
        return
    for key, value, default in (
        ("template", data.template, "model"), ("template_args", data.template_args, {}),
        ("reasoning", data.reasoning, None),
    ):  # fmt: skip
        if value != default:
            yield f"data.{key}: all rows are text or pairs of strings, which no template renders"
