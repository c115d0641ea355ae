"""`sft check`: everything that can be known before training, in one picture, with each problem and its cure.

Reads the config, the tokenizer, the model's config.json and the data, never the weights. The data is prepared as
`sft train` prepares it, into the same cache, so that this work is done once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft.advice import (
    advice_on_steps,
    beyond_context,
    kept_nulls,
    rendered_rows,
    unread_arguments,
    unread_template,
)
from sft.budget import decide, told
from sft.checkmachine import (
    look_at_disk,
    look_at_memory,
    look_at_model,
    look_at_modules,
    look_at_packages,
)
from sft.checkview import print_picture
from sft.errors import EXIT_DONE, EXIT_USER, DataError, ResumeError, SftError
from sft.picture import Picture, as_object
from sft.resume import CONTENT
from sft.runfolder import RunFolder

if TYPE_CHECKING:
    from sft.config import Config, Source
    from sft.configfile import LoadedConfig
    from sft.data.loader import Prepared

Say = Callable[[str], None]

TINY_SHARE = 0.02  # of trained tokens, below which most of the work is spent on context
FEW_HELD_OUT = 20


def check(loaded: LoadedConfig, *, as_json: bool = False) -> int:
    """Prints the picture and returns the exit code: 2 where there are problems."""
    picture = inspect(loaded, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(as_object(picture), indent=1, ensure_ascii=False))
    else:
        print_picture(picture, sys.stdout)
    return EXIT_USER if picture.problems else EXIT_DONE


def inspect(loaded: LoadedConfig, *, say: Say) -> Picture:
    """Looks at everything; what is wrong becomes a problem of the picture, not an exception."""
    picture = Picture(loaded.config, loaded.path, loaded.run_dir, warnings=list(loaded.unread))
    look_at_model(picture)
    look_at_modules(picture)
    look_at_tokenizer(picture)
    look_at_data(picture, say)
    look_at_steps(picture)
    look_at_packages(picture)
    look_at_memory(picture)
    look_at_disk(picture)
    look_at_run(picture)
    return picture


def look_at_tokenizer(picture: Picture) -> None:
    """The tokenizer, the template in use and its stop tokens."""
    from sft.opening import pinned_date
    from sft.prepare import load_bundle

    try:  # as of the day on which the run there began, if there is one: it will go on as of that day
        bundle = picture.bundle = load_bundle(
            picture.config, pinned_date=pinned_date(RunFolder(picture.run_dir), fresh=False)
        )
    except SftError as error:
        if picture.settings:  # else the model is not there at all, which was said
            picture.problems.append(str(error))
        return
    picture.notes += bundle.notes
    picture.warnings += unread_arguments(bundle.template, picture.config.data.template_args)
    rows = picture.shape.vocabulary if picture.shape else None
    if rows is not None and len(bundle.tokenizer) > rows:
        picture.notes.append(
            f"the tokenizer has {len(bundle.tokenizer):,} tokens, the model's embedding {rows:,} rows: it is grown"
        )


def look_at_data(picture: Picture, say: Say) -> None:
    """Prepares the data; where that fails, says all that is wrong and prepares what can be, for its counts."""
    from sft.data.loader import prepare
    from sft.prepare import cache_dir

    config = _with_sources_that_exist(picture)
    if config is None:
        return
    picture.notes += _files_left_out(config)
    if picture.bundle is None:
        _read_only(picture, config.data.train)
        return
    try:
        picture.prepared = prepare(config, picture.bundle, cache_dir=cache_dir(), say=say)
    except SftError as error:
        picture.problems.append(str(error))
        picture.bad_kinds = list(getattr(error, "bad_rows", ()))
        picture.is_whole = False
        lenient = config.data.model_copy(update={"on_bad_row": "skip", "max_dropped": 1.0})
        with tempfile.TemporaryDirectory() as folder:
            try:
                partial = config.model_copy(update={"data": lenient})
                picture.prepared = prepare(partial, picture.bundle, cache_dir=Path(folder), say=lambda line: None)
                picture.prepared.train.lengths_E.sum()  # mapped, and cached, before the folder goes
            except SftError:
                _read_only(picture, config.data.train)  # nothing at all is left: at least the rows are counted
        return
    _judge_data(picture, picture.prepared)


def _files_left_out(config: Config) -> list[str]:
    from sft.data.sources import files_left_out

    sources = [*config.data.train, *(config.data.eval if isinstance(config.data.eval, list) else [])]
    return [line for source in sources for line in files_left_out(source.path, source.split, source.subset)]


def _with_sources_that_exist(picture: Picture) -> Config | None:
    """The config without the sources that are not there, each of which is a problem; None where none is left."""
    from sft.data.sources import source_files

    def existing(sources: list[Source], name: str) -> list[Source]:
        found = []
        for number, source in enumerate(sources):
            try:
                source_files(source.path, source.split, source.subset)
            except SftError as error:
                picture.problems.append(f"data.{name}.{number}.path: {error}")
            else:
                found.append(source)
        return found

    data = picture.config.data
    before = len(picture.problems)
    train = existing(data.train, "train")
    scored = existing(data.eval, "eval") if isinstance(data.eval, list) else data.eval
    picture.is_whole = len(picture.problems) == before
    if not train:
        return None
    return picture.config.model_copy(update={"data": data.model_copy(update={"train": train, "eval": scored or 0})})


def _read_only(picture: Picture, sources: list[Source]) -> None:
    """Reads rows and brings them to their formats, where no tokenizer can encode them."""
    from sft.data.folding import Folded
    from sft.data.pipeline import Dealer, to_sample
    from sft.types import Note

    bad = Folded()
    dealer = Dealer(lambda line: None, {})
    for origin, source in enumerate(sources):
        try:
            for batch in dealer.read(source, origin):
                picture.rows += len(batch.rows)
                samples = (to_sample(row, batch) for row in batch.rows)
                for note in samples:
                    if isinstance(note, Note):
                        bad.add(note.source, note.detail)
        except SftError as error:
            picture.problems.append(f"data.train.{origin}: {error}")
    picture.bad_rows = bad.rows
    if not bad.rows:
        return
    first = bad.as_list()[0]
    if not any(first["detail"] in problem for problem in picture.problems):
        picture.bad_kinds = bad.as_list()
        lines = "\n  ".join(bad.lines())
        picture.problems.append(f"{bad.rows:,} bad rows:\n  {lines}\nRepair them, or set data.on_bad_row: skip.")


def _judge_data(picture: Picture, prepared: Prepared) -> None:
    report, config = prepared.report, picture.config
    longest = int(prepared.train.lengths_E.max())
    if long := beyond_context(picture.settings, longest, config.data.max_tokens):
        picture.problems.append(long)
    picture.warnings += unread_template(config.data, report)
    picture.warnings += kept_nulls(report)
    picture.warnings += rendered_rows(report)
    share = report["trained_tokens"] / max(1, report["tokens"])
    if share < TINY_SHARE:
        picture.warnings.append(
            f"only {share:.2%} of the tokens are trained (data.train_on: {config.data.train_on}). "
            f"Look at them: sft preview {picture.path}"
        )
    empty, examples = _empty_answers(prepared)
    if empty:
        picture.warnings.append(
            f"in {empty:,} of {examples:,} examples a single token is trained, that which ends an answer: the answer "
            f"is empty or cut away. Look at them: sft preview {picture.path}"
        )
    if prepared.eval is not None and prepared.eval.num_conversations < FEW_HELD_OUT:
        picture.warnings.append(
            f"data.eval: {prepared.eval.num_conversations} held-out conversations make a noisy evaluation"
        )
    picture.warnings += _duplicates(prepared)


def _empty_answers(prepared: Prepared) -> tuple[int, int]:
    """(examples of which one token is trained, all examples), of both sides."""
    from sft.data.store import Store

    trained_E = Store(prepared.path).arrays["trained"]
    return int((trained_E == 1).sum()), len(trained_E)


def _duplicates(prepared: Prepared) -> Iterator[str]:
    """Rows that are trained and scored as well, and rows that come twice."""
    import numpy as np

    from sft.data.store import Store

    arrays = Store(prepared.path).arrays
    trained = arrays["hashes"][arrays["train"]]
    scored = arrays["hashes"][arrays["eval"]]
    leaked = int(np.isin(scored, trained).sum())
    if leaked:
        yield f"data.eval: {leaked:,} of {len(scored):,} evaluation rows are trained on as well: their loss says little"
    copies = len(trained) - len(np.unique(trained))
    if copies:
        yield f"data.train: {copies:,} of {len(trained):,} rows are copies of other rows"


def look_at_steps(picture: Picture) -> None:
    from sft.opening import make_plan, work_of_run

    if picture.prepared is None:
        return
    try:
        picture.plan = make_plan(picture.config, picture.prepared)
    except DataError as error:
        picture.problems.append(str(error))
        return
    if picture.prepared.eval is not None:
        work = work_of_run(picture.config, picture.plan, picture.prepared)
        picture.evals = decide(picture.config, work)
        picture.on_steps += told(picture.evals, picture.config, work)
    conversations = picture.prepared.train.num_conversations
    picture.warnings += advice_on_steps(picture.config, picture.plan, conversations)


def look_at_run(picture: Picture) -> None:
    """What lies in the run folder already, and what `sft train` would say to it."""
    from sft.checkpoint import complete_checkpoints, step_of
    from sft.opening import agreed, end_without_checkpoints, is_at_its_end, read_state, run_fingerprint

    folder, config = RunFolder(picture.run_dir), picture.config
    total = picture.plan.total_steps if picture.plan is not None else None
    status = folder.read_status()
    state, step, checkpoints = status.get("state"), status.get("step", 0), complete_checkpoints(folder.checkpoints)
    try:
        if checkpoints and total is not None and picture.prepared is not None and picture.bundle is not None:
            before = read_state(checkpoints[0])
            now = run_fingerprint(config, picture.prepared, picture.bundle, total)
            if not picture.is_whole:  # counted without the rows that are at fault, which were said
                now = {**now, **{key: before.fingerprint.get(key) for key in CONTENT}}
            agreed(config, before, now, run_dir=str(picture.run_dir), say=picture.notes.append)
            step = step_of(checkpoints[0])
        elif not checkpoints and total is not None:
            end_without_checkpoints(config, folder, total)
    except ResumeError as error:
        picture.problems.append(str(error))
        return
    if state == "done" and (total is None or is_at_its_end(config, folder, step, total)):
        picture.notes.append(
            f"{picture.run_dir} holds a finished run (step {step}): sft train leaves it as it is; "
            "--fresh or another run.dir starts anew"
        )
    elif state == "done":
        picture.notes.append(
            f"{picture.run_dir} holds a run that finished at step {step}: sft train continues it to step {total}"
        )
    elif state:
        picture.notes.append(f"{picture.run_dir} holds a run that is {state} at step {step}: sft train continues it")
