"""Cures of a refused row that were tried on it, and work: keys of `data`, arguments of the template, names in the row.

A cure is named as the line to paste. Each kind of row (its roles, tools and reasoning) is tried once a process, for
some seconds at most; rows of the same kind are told the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from sft.data.joined import MERGE, merge_layers
from sft.data.outcome import Encoded
from sft.data.proof import OWN_TOOLS, REASONING_FIELDS, TOOL_TEMPLATES, Refusal, shown
from sft.data.reasoning import Choice
from sft.data.thoughts import NAMES, reasoning_of
from sft.data.trials import Candidate, Trials
from sft.templating import parse
from sft.types import Conversation, Message, Sample

KINDS = 16  # kinds of rows that are tried
MOST = 3  # cures named
OWN = ("messages", "tools", "documents", "add_generation_prompt")
OF_LAYERS = ("template", "layer_left_out", "message_left_out")
OF_REASONING = ("not_after_prompt", "reasoning_left_out", "header_trained")
EXPLAINED: dict[str, str] = {
    "train": "its reasoning is trained",
    "context": "its reasoning stays, and is not trained",
    "drop": "its reasoning is left out",
    "close": "the answer closes the block first: the model is taught to answer without thinking",
}
MERGED = Candidate((f"data.layers: {MERGE}",), {"layers": MERGE})


class Cures:
    """Names cures."""

    def __init__(self, trials: Trials) -> None:
        self.trials, self.settings = trials, trials.settings
        self.told: dict[tuple[Any, ...], str] = {}

    def of(self, sample: Sample, refusal: Refusal) -> Refusal:
        """The refusal with what was found to work for the row."""
        reason = refusal.reason
        if not isinstance(sample, Conversation) or self.trials.bundle.chat is None:
            return refusal
        if reason not in OF_REASONING and (reason not in OF_LAYERS or not (merges(sample) or "left_out" in reason)):
            return refusal
        kind = (reason, bool(sample.tools), repr(sample.template_args), *map(kind_of, sample.messages))
        if kind not in self.told:
            if len(self.told) >= KINDS:
                return refusal
            self.told[kind] = self.found(sample, reason)
        said = str(refusal)
        return Refusal(reason, f"{said.rstrip('.')}. {self.told[kind]}" if self.told[kind] else said)

    def found(self, sample: Conversation, reason: str) -> str:
        """A sentence with the cures that work for a row, those that change least first."""
        cures = list(self.in_rows(sample)) if reason == "reasoning_left_out" else []
        seen: list[Any] = []
        complete = True
        for candidate in self.candidates(sample, reason):
            if len(cures) == MOST or (cures and len(candidate.lines) > 1):
                break
            if self.trials.left <= 0:
                complete = False
                break
            result = self.trials.encoded(sample, candidate)
            if result is None:
                continue
            made = [(e.input_ids_T.tolist(), e.weights_T.tolist()) for e in result.examples]
            if made not in seen:
                seen.append(made)
                lines = " with ".join(f"`{line}`" for line in candidate.lines)
                cures.append(f"{lines} ({self.explained(candidate, result)})")
        if cures:
            return f"What works for it, as tried: {'; or '.join(cures)}."
        return self.nothing(sample, reason) if complete else ""

    def nothing(self, sample: Conversation, reason: str) -> str:
        """What is left to do where nothing works."""
        if reason == "template":
            return ""
        if reason in OF_LAYERS:
            return (
                "Choose a template that prints such messages at this place (data.template: the path of a .jinja file), "
                "or remove the message."
            )
        keys = ["data.reasoning", *(["data.layers"] if merges(sample) else [])]
        names = ", ".join(name for name, _ in self.arguments())
        tried = " and ".join([*keys, *([f"the template's arguments ({names})"] if names else [])])
        if sample.tools or any(message.extra.get("tool_calls") for message in sample.messages):
            tools = OWN_TOOLS if self.trials.bundle.own_prints_tools else TOOL_TEMPLATES
            return f"No value of {tried} works for it, as tried. The row has tools. {tools}"
        return f"No value of {tried} works for it, as tried. Choose another data.template."

    def in_rows(self, sample: Conversation) -> Iterator[str]:
        """Whether reasoning comes through where the content spells it. Other names are read anyway."""
        within = with_reasoning_within(sample)
        if within is not sample and self.trials.encoded(within) is not None:
            yield "the reasoning in the content, as <think>…</think>"

    def explained(self, candidate: Candidate, result: Encoded) -> str:
        choice = candidate.settings.get("reasoning", self.settings.reasoning)
        if candidate.settings == MERGED.settings and not candidate.arguments:
            return "system and developer messages are joined into one, and are to be served so"
        if candidate.arguments and choice != "context":
            example = result.examples[-1]
            prompt = example.input_ids_T[: int((example.weights_T > 0).argmax())].tolist()
            text = self.trials.bundle.tokenizer.decode(prompt[-24:])
            return f"prompts then end with {shown(text[-40:])}"
        if choice == "close" and not any(note.reason == "reasoning_closed" for note in result.notes):
            return "the rest as the template renders it"
        return EXPLAINED[choice or "train"]

    def candidates(self, sample: Conversation, reason: str) -> Iterator[Candidate]:
        """Settings in the order of least change: of what is trained, of what is served, of both."""
        now = self.settings.reasoning
        reasons = any(reasoning_of(message.as_dict()) for message in sample.messages)
        order: tuple[Choice, ...] = ("train", "context", "drop", "close") if reasons else ("close", "drop")
        choices = [
            Candidate((f"data.reasoning: {choice}",), {"reasoning": choice}) for choice in order if choice != now
        ]
        served = [self.with_argument(name, value) for name, values in self.arguments() for value in values]
        merged = [MERGED] if self.settings.layers != MERGE and merges(sample) else []
        yield from merged if reason in OF_LAYERS else ()
        if reason in OF_REASONING:
            yield from choices
            yield from served
        for pair in ((merged, choices), (merged, served), (choices, served)):
            yield from (one | other for one, other in product(*pair))

    def with_argument(self, name: str, value: Any) -> Candidate:
        given = {**self.settings.template_args, name: value}
        line = f"data.template_args: {{{', '.join(f'{k}: {flow(v)}' for k, v in given.items())}}}"
        return Candidate((line,), {}, {name: value})

    def arguments(self) -> list[tuple[str, list[Any]]]:
        chat = self.trials.bundle.chat
        assert chat is not None
        given = self.settings.template_args
        found = {name: values for text in dict.fromkeys((chat.text, chat.with_tools))
                 for name, values in template_arguments(text)}  # fmt: skip
        return [(name, [v for v in values if name not in given or given[name] != v]) for name, values in found.items()]


def merges(sample: Conversation) -> bool:
    """Whether joining its layers changes a row."""
    return merge_layers(sample) is not sample


def with_reasoning_within(sample: Conversation) -> Conversation:
    """The row with the reasoning of its answers in their content; itself if none stands beside it."""
    messages = [moved(message) if message.role == "assistant" else message for message in sample.messages]
    same = all(a is b for a, b in zip(messages, sample.messages, strict=True))
    return sample if same else replace(sample, messages=tuple(messages))


def moved(message: Message) -> Message:
    thoughts = next((message.extra[field] for field in REASONING_FIELDS if message.extra.get(field)), None)
    if not isinstance(thoughts, str) or not thoughts.strip():
        return message
    rest = {key: value for key, value in message.extra.items() if key not in REASONING_FIELDS}
    return replace(message, content=f"<think>\n{thoughts.strip()}\n</think>\n\n{message.content}", extra=rest)


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
