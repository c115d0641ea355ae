"""Self-contained HTML pages: one look for preview, run report and sweep report.

A page is one file that needs no network: style, scripts and data are inside it, and a content security policy forbids
it to load anything. Values go in as data, escaped; a row of training data can hold any text, `</script>` included.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.durable import finite

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = Path(__file__).with_name("pages")


def render_page(template: str, /, **values: Any) -> str:
    """The HTML of `template` (a file of sft/pages, usually extending base.html), filled with `values`.

    `data=` is embedded as JSON for the page's own script, where it is `sft.data`; NaN and infinities become null.
    """
    html = _environment().get_template(template).render(data=values.pop("data", None), **values)
    return html.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a row has no UTF-8: `?`


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = _asset
    environment.filters.update(
        json=embedded_json, count=count, number=number, percent=percent, duration=duration, bytes=num_bytes
    )
    return environment


def _asset(name: str) -> Markup:
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def embedded_json(value: Any) -> Markup:
    """JSON that can stand inside <script>: no character in it can end the element or begin a comment."""
    from markupsafe import Markup

    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def count(value: float | None) -> str:
    """1234567 -> '1 234 567' with narrow spaces; None -> '–'."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits: 1.2346, 0.0002, 3.2e-05."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else count(value)


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\u202f%"


def duration(seconds: float | None) -> str:
    """75 -> '1 min 15 s'."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def num_bytes(value: float | None) -> str:
    """Powers of 1024: 98 MiB, 1.5 GiB."""
    if value is None:
        return "–"
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    unit = units[-1]
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
