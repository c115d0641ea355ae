"""A base model's files of weights, by their headers alone: whether they are all there, and the dtype they are kept in.

Older repositories name no dtype in config.json. transformers then takes the first tensor's; here most of the bytes
decide, so that a norm kept in float32 does not speak for a model in 16 bits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sft.config import Model
from sft.gguf import model_source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # as safetensors itself allows
# in the words of safetensors' headers; 8-bit ones are packings, in which no model is computed or saved
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def base_dtype(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype | None:
    """The dtype of the model behind a hub id, folder or GGUF file; None where neither config nor weights tell.

    Raises OSError or ValueError where there is no such model, as transformers does.
    """
    from transformers import AutoConfig

    source = model_source(name)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    named = _as_dtype(config.dtype)
    return named or stored_dtype(source, revision) or _as_dtype(config.get_text_config().dtype)


def saved_dtype(base: Model, trained: torch.nn.Module) -> str:
    """The name of the dtype of a full finetune's final/: the base's own, else that of the live weights."""
    found = base_dtype(base.name, revision=base.revision, trust_remote_code=base.trust_remote_code)
    found = found or next(p.dtype for p in trained.parameters() if p.is_floating_point())
    return str(found).removeprefix("torch.")


def _as_dtype(value: Any) -> torch.dtype | None:
    value = getattr(torch, value, None) if isinstance(value, str) else value
    return value if isinstance(value, torch.dtype) else None


def stored_dtype(source: str, revision: str | None = None) -> torch.dtype | None:
    """The dtype of most floating-point bytes in the safetensors files of a folder, or of a hub's model in the cache."""
    stored: Counter[torch.dtype] = Counter()
    for file in weight_files(source, revision):
        for entry in tensors_in(file).values():
            if entry["dtype"] in DTYPES:
                start, end = entry["data_offsets"]
                stored[DTYPES[entry["dtype"]]] += end - start
    return stored.most_common(1)[0][0] if stored else None


def weight_files(source: str, revision: str | None = None) -> Iterator[Path]:
    """The files that transformers reads the weights from, as far as they are on this machine."""
    single = _on_this_machine(source, SINGLE, revision)
    if single is not None:
        yield single
        return
    index = _on_this_machine(source, INDEX, revision)
    for name in shards_of(index) if index is not None else ():
        file = _on_this_machine(source, name, revision)
        if file is not None:
            yield file


def faults_of(folder: Path) -> Iterator[str]:
    """Yields what keeps transformers from reading the weights in `folder`, one sentence each, the cure last."""
    single, index = folder / SINGLE, folder / INDEX
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if not found and not index.is_file():
        yield (
            f"there are no *.safetensors in {folder}. Weights are read from safetensors only; save the model again "
            "with save_pretrained."
        )
    elif not single.is_file() and not index.is_file():
        yield (
            f"{folder} holds {', '.join(found[:3])}{' …' * (len(found) > 3)}, but neither {SINGLE} nor {INDEX}, which "
            "says in which file a weight is. Fetch that one too, or save the model again with save_pretrained."
        )
    else:
        try:
            wanted = [SINGLE] if single.is_file() else shards_of(index)
        except (OSError, ValueError) as error:
            yield f"{index} cannot be read ({error}). Fetch it again."
            return
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            yield (
                f"{folder} lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)} ({len(missing)} of the "
                f"{len(wanted)} files that {INDEX} lists). Fetch what is missing, or the model again."
            )
        for name in wanted:
            if name not in missing and (cut := _is_cut(folder / name)):
                yield f"{folder / name} {cut}. Fetch it again."


def _is_cut(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            end = 8 + int.from_bytes(stream.read(8), "little")
        end += max((entry["data_offsets"][1] for entry in tensors_in(file).values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is no safetensors file, or was cut"
    size = file.stat().st_size
    return f"was cut: it has {size:,} bytes, and {end:,} by its header" if size < end else ""


def shards_of(index: Path) -> list[str]:
    """The names of the files that a safetensors index lists. Raises ValueError where it is no such index."""
    listed = json.loads(index.read_text(encoding="utf-8"))
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    return sorted({str(name) for name in weight_map.values()})


def tensors_in(file: Path) -> Mapping[str, Any]:
    """{name: {dtype, shape, data_offsets}} from the header of a file. Raises ValueError where there is none."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size < MOST_HEADER_BYTES:
            raise ValueError(f"{file} is no safetensors file, or was cut")
        header = json.loads(stream.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _on_this_machine(source: str, name: str, revision: str | None) -> Path | None:
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Names the dtype of the saved weights in a config.json: at its top, and in each part (text_config, vision_config)
    that names one. transformers before version 5 reads the parts' own."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    _name_parts(values, name)
    values["dtype"] = name
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_parts(values: dict[str, Any], dtype: str) -> None:
    for spelling in ("dtype", "torch_dtype"):
        if spelling in values:
            values[spelling] = dtype
    for key, part in values.items():
        if isinstance(part, dict) and key.endswith("_config") and key != "quantization_config":
            _name_parts(part, dtype)
