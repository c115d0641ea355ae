"""The loop. `train(loaded)` is what `sft train` runs on every rank; `train_step` is one optimizer step."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft import setup
from sft.accelerator import make_accelerator, unused_gpus_hint
from sft.advice import advice_on_steps, beyond_context
from sft.batches import Join, StepData, StepFeed
from sft.budget import told
from sft.choice import best_step
from sft.console import Console, speak
from sft.data.collate import to_device
from sft.devices import add_to, zeros_64
from sft.distributed import leave, sum_over_ranks, wait_for_all
from sft.durable import check_nameable
from sft.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, SftError, Stopped
from sft.finish import finish
from sft.fitting import peak_gib
from sft.launch import become_launcher_where_needed
from sft.meeting import Meeting
from sft.needed import lacking_for, refuse
from sft.opening import (
    Opening,
    check_ranks_agree,
    make_plan,
    on_first_rank,
    open_run,
    pinned_date,
    run_fingerprint,
    time_until,
)
from sft.optim import set_learning_rate
from sft.phases import Phases
from sft.preview import one_example
from sft.progress import Progress
from sft.report import write_report
from sft.resume import RunState
from sft.runfolder import RunFolder
from sft.runlock import RunLock
from sft.schedule import evaluation_steps, is_due, learning_rate
from sft.session import Session, open_session
from sft.shortage import explain_shortage, loading_explained
from sft.signals import StopRequest
from sft.trackers import Trackers
from sft.trainee import loss_sum
from sft.trouble import decide_on_nonfinite, failures_noted, note_before_start, note_failure, trouble_explained
from sft.versions import versions
from sft.watchdog import STALL_SECONDS, Watchdog

if TYPE_CHECKING:
    from sft.configfile import LoadedConfig


def train(
    loaded: LoadedConfig, *, fresh: bool = False, allow_change: Sequence[str] = (), started: float | None = None
) -> int:
    """Trains until done (0) or stopped on a signal (75). Raises the SftError family for what a user can fix.

    `started`: when the process began, on the monotonic clock.
    """
    become_launcher_where_needed()
    folder = RunFolder(loaded.run_dir)
    check_nameable("run.dir", folder.path)
    with StopRequest() as stop:
        try:
            refuse(lacking_for(loaded.config))  # before the data, which may take minutes
            return _train(loaded, folder, stop, Phases(started), fresh=fresh, allow_change=allow_change)
        except (Stopped, SftError) as error:
            note_before_start(folder, error)
            raise


def _train(
    loaded: LoadedConfig,
    folder: RunFolder,
    stop: StopRequest,
    phases: Phases,
    *,
    fresh: bool,
    allow_change: Sequence[str],
) -> int:
    from sft.prepare import prepare_data

    config, local_first = loaded.config, os.environ.get("LOCAL_RANK", "0") == "0"

    def say_early(text: str) -> None:
        if local_first:
            speak(text)

    setup.set_up_libraries(config)
    date = pinned_date(folder, fresh)
    meeting = Meeting()
    with meeting.announced():
        # outside the process group: no rank waits inside a collective for tokenisation
        with stop.raising(), phases.during("preparing"):
            bundle, data = prepare_data(loaded, say_early, pinned_date=date)
        plan = make_plan(config, data)
        for warning in advice_on_steps(config, plan, data.train.num_conversations):
            say_early(f"warning: {warning}")
        meeting.wait(stop.check)
    accelerator = make_accelerator(config, folder.path)
    rank, is_first = accelerator.process_index, accelerator.is_main_process
    identity = run_fingerprint(config, data, bundle, plan.total_steps)
    check_ranks_agree(rank, {"config": identity, "versions": versions()})
    lock = RunLock(folder.path)
    try:
        answer = on_first_rank(
            is_first,
            lambda: open_run(
                loaded, folder, lock, print_of_run=identity, total_steps=plan.total_steps, fresh=fresh,
                allow_change=allow_change, say=say_early,
            ),
        )  # fmt: skip
        opening = Opening(
            Path(answer["checkpoint"]) if answer["checkpoint"] else None,
            RunState.from_dict(answer["state"]),
            answer["is_done"],
        )
        if opening.is_done:
            if is_first and not (folder.path / "report.html").exists():  # killed between the status and the page
                write_report(folder.path)
            say_early(f"{folder.path}: complete at step {opening.state.step}. --fresh starts over.")
            return EXIT_DONE
        if is_first:
            folder.write_status("running", code=None, reason="", step=opening.state.step)
        with (
            failures_noted(folder),
            Console(enabled=is_first, total_steps=plan.total_steps, first_step=opening.state.step) as console,
        ):
            phases.continue_from(time_until(folder, opening.state))
            with loading_explained(config, accelerator.device), console.phase("loading the model"):
                session = open_session(
                    loaded,
                    folder,
                    bundle,
                    data,
                    opening,
                    accelerator,
                    plan,
                    Progress(console, phases),
                    date_pinned=date,
                )
            _introduce(session, opening, str(loaded.path))
            with (
                Watchdog(
                    STALL_SECONDS,
                    lambda: f"rank {rank}, after step {session.state.step}",
                    lambda reason: note_failure(folder, EXIT_FAILED, reason),
                ) as watchdog,
                trouble_explained(session),
                Trackers(session) as trackers,
            ):
                code = explain_shortage(session, watchdog, lambda: _loop(session, stop, watchdog, trackers, console))
        leave()
        return code
    finally:
        lock.release()


def _loop(session: Session, stop: StopRequest, watchdog: Watchdog, trackers: Trackers, console: Console) -> int:
    """Evaluate at step 0, then step, log, evaluate, save, until the plan ends or all ranks agree to stop."""
    config, job, plan = session.config, session.job, session.job.plan
    total = plan.total_steps
    stopping = False
    session.progress.phases.enter("steps")
    if data_has_eval(session) and session.state.step == 0 and 0 not in session.scores("eval.loss"):
        watchdog.beat("evaluating before the first step")
        stopping = not _evaluate(session, trackers, stop)
    elif session.state.step > 0:
        stopping = not _catch_up(session, trackers, stop)
    if stopping:
        return _stopped(session, stop)
    feed = StepFeed(
        session.data.train, plan, seed=config.run.seed, rank=job.rank, world=job.world,
        micro_tokens=job.micro_tokens, join=Join(job.flat_rows, job.pad_id),
    )  # fmt: skip
    early, best, evaluations = session.should_stop_early(), session.best_step(), evaluations_due(session)
    for data in feed.steps(session.state.step + 1) if not early else ():
        # -- one step -------------------------------------------------------------------------------------------------
        watchdog.beat(f"step {data.step}")
        started = time.perf_counter()
        result = train_step(session, data, asked_to_stop=lambda: stop.requested)
        seconds = time.perf_counter() - started
        session.state = advance(session.state, data, result, seconds)
        if job.is_first and (is_due(data.step, config.log.every, total) or result.stop):
            event = train_event(session, data, result, seconds)
            session.metrics.append(event)
            console.step(event, session.seconds_left())
            trackers.log(event)
        # -- what falls due -------------------------------------------------------------------------------------------
        stopping = result.stop and data.step < total
        saved = is_due(data.step, config.save.every, total) or stopping
        if not stopping and data.step in evaluations:
            watchdog.beat(f"evaluating at step {data.step}")
            stopping = not _evaluate(session, trackers, stop)
            best = session.best_step()
            saved = saved or stopping or best == data.step
            early = session.should_stop_early()
        if saved or early:
            watchdog.beat(f"saving at step {data.step}")
            session.save(best=best, is_last=stopping or early or data.step == total)
        session.store.poll()
        if stopping or early:
            break
    watchdog.beat("writing the last checkpoint", timeout_s=4 * STALL_SECONDS)
    with session.progress.phase("saving", "writing the last checkpoint"):
        session.store.wait()
    if stopping:
        return _stopped(session, stop)
    wait_for_all()
    watchdog.beat("finishing", timeout_s=4 * STALL_SECONDS)
    finish(session, reason="early stopping" if early else "")
    return EXIT_DONE


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` is the mean over the trained tokens of the step, over all ranks; None where nothing was trained."""

    loss: float | None
    grad_norm: float | None
    learning_rate: float
    skipped: bool
    stop: bool


