"""What a template's own `{% generation %}` markers say of a turn, held against the answer that serving would see.

The proven answer (behind the served prompt, through the stop token) bounds what is trained: markers can only take away
from it. What they leave out the author does not want trained, so it is not; what they hold besides (a header that
serving supplies, text behind the stop token) is not trained either; the stop token always is. Positions are characters
of a rendered text until `token_ranges` makes them tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.data.control import unmark
from sft.data.proof import TELLING, Decoder, Refusal, shown
from sft.templating import MarkedText
from sft.types import Conversation, Note

Stretch = tuple[int, int]
LEFT_OUT, CORRECTED = "left_out_by_markers", "markers_corrected"
UNMARKED = "the template's generation markers leave out every turn that would be trained"
LOOKED_AT = 32  # messages and stretches that are searched for words marked elsewhere; a template errs in every row


@dataclass(frozen=True)
class Marking:
    """The markers around one answer. `inside`: marked stretches of it; `outside`: what they hold beside it."""

    inside: tuple[Stretch, ...]
    outside: str

    def covers(self, answer: str) -> bool:
        """Whether the answer is marked, and nothing else."""
        return self.inside == ((0, len(answer)),) and not self.outside


def marking(whole: MarkedText, start: int, answer: str) -> Marking | None:
    """How the marks lie to the answer that begins at `start`. An empty stretch counts: it marks an empty answer."""
    if whole.marks is None:
        return None
    text, marks, end = whole.text, whole.marks, start + len(answer)
    first = bisect_left(marks, start, key=lambda mark: mark[1])
    inside: list[Stretch] = []
    outside = ""
    for low, high in marks[first:]:
        if low > end or (low == end and answer) or (high == start and low < high):
            if low > end:
                break
            continue
        inside.append((max(low, start) - start, min(high, end) - start))
        outside += text[low:start] if low < start else ""
        outside += text[end:high] if high > end else ""
    return Marking(tuple(inside), outside.strip())


def behind_lead(found: Marking | None, length: int) -> Marking | None:
    """The markers around an answer before which stands a text of so many characters that they do not know."""
    if found is None or not length or not found.inside:
        return found
    inside = [(low + length, high + length) for low, high in found.inside]
    first = inside[0] if inside[0][0] > length else (0, inside[0][1])
    inside = [first, *inside[1:]] if first[0] == 0 else [(0, length), *inside]
    return Marking(tuple(inside), found.outside)


@dataclass(frozen=True)
class MarkedTurn:
    """Whether a turn is trained, what of its answer is not (as `piece.texts` has it), and what is to be said."""

    trained: bool
    untrained: list[Stretch]
    notes: tuple[Note, ...] = ()


def marked_turn(found: Marking, answer: str, stop: str, index: int, sample: Conversation) -> MarkedTurn:
    """The rule. `stop`: the stop token with which the answer ends, empty where the template writes none.

    A message's own `train: true` outweighs that its turn isn't marked at all; it is trained whole then.
    """
    body, which = answer.removesuffix(stop), f"message {index}: the template's generation markers"
    if not found.inside:
        if sample.messages[index].train:
            return MarkedTurn(True, [])
        return MarkedTurn(False, [], (Note(sample.source, "altered", LEFT_OUT, f"{which} leave the turn out"),))
    untrained = unmarked_stretches(body, found.inside)
    notes = []
    if untrained:
        low, high = untrained[0]
        said = f"{which} leave {shown(body[low:high])} out, and it is not trained"
        notes.append(Note(sample.source, "altered", LEFT_OUT, said))
    faults = [f"lack {stop}, which is trained all the same"] if found.inside[-1][1] < len(answer) and stop else []
    faults += [f"hold {shown(found.outside)} beside the answer, which is not trained"] if found.outside else []
    if faults:
        notes.append(Note(sample.source, "altered", CORRECTED, f"{which} {', and '.join(faults)}"))
    return MarkedTurn(True, [(len(unmark(body[:a])), len(unmark(body[:b]))) for a, b in untrained], tuple(notes))


def unmarked_stretches(body: str, inside: Sequence[Stretch]) -> list[Stretch]:
    """What the markers leave out of an answer without its stop token. Blanks alone are no words that one leaves out."""
    found, last = [], 0
    for low, high in [*inside, (len(body), len(body))]:
        low = min(low, len(body))
        if body[last:low].strip():
            found.append((last, low))
        last = max(last, high)
    return found


def token_ranges(ids: Sequence[int], text: str, stretches: Sequence[Stretch], decoder: Decoder) -> list[Stretch]:
    """The tokens that lie wholly in the stretches of their text; one that reaches out of a stretch is not among them.

    Raises Refusal where the beginnings of the ids do not decode to beginnings of the text.
    """

    def reached(number: int) -> int:
        """Characters of the text that the first tokens hold; a character in pieces counts with its last one."""
        decoded = decoder([ids[:number]])[0] if number else ""
        if text.startswith(decoded):
            return len(decoded)
        return next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), len(text))

    places = range(len(ids) + 1)
    if reached(len(ids)) < len(text):
        raise Refusal(
            "unprovable",
            f"the template's generation markers leave out a part of {shown(text)}, and the tokenizer does not say "
            "which tokens that is. Take the markers out of the template (data.template: a .jinja file).",
        )
    found = []
    for low, high in stretches:
        first, last = bisect_left(places, low, key=reached), bisect_left(places, high, key=reached)
        last -= reached(last) > high
        if first < last:
            found.append((first, last))
    return found


def check_marked(whole: MarkedText, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises Refusal where the markers stand around another's words than the assistant's."""
    stretches = [whole.text[low:high].strip() for low, high in (whole.marks or ())[:LOOKED_AT]]
    marked = "\0".join(stretches)
    for index, message in enumerate(messages[:LOOKED_AT]):
        words = "" if message["role"] == "assistant" else str(message.get("content") or "").strip()
        if not words or words not in marked:
            continue
        if len(words) < TELLING and words not in stretches:
            continue
        if not any(words in own for m in messages if m["role"] == "assistant" for own in strings(m)):
            stretch = next(stretch for stretch in stretches if words in stretch)
            raise Refusal(
                "marked_elsewhere",
                f"the template's generation markers stand around message {index} ({message['role']}): "
                f"{shown(stretch)}. Correct them, or take them out (data.template: a .jinja file).",
            )


def strings(value: Any) -> Iterator[str]:
    """All strings in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
