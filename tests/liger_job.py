"""Liger's kernel against the plain path: on CUDA, or in a process of its own by Triton's interpreter on the CPU.

As a script (TRITON_INTERPRET=1) prints {case: {figure: value}} as JSON.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sft import attention, isolation, liger, setup
from sft.data.collate import flat, to_device
from sft.loss import LogitTransform, head_loss_sum, linear_loss_sum
from sft.trainee import Trainee, loss_sum
from sft.types import Example

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
Figures = dict[str, float | str | bool]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Small tensors in several chunks."""
    before = liger.chunk_rows
    liger.chunk_rows = lambda vocabulary, device: rows  # type: ignore[assignment]
    try:
        yield
    finally:
        liger.chunk_rows = before


def against_plain(
    device: str, *, rows: int = 1000, trained: bool = True, softcap: float | None = None, mixed: bool = False
) -> Figures:
    """Differences of loss and gradients, of a loss divided by 7 as a step divides it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).to(device, torch.bfloat16 if mixed else torch.float32)
    weight = torch.randn(150, 24, generator=generator).to(device).requires_grad_(trained)
    targets = torch.randint(0, 150, (37,), generator=generator).to(device)
    hidden.requires_grad_()
    ones, cap = torch.ones(37, device=device), LogitTransform(softcap=softcap)
    with torch.autocast(device, torch.bfloat16, enabled=mixed), chunks_of(rows):
        fused = liger.fused_loss_sum(hidden, weight, targets, softcap)
        if softcap is None:
            plain = linear_loss_sum(hidden, weight, targets, ones)
        else:
            plain = head_loss_sum(hidden, lambda h: cap(F.linear(h, weight)), 150, targets, ones)
    wanted = (hidden, weight) if trained else (hidden,)
    kept = [tensor.shape[0] for tensor in fused.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    ours, theirs = (torch.autograd.grad(loss / 7, wanted) for loss in (fused, plain))
    found: Figures = {"loss": relative(fused, plain), "dtype": str(fused.dtype), "hidden": relative(ours[0], theirs[0])}
    found["makes_head_gradient"] = 150 in kept
    if trained:
        found |= {"weight": relative(ours[1], theirs[1]), "weight_dtype": str(ours[1].dtype)}
        found["finer_than_bf16"] = bool((ours[1].bfloat16().float() != ours[1]).any())
    return found


def model(kind: str, device: str, softcap: float | None = None, *, mixed: bool = False) -> Trainee:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    changes = {"query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    config = AutoConfig.for_model(kind, **SMALL, **changes)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.FLAT)
    dtype = torch.bfloat16 if mixed else torch.float32
    trainee = Trainee(made.to(device), compute_dtype=dtype, autocast=mixed).train()
    trainee.transform = LogitTransform(softcap=softcap)
    return trainee


def examples(weight: float) -> list[Example]:
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 97, n, dtype=np.int32), (rng.random(n) < 0.6).astype(np.float32)) for n in (9, 30, 5)]
    return [Example(ids_T, weights_T * weight, f"t:{i}") for i, (ids_T, weights_T) in enumerate(drawn)]


def whole_model(kind: str, device: str, *, softcap: float | None = None, weight: float = 1.0) -> Figures:
    """A micro-batch through the trainee by both kernels: differences of the loss and of all gradients."""
    trainee = model(kind, device, softcap)
    batch = to_device(flat(examples(weight)), torch.device(device))
    found = {}
    for kernel in ("plain", "liger"):
        trainee.loss_kernel = kernel  # type: ignore[assignment]
        trainee.zero_grad()
        loss = loss_sum(trainee, trainee, batch)
        (loss / 7).backward()
        gradients = [p.grad.flatten() for p in trainee.parameters() if p.grad is not None]
        found[kernel] = (loss, torch.cat(gradients))
    loss_pair, gradient_pair = zip(found["liger"], found["plain"], strict=True)
    return {"loss": relative(*loss_pair), "gradients": relative(*gradient_pair)}


def proof(kind: str, device: str, softcap: float | None = None, *, mixed: bool = False) -> Figures:
    """What the proof at the start says of the kernel as it is, and of kernels that are wrong."""
    trainee, where = model(kind, device, softcap, mixed=mixed), torch.device(device)
    right = liger.fused_loss_sum

    def answer(kernel: Any) -> str:
        liger.fused_loss_sum = kernel
        try:
            return str(setup.liger_fault(trainee, where))
        finally:
            liger.fused_loss_sum = right

    def broken(*arguments: Any) -> torch.Tensor:
        raise OSError("no C compiler\nat all")

    return {
        "as_it_is": answer(right),
        "loss_off": answer(lambda *arguments: 1.02 * right(*arguments)),
        "gradient_off": answer(lambda hidden, *rest: right(0.5 * hidden + 0.5 * hidden.detach(), *rest)),
        "broken": answer(broken),
        "left_at": trainee.loss_kernel,
        "agrees": isolation.liger_agrees(trainee, where),
    }


def cases(device: str, softcap: float) -> dict[str, Figures]:
    return {
        "full": against_plain(device),
        "chunks": against_plain(device, rows=8),
        "frozen": against_plain(device, rows=8, trained=False),
        "softcap": against_plain(device, rows=8, softcap=softcap),
        "mixed": against_plain(device, rows=8, mixed=True),
        "llama": whole_model("llama", device),
        "gemma2": whole_model("gemma2", device, softcap=softcap),
        "weighted": whole_model("llama", device, weight=0.5),
        "proof": proof("llama", device),
        "capped_proof": proof("gemma2", device, softcap),
        "mixed_proof": proof("gemma2", device, softcap, mixed=True),
    }


if __name__ == "__main__":
    import liger_kernel.ops.cross_entropy as kernels
    import triton
    import triton.language as tl

    # The interpreter has no CUDA device library: a tanh is lent to it. It takes no float arguments: the cap is whole.
    @triton.jit
    def tanh(x):  # type: ignore[no-untyped-def]
        return 2 * tl.sigmoid(2 * x) - 1

    kernels.tanh = tanh
    print(json.dumps(cases("cpu", 3)))
