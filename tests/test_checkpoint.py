"""Checkpoints are published whole, verified before use, rotated late, and never run code."""

from __future__ import annotations

import json
import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft.checkpoint import (
    MANIFEST,
    CheckpointStore,
    complete_checkpoints,
    find_resumable,
    read_tensors,
    step_of,
    verify,
    write_tensors,
)
from sft.durable import read_json, write_json
from sft.errors import DiskError, ResumeError


def write_state(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        write_tensors(folder / "model" / "adapter_model.safetensors", {"a": torch.full((64,), float(step))})
        write_tensors(folder / "optimizer.safetensors", {"m": torch.arange(32.0)})
        write_json(folder / "state.json", {"step": step})

    return write


def save(root: Path, *steps: int, keep: int = 2, best: int | None = None) -> None:
    store = CheckpointStore(root, keep)
    for step in steps:
        store.save(step, write_state(step), protect=best)
    store.wait()


def steps(root: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(root)]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x20
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_link(file: Path) -> None:
    aside = file.parent.parent.parent / "elsewhere"
    file.rename(aside)
    file.symlink_to(aside)


FILES = ["model/adapter_model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]
DAMAGES = [flip, cut, empty, Path.unlink, replace_by_link]


def test_published_files_are_listed_with_size_and_hash(tmp_path: Path) -> None:
    save(tmp_path, 7)
    checkpoint = tmp_path / "step-00000007"
    manifest = read_json(checkpoint / MANIFEST)
    assert manifest["step"] == 7
    assert sorted(manifest["files"]) == sorted(FILES[:3])
    assert (checkpoint / "state.json").read_text() == '{\n  "step": 7\n}\n'
    assert manifest["files"]["state.json"] == {
        "size": 16,
        "sha256": "bfc22f1e047358590b17944e3323d3b94f440f0afcaef22685350bf91c5e3042",
    }
    verify(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, best=2)
    assert steps(tmp_path) == [5, 4, 2]


def test_rotation_removes_a_former_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        store.save(step, write_state(step), protect=best)
    store.wait()
    assert steps(tmp_path) == [4, 3]


def test_the_former_best_stays_until_the_new_one_is_published(tmp_path: Path) -> None:
    """Step 3 is still being written when step 4 turns out to be the best: a kill before 4 is whole leaves step 1."""
    proceed, seen = threading.Event(), []

    def slow(folder: Path) -> None:
        assert proceed.wait(10)
        write_state(3)(folder)

    def look(folder: Path) -> None:
        seen.extend(steps(tmp_path))
        write_state(4)(folder)

    save(tmp_path, 1, 2, keep=1, best=1)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, slow, protect=1)
    threading.Timer(0.2, proceed.set).start()
    store.save(4, look, protect=4)
    store.wait()
    assert seen == [3, 1], "while step 4 was written"
    assert steps(tmp_path) == [4]


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("step-1", "my-copy", "step-00000001.bak"):
        (tmp_path / name).mkdir()
    save(tmp_path, 1, 2, 3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my-copy", "step-00000001.bak", "step-00000003", "step-1"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_found_named_and_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    root = tmp_path / "checkpoints"
    save(root, 10, 20)
    damage(root / "step-00000020" / name)
    with pytest.raises(ResumeError, match=name.replace(".", r"\.")):
        verify(root / "step-00000020")
    said: list[str] = []
    assert find_resumable(root, said.append) == root / "step-00000010"
    assert any("step-00000020" in line and line.startswith("WARNING") for line in said)


def test_undamaged_is_resumed_in_silence(tmp_path: Path) -> None:
    """The control of the test above."""
    save(tmp_path, 10, 20)
    said: list[str] = []
    assert find_resumable(tmp_path, said.append) == tmp_path / "step-00000020"
    assert said == []


def test_an_additional_file_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "model" / "config.json").write_text("{}")
    with pytest.raises(ResumeError, match=r"config\.json: not in the checkpoint's manifest"):
        verify(tmp_path / "step-00000001")


def test_none_at_all_starts_anew_but_none_whole_is_refused(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "checkpoints", print) is None
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / MANIFEST).unlink()
    with pytest.raises(ResumeError, match=r"(?s)no checkpoint of this run is whole.*00000002.*00000001.*--fresh"):
        find_resumable(tmp_path, print)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.raises(ResumeError, match="expected step 9 as the folder's name says, found 1"):
        verify(tmp_path / "step-00000009")


def test_damaged_newer_ones_never_push_out_a_whole_one(tmp_path: Path) -> None:
    """Resumed from 10 because 20 is damaged; with keep 1, saving 15 must leave 15, not 20."""
    save(tmp_path, 10, 20)
    flip(tmp_path / "step-00000020" / "state.json")
    save(tmp_path, 15, keep=1)
    assert find_resumable(tmp_path, lambda _: None) == tmp_path / "step-00000015"
    save(tmp_path, 25, keep=2)  # past the damaged one: it goes, and is not counted among the two
    assert steps(tmp_path) == [25, 15]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    flip(tmp_path / "step-00000020" / "optimizer.safetensors")
    save(tmp_path, 20)
    verify(tmp_path / "step-00000020")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_whole_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = (tmp_path / "step-00000010" / MANIFEST).stat().st_ino
    store = CheckpointStore(tmp_path, 1)
    store.save(10, write_state(10))
    store.wait()
    assert (tmp_path / "step-00000010" / MANIFEST).stat().st_ino == before


