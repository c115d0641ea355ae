"""Answers behind prompts that end in a closed or an open reasoning block: what is trained, what is refused, what cures.

Every expectation is a literal, and every prompt is compared with `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chatcases import CALL, TOOLS, bpe_tokenizer, conversation
from pydantic import ValidationError

from sft.config import Config
from sft.data.cures import Cures, template_arguments
from sft.data.encode import Encoder, EncodeSettings
from sft.data.loader import encode_settings
from sft.data.outcome import Encoded
from sft.data.reasoning import Choice
from sft.data.samples import sample_record
from sft.data.thoughts import (
    derived_closing,
    drop_reasoning,
    is_closed,
    is_opening,
    reasoning_of,
    shared_length,
    split_content,
)
from sft.data.trials import Trials
from sft.resume import differences, fingerprint
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

FOLDER = Path(__file__).parent / "templates"
STOPS = {"closed_channel": "<turn|>", "deepseek_r1_prefill": "<｜end▁of▁sentence｜>"}


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, thoughts: str = "", **extra: Any) -> Message:
    return Message("assistant", text, {**({"reasoning_content": thoughts} if thoughts else {}), **extra})


PLAIN = conversation(user("What is two plus two?"), answer("It is four."))
TURNS = conversation(user("Two plus two?"), answer("It is four."), user("And three?"), answer("It is six."))
THOUGHT = conversation(user("What is two plus two?"), answer("It is four.", "Two and two."))
SPELLED = conversation(user("What is two plus two?"), answer("<think>\nTwo and two.\n</think>\n\nIt is four."))
AGENT = conversation(
    user("Weather in Paris?"), answer("", "I must look.", tool_calls=[CALL]),
    Message("tool", "sunny", {"name": "get_weather", "tool_call_id": "call00001"}),
    answer("It is sunny.", "It says so."),
    user("Thanks!"), answer("You are welcome.", "They are polite."), tools=TOOLS,
)  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def bundle(name: str, arguments: tuple[tuple[str, Any], ...] = ()) -> TokenizerBundle:
        (file,) = FOLDER.rglob(f"{name}.jinja")
        folder = tmp_path_factory.mktemp(name)
        bpe_tokenizer(folder, file.read_text(encoding="utf-8"), None, STOPS.get(name, "<|im_end|>"), ())
        return load_tokenizer(str(folder), template_args=dict(arguments))

    return bundle


def encoded(bundle: TokenizerBundle, sample: Conversation, reasoning: Choice | None = None) -> Encoded:
    return Encoder(bundle, EncodeSettings(reasoning=reasoning)).encode(sample)


def seen(
    bundle: TokenizerBundle, sample: Conversation, reasoning: Choice | None = None, arguments: Mapping[str, Any] = {}
) -> list[tuple[str, str, str]]:
    """Of each example: the end of what serving asks, what is context behind it, and what is trained; proven."""
    result = encoded(bundle, sample, reasoning)
    assert result.examples, result.notes
    given = drop_reasoning(sample)[0] if reasoning == "drop" else sample
    turns = [i for i, m in enumerate(given.messages) if m.role == "assistant"]
    assert len(turns) == len(result.examples), "one example a turn"
    found = []
    for k, example in zip(turns, result.examples, strict=True):
        ids, trained = example.input_ids_T.tolist(), (example.weights_T > 0).tolist()
        served = bundle.tokenizer.apply_chat_template(
            [m.as_dict() for m in given.messages[:k]], tools=list(given.tools) or None, add_generation_prompt=True,
            return_dict=False, **arguments,
        )  # fmt: skip
        start = trained.index(True)
        end = len(trained) - trained[::-1].index(True)
        assert ids[: len(served)] == served
        assert start >= len(served)
        assert all(trained[start:end])
        assert not bundle.tokenizer.decode(ids[end:]).strip()
        prompt = bundle.tokenizer.decode(served)
        texts = (bundle.tokenizer.decode(part) for part in (ids[len(served) : start], ids[start:end]))
        found.append((prompt[prompt.rindex("<|im_start|>" if "<|im_start|>" in prompt else "<") :], *texts))
    return found


def reasons(result: Encoded) -> list[str]:
    return [note.reason for note in result.notes]


# -- closed blocks


def test_the_answer_follows_a_closed_block_that_the_template_leaves_out(load: Any) -> None:
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    bundle = load("closed_think")
    assert seen(bundle, TURNS) == [(prompt, "", "It is four.<|im_end|>"), (prompt, "", "It is six.<|im_end|>")]
    (note,) = encoded(bundle, TURNS).notes
    assert (note.action, note.reason) == ("altered", "closed_block")
    assert "message 1: the served prompt ends with '<think>\\n\\n</think>\\n\\n', a closed block" in note.detail


def test_an_empty_channel_is_a_closed_block(load: Any) -> None:
    bundle = load("closed_channel")
    (example,) = encoded(bundle, PLAIN).examples
    text = bundle.tokenizer.decode(example.input_ids_T)
    assert (
        text
        == "<|turn>user\nWhat is two plus two?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>It is four.<turn|>"
    )
    assert bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0]) == "It is four.<turn|>"


def test_what_the_template_writes_before_an_answer_is_trained_behind_the_block(load: Any) -> None:
    assert seen(load("closed_markers"), PLAIN) == [
        ("<|im_start|>assistant\n<|START_THINKING|><|END_THINKING|>", "",
         "<|START_RESPONSE|>It is four.<|END_RESPONSE|><|im_end|>")
    ]  # fmt: skip


def test_reasoning_cannot_follow_a_closed_block_unless_it_is_dropped(load: Any) -> None:
    bundle = load("open_think", (("enable_thinking", False),))
    (note,) = encoded(bundle, THOUGHT).notes
    assert (note.action, note.reason) == ("refused", "not_after_prompt")
    assert "message 1 has reasoning, but no reasoning can follow its generation prompt" in note.detail
    assert "`data.reasoning: drop` (its reasoning is left out)" in note.detail
    assert "`data.template_args: {enable_thinking: true}`" in note.detail
    assert "close" not in note.detail.partition("What works")[2], "it would leave the same to be refused"
    prompt = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    found = seen(bundle, THOUGHT, "drop", {"enable_thinking": False})
    assert found == [(prompt, "", "It is four.<|im_end|>")]
    assert reasons(encoded(bundle, THOUGHT, "drop")) == ["reasoning_dropped", "closed_block"]


# -- open blocks


def test_without_the_key_an_open_block_refuses_an_answer_without_reasoning(load: Any) -> None:
    (note,) = encoded(load("open_think"), PLAIN).notes
    assert (note.action, note.reason) == ("refused", "not_after_prompt")
    assert note.detail == (
        "message 1 has no reasoning, and its generation prompt opens a block of it with '<think>\\n': whether the "
        "model is to think is for you to say. What works for it, as tried: `data.reasoning: close` (the answer closes "
        "the block first: the model is taught to answer without thinking); or `data.template_args: {enable_thinking: "
        "false}` (prompts then end with '|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n')."
    )


@pytest.mark.parametrize("choice", ["train", "context"])
def test_neither_train_nor_context_invents_a_closing(load: Any, choice: Choice) -> None:
    assert reasons(encoded(load("open_think"), PLAIN, choice)) == ["not_after_prompt"]


@pytest.mark.parametrize("choice", ["close", "drop"])
def test_close_lets_an_answer_begin_with_the_template_s_closing_text(load: Any, choice: Choice) -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    assert seen(load("open_think"), TURNS, choice) == [
        (prompt, "", "\n</think>\n\nIt is four.<|im_end|>"), (prompt, "", "\n</think>\n\nIt is six.<|im_end|>")
    ]  # fmt: skip
    assert reasons(encoded(load("open_think"), TURNS, choice)) == ["reasoning_closed"]


@pytest.mark.parametrize(
    ("choice", "context", "trained"),
    [
        (None, "", "Two and two.\n</think>\n\nIt is four.<|im_end|>"),
        ("train", "", "Two and two.\n</think>\n\nIt is four.<|im_end|>"),
        ("close", "", "Two and two.\n</think>\n\nIt is four.<|im_end|>"),
        ("context", "Two and two.\n</think>\n\n", "It is four.<|im_end|>"),
        ("drop", "", "\n</think>\n\nIt is four.<|im_end|>"),
    ],
)
def test_reasoning_behind_an_open_block(load: Any, choice: Choice | None, context: str, trained: str) -> None:
    assert seen(load("open_think"), THOUGHT, choice) == [("<|im_start|>assistant\n<think>\n", context, trained)]


def test_words_may_open_reasoning(load: Any) -> None:
    prompt = "<|im_start|>assistant\nHere are my reasoning steps:\n"
    bundle = load("open_words")
    assert reasons(encoded(bundle, PLAIN)) == ["not_after_prompt"]
    assert seen(bundle, PLAIN, "close") == [(prompt, "", "\n[BEGIN FINAL RESPONSE]\nIt is four.<|im_end|>")]
    assert seen(bundle, THOUGHT, "train") == [
        (prompt, "", "Two and two.\n[BEGIN FINAL RESPONSE]\nIt is four.<|im_end|>")
    ]


@pytest.mark.parametrize("sample", [THOUGHT, SPELLED])
def test_a_template_that_never_renders_reasoning_has_it_behind_its_opening(load: Any, sample: Conversation) -> None:
    """DeepSeek R1, QwQ: the closing is the counterpart of the opening, with its blanks."""
    bundle = load("deepseek_r1_prefill")
    end = "It is four.<｜end▁of▁sentence｜>"

    def trained(choice: Choice, given: Conversation) -> str:
        (example,) = encoded(bundle, given, choice).examples
        served = bundle.tokenizer.apply_chat_template(
            [given.messages[0].as_dict()], add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids_T[: len(served)].tolist() == served
        return str(bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0]))

    (note,) = encoded(bundle, sample).notes
    assert note.reason == "not_after_prompt"
    assert "`data.reasoning: train` (its reasoning is trained)" in note.detail
    assert trained("train", sample) == "Two and two.\n</think>\n\n" + end
    assert trained("context", sample) == end
    assert trained("drop", sample) == trained("close", PLAIN) == "\n</think>\n\n" + end


def test_train_refuses_reasoning_that_the_template_leaves_out(load: Any) -> None:
    bundle = load("chatml_plain")
    for choice in (None, "train", "context", "close"):
        (note,) = encoded(bundle, THOUGHT, choice).notes
        assert (note.action, note.reason) == ("refused", "reasoning_left_out"), choice
        assert "`data.reasoning: drop`" in note.detail
    assert reasons(encoded(bundle, THOUGHT, "drop")) == ["reasoning_dropped"]
    assert encoded(bundle, THOUGHT, "drop").examples


def test_a_block_that_the_template_closes_itself_is_said(load: Any, tmp_path: Path) -> None:
    (file,) = FOLDER.rglob("open_think.jinja")
    text = file.read_text().replace(
        "{%- if m.reasoning_content and (loop.index0 > ns.last or keep_thinking) %}", "{%- if true %}"
    )
    bpe_tokenizer(
        tmp_path, text.replace("+ m.reasoning_content +", "+ (m.reasoning_content or '') +"), None, "<|im_end|>", ()
    )
    bundle = load_tokenizer(str(tmp_path))
    assert reasons(encoded(bundle, PLAIN)) == ["reasoning_closed"]
    assert reasons(encoded(bundle, THOUGHT)) == [], "control"
    assert reasons(encoded(load("closed_think"), PLAIN)) == ["closed_block"], "control: no opening"


# -- several turns


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("choice", [None, "train", "context", "drop", "close"])
def test_three_turns_with_tools_are_as_served(load: Any, choice: Choice | None, kept: bool) -> None:
    """Whether earlier reasoning is dropped from history or kept, each turn stands behind its own served prompt."""
    arguments = {"keep_thinking": kept}
    bundle = load("open_think", tuple(arguments.items()))
    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    opened = "<|im_start|>assistant\n<think>\n"
    texts = [("I must look.", call), ("It says so.", "It is sunny.<|im_end|>"),
             ("They are polite.", "You are welcome.<|im_end|>")]  # fmt: skip
    result = encoded(bundle, AGENT, choice)
    if len(result.examples) == 1:  # where history keeps reasoning, one sequence serves all
        assert kept
        assert choice in (None, "train", "context", "close")
        (example,) = result.examples
        trained = bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0])
        parts = [words if choice == "context" else f"{thoughts}\n</think>\n\n{words}" for thoughts, words in texts]
        assert trained == "".join(parts)
        return
    expected = []
    for thoughts, words in texts:
        if choice == "drop":
            expected.append((opened, "", f"\n</think>\n\n{words}"))
        elif choice == "context":
            expected.append((opened, f"{thoughts}\n</think>\n\n", words))
        else:
            expected.append((opened, "", f"{thoughts}\n</think>\n\n{words}"))
    assert seen(bundle, AGENT, choice, arguments) == expected


def test_a_prompt_whose_history_the_turn_forgets(load: Any) -> None:
    """gpt-oss: reasoning before a call is served with its result, and left out once the answer is there."""
    found = seen(load("forgets_analysis"), AGENT)
    assert found[1] == (
        "<|im_start|>assistant", "",
        "<|channel|>analysis<|message|>It says so.<|end|><|im_start|>assistant<|channel|>final<|message|>It is sunny."
        "<|im_end|>",
    )  # fmt: skip
    assert len(found) == 3


# -- controls


@pytest.mark.parametrize("choice", [None, "train", "context", "drop", "close"])
@pytest.mark.parametrize(
    ("name", "sample"),
    [("neither", PLAIN), ("neither", THOUGHT), ("leaky_closing", PLAIN), ("reasoning_behind", PLAIN),
     ("reasoning_behind", THOUGHT)],
)  # fmt: skip
def test_what_is_neither_open_nor_closed_is_refused(
    load: Any, name: str, choice: Choice | None, sample: Conversation
) -> None:
    """A block with words in it; a closing that holds the answer's first word; reasoning behind the answer."""
    result = encoded(load(name), sample, choice)
    assert not result.examples
    (note,) = result.notes
    assert note.reason in ("not_after_prompt", "more_than_message", "not_the_message", "reasoning_left_out")
    assert "works for it, as tried. Choose another data.template." in note.detail


