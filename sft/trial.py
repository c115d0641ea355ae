"""One trial's run: its devices, its command, its processes, and what its run folder says.

A sweep knows the trainer only through the command line and through metrics.jsonl and status.json. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft import keeper
from sft.errors import EXIT_DONE, EXIT_STOPPED, DeviceError, LaunchError
from sft.runfolder import RunFolder
from sft.secrets import mask_secrets

# Set by launchers for their own ranks; a sweep that itself runs under one must not hand them on.
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)  # fmt: skip
_TAIL_LINES, _TAIL_BYTES = 20, 8192


# Devices ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """What one worker may use. `gpus` empty: a CPU worker, pinned to `cores`; with GPUs nothing is pinned."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def words(self) -> str:
        if self.gpus:
            return f"GPU {', '.join(self.gpus)}"
        return f"{len(self.cores)} core{'s' * (len(self.cores) != 1)}"


def divide_devices(workers: int, gpus: Sequence[str], cores: Sequence[int]) -> list[Devices]:
    """A share for each worker: whole GPUs; cores as even as they come, at least one. Raises DeviceError."""
    if gpus and len(gpus) < workers:
        raise DeviceError(
            f"workers: {workers}, but GPUs: {len(gpus)}. Each worker needs one of its own; set workers={len(gpus)}."
        )
    return [Devices(_share(cores, index, workers), _share(gpus, index, workers)) for index in range(workers)]


