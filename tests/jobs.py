"""Small training jobs for tests: rows of very uneven lengths, a config, a run in this process or in real ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from conftest import WORDS

PLAIN = [word for word in WORDS if word.isalpha()]


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations of one to three turns, of two to thirty-six words a message."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(count):
            messages = []
            for _ in range(draw.choice([1, 1, 2, 3])):
                for role in ("user", "assistant"):
                    words = draw.choices(PLAIN, k=draw.choice([2, 5, 12, 36]))
                    messages.append({"role": role, "content": " ".join(words)})
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """A config in `folder` for `model`; `changes` are dotted keys with `__` for the dot."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    config: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {"name": str(model), "tuning": "full", "precision": "fp32"},
        "data": {"train": [{"path": str(rows)}], "eval": 4, "max_tokens": 500},
        "batch": {"examples": 5, "micro_tokens": 4000},
        "optim": {"lr": 1e-3, "schedule": "linear", "warmup": 2},
        "train": {"max_steps": 6},
        "eval": {"every": 3, "samples": 1, "max_new_tokens": 4},
        "save": {"every": 2, "keep": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_here(config: Path, *overrides: str, **options: Any) -> Path:
    """Trains in this process and returns the run folder."""
    from sft.configfile import load_config
    from sft.train import train

    loaded = load_config(config, overrides)
    assert train(loaded, **options) == 0
    return Path(loaded.run_dir)


def run_cli(*arguments: str, processes: int = 1, env: Mapping[str, str] | None = None, timeout: float = 240) -> Any:
    """`sft …` in a process of its own, or under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sft", *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def events(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run)]


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
