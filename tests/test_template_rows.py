"""Which rows a template needs, what is said of them, and which an adapter trains."""

from __future__ import annotations

from pathlib import Path

from conftest import make_tokenizer

from sft.model import cold_reason
from sft.setup import template_tokens
from sft.tokenizer import load_tokenizer

BUILT = (
    "{% for m in messages %}{{ '<|mine_' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|mine_' + 'assistant' + '|>' }}{% endif %}"
)


def test_a_token_that_the_template_builds_is_one_it_needs(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(BUILT)
    bundle = load_tokenizer(str(make_tokenizer(tmp_path / "base")), template=str(tmp_path / "mine.jinja"))
    assert {"<|mine_user|>", "<|mine_assistant|>", "<|im_end|>"} <= set(template_tokens(bundle))
    assert "<|im_start|>" not in template_tokens(bundle), "control: a token of another template"


def test_the_warning_names_a_cure_only_where_there_is_one() -> None:
    assert cold_reason(False, 20) == "cure: model.warm_start_tokens: auto"
    assert "names no end-of-text token" in cold_reason(True, None)
    assert "end-of-text row, to start from, is new or looks untrained" in cold_reason(True, 20)
