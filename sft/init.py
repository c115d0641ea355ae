"""`sft init DATA --model NAME`: looks at the data and at the model, and writes a config that says what it saw.

Both looks are cheap: at most `SAMPLE` rows, the tokenizer, and the headers of the weights. What cannot be seen from
here (a model that is not on this machine, no network) is said in a comment, and the rest is suggested all the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.formats import FORMATS, detect_format
from sft.data.heldout import number_held_out
from sft.data.readers import BadRow, Row
from sft.data.sources import read_rows, source_files
from sft.errors import DataError
from sft.glance import ModelGlance, base_and_adapter, glance_at_model
from sft.schedule import plan
from sft.secrets import mask_secrets
from sft.suited import Suited, cut, one_line, said, suit
from sft.templating import RENDER_SECONDS, TemplateTimeout, texts_or_none
from sft.types import Conversation, Passage, Sample
from sft.yamltree import flow

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = 5000
"""Rows looked at."""
MEASURED = 500
"""Rows tokenised to learn how long examples are."""

_PROMPT = ("question", "query", "input", "problem", "instruction", "prompt", "source")
_COMPLETION = ("answer", "response", "output", "solution", "completion", "target", "chosen")
_MESSAGES = ("dialog", "dialogue", "chat", "turns", "traj", "history", "conversation_a")


@dataclass(frozen=True)
class DataGlance:
    """What a look at the first rows showed."""

    rows: int
    whole: bool  # whether these are all rows there are
    columns: dict[str, str]
    formats: Counter[str]
    samples: list[Sample]
    refused: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        return next(iter(self.formats)) if len(self.formats) == 1 else "auto"

    @property
    def conversations(self) -> list[Conversation]:
        return [sample for sample in self.samples if isinstance(sample, Conversation)]


@dataclass(frozen=True)
class Suggestion:
    """A config, and a line on each thing that could not be seen or used."""

    text: str
    troubles: tuple[str, ...]


def suggest_config(data: str, model: str, name: str = "my.yaml") -> Suggestion:
    """A commented YAML config for `data` and `model`, to be called `name`.

    Raises DataError where the data cannot be used at all.
    """
    base, adapter = base_and_adapter(model)
    about = glance_at_model(base)
    seen = glance_at_data(data, chat=about.has_template is not None)
    suited = Suited()
    if about.tokenizer is not None and seen.conversations:
        suited = suit(base, "model" if about.has_template else "chatml", seen.conversations, RENDER_SECONDS)
        about = replace(about, tokenizer=suited.tokenizer or about.tokenizer)
    lengths, trouble = token_lengths(seen.samples, about)
    about = replace(about, problems=(*about.problems, trouble)) if trouble else about
    lines = _lines(data, model, name, seen, about, lengths, suited, _model_section(base, adapter, about, suited))
    return Suggestion("\n".join(lines) + "\n", (*_troubles(seen, about), *suited.troubles()))


def _troubles(seen: DataGlance, about: ModelGlance) -> Iterator[str]:
    if about.problems:
        blind = about.tokenizer is None and about.context is None and about.parameters is None
        yield f"model {'not looked at' if blind else 'not seen in full'}: {cut(about.problems[0], 300)}"
    if seen.refused:
        looked = f"{seen.rows:,}" if seen.whole else f"the first {seen.rows:,}"
        yield f"{len(seen.refused):,} of {looked} rows cannot be used, such as {cut(seen.refused[0], 300)}"


# The data -----------------------------------------------------------------------------------------------------------


def glance_at_data(path: str, *, chat: bool = True) -> DataGlance:
    """Reads up to `SAMPLE` rows. `chat`: read pairs such as question and answer as conversations where one must choose.

    Raises DataError that lists the keys and formats where none fits.
    """
    rows = list(itertools.islice(read_rows(path), SAMPLE + 1))
    whole, rows = len(rows) <= SAMPLE, rows[:SAMPLE]
    good = [row for row in rows if isinstance(row, Row)]
    refused = [f"{row.source}: {row.message}" for row in rows if isinstance(row, BadRow)]
    if not good:
        raise DataError(f"{path}: no row can be read. {'First: ' + refused[0] if refused else 'It is empty.'}")
    columns = suggest_columns(good[0].data, chat=chat)
    formats: Counter[str] = Counter()
    samples = []
    for row in good:
        renamed = Row(row.source, {columns.get(key, key): value for key, value in row.data.items()})
        try:
            name = detect_format(renamed.data)
            samples.append(FORMATS[name](renamed))
            formats[name] += 1
        except DataError as error:
            refused.append(str(error) if row.source in str(error) else f"{row.source}: {error}")
    if not samples:
        raise DataError(f"{path}: no row fits a format. First: {refused[0]}")
    return DataGlance(len(rows), whole, columns, formats, samples, refused)


def suggest_columns(data: Mapping[str, Any], *, chat: bool = True) -> dict[str, str]:
    """{their name: ours} under which a row fits a format; empty where it fits as it is or nothing helps.

    A pair such as question and answer becomes a conversation, which the chat template renders, or without `chat` a
    prompt and its completion, joined as they are.
    """
    for columns in _candidates(data, ("instruction", "output") if chat else ("prompt", "completion")):
        renamed = {columns.get(key, key): value for key, value in data.items()}
        try:
            FORMATS[detect_format(renamed)](Row("row", renamed))
        except DataError:
            continue
        return columns
    return {}


def _candidates(data: Mapping[str, Any], pair: tuple[str, str]) -> Iterator[dict[str, str]]:
    yield {}
    names = {key.lower(): key for key in data}
    if "instruction" in data:
        answer = next((names[name] for name in _COMPLETION if name in names and names[name] != "output"), None)
        context = {names["context"]: "input"} if "context" in names and "input" not in data else {}
        if answer:
            yield {**context, answer: "output"}
    for theirs in _MESSAGES:
        if theirs in names:
            yield {names[theirs]: "messages"}
    for prompt, completion in itertools.product(_PROMPT, _COMPLETION):
        if prompt in names and completion in names and prompt != completion:
            columns = {names[prompt]: pair[0], names[completion]: pair[1]}
            yield {theirs: ours for theirs, ours in columns.items() if theirs != ours}
    for theirs in ("content", "document", "body"):
        if theirs in names:
            yield {names[theirs]: "text"}


def token_lengths(samples: list[Sample], model: ModelGlance) -> tuple[list[int], str]:
    """Sorted lengths in tokens of up to `MEASURED` samples, and what kept the template from rendering them in time.

    Where it refuses one, the bare words count (`sft check` tells why); without a tokenizer, a quarter of characters.
    """
    step = max(1, len(samples) // MEASURED)
    chosen, trouble = samples[::step][:MEASURED], ""
    texts = [_bare(sample) for sample in chosen]
    if model.chat is not None:
        places = [place for place, sample in enumerate(chosen) if isinstance(sample, Conversation)]
        asked = [([m.as_dict() for m in chosen[p].messages], chosen[p].tools) for p in places]  # type: ignore[union-attr]
        try:
            for place, text in zip(places, texts_or_none(model.chat, asked, RENDER_SECONDS), strict=True):
                texts[place] = text or texts[place]
        except TemplateTimeout as error:
            trouble = str(error)
    if model.tokenizer is None:
        return sorted(len(text) // 4 for text in texts), trouble
    return sorted(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), trouble


def _bare(sample: Sample) -> str:
    if isinstance(sample, Passage):
        return sample.prompt + sample.completion
    return "\n".join(f"{message.role}\n{message.content}" for message in sample.messages)


# Suggestions --------------------------------------------------------------------------------------------------------


def suggest_max_tokens(lengths: list[int], context: int | None) -> int:
    """What 99 of 100 examples fit into, rounded up, and no more than the model was made for."""
    fits = lengths[-(-len(lengths) * 99 // 100) - 1]
    rounded = next((size for size in (256, 512, 1024, 2048, 4096, 8192) if size >= fits * 1.1), None)
    wanted = rounded or -(-fits // 4096) * 4096
    return min(wanted, context) if context else wanted


def suggest_epochs_and_batch(rows: int) -> tuple[int, int]:
    """Small data is seen more often, and in smaller steps, so that there are some hundred of them."""
    epochs = 3 if rows < 1_000 else 2 if rows < 20_000 else 1
    batch = next(size for size in (128, 64, 32, 16, 8) if size == 8 or rows * epochs // size >= 150)
    return epochs, batch


def suggest_tuning(parameters: int | None) -> str:
    """Every weight of a small model, an adapter for others, and 4 bits where 16 would fill a GPU."""
    if parameters is None:
        return "lora"
    return "full" if parameters < 1e9 else "lora" if parameters < 15e9 else "qlora"


def suggest_eval(seen: DataGlance) -> float:
    """Rows to hold out: a twentieth, up to 500, a tenth of very little data, none of next to nothing."""
    if not seen.whole or seen.rows >= 10_000:
        return 500
    return 0.05 if seen.rows >= 200 else seen.rows // 10


def has_test_split(path: str) -> bool:
    """Whether a folder's file names tell training rows from test rows."""
    if not Path(path).expanduser().is_dir():
        return False
    try:
        return source_files(path, "test") != source_files(path, "train")
    except DataError:
        return False


