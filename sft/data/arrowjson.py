"""Arrow columns whose texts are JSON by their type (`arrow.json`, which `datasets` calls Json()), read as values.

The type says so, so nothing is guessed: a text under such a column is in quotes there, `"Hello"`, and would be
rendered with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sft.data.jsontext import parse

EXTENSION = "arrow.json"
Decoder = Callable[[Any], Any]


def row_decoder(schema: Any) -> Decoder | None:
    """A function from a row of Python values to the row with its JSON read; None where no column holds any.

    The function raises ValueError with one sentence where a text is no JSON.
    """
    return _of_fields(list(schema))


def _of_fields(fields: list[Any]) -> Decoder | None:
    found = {field.name: decoder for field in fields if (decoder := _of_field(field))}
    if not found:
        return None

    def decode(value: Any) -> Any:
        if value is None:
            return None
        return {key: found[key](item) if key in found else item for key, item in value.items()}

    return decode


def _of_field(field: Any) -> Decoder | None:
    import pyarrow as pa

    kind, told = field.type, (field.metadata or {}).get(b"ARROW:extension:name", b"")
    if getattr(kind, "extension_name", told.decode("ascii", "replace")) == EXTENSION:
        return _read
    if pa.types.is_struct(kind):
        return _of_fields([kind.field(i) for i in range(kind.num_fields)])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        each = _of_field(kind.value_field)
        return None if each is None else partial(_of_list, each)
    if pa.types.is_map(kind):
        each = _of_field(kind.item_field)
        return None if each is None else partial(_of_map, each)
    return None


def _of_list(each: Decoder, values: Any) -> Any:
    return None if values is None else [each(value) for value in values]


def _of_map(each: Decoder, pairs: Any) -> Any:
    return None if pairs is None else {key: each(value) for key, value in pairs.items()}


def _read(text: Any) -> Any:
    return parse(text) if isinstance(text, str) else text
