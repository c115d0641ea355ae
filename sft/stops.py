"""Where a turn ends: the token that the template writes behind an answer, and those at which serving stops."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import TemplateError

MARKUP = re.compile(r"\s*(<[^<>\s]{1,80}>|\[[^\[\]\s]{1,80}[\[\]]|\{[^{}\s]{1,80}\}|\|[^|\s]{1,80}\|)")
"""A mark that could be a token: `<seed:eos>`, `<｜end▁of▁sentence｜>`, `<turn|>`, `[|endofturn|]`, `[e~[`."""


@dataclass(frozen=True)
class Ending:
    """How a template ends an answer. `stop`: the token; `closes`: whether the template itself writes it; `tail`: the
    text between answer and token. `foreign`: a mark that it writes there and the tokenizer does not know as a token."""

    stop: int
    closes: bool
    tail: str
    foreign: str = ""


def serving_stops(folder_or_id: str, revision: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Where generation stops by the model's settings: generation_config's eos ids, else config's, and eos_token.

    The one that `eos_token` names comes first where the settings hold several.
    """
    named: list[int] = []
    for filename in ("generation_config.json", "config.json"):
        settings = read_settings(folder_or_id, revision, filename)
        found = settings.get("eos_token_id") if settings else None
        if found is not None:
            named = [int(i) for i in (found if isinstance(found, list) else [found])]
            break
    eos = tokenizer.eos_token_id
    if eos is not None:
        named = [eos, *named] if eos in named else [*named, eos]
    return tuple(dict.fromkeys(i for i in named if i < len(tokenizer)))


def read_settings(folder_or_id: str, revision: str | None, filename: str) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    path = cached_file(
        folder_or_id,
        filename,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    return settings if isinstance(settings, dict) else None


def closings(texts: tuple[str, str], answer: str) -> tuple[str, str]:
    """(What follows an answer both at the end of a conversation and within one, what follows at the end), of a small
    conversation rendered alone and with the next question."""
    alone, followed = (text[text.rindex(answer) + len(answer) :] for text in texts)
    common = next((i for i, (a, b) in enumerate(zip(alone, followed, strict=False)) if a != b), len(alone))
    return alone[:common], alone


def foreign_end(texts: tuple[str, str], answer: str, known: Sequence[str]) -> str:
    """The mark with which a template ends its answers where that is none of the tokens `known`; empty where there is
    such a token, or no mark."""
    for text in closings(texts, answer):
        if any(token in text for token in known if token.strip()):
            return ""
        if found := MARKUP.match(text):
            return found[1]
    return ""


def call_end(text: str, argument: str, known: Sequence[str], stops: Sequence[str]) -> str:
    """The mark with which a turn ends that calls a tool, where the template has one of its own for such turns
    (`<|eom_id|>`, `<|call|>`, `<|tool_response>`); empty where one of `stops` ends it as well.

    `text`: a conversation up to a call with that argument. A mark that closes what another opened ends no turn.
    """
    behind = text[text.rindex(argument) + len(argument) :] if argument in text else ""
    if any(stop in behind for stop in stops):
        return ""
    marks = "|".join(map(re.escape, sorted(filter(str.strip, known), key=len, reverse=True))) or "(?!)"
    found = re.search(rf"({marks}|{MARKUP.pattern.removeprefix(chr(92) + 's*')})\s*$", behind)
    return "" if found is None or found[1].startswith("</") else found[1]


def find_stop(
    tokenizer: Any, texts: tuple[str, str], answer: str, serving: tuple[int, ...], notes: list[str]
) -> Ending:
    """How the template ends an answer. Raises TemplateError where nothing could be trained to stop.

    An answer's own closing is what follows it both at the end of a conversation and within one; `<|end|>` in Phi-3's
    `<|end|>\\n<|endoftext|>`. Of several tokens there, one at which serving stops wins, else the last.
    """
    common, alone = closings(texts, answer)
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
    for text, choose_last in ((common, True), (alone, False)):
        tokens = [(m.start(), added[m.group()]) for m in pattern.finditer(text)]
        special = [t for t in tokens if tokenizer.added_tokens_decoder[t[1]].special]
        chosen = [t for t in tokens if t[1] in serving] or (special[-1:] if choose_last else special[:1])
        if chosen:
            start, stop = chosen[0]
            if stop not in serving:
                notes.append(
                    f"{tokenizer.convert_ids_to_tokens(stop)} ends a turn of the template, but the model's "
                    "generation settings do not stop at it yet; the trained model's will"
                )
            return Ending(stop, True, text[:start])
    if not serving:
        raise TemplateError(
            "the chat template does not close an answer with a token, and the model's generation settings name no "
            "eos_token_id: nothing could be trained to stop. Set data.template: chatml, or set eos_token."
        )
    foreign = foreign_end(texts, answer, list(added))
    notes.append(
        "the template does not close an answer with a token of its own: "
        f"{tokenizer.convert_ids_to_tokens(serving[0])}, the end-of-turn token of the model's generation settings, "
        "is trained after each answer"
    )
    return Ending(serving[0], False, alone if not alone.strip() else "", foreign)
