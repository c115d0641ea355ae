"""A model whose every answer is known: after a word comes the word that the chain says, whatever stood before."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from conftest import CHATML, make_tokenizer

ANSWER = ("\n", "Oh", " ", "hello", "<|im_end|>")  # after "<|im_start|>assistant\n" it says "Oh hello" and stops


def make_chain_model(
    folder: Path, chain: tuple[str, ...] = ANSWER, *, stop: str | None = "<|im_end|>", template: str | None = CHATML
) -> Path:
    """Embeddings are unit vectors, layers do nothing, the head turns each word into the next one of `chain`."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = 256
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids(list(chain))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for word, following in pairwise(ids):
            model.lm_head.weight[following, word] = 10.0
    model.generation_config = GenerationConfig(
        eos_token_id=None if stop is None else tokenizer.convert_tokens_to_ids(stop),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model.save_pretrained(folder)
    return folder
