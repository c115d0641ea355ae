"""A disk that is really too small, and one that really fills up: a tmpfs of a few hundred kilobytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Job, assert_same_run

from sft.checkpoint import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a disk of a size. Skips where this user may not mount one."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("only root may mount a tmpfs")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_too_small_a_disk_is_refused_before_the_first_step(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    job = Job(tmp_path / "job", f"run.dir={disk('600k') / 'run'}")
    outcome = job.run()
    assert outcome.codes == [2], outcome.output
    assert "save.keep + 1 = 3 checkpoints" in outcome.output
    assert "missing" in outcome.output


def test_a_disk_that_fills_up_costs_nothing_but_the_newest_save(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    """Another file takes the space while the run is at work; once it is gone, the run goes on to the same end."""
    reference = Job(tmp_path / "reference")
    reference.train()
    folder = disk("4m")
    job = Job(tmp_path / "job", f"run.dir={folder / 'run'}")
    job.run_dir = folder / "run"
    run = job.start()
    job.wait_for_step(2)
    with open(folder / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(b"0" * 4096):
                pass
        except OSError:  # full
            ballast.flush()
    outcome = run.wait()
    assert outcome.codes != [0], outcome.output
    assert "disk full" in outcome.output
    assert " missing." in outcome.output
    for checkpoint in job.checkpoints:
        verify(checkpoint)
    (folder / "ballast").unlink()
    job.train()
    assert_same_run(job, reference)
