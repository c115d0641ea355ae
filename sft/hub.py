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
