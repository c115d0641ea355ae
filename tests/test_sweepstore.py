"""The storage of a sweep: torn journals, leases, claims, and points that do not depend on who was killed when."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sft.errors import ResumeError, StorageError
from sft.sweepfile import load_sweep
from sft.sweepresults import train_line, write_results
from sft.sweepstorage import JOURNAL, JournalFile, open_storage
from sft.sweepstore import SweepStore, open_store

BASE = """\
model: {name: some/model}
data:
  train: [{path: rows.jsonl}]
  eval: 2
train: {max_steps: 8}
"""
SWEEP = """\
config: base.yaml
dir: sw
trials: 6
lease: 1
space:
  optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
  model.lora.rank: [8, 16, 32]
"""
CONDITIONAL = """\
config: base.yaml
dir: sw
sampler: grid
space:
  model.tuning: [lora, qlora, full]
  model.lora.rank: {values: [8, 16], when: {model.tuning: [lora, qlora]}}
  optim.schedule: [cosine, constant]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("rows.jsonl").write_text('{"messages": []}\n')
    return tmp_path


def store(text: str = SWEEP, *overrides: str) -> SweepStore:
    Path("sweep.yaml").write_text(text)
    opened = open_store(load_sweep("sweep.yaml", overrides))
    opened.beat()
    return opened


def run_all(one: SweepStore, limit: int = 1000) -> list[dict]:
    """Claim and finish trials one after another; their points."""
    points = []
    while len(points) < limit and (claim := one.claim(set())):
        points.append(claim.values)
        one.finish(claim, TrialState.COMPLETE, sum(map(hash, map(str, claim.values))) % 97, {})
    return points


# The journal


def test_every_cut_of_the_last_line_is_repaired_before_the_next_append(tmp_path):
    whole = [{"op_code": 1, "text": "a" * 5000}, {"op_code": 2, "text": "ü"}]
    path = tmp_path / "journal"
    JournalFile(path).append_logs(whole)
    last = b'{"op_code":3,"text":"torn"}\n'
    content = path.read_bytes()
    for cut in range(len(last)):
        path.write_bytes(content + last[:cut])
        journal = JournalFile(path)
        assert list(journal.read_logs(0)) == whole
        journal.append_logs([{"op_code": 4}])
        assert list(JournalFile(path).read_logs(0)) == [*whole, {"op_code": 4}]


@pytest.mark.parametrize("junk", [b"\0" * 700, b"\0" * 5000 + b"\n", b'{"op_code":\n', b"\xff\xfe"])
def test_what_a_power_cut_leaves_at_the_end_is_repaired(tmp_path, junk):
    path = tmp_path / "journal"
    JournalFile(path).append_logs([{"op_code": 1}])
    path.write_bytes(path.read_bytes() + junk)
    JournalFile(path).append_logs([{"op_code": 2}])
    assert list(JournalFile(path).read_logs(0)) == [{"op_code": 1}, {"op_code": 2}]


def test_optunas_own_journal_breaks_there(tmp_path):
    """The negative control: without the repair the next append joins the torn line, and the journal is lost."""
    from optuna.storages.journal import JournalFileBackend

    path = tmp_path / "journal"
    JournalFileBackend(str(path)).append_logs([{"op_code": 1}])
    path.write_bytes(path.read_bytes() + b'{"op_code":2')
    JournalFileBackend(str(path)).append_logs([{"op_code": 3}])
    JournalFileBackend(str(path)).append_logs([{"op_code": 4}])
    with pytest.raises(json.JSONDecodeError):
        list(JournalFileBackend(str(path)).read_logs(0))


@pytest.mark.slow
def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path):
    path = tmp_path / "journal"
    journal = JournalFile(path)
    os.symlink(path, str(path) + ".lock")
    began = time.monotonic()
    journal.append_logs([{"op_code": 1}])
    assert time.monotonic() - began < 10
    assert list(journal.read_logs(0)) == [{"op_code": 1}]


