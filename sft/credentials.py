"""Config values that are credentials: refused, with the place where they belong.

A config is written into the run folder, into a sweep's folder and for each trial, and read again, so it holds the
truth and may hold no secret. The rules are stricter than those that mask what is shown: a path is no token because it
begins like one, and `postgres` in a path is no leak because it is somebody's password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sft.config import Config
from sft.configkeys import walk_keys
from sft.secrets import QUERY, SHAPES, URL_PASSWORD, mask_url, secrets_of
from sft.yamltree import KeyPath

_RUN = re.compile(r"[A-Za-z0-9]{16,}")
_NAME = re.compile(
    r"(?i)(^|[_-])(password|passwd|secret|api[_-]?key|access[_-]?key|authorization|(auth|hub|access|hf)[_-]token)$"
)


def credentials(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """The path of each value that is or holds a credential, and what it is, in words."""
    for path in walk_keys(config):
        value: Any = config
        for key in path:
            value = value[key] if isinstance(key, int) else getattr(value, key)
        free = path == ("data", "template_args")  # where the user names the values
        for inner, text in _texts(value):
            if what := credential_in(text, str(inner[-1]) if free and inner else ""):
                yield (*path, *inner), what


def credential_in(value: str, name: str = "", environ: Mapping[str, str] | None = None) -> str | None:
    """What kind of credential a value is or holds, and where that belongs; None where none.

    `name`: what the user calls the value, where names are free: `password: …` is one, whatever it says.
    """
    if not value or os.path.exists(value):
        return None
    for variable, secret in secrets_of(os.environ if environ is None else environ):
        if (secret == value and _is_no_name(secret)) or (secret in value and is_random(secret)):
            return f"the value of the environment variable {variable}: leave it out, whoever needs it reads it there"
    if any(is_random(match[0]) for shape in SHAPES for match in shape.finditer(value)):
        return (
            "a token: tokens belong into the environment (HF_TOKEN, WANDB_API_KEY, …) or to their own login (hf auth "
            "login, wandb login)"
        )
    if any(mask_url(match) != match[0] for match in URL_PASSWORD.finditer(value)):
        return "a URL with a password or token: leave that out, it belongs into ~/.netrc or the environment"
    if "://" in value and QUERY.search(value):
        return "a URL with a credential in its query: download the file, and name it here"
    if _NAME.search(name):
        return "a credential, by its name: it belongs into an environment variable"
    return None


def is_random(text: str) -> bool:
    """Whether chance wrote it: a long run of small letters and capitals, of capitals and digits, or of hexadecimal
    digits. Files are named otherwise."""

    def mixed(run: str) -> bool:
        others = "[0-9]" if run.startswith(("AKIA", "ASIA")) else "[a-z]"
        is_hex = len(run) >= 32 and re.fullmatch("[0-9a-f]+", run) is not None
        return is_hex or (re.search("[A-Z]", run) is not None and re.search(others, run) is not None)

    return any(map(mixed, _RUN.findall(text)))


def _is_no_name(secret: str) -> bool:
    """Nor a word, such as the password `postgres`; nor a file's name, such as the key of an object in a store."""
    is_path = re.search(r"\.[a-z]\w{1,7}$", secret) is not None or ("/" in secret and not is_random(secret))
    return not is_path and (len(secret) >= 16 or not secret.isalpha())


def _texts(value: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every text in a plain value, with where it stands."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*at, index))
