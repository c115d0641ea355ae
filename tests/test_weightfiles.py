"""final/ and merged exports keep the base's dtype, also where its config names none, and say so in each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from jobs import run_here, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export import export
from sft.model import load_base
from sft.weightfiles import base_dtype, stored_dtype, weight_files, write_dtype

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]
TINY_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def keep_in(folder: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def name_no_dtype(folder: Path) -> Path:
    """As repositories of before transformers 4.5 or so are."""
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    make_tokenizer(folder)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(vocab_size=256, eos_token_id=end, bos_token_id=None, **sizes)).save_pretrained(folder)
    return folder


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    make_tokenizer(folder)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    text = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 512,
        "query_pre_attn_scalar": 8, "eos_token_id": end, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    # ids of images stay beyond the words of the rows
    ids = {"image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252, "eos_token_id": end}
    config = Gemma3Config(text_config=text, vision_config=TINY_VISION, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def saved_dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}


def named_dtypes(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())
    parts = {key: part.get("dtype") for key, part in settings.items() if key.endswith("_config") and part}
    return {"": settings.get("dtype"), **parts}


@pytest.mark.parametrize("make", [gpt2, make_model])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_base_whose_config_names_no_dtype_keeps_its_own(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    base = name_no_dtype(keep_in(make(tmp_path / "base"), dtype))
    run = run_here(write_config(tmp_path, base), "train.max_steps=2", "eval.every=2", "data.eval=2")
    assert saved_dtypes(run / "final") == {dtype}
    assert named_dtypes(run / "final") == {"": str(dtype).removeprefix("torch.")}
    assert saved_dtypes(run / "checkpoints/step-00000002/model") == {torch.float32}
    assert named_dtypes(run / "checkpoints/step-00000002/model") == {"": "float32"}


def test_a_resumed_run_asks_its_record_and_not_the_base(tmp_path: Path) -> None:
    base = name_no_dtype(keep_in(make_model(tmp_path / "base"), torch.float16))
    config = write_config(tmp_path, base)
    run_here(config, "optim.schedule=constant", "train.max_steps=2")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    run = run_here(config, "optim.schedule=constant", "train.max_steps=4", allow_change=["train.max_steps"])
    assert saved_dtypes(run / "final") == {torch.float16}


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_each_part_of_a_config_names_the_dtype_of_its_weights(tmp_path: Path, named: bool) -> None:
    base = keep_in(gemma3(tmp_path / "base"), torch.bfloat16)
    if not named:
        name_no_dtype(base)
    run = run_here(write_config(tmp_path, base), "train.max_steps=2", "eval.every=2", "data.eval=2")
    assert saved_dtypes(run / "final") == {torch.bfloat16}
    assert named_dtypes(run / "final") == dict.fromkeys(("", "text_config", "vision_config"), "bfloat16")
    kept = named_dtypes(run / "checkpoints/step-00000002/model")
    assert kept == dict.fromkeys(("", "text_config", "vision_config"), "float32")


def test_a_merged_export_keeps_the_dtype_of_most_weights(tmp_path: Path) -> None:
    """A norm that is stored wider, and first, does not make the export twice as large."""
    base = name_no_dtype(keep_in(make_model(tmp_path / "base"), torch.float16))
    tensors = load_file(base / "model.safetensors")
    widened = {name: t.float() if "norm" in name else t for name, t in tensors.items()}
    save_file({f"{name}": widened[name] for name in sorted(widened, key=lambda n: "norm" not in n)},
              base / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    assert base_dtype(str(base)) == torch.float16
    assert load_base(str(base)).dtype == torch.float16
    run = run_here(write_config(tmp_path, base, model__tuning="lora"), "train.max_steps=2", "data.eval=2")
    assert {t.dtype for t in load_file(run / "final/adapter_model.safetensors").values()} == {torch.float32}
    export(str(run), out=tmp_path / "out", merge=True)
    assert saved_dtypes(tmp_path / "out") == {torch.float16}
    assert named_dtypes(tmp_path / "out") == {"": "float16"}


def test_shards_count_together_and_strangers_files_not(tmp_path: Path) -> None:
    wide, narrow = torch.zeros(4), torch.zeros(99, dtype=torch.bfloat16)
    save_file({"a": wide, "ids": torch.zeros(999, dtype=torch.int64)}, tmp_path / "one.safetensors")
    save_file({"b": narrow}, tmp_path / "two.safetensors")
    save_file({"c": torch.zeros(9999)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "ids": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(str(tmp_path))] == ["one.safetensors", "two.safetensors"]
    assert stored_dtype(str(tmp_path)) == torch.bfloat16


def test_packed_weights_and_an_empty_folder_tell_nothing(tmp_path: Path) -> None:
    assert stored_dtype(str(tmp_path)) is None
    save_file({"a": torch.zeros(9, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert stored_dtype(str(tmp_path)) is None


def test_parts_that_name_no_dtype_are_given_none(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    deep = {"text_config": {"dtype": "float32", "inner_config": {"torch_dtype": "float32"}}, "audio_config": {"a": 1}}
    file.write_text(json.dumps({**deep, "quantization_config": {"dtype": "int8"}, "dtype_config": None}))
    write_dtype(file, torch.bfloat16)
    assert json.loads(file.read_text()) == {
        "dtype": "bfloat16", "audio_config": {"a": 1}, "dtype_config": None,
        "quantization_config": {"dtype": "int8"},
        "text_config": {"dtype": "bfloat16", "inner_config": {"torch_dtype": "bfloat16"}},
    }  # fmt: skip
