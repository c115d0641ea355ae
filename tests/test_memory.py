from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.memory import ModelShape, activation_bytes, estimate, logit_bytes, model_shape

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def shape_of(settings: dict[str, Any]) -> ModelShape:
    shape = model_shape(settings)
    assert shape is not None
    return shape


def test_parameters_of_a_published_model() -> None:
    assert shape_of(LLAMA_3_8B).parameters == 8_030_261_248
    smol = {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    assert shape_of(smol).parameters == 134_515_008


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "GPT2", "Mixtral", "GPTNeoX"])
def test_parameters_are_near_those_of_real_models(family: str) -> None:
    """Biases, norms of heads and positions are left out: they are small."""
    import torch
    import transformers

    names = {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 64} if family == "GPT2" else dict(TINY)
    if family in ("Qwen3", "Gemma2"):
        names["head_dim"] = 64
    if family == "GPTNeoX":
        del names["num_key_value_heads"]
    config = getattr(transformers, f"{family}Config")(**{"vocab_size": 1000, **names})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert shape_of(config.to_dict()).parameters == pytest.approx(real, rel=0.02)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("rank", [1, 8])
def test_lora_parameters_are_those_of_peft(rank: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY)
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules="all-linear"))
        real, _ = model.get_nb_trainable_parameters()
    assert shape_of(config.to_dict()).lora_parameters(rank) == real


@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", 2), ("float32", 4)])
def test_activations_are_those_that_autograd_keeps(dtype: str, compute: int) -> None:
    """Never less, and at most a fifth more."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.set_attn_implementation("sdpa")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holds it, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(1, 256, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    guess = activation_bytes(shape_of(config.to_dict()), 256, compute=compute, checkpointing=False)
    assert real <= guess <= 1.2 * real


def needed(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "tuning": "full", "precision": "bf16", "optimizer": "adamw", "rank": 16, "micro_tokens": 1024,
        "checkpointing": False,
    }  # fmt: skip
    return estimate(shape_of(LLAMA_3_8B), **{**options, **changes})


def test_a_full_finetune_in_bfloat16_takes_eight_bytes_a_parameter() -> None:
    memory = needed()
    assert memory.states == 8 * 8_030_261_248
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(n * 8_030_261_248 for n in (2, 2, 4))


def test_mixed_precision_takes_sixteen_and_copies_to_compute_with() -> None:
    shape = shape_of(LLAMA_3_8B)
    assert needed(precision="mixed").states == 16 * shape.parameters + 2 * shape.linear_parameters


def test_qlora_packs_what_lora_keeps_in_sixteen_bits() -> None:
    lora, qlora = needed(tuning="lora", precision="mixed"), needed(tuning="qlora", precision="mixed")
    assert lora.weights == pytest.approx(16.2e9, rel=0.01)
    assert qlora.weights == pytest.approx(6.0e9, rel=0.05)
    assert (lora.gradients, lora.optimizer) == (qlora.gradients, qlora.optimizer)
    assert lora.gradients == 4 * shape_of(LLAMA_3_8B).lora_parameters(16)
    assert needed(tuning="qlora", precision="mixed", double_quant=False).weights > qlora.weights


def test_checkpointing_and_eight_bits_save() -> None:
    assert needed(checkpointing=True).activations < needed().activations / 5
    assert needed(optimizer="adamw_8bit").optimizer == needed().optimizer / 2
    assert needed(parameters=1_000_000).weights == 2_000_000
    assert needed().as_dict()["total"] == needed().total


@given(st.integers(1, 100_000), st.booleans(), st.sampled_from([2, 4]))
def test_more_tokens_never_take_less(tokens: int, checkpointing: bool, compute: int) -> None:
    shape = shape_of(LLAMA_3_8B)
    for size in (
        lambda n: activation_bytes(shape, n, compute=compute, checkpointing=checkpointing),
        lambda n: logit_bytes(shape, n, compute=compute),
    ):
        assert 0 < size(tokens) <= size(tokens + 1)


def test_shapes_in_other_words() -> None:
    shape = shape_of(LLAMA_3_8B)
    assert shape_of({"model_type": "x_vl", "tie_word_embeddings": False, "text_config": LLAMA_3_8B}) == shape
    gpt2 = shape_of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
    assert (gpt2.intermediate, gpt2.gated, gpt2.tied) == (3072, False, True)
    experts = {**LLAMA_3_8B, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert shape_of(experts) == replace(shape, experts=8, active_experts=2)
    assert model_shape({"model_type": "mamba", "hidden_size": 768}) is None
    assert model_shape({}) is None