def test_texts_of_blocks() -> None:
    closed = ["<think></think>", "<think>\n\n</think>\n\n", "<|channel>thought\n<channel|>", "[THINK][/THINK]",
              "<|START_THINKING|><|END_THINKING|>", "<seed:think></seed:think>"]  # fmt: skip
    assert all(map(is_closed, closed))
    others = ["<think>", "<think>\nOkay\n</think>", "</think>", "<note></note>", "<think></thought>", "", "\n"]
    assert not any(map(is_closed, others))
    assert all(map(is_opening, ["<think>\n", "[THINK]", "<|START_THINKING|>", "Here are my reasoning steps:\n"]))
    assert not any(
        map(is_opening, ["</think>", "<|END_THINKING|>", "[/THINK]", "<note>", "<think>\nOkay", "assistant\n"])
    )
    assert shared_length("a<think>", "a</think>b") == 1, "never within a marker"
    assert shared_length("ab", "abc") == 2
    assert derived_closing("<think>\n", "'</think>' in content") == "\n</think>\n\n"
    assert derived_closing("<think>", "split('</think>')") == "</think>"
    assert derived_closing("<think>\n", "no such marker") is None


def test_reasoning_in_messages() -> None:
    assert split_content("<think>\na\n</think>\n\nb") == ("a", "b")
    assert split_content("a</think>b") == ("a", "b"), "its opening was part of the prompt"
    assert split_content("say <think>a</think> b") == ("", "say <think>a</think> b"), "control: not at the front"
    assert split_content("plain") == ("", "plain")
    assert reasoning_of({"content": "b", "thinking": " a "}) == "a"
    dropped, number = drop_reasoning(conversation(user("<think>q</think>"), answer("<think>a</think>b", "c")))
    assert number == 1
    assert [m.as_dict() for m in dropped.messages] == [
        {"role": "user", "content": "<think>q</think>"}, {"role": "assistant", "content": "b"}
    ]  # fmt: skip


