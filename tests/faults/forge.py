"""A process that has imported everything once and forks a fresh `sft` for each request: a second a run, not ten.

Reads one JSON request a line. `{"argv": [...], "env": {...}, "out": FILE, "faults": [...], "set": {...}, "cwd": DIR}`
answers with the child's pid; `{"poll": PID}` answers with its exit status (negative: the signal), or null while it
runs. The forked process is as fresh as one that a shell starts: nothing was computed before the fork, no thread runs.

A fault is `{"where": "sft.module:Name.function", "call": N, "when": "before" | "after", "what": ...}`: the function
is wrapped in the child, and at its N-th call the fault happens. The product knows nothing of it. "set" changes
constants ("sft.module:NAME") that a fresh process would have read from its environment. "more_memory" limits the
address space to so many bytes beyond what the fresh process has.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import psutil

HEAVY = (
    "torch", "transformers", "accelerate", "peft", "safetensors.torch", "datasets", "torch.nn.parallel",
    "torch.distributed.tensor", "transformers.models.llama.modeling_llama", "sft.__main__", "sft.train",
)  # fmt: skip


def answer(value: object) -> None:
    print(json.dumps(value), flush=True)


def strike(what: str) -> None:
    """The faults."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "stall":
        time.sleep(600)
    elif what.startswith("raise"):
        raise RuntimeError(what.removeprefix("raise").strip() or "injected fault")
    elif what == "disk full":
        raise OSError(28, "No space left on device", "injected")
    elif what == "out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")
    else:
        raise AssertionError(what)


def plant(fault: dict[str, Any]) -> None:
    module_name, _, path = fault["where"].partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == fault["call"] or fault["call"] == 0
        if now and fault["when"] == "before":
            strike(fault["what"])
        if now and fault["when"] == "result":
            return tamper(function(*args, **kwargs), fault["what"])
        result = function(*args, **kwargs)
        if now and fault["when"] == "after":
            strike(fault["what"])
        return result

    setattr(owner, name, wrapped)


def tamper(value: Any, what: str) -> Any:
    """Change what a function returns: non-finite numbers, and restored state that is a little wrong."""
    import torch

    if what in ("nan", "inf"):
        return value * float(what)
    whole = value
    if what == "last bit":  # of the largest number of one tensor, where the rounding of a few steps keeps it
        value = dict(value.named_parameters()) if isinstance(value, torch.nn.Module) else value
        names = sorted(key for key in value if value[key].is_floating_point() and value[key].numel() > 1)
        # a second moment forgets a thousandth a step, a first one a tenth
        name = next((name for name in names if name.endswith("exp_avg_sq")), names[0])
        flat = value[name].detach().view(-1)
        largest = int(flat.abs().argmax())
        flat[largest] = torch.nextafter(flat[largest], torch.tensor(float("inf")))
        return whole
    if what == "zero":
        return 0
    raise AssertionError(what)


def child(request: dict[str, Any]) -> NoReturn:
    os.setsid()
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(request.get("env", {}))
    os.chdir(request.get("cwd", "."))
    if "more_memory" in request:
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + request["more_memory"],) * 2)
    code = 70
    try:
        for name, value in request.get("set", {}).items():
            module, _, attribute = name.partition(":")
            setattr(importlib.import_module(module), attribute, value)
        for fault in request.get("faults", []):
            plant(fault)
        from sft.__main__ import main

        sys.argv = ["sft", *request["argv"]]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        _leave(code)


def _leave(code: int) -> NoReturn:
    """As the interpreter would: pools end, threads that are not daemons are waited for, streams are flushed."""
    import threading

    threading._shutdown()  # what the interpreter itself calls at its end; there is no public name for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    answer("ready")
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if children[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    children[pid] = os.waitstatus_to_exitcode(status)
            answer(children[pid])
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        children[pid] = None
        answer(pid)


if __name__ == "__main__":
    main()
