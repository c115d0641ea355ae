"""Names in a LoRA section, and new tokens beside modules that are trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model

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
