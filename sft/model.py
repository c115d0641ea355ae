"""Base models and adapters: loaded in the right dtype, with the tokens that a template needs, ready to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sft.adapterparts import refuse_unknown_modules, rows_to_train
from sft.config import Lora, Quantization, Tuning
from sft.errors import ModelError
from sft.gguf import model_source
from sft.hub import cure
from sft.modelkind import no_causal_lm
from sft.runfolder import RunFolder
from sft.weightfiles import base_dtype

Precision = Literal["bf16", "mixed", "fp32"]


@dataclass(frozen=True, slots=True)
class Dtypes:
    """`trained`: weights that the optimizer moves. `frozen`: the others. `compute`: matrix products."""

    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """`auto` is mixed where the device multiplies bfloat16 fast, else fp32."""
    if precision != "auto":
        return precision  # type: ignore[return-value]
    return "mixed" if bf16_is_fast(device) else "fp32"


def bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "xpu"


def dtypes(precision: Precision) -> Dtypes:
    if precision == "fp32":
        return Dtypes(torch.float32, torch.float32, torch.float32)
    if precision == "bf16":
        return Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    return Dtypes(torch.float32, torch.bfloat16, torch.bfloat16)


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | Literal["auto"] = "auto",
    quantization: Quantization | None = None,
    compute_dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model from a hub id, folder or GGUF file. Safetensors only, no remote code unless asked.

    Raises ModelError where the name leads nowhere or the model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization, compute_dtype, storage=dtype)
        if device is not None:
            options["device_map"] = {"": device}
    try:
        if dtype == "auto":
            dtype = base_dtype(name, revision=revision, trust_remote_code=trust_remote_code) or "auto"
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_source(name),
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.name: {name!r} brings code of its own, which was not run. Read it, then allow it with "
                "model.trust_remote_code: true (sft chat and sft export: --trust-remote-code), or choose a model that "
                "transformers knows by itself."
            ) from error
        if "Unrecognized configuration class" in str(error):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(
                model_source(name), revision=revision, trust_remote_code=trust_remote_code
            )
            is_pair = bool(getattr(config, "is_encoder_decoder", False))
            raise ModelError(f"model.name: {no_causal_lm(name, config.model_type, is_pair=is_pair)}") from error
        right = "Give a hub id that this machine can reach, or a folder with config.json and safetensors."
        raise ModelError(
            f"model.name: {name!r} could not be loaded: {_first_line(error)} "
            + cure(name, error, right, revision=revision)
        ) from error
    if device is not None and quantization is None:
        model.to(device)
    own_storage(model)
    return model


def own_storage(model: nn.Module) -> None:
    """Copies CPU weights into storage that torch aligned.

    Weights mapped from a file lie where the file's header ends; matrix kernels pick their path by alignment, so the
    same numbers would give other bits in a resumed process than in the first.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.clone()


def _bitsandbytes(quantization: Quantization, compute_dtype: torch.dtype, storage: Any) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.tuning: qlora needs bitsandbytes. Install it (pip install 'sft[qlora]') or use lora.")
    from transformers import BitsAndBytesConfig

    # quant_storage in the dtype of the other weights, without which FSDP cannot shard the packed weights
    config: Any = BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage if isinstance(storage, torch.dtype) else compute_dtype,
    )


