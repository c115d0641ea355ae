"""Data sets and models of a hub: a real one over HTTP, small enough for a test, asked by the libraries users have."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from hubserver import TOKEN, Hub, commit_of, serve
from jobs import run_cli, write_config


def row(word: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Hello {word}"}, {"role": "assistant", "content": f"Yes {word}"}]}


def lines(*words: str) -> bytes:
    return "".join(json.dumps(row(word)) + "\n" for word in words).encode()


def parquet(*rows: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: other
  data_files: [{split: train, path: other/train.jsonl}]
---
"""
CALL = {"messages": [{"role": "user", "content": "six"}, {"role": "assistant", "tool": {"x": 1}}], "note": None}
NEW = {
    "README.md": CARD,
    "plain/train.jsonl": lines("one", "two", "three"),
    "plain/test.jsonl": lines("four"),
    "other/train.jsonl": lines("ten"),
}
OLD = {**NEW, "plain/train.jsonl": lines("seven")}
TWO = b"---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
DATA = {
    "datasets/me/rows": {"main": NEW, "v1": OLD},
    "datasets/me/tools": {
        "main": {"train.parquet": parquet(CALL, {"messages": [{"role": "tool", "content": "ten"}], "note": "n"})}
    },
    "datasets/me/gated": {"main": NEW},
    "datasets/me/two": {"main": {"README.md": TWO, "a.jsonl": lines("one"), "b.jsonl": lines("two")}},
}
ASK = """
import json, sys
from sft.data.sources import Place, read_rows, source_fingerprint
from sft.errors import DataError
for asked in json.loads(sys.argv[1]):
    try:
        place = Place(**asked)
        print(json.dumps([[[r.source, r.data] for r in read_rows(place)], source_fingerprint(place)]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def hub_env(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "SFT_CACHE": str(home / "sft"),
            "HF_HUB_OFFLINE": "0", **more}  # fmt: skip


def ask(env: dict[str, str], *asked: dict[str, Any]) -> list[Any]:
    """Of each query the rows and the fingerprint, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(asked)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "examples/s" not in done.stderr, "no progress bar without a terminal"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_splits_subsets_revisions_and_what_is_missing(tmp_path: Path) -> None:
    with serve(DATA, frozenset({"datasets/me/gated"})) as hub:
        env = hub_env(hub, tmp_path)
        rows = {"path": "me/rows"}
        old, new, test, other, tools, again, *refused = ask(
            env, {**rows, "revision": "v1"}, rows, {**rows, "split": "test"}, {**rows, "subset": "other"},
            {"path": "me/tools"}, rows,
            {**rows, "split": "dev"}, {**rows, "subset": "none"}, {**rows, "revision": "v9"}, {"path": "me/two"},
            {"path": "me/nothing"}, {"path": "me/gated"},
        )  # fmt: skip
        assert new[0] == [[f"me/rows[train]:row {n}", row(word)] for n, word in enumerate(("one", "two", "three"), 1)]
        assert old[0] == [["me/rows[train]:row 1", row("seven")]]
        assert other[0] == [["me/rows[train]:row 1", row("ten")]]
        assert test[0] == [["me/rows[test]:row 1", row("four")]]
        assert tools[0][0] == ["me/tools[train]:row 1", CALL], "no foreign nulls from the other row's keys"
        assert len({answer[1] for answer in (old, new, test, other, tools)}) == 5
        assert again == new
        expected = [
            "me/rows: .* (split 'dev') .*: Unknown split \"dev\". Should be one of ['train', 'test']. Set split",
            "me/rows: .* (split 'train', subset 'none') .* Available: ['default', 'other']. Set subset",
            "me/rows: .* revision 'v9') .*: Revision 'v9' doesn't exist .* Set revision to a branch, tag or commit",
            "me/two: .*: Config name is missing. Please pick one among the available configs: ['a', 'b']. Set subset",
            "me/nothing: .* there is no such file here, .* doesn't exist on the Hub .* Check the name",
            "me/gated: .* is a gated dataset .* Ask for access on its page, then log in",
        ]
        for said, parts in zip(refused, expected, strict=True):
            assert isinstance(said, str)
            assert all(part.strip() in said for part in parts.split(".*")), said

        offline = {**env, "HF_HUB_OFFLINE": "1"}
        hub.requests.clear()
        plain = {**rows, "subset": "default"}  # where several are cached, it must be said
        several, cached, pinned, old, unknown = ask(
            offline,
            rows,
            plain,
            {**plain, "revision": commit_of(NEW)},
            {**plain, "revision": "v1"},
            {"path": "me/none"},
        )
        assert hub.requests == []
        assert "Set subset to one of them, or connect to the hub" in several
        assert cached[0] == pinned[0] == new[0]
        assert old == (
            "me/rows: revision 'v1' cannot be had without the hub: of its local cache, datasets serves commit "
            f"{commit_of(NEW)}. Connect, or set revision to that commit"
        )
        assert "This machine is offline: connect to the hub, with HF_HUB_OFFLINE unset; or, where there" in unknown
        assert "run 'hf download --repo-type dataset me/none --local-dir DIR', and give DIR." in unknown
        assert ask({**env, "HF_TOKEN": TOKEN}, {"path": "me/gated", "split": "test"})[0][0] == [
            ["me/gated[test]:row 1", row("four")]
        ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # names that transformers deprecates and PEFT uses
def test_an_adapter_names_its_base_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from sft.config import Lora
    from sft.model import add_adapter

    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    model = add_adapter(AutoModelForCausalLM.from_pretrained("base"), Lora(), seed=0, revision="v1")
    model.save_pretrained("adapter")
    saved = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == (str(tmp_path / "base"), "v1")
    model = AutoModelForCausalLM.from_pretrained("base")
    continued = add_adapter(model, Lora(), seed=0, adapter="adapter", revision=None)
    assert continued.peft_config["default"].revision is None


@pytest.mark.slow
def test_a_model_of_the_hub_is_trained_at_its_revision_and_pushed(tmp_path: Path) -> None:
    old, new = (make_model(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    revisions = {
        name: {f.name: f.read_bytes() for f in folder.iterdir()} for name, folder in (("main", new), ("v1", old))
    }
    with serve({**DATA, "me/tiny": revisions, "me/gated": revisions}, frozenset({"me/gated"})) as hub:
        env = hub_env(hub, tmp_path / "home")
        config = write_config(
            tmp_path, old, model__name="me/tiny", model__revision="v1", data__train=["me/rows"], data__eval=1,
            model__tuning="lora", train__max_steps=2, batch__examples=2,
        )  # fmt: skip
        trained = run_cli("train", str(config), env=env)
        assert trained.returncode == 0, trained.stderr

        pushed = run_cli(
            "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--merge", "--push", "me/mine",
            env={**env, "HF_TOKEN": TOKEN},
        )  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        assert f"uploaded: {hub.url}/me/mine" in pushed.stdout
        sent = hub.repositories["me/mine"]["main"]
        assert {name: sent[name] for name in sent} == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
        assert_near_the_base(sent["model.safetensors"], old / "model.safetensors", new / "model.safetensors")

        refused = run_cli("export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--push", "me/x",
                          env={**env, "HF_TOKEN": "hf_WrongWrongWrongWrongWrong"})  # fmt: skip
        assert refused.returncode == 2
        assert "--push me/x: the hub refused" in refused.stderr
        assert "hf_Wrong" not in refused.stderr + refused.stdout

        for overrides, said in (
            (["model.name=me/gated", "model.revision=null"], "me/gated"),
            (["model.name=me/none", "model.revision=null"], "me/none"),
            (["model.revision=v9"], "v9"),
        ):
            failed = run_cli("train", str(config), f"run.dir={tmp_path}/other", *overrides, env=env)
            assert (failed.returncode, failed.stdout) == (2, "")
            assert failed.stderr.splitlines()[-1].startswith("error: model.")
            assert said in failed.stderr
            assert "Traceback" not in failed.stderr


def assert_near_the_base(weights: bytes, old: Path, new: Path) -> None:
    """Two small steps move it little: it is `old`, not `new`."""
    from safetensors.torch import load, load_file

    name = "model.layers.0.mlp.up_proj.weight"
    ours, theirs, other = load(weights)[name], load_file(old)[name], load_file(new)[name]
    assert (ours - theirs).norm() < 0.1 * (other - theirs).norm()
