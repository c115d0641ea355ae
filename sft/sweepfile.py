"""Sweep files: read, check, explain. A sweep is a base config, a space of its dotted keys, and how to search it.

    load_sweep("sweep.yaml", ["trials=5", "train.epochs=2"])  ->  LoadedSweep, with every dimension tried on the config

Overrides whose first word is a key of the sweep file change the sweep, the others the base config. No torch, no optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sft.config import Config, EvalMetric
from sft.configfile import COMMAND_LINE, LoadedConfig, dump_config, load_config
from sft.durable import write_text
from sft.errors import ConfigError, ResumeError, SftError, did_you_mean
from sft.needed import lacking
from sft.secrets import MASK, mask_secrets
from sft.sweepspace import Dimension, base_values, grid_points, parse_space, point_in_space, unread_dimensions
from sft.yamltree import KeyPath, Tree, dotted, flow, leaves, parse_yaml, read_yaml

Positive = Annotated[int, Field(ge=1)]
Direction = Literal["minimize", "maximize"]

PRUNED_EVERY = 0.1
"""What `eval.every: auto` is where a pruner decides: ten evaluations of each trial."""
_MAXIMIZED = ("accuracy", "stop_probability")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Pruner(Strict):
    """When a trial that does badly is stopped. Counts are evaluations after the one at step 0."""

    type: Literal["none", "median", "hyperband", "halving"] = "none"
    startup_trials: Annotated[int, Field(ge=0)] = 5
    """median: prune nothing before so many trials have finished."""
    warmup: Annotated[int, Field(ge=0)] = 1
    """median: never before so many evaluations."""
    min_evaluations: Positive = 1
    """hyperband, halving: evaluations that the shortest trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """hyperband, halving: one in so many goes on."""


class Sweep(Strict):
    config: str
    """The base config; every trial is this with some keys changed."""
    dir: str
    """Folder of the sweep, and the name of its study in the storage."""
    metric: EvalMetric = "eval.loss"
    """A number of the final evaluation."""
    direction: Literal["auto"] | Direction = "auto"
    """auto: maximize accuracies and stop_probability, minimize anything else."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    trials: Positive | None = None
    """How many in all, failed and pruned ones included; null with grid: all points."""
    repeats: Positive = 1
    """Runs of each point, with run.seed, run.seed + 1, …; the value is their mean."""
    space: Annotated[dict[str, Any], Field(min_length=1)]
    first: list[Literal["base"] | dict[str, Any]] = ["base"]
    """Points to try first: base is the config as it is; others name some keys of the space."""
    pruner: Pruner = Pruner()
    workers: Positive = 1
    """Trials side by side, each with its own devices."""
    launch: list[str] = []
    """Prefix of the command, e.g. [accelerate, launch, --num_processes, "2"]."""
    storage: str | None = None
    """null: a journal file in dir; or a database URL, shared by machines that run the same sweep."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a trial is stopped and counts as failed."""
    lease: Annotated[float, Field(ge=1)] = 60.0
    """Seconds of silence after which another machine takes over a driver's trials."""

    @field_validator("pruner", mode="before")
    @classmethod
    def a_bare_name_is_a_pruner(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def only_a_grid_ends_by_itself(self) -> Sweep:
        if self.trials is None and self.sampler != "grid":
            raise ValueError(f"'trials' is missing: how many should {self.sampler} try? E.g. trials: 20")
        return self


@dataclass(frozen=True)
class FirstPoint:
    """A point to try first. `is_base`: keys of the space that `values` lacks stay as the config has them; otherwise
    the sampler chooses them."""

    values: Mapping[str, Any]
    is_base: bool


@dataclass(frozen=True)
class LoadedSweep:
    """A checked sweep. `total` is the exact number of trials; `warnings` are worth a line each on stderr."""

    spec: Sweep
    path: Path
    dir: Path
    base: LoadedConfig
    space: tuple[Dimension, ...]
    first: tuple[FirstPoint, ...]
    total: int
    warnings: tuple[str, ...]

    @property
    def direction(self) -> Direction:
        if self.spec.direction != "auto":
            return self.spec.direction
        return "maximize" if self.spec.metric.endswith(_MAXIMIZED) else "minimize"

    @property
    def metric_key(self) -> str:
        """The key in an eval event of metrics.jsonl: `loss` for eval.loss."""
        return self.spec.metric.removeprefix("eval.")

    def better(self, a: float, b: float) -> bool:
        return a < b if self.direction == "minimize" else a > b

    @property
    def base_file(self) -> Path:
        """The base config as the sweep began with it: editing the original must not change later trials."""
        return self.dir / "base.yaml"

    def lacking(self) -> list[SftError]:
        """What some trial would lack on this machine. Which devices their launcher brings is not known here."""

        def of(key: str, base: str) -> list[str]:
            return sorted({base, *(str(c) for d in self.space if d.key == key for c in d.choices)})

        config = self.base.config
        return list(
            lacking(
                tunings=of("model.tuning", config.model.tuning), optimizers=of("optim.type", config.optim.type),
                trackers=config.log.trackers, environ={},
            )
        )  # fmt: skip

    def freeze(self) -> None:
        """Write `base_file`. Raises ResumeError where trials were run by another one."""
        text = dump_config(self.base)
        if key := _masked_before(self.base_file, text):
            raise ResumeError(
                f"{self.base_file}: an earlier version of sft wrote {key} with a part masked as a credential, so the "
                "trials so far may have read other files. They do not count: choose another dir."
            )
        write_text(self.base_file, text)

    def config_for(
        self, values: Mapping[str, Any], run_dir: str | Path, seed: int | None = None, origin: str = "the sweep"
    ) -> LoadedConfig:
        """The base config at a point of the space, with a run folder of its own. Raises ConfigError."""
        changed = {**values, "run.dir": str(run_dir)} | ({"run.seed": seed} if seed is not None else {})
        config = load_config(self.base_file, [f"{key}={flow(value)}" for key, value in changed.items()])
        set_by_base = {key: self.base.origins.get(key, place) for key, place in config.origins.items()}
        return replace(config, origins=set_by_base | dict.fromkeys(changed, origin))


def _masked_before(base_file: Path, text: str) -> str:
    """The key whose value an earlier version masked in `base_file`, where `text` says otherwise; "" for none."""
    try:
        old, new = read_yaml(base_file), parse_yaml(text, str(base_file))
    except ConfigError:  # not there yet, or damaged: it is written anew
        return ""
    known = dict(leaves(new.value))
    for path, value in leaves(old.value):
        is_masked = isinstance(value, str) and (MASK in value or "(masked)" in value)
        if is_masked and known.get(path, value) != value:
            return dotted(path)
    return ""


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Read a sweep file and check all of it against the config it names. Raises ConfigError."""
    file = Path(path)
    tree = read_yaml(file)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{file}: wanted: a sweep, with config:, dir:, trials: and space:.")
    for_sweep = [text for text in overrides if text.partition("=")[0].split(".")[0].strip() in Sweep.model_fields]
    for_base = [text for text in overrides if text not in for_sweep]
    raw = dict(tree.value)
    for text in for_sweep:
        _override(raw, tree.lines, text)
    spec = _validate(raw, tree, file)
    _refuse_reserved(for_base)
    base = _with_evaluations(load_config(spec.config, for_base), spec)
    space = parse_space(
        spec.space,
        lambda path: _line(tree, file, "space", *path),
        lambda extra: load_config(spec.config, [*for_base, *extra]),
    )
    _check(spec, space, base, tree, file)
    values = base_values(space, base.config)
    points = sum(1 for _ in grid_points(space, values)) if spec.sampler == "grid" else None
    total = spec.trials if points is None else min(spec.trials or points, points)
    assert total is not None
    warnings = [*base.unread, *unread_dimensions(space, base)]
    return LoadedSweep(
        spec, file, Path(spec.dir).expanduser(), base, space, _first(spec, space, values, warnings), total,
        tuple(warnings),
    )  # fmt: skip


def _with_evaluations(base: LoadedConfig, spec: Sweep) -> LoadedConfig:
    """A pruner compares trials at equal shares of their runs, whatever their batch: where the base leaves `eval.every`
    to each run, they all get PRUNED_EVERY."""
    if spec.pruner.type == "none" or base.config.eval.every != "auto":
        return base
    evaluation = base.config.eval.model_copy(update={"every": PRUNED_EVERY})
    config = base.config.model_copy(update={"eval": evaluation})
    return replace(base, config=config, origins=base.origins | {"eval.every": f"pruner: {spec.pruner.type}"})


def _first(
    spec: Sweep, space: Sequence[Dimension], base: Mapping[str, Any], warnings: list[str]
) -> tuple[FirstPoint, ...]:
    """The fixed points. The base config is tried even where it lies outside the space, but for a grid."""
    points = []
    for named in spec.first:
        if named != "base":
            by_key = {dimension.key: dimension for dimension in space}
            points.append(FirstPoint({key: by_key[key].snapped(value) for key, value in named.items()}, False))
            continue
        inside, outside = point_in_space(space, base)
        if outside and spec.sampler == "grid":
            warnings.append(f"the base config is no point of the grid, so it is not tried first: {'; '.join(outside)}")
        else:
            points.append(FirstPoint(inside, True))
    return tuple(points)


def _override(raw: dict[str, Any], lines: dict[KeyPath, int], text: str) -> None:
    """`trials=5`, `pruner.warmup=2`, `space.optim.lr=[1e-4, 1e-3]`: a key of the space may hold dots.

    What is set here has no line in the file: `lines` then says 0.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"'{text}': overrides are written key=value, e.g. trials=5.")
    parsed = parse_yaml(value, f"command line, {name}").value
    first, _, rest = name.strip().partition(".")
    path = (first, rest) if rest else (first,)
    for key in [key for key in lines if key[: len(path)] == path]:
        del lines[key]
    lines[path] = 0
    if not rest:
        raw[first] = parsed
    elif first == "space":
        space = raw.get("space") or {}
        raw["space"] = {**(space if rest in space else _without(space, rest)), rest: parsed}
    elif first == "pruner":
        old = raw.get("pruner")
        raw["pruner"] = {**(old if isinstance(old, dict) else {"type": old} if old else {}), rest: parsed}
    else:
        raise ConfigError(f"'{text}': '{first}' has no keys below it.")


