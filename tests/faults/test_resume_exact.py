"""Cut anywhere and resumed, a run ends with bitwise the weights, optimizer state and numbers of the uninterrupted one.

Dropout is on, epochs end within the run, a step has several micro-batches. "Cut" is a real signal to a real process.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from harness import Fault, Job, assert_same_run, fault, same, shared
from safetensors.torch import load_file

STEP = "sft.train:train_step"
STEPS = 8  # of the job: two epochs of four

LORA = {"model.tuning=lora", "model.lora.rank=4", "model.lora.dropout=0.1"}
QLORA = {*LORA - {"model.tuning=lora"}, "model.tuning=qlora"}
TUNINGS = {
    "full": set(),
    "lora": LORA,
    "qlora": QLORA,
    "full, mixed": {"model.precision=mixed"},
    "full, bf16": {"model.precision=bf16"},
    "lora, mixed": {*LORA, "model.precision=mixed"},
    "lora, bf16": {*LORA, "model.precision=bf16"},
    "qlora, mixed": {*QLORA, "model.precision=mixed"},
    "full, compiled": {"model.compile=true", "model.precision=mixed"},
    "lora, compiled": {*LORA, "model.compile=true", "model.precision=mixed"},
}
LOWER = [tuning for tuning in TUNINGS if tuning.endswith(("mixed", "bf16"))]
COMPILED = [tuning for tuning in TUNINGS if tuning.endswith("compiled")]


@functools.cache
def reference(tuning: str = "full", world: int = 1) -> Job:
    """The uninterrupted run. One a setting, shared by the tests of this process."""
    job = Job(Path(tempfile.mkdtemp(prefix="sft-reference-")), *sorted(TUNINGS[tuning]))
    job.train(world=world)
    assert [event["step"] for event in job.events if event["event"] == "train"] == list(range(1, STEPS + 1))
    assert max(event["micro_batches"] for event in job.events if event["event"] == "train") > 1
    return job


def new_job(folder: Path, tuning: str = "full") -> Job:
    return Job(folder, *sorted(TUNINGS[tuning]))


def stop_after(step: int, rank: int = 0) -> dict[int, list[Fault]]:
    """SIGTERM to one rank inside the `step`-th step of this process: all stop at its end."""
    return {rank: [fault(STEP, step, "SIGTERM")]}


def test_two_uninterrupted_runs_are_the_same(tmp_path: Path) -> None:
    """What makes the other tests of this file mean something."""
    job = new_job(tmp_path)
    job.train()
    assert_same_run(job, reference())


def test_stopped_after_every_step(tmp_path: Path) -> None:
    job = new_job(tmp_path)
    for step in range(1, STEPS):
        outcome = job.run(faults=stop_after(1))
        assert outcome.codes == [75], outcome.output
        assert job.status["step"] == step
    job.train()
    assert_same_run(job, reference())


@pytest.mark.parametrize("step", [pytest.param(s, marks=pytest.mark.slow) for s in range(1, STEPS)])
def test_stopped_once(tmp_path: Path, step: int) -> None:
    job = new_job(tmp_path)
    outcome = job.run(faults=stop_after(step))
    assert outcome.codes == [75], outcome.output
    assert (job.status["state"], job.status["step"], job.status["code"]) == ("stopped", step, 75)
    job.train()
    assert_same_run(job, reference())


QUICK_KILLS = {(STEP, 6, "before"), ("sft.checkpoint:CheckpointStore._rotate", 2, "before")}
KILLS = [
    *((STEP, step, when) for step in range(1, STEPS + 1) for when in ("before", "after")),
    *(("sft.checkpoint:_seal", save, when) for save in (1, 2, 4) for when in ("before", "after")),
    *(("sft.checkpoint:CheckpointStore._rotate", save, when) for save in (1, 2, 4) for when in ("before", "after")),
    *(("sft.session:Session.evaluate", number, when) for number in (1, 2, 3) for when in ("before", "after")),
    *(("sft.runfolder:MetricsLog.append", line, "after") for line in (1, 2, 5, 9)),
    ("sft.train:finish", 1, "before"),
    ("sft.train:finish", 1, "after"),
]


@pytest.mark.parametrize(
    ("where", "call", "when"), [pytest.param(*k, marks=[] if k in QUICK_KILLS else pytest.mark.slow) for k in KILLS]
)
def test_killed_once(tmp_path: Path, where: str, call: int, when: str) -> None:
    job = new_job(tmp_path)
    outcome = job.run(faults=[fault(where, call, "SIGKILL", when)])
    assert outcome.codes == [-9], outcome.output
    job.train()
    assert_same_run(job, reference())


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """A process never gets further than two steps and one save; each kill is at the end of its second step."""
    job = new_job(tmp_path)
    kills = 0
    while job.run("save.every=1", faults=[fault(STEP, 3, "SIGKILL")]).codes == [-9]:
        kills += 1
    assert kills >= 3
    assert_same_run(job, reference())


@pytest.mark.parametrize("tuning", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_adapters(tmp_path: Path, tuning: str) -> None:
    job = new_job(tmp_path, tuning)
    assert job.run(faults=stop_after(3)).codes == [75]
    assert not list(job.run_dir.rglob("model.safetensors")), "an adapter's checkpoint holds no base"
    assert job.run(faults=[fault(STEP, 3, "SIGKILL")]).codes == [-9]
    job.train()
    assert_same_run(job, reference(tuning))


@pytest.mark.slow  # tests/test_train.py keeps a short one
@pytest.mark.parametrize("tuning", LOWER)
def test_in_lower_precision(tmp_path: Path, tuning: str) -> None:
    """Stopped, killed and resumed with 16-bit arithmetic, and in `mixed` with float32 weights beside it."""
    job = new_job(tmp_path, tuning)
    assert job.run(faults=stop_after(3)).codes == [75]
    kept = {str(tensor.dtype) for tensor in load_checkpoint(job).values() if tensor.is_floating_point()}
    assert ("torch.float32" if "mixed" in tuning else "torch.bfloat16") in kept
    assert job.run(faults=[fault(STEP, 3, "SIGKILL")]).codes == [-9]
    job.train()
    assert_same_run(job, reference(tuning))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("tuning", COMPILED)
def test_with_compiled_layers(tmp_path: Path, tuning: str) -> None:
    """Each process compiles anew, from the same first row, whatever step it starts at."""
    job = new_job(tmp_path, tuning)
    outcome = job.run(faults=stop_after(3))
    assert outcome.codes == [75]
    assert "compiled in" in outcome.output
    assert job.run(faults=[fault(STEP, 3, "SIGKILL")]).codes == [-9]
    job.train()
    assert_same_run(job, reference(tuning))


def load_checkpoint(job: Job) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in (job.checkpoints[0] / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.gpu
def test_on_cuda_with_deterministic_kernels(tmp_path: Path) -> None:
    """`run.deterministic: true`: stopped, killed and resumed on a GPU, in the precision that `auto` takes there."""
    assert torch.cuda.is_available(), "-m gpu asks for a machine with a CUDA device"
    settings = ["run.deterministic=true", "model.precision=auto", "train.epochs=60", "save.every=7", "eval.every=50"]
    whole, cut = Job(tmp_path / "whole", *settings), Job(tmp_path / "cut", *settings)
    assert process_of(whole).wait(300) == 0
    for number, step, code in ((signal.SIGTERM, 20, 75), (signal.SIGKILL, 60, -9)):
        process = process_of(cut)
        cut.wait_for_step(step, timeout=200)
        process.send_signal(number)
        assert process.wait(100) == code
    assert process_of(cut).wait(300) == 0
    assert_same_run(cut, whole)


def process_of(job: Job) -> subprocess.Popen[bytes]:
    """A process of its own: CUDA does not survive the fork of the other tests' runs."""
    command = [sys.executable, "-m", "sft", "train", str(job.config), *job.overrides]
    return subprocess.Popen(command, env={**os.environ, "SFT_CACHE": str(shared() / "cache")})


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "tuning"),
    [
        (2, "full"),
        pytest.param(2, "full, mixed", marks=pytest.mark.slow),
        pytest.param(2, "lora, mixed", marks=pytest.mark.slow),
        pytest.param(2, "full, compiled", marks=pytest.mark.slow),
        pytest.param(3, "full", marks=pytest.mark.slow),
        pytest.param(2, "lora", marks=pytest.mark.slow),
        pytest.param(3, "lora", marks=pytest.mark.slow),
        pytest.param(2, "qlora", marks=pytest.mark.slow),
    ],
)
def test_several_processes(tmp_path: Path, world: int, tuning: str) -> None:
    """A signal to the last rank stops all at one step; then a kill of one rank ends all."""
    job = new_job(tmp_path, tuning)
    outcome = job.run(faults=stop_after(3, rank=world - 1), world=world)
    assert set(outcome.codes) <= {75, -15}, outcome.output
    assert (job.status["state"], job.status["step"]) == ("stopped", 3)
    outcome = job.run(faults={world - 1: [fault(STEP, 3, "SIGKILL")]}, world=world)
    assert outcome.codes[-1] == -9
    assert 0 not in outcome.codes
    job.train(world=world)
    assert_same_run(job, reference(tuning, world))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_stopped_after_every_step(tmp_path: Path, world: int) -> None:
    job = new_job(tmp_path)
    for step in range(1, STEPS):
        outcome = job.run(faults=stop_after(1, rank=step % world), world=world)
        # A rank that has already let go of its handlers dies of what the launcher sends once the first has left.
        assert set(outcome.codes) <= {75, -15}, outcome.output
        assert job.status["step"] == step
        assert (job.status["state"], job.status["code"]) == ("stopped", 75)
    job.train(world=world)
    assert_same_run(job, reference(world=world))


@pytest.mark.parametrize("file", ["optimizer", pytest.param("model", marks=pytest.mark.slow)])
def test_one_bit_of_the_restored_state_shows(tmp_path: Path, file: str) -> None:
    """The negative control: were a single bit of weights or optimizer state lost, these tests would fail."""
    job = new_job(tmp_path)
    assert job.run(faults=stop_after(4)).codes == [75]
    where = "sft.session:read_tensors" if file == "optimizer" else "sft.setup:load_base"
    job.train(faults=[fault(where, 1, "last bit", "result")])
    assert same(job.tensors(), reference().tensors()) != []