def train_step(session: Session, data: StepData, *, asked_to_stop: Callable[[], bool] = lambda: False) -> StepResult:
    """One optimizer step over this rank's micro-batches of `data`. All ranks decide alike, on a stop too: each is
    asked at the end of its part.

    The loss is Σ w·l / Σ w over the whole step: counted first, over all ranks, then divided. Raises NumericsError
    for a loss or gradient that is not finite, unless `train.on_nonfinite` is skip.
    """
    config, job = session.config, session.job
    lr = _learning_rate(session, data.step)
    set_learning_rate(job.optimizer, lr)
    total_1 = zeros_64(1, job.device)
    losses: list[torch.Tensor] = []
    for micro, batch in enumerate(data.batches):
        is_last = micro == len(data.batches) - 1
        torch.manual_seed(_seed(config.run.seed, data.step, micro, job.rank))
        # Unsynchronised gradients of a sharded model would be whole ones, on each device.
        with nullcontext() if is_last or job.is_sharded else job.accelerator.no_sync(job.module):
            loss = loss_sum(job.module, job.trainee, to_device(batch, job.device))
            # DDP and FSDP average gradients over ranks; times the number of ranks that is the sum.
            job.accelerator.backward(loss * (job.world / max(data.weight, 1e-12)))
        losses.append(loss.detach())
        add_to(total_1, losses[-1])
    max_norm = config.optim.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(list(job.names), max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    own = [float(total_1), float(norm), float(asked_to_stop())]  # the one place where a step waits for its device
    finite = math.isfinite(own[0]) and math.isfinite(own[1])
    loss_all, bad_ranks, stop_ranks = sum_over_ranks([own[0] if finite else 0.0, float(not finite), own[2]], job.device)
    if bad_ranks:
        decide_on_nonfinite(session, data, losses)
    elif data.weight > 0:
        job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=None if bad_ranks or not data.weight else loss_all / data.weight,
        grad_norm=None if bad_ranks else own[1],
        learning_rate=lr,
        skipped=bool(bad_ranks),
        stop=stop_ranks > 0,
    )


