"""Generation with a live model, also one in training: nothing about it is changed afterwards, and greedy decoding
draws no random number.

B prompts, T the longest of them. Generation goes through transformers' own `generate`, the code that serves later:
left-padded batches over one cache of keys and values, which lose the rows that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    tick: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers each prompt of token ids. The caller decides modes (`inference_mode_of`) and autocast.

    Prompts are answered `batch_size` at a time. A row ends at its stop; where half of the rows of a batch have ended,
    the others go on without them, and the batch is over with its last row. `tick` is told how many tokens the present
    batch has made.

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
            answers = _generate(live, [prompts[i] for i in members], stop_ids, max_new_tokens, sampling, streamer, tick)
            for index, ids in zip(members, answers, strict=True):
                completions[index] = _completion(tokenizer, ids, stop_ids)
    return [completion for completion in completions if completion is not None]


def answer_samples(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    tick: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers to held-out samples (`prompt_ids`, `reference`, `source`), as metrics.jsonl records them."""
    prompts = [sample["prompt_ids"] for sample in samples]
    answers = complete(model, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, tick=tick)
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
    tick: Callable[[int], None] | None,
) -> list[list[int]]:
    """The new ids of each prompt; what comes after a stop is padding."""
    device = model.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    assert min(len(prompt) for prompt in prompts) > 0, "generation needs at least one token to start from"
    pad = stop_ids[0] if stop_ids else 0
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    rows, answers = list(range(len(prompts))), [[0]] * len(prompts)
    cache = _divisible_cache(model) if len(prompts) > 1 and stop_ids else None
    while True:
        made = ids_BT.shape[1] - longest
        halving = _Halving(stops, len(rows) if cache is not None else 1, longest, tick)
        ids_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=_settings(max_new_tokens - made, stop_ids, pad, sampling),
            stopping_criteria=[halving],
            streamer=streamer,
            **({} if cache is None else {"past_key_values": cache}),
        )
        ended_B = torch.isin(ids_BT[:, longest:], stops).any(dim=1)
        if cache is None or bool(ended_B.all()) or ids_BT.shape[1] - longest >= max_new_tokens:
            for row, ids in zip(rows, ids_BT[:, longest:].tolist(), strict=True):
                answers[row] = ids
            return answers
        for index in ended_B.nonzero().flatten().tolist():
            answers[rows[index]] = ids_BT[index, longest:].tolist()
        going_b = (~ended_B).nonzero().flatten()
        rows = [rows[index] for index in going_b.tolist()]
        ids_BT = ids_BT[going_b]
        mask_BT = torch.nn.functional.pad(mask_BT[going_b], (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
        cache.batch_select_indices(going_b)


def _settings(max_new_tokens: int, stop_ids: Sequence[int], pad: int, sampling: Sampling) -> Any:
    from transformers import GenerationConfig

    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    settings: Any = GenerationConfig
    return settings(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
        repetition_penalty=sampling.repetition_penalty,
        **options,
    )


def _divisible_cache(model: Any) -> Any:
    """An empty cache that can lose rows, of plain keys and values alone; None for a model that keeps other states."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not supported():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    return cache if plain and cache.layers else None


class _Halving:
    """A stopping criterion for `generate`: halts it where half of a batch's rows have ended; tells how far it is."""

    def __init__(self, stops: torch.Tensor, rows: int, longest: int, tick: Callable[[int], None] | None) -> None:
        self._stops, self._rows, self._longest, self._tick = stops, rows, longest, tick

    def __call__(self, ids_BT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._tick is not None:
            self._tick(ids_BT.shape[1] - self._longest)
        halts = False
        if self._rows > 1:  # rows that have ended are given stops to the end: the last token tells
            halts = 2 * int(torch.isin(ids_BT[:, -1], self._stops).sum()) >= self._rows
        return torch.full((len(ids_BT),), halts, dtype=torch.bool, device=ids_BT.device)


def _completion(tokenizer: Any, ids: Sequence[int], stop_ids: Sequence[int]) -> Completion:
    """Padding comes only after a stop token, so cutting at the first stop removes both."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = tuple(ids if end is None else ids[:end])
    return Completion(kept, tokenizer.decode(list(kept)), end is not None)
