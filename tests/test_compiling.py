"""When layers are compiled, that compiled ones are proven, and what happens where they cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import events, losses, relative, run_cli, run_here, write_config
from liger_job import SMALL
from liger_job import model as small_model

from sft import attention, compiling
from sft.data.collate import flat, to_device
from sft.isolation import compiled_difference, probe, run_once
from sft.runfolder import RunFolder
from sft.trainee import Trainee

# torch warns of itself while it compiles
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def own_kernels(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.FOLDER, str(kernels))


@pytest.mark.parametrize(
    ("device", "tokens", "threads", "expected"),
    [
        # 6 operations a token and weight of 135 million: 148,000 tokens are 1.2e14, ten minutes of two threads
        ("cpu", 148_000, 2, False), ("cpu", 149_000, 2, True), ("cpu", 149_000, 4, False), ("cuda", 10**9, 2, False),
    ],
)  # fmt: skip
def test_when_it_pays(device: str, tokens: int, threads: int, expected: bool) -> None:
    assert compiling.is_worthwhile(device, flops=6 * 135e6 * tokens, threads=threads) is expected


@pytest.mark.parametrize(("kind", "name"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")])
def test_decoder_layers_are_found_by_what_they_are(kind: str, name: str) -> None:
    assert [type(layer).__name__ for layer in compiling.decoder_layers(trainee_of(kind))] == [name] * 2


def trainee_of(kind: str) -> Trainee:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.for_model(kind, **(SMALL if kind != "gpt2" else GPT2))
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention.FLAT)
    return Trainee(made, compute_dtype=torch.float32, autocast=False).train()


GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def choose(trainee: Trainee, setting: Any, recorded: dict[str, Any] | None, tokens: int = 1000) -> bool:
    return compiling.choose(
        trainee, setting, recorded, tokens=tokens, flat_rows=True, pad_id=0, checkpointing=False, say=lambda text: None
    )


def test_what_is_plain_stays_plain() -> None:
    """A short run, a setting that says no, and a checkpoint whose run trained plain layers."""
    trainee = small_model("llama", "cpu")
    assert not choose(trainee, "auto", None)
    assert not choose(trainee, False, {compiling.KEY: True}, 10**15)
    for record in ({compiling.KEY: False}, {}):  # runs of before have no record
        assert not choose(trainee, "auto", record, 10**15)
    assert all(layer._compiled_call_impl is None for layer in compiling.decoder_layers(trainee))


class OddLayer(torch.nn.Module):
    """A layer that computes something else where it is compiled: what a wrong compiler does."""

    def __init__(self, inner: torch.nn.Module, factor: float, through: str) -> None:
        super().__init__()
        self.inner, self.factor, self.through = inner, factor, through

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden, **kwargs)
        if not torch.compiler.is_compiling():
            return out
        if self.through == "loss":
            return out * self.factor
        return out + (self.factor - 1) * (out - out.detach())  # the value stays, its gradient does not


@needs_compiler
@pytest.mark.parametrize(("through", "factor"), [("loss", 1.5), ("gradient", 1.5), ("loss", 1.0)])
def test_compiled_layers_are_held_against_plain_ones(own_kernels: None, through: str, factor: float) -> None:
    """A factor of 1 is the control: the same odd layers, and nothing wrong."""
    trainee = small_model("llama", "cpu")
    trainee.backbone.layers = torch.nn.ModuleList(OddLayer(layer, factor, through) for layer in trainee.backbone.layers)
    trainee.causal._no_split_modules = {"OddLayer"}
    said: list[str] = []
    fault = compiling.compile_layers(trainee, flat_rows=True, pad_id=0, say=said.append)
    assert said == ["compiling the decoder layers, once on this machine"]
    if factor == 1.0:
        assert fault is None
    else:
        assert fault is not None
        assert fault.startswith("the loss differs by")
    assert all(parameter.grad is None for parameter in trainee.parameters())


@needs_compiler
def test_the_proof_is_sharp_in_float32(own_kernels: None) -> None:
    trainee = small_model("llama", "cpu")
    assert compiling.compile_layers(trainee, flat_rows=True, pad_id=0, say=lambda text: None) is None
    batch = to_device(flat(probe(trainee, (7, 12))), torch.device("cpu"))
    verdict = compiled_difference(trainee, batch)
    assert verdict.loss < 1e-6
    assert 0 < verdict.gradients < 1e-4, "rounded otherwise, so they were compiled"


def test_half_a_backward_pass_leaves_no_gradients() -> None:
    """Training goes on with plain layers then, and its first step must not add to them."""
    trainee, seen = small_model("llama", "cpu"), []

    def fail(gradient: torch.Tensor) -> None:
        seen.append(trainee.causal.model.norm.weight.grad)
        raise RuntimeError("a kernel that cannot be compiled")

    trainee.causal.get_input_embeddings().register_forward_hook(lambda *args: args[2].register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        run_once(trainee, to_device(flat(probe(trainee, (7, 12))), torch.device("cpu")))
    assert seen[0] is not None, "the pass had come this far"
    assert all(parameter.grad is None for parameter in trainee.parameters())


def test_kernels_do_not_lie_where_anyone_may_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path))
    for before, after in (
        ("/tmp/torchinductor_root", str(tmp_path / "compiled")),  # torch's own choice
        ("/data/kernels", "/data/kernels"),
    ):
        monkeypatch.setenv(compiling.FOLDER, before)
        monkeypatch.setattr("tempfile.tempdir", "/tmp")
        compiling._keep_kernels()
        assert os.environ[compiling.FOLDER] == after


NO_COMPILER = {"CXX": "/nonexistent"}
WITHOUT = """
import torch
from liger_job import model
from sft import compiling

