"""Every knob, typed, strict, once. Reading and writing the files is `configfile`'s work.

No torch here: a wrong key must answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sft.templating import RESERVED

Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


Auto = Literal["auto"]


def whole_from_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"{value:g} is neither a share of the run (below 1) nor a whole number of steps")
    return value


def whole_from_one_or_auto(value: Auto | float) -> Auto | float:
    return value if isinstance(value, str) else whole_from_one(value)


ShareOrSteps = Annotated[float, Field(ge=0), AfterValidator(whole_from_one)]
AutoShareOrSteps = Annotated[Auto | Annotated[float, Field(ge=0)], AfterValidator(whole_from_one_or_auto)]

Tuning = Literal["full", "lora", "qlora"]
RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
RowField = Literal[
    "messages", "conversations", "conversation", "prompt", "completion", "instruction", "input", "output", "text",
    "system", "history", "tools", "functions", "train", "weight", "chat_template_kwargs",
]  # fmt: skip
"""What some row format reads: a column that is mapped to another name would be lost."""
Policy = Literal["auto", "assistant", "last_assistant", "completion", "all"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
Reasoning = Literal["train", "context", "drop", "close"]
ControlTokens = Literal["text", "allow", "error"]
EvalMetric = Literal["eval.loss", "eval.perplexity", "eval.token_accuracy", "eval.stop_probability"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def with_prefix(metric: Any) -> Any:
    """`loss`, as an evaluation's line in metrics.jsonl has it, is eval.loss."""
    return f"eval.{metric}" if f"eval.{metric}" in get_args(EvalMetric) else metric


class Run(Section):
    """Where a run lives, and what makes it repeatable."""

    dir: str | None = None
    """Run folder; null: runs/<name of the config file>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of samples, dropout and new weights."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA too, at some cost in speed. On CPU runs repeat anyway."""
    threads: Auto | Positive = "auto"
    """Of one process; on a CPU their number decides the last bits. auto: OMP_NUM_THREADS, else all cores."""


class Lora(Section):
    """The adapter (arXiv:2106.09685)."""

    rank: Positive = 16
    """Width of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Updates are scaled by alpha / rank."""
    dropout: Share = 0.0
    """Of the adapter's input, in training."""
    targets: str | list[str] = "all-linear"
    """all-linear, a regular expression, or a list of module names."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    modules_to_save: list[str] = []
    """Modules trained in full beside the adapter."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How the adapter's weights start."""


class Quantization(Section):
    """The frozen base in 4 bits (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code: nf4 suits weights, which are nearly normal."""
    double_quant: bool = True
    """Quantise the scales too."""


