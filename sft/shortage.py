"""Memory that ran out, explained once: what used it, the largest micro-batch that fits, what else would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sft.batches import Join, StepFeed
from sft.errors import DeviceError
from sft.fitting import SHARE, Fit, is_out_of_memory, largest, release
from sft.heap import keep_freed_memory
from sft.limits import tightest
from sft.memory import ModelShape, activation_bytes, estimate, logit_bytes, model_shape
from sft.setup import Job, bytes_in_use, step_memory
from sft.space import human
from sft.watchdog import Watchdog

if TYPE_CHECKING:
    from sft.config import Config
    from sft.session import Session

_SMALLEST = 64  # tokens of an example below which nobody trains


def explain_shortage(session: Session, watchdog: Watchdog, work: Callable[[], int]) -> int:
    """What `work` returns; a DeviceError in place of the first refusal of memory."""
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else "out of memory"
    # The error is gone by here, and with its traceback the frames and closures that hold the tensors of the failed
    # pass. A context manager would measure while they still fill the memory.
    doing = watchdog.phase
    watchdog.beat("measuring which micro-batch fits")
    raise DeviceError(explanation(session, doing)) from DeviceError(first_line)


@contextmanager
def loading_explained(config: Config, device: torch.device) -> Iterator[None]:
    """The same before there is a session: a model that is too large to load."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(_too_large(config, device)) from error


def explanation(session: Session, doing: str) -> str:
    """What to tell of memory that ran out while the run was `doing` something; measures what would fit."""
    job, config = session.job, session.config
    job.optimizer.zero_grad(set_to_none=True)
    release(job.device)
    weights, gradients, states = bytes_in_use(job)
    where = f"{doing}, rank {job.rank}: out of memory"
    beside = f"beside weights {human(weights)}, gradients {human(gradients)} and optimizer {human(states)}"
    if doing.startswith(("saving", "writing", "finishing")):
        room = tightest()
        return (
            f"{where} of the host: a save holds a copy of the trained weights and the optimizer there (up to "
            f"{human(weights + states)}), and {human(room.bytes)} are left under {room.name}. Raise that, or end "
            "what else uses it. The same command resumes."
        )
    needed = _largest_micro_batch(session)
    longest = int(session.data.train.lengths_E.max())
    fit = what_fits(job, config, longest=longest, ceiling=max(longest, needed - 1))
    told = f"{where} on {job.device} ({_room(job.device)[1]}): a micro-batch of {needed:,} tokens did not fit {beside}"
    if fit is not None and fit.bytes_per_token:
        takes, fits = (human(tokens * fit.bytes_per_token) for tokens in (needed, fit.tokens))
        told += f". It takes about {takes} ({human(fit.bytes_per_token)} a token), of which about {fits} fit"
    return f"{told}. Any of these helps: {'; '.join(_advice(session, fit, longest))}. The same command resumes."


def _advice(session: Session, fit: Fit | None, longest: int) -> list[str]:
    job, config = session.job, session.config
    advice = []
    if fit is not None:
        how = "measured to fit" if fit.proven else "computed from smaller passes, or from the model's sizes"
        kept = f"a step keeps its {config.batch.examples} conversations"
        advice.append(f"batch.micro_tokens={fit.tokens} ({how}; {kept})")
    else:
        shorter = what_fits(job, config, longest=None, ceiling=longest - 1, floor=min(_SMALLEST, longest - 1))
        size = f"={shorter.tokens} (measured to fit)" if shorter is not None else f" far below {longest}"
        advice.append(
            f"data.max_tokens{size} with --fresh, since the longest example alone ({longest:,} tokens) is too much"
        )
    return advice + [text for is_open, text in _switches(job, config) if is_open]


def _switches(job: Job, config: Config) -> list[tuple[bool, str]]:
    tuning, is_cuda = config.model.tuning, job.device.type == "cuda"
    shrinks = config.optim.type == "adamw" and tuning == "full" and is_cuda and not job.is_sharded
    return [
        (not job.resolved.get("gradient_checkpointing", False), "model.gradient_checkpointing=true"),
        (shrinks, "optim.type=adamw_8bit with --fresh"),
        (tuning == "full", "model.tuning=lora in a new run"),
        (tuning != "qlora", "model.tuning=qlora in a new run"),
        (not job.is_sharded and is_cuda, "more GPUs with FSDP (configs/accelerate/fsdp2.yaml)"),
    ]


