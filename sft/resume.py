"""What a run must have in common with the checkpoint it continues from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_origin

from sft import __version__
from sft.config import Config
from sft.configkeys import all_keys, explain_unknown, is_default
from sft.errors import ResumeError, did_you_mean
from sft.foreign import answer
from sft.schedule import peak_learning_rate

# Keys that may change between a run and its continuation: they move no weight.
FREE_PREFIXES = (
    "run.dir", "run.deterministic", "run.threads", "eval", "save", "log", "batch.micro_tokens", "model.attention",
    "model.compile", "model.gradient_checkpointing", "train.early_stopping", "train.on_nonfinite",
    "train.max_nonfinite_skips", "data.on_bad_row", "data.max_dropped", "data.unread",
)  # fmt: skip
LENGTH_KEYS = ("train.epochs", "train.max_steps")
# Whatever of these matters for training shows in the digest of the prepared tokens; their spelling does not.
BY_CONTENT = ("data.train", "data.eval", "data.layers")
EVAL_CONTENT = "data.eval.content"
STEPS = "train.steps"
_WAYS_OUT = "Restore the checkpoint from a copy, or start over with --fresh (the old run is moved aside)."
CONTENT = ("data.content", EVAL_CONTENT)
DERIVED = (STEPS, *CONTENT, "tokenizer", "model.weights")  # of the fingerprint, not of the config


@dataclass(frozen=True, slots=True)
class RunState:
    """state.json of a checkpoint: the one integer that the order needs, and what is cumulative over the run."""

    step: int
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    nonfinite_skips: int = 0
    total_steps: int = 0
    warmup_steps: int = -1  # not recorded
    fingerprint: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    consents: list[dict[str, Any]] = field(default_factory=list)
    length: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each, until this checkpoint

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Any, place: str = "state.json") -> RunState:
        """The state in `values`; what an older version did not record yet has its default.

        Raises ResumeError, which names `place`, for fields that only a newer version knows, and for what is no state.
        """
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise ResumeError(f"{place}: no state of a run: it names no step. {_WAYS_OUT}")
        kinds = {field.name: type(field.default_factory() if callable(field.default_factory) else field.default)
                 for field in fields(RunState)}  # fmt: skip
        if unknown := sorted(values.keys() - kinds.keys()):
            raise ResumeError(
                f"{place}: written by a newer version of sft: it holds {', '.join(unknown)}, which version "
                f"{__version__} does not know. Continue with that version, or start over with --fresh (the old run is "
                "moved aside)."
            )
        for name in values.keys() - {"step"}:
            kind = (int, float) if kinds[name] is float else kinds[name]
            if not isinstance(values[name], kind):
                raise ResumeError(
                    f"{place}: {name} is {str(values[name])[:60]!r}, which no version writes. {_WAYS_OUT}"
                )
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
        kept[STEPS] = total_steps
    return {**kept, "data.content": data_digest, EVAL_CONTENT: eval_digest, "tokenizer": tokenizer_digest,
            "model.weights": base_digest}  # fmt: skip


def length_of(config: Config) -> dict[str, Any]:
    """What the user wrote of the run's length, by dotted key: the steps of the fingerprint come from it."""
    return {"train.epochs": config.train.epochs, "train.max_steps": config.train.max_steps}


def check_names(allowed: Iterable[str], *, derived: Iterable[str] = ()) -> None:
    """ResumeError for a key of --allow-change that is neither the config's nor among DERIVED or `derived`."""
    keys = all_keys()
    known = (*keys, *DERIVED, *derived)
    mappings = tuple(key for key, info in keys.items() if get_origin(info.annotation) is dict)
    for key in allowed:
        plain = re.sub(r"\.\d+(?=\.|$)", ".0", key)  # the items of a list have one name
        if plain in known or _under(plain, mappings):
            continue
        path = tuple(key.split("."))
        near = "" if answer(path[-1]) else did_you_mean(key, known)
        why = f"unknown key '{key}'.{near}" if near else explain_unknown(path, Config)
        raise ResumeError(f"--allow-change: {why}")


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


def without_news(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without the keys that the version of `old` did not have, where they say what is the default: a
    new key's default is what was done before there was a key."""
    return {key: value for key, value in new.items() if key in old or not is_default(key, value)}


def check_continuation(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    step: int,
    allowed: Sequence[str],
    run_dir: str,
    lengths: Mapping[str, tuple[Any, Any]] | None = None,
    named: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The consents that this continuation from `step` records; what changed of `named` keys is among them, and said.

    `lengths`: `{key: (was, is)}` of LENGTH_KEYS that changed; each consents to the steps that come of it. ResumeError
    lists every other change without consent.
    """
    changed = differences(old, without_news(old, new))
    for key in (key for key in named if key in changed):
        was, now = (_shown(value) for value in changed[key])
        say(f"note: {key} changed since this run began ({was} -> {now}): scores from here on are of other rows")
    lengths = lengths or {}
    agreed = (*allowed, *named, *((STEPS,) if any(key in allowed for key in lengths) else ()))
    refused = {key: pair for key, pair in changed.items() if not _under(key, agreed)}
    if refused:
        lines = "\n".join("  " + _told(key, pair, lengths if key == STEPS else {}) for key, pair in refused.items())
        flags = " ".join(f"--allow-change {next(iter(lengths), key) if key == STEPS else key}" for key in refused)
        raise ResumeError(
            f"{run_dir}: these changes would alter the training that this run began:\n{lines}\n"
            f"Give this training another run.dir, or start over with --fresh (the old run is moved aside). "
            f"To continue all the same: {flags}"
        )
    return [{"step": step, "key": key, "was": was, "now": now} for key, (was, now) in changed.items()]


def changes_of(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The consents on record in metrics.jsonl.

    Each `resume` event holds all that the run then went by, so the last one counts: a change whose steps were lost to
    a kill, and that was not asked for again, is none.
    """
    last: Mapping[str, Any] = {}
    for event in events:
        last = event if event.get("event") == "resume" else last
    return list(last.get("changes", ()))


def told(change: Mapping[str, Any], shown: Callable[[Any], Any] = lambda value: value) -> str:
    """`changed at step 10: optim.lr 0.0002 -> 0.0001`; `shown` may shorten the values."""
    was, now = (_shown(shown(change[key])) for key in ("was", "now"))
    return f"changed at step {change['step']}: {change['key']} {was} -> {now}"


def _told(key: str, pair: tuple[Any, Any], lengths: Mapping[str, tuple[Any, Any]]) -> str:
    """`optim.lr: 0.1 -> 0.2`; with what it comes of, `train.max_steps: 30 -> 40 (train.steps: 30 -> 40)`."""
    own = f"{key}: {_shown(pair[0])} -> {_shown(pair[1])}"
    causes = ", ".join(f"{cause}: {_shown(was)} -> {_shown(now)}" for cause, (was, now) in lengths.items())
    return f"{causes} ({own})" if causes else own


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
