"""Hostile input is refused and its canary stays untouched; credentials reach no file and no stream."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from harness import Job, fault, shared
from safetensors.torch import load_file

STEP = "sft.train:train_step"


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_the_canary_sings(canary: Path) -> None:
    """The control of this file."""
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{canary}]", "!!python/name:os.system ''", "!include /etc/passwd"]
)
def test_tags_in_yaml_are_refused(tmp_path: Path, canary: Path, tag: str) -> None:
    job = Job(tmp_path)
    job.config.write_text(f"model: {{name: x}}\ndata: {{train: [a.jsonl]}}\nrun:\n  dir: {tag.format(canary=canary)}\n")
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    assert "job.yaml:4" in outcome.output
    assert not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_that_is_a_pickle_is_refused(tmp_path: Path, canary: Path, name: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]})
    )
    (adapter / name).write_bytes(pickle.dumps(Canary(canary)))
    outcome = Job(tmp_path, "model.tuning=lora", f"model.adapter={adapter}").run()
    assert outcome.codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert not canary.exists()


def test_a_model_that_is_a_pickle_is_refused(tmp_path: Path, canary: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shared() / "model", model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Canary(canary)}, model / "pytorch_model.bin")
    outcome = Job(tmp_path, f"model.name={model}").run()
    assert outcome.codes == [2], outcome.output
    assert "Traceback" not in outcome.output
    assert not canary.exists()


def test_pickles_beside_a_checkpoint_are_refused(tmp_path: Path, canary: Path) -> None:
    """Slipped into the newest checkpoint: the run resumes from the one before and opens neither."""
    job = Job(tmp_path)
    assert job.run(faults=[fault(STEP, 5, "SIGTERM")]).codes == [75]
    (job.checkpoints[0] / "optimizer.pt").write_bytes(pickle.dumps(Canary(canary)))
    outcome = job.train()
    assert "not in the checkpoint's manifest" in outcome.output
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../../outside.json", "/etc/hostname"])
def test_a_manifest_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    job = Job(tmp_path)
    assert job.run(faults=[fault(STEP, 5, "SIGTERM")]).codes == [75]
    for checkpoint in job.checkpoints:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    assert "expected names inside the checkpoint" in outcome.output


TEMPLATES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "a long loop": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "an enormous range": "{% for a in range(10**12) %}{% endfor %}x",
    "an enormous power": "{{ 9 ** 9 ** 9 }}",
    "an enormous string": "{{ 'x' * 10 ** 11 }}",
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "globals" else pytest.mark.slow) for k in TEMPLATES])
def test_a_hostile_template_is_refused_in_bounded_time(tmp_path: Path, canary: Path, kind: str) -> None:
    template = tmp_path / "evil.jinja"
    template.write_text(TEMPLATES[kind].replace("CANARY", str(canary)))
    outcome = Job(tmp_path, f"data.template={template}").run(timeout=100)
    assert outcome.codes == [2], outcome.output[-2000:]
    assert outcome.seconds < 60
    assert len(outcome.output) < 20_000
    assert not canary.exists()


def test_code_of_a_model_runs_only_by_the_user_s_word(tmp_path: Path, canary: Path) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "unheard_of"
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    outcome = Job(tmp_path, f"model.name={model}").run()
    assert outcome.codes == [2], outcome.output
    assert "trust_remote_code" in outcome.output
    assert not canary.exists()


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_DATABASE_PASSWORD": "correct-horse-battery",
}


def test_credentials_reach_no_file_and_no_stream(tmp_path: Path) -> None:
    """An error quotes them, a tracker is named, a crash report is printed; the whole folder is searched."""
    job = Job(tmp_path)
    said = " ".join(SECRETS.values()) + " postgresql://me:s3cret-pass@host/db"
    outcome = job.run("--debug", env=SECRETS, faults=[fault(STEP, 3, f"raise {said}")])
    assert outcome.codes == [1], outcome.output
    assert "Traceback" in outcome.output
    assert "***" in outcome.output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for secret in (*SECRETS.values(), "s3cret-pass"):
        assert secret not in outcome.output
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


def test_a_tracker_that_fails_never_stops_training(tmp_path: Path) -> None:
    job = Job(tmp_path, "log.trackers=[tensorboard]")
    outcome = job.train(faults=[fault("torch.utils.tensorboard:SummaryWriter.add_scalar", 0, "raise")])
    assert "tracker" in outcome.output
    assert job.status["state"] == "done"


def test_a_checkpoint_holds_no_pickle_and_an_adapter_no_base(tmp_path: Path) -> None:
    job = Job(tmp_path, "model.tuning=lora", "model.lora.rank=4", "train.max_steps=2")
    job.train()
    names = {path.name for path in job.checkpoints[0].rglob("*") if path.is_file()}
    allowed = {".json", ".safetensors", ".jinja", ".txt", ".model"}
    assert {Path(name).suffix for name in names} <= allowed
    weights = load_file(str(job.checkpoints[0] / "model" / "adapter_model.safetensors"))
    assert all("lora_" in name or "token_adapter" in name or "trainable_tokens" in name for name in weights)


def test_a_tokenizer_alone_needs_no_model(tmp_path: Path) -> None:
    """Of a folder with nothing to load, the error names the folder, not a stack of ours."""
    outcome = Job(tmp_path, f"model.name={make_tokenizer(tmp_path / 'tokenizer')}").run()
    assert outcome.codes == [2], outcome.output
    assert str(tmp_path / "tokenizer") in outcome.output
