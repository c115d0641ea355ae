"""`sft preview`: examples token by token, the trained ones in colour, exactly as training will see them.

Needs the tokenizer and some rows, neither weights nor the whole data set: the first rows of each source are encoded by
the same code that prepares a run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sft.errors import DataError
from sft.pieces import Shown, show
from sft.types import Example

if TYPE_CHECKING:
    from rich.text import Text

    from sft.config import Config, Source
    from sft.configfile import LoadedConfig
    from sft.tokenizer import TokenizerBundle

ROWS_TRIED = 2000  # of one source, before it counts as one without a usable row
SHOWN_STRETCH = 1600  # characters of one stretch on a terminal; the middle of longer ones is left out
OPEN, CLOSE = "⟦", "⟧"  # around what is trained where there is no colour
SPELLED, SPELLED_END = "‹", "›"  # around ordinary characters that spell a control token
SYMBOLS = f"↵ newline  · blank  ⇥ tab  {SPELLED}…{SPELLED_END} spells a control token, and is none"


@dataclass(frozen=True, slots=True)
class Gathered:
    """Examples in the order they are shown, a line for each row on the way that gave none, and one for each key of
    the others' that nothing reads or that has another name."""

    shown: tuple[Shown, ...]
    left_out: tuple[str, ...]
    keys: tuple[str, ...] = ()


def preview(loaded: LoadedConfig, *, n: int = 4, html: Path | None = None, json_lines: bool = False) -> None:
    """Prints `n` examples, spread over the sources; as JSON, as a page into `html`, or both. DataError and others."""
    from sft.prepare import load_bundle

    bundle = load_bundle(loaded.config)
    gathered = gather(loaded.config, bundle, n)
    for line in gathered.left_out[:10]:
        print(f"left out: {line}", file=sys.stderr)
    if len(gathered.left_out) > 10:
        print(f"left out: {len(gathered.left_out) - 10} more rows; sft check counts them", file=sys.stderr)
    for line in gathered.keys[:20]:
        print(line, file=sys.stderr)
    if html is not None:
        from sft.durable import write_text

        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, page(gathered.shown, bundle, loaded))
        print(html, file=sys.stderr if json_lines else sys.stdout)
    if json_lines:
        for shown in gathered.shown:
            print(json.dumps(as_json(shown)))
    if json_lines or html is not None:
        return
    print_examples(gathered.shown, bundle, sys.stdout)


# Gathering ----------------------------------------------------------------------------------------------------------


def gather(config: Config, bundle: TokenizerBundle, n: int) -> Gathered:
    """The first `n` examples, taken from the training sources in turn. DataError where none of them has any."""
    from sft.data.encode import Encoder
    from sft.data.loader import encode_settings

    encoder = Encoder(bundle, encode_settings(config.data))
    left_out: list[str] = []
    keys: dict[tuple[str, str], str] = {}
    streams = [_examples(source, origin, encoder, left_out, keys) for origin, source in enumerate(config.data.train)]
    found: list[tuple[int, Example]] = []
    active = dict(enumerate(streams))
    while active and len(found) < n:
        for origin in list(active):
            example = next(active[origin], None) if len(found) < n else None
            if example is not None:
                found.append((origin, example))
            elif len(found) < n:
                del active[origin]
    if not found:
        lines = "".join(f"\n  {line}" for line in left_out[:10])
        raise DataError(
            f"data.train: no row of {', '.join(s.path for s in config.data.train)} gives an example:"
            f"{lines or ' there are no rows.'}\nRepair the rows, or see data.format, data.columns and data.max_tokens."
        )
    found.sort(key=lambda item: item[0])
    return Gathered(
        tuple(show(example, config.data.train[origin].path, bundle) for origin, example in found),
        tuple(left_out),
        tuple(keys.values()),
    )


def _examples(
    source: Source, origin: int, encoder: Any, left_out: list[str], keys: dict[tuple[str, str], str]
) -> Iterator[Example]:
    """The examples of a source in the order of its rows; what becomes of the others goes to `left_out`, and `keys` gets
    a line for each key that nothing reads, by (path of the source, key)."""
    from sft.data.pipeline import Dealer, to_sample
    from sft.types import Note

    dealer = Dealer(lambda line: None, {})
    for batch in dealer.read(source, origin, ROWS_TRIED):
        for row in batch.rows:
            sample = to_sample(row, batch)
            if isinstance(sample, Note):
                left_out.append(f"{sample.source}: {sample.detail}")
                continue
            encoded = encoder.encode(sample)
            for note in encoded.notes:
                if note.action in ("unread", "read_as"):
                    said = "not read" if note.action == "unread" else "read"
                    keys.setdefault(
                        (source.path, note.reason), f"{said}: {note.reason}, e.g. {note.source}: {note.detail}"
                    )
            if not encoded.examples:
                left_out.extend(f"{note.source}: {note.reason}: {note.detail}" for note in encoded.notes)
            yield from encoded.examples


# JSON ---------------------------------------------------------------------------------------------------------------


def as_json(shown: Shown) -> dict[str, Any]:
    """The object that `--json` promises: `labels` aligned with `input_ids`, -100 where untrained."""
    return {
        "source": shown.example.source,
        "input_ids": shown.example.input_ids_T.tolist(),
        "labels": shown.example.labels_T.tolist(),
        "text": shown.text,
        "trained": list(shown.trained),
    }


# Terminal -----------------------------------------------------------------------------------------------------------


