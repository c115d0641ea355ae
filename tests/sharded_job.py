"""Run by two processes under torchrun (gloo): a sharded trainee must train, save and load as a whole one does.

accelerate enables FSDP on accelerators only; torch's `fully_shard`, which it calls, runs on CPU, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from sft import attention
from sft.accelerator import sharded_precision
from sft.config import Lora
from sft.data.collate import flat
from sft.model import add_adapter, dtypes, load_base
from sft.optim import build, load_state_by_name, state_by_name, whole
from sft.setup import follow_inputs
from sft.trainee import Trainee, loss_sum
from sft.types import Example

OPTIONS: Any = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 256, n, dtype=np.int32), np.ones(n, np.float32), f"s:{n}") for n in (5, 17, 9, 30)]


def trainee(model: Path, *, shard: bool) -> tuple[Trainee, torch.optim.Optimizer, dict[Any, str]]:
    attention.register()
    base = load_base(str(model), dtype=torch.float32, attention=attention.FLAT)
    made = Trainee(base, compute_dtype=torch.float32, autocast=False).train()
    if shard:
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(made)
    names = {parameter: name for name, parameter in made.named_parameters()}
    return made, build("adamw", made.named_parameters(), **OPTIONS), names


def step(made: Trainee, optimizer: torch.optim.Optimizer, members: list[Example], world: int) -> None:
    targets = sum(len(e.input_ids_T) - 1 for e in examples())
    (loss_sum(made, made, flat(members)) * (world / targets)).backward()
    torch.nn.utils.clip_grad_norm_(list(made.parameters()), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def mixed(model: Path, tuning: str, members: list[Example]) -> None:
    """Under the policy that the trainer gives to FSDP: bf16 products, float32 losses and gradients, twice in a row."""
    policy = sharded_precision("mixed")
    kinds = dtypes("mixed")
    base: Any = load_base(
        str(model), dtype=kinds.trained if tuning == "full" else kinds.frozen, attention=attention.FLAT
    )
    if tuning == "lora":
        base = add_adapter(base, Lora(rank=4), seed=0)
        follow_inputs(base)
    made = Trainee(base, compute_dtype=kinds.compute, autocast=True).train()
    for layer in made.backbone.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(made, mp_policy=policy)
    for _ in range(2):
        loss = loss_sum(made, made, flat(members))
        assert loss.dtype == torch.float32
        assert float(loss.detach()) != float(loss.detach().bfloat16()), "the sum was rounded"
        loss.backward()
    with torch.no_grad():  # as an evaluation does: the root stays gathered
        loss_sum(made, made, flat(members))
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert {p.grad.dtype for p in trained.values() if p.grad is not None} == {torch.float32}
    state = made.state_dict(keep_vars=True)
    assert {name for name, tensor in state.items() if tensor.requires_grad} >= set(trained)


def main(model: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded, optimizer, names = trainee(model, shard=True)
    plain, plain_optimizer, plain_names = trainee(model, shard=False)
    for _ in range(3):
        step(sharded, optimizer, examples()[rank::world], world)
        step(plain, plain_optimizer, examples(), 1)
    state, weights = state_by_name(optimizer, names), {n: whole(p) for p, n in names.items()}
    expected_state = state_by_name(plain_optimizer, plain_names)
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-6)
    for parameter, name in plain_names.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-5)

    again, again_optimizer, again_names = trainee(model, shard=True)
    with torch.no_grad():
        for parameter, name in again_names.items():
            full = weights[name]
            parameter.copy_(
                torch.distributed.tensor.distribute_tensor(full, parameter.device_mesh, parameter.placements)
            )
    load_state_by_name(again_optimizer, again_names, state)
    step(sharded, optimizer, examples()[rank::world], world)
    step(again, again_optimizer, examples()[rank::world], world)
    for (parameter, name), other in zip(names.items(), again_names, strict=True):
        assert torch.equal(whole(parameter), whole(other)), name
    print(f"rank {rank}: sharded state is exact", flush=True)
    for tuning in ("full", "lora"):
        mixed(model, tuning, examples()[rank::world])
    print(f"rank {rank}: mixed precision keeps float32 sums", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort an orderly exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
