"""Keeps one command: starts it, ends all of its processes with it, and stops it when whoever asked for it is gone.

    python -m sft.keeper MARK SILENCE GRACE -- COMMAND…    (stdin: the lifeline)

A sweep starts each trial through this small process. The lifeline carries one character a message: `.` I am here,
`s` stop cleanly, `k` kill. When it ends, or nothing comes for SILENCE seconds, the driver is dead or cut off from its
storage, and another may take the trial over: the command is asked to stop, and is killed when SILENCE + GRACE seconds
have passed since the last word.

The command runs in a session of its own. Launchers put their ranks in further sessions, so its processes are known by
an environment variable, SFT_SWEEP_TRIAL=MARK, which children inherit. A clean stop goes to the ranks and not to the
launcher, which would kill them after its own short patience. Exits as the command did; 128 + n for signal n.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

MARK = "SFT_SWEEP_TRIAL"
MODULE = "sft.keeper"
_TICK = 0.1


def marked_processes(mark: str) -> Iterator[psutil.Process]:
    """Living processes of this user on this machine that carry the mark, keepers left out."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def kill_marked(mark: str) -> None:
    """SIGKILL to every process that carries the mark, until none is left."""
    import psutil

    deadline = time.monotonic() + 10
    while (found := list(marked_processes(mark))) and time.monotonic() < deadline:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def stop_marked(mark: str) -> None:
    """SIGTERM to the ranks of a command, or to the command itself where it has none."""
    import psutil

    found = {process.pid: process for process in marked_processes(mark)}
    ranks = {pid for pid, process in found.items() if _is_rank(process)}
    for pid, process in found.items():
        with suppress(psutil.Error):
            parent = process.ppid()
            top = parent not in ranks if ranks else parent not in found
            if top and (not ranks or pid in ranks):
                process.send_signal(signal.SIGTERM)


def _is_rank(process: psutil.Process) -> bool:
    import psutil

    with suppress(psutil.Error):
        return "RANK" in process.environ()
    return False


def is_kept(mark: str) -> bool:
    """Whether a keeper is still at work for this mark: it stops what its dead driver has left, and ends by itself."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if mark in words and any(map(_names_keeper, words)) and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _names_keeper(word: str) -> bool:
    return word == MODULE or word.endswith("sft/keeper.py")  # the latter by drivers of before, by its path


def is_at_work(mark: str) -> bool:
    """Whether anything of this mark still lives. A keeper whose command has ended does: its last act is to kill what
    carries the mark, and a successor started too early would be among that."""
    return is_kept(mark) or any(marked_processes(mark))


def keep(mark: str, silence: float, grace: float, command: list[str]) -> int:
    """Run `command` to its end as the module says. Returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the lifeline decides, not a terminal's Ctrl-C
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, MARK: mark},
        preexec_fn=_default_signals,
    )
    heard = time.monotonic()
    kill_at: float | None = None
    listening = True
    while child.poll() is None:
        now = time.monotonic()
        if listening and select.select([0], [], [], _TICK)[0]:
            said = os.read(0, 4096)
            heard = now
            if b"k" in said:
                kill_at = now
            elif b"s" in said and kill_at is None:
                stop_marked(mark)
            listening = bool(said)
        elif not listening:
            time.sleep(_TICK)
        if kill_at is None and (not listening or now - heard > silence):
            stop_marked(mark)
            kill_at = heard + silence + grace
        if kill_at is not None and now >= kill_at:
            kill_marked(mark)
    kill_marked(mark)  # ranks that outlive their launcher
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    divider = sys.argv.index("--")
    mark_, silence_, grace_ = sys.argv[1:divider]
    sys.exit(keep(mark_, float(silence_), float(grace_), sys.argv[divider + 1 :]))
