"""Runs a sweep, kills its driver twice and one of its trials once, and holds what it promises against what it leaves.

    sweep_demo.py [SWEEP] [key=value …] [--picture FILE]

Checked: the total is exact, the killed trial failed alone, no trial trained a step twice, and `sft train best.yaml`
ends with the winner's value to the last digit. Exit code 1 where one of these is not so.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from sft.pages import duration
from sft.report import write_report
from sft.runfolder import RunFolder, read_events
from sft.sweepfile import LoadedSweep, load_sweep

BLOWS = ((1 / 6, "driver"), (1 / 3, "trial"), (1 / 2, "driver"))  # (share of the trials that have ended, victim)
PATIENCE = 1800.0  # seconds for a trial to end
WIDTH, HEIGHT = 1240, 1240  # of the picture: down to the parallel coordinates


def main(words: list[str]) -> int:
    picture = Path(words.pop(words.index("--picture") + 1)) if "--picture" in words else None
    words = [word for word in words if word != "--picture"]
    sweep = words.pop(0) if words and "=" not in words[0] else "configs/sweep.yaml"
    loaded = load_sweep(sweep, words)
    if loaded.dir.exists():
        sys.exit(f"{loaded.dir} is there already; move it away, or choose another: dir=…")
    began = time.monotonic()
    killed = run_and_kill(loaded, [sys.executable, "-m", "sft", "sweep", sweep, *words])
    good = [*check_trials(loaded, killed), check_winner(loaded)]
    say(f"all in {duration(time.monotonic() - began)}")
    page = write_report(loaded.dir)
    if picture is not None:
        take_picture(page, picture)
    return 0 if all(good) else 1


# The sweep ----------------------------------------------------------------------------------------------------------


def run_and_kill(loaded: LoadedSweep, command: list[str]) -> str:
    """The sweep from its first trial to its last, with blows on the way. The number of the trial that was killed."""
    driver, killed = subprocess.Popen(command), ""
    for share, victim in BLOWS:
        wait_for(partial(is_time, loaded, share, driver), driver)
        if victim == "trial":
            killed, process = next(iter(trainers(driver).items()))
            say(f"SIGKILL to trial {int(killed)}")
            process.kill()
        else:
            say(f"SIGKILL to the driver: {ended(loaded)} of {loaded.total} trials have ended. The same command again:")
            driver.kill()
            driver.wait()
            driver = subprocess.Popen(command)
    if driver.wait() != 0:
        sys.exit(f"the sweep ended with exit code {driver.returncode}")
    return killed


def is_time(loaded: LoadedSweep, share: float, driver: subprocess.Popen[bytes]) -> bool:
    return ended(loaded) >= share * loaded.total and bool(trainers(driver))


def wait_for(condition: Callable[[], object], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            sys.exit("the sweep was over, or stood still, before it could be killed")
        time.sleep(0.2)


def rows(loaded: LoadedSweep) -> list[dict[str, str]]:
    table = loaded.dir / "trials.csv"
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def ended(loaded: LoadedSweep) -> int:
    return sum(row["state"] in ("complete", "pruned", "failed") for row in rows(loaded))


def trainers(driver: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The driver's processes that are in the middle of training, by the name of their trial's folder.

    A driver that was killed leaves some that are still stopping; those are not its heir's.
    """
    found = {}
    for process in psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else ():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        config = Path(words[-1]) if words else Path()
        if words[1:4] == ["-m", "sft", "train"] and len(steps(config.with_suffix(""))) > 1:
            found[config.stem] = process
    return found


# What it promises ---------------------------------------------------------------------------------------------------


def check_trials(loaded: LoadedSweep, killed: str) -> list[bool]:
    table = rows(loaded)
    failed = [row["trial"] for row in table if row["state"] == "failed"]
    trained = [steps(Path(row["run"])) for row in table]
    return [
        told(f"{len(table)} trials, {loaded.total} asked for, all ended", len(table) == loaded.total == ended(loaded)),
        told(f"trial {int(killed)} was killed, and failed alone: {failed}", failed == [str(int(killed))]),
        told("no trial trained a step twice or left one out", all(s == list(range(1, len(s) + 1)) for s in trained)),
    ]


def check_winner(loaded: LoadedSweep) -> bool:
    """`sft train best.yaml`, nothing else, ends where the best trial did."""
    subprocess.run([sys.executable, "-m", "sft", "train", str(loaded.dir / "best.yaml")], check=True)
    values = [float(row["value"]) for row in rows(loaded) if row["state"] == "complete"]
    best = min(values) if loaded.direction == "minimize" else max(values)
    scores = [e[loaded.metric_key] for e in events(loaded.dir / "best") if e["event"] == "eval"]
    what = f"best.yaml trained alone ends with {loaded.spec.metric} {scores[-1]!r}, in the sweep it was {best!r}"
    return told(what, scores[-1] == best)


def events(run: Path) -> list[dict[str, object]]:
    return list(read_events(RunFolder(run).metrics))


def steps(run: Path) -> list[object]:
    return [event["step"] for event in events(run) if event["event"] == "train"]


def told(what: str, holds: bool) -> bool:
    say(f"{'holds' if holds else 'DOES NOT HOLD'}: {what}")
    return holds


def say(text: str) -> None:
    print(f"--- {text}", file=sys.stderr, flush=True)


# Its picture --------------------------------------------------------------------------------------------------------


def take_picture(page: Path, target: Path) -> None:
    """The head of a page as PNG, by a headless browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no picture of {page}: none of {', '.join(names)} is on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                f"--user-data-dir={profile}", "--virtual-time-budget=3000", f"--window-size={WIDTH},{HEIGHT}",
                f"--screenshot={target.resolve()}", page.resolve().as_uri(),
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    say(f"picture: {target}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
