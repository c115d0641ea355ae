"""Where the ranks of a launch meet before their process group exists, so that none waits for one that has left.

Each rank prepares its data by itself, for as long as that takes. A rank that is stopped or fails meanwhile leaves word
in the launch's key-value store; the others find it there rather than wait for the group's timeout inside a call that
hears no signal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sft.distributed import LostContact
from sft.errors import LaunchError, Stopped

PATIENCE_S = 1800.0  # for ranks that prepare; as long as a process group waits
HOST_PATIENCE_S = 300.0  # for the rank that holds the store, which opens it before it prepares anything
_LINGER_S = 2.0
_PAUSE_S = 0.05
_KEYS = "sft-meeting"


class Meeting:
    """One a launch. Without several ranks, or where the launcher names no place to meet, it does nothing."""

    def __init__(self) -> None:
        environ = os.environ
        self._rank, self._world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        known = all(name in environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        self._is_held = known and self._world > 1
        self._hosts = self._rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store: Any = None  # a TCPStore
        if self._is_held and self._hosts:
            self._connect(1.0)

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Inside, whatever ends this rank is told to the others."""
        try:
            yield
        except BaseException as error:
            if self._is_held:
                self._leave_word("stopped" if isinstance(error, Stopped) else "failed", str(error))
            raise

    def wait(self, check: Callable[[], None]) -> None:
        """Until all ranks are here. `check` is called all the time and may raise.

        Raises Stopped where a rank was stopped, LostContact where one failed or is gone, LaunchError after PATIENCE_S.
        """
        if not self._is_held:
            return
        self._find_host(check)
        assert self._store is not None
        deadline = time.monotonic() + PATIENCE_S
        try:
            self._store.set(f"{_KEYS}/here/{self._rank}", "")
            while missing := [rank for rank in range(self._world) if not self._store.check([f"{_KEYS}/here/{rank}"])]:
                check()
                for rank in missing:
                    self._heed_word_of(rank)
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"rank {self._rank}: rank {', '.join(map(str, missing))} did not finish preparing within "
                        f"{PATIENCE_S / 60:.0f} minutes. Run sft prepare first, then launch again."
                    )
                time.sleep(_PAUSE_S)
        except dist.DistError as error:
            raise self._lost("the rank that holds the store ended while the data was prepared") from error

    def _connect(self, timeout_s: float) -> None:
        environ = os.environ
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=self._hosts,
            timeout=timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip

    def _find_host(self, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + HOST_PATIENCE_S
        while self._store is None:
            check()
            try:
                self._connect(1.0)
            except dist.DistError as error:
                if time.monotonic() > deadline:
                    raise self._lost("the rank that holds the store cannot be reached") from error

    def _heed_word_of(self, rank: int) -> None:
        assert self._store is not None
        key = f"{_KEYS}/gone/{rank}"
        if not self._store.check([key]):
            return
        what, why = self._store.get(key).decode().split("\n", 1)
        if what == "stopped":
            raise Stopped(f"{why} (rank {rank}, while the data was prepared)")
        raise self._lost(f"rank {rank} ended while it prepared the data; its own message says why")

    def _lost(self, why: str) -> LostContact:
        print(f"[rank {self._rank}] stopped: {why}", file=sys.stderr, flush=True)
        return LostContact(why)

    def _leave_word(self, what: str, why: str) -> None:
        with suppress(dist.DistError):  # nobody is there to be told
            if self._store is None:
                self._connect(_LINGER_S)
            assert self._store is not None
            self._store.set(f"{_KEYS}/gone/{self._rank}", f"{what}\n{why.splitlines()[0] if why else what}")
            if self._hosts:  # the store ends with this process: those who wait already read it first
                time.sleep(_LINGER_S)
