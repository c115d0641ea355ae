"""The part of `sft check` that looks at the model and the machine: kind, packages, memory, disk, run folder.

Weights are never read: config.json, the headers of files, and arithmetic are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.adapterparts import parted_note, refuse_unknown_modules, tied_pair
from sft.errors import DiskError, ModelError, SftError
from sft.hub import cure
from sft.memory import CPU_MICRO_TOKENS, Memory, estimate, model_shape
from sft.modelkind import no_causal_lm
from sft.needed import lacking_for
from sft.picture import Picture
from sft.space import check_space, free_bytes

CHECKPOINT_FACTOR = 3  # a checkpoint holds the trained weights and two moments of each


def look_at_model(picture: Picture) -> None:
    """config.json, whether transformers knows such a model, where its weights are."""
    from sft.gguf import gguf_file
    from sft.weightfiles import faults_of

    model = picture.config.model
    try:
        file = gguf_file(model.name)
    except SftError as error:
        picture.problems.append(str(error))
        return
    picture.settings = gguf_settings(file) if file else _config_json(model.name, model.revision)
    if not picture.settings:
        right = (
            "Give a hub id (check the spelling and the network), a folder with config.json and safetensors, or a "
            ".gguf file."
        )
        picture.problems.append(
            f"model.name: {model.name!r} has no config.json that this machine can reach. "
            + cure(model.name, "can't find config.json", right, revision=model.revision)
        )
        return
    picture.shape = model_shape(picture.settings)
    folder = Path(model.name)
    if file is None:
        picture.problems += _unknown_kind(picture)
        faults = list(faults_of(folder)) if folder.is_dir() else []
        picture.problems += [f"model.name: {fault}" for fault in faults]
        if not faults:
            picture.parameters = _parameters_in(folder)
    else:
        picture.parameters = picture.settings.get("_parameters")
    if picture.parameters is None and picture.shape is not None:
        picture.parameters = picture.shape.parameters
    adapter = model.adapter
    if adapter and Path(adapter).exists() and not (Path(adapter) / "adapter_model.safetensors").is_file():
        picture.problems.append(
            f"model.adapter: {adapter!r} holds no adapter_model.safetensors. Name the folder of a trained adapter, "
            "such as runs/x/final."
        )


def _config_json(name: str, revision: str | None) -> Mapping[str, Any]:
    from sft.stops import read_settings

    try:
        return read_settings(name, revision, "config.json") or {}
    except (OSError, ValueError):  # not a name that the hub takes, or not JSON: the caller says what is wanted
        return {}


def _unknown_kind(picture: Picture) -> Iterator[str]:
    """Models that transformers cannot build, or only with code of their own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind, model = str(picture.settings.get("model_type", "")), picture.config.model
    if kind in KNOWN:
        return
    brings_code = "AutoModelForCausalLM" in (picture.settings.get("auto_map") or {})
    if brings_code and model.trust_remote_code:
        picture.warnings.append(f"model.trust_remote_code: code that comes with {model.name} is run")
    elif brings_code:
        yield (
            f"model.name: {model.name} ({kind}) runs only with Python code that comes with it. Read that code, then "
            "set model.trust_remote_code: true; or choose a model that transformers knows."
        )
    else:
        is_pair = bool(picture.settings.get("is_encoder_decoder"))
        yield f"model.name: {no_causal_lm(model.name, kind, is_pair=is_pair)}"


def look_at_modules(picture: Picture) -> None:
    """Whether the modules that an adapter names are there, in the model as its config builds it, without weights."""
    model = picture.config.model
    named: dict[str, str | list[str]] = {"targets": model.lora.targets, "modules_to_save": model.lora.modules_to_save}
    if model.tuning == "full" or model.adapter or all(names in ("all-linear", []) for names in named.values()):
        return
    skeleton = None if model.trust_remote_code else _skeleton(picture.settings)
    if skeleton is None:
        return
    for key, names in named.items():
        try:
            refuse_unknown_modules(skeleton, key, names)
        except ModelError as error:
            picture.problems.append(str(error))
    note = parted_note(tied_pair(skeleton), *named.values())
    if note is not None:
        picture.notes.append(note)


