"""Keeps tokens and passwords out of files and streams."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MASK = "***"

_SENSITIVE_VARIABLE = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key|credential|(^|_)key$)")
_SWITCH = re.compile(r"(?i)^(true|false|yes|no|on|off|none|null|auto|\d{1,7})$")

_SHAPES = (
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat|glpat|pypi|wandb_v1)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"),  # JSON web token
)
_URL_PASSWORD = re.compile(r"(?P<head>[a-zA-Z][\w+.-]{0,30}://(?:[^\s/:@'\"]*:)?)(?P<value>[^\s/@'\"]+)@")
_NAMED = re.compile(  # api_key=…, "password": "…", Authorization: Bearer …; not token counts such as max_tokens: 512
    r"(?i)(?P<head>(?<![a-z])(?:[a-z0-9]{1,40}[_-]){0,8}(?:password|passwd|secret|api[_-]?key|access[_-]?key|authorization"
    r"|auth[_-]token|hub[_-]token|access[_-]token|hf[_-]token)['\"]?\s*[=:]\s*['\"]?(?:bearer\s+|basic\s+)?)"
    r"(?P<value>[^\s'\",;&}\]]+)"
)
_QUERY = re.compile(r"(?i)(?P<head>[?&](?:token|key|sig|signature|password|access_token|api_key)=)[^\s&'\"]+")


def mask_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with what looks like a credential replaced by `***`.

    Replaced are: the values of environment variables whose names speak of tokens, keys or passwords, wherever they
    stand; user and password in URLs; credentials in queries; values named like passwords; tokens of known shapes.
    """
    for value in _secret_values(os.environ if environ is None else environ):
        text = text.replace(value, MASK)
    for shape in _SHAPES:
        text = shape.sub(MASK, text)
    text = _URL_PASSWORD.sub(_mask_url, text)
    text = _QUERY.sub(rf"\g<head>{MASK}", text)
    return _NAMED.sub(lambda match: match["head"] + (match["value"] if match["value"] == "null" else MASK), text)


def _mask_url(match: re.Match[str]) -> str:
    """`user:password@` keeps the user; a bare `token@` goes, a bare `user@` stays."""
    is_user = not match["head"].endswith(":") and len(match["value"]) < 20
    return match[0] if is_user else f"{match['head']}{MASK}@"


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    """Longest first, so that a secret that contains another goes whole."""
    found = {
        value
        for name, value in environ.items()
        if len(value) >= 8
        and _SENSITIVE_VARIABLE.search(name)
        and not _SWITCH.match(value)
        and not os.path.exists(value)
    }
    return sorted(found, key=len, reverse=True)
