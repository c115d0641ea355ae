"""A first signal asks, a second ends; a stall ends too. Each in a process of its own, with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sft.errors import Stopped
from sft.signals import StopRequest
from sft.watchdog import Watchdog

LOOP = """
import sys, time
from sft.signals import StopRequest
with StopRequest(echo_seconds=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.requested or len(sys.argv) > 2:
        time.sleep(0.01)
    print("stopped by", stop.signal_name, flush=True)
"""


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_one_signal_is_a_request(name: str) -> None:
    process = start(LOOP, "2")
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == f"stopped by {name}\n"
    assert err == f"sft[{process.pid}]: {name}: stopping at the end of this step; a second signal ends at once\n"


def test_a_second_signal_ends_at_once_with_75() -> None:
    process = start(LOOP, "0.1", "never")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "second SIGTERM: ending at once; the last published checkpoint is whole" in err


def test_the_echo_of_a_launcher_is_not_a_second_signal() -> None:
    """Ctrl-C reaches the workers from the terminal and again from torchrun, a moment later."""
    process = start(LOOP, "2")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.startswith("stopped by SIG")


def test_long_work_that_publishes_by_itself_is_interrupted() -> None:
    signal_in_half_a_second = f"import os, time; time.sleep(0.5); os.kill({os.getpid()}, 15)"
    with StopRequest() as stop, subprocess.Popen([sys.executable, "-c", signal_in_half_a_second]):
        with pytest.raises(Stopped, match="SIGTERM"), stop.raising():
            time.sleep(10)
        with pytest.raises(Stopped), stop.raising():
            pytest.fail("a request made before is not forgotten")
        with pytest.raises(Stopped):
            stop.check()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) != before[0]
        stop.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_launcher_that_is_gone_is_a_request() -> None:
    """`accelerate launch` with one process dies of SIGTERM and leaves its worker behind."""
    launcher = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], '2'])\n"
        "import time; time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, LOOP], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=20)[0] == "stopped by the launcher's end\n"


STALL = """
import sys, time
from sft.watchdog import Watchdog
with Watchdog(0.5, lambda: "rank 1") as dog:
    print("ready", flush=True)
    for step in range(8):
        dog.beat(f"step {step}: forward")
        time.sleep(0.1)
    if sys.argv[1:]:
        time.sleep(60)
print("done")
"""


def test_a_stall_ends_the_process_and_names_rank_and_phase() -> None:
    process = start(STALL, "stall")
    before = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - before < 5
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: rank 1: no progress for 0.5 s; last phase: step 7: forward. Stacks follow.\n")
    assert err.count("error:") == 1
    assert 'File "<string>", line' in err  # where it hung


def test_beats_in_time_are_no_stall() -> None:
    process = start(STALL)
    assert process.communicate(timeout=20)[0] == "done\n"
    assert process.returncode == 0


def test_waiting_for_others_is_given_longer() -> None:
    with Watchdog(0.2) as dog:
        dog.beat("all-reduce", waiting=True)
        time.sleep(0.6)  # past the timeout: this process would have ended
