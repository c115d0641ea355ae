#!/usr/bin/env bash
# Who meets it: anybody who builds rows with tool calls in Python, makes a `datasets` table of them and writes it with
# `to_json`. Arrow gives all rows one type, so each call gets the argument names of all others, with null as value, and the
# JSON file holds them as if they had been said. A chat template prints them, and the model learns to call tools with
# `"seconds": null`. Written with `json.dumps` row by row, the file holds what the rows hold.
# What to do: write JSON Lines yourself, or `from_list(rows, on_mixed_types="use_json")` only where the reader is `datasets`
# too; and look whether a file holds null arguments that the tool's schema does not know.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > "$work/show.py" <<'P'
import json, sys, datasets

datasets.disable_progress_bars()

def row(question, name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "", "tool_calls": [call]}]}

rows = [row("Weather?", "weather", {"city": "Paris"}), row("Time?", "clock", {"zone": "UTC", "seconds": True})]
datasets.Dataset.from_list(rows).to_json(sys.argv[1])
read = [json.loads(line) for line in open(sys.argv[1])]
found = [r["messages"][1]["tool_calls"][0]["function"]["arguments"] for r in read]
print("datasets", datasets.__version__)
print("given  ", [r["messages"][1]["tool_calls"][0]["function"]["arguments"] for r in rows])
print("written", found)
assert found == [
    {"city": "Paris", "zone": None, "seconds": None}, {"city": None, "zone": "UTC", "seconds": True}
], "behaviour changed"
P
HF_HUB_OFFLINE=1 HF_HOME="$work" "$work/venv/bin/python" "$work/show.py" "$work/rows.jsonl"
