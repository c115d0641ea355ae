"""Trouble put into words and into status.json: memory that ran out, another rank that ended, any failure."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from sft.data.collate import flat, to_device
from sft.distributed import gather
from sft.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, DeviceError, SftError
from sft.runfolder import MetricsLog, RunFolder
from sft.runlock import RunLock
from sft.space import human
from sft.trainee import loss_sum
from sft.types import Example

if TYPE_CHECKING:
    from sft.batches import StepData
    from sft.config import Config
    from sft.session import Session
    from sft.setup import Job

_CPU_MEMORY = re.compile(r"(?i)DefaultCPUAllocator|can't allocate memory|cannot allocate memory")
# What gloo and NCCL say when the other end of a connection goes away.
_CONTACT = re.compile(r"(?i)connection (closed|reset) by peer|broken pipe|remote process exited|socket (error|closed)")
_SMALLEST = 64


@contextmanager
def trouble_explained(session: Session) -> Iterator[None]:
    """Memory that ran out, and ranks that end because another did, in words. A save under way is let finish."""
    job, longest = session.job, int(session.data.train.lengths_E.max())
    failure: DeviceError | None = None
    try:
        with told_apart(job.rank, job.world):
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # lets go of the tensors that fill the memory
                failure = DeviceError(str(error).splitlines()[0])
            if failure is not None:
                raise out_of_memory(job, session.config, step=session.state.step + 1, longest=longest) from failure
    finally:
        if unsaved := session.store.settle():
            session.say(f"the checkpoint that was being saved failed as well: {unsaved}")


@contextmanager
def failures_noted(folder: RunFolder) -> Iterator[None]:
    """Writes a failure to status.json."""
    try:
        yield
    except BaseException as error:
        code = EXIT_USER if isinstance(error, SftError) else EXIT_FAILED
        try:
            note_failure(folder, code, str(error) or type(error).__name__)
        except OSError as unwritten:  # a full disk, which the error itself tells of
            print(f"status.json could not be written: {unwritten}", file=sys.stderr, flush=True)
        raise


def note_failure(folder: RunFolder, code: int, reason: str) -> None:
    """The first cause stays: ranks that fail because another did write nothing."""
    status = folder.read_status()
    if status.get("state") == "running":
        steps = [int(event["step"]) for event in MetricsLog(folder.metrics).read() if event["event"] == "train"]
        folder.write_status("failed", code=code, reason=reason, step=max([int(status["step"]), *steps]))


def note_stop_in_preparing(folder: RunFolder, reason: str) -> None:
    """Unless another process trains in this folder right now, its status says that this one was stopped."""
    if os.environ.get("RANK", "0") != "0" or folder.read_status().get("state") == "done":
        return
    try:
        with RunLock(folder.path):
            step = int(folder.read_status().get("step") or 0)
            folder.write_status("stopped", code=EXIT_STOPPED, reason=reason, step=step)
    except SftError:
        return  # the folder is another run's, or cannot be written: the exit code says it all


def decide_on_nonfinite(session: Session, data: StepData, losses: Sequence[torch.Tensor]) -> None:
    """No step is taken: all ranks come here together. Returns to skip the step, within `train.max_nonfinite_skips`.

    `losses` are of this rank's micro-batches; the rows of those that are no numbers are named. Raises DeviceError,
    said by rank 0.
    """
    train, skips = session.config.train, session.state.nonfinite_skips + 1
    bad = [micro for micro, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
    rows = sorted({source for micro in bad for source in data.sources[micro]})
    told = [found for found in gather({"rank": session.job.rank, "rows": rows}) if found["rows"]]
    where = " and ".join(f"rank {found['rank']} (rows {_listed(found['rows'])})" for found in told)
    what = f"the loss is not finite on {where}" if told else "a gradient is not finite, though every loss is"
    if train.on_nonfinite == "skip" and skips <= train.max_nonfinite_skips:
        session.say(f"step {data.step}: {what}; no step is taken ({skips} of {train.max_nonfinite_skips} skips)")
        return
    bound = f" after {skips - 1} skipped steps (train.max_nonfinite_skips)" if train.on_nonfinite == "skip" else ""
    error = DeviceError(
        f"step {data.step}: {what}; no step is taken and the run ends{bound}. Lower optim.lr, set optim.max_grad_norm, "
        "look at the rows with sft preview, or set train.on_nonfinite: skip."
    )
    error.said = not session.job.is_first
    raise error


def _listed(rows: Sequence[str], most: int = 8) -> str:
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")


class LostContact(RuntimeError):
    """Another rank ended, so this one cannot go on. Not the cause: that rank says it, or the system's log does."""

    said = True  # in one line, below, rather than with a traceback that points at the wrong place


