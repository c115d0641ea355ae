"""What every HTML page of this project must be: well-formed, self-contained, safe with any text, alive in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \" \u2028 😀 ]]> <!-- {{ 1 }}"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A strict reader: every element that opens closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def data(self) -> Any:
        (embedded,) = [text for attrs, text in self.scripts if attrs.get("type") == "application/json"]
        return json.loads(embedded)


def check_page(html: str) -> Page:
    """Asserts that a page is whole, loads nothing and forbids loading; returns it parsed."""
    page = Page(html)
    assert [tag for tag, _ in page.elements if tag in ("html", "body", "title")] == ["html", "title", "body"]
    assert len(page.scripts) == 2, "hostile text must not start a script"
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert "src" not in attributes, f"<{tag} src={attributes.get('src')}>"
        assert not [name for name in attributes if name.startswith("on")], f"<{tag}> carries a handler"
        href = attributes.get("href")
        assert href is None or "://" not in href or tag == "a", href
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    return page


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rendered(path: Path, then: str = "") -> str:
    """The document after its scripts ran in headless Chromium, and after the script `then`, which plays the user.

    Fails when a script raised an error or wrote to the console.
    """
    program = chromium()
    assert program is not None
    if then:
        played = path.with_name(f"played-{path.name}")
        script = f"<script>addEventListener('load', () => {{ {then} }})</script></body>"
        played.write_text(path.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
        path = played
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=5000",
                "--window-size=1280,1600", "--dump-dom", path.resolve().as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout
