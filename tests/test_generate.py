"""Batched answers: those of transformers' own `generate` one by one, and no work for rows that have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.evaluate import inference_mode_of
from sft.generate import complete


class Numbers:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


PROMPTS = [[5, 6, 7], list(range(3, 40)), [9], [30, 31, 32, 33, 34, 35, 36, 37, 38], [50] * 12, [8, 7, 6, 5]]


def one_by_one(model: Any, prompt: list[int], stop_ids: list[int], most: int) -> tuple[list[int], bool]:
    """A stranger's call, without any of our code."""
    from transformers import GenerationConfig

    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        generation_config=GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=stop_ids, pad_token_id=0),
    )  # fmt: skip
    ids = out[0, len(prompt) :].tolist()
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return (ids if end is None else ids[:end]), end is not None


def random_model(folder: Path, kind: str) -> Any:
    """Float32 models of several kinds, of random weights large enough that answers differ."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen3NextConfig

    small: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(3)
    if kind == "sliding":
        config: Any = Gemma3TextConfig(
            **small, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    elif kind == "linear":
        config = Qwen3NextConfig(
            **small, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=0,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            mlp_only_layers=[0, 1], decoder_sparse_step=1,
        )  # fmt: skip
    else:
        config = Qwen2Config(**small)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["full", "sliding", "linear"])
def test_a_batch_answers_as_transformers_does_one_by_one(tmp_path: Path, kind: str) -> None:
    model = random_model(tmp_path, kind)
    free = [one_by_one(model, prompt, [], 24)[0] for prompt in PROMPTS]
    # in some rows the token that comes first the latest becomes a stop, so that they end at times of their own
    stops = sorted({max(set(row), key=row.index) for row in free[::2]})
    expected = [one_by_one(model, prompt, stops, 24) for prompt in PROMPTS]
    assert sum(stopped for _, stopped in expected) > 0
    assert len({len(ids) for ids, _ in expected}) > 2, "or nothing is tested"
    with inference_mode_of(model):
        answers = complete(model, Numbers(), PROMPTS, stop_ids=stops, max_new_tokens=24)
    assert [(list(answer.ids), answer.stopped) for answer in answers] == expected


def chain() -> Any:
    """After each number comes the next: a prompt decides how long its answer is, up to the stop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        model.lm_head.weight.copy_(torch.eye(64).roll(1, dims=0))
    return model.eval()


def test_rows_that_have_ended_are_computed_no_more_and_the_batch_ends_with_the_last() -> None:
    model, seen, told = chain(), [], []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[59], [58], [40], [3, 50]]  # to the stop 60: 0, 1, 19 and 9 tokens before it
    with inference_mode_of(model):
        answers = complete(model, Numbers(), prompts, stop_ids=[60], max_new_tokens=50, tick=told.append)
    assert [len(answer.ids) for answer in answers] == [0, 1, 19, 9]
    assert all(answer.stopped for answer in answers)
    rows = [shape[0] for shape in seen]
    assert rows == [4] * 2 + [2] * 8 + [1] * 10, "halved when half have ended, and over with the longest"
    assert all(width == 1 for _, width in seen[1:]), "nothing is read twice"
    assert told == [*range(1, 21)]


def test_without_a_stop_every_answer_is_as_long_as_allowed() -> None:
    with inference_mode_of(model := chain()):
        answers = complete(model, Numbers(), [[1], [2, 3]], stop_ids=[], max_new_tokens=3)
    assert [(answer.ids, answer.stopped) for answer in answers] == [((2, 3, 4), False), ((4, 5, 6), False)]
