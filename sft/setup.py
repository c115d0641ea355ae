"""From a config to everything that a step needs: model, optimizer, micro-batches. One function a decision."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sft import attention, liger, optim
from sft.adapterparts import parted_note, refuse_untrained_tokens, tied_pair, token_modules
from sft.config import Config
from sft.data.collate import flat, idle, padded, to_device
from sft.devices import training_device
from sft.distributed import gather
from sft.errors import ModelError
from sft.fitting import StepMemory, Used, largest, local_bytes, optimizer_bytes, release
from sft.heap import keep_freed_memory
from sft.hush import hush_libraries
from sft.isolation import compare, head_is_exact, liger_agrees
from sft.memory import CPU_MICRO_TOKENS
from sft.model import (
    Precision,
    add_adapter,
    cold_reason,
    count_parameters,
    dtypes,
    fit_vocabulary,
    grow_vocabulary,
    load_base,
)
from sft.needed import is_sharded_launch
from sft.schedule import Plan
from sft.trainee import Trainee, loss_sum

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sft.tokenizer import TokenizerBundle

AUTO_SHARE = 0.85  # of the free memory: steps differ, and so do their gaps
SHARDED_SHARE = 0.7  # where memory runs out on one rank alone, the others wait for it inside a collective


@dataclass
class Job:
    """What the loop works on. `module` is `trainee`, or its wrapper where several processes train."""

    accelerator: Accelerator
    trainee: Trainee
    module: nn.Module
    optimizer: torch.optim.Optimizer
    names: Mapping[nn.Parameter, str]
    plan: Plan
    peak_lr: float
    flat_rows: bool
    micro_tokens: int
    pad_id: int
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        return getattr(self.accelerator.state, "fsdp_plugin", None) is not None


def set_up_libraries(config: Config) -> None:
    """Quiet libraries, memory that stays on a CPU, and repeatable kernels where asked for."""
    hush_libraries()
    if training_device().type == "cpu":
        keep_freed_memory()
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def build_trainee(
    config: Config,
    bundle: TokenizerBundle,
    *,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> tuple[Trainee, dict[str, Any]]:
    """The model to train, from its base or from a checkpoint's model/, and facts about it for the record.

    `precision`: bf16, mixed or fp32.
    """
    attention.register()
    if is_sharded_launch():
        device = torch.device("cpu")  # a model that needs sharding need not fit on one device
    kinds = dtypes(precision)
    tuning = config.model.tuning
    model = load_base(
        str(checkpoint / "model") if checkpoint and tuning == "full" else config.model.name,
        revision=None if checkpoint and tuning == "full" else config.model.revision,
        dtype=kinds.trained if tuning == "full" else kinds.frozen,
        quantization=config.model.quantization if tuning == "qlora" else None,
        compute_dtype=kinds.compute,
        attention=attention.FLAT if config.model.attention in ("auto", "flat") else _padded_attention(config),
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )
    rows = _fit_tokens(model, config, bundle, checkpoint=checkpoint, say=say)
    if tuning != "full":
        if tuning == "qlora":
            _prepare_quantized(model)
        needed, pair = token_modules(model, rows["trained_ids"]), tied_pair(model)
        model = add_adapter(
            model,
            config.model.lora,
            seed=config.run.seed,
            trained_token_ids=rows["trained_ids"],
            adapter=str(checkpoint / "model") if checkpoint else config.model.adapter,
            trained_dtype=kinds.trained,
            revision=config.model.revision,
        )
        follow_inputs(model)
        settings = model.peft_config["default"]
        note = parted_note(pair, settings.target_modules, settings.modules_to_save)
        if note is not None and checkpoint is None:
            say(f"note: {note}")
        if config.model.adapter and checkpoint is None:
            tokens = {index: bundle.tokenizer.convert_ids_to_tokens(index) for index in rows["trained_ids"]}
            refuse_untrained_tokens(settings, needed, tokens)
    trainee = Trainee(
        model,
        compute_dtype=kinds.compute,
        autocast=kinds.compute != kinds.trained,
        neftune_alpha=config.train.neftune_alpha,
    )
    trained, every = count_parameters(trainee)
    facts = {"trained_parameters": trained, "parameters": every, **rows}
    return trainee, facts


def _padded_attention(config: Config) -> str:
    return "eager" if config.model.attention == "eager" else "sdpa"


def _prepare_quantized(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def follow_inputs(model: Any) -> None:
    """Adapters take activations as they come, without PEFT's cast to float32 and back: autocast decides."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def _fit_tokens(
    model: Any,
    config: Config,
    bundle: TokenizerBundle,
    *,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rows for the template's tokens. A checkpoint's model has had its start; its vocabulary is only grown again."""
    tokenizer = bundle.tokenizer
    if checkpoint is not None:
        grow_vocabulary(model, len(tokenizer))
        return {"trained_ids": [], "warm_started": [], "untrained": []}
    rows = fit_vocabulary(
        model,
        vocabulary=len(tokenizer),
        template_tokens={token: tokenizer.convert_tokens_to_ids(token) for token in template_tokens(bundle)},
        added_tokens=bundle.added_tokens,
        end_of_text_id=end_of_text_id(model, bundle),
        warm_start=config.model.warm_start_tokens in ("auto", True),
    )
    if rows.warm_started:
        say(f"never-trained tokens start from the end-of-text row: {' '.join(rows.warm_started)}")
    if rows.untrained:
        why = cold_reason(config.model.warm_start_tokens in ("auto", True), end_of_text_id(model, bundle))
        say(f"warning: tokens with untrained rows: {' '.join(rows.untrained)} ({why})")
    return {
        "trained_ids": list(rows.trained_ids),
        "warm_started": list(rows.warm_started),
        "untrained": list(rows.untrained),
    }


def template_tokens(bundle: TokenizerBundle) -> list[str]:
    """Added tokens that the template spells, that its text was found to need, or that serving stops at."""
    tokenizer = bundle.tokenizer
    stops = {tokenizer.convert_ids_to_tokens(index) for index in bundle.stop_ids}
    wanted = {*stops, *bundle.added_tokens}  # a template may build a token that its source never spells
    text = bundle.template or ""
    return [token for token in tokenizer.get_added_vocab() if token in text or token in wanted]


def end_of_text_id(model: Any, bundle: TokenizerBundle) -> int | None:
    """What the base model learned to end texts with: its generation settings' end, else the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) else bundle.end_of_text


