"""Files, globs, folders and hub ids to rows that know their line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.sources import (
    BadRow,
    Place,
    Row,
    file_of,
    files_left_out,
    read_rows,
    source_files,
    source_fingerprint,
)
from sft.errors import DataError

A, B, C = {"text": "one"}, {"text": "two"}, {"text": "three"}


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def found(path: str, **options: Any) -> list[tuple[str, object]]:
    """(source, data) of each row; of a bad row its message."""
    return [(r.source, r.data if isinstance(r, Row) else r.message) for r in read_rows(Place(path, **options))]


def test_json_lines_know_their_line_past_empty_lines_crlf_and_a_byte_order_mark(here: Path) -> None:
    write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}\n{"text": "three"}')
    assert found("a.jsonl") == [("a.jsonl:1", A), ("a.jsonl:4", B), ("a.jsonl:5", C)]


@pytest.mark.parametrize(
    ("content", "sources"),
    [
        ('[{"text": "one"},\n {"text": "two"}, {"text": "three"}]', ["x.json:1", "x.json:2", "x.json:2[2]"]),
        ('{"version": [1][0], "no": 1}', None),
        ('{"version": 1, "data": [{"text": "one"},\n{"text": "two"},\n{"text": "three"}], "by": {"a": "]"}}',
         ["x.json:1", "x.json:2", "x.json:3"]),
        (lines(A, B, C), ["x.json:1", "x.json:2", "x.json:3"]),
        ('\ufeff  [{"text": "one"}\n,{"text": "two"}\n,{"text": "three"}\n]\n', ["x.json:1", "x.json:2", "x.json:3"]),
    ],
)  # fmt: skip
def test_json_as_an_array_as_an_object_with_a_list_and_as_lines(
    here: Path, content: str, sources: list[str] | None
) -> None:
    write("x.json", content)
    if sources is None:
        with pytest.raises(DataError, match=r"x\.json:1"):
            found("x.json")
    else:
        assert found("x.json") == list(zip(sources, [A, B, C], strict=True))


def test_an_object_with_the_keys_of_a_row_is_a_row(here: Path) -> None:
    row = {"id": 3, "messages": [{"role": "user", "content": "Hi"}]}
    write("x.json", json.dumps(row, indent=2))
    assert found("x.json") == [("x.json:1", row)]
    write("y.json", json.dumps({"traj": [A], "other": [B]}))
    assert found("y.json", columns={"traj": "messages"})[0][1]["messages"] == [A]  # type: ignore[index]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 3, "tools": [{"name": "f"}], "messages": [{"role": "user", "content": "Hi"}]},
        {"functions": [], "conversations": [{"from": "human", "value": "Hi"}]},
        {"history": [["a", "b"]], "instruction": "c", "output": "d"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_lists_that_a_row_holds_beside_its_messages_are_no_rows(here: Path, row: dict[str, Any], indent: int) -> None:
    write("x.json", json.dumps(row, indent=indent))
    assert found("x.json") == [("x.json:1", row)]


def test_lists_before_a_row_s_own_fields(here: Path) -> None:
    write("x.json", json.dumps({"apis": [{"name": "f"}], "messages": [A]}))
    assert found("x.json", columns={"apis": "tools"}) == [("x.json:1", {"tools": [{"name": "f"}], "messages": [A]})]
    with pytest.raises(DataError, match="'apis' was read as the rows, and 'messages' makes the object a row itself"):
        found("x.json")
    write("y.json", json.dumps({"tools": [{"name": "f"}], "data": [A, B]}))
    assert [data for _, data in found("y.json")] == [A, B], "the list of a wrapper"


def test_two_lists_in_one_object_are_ambiguous(here: Path) -> None:
    write("x.json", json.dumps({"train": [A], "test": [B]}))
    with pytest.raises(DataError, match="two lists in one object: 'train' and 'test'"):
        found("x.json")


def test_a_json_array_named_jsonl_is_read_as_an_array(here: Path) -> None:
    write("x.jsonl", json.dumps([A, B], indent=1))
    assert [data for _, data in found("x.jsonl")] == [A, B]


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers() | st.lists(st.text(max_size=3))),
        min_size=1, max_size=8,
    ),
    indent=st.sampled_from([None, 0, 2]),
    chunk=st.integers(1, 40),
    ascii=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_array_read_in_chunks_of_any_size_is_what_json_loads_says(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, chunk: int, ascii: bool
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "x.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.data.jsontext.CHUNK_BYTES", chunk)
        read = list(read_rows(str(path)))
    assert [r.data if isinstance(r, Row) else r for r in read] == rows
    assert len({r.source for r in read}) == len(rows)


def test_csv_with_quotes_line_breaks_and_other_delimiters(here: Path) -> None:
    write("a.csv", 'prompt,completion\n"a, ""b""","two\nlines"\n\nc,d\n')
    assert found("a.csv") == [
        ("a.csv:2", {"prompt": 'a, "b"', "completion": "two\nlines"}),
        ("a.csv:5", {"prompt": "c", "completion": "d"}),
    ]
    write("b.csv", "\ufeffprompt;completion\r\na;b\r\n")
    assert found("b.csv") == [("b.csv:2", {"prompt": "a", "completion": "b"})]
    write("c.tsv", "prompt\tcompletion\na,1\tb\n")
    assert found("c.tsv") == [("c.tsv:2", {"prompt": "a,1", "completion": "b"})]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("question;answer, in short\na;b\nc;d, e\n", {"question": "a", "answer, in short": "b"}),
        ("question;answer, in short\na;b\n", {"question": "a", "answer, in short": "b"}),
        ('question\t"answer; or, none"\nso\tc\n', {"question": "so", "answer; or, none": "c"}),
        ("q;a\n1,5;x\n2,5;y\n", {"q": "1,5", "a": "x"}),
        ("q,a\n1;5,x\n2;5,y\n", {"q": "1;5", "a": "x"}),
        ("q,a;b\n1,2;3\n", {"q": "1", "a;b": "2;3"}),
        ("text\nHello; you\n", {"text": "Hello; you"}),
        ('q;a\n"two\nlines; and, more";b\n', {"q": "two\nlines; and, more", "a": "b"}),
    ],
)
def test_what_parts_cells_is_what_fits_the_rows(here: Path, text: str, row: dict[str, str]) -> None:
    """Before: a comma in the header decided, and every row was bad."""
    assert found(write("a.csv", text))[0] == ("a.csv:2", row)


