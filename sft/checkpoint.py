"""Checkpoints: published, not written.

    checkpoints/
      step-00000120/            complete, or it is not there
        model/ …                what from_pretrained or PEFT loads
        optimizer.safetensors
        state.json
        manifest.json           written last: size and sha256 of each other file

Publishing: write into `.staging-step-…`, flush every file, write and flush the manifest, flush the folders, rename,
flush the parent; only then rotate. Removing is a rename to `.removed-step-…` first, so that no kill leaves a half
checkpoint under a checkpoint's name. Safetensors and JSON; nothing here opens a pickle.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sft.durable import NO_SPACE, cannot_write, flush_to_disk, read_json, write_json
from sft.errors import DiskError, ResumeError
from sft.pickles import is_pickle_name
from sft.space import folder_bytes, free_bytes, human

if TYPE_CHECKING:
    import torch

__all__ = [
    "MANIFEST", "CheckpointStore", "complete_checkpoints", "find_resumable", "publish_folder", "read_json",
    "read_tensors", "step_of", "verify", "write_json", "write_tensors",
]  # fmt: skip

MANIFEST = "manifest.json"
FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = (".staging-", ".removed-", ".damaged-")
_BLOCK = 1 << 22


def step_of(path: Path) -> int:
    """120 for `…/step-00000120`."""
    match = _STEP_NAME.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint's name"
    return int(match[1])


def complete_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints, newest first. A folder without a manifest is not one; contents are not verified here."""
    return [path for path in _step_folders(root) if (path / MANIFEST).is_file()]


