"""A run folder that something else has damaged, odd paths, and terminals that go away."""

from __future__ import annotations

import functools
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from harness import Job, assert_same_run, copy_of, fault, shared

STEP = "sft.train:train_step"
slow = pytest.mark.slow


@functools.cache
def stopped() -> Job:
    """A run stopped after three of its eight steps, to be copied."""
    job = Job(Path(tempfile.mkdtemp(prefix="sft-damage-stopped-")))
    assert job.run(faults=[fault(STEP, 3, "SIGTERM")]).codes == [75]
    return job


@functools.cache
def uninterrupted() -> Job:
    job = Job(Path(tempfile.mkdtemp(prefix="sft-damage-reference-")))
    job.train()
    return job


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", b'{"state": "run'),
        pytest.param("status.json", b"", marks=slow),
        pytest.param("status.json", b"[1]", marks=slow),
        pytest.param("environment.json", b"", marks=slow),
        pytest.param("environment.json", b'{"date": 5}', marks=slow),
        pytest.param(".lock", b"{bad", marks=slow),
    ],
)
def test_what_only_tells_of_a_run_may_be_damaged(tmp_path: Path, name: str, content: bytes) -> None:
    """The checkpoints decide; the end is the same."""
    job = copy_of(stopped(), tmp_path)
    (job.run_dir / name).write_bytes(content)
    job.train()
    assert_same_run(job, uninterrupted())


def test_a_torn_last_line_of_the_metrics_is_cut(tmp_path: Path) -> None:
    job = copy_of(stopped(), tmp_path)
    with open(job.run_dir / "metrics.jsonl", "a") as stream:
        stream.write('{"event": "train", "st')
    job.train()
    assert_same_run(job, uninterrupted())


@pytest.mark.parametrize("how", ["garbage", pytest.param("removed", marks=slow), pytest.param("emptied", marks=slow)])
@pytest.mark.parametrize("decides", [True, pytest.param(False, marks=slow)])
def test_lost_metrics_are_told_and_refused_where_they_decide(tmp_path: Path, how: str, decides: bool) -> None:
    job = copy_of(stopped(), tmp_path, *(["save.best=eval.loss"] if decides else []))
    metrics = job.run_dir / "metrics.jsonl"
    if how == "removed":
        metrics.unlink()
    else:
        lines = metrics.read_bytes().split(b"\n")
        lines[0] = b'{"event": \xff\x00'  # the evaluation at step 0
        metrics.write_bytes(b"\n".join(lines) if how == "garbage" else b"")
    outcome = job.run()
    if decides:
        assert outcome.codes == [2], outcome.output
        assert "save.best=null" in outcome.output
        return
    assert outcome.codes == [0], outcome.output
    assert how == "emptied" or "WARNING" in outcome.output
    assert [e["step"] for e in job.events if e["event"] == "train"][-5:] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("how", ["cut", pytest.param("removed", marks=slow)])
def test_a_damaged_final_is_written_again(tmp_path: Path, how: str) -> None:
    job = copy_of(uninterrupted(), tmp_path)
    weights = job.run_dir / "final" / "model.safetensors"
    if how == "removed":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-7])
    outcome = job.train()
    assert "WARNING" in outcome.output
    assert "written again" in outcome.output
    assert_same_run(job, uninterrupted())
    assert "complete" in job.train().output


FINISHING = [
    (f"sft.finish:{name}", when)
    for name in ("write_text", "check_serving", "publish_folder", "_report")
    for when in ("before", "after")
]


@pytest.mark.parametrize(
    ("where", "when"),
    [pytest.param(*f, marks=() if f == ("sft.finish:_report", "before") else slow) for f in FINISHING],
)
def test_killed_while_finishing(tmp_path: Path, where: str, when: str) -> None:
    """final/ is whole or not there, and the next start completes what lacks, the page included."""
    job = copy_of(stopped(), tmp_path)
    assert job.run(faults=[fault(where, 1, "SIGKILL", when)]).codes == [-9]
    job.train()
    assert_same_run(job, uninterrupted())
    assert (job.run_dir / "report.html").exists()
    assert sorted(path.name for path in job.run_dir.iterdir() if path.name.startswith(".")) == [".lock-guard"]


@slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_moving_the_old_run_aside(tmp_path: Path, when: str) -> None:
    job = copy_of(uninterrupted(), tmp_path)
    assert job.run("--fresh", faults=[fault("sft.runfolder:RunFolder.move_aside", 1, "SIGKILL", when)]).codes == [-9]
    job.train("--fresh")
    assert_same_run(job, uninterrupted())
    assert (tmp_path / "run.old-1" / "final" / "model.safetensors").exists()


