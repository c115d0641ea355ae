"""The one composition: a sample → rendered, proven, tokenised, weighted, cut to length: examples, or why not.

Two ways lead from a conversation to examples. Where the ids of every served prompt are a prefix of the ids of the
whole conversation, and what follows is what serving would see answered, one sequence trains all turns. Else each
trained turn becomes an example of its own: the ids of the served prompt, then the answer, tokenised apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.align import Aligner, Cuts
from sft.data.control import OPEN, control_tokens, encode, encode_after, encode_batch, encode_marked, unmark
from sft.data.cures import Cures
from sft.data.joined import as_given
from sft.data.layers import Given, Layers
from sft.data.markers import UNMARKED, check_marked, marked_turn, token_ranges
from sft.data.masking import message_weights, token_weights, trained_turns
from sft.data.outcome import (
    Encoded,
    EncodeSettings,
    Piece,
    TooLong,
    cut_note,
    refused,
    spelled_note,
    too_long,
    unknown_notes,
    with_notes,
)
from sft.data.passage import encoded_passage
from sft.data.proof import Decoder, Refusal, check_characters, shown
from sft.data.reasoned import context_end, masked_note, turn_notes
from sft.data.render import Renderer, Turn, answer_check, framing, message_dicts
from sft.data.rendered import rendered_message, rendered_note
from sft.data.rowargs import ByArguments
from sft.data.shorten import is_too_long, last_turns
from sft.data.spans import SpanProof
from sft.data.spelling import marked, own_tokens, spelled_in
from sft.data.templatekeys import TemplateKeys
from sft.data.trials import Trials
from sft.data.work import Work, given_by
from sft.errors import DataError, TemplateError
from sft.templating import RENDER_SECONDS, TemplateTimeout, deadline, literals, read_markup
from sft.types import Conversation, Example, Float32Array, Note, Passage, Rendered, Sample, Span

if TYPE_CHECKING:
    from sft.tokenizer import TokenizerBundle

VERIFIED_ROWS = 8  # rows whose prompts are also encoded for real, to check the aligner on this tokenizer and template
LONG_CHAT = 16  # trained turns from which the last one is looked at first: too long there means too long


class Encoder:
    """Encodes samples with one tokenizer and one set of settings. A row never raises, but a missing template does."""

    def __init__(self, bundle: TokenizerBundle, settings: EncodeSettings, *, trial: bool = False) -> None:
        """`trial`: this one only finds out whether a cure works, and tries none itself."""
        self.cures = None if trial else Cures(Trials(bundle, settings, partial(Encoder, trial=True)))
        self.bundle, self.settings, self.tokenizer = bundle, settings, bundle.tokenizer
        self.stops = frozenset(bundle.stop_ids)
        self.stop_texts: list[str] = self.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids))
        chat = bundle.chat
        texts = dict.fromkeys((chat.text, chat.with_tools) if chat else ())
        written, read = "\0".join(map(literals, texts)), "\0".join(map(read_markup, texts))
        self.control = control_tokens(self.tokenizer, written, read, bundle.stop_ids, framing(chat) if chat else "")
        self._keys = TemplateKeys(chat) if chat else None
        self.renderers = ByArguments(self.made_for)
        if chat is not None:
            self.renderers({})
        self.aligner = Aligner(self.tokenizer)
        self.decoder = Decoder(self.tokenizer, bundle.stop_ids[0], self.control.everywhere)
        self.proof = SpanProof(bundle, self.decoder, ended=settings.train_on != "all")
        self.unverified = VERIFIED_ROWS

    @property
    def renderer(self) -> Renderer:
        """Of conversations without arguments of their own. TemplateError where the model has no template for them."""
        return self.renderers({})[0]

    def made_for(self, arguments: Mapping[str, Any]) -> tuple[Renderer, Layers]:
        """The renderer for rows with these template arguments, and what is known of its template. TemplateError."""
        chat = self.bundle.require_chat()
        chat = replace(chat, variables={**chat.variables, **arguments}) if arguments else chat
        allow = self.settings.control_tokens_in_text == "allow"
        made = Renderer(chat, answer_check(self.bundle, chat, self.control.everywhere, allow=allow),
                        self.settings.reasoning)  # fmt: skip
        return made, Layers(made)

    def named(self, sample: Sample) -> Sample:
        """The sample with the keys of its messages as the template names them, and notes about those it never reads."""
        return self._keys.read(sample) if self._keys and isinstance(sample, Conversation) else sample

    def encode(self, sample: Sample) -> Encoded:
        return self.encode_many([sample])[0]

    def encode_many(self, samples: Sequence[Sample]) -> list[Encoded]:
        """The same as `encode` of each, tokenised and decoded in batches.

        A row on which the template does not come to an end is refused, the others of its batch are not.
        """
        try:
            with deadline(RENDER_SECONDS, "the chat template"):
                return [self.shortened(s, e) for s, e in zip(samples, self.encode_batch(samples), strict=True)]
        except TemplateTimeout as error:
            if len(samples) == 1:
                return [refused(samples[0].source, Refusal("template", str(error)), self.settings)]
            return [self.encode(sample) for sample in samples]

    def shortened(self, sample: Sample, encoded: Encoded) -> Encoded:
        """What is too long, with the last turns that fit, where data.over_long asks for that."""
        if self.settings.over_long != "keep_turns" or isinstance(sample, Passage) or not is_too_long(encoded):
            return encoded
        return last_turns(sample, encoded, self.settings, lambda shorter: self.encode_batch([shorter])[0])

    def encode_batch(self, samples: Sequence[Sample]) -> list[Encoded]:
        """`encode_many` without a clock."""
        samples = [self.named(sample) for sample in samples]
        results: list[Encoded | None] = [None] * len(samples)
        works: dict[int, Work] = {}
        pieces: dict[int, list[Piece]] = {}
        notes: dict[int, list[Note]] = {}
        for i, sample in enumerate(samples):
            try:
                if isinstance(sample, Passage):
                    results[i] = self.encode_passage(sample)
                else:
                    works[i] = self.open(sample)
            except Refusal as refusal:
                results[i] = self.refuse(sample, refusal)
        self.tokenize([work for work in works.values() if not work.marked])
        for i, work in works.items():
            try:
                if work.marked:
                    work.ids = self.ids(work.whole)
                notes[i] = list(work.notes)
                pieces[i] = self.pieces(work, notes[i])
            except Refusal as refusal:
                results[i] = self.refuse(samples[i], refusal)
        faults = self.proof.disproved([piece for row in pieces.values() for piece in row])
        for i, row in pieces.items():
            results[i] = self.judged(samples[i], works[i], row, faults, notes[i])
        return [
            with_notes(result, sample.notes, self.settings)
            for result, sample in zip(results, samples, strict=True)
            if result is not None
        ]

    def refuse(self, sample: Sample, refusal: Refusal) -> Encoded:
        """The row refused, with the cures that were tried on it and work."""
        return refused(sample.source, self.cures.of(sample, refusal) if self.cures else refusal, self.settings)

    def judged(
        self, sample: Sample, work: Work, row: list[Piece], faults: Mapping[int, Refusal], notes: list[Note]
    ) -> Encoded:
        """The row's examples if its spans are proven. Turns that are not so in one sequence may be one by one."""
        fault = next((faults[id(piece)] for piece in row if id(piece) in faults), None)
        try:
            if fault is not None and work.turns:
                row = [self.apart(work, turn) for turn in work.turns]
                fault = next(iter(self.proof.disproved(row).values()), None)
            if fault is None:
                return self.close(work, row, notes)
        except Refusal as refusal:
            fault = refusal
        return self.refuse(sample, fault)

    def encode_passage(self, sample: Passage) -> Encoded:
        """A row without a template. Raises Refusal."""
        end = self.bundle.end_of_text
        assert end is not None
        stops = dict.fromkeys((end, *self.bundle.stop_ids))
        return encoded_passage(sample, self.tokenizer, self.control, self.decoder, self.settings, stops=tuple(stops))

    # -- text

    def open(self, sample: Conversation) -> Work:
        """Render the whole conversation, with the control tokens that its messages spell marked."""
        sample, changed = self.given(sample)
        weights = message_weights(self.settings.train_on, sample.messages, sample.context)
        trained = () if self.settings.train_on == "all" else trained_turns(sample.messages, weights)
        messages, tools = message_dicts(sample.messages), [dict(tool) for tool in sample.tools]
        spelled = spelled_in(messages, tools, self.control, mode := self.settings.control_tokens_in_text)
        own = [] if mode == "allow" else own_tokens(sample.source, messages, self.control)
        if spelled:
            if shown_text := rendered_message(sample, self.tokenizer.bos_token, self.stop_texts):
                changed.append(rendered_note(sample.source, shown(shown_text)))
            changed.append(spelled_note(sample.source, spelled))
            messages, tools = marked(messages, tools, self.control)
        changed += own
        self.bundle.require_chat()
        try:
            renderer, layers = self.renderers(sample.template_args)
        except TemplateError as error:
            raise Refusal("template", f"chat_template_kwargs: {error}") from error
        whole = renderer.whole(messages, tools)
        check_characters(unmark(whole.text) if spelled else whole.text)
        if whole.marks is not None and trained:
            check_marked(whole, messages)
        return Work(sample, messages, tools, weights, trained, renderer, layers, whole, bool(spelled),
                    notes=changed)  # fmt: skip

    def given(self, sample: Conversation) -> tuple[Conversation, list[Note]]:
        """The row as the template gets it, and what was changed."""
        return as_given(sample, self.settings, self.stop_texts)

    # -- ids

    def tokenize(self, works: Sequence[Work]) -> None:
        """Ids of whole conversations, in one call."""
        if works:
            encoded = encode_batch(self.tokenizer, [work.whole for work in works])
            for work, ids in zip(works, encoded, strict=True):
                work.ids = ids

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text, marked or not. Raises Refusal."""
        return self.marked_ids(text, behind=False) if OPEN in text else encode(self.tokenizer, text)

    def marked_ids(self, text: str, *, behind: bool) -> list[int]:
        try:
            return encode_marked(self.tokenizer, self.control, text, behind=behind)
        except DataError as error:
            raise Refusal("control_tokens", str(error)) from error

    def pieces(self, work: Work, notes: list[Note]) -> list[Piece]:
        """The sequences that train this conversation. Raises Refusal."""
        limit, settings = self.settings.max_tokens, self.settings
        if settings.train_on == "all":
            return self.whole_piece(work, notes)
        if len(work.ids) > limit and len(work.trained) > LONG_CHAT and settings.over_long != "truncate":
            last = next(work.renderer.turns(work.messages, work.tools, work.trained[-1:], work.rendered))
            if self.by_markers(work, last, []) and len(piece := self.apart(work, last).rendered.input_ids) > limit:
                raise TooLong(len(piece))
        turns: list[Turn] = []
        spans: list[Span] = []
        together, whole = True, True
        cuts = None if work.marked else self.aligner.cuts(work.whole, work.ids)
        for turn in work.renderer.turns(work.messages, work.tools, work.trained, work.rendered):
            if not self.by_markers(work, turn, notes):
                continue
            self.by_reasoning(work, turn, notes)
            turns.append(turn)
            span = self.span(work, turn, cuts) if together else None
            if span is None:
                together = False
            else:
                spans.append(span)
            if settings.over_long == "truncate" and (span.start if span else len(self.ids(turn.prompt))) >= limit:
                whole = False
                break  # later prompts hold more messages still
        if not turns:
            raise Refusal("nothing_trained", UNMARKED)
        notes += work.layers.judge(given_by(work, turns, together=together, whole=whole))
        if together:
            work.turns = turns
            return [Piece(Rendered(tuple(work.ids), tuple(spans)), tuple(unmark(turn.answer) for turn in turns))]
        return [self.apart(work, turn) for turn in turns]

    def by_markers(self, work: Work, turn: Turn, notes: list[Note]) -> bool:
        """Whether the template's own markers, if any, let this turn be trained; what they leave out of it is kept."""
        if turn.marking is None or turn.marking.covers(turn.answer):
            return True
        stop = work.renderer.check.stop_of(turn.answer) if turn.closed else ""
        verdict = marked_turn(turn.marking, turn.answer, stop, turn.message, work.sample)
        notes += [note for note in verdict.notes if note.reason not in {other.reason for other in notes}]
        if verdict.untrained:
            work.untrained[turn.message] = verdict.untrained
        return verdict.trained

    def by_reasoning(self, work: Work, turn: Turn, notes: list[Note]) -> None:
        """What `data.reasoning` makes of a turn: said once a row, and kept where it is context. Raises Refusal."""
        found = turn_notes(work, turn, self.settings.reasoning)
        if self.settings.reasoning == "context" and (end := context_end(work, turn)):
            work.untrained.setdefault(turn.message, []).append((0, end))
            found.append(masked_note(work.sample.source, turn.message))
        notes += [note for note in found if note.reason not in {other.reason for other in notes}]

    def span(self, work: Work, turn: Turn, cuts: Cuts | None) -> Span | None:
        """Where the answer lies in the ids of the whole conversation; None where it isn't served from there."""
        if not turn.served_from_whole:
            return None
        assert turn.prompt_end is not None
        if cuts is not None:
            start = self.aligner.prefix_length(work.whole, turn.prompt_end, work.ids, cuts)
            if self.unverified:
                self.verify(turn, work, start)
        else:
            prompt = self.ids(turn.prompt)
            start = len(prompt) if work.ids[: len(prompt)] == prompt else None
        if start is None:
            return None
        stops, number = self.stops, work.renderer.check.count_stops(turn.answer)
        for place in range(start, len(work.ids)):
            if work.ids[place] in stops:
                number -= 1
                if not number:
                    return Span(turn.message, start, place + 1)
        return None

    def verify(self, turn: Turn, work: Work, start: int | None) -> None:
        """Encode a prompt for real and trust the aligner no longer where that says otherwise."""
        self.unverified -= 1
        own = encode(self.tokenizer, turn.prompt)
        if (start is not None and work.ids[:start] != own) or (start is None and work.ids[: len(own)] == own):
            self.aligner.trusted = False

    def apart(self, work: Work, turn: Turn) -> Piece:
        """The served prompt's ids, then the answer, tokenised as it stands behind them. Raises Refusal."""
        prompt = self.ids(turn.prompt)
        text = unmark(turn.answer)
        answer = self.answer_ids(turn)
        if not turn.closed:
            stop = self.bundle.stop_ids[0]
            answer, text = [*answer, stop], text + self.tokenizer.convert_ids_to_tokens(stop)
        span = Span(turn.message, len(prompt), len(prompt) + len(answer))
        return Piece(Rendered((*prompt, *answer), (span,)), (text,))

    def answer_ids(self, turn: Turn) -> list[int]:
        """Ids of an answer that decode back to it: as it follows a token, else as it stands alone."""
        text = turn.answer
        if OPEN in text:
            return self.marked_ids(text, behind=True)
        return encode_after(self.tokenizer, text, lambda ids: self.decoder([ids])[0] == text)

    def whole_piece(self, work: Work, notes: list[Note]) -> list[Piece]:
        """Policy `all`: one sequence, every token trained but the messages that say otherwise."""
        if len(set(work.weights)) > 1:
            raise Refusal("unprovable", "train_on: all takes no train or weight on single messages")
        if not work.weights[0]:
            raise Refusal("nothing_trained", "the row asks not to be trained: train: false or weight: 0")
        answers = {i: work.whole for i, message in enumerate(work.messages) if message["role"] == "assistant"}
        notes += work.layers.judge(Given(work.sample, work.messages, work.tools, answers, [work.whole], proven=False))
        ids, text = list(work.ids), unmark(work.whole)
        end = max((place for place, token in enumerate(ids, 1) if token in self.stops), default=0)
        if not end or self.decoder([ids[end:]])[0].strip():
            ids.append(self.bundle.stop_ids[0])
            text += self.tokenizer.convert_ids_to_tokens(self.bundle.stop_ids[0])
        return [Piece(Rendered(tuple(ids), (Span(0, 0, len(ids)),)), (text,))]

    # -- length

    def close(self, work: Work, pieces: Sequence[Piece], notes: list[Note]) -> Encoded:
        """Weights and the length rule."""
        source, limit = work.sample.source, self.settings.max_tokens
        longest = max(len(piece.rendered.input_ids) for piece in pieces)
        trained_end = max(piece.rendered.spans[-1].end for piece in pieces)  # context behind it is no loss
        if trained_end > limit and self.settings.over_long != "truncate":
            return too_long(source, longest, self.settings)
        examples, cut = [], 0
        for number, piece in enumerate(pieces):
            weights_T = self.weights(work, piece)
            ids_T = np.asarray(piece.rendered.input_ids, dtype=np.int32)
            cut += int(np.count_nonzero(weights_T[limit:]) > 0)
            if np.count_nonzero(weights_T[:limit]):
                name = source if len(pieces) == 1 else f"{source}#{number}"
                examples.append(Example(ids_T[:limit], weights_T[:limit], name))
        if not examples:
            return too_long(source, longest, self.settings)
        if cut:
            notes = [*notes, cut_note(source, longest, limit)]
        unknown = sum(
            self.decoder.unknown(piece.rendered.input_ids[span.start : span.end], text)
            for piece in pieces
            for span, text in zip(piece.rendered.spans, piece.texts, strict=True)
        )
        return Encoded(tuple(examples), (*notes, *unknown_notes(source, unknown)))

    def weights(self, work: Work, piece: Piece) -> Float32Array:
        """Weight of each token (T,). Raises Refusal where it cannot be told which tokens the markers leave out."""
        rendered = piece.rendered
        if self.settings.train_on == "all":
            return np.full(len(rendered.input_ids), work.weights[0], dtype=np.float32)
        weights_T = token_weights(rendered, work.weights)
        for span, text in zip(rendered.spans, piece.texts, strict=True):
            if stretches := work.untrained.get(span.message):
                ids = rendered.input_ids[span.start : span.end]
                for first, last in token_ranges(ids, text, stretches, self.decoder):
                    weights_T[span.start + first : span.start + last] = 0
        return weights_T
