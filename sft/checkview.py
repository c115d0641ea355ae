"""The picture that `sft check` prints: one block a subject, numbers aligned, problems last and with their cures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from sft.advice import columns_read_as, columns_unread
from sft.pages import num_bytes
from sft.picture import Picture
from sft.schedule import peak_learning_rate, share_or_steps

BARS = " ▁▂▃▄▅▆▇█"
LABEL = 11  # columns of the label in front of each block


def print_picture(picture: Picture, stream: TextIO) -> None:
    """Colours on a terminal, the same text elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    for label, text, style in blocks(picture):
        first, *rest = text.splitlines() or [""]
        line = Text.assemble((f"{label:<{LABEL}}", style or "dim"), (first, style))
        console.print(line)
        for other in rest:
            console.print(Text(" " * LABEL + other, style=style))


def blocks(picture: Picture) -> Iterator[tuple[str, str, str]]:
    """(label, text, style) from top to bottom."""
    yield "config", str(picture.path), ""
    yield "model", model_line(picture), ""
    yield "tuning", tuning_line(picture), ""
    if picture.report["by_source"]:
        yield "data", "\n".join(source_table(picture.report)), ""
        if lines := [line.partition(": ")[2] for line in columns_unread(picture.report)]:
            yield "not read", "\n".join(["columns not read:", *lines]), "yellow"
        if lines := list(columns_read_as(picture.report)):
            yield "read as", "\n".join(line.removeprefix("read as ") for line in lines), ""
        if scored := evaluation_line(picture.report):
            yield "held out", scored, ""
        yield "lengths", "\n".join(length_lines(picture)), ""
    elif picture.rows:
        unreadable = f", {picture.bad_rows:,} of them unreadable" if picture.bad_rows else ""
        yield "data", f"{picture.rows:,} rows read{unreadable}; none could be prepared", ""
    if picture.bundle is not None:
        yield "template", template_line(picture), ""
        yield "stops at", " ".join(picture.bundle.tokenizer.convert_ids_to_tokens(list(picture.bundle.stop_ids))), ""
    if picture.plan is not None:
        yield "steps", "\n".join([steps_line(picture), *picture.on_steps]), ""
    if picture.memory is not None:
        yield "memory", memory_line(picture), ""
    if picture.disk_needed is not None:
        yield "disk", disk_line(picture), ""
    for note in picture.notes:
        yield "note", note, ""
    for warning in picture.warnings:
        yield "warning", warning, "yellow"
    for problem in picture.problems:
        yield "problem", problem, "bold red"
    yield "", *verdict(picture)


def model_line(picture: Picture) -> str:
    parts = [picture.config.model.name]
    if kind := picture.settings.get("model_type"):
        parts.append(str(kind))
    if picture.parameters:
        parts.append(f"{large(picture.parameters)} parameters")
    context = picture.settings.get("text_config", picture.settings).get("max_position_embeddings")
    if context:
        parts.append(f"context {context:,}")
    return " · ".join(parts)


def tuning_line(picture: Picture) -> str:
    model, optim = picture.config.model, picture.config.optim
    name = {"full": "full finetune", "lora": "LoRA", "qlora": "QLoRA"}[model.tuning]
    if model.tuning != "full":
        name += f", rank {model.lora.rank}"
    trained, every = picture.trained_parameters, picture.parameters
    share = f"about {large(trained)} trained ({trained / every:.1%})" if trained and every else ""
    steps = f"{optim.type}, lr {peak_learning_rate(picture.config):g}, {optim.schedule}"
    return " · ".join(part for part in (name, share, f"{picture.precision} on {picture.device}", steps) if part)


