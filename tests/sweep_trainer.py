"""A stand-in for `sft train` in tests of the sweep: a real process with the trainer's command line and files.

It reads a real config, writes metrics.jsonl and status.json, checkpoints its step, resumes, and stops on SIGTERM with
exit code 75. Its loss is a plain function, so that anyone can say what a trial's value must be. SWEEP_TEST (JSON in
the environment) sets the seconds of a step, the faults by LoRA rank, and a file that records every start.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from sft.configfile import load_config
from sft.runfolder import MetricsLog, RunFolder
from sft.schedule import evaluation_steps


def loss_at(lr: float, rank: int, step: int, steps: int, seed: int = 0) -> float:
    """Best at lr 1e-4; falls with the steps; a hundredth worse for each seed."""
    return round(1 + abs(math.log10(lr) + 4) + rank / 1000 + seed / 100 + (1 - step / steps), 6)


def main() -> int:
    settings = json.loads(os.environ.get("SWEEP_TEST", "{}"))
    loaded = load_config(sys.argv[-1])
    config, folder = loaded.config, RunFolder(loaded.run_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two processes on one run folder: the test must fail
        return train(settings, loaded, config, folder)


def train(settings, loaded, config, folder) -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    fault = settings.get("faults", {}).get(str(config.model.lora.rank), "")
    steps = config.train.max_steps
    state = folder.path / "state.json"
    step = json.loads(state.read_text())["step"] if state.exists() else 0
    if "starts" in settings:
        with open(settings["starts"], "a") as starts:
            threads, cores = os.environ["OMP_NUM_THREADS"], sorted(os.sched_getaffinity(0))
            line = {"run": folder.path.name, "step": step, "pid": os.getpid(), "threads": threads, "cores": cores}
            starts.write(json.dumps(line | {"port": os.environ["MASTER_PORT"], "at": time.time()}) + "\n")
    if folder.read_status().get("state") == "done":
        return 0
    lr = 2e-4 if config.optim.lr == "auto" else config.optim.lr
    log = MetricsLog(folder.metrics)
    log.cut_after(step)
    folder.write_status("running", code=None, reason="", step=step)
    print(f"training {folder.path.name} from step {step}", flush=True)

    def evaluate() -> None:
        value = loss_at(lr, config.model.lora.rank, step, steps, config.run.seed)
        log.append({"event": "eval", "step": step, "loss": float("nan") if fault == "nan" and step else value})

    if step == 0:
        evaluate()
    while step < steps:
        time.sleep(settings.get("step_seconds", 0.01))
        step += 1
        misbehave(fault, step)
        log.append({"event": "train", "step": step, "loss": 1.0, "seconds": step * 0.5})
        if step in evaluation_steps(config.eval.every, steps):
            evaluate()
        state.write_text(json.dumps({"step": step}))
        if stopped:
            folder.write_status("stopped", code=75, reason="stopped by SIGTERM", step=step)
            return 75
    text = Path(sys.argv[-1]).read_text()
    folder.config.write_text(
        text.replace("micro_tokens: auto  # default", "micro_tokens: auto  # default; resolved to 64")
    )
    folder.write_status("done", code=0, reason="", step=step)
    return 0


def misbehave(fault: str, step: int) -> None:
    if step != 2:
        return
    if fault == "raise":
        raise RuntimeError("a deliberate fault")
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "usererror":
        print("error: data.jsonl:7: no answer here", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
