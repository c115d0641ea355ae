"""What a config, its data and its model make of each other that a user would hardly have meant: told, not refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sft.schedule import Plan, share_or_steps

if TYPE_CHECKING:
    from sft.config import Config, Data

RENDERED = "rendered_template"  # as sft.data.rendered counts them


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


MOST_COLUMNS = 12
"""Lines about keys of rows; a longer list stays in the data's report."""


def columns_unread(report: Mapping[str, Any]) -> Iterator[str]:
    """Of keys of rows that nothing reads: how many rows have them, one example and the cure. `report`: of the data."""
    told = report.get("unread") or []
    for entry in told[:MOST_COLUMNS]:
        yield f"not read: {rows_with(entry)}. {entry['cure']}"
    if len(told) > MOST_COLUMNS:
        yield f"not read: {len(told) - MOST_COLUMNS:,} further keys; data.json and data_report.jsonl list them all"


def columns_read_as(report: Mapping[str, Any]) -> Iterator[str]:
    """Of keys of rows that were read under one of our names."""
    told = report.get("read_as") or []
    for entry in told[:MOST_COLUMNS]:
        yield f"read as {entry['read_as']}: {rows_with(entry)}"
    if len(told) > MOST_COLUMNS:
        yield f"read under another name: {len(told) - MOST_COLUMNS:,} further keys; data.json lists them all"


def rows_with(entry: Mapping[str, Any]) -> str:
    """`parent_id, 12 rows (100%) of a.jsonl, e.g. a.jsonl:1: 7`."""
    rows = f"{entry['rows']:,} row{'s' * (entry['rows'] != 1)} ({entry['share']:.0%})"
    return f"{entry['key']}, {rows} of {entry['source']}, e.g. {entry['at']}: {entry['example']}"


def rendered_rows(report: Mapping[str, Any]) -> Iterator[str]:
    """Rows whose text is a rendered chat template, or ends with an end token. `report`: of the data."""
    sides = [report, *([report["eval"]] if report.get("eval") else [])]
    found = sum(side["altered"].get(RENDERED, 0) for side in sides)
    rows = sum(side["kept"] for side in sides)
    if found:
        yield (
            f"{found:,} of {rows:,} rows hold what a chat template writes (headers of turns, BOS, an end token of "
            "their own), which is trained as ordinary characters. Set data.control_tokens_in_text: allow to read it as "
            "the tokens it spells, or give the rows as messages and let the template write it"
        )


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


def kept_nulls(report: Mapping[str, Any]) -> Iterator[str]:
    """Of tool calls with null arguments which no schema decides about. `report`: of the data."""
    rows = sum(side["altered"].get("nulls_kept", 0) for side in (report, report.get("eval") or {"altered": {}}))
    if rows:
        yield (
            f"in {rows:,} rows, tool calls hold null arguments, and no schema says whether null is meant: they are "
            "trained as they are. A table writes such nulls for keys of other rows (Dataset.to_json): if this is one, "
            "give the Parquet or Arrow file itself, or the tools with their schemas"
        )
