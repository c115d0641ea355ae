"""`sft chat`: talk to a run, a checkpoint, an adapter, a model folder or a GGUF file in a terminal.

Answers go to stdout, everything else to stderr, so that `sft chat PATH < questions.txt > answers.txt` works: where
stdin is no terminal, each line is one message and decoding is greedy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import EXIT_DONE, ModelError, SftError
from sft.generate import GREEDY, Sampling, complete
from sft.hush import hush_libraries
from sft.tokenizer import message_form

MAX_NEW_TOKENS = 1024
ROOM_FOR_AN_ANSWER = 16  # tokens; a longer conversation loses its oldest turns first
TERMINAL_SAMPLING = Sampling(temperature=0.7, top_p=0.9)  # where the model names no settings of its own
QUOTES = '"""'
HELP = (
    "/system TEXT sets a system prompt, /reset forgets the conversation, /quit (or Ctrl-D) leaves; "
    f"{QUOTES} before and after a message of several lines"
)


def chat(path: str, *, trust_remote_code: bool = False) -> int:
    """Talks until the input ends. `trust_remote_code`: code that the model brings may run.

    Raises ModelError where there is no model or it has no chat template."""
    hush_libraries()
    model, tokenizer, template_args = open_model(path, trust_remote_code=trust_remote_code)
    terminal = sys.stdin.isatty()
    talk = Talk(
        model,
        tokenizer,
        stop_ids=stop_ids_of(path, model, tokenizer),
        sampling=sampling_of(model) if terminal else GREEDY,
        template_args=template_args,
    )
    _note(f"{path}: {HELP}")
    for message in _messages(_lines(terminal)):
        try:
            if not command(talk, message):
                break
        except KeyboardInterrupt:
            _note("(answer cut short)")
    return EXIT_DONE


@dataclass
class Talk:
    """A conversation with a model: its messages so far, and how to answer."""

    model: Any
    tokenizer: Any
    stop_ids: Sequence[int]
    sampling: Sampling = GREEDY
    template_args: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = MAX_NEW_TOKENS
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.form = message_form(self.tokenizer, self.template_args)

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Adds the user's message, streams the answer to `write`, and adds it too. An interrupted one counts."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, room = self._prompt()
        except SftError:
            self.messages.pop()
            raise
        streamer = Streamer(self.tokenizer, self.stop_ids, write)
        try:
            complete(
                self.model,
                self.tokenizer,
                [prompt],
                stop_ids=self.stop_ids,
                max_new_tokens=min(self.max_new_tokens, room),
                sampling=self.sampling,
                streamer=streamer,
            )
        finally:
            streamer.end()
            self.messages.append({"role": "assistant", "content": streamer.text})
        return streamer.text

    def _prompt(self) -> tuple[list[int], int]:
        """The prompt's ids, with the oldest turns left out until it fits, and the tokens left for an answer."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        kept = list(self.messages)
        while True:
            try:
                rendered = self.tokenizer.apply_chat_template(
                    list(map(self.form, kept)), add_generation_prompt=True, return_dict=True, **self.template_args
                )
            except Exception as error:  # a template refuses in ways of its own: system prompts, an odd order of roles
                raise ModelError(f"the chat template refuses this conversation: {error}") from error
            ids = list(rendered["input_ids"])
            if len(ids) + ROOM_FOR_AN_ANSWER <= limit:
                break
            first = next(i for i, message in enumerate(kept) if message["role"] == "user")
            if first == len(kept) - 1:
                raise ModelError(f"this message has {len(ids):,} tokens; the model reads at most {limit:,}.")
            del kept[first : first + 2]
        if len(kept) < len(self.messages):
            _note("(the oldest turns were left out: the conversation is longer than the model reads)")
            self.messages[:] = kept
        return ids, limit - len(ids)


def command(talk: Talk, line: str) -> bool:
    """Does what one line of input asks for; False to leave."""
    word, _, rest = line.strip().partition(" ")
    system = [m for m in talk.messages if m["role"] == "system"]
    if word in ("/quit", "/exit"):
        return False
    if word == "/reset":
        talk.messages[:] = system
        _note("(forgotten)")
    elif word == "/system":
        talk.messages[:] = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
        _note("(system prompt set, conversation forgotten)" if rest.strip() else "(no system prompt)")
    elif word == "/help":
        _note(HELP)
    elif word.startswith("/") and word[1:].isalpha():
        _note(f"no command {word}: {HELP}")
    elif line.strip():
        try:
            talk.answer(line.strip(), _write)
        except SftError as error:
            _note(f"({error})")
        finally:
            _write("\n")
    return True


class Streamer:
    """Writes text as tokens arrive, in the protocol of transformers' `generate`.

    Text is held back while its last character is incomplete (a token may hold part of one), and stop tokens are not
    written. `text` is what was said.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], write: Callable[[str], None]) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, frozenset(stop_ids), write
        self._ids: list[int] = []
        self._seen_prompt = False
        self.text = ""

    def put(self, ids: Any) -> None:
        if not self._seen_prompt:  # the first call brings the prompt
            self._seen_prompt = True
            return
        for token in ids.flatten().tolist():
            if token in self._stops:
                return
            self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Writes what was held back."""
        self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            fresh, self.text = text[len(self.text) :], text
            self._write(fresh)


def open_model(path: str, *, trust_remote_code: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, arguments that training gave to the template)."""
    from sft.devices import training_device
    from sft.model import load_trained

    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise ModelError(f"{path}: there is no such file or folder. Name a run, an adapter, a model or a .gguf file.")
    model, tokenizer = load_trained(
        str(Path(path).expanduser()) if path.startswith("~") else path,
        device=training_device(),
        trust_remote_code=trust_remote_code,
    )
    if not tokenizer.chat_template:
        raise ModelError(
            f"{path} has no chat template: it is a base model and cannot hold a conversation. "
            "Train it first (data.template: chatml), or choose a chat model."
        )
    return model.eval(), tokenizer, _template_args(Path(path))


