"""Which modules and rows an adapter trains: said before PEFT is asked, in words of the config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.errors import ModelError, did_you_mean


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
    whole = _last_names(settings.modules_to_save or ())
    trained = settings.trainable_token_indices or {}
    if not isinstance(trained, Mapping):  # a list of ids means the embedding, which `needed` names first
        trained = {next(iter(needed)): trained}
    missing = {
        index
        for module, ids in needed.items()
        if module not in whole
        for index in set(ids) - set(trained.get(module, ()))
    }
    if missing:
        raise ModelError(
            f"model.adapter: the template needs rows that this adapter does not train: "
            f"{' '.join(tokens[index] for index in sorted(missing))}. They would be neither trained nor saved. "
            "Set data.template to the template with which the adapter was trained, or fold it into its base "
            "(sft export --merge), name the result in model.name and train a new adapter."
        )


def rows_to_train(model: Any, token_ids: Sequence[int], modules_to_save: Sequence[str]) -> dict[str, list[int]] | None:
    """`token_modules`, less what is trained whole; None where nothing is left.

    Raises ModelError where one of a tied pair is trained whole: the head's rows would be saved nowhere, or PEFT would
    train single rows of a head that it trains whole.
    """
    if not token_ids:
        return None
    modules, whole = token_modules(model, token_ids), _last_names(modules_to_save)
    embedding, head = next(iter(modules)), model.get_output_embeddings()
    if len(modules) == 1 and head is not None:
        name = next(name for name, module in model.named_modules() if module is head).rsplit(".", 1)[-1]
        if len(whole & {embedding, name}) == 1:
            raise ModelError(
                f"model.lora.modules_to_save: {list(modules_to_save)}: {embedding} and {name} of this model share "
                "their weights, and the template's new tokens need both. Name both, "
                f"[{embedding}, {name}], or neither: the rows of new tokens are trained and saved anyway."
            )
    return {name: ids for name, ids in modules.items() if name not in whole} or None


@dataclass(frozen=True, slots=True)
class TiedPair:
    """An embedding of `rows` x `width` and the head that shares its weights, by their full names."""

    embedding: str
    head: str
    rows: int
    width: int


def tied_pair(model: Any) -> TiedPair | None:
    """The embedding and head of a model without adapter; None where each has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return TiedPair(names[id(embedding)], names[id(head)], *map(int, embedding.weight.shape))


def parted_note(pair: TiedPair | None, *trained: str | Collection[str] | None) -> str | None:
    """What training one of a tied pair by itself, or each in its own way, means for merging; None where it is not done.

    `trained`: names of modules as PEFT takes them: a pattern of whole names, or ends of names.
    """
    if pair is None:
        return None
    changed = [name for name in (pair.embedding, pair.head) if any(_names(part, name) for part in trained)]
    if not changed:
        return None
    embedding, head = (name.rsplit(".", 1)[-1] for name in (pair.embedding, pair.head))
    how = f"the adapter changes {changed[0].rsplit('.', 1)[-1]} alone" if len(changed) == 1 else "each is changed apart"
    return (
        f"model.lora: {embedding} and {head} of this model share their weights, and {how}. sft export --merge gives "
        f"each its own ({pair.rows:,} x {pair.width:,} weights more, tie_word_embeddings: false); tools that merge "
        "without parting them give another model"
    )


def _names(trained: str | Collection[str] | None, module: str) -> bool:
    if isinstance(trained, str):
        return trained != "all-linear" and re.fullmatch(trained, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in trained or ())


def refuse_unknown_modules(model: Any, key: str, names: str | Sequence[str]) -> None:
    """ModelError for names that no module has; PEFT passes over them. A string is a pattern, and PEFT's to judge."""
    if isinstance(names, str):
        return
    modules = {name for name, _ in model.named_modules() if name}
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
            known = modules if "." in wanted else _last_names(modules)
            weights = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() > 1}
            raise ModelError(
                f"model.lora.{key}: no module of this model is named '{wanted}'.{did_you_mean(wanted, sorted(known))} "
                f"Those with matrices are {', '.join(sorted(_last_names(weights)))}."
            )


def _last_names(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}
