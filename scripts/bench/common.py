"""What the benchmarks share: the model, the rows, memory, medians."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def rows(path: str, count: int) -> list[dict[str, str]]:
    """The first `count` rows with `question` and `answer`, repeated where the file is shorter."""
    with open(path, encoding="utf-8") as stream:
        found = [json.loads(line) for _, line in zip(range(count), stream, strict=False)]
    return [found[i % len(found)] for i in range(count)]


def conversation(row: dict[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def write_jsonl(path: Path, values: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def peak_gib(children: bool = False) -> float:
    """Peak resident memory of this process, or of its ended children, in GiB."""
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss / 2**20


def run_json(command: Sequence[str], **options: Any) -> Any:
    """Runs a command whose last line of output is JSON, and returns that."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def spread(values: Sequence[float]) -> str:
    """`median (min to max)`."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"