def _skeleton(settings: Mapping[str, Any]) -> Any:
    """The model without numbers; None where transformers cannot build it from these settings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if settings.get("model_type") not in KNOWN:
        return None
    told = {key: value for key, value in settings.items() if not key.startswith("_")}
    builder: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return builder.from_config(AutoConfig.for_model(**told))
    except Exception:  # a strange config may raise anything; loading the model says what it is
        return None


def _parameters_in(folder: Path) -> int | None:
    """Numbers in the files that are loaded, not in whatever else lies there."""
    from sft.glance import safetensors_parameters
    from sft.weightfiles import weight_files

    return sum(map(safetensors_parameters, weight_files(str(folder)))) or None if folder.is_dir() else None


def gguf_settings(file: Path) -> dict[str, Any]:
    """The header of a GGUF file in the words of a config.json."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    kind = str(reader.fields["general.architecture"].contents())
    names = {
        "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    }  # fmt: skip
    found = {ours: reader.fields.get(f"{kind}.{theirs}") for ours, theirs in names.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return {
        "model_type": kind,
        **{key: value.contents() for key, value in found.items() if value is not None},
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "_parameters": sum(int(tensor.n_elements) for tensor in reader.tensors),
    }


def look_at_packages(picture: Picture) -> None:
    """What `sft train` would refuse to begin without."""
    picture.problems += map(str, lacking_for(picture.config))


def look_at_memory(picture: Picture) -> None:
    """The estimate for this machine's first device, and how much of it is free."""
    import torch

    from sft import liger
    from sft.devices import device_name, training_device
    from sft.model import resolve_precision

    config, shape = picture.config, picture.shape
    device = training_device()
    picture.device = device_name(device)
    picture.precision = resolve_precision(config.model.precision, device)
    picture.available = _free_memory(device.type)
    if liger.unavailable(device.type, is_sharded=False) is None:
        fault = liger.unfit()
        kernel = f"not by Liger's kernel: {fault}" if fault else "by Liger's kernel, where it proves equal"
        picture.notes.append(f"the loss is computed {kernel}")
    if shape is None:
        return
    picture.micro_tokens = _micro_tokens(picture, device.type)
    setting = config.model.gradient_checkpointing

    def with_checkpointing(checkpointing: bool) -> Memory:
        return estimate(
            shape, tuning=config.model.tuning, precision=picture.precision, optimizer=config.optim.type,
            rank=config.model.lora.rank, micro_tokens=picture.micro_tokens, checkpointing=checkpointing,
            double_quant=config.model.quantization.double_quant, parameters=picture.parameters,
        )  # fmt: skip

    picture.memory = with_checkpointing(setting is True)
    if setting == "auto" and device.type == "cuda" and picture.memory.total > 0.8 * picture.available:
        picture.memory = with_checkpointing(True)
    _judge_memory(picture, picture.memory, picture.available, torch.cuda.device_count() if device.type == "cuda" else 1)


def _free_memory(kind: str) -> int:
    if kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _micro_tokens(picture: Picture, kind: str) -> int:
    """As the run will choose: on CUDA at least the longest example must fit, and more is taken only where it does."""
    wanted = picture.config.batch.micro_tokens
    if wanted != "auto":
        return int(wanted)
    if picture.prepared is None or not picture.prepared.train.num_examples:
        return picture.config.data.max_tokens
    lengths_E = picture.prepared.train.lengths_E
    longest = int(lengths_E.max())
    step = int(lengths_E.mean() * picture.config.batch.examples) + 1
    return longest if kind == "cuda" else max(longest, min(step, CPU_MICRO_TOKENS[picture.config.model.tuning]))


def _judge_memory(picture: Picture, memory: Memory, available: int, devices: int) -> None:
    from sft.pages import num_bytes

    cures = {
        "full": "model.tuning: lora or qlora, optim.type: adamw_8bit, or several GPUs with "
        "accelerate launch --config_file configs/accelerate/fsdp2.yaml",
        "lora": "model.tuning: qlora, a smaller data.max_tokens, or a smaller model",
        "qlora": "a smaller data.max_tokens, or a smaller model",
    }[picture.config.model.tuning]
    if memory.states > available * devices:
        picture.problems.append(
            f"memory: weights, gradients and optimizer need about {num_bytes(memory.states)}, and {picture.device} has "
            f"{num_bytes(available)} free{f' on each of {devices} devices' if devices > 1 else ''}. Use {cures}."
        )
    elif memory.total > available:
        picture.warnings.append(
            f"memory: about {num_bytes(memory.total)} for micro-batches of {picture.micro_tokens:,} tokens, and "
            f"{num_bytes(available)} are free. Use model.gradient_checkpointing: true, a smaller data.max_tokens or "
            f"batch.micro_tokens, or {cures}."
        )


def look_at_disk(picture: Picture) -> None:
    """As the run itself will ask before its first step."""
    trained, keep = picture.trained_parameters, picture.config.save.keep
    picture.disk_free = free_bytes(picture.run_dir)
    if trained is None:
        return
    weights = trained * (2 if picture.precision == "bf16" else 4)
    picture.disk_needed = (keep + 1) * CHECKPOINT_FACTOR * weights + weights
    try:
        check_space(picture.run_dir, CHECKPOINT_FACTOR * weights, keep, final_bytes=weights)
    except DiskError as error:
        picture.problems.append(str(error))
