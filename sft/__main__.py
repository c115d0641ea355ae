"""The command line: parse, call one function, turn its outcome into an exit code.

Nothing heavy is imported before a command needs it, so that help and config errors answer at once.
Exit codes: 0 done; 2 the user can fix it; 75 stopped on a signal, resumable; 1 anything else.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sft import __version__
from sft.console import open_streams
from sft.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, ConfigError, SftError, Stopped
from sft.hush import hush_progress_bars

if TYPE_CHECKING:
    from sft.configfile import LoadedConfig

STARTED = time.monotonic()
SAID_ELSEWHERE_SECONDS = 1.0
app = typer.Typer(
    name="sft",
    help="Supervised finetuning whose every trained token can be seen, and which can be killed anywhere.\n\n"
    "Start: [bold]sft init DATA --model NAME --out my.yaml[/], then [bold]sft check my.yaml[/], [bold]sft train "
    "my.yaml[/].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BEFORE, TRAINING, AFTER = "Before training", "Training", "Afterwards"

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override any key: optim.lr=1e-4 data.train.0.limit=100"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model. Read it first.")
]

Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """Runs a command, prints its error once, and exits with the code that belongs to the outcome."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            code = command(*args, debug=debug, **kwargs)
        except (SftError, Stopped, KeyboardInterrupt, BrokenPipeError, Exception) as error:
            code = explain(error, debug=debug)
        raise typer.Exit(code or EXIT_DONE)

    return run  # type: ignore[return-value]


def explain(error: BaseException, *, debug: bool) -> int:
    """Prints what went wrong on stderr, without credentials, and returns the exit code.

    Every process of a launch reads the same config, so the first one on each machine says what is wrong with it.
    An error that carries a true attribute `said` was printed by another rank already.
    """
    from sft.secrets import mask_secrets

    code = EXIT_FAILED
    lines = [f"error: {str(error) or type(error).__name__}"]
    if isinstance(error, SftError):
        code = EXIT_USER
    elif isinstance(error, Stopped | KeyboardInterrupt):
        code = EXIT_STOPPED
        lines = [str(error) or "stopped; the same command goes on from here"]
    elif isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    elif not debug:
        lines = [f"error, not foreseen: {type(error).__name__}: {error}"]
    if debug or code == EXIT_FAILED:
        import traceback

        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    if not getattr(error, "said", False) and not (isinstance(error, ConfigError) and not first_on_machine()):
        print(mask_secrets(rank_prefix() + "\n".join(lines)), file=sys.stderr, flush=True)
    elif rank_prefix():
        leave_last()
    return code


def leave_last() -> None:
    """Launchers end all ranks as soon as one has left: one whose error another prints gives that one time to."""
    import signal
    import time

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the exit code is decided, and the end is near
    try:
        time.sleep(SAID_ELSEWHERE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)


def rank_prefix() -> str:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ
    return f"[rank {os.environ['RANK']}] " if several else ""


def first_on_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def load(config: str, overrides: list[str] | None) -> LoadedConfig:
    """The checked config; keys that are set but never read are named on stderr."""
    from sft.configfile import load_config
    from sft.hub import hub_names

    loaded = load_config(config, overrides or ())
    for warning in loaded.unread:
        warn(warning)
    settle_hub(hub_names(loaded.config))
    return loaded


def settle_hub(names: list[str]) -> None:
    """Finds out quickly whether the hub can be reached, where one of the names needs it."""
    from sft.hub import settle

    if warning := settle(names):
        warn(warning)


def warn(text: str) -> None:
    from sft.secrets import mask_secrets

    if first_on_machine():
        print(f"warning: {mask_secrets(text)}", file=sys.stderr)


@app.command(rich_help_panel=BEFORE)
@guarded
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, glob, folder or hub id.", show_default=False)],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Hub id, folder or .gguf file.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here instead of printing.")] = None,
    debug: Debug = False,
) -> None:
    """Look at the data and the model, and suggest a commented config: written to --out, or printed."""
    settle_hub([model, data])
    from sft.init import suggest_config

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; remove it or name another --out.")
    found = suggest_config(data, model, str(out or "my.yaml"))
    if out is None:
        print(found.text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.text, encoding="utf-8")
    for trouble in found.troubles:
        warn(trouble)
    if out is not None:
        print(f"{out} written. Read it, then: sft check {out}", file=sys.stderr)


