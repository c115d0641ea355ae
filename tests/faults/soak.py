"""Kills runs at random moments, resumes them until they are done, and compares the end with the uninterrupted run.

    scripts/soak [--minutes 30] [--seed 0] [--processes 1,2,3] [--out FILE]

Each round takes a tuning and a number of processes, and signals a rank or all of them at a moment drawn at random:
SIGKILL, SIGTERM, SIGINT, a second SIGTERM. After each blow, whatever bears a checkpoint's name must verify. At the end
weights, optimizer state and every logged number must be bitwise those of the reference; in elastic rounds, where the
number of processes changes at each resume, losses must agree within 1e-6. Exits 1 at the first difference.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import Job, assert_same_run, shared

from sft.checkpoint import verify

TUNINGS = {
    "full": [],
    "lora": ["model.tuning=lora", "model.lora.rank=4", "model.lora.dropout=0.1"],
    "qlora": ["model.tuning=qlora", "model.lora.rank=4", "model.lora.dropout=0.1"],
}
BLOWS = ["SIGKILL", "SIGKILL to one", "SIGTERM", "SIGINT", "SIGTERM twice"]
LENGTH = ["train.epochs=4", "save.every=3", "eval.every=5"]  # 16 steps
MOST_BLOWS = 40  # in one run; then it is let finish


class Soak:
    def __init__(self, folder: Path, seed: int, processes: list[int]) -> None:
        self.folder, self.chance, self.processes = folder, random.Random(seed), processes
        self.references: dict[tuple[str, int], Job] = {}
        self.durations: dict[tuple[str, int], float] = {}
        self.blows: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.rounds: Counter[str] = Counter()
        self.resumes = self.checkpoints_verified = 0
        self.worst_loss_difference = 0.0

    def reference(self, tuning: str, world: int, *, plain: bool = False) -> Job:
        key = (tuning + ("-plain" if plain else ""), world)
        if key not in self.references:
            job = self.job(f"reference-{key[0]}-{world}", tuning, plain=plain)
            self.durations[key] = job.train(world=world).seconds
            self.references[key] = job
        return self.references[key]

    def job(self, name: str, tuning: str, *, plain: bool = False) -> Job:
        model = [f"model.name={shared() / 'plain'}"] if plain else []
        dropout = [] if plain else TUNINGS[tuning]
        return Job(
            self.folder / name, *LENGTH, *(dropout or [o for o in TUNINGS[tuning] if "dropout" not in o]), *model
        )

    def exact_round(self, number: int) -> None:
        tuning, world = self.chance.choice(sorted(TUNINGS)), self.chance.choice(self.processes)
        reference = self.reference(tuning, world)
        job = self.job(f"round-{number}", tuning)
        self.beat_until_done(job, lambda: world, self.durations[tuning, world])
        assert_same_run(job, reference)
        self.rounds[f"{tuning}, {world} processes"] += 1
        shutil.rmtree(job.config.parent)

    def elastic_round(self, number: int) -> None:
        reference = self.reference("full", 1, plain=True)
        job = self.job(f"round-{number}", "full", plain=True)
        self.beat_until_done(job, lambda: self.chance.choice(self.processes), self.durations["full-plain", 1])
        trains = [[e for e in j.events if e["event"] == "train"] for j in (reference, job)]
        assert len(trains[0]) == len(trains[1])
        for one, other in zip(*trains, strict=True):
            assert (one["step"], one["batch"], one["learning_rate"]) == (
                other["step"], other["batch"], other["learning_rate"],
            )  # fmt: skip
            difference = abs(one["loss"] - other["loss"]) / one["loss"]
            self.worst_loss_difference = max(self.worst_loss_difference, difference)
            assert math.isclose(one["loss"], other["loss"], rel_tol=1e-6)
        self.rounds["elastic"] += 1
        shutil.rmtree(job.config.parent)

    def beat_until_done(self, job: Job, world: Any, duration: float) -> None:
        for attempt in range(MOST_BLOWS + 1):
            self.resumes += attempt > 0
            run = job.start(world=world())
            if attempt < MOST_BLOWS:
                self.strike(run, self.chance.uniform(0, duration))
            outcome = run.wait(300)
            self.ends[",".join(str(code) for code in sorted(set(outcome.codes)))] += 1
            assert 2 not in outcome.codes, outcome.output  # a blow never makes a run unfit to resume
            for path in (job.run_dir / "checkpoints").glob("step-*"):
                verify(path)
                self.checkpoints_verified += 1
            if set(outcome.codes) == {0}:
                return
        raise AssertionError(f"not done after {MOST_BLOWS} blows")

    def strike(self, run: Any, delay: float) -> None:
        time.sleep(delay)
        living = [rank for rank, pid in enumerate(run.pids) if run.forge.poll(pid) is None]
        if len(living) < len(run.pids):
            return  # done before the blow fell
        blow = self.chance.choice(BLOWS)
        self.blows[blow] += 1
        if blow == "SIGKILL":
            run.kill()
        elif blow == "SIGKILL to one":
            run.signal(signal.SIGKILL, self.chance.choice(living))
        else:
            rank = self.chance.choice(living)
            run.signal(signal.SIGINT if blow == "SIGINT" else signal.SIGTERM, rank)
            if blow == "SIGTERM twice":
                time.sleep(2.2)
                if run.forge.poll(run.pids[rank]) is None:
                    run.signal(signal.SIGTERM, rank)

    def figures(self, minutes: float) -> dict[str, Any]:
        return {
            "minutes": round(minutes, 1),
            "runs, all equal to their reference": sum(self.rounds.values()),
            "by kind": dict(sorted(self.rounds.items())),
            "blows": dict(sorted(self.blows.items())),
            "resumes": self.resumes,
            "exit codes": dict(sorted(self.ends.items())),
            "checkpoints verified": self.checkpoints_verified,
            "worst relative loss difference, elastic": self.worst_loss_difference,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", default="1,2,3")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sft-soak-"))
    soak = Soak(folder, options.seed, [int(count) for count in options.processes.split(",")])
    began, number = time.monotonic(), 0
    while (minutes := (time.monotonic() - began) / 60) < options.minutes:
        number += 1
        (soak.elastic_round if number % 4 == 0 else soak.exact_round)(number)
        print(f"{minutes:5.1f} min  round {number}: equal; blows so far {sum(soak.blows.values())}", flush=True)
    figures = json.dumps(soak.figures((time.monotonic() - began) / 60), indent=2)
    print(figures)
    if options.out:
        options.out.write_text(figures + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
