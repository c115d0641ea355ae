"""One file → rows that know their `file:line`: JSON lines, JSON, CSV, Parquet and Arrow.

Read by hand and not through Arrow's JSON reader, which unions the keys of all rows into foreign nulls and forgets
lines. Every reader is a generator in bounded memory. Trouble with one row becomes a `BadRow` and reading goes on;
trouble with the file itself (unreadable, cut in a way that hides how much is lost) raises `DataError`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sft.data.arrowjson import row_decoder
from sft.data.delimiter import HEAD_LINES, delimiter_of
from sft.data.jsontext import JsonText, RowText, parse_object
from sft.errors import DataError

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is refused: it bounds memory, and no conversation comes near."""
ARROW_ROWS = 64
ROW_FIELDS = frozenset(
    ("messages", "conversations", "conversation", "prompt", "completion", "instruction", "output", "text")
)
"""A JSON object with one of these is a row itself and not a wrapper around a list of rows."""
BESIDE = frozenset(("tools", "functions", "history"))
"""Lists that a row may hold before those fields; they are no lists of rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of the user's data. `source` is `file:line`, or `file:row N`; `size` about its bytes."""

    source: str
    data: Mapping[str, Any]
    size: int = 0


@dataclass(frozen=True, slots=True)
class BadRow:
    """What could not be read as a row: what is wrong, the value (cut) and the cure."""

    source: str
    message: str


Rows = Iterator[Row | BadRow]


def read_file(path: Path, name: str, columns: Mapping[str, str]) -> Rows:
    """The rows of one file, `name` being what it is called in messages. A file without rows is one bad row."""
    reader = READERS[kind_of(path)]
    rows = 0
    try:
        for row in reader(path, name, columns):
            rows += 1
            yield row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}. Check the file, or take it out of data.train") from error
    if not rows:
        size = path.stat().st_size
        yield BadRow(name, f"the file holds no rows ({size} bytes). Fill it, or take it out of the list of sources")


