"""SIGKILL before each system call that a save or a rotation makes, and a power cut at the same places.

Run as a program: `python kill_in_save.py VARIANT CUT`. VARIANT names the store under test: `real`, or one of the
deliberately broken ones below, which must be caught. CUT is `kill` or `power`. Prints one violation a line, and how
many places were tried to stderr.

No flag in the product: an audit hook sees each open, rename, remove, mkdir and rmdir before it happens, and `os.fsync`
is wrapped in the child; the child kills itself at the n-th. `power` also does what a power cut may do to what was not
flushed: each file under the root whose content changed since its last fsync is cut in half, and each rename whose
folder was not flushed since is undone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import sft.checkpoint as product
from sft.checkpoint import CheckpointStore, complete_checkpoints, find_resumable, step_of, verify
from sft.errors import ResumeError

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.link", "os.truncate"}
KEEP = 2
BEST = 10
EARLIER = (10, 20, 30)  # already there, 10 being the best so far
LATER = (40, 50)  # saved by the process that is killed


def write(folder: Path) -> None:
    (folder / "model").mkdir()
    with open(folder / "model" / "weights.safetensors", "wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"w" * 1000)
            tick()  # killed inside a file
    (folder / "state.json").write_bytes(b'{"step": 1}')


class Killer:
    """Counts events under `root`; at number `at` it kills the process. `at` 0 only counts."""

    def __init__(self, root: Path, at: int, cut: str) -> None:
        self.root, self.at, self.cut = str(root), at, cut
        self.count = 0
        self.flushed: dict[int, tuple[int, int]] = {}  # inode -> (mtime_ns, size) at its last fsync
        self.renamed: list[tuple[str, str]] = []  # since the last fsync of the folder
        self.busy = False
        self.real_fsync = os.fsync

    def install(self) -> None:
        for folder, _, files in os.walk(self.root):
            for name in files:
                self.remember(os.stat(os.path.join(folder, name)))
        sys.addaudithook(self.hook)
        os.fsync = self.fsync  # type: ignore[assignment]

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and not self.busy and self.at >= 0:
            paths = [str(a) for a in arguments if isinstance(a, str | os.PathLike)]
            if event != "open" or any(path.startswith(self.root) for path in paths):
                self.tick()
                if event == "os.rename":
                    self.renamed.append((paths[0], paths[1]))

    def fsync(self, descriptor: int) -> None:
        self.tick()
        self.real_fsync(descriptor)
        self.remember(os.fstat(descriptor))
        self.renamed = [
            (source, target)
            for source, target in self.renamed
            if not os.path.samestat(os.stat(os.path.dirname(target)), os.fstat(descriptor))
        ]
        self.tick()

    def remember(self, status: os.stat_result) -> None:
        self.flushed[status.st_ino] = (status.st_mtime_ns, status.st_size)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.busy = True
            if self.cut == "power":
                self.lose_what_was_not_flushed()
            os.kill(os.getpid(), signal.SIGKILL)

    def lose_what_was_not_flushed(self) -> None:
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = os.path.join(folder, name)
                status = os.stat(path)
                if self.flushed.get(status.st_ino) != (status.st_mtime_ns, status.st_size):
                    os.truncate(path, status.st_size // 2)
        for source, target in reversed(self.renamed):
            if os.path.isdir(target) and not os.path.exists(source):
                os.rename(target, source)


tick: Callable[[], None] = lambda: None  # noqa: E731  (replaced in the child)


def manifest_after_the_rename(monkey: type[CheckpointStore]) -> None:
    def publish(self: CheckpointStore, step: int, write: Callable[[Path], None]) -> None:
        final = self._root / f"step-{step:08d}"
        final.mkdir()
        write(final)
        product._seal(final, step)
        self._whole[final] = True

    monkey._publish = publish  # type: ignore[method-assign]


def rotation_before_publishing(monkey: type[CheckpointStore]) -> None:
    publish = monkey._publish

    def early(self: CheckpointStore, step: int, write: Callable[[Path], None]) -> None:
        for path in complete_checkpoints(self._root)[KEEP - 1 :]:
            shutil.rmtree(self._set_aside(path, ".removed-"))
        publish(self, step, write)

    monkey._publish = early  # type: ignore[method-assign]


def removal_in_place(monkey: type[CheckpointStore]) -> None:
    monkey._set_aside = lambda self, path, prefix: path  # type: ignore[method-assign]


def no_flush(_: type[CheckpointStore]) -> None:
    def seal(folder: Path, step: int) -> None:
        real, os.fsync = os.fsync, lambda descriptor: None  # type: ignore[assignment]
        real_seal(folder, step)
        os.fsync = real  # type: ignore[assignment]

    real_seal, product._seal = product._seal, seal
    product.flush_to_disk = lambda path: None  # type: ignore[assignment]


def folders_not_flushed(_: type[CheckpointStore]) -> None:
    real = product.flush_to_disk
    product.flush_to_disk = lambda path: None if path.is_dir() else real(path)  # type: ignore[assignment,func-returns-value]


VARIANTS: dict[str, Callable[[type[CheckpointStore]], None]] = {
    "real": lambda _: None,
    "manifest_after_the_rename": manifest_after_the_rename,
    "rotation_before_publishing": rotation_before_publishing,
    "removal_in_place": removal_in_place,
    "no_flush": no_flush,
    "folders_not_flushed": folders_not_flushed,
}


def child(root: Path, acknowledged: int, at: int, cut: str, variant: str) -> int:
    """Save LATER; returns the number of events. `acknowledged` is the pipe that hears of each finished save."""
    global tick
    VARIANTS[variant](CheckpointStore)
    killer = Killer(root, at, cut)
    store = CheckpointStore(root, KEEP)
    killer.install()
    tick = killer.tick
    for step in LATER:
        store.save(step, write, protect=BEST)
        store.wait()
        os.write(acknowledged, bytes([step]))
    count, killer.at = killer.count, -1
    return count


def fork(root: Path, at: int, cut: str, variant: str) -> tuple[bool, list[int], int]:
    """(was killed, acknowledged steps, events) of a child that saves LATER on `root`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            count = child(root, writer, at, cut, variant)
            os.write(writer, b"\xff" + count.to_bytes(4, "big"))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    saved, _, count = told.partition(b"\xff")
    assert status == 0 or os.WIFSIGNALED(status), "the child failed by itself"
    return os.WIFSIGNALED(status), list(saved), int.from_bytes(count, "big")


