"""Kinds of models, by the name that their config gives."""

from __future__ import annotations


def no_causal_lm(name: str, kind: str, *, is_pair: bool) -> str:
    """Why a model of this `model_type`, of which transformers has no causal language model, is not trained, and the
    cure. `is_pair`: its config says encoder-decoder."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    if is_pair or kind in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return (
            f"{name} ({kind}) is an encoder-decoder, and only decoder-only language models are trained. Choose one of "
            "those, such as a Llama, Qwen or SmolLM."
        )
    if kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return (
            f"{name} ({kind}) is a vision-language model, which transformers {transformers.__version__} builds only as "
            "a whole. Choose the text-only model of its family."
        )
    return (
        f"{name} is a {kind or 'nameless'!r} model, which transformers {transformers.__version__} does not know as a "
        "causal language model. Choose another model, or a newer transformers."
    )
