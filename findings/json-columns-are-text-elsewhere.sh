#!/usr/bin/env bash
# Who meets it: anybody who writes chat rows with mixed tool arguments through `datasets` with on_mixed_types="use_json"
# (which it needs, for Arrow knows no column of several types) and reads the Parquet file with anything else: PyArrow,
# Polars, DuckDB, a trainer of one's own. Where the calls have other argument names, the arguments are a piece of JSON text.
# Where one argument has other types, that argument is, and the text "on" comes with its quotes, as the four characters
# '"on"', which nothing in the value gives away. `datasets` decodes both by itself, from metadata of its own in the schema.
# What to do: read the features in the schema's `huggingface` metadata and parse what they call Json, at any depth.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > "$work/show.py" <<'P'
import sys, datasets, pyarrow, pyarrow.parquet

datasets.disable_progress_bars()
def row(arguments):
    call = {"name": "set", "arguments": arguments}
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}

def first_message(rows, path):
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)
    again = datasets.Dataset.from_parquet(path)[0]["messages"][0]
    return pyarrow.parquet.read_table(path).to_pylist()[0]["messages"][0], again

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
keys, keys_again = first_message([row({"city": "Paris"}), row({"zone": "UTC"})], sys.argv[1])
print("other argument names: pyarrow reads", repr(keys), "and datasets", repr(keys_again))
types, types_again = first_message([row({"value": "on"}), row({"value": 3})], sys.argv[2])
print("other argument types: pyarrow reads", repr(types), "and datasets", repr(types_again))
assert keys["tool_calls"][0]["arguments"] == '{"city":"Paris"}', "behaviour changed"
assert keys_again["tool_calls"][0]["arguments"] == {"city": "Paris"}, "behaviour changed"
assert types["tool_calls"][0]["arguments"] == {"value": '"on"'}, "behaviour changed"
assert types_again["tool_calls"][0]["arguments"] == {"value": "on"}, "behaviour changed"
P
HF_HUB_OFFLINE=1 HF_HOME="$work" "$work/venv/bin/python" "$work/show.py" "$work/keys.parquet" "$work/types.parquet"