def test_saving_does_not_hold_up_the_caller(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(folder: Path) -> None:
        assert release.wait(10)
        write_state(1)(folder)

    store = CheckpointStore(tmp_path, 1)
    store.save(1, slow)
    store.poll()  # returns although the save is under way
    assert steps(tmp_path) == []
    assert store.steps() == [1], "what is being written may be the best"
    release.set()
    store.wait()
    assert steps(tmp_path) == [1]


def test_an_error_of_the_writer_reaches_the_caller_and_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        write_state(2)(folder)
        raise RuntimeError("out of luck")

    store = CheckpointStore(tmp_path, 1)
    store.save(1, write_state(1))
    store.save(2, broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        store.wait()
    store.wait()  # told once
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("writer", ["safetensors", "python"])
def test_a_full_disk_says_how_much_is_missing_and_leaves_the_older_whole(tmp_path: Path, writer: str) -> None:
    """A limit on file sizes stands in for the disk: the same write fails, at the same place."""

    def large(folder: Path) -> None:
        if writer == "safetensors":
            write_tensors(folder / "model.safetensors", {"w": torch.zeros(1 << 20)})
        else:
            (folder / "model.json").write_bytes(b"0" * (1 << 22))

    save(tmp_path, 1)
    store = CheckpointStore(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        store.save(2, large)
        with pytest.raises(DiskError, match=r"disk full while saving.*missing\. .*step-00000001 is whole\."):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify(tmp_path / "step-00000001")


def test_leftovers_of_a_dead_writer_are_ignored_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".staging-step-00000002", ".removed-step-00000000-ab", ".damaged-step-00000001-cd"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert find_resumable(tmp_path, print) == tmp_path / "step-00000001"
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_listed_in_the_manifest_is_refused_unopened(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint = tmp_path / "step-00000001"
    evil = pickle.dumps(Canary(tmp_path / "canary"))
    (checkpoint / "optimizer.pt").write_bytes(evil)
    rewrite_manifest(checkpoint, {"optimizer.pt": {"size": len(evil), "sha256": sha256(evil)}})
    with pytest.raises(ResumeError, match=r"refused: it names 'optimizer\.pt', a pickle"):
        verify(checkpoint)
    assert not (tmp_path / "canary").exists()
    pickle.loads(evil)  # the control: the canary sings when someone opens it
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "model/../../outside", "./state.json", "a\\b", ""])
def test_names_that_leave_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    (root / "outside").write_bytes(b"x")
    rewrite_manifest(root / "step-00000001", {name: {"size": 1, "sha256": sha256(b"x")}})
    with pytest.raises(ResumeError, match="expected names inside the checkpoint"):
        verify(root / "step-00000001")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"files": {}}', b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / MANIFEST).write_bytes(content)
    with pytest.raises(ResumeError, match=r"manifest\.json"):
        verify(tmp_path / "step-00000001")


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, keep=3)
    os.mkfifo(tmp_path / "step-00000001" / "pipe")
    (tmp_path / "step-00000002" / "more").symlink_to("/etc")
    (tmp_path / "step-00000003").symlink_to(tmp_path / "step-00000001")
    for step in (1, 2, 3):
        with pytest.raises(ResumeError, match="link"):
            verify(tmp_path / f"step-{step:08d}")


def test_loaded_tensors_are_aligned_and_independent_of_the_file(tmp_path: Path) -> None:
    """The odd length before it would place the second tensor at an odd address of the file."""
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5, 7), "c": torch.randn(4).to(torch.bfloat16)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    loaded = read_tensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % 64 == 0
        assert loaded[name].storage_offset() == 0


def test_tensors_that_share_storage_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "t.safetensors", {"a": whole, "b": whole, "c": whole[2:]})
    loaded = read_tensors(tmp_path / "t.safetensors")
    assert loaded["a"].tolist() == loaded["b"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded["c"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"\xff" * 64])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ResumeError, match="not readable as safetensors"):
        read_tensors(tmp_path / "t.safetensors")


def test_json_is_replaced_whole_and_knows_no_nan(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_json(file, {"loss": 1.0})
    with pytest.raises(TypeError):
        write_json(file, {"loss": object()})
    assert read_json(file) == {"loss": 1.0}
    write_json(file, {"loss": float("nan"), "x": [float("inf")], "text": "\ud800é"})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {"loss": None, "x": [None], "text": "?é"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def rewrite_manifest(checkpoint: Path, more: dict[str, dict[str, object]]) -> None:
    manifest = read_json(checkpoint / MANIFEST)
    manifest["files"].update(more)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
