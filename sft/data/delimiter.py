"""What parts the cells of a CSV file, where its name does not say."""

from __future__ import annotations

import csv
from contextlib import suppress

HEAD_LINES = 64
"""Of a CSV file, looked at."""


def delimiter_of(head: list[str]) -> str:
    """What parts the cells of a file's first lines: the mark under which most of its rows have as many cells as the
    header, and the header several; of equals the first of `,`, tab and `;`."""

    def fitting(mark: str) -> float:
        rows = []
        with suppress(csv.Error):  # told later, with its line
            rows += [cells for cells in csv.reader(head, delimiter=mark) if cells]
        width = len(rows[0]) if rows else 0
        if width < 2:
            return -1.0
        body = rows[1:-1] if len(head) == HEAD_LINES else rows[1:]  # the last row may be cut
        return sum(len(cells) == width for cells in body) / max(1, len(body))

    return max((",", "\t", ";"), key=fitting)
