"""Many bad rows that say the same, as one line with their number and their rows as ranges.

    a.jsonl:3-17, 20, 22 and 4 more ranges (31 rows): messages[1].content: is null. Write text in quotes, …

Details that differ only in what the rows themselves hold (quoted values, numbers) are of one kind; the first is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS_SHOWN = 20
KINDS_KEPT = 1000
"""Of details; those of further kinds are counted only, so that a hostile file does not fill the memory."""
RANGES_SHOWN = 3
RANGES_KEPT = 100
_PLACE = re.compile(r"(.*:)(row )?(\d+)")
_VALUES = (
    (re.compile(r'"(?:[^"\\]|\\.)*"?'), "…"),
    (re.compile(r" = [\[{].*?[\]}…]: "), " = …: "),
    (re.compile(r"(near|after|found) .*?(?=\. [A-Z]|$)"), r"\1 …"),
    (re.compile(r"\d+"), "#"),
)


def kind_of_detail(detail: str) -> str:
    """The detail without what is the row's own: quoted values, numbers, the text near a mistake."""
    for found, instead in _VALUES:
        detail = found.sub(instead, detail)
    return detail


@dataclass
class Kind:
    """Rows of one kind: the first one's detail, how many there are, and where."""

    first: str
    detail: str
    rows: int = 0
    varies: bool = False
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # (`a.jsonl:` or `a.jsonl:row `, from, to)
    num_ranges: int = 0

    def add(self, source: str, detail: str) -> None:
        self.rows += 1
        self.varies |= detail != self.detail
        place = _PLACE.fullmatch(source)
        name, number = (place[1] + (place[2] or ""), int(place[3])) if place else (source, -1)
        if self.num_ranges == len(self.ranges) and self.ranges and number >= 0:
            before, start, end = self.ranges[-1]
            if before == name and number in (end, end + 1):
                self.ranges[-1] = (name, start, number)
                return
        self.num_ranges += 1
        if self.num_ranges <= RANGES_KEPT:
            self.ranges.append((name, number, number))

    def where(self, most: int = RANGES_SHOWN) -> str:
        """`a.jsonl:3-17, 20 and 4 more ranges`."""
        parts, last = [], ""
        for name, start, end in self.ranges[:most]:
            numbers = "" if start < 0 else f"{start}" if start == end else f"{start}-{end}"
            parts.append(numbers if name == last and numbers else f"{name}{numbers}")
            last = name
        more = self.num_ranges - len(parts)
        return ", ".join(parts) + (f" and {more:,} more range{'s' * (more > 1)}" if more else "")

    def line(self) -> str:
        if self.rows == 1:
            return f"{self.first}: {self.detail}"
        return f"{self.where()} ({self.rows:,} rows){', the first' if self.varies else ''}: {self.detail}"

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "where": self.where(RANGES_KEPT), "first": self.first, "detail": self.detail}


class Folded:
    """Collects rows with their details, kinds in the order of their first row."""

    def __init__(self) -> None:
        self.rows = 0
        self._kinds: dict[str, Kind] = {}

    def add(self, source: str, detail: str) -> None:
        self.rows += 1
        name = kind_of_detail(detail)
        if name not in self._kinds and len(self._kinds) < KINDS_KEPT:
            self._kinds[name] = Kind(source, detail)
        if name in self._kinds:
            self._kinds[name].add(source, detail)

    def lines(self, most: int = KINDS_SHOWN) -> Iterator[str]:
        """A line for each of the first kinds, and what was not shown."""
        shown = list(self._kinds.values())[:most]
        yield from (kind.line() for kind in shown)
        rows = self.rows - sum(kind.rows for kind in shown)
        if rows:
            yield f"… and {rows:,} more for other reasons"

    def as_list(self) -> list[dict[str, Any]]:
        return [kind.as_dict() for kind in self._kinds.values()]
