"""One training of ours through the command line; prints speed, memory and losses as JSON. Started by peers.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import peak_gib


def main(settings: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, "-m", "sft", "train", str(settings["config"]), f"run.dir={run}",
            f"model.tuning={settings['tuning']}", f"train.max_steps={settings['steps']}",
            f"model.compile={str(settings['compile']).lower()}",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    first, last = steps[0], steps[-1]
    print(
        json.dumps(
            {
                "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
                "peak_gib": last["peak_memory_gib"] if settings["on_gpu"] else peak_gib(children=True),
                "losses": [event["loss"] for event in steps],
                "tokens": last["tokens"],
                "trained_tokens": last["trained_tokens"],
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
