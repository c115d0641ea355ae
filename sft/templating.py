"""Chat templates as text: rendered in transformers' own sandbox, with a pinned clock and a bound on time and size.

Nothing here knows tokens. `render` gives what `apply_chat_template(tokenize=False)` gives, which the tests compare.
"""

from __future__ import annotations

import json
import mmap
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sft.errors import SftError, TemplateError

RENDER_SECONDS = 30.0  # a row, or a batch of them; a chat of a hundred thousand turns takes a few
RENDER_BYTES = 2 << 30  # of address space that rendering may take; a row of five megabytes takes some dozens
MAX_CHARACTERS = 128 << 20

Limits = tuple[int, int]
rendering: ContextVar[tuple[Limits, Limits] | None] = ContextVar("rendering", default=None)
"""Limits (soft, hard) of the address space of this process: while a template renders, and else."""

Messages = Sequence[Mapping[str, Any]]

_OURS = "It is decided by what is trained: remove it"
RESERVED: dict[str, str] = {
    "messages": "Give the messages as the row's own", "conversation": "Give the messages as the row's own",
    "conversations": "Give the messages as the row's own", "tools": "Give them as `tools` beside the messages",
    "chat_template": "Set data.template, which holds for all rows",
    **dict.fromkeys(
        ("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
         "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
         "sanitize_control_tokens", "raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token",
         "unk_token", "sep_token", "cls_token", "mask_token"), _OURS,
    ),
}  # fmt: skip
"""Names of `apply_chat_template` and of its sandbox that no template argument may take, each with the cure."""


