"""Every knob, typed, strict, once. Reading and writing the files is `configfile`'s work.

No torch here: a wrong key must answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]

Tuning = Literal["full", "lora", "qlora"]
RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Policy = Literal["auto", "assistant", "last_assistant", "completion", "all"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
ControlTokens = Literal["text", "allow", "error"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Run(Section):
    dir: str | None = None
    """Run folder; null: runs/<name of the config file>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    deterministic: bool = False
    """Bitwise repeatable on CUDA too, at some cost in speed. On CPU runs repeat anyway."""


class Lora(Section):
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Share = 0.0
    targets: str | list[str] = "all-linear"
    """all-linear, a regular expression, or a list of module names."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    modules_to_save: list[str] = []
    """Modules trained in full beside the adapter."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"


class Quantization(Section):
    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


class Model(Section):
    name: str
    """Hub id, folder, or a .gguf file."""
    revision: str | None = None
    tuning: Tuning = "lora"
    adapter: str | None = None
    """A trained adapter to continue from."""
    lora: Lora = Lora()
    quantization: Quantization = Quantization()
    precision: Literal["auto", "bf16", "mixed", "fp32"] = "auto"
    attention: Literal["auto", "flat", "padded", "eager", "sdpa"] = "auto"
    """auto, flat: flat rows where they prove equal; padded: sdpa on padded batches; eager, sdpa: padded with that."""
    gradient_checkpointing: Auto | bool = "auto"
    compile: bool = False
    """torch.compile."""
    warm_start_tokens: Auto | bool = "auto"
    """Set never-trained rows of template tokens to the end-of-text row."""
    trust_remote_code: bool = False


class Source(Section):
    path: str
    format: RowFormat = "auto"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    columns: dict[str, str] = {}
    """{their name: ours}, e.g. {question: prompt, answer: completion}."""
    limit: Positive | None = None
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """How often the rows come in one epoch."""


class Data(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    eval: float | list[Source] = 0.05
    """Below 1: share of train, at most 500 rows; whole number: that many rows; list: sources; 0: none."""
    template: str = "model"
    template_args: dict[str, Any] = {}
    train_on: Policy = "auto"
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    over_long: Literal["drop", "truncate", "error"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"
    max_dropped: Share = 0.05
    control_tokens_in_text: ControlTokens = "text"

    @field_validator("train", "eval", mode="before")
    @classmethod
    def a_bare_path_is_a_source(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("eval")
    @classmethod
    def eval_counts_whole_rows(cls, value: float | list[Source]) -> float | list[Source]:
        if isinstance(value, float) and (value < 0 or (value >= 1 and value != int(value))):
            raise ValueError("a share below 1, a whole number of rows, 0 for none, or a list of sources")
        return value


class BatchSize(Section):
    examples: Positive = 32
    """Conversations an optimizer step sees, over all ranks."""
    micro_tokens: Auto | Positive = "auto"
    """Tokens in one forward pass."""


class Optim(Section):
    type: OptimizerName = "adamw"
    lr: Auto | Annotated[float, Field(gt=0)] = "auto"
    schedule: ScheduleName = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1: a share of the steps; else steps."""
    decay: Share = 0.2
    """Share of the steps over which wsd decays at the end."""
    min_lr_ratio: Share = 0.0
    """Where a decaying schedule ends, as a share of lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0: no clipping."""


class EarlyStopping(Section):
    metric: str = "eval.loss"
    patience: Positive = 3
    """Evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class Train(Section):
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Positive | None = None
    early_stopping: EarlyStopping | None = None
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune noise on input embeddings (arXiv:2310.05914)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite_skips: Positive = 10


class Eval(Section):
    every: Annotated[float, Field(ge=0)] = 0.1
    """Below 1: a share of the run; else steps; 0: only at the start and the end."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts answered at each evaluation."""
    max_new_tokens: Positive = 128


class Save(Section):
    every: Annotated[float, Field(ge=0)] = 0.2
    """Below 1: a share of the run; else steps; 0: only at the end."""
    keep: Positive = 2
    best: str | None = None
    """A metric such as eval.loss; its checkpoint is kept and becomes final/."""


class Log(Section):
    every: Positive = 1
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    project: str = "sft"
    name: str | None = None


class Config(Section):
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
        if self.data.eval == 0 and (self.save.best or self.train.early_stopping):
            raise ValueError("save.best and train.early_stopping read an evaluation, but data.eval is 0")
        return self
