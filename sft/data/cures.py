"""Cures of a refused row that were tried on it, and work: values of `data.reasoning` and arguments of the template.

A cure is named as the line to paste. Each kind of row (its roles, tools and reasoning) is tried once a process, for
some seconds at most; rows of the same kind are told the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, get_args

from sft.data.outcome import Encoded, EncodeSettings
from sft.data.proof import Refusal, shown
from sft.data.reasoning import Choice
from sft.data.thoughts import NAMES, reasoning_of
from sft.errors import SftError
from sft.templating import parse
from sft.types import Conversation, Sample

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle

CURABLE = ("not_after_prompt", "reasoning_left_out", "header_trained")
SECONDS, KINDS = 8.0, 16  # all trying in one process, and kinds of rows that are tried
MOST = 3  # cures named
OWN = ("messages", "tools", "documents", "add_generation_prompt")
EXPLAINED: dict[str, str] = {
    "train": "its reasoning is trained",
    "context": "its reasoning stays, and is not trained",
    "drop": "its reasoning is left out",
    "close": "the answer closes the block first: the model is taught to answer without thinking",
}


class RowEncoder(Protocol):
    def encode_batch(self, samples: Sequence[Sample]) -> list[Encoded]: ...


@dataclass(frozen=True)
class Candidate:
    """Settings to try, as the lines that a config would have."""

    lines: tuple[str, ...]
    reasoning: Choice | None
    arguments: Mapping[str, Any]


class Cures:
    """Tries cures with encoders that `make` builds."""

    def __init__(
        self, bundle: TokenizerBundle, settings: EncodeSettings,
        make: Callable[[TokenizerBundle, EncodeSettings], RowEncoder],
    ) -> None:  # fmt: skip
        self.bundle, self.settings, self.make = bundle, settings, make
        self.encoders: dict[tuple[str, ...], RowEncoder | None] = {}
        self.told: dict[tuple[Any, ...], str] = {}
        self.left = SECONDS

    def of(self, sample: Sample, refusal: Refusal) -> Refusal:
        """The refusal with what was found to work for the row."""
        if refusal.reason not in CURABLE or not isinstance(sample, Conversation) or self.bundle.chat is None:
            return refusal
        kind = (refusal.reason, bool(sample.tools), *map(kind_of, sample.messages))
        if kind not in self.told:
            if len(self.told) >= KINDS:
                return refusal
            self.told[kind] = self.found(sample)
        return Refusal(refusal.reason, f"{refusal} {self.told[kind]}".strip())

    def found(self, sample: Conversation) -> str:
        """A sentence with the cures that work for a row, those that change least first."""
        cures: list[str] = []
        seen: list[Any] = []
        began, complete = time.monotonic(), True
        for candidate in self.candidates(any(reasoning_of(message.as_dict()) for message in sample.messages)):
            if len(cures) == MOST or (cures and len(candidate.lines) > 1):
                break
            if time.monotonic() - began > self.left:
                complete = False
                break
            result = self.tried(candidate, sample)
            if result is None or not result.examples:
                continue
            made = [(e.input_ids_T.tolist(), e.weights_T.tolist()) for e in result.examples]
            if made not in seen:
                seen.append(made)
                lines = " with ".join(f"`{line}`" for line in candidate.lines)
                cures.append(f"{lines} ({self.explained(candidate, result)})")
        self.left = max(0.0, self.left - (time.monotonic() - began))
        if cures:
            return f"What works for it, as tried: {'; or '.join(cures)}."
        names = ", ".join(name for name, _ in self.arguments())
        tried = "data.reasoning" + (f" and the template's arguments ({names})" if names else "")
        return f"No value of {tried} works for it, as tried. Choose another data.template." if complete else ""

    def tried(self, candidate: Candidate, sample: Conversation) -> Encoded | None:
        if candidate.lines not in self.encoders:
            self.encoders[candidate.lines] = self.encoder(candidate)
        encoder = self.encoders[candidate.lines]
        return None if encoder is None else encoder.encode_batch([sample])[0]

    def encoder(self, candidate: Candidate) -> RowEncoder | None:
        assert self.bundle.chat is not None
        chat = replace(self.bundle.chat, variables={**self.bundle.chat.variables, **candidate.arguments})
        settings = replace(self.settings, reasoning=candidate.reasoning)
        try:
            return self.make(replace(self.bundle, chat=chat), settings)
        except SftError:
            return None

    def explained(self, candidate: Candidate, result: Encoded) -> str:
        if candidate.arguments and candidate.reasoning != "context":
            example = result.examples[-1]
            prompt = example.input_ids_T[: int((example.weights_T > 0).argmax())].tolist()
            text = self.bundle.tokenizer.decode(prompt[-24:])
            return f"prompts then end with {shown(text[-40:])}"
        if candidate.reasoning == "close" and not any(note.reason == "reasoning_closed" for note in result.notes):
            return "the rest as the template renders it"
        return EXPLAINED[candidate.reasoning or "train"]

    def candidates(self, reasons: bool) -> Iterator[Candidate]:
        """Settings in the order of least change: of what is trained, of what is served, of both. `reasons`: whether the
        row has reasoning."""
        now = self.settings.reasoning
        order: tuple[Choice, ...] = ("train", "context", "drop", "close") if reasons else ("close", "drop")
        choices = [choice for choice in order if choice != now]
        for choice in choices:
            yield Candidate((f"data.reasoning: {choice}",), choice, {})
        singles = []
        for name, values in self.arguments():
            for value in values:
                given = {**self.settings.template_args, name: value}
                line = f"data.template_args: {{{', '.join(f'{k}: {flow(v)}' for k, v in given.items())}}}"
                singles.append(({name: value}, line))
                yield Candidate((line,), now, {name: value})
        for arguments, line in singles:
            for choice in choices:
                yield Candidate((f"data.reasoning: {choice}", line), choice, arguments)

    def arguments(self) -> list[tuple[str, list[Any]]]:
        assert self.bundle.chat is not None
        texts = dict.fromkeys((self.bundle.chat.text, self.bundle.chat.with_tools))
        given = self.settings.template_args
        found = {name: values for text in texts for name, values in template_arguments(text)}
        return [(name, [v for v in values if name not in given or given[name] != v]) for name, values in found.items()]


def kind_of(message: Any) -> tuple[Any, ...]:
    """What of a message decides whether a cure works."""
    given = message.as_dict()
    return (message.role, bool(message.content.strip()), bool(given.get("tool_calls")), bool(reasoning_of(given)))


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    return json.dumps(value, ensure_ascii=False)


def template_arguments(template: str) -> list[tuple[str, list[Any]]]:
    """A template's own arguments that have to do with thinking, each with the values that it looks for."""
    from jinja2 import meta, nodes

    tree = parse(template)
    try:
        names = meta.find_undeclared_variables(tree)
    except Exception:  # a filter that only the renderer knows
        names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    found = []
    for name in sorted(name for name in names if name not in OWN and is_about_thinking(name)):
        constants: list[str | int | float] = []
        for node in tree.find_all(nodes.Compare):
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            if any(isinstance(side, nodes.Name) and side.name == name for side in sides):
                parts = [p for s in sides for p in ([s] if isinstance(s, nodes.Const) else s.find_all(nodes.Const))]
                values = [v for p in parts for v in (p.value if isinstance(p.value, list | tuple) else [p.value])]
                constants += [value for value in values if isinstance(value, str | int | float)]
        plain = [value for value in dict.fromkeys(constants) if not isinstance(value, bool)]
        found.append((name, plain or [False, True]))
    return found


def is_about_thinking(name: str) -> bool:
    return bool(NAMES.search(name)) or "effort" in name or name.endswith("mode")


assert set(EXPLAINED) == set(get_args(Choice))
