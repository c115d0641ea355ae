"""The README.md of final/: what was trained on what, with which result, and how to talk to it. Plain values in,
Markdown out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sft.hub import is_local

METRICS = {
    "loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "stop_probability": "probability of stopping where a turn ends",
}
REASONING = {
    "train": "Reasoning was trained. Serve it as usual: the model writes its thoughts before it answers, and a "
    "server's reasoning parser takes them out.",
    "context": "Reasoning was context and not trained: the model thinks as its base does and answers as trained. Leave "
    "it room to think.",
    "drop": "Reasoning was left out: the model is taught to answer without it. Where a prompt opens a block of it, the "
    "answer closes the block first. Leave reasoning out of earlier messages as well.",
    "close": "Answers without reasoning close the block that a prompt opens, so the model may answer without thinking. "
    "Serve it as usual: what stands before the closing text is reasoning, mostly empty.",
}
METHODS = {"full": "full finetune", "lora": "LoRA", "qlora": "QLoRA"}


def model_card(
    config: Mapping[str, Any],
    data_report: Mapping[str, Any],
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    best: str | None = None,
    serving: str | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    steps: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
    resolved: Mapping[str, Any] | None = None,
    license: str | None = None,
    merged: bool = False,
    changes: Sequence[str] = (),
) -> str:
    """Markdown with a YAML header for the hub.

    `config`: the resolved config as nested plain values. `data_report`: `Prepared.report`. `before` and `after`: the
    evaluations at step 0 and of the weights in this folder. `best`: the metric by which its checkpoint was chosen.
    `serving`: what `serving.describe` said. `samples`: answers of the last evaluation. `tokens` and `seconds` of
    training. `environment`: package versions. `resolved`: what `auto` became, by dotted key. `license`: only if known.
    `merged`: the adapter has been folded into the base, so that the folder is a plain model. `changes`: what became
    different along the way, a line each.
    """
    plain = merged or config["model"]["tuning"] == "full"
    sections = [
        _header(config, data_report, license, plain=plain),
        _opening(config, plain=plain),
        _talk(config, data_report, plain=plain),
        _results(before, after, best, data_report),
        _samples(samples),
        _data(data_report),
        _training(config, resolved or {}, steps=steps, tokens=tokens, seconds=seconds, changes=changes),
        _template(data_report, config, serving),
        _versions(environment),
    ]
    return "\n".join(section.strip("\n") + "\n" for section in sections if section)


def public_name(name: str) -> str:
    """A model's name without folders of the machine it was trained on; hub ids stay whole."""
    if name.startswith("pkg://"):
        return name.removeprefix("pkg://")
    path = PurePath(name)
    local = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf" or len(path.parts) > 2
    return path.name if local else name


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and public_name(name) == name


