"""`sft prepare`: the data, rendered, proven and tokenised once. Preview, check and train begin with the same call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sft.gguf import cache_root, tokenizer_source

if TYPE_CHECKING:
    from sft.config import Config
    from sft.configfile import LoadedConfig
    from sft.data.loader import Prepared
    from sft.tokenizer import TokenizerBundle


def cache_dir() -> Path:
    """Where prepared data lies, shared by all runs: `$SFT_CACHE/prepared`, by default `~/.cache/sft/prepared`."""
    return cache_root() / "prepared"


def load_bundle(config: Config, *, pinned_date: str | None = None) -> TokenizerBundle:
    """The tokenizer and the template in use. Loads no weights. Raises ModelError, TemplateError."""
    from sft.tokenizer import load_tokenizer

    model, data = config.model, config.data
    return load_tokenizer(
        tokenizer_source(model.name),
        revision=model.revision,
        template=data.template,
        template_args=data.template_args,
        trust_remote_code=model.trust_remote_code,
        pinned_date=pinned_date,
        new_tokens=model.new_tokens,
    )


def prepare_data(
    loaded: LoadedConfig, say: Callable[[str], None], *, pinned_date: str | None = None, workers: int | None = None
) -> tuple[TokenizerBundle, Prepared]:
    """Prepares the data of a config, or opens what was prepared before. Collective-free: call it on one process.

    `pinned_date` (ISO) is what templates that ask for today's date are told; a run keeps the date of its start.
    Raises DataError, ModelError, TemplateError.
    """
    from sft.data.loader import prepare

    bundle = load_bundle(loaded.config, pinned_date=pinned_date)
    return bundle, prepare(loaded.config, bundle, cache_dir=cache_dir(), workers=workers, say=say)


def prepare_command(loaded: LoadedConfig) -> int:
    """Prepares, and prints what came of it."""
    bundle, prepared = prepare_data(loaded, print)
    for line in summary(bundle, prepared):
        print(line)
    return 0


def summary(bundle: TokenizerBundle, prepared: Prepared) -> list[str]:
    """What one wants to know of prepared data beyond its counts, a line each."""
    report = prepared.report
    share = report["trained_tokens"] / max(1, report["tokens"])
    stops = " ".join(bundle.tokenizer.convert_ids_to_tokens(list(bundle.stop_ids)))
    lines = [f"dropped: {number:,} {reason}" for reason, number in report["dropped"].items()]
    lines += [f"altered: {number:,} {reason}" for reason, number in report.get("altered", {}).items()]
    return [
        *lines,
        f"trained: {share:.0%} of the tokens",
        f"template: {bundle.template_name}; generation stops at {stops}",
        *(f"note: {note}" for note in bundle.notes),
        f"cache: {prepared.path}",
    ]
