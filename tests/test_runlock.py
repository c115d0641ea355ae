"""One run folder, one run: the living are respected, the dead are not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.durable import check_writable
from sft.errors import DiskError, ResumeError
from sft.runlock import RunLock, forget_other_host

HOLD = "import sys; from pathlib import Path; from sft.runlock import RunLock\nRunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"  # noqa: E501


def holder(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def forge(run_dir: Path, **changes: object) -> None:
    """Change what the lock of a living owner says."""
    lock = run_dir / ".lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))


def test_taken_given_back_and_taken_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    for _ in range(2):
        with RunLock(run_dir):
            assert (run_dir / ".lock").exists()
        assert not (run_dir / ".lock").exists()


def test_the_second_is_told_host_and_process_of_the_first(tmp_path: Path) -> None:
    first = holder(tmp_path)
    try:
        with pytest.raises(ResumeError, match=rf"host {os.uname().nodename}, process {first.pid}, since \d{{4}}"):
            RunLock(tmp_path).acquire()
    finally:
        end(first)


def test_the_same_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ResumeError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    RunLock(tmp_path).acquire()


def test_a_killed_owner_is_succeeded(tmp_path: Path) -> None:
    end(holder(tmp_path))
    assert (tmp_path / ".lock").exists()
    with RunLock(tmp_path):
        pass


def test_remains_of_an_owner_that_nobody_collected_count_as_dead(tmp_path: Path) -> None:
    first = holder(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    with RunLock(tmp_path):
        pass
    end(first)


def test_a_pid_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    first = holder(tmp_path)
    forge(tmp_path, start_time=1)
    with RunLock(tmp_path):
        pass
    end(first)


@pytest.mark.parametrize("change", [{"boot": "another"}, {"pid_namespace": "pid:[1]", "pid": 2**22 + 1}])
def test_where_the_pid_cannot_tell_the_kernel_does(tmp_path: Path, change: dict[str, Any]) -> None:
    """After a reboot, or seen from another container of the same name: a living owner holds an flock."""
    first = holder(tmp_path)
    forge(tmp_path, **change)
    with pytest.raises(ResumeError, match="another run is at work here"):
        RunLock(tmp_path).acquire()
    end(first)
    with RunLock(tmp_path):
        pass


def test_an_owner_on_another_host_is_respected_with_the_way_out(tmp_path: Path) -> None:
    first = holder(tmp_path)
    forge(tmp_path, host="node17")
    end(first)
    with pytest.raises(ResumeError, match=r"host node17, .*delete .*\.lock"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_torn_lock_that_nobody_holds_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with RunLock(tmp_path):
        pass


def test_release_leaves_the_lock_of_a_successor(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").unlink()
    with RunLock(tmp_path):
        lock.release()
        assert (tmp_path / ".lock").exists()


def contend(run_dir: str, turns: int, inside: Any, most: Any) -> None:
    for _ in range(turns):
        lock = RunLock(Path(run_dir))
        try:
            lock.acquire()
        except ResumeError:
            continue
        with inside.get_lock():
            inside.value += 1
            most.value = max(most.value, inside.value)
        with inside.get_lock():
            inside.value -= 1
        if os.getpid() % 2:  # half of them never give it back: their successors find a dead or foreign nonce
            lock.release()
        else:
            os.unlink(Path(run_dir) / ".lock")
            lock.release()


def test_a_folder_is_moved_while_nobody_else_can_own_it(tmp_path: Path) -> None:
    run_dir, aside = tmp_path / "x", tmp_path / "x.old-1"
    run_dir.mkdir()
    refused: list[str] = []

    def move() -> Path:
        with pytest.raises(ResumeError, match="another run is at work") as caught:
            RunLock(run_dir).acquire()
        refused.append(str(caught.value))
        return run_dir.rename(aside)

    lock = RunLock(run_dir)
    assert lock.while_held(move) == aside
    assert refused
    assert not (aside / ".lock").exists()
    with lock:  # the new folder's
        assert (run_dir / ".lock").exists()


def test_only_the_lock_of_another_host_is_forgotten(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        forget_other_host(tmp_path)
        assert (tmp_path / ".lock").exists()
        forge(tmp_path, host="elsewhere")
        forget_other_host(tmp_path)
        assert not (tmp_path / ".lock").exists()


def test_many_at_once_never_hold_it_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    inside, most = context.Value("i", 0), context.Value("i", 0)
    crowd = [context.Process(target=contend, args=(str(tmp_path), 60, inside, most)) for _ in range(6)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0] * 6
    assert most.value == 1


@pytest.mark.parametrize("act", [lambda folder: RunLock(folder).acquire(), check_writable])
def test_a_folder_that_cannot_be_written_fails_at_once(tmp_path: Path, act: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cannot be written .* run\.dir"):
        act(tmp_path / "file" / "run")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(DiskError, match="cannot be written"):
            act(tmp_path / "closed")
