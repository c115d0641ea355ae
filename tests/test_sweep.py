"""Sweeps as users run them: real drivers, real trials (of a stand-in trainer), real kills."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from sweep_trainer import loss_at

from sft.configfile import load_config
from sft.runfolder import read_events

TRAINER = Path(__file__).with_name("sweep_trainer.py")
BASE = """\
model: {name: some/model}
data:
  train: [{path: rows.jsonl}]
  eval: 2
train: {max_steps: 8}
eval: {every: 0.25}
"""
SWEEP = f"""\
config: base.yaml
dir: sw
trials: 4
sampler: random
lease: 6
launch: [{sys.executable}, {TRAINER}]
space:
  optim.lr: {{low: 1.0e-5, high: 1.0e-3, log: true}}
  model.lora.rank: [8, 16, 32]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("rows.jsonl").write_text('{"messages": []}\n')
    Path("sweep.yaml").write_text(SWEEP)
    yield tmp_path
    for process in psutil.process_iter():  # a failed test leaves nothing running: only what works in its own folder
        try:
            if process.cwd() == str(tmp_path) and process.pid != os.getpid():
                process.kill()
        except psutil.Error:
            continue


def start(*overrides: str, **settings: Any) -> subprocess.Popen[str]:
    settings = {"starts": str(Path("starts.jsonl").resolve()), **settings}
    env = {**os.environ, "SWEEP_TEST": json.dumps(settings), "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-m", "sft", "sweep", "sweep.yaml", *overrides],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*overrides: str, **settings: Any) -> tuple[int, str, str]:
    process = start(*overrides, **settings)
    out, err = process.communicate()  # pytest-timeout watches
    return process.returncode, out, err


def table(folder: str = "sw") -> list[dict[str, str]]:
    with open(Path(folder) / "trials.csv") as stream:
        return list(csv.DictReader(stream))


def starts() -> list[dict[str, Any]]:
    path = Path("starts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def steps_of(run_dir: str) -> list[int]:
    return [event["step"] for event in read_events(Path(run_dir) / "metrics.jsonl") if event["event"] == "train"]


def trainers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(TRAINER) in process.cmdline() and "keeper.py" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid in {start["pid"] for start in starts()}]


