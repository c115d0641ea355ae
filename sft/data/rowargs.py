"""What is made once for each set of template arguments that rows bring (`chat_template_kwargs`)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

MOST_KEPT = 16

T = TypeVar("T")


class ByArguments(Generic[T]):
    """What is made once for each distinct set of arguments. The MOST_KEPT used last are kept."""

    def __init__(self, make: Callable[[Mapping[str, Any]], T]) -> None:
        self.make = make
        self.kept: OrderedDict[str, T] = OrderedDict()

    def __call__(self, arguments: Mapping[str, Any]) -> T:
        key = json.dumps(arguments, sort_keys=True) if arguments else ""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        made = self.kept[key] = self.make(arguments)
        if len(self.kept) > MOST_KEPT:
            self.kept.popitem(last=False)
        return made