# The page -----------------------------------------------------------------------------------------------------------


def _lines(
    data: str, model: str, name: str, seen: DataGlance, about: ModelGlance, lengths: list[int], suited: Suited,
    model_section: Iterable[str],
) -> Iterator[str]:  # fmt: skip
    head = [
        f"Suggested by: sft init {data} --model {model}",
        "",
        *_about_data(seen, lengths, about),
        "",
        *_about_model(about),
        "",
        f"Then:  sft check {name}        what is trained, which rows are dropped, memory, steps",
        f"       sft preview {name}      the trained tokens, in colour",
        f"       sft train {name}        any key can be set here too: optim.lr=1e-4",
        "Every key there is: configs/reference.yaml",
    ]
    yield from (f"# {mask_secrets(one_line(line))}".rstrip() for line in head)
    yield ""
    yield from model_section
    yield ""
    yield from _data_section(data, seen, about, lengths, suited)
    yield ""
    scored = 0 if has_test_split(data) else number_held_out(len(seen.samples), suggest_eval(seen))
    yield from _training_sections(seen, len(seen.samples) - scored)


def _training_sections(seen: DataGlance, trained: int) -> Iterator[str]:
    """`trained`: how many of the rows that were seen are usable and not held out."""
    epochs, batch = suggest_epochs_and_batch(seen.rows)
    yield "batch:"
    yield said(f"  examples: {batch}", "conversations a step sees, over all devices")
    yield ""
    yield "optim:"
    yield said("  lr: auto", "2e-4 for lora and qlora, 2e-5 for full; the first thing to vary: sft sweep")
    yield ""
    yield "train:"
    total = plan(max(1, trained), batch, epochs, None).total_steps
    steps = f"about {total:,} step{'s' * (total != 1)}" if seen.whole else "watch the held-out loss"
    yield said(f"  epochs: {epochs}", steps)
    if suggest_eval(seen):
        yield ""
        yield "eval:"
        yield said("  every: auto", "with samples and the serving check, a tenth of the run; or a share, or steps")
        yield ""
        yield "save:"
        yield said("  best: eval.loss", "final/ is the best checkpoint; null: the last")