# -- cures, samples, settings


def test_arguments_are_those_that_the_template_reads() -> None:
    text = (
        "{% if thinking_mode == 'chat' %}a{% endif %}{% set x = enable_thinking | default(true) %}"
        "{% if reasoning_effort in ['low', 'none'] %}b{% endif %}{{ messages }}{{ date_string }}"
    )
    assert template_arguments(text) == [
        ("enable_thinking", [False, True]), ("reasoning_effort", ["low", "none"]), ("thinking_mode", ["chat"]),
    ]  # fmt: skip


def test_a_cure_keeps_the_arguments_that_are_given_and_is_tried_once_a_kind(load: Any) -> None:
    bundle = load("open_think", (("keep_thinking", True),))
    made: list[EncodeSettings] = []

    def make(given: TokenizerBundle, settings: EncodeSettings) -> Encoder:
        made.append(settings)
        return Encoder(given, settings, trial=True)

    settings = EncodeSettings(template_args={"keep_thinking": True})
    cures = Cures(Trials(bundle, settings, make))
    (note,) = encoded(bundle, PLAIN).notes
    from sft.data.proof import Refusal

    told = [str(cures.of(PLAIN, Refusal("not_after_prompt", "no."))) for _ in range(2)]
    assert told[0] == told[1]
    assert "`data.template_args: {keep_thinking: true, enable_thinking: false}`" in told[0]
    number = len(made)
    cures.of(PLAIN, Refusal("not_after_prompt", "no."))
    assert len(made) == number
    assert str(cures.of(PLAIN, Refusal("no_stop", "no."))) == "no.", "control: nothing that reasoning cures"
    assert note.detail


