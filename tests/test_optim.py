"""What the optimizer decays, of real models: matrices, and no vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_job import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sft import optim

OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_decay_and_vectors_never(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else SMALL)))
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = optim.build("adamw", model.named_parameters(), weight_decay=0.5, **OPTIONS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == {name for name, parameter in model.named_parameters() if parameter is not frozen}
    vectors = {name for name in decays if "norm" in name or "ln_" in name or name.endswith(".bias")}
    assert vectors
    assert {name for name, decay in decays.items() if decay == 0.0} == vectors
    assert {decay for name, decay in decays.items() if name not in vectors} == {0.5}


def test_decay_is_all_that_moves_weights_without_a_gradient() -> None:
    """lr * decay of each matrix goes, and a bias stays (AdamW: Loshchilov & Hutter, arXiv:1711.05101)."""
    layer = nn.Linear(4, 3)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = optim.build("adamw", layer.named_parameters(), weight_decay=0.5, **OPTIONS)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_an_adapter_of_matrices_alone_has_one_group() -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer = optim.build("adamw", layer.named_parameters(), weight_decay=0.5, **OPTIONS)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
