"""A row's own arguments for the template, rows that hold rendered templates, and BOS of the built-in templates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatcases import answer, bpe_tokenizer, conversation, user
from conftest import CHATML, make_tokenizer

from sft.data.encode import Encoder, EncodeSettings
from sft.data.formats import FORMATS
from sft.data.heldout import content_hash
from sft.data.readers import Row
from sft.data.rowargs import MOST_KEPT, ByArguments
from sft.data.samples import sample_record
from sft.errors import DataError
from sft.serving import check_serving, prompt_difference
from sft.templating import RESERVED
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Passage

THINKING = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
PREFILLED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and mode is defined %}{{ '[' + mode + '] ' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode is defined %}{{ '[' + mode + '] ' }}{% endif %}{% endif %}"
)


def row(**data: Any) -> Any:
    told = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    return FORMATS["messages"](Row("a.jsonl:7", {"messages": told, **data}))


@pytest.fixture
def bundle(tmp_path: Path) -> TokenizerBundle:
    return load_tokenizer(str(bpe_tokenizer(tmp_path / "t", PREFILLED, None, "<|im_end|>", ())))


def texts(bundle: TokenizerBundle, encoded: Any) -> list[str]:
    return [bundle.tokenizer.decode(example.input_ids_T) for example in encoded.examples]


@pytest.mark.parametrize("given", [{"mode": "fast"}, '{"mode": "fast"}', {"mode": "fast", "other": None}])
def test_a_row_s_arguments_are_given_to_the_template(bundle: TokenizerBundle, given: Any) -> None:
    encoder = Encoder(bundle, EncodeSettings())
    encoded = encoder.encode_many([row(chat_template_kwargs=given), row()])
    assert texts(bundle, encoded[0])[0].endswith("assistant\n[fast] Hi.<|im_end|>\n")
    assert texts(bundle, encoded[1])[0].endswith("assistant\nHi.<|im_end|>\n"), "control: the next row has none"
    assert [e.notes for e in encoded] == [(), ()]


def test_they_go_over_those_of_the_config(tmp_path: Path) -> None:
    folder = bpe_tokenizer(tmp_path / "t", PREFILLED, None, "<|im_end|>", ())
    bundle = load_tokenizer(str(folder), template_args={"mode": "slow"})
    encoder = Encoder(bundle, EncodeSettings(template_args={"mode": "slow"}))
    for given, mode in ((None, "slow"), ({"mode": "fast"}, "fast")):
        (text,) = texts(bundle, encoder.encode(row(chat_template_kwargs=given)))
        assert f"[{mode}] Hi." in text


def test_what_the_template_never_reads_is_named(bundle: TokenizerBundle) -> None:
    encoded = Encoder(bundle, EncodeSettings()).encode(row(chat_template_kwargs={"mode": "fast", "depth": 3}))
    assert [(n.action, n.reason) for n in encoded.notes] == [("unread", "chat_template_kwargs.depth")]


@pytest.mark.parametrize("name", [*RESERVED])
def test_names_that_are_not_for_a_row_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl:7: chat_template_kwargs\.{name} = "):
        row(chat_template_kwargs={name: "x"})


@pytest.mark.parametrize("value", [3, [1], "[1]", "{"])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:7: chat_template_kwargs"):
        row(chat_template_kwargs=value)


def test_arguments_are_part_of_what_a_row_says() -> None:
    plain, fast, slow = row(), row(chat_template_kwargs={"mode": "fast"}), row(chat_template_kwargs={"mode": "slow"})
    assert len({content_hash(sample) for sample in (plain, fast, slow)}) == 3
    assert content_hash(plain) == content_hash(row(chat_template_kwargs={}))
    assert content_hash(plain) == 4519595544895132789, "rows without keep the hash they had before"


def test_many_sets_of_arguments_are_not_all_kept(bundle: TokenizerBundle) -> None:
    encoder = Encoder(bundle, EncodeSettings())
    rows = [row(chat_template_kwargs={"mode": f"m{i}"}) for i in range(3 * MOST_KEPT)]
    assert all(f"[m{i}] " in texts(bundle, one)[0] for i, one in enumerate(encoder.encode_many(rows)))
    assert len(encoder.renderers.kept) == MOST_KEPT
    made: list[Any] = []
    kept: ByArguments[int] = ByArguments(lambda given: made.append(given) or len(made))  # type: ignore[func-returns-value]
    assert kept({"a": 1, "b": 2}) == kept({"b": 2, "a": 1}) == 1


def test_serving_is_asked_with_the_row_s_arguments(tmp_path: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = PREFILLED
    tokenizer.save_pretrained(model)
    bundle = load_tokenizer(str(model))
    encoder, sample = Encoder(bundle, EncodeSettings()), row(chat_template_kwargs={"mode": "one"})
    record = sample_record(sample, encoder.encode(sample).examples[-1].input_ids_T, encoder)
    assert record is not None
    assert record["template_args"] == {"mode": "one"}
    assert prompt_difference(tokenizer, record, {}) is None
    assert prompt_difference(tokenizer, {**record, "template_args": {}}, {}) is not None, "control"
    result = check_serving(model, [record], max_new_tokens=2)
    assert (result["ids_equal"], result["row_template_args"]) == (1, [{"mode": "one"}])


# -- rendered templates


def passage(prompt: str, completion: str) -> Passage:
    return Passage(prompt, completion, "a.jsonl:1", "completion" if prompt else "text")


RENDERED = [
    passage("", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"),
    passage("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "one<|im_end|>"),
    passage("Hello", "one<|im_end|>"),
    passage("<s>[INST] Hello [/INST]", "one"),
]


@pytest.mark.parametrize("sample", RENDERED)
def test_a_rendered_template_is_told_and_ends_once(tokenizer_folder: Path, sample: Passage) -> None:
    bundle = load_tokenizer(str(tokenizer_folder))
    told = Encoder(bundle, EncodeSettings()).encode(sample)
    assert "rendered_template" in [note.reason for note in told.notes]
    allowed = Encoder(bundle, EncodeSettings(control_tokens_in_text="allow")).encode(sample)
    assert not allowed.notes
    (example,) = allowed.examples
    text = bundle.tokenizer.decode(example.input_ids_T)
    assert text.endswith("one<|im_end|>")
    assert example.weights_T[-1] == 1
    assert text.count("<|im_end|>") == max(1, (sample.prompt + sample.completion).count("<|im_end|>"))


@pytest.mark.parametrize("sample", [passage("", "one two"), passage("Hello", "one"), passage("a <|im_end|> b", "one")])
def test_plain_text_is_no_rendered_template(tokenizer_folder: Path, sample: Passage) -> None:
    """Negative control: a token in the middle is text that speaks of it."""
    bundle = load_tokenizer(str(tokenizer_folder))
    for mode in ("text", "allow"):
        encoded = Encoder(bundle, EncodeSettings(control_tokens_in_text=mode)).encode(sample)
        assert "rendered_template" not in [note.reason for note in encoded.notes]
        assert encoded.examples[0].input_ids_T[-1] == bundle.stop_ids[0]


def test_an_answer_that_brings_its_end_token_ends_once(tokenizer_folder: Path) -> None:
    bundle = load_tokenizer(str(tokenizer_folder))
    sample = conversation(user("Hello"), answer("one<|im_end|>\n"), user("Yes"), answer("two <|im_end|> three"))
    allowed = Encoder(bundle, EncodeSettings(control_tokens_in_text="allow")).encode(sample)
    assert [note.reason for note in allowed.notes] == ["end_token_once"]
    (text,) = texts(bundle, allowed)
    assert "assistant\none<|im_end|>\n<|im_start|>user" in text
    assert "two <|im_end|> three<|im_end|>" in text, "a token within is the row's own"
    told = Encoder(bundle, EncodeSettings()).encode(sample)
    assert "rendered_template" in [note.reason for note in told.notes]


@pytest.mark.usefixtures("own_cache")
def test_check_and_prepare_warn_of_rendered_templates(model: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"<|im_start|>user\nHello {i}<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"} for i in range(9)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model": {"name": str(model)}, "data": {"train": str(tmp_path / "r.jsonl")}}))

    def said(command: str, *more: str) -> str:
        ran = [sys.executable, "-m", "sft", command, str(config), *more]
        done = subprocess.run(ran, capture_output=True, text=True, check=False, cwd=tmp_path)
        return " ".join((done.stdout + done.stderr).split())

    warning = "9 of 9 rows hold what a chat template writes"
    for command in ("prepare", "check"):
        assert warning in said(command)
    assert "Set data.control_tokens_in_text: allow" in said("check")
    assert warning not in said("check", "data.control_tokens_in_text=allow"), "control"


# -- BOS of the built-in templates


@pytest.fixture
def dressed(tmp_path: Path) -> Callable[[bool], Path]:
    """A tokenizer that puts `<s>` before every text, or only has one."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    def made(puts: bool) -> Path:
        folder = bpe_tokenizer(tmp_path / str(puts), CHATML, "<s>", "</s>", ())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if puts:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        tokenizer.save_pretrained(folder)
        return Path(folder)

    return made


@pytest.mark.parametrize("template", ["zephyr", "tulu"])
def test_built_in_templates_begin_as_the_tokenizer_begins_texts(dressed: Callable[[bool], Path], template: str) -> None:
    own = Path(__file__).parent.parent / "sft" / "templates" / f"{template}.jinja"
    for puts in (True, False):
        bundle = load_tokenizer(str(dressed(puts)), template=template)
        encoded = Encoder(bundle, EncodeSettings()).encode(
            conversation(user("Hello"), answer("one"), user("a"), answer("b"))
        )
        (example,) = encoded.examples
        bos = bundle.tokenizer.bos_token_id
        assert example.input_ids_T.tolist().count(bos) == puts
        assert (example.input_ids_T[0] == bos) == puts
        if not puts:
            assert bundle.template == own.read_text(), "what a run of before was fingerprinted by"


def test_a_base_without_bos_keeps_its_template(tmp_path: Path) -> None:
    bundle = load_tokenizer(str(make_tokenizer(tmp_path)), template="zephyr")
    assert replace(bundle).template == load_tokenizer(str(tmp_path), template="zephyr").template
    assert "bos_token" not in (bundle.template or "")