@pytest.mark.parametrize("choice", ["train", "context", "drop"])
def test_samples_hold_the_served_prompt(load: Any, choice: Choice) -> None:
    bundle = load("open_think")
    encoder = Encoder(bundle, EncodeSettings(reasoning=choice))
    example = encoder.encode(AGENT).examples[-1]
    record = sample_record(AGENT, example.input_ids_T, encoder)
    assert record is not None
    served = bundle.tokenizer.apply_chat_template(
        record["messages"], tools=record["tools"], add_generation_prompt=True, return_dict=False
    )
    assert record["prompt_ids"] == served
    assert any("reasoning_content" in message for message in record["messages"]) == (choice != "drop")


def test_the_key_is_no_change_where_it_is_not_set() -> None:
    base = {"model": {"name": "m"}, "data": {"train": "a.jsonl"}}
    config = Config.model_validate(base)
    assert config.data.reasoning is None
    assert encode_settings(config.data).reasoning is None
    given = {"data_digest": "a", "eval_digest": "b", "tokenizer_digest": "c", "base_digest": "d", "total_steps": 3}
    now = fingerprint(config, **given)  # type: ignore[arg-type]
    before = {key: value for key, value in now.items() if key != "data.reasoning"}
    assert differences(before, now) == {}
    closes = fingerprint(Config.model_validate({**base, "data": {"train": "a.jsonl", "reasoning": "close"}}), **given)  # type: ignore[arg-type]
    assert differences(before, closes) == {"data.reasoning": (None, "close")}


