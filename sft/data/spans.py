"""The last proof of an example: what its trained tokens decode to, and that they end where serving stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.data.outcome import Piece
from sft.data.proof import Decoder, Refusal, shown
from sft.types import Rendered, Span

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle


class SpanProof:
    """Decodes trained spans. `ended`: whether each must end with a stop token."""

    def __init__(self, bundle: TokenizerBundle, decoder: Decoder, *, ended: bool) -> None:
        self.tokenizer, self.stops = bundle.tokenizer, frozenset(bundle.stop_ids)
        self.decoder, self.ended = decoder, ended

    def disproved(self, pieces: Sequence[Piece]) -> dict[int, Refusal]:
        """By the id() of a piece, why its spans are not what they claim. Decodes all spans in one call."""
        spans = [
            (piece, span, text)
            for piece in pieces
            for span, text in zip(piece.rendered.spans, piece.texts, strict=True)
        ]
        decoded = self.decoder([piece.rendered.input_ids[span.start : span.end] for piece, span, _ in spans])
        faults: dict[int, Refusal] = {}
        for (piece, span, expected), found in zip(spans, decoded, strict=True):
            fault = self.fault(piece.rendered, span, expected, found)
            if fault is not None:
                faults.setdefault(id(piece), fault)
        return faults

    def fault(self, rendered: Rendered, span: Span, expected: str, found: str) -> Refusal | None:
        """What is wrong with one span."""
        if self.ended and rendered.input_ids[span.end - 1] not in self.stops:
            last = self.tokenizer.convert_ids_to_tokens(rendered.input_ids[span.end - 1])
            return Refusal(
                "no_stop",
                f"message {span.message}: expected the trained span to end with a stop token, found {last!r}. "
                "Check that the template's end of turn is one token of the tokenizer.",
            )
        if self.decoder.same(found, expected):
            return None
        return Refusal(
            "unprovable",
            f"message {span.message}: expected the trained tokens to decode to {shown(expected)}, found "
            f"{shown(found)}. The tokenizer does not give this text back.",
        )
