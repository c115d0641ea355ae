"""Keys that a config sets and that its own mode never reads: a warning each, since the user expected something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sft.config import Config

DEFAULT = "default"
"""The origin of a value that nobody set."""


def unread_keys(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """A warning for each key that the user set and that the chosen mode never reads."""
    for prefix, reason in _unread_prefixes(config):
        for key, origin in origins.items():
            if origin != DEFAULT and (key == prefix or key.startswith(prefix + ".")):
                yield f"{key} ({origin}) is set but not read: {reason}."


def _unread_prefixes(config: Config) -> Iterator[tuple[str, str]]:
    model, data, optim, log = config.model, config.data, config.optim, config.log
    if model.tuning == "full":
        yield "model.lora", "model.tuning is full"
        yield "model.adapter", "model.tuning is full; lora continues from an adapter"
    elif model.adapter:
        yield "model.lora", "model.adapter brings its own settings"
    if model.tuning != "qlora":
        yield "model.quantization", f"model.tuning is {model.tuning}; qlora reads it"
    if model.revision and (Path(model.name).exists() or model.name.startswith("pkg://")):
        yield "model.revision", f"{model.name} is on this machine, where there are no revisions"
    if optim.schedule != "wsd":
        yield "optim.decay", f"optim.schedule is {optim.schedule}; wsd reads it"
    if optim.schedule == "constant":
        yield "optim.min_lr_ratio", "optim.schedule is constant"
    if data.eval in (0, []):
        yield "eval", f"data.eval is {data.eval}, so nothing is evaluated"
    elif config.eval.samples == 0:
        yield "eval.max_new_tokens", "eval.samples is 0"
    if config.train.max_steps is not None:
        yield "train.epochs", "train.max_steps says how long to train"
    if config.train.on_nonfinite == "stop":
        yield "train.max_nonfinite_skips", "train.on_nonfinite is stop"
    if not log.trackers:
        yield "log.project", "log.trackers is empty"
        yield "log.name", "log.trackers is empty"
    if all(source.format == "text" for source in data.train):
        for key in ("template", "template_args", "reasoning"):
            yield f"data.{key}", "all training data is plain text, which no template renders"
    for name, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if name == "eval":
                yield f"data.eval.{index}.repeat", "an evaluation scores each row once"
            place = Path(source.path)
            keys: tuple[str, ...]
            if place.is_dir():
                keys, what = ("revision",), "a folder"
            elif place.is_file() or any(mark in source.path for mark in "*?["):
                keys, what = ("split", "subset", "revision"), "a file"
            else:
                continue
            for key in keys:
                yield f"data.{name}.{index}.{key}", f"{what} has none; hub ids do"
