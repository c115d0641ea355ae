"""`sft report`: one self-contained page for a run or a sweep, from what the run folder holds and nothing else.

    metrics.jsonl  ->  curves, tiles, samples        data.json, data_report.jsonl  ->  sources, lengths, dropped rows
    config.yaml    ->  every key with its origin     environment.json, status.json ->  where, and how it ended

Missing files leave their part out: a run that failed early, or still goes on, has a page too. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sft.durable import read_json, write_text
from sft.errors import ConfigError
from sft.pages import count, render_page
from sft.phases import PHASES
from sft.resume import changes_of, told
from sft.runfolder import RunFolder, read_events
from sft.secrets import mask_secrets
from sft.yamltree import split_line

MOST_POINTS = 1200  # of one curve on the page: more than a screen has pixels
MOST_NOTES = 200  # rows of data_report.jsonl on the page

Event = Mapping[str, Any]
Point = tuple[float, float | None]


def write_report(path: Path | str) -> Path:
    """Writes report.html into the run or sweep folder `path` and returns it. Raises ConfigError for other folders."""
    folder = Path(path)
    if is_sweep(folder):
        from sft.sweepreport import write_sweep_report

        return Path(write_sweep_report(folder))
    if not is_run(folder):
        raise ConfigError(
            f"{folder}: neither a run nor a sweep: there is no metrics.jsonl, status.json or trials.csv in it. "
            "Name the run.dir of a run, such as runs/quickstart."
        )
    target = folder / "report.html"
    write_text(target, run_page(folder))
    return target


def is_run(folder: Path) -> bool:
    run = RunFolder(folder)
    return run.metrics.is_file() or run.status.is_file()


def is_sweep(folder: Path) -> bool:
    return not is_run(folder) and any((folder / name).is_file() for name in ("trials.csv", "sweep.yaml", "sweep.json"))


def run_page(folder: Path) -> str:
    """The page of a run as HTML."""
    run = RunFolder(folder)
    events = list(read_events(run.metrics))
    config = read_config_lines(run.config)
    data = _read_or_none(run.data)
    environment = _read_or_none(run.environment) or {}
    values = {line.key: line.resolved or line.value for line in config}
    return render_page(
        "report.html",
        name=folder.resolve().name,
        status=run.read_status(),
        serving=_read_or_none(folder / "serving.json") or {},
        title=mask_secrets(values.get("model.name", "").strip("'\"")),
        subtitle=subtitle(values, environment.get("resolved", {}).get("trained_parameters")),
        summary=summarize(events),
        times=times(events),
        changes=[mask_secrets(told(change)) for change in changes_of(events)],
        samples=samples_by_prompt(events),
        report=data,
        notes=list(islice(_notes_of_rows(run.data_report), MOST_NOTES + 1)),
        most_notes=MOST_NOTES,
        config=by_section(map(masked, config)),
        environment=list(flatten(environment)),
        data={"curves": curves(events), "histogram": (data or {}).get("length_histogram", [])},
    )


def _notes_of_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What became of rows; keys that nothing reads, or under another name, have a table of their own."""
    return (note for note in _json_lines(path) if note.get("action") not in ("unread", "read_as"))


# Curves -------------------------------------------------------------------------------------------------------------


def curves(events: Sequence[Event]) -> dict[str, list[Point]]:
    """Points (step, value) of every curve, at most `MOST_POINTS` each; extremes survive the thinning."""
    train = [event for event in events if event.get("event") == "train"]
    evals = [event for event in events if event.get("event") == "eval"]
    drawn = {
        key: thin([(event["step"], event.get(key)) for event in train])
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    }
    for key in ("loss", "grad_norm", "tokens_per_second"):
        drawn[f"{key}_smooth"] = thin(smooth([(event["step"], event.get(key)) for event in train]))
    for key in ("loss", "token_accuracy", "stop_probability"):
        drawn[f"eval_{key}"] = [(event["step"], event.get(key)) for event in evals]
    drawn["resumes"] = [(event["step"], event.get("seconds")) for event in events if event.get("event") == "resume"]
    return drawn


def smooth(points: Sequence[Point], share: float = 0.06) -> list[Point]:
    """A line fitted to the nearest `share` of the points around each point, read off at that point.

    A moving mean would lag where the curve falls, and at its ends. Nothing for fewer than 12 points; where less than
    two values are known around a point, a gap.
    """
    half = round(len(points) * share / 2)
    if len(points) < 12 or half < 1:
        return []
    # running: count, x, y, x², xy; those of x are whole numbers, exact however long the run
    sums: list[tuple[float, float, float, float, float]] = [(0, 0, 0.0, 0, 0.0)]
    for x, (_, value) in enumerate(points):
        n, sx, sy, sxx, sxy = sums[-1]
        sums.append(sums[-1] if value is None else (n + 1, sx + x, sy + value, sxx + x * x, sxy + x * value))
    result: list[Point] = []
    for x, (step, _) in enumerate(points):
        low, high = max(0, x - half), min(len(points), x + half + 1)
        n, sx, sy, sxx, sxy = (b - a for a, b in zip(sums[low], sums[high], strict=True))
        spread = n * sxx - sx * sx
        slope = (n * sxy - sx * sy) / spread if spread > 0 else 0.0
        result.append((step, sy / n + slope * (x - sx / n) if n > 1 else None))
    return result


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    result: list[Point] = []
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        known = [point for point in stretch if point[1] is not None] or [stretch[0]]
        ends = {min(known, key=_value), max(known, key=_value)}
        result += sorted(ends, key=lambda point: point[0])
    if result[-1] != points[-1]:
        result.append(points[-1])
    return result