def test_a_long_csv_file_is_cut_at_any_row(here: Path) -> None:
    write("a.csv", "q;a, b\n" + '"x\ny";z\n' * 200)
    assert [data for _, data in found("a.csv")] == [{"q": "x\ny", "a, b": "z"}] * 200


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("a.txt", "Write each text as a row of a .jsonl file"), ("a.xlsx", "Save the sheet as CSV"),
        ("a.jsonl.zst", "Unpack it first"), ("a.pkl", "Pickles can hold code and are not read"),
    ],
)  # fmt: skip
def test_files_that_no_reader_knows_get_a_cure(here: Path, name: str, cure: str) -> None:
    write(f"d/{name}", "x")
    for path in (f"d/{name}", "d", f"d/{name[:1]}*"):
        with pytest.raises(DataError, match=cure):
            source_files(path)


def test_csv_trouble_names_the_line(here: Path) -> None:
    write("a.csv", 'a,b\n1,2,3\n"x"y,2\n3,4\n"open,5\n')
    assert [source for source, data in found("a.csv") if isinstance(data, str)] == ["a.csv:2", "a.csv:3", "a.csv:5"]
    assert ("a.csv:4", {"a": "3", "b": "4"}) in found("a.csv")
    write("b.csv", "a,a\n1,2\n")
    with pytest.raises(DataError, match="column 'a' appears twice"):
        found("b.csv")


