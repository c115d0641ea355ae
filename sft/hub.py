"""Whether the hub can be reached, asked once and quickly.

Without an answer its client waits half a minute for each file that it asks about, though everything may lie in the
local cache. Asked before `huggingface_hub` is imported, which reads `HF_HUB_OFFLINE` when it is.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from sft.config import Config

TIMEOUT_S = 3.0
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
_UNANSWERED = re.compile(r"couldn't connect|couldn't reach", re.IGNORECASE)
_NOT_HERE = re.compile(r"can't find|couldn't instantiate the backend|does not appear to have a file", re.IGNORECASE)


def hub_names(config: Config) -> list[str]:
    """Names in a config that are neither files nor folders here."""
    names = [config.model.name, config.model.adapter, *(source.path for source in config.data.train)]
    if isinstance(config.data.eval, list):
        names += [source.path for source in config.data.eval]
    return [name for name in names if name and not is_local(name)]


def names_behind(path: str) -> list[str]:
    """A model's own name, and that of the base model where it is an adapter or a run that trained one."""
    folder = Path(path)
    configs = [place / "adapter_config.json" for place in (folder, folder / "model", folder / "final")]
    texts = [config.read_text(encoding="utf-8") for config in configs if config.is_file()]
    return [path, *(found[1] for text in texts if (found := re.search(r'"base_model_name_or_path": "([^"]+)"', text)))]


def is_local(name: str) -> bool:
    looks_local = name.startswith(("/", ".", "~", "pkg://")) or name.endswith(".gguf") or any(c in name for c in "*?[")
    return looks_local or Path(name).exists()


def settle(names: Iterable[str]) -> str | None:
    """Sets `HF_HUB_OFFLINE` where a name needs the hub and it cannot be reached; returns what to tell the user."""
    asked = os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(p) for p in ("HTTPS_PROXY", "https_proxy"))
    if asked or "huggingface_hub" in sys.modules or not any(not is_local(name) for name in names):
        return None
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = endpoint.hostname or "huggingface.co", endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{host} cannot be reached ({error.strerror or error}): only what is on this machine is used"
    return None


def is_offline() -> bool:
    """As `huggingface_hub` reads its environment."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in ("1", "ON", "YES", "TRUE")


def cure(name: str, said: object, otherwise: str, *, revision: str | None = None, dataset: bool = False) -> str:
    """What to do about a `name` that could not be had: to go online where that is what is missing, else `otherwise`.

    `said`: by the library that looked for it. Offline it says of a file that the cache lacks what it would say of one
    that does not exist.
    """
    if is_local(name) or not _HUB_ID.fullmatch(name):
        return otherwise
    if not _UNANSWERED.search(str(said)) and not (is_offline() and _NOT_HERE.search(str(said))):
        return otherwise
    unset = ", with HF_HUB_OFFLINE unset" if is_offline() else ""
    flags = ("--repo-type dataset " if dataset else "") + (f"--revision {revision} " if revision else "")
    state = "This machine is offline" if dataset else "No folder here has that name, and this machine is offline"
    return (
        f"{state}: connect to the hub{unset}; or, where there is a network, run "
        f"'hf download {flags}{name} --local-dir DIR', and give DIR."
    )