def _without(space: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The space as a file nests it, without one dotted key."""
    left: dict[str, Any] = {}
    for name, value in space.items():
        if name == key:
            continue
        inner = (
            _without(value, key[len(name) + 1 :]) if isinstance(value, dict) and key.startswith(name + ".") else value
        )
        if inner or not value:
            left[name] = inner
    return left


def _validate(raw: dict[str, Any], tree: Tree, file: Path) -> Sweep:
    problems = []
    for key in raw:
        if key not in Sweep.model_fields:
            here = did_you_mean(key, Sweep.model_fields) or f" A sweep has: {', '.join(Sweep.model_fields)}."
            if key in Config.model_fields:
                here = f" That is the config's; change it there, or on the command line: {key}.…=…"
            problems.append(f"{_line(tree, file, key)}: unknown key '{key}'.{here}")
    try:
        spec = Sweep.model_validate({key: value for key, value in raw.items() if key in Sweep.model_fields})
    except ValidationError as error:
        problems += [_explained(finding, raw, tree, file) for finding in error.errors(include_url=False)]
    if problems:
        unique = list(dict.fromkeys(problems))
        if len(unique) == 1:
            raise ConfigError(unique[0])
        raise ConfigError(f"{file}: {len(unique)} problems\n" + "\n".join(f"  - {problem}" for problem in unique))
    return spec


def _explained(finding: Any, raw: Mapping[str, Any], tree: Tree, file: Path) -> str:
    path = [key for key in finding["loc"] if not (isinstance(key, str) and key.endswith(("]", "'", "literal")))]
    name = ".".join(str(key) for key in path)
    where = _line(tree, file, *path)
    if finding["type"] == "missing":
        return f"{where}: '{name}' is missing.{_EXAMPLES.get(name, '')}"
    message = finding["msg"].removeprefix("Value error, ")
    if not path:
        return f"{where}: {message}."
    if finding["type"] == "extra_forbidden":
        return f"{where}: unknown key '{name}'.{did_you_mean(str(path[-1]), Pruner.model_fields)}"
    value = mask_secrets(flow(finding["input"]))
    return f"{where}: '{name}' is {value[:80]}: {message[0].lower()}{message[1:]}."


_EXAMPLES = {
    "config": " E.g. config: configs/quickstart.yaml",
    "dir": " E.g. dir: sweeps/lr",
    "space": "\n    space:\n      optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}\n      model.lora.rank: [8, 16, 32]",
}


def _line(tree: Tree, file: Path, *path: Any) -> str:
    """`file:line` of the deepest part of `path` that the file holds, or that it came from the command line."""
    for depth in range(len(path), 0, -1):
        if (line := tree.lines.get(path[:depth])) is not None:
            return f"{file}:{line}" if line else COMMAND_LINE
    return str(file)


def _refuse_reserved(overrides: Sequence[str]) -> None:
    for text in overrides:
        if text.partition("=")[0].strip() == "run.dir":
            raise ConfigError(f"'{text}': each trial has a run folder of its own; the sweep's folder is dir=….")


def _check(spec: Sweep, space: Sequence[Dimension], base: LoadedConfig, tree: Tree, file: Path) -> None:
    """Rules between the sweep, its space and the base config."""
    keys = {dimension.key: dimension for dimension in space}
    if base.config.data.eval == 0:
        raise ConfigError(
            f"{_line(tree, file, 'metric')}: {spec.metric} is of an evaluation, but data.eval is 0 in {spec.config}."
            " Hold some rows out: data.eval: 0.05"
        )
    if "run.seed" in keys and spec.repeats > 1:
        raise ConfigError(f"{keys['run.seed'].where}: repeats already varies run.seed; leave one of the two.")
    for dimension in space:
        if spec.sampler == "grid" and dimension.kind != "choice" and dimension.step is None:
            raise ConfigError(
                f"{dimension.where}: a grid needs points: give {dimension.key} a step, or a list of values."
            )
    for index, point in enumerate(spec.first):
        if point != "base":
            where = _line(tree, file, "first", index)
            for key, value in point.items():
                if key not in keys:
                    raise ConfigError(f"{where}: '{key}' is not in the space, which has: {', '.join(keys)}.")
                if not keys[key].contains(value):
                    raise ConfigError(f"{where}: {key}: {flow(value)} is not in the space: {keys[key].words()}.")