def _value(point: Point) -> float:
    return float("inf") if point[1] is None else point[1]


# Summary ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Numbers for the tiles; None where the run recorded none."""

    steps: int
    epoch: float | None
    train_loss: float | None
    first: Event  # evaluations: at step 0, the last, the best by loss
    last: Event
    best: Event
    tokens: int | None
    trained_tokens: int | None
    seconds: float | None
    tokens_per_second: float | None
    resumes: int


def summarize(events: Sequence[Event]) -> Summary:
    train = [event for event in events if event.get("event") == "train"]
    evals = [event for event in events if event.get("event") == "eval"]
    scored = [event for event in evals if event.get("loss") is not None]
    last = train[-1] if train else {}
    speeds = sorted(speed for event in train if (speed := event.get("tokens_per_second")) is not None)
    return Summary(
        steps=last.get("step", 0),
        epoch=last.get("epoch"),
        train_loss=last.get("loss"),
        first=next((event for event in evals if event["step"] == 0), {}),
        last=evals[-1] if evals else {},
        best=min(scored, key=lambda event: event["loss"]) if scored else {},
        tokens=last.get("tokens"),
        trained_tokens=last.get("trained_tokens"),
        seconds=last.get("seconds"),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        resumes=sum(event.get("event") == "resume" for event in events),
    )


def times(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Where the time went as the newest `time` event has it: {phase, seconds, share}, each phase that took some; []
    where no process of the run has come to an end or a stop."""
    last: Event = {}
    for event in events:
        last = event if event.get("event") == "time" else last
    taken = {phase: float(last.get(phase) or 0.0) for phase in PHASES}
    whole = sum(taken.values())
    return [
        {"phase": phase.replace("_", " "), "seconds": seconds, "share": seconds / whole}
        for phase, seconds in taken.items()
        if seconds > 0
    ]


def subtitle(values: Mapping[str, str], trained_parameters: int | None = None) -> str:
    """`LoRA, rank 16 · 4 884 480 trained parameters · 32 conversations a step · adamw at 2e-4, cosine`."""
    tuning = {"full": "full finetune", "lora": "LoRA", "qlora": "QLoRA"}.get(values.get("model.tuning", ""), "")
    parts = [tuning]
    if tuning.endswith("LoRA") and "model.lora.rank" in values:
        parts[0] += f", rank {values['model.lora.rank']}"
    if trained_parameters is not None:
        parts.append(f"{count(trained_parameters)} trained parameters")
    if "batch.examples" in values:
        parts.append(f"{values['batch.examples']} conversations a step")
    if "optim.lr" in values:
        parts.append(
            f"{values.get('optim.type', '')} at {values['optim.lr']}, {values.get('optim.schedule', '')}".strip(", ")
        )
    return " · ".join(part for part in parts if part)


def samples_by_prompt(events: Iterable[Event]) -> list[dict[str, Any]]:
    """One entry a held-out prompt: its text, the reference, and the completions in the order of their steps."""
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event.get("event") != "samples":
            continue
        for sample in event["samples"]:
            key = (sample.get("source", ""), sample["prompt"])
            entry = prompts.setdefault(
                key,
                {"source": key[0], "prompt": key[1], "reference": sample.get("reference", ""), "completions": []},
            )
            entry["completions"].append(
                {"step": event["step"], "text": sample["completion"], "stopped": sample.get("stopped")}
            )
    return list(prompts.values())


# Files --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigLine:
    """One key of config.yaml as it is written, with the comment that says where it came from."""

    key: str
    value: str
    origin: str
    resolved: str

    @property
    def is_default(self) -> bool:
        return self.origin == "default"


def masked(line: ConfigLine) -> ConfigLine:
    """As a page shows it; config.yaml itself holds the truth, since it is read again."""
    return replace(line, value=mask_secrets(line.value), resolved=mask_secrets(line.resolved))


def read_config_lines(path: Path) -> list[ConfigLine]:
    """The leaves of the resolved config.yaml in file order; [] where there is none.

    Reads lines, not YAML: the comments are what is wanted, and the file is our own, one key a line.
    """
    if not path.is_file():
        return []
    lines: list[ConfigLine] = []
    stack: list[tuple[int, str]] = []  # (indent, key or index) of the sections that are open
    for text in path.read_text(encoding="utf-8").split("\n"):
        match = split_line(text)
        if fact := re.match(r"^# resolved: ([^:]+): (.*)$", text):
            lines.append(ConfigLine(fact[1], fact[2], "resolved", ""))
        if match is None:
            continue
        indent = match.indent
        if match.is_item:
            siblings = [key for at, key in stack if at == indent and key.isdigit()]
            stack = [item for item in stack if item[0] < indent]
            stack.append((indent, str(int(siblings[-1]) + 1) if siblings else "0"))
            indent += 2
        stack = [item for item in stack if item[0] < indent]
        key = ".".join([key for _, key in stack] + [match.key])
        if not match.value:
            stack.append((indent, match.key))
            continue
        origin, _, resolved = match.note.partition("; resolved to ")
        lines.append(ConfigLine(key, match.value, origin, resolved if resolved != match.value else ""))
    return lines


def by_section(lines: Iterable[ConfigLine]) -> dict[str, list[ConfigLine]]:
    sections: dict[str, list[ConfigLine]] = {}
    for line in lines:
        sections.setdefault(line.key.partition(".")[0], []).append(line)
    return sections


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, text) of nested JSON; lists of plain values stay together."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}.{index}")
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, "–" if value is None else str(value)


def _read_or_none(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                if line.endswith("\n"):
                    yield json.loads(line)
