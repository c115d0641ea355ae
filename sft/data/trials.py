"""Rows tried under other settings than the config's, to find out which cures of a refusal work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from sft.data.outcome import Encoded, EncodeSettings
from sft.errors import SftError
from sft.types import Conversation, Sample

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle

SECONDS = 16.0  # of computing, for all trying in one process
NO_LIMIT = 10**9  # of tokens: a long row has its cures as well


class RowEncoder(Protocol):
    def encode_batch(self, samples: Sequence[Sample]) -> list[Encoded]: ...


@dataclass(frozen=True)
class Candidate:
    """What to try: settings of `data` and arguments of the template, with the lines that a config would have."""

    lines: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: Candidate) -> Candidate:
        return Candidate(
            (*self.lines, *other.lines), {**self.settings, **other.settings}, {**self.arguments, **other.arguments}
        )


UNCHANGED = Candidate(())


class Trials:
    """Tries rows with encoders that `make` builds, each once, for some seconds in all."""

    def __init__(
        self, bundle: TokenizerBundle, settings: EncodeSettings,
        make: Callable[[TokenizerBundle, EncodeSettings], RowEncoder],
    ) -> None:  # fmt: skip
        self.bundle, self.settings, self.make = bundle, settings, make
        self.encoders: dict[tuple[str, ...], RowEncoder | None] = {}
        self.left = SECONDS

    def encoded(self, sample: Conversation, candidate: Candidate = UNCHANGED) -> Encoded | None:
        """What a row gives under a candidate; None where it gives no examples."""
        began = time.process_time()
        if candidate.lines not in self.encoders:
            self.encoders[candidate.lines] = self.encoder(candidate)
        encoder = self.encoders[candidate.lines]
        found = None if encoder is None else encoder.encode_batch([sample])[0]
        self.left -= time.process_time() - began
        return found if found is not None and found.examples else None

    def encoder(self, candidate: Candidate) -> RowEncoder | None:
        assert self.bundle.chat is not None
        chat = replace(self.bundle.chat, variables={**self.bundle.chat.variables, **candidate.arguments})
        settings = replace(self.settings, max_tokens=NO_LIMIT, **candidate.settings)
        try:
            return self.make(replace(self.bundle, chat=chat), settings)
        except SftError:
            return None