def stop_ids_of(path: str, model: Any, tokenizer: Any) -> list[int]:
    """Where the saved generation config stops, else the model's own and the tokenizer's end of text."""
    from sft.model import trained_folder
    from sft.serving import saved_stop_ids

    saved = saved_stop_ids(Path(trained_folder(path)))
    if saved:
        return saved
    ends = getattr(model.generation_config, "eos_token_id", None)
    named = list(ends) if isinstance(ends, list | tuple) else [ends]
    return [int(end) for end in dict.fromkeys([*named, tokenizer.eos_token_id]) if end is not None]


def sampling_of(model: Any) -> Sampling:
    """The model's own settings where it samples, else mild ones."""
    settings = model.generation_config
    if not getattr(settings, "do_sample", None):
        return TERMINAL_SAMPLING
    return Sampling(
        temperature=settings.temperature if settings.temperature is not None else 1.0,
        top_p=settings.top_p if settings.top_p is not None else 1.0,
        top_k=settings.top_k if settings.top_k is not None else 0,
        repetition_penalty=settings.repetition_penalty if settings.repetition_penalty is not None else 1.0,
    )


def _template_args(path: Path) -> dict[str, Any]:
    """A run folder remembers what training gave to the template."""
    from sft.configfile import load_config
    from sft.runcard import run_of

    run = run_of(path)
    return {} if run is None else dict(load_config(run.config).config.data.template_args)


def _messages(lines: Iterable[str]) -> Iterator[str]:
    """A line each; what stands between two `\"\"\"` is one message, line breaks included."""
    rest = iter(lines)
    for line in rest:
        start = line.strip()
        if not start.startswith(QUOTES):
            yield line
            continue
        parts = [start.removeprefix(QUOTES)]
        while not parts[-1].rstrip().endswith(QUOTES):
            following = next(rest, None)
            if following is None:  # the input ended first: what came is the message
                break
            parts.append(following.rstrip("\n"))
        yield "\n".join(parts).rstrip().removesuffix(QUOTES)


def _lines(terminal: bool) -> Iterator[str]:
    if terminal:
        with suppress(ImportError):  # not on every platform; where it is, it gives `input` arrow keys and a history
            import readline  # noqa: F401
    while True:
        if terminal:
            try:
                yield input("\n> ")
            except (EOFError, KeyboardInterrupt):
                _note("")
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
            yield line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
