from __future__ import annotations

from typing import Any

import pytest

from sft.console import Console


def event(step: int, loss: float | None = 1.23456) -> dict[str, Any]:
    return {"step": step, "loss": loss, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "seconds": 40.0 * step}


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(enabled=True, total_steps=100) as console:
        for step in (10, 20, 30):  # the second and third come well within half a minute
            console.step(event(step))
        console.step(event(100, loss=None))
    assert capsys.readouterr().err.splitlines() == [
        "step 10/100  loss 1.2346  lr 2.00e-05  12,346 tok/s  about 1:00:00 left",
        "step 100/100  loss -  lr 2.00e-05  12,346 tok/s  about 0:00:00 left",
    ]


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(enabled=False, total_steps=2) as console:
        console.step(event(1))
        console.step(event(2))
    assert capsys.readouterr() == ("", "")
