"""What a run must have in common with the checkpoint it continues from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sft.config import Config
from sft.errors import ResumeError
from sft.schedule import peak_learning_rate

# Keys that may change between a run and its continuation: they move no weight.
FREE_PREFIXES = (
    "run.dir", "run.deterministic", "run.threads", "eval", "save", "log", "batch.micro_tokens", "model.attention",
    "model.compile", "model.gradient_checkpointing", "train.early_stopping", "train.on_nonfinite",
    "train.max_nonfinite_skips", "data.on_bad_row", "data.max_dropped",
)  # fmt: skip
LENGTH_KEYS = ("train.epochs", "train.max_steps")
# Whatever of these matters for training shows in the digest of the prepared tokens; their spelling does not.
BY_CONTENT = ("data.train", "data.eval")
EVAL_CONTENT = "data.eval.content"


@dataclass(frozen=True, slots=True)
class RunState:
    """state.json of a checkpoint: the one integer that the order needs, and what is cumulative over the run."""

    step: int
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    nonfinite_skips: int = 0
    total_steps: int = 0
    warmup_steps: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    consents: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RunState:
        return RunState(**values)


def fingerprint(
    config: Config, *, data_digest: str, eval_digest: str | None, tokenizer_digest: str, base_digest: str | None,
    total_steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides the trajectory, by dotted key. Length counts only where the schedule decays."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    kept = {key: value for key, value in flat.items() if not _under(key, (*FREE_PREFIXES, *BY_CONTENT, *LENGTH_KEYS))}
    kept["optim.lr"] = peak_learning_rate(config)  # auto, and the number it stands for, are the same rate
    if config.optim.schedule != "constant":
        kept["train.steps"] = total_steps
    return {**kept, "data.content": data_digest, EVAL_CONTENT: eval_digest, "tokenizer": tokenizer_digest,
            "model.weights": base_digest}  # fmt: skip


def named_only(config: Config) -> tuple[str, ...]:
    """Keys of the fingerprint whose change is said and not refused: held-out rows that only draw a curve.

    Where they choose the best checkpoint or the last step, they decide what the run ends with.
    """
    decides = config.save.best is not None or config.train.early_stopping is not None
    return () if decides else (EVAL_CONTENT,)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{key: (was, is)}` for every key that changed."""
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_continuation(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    allowed: Sequence[str],
    run_dir: str,
    named: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The consents that this continuation records; what changed of `named` keys is among them, and said.

    ResumeError lists every other change without consent.
    """
    changed = differences(old, new)
    for key in (key for key in named if key in changed):
        was, now = (_shown(value) for value in changed[key])
        say(f"note: {key} changed since this run began ({was} -> {now}): scores from here on are of other rows")
    refused = {key: pair for key, pair in changed.items() if not _under(key, (*allowed, *named))}
    if refused:
        lines = "\n".join(f"  {key}: {_shown(was)} -> {_shown(now)}" for key, (was, now) in refused.items())
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise ResumeError(
            f"{run_dir}: these changes would alter the training that this run began:\n{lines}\n"
            f"Give this training another run.dir, or start over with --fresh (the old run is moved aside). "
            f"To continue all the same: {flags}"
        )
    return [{"key": key, "was": was, "now": now} for key, (was, now) in changed.items()]


def digest_of(*parts: bytes | memoryview) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()[:16]


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
