"""Instructions that a template would lose: roles that it leaves out silently, and `data.roles`, which renames them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft.data.proof import Refusal, shown
from sft.errors import TemplateError
from sft.templating import RENDER_SECONDS, ChatTemplate, TemplateTimeout, deadline
from sft.types import Conversation, Message, Sample

Roles = Mapping[str, str | None]
INSTRUCTING = ("system", "developer")
PROBE = "celesta setting"


def with_roles(sample: Sample, roles: Roles) -> Sample:
    """A conversation whose messages have the roles that `data.roles` gives them; those without one are left out."""
    if not roles or not isinstance(sample, Conversation):
        return sample
    kept, context = list[Message](), 0
    for place, message in enumerate(sample.messages):
        role = roles.get(message.role, message.role)
        if role is not None:
            kept.append(replace(message, role=role))  # type: ignore[arg-type]
            context += place < sample.context
    return replace(sample, messages=tuple(kept), context=context)


def lost_roles(chat: ChatTemplate) -> frozenset[str]:
    """Of `INSTRUCTING`, those whose messages the template takes and does not print."""
    return frozenset(role for role in INSTRUCTING if prints_role(chat, role) is False)


def prints_role(chat: ChatTemplate, role: str) -> bool | None:
    """Whether the template prints what an opening message of that role says; None where it objects to one."""
    messages = [{"role": role, "content": PROBE}, {"role": "user", "content": "question"},
                {"role": "assistant", "content": "answer"}]  # fmt: skip
    try:
        with deadline(RENDER_SECONDS, "the chat template"):
            return PROBE in chat.render([messages], generation_prompt=False)[0]
    except (TemplateError, TemplateTimeout):
        return None


def check_roles(messages: Sequence[Mapping[str, Any]], lost: frozenset[str], chat: ChatTemplate) -> None:
    """Raises Refusal for a message that the template would leave out of every prompt, with the keys that settle it."""
    for place, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role in lost and isinstance(content, str) and content.strip():
            renamed = role == "developer" and prints_role(chat, "system")
            cure = "To give it as a system message, set data.roles: {developer: system}. " if renamed else ""
            raise Refusal(
                "message_left_out",
                f"message {place}: the template prints no {role} message, so {shown(content)} would be lost. {cure}"
                f"To leave such messages out, as it does, set data.roles: {{{role}: null}}.",
            )
