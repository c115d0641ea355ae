"""Signals in every phase, and one rank's trouble that ends the whole job in bounded time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import Fault, Job, fault, rows, shared, write_rows

from sft.checkpoint import step_of, verify

STEP = "sft.train:train_step"

PHASES = {
    "preparing": (fault("sft.data.loader:prepare", 1, "SIGTERM"), None),
    "loading the model": (fault("sft.setup:load_base", 1, "SIGTERM"), 0),
    "the first evaluation": (fault("sft.session:Session.evaluate", 1, "SIGTERM"), 0),
    "a step": (fault(STEP, 3, "SIGINT"), 3),
    "an evaluation": (fault("sft.session:Session.evaluate", 2, "SIGTERM"), 4),
    "a save": (fault("sft.checkpoint:_seal", 1, "SIGTERM"), None),
    "the last step": (fault(STEP, 8, "SIGTERM"), 8),
}


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=[] if p in ("preparing", "an evaluation") else pytest.mark.slow) for p in PHASES]
)
def test_a_signal_in_any_phase(tmp_path: Path, phase: str) -> None:
    job = Job(tmp_path)
    struck, at_step = PHASES[phase]
    outcome = job.run(faults=[struck])
    assert outcome.codes == [75], outcome.output
    assert re.search(r"SIGTERM|SIGINT", outcome.output)
    assert (job.status["state"], job.status["code"]) == ("stopped", 75)
    if at_step is not None:
        assert job.status["step"] == at_step
        assert [step_of(checkpoint) for checkpoint in job.checkpoints[:1]] == ([at_step] if at_step else [])
    for checkpoint in job.checkpoints:
        verify(checkpoint)


@pytest.mark.parametrize("where", [STEP, pytest.param("sft.checkpoint:_seal", marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once_and_leaves_the_older_checkpoint(tmp_path: Path, where: str) -> None:
    """The process hangs, in a step or inside the second save; it is asked, and asked again."""
    job = Job(tmp_path)
    call = 4 if where == STEP else 2
    run = job.start(faults=[fault(where, call, "stall")])
    job.wait_for_step(3)
    time.sleep(0.5)
    run.signal(signal.SIGTERM)
    time.sleep(2.3)
    asked = time.monotonic()
    run.signal(signal.SIGTERM)
    outcome = run.wait()
    assert time.monotonic() - asked < 5
    assert outcome.codes == [75], outcome.output
    assert "ending at once" in outcome.output
    assert [step_of(path) for path in job.checkpoints] == [2]
    verify(job.checkpoints[0])


PREPARE = "sft.data.loader:prepare"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("rank", "what"),
    [
        (1, "SIGTERM"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "SIGTERM"), (1, "raise"), (0, "raise"))),
    ],
)
def test_before_there_is_a_group_no_rank_waits_for_one_that_left(tmp_path: Path, rank: int, what: str) -> None:
    """One rank is stopped, or fails, while it prepares; the other is at the meeting, and hears of it."""
    job = Job(tmp_path)
    run = job.start(world=2, faults={rank: [fault(PREPARE, 1, what)]})
    while any(run.forge.poll(pid) is None for pid in run.pids):  # no launcher helps: nobody is signalled
        assert time.monotonic() - run.began < 90, [out.read_text() for out in run.outs]
        time.sleep(0.05)
    outcome = run.wait()
    if what == "SIGTERM":
        assert outcome.codes == [75, 75], outcome.output
        assert f"SIGTERM (rank {rank}, while the data was prepared)" in outcome.outputs[1 - rank]
        assert (job.status["state"], job.status["code"]) == ("stopped", 75)
    else:
        assert outcome.codes == [1, 1], outcome.output
        assert outcome.output.count("Traceback") == 1
        assert f"rank {rank} ended while it prepared the data" in outcome.outputs[1 - rank]
    assert "Traceback" not in outcome.outputs[1 - rank]
    job.train(world=2)


TROUBLE: dict[str, tuple[Fault, str]] = {
    "an exception": (fault(STEP, 3, "raise"), "injected fault"),
    "out of memory": (fault(STEP, 3, "out of memory"), "out of memory"),
    "killed": (fault(STEP, 3, "SIGKILL"), ""),
    "a crash": (fault(STEP, 3, "SIGSEGV"), ""),
    "a stall": (fault(STEP, 3, "stall"), "no progress"),
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("an exception", 1),
        *(
            pytest.param(kind, rank, marks=pytest.mark.slow)
            for kind in TROUBLE
            for rank in (0, 1)
            if (kind, rank) != ("an exception", 1)
        ),
    ],
)
def test_one_rank_in_trouble_ends_all(tmp_path: Path, kind: str, rank: int) -> None:
    job = Job(tmp_path)
    struck, told = TROUBLE[kind]
    outcome = job.run(world=2, faults={rank: [struck]}, stall_seconds=5)
    assert 0 not in outcome.codes
    assert outcome.outputs[1 - rank].count("another rank ended") == 1
    assert "Traceback" not in outcome.outputs[1 - rank]
    assert outcome.seconds < 45
    if told:
        assert told in outcome.outputs[rank]
        assert job.status["state"] == "failed"
        assert told in job.status["reason"]
        assert job.status["step"] in (1, 2)  # what was logged when the rank in trouble looked
    if told or rank == 1:  # else the first rank died with the save of step 2 under way
        assert [step_of(path) for path in job.checkpoints] == [2]
    for checkpoint in job.checkpoints:
        verify(checkpoint)


@pytest.mark.slow
@pytest.mark.dist
def test_a_frozen_rank_is_noticed_by_the_others(tmp_path: Path) -> None:
    """SIGSTOP freezes its watchdog with it, so another's must speak, after its longer patience."""
    job = Job(tmp_path)
    outcome = job.run(world=2, faults={1: [fault(STEP, 3, "SIGSTOP")]}, stall_seconds=3)
    assert outcome.codes == [1, -9], outcome.output
    assert "waiting for another rank, which is the one that stalls" in outcome.outputs[0]
    assert outcome.seconds < 60
    assert "no progress" in job.status["reason"]