def source_table(report: dict[str, Any]) -> list[str]:
    """A line for each source, and their sum; columns as wide as their widest entry."""
    head = ["source", "format", "rows", "kept", "held out", "dropped", "cut", "examples", "tokens", "of them trained"]
    rows = [[row["path"], row["format"], *counts(row)] for row in report["by_source"]]
    if len(rows) > 1:
        rows.append(["all", "", *counts(report)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(
            entry.ljust(width) if column < 2 else entry.rjust(width)
            for column, (entry, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    reasons = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in report["dropped"].items())
    altered = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in report["altered"].items())
    lines += [f"dropped: {reasons}"] if reasons else []
    return lines + ([f"altered: {altered}"] if altered else [])


def counts(row: dict[str, Any]) -> list[str]:
    share = row["trained_tokens"] / max(1, row["tokens"])
    numbers = [row["rows"], row["kept"], row["held_out"], sum(row["dropped"].values()), row["cut"], row["examples"]]
    return [f"{number:,}" for number in [*numbers, row["tokens"]]] + [f"{share:.1%}"]


def evaluation_line(report: dict[str, Any]) -> str:
    scored = report.get("eval")
    if not scored:
        return ""
    return f"{scored['kept']:,} conversations, {scored['tokens']:,} tokens, {scored['trained_tokens']:,} of them scored"


def length_lines(picture: Picture) -> list[str]:
    """A histogram in one line, and the lengths that matter. Tokens of one example."""
    import numpy as np

    assert picture.prepared is not None
    lengths_E = picture.prepared.train.lengths_E
    bars = [bar["value"] for bar in picture.report["length_histogram"]]
    high = max(bars, default=0)
    drawn = "".join(BARS[0 if not bar else max(1, round(bar / high * (len(BARS) - 1)))] for bar in bars)
    end = picture.report["length_histogram"][-1]["to"] if bars else 0
    middle, late = (int(value) for value in np.quantile(lengths_E, [0.5, 0.95]))
    return [
        f"0 ▕{drawn}▏ {end:,}",
        f"half of the examples have at most {middle:,} tokens, 95% at most {late:,}, "
        f"the longest {int(lengths_E.max()):,} (data.max_tokens {picture.config.data.max_tokens:,})",
    ]


def template_line(picture: Picture) -> str:
    assert picture.bundle is not None
    report = picture.report
    number = report["examples"] + (report["eval"]["examples"] if report.get("eval") else 0)
    name = f"{picture.bundle.template_name}, data.train_on: {picture.config.data.train_on}"
    if not number:
        return f"{name}; nothing to prove yet"
    those = f"all {number:,} examples" if number > 1 else "the one example"
    return f"{name}; proven for {those}: each trained span decodes to its message"


def steps_line(picture: Picture) -> str:
    plan, config = picture.plan, picture.config
    assert plan is not None
    total = plan.total_steps
    epochs = total / plan.steps_per_epoch
    tokens = picture.report["tokens"] / max(1, picture.report["kept"]) * plan.conversations_per_step
    line = (
        f"{total:,} of {plan.conversations_per_step} conversations, about {tokens:,.0f} tokens each; "
        f"{epochs:g} epoch{'s' * (epochs != 1)} of {plan.steps_per_epoch:,}"
    )
    save = share_or_steps(config.save.every, total)
    evaluation = picture.evals.every_steps if picture.evals else 0
    line += f"; evaluation every {evaluation:,}" if evaluation else ""
    return line + (f"; checkpoint every {save:,}" if save else "; one checkpoint, at the end")


def memory_line(picture: Picture) -> str:
    memory = picture.memory
    assert memory is not None
    parts = ", ".join(
        f"{name} {num_bytes(size)}"
        for name, size in (
            ("weights", memory.weights), ("gradients", memory.gradients), ("optimizer", memory.optimizer),
            ("activations", memory.activations), ("logits", memory.logits),
        )
    )  # fmt: skip
    return (
        f"about {num_bytes(memory.total)} of {num_bytes(picture.available)} free on {picture.device}, "
        f"for micro-batches of {picture.micro_tokens:,} tokens\n{parts}"
    )


def disk_line(picture: Picture) -> str:
    keep = picture.config.save.keep
    return (
        f"about {num_bytes(picture.disk_needed)} for {keep + 1} checkpoints and final/ in {picture.run_dir}, "
        f"{num_bytes(picture.disk_free)} free"
    )


def verdict(picture: Picture) -> tuple[str, str]:
    number = len(picture.problems)
    if number:
        return f"{number} problem{'s' * (number != 1)} to solve before training.", "bold red"
    return f"No problems. Look at the data: sft preview {picture.path}   Then: sft train {picture.path}", "bold green"


def large(number: float) -> str:
    """134515008 -> 134.5 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
