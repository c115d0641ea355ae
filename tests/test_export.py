"""What is exported loads with plain transformers or PEFT, gives the run's logits, and is never half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.config import Lora, Quantization
from sft.errors import ModelError
from sft.export import export, find_weights, merge_adapter, upload
from sft.model import add_adapter, fit_vocabulary, load_adapter, load_base

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def base_model(folder: Path, *, tie: bool = True, dtype: torch.dtype = torch.bfloat16, hidden: int = 32) -> Path:
    if hidden == 32:
        make_model(folder, tie=tie)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        make_tokenizer(folder)
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tie,
                eos_token_id=138, pad_token_id=0, bos_token_id=None,
            )
        ).save_pretrained(folder)  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def trained_adapter(
    base: Path,
    run: Path,
    *,
    lora: Lora | None = None,
    new_tokens: int = 0,
    grow: bool = False,
    quantization: Quantization | None = None,
) -> Any:
    """An adapter with weights as if trained, saved in run/final as a run saves it; returns the live model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model = load_base(str(base), dtype=torch.bfloat16, quantization=quantization, device=torch.device("cpu"))
    filler = 256 - len(tokenizer) if grow else 0  # use up the spare rows first
    added = [f"<|new{i}|>" for i in range(filler + new_tokens)]
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
    wanted = added[filler:]
    rows = fit_vocabulary(
        model, vocabulary=len(tokenizer), added_tokens=wanted, end_of_text_id=20, warm_start=True,
        template_tokens={token: tokenizer.convert_tokens_to_ids(token) for token in wanted},
    )  # fmt: skip
    assert (model.config.vocab_size > 256) == grow
    peft = add_adapter(model, lora or Lora(rank=4, alpha=8), seed=0, trained_token_ids=rows.trained_ids)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    final = run / "final"
    final.mkdir(parents=True)
    peft.save_pretrained(final, save_embedding_layers=False)
    (final / "README.md").unlink()
    tokenizer.save_pretrained(final)
    (final / "generation_config.json").write_text('{"eos_token_id": [138, 20], "pad_token_id": 20}')
    return peft.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits[0].float()
    return result


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).pow(2).mean().sqrt() / (theirs - theirs.mean(-1, keepdim=True)).pow(2).mean().sqrt())


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("grow", [False, True], ids=["spare rows", "grown vocabulary"])
def test_merged_export_with_new_tokens_loads_with_plain_transformers(
    tmp_path: Path, tie: bool, grow: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_model(tmp_path / "base", tie=tie)
    live = trained_adapter(base, tmp_path / "run", new_tokens=2, grow=grow)
    assert export(str(tmp_path / "run"), out=tmp_path / "out", merge=True) == 0
    assert "verified: loaded again with plain transformers" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert plain.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tie
    rows = len(tokenizer)
    new = [rows - 2, rows - 1]
    ids = torch.cat([IDS, torch.tensor([new])], dim=1)
    assert relative(logits(plain, ids)[:, :rows], logits(live, ids)[:, :rows]) < 0.05
    # the trained rows themselves, not only what they lead to
    trained = live.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(plain.get_input_embeddings().weight[new], trained.bfloat16())
    if grow:
        assert plain.get_input_embeddings().weight.shape[0] == plain.config.vocab_size == rows > 256
    assert plain.generation_config.eos_token_id == [138, 20]
    assert tokenizer.chat_template == CHATML
    assert not list((tmp_path / "out").glob("adapter*"))


def test_without_merge_the_adapter_loads_with_plain_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import AutoPeftModelForCausalLM

    base = base_model(tmp_path / "base")
    live = trained_adapter(base, tmp_path / "run", new_tokens=2, grow=True)
    (tmp_path / "run" / "final" / "left.pt").write_bytes(b"a pickle")
    export(str(tmp_path / "run"), out=tmp_path / "out")
    assert "verified: loaded again with plain PEFT" in capsys.readouterr().out
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    size = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert relative(logits(peft)[:, :size], logits(live)[:, :size]) < 0.02
    assert not (tmp_path / "out" / "left.pt").exists()


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, alpha=8, dora=True),
        Lora(rank=4, alpha=8, rslora=True),
        Lora(rank=4, alpha=8, targets=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["dora", "rslora", "own head"],
)
def test_variants_of_lora_merge(tmp_path: Path, lora: Lora) -> None:
    base = base_model(tmp_path / "base", tie=not lora.modules_to_save)
    live = trained_adapter(base, tmp_path / "run", lora=lora)
    export(str(tmp_path / "run"), out=tmp_path / "out", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.autocast("cpu", torch.bfloat16):  # as in training: a head of its own is kept in float32
        assert relative(logits(plain), logits(live)) < 0.05
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, (
        "weights are as readable as the rest"
    )


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=" ".join)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_that_is_trained_apart_is_exported_apart(tmp_path: Path, modules: list[str]) -> None:
    base = base_model(tmp_path / "base", tie=True)
    lora = Lora(rank=4, alpha=8, targets=["q_proj"], modules_to_save=modules)
    live = trained_adapter(base, tmp_path / "run", lora=lora)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(live)
    export(str(tmp_path / "run"), out=tmp_path / "out", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(plain), before) < 0.05
    embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert not torch.equal(embedding, head)
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, original) == ("embed_tokens" not in modules)
    assert torch.equal(head, original) == ("lm_head" not in modules)


