"""What becomes of a turn's reasoning under `data.reasoning`: what is context, and what is to be said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sft.data.control import unmark
from sft.data.proof import Refusal, left_out, shown
from sft.data.reasoning import Choice
from sft.data.render import Turn
from sft.data.thoughts import THINK_END, beginning, opens, reasoning_of
from sft.data.work import Work
from sft.types import Note

END = 96  # characters of a served prompt in which its end is looked for


def masked_note(source: str, message: int) -> Note:
    return Note(source, "altered", "reasoning_masked", f"message {message}: its reasoning is context and not trained")


def turn_notes(work: Work, turn: Turn, choice: Choice | None) -> list[Note]:
    """What is to be said of one turn. Raises Refusal where reasoning is asked for that the template leaves out."""
    source, k = work.sample.source, turn.message
    message, lead = work.messages[k], turn.lead
    if left_out(message, turn.answer):
        if choice in ("train", "context"):
            raise Refusal(
                "reasoning_left_out",
                f"message {k} has reasoning that the template does not render here, so that data.reasoning: {choice} "
                "cannot be done.",
            )
        return lead_notes(source, k, turn)  # whether that may be is for `layers` to say
    if lead is not None:
        return lead_notes(source, k, turn)
    if not work.renderer.blocks.names_reasoning:
        return []
    end = turn.prompt if turn.prompt_end is None else turn.whole[max(0, turn.prompt_end - END) : turn.prompt_end]
    if opens(end) and not reasoning_of(message):
        said = "the template closes the reasoning block that the served prompt opens"
        return [Note(source, "altered", "reasoning_closed", f"message {k} has no reasoning: {said}")]
    return []


def lead_notes(source: str, k: int, turn: Turn) -> list[Note]:
    lead = turn.lead
    if lead is None or lead.kind == "history":
        return []
    said = {
        "closed_block": f"the served prompt ends with {shown(lead.block)}, a closed block that the template leaves out "
        "before this answer; the answer follows the served prompt",
        "reasoning_closed": f"has no reasoning and closes the block that the served prompt opens with "
        f"{shown(lead.block)} before it answers",
        "reasoning_continued": f"its reasoning follows the served prompt, which opens {shown(lead.block)}; the "
        "template does not render the two so",
    }[lead.kind]
    return [Note(source, "altered", lead.kind, f"message {k}: {said}")]


def context_end(work: Work, turn: Turn) -> int:
    """Where the reasoning of an answer and the text that closes it end, in characters of the answer without marks.

    Raises Refusal where that cannot be told.
    """
    message = work.messages[turn.message]
    thoughts = reasoning_of(message)
    if not thoughts or left_out(message, turn.answer):
        return 0
    end = turn.lead.hidden if turn.lead is not None and turn.lead.hidden else None
    if end is None:
        end = rendered_end(work, turn, message, thoughts)
    return len(unmark(turn.answer[:end]))


def rendered_end(work: Work, turn: Turn, message: Mapping[str, Any], thoughts: str) -> int:
    k = turn.message
    place = turn.answer.find(thoughts)
    behind = turn.answer[place + len(thoughts) :]
    between = work.renderer.blocks.between(work.messages[:k], message, work.tools)
    written = None if between is None else beginning(behind, between)
    if written is None and (spelled := re.match(rf"\s*{THINK_END.pattern}\s*", behind)):
        written = spelled.group()
    if place >= 0 and written:
        return place + len(thoughts) + len(written)
    raise Refusal(
        "not_after_prompt",
        f"message {k}: data.reasoning: context asks for reasoning that is not trained, but where it ends in "
        f"{shown(turn.answer)} cannot be told.",
    )
