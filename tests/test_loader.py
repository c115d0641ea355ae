"""Prepared once: the same arrays whatever the workers, counts that add up, held-out rows by content, publishing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from sft.config import Config
from sft.data import sources as sources_module
from sft.data import store as store_module
from sft.data.encode import Encoder
from sft.data.formats import FORMATS
from sft.data.heldout import MOST_ROWS, content_hash, held_out
from sft.data.ledger import histogram
from sft.data.loader import Prepared, cache_key, encode_settings, prepare
from sft.data.outcome import EncodeSettings
from sft.data.pipeline import RowBatch, encode_stream
from sft.data.readers import Row
from sft.data.sources import read_rows
from sft.data.store import Store
from sft.errors import DataError, DiskError, WorkerError
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message, Passage, Sample

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def bundle(tokenizer_folder: Path) -> TokenizerBundle:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat(*turns: str, **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)], **beside}


def number(n: int) -> str:
    """`407` → four ten seven: words that the test tokenizer knows."""
    return " ".join(NUMBERS[int(digit) - 1] for digit in str(n))


def write_rows(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"Hello {number(i)}", "Yes" if i % 3 else "No . " * (i % 7 + 1)) for i in range(start, start + count)]


def config(train: Any, **data: Any) -> Config:
    return Config(model={"name": "m"}, data={"train": train, **data})  # type: ignore[arg-type]


def run(bundle: TokenizerBundle, train: Any, cache: str = "cache", workers: int | None = 0, **data: Any) -> Prepared:
    return prepare(config(train, **data), bundle, cache_dir=Path(cache), workers=workers, say=lambda line: None)


def contents(path: Path) -> dict[str, bytes]:
    """Of the files, but for digests.json, which holds the dates of others."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "digests.json"}


def assert_adds_up(report: dict[str, Any]) -> None:
    for side in (report, report["eval"]):
        for part in (side, *side["by_source"]) if side else ():
            assert part["rows"] == part["kept"] + sum(part["dropped"].values()) + part["held_out"], part
        if side:
            for key in ("rows", "kept", "held_out", "cut", "examples", "tokens", "trained_tokens"):
                assert side[key] == sum(source[key] for source in side["by_source"]), key
            assert side["examples"] == sum(bar["value"] for bar in side["length_histogram"])


def test_what_is_stored_is_what_the_encoder_says(here: Path, bundle: TokenizerBundle) -> None:
    rows = [chat("Hello", "Yes"), chat("Hello one", "No", "Are you sure ?", "Yes"), *rows_of(1)]
    prepared = run(bundle, write_rows("a.jsonl", rows), eval=0)
    encoder = Encoder(bundle, EncodeSettings())
    expected = [e for row in read_rows("a.jsonl") for e in encoder.encode(FORMATS["messages"](row)).examples]  # type: ignore[arg-type]
    train = prepared.train
    assert (train.num_conversations, train.num_examples, prepared.eval) == (3, len(expected), None)
    for index, example in enumerate(expected):
        stored = train.example(index)
        assert stored.input_ids_T.tolist() == example.input_ids_T.tolist()
        assert stored.weights_T.tolist() == example.weights_T.tolist()
        assert (stored.source, stored.num_trained) == (example.source, example.num_trained)
        assert (stored.input_ids_T.dtype, stored.weights_T.dtype) == (np.int32, np.float32)
        assert not stored.input_ids_T.flags.writeable
    assert train.lengths_E.tolist() == [len(e.input_ids_T) for e in expected]
    assert train.trained_E.tolist() == [e.num_trained for e in expected]
    assert (train.origins_C.tolist(), train.repeats_S) == ([0, 0, 0], (1.0,))
    first = train.example(0)
    assert bundle.tokenizer.decode(first.input_ids_T[first.weights_T > 0]) == "Yes<|im_end|>"
    assert_adds_up(prepared.report)


