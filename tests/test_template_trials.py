"""The oracle of `scripts/templates` tells wrong masks from right ones: it is made to fail."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatcases import bpe_tokenizer
from conftest import CHATML

from sft.data.encode import Encoder, EncodeSettings
from sft.data.formats import FORMATS
from sft.data.readers import Row
from sft.tokenizer import TokenizerBundle, load_tokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "templates.py"


@pytest.fixture(scope="module")
def trials() -> Any:
    spec = importlib.util.spec_from_file_location("template_trials", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["template_trials"] = module  # where dataclasses look their annotations up
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TokenizerBundle:
    return load_tokenizer(str(bpe_tokenizer(tmp_path_factory.mktemp("bpe"), CHATML, None, "<|im_end|>", ())))


def test_it_tells_right_from_wrong(trials: Any, bundle: TokenizerBundle) -> None:
    row = trials.SHAPES["system prompt"]
    (example,) = Encoder(bundle, EncodeSettings()).encode(FORMATS["messages"](Row("a:1", row))).examples
    trained = np.flatnonzero(example.weights_T)
    first, last = trained[0], trained[-1]

    def verdict(change: Any, ids: Any = None) -> str:
        weights = example.weights_T.copy()
        change(weights)
        changed = replace(example, weights_T=weights, input_ids_T=example.input_ids_T if ids is None else ids)
        found: str = trials.wrong(bundle.tokenizer, {}, row, [changed], set(bundle.stop_ids))
        return found

    def at(place: int, weight: float) -> Any:
        return lambda weights: weights.__setitem__(place, weight)

    assert verdict(lambda weights: None) == ""
    assert "follow its served prompt" in verdict(at(first - 1, 1.0)), "a token of the header"
    assert verdict(at(first, 0.0)), "an answer without its beginning"
    assert "no stop token" in verdict(at(last, 0.0)), "an answer that is not trained to stop"
    assert "no stop token" in verdict(at(last + 1, 1.0)), "what follows the stop token"
    assert verdict(lambda weights: weights.__setitem__(slice(first, first + 200), 0.0)), "a turn is missing"
    assert verdict(lambda weights: weights.fill(1.0)), "all of it"
    ids = example.input_ids_T.copy()
    ids[5] = ids[6]
    assert "follow its served prompt" in verdict(lambda weights: None, ids)


def test_words_that_no_prompt_holds_are_found(trials: Any, tmp_path: Path) -> None:
    """A template that drops the system prompt: what is trained is what is served, and still not what was asked for."""
    template = CHATML.replace("message['content']", "(message['content'] if message['role'] != 'system' else '')")
    silent = load_tokenizer(str(bpe_tokenizer(tmp_path / "bpe", template, None, "<|im_end|>", ())))
    row = trials.SHAPES["system prompt"]
    sample = FORMATS["messages"](Row("a:1", {"messages": row["messages"]}))
    encoder = Encoder(silent, EncodeSettings())
    encoder.renderers({})[1].judge = lambda given: []  # type: ignore[method-assign]  # as if nobody looked
    found = trials.wrong(silent.tokenizer, {}, row, encoder.encode(sample).examples, set(silent.stop_ids))
    assert "the words of message 0 are not in the prompt" in found


def test_cures_are_read_as_lines_to_paste(trials: Any) -> None:
    told = 'Set data.template: chatml-tools, or model.new_tokens: ["[e~["], or data.layers: merge_into_system.'
    assert trials.named_keys(told) == [
        ("data.template=chatml-tools",), ('model.new_tokens=["[e~["]',), ("data.layers=merge_into_system",),
    ]  # fmt: skip
    assert trials.named_keys("`data.reasoning: close` with `data.template_args: {a: true}` (so)") == [
        ("data.reasoning=close", "data.template_args={a: true}")
    ]


def verdict_on(trials: Any, tokenizer: Any, head: str, tail: str = "") -> str:
    """Of an answer with other text between its served prompt and its words."""
    row = trials.SHAPES["one turn"]
    messages = row["messages"]
    server = trials.Server(tokenizer, {}, row, (False, False))
    stop = tokenizer.eos_token
    prompt = server.text(messages[:1], prompt=True)
    told: str = trials.not_rendered(
        server, messages, messages, 1, prompt, f"{head}Mostly on Rottnest.{tail}{stop}", stop
    )
    return told


@pytest.mark.parametrize(
    ("template", "stop", "right", "others"),
    [
        ("deepseek_r1_prefill", "<｜end▁of▁sentence｜>", "\n</think>\n\n",
         ["</think>", "\n</thought>\n\n", "\n</think>\n\nWell: ", "Hm.\n</think>\n\n", "\n\n", ""]),
        ("reasoning/closed_markers", "<|im_end|>", "<|START_RESPONSE|>",
         ["<|END_THINKING|><|START_RESPONSE|>", "<|START_RESPONSE|>Well: ", "assistant\n<|START_RESPONSE|>"]),
        ("reasoning/ends_only", "<|im_end|>", "\n\n<say>", ["</think>\n\n<say>", "<say>", "\n\n<say>Well: "]),
        ("reasoning/open_think", "<|im_end|>", "\n</think>\n\n",
         ["\n\n</think>\n\n", "\n</think>\n\nWell: ", "Hm.\n</think>\n\n", "<think>\n", ""]),
    ],
)  # fmt: skip
def test_what_may_stand_before_an_answer(
    trials: Any, tmp_path: Path, template: str, stop: str, right: str, others: list[str]
) -> None:
    text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(str(bpe_tokenizer(tmp_path / "bpe", text, None, stop, ()))).tokenizer
    tail = "<|END_RESPONSE|>" if "RESPONSE" in right else ""
    assert verdict_on(trials, tokenizer, right, tail) == ""
    for head in others:
        assert "stands before the answer" in verdict_on(trials, tokenizer, head, tail), head