def find_resumable(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Says loudly which newer ones were passed over and why. ResumeError when there are some and none verifies: starting
    again from nothing is the user's choice, not ours.
    """
    faults: list[str] = []
    for path in _step_folders(root):
        try:
            verify(path)
        except ResumeError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            say(f"WARNING: damaged checkpoint passed over: {fault}")
        if faults:
            say(f"WARNING: resuming from the previous complete checkpoint instead: {path}")
        return path
    if faults:
        raise ResumeError(
            "no checkpoint of this run is whole:\n  " + "\n  ".join(faults)
            + "\nRestore one from a copy, or start again with --fresh (which moves this run aside)."
        )  # fmt: skip
    return None


def verify(path: Path) -> None:
    """Prove that a checkpoint is what was published: names, sizes, hashes, nothing more, no links, no pickles.

    Raises ResumeError with the file, what was expected and what was found. Nothing is parsed but the manifest.
    """
    if path.is_symlink() or not path.is_dir():
        raise ResumeError(f"{path}: expected a folder, found {'a link' if path.is_symlink() else 'something else'}.")
    try:
        _verify_contents(path)
    except OSError as error:  # an unreadable sector is damage like any other
        raise ResumeError(f"{error.filename or path}: cannot be read ({error.strerror}).") from error


def _verify_contents(path: Path) -> None:
    listed = _read_manifest(path)
    present = dict(_walk(path))
    present.pop(MANIFEST, None)
    for name in sorted(present.keys() - listed.keys()):
        raise ResumeError(f"{path / name}: not in the checkpoint's manifest; expected no such file.")
    for name, (size, digest) in sorted(listed.items()):
        if name not in present:
            raise ResumeError(f"{path / name}: missing; expected {size} bytes.")
        if present[name] != size:
            raise ResumeError(f"{path / name}: damaged: expected {size} bytes, found {present[name]}.")
        found = _sha256(path / name)
        if found != digest:
            raise ResumeError(f"{path / name}: damaged: expected sha256 {digest[:16]}…, found {found[:16]}….")


class CheckpointStore:
    """Publishes checkpoints in the background, one at a time, and rotates them. Rank 0 only; the run's lock is held.

    Keeps the newest `keep` that verify, the protected (best) one, and never removes anything before a newer one is
    durable on disk.
    """

    def __init__(self, root: Path, keep: int) -> None:
        assert keep >= 1
        self._root = root
        self._keep = keep
        self.expected_bytes = 0  # of one checkpoint, where the caller can tell before the first
        self._protected: int | None = None
        self._newest: int | None = None
        self._saving: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        # The thread is there from now on: where memory is short, starting one can fail, or wait for ever (CPython).
        self._writer.submit(int).result()
        self._whole: dict[Path, bool] = {}  # verified once a process: damage found later costs at most a kept copy

    def protect(self, step: int | None) -> None:
        """`step` is the best of those that are published: rotation leaves it. None lifts the protection."""
        self._protected = step

    def save(self, step: int, write: Callable[[Path], None], *, protect: int | None = None) -> None:
        """Publish `step`: `write(folder)` fills the folder, in a background thread.

        `protect` is the best step once this one is published, and not before: where it is `step` itself, the former
        best stays until then.

        Waits for (and raises the error of) the save before. What `write` reads must not change meanwhile: give it
        copies in host memory.
        """
        self.wait()
        self._newest = step
        self._saving = self._writer.submit(self._run, step, write, protect)

    def steps(self) -> list[int]:
        """Steps whose checkpoints are published, and the one that is being written."""
        there = [step_of(path) for path in complete_checkpoints(self._root)]
        return there if self._newest is None else [self._newest, *there]

    def wait(self) -> None:
        """Until the save is durable and rotated. Raises its error: DiskError for the disk's, others as they are."""
        error = self.settle()
        if error is not None:
            raise error

    def settle(self) -> BaseException | None:
        """Until the save under way has ended, and its error if it met one: for a run that already fails for another."""
        saving, self._saving = self._saving, None
        return None if saving is None else saving.exception()

    def poll(self) -> None:
        """Raise the error that a save in the background has met, if any. Never waits."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def _run(self, step: int, write: Callable[[Path], None], protect: int | None) -> None:
        self._publish(step, write)
        self._protected = protect
        self._rotate(step)

    def _publish(self, step: int, write: Callable[[Path], None]) -> None:
        final = self._root / f"step-{step:08d}"
        staging = self._root / f".staging-{final.name}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            if self._is_whole(final):  # a resumed run at the step it started from: the same state, already safe
                return
            staging.mkdir()
            write(staging)
            _seal(staging, step)
            if os.path.lexists(final):  # damaged, or we had returned
                self._set_aside(final, ".damaged-")
            os.rename(staging, final)
            flush_to_disk(self._root)
        except BaseException as error:
            failure = self._explain(error, staging)
            shutil.rmtree(staging, ignore_errors=True)
            if failure is not None:
                raise failure from error
            raise
        self._whole[final] = True

    def _rotate(self, newest: int) -> None:
        """Remove what is older than the newest `keep` whole ones, but the protected one.

        Damaged folders newer than `newest` were passed over at resume; they go once training has passed them.
        """
        past = [path for path in _step_folders(self._root) if step_of(path) <= newest]
        keep = set([path for path in past if self._is_whole(path)][: self._keep])
        assert keep, "the checkpoint just published is whole"
        for path in past:
            if path not in keep and step_of(path) != self._protected:
                shutil.rmtree(self._set_aside(path, ".removed-"))
        self._sweep()

    def _set_aside(self, path: Path, prefix: str) -> Path:
        aside = path.with_name(f"{prefix}{path.name}-{os.urandom(4).hex()}")
        os.rename(path, aside)
        flush_to_disk(self._root)
        self._whole.pop(path, None)
        return aside

    def _sweep(self) -> None:
        """Remove what writers that died have left. The run's lock says that no other writer lives."""
        for path in self._root.iterdir():
            if path.name.startswith(_LEFTOVER):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            try:
                verify(path)
                self._whole[path] = True
            except ResumeError:
                self._whole[path] = False
        return self._whole[path]

    def _explain(self, error: BaseException, staging: Path) -> DiskError | None:
        """The disk's errors in the user's words; None for any other."""
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        # safetensors writes from Rust and wraps the system's error into text.
        full = full or any(f"os error {number})" in str(error) for number in NO_SPACE)
        older = complete_checkpoints(self._root) if self._root.is_dir() else []
        safe = f"{older[0]} is whole." if older else "No checkpoint was published before."
        if full:
            staged = folder_bytes(staging)
            needed = max([staged, self.expected_bytes, *(folder_bytes(path) for path in older[:1])])
            free = free_bytes(self._root) + staged  # what remains once the staged part is gone
            missing = human(needed - free) if needed > free else f"more than {human(max(free - staged, 0))}"
            return DiskError(
                f"{staging.parent}: disk full while saving a checkpoint of about {human(needed)}; {human(free)} can be "
                f"used, {missing} missing. {safe} Free some or lower save.keep, then run the same command: it resumes."
            )
        if isinstance(error, OSError):
            told = cannot_write(Path(error.filename or self._root), error)
            return DiskError(f"{told} {safe}")
        return None


def publish_folder(staging: Path, target: Path) -> None:
    """Put a written folder in the place of `target`, flushed: readers see the old one or the new one, whole."""
    for inner, _, names in os.walk(staging, topdown=False):
        for name in names:
            flush_to_disk(Path(inner) / name)
        flush_to_disk(Path(inner))
    aside = target.with_name(f".removed-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if os.path.lexists(target):
        os.rename(target, aside)
    os.rename(staging, target)
    flush_to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors may lie anywhere; those that share storage are written apart."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    save_file(apart, str(path), metadata=dict(metadata or {}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on the CPU, each in memory of torch's own.

    A mapped tensor starts where the file happens to put it; matrix products on it differ in their last bits from those
    on aligned memory, so a resumed run would not be exact.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        mapped = load_file(str(path))
    except FileNotFoundError:
        raise ResumeError(f"{path}: the file is missing.") from None
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{path}: not readable as safetensors ({error}).") from error
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in mapped.items()}


def _step_folders(root: Path) -> list[Path]:
    """Whatever bears a checkpoint's name, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _seal(folder: Path, step: int) -> None:
    """Flush every file, then write the manifest over them, then flush the folders."""
    files: dict[str, dict[str, Any]] = {}
    for name, size in sorted(_walk(folder)):
        assert not is_pickle_name(name), f"{name}: a checkpoint holds no pickles"
        flush_to_disk(folder / name)
        files[name] = {"size": size, "sha256": _sha256(folder / name)}
    for inner, _, _ in os.walk(folder, topdown=False):
        flush_to_disk(Path(inner))
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files}, indent=None)


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """name -> (size, sha256), each name proven to lie inside the checkpoint."""
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise ResumeError(f"{file}: missing or not a plain file; expected the list of the checkpoint's files.")
    manifest = read_json(file)
    try:
        form, step = manifest["format"], manifest["step"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResumeError(f"{file}: damaged: expected format, step and files ({error!r}).") from None
    if form != FORMAT:
        raise ResumeError(f"{file}: expected format {FORMAT}, found {form!r}; it was written by another version.")
    if step != step_of(path):
        raise ResumeError(f"{file}: expected step {step_of(path)} as the folder's name says, found {step!r}.")
    for name in listed:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or name != str(parts):
            raise ResumeError(f"{file}: refused: it names {name!r}; expected names inside the checkpoint.")
        if is_pickle_name(name):
            raise ResumeError(f"{file}: refused: it names {name!r}, a pickle; expected safetensors and JSON.")
    return listed


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(name, size) of each plain file below `folder`. ResumeError for links, devices, sockets."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = f"{prefix}{entry.name}"
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(Path(entry.path), f"{name}/")
            elif stat.S_ISREG(status.st_mode):
                yield name, status.st_size
            else:
                raise ResumeError(f"{entry.path}: refused: a link or special file; expected plain files only.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
