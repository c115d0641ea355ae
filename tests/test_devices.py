"""One choice of the device for all commands, and no float64 where the device has none."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.devices import add_to, device_name, has_float64, sums_64, training_device, zeros_64

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "sft"
CPU = torch.device("cpu")
# distributed: where `sums_device` says; optim: plain numbers for a file, on the host; weightfiles: names alone
MAY_NAME_FLOAT64 = {"devices", "distributed", "optim", "weightfiles"}
MAY_ASK_FOR_GPUS = {"devices"}


def float64_in(source: str) -> list[int]:
    """Lines that name torch's float64 or widen to it."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (node.attr in ("double", "float64") and not (isinstance(node.value, ast.Name) and node.value.id == "np"))
    ]


def choices_in(source: str) -> list[str]:
    """Calls that ask whether there is a GPU, by the function in which they stand."""
    return [
        function.name
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and node.attr == "is_available"
        and ast.unparse(node.value) in ("torch.cuda", "torch.accelerator", "torch.backends.mps", "torch.xpu")
    ]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_one_file_decides_on_devices_and_float64(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    if file.stem not in MAY_NAME_FLOAT64:
        assert float64_in(source) == [], "Apple's GPUs refuse it: use sft.devices"
    if file.stem not in MAY_ASK_FOR_GPUS:
        # a hint for those who leave GPUs idle
        assert set(choices_in(source)) <= {"unused_gpus_hint"}, "use training_device, so that all commands agree"


def test_control_the_rules_see_what_they_forbid() -> None:
    source = "def f():\n x = torch.zeros(1, dtype=torch.float64)\n x.double()\n y = np.float64\n"
    assert sorted(float64_in(source)) == [2, 3]
    assert choices_in("def f():\n return torch.cuda.is_available() or torch.accelerator.is_available()") == ["f", "f"]


def test_a_device_without_float64_adds_up_on_the_host() -> None:
    ran = subprocess.run(
        [sys.executable, str(TESTS / "toy_device.py")], capture_output=True, text=True, timeout=120, check=False,
        cwd=TESTS.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    cpu, toy = told["cpu"], told["toy"]
    assert "doesn't support float64" in told["refused"], "control: the stand-in refuses it"
    assert (cpu["has_float64"], toy["has_float64"]) == (True, False)
    assert toy["kept_on"] == cpu["kept_on"] == ["cpu"] * 3
    assert toy["dtypes"] == cpu["dtypes"] == ["torch.float64"] * 3
    assert toy["loss"] == cpu["loss"]
    for ours, theirs in ((toy["scores"], cpu["scores"]), (toy["added_up"], toy["scores"])):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert cpu["scores"]["tokens"] > 200


def test_sums_on_the_cpu_are_what_they_were_to_the_bit() -> None:
    """Runs of before go on: each sum is taken as it was, by torch's own sum in float64."""
    assert has_float64(CPU)
    draw = torch.Generator().manual_seed(0)
    losses, total, total_1 = torch.rand(1001, generator=draw), torch.zeros((), dtype=torch.float64), zeros_64(1, CPU)
    for loss in losses:
        total += loss
        add_to(total_1, loss)
    assert float(total) == float(total_1)
    vectors = [losses, losses > 0.5]
    assert torch.equal(sums_64(vectors), torch.stack([vector.sum(dtype=torch.float64) for vector in vectors]))


def test_a_launch_that_asks_for_the_cpu_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_device() == CPU
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert (training_device().type != "cpu") == torch.accelerator.is_available()
    assert [device_name(torch.device(kind)) for kind in ("cpu", "mps", "meta")] == ["CPU", "Apple GPU", "meta"]


def test_peak_memory_is_bytes_on_macos_and_kib_on_linux() -> None:
    from sft.fitting import most_resident_bytes, peak_gib

    assert most_resident_bytes(3 << 30, "darwin") == most_resident_bytes(3 << 20, "linux") == 3 << 30
    assert 0.05 < peak_gib(CPU) < 500


def test_windows_is_told_so_in_one_sentence() -> None:
    code = "import sys; from sft.__main__ import main; sys.platform = 'win32'; sys.argv = ['sft', 'schema']; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: sft runs on Linux and macOS. On Windows, use it inside WSL 2.\n"


def test_what_the_command_line_imports_at_its_top_is_there_on_windows() -> None:
    """So that the sentence above is reached: without fcntl and resource, which Windows lacks."""
    blocked = "import sys; sys.modules.update(fcntl=None, resource=None, termios=None, pwd=None, grp=None)"
    ran = subprocess.run(
        [sys.executable, "-c", f"{blocked}; import sft.__main__; print('there')"], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert ran.stdout == "there\n", ran.stderr