def prove(trainee: Trainee, config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Whether flat rows and the chunked head serve this model: `{"flat_rows", "head_path", …}`.

    Raises ModelError where the user insists on flat rows and the model fails.
    """
    wanted = config.model.attention
    device = next(trainee.parameters()).device
    exact = False
    if wanted in ("auto", "flat"):
        exact, reason = _flat_rows_serve(trainee, device)
        if not exact and wanted == "flat":
            raise ModelError(f"model.attention: flat rows change this model ({reason}). Use auto or padded.")
        if not exact:
            say(f"flat rows change this model ({reason}): training on padded batches grouped by length")
            trainee.causal.set_attn_implementation(_padded_attention(config))
    # A router's extra loss is part of the model's own forward pass alone.
    routed = bool(getattr(trainee.causal.config.get_text_config(), "output_router_logits", False))
    own_head = routed or not head_is_exact(trainee, device)
    if own_head:
        say("this model's loss is more than a matrix product and a cross entropy: its own forward pass is used")
    return {"flat_rows": exact, "head_path": "model" if own_head else "chunked"}


def choose_loss_kernel(trainee: Trainee, say: Callable[[str], None]) -> liger.LossKernel:
    """Liger's where it is installed, fits the head and gives what the plain path gives, on the trainee's device."""
    device = next(trainee.parameters()).device
    if liger.unavailable(device.type, is_sharded=is_sharded_launch()) or not trainee.fits_liger:
        return "plain"
    fault = liger.unfit() or liger_fault(trainee, device)
    if fault:
        say(f"note: the loss is computed without Liger's kernel: {fault}")
    return "plain" if fault else "liger"


def liger_fault(trainee: Trainee, device: torch.device) -> str | None:
    try:
        return None if liger_agrees(trainee, device) else "its result differs from the plain path's"
    except Exception as error:  # Triton compiles here: no C compiler, an old driver, a GPU that it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _flat_rows_serve(trainee: Trainee, device: torch.device) -> tuple[bool, str]:
    try:
        verdict = compare(trainee, device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        # A model whose layers refuse flat rows: linear attention, convolutions, encoders.
        return False, f"{type(error).__name__}: {error}".splitlines()[0]
    return verdict.flat_is_exact, f"logits differ by {verdict.logits:.1e}, gradients by {verdict.gradients:.1e}"


def wants_checkpointing(config: Config, parameters: int, tokens: int, device: torch.device) -> bool:
    """`auto`: only where activations of `tokens` would not fit beside weights and optimizer."""
    setting = config.model.gradient_checkpointing
    if setting != "auto":
        return bool(setting)
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    states = 12 * parameters if config.model.tuning == "full" else 0
    # about 34 bytes a hidden unit and layer in 16 bit (Korthikanti et al., arXiv:2205.05198, without attention maps)
    activations = 34 * tokens * (parameters / 12) ** 0.5 * 8
    return bool(states + activations > 0.8 * free)


def enable_checkpointing(trainee: Trainee) -> None:
    """Activations of a layer are computed again in its backward pass instead of being kept."""
    options = {"use_reentrant": False}
    if hasattr(trainee.causal, "activation_checkpointing_enable"):  # the name from transformers 5.20 or so on
        trainee.causal.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        trainee.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def warm_up(job: Job) -> None:
    """One idle pass through DDP, its gradients thrown away.

    DDP regroups its buckets after the first backward pass. Were that the first step, a resumed process would reduce
    its first step in other groups than the uninterrupted run did, and differ in the last bits.
    """
    if job.world == 1 or job.is_sharded:
        return
    example = [idle()]
    batch = to_device(flat(example) if job.flat_rows else padded(example, job.pad_id), job.device)
    loss = loss_sum(job.module, job.trainee, batch)
    job.accelerator.backward(loss)
    job.optimizer.zero_grad(set_to_none=True)
    job.module.zero_grad(set_to_none=True)


def choose_micro_tokens(job: Job, config: Config, longest: int, step_tokens: int) -> int:
    """The largest micro-batch that fits, by measured passes on CUDA; on CPU what its matrix products want.

    `longest`: tokens of the longest example, which must fit in any case. `step_tokens`: of a step on this rank.
    """
    if config.batch.micro_tokens != "auto":
        return int(config.batch.micro_tokens)
    if job.device.type != "cuda":
        return max(longest, CPU_MICRO_TOKENS[config.model.tuning])
    attempt = step_memory(job, config, longest)

    def together(tokens: int) -> Used | None:
        """A sharded model is run by all ranks, so all must go on to the same size."""
        used = attempt(tokens)
        everyone = gather(None if used is None else [used.bytes, used.share])
        return None if None in everyone else Used(*max(everyone, key=lambda pair: float(pair[1])))

    ceiling = max(longest, step_tokens)
    if job.is_sharded:
        fit = largest(together, floor=longest, ceiling=ceiling, share=SHARDED_SHARE, seconds=math.inf)
    else:
        fit = largest(attempt, floor=longest, ceiling=ceiling, share=AUTO_SHARE)
    release(job.device)
    return fit.tokens if fit is not None else longest  # and the first step explains why that is too much


def step_memory(job: Job, config: Config, longest: int | None) -> StepMemory:
    """Measures what a step takes with examples of `longest` tokens; None: with one example in a micro-batch."""
    trained = [p for p in job.trainee.parameters() if p.requires_grad]
    whole = optimizer_bytes(config.optim.type, sum(map(local_bytes, trained)), sum(p.numel() for p in trained))
    return StepMemory(
        job.trainee,
        job.device,
        job.flat_rows,
        longest,
        missing_bytes=max(0, whole - bytes_in_use(job)[2]),
        passes=1 if job.world > 1 and not job.is_sharded else 2,  # DDP's gradients have their place already
        through=job.module if job.is_sharded else None,
    )


def bytes_in_use(job: Job) -> tuple[int, int, int]:
    """Weights, gradients while a step is at work, optimizer state; on this rank."""
    parameters = list(job.trainee.parameters())
    states = (value for entries in job.optimizer.state.values() for value in entries.values())
    return (
        sum(map(local_bytes, parameters)),
        sum(local_bytes(p) for p in parameters if p.requires_grad),
        sum(local_bytes(value) for value in states if isinstance(value, torch.Tensor)),
    )


def build_optimizer(config: Config, trainee: Trainee, lr: float) -> torch.optim.Optimizer:
    settings = config.optim
    return optim.build(
        settings.type,
        trainee.named_parameters(),
        lr=lr,
        weight_decay=settings.weight_decay,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
    )
