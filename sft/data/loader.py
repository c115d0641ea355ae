"""Prepare once, then serve from memory maps.

    prepare(config, bundle, cache_dir=…)  →  cache_dir/<key>/  →  Prepared(train, eval, report)

The key covers everything that the result depends on: the bytes of the files, how they are read, the tokenizer and its
template, the settings, the code of `sft.data`, the versions of the libraries. What is found under it was published
whole by a rename; two processes that prepare the same key at once wait for each other, or the first rename wins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np

from sft.advice import columns_read_as, columns_unread, kept_nulls, rendered_rows, unread_template
from sft.config import Config, Data, Source
from sft.data.encode import Encoder
from sft.data.heldout import held_out
from sft.data.ledger import Ledger, account, refuse_bad_rows, refuse_many_drops, told_keys
from sft.data.outcome import EncodeSettings
from sft.data.pipeline import Dealer, EncodedBatch, RowBatch, encode_stream
from sft.data.samples import Picks, pick_samples
from sft.data.sources import files_left_out, place_of, source_files, source_fingerprint
from sft.data.store import (
    NOTES,
    Prepared,
    Split,
    StoreWriter,
    clear_staged,
    disk_errors,
    is_published,
    open_prepared,
    staged,
)
from sft.errors import DataError
from sft.tokenizer import TokenizerBundle

__all__ = ["Prepared", "Split", "cache_key", "prepare"]

SAY_SECONDS = 10.0
SOURCES = ".sources"
"""Beside the keys: digests of the files that were read."""


def prepare(
    config: Config,
    bundle: TokenizerBundle,
    *,
    cache_dir: Path,
    workers: int | None = None,
    say: Callable[[str], None],
) -> Prepared:
    """Renders, proves and tokenises all rows once into `cache_dir/<key>/`, or opens what is there.

    `workers`: processes beside this one; 0 none, None chosen. `say` gets a line now and then; an exception that it (or
    a signal's handler) raises ends the preparing and leaves nothing behind.
    Raises DataError with all bad rows, or where too many were dropped or nothing is left; DiskError for the disk.
    """
    data = config.data
    settings = encode_settings(data)
    path = cache_dir / cache_key(data, bundle, settings, cache_dir / SOURCES)
    sources = _sources(data)
    repeats = [source.repeat for source in sources]
    for source in sources:
        for line in files_left_out(source.path, source.split, source.subset):
            say(line)
    if not is_published(path):
        with disk_errors(path), _alone(path, say):
            if not is_published(path):
                _build(path, data, bundle, settings, workers, say)
    prepared = open_prepared(path, repeats)
    _say_result(prepared, say)
    report = prepared.report
    advice = (unread_template(data, report), kept_nulls(report), columns_read_as(report), columns_unread(report))
    for line in chain(*advice):
        say(line)
    for line in rendered_rows(prepared.report):
        say(f"WARNING: {line}")
    return prepared


def encode_settings(data: Data) -> EncodeSettings:
    return EncodeSettings(
        train_on=data.train_on,
        max_tokens=data.max_tokens,
        over_long=data.over_long,
        control_tokens_in_text=data.control_tokens_in_text,
        template_args=data.template_args,
        unread=data.unread,
        layers=data.layers,
        reasoning=data.reasoning,
    )


def _sources(data: Data) -> list[Source]:
    """Those of train, then those of eval where it has its own. A source's place here is its `origin`."""
    return [*data.train, *(data.eval if isinstance(data.eval, list) else [])]


def cache_key(data: Data, bundle: TokenizerBundle, settings: EncodeSettings, memo: Path | None = None) -> str:
    """Changes with anything that the prepared data depends on. `repeat` is no part: it is applied when opened.

    `memo`: a folder that remembers the digests of files.
    """
    facts = {
        "train": [(source_fingerprint(place_of(s), memo), s.format) for s in data.train],
        "eval": [(source_fingerprint(place_of(s), memo), s.format) for s in data.eval]
        if isinstance(data.eval, list)
        else data.eval,
        "rules": [data.on_bad_row, data.max_dropped],
        "tokenizer": bundle.digest,
        "template": bundle.template,
        "stop": bundle.stop_ids,
        "settings": dataclasses.asdict(settings),
        "code": code_version(),
        "libraries": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:24]


def code_version() -> str:
    """A hash of the code that turns rows into examples: a fix in it must not meet the cache of the fault."""
    here = Path(__file__).parent
    files = [
        *sorted(here.glob("*.py")),
        *(here.parent / f"{name}.py" for name in ("tokenizer", "stops", "templating", "types")),
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + (file.read_bytes() if file.exists() else b""))
    return digest.hexdigest()[:16]


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the key's lock, which the system frees when its process dies. Without file locks the first rename wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield
        return
    with (path.parent / f".{path.name}.lock").open("a") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clear_staged(path)
                break
            except BlockingIOError:
                if not told:
                    say("another process prepares the same data: waiting for it")
                told = True
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def _build(
    path: Path, data: Data, bundle: TokenizerBundle, settings: EncodeSettings, workers: int | None,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    sources = _sources(data)
    paths = [source.path for source in sources]
    before = _states(sources)
    all_rows = path.parent / f"{path.name}.{NOTES}"
    all_rows.unlink(missing_ok=True)
    with staged(path) as folder:
        writer, ledger = StoreWriter(folder), Ledger(folder / NOTES)
        try:
            picks, formats = _encode_all(writer, ledger, data, bundle, settings, workers, say)
            ledger.close()
            if _states(sources) != before:
                raise DataError(f"{', '.join(paths)}: a file changed while it was read. Prepare again when it is done")
            if data.on_bad_row == "error":
                refuse_bad_rows(ledger, all_rows)
            trained = range(len(data.train))
            own_eval = range(len(data.train), len(sources))
            for origins in (trained, own_eval):
                refuse_many_drops(ledger, paths, origins, data.max_dropped, all_rows, data.over_long)
            _split(writer, ledger, data, paths, say)
            report = account(writer, ledger, paths, trained, "train", formats[1])
            scored = account(writer, ledger, paths, own_eval or trained, "eval", formats[1])
            report["eval"] = scored if scored["kept"] else None
            report.update(told_keys(ledger, paths, writer.read("origins")))
            report["formats"] = formats[0]
            report["templated"] = ledger.templated
            report["stop_tokens"] = bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids))
            report["template"] = bundle.template_name
            report["content_in_parts"] = bundle.chat is not None and bundle.chat.parts
            writer.finish(report, pick_samples(writer, ledger, picks, Encoder(bundle, settings)))
            made = open_prepared(folder, [source.repeat for source in sources])
            for split in (made.train, made.eval):
                if split is not None:
                    split.digest()  # remembered beside the arrays
        finally:
            writer.close()
            ledger.close()