class TemplateTimeout(SftError):
    """A template ran longer than any conversation can need."""


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise TemplateTimeout in the block after `seconds`, and bound the memory of what it renders.

    Does nothing outside a main thread, where no signal arrives. A signal is heard between two steps of Python; one step
    that would take long (`'a' * 10 ** 11`) takes memory as well, and fails for want of it. A timer of somebody else
    (pytest-timeout's) is put back with what is left of its time.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    import resource

    def ring(signum: int, frame: object) -> None:
        raise Rung

    handler = signal.signal(signal.SIGALRM, ring)
    started, limits = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should a finaliser swallow the first
    tight = tighter(limits)
    token = rendering.set(tight)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            rendering.reset(token)
            if tight is not None:  # else nothing was limited, and macOS may refuse its own limits
                resource.setrlimit(resource.RLIMIT_AS, limits)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
    except Rung:
        detail = f"{what} ran longer than {seconds:g} s and was stopped. Look for a loop without end."
        raise TemplateTimeout(detail) from None


class Rung(BaseException):
    """The time is up. No Exception, since Jinja drops those that come while it computes a template's constants."""


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE


def tighter(limits: Limits) -> tuple[Limits, Limits] | None:
    """Limits that leave RENDER_BYTES to rendering, and those to go back to; None where the system tells no size."""
    if not Path("/proc/self/statm").exists():
        return None
    most = min(limit for limit in (address_space() + RENDER_BYTES, *limits) if limit >= 0)  # -1: unlimited
    return (most, limits[1]), limits


def limit_address_space(limits: Limits) -> None:
    """Allocations beyond it fail with MemoryError."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, limits)


def pin_clock(template: str, now: datetime) -> str:
    """The template with `strftime_now` answering `now` for ever.

    A macro of that name shadows the function of the sandbox, so no library is patched and the text stays a template.
    """
    if "strftime_now" not in template:
        return template
    codes = ["%-d", "%-m", "%-H", "%-I", "%-M", *(f"%{c}" for c in "aAbBcdHIjmMpSUwWxXyYZzDFTehGuVfR")]
    replaced = "format" + "".join(f"|replace({code!r}, {now.strftime(code)!r})" for code in codes)
    return "{% macro strftime_now(format) %}{{ " + replaced + " }}{% endmacro %}\n" + template


@dataclass(frozen=True)
class MarkedText:
    """A rendered text. `marks`: [start, end) of what the template marks as generated; None where it has no markers.

    `starts`: where each message begins; None where that isn't known.
    """

    text: str
    marks: tuple[tuple[int, int], ...] | None = None
    starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ChatTemplate:
    """A template, the one for conversations with tools where the model has two, and the variables both are given."""

    text: str
    with_tools: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    parts: bool = False
    """Whether it reads content as a list of parts, as templates of models that see do."""
    json_arguments: bool = False
    """Whether it reads the arguments of tool calls as JSON text and not as objects."""

    def given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as this template reads it."""
        message = in_parts(message) if self.parts else dict(message)
        return with_json_arguments(message) if self.json_arguments else message

    def render(
        self,
        conversations: Sequence[Messages],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool,
        template: str | None = None,
    ) -> list[str]:
        """The text of each list of messages. Raises TemplateError with what the template itself objects to.

        `template` renders another text in its place, with the same variables.
        """
        return self._rendered(conversations, tools, generation_prompt, template, marks=False)[0]

    def render_marked(
        self, conversations: Sequence[Messages], tools: Sequence[Mapping[str, Any]] = (), template: str | None = None
    ) -> list[MarkedText]:
        """`render` without a generation prompt, with what stands in `{% generation %}` blocks. Raises TemplateError."""
        texts, marks = self._rendered(conversations, tools, False, template, marks=True)
        return [MarkedText(text, tuple(sorted(found))) for text, found in zip(texts, marks, strict=True)]

    def _rendered(
        self, conversations: Sequence[Messages], tools: Sequence[Mapping[str, Any]], generation_prompt: bool,
        template: str | None, *, marks: bool,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:  # fmt: skip
        from transformers.utils.chat_template_utils import render_jinja_template

        template = template or (self.with_tools if tools else self.text)
        limits = rendering.get()
        try:
            if limits:
                limit_address_space(limits[0])
            rendered: Any = render_jinja_template(
                conversations=[list(map(self.given, messages)) for messages in conversations],
                tools=list(map(dict, tools)) or None,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.variables,
            )
        except (TemplateError, TemplateTimeout):
            raise
        except Exception as error:  # a template may raise anything: it is a program
            raise TemplateError(describe(error)) from error
        finally:
            if limits:
                limit_address_space(limits[1])
        texts: list[str] = rendered[0]
        for text in texts:
            if len(text) > MAX_CHARACTERS:
                raise TemplateError(f"the template renders {len(text)} characters, more than {MAX_CHARACTERS} allowed")
        return texts, rendered[1]


def texts_or_none(
    chat: ChatTemplate, conversations: Sequence[tuple[Messages, Sequence[Mapping[str, Any]]]], seconds: float
) -> list[str | None]:
    """The text of each (messages, tools) of a strange template; None of those that it refuses, whatever it raises.

    Raises TemplateTimeout where all of them together take longer than `seconds`.
    """

    def text(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return chat.render([messages], tools, generation_prompt=False)[0]
        except TemplateError:
            return None

    with deadline(seconds, "the chat template"):
        return [text(messages, tools) for messages, tools in conversations]


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose text is a list with one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message


def describe(error: Exception) -> str:
    """One line about an exception that a template raised."""
    line = getattr(error, "lineno", None)
    where = f" (line {line} of the template)" if line else ""
    name = type(error).__name__
    if isinstance(error, MemoryError):
        return f"it takes more than {RENDER_BYTES >> 30} GiB of memory"
    text = str(error).strip() or "no message"
    return f"{text}{where}" if name == "TemplateError" else f"{name}: {text}{where}"


def parse(template: str) -> Any:
    """The syntax tree, as the sandbox reads it. Raises TemplateError with the line of a mistake."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = jinja2.Environment(  # never renders, only parses
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    try:
        return environment.parse(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {describe(error)}") from error
    except RecursionError as error:
        raise TemplateError("the chat template nests too deep") from error


def reads(template: str) -> frozenset[str]:
    """The variables that a template looks up."""
    from jinja2 import nodes

    return frozenset(node.name for node in parse(template).find_all(nodes.Name) if node.ctx == "load")


def literals(template: str) -> str:
    """All text and string constants of a template, each on its own behind a zero character."""
    from jinja2 import nodes

    tree = parse(template)
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    found += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(found)


def read_markup(template: str) -> str:
    """The string constants by which a template looks into a message (`'</think>' in content`, `.split('</think>')`)."""
    from jinja2 import nodes

    found: list[str] = []
    for node in parse(template).find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(node, nodes.Compare):
            looks = any(operand.op in ("in", "notin") for operand in node.ops)
            parts = [node.expr] if looks else []
        elif isinstance(node, nodes.Call):
            parts = list(node.args) if isinstance(node.node, nodes.Getattr) else []
        else:
            parts = list(node.args) if node.name in ("replace", "split") else []
        found += [c.value for part in parts for c in own_constants(part) if isinstance(c.value, str)]
    return "\0".join(found)


def own_constants(node: Any) -> list[Any]:
    from jinja2 import nodes

    return [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))


def generation_markers(template: str) -> Literal["absent", "placed", "unplaced"]:
    """Whether a template has `{% generation %}` markers, and whether transformers can say where they stand.

    It counts the characters written before a marker, which is wrong where they are still held back: in macros, in
    `set` and `filter` blocks, in recursive loops, within another marker.
    """
    from jinja2 import nodes

    def seen(node: Any, straight: bool) -> Iterator[bool]:
        for child in node.iter_child_nodes():
            if isinstance(child, nodes.Scope):
                yield straight
            kept = isinstance(child, nodes.If | nodes.With) or (isinstance(child, nodes.For) and not child.recursive)
            yield from seen(child, straight and kept)

    found = list(seen(parse(template), True))
    return "absent" if not found else "placed" if all(found) else "unplaced"
