"""When Liger's loss kernel is taken, and that it gives what the plain path gives."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import run_here, write_config
from liger_job import Figures, cases, examples, model, whole_model

from sft import liger, setup
from sft.data.collate import flat, idle, padded, to_device
from sft.errors import ResumeError
from sft.loss import LogitTransform
from sft.types import Example

WITH_LIGER = find_spec("liger_kernel") is not None


# What the host knows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"), [([0, 1, 1], True), ([7, 1, 0], True), ([0, 1, 0.5], False), ([0, 2, 2], False)]
)
def test_a_batch_knows_whether_its_targets_weigh_one(weights: list[float], expected: bool) -> None:
    """The first token is no target, and an untrained one has no weight."""
    example = Example(np.arange(3, dtype=np.int32), np.array(weights, dtype=np.float32), "t:1")
    for batch in (flat([example, idle()]), padded([example], 0)):
        assert batch.unit_weights is expected
        assert to_device(batch, torch.device("cpu")).unit_weights is expected


def test_what_liger_cannot_take() -> None:
    some, none = torch.ones(3, 4), torch.ones(0, 4)
    trained = torch.ones(5, 4, requires_grad=True)
    assert liger.serves(some.clone().requires_grad_(), trained)
    assert liger.serves(some, trained.detach()), "an evaluation under a frozen head"
    assert not liger.serves(some, trained), "it would leave the head without a gradient"
    assert not liger.serves(none.clone().requires_grad_(), trained), "it divides by the number of targets"


@pytest.mark.parametrize(
    ("targets", "dim", "vocabulary", "rows", "factor"),
    [(8192, 2048, 128256, 2500, 16), (8192, 576, 49152, 6500, 43), (100, 2048, 128256, 2500, 63)],
)
def test_chunks_are_as_large_as_ours(targets: int, dim: int, vocabulary: int, rows: int, factor: int) -> None:
    assert liger.chunk_factor(targets, dim, vocabulary, rows) == factor
    chunks = -(-vocabulary // (factor * dim))  # as Liger counts them, before it rounds their size up
    assert chunks == -(-targets // rows)


# When it is taken ----------------------------------------------------------------------------------------------------


def installed(folder: Path, version: str, code: str | None = None) -> Path:
    """A package of that name and version; `code` is its functional API."""
    (folder / f"liger_kernel-{version}.dist-info").mkdir(parents=True)
    (folder / f"liger_kernel-{version}.dist-info" / "METADATA").write_text(f"Name: liger-kernel\nVersion: {version}\n")
    (folder / "liger_kernel").mkdir()
    (folder / "liger_kernel" / "__init__.py").touch()
    if code is not None:
        (folder / "liger_kernel" / "transformers").mkdir()
        (folder / "liger_kernel" / "transformers" / "__init__.py").touch()
        (folder / "liger_kernel" / "transformers" / "functional.py").write_text(code)
    return folder


def test_where_it_is_not_available() -> None:
    assert liger.unavailable("cpu", is_sharded=False) == "liger-kernel needs CUDA, this is cpu"
    assert liger.unavailable("cuda", is_sharded=True) == "a sharded model keeps to the plain path"
    missing = None if WITH_LIGER else "liger-kernel is not installed: pip install 'sft[liger]'"
    assert liger.unavailable("cuda", is_sharded=False) == missing


@pytest.mark.parametrize(
    ("version", "code", "fault"),
    [
        ("0.8.3", None, "liger-kernel 0.8.3 is too old: pip install 'sft[liger]'"),
        ("0.8.4", "import absent", "liger-kernel cannot be imported (ModuleNotFoundError: No module named 'absent')"),
        ("0.10.0.dev1", "def liger_fused_linear_cross_entropy(): ...", None),
    ],
)
def test_what_is_wrong_with_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, code: str | None, fault: str | None
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, version, code))
    others = {name for name in sys.modules if name.split(".")[0] == "liger_kernel"}
    for name in others:
        monkeypatch.delitem(sys.modules, name)
    assert liger.unavailable("cuda", is_sharded=False) is None
    assert liger.unfit() == fault
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def test_models_whose_logits_it_does_not_know() -> None:
    trainee = model("llama", "cpu")
    assert trainee.fits_liger
    trainee.transform = LogitTransform(softcap=30.0)
    assert trainee.fits_liger
    trainee.transform = LogitTransform(scale=0.25)
    assert not trainee.fits_liger
    trainee.transform = LogitTransform()
    trainee.head_path = "model"
    assert not trainee.fits_liger
    trainee.head_path = "chunked"
    trainee.causal.lm_head = torch.nn.Linear(32, 97, bias=True)
    assert not trainee.fits_liger


def test_a_run_on_a_cpu_begins_on_the_plain_path_without_a_word() -> None:
    said: list[str] = []
    assert setup.choose_loss_kernel(model("llama", "cpu"), said.append) == "plain"
    assert said == []


def test_weighted_targets_take_the_plain_path() -> None:
    """Bit for bit, and without a look at the package."""
    assert whole_model("llama", "cpu", weight=0.5) == {"loss": 0, "gradients": 0}


@pytest.mark.skipif(WITH_LIGER, reason="it would be called")
def test_others_do_not() -> None:
    with pytest.raises(ModuleNotFoundError, match="liger_kernel"):
        whole_model("llama", "cpu")
    trainee = model("llama", "cpu")
    assert "liger_kernel" in str(setup.liger_fault(trainee, torch.device("cpu")))
    assert trainee.loss_kernel == "plain"
    assert flat(examples(1.0)).unit_weights


# Continuing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [{}, {"loss_kernel": "plain"}])
def test_what_began_on_the_plain_path_stays_there(recorded: dict[str, Any]) -> None:
    assert liger.lost(recorded, "cuda", is_sharded=False) is None


def record(run: Path, kernel: str | None) -> None:
    """As if the newest checkpoint had been written by a run on that kernel; None: before there was a choice."""
    checkpoint = max((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["resolved"].pop("loss_kernel") == "plain"
    state["resolved"] |= {"loss_kernel": kernel} if kernel else {}
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.usefixtures("own_cache")
def test_a_run_that_loses_its_kernel_needs_a_word(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model, optim__schedule="constant", optim__warmup=0)
    run = run_here(config, "train.max_steps=2")
    assert json.loads((run / "environment.json").read_text())["resolved"]["loss_kernel"] == "plain"
    record(run, None)
    run_here(config, "train.max_steps=3")
    record(run, "liger")
    here = "liger-kernel needs CUDA, this is cpu"
    with pytest.raises(ResumeError, match=rf"  loss_kernel: liger -> plain \({here}\)\n.*--allow-change loss_kernel"):
        run_here(config, "train.max_steps=4")
    run_here(config, "train.max_steps=4", allow_change=["loss_kernel"])
    run_here(config, "train.max_steps=5")
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["resolved"]["loss_kernel"] == "plain"
    assert state["consents"] == [{"step": 3, "key": "loss_kernel", "was": "liger", "now": f"plain ({here})"}]
    assert "loss by Liger" not in capsys.readouterr().err


# The kernel itself ---------------------------------------------------------------------------------------------------


def check(found: dict[str, Figures], rounding: float) -> None:
    for case in ("full", "chunks", "frozen", "softcap"):
        assert found[case]["dtype"] == "torch.float32"
        for figure in ("loss", "hidden", "weight"):
            assert found[case].get(figure, 0) < 2 * rounding, (case, figure)
    assert [found[case]["makes_head_gradient"] for case in ("full", "frozen")] == [True, False]
    assert found["mixed"]["loss"] < 1e-5
    assert max(found["mixed"]["hidden"], found["mixed"]["weight"]) < 2**-7
    assert found["mixed"]["weight_dtype"] == "torch.float32"
    assert found["mixed"]["finer_than_bf16"], "sums over chunks are kept in float32"
    for case in ("llama", "gemma2"):
        assert found[case]["loss"] < rounding
        assert found[case]["gradients"] < 10 * rounding
    assert found["weighted"] == {"loss": 0, "gradients": 0}
    differs = "its result differs from the plain path's"
    for case in ("proof", "capped_proof", "mixed_proof"):
        assert found[case] == {
            "as_it_is": "None", "loss_off": differs, "gradient_off": differs, "broken": "OSError: no C compiler",
            "left_at": "plain", "agrees": True,
        }  # fmt: skip


@pytest.mark.slow
def test_it_gives_what_the_plain_path_gives() -> None:
    """Without a GPU, by Triton's interpreter."""
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    assert not missing, (
        f"not installed: {', '.join(missing)}. In a venv of its own (0.7 GB more): "
        "pip install -e '.[dev]' && pip install --no-deps liger-kernel triton && pytest tests/test_liger.py -m slow"
    )
    folders = [str(Path(liger.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "liger_job.py")],
        env=env, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    check(json.loads(job.stdout.splitlines()[-1]), rounding=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not WITH_LIGER, reason="liger-kernel is not installed")
def test_it_does_so_on_a_gpu() -> None:
    check(cases("cuda", 3.0), rounding=1e-5)
    assert setup.choose_loss_kernel(model("llama", "cuda"), print) == "liger"