def kind_of(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`; the empty string where no reader knows the name."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    known = kind in READERS and not (name.endswith(".gz") and kind in (".parquet", ".arrow"))
    return kind if known else ""


def _open(path: Path) -> IO[bytes]:
    file: IO[bytes] = gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
    return file


def _refuse_utf16(start: bytes, name: str) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {name}")


def read_jsonl(path: Path, name: str, columns: Mapping[str, str] = {}) -> Rows:
    """One object a line. Empty lines are no rows; a byte-order mark and CRLF are taken off.

    A file that opens with `[` is one JSON array, whatever its name says.
    """
    with _open(path) as file:
        if _first_character(file, name) == b"[":
            yield from _read_array(file, name)
            return
        file.seek(0)
        yield from _read_lines(file, name)


def _read_lines(file: IO[bytes], name: str) -> Rows:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        source = f"{name}:{number}"
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield BadRow(source, f"the line is longer than {MAX_ROW_BYTES >> 20} MiB. Split it, or leave it out")
            continue
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        if not text:
            continue
        parsed = parse_object(text, last=not line.endswith(b"\n"))
        yield BadRow(source, parsed) if isinstance(parsed, str) else Row(source, parsed, len(line))


def _first_character(file: IO[bytes], name: str) -> bytes:
    start = file.read(4096)
    _refuse_utf16(start, name)
    start = start.removeprefix(codecs.BOM_UTF8)
    while start and not start.strip():
        start = file.read(4096)
    file.seek(0)
    return start.lstrip()[:1]


def read_json(path: Path, name: str, columns: Mapping[str, str] = {}) -> Rows:
    """A JSON array of rows, an object with one list of rows, one row, or (as many name them) JSON lines."""
    with _open(path) as file:
        first = _first_character(file, name)
        if first == b"[":
            yield from _read_array(file, name)
        elif first == b"{" and not _is_lines(file):
            yield from _read_object(file, name, columns)
        else:
            yield from _read_lines(file, name)


def _is_lines(file: IO[bytes]) -> bool:
    """Whether the first line is an object by itself and something follows. Leaves the file at its start."""
    line = b""
    while not line.strip():
        line = file.readline(MAX_ROW_BYTES)
    whole = not isinstance(parse_object(line.removeprefix(codecs.BOM_UTF8).strip(), last=False), str)
    more = whole and any(chunk.strip() for chunk in iter(lambda: file.read(4096), b""))
    file.seek(0)
    return more


def _read_array(file: IO[bytes], name: str) -> Rows:
    text = JsonText(file, name, MAX_ROW_BYTES)
    text.space()
    yield from _elements(text, name)
    if text.space():
        raise DataError(f"{name}:{text.line}: text after the end of the array: {text.ahead()}. Name JSON lines .jsonl")


def _elements(text: JsonText, name: str) -> Rows:
    """Rows from `[` through `]`. Elements that start on the same line are told apart as `file:line[index]`."""
    text.take("[")
    index, last_line = 0, 0
    while True:
        character = text.space()
        if character == "]" and not index:
            break
        line = text.line
        source = f"{name}:{line}" if line != last_line else f"{name}:{line}[{index}]"
        if not character:
            yield BadRow(source, "the file ends before the array's closing ']': it is cut. Write or download it again")
            return
        element: RowText = text.row()
        if isinstance(element.parsed, str):
            yield BadRow(source, element.parsed)
        else:
            yield Row(source, element.parsed, element.size)
        index, last_line = index + 1, line
        character = text.space()
        if character == ",":
            text.take(",")
        elif character == "]":
            break
        elif character:
            raise DataError(
                f"{name}:{text.line}: expected ',' or ']' after a row of the array, found {text.ahead()}. "
                "The rest of the file cannot be read; repair it, or write one object a line in a .jsonl file"
            )
        elif not element.cut:
            yield BadRow(f"{name}:{text.line}", "the file ends before the array's closing ']': it is cut")
            return
        else:
            return
    text.take("]")


def _read_object(file: IO[bytes], name: str, columns: Mapping[str, str]) -> Rows:
    """`{"data": [rows]}`; or, where the keys are those of a row or no list is found, the object is the one row."""
    text = JsonText(file, name, MAX_ROW_BYTES)
    text.space()
    text.take("{")
    lists: list[str] = []
    while text.space() not in ("}", ""):
        key = text.key()
        name_here = columns.get(key, key)
        if name_here in ROW_FIELDS and not lists:
            break
        if name_here in ROW_FIELDS:
            raise DataError(
                f"{name}:{text.line}: the list '{lists[0]}' was read as the rows, and '{key}' makes the object a row "
                f"itself. Put '{key}' first, or write one object a line in a .jsonl file"
            )
        if text.space() == "[" and name_here not in BESIDE:
            lists.append(key)
            if len(lists) > 1:
                raise DataError(
                    f"{name}:{text.line}: two lists in one object: '{lists[0]}' and '{key}'; which one holds the rows? "
                    "Keep one list of objects, or write one object a line in a .jsonl file"
                )
            yield from _elements(text, name)
        else:
            text.skip()
        if text.space() == ",":
            text.take(",")
    else:
        if text.space() == "}":
            text.take("}")
        if text.space():
            raise DataError(f"{name}:{text.line}: text after the object: {text.ahead()}. Write one object a line")
    if not lists:
        file.seek(0)
        raw = file.read(MAX_ROW_BYTES + 1)
        if len(raw) > MAX_ROW_BYTES:
            raise DataError(f"{name}: one object of more than {MAX_ROW_BYTES >> 20} MiB. Write one object a line")
        parsed = parse_object(raw.removeprefix(codecs.BOM_UTF8).strip(), last=True)
        yield BadRow(f"{name}:1", parsed) if isinstance(parsed, str) else Row(f"{name}:1", parsed, len(raw))


def read_csv(path: Path, name: str, columns: Mapping[str, str] = {}) -> Rows:
    """Rows under a header of column names. Cells are text, between them `,`, `;` or a tab: what fits the first rows."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open(path) as binary:
        _first_character(binary, name)
        # Bytes that are not UTF-8 become lone surrogates, which the formats refuse with the row's line.
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _bounded_lines(file, name)
        head = list(itertools.islice(lines, HEAD_LINES))
        if not head:
            return
        delimiter = "\t" if kind_of(path) == ".tsv" else delimiter_of(head)
        reader = csv.reader(itertools.chain(head, lines), delimiter=delimiter, strict=True)
        yield from _csv_rows(reader, name)


def _bounded_lines(file: io.TextIOWrapper, name: str) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) >= MAX_ROW_BYTES:
            raise DataError(f"{name}:{number}: a line of more than {MAX_ROW_BYTES >> 20} MiB. Is this a CSV file?")
        yield line


def _csv_rows(reader: Any, name: str) -> Rows:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "field larger" in str(error):
                raise DataError(f"{name}:{line}: {error}: a quote is never closed. Close it") from error
            yield BadRow(f"{name}:{line}", f"malformed CSV: {error}. Quote cells that hold quotes, doubling them")
            continue
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = sorted({cell for cell in header if header.count(cell) > 1})
            if twice:
                raise DataError(f"{name}:1: the column '{twice[0]}' appears twice in the header {header}. Rename one")
        elif len(cells) != len(header):
            found = json.dumps(cells, ensure_ascii=False)[:80]
            yield BadRow(
                f"{name}:{line}",
                f"{len(cells)} cells under {len(header)} columns ({', '.join(header)}): {found}. Quote cells that hold "
                "a delimiter or a line break",
            )
        else:
            yield Row(f"{name}:{line}", dict(zip(header, cells, strict=True)), sum(map(len, cells)))


def read_parquet(path: Path, name: str, columns: Mapping[str, str] = {}) -> Rows:
    """Rows of a Parquet file, without the nulls that Arrow put where a struct lacked a key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from rows_of_batches(file.iter_batches(batch_size=ARROW_ROWS), name)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a readable Parquet file: {_first_line(error)}. Write it again") from error


def read_arrow(path: Path, name: str, columns: Mapping[str, str] = {}) -> Rows:
    """Rows of an Arrow file or stream, as `datasets` saves to disk."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
                batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from rows_of_batches(batches, name)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a readable Arrow file: {_first_line(error)}. Write it again") from error


def rows_of_batches(batches: Iterator[Any], name: str) -> Rows:
    """Rows of Arrow record batches, numbered from 1 (`name:row N`)."""
    number = 0
    for whole in batches:
        decode = row_decoder(whole.schema)
        for start in range(0, whole.num_rows, ARROW_ROWS):
            batch = whole.slice(start, ARROW_ROWS)
            size = batch.nbytes // max(1, batch.num_rows)
            for row in _python_rows(batch):
                number += 1
                source = f"{name}:row {number}"
                if isinstance(row, str):
                    yield BadRow(source, row)
                    continue
                try:  # nulls within JSON are the user's: of those Arrow knows nothing
                    plain = without_nulls(row, 0)
                    yield Row(source, decode(plain) if decode else plain, size)
                except ValueError as error:
                    yield BadRow(source, f"{error}. Repair or remove the row")


def _python_rows(batch: Any) -> list[dict[str, Any] | str]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")  # type: ignore[no-any-return]
    except (UnicodeDecodeError, ValueError, OverflowError, KeyError) as error:
        if batch.num_rows == 1:
            return [f"cannot be read: {_first_line(error)}. Repair or remove the row"]
        return [_python_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def without_nulls(value: Any, depth: int = 0) -> Any:
    """Without keys whose value is null in nested objects: Arrow adds them, and a template would print them.

    Nulls at the top and in lists stay. A null that the user wrote in a nested object is lost too: Arrow cannot tell.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item, depth + 1) for key, item in value.items() if depth == 0 or item is not None}
    if isinstance(value, list):
        return [without_nulls(item, depth + 1) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


READERS: dict[str, Callable[[Path, str, Mapping[str, str]], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""By the end of the file's name; a new kind of file is one function here."""
