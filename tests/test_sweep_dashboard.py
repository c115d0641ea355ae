"""Optuna's own dashboard opens the storage of a sweep, journal or database, and shows what the table says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from test_sweep import FAULTS, here, run, table  # noqa: F401
from test_sweep_postgres import PASSWORD, Server, binaries, server, shared  # noqa: F401

from sft.trial import free_port

PROGRAM = shutil.which("optuna-dashboard")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no optuna-dashboard here (pip install optuna-dashboard)"),
]
# The base, one that raises, one that is pruned: every state that a trial can end in.
POINTS = "first=[base, {model.lora.rank: 1}, {optim.lr: 1.0e-5, model.lora.rank: 8}]"
SPACE = "space.model.lora.rank=[8,16,1]"
PRUNER = "pruner={type: median, startup_trials: 1, warmup: 0}"


@contextmanager
def dashboard(storage: str, **env: str) -> Iterator[str]:
    """The address of a dashboard on `storage`."""
    assert PROGRAM is not None
    port = free_port(set())
    command = [PROGRAM, "--port", str(port), storage]
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{port}/"):
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline, "the dashboard never answered"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except URLError:
        return False
    return True


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def check(address: str, folder: str) -> None:
    """The study bears the sweep's name; numbers, states, values, points and curves are those of the table."""
    (study,) = [s for s in fetch(f"{address}/api/studies")["study_summaries"] if s["study_name"] == folder]
    assert study["directions"] == ["minimize"]
    trials = fetch(f"{address}/api/studies/{study['study_id']}")["trials"]
    rows = table(folder)
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert [trial["state"] for trial in trials] == ["Complete", "Fail", "Pruned"]
    assert [row["state"] for row in rows] == ["complete", "failed", "pruned"]
    assert trials[0]["values"] == [float(rows[0]["value"])]
    for trial, row in zip(trials, rows, strict=True):
        shown = {param["name"]: float(param["param_external_value"]) for param in trial["params"]}
        assert shown == {key: float(row[key]) for key in ("optim.lr", "model.lora.rank")}
    assert [value["step"] for value in trials[0]["intermediate_values"]] == [1, 2, 3, 4]


def test_it_opens_the_journal(here):  # noqa: F811
    code, _, err = run("trials=3", POINTS, SPACE, PRUNER, faults=FAULTS, step_seconds=0.3)
    assert code == 0, err
    with dashboard("sw/study.journal") as address:
        check(address, "sw")
    before = Path("sw/trials.csv").read_text()
    code, _, err = run("trials=3", POINTS, SPACE, PRUNER)  # it left the sweep as it was
    assert code == 0, err
    assert Path("sw/trials.csv").read_text() == before


@pytest.mark.skipif(binaries() is None, reason="no PostgreSQL server here (apt-get install postgresql)")
def test_it_opens_the_database(shared: str, server: Server):  # noqa: F811
    code, _, err = run("trials=3", POINTS, SPACE, PRUNER, faults=FAULTS, step_seconds=0.3)
    assert code == 0, err
    url = server.url.replace(f":{PASSWORD}@", "@").replace("postgresql:", "postgresql+psycopg:")
    with dashboard(url, PGPASSWORD=PASSWORD) as address:
        check(address, shared)
