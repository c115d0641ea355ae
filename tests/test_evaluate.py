"""Scores are sums over trained tokens, each once; evaluating or generating leaves a model in training untouched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data import collate
from sft.evaluate import EvalSums, eval_plan, evaluate, inference_mode_of, keeps_training_mode, metrics, score_hidden
from sft.generate import answer_samples, complete, unwrap
from sft.types import Batch, Example

# transformers 5.23 renamed what older releases, and PEFT 0.21, still call
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

STOP = 3


def identity(features: torch.Tensor) -> torch.Tensor:
    return features


def test_sums_can_be_checked_by_hand() -> None:
    # Vocabulary of 4, token 3 stops. Logits are logs of probabilities.
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]).log()
    labels, weights = torch.tensor([3, 0, 3]), torch.tensor([1.0, 0.5, 2.0])
    sums = EvalSums.of(score_hidden(logits, identity, labels, weights, [STOP]))
    expected_loss = -(math.log(0.4) + 0.5 * math.log(0.7) + 2.0 * math.log(0.7))
    assert sums.loss == pytest.approx(expected_loss)
    assert sums.weight == 3.5
    assert (sums.correct, sums.tokens, sums.stops) == (3, 3, 2)
    assert sums.stop_probability == pytest.approx(0.4 + 0.7)
    assert metrics(sums) == {
        "loss": pytest.approx(expected_loss / 3.5),
        "perplexity": pytest.approx(math.exp(expected_loss / 3.5)),
        "token_accuracy": 1.0,
        "stop_probability": pytest.approx(0.55),
        "tokens": 3,
    }


def test_the_mass_of_all_stop_tokens_counts() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    sums = EvalSums.of(score_hidden(logits, identity, torch.tensor([3]), torch.tensor([1.0]), [3, 2, 99]))
    assert sums.stop_probability == pytest.approx(0.7)


def test_untrained_positions_count_for_nothing() -> None:
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.7]]).log()
    both = score_hidden(logits, identity, torch.tensor([3, 3]), torch.tensor([0.0, 1.0]), [STOP])
    alone = score_hidden(logits[1:], identity, torch.tensor([3]), torch.tensor([1.0]), [STOP])
    assert both.tolist() == alone.tolist()


def test_nothing_to_score_says_nothing() -> None:
    assert metrics(evaluate(lambda batch: (torch.zeros(0, 4), identity), [], [STOP])) == {
        "loss": None, "perplexity": None, "token_accuracy": None, "stop_probability": None, "tokens": 0,
    }  # fmt: skip
    none_trained = score_hidden(torch.zeros(0, 8), identity, torch.zeros(0, dtype=torch.int64), torch.zeros(0), [STOP])
    assert none_trained.tolist() == [0.0] * 6


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 23), chunk=st.integers(1, 30), seed=st.integers(0, 99))
def test_chunks_change_nothing_and_stay_small(count: int, chunk: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(count, 5, generator=random), torch.randn(7, 5, generator=random)
    labels = torch.randint(0, 7, (count,), generator=random)
    weights = torch.rand(count, generator=random).round(decimals=1)
    rows: list[int] = []

    def head(part: torch.Tensor) -> torch.Tensor:
        rows.append(len(part))
        return 10.0 * torch.tanh(part @ weight.T / 10.0)

    chunked = score_hidden(features, head, labels, weights, [1, 2], chunk=chunk)
    assert max(rows, default=0) <= chunk
    whole = score_hidden(features, head, labels, weights, [1, 2], chunk=1000)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40), ranks=st.integers(1, 4), micro_tokens=st.sampled_from([16, 64])
)
def test_each_example_is_scored_once_over_all_ranks(lengths: list[int], ranks: int, micro_tokens: int) -> None:
    plans = [list(eval_plan(lengths, rank=rank, ranks=ranks, micro_tokens=micro_tokens)) for rank in range(ranks)]
    assert sorted(i for plan in plans for micro in plan for i in micro) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1  # sharded models need every rank in each forward pass


def test_a_large_split_is_dealt_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.evaluate.DEAL_WINDOW", 3)
    plans = [list(eval_plan([5] * 14, rank=rank, ranks=2, micro_tokens=10)) for rank in range(2)]
    assert sorted(i for plan in plans for micro in plan for i in micro) == list(range(14))


def example(ids: list[int], trained: list[int]) -> Example:
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[trained] = 1.0
    return Example(np.array(ids, dtype=np.int32), weights, "test:1")


def model_forward(model: Any) -> Any:
    def forward(batch: Batch) -> tuple[torch.Tensor, Any]:
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.positions
        ).last_hidden_state
        return hidden.flatten(0, 1)[batch.target_index_M], model.lm_head

    return forward


def test_a_model_scores_what_its_own_loss_says_in_any_layout(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    examples = [example([5, 6, 7, 8, 9], [3, 4]), example([10, 11, 12], [1, 2]), example([9, 8, 7, 6, 5, 4, 3], [6])]
    with inference_mode_of(model):
        together = evaluate(model_forward(model), [collate.padded(examples, 0)], [9, 3])
        apart = [evaluate(model_forward(model), [collate.padded([e], 0)], [9, 3]) for e in examples]
        losses = []
        for e in examples:
            ids = torch.tensor(e.input_ids_T, dtype=torch.int64)[None]
            losses.append(model(input_ids=ids, labels=torch.tensor(e.labels_T, dtype=torch.int64)[None]).loss.item())
    total = sum(apart, EvalSums())
    assert together.loss == pytest.approx(total.loss, rel=1e-5)
    assert (together.tokens, together.stops) == (total.tokens, total.stops) == (5, 2)
    # transformers' loss is a mean over the example's targets; ours weighs each target alike
    assert metrics(together)["loss"] == pytest.approx((2 * losses[0] + 2 * losses[1] + losses[2]) / 5, rel=1e-5)


def test_ranks_add_up_through_reduce() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    batch = collate.flat([example([1, 3], [1])])
    sums = evaluate(lambda b: (logits, identity), [batch], [STOP], reduce=lambda vector: vector * 2)
    assert (sums.tokens, sums.stops) == (2, 2)
    assert sums.loss == pytest.approx(-2 * math.log(0.4))


def test_every_mode_is_restored_also_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model.train()
    model[2].eval()

    def fail() -> None:
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"), inference_mode_of(model):
        fail()
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert torch.is_grad_enabled()


# --- a real NF4 model -------------------------------------------------------------------------------------------------


def nf4_model() -> Any:
    """A Llama whose linear layers are bitsandbytes NF4, with a LoRA adapter, in train mode."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, eos_token_id=9, pad_token_id=0, bos_token_id=None,
        )
    ).to(torch.bfloat16)  # fmt: skip
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed.to("cpu"))
    model.requires_grad_(False)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return peft.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    ids = torch.arange(1, 33)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_nf4_gradients_survive_evaluation_and_generation() -> None:
    model = nf4_model()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    before = gradients(model)
    assert sorted(before) == sorted(trainable)
    assert all(g.abs().sum() > 0 for g in before.values())
    with inference_mode_of(model):
        model(input_ids=torch.arange(1, 33)[None])
        complete(model, Words(), [[1, 2, 3], [4, 5]], stop_ids=[9], max_new_tokens=4)
        assert any(keeps_training_mode(m) for m in model.modules())
        assert all(m.training == keeps_training_mode(m) for m in model.modules())
    after = gradients(model)
    assert sorted(after) == sorted(before)
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.mark.filterwarnings("ignore")
def test_negative_control_plain_eval_mode_loses_nf4_gradients() -> None:
    import bitsandbytes.functional

    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("only CPUs with AVX-512 bf16 repack")
    model = nf4_model()
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(1, 33)[None])
    model.train()
    after = gradients(model)
    assert any(name not in after or not torch.equal(after[name], before[name]) for name in before)