def _states(sources: Sequence[Source]) -> list[tuple[str, int, int]]:
    files = chain.from_iterable(source_files(source.path, source.split, source.subset) for source in sources)
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _encode_all(
    writer: StoreWriter, ledger: Ledger, data: Data, bundle: TokenizerBundle, settings: EncodeSettings,
    workers: int | None, say: Callable[[str], None],
) -> tuple[Picks, tuple[dict[str, str], dict[int, set[str]]]]:  # fmt: skip
    """Reads, encodes and stores every row of every source, in order."""
    dealer = Dealer(_few(say), {})
    picks = Picks(len(data.train))
    formats: dict[int, set[str]] = {}
    batches = chain.from_iterable(dealer.read(source, origin) for origin, source in enumerate(_sources(data)))
    started = said = time.monotonic()
    for batch, encoded in encode_stream(batches, partial(Encoder, bundle, settings), workers):
        _store(writer, ledger, batch, encoded, picks, say if data.on_bad_row == "error" else None)
        if encoded.examples.any():
            formats.setdefault(batch.origin, set()).add(batch.format)
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            rows = sum(ledger.rows.values())
            say(f"prepared {rows:,} rows, {rows / (said - started):,.0f} a second")
    return picks, (dealer.formats, formats)


def _few(say: Callable[[str], None], most: int = 10) -> Callable[[str], None]:
    """Says the first lines only: a folder may hold thousands of files."""
    said = 0

    def limited(line: str) -> None:
        nonlocal said
        said += 1
        if said <= most:
            say(line)
        elif said == most + 1:
            say("… and so on; the report of the data lists each file's format")

    return limited


