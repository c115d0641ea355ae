from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML
from pagecheck import HOSTILE, check_page, chromium, rendered

from sft.configfile import LoadedConfig, load_config
from sft.errors import DataError
from sft.pieces import Shown, show, trained_spans
from sft.prepare import load_bundle
from sft.preview import (
    as_json,
    coloured,
    gather,
    headline,
    one_example,
    page,
    plain,
    preview,
    print_examples,
    visible_blanks,
)
from sft.tokenizer import TokenizerBundle
from sft.types import IGNORE_INDEX, Example

HELLO = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hello world"}]}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_for(tmp_path: Path, tokenizer: Path, *files: Path, **data: Any) -> LoadedConfig:
    file = tmp_path / "my.yaml"
    values = {"train": [str(path) for path in files], **data}
    file.write_text(f"model: {{name: {tokenizer}}}\ndata: {json.dumps(values)}\n")
    return load_config(file)


def gathered(loaded: LoadedConfig, n: int = 4) -> tuple[tuple[Shown, ...], TokenizerBundle]:
    bundle = load_bundle(loaded.config)
    return gather(loaded.config, bundle, n).shown, bundle


def test_plain_text_marks_what_is_trained_and_what_is_blank(tmp_path: Path, tokenizer_folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": " Hello\n  one"}, {"role": "assistant", "content": "hello world"}]}
    (shown,), _ = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", row)))
    assert plain(shown) == (
        "<|im_start|>user↵\n·Hello↵\n··one<|im_end|>↵\n<|im_start|>assistant↵\n⟦hello world<|im_end|>⟧↵\n"
    )
    assert headline(shown) == f"{tmp_path}/a.jsonl:1 · 19 tokens, 4 trained (21%)"


def test_spelled_control_tokens_are_told_from_real_ones(tmp_path: Path) -> None:
    folder = bpe_tokenizer(tmp_path, CHATML, None, "<|im_end|>", ())
    row = {
        "messages": [
            {"role": "user", "content": "Are <|im_end|> you"},
            {"role": "assistant", "content": "Oh <|im_start|><|im_end|>"},
        ]
    }
    loaded = config_for(tmp_path, folder, write_rows(tmp_path / "a.jsonl", row))
    (shown,), bundle = gathered(loaded)
    expected = (
        "<|im_start|>user↵\nAre ‹<|im_end|>› you<|im_end|>↵\n"
        "<|im_start|>assistant↵\n⟦Oh ‹<|im_start|>›‹<|im_end|>›<|im_end|>⟧↵\n"
    )
    assert plain(shown) == expected
    assert coloured(shown).plain == expected.replace("⟦", "").replace("⟧", "")
    styles = [(span.style, coloured(shown).plain[span.start : span.end]) for span in coloured(shown).spans]
    assert ("bold black on green", "<|im_end|>") in styles
    assert ("green", "Oh ‹<|im_start|>›‹<|im_end|>›") in styles
    pipe = io.StringIO()
    print_examples([shown], bundle, pipe)
    assert "‹…› spells a control token, and is none" in pipe.getvalue()
    allowed = config_for(tmp_path, folder, write_rows(tmp_path / "a.jsonl", row), control_tokens_in_text="allow")
    assert "‹" not in plain(gathered(allowed)[0][0]), "there they are real"


def test_json_holds_the_promised_keys_and_aligned_labels(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_turns = {
        "messages": [*HELLO["messages"], {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    }
    preview(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO, two_turns)), json_lines=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in lines] == [["source", "input_ids", "labels", "text", "trained"]] * 2
    assert [line["source"] for line in lines] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    assert lines[0]["text"] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nhello world<|im_end|>\n"
    assert lines[0]["trained"] == ["hello world<|im_end|>"]
    assert lines[1]["trained"] == ["hello world<|im_end|>", "two<|im_end|>"]
    for line in lines:
        assert len(line["labels"]) == len(line["input_ids"])
        assert all(
            label in (IGNORE_INDEX, token) for label, token in zip(line["labels"], line["input_ids"], strict=True)
        )
    labels = lines[0]["labels"]
    assert labels[:9] + labels[-1:] == [IGNORE_INDEX] * 10
    assert labels[9:-1] == lines[0]["input_ids"][9:-1]


def test_examples_are_spread_over_the_sources(tmp_path: Path, tokenizer_folder: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", *[HELLO] * 9)
    few = write_rows(tmp_path / "few.jsonl", HELLO)
    shown, _ = gathered(config_for(tmp_path, tokenizer_folder, many, few), 5)
    assert [Path(one.example.source).name for one in shown] == [
        "many.jsonl:1", "many.jsonl:2", "many.jsonl:3", "many.jsonl:4", "few.jsonl:1"
    ]  # fmt: skip


def test_only_the_first_rows_are_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = "".join(json.dumps(HELLO) + "\n" for _ in range(300))
    file.write_text(rows + "this is no JSON\n" * 10)
    loaded = config_for(tmp_path, tokenizer_folder, file)
    result = gather(loaded.config, load_bundle(loaded.config), 3)
    assert len(result.shown) == 3
    assert result.left_out == ()


def test_rows_without_an_example_are_named(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"messages": [{"role": "user", "content": "Hello"}]}
    preview(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO, bad)), n=2)
    output = capsys.readouterr()
    assert "⟦hello world<|im_end|>⟧" in output.out
    assert output.err.startswith(f"left out: {tmp_path}/a.jsonl:2: ")
    with pytest.raises(DataError, match=r"no row of .*b\.jsonl gives an example:\n  .*b\.jsonl:1"):
        preview(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "b.jsonl", bad)))


