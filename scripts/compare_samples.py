"""Prints held-out prompts answered before and after a run, side by side. Usage: compare_samples.py RUN"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sft.runfolder import RunFolder, read_events


def main(run: str) -> None:
    events = list(read_events(RunFolder(Path(run)).metrics))
    samples = [event for event in events if event["event"] == "samples"]
    scores = [event for event in events if event["event"] == "eval"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="The same held-out prompts, before and after", show_lines=True)
    for header in ("prompt", "before", f"after {samples[-1]['step']} steps"):
        table.add_column(header, ratio=1)
    for before, after in zip(samples[0]["samples"], samples[-1]["samples"], strict=True):
        table.add_row(last_message(before["prompt"]), shown(before), shown(after))
    console.print(table)
    console.print(
        f"held-out loss {scores[0]['loss']:.3f} -> {scores[-1]['loss']:.3f}, "
        f"probability of stopping where a turn ends {scores[0]['stop_probability']:.2f} -> "
        f"{scores[-1]['stop_probability']:.2f}"
    )
    console.print(
        f"\nnext:\n  sft chat {run}                    talk to it\n  open {run}/report.html            curves, data, "
        f"samples\n  sft preview configs/quickstart.yaml   what was trained, token by token\n"
        f"  sft init my.jsonl --model NAME        your own data and model",
        highlight=False,
        soft_wrap=True,
    )


def last_message(prompt: str) -> str:
    """The user's words in a ChatML prompt."""
    return prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].strip()


def shown(sample: dict[str, Any]) -> str:
    return str(sample["completion"]).strip() + ("" if sample["stopped"] else " […]")


if __name__ == "__main__":
    main(sys.argv[1])
