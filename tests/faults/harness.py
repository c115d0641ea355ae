"""What the fault tests share: a tiny job, processes that can be killed, and what two runs must have in common.

A run here is the real command (`sft train CONFIG`) in real processes, forked by `forge.py` to save their imports.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import WORDS, make_model
from safetensors.torch import load_file

from sft.checkpoint import complete_checkpoints, verify

Fault = dict[str, Any]

# Written by the clock or the allocator; everything else in metrics.jsonl must be equal.
VOLATILE = {"seconds", "tokens_per_second", "time", "peak_memory_gib", "step_seconds", "data_seconds"}


def fault(where: str, call: int, what: str, when: str = "before") -> Fault:
    """`what` happens `when` the `call`-th call of `where` ("sft.train:train_step") begins ("before") or ends."""
    return {"where": where, "call": call, "what": what, "when": when}


@dataclass(frozen=True)
class Outcome:
    """Exit codes by rank (negative: killed by that signal) and what each wrote to stdout and stderr."""

    codes: list[int]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


@dataclass
class Run:
    """Ranks under way."""

    forge: Forge
    pids: list[int]
    outs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for pid in self.pids:
            if self.forge.poll(pid) is None:
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> Outcome:
        """Until all ranks ended. When one fails, the others get what torchrun gives them: SIGTERM, later SIGKILL."""
        deadline, terminated = time.monotonic() + timeout, 0.0
        while True:
            codes = [self.forge.poll(pid) for pid in self.pids]
            if all(code is not None for code in codes):
                break
            if not terminated and any(code not in (None, 0) for code in codes):
                terminated = time.monotonic()
                self._send_to_living(signal.SIGTERM)
            if terminated and time.monotonic() > terminated + 30:
                self._send_to_living(signal.SIGKILL)
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"ranks {codes} after {timeout} s:\n" + self._outcome([0]).output)
            time.sleep(0.02)
        return self._outcome([code for code in codes if code is not None])

    def _send_to_living(self, number: int) -> None:
        for pid in self.pids:
            if self.forge.poll(pid) is None:
                os.kill(pid, number)

    def _outcome(self, codes: list[int]) -> Outcome:
        return Outcome(codes, [out.read_text(errors="replace") for out in self.outs], time.monotonic() - self.began)


class Forge:
    """Client of forge.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forge.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""},
        )  # fmt: skip
        while self._read() != "ready":
            pass
        atexit.register(self.close)

    def fork(self, **request: Any) -> int:
        return int(self._ask(request))

    def poll(self, pid: int) -> int | None:
        code: int | None = self._ask({"poll": pid})
        return code

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(10)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            try:
                return json.loads(line)
            except json.JSONDecodeError:  # what libraries print while they are imported
                continue
        raise RuntimeError("forge.py ended")


@functools.cache
def the_forge() -> Forge:
    return Forge()