@app.command(rich_help_panel=BEFORE)
@guarded
def check(config: Config, overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> int:
    """Preflight in seconds: config, data, template, mask proof, stop tokens, memory, plan of steps."""
    loaded = load(config, overrides)
    from sft.check import check

    return check(loaded, as_json=as_json)


@app.command(rich_help_panel=BEFORE)
@guarded
def preview(
    config: Config,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many examples.")] = 4,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show examples token by token, the trained ones in colour."""
    loaded = load(config, overrides)
    from sft.preview import preview

    preview(loaded, n=n, html=html, json_lines=as_json)


@app.command(rich_help_panel=BEFORE)
@guarded
def prepare(config: Config, overrides: Overrides = None, debug: Debug = False) -> int:
    """Render, prove and tokenise the data once, into a cache keyed by its content."""
    loaded = load(config, overrides)
    from sft.prepare import prepare_command

    return prepare_command(loaded)


@app.command(rich_help_panel=TRAINING)
@guarded
def train(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move the old run aside and start over.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option("--allow-change", metavar="KEY", help="Resume although KEY changed; may be repeated."),
    ] = None,
    debug: Debug = False,
) -> int:
    """Train; run again on the same run folder, it resumes by itself."""
    loaded = load(config, overrides)
    from sft.train import train

    return train(loaded, fresh=fresh, allow_change=list(allow_change or ()), started=STARTED)


@app.command(rich_help_panel=TRAINING)
@guarded
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file of a sweep.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Override any key of it: trials=40 workers=2"),
    ] = None,
    debug: Debug = False,
) -> int:
    """Search hyperparameters as a YAML file says; run again, it resumes."""
    from sft.sweep import sweep as run_sweep

    return run_sweep(sweep, overrides or ())


@app.command("eval", rich_help_panel=AFTER)
@guarded
def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH", help="A run, a checkpoint, an adapter or a model.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Token-weighted loss, perplexity, token accuracy, stop probability, generations."""
    loaded = load(config, overrides)
    from sft.evalcommand import evaluate_path

    return evaluate_path(loaded, model or str(loaded.run_dir), as_json)


@app.command(rich_help_panel=AFTER)
@guarded
def chat(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A run, an adapter or a model.", show_default=False)],
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> int:
    """Talk to a run, an adapter or a model."""
    from sft.hub import names_behind

    settle_hub(names_behind(path))
    from sft.chat import chat

    return chat(path, trust_remote_code=trust_remote_code)


@app.command(rich_help_panel=AFTER)
@guarded
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the 16-bit base.")] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="Upload to this hub repository.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> int:
    """Write a plain Hugging Face model folder."""
    from sft.hub import names_behind

    settle_hub(names_behind(run))
    from sft.export import export

    return export(run, out=out, merge=merge, push=push, trust_remote_code=trust_remote_code)


@app.command(rich_help_panel=AFTER)
@guarded
def report(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run or sweep folder.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page for a run or a sweep."""
    from sft.report import write_report

    print(write_report(path))


@app.command(rich_help_panel=BEFORE)
@guarded
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of the config, for editors."""
    import json

    from sft.configfile import json_schema

    print(json.dumps(json_schema(), indent=2))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `sft` and of `python -m sft`."""
    if sys.platform == "win32":  # its locks, signals and limits are other ones
        print("error: sft runs on Linux and macOS. On Windows, use it inside WSL 2.", file=sys.stderr)
        sys.exit(EXIT_USER)
    open_streams()
    dashed = [argument for argument in sys.argv[1:] if re.match(r"--\w+\.\w", argument)]
    if dashed:
        print(f"error: {dashed[0]}: overrides are written without dashes: optim.lr=1e-4", file=sys.stderr)
        sys.exit(EXIT_USER)
    hush_progress_bars()
    app(prog_name="sft")


if __name__ == "__main__":
    main()