def test_a_sweep_from_file_to_best_config():
    code, out, err = run("workers=2")
    assert code == 0, err
    rows = table()
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert list(rows[0]) == ["trial", "state", "value", "seconds", "run", "reason", "optim.lr", "model.lora.rank"]
    for row in rows:
        assert float(row["value"]) == loss_at(float(row["optim.lr"]), int(row["model.lora.rank"]), 8, 8)
        assert row["seconds"] == "4.0"
        assert Path(row["run"], "metrics.jsonl").exists()
    assert (rows[0]["optim.lr"], rows[0]["model.lora.rank"]) == ("0.0002", "16")  # the base config came first
    one, two = starts()[:2]  # side by side, each with its own devices
    assert one["port"] != two["port"]
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) == 1 or sorted(one["cores"] + two["cores"]) == cores
    assert one["threads"] == "1"
    best = min(rows, key=lambda row: float(row["value"]))
    config = load_config("sw/best.yaml")
    assert config.config.optim.lr == float(best["optim.lr"])
    assert config.config.model.lora.rank == int(best["model.lora.rank"])
    assert config.config.batch.micro_tokens == 64  # what auto became in the winner
    assert config.run_dir == Path("sw/best")
    assert not config.unread
    assert f"trial {best['trial']}: eval.loss" in out
    assert len(err.splitlines()) == 5  # one line to begin, one a finished trial
    page = Path("sw/report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    # optuna's own tools (its dashboard) read the journal
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sw/study.journal"))
    assert optuna.load_study(study_name="sw", storage=journal).best_value == float(best["value"])
    # and the best config, run by itself, gives the same value
    done = subprocess.run([sys.executable, TRAINER, "sw/best.yaml"], env={**os.environ, "MASTER_PORT": "0"}, check=True)
    assert done.returncode == 0
    *_, last = (event for event in read_events(Path("sw/best/metrics.jsonl")) if event["event"] == "eval")
    assert last["loss"] == float(best["value"])


@pytest.mark.slow
def test_a_finished_sweep_says_so_and_runs_nothing():
    run("trials=1")
    before = Path("starts.jsonl").read_text()
    code, out, _ = run("trials=1")
    assert code == 0
    assert "trials     1 complete" in out
    assert Path("starts.jsonl").read_text() == before
    code, _, _ = run("trials=2")  # more trials continue it
    assert [row["state"] for row in table()] == ["complete"] * 2


FAULTS = {"1": "raise", "2": "segfault", "3": "kill", "4": "nan", "5": "usererror"}


def test_trials_fail_alone_with_their_reason_and_the_tail_of_their_log():
    grid = ["sampler=grid", "trials=null", "space.optim.lr=[1e-4]", "space.model.lora.rank=[1,2,3,4,5,6]"]
    code, _, err = run(*grid, "workers=2", faults=FAULTS)
    assert code == 0, err
    rows = {row["model.lora.rank"]: row for row in table()}
    assert {rank: row["state"] for rank, row in rows.items()} == {**dict.fromkeys("12345", "failed"), "6": "complete"}
    assert rows["1"]["reason"] == "exit code 1: RuntimeError: a deliberate fault"
    assert rows["2"]["reason"] == "killed by SIGSEGV"
    assert rows["3"]["reason"] == "killed by SIGKILL (out of memory?)"
    assert rows["4"]["reason"] == "eval.loss is not finite at step 2"
    assert rows["5"]["reason"] == "data.jsonl:7: no answer here"
    summary = json.loads(Path("sw/sweep.json").read_text())
    tails = {trial["values"]["model.lora.rank"]: trial["tail"] for trial in summary["trials"]}
    assert "Traceback" in tails[1]
    assert load_config("sw/best.yaml").config.model.lora.rank == 6


def test_all_failed_is_a_failure_without_a_best_config():
    code, out, _ = run("space.model.lora.rank=[1]", "first=[]", "trials=1", faults=FAULTS)
    assert code == 1
    assert "no trial succeeded" in out
    assert "a deliberate fault" in out
    assert not Path("sw/best.yaml").exists()


def test_pruned_trials_stop_cleanly_and_keep_their_last_value():
    points = ["{optim.lr: 1e-4, model.lora.rank: 8}", "{optim.lr: 1e-3}", "{optim.lr: 1e-5, model.lora.rank: 8}"]
    first = f"first=[{', '.join(points)}]"
    code, _, err = run("pruner={type: median, startup_trials: 1, warmup: 0}", first, "trials=3", step_seconds=0.1)
    assert code == 0, err
    rows = table()
    assert [row["state"] for row in rows] == ["complete", "pruned", "pruned"]
    assert rows[1]["reason"] == "pruned at step 2"
    assert json.loads(Path("sw/trials/0001/status.json").read_text())["state"] == "stopped"
    assert float(rows[1]["value"]) > float(rows[0]["value"])


def test_repeats_give_the_mean_over_seeds():
    code, _, err = run("repeats=2", "trials=1")
    assert code == 0, err
    (row,) = table()
    assert float(row["value"]) == pytest.approx((loss_at(2e-4, 16, 8, 8, 0) + loss_at(2e-4, 16, 8, 8, 1)) / 2)
    assert [start["run"] for start in starts()] == ["seed-0", "seed-1"]


def test_the_driver_stopped_and_started_again_goes_on_where_it_was():
    driver = start("workers=2", "trials=2", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[2:] and steps_of("sw/trials/0001")[2:])
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 75, err
    assert "the same command goes on" in err
    assert not trainers()
    assert [row["state"] for row in table()] == ["running"] * 2
    code, _, err = run("workers=2", "trials=2")
    assert code == 0, err
    assert "continuing, 0 of 2" in err or "2 trials" in err
    assert [row["state"] for row in table()] == ["complete"] * 2
    for folder in ("sw/trials/0000", "sw/trials/0001"):
        assert steps_of(folder) == list(range(1, 9))
    assert all(start["step"] > 0 for start in starts()[2:])


def test_the_driver_killed_and_started_again_goes_on_where_it_was():
    driver = start("workers=2", "trials=3", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[2:] and steps_of("sw/trials/0001")[2:])
    driver.kill()
    driver.communicate()
    code, _, err = run("workers=2", "trials=3")  # at once: what the dead driver left is still stopping
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete"] * 3
    assert all(steps_of(f"sw/trials/000{n}") == list(range(1, 9)) for n in range(3))
    again = [start for start in starts()[2:] if start["run"] in ("0000", "0001")]
    assert len(again) == 2
    assert all(start["step"] > 0 for start in again)


@pytest.mark.slow
def test_everything_killed_at_once_like_a_machine_that_loses_power():
    driver = start("trials=2", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[2:])
    for process in [*psutil.Process(driver.pid).children(recursive=True), driver]:
        process.kill()
    driver.communicate()
    with open("sw/study.journal", "ab") as journal:
        journal.write(b'{"op_code": 8, "wor')
    code, _, err = run("trials=2")
    assert code == 0, err
    assert [row["state"] for row in table()] == ["complete"] * 2
    assert steps_of("sw/trials/0000") == list(range(1, 9))


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_sweep_goes_on_when_there_is_room():
    """A limit on the size of files stands in for a full disk: report.html is the first that does not fit."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY)); "
    code += "from sft.sweep import sweep; from sft.errors import DiskError\n"
    code += "try:\n    sweep('sweep.yaml', ['trials=2'])\nexcept DiskError as error:\n    sys.exit(str(error))"
    env = {**os.environ, "SWEEP_TEST": "{}"}
    full = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert full.returncode == 1
    assert "sw: its disk is full (File too large)." in full.stderr
    assert full.stderr.endswith("the same command goes on: sft sweep sweep.yaml\n")
    done, _, err = run("trials=2")
    assert done == 0, err
    assert "continuing, 1 of 2 trials done" in err


@pytest.mark.slow
def test_orphans_end_by_themselves():
    driver = start("trials=1", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[1:])
    driver.kill()
    driver.communicate()
    wait_for(lambda: not trainers(), 10)
    assert json.loads(Path("sw/trials/0000/status.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_a_driver_that_hangs_loses_its_trials_before_another_takes_them():
    """Stopped with SIGSTOP: its keepers hear nothing and stop the trainer, so that two never run in one folder."""
    driver = start("trials=1", "lease=2", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[1:])
    driver.send_signal(signal.SIGSTOP)
    wait_for(lambda: not trainers(), 10)
    driver.send_signal(signal.SIGCONT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert steps_of("sw/trials/0000") == list(range(1, 9))


@pytest.mark.slow
def test_a_trial_stopped_by_somebody_else_goes_on():
    driver = start("trials=1", step_seconds=0.2)
    wait_for(lambda: steps_of("sw/trials/0000")[1:])
    trainers()[0].terminate()
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert len(starts()) == 2
    assert steps_of("sw/trials/0000") == list(range(1, 9))


@pytest.mark.slow
def test_two_drivers_on_one_storage_share_the_work():
    one, two = start(step_seconds=0.03), start(step_seconds=0.03)
    for driver in (one, two):
        _, err = driver.communicate(timeout=120)
        assert driver.returncode == 0, err
    assert [row["state"] for row in table()] == ["complete"] * 4
    assert sorted(start["run"] for start in starts()) == [f"{n:04d}" for n in range(4)]  # each once


@pytest.mark.slow
def test_a_timeout_fails_the_trial_alone():
    code, _, _ = run("trials=1", "timeout=1", step_seconds=0.5)
    assert code == 1
    assert table()[0]["reason"] == "not done after 1 s (timeout)"


def test_a_launcher_that_is_not_there_is_said_before_any_trial():
    code, _, err = run("launch=[nolauncher]")
    assert code == 2
    assert err == "error: launch: there is no program 'nolauncher' on the PATH; install it, or give its full path.\n"
    assert not Path("sw").exists()


def test_help_and_errors_come_without_torch():
    code = (
        "import sys, sft.sweep, sft.sweepstore, sft.sweepresults; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOOKS_LIKE_A_KEY = "data/sk-wikipedia-conversations.jsonl"
MASKED = "data/***.jsonl"


def test_trials_train_on_the_files_that_the_config_names():
    """Written through the mask for credentials, the path would be a pattern that takes in its neighbour."""
    Path("data").mkdir()
    for name in (LOOKS_LIKE_A_KEY, "data/other.jsonl"):
        Path(name).write_text('{"messages": []}\n')
    Path("base.yaml").write_text(BASE.replace("rows.jsonl", LOOKS_LIKE_A_KEY))
    code, _, err = run("trials=2")
    assert code == 0, err
    for file in ("sw/base.yaml", "sw/trials/0000.yaml", "sw/trials/0001.yaml", "sw/best.yaml"):
        assert [source.path for source in load_config(file).config.data.train] == [LOOKS_LIKE_A_KEY], file
    Path("sw/base.yaml").write_text(Path("sw/base.yaml").read_text().replace(LOOKS_LIKE_A_KEY, f'"{MASKED}"'))
    code, _, err = run("trials=3")
    assert code == 2
    assert "sw/base.yaml: an earlier version of sft wrote data.train.0.path with a part masked" in err
    assert "choose another dir" in err


def test_hyperband_shares_out_the_evaluations_that_the_plan_has():
    """14 steps at a tenth of the run are 14 evaluations, since a step is the least interval; not 10."""
    Path("base.yaml").write_text(BASE.replace("max_steps: 8", "max_steps: 14").replace("every: 0.25", "every: 0.1"))
    code, _, err = run("trials=3", "pruner=hyperband")
    assert code == 0, err
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sw/study.journal"))
    (study,) = optuna.get_all_study_summaries(storage)
    assert study.user_attrs["evaluations"] == 14
    assert max(len(trial.intermediate_values) for trial in optuna.load_study(
        study_name=study.study_name, storage=storage).trials) == 14  # fmt: skip


def test_what_a_trial_would_lack_is_said_before_the_first(monkeypatch):
    Path("base.yaml").write_text(BASE + "log: {trackers: [trackio]}\n")
    code, _, err = run()
    assert code == 2
    assert "error: log.trackers: trackio is not installed." in err
    assert not Path("sw").exists()