@functools.cache
def shared() -> Path:
    """A model with dropout and a data file, made once: `model/`, `data.jsonl`, `cache/`."""
    folder = Path(tempfile.mkdtemp(prefix="sft-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_model(folder / "model", dropout=0.1)
    make_model(folder / "plain", dropout=0.0)
    write_rows(folder / "data.jsonl", rows(33))
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of very uneven lengths."""
    chance = random.Random(seed)
    words = [word for word in WORDS if word.isalpha()]

    def text(longest: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(1, longest)))

    return [
        {
            "messages": [
                {"role": role, "content": text(30 if turn % 5 == 0 else 8)}
                for _ in range(chance.randint(1, 2))
                for role in ("user", "assistant")
            ]
        }
        for turn in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Job:
    """A config and its run folder: 32 rows, 8 a step, 4 steps an epoch, 2 epochs, several micro-batches a step."""

    def __init__(self, folder: Path, *overrides: str, **sections: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "run"
        self.config = folder / "job.yaml"
        settings = {
            "run": {"dir": str(self.run_dir), "seed": 7},
            "model": {"name": str(shared() / "model"), "tuning": "full", "precision": "fp32"},
            "data": {"train": [{"path": str(shared() / "data.jsonl")}], "eval": 1},
            "batch": {"examples": 8, "micro_tokens": 160},
            "optim": {"lr": 1e-3, "warmup": 0.2},
            "train": {"epochs": 2},
            "eval": {"every": 4, "samples": 0},
            "save": {"every": 2, "keep": 2},
            **sections,
        }
        self.config.write_text(json.dumps(settings))  # JSON is YAML
        self.overrides = list(overrides)
        self._runs = 0

    def start(
        self,
        *arguments: str,
        world: int = 1,
        faults: Mapping[int, Sequence[Fault]] | Sequence[Fault] = (),
        env: Mapping[str, str] | None = None,
        command: str = "train",
        only_rank: Mapping[int, Sequence[str]] | None = None,
        stall_seconds: float = 1800,
        more_memory: int | None = None,
    ) -> Run:
        """Start all ranks. `faults`: of rank 0, or by rank. `only_rank`: further arguments for some. `more_memory`:
        bytes of address space beyond those of the fresh process."""
        by_rank = faults if isinstance(faults, Mapping) else {0: faults}
        self._runs += 1
        port, outs, pids = str(free_port()), [], []
        for rank in range(world):
            out = self.config.parent / f"out-{self._runs}-{rank}.txt"
            ranks = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            pids.append(
                the_forge().fork(
                    argv=[command, str(self.config), *self.overrides, *arguments, *(only_rank or {}).get(rank, ())],
                    env={"SFT_CACHE": str(shared() / "cache"), **(ranks if world > 1 else {}), **(env or {})},
                    set={"sft.train:STALL_SECONDS": stall_seconds},
                    out=str(out), faults=list(by_rank.get(rank, ())), cwd=str(self.config.parent),
                    **({"more_memory": more_memory} if more_memory else {}),
                )
            )  # fmt: skip
            outs.append(out)
        return Run(the_forge(), pids, outs)

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> Outcome:
        return self.start(*arguments, **options).wait(timeout)

    def train(self, *arguments: str, **options: Any) -> Outcome:
        """Run to the end, which must be exit code 0 on all ranks."""
        outcome = self.run(*arguments, **options)
        assert set(outcome.codes) == {0}, outcome.output
        return outcome

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "status.json").read_text()))

    @property
    def checkpoints(self) -> list[Path]:
        return complete_checkpoints(self.run_dir / "checkpoints")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def numbers(self) -> list[dict[str, Any]]:
        """The train and eval events, without what the clock wrote."""
        return [
            {key: value for key, value in event.items() if key not in VOLATILE}
            for event in self.events
            if event["event"] in ("train", "eval")
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state of the newest checkpoint, and the weights in final/."""
        newest = self.checkpoints[0]
        verify(newest)
        found: dict[str, torch.Tensor] = {}
        for folder in (newest, self.run_dir / "final"):
            for file in sorted(folder.rglob("*.safetensors")):
                prefix = file.relative_to(self.run_dir if folder.name == "final" else newest)
                found.update({f"{prefix}:{name}": tensor for name, tensor in load_file(str(file)).items()})
        return found

    def wait_for_step(self, step: int, timeout: float = 60) -> None:
        """Until metrics.jsonl tells of a train step of at least `step`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            path = self.run_dir / "metrics.jsonl"
            if path.exists():
                lines = [line for line in path.read_text().split("\n")[:-1] if '"train"' in line]
                if any(json.loads(line)["step"] >= step for line in lines):
                    return
            time.sleep(0.01)
        raise TimeoutError(f"step {step} was not reached")


def copy_of(job: Job, folder: Path, *overrides: str) -> Job:
    """The same job with a copy of its run folder, to be continued in another way."""
    copy = Job(folder)
    copy.config.write_text(job.config.read_text())
    copy.overrides = [*job.overrides, f"run.dir={copy.run_dir}", *overrides]
    shutil.copytree(job.run_dir, copy.run_dir)
    return copy


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise the same."""
    return [
        name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b or bits(a[name]) != bits(b[name])
    ]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) + str(tensor.dtype).encode()


def assert_same_run(one: Job, other: Job) -> None:
    """Bitwise the same weights and optimizer state, and the same numbers at each step, each step once."""
    assert one.numbers() == other.numbers()
    steps = [event["step"] for event in one.events if event["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    tensors = one.tensors()
    assert any("optimizer" in name for name in tensors)
    assert any(name.startswith("final/") for name in tensors)
    assert same(tensors, other.tensors()) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
