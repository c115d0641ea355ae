"""A stall of one rank ends the job in bounded time, and says where it stalled."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from sft.errors import EXIT_FAILED

STALL_SECONDS = float(os.environ.get("SFT_STALL_SECONDS", "1800"))
# A rank that waits for others gets longer, so that the rank that stalls is the one that speaks and ends first.
PATIENCE_WHILE_WAITING = 1.5
_MARGIN_SECONDS = 5.0
# Where the main thread stands while a collective keeps it: in one, or in a backward pass that ends with one.
_WAITING_PLACES = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", "sft/distributed.py")


class Watchdog:
    """Ends the process (exit 1) when `beat` was not called for `timeout_s` seconds; prints phase and stacks once.

    The launcher ends the other ranks then. `describe()` adds what the caller knows (rank, step); it must not block.
    `note(reason)` may write it to a file; it is given a few seconds, since the disk may be what stalls.
    """

    def __init__(
        self,
        timeout_s: float,
        describe: Callable[[], str] = lambda: "",
        note: Callable[[str], None] = lambda reason: None,
    ) -> None:
        assert timeout_s > 0
        self._timeout_s = timeout_s
        self._describe = describe
        self._note = note
        self._phase = "start"
        self._lenient = False  # the longer time was already granted to this phase
        self._deadline = float("inf")
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.beat(self._phase)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def phase(self) -> str:
        """What the process is at, in words."""
        return self._phase

    def beat(self, phase: str, *, waiting: bool = False, timeout_s: float | None = None) -> None:
        """`phase` begins now. `waiting`: for other ranks. `timeout_s`: for a phase that may take longer."""
        allowed = timeout_s or self._timeout_s
        if waiting:
            allowed = allowed * PATIENCE_WHILE_WAITING + _MARGIN_SECONDS
        self._phase = phase
        self._lenient = waiting
        self._deadline = time.monotonic() + allowed

    def _watch(self) -> None:
        pause = min(1.0, self._timeout_s / 10)
        while not self._stopped.wait(pause):
            if time.monotonic() <= self._deadline:
                continue
            if not self._lenient and _main_thread_waits_for_others():
                self._lenient = True
                self._deadline += self._timeout_s * (PATIENCE_WHILE_WAITING - 1) + _MARGIN_SECONDS
                continue
            self._end()

    def _end(self) -> None:
        try:
            what = f"{self._describe()}: no progress for {self._timeout_s:g} s".removeprefix(": ")
            if self._lenient:
                what += " (waiting for another rank, which is the one that stalls)"
            what += f"; last phase: {self._phase}"
            print(f"error: {what}. Stacks follow.", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            noting = threading.Thread(target=self._note, args=(what,), daemon=True)
            noting.start()
            noting.join(_MARGIN_SECONDS)
        finally:
            os._exit(EXIT_FAILED)


def _main_thread_waits_for_others() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and any(place in frame.f_code.co_filename for place in _WAITING_PLACES)
