"""Names in a LoRA section, and new tokens beside modules that are trained whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from jobs import run_cli, write_config

from sft.adapterparts import TiedPair, parted_note
from sft.config import Lora
from sft.errors import ModelError
from sft.model import add_adapter, load_adapter, load_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
NEW = (200, 201)


def adapted(base: Path, **lora: Any) -> Any:
    return add_adapter(load_base(str(base)), Lora(rank=4, **lora), seed=0, trained_token_ids=NEW)


@pytest.mark.parametrize(
    ("tie", "modules"),
    [(True, ["embed_tokens", "lm_head"]), (False, ["embed_tokens", "lm_head"]), (False, ["lm_head"])],
)
def test_new_tokens_come_back_beside_modules_trained_whole(tmp_path: Path, tie: bool, modules: list[str]) -> None:
    base = make_model(tmp_path / "base", tie=tie)
    model = adapted(base, modules_to_save=modules).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for file in base.glob("tokenizer*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    ids = torch.tensor([[5, *NEW, 6]])
    again = load_adapter(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ["q_porj", "v_proj"]}, r"model\.lora\.targets: .*'q_porj'\. Did you mean 'q_proj'\? .*down_proj"),
        ({"modules_to_save": ["embed_token"]}, r"model\.lora\.modules_to_save: .* Did you mean 'embed_tokens'\?"),
        ({"targets": ["layers.0.self_attn.q_porj"]}, r"Did you mean 'model\.layers\.0\.self_attn\.q_proj'\?"),
        ({"targets": ["embed_tokens", "q_proj"]}, r"model\.lora\.targets: .*embed_tokens.*modules_to_save"),
        ({"targets": ".*embed_tokens"}, r"model\.lora\.targets: .*takes in embed_tokens.*modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, r"model\.lora\.modules_to_save: .*\[embed_tokens, lm_head\]"),
        ({"modules_to_save": ["embed_tokens"]}, r"model\.lora\.modules_to_save: .*\[embed_tokens, lm_head\]"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        adapted(make_model(tmp_path / "base"), **lora)


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (["lm_head"], "the adapter changes lm_head alone"),
        ([r".*\.embed_tokens", []], "the adapter changes embed_tokens alone"),
        (["all-linear", ["model.embed_tokens", "lm_head"]], "each is changed apart"),
        ([["q_proj"], ["lm_head"]], "the adapter changes lm_head alone"),
        ([{"q_proj", "tokens", "my_lm_head"}, None], None),
        (["all-linear", []], None),
        ([".*q_proj"], None),
    ],
)
def test_what_parts_a_tied_pair_is_said(trained: Any, said: str | None) -> None:
    pair = TiedPair("model.embed_tokens", "lm_head", 256, 32)
    note = parted_note(pair, *trained)
    assert (said is None and note is None) or (note is not None and said is not None and said in note)
    assert parted_note(None, *trained) is None, "a head of its own is nobody's twin"
    if note is not None:
        assert "256 x 32 weights more, tie_word_embeddings: false" in note


def moe(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_model(folder)
    kept = json.loads((folder / "config.json").read_text())
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "eos_token_id", "pad_token_id")  # fmt: skip
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{key: kept[key] for key in same}, num_hidden_layers=1, **sizes, tie_word_embeddings=False)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_a_run_and_its_export_say_it_in_our_words_and_not_in_peft_s(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base") if kind == "tied" else moe(tmp_path / "base")
    config = write_config(tmp_path, base, model__tuning="lora")
    targets = ["model.lora.targets=[embed_tokens,lm_head,q_proj]"] if kind == "tied" else []
    checked = run_cli("check", str(config), *targets)
    trained = run_cli("train", str(config), *targets, "train.max_steps=2", "optim.lr=0.01")
    exported = run_cli("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--merge")
    for result in (checked, trained, exported):
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Warning" not in result.stderr, result.stderr
        assert "site-packages" not in result.stdout + result.stderr
    for result in (checked, trained):
        words = " ".join((result.stdout + result.stderr).split())
        assert ("embed_tokens and lm_head of this model share their weights" in words) == (kind == "tied")
    assert "verified: loaded again with plain transformers" in exported.stdout
