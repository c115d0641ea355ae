"""Serving equals training: held-out prompts go through the saved folder exactly as a stranger would load it.

The ids that the stranger's `apply_chat_template` makes must be those that training saw, and greedy generation must end
by itself at a token that the saved generation config names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sft.errors import TemplateError
from sft.evaluate import inference_mode_of
from sft.generate import complete
from sft.templating import describe as objection
from sft.templating import pin_clock
from sft.tokenizer import message_form

SHOWN = 160  # characters of a text that a report carries
AROUND = 2  # tokens shown on either side of a difference between days
LATER = timedelta(days=401, hours=13, minutes=7)  # another year, month, weekday and hour: whatever a template writes


def check_serving(
    folder: Path | str,
    samples: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    answered: int | None = None,
    model: Any = None,
    device: Any = None,
    template_args: Mapping[str, Any] | None = None,
    pinned_date: str | None = None,
    trust_remote_code: bool = False,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Checks `folder` on held-out samples and returns what came of it, as plain values.

    A sample holds `source`, `messages` and `tools` (or a string `prompt`), and the `prompt_ids` of training. Messages
    are given to the template as training gave them: where it reads content as a list of parts, in parts. `model`
    spares loading the weights a second time, onto `device`: tokenizer and generation config come from the folder in
    any case. `answered`: how many of the prompts the model answers; the ids of all of them are compared. `tick` is told
    how many tokens the answers have.
    `template_args` are what training gave to the template; a stranger has to give them too, so the result names them.
    `pinned_date` is the ISO date that the run told to templates which read the clock.

    Keys: passed, checked, ids_equal, answered, stopped, stop_tokens, max_new_tokens, weights ("folder" or "live"),
    template_args, row_template_args (the sets that samples bring of their own, as `template_args`), date (None unless
    the template reads the clock), another_day (what a stranger's prompt holds in place of training's on a later date;
    None where no prompt differs), mismatches, answers, excepted (prompts whose text spells a control token: a
    stranger's tokenizer turns that text into the token, training did not).
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    arguments, own = dict(template_args or {}), row_arguments(samples)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    saved, date = tokenizer.chat_template, None
    if pinned_date is not None and "strftime_now" in str(saved):
        date = datetime.fromisoformat(pinned_date)
        tokenizer.chat_template = pinned(saved, date)
    form = message_form(tokenizer, arguments)
    samples = [{**sample, "messages": list(map(form, sample.get("messages") or ()))} for sample in samples]
    stop_ids = saved_stop_ids(folder)
    mismatches: list[dict[str, Any]] = []
    excepted: list[str] = []
    for sample in samples:
        difference = prompt_difference(tokenizer, sample, arguments)
        if difference is None:
            continue
        if _spells_control_token(tokenizer, sample):
            excepted.append(str(sample["source"]))
        else:
            mismatches.append({"source": sample["source"], **difference})
    weights = "folder" if model is None else "live"
    if samples and model is None:
        model = load_as_stranger(folder, trust_remote_code=trust_remote_code)
        model = model if device is None else model.to(device)
    asked = samples[:answered]
    answers = _answers(model, tokenizer, asked, stop_ids, max_new_tokens, tick) if asked else []
    stopped = sum(answer["stopped"] for answer in answers)
    return {
        "passed": bool(samples) and not mismatches and stopped == len(asked),
        "checked": len(samples),
        "ids_equal": len(samples) - len(mismatches) - len(excepted),
        "answered": len(asked),
        "stopped": stopped,
        "stop_tokens": tokenizer.convert_ids_to_tokens(stop_ids),
        "max_new_tokens": max_new_tokens,
        "weights": weights,
        "template_args": arguments,
        "row_template_args": own,
        "date": date and date.date().isoformat(),
        "another_day": date and another_day(tokenizer, saved, samples, arguments, date + LATER),
        "mismatches": mismatches,
        "excepted": excepted,
        "answers": answers,
    }


def describe(result: Mapping[str, Any]) -> str:
    """One or two sentences for the console and the model card."""
    checked = result["checked"]
    if not checked:
        return "Not checked: no held-out prompts."
    exact = f"{result['ids_equal']} of {checked} held-out prompts give the very token ids of training"
    if result["template_args"]:
        exact += " (with " + ", ".join(f"{k}={v!r}" for k, v in result["template_args"].items()) + ")"
    if own := result.get("row_template_args"):
        sets = "; ".join(", ".join(f"{key}={value!r}" for key, value in given.items()) for given in own)
        exact += f" (each asked with the template arguments of its row: {sets})"
    if result["date"]:
        exact += f" (the template reads the clock; asked as of {result['date']}, the day the run began"
        if other := result["another_day"]:
            exact += (
                f": a prompt of {other['date']} has {other['served']!r} where training had {other['trained']!r}, "
                f"{other['differ']} of {checked} prompts differ so"
            )
        exact += ")"
    if result["excepted"]:
        exact += f"; {len(result['excepted'])} spell a control token in their text, which a plain tokenizer obeys"
    if result["mismatches"]:
        first = result["mismatches"][0]
        exact += (
            f"; {first['source']} differs from token {first['at']} on: training saw {first['trained']!r}, "
            f"the saved folder gives {first['served']!r}"
        )
    ended = (
        f"{result['stopped']} of {result.get('answered', checked)} greedy answers end by themselves within "
        f"{result['max_new_tokens']} tokens"
    )
    if not result["stop_tokens"]:
        ended += " (the saved generation config names no stop token)"
    return f"{exact}. {ended}.{_rounding(result.get('rounded'))}"


def _rounding(rounded: Mapping[str, Any] | None) -> str:
    """What saving in 16 bits changed, where it was measured."""
    if rounded is None or rounded["loss"] is None or rounded["loss_as_trained"] is None:
        return ""
    return (
        f" final/ is saved in {rounded['dtype']}: held-out loss {rounded['loss']:.4f} there, "
        f"{rounded['loss_as_trained']:.4f} as trained (checkpoints/step-{rounded['step']:08d}/model)."
    )


def prompt_difference(
    tokenizer: Any, sample: Mapping[str, Any], template_args: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Where the served ids first part from training's: {at, trained, served}; None where they are equal.

    `served` says what the template objects to where it makes no prompt at all.
    """
    trained = list(sample["prompt_ids"])
    try:
        served = served_ids(tokenizer, sample, template_args)
    except TemplateError as error:
        return {"at": 0, "trained": tokenizer.decode(trained[:12]), "served": f"no prompt, but an error: {error}"}
    if served == trained:
        return None
    at = shared(trained, served)
    window = slice(max(0, at - 4), at + 12)
    return {"at": at, "trained": tokenizer.decode(trained[window]), "served": tokenizer.decode(served[window])}


