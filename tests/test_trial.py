"""One trial's devices, command and processes, and what its run folder says of its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from sft import keeper
from sft.errors import DeviceError
from sft.trial import (
    Curve,
    Devices,
    TrialProcess,
    divide_devices,
    num_processes,
    read_outcome,
    train_command,
    trial_environment,
    visible_gpus,
)


@pytest.mark.parametrize(
    ("workers", "gpus", "cores", "expected"),
    [
        (1, [], [0, 1], [((0, 1), ())]),
        (2, [], [0, 1, 2], [((0,), ()), ((1, 2), ())]),
        (3, [], [4, 5], [((4,), ()), ((5,), ()), ((4,), ())]),
        (2, ["0", "1", "2", "3"], [0, 1], [((0,), ("0", "1")), ((1,), ("2", "3"))]),
    ],
)
def test_devices_are_divided(workers, gpus, cores, expected):
    assert [(share.cores, share.gpus) for share in divide_devices(workers, gpus, cores)] == expected


def test_more_workers_than_gpus():
    with pytest.raises(DeviceError, match="set workers=1"):
        divide_devices(2, ["0"], [0, 1])


def test_gpus_are_those_that_the_environment_leaves():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-5f"}) == ("2", "GPU-5f")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_commands_behind_each_launcher(tmp_path):
    python, config = sys.executable, Path("c.yaml")
    train = ["-m", "sft", "train", "c.yaml"]
    beside = str(Path(python).parent)
    assert train_command([], config, 29) == [python, *train]
    assert train_command(["accelerate", "launch", "--num_processes", "2"], config, 29) == [
        f"{beside}/accelerate", "launch", "--main_process_port=29", "--num_processes", "2", *train,
    ]  # fmt: skip
    assert train_command(["accelerate", "launch", "--main_process_port", "7"], config, 29)[2:4] == [
        "--main_process_port",
        "7",
    ]
    assert train_command(["torchrun", "--nproc-per-node=2"], config, 29) == [
        f"{beside}/torchrun", "--master_port=29", "--nproc-per-node=2", *train,
    ]  # fmt: skip
    assert train_command(["torchrun", "--standalone"], config, 29)[1:] == ["--standalone", *train]
    assert train_command([python, "-m", "torch.distributed.run"], config, 29) == [
        python, "-m", "torch.distributed.run", "--master_port=29", *train,
    ]  # fmt: skip
    assert train_command(["env", "-u", "X"], config, 29)[1:] == ["-u", "X", python, *train]


def test_ranks_that_a_launcher_starts():
    assert num_processes([]) == 1
    assert num_processes(["accelerate", "launch", "--num_processes", "2"]) == 2
    assert num_processes(["torchrun", "--nproc-per-node=4"]) == 4
    assert num_processes(["torchrun", "--nproc_per_node", "gpu"]) == 1


def test_the_environment_of_a_trial():
    before = {"RANK": "3", "WORLD_SIZE": "4", "PATH": "/bin", "OMP_NUM_THREADS": "64"}
    env = trial_environment(before, Devices((0, 1, 2, 3), ("5", "6")), 2, 4000)
    assert env == {"PATH": "/bin", "MASTER_PORT": "4000", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "5,6"}
    assert trial_environment({"OMP_NUM_THREADS": "1"}, Devices((0, 1)), 1, 4000)["OMP_NUM_THREADS"] == "1"


# The keeper

CHILD = """\
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(75)))
if sys.argv[1:] == ["launcher"]:  # ranks in a session of their own, as torchrun has them
    ranks = [subprocess.Popen([sys.executable, __file__], env={**os.environ, "RANK": str(r)}, start_new_session=True)
             for r in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def kept(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    started = []

    def start(*words: str, lease: float = 60.0) -> TrialProcess:
        log, mark = tmp_path / "log", f"test/{os.getpid()}-{tmp_path.name}"
        process = TrialProcess([sys.executable, str(script), *words], os.environ, Devices(()), log, mark, lease)
        started.append(process)
        ready = 2 if words else 1
        deadline = time.monotonic() + 20
        while log.read_text().count("ready") < ready:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        keeper.kill_marked(process.mark)


def test_a_keeper_is_started_by_its_module_s_name(kept):
    """By its path, Python would look into sft/ before the standard library, and find sft/types.py for `types`."""
    process = kept()
    words = psutil.Process(process._keeper.pid).cmdline()
    assert words[1:4] == ["-m", "sft.keeper", process.mark]
    assert keeper.is_kept(process.mark)
    process.kill()
    assert ended(process) == 137
    assert not keeper.is_kept(process.mark)


def ended(process: TrialProcess) -> int:
    deadline = time.monotonic() + 20
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline, "it never ended"
        time.sleep(0.02)
    assert not any(keeper.marked_processes(process.mark))
    return code


def test_a_clean_stop_and_its_code(kept, tmp_path):
    process = kept()
    process.stop()
    assert ended(process) == 75
    assert "asked" in (tmp_path / "log").read_text()


def test_a_clean_stop_goes_to_the_ranks_and_not_to_their_launcher(kept, tmp_path):
    process = kept("launcher")
    process.stop()
    assert ended(process) == 75
    assert (tmp_path / "log").read_text().count("asked") == 2


def test_a_kill_ends_ranks_in_other_sessions_too(kept):
    process = kept("launcher")
    process.kill()
    assert ended(process) == 128 + signal.SIGKILL


def test_silence_stops_what_is_kept(kept, tmp_path):
    process = kept(lease=1.2)
    for _ in range(4):
        time.sleep(0.25)
        process.beat()
    assert process.poll() is None
    assert ended(process) == 75


def test_a_killed_keeper_takes_its_processes_with_it_at_the_next_look(kept):
    process = kept("launcher")
    process._keeper.kill()
    assert ended(process) == 128 + signal.SIGKILL


def test_a_keeper_whose_command_has_ended_is_still_at_work(kept):
    """It is about to kill all that carries its mark: a successor that starts now would die with it."""
    process = kept()
    process._keeper.send_signal(signal.SIGSTOP)
    for child in keeper.marked_processes(process.mark):
        child.terminate()
    wait_until(lambda: not any(keeper.marked_processes(process.mark)))
    assert keeper.is_at_work(process.mark)
    process._keeper.send_signal(signal.SIGCONT)
    wait_until(lambda: not keeper.is_at_work(process.mark))
    assert process.poll() == 75


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


# What the run folder says


def outcome(tmp_path: Path, code: int, log: str = "", status: dict | None = None, evals: tuple = ()):
    (tmp_path / "log").write_text(log)
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    lines = [json.dumps({"event": "eval", "step": step, **values}) + "\n" for step, values in evals]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"event": "eval", "st')
    found = read_outcome(tmp_path, code, Curve(tmp_path / "metrics.jsonl", "loss"), tmp_path / "log", time.time())
    return found.state, found.value, found.reason


def test_outcomes(tmp_path):
    two = ((0, {"loss": 3.0}), (8, {"loss": 2.5}))
    assert outcome(tmp_path, 0, evals=two) == ("done", 2.5, "")
    assert outcome(tmp_path, 0, evals=((8, {"loss": None}),)) == (
        "failed",
        None,
        "eval.loss is not finite in the final evaluation",
    )
    assert outcome(tmp_path, 0, evals=((8, {"accuracy": 1}),)) == (
        "failed", None, "no eval.loss in the final evaluation; it has accuracy",
    )  # fmt: skip
    assert outcome(tmp_path, 75) == ("stopped", None, "stopped on a signal")
    assert outcome(tmp_path, 137) == ("failed", None, "killed by SIGKILL (out of memory?)")
    assert outcome(tmp_path, 1, "Traceback …\nValueError: x\n") == ("failed", None, "exit code 1: ValueError: x")
    launcher = "error: d.jsonl:3: no answer\ntorch.distributed.elastic says much\n=======\n"
    assert outcome(tmp_path, 1, launcher) == ("failed", None, "d.jsonl:3: no answer")
    assert outcome(tmp_path, 1, "[rank 0] error: bad\n====\n") == ("failed", None, "bad")
    failed = {"state": "failed", "code": 2, "reason": "step 3: the loss is not finite", "step": 3}
    assert outcome(tmp_path, 1, launcher, failed) == ("failed", None, "step 3: the loss is not finite")
    stopped = {"state": "stopped", "code": 75, "reason": "stopped by SIGTERM", "step": 3}
    assert outcome(tmp_path, 1, status=stopped) == ("stopped", None, "stopped by SIGTERM")  # a launcher's 1


def test_an_old_status_says_nothing_of_this_attempt(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "stopped", "reason": "long ago"}')
    os.utime(tmp_path / "status.json", (1, 1))
    assert outcome(tmp_path, 1, "boom\n") == ("failed", None, "exit code 1: boom")


def test_credentials_in_a_log_stay_out_of_the_table(tmp_path):
    state, _, reason = outcome(tmp_path, 1, "could not log in with hf_abcdefghijklmnopqrstuvwx\n")
    assert (state, reason) == ("failed", "exit code 1: could not log in with ***")