def _about_data(seen: DataGlance, lengths: list[int], about: ModelGlance) -> Iterator[str]:
    formats = ", ".join(f"{name} ({number:,})" for name, number in seen.formats.most_common())
    looked = f"{seen.rows:,} rows" if seen.whole else f"the first {seen.rows:,} rows"
    yield f"Data: {looked}, format {formats if len(seen.formats) > 1 else seen.format}."
    chats = seen.conversations
    if chats:
        answers = Counter(sum(message.role == "assistant" for message in chat.messages) for chat in chats)
        several = sum(number for turns, number in answers.items() if turns > 1)
        has = {
            "system prompts": sum(chat.messages[0].role in ("system", "developer") for chat in chats),
            "tools": sum(bool(chat.tools) for chat in chats),
            "reasoning": sum(any("reasoning_content" in m.extra for m in chat.messages) for chat in chats),
        }
        has = {"several answers": several} | has
        facts = [f"{number:,} have {what}" for what, number in has.items() if number]
        yield f"Of {len(chats):,} conversations {', '.join(facts)}." if facts else "One question, one answer each."
    middle, longest = lengths[len(lengths) // 2], lengths[-1]
    unit = "tokens" if about.tokenizer is not None else "tokens, guessed from characters"
    yield f"Length: {middle:,} {unit}, in the middle; the longest seen {longest:,}."
    if seen.refused:
        yield f"{len(seen.refused):,} of them cannot be used, such as:"
        yield from (f"  {cut(line, 150)}" for line in seen.refused[:3])
    yield "The first:"
    yield from (f"  {line}" for line in _first_sample(seen.samples[0]))


def _first_sample(sample: Sample) -> Iterator[str]:
    if isinstance(sample, Passage):
        if sample.prompt:
            yield f"prompt      {cut(sample.prompt)}"
        yield f"{sample.kind:<11} {cut(sample.completion)}"
        return
    for message in sample.messages[:4]:
        calls = " (tool calls)" if message.extra.get("tool_calls") else ""
        yield f"{message.role:<11} {cut(message.content)}{calls}"
    if len(sample.messages) > 4:
        yield f"... and {len(sample.messages) - 4} more messages"


def _about_model(about: ModelGlance) -> Iterator[str]:
    facts = []
    if about.parameters:
        facts.append(f"{_count(about.parameters)} parameters")
    if about.context:
        facts.append(f"made for {about.context:,} tokens")
    if about.has_template is not None:
        facts.append("brings its chat template" if about.has_template else "brings no chat template")
    yield f"Model: {', '.join(facts) or 'not looked at'}."
    for problem in about.problems:
        yield f"Could not be seen from here: {cut(problem, 200)}"
    if about.parameters:
        full, lora, qlora = (_gigabytes(about.parameters * size) for size in (16, 2, 0.6))
        yield f"Memory, before activations: full {full}, lora {lora}, qlora {qlora}."


def _model_section(model: str, adapter: str | None, about: ModelGlance, suited: Suited) -> Iterator[str]:
    tuning = suggest_tuning(about.parameters)
    yield "model:"
    yield f"  name: {flow(model)}"
    yield from suited.lines("model")
    if adapter:
        yield said(f"  adapter: {flow(adapter)}", "training goes on from it")
        yield said(f"  tuning: {'lora' if tuning == 'full' else tuning}", "lora | qlora")
        return
    yield said(f"  tuning: {tuning}", "full | lora | qlora")
    if tuning != "full":
        yield said("  lora: {rank: 16, alpha: 32}", "a higher rank can learn more")


def _origin_of_format(seen: DataGlance) -> str:
    if seen.format == "auto":
        return "several, see above"
    return "once its columns are renamed" if seen.columns else "as detected"


def _data_section(data: str, seen: DataGlance, about: ModelGlance, lengths: list[int], suited: Suited) -> Iterator[str]:
    yield "data:"
    yield "  train:"
    yield f"    - path: {flow(data)}"
    yield said(f"      format: {seen.format}", _origin_of_format(seen))
    if seen.columns:
        yield said(f"      columns: {flow(seen.columns)}", "their names: ours")
    if set(seen.columns.values()) == {"instruction", "output"}:
        plain = {theirs: {"instruction": "prompt", "output": "completion"}[o] for theirs, o in seen.columns.items()}
        yield f"      # as a conversation; without the chat template: columns: {flow(plain)}"
    if has_test_split(data):
        yield "  eval:"
        yield f"    - path: {flow(data)}"
        yield said("      split: test", "rows that are never trained")
        yield from ([f"      columns: {flow(seen.columns)}"] if seen.columns else [])
        yield "      limit: 500"
    else:
        yield said(
            f"  eval: {flow(suggest_eval(seen))}", "held out of train: a share or a number; or a list of sources"
        )
    yield from suited.lines("data")
    if about.has_template is False and seen.conversations and "data.template" not in suited.settings:
        yield said("  template: chatml", "the model has none of its own; or chatml-tools, zephyr, tulu, a .jinja file")
    size = suggest_max_tokens(lengths, about.context)
    fit = sum(length <= size for length in lengths) / len(lengths)
    several = any(sum(message.role == "user" for message in chat.messages) > 1 for chat in seen.conversations)
    keep = fit < 0.95 and several  # data.max_dropped would stop the run
    others = "of others the last turns are trained" if keep else "others are dropped and counted"
    yield said(f"  max_tokens: {size}", f"{fit:.1%} of the rows fit; {others}")
    if keep:
        yield said("  over_long: keep_turns", "drop would lose too many; the system prompt and tools stay")
    if seen.refused:
        yield said("  on_bad_row: error", "skip: go on without the bad rows, up to max_dropped")


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"
