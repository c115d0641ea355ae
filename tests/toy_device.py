"""A device without float64, as Apple's GPUs are, on a machine without one.

`python tests/toy_device.py` runs there what adds losses and scores up, and prints what came out beside the CPU's. Its
tensors are wrapped ones whose numbers lie on the CPU; a float64 result is refused in the words of Apple's backend.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

REFUSAL = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


class ToyTensor(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> ToyTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="toy")
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class ToyMode(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class ToyConstructor(TorchFunctionMode):
    """`torch.tensor` reads numbers below where ToyMode listens."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is torch.tensor and torch.device(given.get("device") or "cpu").type == "toy":
            return function(*args, **{**given, "device": "cpu"}).to(given["device"])
        return function(*args, **given)


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    on_toy = False

    def unwrapped(value: Any) -> Any:
        nonlocal on_toy
        if isinstance(value, ToyTensor):
            on_toy = True
            return value.inner
        return value

    def wrapped(value: Any) -> Any:
        if not (on_toy and isinstance(value, torch.Tensor)):
            return value
        if value.dtype == torch.float64:
            raise TypeError(REFUSAL)
        return ToyTensor(value)

    plain_args, plain_kwargs = tree_map(unwrapped, args), tree_map(unwrapped, dict(kwargs))
    if plain_kwargs.get("device") is not None:
        on_toy = torch.device(plain_kwargs["device"]).type == "toy"
        plain_kwargs["device"] = torch.device("cpu")
    return tree_map(wrapped, function(*plain_args, **plain_kwargs))


def sums_on(device: torch.device) -> dict[str, Any]:
    """What the loop and an evaluation keep of three micro-batches."""
    from sft.devices import add_to, has_float64, zeros_64
    from sft.distributed import sum_over_ranks
    from sft.evaluate import EvalSums, add_up, metrics, score_hidden

    draw = torch.Generator().manual_seed(0)
    head_VD = torch.randn(17, 8, generator=draw).to(device)
    losses_1, total_6, scores = zeros_64(1, device), zeros_64(6, device), []
    for count in (3, 300, 40):
        hidden_MD = torch.randn(count, 8, generator=draw).to(device)
        labels_M = torch.randint(0, 17, (count,), generator=draw).to(device)
        weights_M = (torch.rand(count, generator=draw) < 0.7).float().to(device)
        scores.append(score_hidden(hidden_MD, lambda h: h @ head_VD.T, labels_M, weights_M, [3, 40]))
        add_to(total_6, scores[-1])
        add_to(losses_1, hidden_MD.pow(2).sum())
    return {
        "has_float64": has_float64(device),
        "kept_on": [total_6.device.type, losses_1.device.type, scores[-1].device.type],
        "dtypes": [str(total_6.dtype), str(losses_1.dtype), str(scores[-1].dtype)],
        "loss": sum_over_ranks([float(losses_1)], device),
        "scores": metrics(EvalSums.of(total_6)),
        "added_up": metrics(add_up(scores)),
    }


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("toy")
    on_cpu = sums_on(torch.device("cpu"))
    with ToyMode(), ToyConstructor():
        toy = torch.device("toy")
        try:
            torch.zeros(6, dtype=torch.float64, device=toy)
        except TypeError as error:
            refused = str(error)
        print(json.dumps({"refused": refused, "cpu": on_cpu, "toy": sums_on(toy)}))
