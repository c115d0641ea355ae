"""Keeps tokens and passwords out of what people are shown.

What is printed, drawn or sent away is masked, at the price of a harmless word now and then. Files that are read again
hold the truth: what may not stand in them is refused, by `credentials`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MASK = "***"

_SENSITIVE_VARIABLE = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key|credential|(^|_)key$)")
_SWITCH = re.compile(r"(?i)^(true|false|yes|no|on|off|none|null|auto|\d{1,7})$")

SHAPES = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat|glpat|pypi|wandb_v1)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"),  # JSON web token
)
URL_PASSWORD = re.compile(r"(?P<head>[a-zA-Z][\w+.-]{0,30}://(?:[^\s/:@'\"]*:)?)(?P<value>[^\s/@'\"]+)@")
_NAMED = re.compile(  # api_key=…, "password": "…", Authorization: Bearer …; not token counts such as max_tokens: 512
    r"(?i)(?P<head>(?<![a-z])(?:[a-z0-9]{1,40}[_-]){0,8}(?:password|passwd|secret|api[_-]?key|access[_-]?key|authorization"
    r"|auth[_-]token|hub[_-]token|access[_-]token|hf[_-]token)['\"]?\s*[=:]\s*['\"]?(?:bearer\s+|basic\s+)?)"
    r"(?P<value>[^\s'\",;&}\]]+)"
)
QUERY = re.compile(r"(?i)(?P<head>[?&](?:token|key|sig|signature|password|access_token|api_key)=)[^\s&'\"]+")


def mask_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with what looks like a credential replaced by `***`.

    Replaced are: the values of environment variables whose names speak of tokens, keys or passwords, wherever they
    stand; user and password in URLs; credentials in queries; values named like passwords; tokens of known shapes.
    """
    for value in _secret_values(os.environ if environ is None else environ):
        text = text.replace(value, MASK)
    for shape in SHAPES:
        text = shape.sub(MASK, text)
    text = URL_PASSWORD.sub(mask_url, text)
    text = QUERY.sub(rf"\g<head>{MASK}", text)
    return _NAMED.sub(lambda match: match["head"] + (match["value"] if match["value"] == "null" else MASK), text)


_BARE_MASK = re.compile(rf"(?<![^\s\[{{,]){re.escape(MASK)}")


def mask_yaml(text: str) -> str:
    """`mask_secrets` for text in which YAML stands: a value that begins with * would be read as an alias."""
    return _BARE_MASK.sub("(masked)", mask_secrets(text))


def mask_url(match: re.Match[str]) -> str:
    """`user:password@` keeps the user; a bare `token@` goes, a bare `user@` stays."""
    is_user = not match["head"].endswith(":") and len(match["value"]) < 20
    return match[0] if is_user else f"{match['head']}{MASK}@"


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    """Longest first, so that a secret that contains another goes whole."""
    return sorted({value for _, value in secrets_of(environ)}, key=len, reverse=True)


def secrets_of(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, value) of the variables whose names speak of credentials."""
    return [
        (name, value)
        for name, value in environ.items()
        if len(value) >= 8
        and _SENSITIVE_VARIABLE.search(name)
        and not _SWITCH.match(value)
        and not os.path.exists(value)
    ]
