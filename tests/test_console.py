from __future__ import annotations

from typing import Any

import pytest

from sft.console import Console


def event(step: int, loss: float | None = 1.23456) -> dict[str, Any]:
    return {"step": step, "loss": loss, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "seconds": 40.0 * step}


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(enabled=True, total_steps=100) as console:
        for step in (10, 20, 30):  # the second and third come well within half a minute
            console.step(event(step), seconds_left=3600.0)
        console.step(event(100, loss=None), seconds_left=90.4)
    assert capsys.readouterr().err.splitlines() == [
        "step 10/100  loss 1.2346  lr 2.00e-05  12,346 tok/s  about 1:00:00 left",
        "step 100/100  loss -  lr 2.00e-05  12,346 tok/s  about 0:01:30 left",
    ]


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(enabled=False, total_steps=2) as console:
        console.step(event(1), seconds_left=1.0)
        console.step(event(2), seconds_left=0.0)
        with console.phase("evaluating", 4) as tick:
            tick(1)
    assert capsys.readouterr() == ("", "")


def test_a_long_phase_says_so_as_it_begins_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("sft.console.time.monotonic", lambda: now)
    with Console(enabled=True, total_steps=100) as console, console.phase("evaluating", 40) as tick:
        for done in range(1, 41):
            now += 8.0
            tick(done)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating …",
        "evaluating: 4/40  about 0:04:48 left",
        "evaluating: 8/40  about 0:04:16 left",
        *(f"evaluating: {done}/40  about 0:0{(40 - done) * 8 // 60}:{(40 - done) * 8 % 60:02} left"
          for done in range(12, 41, 4)),
    ]  # fmt: skip


def test_a_phase_that_is_known_to_be_short_is_not_announced(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(enabled=True) as console:
        with console.phase("saving a checkpoint", expected=0.2):
            pass
        with console.phase("saving a checkpoint", expected=61.0):
            pass
    assert capsys.readouterr().err.splitlines() == ["saving a checkpoint …  about 0:01:01 left"]


def test_on_a_terminal_a_phase_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pty
    import sys

    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        with Console(enabled=True, total_steps=100) as console:
            console.step(event(10), seconds_left=75.0)
            with console.phase("evaluating", 40) as tick:
                tick(10)
                console.refresh()
        monkeypatch.undo()
        shown = os.read(master, 65536).decode()
    os.close(master)
    assert "step 10/100" in shown
    assert "about 0:01:15 left" in shown
    assert "evaluating" in shown
    assert "10/40" in shown
