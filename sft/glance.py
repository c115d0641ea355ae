"""A cheap look at a model: its tokenizer, its context length and the number of its parameters. No weights are read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import ModelError, SftError, TemplateError
from sft.gguf import gguf_file, tokenizer_source
from sft.templating import ChatTemplate, TemplateTimeout


@dataclass(frozen=True)
class ModelGlance:
    """What could be seen; None where it could not, with the reasons in `problems`."""

    tokenizer: Any = None
    chat: ChatTemplate | None = None
    has_template: bool | None = None
    context: int | None = None
    parameters: int | None = None
    problems: tuple[str, ...] = ()


def base_and_adapter(name: str) -> tuple[str, str | None]:
    """What `model.name` and `model.adapter` say for a run, a checkpoint or an adapter; else the name itself.

    Raises ModelError where a path leads nowhere.
    """
    from sft.model import trained_folder

    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().exists():
        raise ModelError(f"--model {name}: there is no such file or folder. Name a hub id, a folder or a .gguf file.")
    folder = trained_folder(str(Path(name).expanduser()) if name.startswith("~") else name)
    adapter = Path(folder, "adapter_config.json")
    if not adapter.is_file():
        return (folder if Path(folder).exists() else name), None
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]), folder


def glance_at_model(name: str) -> ModelGlance:
    """Looks at a folder, a GGUF file or a hub id. Never raises for what is merely out of reach."""
    problems: list[str] = []
    tokenizer, chat, has_template = _tokenizer(name, problems)
    try:
        context, parameters = _sizes(name)
    except Exception as error:  # the hub client's, the network's and the file's errors: said, not raised
        context = parameters = None
        problems.append(f"sizes: {_first_line(error)}")
    return ModelGlance(tokenizer, chat, has_template, context, parameters, tuple(problems))


def _tokenizer(name: str, problems: list[str]) -> tuple[Any, ChatTemplate | None, bool | None]:
    """The tokenizer, its template, and whether it brings one that works; `chatml` stands in where it does not."""
    from sft.tokenizer import load_tokenizer

    try:
        source = tokenizer_source(name)
        try:
            bundle = load_tokenizer(source)
        except (TemplateError, TemplateTimeout):  # its own does not work, or does not end
            bundle = None
        if bundle is not None and bundle.chat is not None:
            return bundle.tokenizer, bundle.chat, True
        bundle = load_tokenizer(source, template="chatml")
        return bundle.tokenizer, bundle.chat, False
    except (SftError, OSError, ValueError) as error:
        problems.append(_first_line(error))
        return None, None, None


def _sizes(name: str) -> tuple[int | None, int | None]:
    """(context length, number of parameters)."""
    if (file := gguf_file(name)) is not None:
        return _gguf_sizes(file)
    folder = Path(name)
    if folder.is_dir():
        return _context(folder / "config.json"), sum(map(safetensors_parameters, folder.glob("*.safetensors"))) or None
    from huggingface_hub import constants, get_safetensors_metadata, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        cached = try_to_load_from_cache(name, "config.json")
        return (_context(Path(cached)) if isinstance(cached, str) else None), None
    from huggingface_hub import hf_hub_download

    counts = get_safetensors_metadata(name).parameter_count
    return _context(Path(hf_hub_download(name, "config.json"))), sum(counts.values()) or None


def _context(config: Path) -> int | None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    length = settings.get("text_config", settings).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def safetensors_parameters(file: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size < 100_000_000:
            raise ModelError(f"{file} is no safetensors file, or was cut. Fetch it again.")
        header = json.loads(stream.read(size))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _gguf_sizes(file: Path) -> tuple[int | None, int | None]:
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    context = next((f.contents() for key, f in reader.fields.items() if key.endswith(".context_length")), None)
    return context, sum(int(tensor.n_elements) for tensor in reader.tensors) or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
