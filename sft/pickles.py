"""Files that run code when they are loaded, recognised by name before anything opens them."""

from __future__ import annotations

from pathlib import Path

from sft.errors import ModelError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})


def is_pickle_name(name: str) -> bool:
    """True for names under which torch, numpy or pickle look for serialised objects."""
    return Path(name).suffix.lower() in PICKLE_SUFFIXES


def refuse_pickled_weights(folder: Path, stems: tuple[str, ...] = ("adapter_model", "pytorch_model", "model")) -> None:
    """ModelError when `folder` holds weights only as pickles. Beside safetensors nobody opens them."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.iterdir() if is_pickle_name(p.name) and p.name.startswith(stems))
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: weights as a pickle, which can run code when loaded, no safetensors beside it. "
            "Nothing was opened. Ask its author for safetensors, or convert it yourself where you trust it."
        )