def what_fits(job: Job, config: Config, *, longest: int | None, ceiling: int, floor: int | None = None) -> Fit | None:
    """The most tokens of a micro-batch: measured, or computed where measuring needs the other ranks, or a C library
    that keeps freed memory.

    `longest`: tokens of an example; None: one example fills the micro-batch.
    """
    floor = floor or longest or 1
    attempt = step_memory(job, config, longest)
    if job.is_sharded or not (job.device.type == "cuda" or keep_freed_memory()):
        return _computed(job, floor, ceiling, attempt.missing_bytes)
    return largest(attempt, floor=floor, ceiling=ceiling)


def _computed(job: Job, floor: int, ceiling: int, to_come: int) -> Fit | None:
    """What the tensors that autograd keeps take, and one layer gathered whole where the model is sharded."""
    shape = model_shape(job.trainee.causal.config.to_dict())
    if shape is None:
        return None
    compute = job.trainee.compute_dtype.itemsize
    per_token = _bytes_per_token(shape, compute, bool(job.resolved.get("gradient_checkpointing")))
    gathered = 2 * compute * (shape.linear_parameters // shape.layers + shape.embedding_parameters)
    gathered *= job.is_sharded
    room = SHARE * _room(job.device)[0] - to_come - gathered - logit_bytes(shape, 0, compute=compute)
    tokens = min(ceiling, int(room / per_token))
    return Fit(tokens, False, per_token) if tokens >= floor else None


def _bytes_per_token(shape: ModelShape, compute: int, checkpointing: bool) -> float:
    many = 1000
    kept = activation_bytes(shape, many, compute=compute, checkpointing=checkpointing)
    return kept / many + shape.hidden * compute


def _largest_micro_batch(session: Session) -> int:
    """Tokens of the largest micro-batch of the next step on this rank."""
    job, step = session.job, session.state.step + 1
    if step > job.plan.total_steps:
        return job.micro_tokens
    feed = StepFeed(
        session.data.train, job.plan, seed=session.config.run.seed, rank=job.rank, world=job.world,
        micro_tokens=job.micro_tokens, join=Join(job.flat_rows, job.pad_id),
    )  # fmt: skip
    return max(batch.input_ids.numel() for batch in feed.build(step).batches)


def _room(device: torch.device) -> tuple[int, str]:
    """Bytes that a micro-batch may take, and whose limit that is."""
    if device.type != "cuda":
        room = tightest()
        return room.bytes, f"{human(room.limit)}, {room.name}"
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, human(total)


def _too_large(config: Config, device: torch.device) -> str:
    from sft.model import resolve_precision
    from sft.stops import read_settings

    room_bytes, limit = _room(device)
    shape = model_shape(read_settings(config.model.name, config.model.revision, "config.json") or {})
    needs = ""
    if shape is not None:
        memory = estimate(
            shape, tuning=config.model.tuning, precision=resolve_precision(config.model.precision, device),
            optimizer=config.optim.type, rank=config.model.lora.rank, micro_tokens=1, checkpointing=True,
            double_quant=config.model.quantization.double_quant,
        )  # fmt: skip
        needs = (
            f" It needs about {human(memory.states)} before the first token: weights {human(memory.weights)}, "
            f"gradients {human(memory.gradients)}, optimizer {human(memory.optimizer)}."
        )
    cure = {
        "full": "model.tuning=lora or qlora, more GPUs with FSDP (configs/accelerate/fsdp2.yaml), or a smaller model",
        "lora": "model.tuning=qlora, or a smaller model",
        "qlora": "a smaller model",
    }[config.model.tuning]
    return (
        f"out of memory while {config.model.name} was loaded and tried, on {device} ({limit}): {human(room_bytes)} "
        f"are free.{needs} Use {cure}."
    )