# --- generation -------------------------------------------------------------------------------------------------------


class Words:
    """Decodes ids as numbers, so that a reader can follow."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def chain_model(model_folder: Path) -> Any:
    """A model that always answers with the next id: 5 → 6 → 7 … (weights set by hand, attention switched off)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(32))
        model.lm_head.weight.copy_(torch.eye(32).roll(1, dims=0))
    return model


def test_generation_follows_the_chain_and_stops(model_folder: Path) -> None:
    model = chain_model(model_folder)
    with inference_mode_of(model):
        answers = complete(model, Words(), [[1, 2, 5], [20], [11, 12]], stop_ids=[9, 14], max_new_tokens=5)
    assert [a.ids for a in answers] == [(6, 7, 8), (21, 22, 23, 24, 25), (13,)]
    assert [a.stopped for a in answers] == [True, False, True]
    assert answers[0].text == "6 7 8"


def test_a_batch_answers_as_each_prompt_alone(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = [[5, 6, 7], list(range(3, 20)), [9]]
    with inference_mode_of(model):
        together = complete(model, Words(), prompts, stop_ids=[200], max_new_tokens=8)
        alone = [complete(model, Words(), [p], stop_ids=[200], max_new_tokens=8)[0] for p in prompts]
    assert together == alone


def test_generation_leaves_no_trace(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from sft import attention

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=attention.FLAT)
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.generation_config.repetition_penalty = 50.0  # must not bend greedy samples
    settings_before = model.generation_config.to_dict()
    torch.manual_seed(1)
    random_before = torch.get_rng_state()
    with inference_mode_of(model):
        first = complete(model, Words(), [[5, 6], [7]], stop_ids=[200], max_new_tokens=6)
        again = complete(model, Words(), [[5, 6], [7]], stop_ids=[200], max_new_tokens=6)
    assert first == again
    assert torch.equal(torch.get_rng_state(), random_before)
    assert model.config._attn_implementation == attention.FLAT
    assert model.config.use_cache is False
    assert model.generation_config.to_dict() == settings_before
    assert model.model.layers[0].gradient_checkpointing
    assert all(m.training for m in model.modules())
    plain = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        assert complete(plain, Words(), [[5, 6], [7]], stop_ids=[200], max_new_tokens=6) == first


def test_adapters_take_part_in_generation(model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = chain_model(model_folder)
    with inference_mode_of(model):
        base = complete(model, Words(), [[5]], stop_ids=[9], max_new_tokens=3)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    lora = peft.base_model.model.lm_head
    with torch.no_grad():  # a change that makes 7 the answer to everything
        lora.lora_A["default"].weight.fill_(1.0)
        lora.lora_B["default"].weight.zero_()
        lora.lora_B["default"].weight[7] = 100.0
    assert unwrap(peft) is model
    with inference_mode_of(peft):
        assert complete(peft, Words(), [[5]], stop_ids=[9], max_new_tokens=3)[0].ids == (7, 7, 7)
    assert base[0].ids == (6, 7, 8)


def test_samples_become_records_for_the_metrics_file(model_folder: Path) -> None:
    model = chain_model(model_folder)
    sample = {"source": "a.jsonl:3", "messages": [], "tools": [], "prompt_ids": [4, 5], "reference": "6"}
    with inference_mode_of(model):
        records = answer_samples(model, Words(), [sample], stop_ids=[9], max_new_tokens=9)
    assert records == [
        {"source": "a.jsonl:3", "prompt": "4 5", "reference": "6", "completion": "6 7 8", "stopped": True}
    ]
