"""The tokenizer with the template in use, and the tokens at which serving stops.

What is decided here, in one place:
- `tokenizer.chat_template` is the template in use, so that it is saved with the model. A template that reads the clock
  is rendered with the date pinned (`bundle.chat`), and saved as it was.
- Stop tokens are found by rendering a small conversation and looking at what follows the answer.
- `eos_token` stays what the model's own tokenizer says, except where the template ends its turns otherwise, does not
  read `eos_token` itself, and either is a foreign one (built in, or a file) or ends them with a token at which the
  model's settings do not stop; `end_of_text` keeps the original one for rows without template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sft.errors import ModelError, TemplateError, did_you_mean
from sft.hub import cure
from sft.stops import call_end, find_stop, foreign_end, serving_stops
from sft.templating import ChatTemplate, TemplateTimeout, deadline, generation_markers, parse, pin_clock

BUILT_IN = ("chatml", "chatml-tools", "zephyr", "tulu")
NEEDED_BY_BUILT_IN = dict.fromkeys(("chatml", "chatml-tools"), ("<|im_start|>", "<|im_end|>"))
WITHOUT_BOS = ("zephyr", "tulu")
BOS_FIRST = "{{- bos_token }}\n"
"""Goes before those of BUILT_IN that do not write BOS themselves, on tokenizers that begin texts with it."""
CONTROL_SHAPE = re.compile(r"<\|[A-Za-z0-9_]+\|>|<(?:start|end)_of_turn>")
NO_TEMPLATE = (
    "has no chat template: it is a base model, or its template was not saved with it, and the rows are conversations. "
    "Set data.template: chatml (or chatml-tools, zephyr, tulu, or the path of a .jinja file)."
)
PROBE_USER, PROBE_ANSWER, PROBE_NEXT = "xylophone question", "marimba reply", "bassoon follow up"
PROBE_TOOL, PROBE_ARGUMENT = "piccolo", "high"
PROBE_CALL: dict[str, Any] = {
    "id": "call00001", "type": "function", "function": {"name": PROBE_TOOL, "arguments": {"pitch": PROBE_ARGUMENT}},
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerBundle:
    """A tokenizer ready for a run. `stop_ids[0]` ends a trained turn, the others are where serving stops as well."""

    tokenizer: Any
    template: str | None
    template_name: str
    added_tokens: tuple[str, ...]
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...]
    digest: str
    chat: ChatTemplate | None = None
    """What renders, with the clock pinned; None where there is no template. Read it by `require_chat`."""
    closes: bool = True
    """Whether the template itself writes `stop_ids[0]` after an answer."""
    tail: str = ""
    """What the template writes between an answer and its stop token."""
    foreign_end: str = ""
    """A mark that the template writes behind an answer and that is no token of the tokenizer."""
    own_prints_tools: bool = False
    """Whether the model's own template, which another one stands in for, prints tools and calls."""
    end_of_text: int | None = None
    """Ends rows that use no template."""

    def require_chat(self) -> ChatTemplate:
        """What renders conversations. Raises TemplateError for a base model, with the cure."""
        if self.chat is None:
            raise TemplateError(f"{self.tokenizer.name_or_path} {NO_TEMPLATE}")
        return self.chat