def _share(items: Sequence[Any], index: int, workers: int) -> tuple[Any, ...]:
    if len(items) < workers:
        return (items[index % len(items)],) if items else ()
    return tuple(items[len(items) * index // workers : len(items) * (index + 1) // workers])


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; asks the driver's own tool, not torch."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip() and part.strip() != "-1")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    asked = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return tuple(asked.stdout.split()) if asked.returncode == 0 else ()


def usable_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@contextmanager
def _pinned(devices: Devices) -> Iterator[None]:
    """Inside, new processes start on the worker's cores: affinity is inherited."""
    if devices.gpus or not devices.cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, devices.cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# Command ------------------------------------------------------------------------------------------------------------


def free_port(taken: set[int]) -> int:
    """A TCP port that nobody listens on and that no other worker was given."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


def train_command(launch: Sequence[str], config: Path, port: int) -> list[str]:
    """`sft train CONFIG` behind the launch prefix. accelerate and torchrun get the module and a port of its own."""
    train = ["-m", "sft", "train", str(config)]
    if not launch:
        return [sys.executable, *train]
    first, rest = _program(launch[0]), list(launch[1:])
    name = Path(launch[0]).name
    if name == "accelerate" and rest[:1] == ["launch"]:
        if not any(word.startswith("--main_process_port") for word in rest):
            rest.insert(1, f"--main_process_port={port}")
        return [first, *rest, *train]
    if name == "torchrun" or rest[-1:] == ["torch.distributed.run"]:
        at = 0 if name == "torchrun" else len(rest)
        if not any(word.replace("-", "_").startswith(("__master_port", "__rdzv", "__standalone")) for word in rest):
            rest.insert(at, f"--master_port={port}")
        return [first, *rest, *train]
    if name.startswith("python"):
        return [first, *rest, *train]
    return [first, *rest, sys.executable, *train]


def _program(name: str) -> str:
    """The launcher beside this Python before one elsewhere on the PATH: it must see the same packages."""
    beside = Path(sys.executable).parent / name
    if "/" not in name and beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise LaunchError(f"launch: there is no program '{name}' on the PATH; install it, or give its full path.")
    return found


def num_processes(launch: Sequence[str]) -> int:
    """How many ranks a launch prefix starts on this machine, as far as its words say."""
    words = " ".join(launch).replace("=", " ").replace("-", "_").split()
    for name in ("__num_processes", "__nproc_per_node"):
        if name in words[:-1] and (value := words[words.index(name) + 1]).isdigit():
            return max(1, int(value))
    return 1


def trial_environment(environ: Mapping[str, str], devices: Devices, ranks: int, port: int) -> dict[str, str]:
    """The variables of a trial's processes. Prepared data goes to the one cache that all trials share."""
    env = {name: value for name, value in environ.items() if name not in (*_LAUNCHER_VARIABLES, keeper.MARK)}
    env["MASTER_PORT"] = str(port)
    threads = max(1, len(devices.cores) // ranks)
    asked = environ.get("OMP_NUM_THREADS", "")
    env["OMP_NUM_THREADS"] = str(min(threads, int(asked)) if asked.isdigit() and int(asked) > 0 else threads)
    if devices.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices.gpus)
    return env


# Process ------------------------------------------------------------------------------------------------------------


class TrialProcess:
    """A running `sft train`, kept by a small process that ends with its lifeline (see keeper)."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], devices: Devices, log: Path, mark: str, lease: float
    ) -> None:
        self.mark = mark
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        # By its name: started by its path, Python would look into sft/ first, whose types.py is not the standard one.
        keeping = [sys.executable, "-m", keeper.MODULE, mark, str(lease / 2), str(lease / 4), "--"]
        with open(log, "ab") as stream, _pinned(devices):
            self._keeper = subprocess.Popen(
                [*keeping, *command],
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _say(self, word: bytes) -> None:
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended; poll() will tell
            self._keeper.stdin.write(word)
            self._keeper.stdin.flush()

    def beat(self) -> None:
        """Say that the driver lives and still holds its lease."""
        self._say(b".")

    def stop(self) -> None:
        """Ask the trainer to publish a checkpoint and leave."""
        self._say(b"s")

    def kill(self) -> None:
        self._say(b"k")

    def poll(self) -> int | None:
        """The exit code, 128 + n for signal n; None while it runs."""
        code = self._keeper.poll()
        if code is None:
            return None
        if self._keeper.stdin is not None:
            with suppress(BrokenPipeError):
                self._keeper.stdin.close()
        if code < 0:  # the keeper itself was killed: nobody else ends what it kept
            keeper.kill_marked(self.mark)
            return 128 - code
        return code


# What the run folder says -------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """The evaluations of a run so far, read again only when the file has changed."""

    path: Path
    metric: str
    points: list[tuple[int, float | None]] = field(default_factory=list)  # (step, value), in the file's order
    seconds: float = 0.0
    step: int = 0
    keys: tuple[str, ...] = ()
    _seen: tuple[int, int, int] = (0, 0, 0)

    def refresh(self) -> None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return
        self._seen = seen
        points: dict[int, float | None] = {}
        for event in _events(self.path):
            self.step = int(event.get("step") or 0)
            self.seconds = max(self.seconds, float(event.get("seconds") or 0.0))
            if event.get("event") == "eval":
                self.keys = tuple(k for k, v in event.items() if k != "step" and isinstance(v, int | float))
                value = event.get(self.metric)
                if self.metric in event:
                    points[self.step] = float(value) if isinstance(value, int | float) else None
        self.points = list(points.items())

    @property
    def counted(self) -> list[tuple[int, float | None]]:
        """Evaluations of trained weights: without the one at step 0, which is alike for all trials."""
        return [(step, value) for step, value in self.points if step > 0]


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the last one may be half written."""
    with open(path, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                with suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        yield event


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `value` is set where state is done."""

    state: Literal["done", "stopped", "failed"]
    value: float | None = None
    reason: str = ""
    tail: str = ""


def read_outcome(run_dir: Path, code: int, curve: Curve, log: Path, since: float) -> Outcome:
    """What became of a run whose process has ended with `code`.

    Launchers turn every failure into 1, so status.json has the first word, where it was written after `since` (wall
    clock): one of an earlier attempt says nothing about this one.
    """
    curve.refresh()
    folder = RunFolder(run_dir)
    status: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        if folder.status.stat().st_mtime >= since - 1:
            status = folder.read_status()
    tail = log_tail(log)
    if code == EXIT_DONE:
        return _done(curve, tail)
    if code == EXIT_STOPPED or (status.get("state") == "stopped" and code < 128):
        return Outcome("stopped", reason=str(status.get("reason") or "stopped on a signal"), tail=tail)
    reason = str(status.get("reason") or "") if status.get("state") == "failed" else ""
    reason = reason or _said_by_log(tail) or _said_by_code(code, tail)
    return Outcome("failed", reason=mask_secrets(" ".join(reason.split())), tail=tail)


def _said_by_log(tail: str) -> str:
    """The trainer's own last word: it begins with `error`. Launchers print pages of their own after it."""
    for line in reversed(tail.splitlines()):
        if found := re.match(r"(?:\[rank \d+\] )?error(?:, not foreseen)?: (.+)", line):
            return found[1]
    return ""


def _done(curve: Curve, tail: str) -> Outcome:
    if not curve.points:
        found = f"; it has {', '.join(curve.keys)}" if curve.keys else "; there was none"
        return Outcome("failed", reason=f"no eval.{curve.metric} in the final evaluation{found}", tail=tail)
    value = curve.points[-1][1]
    if value is None or not math.isfinite(value):
        return Outcome("failed", reason=f"eval.{curve.metric} is not finite in the final evaluation", tail=tail)
    return Outcome("done", value=value, reason="", tail=tail)


def _said_by_code(code: int, tail: str) -> str:
    if code > 128:
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            return f"exit code {code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip("=-# ")), "")
    return f"exit code {code}" + (f": {last}" if last else "")


def log_tail(log: Path) -> str:
    """The last lines of a log, without credentials."""
    try:
        with open(log, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return mask_secrets("\n".join(text.splitlines()[-_TAIL_LINES:]))