def served_ids(tokenizer: Any, sample: Mapping[str, Any], template_args: Mapping[str, Any]) -> list[int]:
    """The prompt's ids as a stranger makes them: through the saved template, or from the plain string. Raises
    TemplateError."""
    messages = list(sample.get("messages") or ())
    if not messages:
        ids: list[int] = tokenizer(sample.get("prompt", ""))["input_ids"]
        return ids
    if messages[-1]["role"] == "assistant":  # the reference answer
        messages = messages[:-1]
    tools = list(sample.get("tools") or ()) or None
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True,
            **{**template_args, **(sample.get("template_args") or {})},
        )  # fmt: skip
    except Exception as error:  # a template may raise anything: it is a program
        raise TemplateError(objection(error)) from error
    return list(rendered["input_ids"])


def row_arguments(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct template arguments that samples bring of their own, in the order of their coming."""
    found: list[dict[str, Any]] = []
    for sample in samples:
        own = dict(sample.get("template_args") or {})
        if own and own not in found:
            found.append(own)
    return found


def saved_stop_ids(folder: Path) -> list[int]:
    """The tokens at which generation stops for whoever loads `folder`: its generation config's, nothing else."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return []
    load: Any = GenerationConfig.from_pretrained
    stops = load(folder).eos_token_id
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, list | tuple) else [int(stops)]


def load_as_stranger(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Plain transformers or PEFT, by the folder alone. An adapter brings its base by the name that it carries."""
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)


def pinned(template: Any, now: datetime) -> Any:
    """A tokenizer's template, or its templates by name, with the clock standing at `now`."""
    if isinstance(template, dict):
        return {name: pin_clock(text, now) for name, text in template.items()}
    return pin_clock(template, now)


def another_day(
    tokenizer: Any,
    template: Any,
    samples: Sequence[Mapping[str, Any]],
    template_args: Mapping[str, Any],
    now: datetime,
) -> dict[str, Any] | None:
    """How prompts differ from training's when the saved template is rendered at `now`: {date, differ, trained, served}.

    `trained` and `served` are the texts in which the first such prompt differs, with some tokens around.
    """
    tokenizer.chat_template = pinned(template, now)
    found = []
    for sample in samples:
        trained = list(sample["prompt_ids"])
        try:
            served = served_ids(tokenizer, sample, template_args)
        except TemplateError:  # on the run's own day it made no prompt either, which is among the mismatches
            continue
        if trained != served and not _spells_control_token(tokenizer, sample):
            found.append((trained, served))
    if not found:
        return None
    trained, served = found[0]
    front, back = shared(trained, served), shared(trained[::-1], served[::-1])
    back = min(back, len(trained) - front, len(served) - front)
    texts = [
        tokenizer.decode(ids[max(0, front - AROUND) : len(ids) - back + AROUND])[:SHOWN] for ids in (trained, served)
    ]
    return {"date": now.date().isoformat(), "differ": len(found), "trained": texts[0], "served": texts[1]}


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _answers(
    served: Any,
    tokenizer: Any,
    samples: Sequence[Mapping[str, Any]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    tick: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    prompts = [list(sample["prompt_ids"]) for sample in samples]
    with inference_mode_of(served):
        completions = complete(served, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, tick=tick)
    return [
        {"source": sample["source"], "completion": completion.text[:SHOWN], "stopped": completion.stopped}
        for sample, completion in zip(samples, completions, strict=True)
    ]


def _spells_control_token(tokenizer: Any, sample: Mapping[str, Any]) -> bool:
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    texts = [str(sample.get("prompt", ""))]
    for message in sample.get("messages") or ():
        content = message.get("content")
        texts.append(content if isinstance(content, str) else str(content))
    return any(token in text for token in tokens for text in texts)