def test_a_conversation_of_several_examples_stays_together(here: Path) -> None:
    forgetful = (  # reasoning is rendered only where the conversation ends, so no sequence serves all turns
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
        "{{ m.reasoning_content }} {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = load_tokenizer(str(make_tokenizer(here / "tokenizer", forgetful)))
    rows = [chat("Hello", "Yes"), chat("Hello", "Yes", "one", "No", "two", "Oh"), chat("Hello", "No")]
    for turn in (1, 3, 5):
        rows[1]["messages"][turn]["reasoning_content"] = "You are sure"
    source = {"path": write_rows("a.jsonl", rows), "repeat": 2.0}
    train = run(other, [source], eval=0).train
    assert [list(train.conversation_examples(c)) for c in range(3)] == [[0], [1, 2, 3], [4]]
    assert [train.example(e).source for e in range(5)] == [
        "a.jsonl:1", "a.jsonl:2#0", "a.jsonl:2#1", "a.jsonl:2#2", "a.jsonl:3",
    ]  # fmt: skip
    assert (train.origins_C.tolist(), train.repeats_S) == ([0, 0, 0], (2.0,))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(here: Path, bundle: TokenizerBundle) -> None:
    rows: list[Any] = rows_of(700)
    rows[30], rows[400] = {"messages": []}, chat("Hello", "six " * 300)
    source = write_rows("a.jsonl", rows)
    options = {"on_bad_row": "skip", "max_tokens": 128}
    alone = run(bundle, source, "alone", 0, **options)
    beside = run(bundle, source, "beside", 2, **options)
    assert alone.key == beside.key
    assert contents(alone.path) == contents(beside.path)
    assert alone.report["dropped"] == {"bad_row": 1, "over_long": 1}
    assert_adds_up(alone.report)


def test_what_a_fresh_worker_gets_can_be_sent(bundle: TokenizerBundle) -> None:
    made: Callable[[], Encoder] = pickle.loads(pickle.dumps(partial(Encoder, bundle, EncodeSettings())))
    sample = Conversation((Message("user", "Hello"), Message("assistant", "Yes")), "a:1")
    ours, theirs = Encoder(bundle, EncodeSettings()).encode(sample), made().encode(sample)
    assert ours.examples[0].input_ids_T.tolist() == theirs.examples[0].input_ids_T.tolist()


def test_fresh_interpreters_as_workers(here: Path, bundle: TokenizerBundle) -> None:
    done = threading.Event()
    threading.Thread(target=done.wait).start()  # beside another thread it is unsafe to fork
    try:
        beside = run(bundle, write_rows("a.jsonl", rows_of(600)), "beside", 2)
    finally:
        done.set()
    assert contents(beside.path) == contents(run(bundle, "a.jsonl", "alone", 0).path)


def test_prepared_once(here: Path, bundle: TokenizerBundle) -> None:
    first = run(bundle, write_rows("a.jsonl", rows_of(20)))
    said: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    again = prepare(config("a.jsonl"), bundle, cache_dir=Path("cache"), say=said.append)
    assert again.key == first.key
    assert {file: file.stat().st_mtime_ns for file in again.path.iterdir()} == before
    tokens = f"{again.report['tokens']:,} tokens, {again.report['trained_tokens']:,} of them trained"
    assert said == [f"data: 20 rows: 19 train, 1 held out, 0 dropped; 19 examples, {tokens}"]


def test_the_digest_of_a_side_is_that_of_every_token_and_weight(here: Path, bundle: TokenizerBundle) -> None:
    """Runs compare it with what they began on: this computation, one example after the other, is for ever."""
    write_rows("b.jsonl", rows_of(7))
    prepared = run(bundle, [{"path": write_rows("a.jsonl", rows_of(20)), "repeat": 0.5}, "b.jsonl"], eval=4)
    assert prepared.eval is not None
    for split in (prepared.train, prepared.eval):
        repeats = np.asarray(split.repeats_S, dtype=np.float32)
        hasher = hashlib.sha256(repeats[split.origins_C].tobytes() + split.origins_C.tobytes())
        for index in range(split.num_examples):
            hasher.update(split.example(index).input_ids_T.tobytes())
            hasher.update(split.example(index).weights_T.tobytes())
        assert split.digest() == hasher.hexdigest()[:16]


def test_a_digest_is_computed_once_and_anew_where_the_arrays_changed(here: Path, bundle: TokenizerBundle) -> None:
    first = run(bundle, write_rows("a.jsonl", rows_of(20)))
    right = first.train.digest()
    file = first.path / "digests.json"
    held = json.loads(file.read_text())
    assert right in held["digests"].values()  # written when the data was prepared
    held["digests"] = dict.fromkeys(held["digests"], "remembered")
    file.write_text(json.dumps(held))
    assert run(bundle, "a.jsonl").train.digest() == "remembered"
    os.utime(first.path / "ids.bin", (5, 5))
    assert run(bundle, "a.jsonl").train.digest() == right
    more = run(bundle, [{"path": "a.jsonl", "repeat": 2.0}])
    assert more.key == first.key
    assert more.train.digest() != right
    for damage in ("", "[]", "{"):
        file.write_text(damage)
        assert run(bundle, "a.jsonl").train.digest() == right


def test_the_bytes_of_a_source_are_read_once(
    here: Path, bundle: TokenizerBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: at each start, on every rank."""
    read: list[Path] = []
    blocks = sources_module._blocks
    monkeypatch.setattr(sources_module, "_blocks", lambda file: (read.append(file), blocks(file))[1])
    monkeypatch.setattr("sft.data.memo.SETTLED_SECONDS", -1e9)
    first = run(bundle, write_rows("a.jsonl", rows_of(20)))
    assert run(bundle, "a.jsonl").key == first.key
    assert len(read) == 1

    text = Path("a.jsonl").read_text()
    state = Path("a.jsonl").stat()
    time.sleep(0.02)  # the clock's step
    Path("a.jsonl").write_text(text.replace("one", "two"))
    os.utime("a.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Path("a.jsonl").stat().st_size == state.st_size
    assert run(bundle, "a.jsonl").key != first.key, "rewritten at the same size, with its old date"

    remembered = next(file for file in Path("cache/.sources").iterdir())
    for file in Path("cache/.sources").iterdir():
        file.write_text("damaged")
    assert run(bundle, "a.jsonl").key != first.key
    assert len(read) == 3
    assert remembered.read_text() == "damaged" or len(remembered.read_text()) == 64


def test_a_file_that_has_just_changed_is_not_remembered(here: Path, bundle: TokenizerBundle) -> None:
    run(bundle, write_rows("a.jsonl", rows_of(20)))
    assert not Path("cache/.sources").exists()


def test_a_memo_that_cannot_be_written_costs_time_alone(here: Path, bundle: TokenizerBundle) -> None:
    Path("cache").mkdir()
    Path("cache/.sources").write_text("a file")
    write_rows("a.jsonl", rows_of(20))
    os.utime("a.jsonl", (5, 5))
    assert run(bundle, "a.jsonl").report["rows"] == 20


def test_the_key_changes_with_all_that_the_result_depends_on(here: Path, bundle: TokenizerBundle) -> None:
    from dataclasses import replace

    def key(train: Any = "a.jsonl", bundle: TokenizerBundle = bundle, **data: Any) -> str:
        settings = config(train, **data).data
        return cache_key(settings, bundle, encode_settings(settings))

    write_rows("a.jsonl", rows_of(9))
    write_rows("b.jsonl", rows_of(9))
    base = key()
    os.utime("a.jsonl", (5, 5))
    assert key([{"path": "a.jsonl", "repeat": 3.0}]) == base
    others = [
        key("b.jsonl"), key(["a.jsonl", "b.jsonl"]), key([{"path": "a.jsonl", "limit": 5}]),
        key([{"path": "a.jsonl", "columns": {"x": "text"}}]), key([{"path": "a.jsonl", "format": "messages"}]),
        key(eval=3), key(eval=["b.jsonl"]), key(max_tokens=99), key(train_on="all"), key(over_long="truncate"),
        key(on_bad_row="skip"), key(max_dropped=0.5), key(control_tokens_in_text="allow"), key(template_args={"a": 1}),
        key(bundle=replace(bundle, digest="other")), key(bundle=replace(bundle, template="other")),
    ]  # fmt: skip
    write_rows("a.jsonl", rows_of(8))
    others.append(key())
    assert len({base, *others}) == len(others) + 1


def texts(split: Any) -> set[str]:
    """The ids of each example, to compare splits by content."""
    return {str(split.example(e).input_ids_T.tolist()) for e in range(split.num_examples)}


def test_held_out_rows_follow_content_not_order_or_seed(here: Path, bundle: TokenizerBundle) -> None:
    rows = rows_of(60)
    first = run(bundle, write_rows("a.jsonl", rows), eval=0.1)
    turned = run(bundle, write_rows("b.jsonl", rows[::-1]), eval=0.1)
    assert first.eval is not None
    assert turned.eval is not None
    assert first.eval.num_conversations == 6
    assert texts(first.eval) == texts(turned.eval)
    assert not texts(first.eval) & texts(first.train)
    assert texts(first.eval) | texts(first.train) == texts(run(bundle, "a.jsonl", eval=0).train)
    assert_adds_up(first.report)
    assert (first.report["kept"], first.report["held_out"], first.report["eval"]["kept"]) == (54, 6, 6)


def test_equal_rows_stay_on_one_side(here: Path, bundle: TokenizerBundle) -> None:
    rows = [dict(row, id=n) for n in range(4) for row in rows_of(10)]  # four times each, told apart by an id only
    prepared = run(bundle, write_rows("a.jsonl", rows), eval=0.3)
    assert prepared.eval is not None
    assert prepared.eval.num_conversations == 12
    assert not texts(prepared.eval) & texts(prepared.train)


@pytest.mark.parametrize(
    ("rows", "wanted", "scored"), [(2, 0.05, 1), (1, 0.05, 0), (40, 0, 0), (40, 7, 7), (40, 1, 1), (40, 0.25, 10)]
)
def test_how_many_are_held_out(here: Path, bundle: TokenizerBundle, rows: int, wanted: float, scored: int) -> None:
    prepared = run(bundle, write_rows("a.jsonl", rows_of(rows)), eval=wanted)
    assert prepared.train.num_conversations == rows - scored
    assert (prepared.eval.num_conversations if prepared.eval else 0) == scored
    assert_adds_up(prepared.report)


def test_more_held_out_than_there_is(here: Path, bundle: TokenizerBundle) -> None:
    with pytest.raises(DataError, match=r"data\.eval = 5: only 5 rows are left"):
        run(bundle, write_rows("a.jsonl", rows_of(5)), eval=5)
    assert os.listdir("cache") == [f for f in os.listdir("cache") if f.endswith(".lock")]


@given(st.lists(st.integers(0, 30), max_size=60), st.sampled_from([0, 0.01, 0.05, 0.5, 0.99, 1, 2, 10, 40]))
def test_held_out_never_splits_equals_never_empties_train(values: list[int], wanted: float) -> None:
    hashes = np.array([value * 2**59 for value in values], dtype=np.uint64)
    if wanted >= 1 and 0 < len(values) <= wanted:
        with pytest.raises(DataError):
            held_out(hashes, wanted)
        return
    mask = held_out(hashes, wanted)
    assert not set(hashes[mask].tolist()) & set(hashes[~mask].tolist())
    assert not values or not mask.all()
    if wanted > 0 and len(set(values)) > 1:
        assert mask.any()
    if len(set(values)) == len(values):
        expected = wanted if wanted >= 1 else max(1, round(wanted * len(values))) if wanted and len(values) > 1 else 0
        assert mask.sum() == min(expected, max(0, len(values) - 1))
        assert not mask.any() or hashes[mask].max() < hashes[~mask].min()


def test_a_share_is_capped() -> None:
    assert held_out(np.arange(100_000, dtype=np.uint64), 0.05).sum() == MOST_ROWS
    assert held_out(np.arange(100_000, dtype=np.uint64), 600).sum() == 600


def test_content_is_what_counts() -> None:
    def said(text: str, source: str = "a:1", **extra: Any) -> Sample:
        return Conversation((Message("user", "Hi"), Message("assistant", text, extra)), source)

    assert content_hash(said("x")) == content_hash(said("x", "b:2"))
    passages = [Passage("Hi", "x", "a:1"), Passage("", "Hix", "a:1", "text")]
    different = [said("x"), said("y"), said("x", name="n"), *passages]
    assert len({content_hash(sample) for sample in different}) == len(different)


def test_bookkeeping_train_and_weight_are_no_content() -> None:
    """Before: such rows were no duplicates, and stood on both sides of the split."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

    def chat(number: int, train: bool | None = None, weight: float = 1.0, **said: Any) -> Conversation:
        ids = {"id": f"m{number}", "timestamp": number, "uuid": str(number)} if number else {}
        calls = {**call, "id": f"c{number}", "index": number} if number else call
        return Conversation(
            (
                Message("user", "Hi", ids),
                Message("assistant", "", {**said, "tool_calls": [calls], **ids}),
                Message("tool", "2", {"name": "add", "tool_call_id": f"c{number}"}),
                Message("assistant", "2", ids, train, weight),
            ),
            f"a:{number}",
        )

    same = [chat(0), chat(1), chat(2), chat(3, False), chat(4, True, 0.5), chat(5, None, 2.0)]
    assert len({content_hash(sample) for sample in same}) == 1
    different = [chat(0), chat(0, reasoning_content="Add."), chat(0, reasoning_content="Hm."), chat(0, thinking="Hm.")]
    assert len({content_hash(sample) for sample in different}) == 4


def test_the_hash_of_plain_rows_is_for_ever() -> None:
    """Which rows are held out depends on it: change these literals, and runs can't be resumed any more."""
    chat = (Message("user", "Hello"), Message("assistant", "Yes"))
    assert content_hash(Conversation(chat, "a:1")) == 652821163107826809
    assert content_hash(Passage("a", "b", "s")) == 12321618954657544411
    assert content_hash(Passage("", "b", "s", "text")) == 3582885988791234574
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = ({"type": "function", "function": {"name": "add"}},)
    called = (
        Message("user", "Hello"),
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", "2", {"name": "add"}),
        Message("assistant", "2", {"reasoning_content": "R"}),
    )
    assert content_hash(Conversation(called, "a:1", tools)) == 12274078436478489825


def test_copies_with_other_ids_stay_on_one_side_and_are_counted(here: Path, bundle: TokenizerBundle) -> None:
    rows = rows_of(20)
    copies = [
        {"messages": [{**message, "id": f"{number}-{copy}"} for message in row["messages"]]}
        for number, row in enumerate(rows)
        for copy in range(3)
    ]
    write_rows("a.jsonl", copies)
    prepared = run(bundle, "a.jsonl", eval=6)
    assert prepared.eval is not None
    arrays = Store(prepared.path).arrays
    assert not set(arrays["hashes"][arrays["eval"]]) & set(arrays["hashes"][arrays["train"]])
    assert (len(set(arrays["hashes"])), prepared.eval.num_conversations) == (20, 6)


def test_evaluation_from_sources_of_its_own(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(20))
    write_rows("b.jsonl", [{"instruction": "Hello", "output": n} for n in NUMBERS[:5]])
    prepared = run(bundle, "a.jsonl", eval=["b.jsonl"])
    assert prepared.eval is not None
    assert (prepared.train.num_conversations, prepared.eval.num_conversations) == (20, 5)
    assert prepared.report["formats"] == {"a.jsonl": "messages", "b.jsonl": "alpaca"}
    assert [s["path"] for s in prepared.report["eval"]["by_source"]] == ["b.jsonl"]
    assert (prepared.report["rows"], prepared.report["held_out"], prepared.report["eval"]["rows"]) == (20, 0, 5)
    assert_adds_up(prepared.report)


def test_evaluation_rows_that_are_also_trained_are_said(here: Path, bundle: TokenizerBundle) -> None:
    said: list[str] = []
    write_rows("a.jsonl", rows_of(20))
    write_rows("b.jsonl", rows_of(10, 15))
    prepare(config("a.jsonl", eval=["b.jsonl"]), bundle, cache_dir=Path("cache"), workers=0, say=said.append)
    assert "data.eval: 5 of its 10 rows are also trained, so its loss flatters the model" in said


def test_samples_are_prompts_as_serving_would_build_them(here: Path, bundle: TokenizerBundle) -> None:
    rows = [chat("Hello", "Yes", f"Hello {number(i)}", f"No {number(i)}") for i in range(30)]
    prepared = run(bundle, write_rows("a.jsonl", rows), eval=0.1)
    assert prepared.eval is not None
    assert (len(prepared.eval.samples), len(prepared.train.samples)) == (3, 16)
    for sample in (*prepared.eval.samples, *prepared.train.samples):
        row = rows[int(sample["source"].rpartition(":")[2]) - 1]["messages"]
        assert (sample["messages"], sample["reference"]) == (row[:3], row[3]["content"])
        served = bundle.tokenizer.apply_chat_template(row[:3], add_generation_prompt=True, return_dict=False)
        assert sample["prompt_ids"] == served
    held = {prepared.eval.example(e).source for e in range(prepared.eval.num_examples)}
    assert {sample["source"] for sample in prepared.eval.samples} == held


@pytest.mark.parametrize("policy", ["auto", "all"])
def test_samples_begin_where_the_whole_answer_does(here: Path, policy: str) -> None:
    """Whatever of it is trained: a template's markers leave its first word out here, and `all` trains the prompt."""
    marking = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% set words = m['content'].split(' ') %}{{ words[0] + ' ' }}{% generation %}{{ words[1] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    bundle = load_tokenizer(str(make_tokenizer(Path("marking"), marking)))
    rows = [chat("Hello", "Yes No", f"Hello {number(i)}", "No Yes") for i in range(3)]
    prepared = run(bundle, write_rows("a.jsonl", rows), eval=0, train_on=policy)
    example = prepared.train.example(0)
    trained = bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0])
    assert trained == "No<|im_end|>Yes<|im_end|>" if policy == "auto" else trained.startswith("<|im_start|>user")
    assert len(prepared.train.samples) == 3
    for sample in prepared.train.samples:
        row = rows[int(sample["source"].rpartition(":")[2]) - 1]["messages"]
        served = bundle.tokenizer.apply_chat_template(row[:3], add_generation_prompt=True, return_dict=False)
        assert (sample["prompt_ids"], sample["reference"]) == (served, "No Yes")


def test_a_history_that_a_prompt_renders_otherwise_makes_no_sample_of_a_row_that_is_trained_whole(here: Path) -> None:
    """`all` trains the text as it stands."""
    loud = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ 'Oh ' if add_generation_prompt }}{{ m.content }}" \
           "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip
    bundle = load_tokenizer(str(make_tokenizer(Path("loud"), loud)))
    assert run(bundle, write_rows("a.jsonl", rows_of(3)), eval=0, train_on="all").train.samples == []


