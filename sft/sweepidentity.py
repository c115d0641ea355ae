"""What a sweep is, so that another is not continued in its name; and who a driver is, so that its death is noticed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.configkeys import is_default
from sft.runlock import start_time
from sft.sweepfile import LoadedSweep

# Another launcher, more workers, a longer list of trials change nothing that was measured.
_FREE = ("run.dir", "run.threads", "log", "save")


def fingerprint(loaded: LoadedSweep) -> dict[str, str]:
    """What must stay the same for the trials of one sweep to be comparable, in words, key by key."""
    spec = loaded.spec
    found = {
        "metric": spec.metric,
        "direction": loaded.direction,
        "sampler": spec.sampler,
        "seed": str(spec.seed),
        "repeats": str(spec.repeats),
        "pruner": json.dumps(spec.pruner.model_dump(), sort_keys=True) if spec.pruner.type != "none" else "none",
    }
    found |= {f"space.{dimension.key}": dimension.identity() for dimension in loaded.space}
    searched = {dimension.key for dimension in loaded.space}
    for key, value in _leaves(loaded.base.config.model_dump(mode="json"), ()):
        if key not in searched and not any(key == free or key.startswith(free + ".") for free in _FREE):
            found[f"config.{key}"] = json.dumps(value, ensure_ascii=False)
    return found | _content(loaded)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield ".".join(path), value


def _content(loaded: LoadedSweep) -> dict[str, str]:
    """Digests of the files that are trained on and scored; a hub id is known by its name and revision."""
    from sft.data.sources import place_of, source_files, source_fingerprint

    found = {}
    data = loaded.base.config.data
    for name, sources in (("train", data.train), ("eval", data.eval if isinstance(data.eval, list) else [])):
        for index, source in enumerate(sources):
            if source_files(source.path, source.split, source.subset):
                digest = source_fingerprint(place_of(source))
                found[f"rows of data.{name}.{index}"] = f"{source.path}, sha256 {digest[:16]}"
    return found


def differences(written: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """The keys in which a sweep differs from what was written of it. A key of the config that the version which wrote
    it did not have is none while it is at its default."""

    def is_news(key: str) -> bool:
        return key not in written and is_default(key.removeprefix("config."), json.loads(mine[key]))

    return [
        key for key in {**written, **mine}
        if written.get(key) != mine.get(key) and not (key.startswith("config.") and is_news(key))
    ]  # fmt: skip


def say_differences(loaded: LoadedSweep, written: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """The refusal to go on with a sweep that was changed, key by key, with the two ways out."""
    changed = differences(written, mine)
    lines = [f"  {key}: was {written.get(key, 'not there')}, is {mine.get(key, 'not there')}" for key in changed]
    return (
        f"{loaded.dir}: this sweep began otherwise, and its trials would not be comparable:\n"
        + "\n".join(lines)
        + f"\nUndo the change, or choose another dir in {loaded.path}."
    )


def this_process() -> dict[str, Any]:
    """Identity of this process: pids are used again, and two containers may share a host's name."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start_time(os.getpid()),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "namespace": _link("/proc/self/ns/pid"),
    }


def is_alive(pid: int, start: float | None) -> bool:
    """Whether the process that began at `start` still runs on this machine."""
    found = _start_time(pid)
    return found is not None and found == start


def _start_time(pid: int) -> float | None:
    """When a process started; None when it is gone.

    In clock ticks since boot where the system tells them: other clocks may be set while the process runs.
    """
    if Path("/proc/self/stat").exists():
        ticks = start_time(pid)
        return None if ticks is None or ticks < 0 else float(ticks)
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
