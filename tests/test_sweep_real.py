"""A sweep of the real trainer on a tiny model: two workers, pruning, killed twice; the winner's config repeats it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_sweep import here, run, start, table, wait_for  # noqa: F401

from sft.configfile import load_config
from sft.runfolder import read_events

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.timeout(900)]

BASE = """\
model: {name: MODEL, precision: fp32}
data:
  train: [{path: rows.jsonl}]
  eval: 16
batch: {examples: 8}
train: {max_steps: 48}
eval: {every: 0.25, samples: 1, max_new_tokens: 4}
save: {every: 0.125}
"""
SWEEP = """\
config: base.yaml
dir: sw
trials: 6
workers: 2
pruner: {type: median, startup_trials: 2, warmup: 0}
space:
  optim.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
  model.lora.rank: [2, 4, 8]
"""
WORDS = ["hello", "world", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def prepared(here, model_folder, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("SFT_CACHE", str(Path("cache").resolve()))
    Path("base.yaml").write_text(BASE.replace("MODEL", str(model_folder)))
    Path("sweep.yaml").write_text(SWEEP)
    draw = random.Random(0)
    with open("rows.jsonl", "w") as rows:
        for _ in range(120):
            asked, told = (" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(2))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            rows.write(json.dumps({"messages": messages}) + "\n")


def last_loss(run_dir: str) -> float:
    return [event["loss"] for event in read_events(Path(run_dir, "metrics.jsonl")) if event["event"] == "eval"][-1]


def logged(run_dir: Path) -> int:
    return sum(event["event"] == "train" for event in read_events(run_dir / "metrics.jsonl"))


def test_killed_twice_and_the_winner_repeats_exactly(prepared):
    for done in (0, 2):
        driver = start()
        wait_for(lambda done=done: any(logged(run) > 20 for run in Path("sw/trials").glob(f"000[{done}-9]")), 120)
        driver.kill()
        driver.communicate()
    code, _, err = run()
    assert code == 0, err
    rows = table()
    assert len(rows) == 6
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    complete = [row for row in rows if row["state"] == "complete"]
    assert all(float(row["value"]) == last_loss(row["run"]) for row in complete)
    for row in rows:
        steps = [event["step"] for event in read_events(Path(row["run"], "metrics.jsonl")) if event["event"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
    best = min(complete, key=lambda row: float(row["value"]))
    assert load_config("sw/best.yaml").config.run.threads == 1
    env = {**os.environ, "OMP_NUM_THREADS": "2"}  # the recorded number counts, not the command's
    subprocess.run([sys.executable, "-m", "sft", "train", "sw/best.yaml"], env=env, check=True, capture_output=True)
    assert last_loss("sw/best") == float(best["value"])


def test_behind_accelerate_launch_pruning_stops_all_ranks(prepared):
    points = "first=[{optim.lr: 3.0e-3, model.lora.rank: 2}, {optim.lr: 1.0e-4, model.lora.rank: 2}]"
    launch = 'launch=[accelerate, launch, --cpu, --num_processes, "2"]'
    pruner = "pruner={type: median, startup_trials: 1, warmup: 0}"
    code, _, err = run(launch, points, pruner, "trials=2", "workers=1")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete", "pruned"]
    status = json.loads(Path("sw/trials/0001/status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 75)
    assert "[1]:" in Path("sw/trials/0001.log").read_text()  # the launcher saw rank 1 leave with 75 too


def test_two_workers_behind_accelerate_launch_do_not_meet(prepared):
    launch = 'launch=[accelerate, launch, --cpu, --num_processes, "2"]'
    code, out, err = run(launch, "trials=2", "train.max_steps=12")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete"] * 2
    said = [json.loads(Path(f"sw/trials/000{n}/environment.json").read_text()) for n in range(2)]
    assert [one["processes"] for one in said] == [2, 2]
    assert "train it: accelerate launch --cpu --num_processes 2 -m sft train sw/best.yaml" in out
    command = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    subprocess.run([*command, "-m", "sft", "train", "sw/best.yaml"], check=True, capture_output=True)
    best = min(table(), key=lambda row: float(row["value"]))
    assert last_loss("sw/best") == float(best["value"])