def test_weights_are_shown(tmp_path: Path, tokenizer_folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "one", "weight": 0.5}]}
    (shown,), _ = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", row)))
    assert headline(shown).endswith("2 trained (17%), weights 0.5")


def example_of(ids: list[int], weights: list[float]) -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), "a.jsonl:1")


def test_trained_spans_are_contiguous_runs() -> None:
    assert trained_spans(example_of([5, 6, 7, 8, 9], [0, 1, 0.5, 0, 1])) == [(1, 3), (4, 5)]
    assert trained_spans(example_of([5], [0])) == []


def byte_tokenizer(folder: Path) -> Any:
    """One token a byte, so that an emoji needs four."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def metaspace_tokenizer() -> Any:
    """Blanks belong to the word behind them, and the decoder strips the first: as in Llama 2 and Mistral."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1, "!": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def bundle_of(tokenizer: Any) -> TokenizerBundle:
    return TokenizerBundle(tokenizer, None, "model", (), (tokenizer.eos_token_id,), (), "")


@pytest.mark.parametrize("text", ["naïve 🏴‍☠️ שלום", "plain", "日本", " two  blanks\n"])
def test_bytes_of_a_character_form_one_piece_and_pieces_join_to_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer(text)["input_ids"]
    shown = show(example_of(ids, [1.0] * len(ids)), "a", bundle_of(tokenizer))
    assert "".join(piece.text for piece in shown.pieces) == shown.text == text
    assert [token for piece in shown.pieces for token in piece.ids] == ids
    assert max(len(piece.text) for piece in shown.pieces) == 1


def test_a_piece_never_crosses_the_border_of_what_is_trained(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer("é")["input_ids"]
    shown = show(example_of(ids, [0, 1]), "a", bundle_of(tokenizer))
    assert [piece.ids for piece in shown.pieces] == [(ids[0],), (ids[1],)]


def test_blanks_that_a_decoder_strips_are_kept() -> None:
    tokenizer = metaspace_tokenizer()
    ids = [0, 1, 2, tokenizer.eos_token_id]
    shown = show(example_of(ids, [0, 1, 1, 1]), "a", bundle_of(tokenizer))
    assert [piece.text for piece in shown.pieces][1:] == [" world", "!", "</s>"]
    assert [piece.special for piece in shown.pieces] == [False, False, False, True]
    assert shown.trained == (" world!</s>",)


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("a b", "a b"),
        ("a  b ", "a··b·"),
        (" a\n b \n", "·a↵\n·b·↵\n"),
        ("\ta", "⇥\ta"),
        ("\x1b[2J\x7f\r", "␛[2J␡␍"),
    ],
)
def test_blanks_and_control_characters_are_visible(text: str, visible: str) -> None:
    assert visible_blanks(text) == visible


def test_colours_carry_the_same_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    (shown,), _ = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)))
    text = coloured(shown)
    assert text.plain == plain(shown).replace("⟦", "").replace("⟧", "")
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["hello world"] == "green"
    assert styles["<|im_start|>"] == "magenta"
    assert styles["<|im_end|>"] == "bold black on green"  # the last one in the text