def test_a_lock_that_a_dead_driver_left_is_passed(tmp_path, monkeypatch):
    """In real processes, with the relative path that users write; and after the folder was moved."""
    monkeypatch.chdir(tmp_path)
    script = "from sft.sweepstorage import JournalFile; from pathlib import Path; import os, signal\n"
    Path("sweep").mkdir()
    die = f"{script}lock = JournalFile(Path('sweep/{JOURNAL}'))._sft_lock\nlock.acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", die]).returncode == -9
    assert Path("sweep", JOURNAL + ".lock").is_symlink()
    Path("sweep").rename("moved")
    live = f"{script}JournalFile(Path('moved/{JOURNAL}')).append_logs([{{'op_code': 1}}])"
    assert subprocess.run([sys.executable, "-c", live], timeout=30).returncode == 0
    assert subprocess.run([sys.executable, "-c", die.replace("sweep/", "moved/")]).returncode == -9
    live = live.replace("1}", "2}")
    assert subprocess.run([sys.executable, "-c", live], timeout=30).returncode == 0
    assert list(JournalFile(Path("moved", JOURNAL)).read_logs(0)) == [{"op_code": 1}, {"op_code": 2}]


def test_a_study_goes_on_after_a_torn_line():
    first = store()
    points = run_all(first, 3)
    with open(Path("sw") / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code": 5, "trial_')
    points += run_all(store())
    assert len(points) == 6
    assert [trial.state for trial in store().trials()] == [TrialState.COMPLETE] * 6


# Points


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_points_do_not_depend_on_restarts(sampler):
    """A driver killed after every single trial tries the very points of one that never was."""
    text = (
        SWEEP.replace("{low: 1.0e-5, high: 1.0e-3, log: true}", "[1.0e-5, 1.0e-4, 1.0e-3]")
        if sampler == "grid"
        else SWEEP
    )
    straight = run_all(store(text, f"sampler={sampler}", "trials=9"))
    shutil.rmtree("sw")
    cut = [run_all(store(text, f"sampler={sampler}", "trials=9"), 1)[0] for _ in range(9)]
    assert cut == straight
    assert len({json.dumps(point) for point in cut}) == 9


def test_a_sampler_that_lives_on_would_repeat_itself():
    """The negative control of the test above: optuna's own way, a seeded sampler made anew."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first = study.ask().suggest_float("x", 0, 1)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    assert study.ask().suggest_float("x", 0, 1) == first


def test_another_seed_tries_other_points():
    a = run_all(store())
    shutil.rmtree("sw")
    b = run_all(store(SWEEP, "seed=1"))
    assert a[0] == b[0] == {"optim.lr": 2e-4, "model.lora.rank": 16}  # the base config
    assert all(x != y for x, y in zip(a[1:], b[1:], strict=True))


def test_a_grid_with_conditions_tries_every_point_once():
    points = run_all(store(CONDITIONAL))
    assert len(points) == 10
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 10
    assert all(("model.lora.rank" in point) == (point["model.tuning"] != "full") for point in points)


def test_first_points_come_first_and_once():
    text = SWEEP + "first: [base, {model.lora.rank: 32}, {optim.lr: 5.0e-4, model.lora.rank: 8}]\n"
    points = run_all(store(text), 1) + run_all(store(text))
    assert points[0] == {"optim.lr": 2e-4, "model.lora.rank": 16}
    assert points[1]["model.lora.rank"] == 32
    assert points[2] == {"optim.lr": 5e-4, "model.lora.rank": 8}
    assert len(points) == 6


def test_choices_that_are_lists_or_look_alike():
    text = SWEEP.replace(
        "model.lora.rank: [8, 16, 32]", "optim.betas: [[0.9, 0.95], [0.9, 0.999]]\n  data.train.0.limit: [null, 1]"
    )
    for point in run_all(store(text)):
        assert point["optim.betas"] in ([0.9, 0.95], [0.9, 0.999])
        assert point["data.train.0.limit"] in (None, 1)


# Claims and leases


def claim_all(folder: str, barrier, numbers) -> None:
    os.chdir(folder)
    one = store()
    barrier.wait()
    while claim := one.claim(set()):
        numbers.append(claim.number)
        one.finish(claim, TrialState.COMPLETE, 1.0, {})


def test_drivers_side_by_side_never_take_the_same_trial_and_the_total_is_exact(here):
    spawn = multiprocessing.get_context("fork")
    with spawn.Manager() as manager:
        numbers, barrier = manager.list(), spawn.Barrier(3)
        drivers = [spawn.Process(target=claim_all, args=(str(here), barrier, numbers)) for _ in range(3)]
        store()
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
        assert sorted(numbers) == list(range(6))
    assert len(store().trials()) == 6


def test_a_trial_of_a_driver_that_left_is_taken_over_with_its_point():
    first = store()
    claim = first.claim(set())
    assert claim is not None
    first.release(claim)
    again = store().claim(set())
    assert again is not None
    assert (again.number, again.values, again.adopted) == (claim.number, claim.values, True)


def test_a_dead_driver_on_this_machine_is_known_at_once(here):
    code = (
        "import os, signal; from sft.sweepfile import load_sweep; from sft.sweepstore import open_store\n"
        "store = open_store(load_sweep('sweep.yaml')); store.beat(); store.claim(set())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    mine = store()
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    claim = mine.claim(set())
    assert claim is not None
    assert (claim.number, claim.adopted) == (0, True)


def test_a_driver_elsewhere_is_dead_when_it_is_silent_for_a_lease(monkeypatch):
    mine, other = store(), store()
    elsewhere = {"host": "far", "pid": 1, "start": 1.0, "boot": "", "namespace": ""}

    def beat() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("sft.sweepstore.this_process", lambda: elsewhere)
            other.beat()

    beat()
    taken = other.claim(set())
    assert taken is not None
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:  # it beats, so it lives
        beat()
        assert not mine.is_dead(other.driver, mine.study.user_attrs)
        time.sleep(0.3)
    time.sleep(1.1)
    claim = mine.claim(set())
    assert claim is not None
    assert claim.number == taken.number
    assert not other.owns(taken)
    assert not other.finish(taken, TrialState.COMPLETE, 1.0, {})  # it woke up too late
    assert mine.finish(claim, TrialState.COMPLETE, 2.0, {})
    assert mine.trials()[claim.number].value == 2.0


def test_a_driver_that_died_while_choosing_leaves_a_trial_without_owner():
    mine = store()
    trial = mine.study.ask()
    trial.suggest_float("optim.lr", 1e-5, 1e-3, log=True)
    claim = mine.claim(set())
    assert claim is not None
    assert (claim.number, claim.adopted) == (0, False)
    assert claim.values["optim.lr"] == trial.params["optim.lr"]
    assert set(claim.values) == {"optim.lr", "model.lora.rank"}


def test_finishing_twice_is_harmless():
    mine = store()
    claim = mine.claim(set())
    assert claim is not None
    assert mine.finish(claim, TrialState.FAIL, None, {"reason": "x"})
    assert mine.finish(claim, TrialState.FAIL, None, {"reason": "x"})


# Refusals


def test_a_changed_sweep_is_refused_with_the_differences():
    store()
    Path("rows.jsonl").write_text('{"messages": [1]}\n')
    Path("base.yaml").write_text(BASE.replace("max_steps: 8", "max_steps: 9"))
    with pytest.raises(ResumeError) as caught:
        store(SWEEP.replace("[8, 16, 32]", "[8, 16]").replace("trials", "metric: eval.perplexity\ntrials"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("sw: this sweep began otherwise")
    assert lines[1:-1] == [
        "  metric: was eval.loss, is eval.perplexity",
        "  space.model.lora.rank: was [8, 16, 32], is [8, 16]",
        "  config.train.max_steps: was 8, is 9",
        lines[4],
    ]
    assert lines[4].startswith("  rows of data.train.0: was rows.jsonl, sha256 ")


def test_a_sweep_goes_where_its_folder_goes():
    first = store(SWEEP, "trials=3")
    points = run_all(first, 2)
    Path("elsewhere").mkdir()
    Path("sw").rename("elsewhere/sw")
    moved = store(SWEEP, "trials=3", "dir=elsewhere/sw")
    assert len(run_all(moved)) == 1
    moved.loaded.freeze()
    rows = write_results(moved.loaded, moved).rows
    assert [row.state for row in rows] == ["complete"] * 3
    assert [row.values for row in rows[:2]] == points
    assert [row.run for row in rows] == [f"elsewhere/sw/trials/{n:04d}" for n in range(3)]


def test_what_changes_no_result_may_change():
    store()
    Path("base.yaml").write_text(BASE + "log: {every: 5}\nsave: {keep: 1}\nrun: {threads: 2}\n")
    assert store(SWEEP, "trials=12", "workers=4", "launch=[nice]", "lease=9", "timeout=60").loaded.total == 12


def test_the_line_that_trains_the_best_is_behind_the_launcher_of_its_ranks():
    lines = {
        "[]": "sft train sw/best.yaml",
        "[nice, -n, '10']": "sft train sw/best.yaml",
        "[accelerate, launch, --num_processes, '2']": "accelerate launch --num_processes 2 -m sft train sw/best.yaml",
        "[torchrun, --nproc-per-node=2]": "torchrun --nproc-per-node=2 -m sft train sw/best.yaml",
    }
    Path("sweep.yaml").write_text(SWEEP)
    for launch, line in lines.items():
        assert train_line(load_sweep("sweep.yaml", [f"launch={launch}"])) == line


def test_a_study_of_somebody_else_is_not_ours():
    storage, _ = open_storage(None, Path("sw"))
    optuna.create_study(study_name="sw", storage=storage).ask()
    with pytest.raises(ResumeError, match="was not made by sft sweep"):
        store()


def test_passwords_of_a_storage_reach_no_message():
    text = SWEEP + "storage: postgresql://me:swordfish@127.0.0.1:9/none\n"
    with pytest.raises(StorageError) as caught:
        store(text)
    assert "swordfish" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    with pytest.raises(StorageError, match=r"oracle is not supported|needs the package|cannot be used"):
        store(SWEEP + "storage: oracle://me:swordfish@127.0.0.1/none\n")


def test_a_database_file_serves_as_well():
    text = SWEEP + "storage: sqlite:///trials.db\n"
    assert len(run_all(store(text), 2) + run_all(store(text))) == 6


def test_what_made_the_difference():
    text = SWEEP.replace("trials: 6", "trials: 30").replace("space:", "sampler: random\nspace:")
    mine = store(text)
    assert mine.importances() == {}
    while claim := mine.claim(set()):
        mine.finish(claim, TrialState.COMPLETE, abs(claim.values["optim.lr"] - 1e-4), {})
    shares = mine.importances()
    assert shares["optim.lr"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_a_key_that_came_later_is_no_change_while_at_its_default() -> None:
    from sft.sweepidentity import differences

    written = {"metric": "eval.loss", "config.optim.lr": "0.1"}
    news = {"config.model.lora.dora": "false", "config.data.train.3.repeat": "1.0", "config.eval.samples": '"auto"'}
    assert differences(written, {**written, **news}) == []
    assert differences(written, {**written, "config.model.lora.dora": "true"}) == ["config.model.lora.dora"]
    assert differences({**written, **news}, written) == list(news), "one that went is a change"
    assert differences(written, {**written, "space.optim.lr": "x", "config.optim.lr": "0.2"}) == [
        "config.optim.lr", "space.optim.lr",
    ]  # fmt: skip
