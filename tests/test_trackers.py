"""Trackers continue their own run after a stop and a kill, get the config once, and never stop the training."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from jobs import events, run_cli, run_here, write_config

from sft.trackers import flat_config


@pytest.fixture(autouse=True)
def here(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, make_model(tmp_path / "model"))


def test_tensorboard_shows_one_run_with_each_step_once(tmp_path: Path, config: Path) -> None:
    """The run is cut at step 2 and goes on twice: from the end, and from the start of the same folder."""
    options = ("log.trackers=[tensorboard]", "optim.schedule=constant")
    run_here(config, *options, "train.max_steps=2")
    run = run_here(config, *options)
    seen = tensorboard(run)
    assert seen["train"] == {e["step"]: pytest.approx(e["loss"], rel=1e-6) for e in events(run)}
    assert seen["eval"] == [0, 2, 3, 6]  # the first two steps ended with an evaluation of their own
    assert f"run.dir: {run}" in seen["config"]
    assert "resolved.processes: 1" in seen["config"]

    run_here(config, *options, "train.max_steps=1", fresh=True)
    assert sorted(tensorboard(run)["train"]) == [1], "--fresh begins a new run"


def tensorboard(run: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "trackers/tensorboard"))
    accumulator.Reload()
    train = accumulator.Scalars("train/loss")
    assert len({event.step for event in train}) == len(train)
    return {
        "train": {event.step: event.value for event in train},
        "eval": [event.step for event in accumulator.Scalars("eval/loss")],
        "config": accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode(),
    }


def test_trackers_that_cannot_start_are_named_and_training_goes_on(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")  # of a run that was killed early
    (run / "trackers").write_text("in the way")
    run_here(config, "log.trackers=[tensorboard]", "train.max_steps=2")
    said = capsys.readouterr().err
    assert "warning: log.trackers: tensorboard failed and is left out of this run, which goes on: FileExists" in said
    assert len(events(run)) == 2


def test_the_config_that_trackers_get_is_flat_and_holds_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", "correct-horse-battery")
    config = {
        "optim": {"lr": 1e-4, "betas": [0.9, 0.999]},
        "data": {"train": [{"path": "https://me:correct-horse-battery@host/a.jsonl"}], "template_args": {}},
        "run": {"deterministic": False},
    }
    assert flat_config(config) == {
        "optim.lr": 1e-4,
        "optim.betas": "[0.9, 0.999]",
        "data.train": '[{"path": "https://me:***@host/a.jsonl"}]',
        "data.template_args": "{}",
        "run.deterministic": False,
    }


# The others are large, and pull down versions of our packages: CONTRIBUTING.md says how to run these. ----------------

SERVICES = ["wandb", "mlflow", "trackio"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_keeps_one_run_over_a_stop_and_a_kill(tmp_path: Path, config: Path, service: str) -> None:
    if importlib.util.find_spec(service) is None:
        pytest.skip(f"{service} is not installed: see CONTRIBUTING.md")
    env = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HUB_TOKEN": "correct-horse-battery",
    }
    command = (
        "train", str(config), f"log.trackers=[{service}]", "log.project=pirates", "log.name=first",
        "train.max_steps=60", "eval.every=20", "save.every=5",
    )  # fmt: skip
    args = "template_args: {note: a correct-horse-battery}"
    config.write_text(config.read_text().replace("eval: 4", f"eval: 4\n  {args}"))
    run = tmp_path / "run"
    cut(command, run, 8, signal.SIGTERM, env)
    cut(command, run, 32, signal.SIGKILL, env)
    done = run_cli(*command, env=env)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    seen = {"wandb": look_at_wandb, "mlflow": look_at_mlflow, "trackio": look_at_trackio}[service](tmp_path, env)
    assert seen["runs"] == [["pirates", "first"]]
    stopped, killed = (event["step"] for event in events(run, "resume"))
    lost = set(range(1, 61)) - set(seen["train"])
    if service == "wandb":  # its own process writes in blocks and dies with ours, so a kill loses the last of them
        assert all(stopped < step <= killed for step in lost), (stopped, killed, lost)
    else:
        assert not lost
    assert {0, 40, 60} <= set(seen["eval"]) <= {0, 20, 40, 60}
    assert seen["config"]["optim.schedule"] == "linear"
    written = [path for path in run.joinpath("trackers").rglob("*") if path.is_file()]
    assert [path for path in written if b"correct-horse" in path.read_bytes()] == []
    assert "correct-horse" not in json.dumps(seen)

    again = run_cli(*command, "--fresh", "train.max_steps=3", env=env)
    assert again.returncode == 0, again.stderr
    seen = {"wandb": look_at_wandb, "mlflow": look_at_mlflow, "trackio": look_at_trackio}[service](tmp_path, env)
    # of W&B only what the run folder holds is looked at, and --fresh has moved that aside
    assert seen["runs"] == [["pirates", "first"]] * (1 if service == "wandb" else 2), "--fresh begins a new run"
    assert service != "wandb" or seen["train"] == [1, 2, 3]


def cut(command: tuple[str, ...], run: Path, step: int, how: signal.Signals, env: dict[str, str]) -> None:
    """Runs until metrics.jsonl tells of `step`, then ends the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sft", *command], env={**os.environ, **env}, stderr=subprocess.PIPE
    )
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.1)
    process.send_signal(how)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9}[how], said
    assert "is left out" not in said


def look(program: str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """What a program that knows the service prints as its last line, as JSON; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def look_at_wandb(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Reads the files that `wandb sync` would send: records framed as LevelDB frames its log."""
    return look(
        """
import json, pathlib, struct
from wandb.proto import wandb_internal_pb2 as messages

def records(data):
    at, part = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield part
            part = b""

runs, rows, config = {}, [], {}
for file in sorted(pathlib.Path("run/trackers").glob("wandb/offline-run-*/*.wandb")):
    for data in records(file.read_bytes()):
        record = messages.Record.FromString(data)
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.run.run_id:
            runs[record.run.run_id] = [record.run.project, record.run.display_name]
        if record.history.item:
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
steps = lambda key: [row["step"] for row in rows if key in row]
print(json.dumps({"runs": list(runs.values()), "train": steps("train/loss"), "eval": steps("eval/loss"),
                  "config": config}))
""",
        folder, env,
    )  # fmt: skip


def look_at_mlflow(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    return look(
        """
import json, mlflow
client = mlflow.MlflowClient()
experiments = [e for e in client.search_experiments() if e.name == "pirates"]
runs = client.search_runs([e.experiment_id for e in experiments], order_by=["attributes.start_time ASC"])
steps = lambda key: [m.step for m in client.get_metric_history(runs[0].info.run_id, key)]
print(json.dumps({"runs": [["pirates", r.info.run_name] for r in runs], "train": steps("train/loss"),
                  "eval": steps("eval/loss"), "config": runs[0].data.params}))
""",
        folder, env,
    )  # fmt: skip


def look_at_trackio(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    return look(
        """
import json, sqlite3
database = sqlite3.connect("trackio/pirates.db")
rows = database.execute("select run_id, run_name, step, cast(metrics as text) from metrics order by id").fetchall()
steps = lambda key: [row[2] for row in rows if key in row[3]]
config = json.loads(database.execute("select config from configs").fetchone()[0])
print(json.dumps({"runs": [["pirates", name] for _, name in sorted({(r[0], r[1]) for r in rows})],
                  "train": steps("train/loss"), "eval": steps("eval/loss"), "config": config}))
""",
        folder, env,
    )  # fmt: skip
