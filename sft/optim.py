"""Parameter groups and optimizers, and their state by parameter name.

State is stored by name, whole and on the host, so that a checkpoint of two processes loads into one, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sft.errors import ModelError


def _adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def build(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        try:
            import bitsandbytes.optim as bnb
        except ImportError as error:
            raise ModelError(
                "optim.type: 8-bit optimizers need bitsandbytes. Install it (pip install 'sft[qlora]') or use adamw."
            ) from error
        optimizer: torch.optim.Optimizer = getattr(bnb, name)(groups, **options)
        return optimizer

    return build


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
}


def build(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer over all trained parameters. Vectors (norms, biases) are never decayed."""
    trained = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def whole(tensor: torch.Tensor, *, copy: bool = True, keep: bool = True) -> torch.Tensor:
    """The full tensor on the host; gathers shards (a collective: every rank must call it).

    Without `copy`, a tensor that lies on the host already is given as it is: for when nothing trains any more.
    Without `keep`, the caller only takes part in gathering, and gets an empty tensor.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=copy) if keep else torch.empty(0)


def state_by_name(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, copy: bool = True, keep: bool = True
) -> dict[str, torch.Tensor]:
    """`{"<parameter>::<entry>": tensor}`, whole, on the host. Plain numbers become float64 scalars. As `whole`."""
    state: dict[str, torch.Tensor] = {}
    for parameter, name in names.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            state[f"{name}::{entry}"] = (
                whole(value, copy=copy, keep=keep) if is_tensor else torch.tensor(float(value), dtype=torch.float64)
            )
    return state


def load_state_by_name(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], state: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `state_by_name` gave, sharded as the parameters are now.

    Raises ModelError where an entry has no parameter: the checkpoint is another model's.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    per_parameter: dict[nn.Parameter, dict[str, Any]] = {}
    for key, tensor in state.items():
        name, entry = key.rsplit("::", 1)
        if name not in by_name:
            raise ModelError(f"the optimizer state in the checkpoint names {name!r}, which this model does not train.")
        parameter = by_name[name]
        per_parameter.setdefault(parameter, {})[entry] = _placed(tensor, parameter)
    indices = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    whole_state = optimizer.state_dict()
    whole_state["state"] = {indices[p]: entries for p, entries in per_parameter.items()}
    optimizer.load_state_dict(whole_state)
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """Moves restored moments back into memory shared with the host: bitsandbytes loads them onto the device."""
    for parameter, entries in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in entries:
                buffer = optimizer.get_state_buffer(parameter, dtype=entries[name].dtype)
                entries[name] = buffer.copy_(entries[name])


def _placed(tensor: torch.Tensor, parameter: nn.Parameter) -> Any:
    if tensor.dtype == torch.float64 and tensor.ndim == 0:
        return int(tensor.item())
    if isinstance(parameter.data, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(
            tensor.to(parameter.device), parameter.data.device_mesh, list(parameter.data.placements)
        )
    return tensor.clone()
