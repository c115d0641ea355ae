"""`sft eval`: scores a run, a checkpoint, an adapter or a model on the held-out rows of a config, and lets it answer.

The rows, their tokens and masks are those of training; the numbers are those of training's own evaluations. Works
under `accelerate launch` too: each conversation is scored by one rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.budget import MOST_SAMPLES
from sft.errors import EXIT_DONE, ConfigError, ModelError
from sft.hush import hush_libraries
from sft.runcard import run_of

if TYPE_CHECKING:
    import torch

    from sft.configfile import LoadedConfig
    from sft.data.loader import Split
    from sft.tokenizer import TokenizerBundle
    from sft.trainee import Trainee

MICRO_TOKENS = {"cuda": 16384, "cpu": 4096}  # of one forward pass where the config says auto


def evaluate_path(loaded: LoadedConfig, model: str, as_json: bool = False) -> int:
    """Evaluates `model` (run folder, checkpoint, adapter, model folder, GGUF file or hub id). Returns the exit code.

    Raises ConfigError where nothing is held out, ModelError where the model does not load or reads other tokens.
    """
    hush_libraries()
    first = int(os.environ.get("RANK", "0")) == 0
    result = measure(loaded, model, say=_note if first else lambda text: None)
    if first:
        print(json.dumps(result, ensure_ascii=False) if as_json else render(result))
    return EXIT_DONE


def measure(loaded: LoadedConfig, model: str, *, say: Any) -> dict[str, Any]:
    """The scores and samples as plain values: model, conversations, loss, perplexity, token_accuracy,
    stop_probability, tokens (trained ones), dtype, samples."""
    from accelerate import PartialState

    from sft.devices import training_device
    from sft.distributed import leave
    from sft.prepare import prepare_data

    config = loaded.config
    if config.data.eval == 0:
        raise ConfigError("data.eval: 0 holds out no rows, so there is nothing to evaluate on. Say data.eval=0.05.")
    _require(model, str(loaded.run_dir))
    # before the process group: no rank waits inside a collective for tokenisation
    bundle, prepared = prepare_data(loaded, say, pinned_date=_date_of(model))
    if prepared.eval is None or prepared.eval.num_conversations == 0:
        raise ConfigError(
            f"data.eval: {config.data.eval} holds out no rows of this data. Say data.eval=0.2, or a number."
        )
    # without a GPU, accelerate starts a process group only where it is told so
    state = PartialState(cpu=training_device().type == "cpu")
    trainee, flat_rows = load(loaded, model, bundle, state.device, say)
    micro_tokens = config.batch.micro_tokens
    if micro_tokens == "auto":
        micro_tokens = MICRO_TOKENS.get(state.device.type, MICRO_TOKENS["cpu"])
    scores = score_split(
        trainee, prepared.eval, bundle, state.device,
        rank=state.process_index, ranks=state.num_processes, micro_tokens=micro_tokens, flat_rows=flat_rows,
    )  # fmt: skip
    wanted = MOST_SAMPLES if config.eval.samples == "auto" else config.eval.samples
    samples = prepared.eval.samples[:wanted] if state.is_main_process else []
    dtype = str(trainee.causal.get_input_embeddings().weight.dtype).removeprefix("torch.")
    answers = answer(trainee, bundle, samples, state.device, config.eval.max_new_tokens)
    leave()
    return {
        "model": model,
        "conversations": prepared.eval.num_conversations,
        **scores,
        "dtype": f"{dtype}, computing in bfloat16" if trainee.autocast else dtype,
        "samples": answers,
    }


def load(
    loaded: LoadedConfig, model: str, bundle: TokenizerBundle, device: torch.device, say: Any
) -> tuple[Trainee, bool]:
    """The model as training would run it, and whether flat rows serve it."""
    from sft import attention, setup
    from sft.model import dtypes, load_trained, resolve_precision
    from sft.trainee import Trainee

    config = loaded.config
    attention.register()
    kinds = dtypes(resolve_precision(config.model.precision, device))
    tuning = config.model.tuning
    live, tokenizer = load_trained(
        model,
        dtype=kinds.trained if tuning == "full" else kinds.frozen,
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )
    if tuning == "qlora":
        say("note: the base is loaded in 16 bits; training's own evaluations saw it in 4 bits")
    check_tokens(live, tokenizer, bundle, model)
    trainee = Trainee(live, compute_dtype=kinds.compute, autocast=kinds.compute != kinds.trained)
    proof = setup.prove(trainee, config, say)
    trainee.head_path = proof["head_path"]
    if proof["flat_rows"]:
        trainee.causal.set_attn_implementation(attention.FLAT)
    return trainee, bool(proof["flat_rows"])


def check_tokens(model: Any, tokenizer: Any, bundle: TokenizerBundle, name: str) -> None:
    """The rows were tokenised for the config's model; a model that reads those ids otherwise has no comparable loss."""
    ours, theirs = bundle.tokenizer.get_vocab(), tokenizer.get_vocab()
    differing = [token for token, index in theirs.items() if ours.get(token, index) != index]
    missing = [token for token in ours if token not in theirs and token not in bundle.added_tokens]
    if differing or missing:
        shown = ", ".join(repr(token) for token in (differing or missing)[:3])
        raise ModelError(
            f"--model {name}: its tokenizer is not that of the config's model.name ({shown} differ). "
            "Evaluate it with a config that names its own base model."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(bundle.tokenizer) > rows:
        raise ModelError(
            f"--model {name}: the template needs {' '.join(bundle.added_tokens)}, which this model lacks: it has "
            f"{rows:,} rows, {len(bundle.tokenizer):,} are needed. Evaluate a trained run instead of its base."
        )


def score_split(
    trainee: Trainee,
    split: Split,
    bundle: TokenizerBundle,
    device: torch.device,
    *,
    rank: int,
    ranks: int,
    micro_tokens: int,
    flat_rows: bool,
) -> dict[str, float | int | None]:
    """`evaluate.metrics` over the whole split, each example on one rank."""
    from dataclasses import astuple

    from sft.batches import Join
    from sft.data.collate import to_device
    from sft.distributed import sum_over_ranks
    from sft.evaluate import EvalSums, add_up, eval_plan, inference_mode_of, metrics, score_hidden
    from sft.trainee import loss_sum

    join = Join(flat_rows, bundle.tokenizer.pad_token_id or 0)

    def scored(members: Sequence[int]) -> torch.Tensor:
        batch = to_device(join([split.example(index) for index in members]), device)

        def score(features_MD: torch.Tensor, head: Any) -> torch.Tensor:
            return score_hidden(features_MD, head, batch.targets_M, batch.weights_M, bundle.stop_ids)

        return loss_sum(trainee, trainee, batch, score)

    lengths = [int(length) for length in split.lengths_E]
    with inference_mode_of(trainee):
        own = add_up(scored(m) for m in eval_plan(lengths, rank=rank, ranks=ranks, micro_tokens=micro_tokens))
    return metrics(EvalSums(*sum_over_ranks(astuple(own), device)))


def answer(
    trainee: Trainee, bundle: TokenizerBundle, samples: Sequence[Any], device: torch.device, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to held-out prompts."""
    import torch

    from sft.evaluate import inference_mode_of
    from sft.generate import answer_samples

    if not samples:
        return []
    with inference_mode_of(trainee), torch.autocast(device.type, trainee.compute_dtype, enabled=trainee.autocast):
        return answer_samples(
            trainee.model, bundle.tokenizer, samples, stop_ids=bundle.stop_ids, max_new_tokens=max_new_tokens
        )


def render(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [
        f"model              {result['model']} ({result['dtype']})",
        f"held out           {result['conversations']:,} conversations, {result['tokens']:,} trained tokens",
        f"loss               {_number(result['loss'])} nats a token",
        f"perplexity         {_number(result['perplexity'])}",
        f"token accuracy     {_number(result['token_accuracy'])}",
        f"stop probability   {_number(result['stop_probability'])}",
    ]
    for sample in result["samples"]:
        lines += [
            "",
            f"--- {sample['source']}",
            sample["prompt"].rstrip("\n"),
            f"> {sample['completion']}" + ("" if sample["stopped"] else " […]"),
            f"  (reference: {sample['reference']})",
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _require(model: str, run_dir: str) -> None:
    local = model == run_dir or model.startswith((".", "/", "~"))
    if local and not Path(model).exists():
        raise ModelError(f"--model {model}: there is no such run or folder. Train first, or name another --model.")


def _date_of(model: str) -> str | None:
    """The date that a run told its template, so that the same rows render the same again."""
    from sft.durable import read_json

    run = run_of(Path(model))
    if run is None or not run.environment.is_file():
        return None
    date = read_json(run.environment).get("date")
    return None if date is None else str(date)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
