"""The space of a sweep: dimensions over dotted keys of the config, with conditions between them.

A dimension is a list of values, or a range {low, high} with `log`, `step` or `int`; `when: {key: [values]}` makes it
count only where another key has one of these values. Each end of a range and each value of a list is tried on the
base config here, so that what the config refuses is an error before the first trial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from sft.config import Config
from sft.configfile import LoadedConfig, unread_keys
from sft.configkeys import all_keys, explain_unknown
from sft.errors import ConfigError, did_you_mean
from sft.schedule import peak_learning_rate
from sft.yamltree import flow

Where = Callable[[tuple[str, ...]], str]
Try = Callable[[Sequence[str]], LoadedConfig]

_RANGE_KEYS = ("low", "high", "log", "step", "int", "values", "when")
_RESERVED = {
    "run.dir": "each trial has a run folder of its own",
    "data.eval": "all trials are scored on the same held-out rows",
    "log": "it changes no result",
    "save": "it changes no result that a sweep compares",
}


@dataclass(frozen=True)
class Dimension:
    """One key of the config and what it may be. `when`: ((other key, its values), …), all of which must hold."""

    key: str
    kind: Literal["choice", "float", "int"]
    where: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def names(self) -> tuple[str | int | float | bool | None, ...]:
        """The choices as the storage knows them: lists and mappings as JSON."""
        return tuple(choice_name(choice) for choice in self.choices)

    def contains(self, value: Any) -> bool:
        if self.kind == "choice":
            return any(_same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.kind == "int" and value != int(value):
            return False
        return self.step is None or math.isclose(round((value - self.low) / self.step) * self.step + self.low, value)

    def snapped(self, value: Any) -> Any:
        """A contained `value`, exactly as the sampler would write it."""
        if self.kind == "choice":
            return next(choice for choice in self.choices if _same(value, choice))
        if self.step is not None:
            return min(self.points(), key=lambda point: abs(point - value))
        return int(value) if self.kind == "int" else float(value)

    def points(self) -> tuple[Any, ...]:
        """All values of a finite dimension."""
        if self.kind == "choice":
            return self.choices
        assert self.step is not None
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        numbers = (low + index * step for index in range(int((high - low) / step) + 1))
        return tuple(int(number) if self.kind == "int" else float(number) for number in numbers)

    def active(self, values: Mapping[str, Any]) -> bool:
        return all(any(_same(values.get(key), wanted) for wanted in wanteds) for key, wanteds in self.when)

    def words(self) -> str:
        if self.kind == "choice":
            return "one of " + ", ".join(flow(choice) for choice in self.choices)
        plain = self.step is None or (self.kind == "int" and self.step == 1)
        step = "" if plain else f" in steps of {self.step:g}"
        return f"{'a whole number ' if self.kind == 'int' else ''}from {self.low:g} to {self.high:g}{step}"

    def identity(self) -> str:
        """What must not change while a sweep goes on."""
        said = flow(list(self.choices)) if self.kind == "choice" else self.words() + (", log" if self.log else "")
        return said + "".join(f", when {key} is {flow(list(wanted))}" for key, wanted in self.when)


def choice_name(choice: Any) -> str | int | float | bool | None:
    return json.dumps(choice, ensure_ascii=False) if isinstance(choice, list | dict) else choice


def _same(a: Any, b: Any) -> bool:
    """Equal as YAML values: 1 and 1.0 are, true and 1 are not."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


# Points -------------------------------------------------------------------------------------------------------------


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; None where a section on the way is null.

    `optim.lr: auto` gives its number: the base config is a point of a space of numbers only by its numbers.
    """
    here: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict):
            here = here.get(part)
        else:
            return None
    return peak_learning_rate(config) if key == "optim.lr" else here


def base_values(space: Sequence[Dimension], config: Config) -> dict[str, Any]:
    """What the config itself says for each key that the space or a condition names."""
    keys = {dimension.key for dimension in space} | {key for dimension in space for key, _ in dimension.when}
    return {key: value_of(config, key) for key in keys}


def walk(space: Sequence[Dimension], base: Mapping[str, Any], choose: Callable[[Dimension], Any]) -> dict[str, Any]:
    """One point: a value for each dimension whose conditions hold, chosen in order."""
    point: dict[str, Any] = {}
    for dimension in space:
        if dimension.active({**base, **point}):
            point[dimension.key] = choose(dimension)
    return point


def grid_points(space: Sequence[Dimension], base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All points of a finite space, each once."""
    if not space:
        yield {}
        return
    first, rest = space[0], space[1:]
    if not first.active(base):
        yield from grid_points(rest, base)
        return
    for value in first.points():
        for point in grid_points(rest, {**base, first.key: value}):
            yield {first.key: value, **point}