@pytest.mark.parametrize("policy", ["auto", "all"])
def test_samples_of_passages(here: Path, bundle: TokenizerBundle, policy: str) -> None:
    rows = [{"prompt": "one two ", "completion": "three"}] * 2
    prepared = run(bundle, write_rows("a.jsonl", rows), eval=0, train_on=policy)
    (sample, *_) = prepared.train.samples
    assert (sample["prompt"], sample["reference"], sample["messages"]) == ("one two ", "three", [])
    assert bundle.tokenizer.decode(sample["prompt_ids"]) == "one two "


def test_a_template_is_said_to_be_unread_where_all_rows_are_pairs_of_strings(
    here: Path, bundle: TokenizerBundle
) -> None:
    pair = {"prompt": "Hello ", "completion": "Yes"}
    talk = {"prompt": [{"role": "user", "content": "Hello"}], "completion": [{"role": "assistant", "content": "Yes"}]}
    for rows, unread in (([pair] * 3, True), ([pair, talk], False)):
        said: list[str] = []
        cfg = config(write_rows("a.jsonl", rows), eval=0, template="chatml")
        prepare(cfg, bundle, cache_dir=Path("cache"), workers=0, say=said.append)
        assert any(line.startswith("data.template: all rows are text or pairs of strings") for line in said) is unread