def load_tokenizer(
    folder_or_id: str,
    *,
    revision: str | None = None,
    template: str = "model",
    template_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    pinned_date: str | None = None,
    new_tokens: Sequence[str] = (),
) -> TokenizerBundle:
    """Load a tokenizer, put the template in place, add the tokens it needs, and find where turns end.

    `template` is model, a name of `BUILT_IN`, or a path to a .jinja file. `pinned_date` is an ISO date or time.
    `new_tokens` are added as control tokens.
    A base model without a template serves rows that need none; `bundle.require_chat` tells the others.
    Raises ModelError where there is no tokenizer, TemplateError where the template doesn't work.
    """
    tokenizer = read_tokenizer(folder_or_id, revision, trust_remote_code)
    end_of_text = tokenizer.eos_token_id
    needed: tuple[str, ...] = ()
    own_prints_tools = False
    known = tokenizer.get_vocab()
    added = add_tokens(tokenizer, tuple(new_tokens))
    serving = serving_stops(folder_or_id, revision, tokenizer)
    if template == "model":
        if not tokenizer.chat_template:
            return without_template(tokenizer, folder_or_id, serving, added)
    else:
        text, needed = template_text(template)
        own_prints_tools = bool(tokenizer.chat_template) and prints_tools(tokenizer)
        tokenizer.chat_template = text
        if template in WITHOUT_BOS and begins_with_bos(tokenizer):
            tokenizer.chat_template = BOS_FIRST + text
    added += add_tokens(tokenizer, needed)
    notes: list[str] = []
    chat = chat_template(tokenizer, template_args or {}, pinned_date, notes)
    with deadline(10.0, "the chat template"):
        chat = fit_arguments(fit_content(chat, notes), notes)
        if template.endswith(".jinja"):
            missing = CONTROL_SHAPE.findall(probe(chat)[0])
            end = foreign_end(probe(chat), PROBE_ANSWER, [*tokenizer.get_added_vocab(), *missing])
            added += add_tokens(tokenizer, tuple(dict.fromkeys([*missing, *filter(None, [end])])))
        if asked_for := [token for token in added if token in new_tokens]:
            notes.append(f"added to the tokenizer (model.new_tokens): {' '.join(asked_for)}")
        if found := [token for token in added if token not in new_tokens]:
            notes.append(f"added to the tokenizer, since the template needs them: {' '.join(found)}")
        ending = find_stop(tokenizer, probe(chat), PROBE_ANSWER, serving, notes)
        stop, closes = ending.stop, ending.closes
        calling = end_of_calls(tokenizer, chat, (stop, *serving), add=template.endswith(".jinja"))
    if calling and calling in tokenizer.get_added_vocab():
        notes.append(f"{calling} ends a turn of the template that calls tools: the trained model stops at it as well")
        added += (calling,) if calling not in known else ()
        serving = (*serving, tokenizer.convert_tokens_to_ids(calling))
    reads_end = "eos_token" in chat.text + chat.with_tools
    if closes and not reads_end and tokenizer.eos_token_id != stop and (template != "model" or stop not in serving):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
        notes.append(f"the tokenizer's eos_token is now {tokenizer.eos_token}, the template's end of turn")
        chat = replace(chat, variables={**tokenizer.special_tokens_map, **(template_args or {})})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(stop)
    return TokenizerBundle(
        tokenizer=tokenizer,
        template=chat.text if isinstance(tokenizer.chat_template, dict) else tokenizer.chat_template,
        template_name=template,
        added_tokens=added,
        stop_ids=tuple(dict.fromkeys((stop, *serving))),
        notes=tuple(notes),
        digest=digest(tokenizer, chat),
        chat=chat,
        closes=closes,
        tail=ending.tail,
        foreign_end=ending.foreign,
        own_prints_tools=own_prints_tools,
        end_of_text=end_of_text if end_of_text is not None else stop,
    )


def without_template(tokenizer: Any, name: str, stops: tuple[int, ...], added: tuple[str, ...] = ()) -> TokenizerBundle:
    """A base model's tokenizer as it is: for rows of text and pairs of strings, which end with its end of text."""
    if not stops:
        raise TemplateError(
            f"{name} has no chat template, and neither its tokenizer nor its generation settings name an eos_token: "
            "nothing could be trained to stop. Set data.template: chatml, or set eos_token."
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    return TokenizerBundle(
        tokenizer=tokenizer,
        template=None,
        template_name="none",
        added_tokens=added,
        stop_ids=tuple(dict.fromkeys((end, *stops))),
        notes=("the model has no chat template: rows are joined as they are, and end with its end of text",),
        digest=digest(tokenizer, ChatTemplate("", "", {})),
        end_of_text=end,
    )


def read_tokenizer(folder_or_id: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder_or_id, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        right = "Check the name, or point it at a folder that holds tokenizer.json."
        raise ModelError(
            f"model.name: no tokenizer could be loaded from {folder_or_id!r}: {first} "
            + cure(folder_or_id, error, right, revision=revision)
        ) from error


def template_text(template: str) -> tuple[str, tuple[str, ...]]:
    """The text of a built-in template or of a .jinja file, and the special tokens that it needs."""
    if template in BUILT_IN:
        text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
        return text, NEEDED_BY_BUILT_IN.get(template, ())
    if not template.endswith(".jinja"):
        raise TemplateError(
            f"data.template: {template!r} is neither model, nor built in ({', '.join(BUILT_IN)}), nor a .jinja file."
            + did_you_mean(template, ("model", *BUILT_IN))
        )
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"data.template: cannot read {template}: {error}") from error
    parse(text)
    return text, ()


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def add_tokens(tokenizer: Any, needed: tuple[str, ...]) -> tuple[str, ...]:
    """Add as special tokens those that the tokenizer does not know as one token each."""
    known = tokenizer.get_vocab()
    missing = tuple(token for token in needed if token not in known)
    present = [t for t in needed if t in known and t not in tokenizer.added_tokens_encoder]
    if missing or present:
        tokenizer.add_special_tokens({"extra_special_tokens": [*present, *missing]}, replace_extra_special_tokens=False)
    return missing


def chat_template(
    tokenizer: Any, template_args: Mapping[str, Any], pinned_date: str | None, notes: list[str]
) -> ChatTemplate:
    """What renders conversations: template texts with the clock pinned, special tokens and the user's arguments."""
    now = datetime.fromisoformat(pinned_date) if pinned_date else datetime.now()
    texts = []
    choices: tuple[list[dict[str, Any]] | None, ...] = (None, [{}])
    for tools in choices:
        text = tokenizer.get_chat_template(tools=tools)
        parse(text)
        texts.append(pin_clock(text, now))
    if texts[0] != tokenizer.get_chat_template():
        notes.append(
            f"the template reads the clock: its date is pinned to {now.date().isoformat()} for this run; the saved one "
            "reads the clock again, so a prompt served on another day names that day"
        )
    if "unplaced" in map(generation_markers, texts):
        notes.append(
            "the template's generation markers stand where their places cannot be told (in a macro, a set block or "
            "another marker), and are not used: answers are trained whole"
        )
    variables = {**tokenizer.special_tokens_map, **template_args}
    return ChatTemplate(texts[0], texts[1], variables)


def fit_content(chat: ChatTemplate, notes: list[str]) -> ChatTemplate:
    """The template, told to get text as lists of parts where it renders no plain strings. Raises TemplateError."""
    try:
        probe(chat)
    except TemplateError:
        in_parts = replace(chat, parts=True)
        try:
            probe(in_parts)
        except TemplateError:
            probe(chat)
        notes.append("the template reads content as a list of parts: text is given to it as [{type: text, text: …}]")
        return in_parts
    return chat


def fit_arguments(chat: ChatTemplate, notes: list[str]) -> ChatTemplate:
    """The template, told to get arguments of tool calls as JSON text where it objects to objects alone, or writes them
    as Python prints them (`{'pitch': 'high'}`), which no parser of tool calls reads."""
    arguments = PROBE_CALL["function"]["arguments"]
    plain, in_json = with_a_tool(chat), replace(chat, json_arguments=True)
    if plain is not None and str(arguments) not in plain:
        return chat
    text, as_json = with_a_tool(in_json), json.dumps(arguments)
    # In quotes it is within a call that is printed whole.
    if text is not None and (plain is None or (as_json in text and repr(as_json) not in text)):
        notes.append("the template reads the arguments of tool calls as text: they are given to it as JSON text")
        return in_json
    if plain is not None:
        notes.append(
            f"the template writes tool calls as Python prints them, with {arguments}, which is no JSON: where rows "
            "hold some, check that what serves the model reads such calls, or choose another template"
        )
    return chat  # or it takes no such conversation at all; each row is told why


def end_of_calls(tokenizer: Any, chat: ChatTemplate, stops: Sequence[int], *, add: bool) -> str:
    """The mark of its own, if any, with which the template ends turns that call tools; made a token with `add`."""
    text = with_a_tool(chat, answered=False)
    known = list(tokenizer.get_added_vocab())
    names = tokenizer.convert_ids_to_tokens(list(stops))
    end = "" if text is None else call_end(text, PROBE_ARGUMENT, known, names)
    if end and add:
        add_tokens(tokenizer, (end,))
    return end


def with_a_tool(chat: ChatTemplate, *, answered: bool = True) -> str | None:
    """A question for which a tool is called, with what that answers, as the template renders it; None where it
    objects."""
    function = {"name": PROBE_TOOL, "description": PROBE_TOOL, "parameters": {"type": "object", "properties": {}}}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": PROBE_USER}, {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
        {"role": "tool", "tool_call_id": PROBE_CALL["id"], "name": PROBE_TOOL, "content": PROBE_ANSWER},
    ]  # fmt: skip
    tools = [{"type": "function", "function": function}]
    try:
        return chat.render([asked if answered else asked[:2]], tools, generation_prompt=answered)[0]
    except TemplateError:
        return None


