"""What a run needs in memory, by arithmetic from the model's config.json: no weights, no torch.

Weights, gradients and optimizer states are exact for the decoder families of the day. Activations count the tensors
that autograd keeps in a decoder layer of the Llama kind (norms in float32 as transformers computes them, attention
without its map, a gated MLP), as Korthikanti et al. (arXiv:2205.05198) count those of GPT; allocators add some per
cent. All sizes are bytes of one process without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sft.config import OptimizerName, Tuning

PLAIN_MLP = ("gpt2", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "phi", "falcon", "starcoder2", "mpt", "codegen")
LOGIT_CHUNK = 96 * 2**20  # of float32 logits at a time on a CPU, as in sft.loss; on a GPU steps are measured
# What `batch.micro_tokens: auto` takes on a CPU: products are as fast as they get from about 1,000 tokens on, and
# activations grow with each. But a full finetune casts and adds all gradients for each micro-batch. QLoRA unpacks
# its weights there: 4,096 would be a tenth faster, and take up to twice the memory.
CPU_MICRO_TOKENS: dict[Tuning, int] = {"full": 2048, "lora": 1536, "qlora": 1536}
QUANT_BLOCK, DOUBLE_QUANT_BLOCK = 64, 256  # weights that share a scale, scales that share a second one (bitsandbytes)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that decide its memory."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    gated: bool = True
    experts: int = 1
    active_experts: int = 1

    @property
    def linears(self) -> tuple[tuple[int, int, int], ...]:
        """(inputs, outputs, copies) of each linear layer of one decoder layer."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = (self.hidden, self.intermediate, self.experts * (2 if self.gated else 1))
        return (
            (self.hidden, attention, 1),
            (self.hidden, kv, 2),
            (attention, self.hidden, 1),
            mlp,
            (self.intermediate, self.hidden, self.experts),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers: what LoRA adapts and QLoRA packs."""
        return self.layers * sum(inputs * outputs * copies for inputs, outputs, copies in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """The embedding, and the head where it has weights of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        router = self.layers * self.hidden * self.experts if self.experts > 1 else 0
        return self.linear_parameters + self.embedding_parameters + (2 * self.layers + 1) * self.hidden + router

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter on all linear layers. Experts that are one stacked parameter take none."""
        copies = [1 if n < self.experts or self.experts == 1 else 0 for *_, n in self.linears]
        return (
            self.layers
            * rank
            * sum(
                (inputs + outputs) * number * keep
                for (inputs, outputs, number), keep in zip(self.linears, copies, strict=True)
            )
        )


def model_shape(settings: Mapping[str, Any]) -> ModelShape | None:
    """The sizes in a config.json; None where it does not speak of a decoder whose sizes we know."""
    text: Mapping[str, Any] = settings.get("text_config") or settings

    def first(*names: str) -> Any:
        return next((text[name] for name in names if text.get(name) is not None), None)

    hidden, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "n_layers")
    heads, vocabulary = first("num_attention_heads", "n_head", "n_heads"), first("vocab_size")
    if not all(isinstance(value, int) and value > 0 for value in (hidden, layers, heads, vocabulary)):
        return None
    experts = first("num_local_experts", "num_experts", "n_routed_experts") or 1
    wide = first("moe_intermediate_size") if experts > 1 else None
    intermediate = wide or first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    model_type = str(text.get("model_type", ""))
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=first("num_key_value_heads", "num_kv_heads") or (1 if text.get("multi_query") else heads),
        head_dim=first("head_dim") or hidden // heads,
        intermediate=max(intermediate) if isinstance(intermediate, list) else intermediate,
        vocabulary=vocabulary,
        tied=bool(settings.get("tie_word_embeddings", text.get("tie_word_embeddings", _tied_by_default(model_type)))),
        gated=model_type not in PLAIN_MLP,
        experts=experts,
        active_experts=first("num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1,
    )


def _tied_by_default(model_type: str) -> bool:
    """Configs leave out what is their family's default."""
    return model_type in ("gpt2", "bloom", "gemma", "gemma2", "gemma3", "gemma3_text", "opt", "falcon", "cohere", "mpt")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `weights` include the copies that a mixed precision computes with."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """What is there whatever the length of a micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate(
    shape: ModelShape,
    *,
    tuning: Tuning,
    precision: str,
    optimizer: OptimizerName,
    rank: int,
    micro_tokens: int,
    checkpointing: bool,
    double_quant: bool = True,
    parameters: int | None = None,
) -> Memory:
    """Bytes that training needs with micro-batches of `micro_tokens` tokens.

    `precision` is bf16, mixed or fp32. `parameters`: how many the weights' files hold, where that is known better
    than the config tells.
    """
    compute = 4 if precision == "fp32" else 2
    trained_bytes = 2 if precision == "bf16" else 4
    every = parameters or shape.parameters
    linear = min(shape.linear_parameters, every)
    if tuning == "full":
        trained = every
        copies = 2 * linear if precision == "mixed" else 0
        weights = trained * trained_bytes + copies
    else:
        trained = shape.lora_parameters(rank)
        frozen = every * compute
        if tuning == "qlora":
            scales = 1 + 4 / DOUBLE_QUANT_BLOCK if double_quant else 4
            packed = linear * (0.5 + scales / QUANT_BLOCK)
            largest = max(inputs * outputs for inputs, outputs, _ in shape.linears)
            frozen = round(packed) + (every - linear) * compute + largest * compute
        weights = frozen + trained * trained_bytes
    states = 2 * trained_bytes if optimizer == "adamw" else 2
    return Memory(
        weights=weights,
        gradients=trained * trained_bytes,
        optimizer=trained * states,
        activations=activation_bytes(shape, micro_tokens, compute=compute, checkpointing=checkpointing),
        logits=logit_bytes(shape, micro_tokens, compute=compute),
    )


def activation_bytes(shape: ModelShape, tokens: int, *, compute: int, checkpointing: bool) -> int:
    """What autograd keeps of one forward pass over `tokens` tokens."""
    layer = layer_bytes_per_token(shape, compute)
    outside = shape.hidden * (2 * 4 + 2 * compute)  # embedded tokens and the last norm
    if checkpointing:  # the input of each layer, and one layer run again
        return tokens * (shape.layers * shape.hidden * compute + layer + outside)
    return tokens * (shape.layers * layer + outside)


def layer_bytes_per_token(shape: ModelShape, compute: int) -> int:
    """Two norms (input and product in float32, output), queries, keys, values, attention's output, the MLP."""
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.hidden * ((8 if compute == 2 else 2 * compute) + compute)
    mlp = shape.active_experts * shape.intermediate * (4 if shape.gated else 2) * compute
    return norms + (2 * attention + 2 * kv) * compute + mlp


def logit_bytes(shape: ModelShape, tokens: int, *, compute: int) -> int:
    """A chunk of float32 logits with its gradient, and the gradient of the features."""
    chunk = min(max(LOGIT_CHUNK, 16 * 4 * shape.vocabulary), 4 * shape.vocabulary * tokens)
    return chunk + chunk * compute // 4 + tokens * shape.hidden * compute
