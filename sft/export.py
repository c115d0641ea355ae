"""`sft export`: a plain Hugging Face folder of a run, checked by loading it again, and uploaded where asked.

`--merge` folds an adapter into the base's own 16-bit weights, also where training saw them in 4 bits: layer by layer
in float32, rounded once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.durable import as_readable_as
from sft.errors import EXIT_DONE, ModelError
from sft.hub import is_offline
from sft.hush import hush_libraries
from sft.modelcard import is_hub_id
from sft.pickles import is_pickle_name, refuse_pickled_weights
from sft.runcard import run_card

if TYPE_CHECKING:
    import torch

PROBE = "Tell me in one sentence why the sea is salty."
# Differences of logits, root mean square against their spread. The folder must give what was in memory: only kernels
# may differ. Merging into 16-bit weights rounds each of them once more, which all layers pass on.
RELOADED = {"float32": 1e-4}
RELOADED_16_BIT = 0.03
MERGED = {"float32": 1e-3}
MERGED_16_BIT = 0.2

Say = Callable[[str], None]


def export(
    run: str,
    *,
    out: Path | str,
    merge: bool = False,
    push: str | None = None,
    trust_remote_code: bool = False,
    say: Say = print,
) -> int:
    """Writes the model of `run` (a run folder, checkpoint, adapter or model) to `out`. Returns the exit code.

    `trust_remote_code`: code that the model brings may run.
    Raises ModelError where there is nothing to export, `out` is taken, the written folder does not give the run's
    logits, or the upload is refused.
    """
    hush_libraries()
    source, target = find_weights(run), Path(out)
    _refuse_taken(target)
    if push is not None:
        check_upload(push)
    adapter = (source / "adapter_config.json").is_file()
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        if adapter and merge:
            expected = write_merged(source, staging, trust_remote_code)
            say(f"{source}: the adapter is folded into {base_name(source)}")
        else:
            if merge:
                say(f"{source} is a whole model already: there is nothing to fold in")
            expected = write_copy(source, staging, trust_remote_code)
        _write_card(Path(run), source, staging, merged=adapter and merge)
        say(verify_folder(staging, expected, trust_remote_code))
        if target.exists():
            target.rmdir()  # empty, as `_refuse_taken` saw
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{target} written. Talk to it: sft chat {target}")
    if push is not None:
        say(f"uploaded: {upload(target, push)}")
    return EXIT_DONE


def find_weights(run: str) -> Path:
    """The folder with the weights of `run`. Raises ModelError where there is none, or only pickles."""
    from sft.model import trained_folder

    path = Path(run)
    if not path.is_dir():
        raise ModelError(f"{run}: there is no such folder. Name a run folder, a checkpoint, an adapter or a model.")
    source = Path(trained_folder(path))
    refuse_pickled_weights(source)
    known = ("config.json", "adapter_config.json")
    if not any((source / name).is_file() for name in known) or not any(source.glob("*.safetensors")):
        raise ModelError(
            f"{run}: no model here: neither final/ nor a complete checkpoint, nor weights of its own. "
            "Name a run that has saved (sft train publishes a checkpoint every save.every)."
        )
    return source


def base_name(adapter: Path) -> str:
    """The base model that an adapter names."""
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


@dataclass(frozen=True, slots=True)
class Expected:
    """Logits (T, V) in float32 that the exported folder must give for the ids (T,), and how they were made."""

    ids: list[int]
    logits_TV: torch.Tensor
    dtype: str
    rounding: float | None = None  # what folding the adapter in has changed


def write_copy(source: Path, target: Path, trusted: bool = False) -> Expected:
    """The files of `source` as they are, without what only training needs."""
    from sft.model import load_trained

    _copy_files(source, target, lambda name: True)
    model, tokenizer = load_trained(source, trust_remote_code=trusted)
    return _expect(model, tokenizer)


def write_merged(source: Path, target: Path, trusted: bool = False) -> Expected:
    """The base in its own dtype with the adapter of `source` folded in, as a plain model folder."""
    from transformers import AutoTokenizer

    from sft.model import load_adapter

    model = load_adapter(source, trust_remote_code=trusted)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    adapted = _expect(model, tokenizer)
    merged = merge_adapter(model)
    expected = _expect(merged, tokenizer)
    rounding, _ = difference(expected.logits_TV, adapted.logits_TV, len(tokenizer))
    if not rounding <= MERGED.get(expected.dtype, MERGED_16_BIT):  # written so that a NaN is no agreement
        raise ModelError(
            f"{source}: folded into its base, the adapter gives other logits than beside it: they differ by "
            f"{rounding:.2g} of their spread. Nothing was exported; export without --merge."
        )
    merged.config.use_cache = True
    merged.save_pretrained(target)
    as_readable_as(target / "config.json", target.glob("*.safetensors"))
    # after the model, whose own generation config this replaces
    _copy_files(source, target, lambda name: not name.startswith("adapter_"))
    return replace(expected, rounding=rounding)


def merge_adapter(model: Any) -> Any:
    """The plain model inside a PEFT one, its adapter folded into the weights. The PEFT model is used up.

    Each layer is merged in float32 and rounded once to its own dtype: adding in 16 bits would round the update before
    the sum. Rows of trained tokens are written into the embedding and the head.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    with torch.no_grad():
        for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            dtype = next(wrapper.original_module.parameters()).dtype
            wrapper.modules_to_save.to(dtype)
        _part_shared(model)
        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            weights = [p for p in layer.get_base_layer().parameters(recurse=False) if p.is_floating_point()]
            dtypes = [parameter.dtype for parameter in weights]
            for parameter in weights:
                parameter.data = parameter.data.float()
            layer.merge(safe_merge=True)
            # Merging may put new tensors into the layer, so they are looked up again.
            again = [p for p in layer.get_base_layer().parameters(recurse=False) if p.is_floating_point()]
            for parameter, dtype in zip(again, dtypes, strict=True):
                parameter.data = parameter.data.to(dtype)
        plain = model.unload()
    _untie_where_parted(plain)
    return plain