def point_in_space(space: Sequence[Dimension], base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The base config as a point of the space, and in words the values of it that lie outside."""
    inside: dict[str, Any] = {}
    outside = []
    for dimension in space:
        if dimension.active(base):
            value = base[dimension.key]
            if dimension.contains(value):
                inside[dimension.key] = dimension.snapped(value)
            else:
                outside.append(f"{dimension.key} is {flow(value)}, not {dimension.words()}")
    return inside, outside


# Parsing ------------------------------------------------------------------------------------------------------------


def parse_space(raw: Mapping[str, Any], where: Where, attempt: Try) -> tuple[Dimension, ...]:
    """The dimensions, those that a condition reads before those that it guards. Raises ConfigError.

    `where` gives the place of a key of the space; `attempt` loads the base config with overrides.
    """
    dimensions: dict[str, Dimension] = {}
    for key, (value, place) in _flattened(raw, (), where):
        _check_key(key, place)
        if key in dimensions:
            raise ConfigError(f"{place}: {key} is searched already at {dimensions[key].where}; leave one of the two.")
        dimensions[key] = _dimension(key, value, place, attempt)
    ordered = _ordered(dimensions)
    base = base_values(ordered, attempt(()).config)
    for dimension in ordered:
        _check_conditions(dimension, dimensions, base)
        _check_values(dimension, attempt)
    return tuple(ordered)


def _flattened(raw: Mapping[str, Any], at: tuple[str, ...], where: Where) -> Iterator[tuple[str, tuple[Any, str]]]:
    """`{optim: {lr: {low: …}}}` and `{optim.lr: {low: …}}` alike, as dotted keys."""
    for key, value in raw.items():
        path = (*at, key)
        if isinstance(value, dict) and not any(name in value for name in _RANGE_KEYS):
            if not value or (".".join(path) in all_keys() and not _is_section(".".join(path))):
                raise ConfigError(f"{where(path)}: {'.'.join(path)}: {_SHAPES}")
            yield from _flattened(value, path, where)
        else:
            yield ".".join(path), (value, where(path))


_SHAPES = "wanted: a list of values, or a range such as {low: 1.0e-5, high: 1.0e-3, log: true}."


def _is_section(key: str) -> bool:
    return any(other.startswith(key + ".") for other in all_keys())


def _check_key(key: str, place: str) -> None:
    for reserved, why in _RESERVED.items():
        if key == reserved or key.startswith(reserved + "."):
            raise ConfigError(f"{place}: '{key}' cannot be searched: {why}.")
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    known = ".".join("0" if isinstance(part, int) else part for part in path)
    open_mapping = any(known.startswith(name + ".") for name in ("data.template_args", "data.train.0.columns"))
    if known not in all_keys() and not open_mapping:
        near = did_you_mean(key, all_keys())
        raise ConfigError(f"{place}: {explain_unknown(path, Config) if not near else f'unknown key {key!r}.{near}'}")


def _dimension(key: str, value: Any, place: str, attempt: Try) -> Dimension:
    if isinstance(value, list):
        value = {"values": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {key} is {flow(value)}; {_SHAPES} One value: [{flow(value)}].")
    for name in value:
        if name not in _RANGE_KEYS:
            raise ConfigError(f"{place}: {key}: unknown '{name}'.{did_you_mean(name, _RANGE_KEYS)} {_SHAPES}")
    when = _conditions(key, value.get("when"), place)
    if "values" in value:
        return Dimension(key, "choice", place, choices=_choices(key, value, place), when=when)
    return _range(key, value, when, place, attempt)


def _choices(key: str, value: Mapping[str, Any], place: str) -> tuple[Any, ...]:
    choices = value["values"]
    if extra := set(value) - {"values", "when"}:
        raise ConfigError(f"{place}: {key} has both values and {sorted(extra)[0]}; leave one of the two.")
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"{place}: {key}: values is {flow(choices)}; wanted: a list with at least one value.")
    for index, choice in enumerate(choices):
        if any(_same(choice, other) for other in choices[:index]):
            raise ConfigError(f"{place}: {key}: {flow(choice)} appears twice; remove one of the two.")
    return tuple(choices)


def _conditions(key: str, when: Any, place: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if when is None:
        return ()
    if not isinstance(when, dict) or not when:
        raise ConfigError(f"{place}: {key}: when is {flow(when)}; wanted: {{model.tuning: [lora, qlora]}}.")
    for other in when:
        _check_key_exists(other, place)
    return tuple((other, tuple(value) if isinstance(value, list) else (value,)) for other, value in when.items())


def _check_key_exists(key: str, place: str) -> None:
    known = ".".join("0" if part.isdigit() else part for part in key.split("."))
    if known not in all_keys():
        raise ConfigError(f"{place}: when: unknown key '{key}'.{did_you_mean(key, all_keys())}")


def _range(
    key: str, value: Mapping[str, Any], when: tuple[tuple[str, tuple[Any, ...]], ...], place: str, attempt: Try
) -> Dimension:
    low, high, step, log = (value.get(name) for name in ("low", "high", "step", "log"))
    for name, number in (("low", low), ("high", high), ("step", step)):
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not is_number and not (name == "step" and number is None):
            raise ConfigError(f"{place}: {key}: {name} is {flow(number)}; wanted: a number.")
    for name in ("log", "int"):
        if not isinstance(value.get(name, False), bool):
            raise ConfigError(f"{place}: {key}: {name} is {flow(value[name])}; wanted: true or false.")
    assert low is not None
    assert high is not None
    log = bool(log)
    whole = value.get("int", not _takes_fractions(key, low, high, when, attempt))
    if low >= high:
        raise ConfigError(f"{place}: {key}: low {flow(low)} must lie below high {flow(high)}.")
    if log and low <= 0:
        raise ConfigError(f"{place}: {key}: low {flow(low)} must be above 0 on a log scale.")
    if step is not None and (step <= 0 or step > high - low):
        raise ConfigError(f"{place}: {key}: step {flow(step)} must be above 0 and fit between low and high.")
    if log and step is not None:
        raise ConfigError(f"{place}: {key}: a log range takes no step; give a list of values instead.")
    if whole and any(number is not None and number != int(number) for number in (low, high, step)):
        raise ConfigError(f"{place}: {key} takes whole numbers; low, high and step must be whole.")
    if whole:
        low, high, step = int(low), int(high), int(step) if step is not None else (None if log else 1)
    if step is not None:  # the last point of the range is its end
        count = int((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step)))
        end = Decimal(str(low)) + count * Decimal(str(step))
        high = int(end) if whole else float(end)
    return Dimension(key, "int" if whole else "float", place, low=low, high=high, step=step, log=log, when=when)


def _takes_fractions(
    key: str, low: float, high: float, when: tuple[tuple[str, tuple[Any, ...]], ...], attempt: Try
) -> bool:
    """Whether the config takes a number between; where it takes neither, the ends will say why."""
    middle = (low + high) / 2
    if middle == int(middle):
        middle += (high - low) / 8 if (high - low) / 8 % 1 else 0.5
    try:
        attempt([*_holding(when), f"{key}={flow(float(middle))}"])
    except ConfigError:
        return False
    return True


def _holding(when: tuple[tuple[str, tuple[Any, ...]], ...]) -> list[str]:
    """Overrides under which conditions hold."""
    return [f"{key}={flow(values[0])}" for key, values in when if values]


def _ordered(dimensions: Mapping[str, Dimension]) -> list[Dimension]:
    """As in the file, but each after the dimensions its conditions read."""
    ordered: list[Dimension] = []
    open_keys: list[str] = []

    def visit(dimension: Dimension) -> None:
        if dimension in ordered:
            return
        if dimension.key in open_keys:
            circle = " → ".join([*open_keys[open_keys.index(dimension.key) :], dimension.key])
            raise ConfigError(f"{dimension.where}: conditions go in a circle: {circle}.")
        open_keys.append(dimension.key)
        for key, _ in dimension.when:
            if key in dimensions:
                visit(dimensions[key])
        open_keys.pop()
        ordered.append(dimension)

    for dimension in dimensions.values():
        visit(dimension)
    return ordered


def _check_conditions(dimension: Dimension, dimensions: Mapping[str, Dimension], base: Mapping[str, Any]) -> None:
    for key, values in dimension.when:
        for value in values:
            possible = dimensions[key].contains(value) if key in dimensions else _same(base[key], value)
            if possible:
                break
        else:
            has = f"there {key} is {dimensions[key].words()}" if key in dimensions else f"{key} is {flow(base[key])}"
            raise ConfigError(
                f"{dimension.where}: {dimension.key} never counts: when {key} is {flow(list(values))}, but {has}."
            )


def _check_values(dimension: Dimension, attempt: Try) -> None:
    for value in dimension.choices if dimension.kind == "choice" else (dimension.low, dimension.high):
        try:
            attempt([*_holding(dimension.when), f"{dimension.key}={flow(value)}"])
        except ConfigError as error:
            said = str(error).removeprefix("command line: ")
            raise ConfigError(f"{dimension.where}: {said}") from None


def unread_dimensions(space: Sequence[Dimension], base: LoadedConfig) -> Iterator[str]:
    """A warning for each dimension that another one's value turns off, unless a condition says so."""
    for dimension in space:
        for other in space:
            if other is dimension or other.kind != "choice" or other.key in dict(dimension.when):
                continue
            for choice in other.choices:
                config = with_value(base.config, other.key, choice)
                if config and any(unread_keys(config, {dimension.key: "the space"})):
                    rest = [value for value in other.choices if value != choice]
                    yield (
                        f"{dimension.where}: {dimension.key} is not read where {other.key} is {flow(choice)};"
                        f" add when: {{{other.key}: {flow(rest)}}} to it"
                    )


def with_value(config: Config, key: str, value: Any) -> Config | None:
    """The config with one key changed, or None where it refuses."""
    tree = config.model_dump(mode="json")
    here: Any = tree
    *path, last = key.split(".")
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {}) or here
    here[int(last) if isinstance(here, list) else last] = value
    try:
        return Config.model_validate(tree)
    except ValueError:
        return None