def test_files_that_are_left_out_of_a_folder_are_said(here: Path, bundle: TokenizerBundle) -> None:
    Path("d").mkdir()
    for name in ("tools", "dev_tools"):
        write_rows(f"d/{name}.jsonl", rows_of(3))
    for _ in range(2):  # prepared, and found prepared
        said: list[str] = []
        prepare(config("d", eval=0), bundle, cache_dir=Path("cache"), workers=0, say=said.append)
        assert sum("dev_tools.jsonl (validation)" in line for line in said) == 1


def test_mapped_columns_decide_the_format(here: Path, bundle: TokenizerBundle) -> None:
    rows = [{"question": "one", "answer": "two", **chat("Hello", "Yes")}] * 3
    write_rows("a.jsonl", rows)
    assert run(bundle, "a.jsonl", eval=0).report["formats"] == {"a.jsonl": "messages"}
    columns = {"question": "prompt", "answer": "completion"}
    assert run(bundle, [{"path": "a.jsonl", "columns": columns}], eval=0).report["formats"] == {
        "a.jsonl": "prompt_completion"
    }


def test_formats_are_said_aloud(here: Path, bundle: TokenizerBundle) -> None:
    said: list[str] = []
    write_rows("a.jsonl", rows_of(3))
    write_rows("b.jsonl", [{"text": "Hello"}] * 3)
    settings = config([{"path": "*.jsonl"}], eval=0)
    prepared = prepare(settings, bundle, cache_dir=Path("cache"), workers=0, say=said.append)
    assert said[:2] == ["a.jsonl: format messages, as a.jsonl:1 shows", "b.jsonl: format text, as b.jsonl:1 shows"]
    assert prepared.report["by_source"][0]["format"] == "messages, text"
    assert prepared.report["stop_tokens"][0] == "<|im_end|>"