def test_all_trains_reasoning_too() -> None:
    for choice in ("context", "close"):
        with pytest.raises(ValidationError, match=r"data\.train_on is all, which trains every token"):
            Config.model_validate(
                {"model": {"name": "m"}, "data": {"train": "a.jsonl", "train_on": "all", "reasoning": choice}}
            )


# -- with the rest of a row: its own arguments, its developer message


def test_a_row_s_own_arguments_decide_how_its_prompt_ends(load: Any) -> None:
    bundle = load("open_think")
    encoder = Encoder(bundle, EncodeSettings())
    quick = replace(PLAIN, template_args={"enable_thinking": False})
    found, refused = encoder.encode_many([quick, PLAIN])
    (example,) = found.examples
    text = bundle.tokenizer.decode(example.input_ids_T)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nIt is four.<|im_end|>\n") or text.endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is four.<|im_end|>"
    )
    assert reasons(found) == ["closed_block"]
    assert reasons(refused) == ["not_after_prompt"], "control: the row without"
    thought = replace(THOUGHT, template_args={"enable_thinking": False})
    (note,) = encoder.encode(thought).notes
    assert "`data.reasoning: drop`" in note.detail
    assert "template_args" not in note.detail, "the row's own go over those of the config"


def test_two_faults_of_a_row_are_cured_by_two_lines(load: Any, tmp_path: Path) -> None:
    """A developer message that the template drops, behind a prompt that opens a block."""
    (file,) = FOLDER.rglob("open_think.jinja")
    silent = "{%- elif m.role != 'developer' %}{{- '<|im_start|>' + m.role"
    text = file.read_text().replace("{%- else %}{{- '<|im_start|>' + m.role", silent)
    bpe_tokenizer(tmp_path, text, None, "<|im_end|>", ())
    bundle = load_tokenizer(str(tmp_path))
    row = conversation(Message("developer", "Be brief."), *PLAIN.messages)
    (note,) = encoded(bundle, row).notes
    assert "`data.layers: merge_into_system` with `data.reasoning: close`" in note.detail
    settings = EncodeSettings(reasoning="close", layers="merge_into_system")
    result = Encoder(bundle, settings).encode(row)
    assert reasons(result) == ["layers_merged", "reasoning_closed"]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in bundle.tokenizer.decode(result.examples[0].input_ids_T)
    assert "data.layers" not in encoded(load("open_think"), row).notes[0].detail, "control: the role is printed"
