"""Bad rows of every kind: an error with `file:line` that lists them, or an exact ledger; in bounded time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.config import Config
from sft.data.folding import Folded, Kind
from sft.data.loader import Prepared, prepare
from sft.data.readers import Row
from sft.data.sources import Place, read_rows
from sft.errors import DataError
from sft.tokenizer import TokenizerBundle, load_tokenizer

GOOD = b'{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]}'

ROWS: list[tuple[str, bytes, str]] = [
    ("not JSON", b"Hello", "malformed JSON: Expecting value at character 1"),
    ("single quotes", b"{'messages': []}", "malformed JSON"),
    ("trailing comma", GOOD[:-1] + b",}", "malformed JSON"),
    ("two objects on a line", GOOD + GOOD, "malformed JSON: Extra data"),
    ("cut in the middle", GOOD[:40], "malformed JSON: Expecting ':' delimiter"),
    ("a list", b"[1, 2]", "a row must be an object {…}, this is a list: [1, 2]"),
    ("null", b"null", "this is null"),
    ("a number", b"17", "this is a number: 17"),
    ("a bare NaN", b"NaN", "this is NaN"),
    ("an empty object", b"{}", "messages: a list of {role, content} is missing"),
    ("a key twice", b'{"messages": [], "messages": [1]}', "the key 'messages' appears twice"),
    ("a role twice", GOOD.replace(b'"user"', b'"user", "role": "tool"'), "the key 'role' appears twice"),
    ("messages null", b'{"messages": null}', "messages: a list of {role, content} is missing"),
    ("messages text", b'{"messages": "Hello"}', 'messages = "Hello": is text, expected a list'),
    ("messages empty", b'{"messages": []}', "messages = []: is an empty list"),
    ("content null", GOOD.replace(b'"Yes"', b"null"), "messages[1].content: is null"),
    ("content missing", GOOD.replace(b', "content": "Yes"', b""), "messages[1].content: is null"),
    ("content a number", GOOD.replace(b'"Yes"', b"6"), "messages[1].content = 6: is a number, expected text"),
    ("content NaN", GOOD.replace(b'"Yes"', b"NaN"), "messages[1].content = NaN: is NaN"),
    ("content an object", GOOD.replace(b'"Yes"', b'{"a": 1}'), 'messages[1].content = {"a": 1}: is an object'),
    ("unknown role", GOOD.replace(b"user", b"usr"), 'messages[0].role = "usr": unknown role'),
    ("role null", GOOD.replace(b'"user"', b"null"), "messages[0].role: is missing"),
    ("no answer", b'{"messages": [{"role": "user", "content": "Hello"}]}', "no assistant message among user"),
    ("another format", b'{"text": "Hello"}', "looks like text, but a.jsonl:1 made the file's format messages"),
    ("lone surrogate", GOOD.replace(b"Yes", rb"Yes \ud83d"), "lone surrogate (U+D83D)"),
    ("not UTF-8", GOOD.replace(b"Yes", b"Yes \xff"), "not UTF-8 at byte"),
    ("bottomless", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("bottomless and cut", b'{"a":' * 100_000, "nested too deeply"),
    ("a huge number", b'{"messages": ' + b"9" * 5000 + b"}", "4300 digits"),
    ("zero bytes", b"\0" * 300, "malformed JSON"),
    ("train in words", GOOD.replace(b'"Yes"', b'"Yes", "train": "no"'), 'messages[1].train = "no": is text'),
    ("weight below 0", GOOD.replace(b'"Yes"', b'"Yes", "weight": -1'), "messages[1].weight = -1"),
    ("five megabytes of nothing", b"x" * 5_000_000, "malformed JSON"),
    ("an endless string", b'{"messages": "' + b'\\"' * 2_500_000, "malformed JSON: Unterminated string"),
]
HARMLESS: list[tuple[str, bytes]] = [
    ("an emoji as two escapes", GOOD.replace(b"Yes", rb"Yes \ud83d\ude00")),
    ("right to left", GOOD.replace(b"Yes", "Yes שלום".encode())),
    ("NaN where nobody looks", GOOD[:-1] + b', "score": NaN}'),
    ("deep where nobody looks", GOOD[:-1] + b', "tree": ' + b"[" * 300 + b"]" * 300 + b"}"),
    ("blanks around", b"  \t" + GOOD + b"  "),
    ("a byte-order mark inside, as joined files have", b"\xef\xbb\xbf" + GOOD),
]


@pytest.fixture(scope="module")
def bundle(tokenizer_folder: Path) -> TokenizerBundle:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(bundle: TokenizerBundle, train: Any, **data: Any) -> Prepared:
    settings = Config(model={"name": "m"}, data={"train": train, "eval": 0, "max_tokens": 512, **data})  # type: ignore[arg-type]
    return prepare(settings, bundle, cache_dir=Path("cache"), workers=0, say=lambda line: None)


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(*rows: bytes, name: str = "a.jsonl", end: bytes = b"\n") -> str:
    Path(name).write_bytes(b"\n".join(rows) + end)
    return name


@pytest.mark.parametrize(("raw", "message"), [pytest.param(raw, m, id=name) for name, raw, m in ROWS])
def test_a_bad_row_stops_with_its_line_or_is_in_the_ledger(bundle: TokenizerBundle, raw: bytes, message: str) -> None:
    source = write(GOOD, raw, GOOD, GOOD)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        run(bundle, source)
    text = str(caught.value)
    assert text.startswith("1 bad row of 4:\n  a.jsonl:2: "), text
    assert message in text
    assert "data.on_bad_row: skip" in text
    assert len(text) < 700, "values are cut"

    prepared = run(bundle, source, on_bad_row="skip", max_dropped=0.25)
    assert time.monotonic() - began < 10
    (entry,) = ledger(prepared.path / "data_report.jsonl")
    assert (entry["source"], entry["line"], entry["action"], entry["reason"]) == ("a.jsonl:2", 2, "dropped", "bad_row")
    assert message in entry["detail"]
    report = prepared.report
    assert (report["rows"], report["kept"], report["dropped"]) == (4, 3, {"bad_row": 1})
    assert [prepared.train.example(e).source for e in range(3)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in HARMLESS])
def test_harmless_rows_are_kept(bundle: TokenizerBundle, raw: bytes) -> None:
    assert run(bundle, write(GOOD, raw)).report["kept"] == 2


def test_a_cut_last_line(bundle: TokenizerBundle) -> None:
    for length in range(1, len(GOOD)):
        (_, row) = read_rows(write(GOOD, GOOD[:length], end=b""))
        assert not isinstance(row, Row)
        assert row.source == "a.jsonl:2"
        assert "the file ends inside this row: it is cut" in row.message, (length, row.message)
    assert len(list(read_rows(write(GOOD, GOOD, end=b"")))) == 2


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["b.jsonl", "b.json", "b.csv"])
def test_an_empty_file(bundle: TokenizerBundle, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: the file holds no rows"):
        run(bundle, name)
    prepared = run(bundle, [write(GOOD), name], on_bad_row="skip", max_dropped=0.5)
    assert (prepared.report["rows"], prepared.report["kept"]) == (2, 1)
    assert ledger(prepared.path / "data_report.jsonl")[0]["source"] == name


@pytest.mark.parametrize("name", ["b.json", "b.csv", "b.parquet"])
def test_a_file_with_a_header_and_no_rows(bundle: TokenizerBundle, name: str) -> None:
    if name == "b.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": pa.array([], pa.string())}), name)
    else:
        Path(name).write_text({"b.json": "[]", "b.csv": "prompt,completion\n"}[name])
    with pytest.raises(DataError, match=f"{name}: the file holds no rows"):
        run(bundle, name)


@pytest.mark.parametrize(("name", "encoding"), [("b.jsonl", "utf-16"), ("b.csv", "utf-16"), ("b.json", "utf-16")])
def test_utf16_is_named_with_the_cure(bundle: TokenizerBundle, name: str, encoding: str) -> None:
    Path(name).write_bytes(GOOD.decode().encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: is UTF-16, not UTF-8. Convert it: iconv"):
        run(bundle, name)


def test_an_array_goes_on_behind_a_bad_element(bundle: TokenizerBundle) -> None:
    elements = [GOOD, b'{"messages": tru}', b"17", b'{"a": "]}{["}', b'{"b": 1, "b": 2}', GOOD]
    Path("a.json").write_bytes(b"[" + b",\n".join(elements) + b"]")
    rows = [(row.source, isinstance(row, Row)) for row in read_rows("a.json")]
    assert rows == [
        ("a.json:1", True), ("a.json:2", False), ("a.json:3", False), ("a.json:4", True), ("a.json:5", False),
        ("a.json:6", True),
    ]  # fmt: skip


def test_an_array_that_is_cut(bundle: TokenizerBundle) -> None:
    whole = b"[" + GOOD + b",\n" + GOOD + b"]"
    for length in range(2, len(whole)):
        Path("a.json").write_bytes(whole[:length])
        *_, last = read_rows("a.json")
        assert not isinstance(last, Row), length
        assert "is cut" in last.message, (length, last.message)
    Path("a.json").write_bytes(b"[" + GOOD + b"\n" + GOOD + b"]")
    with pytest.raises(DataError, match=r"a\.json:2: expected ',' or '\]' after a row"):
        list(read_rows("a.json"))


def test_bytes_that_are_no_text_in_csv_and_in_an_array_name_their_row(bundle: TokenizerBundle) -> None:
    Path("a.csv").write_bytes(b"prompt,completion\none,two\none,\xfftwo\none,two\n")
    with pytest.raises(DataError, match=r"1 bad row of 3:\n  a\.csv:3: completion = .*lone surrogate"):
        run(bundle, "a.csv")
    Path("a.json").write_bytes(b"[" + GOOD + b",\n" + GOOD.replace(b"Yes", b"\xff") + b"]")
    with pytest.raises(DataError, match=r"1 bad row of 2:\n  a\.json:2: messages\[1\]\.content.*lone surrogate"):
        run(bundle, "a.json")


def test_a_bad_first_row_does_not_decide_the_format(bundle: TokenizerBundle) -> None:
    prepared = run(bundle, write(b'{"id": 1}', b'{"messages": [1]}', *[GOOD] * 8), on_bad_row="skip", max_dropped=0.2)
    assert prepared.report["formats"] == {"a.jsonl": "messages"}
    details = [entry["detail"] for entry in ledger(prepared.path / "data_report.jsonl")]
    assert "no format fits a row with the keys id" in details[0]
    assert "messages[0] = 1: is a number" in details[1]


def test_wrong_types_after_ten_thousand_good_rows(bundle: TokenizerBundle) -> None:
    source = write(*[b'{"text": "one two"}'] * 10_000, b'{"text": 12}', b'{"text": ["one"]}')
    with pytest.raises(DataError, match=r"2 bad rows of 10,002:\n  a\.jsonl:10001: text = 12: is a number"):
        run(bundle, source)
    assert run(bundle, source, on_bad_row="skip").report["kept"] == 10_000


def test_all_bad_rows_are_counted_and_listed_in_a_file(bundle: TokenizerBundle) -> None:
    with pytest.raises(DataError) as caught:
        run(bundle, write(*[GOOD, b"{"] * 300))
    text = str(caught.value)
    assert text.startswith("300 bad rows of 600:\n  a.jsonl:2, 4, 6 and 297 more ranges (300 rows): malformed JSON")
    assert text.count("a.jsonl") == 1
    assert "Each one is listed in cache/" in text
    listed = next(word for word in text.split() if word.endswith("data_report.jsonl."))
    assert [entry["line"] for entry in ledger(Path(listed.rstrip(".")))] == list(range(2, 601, 2))


def test_what_repeats_itself_is_told_once_with_its_rows(bundle: TokenizerBundle) -> None:
    """Before: twenty lines, most of them "the same"."""
    alike = b'{"question": "one", "answer": "two"}'
    wrong = [GOOD.replace(b"user", role) for role in (b"usr", b"usrr")]
    source = write(*[alike] * 3, GOOD, *wrong, GOOD, alike, b"[1]")
    with pytest.raises(DataError) as caught:
        run(bundle, source)
    first, one, two, three, *_ = str(caught.value).splitlines()
    assert first == "7 bad rows of 9:"
    assert one.startswith("  a.jsonl:1-3 (3 rows): no format fits a row with the keys question, answer.")
    assert two.startswith('  a.jsonl:5-6 (2 rows), the first: messages[0].role = "usr": unknown role.')
    assert three.startswith("  a.jsonl:8: messages: a list of {role, content} is missing")
    kinds = caught.value.bad_rows
    assert [(kind["rows"], kind["where"]) for kind in kinds] == [
        (3, "a.jsonl:1-3"), (2, "a.jsonl:5-6"), (1, "a.jsonl:8"), (1, "a.jsonl:9"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        (["a.jsonl:3", "a.jsonl:4", "a.jsonl:6"], "a.jsonl:3-4, 6"),
        (["a.jsonl:3", "b.jsonl:4", "b.jsonl:5"], "a.jsonl:3, b.jsonl:4-5"),
        (["a.parquet:row 1", "a.parquet:row 2"], "a.parquet:row 1-2"),
        (["a.json:1", "a.json:1[1]", "a.json:2"], "a.json:1, a.json:1[1], a.json:2"),
        ([f"a.jsonl:{n}" for n in range(0, 20, 2)], "a.jsonl:0, 2, 4 and 7 more ranges"),
        ([f"a.jsonl:{n}" for n in (1, 3, 5, 7)], "a.jsonl:1, 3, 5 and 1 more range"),
        (["a.jsonl"], "a.jsonl"),
    ],
)
def test_rows_as_ranges(sources: list[str], where: str) -> None:
    kind = Kind(sources[0], "x")
    for source in sources:
        kind.add(source, "x")
    assert kind.where() == where


@given(st.lists(st.integers(0, 40), max_size=60), st.sampled_from([0, 1, 3]))
def test_folding_loses_no_row(numbers: list[int], kinds: int) -> None:
    folded = Folded()
    for number in numbers:
        folded.add(f"a.jsonl:{number}", "abcd"[number % (kinds + 1)])
    assert sum(kind["rows"] for kind in folded.as_list()) == folded.rows == len(numbers)
    named = set()
    for kind in folded.as_list():
        for part in kind["where"].removeprefix("a.jsonl:").split(", "):
            start, _, end = part.partition("-")
            named |= set(range(int(start), int(end or start) + 1))
    assert named == set(numbers)


def test_kinds_are_bounded_and_the_rest_is_counted() -> None:
    folded = Folded()
    for number in range(3000):
        folded.add(f"a.jsonl:{number}", "x" * (number % 1500))
    assert list(folded.lines())[-1] == "… and 2,960 more for other reasons"


def test_too_many_drops_stop_whatever_the_reason(bundle: TokenizerBundle) -> None:
    long = GOOD.replace(b"Yes", b"six " * 600)
    source = write(*[GOOD] * 16, long, long, long, b"{")
    with pytest.raises(DataError) as caught:
        run(bundle, source, on_bad_row="skip", max_dropped=0.15)
    text = str(caught.value)
    assert text.startswith("4 of 20 rows (20.0%) were dropped, more than data.max_dropped = 0.15:\n")
    assert "a.jsonl: 20 rows, dropped 3 over_long, 1 bad_row" in text
    assert "data.max_tokens" in text
    assert "data.over_long: keep_turns or truncate" in text
    assert "\n  a.jsonl:20: malformed JSON" in text
    prepared = run(bundle, source, on_bad_row="skip", max_dropped=0.2)
    assert prepared.report["dropped"] == {"over_long": 3, "bad_row": 1}
    assert len(ledger(prepared.path / "data_report.jsonl")) == 4


def test_prompts_that_fill_max_tokens_under_truncate_get_another_cure(bundle: TokenizerBundle) -> None:
    """Before: "set data.over_long: truncate", which was set."""
    source = write(*[GOOD.replace(b"Hello", b"six " * 600)] * 3, GOOD)
    with pytest.raises(DataError) as caught:
        run(bundle, source, over_long="truncate")
    assert "set data.over_long" not in str(caught.value)
    assert "raise data.max_tokens, for their prompts alone fill it, or shorten the prompts" in str(caught.value)


def test_over_long_as_an_error_is_a_bad_row(bundle: TokenizerBundle) -> None:
    source = write(GOOD, GOOD.replace(b"Yes", b"six " * 600))
    with pytest.raises(DataError, match=r"1 bad row of 2:\n  a\.jsonl:2: ") as caught:
        run(bundle, source, over_long="error")
    cure = "Raise data.max_tokens, or set data.over_long: drop, keep_turns or truncate"
    assert str(caught.value).splitlines()[-1] == cure
    with pytest.raises(DataError) as caught:
        run(bundle, write(GOOD.replace(b"Yes", b"six " * 600), b"{"), over_long="error")
    also = "repair or remove them, or set data.on_bad_row: skip to leave them out"
    assert str(caught.value).splitlines()[-1] == f"{cure}; {also}"


def test_cut_rows_are_counted_by_source(bundle: TokenizerBundle) -> None:
    write(GOOD, name="a.jsonl")
    write(GOOD, GOOD.replace(b"Yes", b"six " * 600), name="b.jsonl")
    report = run(bundle, ["a.jsonl", "b.jsonl"], over_long="truncate").report
    assert (report["cut"], [source["cut"] for source in report["by_source"]]) == (1, [0, 1])


def test_nothing_left_says_why(bundle: TokenizerBundle) -> None:
    with pytest.raises(DataError, match=r"no row is left of 1 from a\.jsonl \(1 over_long\)"):
        run(bundle, write(GOOD.replace(b"Yes", b"six " * 600)), max_dropped=1.0)


def test_a_five_megabyte_row_is_dropped_in_bounded_time(bundle: TokenizerBundle) -> None:
    rows = [*[GOOD] * 3, GOOD.replace(b"Yes", b"helicopters " * 420_000), GOOD]
    began = time.monotonic()
    prepared = run(bundle, write(*rows), max_dropped=0.2)
    assert time.monotonic() - began < 30
    assert prepared.report["dropped"] == {"over_long": 1}
    assert ledger(prepared.path / "data_report.jsonl")[0]["line"] == 4
    Path("a.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    began = time.monotonic()
    assert [row.source for row in read_rows("a.json") if isinstance(row, Row)][3:] == ["a.json:4", "a.json:5"]
    assert time.monotonic() - began < 2


def test_a_chat_of_a_hundred_thousand_turns_is_dropped_in_bounded_time(bundle: TokenizerBundle) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}] * 50_000
    source = write(GOOD, json.dumps({"messages": turns}).encode(), GOOD)
    began = time.monotonic()
    prepared = run(bundle, source, max_dropped=0.5)
    assert time.monotonic() - began < 60
    assert prepared.report["dropped"] == {"over_long": 1}


def test_a_line_without_end_is_refused_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.data.readers.MAX_ROW_BYTES", 2**20)
    write(GOOD, b'{"text": "' + b"six " * 5_000_000 + b'"}', GOOD)
    tracemalloc.start()
    rows = list(read_rows("a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(row, Row) for row in rows] == [True, False, True]
    assert rows[1].source == "a.jsonl:2"
    assert rows[2].source == "a.jsonl:3"
    assert peak < 8 * 2**20
    Path("a.json").write_bytes(b"[" + GOOD + b",\n" + b'{"text": "' + b"six " * 5_000_000)
    with pytest.raises(DataError, match=r"a\.json:2: a row of more than 1 MiB, or one never closed"):
        list(read_rows("a.json"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_reading_holds_a_few_rows_at_a_time(name: str) -> None:
    count, text = 12_000, "one two three " * 30
    if name == "a.jsonl":
        Path(name).write_text(f'{{"text": "{text}"}}\n' * count)
    elif name == "a.json":
        Path(name).write_text("[" + ",\n".join([f'{{"text": "{text}"}}'] * count) + "]")
    elif name == "a.csv":
        Path(name).write_text("text\n" + f"{text}\n" * count)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [f"{i} {text}" for i in range(count)]}), name, row_group_size=500)
    assert sum(1 for _ in read_rows(Place(name, limit=100))) == 100  # imports do not count
    tracemalloc.start()
    assert sum(isinstance(row, Row) for row in read_rows(name)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * 2**20, "the file has 5 MB of text"