# Publishing


def children() -> list[str]:
    """What lies in the cache beside locks."""
    return sorted(path.name for path in Path("cache").glob("*") if path.suffix != ".lock")


def forked(work: Callable[[], object]) -> int:
    """Runs the work in a forked child: its pid."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_prepare_the_same_at_once(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(300))
    pids = [forked(lambda: run(bundle, "a.jsonl")) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert len(children()) == 1
    assert run(bundle, "a.jsonl").report["rows"] == 300


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_without_locks_the_first_rename_wins(here: Path, bundle: TokenizerBundle) -> None:
    prepared = run(bundle, write_rows("a.jsonl", rows_of(5)))
    before = contents(prepared.path)
    with store_module.staged(prepared.path) as folder:
        (folder / "half").write_text("another process")
    assert contents(prepared.path) == before
    assert children() == [prepared.key]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_time_leaves_nothing_that_opens(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(1500))
    for delay in (0.02, 0.1, 0.3):
        child = forked(lambda: run(bundle, "a.jsonl"))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name in children():
            assert name.startswith(".") or store_module.is_published(Path("cache") / name)
    prepared = run(bundle, "a.jsonl")
    assert children() == [prepared.key], "what the killed ones left is cleared away"
    assert prepared.report["rows"] == 1500


def test_an_exception_on_the_way_leaves_nothing(here: Path, bundle: TokenizerBundle) -> None:
    class Interrupted(Exception):
        pass

    def say(line: str) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        prepare(config(write_rows("a.jsonl", rows_of(5))), bundle, cache_dir=Path("cache"), workers=0, say=say)
    assert children() == []


@pytest.mark.parametrize("damage", ["ids.bin", "manifest.json", "samples.json", "hashes.bin"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_store_is_prepared_again(here: Path, bundle: TokenizerBundle, damage: str, cut: bool) -> None:
    prepared = run(bundle, write_rows("a.jsonl", rows_of(5)))
    before = contents(prepared.path)
    if cut and damage != "samples.json":
        os.truncate(prepared.path / damage, 7)
    else:
        (prepared.path / damage).unlink()
    assert not store_module.is_published(prepared.path)
    assert contents(run(bundle, "a.jsonl").path) == before


@contextmanager
def small_files() -> Iterator[None]:
    """A disk that takes four kilobytes a file, as a full one would. No fixture: pytest may write to a file, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_leaves_nothing(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(400))
    with pytest.raises(DiskError, match="no space left for prepared data in cache"), small_files():
        run(bundle, "a.jsonl")
    assert children() == []


