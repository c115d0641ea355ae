"""The account of rows: what became of each, by source and by reason, in flat memory.

For each side (train; evaluation from sources of its own) and for each of its sources:

    rows == kept + sum(dropped.values()) + held_out

`held_out` are the rows of train that are scored instead of trained. `cut` and `altered` count rows that were kept.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.folding import Folded
from sft.data.rowkeys import cure_of
from sft.data.store import StoreWriter
from sft.errors import DataError
from sft.types import Note

MOST_KEYS = 200
"""Key paths of one source that are told one by one; rows whose keys are data would have millions."""
OTHER_KEYS = "(further keys)"
_LINE = re.compile(r":(?:row )?(\d+)(?:\[\d+\])?(?:#\d+)?$")


@dataclass
class ToldKey:
    """A key path that was not read, or read under another name: its first row, and how many have it."""

    first: Note
    rows: int = 0


class Ledger:
    """Counts what comes, and writes each note as one line of JSON. Of keys, one line a key path and source."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        self.path = path
        self.rows: Counter[int] = Counter()  # origin → rows read
        self.templated = 0  # rows that a template renders
        self.dropped: dict[int, Counter[str]] = {}  # origin → reason → rows
        self.refused = Folded()
        self.num_refused = 0
        self.num_refused_long = 0  # those of them that are only over_long
        self._codes: dict[tuple[str, str], int] = {}  # (action, reason) of kept rows → number
        self._noted_conversations = array("q")
        self._noted_codes = array("i")
        self.keys: dict[tuple[int, str, str], ToldKey] = {}  # (origin, action, reason)
        self._num_keys: Counter[int] = Counter()  # by origin

    def refuse(self, note: Note, origin: int) -> None:
        """A row that `data.on_bad_row` decides about."""
        self.num_refused += 1
        self.num_refused_long += note.reason == "over_long"
        self.refused.add(note.source, note.detail or note.reason)
        self.drop(note, origin)

    def drop(self, note: Note, origin: int) -> None:
        self.dropped.setdefault(origin, Counter())[note.reason] += 1
        self._write(Note(note.source, "dropped", note.reason, note.detail))

    def keep(self, note: Note, conversation: int) -> None:
        """A kept row that was cut or altered."""
        code = self._codes.setdefault((note.action, note.reason), len(self._codes))
        self._noted_conversations.append(conversation)
        self._noted_codes.append(code)
        self._write(note)

    def tell(self, note: Note, origin: int) -> None:
        """A key of a kept row that nothing reads, or that was read under another name."""
        key = (origin, note.action, note.reason)
        if key not in self.keys:
            if self._num_keys[origin] >= MOST_KEYS:
                key = (origin, note.action, OTHER_KEYS)
            self._num_keys[origin] += 1
        self.keys.setdefault(key, ToldKey(note)).rows += 1

    def _write(self, note: Note, **more: int) -> None:
        line = _LINE.search(note.source)
        entry = {
            "source": note.source,
            "line": int(line[1]) if line else None,
            "action": note.action,
            "reason": note.reason,
            "detail": note.detail,
            **more,
        }
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flushes to the disk. May be called again."""
        if not self._file.closed:
            for (_, _, reason), told in self.keys.items():
                self._write(Note(told.first.source, told.first.action, reason, told.first.detail), rows=told.rows)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def noted(self, action: str, mask_C: NDArray[np.bool_]) -> dict[str, int]:
        """How many notes of an action fall on the conversations of the mask, by reason."""
        conversations = np.frombuffer(self._noted_conversations, dtype=np.int64)
        codes = np.frombuffer(self._noted_codes, dtype=np.intc)
        counts = np.bincount(codes[mask_C[conversations]], minlength=len(self._codes)).tolist()
        return {reason: counts[code] for (what, reason), code in self._codes.items() if what == action and counts[code]}

    def conversations_noted(self, action: str) -> list[int]:
        codes = {code for (what, _), code in self._codes.items() if what == action}
        return [c for c, code in zip(self._noted_conversations, self._noted_codes, strict=True) if code in codes]

    def total(self, origins: Sequence[int]) -> tuple[int, Counter[str]]:
        """(rows read, rows dropped by reason) over sources."""
        dropped: Counter[str] = Counter()
        for origin in origins:
            dropped.update(self.dropped.get(origin, {}))
        return sum(self.rows[origin] for origin in origins), dropped


def refuse_bad_rows(ledger: Ledger, all_rows: Path) -> None:
    """`on_bad_row: error`: raises with the bad rows by kind; the list of all of them moves to `all_rows`."""
    if not ledger.num_refused:
        return
    ledger.path.replace(all_rows)
    lines = [f"  {line}" for line in ledger.refused.lines()]
    if ledger.num_refused > 1:
        lines.append(f"Each one is listed in {all_rows}.")
    cures = (
        ["raise data.max_tokens, or set data.over_long: drop, keep_turns or truncate"]
        if ledger.num_refused_long
        else []
    )
    if ledger.num_refused > ledger.num_refused_long:
        cures.append("repair or remove them, or set data.on_bad_row: skip to leave them out")
    if any("unread" in reasons for reasons in ledger.dropped.values()):
        cures.append(
            "a key that nothing reads: map it (columns: {theirs: ours}), leave it out (columns: {theirs: null}), or "
            "set data.unread: report"
        )
    told = "; ".join(cures)
    error = DataError(
        f"{ledger.num_refused:,} bad row{'s' if ledger.num_refused > 1 else ''} of {sum(ledger.rows.values()):,}:\n"
        + "\n".join(lines)
        + f"\n{told[0].upper()}{told[1:]}"
    )
    error.bad_rows = tuple(ledger.refused.as_list())
    raise error


def refuse_many_drops(
    ledger: Ledger, paths: Sequence[str], origins: Sequence[int], most: float, all_rows: Path, over_long: str = "drop"
) -> None:
    """Raises where more than the share `most` of the rows of these sources was dropped, whatever the reason.

    `over_long`: as `data.over_long` says; where it is truncate, what is left too long has no room for an answer.
    """
    rows, dropped = ledger.total(origins)
    number = sum(dropped.values())
    if not rows or number <= most * rows:
        return
    if ledger.path.exists():
        ledger.path.replace(all_rows)
    lines = [
        f"  {paths[origin]}: {ledger.rows[origin]:,} rows, dropped "
        + ", ".join(f"{count:,} {reason}" for reason, count in ledger.dropped[origin].most_common())
        for origin in origins
        if origin in ledger.dropped
    ]
    cure = ""
    if "over_long" in dropped and over_long == "truncate":
        cure = "raise data.max_tokens, for their prompts alone fill it, or shorten the prompts; "
    elif "over_long" in dropped:
        cure = "raise data.max_tokens, or set data.over_long: keep_turns or truncate; "
    if ledger.num_refused:  # not all of them may be of these sources
        lines += ["Bad rows among them:", *(f"  {line}" for line in ledger.refused.lines())]
    error = DataError(
        f"{number:,} of {rows:,} rows ({number / rows:.1%}) were dropped, more than data.max_dropped = {most}:\n"
        + "\n".join(lines)
        + f"\nEach one is listed in {all_rows}. Repair the rows; {cure}or raise data.max_dropped"
    )
    error.bad_rows = tuple(ledger.refused.as_list())
    raise error


def account(
    writer: StoreWriter, ledger: Ledger, paths: Sequence[str], origins: Sequence[int], side: str,
    formats: dict[int, set[str]],
) -> dict[str, Any]:  # fmt: skip
    """The counts of one side, in all and by source. `side` is the array of its conversations, train or eval."""
    origin_C, examples_C = writer.read("origins"), writer.read("examples")
    mask_C = np.zeros(len(origin_C), dtype=np.bool_)
    mask_C[writer.read(side)] = True
    conversation_E = np.repeat(np.arange(len(origin_C)), examples_C)
    lengths_E, trained_E = writer.read("lengths"), writer.read("trained")

    def counts(chosen_C: NDArray[np.bool_], rows: int, dropped: dict[str, int], held_out: int) -> dict[str, Any]:
        chosen_E = chosen_C[conversation_E]
        return {
            "rows": rows,
            "kept": int(chosen_C.sum()),
            "dropped": dropped,
            "held_out": held_out,
            "cut": sum(ledger.noted("cut", chosen_C).values()),
            "altered": ledger.noted("altered", chosen_C),
            "examples": int(chosen_E.sum()),
            "tokens": int(lengths_E[chosen_E].sum(dtype=np.int64)),
            "trained_tokens": int(trained_E[chosen_E].sum(dtype=np.int64)),
        }

    drawn = side == "eval" and not set(origins).isdisjoint(np.unique(origin_C[writer.read("train")]).tolist())
    by_source = []
    for origin in origins:
        here_C = (origin_C == origin) & mask_C
        rows, dropped = ledger.total([origin])
        held_out = 0 if drawn else rows - sum(dropped.values()) - int(here_C.sum())
        found = counts(here_C, int(here_C.sum()) if drawn else rows, {} if drawn else dict(dropped), held_out)
        by_source.append({"path": paths[origin], "format": ", ".join(sorted(formats.get(origin, ()))), **found})
    whole = counts(mask_C, 0, {}, 0)
    whole["rows"] = sum(source["rows"] for source in by_source)
    whole["held_out"] = sum(source["held_out"] for source in by_source)
    whole["dropped"] = {} if drawn else dict(ledger.total(origins)[1])
    whole["by_source"] = by_source
    whole["length_histogram"] = histogram(lengths_E[mask_C[conversation_E]])
    return whole


def told_keys(ledger: Ledger, paths: Sequence[str], origin_C: NDArray[np.int32]) -> dict[str, list[dict[str, Any]]]:
    """`{"unread": …, "read_as": …}`: a key path of a source each, with the number and share of its kept rows, the first
    of them (`at`) and an excerpt of its value. `origin_C`: the source of each kept row."""
    kept = Counter(origin_C.tolist())
    found: dict[str, list[dict[str, Any]]] = {"unread": [], "read_as": []}
    for (origin, action, reason), told in sorted(ledger.keys.items(), key=lambda item: (item[0][0], -item[1].rows)):
        path, _, ours = reason.rpartition(" as ") if action == "read_as" else (reason, "", "")
        found[action].append(
            {
                "key": path or reason,
                "rows": told.rows,
                "share": told.rows / max(1, kept[origin]),
                "source": paths[origin],
                "example": told.first.detail,
                "at": told.first.source,
                **({"cure": cure_of(reason)} if action == "unread" else {"read_as": ours}),
            }
        )
    return found


def histogram(lengths_E: NDArray[np.int32], bars: int = 20) -> list[dict[str, Any]]:
    """Examples by length: bars of equal width, `from` inclusive, `to` exclusive; a rare long tail shares the last."""
    if not len(lengths_E):
        return []
    most = int(np.quantile(lengths_E, 0.995)) + 1
    width = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power * bars >= most)
    last = (most - 1) // width
    counts = np.bincount(np.minimum(lengths_E // width, last), minlength=last + 1).tolist()
    longest = int(lengths_E.max())
    edges = [(i * width, (i + 1) * width if i < last else max((i + 1) * width, longest + 1)) for i in range(last + 1)]
    return [
        {"label": str(low), "value": count, "title": f"{low} to {high - 1} tokens", "from": low, "to": high}
        for (low, high), count in zip(edges, counts, strict=True)
    ]