@contextmanager
def told_apart(rank: int, world: int) -> Iterator[None]:
    """Turns the noise that other ranks make when one ends into one line each, so that the cause stands out."""
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not is_lost_contact(error):
            raise
        lost = LostContact("another rank ended; its own message says why, and where it has none it was killed")
        print(f"[rank {rank}] stopped: {lost}", file=sys.stderr, flush=True)
        raise lost from error


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because its peer went away."""
    return isinstance(error, torch.distributed.DistError) or _CONTACT.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _CPU_MEMORY.search(str(error)) is not None
    )


def out_of_memory(job: Job, config: Config, *, step: int, longest: int) -> DeviceError:
    """What used the memory, the micro-batch that fits, what else would help. `longest`: tokens of an example."""
    job.optimizer.zero_grad(set_to_none=True)
    weights, gradients, states = _bytes_in_use(job)
    fits, how = _micro_tokens_that_fit(job, longest)
    size = human(torch.cuda.get_device_properties(job.device).total_memory) if job.device.type == "cuda" else "memory"
    advice = []
    if fits is not None:
        advice.append(f"batch.micro_tokens={fits} ({how}; a step keeps its {config.batch.examples} conversations)")
    if job.micro_tokens <= longest or fits is None:
        advice.append(f"data.max_tokens below {longest}, the longest example")
    advice += [text for is_open, text in _switches(job, config) if is_open]
    tokens = max(job.micro_tokens, longest)
    return DeviceError(
        f"step {step}, rank {job.rank}: out of memory: a micro-batch of up to {tokens:,} tokens did not fit into the "
        f"{size} of {job.device} beside weights {human(weights)}, gradients {human(gradients)} and optimizer "
        f"{human(states)}. Any of these helps: {'; '.join(advice)}. The same command resumes."
    )


def _switches(job: Job, config: Config) -> list[tuple[bool, str]]:
    tuning = config.model.tuning
    return [
        (not job.resolved.get("gradient_checkpointing", False), "model.gradient_checkpointing=true"),
        (config.optim.type == "adamw" and tuning == "full", "optim.type=adamw_8bit"),
        (tuning == "full", "model.tuning=lora in a new run"),
        (tuning != "qlora", "model.tuning=qlora in a new run"),
        (not job.is_sharded and job.device.type == "cuda", "more GPUs with FSDP (configs/accelerate/fsdp2.yaml)"),
    ]


def _bytes_in_use(job: Job) -> tuple[int, int, int]:
    """Weights, gradients while a step is at work, optimizer state; on this rank."""
    parameters = list(job.trainee.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    states = sum(
        value.numel() * value.element_size()
        for entries in job.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    return weights, gradients, states


def _micro_tokens_that_fit(job: Job, longest: int) -> tuple[int | None, str]:
    """Halves until a pass fits, measured where that is safe: on a GPU, and without other ranks in the model."""
    tokens = job.micro_tokens // 2
    if job.device.type != "cuda" or job.is_sharded:
        return (tokens, "half of now") if tokens >= _SMALLEST else (None, "")
    while tokens >= max(_SMALLEST, longest // 2):
        try:
            _pass(job, tokens, longest)
        except torch.OutOfMemoryError:
            tokens //= 2
            continue
        finally:
            job.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return tokens, "measured to fit"
    return None, ""


def _pass(job: Job, tokens: int, longest: int) -> None:
    """Forward and backward over `tokens` tokens, all trained, past any wrapper that would wait for other ranks."""
    pieces = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    examples = [Example(np.ones(n, np.int32), np.ones(n, np.float32), "measure") for n in pieces if n > 1]
    loss_sum(job.trainee, job.trainee, to_device(flat(examples), job.device)).backward()  # type: ignore[no-untyped-call]
