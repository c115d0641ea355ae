"""The model as the loop sees it: a micro-batch goes in, a sum of losses comes out.

Owning this module's forward lets one path serve one process, DDP and FSDP: whatever wraps it sees tensors go in and
a scalar come out, and never a logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sft import liger
from sft.attention import segments
from sft.loss import LogitTransform, head_loss_sum, linear_loss_sum, logits_loss_sum
from sft.types import Batch

HeadPath = Literal["chunked", "model"]
Head = Callable[[torch.Tensor], torch.Tensor]
Score = Callable[[torch.Tensor, Head], torch.Tensor]


class Trainee(nn.Module):
    """A causal language model that answers with Σ w·l over the targets of a micro-batch.

    `head_path` chunked: the backbone runs, then head and loss on the M target positions alone. model: the model's own
    forward makes all logits; for models whose head does more than a matrix product (see `sft.isolation`).
    """

    def __init__(
        self, model: Any, *, compute_dtype: torch.dtype, autocast: bool, neftune_alpha: float | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.autocast = autocast
        self.head_path: HeadPath = "chunked"
        self.loss_kernel: liger.LossKernel = "plain"
        self.neftune_alpha = neftune_alpha
        self.causal: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        self.transform = logit_transform(self.causal.config.get_text_config())
        # A hook, so that models which scale their embeddings or read ids twice keep doing so.
        self.causal.get_input_embeddings().register_forward_hook(self._on_embeddings)
        for module in self.causal.modules():
            own = dict(module.named_parameters(recurse=False))
            if "bias" not in own and any(parameter.ndim == 1 for parameter in own.values()):
                module.register_forward_hook(self._on_norm)
        self._noise_lengths: tuple[int, ...] | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        target_index_M: torch.Tensor,
        targets_M: torch.Tensor,
        weights_M: torch.Tensor,
        attention: dict[str, Any],
        score: Score | None = None,
        unit_weights: bool = False,
    ) -> torch.Tensor:
        """`attention` holds the segments of a flat row or the mask of padded ones. Returns a float32 scalar.

        With `score`, returns what that makes of the features (M, D) at the targets and the head that reads them:
        inside forward, since a sharded head is whole only here. `unit_weights`: `weights_M` is known to be all one.
        """
        inputs = {"input_ids": input_ids, "position_ids": positions, "use_cache": False, **attention}
        with torch.autocast(input_ids.device.type, self.compute_dtype, enabled=self.autocast):
            if self.head_path == "model" and score is None:
                return self._own_path(inputs, target_index_M, targets_M, weights_M)
            if self.head_path == "model" and score is not None:
                logits = self.causal(**inputs).logits.flatten(0, 1).index_select(0, target_index_M)
                return score(logits, lambda logits_mV: logits_mV)
            hidden = self.backbone(**inputs).last_hidden_state
            hidden_MD = hidden.flatten(0, 1).index_select(0, target_index_M)
            if self.autocast:
                hidden_MD = hidden_MD.to(self.compute_dtype)
            if score is not None:
                head = self.causal.get_output_embeddings()
                return score(hidden_MD, lambda h: self.transform(head(h)))
            return self.head_loss(hidden_MD, targets_M, weights_M, unit_weights=unit_weights)

    def head_loss(
        self, hidden_MD: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor, *, unit_weights: bool
    ) -> torch.Tensor:
        """Σ w·l from the features at the targets, under the caller's autocast."""
        head = self.causal.get_output_embeddings()
        fused = self.loss_kernel == "liger" and unit_weights and self.fits_liger
        if _is_plain(head) and (fused or self.transform == LogitTransform()):
            weight_VD = head.weight  # read once: PEFT's wrapper makes it at each reading
            if fused and liger.serves(hidden_MD, weight_VD):
                return liger.fused_loss_sum(hidden_MD, weight_VD, targets_M, self.transform.softcap)
            if self.transform == LogitTransform():
                return linear_loss_sum(hidden_MD, weight_VD, targets_M, weights_M)
        vocabulary = self.causal.config.get_text_config().vocab_size
        return head_loss_sum(hidden_MD, lambda h: self.transform(head(h)), vocabulary, targets_M, weights_M)

    @property
    def fits_liger(self) -> bool:
        """Whether Liger's kernel knows all that head and logits do."""
        plain = self.head_path == "chunked" and _is_plain(self.causal.get_output_embeddings())
        return plain and self.transform.scale == 1.0

    def _own_path(
        self, inputs: dict[str, Any], index_M: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor
    ) -> torch.Tensor:
        output = self.causal(**inputs)
        loss = logits_loss_sum(output.logits.flatten(0, 1).index_select(0, index_M), targets_M, weights_M)
        auxiliary = getattr(output, "aux_loss", None)
        if auxiliary is not None:  # a mean, weighed like the targets of this micro-batch so that sums still add up
            coefficient = self.causal.config.get_text_config().router_aux_loss_coef
            loss = loss + coefficient * auxiliary * weights_M.sum()
        return loss

    @property
    def _no_split_modules(self) -> Any:
        """The model's decoder layers by name, for launchers that shard a unit a layer (transformers' own attribute)."""
        return self.causal._no_split_modules

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its head."""
        module: nn.Module = getattr(self.causal, self.causal.base_model_prefix)
        return module

    def _on_embeddings(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self.neftune_alpha is not None and self.training and self._noise_lengths is not None:
            output = output + neftune_noise(output, self._noise_lengths, self.neftune_alpha)
        # The stream of activations follows the computation, also where weights are kept in float32.
        return (
            output.to(self.compute_dtype) if self.autocast and torch.is_autocast_enabled(output.device.type) else output
        )

    def _on_norm(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """A norm whose weight is kept in float32 answers in float32. One cast here spares every linear layer that
        reads it one of its own, and the copies that those keep for their backward passes."""
        widened = self.autocast and isinstance(output, torch.Tensor) and output.dtype == torch.float32
        return output.to(self.compute_dtype) if widened and inputs[0].dtype == self.compute_dtype else output

    @contextmanager
    def noise_for(self, lengths: tuple[int, ...]) -> Iterator[None]:
        """NEFTune needs the lengths of the examples in a row: noise shrinks with length."""
        self._noise_lengths = lengths
        try:
            yield
        finally:
            self._noise_lengths = None


def _is_plain(head: Any) -> bool:
    """Whether the head is one product with `head.weight`: a linear layer, or PEFT's wrapper of one that trains some of
    its rows, whose `weight` is then made of both, once."""
    inner = head.original_module if hasattr(head, "token_adapter") else head
    return type(inner) is nn.Linear and inner.bias is None


def loss_sum(
    module: Callable[..., torch.Tensor], trainee: Trainee, batch: Batch, score: Score | None = None
) -> torch.Tensor:
    """Runs `batch` (on its device) through `module`, which is `trainee` or a wrapper of it (DDP, FSDP)."""
    with trainee.noise_for(batch.segment_lengths):
        loss: torch.Tensor = module(
            batch.input_ids,
            batch.positions,
            batch.target_index_M,
            batch.targets_M,
            batch.weights_M,
            attention_inputs(batch),
            score,
            batch.unit_weights,
        )
    return loss


def attention_inputs(batch: Batch) -> dict[str, Any]:
    """What the model's forward needs so that the examples of `batch` do not see each other or the padding."""
    if batch.attention_mask is not None:
        return {"attention_mask": batch.attention_mask}
    return segments(batch.segment_lengths, batch.input_ids.device)


def logit_transform(config: Any) -> LogitTransform:
    """Soft caps (Gemma 2) and scales (Cohere multiplies, Granite divides) as the configuration names them.

    Others are found by comparing with the model's own loss before training.
    """
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def neftune_noise(embedded: torch.Tensor, lengths: tuple[int, ...], alpha: float) -> torch.Tensor:
    """Uniform noise of size alpha / sqrt(T * D) for each example of T tokens (NEFTune, arXiv:2310.05914).

    `embedded` is (1, N, D) flat or (B, T, D) padded.
    """
    dim = embedded.shape[-1]
    if embedded.shape[0] == 1:
        sizes = [alpha / (n * dim) ** 0.5 for n in lengths for _ in range(n)]
        scale = torch.tensor(sizes, dtype=embedded.dtype)[None, :, None]
    else:
        scale = torch.tensor([alpha / (n * dim) ** 0.5 for n in lengths], dtype=embedded.dtype)[:, None, None]
    return torch.empty_like(embedded).uniform_(-1, 1) * scale.to(embedded.device)
