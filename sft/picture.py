"""What `sft check` found, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.budget import Evaluations
from sft.memory import Memory, ModelShape
from sft.schedule import Plan

if TYPE_CHECKING:
    from sft.config import Config
    from sft.data.loader import Prepared
    from sft.tokenizer import TokenizerBundle


@dataclass
class Picture:
    """What `check` found. `problems` keep a run from starting or from making sense; `warnings` do not."""

    config: Config
    path: Path
    run_dir: Path
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)  # the model's config.json
    shape: ModelShape | None = None
    parameters: int | None = None
    bundle: TokenizerBundle | None = None
    prepared: Prepared | None = None
    is_whole: bool = True  # whether `prepared` is of all the rows that the config names
    rows: int = 0  # read, where nothing could be prepared
    bad_rows: int = 0  # of these, the unreadable: a template may refuse others
    bad_kinds: list[dict[str, Any]] = field(default_factory=list)  # bad rows by kind: {rows, where, first, detail}
    plan: Plan | None = None
    evals: Evaluations | None = None  # where rows are held out
    on_steps: list[str] = field(default_factory=list)  # what auto became
    device: str = ""
    precision: str = ""
    memory: Memory | None = None
    micro_tokens: int = 0
    available: int | None = None  # bytes of memory on the device
    disk_needed: int | None = None
    disk_free: int = 0

    @property
    def report(self) -> dict[str, Any]:
        """The counts of the data; where nothing could be prepared all rows are dropped, those that are not bad in
        themselves as not_prepared."""
        if self.prepared is not None:
            return self.prepared.report
        dropped = {"bad_row": self.bad_rows, "not_prepared": self.rows - self.bad_rows}
        return {
            "rows": self.rows, "kept": 0, "dropped": {reason: count for reason, count in dropped.items() if count},
            "held_out": 0, "cut": 0, "altered": {}, "examples": 0, "tokens": 0, "trained_tokens": 0,
            "by_source": [], "length_histogram": [], "eval": None, "formats": {}, "unread": [], "read_as": [],
        }  # fmt: skip

    @property
    def trained_parameters(self) -> int | None:
        if self.config.model.tuning == "full":
            return self.parameters
        return self.shape.lora_parameters(self.config.model.lora.rank) if self.shape else None


def as_object(picture: Picture) -> dict[str, Any]:
    """What `--json` prints: the promised keys first."""
    report, bundle = picture.report, picture.bundle
    stops = list(bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids))) if bundle else []
    return {
        # kept is what was not dropped, so that rows add up; `held_out` of them are scored and not trained
        **{"rows": report["rows"], "kept": report["kept"] + report["held_out"], "dropped": report["dropped"]},
        **{key: report[key] for key in ("examples", "tokens", "trained_tokens")},
        "steps": picture.plan.total_steps if picture.plan else 0,
        "template": bundle.template_name if bundle else picture.config.data.template,
        "stop_tokens": stops,
        "problems": picture.problems,
        "warnings": picture.warnings,
        "notes": picture.notes,
        "bad_rows": picture.bad_kinds,
        **{key: report[key] for key in ("held_out", "cut", "altered", "length_histogram", "eval")},
        **{key: report[key] for key in ("unread", "read_as")},
        "by_source": [{**source, "kept": source["kept"] + source["held_out"]} for source in report["by_source"]],
        "evaluations": picture.evals.as_dict() if picture.evals else None,
        "proven_examples": report["examples"],
        "model_type": picture.settings.get("model_type"),
        "parameters": picture.parameters,
        "trained_parameters": picture.trained_parameters,
        "device": picture.device,
        "precision": picture.precision,
        "memory": picture.memory.as_dict() if picture.memory else None,
        "memory_available": picture.available,
        "disk_needed": picture.disk_needed,
        "disk_free": picture.disk_free,
    }