def _part_shared(model: Any) -> None:
    """Gives a layer under a LoRA its own copy of weights that another module reads, too: what is folded into a tied
    head must not reach the embedding. Rows of new tokens are changed in both, and stay shared."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    readers = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        base = layer.get_base_layer()
        for name, parameter in list(base.named_parameters(recurse=False)):
            if readers[id(parameter)] > 1:
                readers[id(parameter)] -= 1
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _untie_where_parted(model: Any) -> None:
    """A head trained apart from a tied embedding (as a LoRA target, or whole) must not be tied again on loading."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def verify_folder(folder: Path, expected: Expected, trusted: bool = False) -> str:
    """Loads `folder` with plain transformers or PEFT and compares logits; a sentence that says so, or ModelError.

    `trusted`: the code that the model brings may run.
    """
    from transformers import AutoTokenizer

    from sft.serving import load_as_stranger

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if list(probe_ids(tokenizer)) != expected.ids:
        raise ModelError(f"{folder}: the saved tokenizer gives other ids than the run's. Nothing was exported.")
    logits_TV = logits_of(load_as_stranger(folder, trust_remote_code=trusted), expected.ids)
    found, same = difference(logits_TV, expected.logits_TV, len(tokenizer))
    allowed = RELOADED.get(expected.dtype, RELOADED_16_BIT)
    library = "PEFT" if (folder / "adapter_config.json").is_file() else "transformers"
    if not found <= allowed:  # written so that a NaN is no agreement
        raise ModelError(
            f"the exported folder, loaded with plain {library}, does not give the run's logits: they differ by "
            f"{found:.2g} of their spread, {allowed:g} is allowed. Nothing was exported."
        )
    said = (
        f"verified: loaded again with plain {library}, its logits are the run's within {found:.1e} of their spread, "
        f"the same next token at {same:.0%} of {len(expected.ids)} positions ({expected.dtype})"
    )
    if expected.rounding is not None:
        said += f"; folding the adapter into {expected.dtype} weights changed them by {expected.rounding:.1e}"
    return said


def difference(ours_TV: torch.Tensor, theirs_TV: torch.Tensor, known: int) -> tuple[float, float]:
    """(root mean square difference against the spread of `theirs`, share of positions with the same best token).

    Only the first `known` tokens count: rows beyond the tokenizer mean nothing.
    """
    ours, theirs = ours_TV[:, :known], theirs_TV[:, :known]
    spread = float((theirs - theirs.mean(-1, keepdim=True)).pow(2).mean().sqrt())
    apart = float((ours - theirs).pow(2).mean().sqrt()) / max(spread, 1e-12)
    return apart, float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


def probe_ids(tokenizer: Any) -> list[int]:
    """A short prompt as the saved template renders it, or plain text where there is no template."""
    if tokenizer.chat_template:
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": PROBE}], add_generation_prompt=True, return_dict=True
            )
        except Exception:  # a template may refuse a lone question in any way of its own; plain text serves as well
            rendered = tokenizer(PROBE)
        return list(rendered["input_ids"])
    return list(tokenizer(PROBE)["input_ids"])


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """(T, V) float32 on the host."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu()
    return logits


def check_upload(repo: str) -> None:
    """Everything that can be known before hours of work: a name that can be, and a token."""
    from huggingface_hub import get_token

    if not is_hub_id(repo):
        raise ModelError(f"--push {repo!r}: a repository is named like user/model.")
    if is_offline():
        raise ModelError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or leave out --push.")
    if get_token() is None:
        raise ModelError("--push: no token of the Hugging Face hub was found. Run `hf auth login`, or set HF_TOKEN.")


def upload(folder: Path, repo: str) -> str:
    """Uploads `folder` to a model repository, which is created private where it does not exist. Returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    api = HfApi()
    try:
        address = str(api.create_repo(repo, exist_ok=True, private=True))
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Upload the exported model")
    except (HfHubHTTPError, RepositoryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"--push {repo}: the hub refused: {first}. The export itself is whole, in {folder}: "
            f"check name and token, then `hf upload {repo} {folder}`."
        ) from error
    return address


def _expect(model: Any, tokenizer: Any) -> Expected:
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    ids = probe_ids(tokenizer)
    return Expected(ids, logits_of(model, ids), dtype)


def _copy_files(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Plain files of the top level, where the target does not already have weights of its own under that name."""
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.is_symlink() or is_pickle_name(file.name) or not wanted(file.name):
            continue
        if file.name == "config.json" and (target / "config.json").exists():
            continue
        shutil.copyfile(file, target / file.name)


def _write_card(run: Path, source: Path, target: Path, *, merged: bool) -> None:
    """The run's card, rewritten for a merged model where the run's record is at hand."""
    card = run_card(run if (run / "metrics.jsonl").is_file() else source.parent, merged=merged)
    if card is not None:
        (target / "README.md").write_text(card, encoding="utf-8")
    elif merged:
        (target / "README.md").unlink(missing_ok=True)  # an adapter's card would tell its reader to load an adapter


def _refuse_taken(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"--out {target}: exists and is not empty. Name another folder, or remove that one.")