def violations(root: Path, acknowledged: list[int], at: int) -> list[str]:
    found: list[str] = []
    for path in root.iterdir():
        if path.name.startswith("step-"):
            try:
                verify(path)
            except ResumeError as error:
                found.append(f"cut {at}: half a checkpoint: {error}")
    steps = {step_of(path) for path in complete_checkpoints(root)}
    newest = max([EARLIER[-1], *acknowledged])
    if not any(step >= newest for step in steps):
        found.append(f"cut {at}: {newest} was complete and is gone; left: {sorted(steps)}")
    if BEST not in steps:
        found.append(f"cut {at}: the best is gone; left: {sorted(steps)}")
    if len(steps - {BEST}) < KEEP:
        found.append(f"cut {at}: fewer than {KEEP} left: {sorted(steps)}")
    if found:
        return found
    resumed = find_resumable(root, lambda line: found.append(f"cut {at}: {line}"))
    assert resumed is not None
    store = CheckpointStore(root, KEEP)  # life goes on: the next save cleans up
    store.save(60, write, protect=BEST)
    store.wait()
    left = sorted(path.name for path in root.iterdir())
    if left != ["step-00000010", f"step-{step_of(resumed):08d}", "step-00000060"]:
        found.append(f"cut {at}: after the next save: {left}")
    return found


def main(variant: str, cut: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        store = CheckpointStore(start, KEEP)
        for step in EARLIER:
            store.save(step, write, protect=BEST)
        store.wait()
        at, killed = 0, True
        while killed:
            at += 1
            root = Path(folder) / f"root-{at}"
            shutil.copytree(start, root)
            killed, acknowledged, count = fork(root, at, cut, variant)
            if killed or variant == "real":
                print("".join(f"{line}\n" for line in violations(root, acknowledged, at)), end="")
            shutil.rmtree(root)
        print(f"{at - 1} places, {count} events", file=sys.stderr)
        assert at - 1 == count


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