TIED_TARGETS: list[Any] = [
    ["embed_tokens", "lm_head", "q_proj"],
    ["embed_tokens"],
    ["lm_head"],
    r".*(embed_tokens|lm_head)",
]


@pytest.mark.parametrize(("targets", "dora"), [*((t, False) for t in TIED_TARGETS), (TIED_TARGETS[0], True)], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_pair_that_is_changed_apart_is_merged_apart(tmp_path: Path, targets: Any, dora: bool) -> None:
    base = base_model(tmp_path / "base", tie=True, dtype=torch.float32)
    live = trained_adapter(base, tmp_path / "run", lora=Lora(rank=4, alpha=8, targets=targets, dora=dora))
    before = logits(live)  # of the base rounded to 16 bits, in which `trained_adapter` loads it
    export(str(tmp_path / "run"), out=tmp_path / "out", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits(plain), before) < 0.05
    assert relative(logits(plain), logits(load_adapter(tmp_path / "run" / "final").eval())) < 1e-5
    embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, original) == ("embed_tokens" not in targets)
    assert torch.equal(head, original) == ("lm_head" not in targets)


def test_merging_rounds_each_weight_once(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    trained_adapter(base, tmp_path / "run", lora=Lora(rank=4, alpha=8, targets=["q_proj"]))
    before = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    model = load_adapter(tmp_path / "run" / "final")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    update = 2.0 * (layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float())  # alpha / rank
    merged = merge_adapter(model).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, (before + update).to(torch.bfloat16))


def test_qlora_merges_into_the_original_weights_not_the_quantised_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    base = base_model(tmp_path / "base", hidden=64)
    trained_adapter(base, tmp_path / "run", lora=Lora(rank=4, alpha=8, targets=["q_proj"]), quantization=Quantization())
    export(str(tmp_path / "run"), out=tmp_path / "out", merge=True)
    original, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == merged.keys()
    changed = {name for name in original if not torch.equal(original[name], merged[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_full_run_is_copied_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model(tmp_path / "run" / "final")
    export(str(tmp_path / "run"), out=str(tmp_path / "out"), merge=True)
    said = capsys.readouterr().out
    assert "nothing to fold in" in said
    assert f"{tmp_path / 'out'} written" in said
    for file in base.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_run_without_final_gives_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    for step, complete in ((3, True), (9, True), (12, False)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        base_model(folder / "model")
        if complete:
            (folder / "manifest.json").write_text("{}")
    assert find_weights(str(tmp_path / "run")).parent.name == "step-00000009"


def test_control_a_folder_that_lost_a_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_model(tmp_path / "run" / "final")

    def lossy(source: Path, target: Path, wanted: Any) -> None:
        real(source, target, wanted)
        tensors = load_file(target / "model.safetensors")
        tensors["model.layers.0.mlp.down_proj.weight"] *= 10
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    import sft.export

    real = sft.export._copy_files
    monkeypatch.setattr(sft.export, "_copy_files", lossy)
    with pytest.raises(ModelError, match="does not give the run's logits"):
        export(str(tmp_path / "run"), out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # neither the folder nor a half of it


def test_control_an_adapter_that_is_lost_in_merging_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model(tmp_path / "base")
    trained_adapter(base, tmp_path / "run")
    monkeypatch.setattr("sft.export.merge_adapter", lambda model: model.unload())
    with pytest.raises(ModelError, match="gives other logits than beside it"):
        export(str(tmp_path / "run"), out=tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        export(str(tmp_path / "none"), out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no model here"):
        export(str(tmp_path / "empty"), out=tmp_path / "out")
    base_model(tmp_path / "run" / "final")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not empty"):
        export(str(tmp_path / "run"), out=tmp_path / "taken")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle"):
        export(str(pickled), out=tmp_path / "out")


def test_an_upload_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_model(tmp_path / "run" / "final")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for repo, complaint in (("not a name", "is named like user/model"), ("me/model", "no token")):
        with pytest.raises(ModelError, match=complaint):
            export(str(tmp_path / "run"), out=tmp_path / "out", push=repo)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        export(str(tmp_path / "run"), out=tmp_path / "out", push="me/model")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_leaves_the_export_whole(tmp_path: Path) -> None:
    base = base_model(tmp_path / "model")
    with pytest.raises(ModelError, match="The export itself is whole"):
        upload(base, "me/model")  # HF_HUB_OFFLINE is set for all tests
