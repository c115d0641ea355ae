"""An example token by token, as it can be looked at: each piece with its text, its ids, its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.types import Example

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle

LONGEST_GROUP = 12  # tokens that one visible character may need
BROKEN = "\ufffd"  # what decoders write for bytes that are no whole character; some write nothing


@dataclass(frozen=True, slots=True)
class Piece:
    """The smallest run of tokens that has a text of its own: mostly one, several for an emoji cut in bytes."""

    text: str
    ids: tuple[int, ...]
    weight: float
    special: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One example, ready to be looked at. `data_source` is the path of its source in the config."""

    example: Example
    data_source: str
    text: str
    trained: tuple[str, ...]
    pieces: tuple[Piece, ...]
    control: tuple[str, ...] = ()
    """The texts of the tokenizer's control tokens, which ordinary tokens may spell."""

    @property
    def num_tokens(self) -> int:
        return len(self.example.input_ids_T)


def show(example: Example, data_source: str, bundle: TokenizerBundle) -> Shown:
    """Decodes an example: the whole, each contiguous trained span, and piece by piece."""
    ids = [int(token) for token in example.input_ids_T]
    text, *trained = texts_of(bundle.tokenizer, ids, [(0, len(ids)), *trained_spans(example)])
    control = tuple(t.content for t in bundle.tokenizer.added_tokens_decoder.values() if t.content.strip())
    return Shown(example, data_source, text, tuple(trained), tuple(pieces(example, bundle.tokenizer)), control)


def texts_of(tokenizer: Any, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[str]:
    """What each span [start, end) of the ids adds to the text before it.

    Decoded behind its neighbour, since alone some decoders (Llama 2's, Mistral's) strip its blank. Where the neighbour
    is a part of a character, the span is decoded alone.
    """
    sequences = [ids[max(0, start - 1) : end] for start, end in spans]
    fronts = [ids[max(0, start - 1) : start] for start, _ in spans]
    alone = [ids[start:end] for start, end in spans]
    decoded = _decode_all(tokenizer, [*sequences, *fronts, *alone])
    number = len(spans)
    texts = []
    for text, front, own in zip(decoded[:number], decoded[number : 2 * number], decoded[2 * number :], strict=True):
        texts.append(text[len(front) :] if text.startswith(front) and BROKEN not in front else own)
    return texts


def _decode_all(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> list[str]:
    """Nothing skipped, nothing cleaned up."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return list(backend.decode_batch([list(sequence) for sequence in sequences], skip_special_tokens=False))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(sequence, **options) for sequence in sequences]


def trained_spans(example: Example) -> list[tuple[int, int]]:
    """[start, end) of each contiguous run of trained tokens."""
    spans: list[tuple[int, int]] = []
    for position, weight in enumerate(example.weights_T):
        if weight <= 0:
            continue
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans


def pieces(example: Example, tokenizer: Any) -> Iterator[Piece]:
    """The tokens with their texts, which join to the text of the example.

    Tokens that only together make a character (bytes of an emoji) form one piece, unless they are weighed differently.
    """
    ids = [int(token) for token in example.input_ids_T]
    weights = [float(weight) for weight in example.weights_T]
    special = tokenizer.added_tokens_decoder
    texts = texts_of(tokenizer, ids, [(i, i + 1) for i in range(len(ids))])
    start = 0
    while start < len(ids):
        end, text = start + 1, texts[start]
        if BROKEN in text or (not text and ids[start] not in special):
            end, text = _whole_character(tokenizer, ids, weights, start) or (end, text)
        yield Piece(text, tuple(ids[start:end]), weights[start], ids[start] in special)
        start = end


def _whole_character(
    tokenizer: Any, ids: Sequence[int], weights: Sequence[float], start: int
) -> tuple[int, str] | None:
    """(end, text) of the shortest group from `start` that decodes to whole characters and is weighed alike."""
    special = tokenizer.added_tokens_decoder
    for end in range(start + 2, min(start + LONGEST_GROUP, len(ids)) + 1):
        if weights[end - 1] != weights[start] or ids[end - 1] in special:
            return None
        text = texts_of(tokenizer, ids, [(start, end)])[0]
        if text and BROKEN not in text:
            return end, text
    return None
