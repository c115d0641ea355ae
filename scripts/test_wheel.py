"""What `pip install` of the wheel gives: a command that trains, resumes after a kill and sweeps, in any folder.

    python scripts/test_wheel.py            (in the environment whose packages the wheel is to find)

The tests run on an editable install, where Python finds modules and files that a wheel may lack. Here the wheel goes
into an environment of its own, which borrows this one's other packages; nothing of the source folder is on its path.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "sft")
DATA = {"py.typed", "pages/report.html", "templates/chatml.jinja"}

CONFIG = """\
run: {{dir: run}}
model: {{name: {model}, precision: fp32}}
data: {{train: rows.jsonl, eval: 6, template: chatml, max_tokens: 500}}
batch: {{examples: 5}}
optim: {{schedule: constant}}
train: {{max_steps: 60}}
eval: {{every: 0, samples: 1, max_new_tokens: 4}}
save: {{every: 5}}
"""
SWEEP = """\
config: my.yaml
dir: sweep
trials: 2
sampler: random
space: {optim.lr: [0.001, 0.01], train.max_steps: [4]}
"""


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sft-wheel-") as folder:
        python = install(build(Path(folder)), Path(folder))
        try_out(Path(folder), python)
    print(f"the wheel trains, resumes and sweeps ({time.monotonic() - began:.0f} s)")


def build(folder: Path) -> Path:
    """The wheel, built in a copy: setuptools leaves a folder behind, and would take up what is in it."""
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        path, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        _ = shutil.copytree(path, source / name, ignore=ignored) if path.is_dir() else shutil.copy(path, source)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("sft-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The Python of an environment that holds the wheel. Its other packages are those of this environment."""
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv/bin/python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    # After the install, for pip must not find the editable one. A .pth within a folder that a .pth names is not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    held = {path.relative_to(site / "sft").as_posix() for path in (site / "sft").rglob("*") if path.is_file()}
    source = {path.relative_to(ROOT / "sft").as_posix() for path in (ROOT / "sft").rglob("*")
              if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert source - held == set(), f"the wheel lacks {sorted(source - held)}"
    assert held >= DATA, f"the wheel lacks {sorted(DATA - held)}"
    return python


def try_out(folder: Path, python: Path) -> None:
    work = folder / "work"
    work.mkdir()
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_model
    from jobs import write_rows

    write_rows(work / "rows.jsonl", 40)
    (work / "my.yaml").write_text(CONFIG.format(model=make_model(folder / "model")))
    (work / "sweep.yaml").write_text(SWEEP)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"SFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    sft = folder / "venv/bin/sft"
    where = call(python, "-c", "import sft; print(sft.__file__)", cwd=work, env=environ)
    assert where.startswith(str(folder / "venv")), f"not the wheel: {where}"

    metrics = work / "run/metrics.jsonl"
    training = subprocess.Popen([sft, "train", "my.yaml"], cwd=work, env=environ, stderr=subprocess.DEVNULL)
    while training.poll() is None and len(steps(metrics)) < 12:
        time.sleep(0.02)
    assert training.poll() is None, "it ended before it could be killed"
    training.send_signal(signal.SIGKILL)
    training.wait()
    call(sft, "train", "my.yaml", cwd=work, env=environ)
    assert steps(metrics) == list(range(1, 61)), steps(metrics)
    assert any(event["event"] == "resume" for event in events(metrics)), "it began again instead of going on"
    assert (work / "run/report.html").stat().st_size > 1000
    assert (work / "run/final/adapter_config.json").is_file()
    print("trained, killed and resumed", flush=True)

    call(sft, "sweep", "sweep.yaml", cwd=work, env=environ)
    with open(work / "sweep/trials.csv") as table:
        states = [row["state"] for row in csv.DictReader(table)]
    assert states == ["complete", "complete"], states
    assert (work / "sweep/best.yaml").is_file()
    assert (work / "sweep/report.html").stat().st_size > 1000


def events(metrics: Path) -> list[dict[str, object]]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(metrics: Path) -> list[object]:
    return [event["step"] for event in events(metrics) if event["event"] == "train"]


def call(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command prints; its own words where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
