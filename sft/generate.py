"""Generation with a live model, also one in training: nothing about it is changed afterwards, and greedy decoding
draws no random number.

B prompts, T the longest of them. Generation goes through transformers' own `generate`, the code that serves later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered. `ids` end before the stop token; `stopped` says whether there was one."""

    ids: tuple[int, ...]
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick tokens; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    streamer: Any = None,
) -> list[Completion]:
    """Answers each prompt of token ids. The caller decides modes (`inference_mode_of`) and autocast.

    Under FSDP every rank must call this with the same prompts: all ranks take part in each forward pass, and greedy
    decoding keeps them in step.
    """
    live = unwrap(model)
    completions: list[Completion | None] = [None] * len(prompts)
    # neighbours in length share a batch: less padding
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    with _ready_to_generate(live):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            answers = _generate(live, [prompts[i] for i in members], stop_ids, max_new_tokens, sampling, streamer)
            for index, ids in zip(members, answers, strict=True):
                completions[index] = _completion(tokenizer, ids, stop_ids)
    return [completion for completion in completions if completion is not None]


def answer_samples(
    model: Any, tokenizer: Any, samples: Sequence[Mapping[str, Any]], *, stop_ids: Sequence[int], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to held-out samples (`prompt_ids`, `reference`, `source`), as metrics.jsonl records them."""
    answers = complete(
        model, tokenizer, [s["prompt_ids"] for s in samples], stop_ids=stop_ids, max_new_tokens=max_new_tokens
    )
    return [
        {
            "source": sample["source"],
            "prompt": tokenizer.decode(sample["prompt_ids"]),
            "reference": sample["reference"],
            "completion": answer.text,
            "stopped": answer.stopped,
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, torch.compile and PEFT. Adapter layers live in it, so it still uses them."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):  # PEFT
            return model.get_base_model()
        else:
            return model


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """sdpa for padded batches with a cache (flat attention can do neither), and no inherited generation settings:
    a repetition penalty that the model ships with would make samples incomparable with the loss."""
    from transformers import GenerationConfig

    fresh: Any = GenerationConfig
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    attentions = [(config, config._attn_implementation) for config in configs.values()]
    generation_config, use_cache = model.generation_config, getattr(model.config, "use_cache", None)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", True) else "eager")
    model.generation_config = fresh()
    try:
        yield
    finally:
        model.generation_config = generation_config
        if use_cache is not None:
            model.config.use_cache = use_cache
        for config, attention in attentions:  # parents come first: setting one also sets the configs below it
            config._attn_implementation = attention


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: Any,
) -> list[list[int]]:
    from transformers import GenerationConfig

    settings: Any = GenerationConfig
    device = model.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    assert min(len(prompt) for prompt in prompts) > 0, "generation needs at least one token to start from"
    pad = stop_ids[0] if stop_ids else 0
    input_ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    output_BT = model.generate(
        input_ids=input_ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        generation_config=settings(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad,
            use_cache=True,
            repetition_penalty=sampling.repetition_penalty,
            **options,
        ),
        streamer=streamer,
    )
    answers: list[list[int]] = output_BT[:, longest:].tolist()
    return answers


def _completion(tokenizer: Any, ids: Sequence[int], stop_ids: Sequence[int]) -> Completion:
    """Padding comes only after a stop token, so cutting at the first stop removes both."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = tuple(ids if end is None else ids[:end])
    return Completion(kept, tokenizer.decode(list(kept)), end is not None)