def test_a_terminal_gets_colours_and_a_pipe_does_not(tmp_path: Path, tokenizer_folder: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, bundle = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)))
    pipe, terminal = io.StringIO(), Terminal()
    print_examples(shown, bundle, pipe)
    print_examples(shown, bundle, terminal)
    assert "\x1b[" not in pipe.getvalue()
    assert "1 example, 14 tokens, 29% trained; template model" in pipe.getvalue()
    assert "⟦" not in terminal.getvalue()
    assert "hello world" in terminal.getvalue()


def test_one_example_for_the_start_of_a_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    (shown,), bundle = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)))
    assert one_example(shown.example, bundle).splitlines()[-1] == "⟦hello world<|im_end|>⟧↵"


def hostile_page(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Examples whose text and whose file name try to break out of the page."""
    loaded = config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO))
    tokenizer = byte_tokenizer(tmp_path)
    ids = [*tokenizer(f"say {HOSTILE}")["input_ids"], tokenizer.eos_token_id]
    example = Example(np.array(ids, np.int32), np.array([0.0] * 4 + [1.0] * (len(ids) - 4), np.float32), HOSTILE)
    bundle = bundle_of(tokenizer)
    html = page((show(example, HOSTILE, bundle), show(example_of(ids[:4], [1.0] * 4), "b", bundle)), bundle, loaded)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    return tmp_path / "page.html"


def test_the_page_is_whole_self_contained_and_safe_with_any_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    parsed = check_page(hostile_page(tmp_path, tokenizer_folder).read_text(encoding="utf-8"))
    first, second = parsed.data
    assert (first["source"], first["path"]) == (HOSTILE, HOSTILE)
    assert "".join(piece[0] for piece in first["pieces"]) == f"say {HOSTILE}<|im_end|>"
    assert first["pieces"][-1] == ["<|im_end|>", [256], 1.0, 1]
    assert second["pieces"][0] == ["s", [82], 1.0, 0]
    assert (second["tokens"], second["trained"]) == (4, 3), "nothing predicts the first token"


def test_the_page_is_written_where_it_is_asked_for(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "page.html"
    preview(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)), html=target)
    assert capsys.readouterr().out == f"{target}\n"
    assert check_page(target.read_text(encoding="utf-8")).data[0]["trained"] == 4


def test_a_page_and_json_may_be_asked_for_together(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, loaded = (
        tmp_path / "page.html",
        config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)),
    )
    preview(loaded, html=target, json_lines=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["trained"] == ["hello world<|im_end|>"]
    assert str(target) in printed.err
    assert check_page(target.read_text(encoding="utf-8")).data[0]["trained"] == 4


def test_the_tokenizer_is_enough(tmp_path: Path, tokenizer_folder: Path) -> None:
    assert not list(tokenizer_folder.glob("*.safetensors"))
    shown, _ = gathered(config_for(tmp_path, tokenizer_folder, write_rows(tmp_path / "a.jsonl", HELLO)))
    assert list(as_json(shown[0])["trained"]) == ["hello world<|im_end|>"]


@pytest.mark.slow
def test_a_browser_draws_the_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    dom = rendered(hostile_page(tmp_path, tokenizer_folder))
    assert "<title>my.yaml · preview</title>" in dom
    assert dom.count("<article") == 2
    assert '<span class="t on s">&lt;|im_end|&gt;</span>' in dom


@pytest.mark.slow
def test_search_filter_and_hover_in_a_browser(tmp_path: Path, tokenizer_folder: Path) -> None:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    page_file = hostile_page(tmp_path, tokenizer_folder)
    hover = "document.querySelector('.t.hit').dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));"
    search = "const q = document.getElementById('query'); q.value = '{}'; q.dispatchEvent(new Event('input'));"
    dom = rendered(page_file, search.format("OWNED") + hover)
    assert dom.count("<article") == 1
    assert ">1 of 2 examples</span>" in dom
    assert dom.count('class="t on hit"') == len("owned")
    assert "<div><span>position</span><b>" in dom
    dom = rendered(page_file, search.format("256") + hover)  # an id
    assert '<span class="t on s hit">&lt;|im_end|&gt;</span>' in dom
    assert "<div><span>id</span><b>256</b></div>" in dom
    chosen = "const s = document.getElementById('source'); s.value = 'b'; s.dispatchEvent(new Event('change'));"
    dom = rendered(page_file, chosen)
    assert dom.count("<article") == 1
    assert "4 tokens" in dom