def test_parquet_rows_have_numbers_and_no_foreign_nulls(here: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tools = [{"name": "f", "args": {"x": 1}}, {"name": "g", "args": {"y": None, "z": [None, {"q": None}]}}]
    rows = [{"messages": [tools[0]], "note": None}, {"messages": [tools[1]], "note": "n"}]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    assert found("a.parquet") == [
        ("a.parquet:row 1", {"messages": [{"name": "f", "args": {"x": 1}}], "note": None}),
        ("a.parquet:row 2", {"messages": [{"name": "g", "args": {"z": [None, {}]}}], "note": "n"}),
    ]
    write("broken.parquet", Path("a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"broken\.parquet: not a readable Parquet file"):
        found("broken.parquet")


def test_a_folder_that_datasets_saved_is_read(here: Path) -> None:
    import datasets

    datasets.Dataset.from_list([A, B]).save_to_disk("saved")
    assert [data for _, data in found("saved")] == [A, B]


def test_compressed_lines(here: Path) -> None:
    write("a.jsonl.gz", gzip.compress(lines(A, B).encode()))
    assert found("a.jsonl.gz") == [("a.jsonl.gz:1", A), ("a.jsonl.gz:2", B)]
    write("b.jsonl.gz", gzip.compress(lines(A, B).encode())[:-9])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read"):
        found("b.jsonl.gz")


def test_globs_and_folders_are_sorted_and_leave_other_files_out(here: Path) -> None:
    for name, row in (("d/b.jsonl", B), ("d/a.jsonl", A), ("d/sub/c.json", [C])):
        write(name, json.dumps(row))
    write("d/README.md", "# no data")
    write("d/.hidden.jsonl", lines(A))
    assert [source for source, _ in found("d")] == ["d/a.jsonl:1", "d/b.jsonl:1", "d/sub/c.json:1"]
    assert [source for source, _ in found("d/*.jsonl")] == ["d/a.jsonl:1", "d/b.jsonl:1"]
    assert [source for source, _ in found("d/**/*.json*")] == ["d/a.jsonl:1", "d/b.jsonl:1", "d/sub/c.json:1"]
    with pytest.raises(DataError, match="matches 1 paths, none of them a data file"):
        found("d/*.md")


def test_split_picks_files_of_a_folder_by_name_so_that_test_rows_are_not_trained(here: Path) -> None:
    write("d/train.jsonl", lines(A))
    write("d/test-00000.jsonl", lines(B))
    write("d/dev/x.jsonl", lines(C))
    assert found("d") == [("d/train.jsonl:1", A)]
    assert found("d", split="test") == [("d/test-00000.jsonl:1", B)]
    assert found("d", split="validation") == [("d/dev/x.jsonl:1", C)]
    with pytest.raises(DataError, match="no file for split 'tset'"):
        found("d", split="tset")


def test_files_that_a_folder_s_split_leaves_out_are_named(here: Path) -> None:
    for name in ("tools.jsonl", "dev_tools.jsonl", "more/test.jsonl", "notes.txt"):
        write(f"d/{name}", lines(A))
    assert list(files_left_out("d")) == [
        "d: left out, since by their names they belong to another split than 'train': dev_tools.jsonl (validation), "
        "more/test.jsonl (test). To read one, name the file itself as a source"
    ]
    (said,) = files_left_out("d", "validation")
    assert "tools.jsonl (train)" in said
    for number in range(9):
        write(f"e/{number}-test.jsonl", lines(A))
    write("e/train.jsonl", lines(A))
    (said,) = files_left_out("e")
    assert "4-test.jsonl (test) and 4 more." in said
    for whole in ("d/*.jsonl", "d/tools.jsonl", "d/more"):
        assert list(files_left_out(whole, "test")) == []


def touch(*names: str, folder: str = "clone") -> None:
    for name in names:
        write(f"{folder}/{name}", lines(A))


def read(split: str = "train", subset: str | None = None, folder: str = "clone") -> list[str]:
    return [str(file.relative_to(folder)) for file in source_files(folder, split, subset)]


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: train_gen
    path: data/train_gen-*
  - split: test_sft
    path: data/test_sft-*
dataset_info:
  features: []
---
# A set
"""
SHARDS = [f"data/{name}-00000-of-00001.jsonl" for name in ("train_sft", "train_gen", "test_sft", "test_gen")]


@pytest.mark.parametrize("readme", [True, False])
def test_splits_of_a_clone_are_told_apart(here: Path, readme: bool) -> None:
    """Before: train_sft and train_gen were trained together, and `split: train_sft` found no file."""
    touch(*SHARDS)
    if readme:
        write("clone/README.md", README)
    with pytest.raises(DataError, match=r"several splits begin with 'train': train_gen, train_sft\. Set split to one"):
        read()
    assert read("train_sft") == SHARDS[:1]
    assert read("train_gen") == SHARDS[1:2]
    assert read("test_sft") == SHARDS[2:3]
    with pytest.raises(DataError, match=r"no file for split 'train_stf'.* Did you mean 'train_sft'\?"):
        read("train_stf")
    said = list(files_left_out("clone", "train_sft"))
    assert "train_gen-00000-of-00001.jsonl (train_gen)" in said[-1]
    if readme:  # of the files, those that it names
        assert read("test") == SHARDS[2:3]
        assert said[0] == f"clone: left out, since they belong to another subset, or to none: {SHARDS[3]}"


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        ("train_sft.jsonl test_sft.jsonl", "train", "train_sft.jsonl"),
        ("train_1.jsonl train_2.jsonl", "train", "train_1.jsonl train_2.jsonl"),
        ("train.part1.jsonl train-part2.jsonl", "train", "train-part2.jsonl train.part1.jsonl"),
        ("train-00000-of-00002.jsonl train-00001-of-00002.jsonl train_old-00000-of-00001.jsonl", "train",
         "train-00000-of-00002.jsonl train-00001-of-00002.jsonl"),
        ("train-00000-of-00001.jsonl train_old-00000-of-00001.jsonl", "train_old", "train_old-00000-of-00001.jsonl"),
        ("math_train.jsonl code_train.jsonl math_test.jsonl", "train", "code_train.jsonl math_train.jsonl"),
        ("tools.jsonl train_sft.jsonl", "train", "tools.jsonl train_sft.jsonl"),
        ("magpie-00000-of-00001.jsonl other-00000-of-00001.jsonl", "magpie", "magpie-00000-of-00001.jsonl"),
        ("a.jsonl b.jsonl", "train", "a.jsonl b.jsonl"),
        ("train_sft/a.jsonl train_gen/a.jsonl", "train_sft", "train_sft/a.jsonl"),
        ("train_100k-00000-of-00001.jsonl train_10k-00000-of-00001.jsonl", "train_10k",
         "train_10k-00000-of-00001.jsonl"),
        ("train/a.jsonl train/b.jsonl validation/a.jsonl", "valid", "validation/a.jsonl"),
    ],
)  # fmt: skip
def test_a_split_is_a_name_or_its_beginning(here: Path, names: str, split: str, chosen: str) -> None:
    touch(*names.split())
    assert read(split) == sorted(chosen.split())


def test_a_split_that_no_name_tells_is_not_ignored(here: Path) -> None:
    touch("a.jsonl", "b.jsonl")
    with pytest.raises(DataError, match=r"no file for split 'magpie' among a\.jsonl"):
        read("magpie")


PARTS = [f"data/{name}/train-00000-of-00001.jsonl" for name in ("all", "everyday", "magpie")]


def test_a_subset_is_a_folder(here: Path) -> None:
    """Before: "set but not read", and all three were trained, many rows twice."""
    touch(*PARTS)
    assert read(subset="magpie") == PARTS[2:]
    assert read() == PARTS
    with pytest.raises(DataError, match=r"no subset 'magpi': its folders are .*Did you mean 'magpie'\?"):
        read(subset="magpi")
    assert [row for row, _ in found("clone", subset="all")] == [f"clone/{PARTS[0]}:1"]


@pytest.mark.parametrize(
    "data_files",
    ["data/{}/train-*", '["data/{}/train-*"]', "{{train: data/{}/*}}", "[{{split: train, path: [data/{}/train-*]}}]",
     "data/{}/**", "data/{}"],
)  # fmt: skip
def test_a_subset_is_what_the_readme_says(here: Path, data_files: str) -> None:
    touch(*PARTS, "extra.jsonl")
    named = [("all", "all"), ("tiny", "everyday"), ("magpie", "magpie")]
    configs = "".join(f"- config_name: {name}\n  data_files: {data_files.format(part)}\n" for name, part in named)
    write("clone/README.md", f"---\nlicense: mit\nconfigs:\n{configs}tags: [x]\n---\nText\n")
    assert read(subset="tiny") == PARTS[1:2]
    with pytest.raises(DataError, match=r"its README names several subsets: all, tiny, magpie\. Set subset to one"):
        read()
    with pytest.raises(DataError, match=r"no subset 'everyday' with files here; its README names all, tiny, magpie"):
        read(subset="everyday")
    write("clone/README.md", f"---\nconfigs:\n{configs}  default: true\n---\n")
    assert read() == PARTS[2:]


@pytest.mark.parametrize(
    "head",
    ["", "# A set\n", "---\nlicense: mit\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs:\n- {{\n---\n",
     "---\nconfigs:\n- config_name: default\n  data_files: nowhere/*\n---\n"],
)  # fmt: skip
def test_a_readme_that_says_nothing_of_these_files_changes_nothing(here: Path, head: str) -> None:
    touch("train.jsonl", "test.jsonl")
    write("clone/README.md", head)
    assert read() == ["train.jsonl"]


def test_what_is_not_there_is_said_with_the_nearest_name(here: Path) -> None:
    write("pirate.jsonl", lines(A))
    with pytest.raises(DataError, match=r"pirat\.jsonl: no such file .* Did you mean 'pirate\.jsonl'\?"):
        source_files("pirat.jsonl")
    with pytest.raises(DataError, match="no reader for this kind of file"):
        source_files(write("a.txt", "x"))
    Path("empty").mkdir()
    with pytest.raises(DataError, match="no data files in this folder"):
        source_files("empty")


def test_a_hub_id_that_cannot_be_had_says_what_to_check(here: Path) -> None:
    assert source_files("someone/no-such-data") == []
    with pytest.raises(
        DataError, match=r"no-such-data: .*\(split 'train', subset 'main', revision 'abc'\) .*offline: connect to"
    ):
        found("someone/no-such-data", subset="main", revision="abc")


def test_columns_rename_and_an_unknown_one_lists_those_seen(here: Path) -> None:
    write("a.jsonl", lines({"question": "q", "answer": "a", "prompt": "hidden"}, {"question": "q2"}))
    mapping = {"question": "prompt", "answer": "completion"}
    assert [data for _, data in found("a.jsonl", columns=mapping)] == [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q2"},
    ]
    with pytest.raises(DataError, match=r"no column 'qestion' .* columns seen: question, answer, prompt. Did you mean"):
        found("a.jsonl", columns={"qestion": "prompt"})
    with pytest.raises(DataError, match="two columns are mapped to 'prompt'"):
        found("a.jsonl", columns={"question": "prompt", "answer": "prompt"})


def test_a_mapped_column_replaces_a_namesake_only_where_a_row_has_it(here: Path) -> None:
    write("a.jsonl", lines({"context": "c", "input": "i"}, {"input": "i"}, {"context": None, "input": "i"}))
    assert [data for _, data in found("a.jsonl", columns={"context": "input"})] == [
        {"input": "c"}, {"input": "i"}, {"input": None}
    ]  # fmt: skip


def test_columns_can_swap_names(here: Path) -> None:
    write("a.jsonl", lines({"prompt": "1", "completion": "2"}))
    swapped = found("a.jsonl", columns={"prompt": "completion", "completion": "prompt"})
    assert swapped == [("a.jsonl:1", {"completion": "1", "prompt": "2"})]


def test_limit_counts_rows_over_all_files(here: Path) -> None:
    write("d/a.jsonl", lines(A, B))
    write("d/b.jsonl", lines(C, A))
    assert [data for _, data in found("d", limit=3)] == [A, B, C]


def test_the_fingerprint_follows_content_and_settings_not_dates(here: Path) -> None:
    import os

    write("a.jsonl", lines(A, B))
    before = source_fingerprint("a.jsonl")
    os.utime("a.jsonl", (1, 1))
    assert source_fingerprint("a.jsonl") == before
    assert source_fingerprint(Place("a.jsonl", limit=1)) != before
    assert source_fingerprint(Place("a.jsonl", columns={"text": "prompt"})) != before
    write("a.jsonl", lines(A, C))
    assert source_fingerprint("a.jsonl") != before


@pytest.mark.parametrize(
    ("source", "file"),
    [("d/a.jsonl:17", "d/a.jsonl"), ("a.json:1[3]", "a.json"), ("a.parquet:row 4", "a.parquet"), ("a.csv", "a.csv")],
)
def test_the_file_of_a_row(source: str, file: str) -> None:
    assert file_of(source) == file


def test_a_bad_row_is_no_row() -> None:
    assert not isinstance(BadRow("a:1", "x"), Row)


def test_columns_that_make_up_a_format_go_before_others_wherever_a_source_is_read(here: Path) -> None:
    from sft.config import Source
    from sft.data.pipeline import Dealer

    write("a.jsonl", lines({"question": "q", "answer": "a", "messages": [{"role": "user", "content": "Hi"}]}))
    source = Source(path="a.jsonl", columns={"question": "prompt", "answer": "completion"})
    assert [batch.format for batch in Dealer(lambda line: None, {}).read(source, 0)] == ["prompt_completion"]
    assert list(Dealer(lambda line: None, {}).read(source, 0, most=0)) == []
