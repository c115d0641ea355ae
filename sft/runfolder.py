"""Names of the files in a run folder, and its append-only metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft.durable import finite, read_json, write_json
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

    def write_status(self, state: State, *, code: int | None, reason: str, step: int) -> None:
        write_json(
            self.status,
            {"state": state, "code": code, "reason": mask_secrets(reason), "step": step, "pid": os.getpid()},
        )

    def read_status(self) -> dict[str, Any]:
        """The status, or {} for a folder that never ran."""
        return dict(read_json(self.status)) if self.status.exists() else {}

    def move_aside(self) -> Path | None:
        """Renames the folder to `<name>.old-1` (the first free number) and returns that; None where there is none."""
        if not self.path.exists():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


class MetricsLog:
    """metrics.jsonl: one object a line, flushed as it is written; a cut last line is never read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite(dict(event)), ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return list(read_events(self._path))

    def cut_after(self, step: int) -> None:
        """Drops what a killed process logged beyond the checkpoint that the run resumes from."""
        kept = [event for event in read_events(self._path) if event.get("step", 0) <= step]
        aside = self._path.with_suffix(".tmp")
        with open(aside, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self._path)

    def flush_to_disk(self) -> None:
        if self._path.exists():
            with open(self._path, "rb+") as stream:
                os.fsync(stream.fileno())


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; a line that a kill has cut short ends the file."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if not line.endswith("\n"):
                return
            yield json.loads(line)