trainee = model("llama", "cpu")
made = compiling.choose(
    trainee, "auto", {compiling.KEY: True}, tokens=0, flat_rows=True, pad_id=0, checkpointing=False, say=print
)
ids = torch.arange(1, 9)[None]
print(made, bool(trainee.causal(input_ids=ids, use_cache=False).logits.isfinite().all()))
"""


def test_auto_goes_on_with_plain_layers_where_there_is_no_compiler(tmp_path: Path) -> None:
    """Also where the checkpoint's run had compiled ones."""
    env = {**os.environ, **NO_COMPILER, compiling.FOLDER: str(tmp_path / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=Path(__file__).parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, note, last = done.stdout.splitlines()
    assert first == "compiling the decoder layers, once on this machine"
    assert note.startswith(
        "note: the layers are not compiled, as they were until now: sums are rounded otherwise from here on: "
        "InvalidCxxCompiler: No working C++ compiler found"
    )
    assert last == "False True"


def test_a_user_who_insists_is_told_what_is_missing(tmp_path: Path, model: Path) -> None:
    env = {**NO_COMPILER, compiling.FOLDER: str(tmp_path / "kernels")}
    outcome = run_cli("train", str(write_config(tmp_path, model)), "model.compile=true", env=env)
    assert outcome.returncode == 2
    assert "model.compile is true, and the layers of this model cannot be compiled here: Invalid" in outcome.stderr
    assert "No working C++ compiler found" in outcome.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [[], ["model.attention=padded"], ["model.gradient_checkpointing=true"], ["model.tuning=lora"]]
)
def test_compiled_layers_train_the_same(tmp_path: Path, model: Path, own_kernels: None, settings: list[str]) -> None:
    """Also after an evaluation with generated answers, whose shapes are others. Lengths do not compile anew."""
    from torch._dynamo.utils import counters

    config = write_config(tmp_path, model, batch__micro_tokens=300)
    plain = run_here(config, *settings)
    counters.clear()
    compiled = run_here(config, f"run.dir={tmp_path}/compiled", "model.compile=true", *settings)
    assert counters["stats"]["unique_graphs"] > 0
    assert not [reason for reason in counters["graph_break"] if "limit" in str(reason)], "they were given up"
    assert relative(losses(compiled), losses(plain)) < 1e-6
    scores = [[event["loss"] for event in events(run, "eval")] for run in (compiled, plain)]
    assert relative(*scores) < 1e-6
    assert RunFolder(compiled).config.read_text().count("compile: true") == 1


@pytest.mark.parametrize("opaque", [True, False], ids=["as it is", "control: a tuple"])
def test_the_number_of_segments_compiles_nothing_anew(opaque: bool) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()  # what other tests compiled counts towards torch's limit
    counters.clear()
    trainee = trainee_of("llama")
    for layer in compiling.decoder_layers(trainee):
        layer.compile(dynamic=True, backend="eager")
    compiled = []
    for lengths in ([9, 4], [3, 4, 5], [6, 2, 2, 7], [2, 3, 4, 5, 6]):
        batch = flat(probe(trainee, lengths))
        options = attention.segments(batch.segment_lengths, torch.device("cpu"))
        if not opaque:
            options["segment_lengths"] = tuple(options["segment_lengths"].lengths)
        inputs = (batch.input_ids, batch.positions, batch.target_index_M, batch.targets_M, batch.weights_M)
        with suppress(AttributeError):  # the control's attention reads no tuple, after its graph was made
            trainee(*inputs, options)
        compiled.append(counters["stats"]["unique_graphs"])
    assert (compiled[1] == compiled[-1]) == opaque