def _learning_rate(session: Session, step: int) -> float:
    settings = session.config.optim
    return learning_rate(
        step,
        total_steps=session.job.plan.total_steps,
        peak=session.job.peak_lr,
        schedule=settings.schedule,
        warmup=session.state.warmup_steps,
        decay=settings.decay,
        min_ratio=settings.min_lr_ratio,
    )


def _seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Dropout and noise depend on where a micro-batch stands, not on what ran before it in this process."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def advance(state: RunState, data: StepData, result: StepResult, seconds: float) -> RunState:
    return replace(
        state,
        step=data.step,
        tokens=state.tokens + data.tokens,
        trained_tokens=state.trained_tokens + data.trained_tokens,
        seconds=state.seconds + seconds,
        nonfinite_skips=state.nonfinite_skips + int(result.skipped),
    )


def train_event(session: Session, data: StepData, result: StepResult, seconds: float) -> dict[str, Any]:
    return {
        "event": "train",
        "step": data.step,
        "epoch": round(session.job.plan.epoch_at(data.step), 6),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": session.state.tokens,
        "trained_tokens": session.state.trained_tokens,
        "tokens_per_second": round(data.tokens / seconds, 1),
        "seconds": round(session.state.seconds, 3),
        "micro_batches": len(data.batches),
        "peak_memory_gib": round(peak_gib(session.job.device), 2),
        "batch": data.digest,
        **({"skipped": True} if result.skipped else {}),
    }


def data_has_eval(session: Session) -> bool:
    return session.data.eval is not None


def evaluations_due(session: Session) -> frozenset[int]:
    """The steps after which the held-out rows are scored."""
    if not data_has_eval(session):
        return frozenset()
    return frozenset(evaluation_steps(session.evals.every_steps, session.job.plan.total_steps))


def _evaluate(session: Session, trackers: Trackers, stop: StopRequest) -> bool:
    """Evaluates after the current step. False where a rank was asked to stop on the way."""
    scores = session.evaluate(session.state.step, lambda: stop.requested)
    if scores is None:
        return False
    trackers.log_eval(scores, session.state.step)
    return True


def _catch_up(session: Session, trackers: Trackers, stop: StopRequest) -> bool:
    """The evaluation that fell due at the step after which the run was stopped. False where it is stopped again."""
    step = session.state.step
    if (
        step in evaluations_due(session)
        and step not in session.scores("eval.loss")
        and not _evaluate(session, trackers, stop)
    ):
        return False
    best, metric = session.best_step(), session.config.save.best
    session.store.protect(best)
    if metric is not None and best != (lost := best_step(session.scores(metric), metric)):
        kept = f"the best of those that have one is step {best}" if best else "none of the others has one either"
        session.say(f"WARNING: by {metric} step {lost} was the best so far, but it has no checkpoint; {kept}")
    return True


def _stopped(session: Session, stop: StopRequest) -> int:
    step, name = session.state.step, stop.signal_name or "a signal to another rank"
    if session.job.is_first:
        session.record_time()
        session.folder.write_status("stopped", code=EXIT_STOPPED, reason=f"stopped by {name}", step=step)
    wait_for_all()  # the first rank that leaves makes the launcher signal the others: all is written by then
    what = f"after step {step}, checkpoint published" if step else "before the first step"
    session.say(f"stopped by {name} {what}; the same command resumes")
    return EXIT_STOPPED


def _introduce(session: Session, opening: Opening, command: str) -> None:
    """What is about to happen, and one example as it is trained: ten seconds of looking find most mask bugs."""
    job, plan = session.job, session.job.plan
    facts = job.resolved
    begin = f"resuming after step {opening.state.step}" if opening.state.step else "training"
    threads = f", {facts['threads']} thread{'s' * (facts['threads'] > 1)}" if job.device.type == "cpu" else ""
    session.say(
        f"{begin}: {plan.total_steps} steps of {session.config.batch.examples} conversations on {job.world} "
        f"process{'es' if job.world > 1 else ''} ({job.device.type}{threads}), {facts['trained_parameters']:,} of "
        f"{facts['parameters']:,} parameters, {facts['precision']}, lr {job.peak_lr:g}, "
        f"{'flat rows' if job.flat_rows else 'padded batches'} of up to {job.micro_tokens:,} tokens"
        f"{', loss by Liger' if job.trainee.loss_kernel == 'liger' else ''}"
    )
    if data_has_eval(session):
        for line in told(session.evals, session.config, session.work):
            session.say(line)
    longest = int(session.data.train.lengths_E.max())
    if long := beyond_context(job.trainee.model.config.to_dict(), longest, session.config.data.max_tokens):
        session.say(f"warning: {long}")
    if hint := unused_gpus_hint(command):
        session.say(hint)
    if opening.state.step == 0 and job.is_first:
        session.say(one_example(session.data.train.example(0), session.bundle))