def test_a_cache_that_cannot_be_a_folder(here: Path, bundle: TokenizerBundle) -> None:
    Path("cache").write_text("a file")
    with pytest.raises(DiskError, match="cannot write prepared data into cache"):
        run(bundle, write_rows("a.jsonl", rows_of(5)))


class Dying:
    """An encoder whose process is killed at the second batch."""

    def encode_many(self, samples: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_worker_is_an_error_and_not_a_wait() -> None:
    batches = [RowBatch(0, "text", "", [Row("a:1", {"text": "Hello"})])] * 9
    with pytest.raises(WorkerError, match="a process that prepares data died"):
        list(encode_stream(batches, Dying, workers=2))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_end_with_a_killed_parent(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(5000))
    child = forked(lambda: run(bundle, "a.jsonl", workers=2))
    workers: list[int] = []
    while len(workers) < 2:
        time.sleep(0.01)
        workers = children_of(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    began = time.monotonic()
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() - began < 20
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        if fields[1] == str(parent):
            found.append(int(stat.parent.name))
    return found


def test_a_file_that_changes_while_it_is_read(here: Path, bundle: TokenizerBundle) -> None:
    write_rows("a.jsonl", rows_of(5))

    def say(line: str) -> None:
        with open("a.jsonl", "a") as file:
            file.write(json.dumps(chat("Hello", "Yes")) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config("a.jsonl"), bundle, cache_dir=Path("cache"), workers=0, say=say)


def test_histogram_bars_hold_every_length() -> None:
    bars = histogram(np.array([1, 2, 3, 50, 99, 100, 7000], dtype=np.int32))
    assert sum(bar["value"] for bar in bars) == 7
    assert len(bars) <= 20
    assert bars[-1]["to"] > 7000
    assert histogram(np.array([4], dtype=np.int32))[-1] == {
        "label": "4", "value": 1, "title": "4 to 4 tokens", "from": 4, "to": 5
    }  # fmt: skip