def _store(
    writer: StoreWriter, ledger: Ledger, batch: RowBatch, encoded: EncodedBatch, picks: Picks,
    say_bad: Callable[[str], None] | None,
) -> None:  # fmt: skip
    ledger.rows[batch.origin] += len(batch.rows)
    ledger.templated += encoded.templated
    kept = np.flatnonzero(encoded.examples)
    first = writer.num_conversations
    conversations = dict(zip(kept.tolist(), range(first, first + len(kept)), strict=True))
    gone: set[int] = set()
    for row, note in encoded.notes:
        if note.action in ("unread", "read_as"):
            ledger.tell(note, batch.origin)
        elif row in conversations:
            ledger.keep(note, conversations[row])
        elif row not in gone and note.action in ("refused", "dropped"):
            gone.add(row)
            if note.action == "refused":
                if say_bad and not ledger.num_refused:
                    say_bad(f"bad row {note.source}: {note.detail}; reading on to list them all")
                ledger.refuse(note, batch.origin)
            else:
                ledger.drop(note, batch.origin)
    assert len(gone) + len(kept) == len(batch.rows), f"rows without examples and without a note after {batch.decided}"
    names = [name.encode("utf-8", "surrogateescape") for name in encoded.names]
    writer.append(
        ids=encoded.ids,
        weights=encoded.weights,
        lengths=encoded.lengths,
        trained=encoded.trained,
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_lengths=np.array([len(name) for name in names], dtype=np.int32),
        examples=encoded.examples[kept],
        origins=np.full(len(kept), batch.origin, dtype=np.int32),
        hashes=encoded.hashes[kept],
    )
    for row in kept.tolist():
        picks.offer(int(encoded.hashes[row]), conversations[row], batch, row)


def _split(writer: StoreWriter, ledger: Ledger, data: Data, paths: Sequence[str], say: Callable[[str], None]) -> None:
    origins_C = writer.read("origins")
    of_train_C = origins_C < len(data.train)
    if isinstance(data.eval, list):
        scored = np.flatnonzero(~of_train_C)
        hashes_C = writer.read("hashes")
        both = int(np.isin(hashes_C[scored], hashes_C[of_train_C]).sum())
        if both:
            say(f"data.eval: {both:,} of its {len(scored):,} rows are also trained, so its loss flatters the model")
    else:
        scored = np.flatnonzero(held_out(writer.read("hashes"), data.eval))
        if data.eval and not len(scored) and len(origins_C):
            say(f"data.eval = {data.eval:g}: no rows are held out, since all rows are equal or there is only one")
        elif data.eval >= 1 and len(scored) != data.eval:
            say(f"data.eval = {data.eval:g}: {len(scored)} rows are held out, since equal rows stay together")
    is_scored_C = np.zeros(len(origins_C), dtype=np.bool_)
    is_scored_C[scored] = True
    trained = np.flatnonzero(of_train_C & ~is_scored_C)
    for rows, what, origins in (
        (trained, "train", range(len(data.train))),
        (scored, "eval", range(len(data.train), len(paths))),
    ):
        if not len(rows) and origins:
            read, dropped = ledger.total(origins)
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
            listed = ", ".join(paths[o] for o in origins)
            cure = "Raise data.max_tokens" if "over_long" in dropped else "Look at the rows: sft check"
            raise DataError(f"data.{what}: no row is left of {read} from {listed} ({why}). {cure}")
    writer.append(train=trained, eval=scored)


def _say_result(prepared: Prepared, say: Callable[[str], None]) -> None:
    report = prepared.report
    dropped = sum(report["dropped"].values())
    say(
        f"data: {report['rows']:,} rows: {report['kept']:,} train, {report['held_out']:,} held out, {dropped:,} dropped"
        f"; {report['examples']:,} examples, {report['tokens']:,} tokens, {report['trained_tokens']:,} of them trained"
    )
