"""What a machine or a launch lacks is said before any work; a failure's kind is on record; a launcher's leftovers in
the environment are no launch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import events, losses, run_cli, run_here, write_config, write_rows
from test_nan_evaluation import config as nan_config  # noqa: F401

from sft.checkpoint import MANIFEST
from sft.configfile import load_config
from sft.errors import ConfigError, DataError, DiskError, NumericsError, ResumeError, SftError, error_named
from sft.report import read_config_lines, write_report
from sft.resume import RunState

pytestmark = pytest.mark.usefixtures("own_cache")

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("override", "env", "said"),
    [
        ("log.trackers=[trackio]", {}, "error: log.trackers: trackio is not installed. Install it (pip "),
        ("log.name=x", {**FSDP, "FSDP_VERSION": "1"}, "error: accelerate's config asks for FSDP's first version."),
        ("optim.type=adamw_8bit", FSDP, "error: optim.type: adamw_8bit cannot be sharded by FSDP."),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_the_data_is_prepared(
    tmp_path: Path, model: Path, override: str, env: dict[str, str], said: str
) -> None:
    result = run_cli("train", str(write_config(tmp_path, model)), override, env=env)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "cache").exists(), "nothing was rendered"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 2)
    assert status["error"] == ("LaunchError" if "first version" in said else "ConfigError")


@pytest.mark.parametrize("override", ["model.tuning=qlora", "optim.type=adamw_8bit", "optim.type=paged_adamw_8bit"])
def test_a_missing_package_is_one_message(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    import sft.needed

    monkeypatch.setattr(sft.needed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed.*pip install 'sft\[qlora\]'"):
        run_here(write_config(tmp_path, model), override)
    with pytest.raises(
        ConfigError, match=r"2 things are missing\n  - .*bitsandbytes.*\n  - log\.trackers: tensorboard"
    ):
        run_here(write_config(tmp_path, model), override, "log.trackers=[tensorboard]")
    assert not (tmp_path / "cache").exists()


def test_variables_that_a_launcher_left_behind_start_nothing(tmp_path: Path, model: Path) -> None:
    """As in a shell that was opened under `accelerate launch`, or after `env $(cat saved)`."""
    left = {"ACCELERATE_MIXED_PRECISION": "bf16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    result = run_cli("train", str(write_config(tmp_path, model, train__max_steps=2)), env=left)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 1


def test_a_loss_that_is_no_number_is_not_a_device_s_fault(tmp_path: Path, nan_config: Path) -> None:  # noqa: F811
    result = run_cli("train", str(nan_config), f"data.train={tmp_path}/held.jsonl", "data.eval=0", "train.max_steps=2")
    assert result.returncode == 2, result.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["code"], status["error"]) == (2, "NumericsError")
    assert status["reason"].startswith("step 1: the loss is not finite")


def test_an_error_of_another_rank_keeps_its_kind() -> None:
    assert isinstance(error_named("DiskError", "full"), DiskError)
    assert isinstance(error_named("NumericsError", "nan"), NumericsError)
    assert type(error_named("KeyError", "x")) is SftError


# -- checkpoints of other versions


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """state.json of every checkpoint as another version wrote it, its manifest with it."""
    for folder in (run / "checkpoints").glob("step-*"):
        file, manifest = folder / "state.json", json.loads((folder / MANIFEST).read_text())
        state = json.loads(file.read_text())
        file.write_text(json.dumps(change(state) or state))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest["files"]["state.json"] = {"size": file.stat().st_size, "sha256": digest}
        (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_of_a_newer_version_is_refused_in_a_sentence(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, train__max_steps=4, optim__schedule="constant")
    rewrite(run_here(config), lambda state: state.update(curriculum={"stage": 2}))
    result = run_cli("train", str(config), "train.max_steps=6")
    assert result.returncode == 2
    assert "state.json: written by a newer version of sft: it holds curriculum, which version " in result.stderr
    assert "--fresh" in result.stderr
    assert "Traceback" not in result.stderr
    assert "written by a newer version of sft" in run_cli("check", str(config), "train.max_steps=6").stdout


def test_a_checkpoint_from_before_a_field_and_a_key_were_there_goes_on(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, model, train__max_steps=4, optim__schedule="constant")

    def older(state: dict[str, Any]) -> None:
        for field in ("consents", "length", "warmup_steps", "nonfinite_skips"):
            del state[field]
        del state["fingerprint"]["model.lora.dora"]  # a key that came later: its default is what was done before

    rewrite(run_here(config), older)
    run = run_here(config, "train.max_steps=6")
    assert [event["step"] for event in events(run)] == [1, 2, 3, 4, 5, 6]
    rewrite(run, lambda state: state["fingerprint"].pop("model.lora.dora", None) and None)
    with pytest.raises(ResumeError, match=r"model\.lora\.dora: not set -> True"):
        run_here(config, "train.max_steps=8", "model.lora.dora=true")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("step") and None, "no state of a run: it names no step"),
        (lambda state: [1], "no state of a run"),
        (lambda state: state.update(fingerprint="x"), "fingerprint is 'x', which no version writes"),
        (lambda state: state.update(fingerprint={}), "did not record what a run is made of"),
    ],
)
def test_a_state_that_is_none_is_a_sentence_too(
    tmp_path: Path, model: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    config = write_config(tmp_path, model, train__max_steps=2, optim__schedule="constant", eval__samples=0)
    rewrite(run_here(config), change)
    with pytest.raises(ResumeError, match=said):
        run_here(config, "train.max_steps=4")


def test_a_state_reads_back_as_it_was() -> None:
    state = RunState(3, tokens=5, seconds=1.5, warmup_steps=2, fingerprint={"optim.lr": 1e-4}, consents=[{"step": 1}])
    assert RunState.from_dict(json.loads(json.dumps(state.as_dict()))) == state
    assert RunState.from_dict({"step": 3, "seconds": 2}).seconds == 2


# -- files that are read again hold the truth


def test_a_run_s_config_names_the_file_that_was_trained_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    rows = write_rows(tmp_path / "sk-wikipedia-conversations-of-postgres.jsonl")
    write_rows(tmp_path / "other.jsonl", seed=1)
    run = run_here(write_config(tmp_path, model, train__max_steps=2), f"data.train={rows}")
    assert load_config(run / "config.yaml").config.data.train[0].path == str(rows)
    again = run_here(run / "config.yaml", f"run.dir={tmp_path}/again")
    assert losses(again) == losses(run), "its config trains the same"
    assert "postgres" not in (run / "final/README.md").read_text(), "what is shown is masked, at that price"
    rows.unlink()
    with pytest.raises(DataError, match=r"sk-\*|sk-wikipedia"):
        run_here(run / "config.yaml", f"run.dir={tmp_path}/third")


def test_a_report_page_is_masked(tmp_path: Path) -> None:
    token = "hf_AbCdEfGhIjKlMnOpQrSt"
    (tmp_path / "config.yaml").write_text(f"log:\n  name: {token}  # my.yaml:3; resolved to {token}\n")
    (tmp_path / "status.json").write_text('{"state": "done"}')
    page = write_report(tmp_path).read_text()
    assert token not in page
    assert "***" in page
    assert [line.value for line in read_config_lines(tmp_path / "config.yaml")] == [token]
