"""Memory that really runs out, and the advice that really helps: a run under a limit on its address space.

What the message advises is given to the same command under the same limit, which must then train.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, make_model
from harness import Job, Outcome, write_rows

PLAIN = [word for word in WORDS if word.isalpha()]
MEGABYTE = 1 << 20


def long_rows(count: int, least: int, most: int) -> list[dict[str, Any]]:
    """Answers of so many words; a word and its space are two tokens."""
    chance = random.Random(0)
    return [
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": " ".join(chance.choices(PLAIN, k=chance.randint(least, most)))},
            ]
        }
        for _ in range(count)
    ]


def large_job(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Job:
    """One step of all rows in one micro-batch, on a model whose activations are far larger than its weights."""
    folder.mkdir()
    make_model(folder / "model", layers=16)
    write_rows(folder / "long.jsonl", rows)
    job = Job(folder, data={"train": [{"path": str(folder / "long.jsonl")}], "eval": 0}, eval={})
    job.overrides = [f"model.name={folder / 'model'}", f"batch.examples={len(rows)}", "train.epochs=1", *overrides]
    return job


def advised(outcome: Outcome, key: str) -> int:
    found = re.search(rf"{key}=(\d+) \(measured to fit", outcome.output)
    assert found, outcome.output
    return int(found[1])


def told(outcome: Outcome, *texts: str) -> None:
    assert outcome.codes == [2], outcome.output
    assert outcome.output.count("error:") == 1
    assert "Traceback" not in outcome.output
    for text in texts:
        assert text in outcome.output


# slow, all of them, since what advises is measured, and what is advised is run
@pytest.mark.slow
def test_the_advised_micro_batch_trains_under_the_limit_that_refused_the_other(tmp_path: Path) -> None:
    job = large_job(tmp_path / "job", long_rows(10, 150, 240), "batch.micro_tokens=100000")
    limit = {"more_memory": 170 * MEGABYTE}
    refused = job.run(**limit)
    told(refused, "step 1, rank 0: out of memory on cpu", "ulimit -v", "weights",
         "optimizer", "a step keeps its 10 conversations", "model.gradient_checkpointing=true")  # fmt: skip
    assert job.status["state"] == "failed"
    tokens = advised(refused, "batch.micro_tokens")
    needed = re.search(r"a micro-batch of ([\d,]+) tokens did not fit", refused.output)
    assert needed
    assert tokens < int(needed[1].replace(",", ""))
    job.train(f"batch.micro_tokens={tokens}", **limit)
    assert job.events[0]["micro_batches"] > 1


@pytest.mark.slow
def test_much_more_than_the_advised_micro_batch_does_not_train(tmp_path: Path) -> None:
    """The control: the advice is not merely small."""
    job = large_job(tmp_path / "job", long_rows(16, 150, 240), "batch.micro_tokens=100000")
    limit = {"more_memory": 170 * MEGABYTE}
    tokens = advised(job.run(**limit), "batch.micro_tokens")
    assert tokens * 1.5 < 6500
    told(job.run(f"batch.micro_tokens={round(tokens * 1.5)}", **limit), "out of memory on cpu")


@pytest.mark.slow
def test_an_example_that_is_too_long_for_the_memory_is_told_how_long_it_may_be(tmp_path: Path) -> None:
    """A single example cannot be split, so `micro_tokens` does not help; the advised `max_tokens` does."""
    rows = [*long_rows(8, 20, 60), *long_rows(1, 4000, 4000)]
    job = large_job(tmp_path / "job", rows, "data.max_tokens=9000", "data.max_dropped=0.5")
    limit = {"more_memory": 250 * MEGABYTE}
    refused = job.run(**limit)
    told(refused, "the longest example alone", "--fresh")
    assert "batch.micro_tokens=" not in refused.output
    job.train(f"data.max_tokens={advised(refused, 'data.max_tokens')}", "--fresh", **limit)