@pytest.mark.parametrize(
    "where", ["sft.session:write_tensors", pytest.param("sft.checkpoint:_seal", marks=pytest.mark.slow)]
)
def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint(tmp_path: Path, where: str) -> None:
    job = Job(tmp_path)
    outcome = job.run(faults=[fault(where, 2, "disk full")])
    assert outcome.codes == [2], outcome.output
    assert "disk full while saving" in outcome.output
    assert "missing" in outcome.output
    assert "step-00000002 is whole" in outcome.output
    assert "Traceback" not in outcome.output
    assert job.status["state"] == "failed"
    assert [step_of(path) for path in job.checkpoints] == [2]


def test_a_slow_disk_does_not_hold_up_the_steps(tmp_path: Path) -> None:
    """Hashing and flushing of the first checkpoint never end; the steps go on until the next one is due."""
    job = Job(tmp_path, "save.every=4")
    run = job.start(faults=[fault("sft.checkpoint:_seal", 1, "stall")])
    job.wait_for_step(8)
    assert job.checkpoints == []
    assert [path.name for path in (job.run_dir / "checkpoints").iterdir()] == [".staging-step-00000004"]
    run.kill()
    run.wait()


def ranks_of(launcher: int) -> list[int]:
    """Processes below `launcher` that train."""
    import psutil

    below = psutil.Process(launcher).children(recursive=True)
    return [p.pid for p in below if "-m" in p.cmdline() and "sft" in p.cmdline() and "launch" not in p.cmdline()]


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate, two": [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
    "accelerate, one": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "none": [],
}


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_one_rank_that_prepares_under_torchrun(tmp_path: Path) -> None:
    """Both ranks end with 75 well before torchrun would kill the one that was not signalled."""
    write_rows(tmp_path / "data.jsonl", rows(40_000))
    job = Job(tmp_path, f"data.train.0.path={tmp_path / 'data.jsonl'}")
    command = [sys.executable, *LAUNCHERS["torchrun"], "-m", "sft", "train", str(job.config), *job.overrides]
    environment = {**os.environ, "SFT_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
    out = tmp_path / "out.txt"
    with open(out, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=tmp_path)
        try:
            deadline = time.monotonic() + 90
            while "format messages" not in out.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(ranks_of(process.pid)[-1], signal.SIGTERM)
            asked = time.monotonic()
            process.wait(25)
        finally:
            process.kill()
    assert time.monotonic() - asked < 25
    told = out.read_text()
    assert "[rank 1] stopped by SIGTERM" in told, told
    assert "[rank 0] stopped by SIGTERM" in told, told
    assert told.count("Traceback") <= 1  # torchrun's own
    assert (job.status["state"], job.status["code"]) == ("stopped", 75)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("target", ["launcher", "a rank"])
def test_under_real_launchers(tmp_path: Path, launcher: str, target: str) -> None:
    """SIGTERM to the launcher, or to its last rank alone: a published checkpoint, code 75, and a resume."""
    job = Job(tmp_path, "train.epochs=2000")
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "sft", "train", str(job.config), *job.overrides]
    environment = {
        **os.environ, "SFT_CACHE": str(shared() / "cache"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=tmp_path)
        try:
            job.wait_for_step(5, timeout=90)  # else look at out.txt
            os.kill(process.pid if target == "launcher" or launcher == "none" else ranks_of(process.pid)[-1], 15)
            process.wait(40)
            deadline = time.monotonic() + 30
            while job.status["state"] == "running" and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            process.kill()
    assert (job.status["state"], job.status["code"]) == ("stopped", 75), (tmp_path / "out.txt").read_text()
    assert step_of(job.checkpoints[0]) == job.status["step"]
    assert [e["step"] for e in job.events if e["event"] == "train"][-1] == job.status["step"]


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_end_once_the_run_is_done(tmp_path: Path) -> None:
    """Where gloo's threads are joined under Python's lock, a rank now and then never ends."""
    for number in range(20):
        outcome = Job(tmp_path / str(number), "train.max_steps=1", "eval.samples=0").run(world=3)
        assert outcome.codes == [0, 0, 0], outcome.output