class Model(Section):
    """What is trained, and how it computes."""

    name: str
    """Hub id, folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tuning: Tuning = "lora"
    """full: every weight; lora: a small adapter; qlora: an adapter on a 4-bit base."""
    adapter: str | None = None
    """A trained adapter to continue from."""
    lora: Lora = Lora()
    """Read by lora and qlora."""
    quantization: Quantization = Quantization()
    """Read by qlora."""
    precision: Literal["auto", "bf16", "mixed", "fp32"] = "auto"
    """mixed: float32 trained weights, bf16 computation; bf16, fp32: both. Frozen weights follow the computation."""
    attention: Literal["auto", "flat", "padded", "eager", "sdpa"] = "auto"
    """auto, flat: flat rows where they prove equal; padded: sdpa on padded batches; eager, sdpa: padded with that."""
    gradient_checkpointing: Auto | bool = "auto"
    """auto: when memory asks for it."""
    compile: Auto | bool = "auto"
    """torch.compile for the decoder layers. auto: on CPUs, where the run is long enough to gain by it."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """Added to the tokenizer as control tokens, such as the end of turn of another model's template."""
    warm_start_tokens: Auto | bool = "auto"
    """Set never-trained rows of template tokens to the end-of-text row."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @field_validator("adapter")
    @classmethod
    def adapter_is_a_place(cls, adapter: str | None) -> str | None:
        if adapter in get_args(Tuning):
            raise ValueError(f"names a trained adapter to continue from; for a new one write model.tuning: {adapter}")
        return adapter


class Source(Section):
    """Rows from one place."""

    path: str
    """File, glob, folder or hub id."""
    format: RowFormat = "auto"
    """auto finds out, and says which."""
    split: str = "train"
    """Of a hub id, or of a folder whose file names or README tell splits."""
    subset: str | None = None
    """Of a hub id (its configuration), or of a folder, as its README or its folders name it."""
    revision: str | None = None
    """Of a hub id: branch, tag or commit."""
    columns: dict[str, RowField | None] = {}
    """{their name: ours}, e.g. {question: prompt, answer: completion}; null leaves a column out knowingly."""
    limit: Positive | None = None
    """Read that many rows."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """How often the rows come in one epoch."""


class Data(Section):
    """What is trained on, and which of its tokens."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources, mixed; a bare path is a source too."""
    eval: float | list[Source] = 0.05
    """Below 1: share of train, at most 500 rows; whole number: that many rows; list: sources; 0: none."""
    template: str = "model"
    """model (its own), chatml, chatml-tools, zephyr, tulu, or a path to a .jinja file."""
    template_args: dict[str, Any] = {}
    """Given to the template, e.g. {enable_thinking: false}; a row's own `chat_template_kwargs` go over them."""
    layers: Literal["separate", "merge_into_system"] = "separate"
    """System and developer messages at a row's start: separate: as they are; merge_into_system: joined in one."""
    train_on: Policy = "auto"
    """auto: assistant for conversations, completion for prompt/completion texts, all for text."""
    reasoning: Reasoning | None = None
    """Of answers: train it, context: keep it untrained, drop it; close: answers without may close an open block."""
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    """Of one example."""
    over_long: Literal["drop", "keep_turns", "truncate", "error"] = "drop"
    """What happens to rows of more than max_tokens. keep_turns: system prompt, tools and the last turns that fit."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error: list the bad rows and stop; skip: count them in data_report.jsonl and go on."""
    unread: Literal["report", "error"] = "report"
    """Keys of rows that nothing reads: report: named with their rows and the cure; error: such rows are bad rows."""
    max_dropped: Share = 0.05
    """Stop when a larger share of rows is dropped, for whatever reason."""
    control_tokens_in_text: ControlTokens = "text"
    """A message that spells a control token: text: ordinary characters, counted; allow; error."""

    @field_validator("template_args")
    @classmethod
    def arguments_are_the_template_s(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name in RESERVED:
                raise ValueError(f"{name} is no argument of a template. {RESERVED[name]}")
        return arguments

    @field_validator("train", "eval", mode="before")
    @classmethod
    def a_bare_path_is_a_source(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def all_trains_reasoning_too(self) -> Data:
        if self.train_on == "all" and self.reasoning in ("context", "close"):
            raise ValueError(
                f"data.reasoning is {self.reasoning}, which is about answers, but data.train_on is all, which trains "
                "every token as it is rendered. Write data.reasoning: drop or null, or data.train_on: assistant"
            )
        return self

    @field_validator("eval")
    @classmethod
    def eval_counts_whole_rows(cls, value: float | list[Source]) -> float | list[Source]:
        if isinstance(value, float) and (value < 0 or (value >= 1 and value != int(value))):
            raise ValueError("a share below 1, a whole number of rows, 0 for none, or a list of sources")
        return value


class BatchSize(Section):
    """A step is a number of conversations, whatever the hardware."""

    examples: Positive = 32
    """Conversations an optimizer step sees, over all ranks."""
    micro_tokens: Auto | Positive = "auto"
    """Tokens in one forward pass."""


class Optim(Section):
    """The optimizer and its learning rate."""

    type: OptimizerName = "adamw"
    """The 8-bit ones need bitsandbytes."""
    lr: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate; auto: 2e-4 for lora and qlora, 2e-5 for full."""
    schedule: ScheduleName = "cosine"
    """wsd: warm up, hold, decay at the end."""
    warmup: ShareOrSteps = 0.03
    """Below 1: a share of the steps; else steps."""
    decay: Share = 0.2
    """Share of the steps over which wsd decays at the end."""
    min_lr_ratio: Share = 0.0
    """Where a decaying schedule ends, as a share of lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; vectors (norms, biases) are never decayed."""
    betas: Annotated[list[ShareBelowOne], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Of AdamW."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0: no clipping."""


class EarlyStopping(Section):
    """Stop when an evaluation metric no longer improves."""

    metric: EvalMetric = "eval.loss"
    """What must improve."""
    patience: Positive = 3
    """Evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smaller gains do not count."""

    _whole_name = field_validator("metric", mode="before")(with_prefix)


class Train(Section):
    """How long to train."""

    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the data; 0.5 is half of one."""
    max_steps: Positive | None = None
    """Instead of epochs: a number of steps."""
    early_stopping: EarlyStopping | None = None
    """null: train to the end."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune noise on input embeddings (arXiv:2310.05914)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinity in the loss or a gradient does; no step is taken with it."""
    max_nonfinite_skips: Positive = 10
    """With skip: stop after so many."""


class Eval(Section):
    """Evaluations: at the start, along the way, at the end."""

    every: AutoShareOrSteps = "auto"
    """Below 1: a share of the run; else steps; 0: only at the start and the end. auto: up to ten times, in a tenth."""
    samples: Auto | Annotated[int, Field(ge=0)] = "auto"
    """Held-out prompts answered at each evaluation. auto: up to 4, as far as a tenth of the run's tokens goes."""
    max_new_tokens: Positive = 128
    """Length of those answers, at most."""


class Save(Section):
    """Checkpoints."""

    every: ShareOrSteps = 0.2
    """Below 1: a share of the run; else steps; 0: only at the end."""
    keep: Positive = 2
    """The newest so many; the best is kept besides."""
    best: EvalMetric | None = None
    """A metric such as eval.loss; its checkpoint is kept and becomes final/."""

    _whole_name = field_validator("best", mode="before")(with_prefix)


class Log(Section):
    """What is recorded, and where."""

    every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Where metrics go besides metrics.jsonl."""
    project: str = "sft"
    """For trackers."""
    name: str | None = None
    """Of the run, for trackers; null: the run folder's name."""


class Config(Section):
    """All of it. Only `model.name` and `data.train` have no default."""

    run: Run = Run()
    model: Model
    data: Data
    batch: BatchSize = BatchSize()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()

    @model_validator(mode="after")
    def best_and_early_stopping_need_an_evaluation(self) -> Config:
        if self.data.eval in (0, []) and (self.save.best or self.train.early_stopping):
            held_out = "0" if self.data.eval == 0 else "an empty list"
            raise ValueError(f"save.best and train.early_stopping read an evaluation, but data.eval is {held_out}")
        return self

    @model_validator(mode="after")
    def packed_weights_cannot_be_decomposed(self) -> Config:
        init = self.model.lora.init
        if self.model.tuning == "qlora" and self.model.adapter is None and init in ("pissa", "olora"):
            raise ValueError(
                f"model.lora.init is {init}, which decomposes the base's weights and changes them, but model.tuning is "
                "qlora, which holds them packed in 4 bits. Write model.lora.init: default (or gaussian, orthogonal), "
                "or model.tuning: lora"
            )
        return self
