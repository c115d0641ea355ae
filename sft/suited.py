"""Which settings a model's template needs for these rows: found by encoding some of each kind, as training would.

A refusal names the keys under which its row trains, as lines to paste; they are tried here on all kinds of rows. What
only fits the template to the rows is chosen; what decides how the model will answer is a question, with its answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.config import Config
from sft.data.encode import Encoder
from sft.data.loader import encode_settings
from sft.errors import SftError
from sft.prepare import load_bundle
from sft.templating import RENDER_SECONDS, deadline
from sft.types import Conversation
from sft.yamltree import flow, parse_plain

OF_EACH_KIND = 3
ROUNDS = 3
LINE = re.compile(r"\b((?:data|model)\.[a-z_]+): (\{[^{}]*\}|\[(?:\"[^\"]*\"|[^\[\]\"])*\]|[\w-]+(?![\w/-]|\.\w))")
PAIR = re.compile(r"`([^`]+)` with `([^`]+)`")
CHOSEN = ("data.template", "model.new_tokens", "data.layers")
"""Keys that fit a template to rows. Others decide what the model learns to write, and are asked for."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Suited:
    """`settings`: key → value to set, such as {"data.template": "chatml-tools"}; `why`: the refusal that each is for.

    `answers`: settings of which one is needed besides and nobody else can choose; `question`: the refusal they answer.
    `tokenizer`: with the template in use; None where it could not be loaded.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    answers: tuple[Settings, ...] = ()
    question: str = ""
    tokenizer: Any = None

    def lines(self, section: str) -> Iterator[str]:
        """Of a config's section: what is set and why, and the question with its answers to choose from."""
        for key, value in self.settings.items():
            if key.startswith(f"{section}."):
                yield said(f"  {key.partition('.')[2]}: {flow(value)}", f"else: {cut(self.why[key], 150)}")
        if section != "data" or not self.question:
            return
        yield (
            f"  # A row needs a choice: {cut(self.question, 200)}"
            if self.answers
            else (f"  # Some rows are refused: {cut(self.question, 200)}")
        )
        for number, answer in enumerate(self.answers):
            lines = [f"{key.partition('.')[2]}: {flow(value)}" for key, value in answer.items()]
            yield f"  # {'choose' if not number else 'or'}  {'  and  '.join(lines)}"

    def troubles(self) -> Iterator[str]:
        """What the console says of it."""
        if self.answers:
            told = "; or ".join(
                " with ".join(f"{key}: {flow(value)}" for key, value in answer.items()) for answer in self.answers
            )
            yield f"one thing is yours to choose, {told}, since {cut(self.question, 200)}"
        elif self.question:
            yield f"some rows are refused: {cut(self.question, 300)}"


def suit(model: str, template: str, samples: Sequence[Conversation], seconds: float = RENDER_SECONDS) -> Suited:
    """Settings with which every kind of these conversations trains, as far as their refusals name them.

    None are looked for where a template takes more than `seconds` for a few rows.
    """
    rows = some_of_each_kind(samples)
    settings: dict[str, Any] = {}
    why: dict[str, str] = {}
    first = refusals(model, template, settings, rows, seconds)
    if first is None:
        return Suited()
    tokenizer, told = first
    for _ in range(ROUNDS):
        if not told:
            break
        tried = [
            (named, refusals(model, template, {**settings, **named}, rows, seconds))
            for named in named_settings(told[0])
        ]
        worked = [(named, *found) for named, found in tried if found is not None and len(found[1]) < len(told)]
        if not worked:
            break
        best = min(worked, key=lambda found: len(found[2]))
        if not set(best[0]) <= set(CHOSEN):
            answers = tuple(named for named, _, left in worked if len(left) == len(best[2]))
            return Suited(settings, why, answers, told[0], tokenizer)
        settings, why = {**settings, **best[0]}, {**why, **dict.fromkeys(best[0], told[0])}
        _, tokenizer, told = best
    return Suited(settings, why, (), told[0] if told else "", tokenizer)


def some_of_each_kind(samples: Iterable[Conversation]) -> list[Conversation]:
    """A few conversations of each kind, however late it comes: by roles, tools, calls, reasoning, and blanks."""
    seen: Counter[Any] = Counter()
    chosen = []
    for sample in samples:
        kind = (
            bool(sample.tools),
            frozenset((m.role, bool(m.content.strip()), *sorted(m.extra)) for m in sample.messages),
        )
        seen[kind] += 1
        if seen[kind] <= OF_EACH_KIND and len(seen) <= 64:
            chosen.append(sample)
    return chosen


def refusals(
    model: str, template: str, settings: Settings, rows: Sequence[Conversation], seconds: float
) -> tuple[Any, list[str]] | None:
    """(The tokenizer, why rows are refused under these settings); None where they cannot be loaded."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": model},
        "data": {"train": "rows", "template": template, "max_tokens": 10**9},
    }
    for key, value in settings.items():
        section, _, name = key.partition(".")
        raw[section][name] = value
    try:
        config = Config.model_validate(raw)
        bundle = load_bundle(config)
        encoder = Encoder(bundle, encode_settings(config.data))
        with deadline(seconds, "the chat template"):
            encoded = encoder.encode_batch(rows)
    except (SftError, ValueError, OSError):
        return None
    return bundle.tokenizer, [note.detail for row in encoded for note in row.notes if note.action == "refused"]


def named_settings(refusal: str) -> list[dict[str, Any]]:
    """What a refusal names as lines to paste, each a setting; two of one where it says they go together."""
    texts = [" ".join(pair) for pair in PAIR.findall(refusal)]
    lines = [[(key, value)] for key, value in LINE.findall(PAIR.sub("", refusal))]
    found = []
    for pairs in [*lines, *(LINE.findall(text) for text in texts)]:
        try:
            found.append({key: parse_plain(value) for key, value in pairs})
        except SftError:
            continue
    return found


def said(line: str, why: str) -> str:
    return f"{line:<30} # {why}" if len(line) <= 30 else f"{line}  # {why}"


def one_line(text: str) -> str:
    """Without control characters, since it goes into a comment."""
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]+", " ", text)


def cut(text: str, width: int = 90) -> str:
    line = one_line(text[: 10 * width]).strip()
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
