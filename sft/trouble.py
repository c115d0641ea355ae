"""Trouble put into words and into status.json: another rank that ended, numbers that are none, any failure."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sft.distributed import LostContact, gather
from sft.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, NumericsError, SftError, Stopped
from sft.runfolder import MetricsLog, RunFolder
from sft.runlock import RunLock

if TYPE_CHECKING:
    from sft.batches import StepData
    from sft.session import Session

# What gloo and NCCL say when the other end of a connection goes away.
_CONTACT = re.compile(r"(?i)connection (closed|reset) by peer|broken pipe|remote process exited|socket (error|closed)")


@contextmanager
def trouble_explained(session: Session) -> Iterator[None]:
    """Ranks that end because another did, in words. A save under way is let finish."""
    try:
        with told_apart(session.job.rank, session.job.world):
            yield
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
            note_failure(folder, code, str(error) or type(error).__name__, type(error).__name__)
        except OSError as unwritten:  # a full disk, which the error itself tells of
            print(f"status.json could not be written: {unwritten}", file=sys.stderr, flush=True)
        raise


def note_failure(folder: RunFolder, code: int, reason: str, error: str = "") -> None:
    """The first cause stays: ranks that fail because another did write nothing."""
    status = folder.read_status()
    if status.get("state") == "running":
        steps = [int(event["step"]) for event in MetricsLog(folder.metrics).read() if event["event"] == "train"]
        folder.write_status("failed", code=code, reason=reason, step=max([int(status["step"]), *steps]), error=error)


def note_before_start(folder: RunFolder, error: SftError | Stopped) -> None:
    """Writes what kept a process from training, for launchers turn every exit code into 1.

    A complete run stays complete. Nothing is written where another process trains, where this one has written its
    status already, and between a user's files.
    """
    status = folder.read_status()
    if os.environ.get("RANK", "0") != "0" or status.get("state") == "done" or not folder.may_be_written():
        return
    stopped = isinstance(error, Stopped)
    if not stopped and (status.get("state"), status.get("pid")) == ("failed", os.getpid()):
        return
    # Where there is no checkpoint, the run begins again at step 0, whatever a killed process has logged.
    step = int(status.get("step") or 0) if any(folder.checkpoints.glob("step-*")) else 0
    try:
        with RunLock(folder.path):
            folder.write_status(
                "stopped" if stopped else "failed", code=EXIT_STOPPED if stopped else EXIT_USER, reason=str(error),
                step=step, error="" if stopped else type(error).__name__,
            )  # fmt: skip
    except (SftError, OSError):
        return  # the folder is another run's, or cannot be written: the exit code says it all


def decide_on_nonfinite(session: Session, data: StepData, losses: Sequence[torch.Tensor]) -> None:
    """No step is taken: all ranks come here together. Returns to skip the step, within `train.max_nonfinite_skips`.

    `losses` are of this rank's micro-batches; the rows of those that are no numbers are named. Raises NumericsError,
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
    error = NumericsError(
        f"step {data.step}: {what}; no step is taken and the run ends{bound}. Lower optim.lr, set optim.max_grad_norm, "
        "look at the rows with sft preview, or set train.on_nonfinite: skip."
    )
    error.said = not session.job.is_first
    raise error


def _listed(rows: Sequence[str], most: int = 8) -> str:
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")


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
