"""Before a model is loaded: ranks that agree, the run folder, its lock and newest checkpoint, the plan of steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft import liger
from sft.budget import Work, work_of
from sft.checkpoint import find_resumable
from sft.choice import scores_of, stops_early
from sft.config import Config
from sft.data.order import conversations_per_epoch, epoch_members
from sft.devices import training_device
from sft.distributed import from_first_rank, gather
from sft.durable import check_writable, read_json
from sft.errors import DataError, LaunchError, ResumeError, SftError, error_named
from sft.gguf import gguf_file
from sft.needed import is_sharded_launch
from sft.phases import PHASES
from sft.resume import RunState, check_continuation, check_names, differences, fingerprint, length_of, named_only
from sft.runfolder import MetricsLog, RunFolder
from sft.runlock import RunLock
from sft.schedule import Plan, plan, share_or_steps

MOST_HEADER_BYTES = 100_000_000  # as safetensors itself allows
WEIGHT_SAMPLES, WEIGHT_SAMPLE_BYTES = 256, 4096  # of each file of weights

if TYPE_CHECKING:
    from sft.configfile import LoadedConfig
    from sft.data.loader import Prepared
    from sft.tokenizer import TokenizerBundle


def pinned_date(folder: RunFolder, fresh: bool) -> str:
    """The date that templates are told: the day this run began, so that a resumed run renders the same."""
    try:
        return date.fromisoformat(read_json(folder.environment)["date"]).isoformat() if not fresh else _today()
    except (ResumeError, OSError, ValueError, TypeError, KeyError):
        # Not there or damaged: where a template reads the date, the changed content will be refused.
        return _today()


def _today() -> str:
    return date.today().isoformat()


def on_first_rank(is_first: bool, action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0 and gives its plain result to all; its user error is raised on all, said once."""
    answer: dict[str, Any] = {}
    failure: SftError | None = None
    if is_first:
        try:
            answer = {"result": action()}
        except SftError as error:
            failure, answer = error, {"error": str(error), "kind": type(error).__name__}
    answer = from_first_rank(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        quiet = error_named(answer["kind"], answer["error"])
        quiet.said = True
        raise quiet
    return answer["result"]


def check_ranks_agree(rank: int, facts: dict[str, Any]) -> None:
    """Config, data and versions must be the same everywhere: told apart by rank, or nothing."""
    everyone = gather(facts)
    for other, theirs in enumerate(everyone):
        different = sorted(key for key in facts if theirs.get(key) != everyone[0].get(key))
        if different:
            shown = "; ".join(f"{key}: {everyone[0][key]!r} on rank 0, {theirs[key]!r} here" for key in different)
            error = LaunchError(f"rank {other} does not agree with rank 0: {shown}. Give all ranks the same files.")
            error.said = rank != other
            raise error


@dataclass(frozen=True)
class Opening:
    """What was decided about the run folder before a model is loaded."""

    checkpoint: Path | None
    state: RunState
    is_done: bool


def open_run(
    loaded: LoadedConfig,
    folder: RunFolder,
    lock: RunLock,
    *,
    print_of_run: dict[str, Any],
    total_steps: int,
    fresh: bool,
    allow_change: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """On rank 0: the lock, the old run moved aside, the checkpoint to continue from, or what forbids it."""
    check_names(allow_change, derived=(liger.KEY,))
    _refuse_strangers_files(folder)
    if fresh and folder.path.exists():
        moved = lock.while_held(folder.move_aside)  # a live owner is named before anything moves
        say(f"--fresh: the old run lies in {moved}")
    check_writable(folder.path)
    lock.acquire()
    check_writable(folder.checkpoints)
    checkpoint, length = find_resumable(folder.checkpoints, say), length_of(loaded.config)
    if checkpoint is None:
        done_at = end_without_checkpoints(loaded.config, folder, total_steps)
        warmup = warmup_steps(loaded.config, total_steps, None)
        state = RunState(done_at or 0, fingerprint=print_of_run, warmup_steps=warmup, length=length)
        return {"checkpoint": None, "state": state.as_dict(), "is_done": done_at is not None}
    before = read_state(checkpoint)
    kernel, consents = agreed(
        loaded.config, before, print_of_run, run_dir=str(folder.path), allowed=allow_change, say=say
    )
    warmup = warmup_steps(loaded.config, total_steps, before)
    state = replace(
        before, fingerprint=print_of_run, consents=[*before.consents, *consents], warmup_steps=warmup, length=length,
        resolved={**before.resolved, liger.KEY: kernel},
    )  # fmt: skip
    fault = fault_of_model(folder.final) if folder.final.is_dir() else "not there"
    ended = folder.read_status().get("state") == "done" and not fault
    if folder.read_status().get("state") == "done" and fault:
        say(f"WARNING: {folder.final} is damaged ({fault}): it is written again from the checkpoint")
    is_done = ended and is_at_its_end(loaded.config, folder, state.step, total_steps)
    return {"checkpoint": str(checkpoint), "state": state.as_dict(), "is_done": is_done}


def read_state(checkpoint: Path) -> RunState:
    """The state in a checkpoint. Raises ResumeError."""
    return RunState.from_dict(read_json(checkpoint / "state.json"), str(checkpoint / "state.json"))


def agreed(
    config: Config,
    before: RunState,
    print_of_run: Mapping[str, Any],
    *,
    run_dir: str,
    allowed: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, list[dict[str, Any]]]:
    """The loss kernel with which the run goes on, and the consents to what changed since `before`.

    Raises ResumeError for changes without consent: `sft train` and `sft check` refuse by this one rule.
    """
    if not before.fingerprint:
        raise ResumeError(
            f"{run_dir}: its checkpoints are of a version of sft that did not record what a run is made of, so nobody "
            "can tell whether this is the same training. Give it another run.dir, or start over with --fresh."
        )
    kernel = before.resolved.get(liger.KEY, "plain")
    lost = liger.lost(before.resolved, training_device().type, is_sharded=is_sharded_launch())
    consents = check_continuation(
        {**before.fingerprint, liger.KEY: kernel}, {**print_of_run, liger.KEY: f"plain ({lost})" if lost else kernel},
        step=before.step, allowed=allowed, run_dir=run_dir, named=named_only(config), say=say,
        lengths=differences(before.length, length_of(config)) if before.length else {},
    )  # fmt: skip
    return "plain" if lost else kernel, consents


def is_at_its_end(config: Config, folder: RunFolder, step: int, total_steps: int) -> bool:
    """Whether nothing is left to train after `step`."""
    return step >= total_steps or _stopped_early(config, folder)


def _stopped_early(config: Config, folder: RunFolder) -> bool:
    """Whether the run ended early by a rule that still says so."""
    rule, reason = config.train.early_stopping, folder.read_status().get("reason", "")
    if rule is None or not reason.startswith("early stopping"):
        return False
    return stops_early(scores_of(MetricsLog(folder.metrics).read(), rule.metric), rule)


def end_without_checkpoints(config: Config, folder: RunFolder, total_steps: int) -> int | None:
    """The step at which a complete run ended whose checkpoints were removed; None for a run that is to begin.

    ResumeError for a run that had checkpoints and needs them: beginning again from nothing is the user's choice.
    """
    status, events = folder.read_status(), MetricsLog(folder.metrics).read()
    if status.get("state") == "done" and not fault_of_model(folder.final):
        step = int(status.get("step") or 0)
        if is_at_its_end(config, folder, step, total_steps):
            return step
    trained = max((int(event["step"]) for event in events if event["event"] == "train"), default=0)
    interval = share_or_steps(config.save.every, total_steps)
    # The second save waits for the first one to be published.
    had_some = any(event["event"] == "resume" for event in events) or 0 < 2 * interval < trained
    if status.get("state") == "done" or had_some or (status.get("state") == "stopped" and status.get("step")):
        raise ResumeError(
            f"{folder.path}: this run came to step {trained}, but {folder.checkpoints} holds no checkpoint to continue "
            "from. Put it back (is a disk not mounted?), give this training another run.dir, or start over with "
            "--fresh (the old run is moved aside)."
        )
    return None


def time_until(folder: RunFolder, state: RunState) -> dict[str, float]:
    """Seconds of each phase until the checkpoint, and what came after it where the run then ended or was stopped."""
    told = [event for event in MetricsLog(folder.metrics).read() if event["event"] == "time"]
    if state.step == 0 or not told or told[-1].get("step") != state.step:
        return state.phases
    return {phase: float(told[-1].get(phase) or 0.0) for phase in PHASES}


def warmup_steps(config: Config, total_steps: int, before: RunState | None) -> int:
    """Steps of warm-up. `before`: the state of the checkpoint that is continued from, if any.

    A share is one of the steps that the run began with: more steps at a constant rate must not warm up again. Where
    the schedule decays, its length is agreed on anew, and the warm-up with it.
    """
    settings = config.optim
    if before and settings.schedule == "constant" and before.warmup_steps >= 0:
        began_with = before.fingerprint.get("optim.warmup")
        if began_with == settings.warmup:
            return before.warmup_steps
    return share_or_steps(settings.warmup, total_steps)


def fault_of_model(folder: Path) -> str:
    """What keeps a saved model from being whole, as far as sizes tell: "" where nothing does."""
    names = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
    shards = set(folder.glob("*.safetensors"))
    try:
        if not names:
            return "no config.json"
        for index in folder.glob("*.safetensors.index.json"):
            shards |= {folder / str(name) for name in read_json(index)["weight_map"].values()}
        for name in names:
            read_json(folder / name)
        short = [file.name for file in sorted(shards) if file.stat().st_size != safetensors_size(file)]
    except (ResumeError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return str(error)
    return f"{short[0]} is not as long as its header says" if short else "" if shards else "no *.safetensors"


def safetensors_size(file: Path) -> int:
    """The size that the header of a safetensors file gives it. ValueError where there is no such header."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, MOST_HEADER_BYTES)))
    return (
        8
        + length
        + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    )


def cut_metrics(metrics: MetricsLog, config: Config, opening: Opening, say: Callable[[str], None]) -> None:
    """metrics.jsonl back to the checkpoint. Where lines were lost, says so; refuses where evaluations decide."""
    decides = config.save.best is not None or config.train.early_stopping is not None
    is_lost = not metrics.exists() or (decides and not metrics.read())
    damaged = metrics.cut_after(opening.state.step if opening.checkpoint else -1)
    if opening.checkpoint is None or not (is_lost or damaged):
        return
    what = f"{damaged} damaged lines of metrics.jsonl are lost" if damaged else "metrics.jsonl is lost"
    if decides:
        raise ResumeError(
            f"{what}, and with them evaluations that save.best or train.early_stopping decide by. Restore the file "
            "from a copy, start over with --fresh, or drop those keys (save.best=null train.early_stopping=null)."
        )
    say(f"WARNING: {what}: curves have a gap before step {opening.state.step + 1}; the training itself is not touched")


def _refuse_strangers_files(folder: RunFolder) -> None:
    """A folder of other things is not a run folder: nothing is written between, or over, a user's files."""
    if not folder.may_be_written():
        held = sorted(path.name for path in folder.path.iterdir() if not path.name.startswith("."))
        raise ResumeError(
            f"run.dir: {folder.path} is no run folder: it holds {', '.join(held[:5])}. Choose an empty or new folder."
        )


def make_plan(config: Config, data: Prepared) -> Plan:
    """The steps of the run. DataError where `repeat` leaves an epoch without a row."""
    number = conversations_per_epoch(data.train.origins_C, data.train.repeats_S)
    if not number:
        repeats = ", ".join(f"data.train.{i}.repeat is {source.repeat:g}" for i, source in enumerate(config.data.train))
        raise DataError(
            f"{repeats}: with {data.train.num_conversations:,} conversations to train on, an epoch would hold none. "
            "Raise repeat until it comes to at least one conversation an epoch; 1 takes each once."
        )
    return plan(number, config.batch.examples, config.train.epochs, config.train.max_steps)


def work_of_run(config: Config, plan: Plan, data: Prepared) -> Work:
    """What the run computes, as the same numbers on every machine. Without held-out rows there is nothing to score."""
    train = data.train
    members = epoch_members(train.origins_C, train.repeats_S, seed=0, epoch=0)
    tokens_C = np.add.reduceat(train.lengths_E.astype(np.int64), train.first_examples_C)
    held_out = data.eval
    return work_of(
        config,
        total_steps=plan.total_steps,
        tokens_per_step=float(tokens_C[members].sum()) / plan.steps_per_epoch,
        held_out_tokens=int(held_out.lengths_E.sum()) if held_out is not None else 0,
        prompts=[len(sample["prompt_ids"]) for sample in held_out.samples] if held_out is not None else [],
    )


def run_fingerprint(config: Config, data: Prepared, bundle: TokenizerBundle, total_steps: int) -> dict[str, Any]:
    return fingerprint(
        config,
        data_digest=data.train.digest(),
        eval_digest=data.eval.digest() if data.eval is not None else None,
        tokenizer_digest=bundle.digest,
        base_digest=base_digest(config),
        total_steps=total_steps,
    )


def base_digest(config: Config) -> str | None:
    """Of the weights under an adapter; None for a full finetune, whose checkpoints hold its own.

    The commit of a hub model; of files, their sizes and samples throughout, since whole ones may take minutes to read.
    """
    if config.model.tuning == "full":
        return None
    place = gguf_file(config.model.name) or Path(config.model.name)
    if not place.exists():
        from transformers.utils.hub import cached_file, extract_commit_hash

        settings = cached_file(config.model.name, "config.json", revision=config.model.revision)
        return extract_commit_hash(settings, None)
    files = sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]) if place.is_dir() else [place]
    hasher = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for sample in range(WEIGHT_SAMPLES):
                stream.seek(size * sample // WEIGHT_SAMPLES)
                hasher.update(stream.read(WEIGHT_SAMPLE_BYTES))
    return hasher.hexdigest()[:16]
