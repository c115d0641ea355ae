"""Which modules and rows an adapter trains: said before PEFT is asked, in words of the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.errors import ModelError


def token_modules(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the embedding, and the head where it has weights of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {names[id(embedding)].rsplit(".", 1)[-1]: list(token_ids)}
    if head is not None and head.weight is not embedding.weight:
        modules[names[id(head)].rsplit(".", 1)[-1]] = list(token_ids)
    return modules


def refuse_untrained_tokens(settings: Any, needed: Mapping[str, Sequence[int]], tokens: Mapping[int, str]) -> None:
    """ModelError where an adapter that is continued neither trains nor saves rows that the template needs.

    `settings`: its PEFT config. `needed`: `token_modules` of the base. `tokens`: the spelling of the ids.
    """
    trained = settings.trainable_token_indices or {}
    if not isinstance(trained, Mapping):  # a list of ids means the embedding, which `needed` names first
        trained = {next(iter(needed)): trained}
    missing = {
        index
        for module, ids in needed.items()
        if module not in (settings.modules_to_save or ())
        for index in set(ids) - set(trained.get(module, ()))
    }
    if missing:
        raise ModelError(
            f"model.adapter: the template needs rows that this adapter does not train: "
            f"{' '.join(tokens[index] for index in sorted(missing))}. They would be neither trained nor saved. "
            "Set data.template to the template with which the adapter was trained, or fold it into its base "
            "(sft export --merge), name the result in model.name and train a new adapter."
        )
