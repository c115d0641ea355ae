"""A run's live model beside weights in a folder: taken from it, compared with it, and let go before one is loaded.

The end of a run has no room for a second model: its base may fill the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.fitting import release

if TYPE_CHECKING:
    from sft.setup import Job
    from sft.trainee import Trainee

ADAPTER = "adapter_model.safetensors"


def free_training_memory(job: Job) -> None:
    """Gradients and the optimizer's state, which nothing needs after the last checkpoint was written."""
    job.optimizer.zero_grad(set_to_none=True)
    job.optimizer.state.clear()
    release(job.device)


def let_go(trainee: Trainee) -> None:
    """Frees the weights, whoever still refers to the model. It is of no use afterwards."""
    device = next(trainee.parameters()).device
    for tensor in [*trainee.parameters(), *trainee.buffers()]:
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    release(device)


def load_into(trainee: Trainee, folder: Path) -> bool:
    """Puts the weights that a checkpoint's model/ holds into the live model, one by one. Whether it holds them then:
    where the files name other tensors than the model has, they have to be loaded as a model of their own."""
    live = _saved_names(trainee)
    found = dict(_shapes(folder))
    if not found or {name: tuple(tensor.shape) for name, tensor in live.items() if name in found} != found:
        return False
    with torch.no_grad():
        for name, tensor in _tensors(folder):
            live[name].copy_(tensor)
    return saved_equals_live(trainee, folder)


def saved_equals_live(trainee: Trainee, folder: Path) -> bool:
    """Whether every tensor that the files of a folder hold is the live model's, rounded to the dtype of the file, and
    none that is trained is missing there."""
    live = _saved_names(trainee)
    left = {id(tensor) for tensor in live.values()}
    for name, saved in _tensors(folder):
        if name not in live or not torch.equal(live[name].detach().to(saved.dtype).cpu(), saved):
            return False
        left.discard(id(live[name]))
    return not left


def _saved_names(trainee: Trainee) -> Mapping[str, torch.Tensor]:
    """The live tensors by their names in the files: of an adapter as PEFT writes it, else of the whole model."""
    if not hasattr(trainee.model, "peft_config"):
        return dict(trainee.causal.state_dict(keep_vars=True))
    from peft import get_peft_model_state_dict

    state = {name: tensor for name, tensor in trainee.model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    return dict(get_peft_model_state_dict(trainee.model, state_dict=state, save_embedding_layers=False))


def _files(folder: Path) -> list[Path]:
    return [folder / ADAPTER] if (folder / ADAPTER).is_file() else sorted(folder.glob("*.safetensors"))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            yield from ((name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """One at a time, on the host."""
    from safetensors import safe_open

    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