def prints_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's template prints tools, calls with their arguments, and what tools answer."""
    try:
        chat = chat_template(tokenizer, {}, None, [])
        with deadline(10.0, "the chat template"):
            text = with_a_tool(fit_arguments(fit_content(chat, []), []))
    except (TemplateError, TemplateTimeout):
        return False
    return text is not None and text.count(PROBE_TOOL) > 1 and "pitch" in text and PROBE_ANSWER in text


def message_form(tokenizer: Any, template_args: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes of a plain message one as the tokenizer's own template reads it: found out as for training.

    A template that is not there, or that cannot be probed, gets plain ones; it says itself what it objects to.
    """
    if not tokenizer.chat_template:
        return dict
    try:
        chat = chat_template(tokenizer, template_args, None, [])
        with deadline(10.0, "the chat template"):
            return fit_arguments(fit_content(chat, []), []).given
    except (TemplateError, TemplateTimeout):
        return dict


def probe(chat: ChatTemplate) -> tuple[str, str]:
    """A question with its answer, alone and followed by the next question, as the template renders them."""
    user, answer = {"role": "user", "content": PROBE_USER}, {"role": "assistant", "content": PROBE_ANSWER}
    follow = {"role": "user", "content": PROBE_NEXT}
    error: TemplateError | None = None
    for opening in ([], [{"role": "system", "content": "flute setting"}]):
        try:
            texts = chat.render([[*opening, user, answer], [*opening, user, answer, follow]], generation_prompt=False)
            if all(PROBE_ANSWER in text for text in texts):
                return texts[0], texts[1]
            error = TemplateError("it leaves the answer out")
        except TemplateError as caught:
            error = caught
    raise TemplateError(
        f"data.template: the chat template cannot render a question and its answer: {error} "
        f"Choose another one ({', '.join(BUILT_IN)}, or a .jinja file)."
    )


def digest(tokenizer: Any, chat: ChatTemplate) -> str:
    """Changes whenever rendering or tokenising could."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [vocabulary, chat.text, chat.with_tools, json.dumps(dict(chat.variables), sort_keys=True, default=str)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