def print_examples(shown: Sequence[Shown], bundle: TokenizerBundle, stream: TextIO) -> None:
    """To a terminal in colour; elsewhere plain, with marks around what is trained."""
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream, highlight=False, soft_wrap=True)
        for example in shown:
            console.rule(headline(example), align="left", style="dim")
            tokens = coloured(example)
            tokens.rstrip()
            console.print(tokens)
            console.print()
        console.print(_coloured_legend(bundle))
        return
    for example in shown:
        text = plain(example).rstrip("\n")
        print(f"── {headline(example)}\n{text}\n", file=stream)
    print(legend(shown, bundle), file=stream)


def headline(shown: Shown) -> str:
    number, trained = shown.num_tokens, shown.example.num_trained
    weights = sorted({float(w) for w in shown.example.weights_T if w > 0} - {1.0})
    extra = f", weights {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
    return f"{shown.example.source} · {number:,} tokens, {trained:,} trained ({trained / max(1, number):.0%}){extra}"


def legend(shown: Sequence[Shown], bundle: TokenizerBundle) -> str:
    tokens = sum(example.num_tokens for example in shown)
    trained = sum(example.example.num_trained for example in shown)
    stop = bundle.tokenizer.convert_ids_to_tokens(bundle.stop_ids[0])
    return (
        f"{OPEN}trained{CLOSE}  {SYMBOLS}   "
        f"{len(shown)} example{'s' * (len(shown) != 1)}, {tokens:,} tokens, {trained / max(1, tokens):.0%} trained; "
        f"template {bundle.template_name}, a trained turn ends with {stop}"
    )


def plain(shown: Shown) -> str:
    """The example without colour: `⟦…⟧` around each trained span, newlines and odd blanks visible."""
    parts = []
    for trained, stretch in _styled_runs(shown):
        visible = "".join(text for _, text in stretch)
        parts.append(f"{OPEN}{visible}{CLOSE}" if trained else visible)
    return "".join(parts)


def shorten(text: str) -> str:
    if len(text) <= SHOWN_STRETCH:
        return text
    half = SHOWN_STRETCH // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


def visible_blanks(text: str) -> str:
    """Newlines and tabs marked; blanks marked where one would not see them: at edges, beside newlines, in rows."""
    text = re.sub(r"^ +| +$|(?<=\n) +| +(?=\n)| {2,}", lambda match: "·" * len(match[0]), text)
    return visible_controls(text.replace("\t", "⇥\t").replace("\n", "↵\n"))


def visible_controls(text: str) -> str:
    """Control characters that a terminal would obey become their pictures (U+2400 …): data must not move the cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 32 else "␡", text)


def coloured(shown: Shown) -> Text:
    """The example as rich text: trained green, special tokens bold, the rest dim."""
    from rich.text import Text

    text = Text()
    for trained, stretch in _styled_runs(shown):
        for special, piece in stretch:
            base = "green" if trained else "dim"
            style = ("bold black on green" if trained else "magenta") if special else base
            text.append(piece, style=style)
    return text


def _styled_runs(shown: Shown) -> Iterator[tuple[bool, list[tuple[bool, str]]]]:
    """(trained, [(special, visible text)…]): pieces joined while neither changes."""
    control = re.compile("|".join(map(re.escape, sorted(shown.control, key=len, reverse=True))) or "(?!)")
    for trained, stretch in groupby(shown.pieces, key=lambda piece: piece.weight > 0):
        runs = []
        for special, same in groupby(stretch, key=lambda piece: piece.special):
            text = "".join(piece.text for piece in same)
            if special:
                runs.append((True, visible_blanks(text)))
            else:
                runs.append((False, control.sub(f"{SPELLED}\\g<0>{SPELLED_END}", visible_blanks(shorten(text)))))
        yield trained, runs


def _coloured_legend(bundle: TokenizerBundle) -> Text:
    from rich.text import Text

    stop = bundle.tokenizer.convert_ids_to_tokens(bundle.stop_ids[0])
    return Text.assemble(
        ("trained", "green"), "  ", ("trained special token", "bold black on green"), "  ",
        ("special token", "magenta"), "  ", ("context", "dim"), f"   {SYMBOLS}   ",
        (f"template {bundle.template_name}, a trained turn ends with {stop}", "dim"),
    )  # fmt: skip


def one_example(example: Example, bundle: TokenizerBundle) -> str:
    """A headline and the plain text of one example, as `sft train` prints it at the start."""
    shown = show(example, "", bundle)
    return f"{headline(shown)}\n{plain(shown)}"


# Page ---------------------------------------------------------------------------------------------------------------


def page(shown: Sequence[Shown], bundle: TokenizerBundle, loaded: LoadedConfig) -> str:
    """The self-contained page of `--html`. Tokens are data: the page's script makes text nodes of them."""
    from sft.pages import render_page

    config = loaded.config
    tokens = sum(example.num_tokens for example in shown)
    trained = sum(example.example.num_trained for example in shown)
    return render_page(
        "preview.html",
        name=loaded.path.name,
        model=config.model.name,
        policy=config.data.train_on,
        template=bundle.template_name,
        stops=bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids)),
        examples=len(shown),
        tokens=tokens,
        trained=trained,
        sources=list(dict.fromkeys(example.data_source for example in shown)),
        data=[
            {
                "source": example.example.source,
                "path": example.data_source,
                "trained": example.example.num_trained,
                "tokens": example.num_tokens,
                "pieces": [[p.text, list(p.ids), round(p.weight, 4), int(p.special)] for p in example.pieces],
            }
            for example in shown
        ],
    )