def _is_on_hub(name: str) -> bool:
    """Whether a model or a source of data is the hub's, as far as can be told: `data/a.jsonl` and `models/mine` beside
    the run look like ids, too."""
    file = PurePath(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
    return is_hub_id(name) and not file and not is_local(name)


def _header(config: Mapping[str, Any], report: Mapping[str, Any], license: str | None, *, plain: bool) -> str:
    name, tuning = config["model"]["name"], config["model"]["tuning"]
    lines = ["---"]
    if _is_on_hub(name):
        lines += [f"base_model: {name}"]
        lines += [f"base_model_relation: {'finetune' if plain else 'adapter'}"]
    lines += [f"library_name: {'transformers' if plain else 'peft'}", "pipeline_tag: text-generation"]
    if license:
        lines.append(f"license: {license}")
    datasets = [source["path"] for source in report.get("by_source", ()) if _is_on_hub(str(source["path"]))]
    if datasets:
        lines += ["datasets:", *(f"  - {path}" for path in dict.fromkeys(datasets))]
    tags = ["sft", "conversational"] + ([] if tuning == "full" else ["lora"])
    return "\n".join([*lines, "tags:", *(f"  - {tag}" for tag in tags), "---"])


def _opening(config: Mapping[str, Any], *, plain: bool) -> str:
    name, tuning = public_name(config["model"]["name"]), config["model"]["tuning"]
    title = PurePath(str(config["run"].get("dir") or "model")).name
    kind = "A" if plain else "An adapter: a"
    folded = ", folded into the weights of its base" if plain and tuning != "full" else ""
    revision = f" (revision `{config['model']['revision']}`)" if config["model"].get("revision") else ""
    return f"# {title}\n\n{kind} {METHODS[tuning]} of **{name}**{revision}{folded}."


def _talk(config: Mapping[str, Any], report: Mapping[str, Any], *, plain: bool) -> str:
    arguments = "".join(f", {key}={value!r}" for key, value in (config["data"].get("template_args") or {}).items())
    if plain:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load = 'model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")'
    else:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, GenerationConfig"
        load = (
            'model = AutoPeftModelForCausalLM.from_pretrained(folder, device_map="auto")\n'
            "model.generation_config = GenerationConfig.from_pretrained(folder)  # where to stop"
        )
    title, hint = "Talk to it", "\n\nOr in a terminal: `sft chat FOLDER`."
    content = '[{"type": "text", "text": "Hello!"}]' if report.get("content_in_parts") else '"Hello!"'
    inputs = f"""messages = [{{"role": "user", "content": {content}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{arguments}
).to(model.device)"""
    if report.get("template") == "none":
        title, hint = "Let it write", ""
        inputs = 'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)'
    return f"""## {title}

```python
{imports}

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
{inputs}
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```{hint}"""


def _results(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, best: str | None, report: Mapping[str, Any]
) -> str:
    if not after:
        return "## Results\n\nNot evaluated: no rows were held out."
    rows = (report.get("eval") or {}).get("kept")
    over = f"On {rows:,} held-out rows" if rows else "On held-out rows"
    lines = ["## Results", "", f"{over}, over all trained tokens."]
    if best:
        lines[-1] += f" These weights are the checkpoint with the best `{best}`."
    lines += ["", "| | before | after |", "|---|---:|---:|"]
    for key, title in METRICS.items():
        if after.get(key) is not None:
            lines.append(f"| {title} | {_number((before or {}).get(key))} | {_number(after[key])} |")
    return "\n".join(lines)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    lines = ["## Samples", "", "Greedy answers to held-out prompts.", ""]
    for sample in samples[:4]:
        lines += [_fenced(f"{sample['prompt']}{sample['completion']}{'' if sample['stopped'] else ' […]'}"), ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _data(report: Mapping[str, Any]) -> str:
    lines = ["## Data", "", "| source | format | rows | kept | examples | tokens | trained |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for source in report.get("by_source", ()):
        path = str(source["path"])
        shown = path if is_hub_id(path) else PurePath(path).name
        counts = (_count(source.get(key)) for key in ("rows", "kept", "examples", "tokens", "trained_tokens"))
        lines.append(f"| {_cell(shown)} | {source.get('format', '')} | " + " | ".join(counts) + " |")
    totals = (_count(report.get(key)) for key in ("rows", "kept", "examples", "tokens", "trained_tokens"))
    lines.append("| all | | " + " | ".join(totals) + " |")
    dropped = {reason: count for reason, count in (report.get("dropped") or {}).items() if count}
    if dropped:
        lines += ["", "Dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) + "."]
    return "\n".join(lines)


def _training(
    config: Mapping[str, Any],
    resolved: Mapping[str, Any],
    *,
    steps: int | None,
    tokens: int | None,
    seconds: float | None,
    changes: Sequence[str],
) -> str:
    model, optim = config["model"], config["optim"]
    learning_rate = _with_resolved(optim["lr"], resolved.get("optim.lr"))
    precision = _with_resolved(model["precision"], resolved.get("model.precision"))
    facts = [("method", METHODS[model["tuning"]])]
    if model["tuning"] != "full":
        lora = model["lora"]
        facts.append(("adapter", f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"))
        facts.append(("on", lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])))
    facts += [
        ("conversations a step", str(config["batch"]["examples"])),
        ("epochs", f"{config['train']['epochs']:g}"),
        ("steps", _count(steps)),
        ("tokens seen", _count(tokens)),
        ("time", "" if seconds is None else _duration(seconds)),
        ("optimizer", str(optim["type"])),
        ("learning rate", f"{learning_rate}, {optim['schedule']}"),
        ("precision", precision),
        ("seed", str(config["run"]["seed"])),
    ]
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts if value]
    listed = ["", *(f"- {_cell(change)}" for change in changes)] if changes else []
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows, *listed])


def _template(report: Mapping[str, Any], config: Mapping[str, Any], serving: str | None) -> str:
    stops = " ".join(f"`{token}`" for token in report.get("stop_tokens", ()))
    lines = ["## Template", "", f"Chat template: {report.get('template', config['data']['template'])}. "]
    lines[-1] += f"A turn ends with {stops}." if stops else ""
    arguments = config["data"].get("template_args")
    if arguments:
        lines += ["", f"The template was given `{json.dumps(arguments, ensure_ascii=False)}`; give it the same."]
    lines += _reasoning(report, config["data"].get("reasoning"))
    lines += ["", f"Serving equals training: {serving or 'not checked.'}"]
    return "\n".join(lines)


def _reasoning(report: Mapping[str, Any], choice: str | None) -> list[str]:
    """What was chosen for reasoning, and how to serve it."""
    altered = report.get("altered") or {}
    closed = altered.get("reasoning_closed", 0)
    lines = ["", f"`data.reasoning: {choice}`: {REASONING[choice]}"] if choice else []
    if closed and not choice:
        lines += ["", f"In {closed:,} rows an answer without reasoning closes the block that its prompt opens, as the "
                      "template renders it: the model is taught to answer without thinking."]  # fmt: skip
    if altered.get("closed_block"):
        lines += ["", "Prompts end with a reasoning block that is closed already; the answers stand behind it. Serve "
                      "it without turning reasoning on."]  # fmt: skip
    return lines


def _versions(environment: Mapping[str, str] | None) -> str:
    if not environment:
        return ""
    return "Made with " + ", ".join(f"{name} {version}" for name, version in environment.items()) + "."


def _with_resolved(given: Any, became: Any) -> str:
    """`auto → mixed`; one of them where they are the same, or where nothing was recorded."""
    own, final = _number(given), _number(became)
    return own if became is None or own == final else f"{own} → {final}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ("–" if value is None else str(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
