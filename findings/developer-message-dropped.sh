#!/usr/bin/env bash
# Who meets it: anybody who finetunes on rows with a `developer` message (OpenAI's newer role for instructions) and takes a
# model's chat template as it is. Many templates have no branch for that role: some raise, which is fine, but others leave
# the message out without a word, so that the model is taught to obey instructions that it never saw.
# What to do: before training, render one row and look for the words of each message in the text; or move developer
# messages into the system message.
# Counts it over the inference templates that trl ships. Needs no model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jinja2==3.1.6
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" trl==1.16.0
python3 -m zipfile -e "$work"/trl-1.16.0-*.whl "$work/trl"
cat > "$work/count.py" <<'P'
import json, pathlib, sys
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MESSAGES = [
    {"role": "developer", "content": "Answer only in French."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Bonjour"},
]

def fail(text):
    raise ValueError(text)

outcome = {"printed": [], "raises": [], "dropped": [], "reads parts only": []}
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
    if file.stem.endswith("_training"):
        continue
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals.update(raise_exception=fail, strftime_now=lambda form: "2026-01-01")
    try:
        text = env.from_string(file.read_text()).render(
            messages=MESSAGES, add_generation_prompt=False, bos_token="<s>", eos_token="</s>"
        )
    except Exception as error:  # a refusal in words is what one would wish for
        outcome["raises"].append(file.stem)
        continue
    kept = "Answer only in French." in text
    if "Hello there" not in text or "Bonjour" not in text:  # templates of vision models want lists of content parts
        outcome["reads parts only"].append(file.stem)
        continue
    outcome["printed" if kept else "dropped"].append(file.stem)

print("trl 1.16.0, jinja2 3.1.6: a developer message in a conversation of three messages")
for what, names in outcome.items():
    print(f"{what:16} {len(names):2}: {', '.join(names)}")
assert "qwen3" in outcome["dropped"] and len(outcome["dropped"]) == 11, "behaviour changed"
P
"$work/venv/bin/python" "$work/count.py" "$work/trl/trl/chat_templates"
