"""A sweep shared through a real PostgreSQL server, which the tests start and end by themselves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from test_sweep import SWEEP, here, run, start, starts, steps_of, table, wait_for  # noqa: F401

pytest.importorskip("psycopg")
PASSWORD = "swordfish-in-a-url"


def binaries() -> Path | None:
    """Debian keeps the server's programs off the PATH."""
    found = shutil.which("initdb")
    folders = (
        [Path(found).resolve().parent] if found else [Path(path) for path in sorted(glob("/usr/lib/postgresql/*/bin"))]
    )
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(binaries() is None, reason="no PostgreSQL server here (apt-get install postgresql)"),
]


class Server:
    """A PostgreSQL of its own: a folder, a port, a password. It refuses to run as root, so root takes another user."""

    def __init__(self, port: int) -> None:
        self.bin, self.port = binaries(), port
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self.call(
            "initdb",
            "-D",
            str(self.folder / "data"),
            "-U",
            "sweeper",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "-N",
        )
        self.up()

    def call(self, program: str, *words: str) -> None:
        assert self.bin is not None
        subprocess.run(
            [self.bin / program, *words], check=True, user=self.user, stdout=subprocess.DEVNULL, cwd=self.folder
        )

    def up(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.call(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def down(self) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://sweeper:{PASSWORD}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from sft.trial import free_port

    one = Server(free_port(set()))
    yield one
    one.down()
    shutil.rmtree(one.folder)


@pytest.fixture
def shared(server, here) -> str:  # noqa: F811
    """The sweep of this test, in a study of its own."""
    folder = f"sw{time.monotonic_ns()}"
    Path("sweep.yaml").write_text(SWEEP.replace("dir: sw", f"dir: {folder}") + f"storage: {server.url}\n")
    return folder


def test_two_drivers_share_a_database(shared):
    drivers = [start("trials=6", step_seconds=0.05) for _ in range(2)]
    for driver in drivers:
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 0, err
        assert PASSWORD not in out + err
    assert [row["state"] for row in table(shared)] == ["complete"] * 6
    assert sorted(line["run"] for line in starts()) == [f"{n:04d}" for n in range(6)]
    assert not (Path(shared) / "study.journal").exists()


def test_the_password_is_in_no_file(shared):
    code, _, err = run("trials=2")
    assert code == 0, err
    holding = [path for path in Path(shared).rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert holding == []


def test_a_killed_driver_is_continued(shared):
    driver = start("trials=3", "workers=2", step_seconds=0.3)
    wait_for(lambda: steps_of(f"{shared}/trials/0000")[2:] and steps_of(f"{shared}/trials/0001")[2:])
    driver.kill()
    driver.communicate()
    code, _, err = run("trials=3", "workers=2")
    assert code == 0, err
    assert [row["state"] for row in table(shared)] == ["complete"] * 3
    assert all(steps_of(f"{shared}/trials/000{n}") == list(range(1, 9)) for n in range(3))


def test_a_driver_that_hangs_while_it_decides_does_not_hold_up_the_others(shared, server, monkeypatch):
    """A driver stopped inside the guard: the server ends its idle transaction, and with it the lock."""
    code = (
        "import os, signal, sys; from sft.sweepfile import load_sweep; import sft.sweepstorage as s\n"
        "s._GUARD_SECONDS = 2\n"
        "storage, guard = s.open_storage(load_sweep('sweep.yaml').spec.storage, load_sweep('sweep.yaml').dir)\n"
        "with guard():\n    print('in', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    hung = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert hung.stdout is not None
    assert hung.stdout.readline() == b"in\n"
    try:
        status, _, err = run("trials=1")
        assert status == 0, err
    finally:
        hung.send_signal(signal.SIGKILL)
        hung.communicate()


def test_a_server_that_goes_away_and_comes_back(shared, server):
    driver = start("trials=2", "lease=20", step_seconds=0.4)
    wait_for(lambda: steps_of(f"{shared}/trials/0000")[1:])
    server.down()
    time.sleep(2)
    server.up()
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert "the storage cannot be reached, trying again" in err
    assert PASSWORD not in out + err
    assert [row["state"] for row in table(shared)] == ["complete"] * 2
    assert steps_of(f"{shared}/trials/0000") == list(range(1, 9))


def test_a_wrong_password_is_the_users_to_mend_and_is_not_shown(shared):
    Path("sweep.yaml").write_text(Path("sweep.yaml").read_text().replace(PASSWORD, "wrong-swordfish"))
    code, out, err = run()
    assert code == 2
    assert "password authentication failed" in err
    assert "wrong-swordfish" not in out + err
