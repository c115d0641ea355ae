"""What a run needs and this machine or this launch lacks: packages, and what FSDP can shard.

`sft check` lists it, `sft train` and `sft sweep` refuse it: one function, asked before any data is prepared. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

from sft.config import Config
from sft.errors import ConfigError, LaunchError, SftError


def lacking(
    *,
    tunings: Sequence[str],
    optimizers: Sequence[str],
    trackers: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[SftError]:
    """An error for each thing that is missing; `environ` is what a launcher set, by default this process's."""
    if find_spec("bitsandbytes") is None:
        for key, values in (("model.tuning", tunings), ("optim.type", optimizers)):
            for value in values:
                if value == "qlora" or value.endswith("8bit"):
                    yield ConfigError(
                        f"{key}: {value} needs bitsandbytes, which is not installed. Install it (pip install "
                        f"'sft[qlora]'), or write {'lora' if value == 'qlora' else 'adamw'}."
                    )
    for tracker in trackers:
        if find_spec(tracker) is None:
            yield ConfigError(
                f"log.trackers: {tracker} is not installed. Install it (pip install {tracker}), or leave it out."
            )
    environ = os.environ if environ is None else environ
    if not is_sharded_launch(environ):
        return
    if environ.get("FSDP_VERSION") != "2":
        yield LaunchError(
            "accelerate's config asks for FSDP's first version. Set fsdp_version: 2 there, as "
            "configs/accelerate/fsdp2.yaml does."
        )
    for optimizer in optimizers:
        if optimizer != "adamw":
            yield ConfigError(f"optim.type: {optimizer} cannot be sharded by FSDP. Write optim.type: adamw.")


def lacking_for(config: Config) -> list[SftError]:
    """What one run lacks here."""
    return list(lacking(tunings=[config.model.tuning], optimizers=[config.optim.type], trackers=config.log.trackers))


def refuse(lacks: Sequence[SftError]) -> None:
    """Raises the one error, or a ConfigError that lists them."""
    if len(lacks) == 1:
        raise lacks[0]
    if lacks:
        raise ConfigError(f"{len(lacks)} things are missing\n" + "\n".join(f"  - {error}" for error in lacks))


def is_sharded_launch(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher asks for a model that is sharded over processes (FSDP)."""
    environ = os.environ if environ is None else environ
    return environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