def test_two_starts_at_the_same_instant(tmp_path: Path) -> None:
    job = Job(tmp_path)
    runs = [job.start(), job.start()]
    outcomes = [run.wait() for run in runs]
    assert sorted(outcome.codes[0] for outcome in outcomes) == [0, 2]
    assert "another run is at work here" in next(o.output for o in outcomes if o.codes == [2])
    assert_same_run(job, uninterrupted())


@slow
def test_odd_places(tmp_path: Path) -> None:
    job = Job(tmp_path / "späce 你好 'q' $(x)")
    job.train()
    assert_same_run(job, uninterrupted())
    deep = Job(tmp_path / "deep", "run.dir=a/../b/c/d e/run")
    deep.run_dir = tmp_path / "deep" / "b/c/d e/run"
    deep.train()
    assert_same_run(deep, uninterrupted())


@pytest.mark.parametrize(
    "name", ["x" * 300, pytest.param('"a\\0b"', marks=slow), pytest.param("/proc/no/run", marks=slow)]
)
def test_a_place_that_cannot_be(tmp_path: Path, name: str) -> None:
    outcome = Job(tmp_path, f"run.dir={name}").run()
    assert outcome.codes == [2], outcome.output
    assert "Choose another" in outcome.output
    assert len(outcome.output) < 2000


@slow
def test_a_link_to_another_disk_stays_the_place_of_the_run(tmp_path: Path) -> None:
    """`--fresh` moves what the link leads to, beside it there; a link that leads to nothing yet is filled."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "run")
    job = Job(tmp_path / "job", f"run.dir={link}")
    job.run_dir = link
    assert job.run(faults=[fault(STEP, 3, "SIGTERM")]).codes == [75]
    job.train()
    assert_same_run(job, uninterrupted())
    job.train("--fresh")
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["run", "run.old-1"]


def command(job: Job, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sft", "train", str(job.config), *job.overrides, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "SFT_CACHE": str(shared() / "cache"), "OMP_NUM_THREADS": "1"}


@slow
def test_nobody_reads_what_a_run_says(tmp_path: Path) -> None:
    """`sft train x 2>&1 | head -1`: the reader leaves, the run goes on to its end."""
    job = Job(tmp_path)
    process = subprocess.Popen(command(job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert_same_run(job, uninterrupted())


@slow
def test_all_streams_closed(tmp_path: Path) -> None:
    job = Job(tmp_path)
    line = " ".join(f"'{word}'" for word in command(job)) + " <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], env=environment(), timeout=120).returncode == 0
    assert_same_run(job, uninterrupted())


@slow
@pytest.mark.parametrize("kept", [False, True])
def test_a_terminal_that_is_closed(tmp_path: Path, kept: bool) -> None:
    """The run stops at a step's end and publishes; under nohup it goes on."""
    job = Job(tmp_path, "train.epochs=400", "save.every=1000") if not kept else Job(tmp_path)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        (["nohup"] if kept else []) + command(job), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(),
        start_new_session=True, cwd=tmp_path, preexec_fn=functools.partial(_take_terminal, theirs),
    )  # fmt: skip
    os.close(theirs)
    job.wait_for_step(3, timeout=120) if not kept else _wait_for(tmp_path / "nohup.out", process)
    os.close(ours)  # the kernel sends SIGHUP
    assert process.wait(120) == (0 if kept else 75)
    if kept:
        assert_same_run(job, uninterrupted())
    else:
        assert (job.status["state"], job.status["code"]) == ("stopped", 75)
        assert "SIGHUP" in job.status["reason"]
        assert job.checkpoints[0].name == f"step-{job.status['step']:08d}"


def _take_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def _wait_for(path: Path, process: subprocess.Popen[bytes], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_very_long_reason_is_cut(tmp_path: Path) -> None:
    job = Job(tmp_path)
    outcome = job.run(faults=[fault(STEP, 2, "raise " + "x" * 200_000)])
    assert outcome.codes == [1]
    assert outcome.seconds < 60
    assert len(json.loads((job.run_dir / "status.json").read_text())["reason"]) < 11_000


@slow
def test_rows_that_change_while_the_run_is_at_work(tmp_path: Path) -> None:
    """It trains on what it prepared; its resume is refused, and says why."""
    data = tmp_path / "data.jsonl"
    data.write_bytes((shared() / "data.jsonl").read_bytes())
    job = Job(tmp_path, f"data.train.0.path={data}")
    run = job.start(faults=[fault(STEP, 6, "SIGTERM")])
    job.wait_for_step(1)
    data.write_text(data.read_text().replace("e", "a", 1).replace("o", "a"))
    assert run.wait().codes == [75]
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    data.write_bytes((shared() / "data.jsonl").read_bytes())
    job.train()
    assert_same_run(job, uninterrupted())
