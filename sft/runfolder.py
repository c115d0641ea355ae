"""Names of the files in a run folder, and its append-only metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft.durable import finite, read_json, write_json
from sft.errors import ResumeError
from sft.secrets import mask_secrets

State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk. Only rank 0 writes, but for the status of a rank that fails alone."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def data_report(self) -> Path:
        return self.path / "data_report.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def write_status(self, state: State, *, code: int | None, reason: str, step: int, error: str = "") -> None:
        """`error`: of a failure, the name of its kind (DiskError, NumericsError, …)."""
        told = {"state": state, "code": code, "reason": _brief(mask_secrets(reason)), "step": step, "pid": os.getpid()}
        write_json(self.status, told | ({"error": error} if error else {}))

    def may_be_written(self) -> bool:
        """Whether this is a run's folder, or one that holds nothing yet: its first file is the status."""
        if self.status.exists() or not self.path.exists():
            return True
        begun = any(self.checkpoints.glob("step-*")) or is_record(self.environment)
        return begun or not any(
            path != self.checkpoints and not path.name.startswith(".") for path in self.path.iterdir()
        )

    def read_status(self) -> dict[str, Any]:
        """The status, or {} for a folder that never ran, or whose status was damaged: the checkpoints decide then."""
        try:
            status = read_json(self.status)
        except (ResumeError, OSError):
            return {}
        return status if isinstance(status, dict) else {}

    def move_aside(self) -> Path | None:
        """Renames the folder to `<name>.old-1` (the first free number) and returns that; None where there is none.

        Where the path is a link, what it leads to is moved: the link says on which disk this run lives.
        """
        real = self.path.resolve()
        if not real.exists():
            return None
        number = 1
        while os.path.lexists(aside := real.with_name(f"{real.name}.old-{number}")):
            number += 1
        real.rename(aside)
        return aside


def is_record(environment: Path) -> bool:
    """Whether environment.json is one that a run wrote."""
    try:
        record = read_json(environment)
    except (ResumeError, OSError):
        return False
    return isinstance(record, dict) and {"versions", "resolved"} <= record.keys()


class MetricsLog:
    """metrics.jsonl: one object a line, flushed as it is written; a cut last line is never read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite(dict(event)), ensure_ascii=False) + "\n")

    def exists(self) -> bool:
        return self._path.exists()

    def read(self) -> list[dict[str, Any]]:
        return list(read_events(self._path))

    def cut_after(self, step: int) -> int:
        """Drops what a killed process logged beyond the checkpoint that the run resumes from, and damaged lines.

        Returns the number of damaged lines.
        """
        kept = [event for event in read_events(self._path) if _stays(event, step)]
        damaged = sum(event is None for event in _lines(self._path))
        aside = self._path.with_suffix(".tmp")
        with open(aside, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self._path)
        return damaged

    def flush_to_disk(self) -> None:
        if self._path.exists():
            with open(self._path, "rb+") as stream:
                os.fsync(stream.fileno())


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; a line that a kill has cut short ends the file, damaged ones are passed over."""
    return (event for event in _lines(path) if event is not None)


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's event; None for a line that is none."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                event = None
            yield event if isinstance(event, dict) and "event" in event else None


def _stays(event: Mapping[str, Any], step: int) -> bool:
    """Whether an event is of what the checkpoint of `step` holds. How long the run took until then is told anew."""
    at = event.get("step", 0)
    return bool(at < step or (at == step and event["event"] != "time"))


def _brief(text: str, most: int = 10_000) -> str:
    """Some errors quote a whole file: the ends of a text tell enough."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