def add_adapter(
    model: Any,
    lora: Lora,
    *,
    seed: int,
    trained_token_ids: Sequence[int] = (),
    adapter: str | None = None,
    trained_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Any:
    """The model with a fresh adapter, or with the trained one at `adapter` to continue from.

    `trained_token_ids`: rows of the embedding (and of an untied head) that are trained beside the adapter.
    `revision`: of the base model, which the adapter names so that it is put on the same one again.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        continued = _continue_adapter(model, adapter, PeftModel, trained_dtype)
        _name_base(continued, revision)
        return continued
    refuse_unknown_modules(model, "targets", lora.targets)
    refuse_unknown_modules(model, "modules_to_save", lora.modules_to_save)
    rows = rows_to_train(model, trained_token_ids, lora.modules_to_save)
    torch.manual_seed(seed)  # the adapter's first weights depend on the seed alone
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=lora.modules_to_save or None,
        init_lora_weights=True if lora.init == "default" else lora.init,
        trainable_token_indices=rows,
    )
    try:
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(
            f"model.lora.targets: {lora.targets!r}: {_first_line(error)} Use all-linear, or names of linear modules."
        ) from error
    except TypeError as error:
        if rows is None:
            raise
        raise ModelError(
            f"model.lora.targets: {lora.targets!r} takes in {' or '.join(rows)}, whose rows for the template's new "
            "tokens are trained by themselves. Leave it out, or move it to model.lora.modules_to_save."
        ) from error
    _cast_trained(peft_model, trained_dtype)
    _name_base(peft_model, revision)
    return peft_model


def _name_base(model: Any, revision: str | None) -> None:
    """What the saved adapter says of its base: a folder in full, so that it is found from wherever it is used."""
    settings, name = model.peft_config["default"], model.get_base_model().name_or_path
    settings.base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    settings.revision = revision


def _continue_adapter(model: Any, adapter: str, peft_model_type: Any, trained_dtype: torch.dtype) -> Any:
    if not (Path(adapter) / "adapter_model.safetensors").is_file() and Path(adapter).exists():
        raise ModelError(
            f"model.adapter: {adapter!r} holds no adapter_model.safetensors. Name the folder of a trained adapter, "
            "such as runs/x/final."
        )
    try:
        # The adapter's layers must have its own dtype when its weights are read: on a bfloat16 base, PEFT makes them
        # bfloat16 unless it autocasts, and a resumed run would go on from rounded weights.
        peft_model = peft_model_type.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=trained_dtype == torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        right = "Use the adapter with the base model it was trained on."
        raise ModelError(
            f"model.adapter: {adapter!r} cannot be put on this model: {_first_line(error)} "
            + cure(adapter, error, right)
        ) from error
    _cast_trained(peft_model, trained_dtype)
    return peft_model


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype, copy=True)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What was done to the embedding for the tokens that a template needs."""

    warm_started: tuple[str, ...]  # set to the end-of-text row
    untrained: tuple[str, ...]  # look never trained and were left as they are
    trained_ids: tuple[int, ...]  # rows that an adapter must train and save


def fit_vocabulary(
    model: Any,
    *,
    vocabulary: int,
    template_tokens: Mapping[str, int],
    added_tokens: Sequence[str],
    end_of_text_id: int | None,
    warm_start: bool,
) -> TokenRows:
    """Makes room for added tokens and gives never-trained rows of template tokens a start.

    Spare rows (an embedding larger than the tokenizer) are used before the embedding grows. A row counts as never
    trained when its token was added just now, or when its length is below a quarter or above four times the median.
    Such rows start from the end-of-text row, which is the nearest thing to "a turn ends here" a base model knows.
    """
    grow_vocabulary(model, vocabulary)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    suspects = {
        token: index
        for token, index in template_tokens.items()
        if token in added_tokens or any(_never_trained(weight, index) for weight in weights)
    }
    start = warm_start and end_of_text_id is not None and end_of_text_id not in suspects.values()
    if start:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in weights:
                source = weight[end_of_text_id].detach().float().cpu()
                for index in suspects.values():
                    # a little noise, so that two tokens with the same start can part
                    noise = torch.randn(source.shape, generator=generator) * source.std() * 0.01
                    weight[index] = (source + noise).to(weight)
    return TokenRows(
        warm_started=tuple(suspects) if start else (),
        untrained=() if start else tuple(suspects),
        trained_ids=tuple(sorted(suspects.values())),
    )


def cold_reason(asked: bool, end_of_text: int | None) -> str:
    """Why `fit_vocabulary` gave rows no warm start. `asked`: by model.warm_start_tokens."""
    if not asked:
        return "cure: model.warm_start_tokens: auto"
    if end_of_text is None:
        return "no warm start: the base model names no end-of-text token to start from; they learn from data alone"
    return "no warm start: the end-of-text row, to start from, is new or looks untrained; they learn from data alone"


def grow_vocabulary(model: Any, vocabulary: int) -> None:
    """Rows for every id of the tokenizer, where there are fewer; new ones start as the mean of the old.

    Exactly as many as the tokenizer has, as a stranger's PEFT would make them; and not at random, since a row that
    nothing trains and nothing saves must be the same in every process.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if vocabulary <= old:
        return
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[old:] = module.weight[:old].float().mean(dim=0).to(module.weight)


def _never_trained(weight: torch.Tensor, index: int) -> bool:
    with torch.no_grad():
        sample = weight[:: max(1, weight.shape[0] // 4096)].float().norm(dim=-1)
        length = weight[index].float().norm()
        median = sample.median()
        return bool(length < median / 4 or length > median * 4)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all), counting packed 4-bit weights as the numbers that they hold."""
    trained = every = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        every += count
        trained += count if parameter.requires_grad else 0
    return trained, every


def load_trained(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """(model, tokenizer) of a run folder, a checkpoint, an adapter folder, a model folder, a GGUF file or a hub id.

    Adapters are put on the base model that they name. The model is in evaluation mode.
    """
    from transformers import AutoTokenizer

    source = trained_folder(path)
    adapter_config = Path(source) / "adapter_config.json"
    if adapter_config.is_file():
        model = load_adapter(Path(source), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    else:
        model = load_base(str(source), dtype=dtype or "auto", device=device, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(model_source(str(source)), trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def load_adapter(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The adapter in `folder` on its base model in 16 bit (or `dtype`), the vocabulary grown as it was in training."""
    import json

    from peft import PeftModel
    from transformers import AutoTokenizer

    settings = json.loads((folder / "adapter_config.json").read_text())
    base = load_base(
        settings["base_model_name_or_path"],
        revision=settings.get("revision"),
        dtype=dtype or "auto",
        device=device,
        trust_remote_code=trust_remote_code,
    )
    grow_vocabulary(base, len(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)))
    return PeftModel.from_pretrained(base, folder)


def trained_folder(path: Path | str) -> str:
    """Where the weights are: a run's final/ or newest checkpoint's model/, a checkpoint's model/, else `path`.

    A run that went on after its end leaves final/ behind: until it is done again, a checkpoint made since is taken.
    """
    folder = Path(path)
    final, checkpoints = folder / "final", sorted(folder.glob("checkpoints/step-*/manifest.json"))
    if final.is_dir():
        goes_on = RunFolder(folder).read_status().get("state", "done") != "done"
        if not (goes_on and checkpoints and checkpoints[-1].stat().st_mtime_ns > final.stat().st_mtime_ns):
            return str(final)
    if checkpoints:
        return str(checkpoints[-1].parent / "model")
    if (folder / "model" / "config.json").is_file() or (folder / "model" / "adapter_config.json").is_file():
        return str(folder / "model")
    return str(path)


def tuning_name(tuning: Tuning) -> str:
    return {"full": "full finetune", "lora": "LoRA", "qlora": "QLoRA"}[tuning]


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith((".", "!", "?")) else line + "."
