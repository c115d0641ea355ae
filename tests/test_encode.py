"""Samples to examples: literal ids, the length rule, control tokens, passages, and the proof's negative controls."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatcases import CORPUS, bpe_tokenizer, conversation, dicts, judge, trained_runs
from conftest import CHATML, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.data.encode import Encoder
from sft.data.formats import FORMATS
from sft.data.outcome import Encoded, EncodeSettings
from sft.data.proof import TOOL_TEMPLATES, Refusal
from sft.data.readers import Row
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message, Passage, Rendered, Span


def U(text: str, **more: Any) -> Message:
    return Message("user", text, **more)


def A(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> TokenizerBundle:
    """One id a word, one a blank or newline."""
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> TokenizerBundle:
    """Byte-level BPE whose merges cross newlines, with <think> as an added token that is not special."""
    folder = tmp_path_factory.mktemp("merging")
    bpe_tokenizer(folder, CHATML + "{# <think> </think> <|endoftext|> #}", None, "<|im_end|>", ())
    bundle = load_tokenizer(str(folder))
    return bundle


def encode(bundle: TokenizerBundle, *messages: Message, **changes: Any) -> Encoded:
    return Encoder(bundle, EncodeSettings(**changes)).encode(conversation(*messages))


def trained(bundle: TokenizerBundle, encoded: Encoded) -> list[list[str]]:
    """The trained stretches of each example as text."""
    return [
        [bundle.tokenizer.decode(e.input_ids_T[a:b]) for a, b in trained_runs(e.labels_T.tolist())]
        for e in encoded.examples
    ]


def only(encoded: Encoded) -> tuple[str, str]:
    """Action and reason of the one note about a row without examples."""
    assert encoded.examples == ()
    (note,) = encoded.notes
    assert note.source == "a.jsonl:1"
    return note.action, note.reason


# -- literals


def test_a_conversation_by_eye(words: TokenizerBundle) -> None:
    (example,) = encode(words, U("Hello"), A("Yes . No"), U("Are you"), A("Oh six")).examples
    t = words.tokenizer
    assert t.convert_ids_to_tokens(example.input_ids_T.tolist()) == [
        "<|im_start|>", "user", "\n", "Hello", "<|im_end|>", "\n",
        "<|im_start|>", "assistant", "\n", "Yes", " ", ".", " ", "No", "<|im_end|>", "\n",
        "<|im_start|>", "user", "\n", "Are", " ", "you", "<|im_end|>", "\n",
        "<|im_start|>", "assistant", "\n", "Oh", " ", "six", "<|im_end|>", "\n",
    ]  # fmt: skip
    assert example.weights_T.tolist() == [0] * 9 + [1] * 6 + [0] * 12 + [1] * 4 + [0]
    assert example.source == "a.jsonl:1"
    hello, yes, im_end = t.convert_tokens_to_ids(["Hello", "Yes", "<|im_end|>"])
    assert example.labels_T[3] == -100
    assert example.input_ids_T[3] == hello
    assert example.labels_T[9] == yes
    assert example.labels_T[14] == im_end


@pytest.mark.parametrize(
    ("policy", "spans"),
    [
        ("auto", ["one<|im_end|>", "two<|im_end|>"]),
        ("assistant", ["one<|im_end|>", "two<|im_end|>"]),
        ("last_assistant", ["two<|im_end|>"]),
        ("completion", ["two<|im_end|>"]),
        ("all", ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
                 "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_policies(words: TokenizerBundle, policy: str, spans: list[str]) -> None:
    encoded = encode(words, U("Hello"), A("one"), U("Hello"), A("two"), train_on=policy)
    assert trained(words, encoded) == [spans]


def test_flags_and_weights(words: TokenizerBundle) -> None:
    (example,) = encode(words, U("Hello"), A("one", train=False), U("Hello"), A("two", weight=0.5)).examples
    assert example.weights_T.tolist() == [0] * 21 + [0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((U("Hello"),), "nothing_trained"),
        ((U("Hello"), A("one", train=False)), "nothing_trained"),
        ((U("Hello"), A("one", weight=0.0)), "nothing_trained"),
        ((A("Hello"), U("Hello"), A("one")), "no_prompt"),
        ((U("Hello", train=True), A("one")), "not_trainable"),
        ((U("Hello"), A("", extra={"tool_calls": [{"function": {"name": "fly", "arguments": {}}}]})),
         "tool_calls_not_rendered"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_trained(words: TokenizerBundle, messages: tuple[Message, ...], reason: str) -> None:
    assert only(encode(words, *messages)) == ("refused", reason)


@pytest.mark.parametrize("template", ["chatml", "zephyr", "tulu"])
def test_plain_built_in_templates_print_no_tools_and_their_refusals_name_the_one_that_does(
    tokenizer_folder: Path, template: str
) -> None:
    bundle = load_tokenizer(str(tokenizer_folder), template=template)
    call = A("", extra={"tool_calls": [{"function": {"name": "fly", "arguments": {}}}]})
    tool = {"type": "function", "function": {"name": "fly"}}
    for sample in (Conversation((U("Hello"), call), "a:1"), Conversation((U("Hello"), A("one")), "a:1", tools=(tool,))):
        (note,) = Encoder(bundle, EncodeSettings()).encode(sample).notes
        assert TOOL_TEMPLATES in note.detail
    (note,) = Encoder(bundle, EncodeSettings()).encode(Conversation((), "a:1")).notes
    assert TOOL_TEMPLATES not in note.detail


def test_no_messages_is_refused(words: TokenizerBundle) -> None:
    assert only(encode(words))[0] == "refused"
    assert only(encode(words, train_on="all"))[0] == "refused"


def test_a_greeting_may_stand_first_as_context(words: TokenizerBundle) -> None:
    encoded = encode(words, A("Hello", train=False), U("Hello"), A("one"))
    assert trained(words, encoded) == [["one<|im_end|>"]]


def test_all_takes_no_flags(words: TokenizerBundle) -> None:
    assert only(encode(words, U("Hello", train=False), A("one"), train_on="all")) == ("refused", "unprovable")


def test_all_trains_the_prompt_of_a_row_of_prompt_and_completion(words: TokenizerBundle) -> None:
    prompt = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "one"}]
    data = {"prompt": [*prompt, {"role": "user", "content": "two"}], "completion": [prompt[1]]}
    sample = FORMATS["prompt_completion"](Row("a.jsonl:1", data))
    assert trained(words, Encoder(words, EncodeSettings()).encode(sample)) == [["one<|im_end|>"]]
    everything = Encoder(words, EncodeSettings(train_on="all")).encode(sample)
    ((text,),) = trained(words, everything)
    assert text.count("one<|im_end|>") == 2
    assert text.startswith("<|im_start|>user\nHello")
    data["prompt"][0] = {**prompt[0], "train": False}
    flagged = FORMATS["prompt_completion"](Row("a.jsonl:1", data))
    assert only(Encoder(words, EncodeSettings(train_on="all")).encode(flagged)) == ("refused", "unprovable")


@pytest.mark.parametrize(("footer", "added"), [("", 0), ("\\n \\n", 0), ("Oh", 1), ("Oh . Oh . Oh", 1)])
def test_a_row_that_is_trained_whole_ends_with_a_stop_token(tmp_path: Path, footer: str, added: int) -> None:
    """However near its end another one stands."""
    bundle = load_tokenizer(str(make_tokenizer(tmp_path, CHATML + f"{{{{ '{footer}' }}}}")))
    (example,) = encode(bundle, U("Hello"), A("one"), train_on="all").examples
    text = bundle.tokenizer.decode(example.input_ids_T)
    assert text.count("<|im_end|>") == 2 + added
    assert text.rstrip().endswith("<|im_end|>")


def test_reasoning_that_the_template_drops_is_refused_where_it_was_to_be_learned(words: TokenizerBundle) -> None:
    thinking = A("one", extra={"reasoning_content": "two"})
    assert only(encode(words, U("Hello"), thinking)) == ("refused", "reasoning_left_out")
    earlier = encode(words, U("Hello"), replace(thinking, train=False), U("Hello"), A("three"))
    assert [(n.action, n.reason) for n in earlier.notes] == [("altered", "reasoning_left_out")]
    assert trained(words, earlier) == [["three<|im_end|>"]]


@pytest.mark.parametrize("policy", ["assistant", "all"])
def test_reasoning_within_content_that_the_template_cuts_is_refused(tmp_path: Path, policy: str) -> None:
    """Whatever else is said of the row, and although the words behind the reasoning repeat it."""
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]", 1) + "{# <think> #}"
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, template, None, "<|im_end|>", ())))
    cut = encode(bundle, U("2+2?"), A("<think>four</think>It is four."), train_on=policy)
    assert only(cut) == ("refused", "reasoning_left_out")
    cut = encode(bundle, U("<|im_end|>?"), A("<think>hm</think>It."), train_on=policy)
    assert only(cut) == ("refused", "reasoning_left_out")
    blank = encode(bundle, U("2+2?"), A("<think> \n</think>It is four."), train_on=policy)
    assert blank.notes == ()
    assert "It is four.<|im_end|>" in trained(bundle, blank)[0][0]


@pytest.mark.parametrize("policy", ["assistant", "all"])
def test_reasoning_within_content_that_is_rendered_is_no_alteration(merging: TokenizerBundle, policy: str) -> None:
    assert merging.chat is not None
    chat = replace(merging.chat, text=merging.chat.text + "{{ '' if '</think>' in messages[0].content }}")
    bundle = replace(merging, chat=replace(chat, with_tools=chat.text))
    encoded = encode(bundle, U("2+2?"), A("<think>\nfour\n</think>\n\nIt is four."), train_on=policy)
    assert encoded.notes == ()
    assert "<think>\nfour\n</think>\n\nIt is four.<|im_end|>" in trained(bundle, encoded)[0][0]


@pytest.mark.parametrize("policy", ["assistant", "all"])
def test_trained_characters_that_the_tokenizer_does_not_know_are_said(words: TokenizerBundle, policy: str) -> None:
    encoded = encode(words, U("Hello ש"), A("one ש two 🙂 ש"), train_on=policy)
    (note,) = encoded.notes
    assert (note.action, note.reason) == ("altered", "unknown_characters")
    assert note.detail.startswith("4 of its" if policy == "all" else "3 of its")
    assert encode(words, U("Hello ש"), A("one")).notes == ()
    passage = Passage("ש ", "one ש", "a.jsonl:1")
    (note,) = Encoder(words, EncodeSettings()).encode(passage).notes
    assert (note.reason, note.detail[:8]) == ("unknown_characters", "1 of its")


def test_an_unknown_token_that_also_ends_texts_is_no_loss(tmp_path: Path) -> None:
    """As GPT-2's does."""
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, CHATML, None, "<|im_end|>", ())))
    bundle.tokenizer.unk_token = "<|im_end|>"
    assert encode(bundle, U("Hello"), A("there")).notes == ()


def test_bos_once(tmp_path: Path) -> None:
    """The template writes BOS, and the tokenizer would add another."""
    from transformers import AutoTokenizer

    folder = bpe_tokenizer(tmp_path, "{{ bos_token }}" + CHATML, "<s>", "<|im_end|>", ())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    bundle = load_tokenizer(str(folder))
    encoder = Encoder(bundle, EncodeSettings())
    bos = bundle.tokenizer.bos_token_id
    passage = Passage("", "Hello there", "a.jsonl:2", "text")
    for sample in (conversation(U("Hello"), A("there")), passage):
        (example,) = encoder.encode(sample).examples
        assert example.input_ids_T.tolist().count(bos) == 1
        assert example.input_ids_T[0] == bos
        assert example.weights_T[0] == 0
    spelled = replace(passage, completion="<s>Hello")
    allowed = Encoder(bundle, EncodeSettings(control_tokens_in_text="allow"))
    assert allowed.encode(spelled).examples[0].input_ids_T.tolist().count(bos) == 1
    assert encoder.encode(spelled).examples[0].input_ids_T.tolist().count(bos) == 1


# -- length


LONG = (U("Hello"), A("one"), U("Yes"), A("two three four"))  # 26 tokens; trained: 9-11 and 21-27


@pytest.mark.parametrize(
    ("rule", "limit", "outcome"),
    [
        ("drop", 28, None),
        ("drop", 27, None),  # the newline behind the last stop token is no loss
        ("drop", 26, ("dropped", "over_long")),
        ("error", 26, ("refused", "over_long")),
        ("truncate", 9, ("dropped", "over_long")),  # no trained token would remain
    ],
)
def test_over_long(words: TokenizerBundle, rule: str, limit: int, outcome: tuple[str, str] | None) -> None:
    encoded = encode(words, *LONG, max_tokens=limit, over_long=rule)
    if outcome:
        assert only(encoded) == outcome
        assert str(limit) in encoded.notes[0].detail
    else:
        (example,) = encoded.examples
        assert len(example.input_ids_T) <= limit
        assert trained(words, encoded) == [["one<|im_end|>", "two three four<|im_end|>"]]


def test_a_turn_cut_before_its_stop_is_not_trained_to_stop(words: TokenizerBundle) -> None:
    encoded = encode(words, *LONG, max_tokens=24, over_long="truncate")
    assert trained(words, encoded) == [["one<|im_end|>", "two three"]]
    assert [(n.action, n.reason) for n in encoded.notes] == [("cut", "over_long")]
    encoded = encode(words, *LONG, max_tokens=15, over_long="truncate")
    assert trained(words, encoded) == [["one<|im_end|>"]]


def test_truncation_of_one_example_a_turn(tmp_path: Path) -> None:
    """A template that marks the last question: earlier prompts are no beginning of the whole."""
    template = (
        "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ('!' if message == last else '') + '\n' + "
        "message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    bundle = load_tokenizer(str(make_tokenizer(tmp_path, template)))
    encoded = encode(bundle, *LONG)
    assert [e.source for e in encoded.examples] == ["a.jsonl:1#0", "a.jsonl:1#1"]
    cut = encode(bundle, *LONG, max_tokens=16, over_long="truncate")
    assert trained(bundle, cut) == [["one<|im_end|>"]]
    assert only(encode(bundle, *LONG, max_tokens=15)) == ("dropped", "over_long")


@pytest.mark.parametrize("rule", ["drop", "truncate"])
def test_a_chat_of_a_hundred_thousand_turns(words: TokenizerBundle, rule: str) -> None:
    """Bounded in time: some seconds, for templates that are rendered once and for others."""
    encoder = Encoder(words, EncodeSettings(over_long=rule, max_tokens=512))
    sample = conversation(*[m for _ in range(50_000) for m in (U("Hello"), A("one"))])
    started = time.monotonic()
    encoded = encoder.encode(sample)
    assert time.monotonic() - started < 60
    assert bool(encoded.examples) == (rule == "truncate")


# -- control tokens


def test_spelled_control_tokens_become_text(merging: TokenizerBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    t = merging.tokenizer
    im_end, think = t.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    encoded = encode(merging, U("What is <|im_end|> <think> ?"), A("It is <|im_end|> ."))
    (example,) = encoded.examples
    ids = example.input_ids_T.tolist()
    assert (ids.count(im_end), ids.count(think)) == (2, 0)
    assert trained(merging, encoded) == [["It is <|im_end|> .<|im_end|>"]]
    (note,) = encoded.notes
    assert (note.action, note.reason) == ("altered", "control_tokens")
    assert "<|im_end|> (2)" in note.detail
    assert "<think> (1)" in note.detail
    monkeypatch.setattr(t, "chat_control_tokens", ["<think>", "</think>"])
    served = t.apply_chat_template(
        dicts(conversation(U("What is <|im_end|> <think> ?"))), add_generation_prompt=True, return_dict=False,
        sanitize_control_tokens=True,
    )  # fmt: skip
    assert ids[: len(served)] == served, "transformers' sanitised serving gives the same ids"


CALLED = '<tool_call>\n{"name": "weather"}\n</tool_call>'


@pytest.mark.parametrize("markup", ["<think>\nhmm\n</think>\n\nIt is 4.", CALLED])
def test_an_answer_s_markup_is_the_model_s_own_tokens(tmp_path: Path, markup: str) -> None:
    """As its tokenizer reads what the template writes; a question's is text, and stays so."""
    template = CHATML + "{# <think> </think> <tool_call> </tool_call> #}"
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, template, None, "<|im_end|>", ())))
    t = bundle.tokenizer
    start, end = ("<think>", "</think>") if "think" in markup else ("<tool_call>", "</tool_call>")
    encoded = encode(bundle, U(f"Say {start} and {end}"), A(markup), U("Why?"), A("Because."))
    (example,) = encoded.examples
    own = t(markup + "<|im_end|>", add_special_tokens=False)["input_ids"]
    first = [i for i, w in enumerate(example.weights_T) if w][: len(own)]
    assert example.input_ids_T[first].tolist() == own
    assert [example.input_ids_T.tolist().count(t.convert_tokens_to_ids(x)) for x in (start, end)] == [1, 1]
    assert [(note.reason, note.detail) for note in encoded.notes if note.reason != "reasoning_left_out"] == [
        ("control_tokens", f"encoded as ordinary characters: {start} (1), {end} (1)"),
        ("own_tokens", f"spelled by answers and encoded as the model's own: {start} (1), {end} (1)"),
    ]


def test_control_an_answer_forges_no_header_even_where_headers_are_not_special(tmp_path: Path) -> None:
    """Tokenizers that were finetuned to ChatML often hold `<|im_start|>` as an ordinary added token."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = bpe_tokenizer(tmp_path, None, None, "</s>", ())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<|im_start|>", "<|im_end|>", "<tag>", "<|fim|>")])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    bundle = load_tokenizer(str(folder))
    encoded = encode(bundle, U("Hi"), A("<tag> <|im_start|>user\n<|fim|>"))
    ids = encoded.examples[0].input_ids_T.tolist()
    counts = {x: ids.count(bundle.tokenizer.convert_tokens_to_ids(x)) for x in ("<|im_start|>", "<tag>", "<|fim|>")}
    assert counts == {"<|im_start|>": 2, "<tag>": 1, "<|fim|>": 1}
    assert [note.reason for note in encoded.notes] == ["control_tokens", "own_tokens"]


def test_words_that_were_added_to_a_vocabulary_are_no_control_tokens(tmp_path: Path) -> None:
    """They are one token in training as in serving; what looks like markup is a control token, special or not."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = bpe_tokenizer(tmp_path, CHATML, None, "<|im_end|>", ())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("covid19", "[GENE]", "<b>")])
    tokenizer.save_pretrained(folder)
    bundle = load_tokenizer(str(folder))
    covid, gene, bold = bundle.tokenizer.convert_tokens_to_ids(["covid19", "[GENE]", "<b>"])
    encoded = encode(bundle, U("Is covid19 <b> or [GENE] ?"), A("It is covid19 ."))
    ids = encoded.examples[0].input_ids_T.tolist()
    assert (ids.count(covid), ids.count(bold), ids.count(gene)) == (2, 1, 0)
    assert [(note.reason, note.detail) for note in encoded.notes] == [
        ("control_tokens", "encoded as ordinary characters: [GENE] (1)")
    ]
    served = bundle.tokenizer.apply_chat_template(
        dicts(conversation(U("Is covid19 <b> ?"))), add_generation_prompt=True, return_dict=False,
        sanitize_control_tokens=True,
    )  # fmt: skip
    (example,) = encode(bundle, U("Is covid19 <b> ?"), A("yes")).examples
    assert example.input_ids_T[: len(served)].tolist() == served


def test_spelled_control_tokens_allowed(merging: TokenizerBundle) -> None:
    im_end = merging.tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoded = encode(merging, U("What is <|im_end|> ?"), A("It is <|im_end|> ."), control_tokens_in_text="allow")
    assert encoded.examples[0].input_ids_T.tolist().count(im_end) == 4
    assert trained(merging, encoded) == [["It is <|im_end|> .<|im_end|>"]]
    assert not encoded.notes


def test_spelled_control_tokens_as_an_error(merging: TokenizerBundle) -> None:
    encoded = encode(merging, U("What is <|im_end|> ?"), A("It."), control_tokens_in_text="error")
    assert only(encoded) == ("refused", "control_tokens")
    assert "<|im_end|>" in encoded.notes[0].detail


def test_markup_that_the_template_reads_stays_markup(tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]", 1)
    bpe_tokenizer(tmp_path, template + "{# <think> #}", None, "<|im_end|>", ())
    bundle = load_tokenizer(str(tmp_path))
    encoded = encode(bundle, U("Hello <think>"), A("<think>\n\n</think>\n\nyes"))
    assert "<think> (1)" in encoded.notes[0].detail, "the user's is spelled, the answer's is markup"
    assert trained(bundle, encoded) == [["\n\nyes<|im_end|>"]]


def test_tools_may_not_smuggle_control_tokens(merging: TokenizerBundle) -> None:
    template = CHATML + "{{ tools | tojson if tools else '' }}"
    tokenizer = merging.tokenizer
    sample = Conversation(
        (U("Hello"), A("yes")), "a.jsonl:1", ({"function": {"name": "x", "description": "<|im_end|>"}},)
    )
    chat = replace(merging.chat, text=template, with_tools=template)  # type: ignore[type-var]
    encoded = Encoder(replace(merging, chat=chat), EncodeSettings(train_on="all")).encode(sample)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.examples[0].input_ids_T.tolist().count(im_end) == 2 + 1  # the last ends the row


# -- passages


def test_a_completion_is_trained_with_end_of_text(words: TokenizerBundle) -> None:
    encoder = Encoder(words, EncodeSettings())
    (example,) = encoder.encode(Passage("Are you", " sure ?", "a.jsonl:1")).examples
    assert words.tokenizer.convert_ids_to_tokens(example.input_ids_T.tolist()) == [
        "Are", " ", "you", " ", "sure", " ", "?", "<|im_end|>"
    ]  # fmt: skip
    assert example.weights_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_text_is_trained_whole(words: TokenizerBundle) -> None:
    (example,) = Encoder(words, EncodeSettings()).encode(Passage("", "Yes . No", "a.jsonl:1", "text")).examples
    assert example.weights_T.tolist() == [1] * 6


@pytest.mark.parametrize("policy", ["assistant", "last_assistant", "completion"])
def test_text_has_no_answers(words: TokenizerBundle, policy: str) -> None:
    encoded = Encoder(words, EncodeSettings(train_on=policy)).encode(Passage("", "Yes", "a.jsonl:1", "text"))
    assert only(encoded) == ("refused", "nothing_trained")


def test_passages_keep_to_the_length_rule(words: TokenizerBundle) -> None:
    passage = Passage("Are you", " sure ?", "a.jsonl:1")
    encoder = Encoder(words, EncodeSettings(max_tokens=5))
    assert only(encoder.encode(passage)) == ("dropped", "over_long")
    cut = Encoder(words, EncodeSettings(max_tokens=5, over_long="truncate")).encode(passage)
    assert trained(words, cut) == [[" sure"]]
    assert cut.notes[0].action == "cut"
    assert only(Encoder(words, EncodeSettings(max_tokens=3, over_long="truncate")).encode(passage))[0] == "dropped"


def test_a_passage_that_spells_control_tokens(merging: TokenizerBundle) -> None:
    encoded = Encoder(merging, EncodeSettings()).encode(Passage("a <|im_end|>", " b <think>", "a.jsonl:1"))
    im_end = merging.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.examples[0].input_ids_T.tolist().count(im_end) == 1
    assert trained(merging, encoded) == [[" b <think><|im_end|>"]]
    assert encoded.notes[0].reason == "control_tokens"


# -- rows that nobody sane writes


@pytest.mark.parametrize("text", ["half \ud83d of it", "a \U000f5f7c mark"])
def test_strange_characters_are_refused_by_name(merging: TokenizerBundle, text: str) -> None:
    assert only(encode(merging, U("Hello"), A(text)))[0] == "refused"
    assert only(encode(merging, U("<|im_end|>"), A(text)))[0] == "refused"
    encoded = Encoder(merging, EncodeSettings()).encode(Passage("", text, "a.jsonl:1", "text"))
    assert only(encoded)[0] == "refused"


def test_a_bad_row_leaves_its_neighbours_alone(merging: TokenizerBundle) -> None:
    good = conversation(U("Hello"), A("there"))
    bad = [conversation(U("Hello"), A("half \ud83d")), conversation(U("Hello")), Passage("", "\ud83d", "a.jsonl:1")]
    encoded = Encoder(merging, EncodeSettings()).encode_many([good, *bad, good])
    assert [bool(e.examples) for e in encoded] == [True, False, False, False, True]


def test_a_template_that_loops_on_a_row_costs_that_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% if 'six' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}" \
           "{% endfor %}{% endif %}"  # fmt: skip
    bundle = load_tokenizer(str(make_tokenizer(tmp_path, CHATML + loop)))
    encoder = Encoder(bundle, EncodeSettings())
    monkeypatch.setattr("sft.data.encode.RENDER_SECONDS", 0.3)
    good, bad = conversation(U("Hello"), A("one")), conversation(U("six"), A("one"))
    encoded = encoder.encode_many([good, bad, good])
    assert [bool(e.examples) for e in encoded] == [True, False, True]
    assert "loop without end" in encoded[1].notes[0].detail


# -- negative controls of the proof


def test_a_shifted_span_is_disproved(words: TokenizerBundle) -> None:
    encoder = Encoder(words, EncodeSettings())
    (example,) = encoder.encode(conversation(U("Hello"), A("Yes . No"))).examples
    rendered = Rendered(tuple(example.input_ids_T.tolist()), (Span(1, 9, 15),))
    text = "Yes . No<|im_end|>"
    assert encoder.proof.fault(rendered, Span(1, 9, 15), text, text) is None
    for start, end, reason in ((8, 15, "unprovable"), (10, 15, "unprovable"), (9, 14, "no_stop"), (9, 16, "no_stop")):
        found = words.tokenizer.decode(rendered.input_ids[start:end])
        fault = encoder.proof.fault(rendered, Span(1, start, end), text, found)
        assert isinstance(fault, Refusal)
        assert fault.reason == reason
        assert "message 1" in str(fault)


def test_an_aligner_that_lies_is_found_out(merging: TokenizerBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The span does not decode to the answer, and is made anew; the first rows' own prompts say otherwise, too."""
    encoder, sample = Encoder(merging, EncodeSettings()), conversation(U("Hello"), A("there"))
    encoder.unverified = 0
    right = encoder.aligner.prefix_length
    monkeypatch.setattr(encoder.aligner, "prefix_length", lambda *a: (right(*a) or 0) - 1)
    assert judge(merging.tokenizer, sample, encoder.encode(sample), set(merging.stop_ids)).right
    assert encoder.aligner.trusted
    encoder.unverified = 1
    assert judge(merging.tokenizer, sample, encoder.encode(sample), set(merging.stop_ids)).right
    assert not encoder.aligner.trusted


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_swallow_blanks(tmp_path: Path, side: str) -> None:
    """As Phi-3's do. What they swallow of an answer is tokenised apart, or the row is refused."""
    folder = bpe_tokenizer(tmp_path, CHATML, None, "<|im_end|>", ())
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text())
    for token in parts["added_tokens"]:
        token[side] = True
    file.write_text(json.dumps(parts))
    bundle = load_tokenizer(str(folder))
    for text in ("Hi", "\nHi\n", " Hi ", "\n\n"):
        sample = conversation(U("Hello"), A(text), U("Hello"), A("yes"))
        verdict = judge(bundle.tokenizer, sample, encode(bundle, *sample.messages), set(bundle.stop_ids))
        assert not verdict.wrong, (text, verdict)
        assert verdict.right or text != "Hi"


def test_a_tokenizer_that_does_not_give_text_back_is_refused(tmp_path: Path) -> None:
    from tokenizers import decoders

    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, CHATML, None, "<|im_end|>", ())))
    bundle.tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("bed", "bad")]
    )
    encoded = encode(bundle, U("a"), A("a bed"))
    assert only(encoded) == ("refused", "unprovable")
    assert "expected the trained tokens to decode to 'a bed<|im_end|>', found 'a bad<|im_end|>'" in (
        encoded.notes[0].detail
    )


def test_encode_many_is_encode_of_each(merging: TokenizerBundle) -> None:
    samples = [
        conversation(U("Hello"), A("there")), conversation(U("<|im_end|>"), A("\nHello\n\n")), conversation(U("x")),
        Passage("Hello", " there", "a.jsonl:3"), conversation(*[m for i in range(9) for m in (U(str(i)), A(f"{i}."))]),
    ]  # fmt: skip
    together = Encoder(merging, EncodeSettings()).encode_many(samples)
    for sample, encoded in zip(samples, together, strict=True):
        alone = Encoder(merging, EncodeSettings()).encode(sample)
        assert alone.notes == encoded.notes
        assert [(e.input_ids_T.tolist(), e.weights_T.tolist()) for e in alone.examples] == [
            (e.input_ids_T.tolist(), e.weights_T.tolist()) for e in encoded.examples
        ]


# -- any conversation


STRANGE, KNOWN = st.sampled_from("ab é\n\n\t 🙂ש.<|>/"), st.sampled_from(sorted(set("".join(CORPUS))))
TEXT = st.text(alphabet=st.one_of(STRANGE, KNOWN), max_size=12)
SPELLING = st.sampled_from(["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>", "<|im_", "end|>"])
WORDS = st.lists(st.one_of(TEXT, TEXT, SPELLING), max_size=3).map("".join)
ASKED = WORDS.filter(lambda text: "think>" not in text)  # text in a question, the model's own in an answer: no one
TURN = st.tuples(ASKED, WORDS)  # setting of transformers' sanitising does both


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TURN, min_size=1, max_size=6), opening=st.none() | ASKED)
def test_any_conversation_is_right_or_refused(
    merging: TokenizerBundle, turns: list[tuple[str, str]], opening: str | None
) -> None:
    messages = [m for question, answer in turns for m in (U(question), A(answer))]
    sample = conversation(*([Message("system", opening)] if opening is not None else []), *messages)
    encoded = Encoder(merging, EncodeSettings()).encode(sample)
    spelled = any(note.reason == "control_tokens" for note in encoded.notes)
    arguments = {"sanitize_control_tokens": True} if spelled else {}
    verdict = judge(merging.tokenizer, sample, encoded, set(merging.stop_ids), **arguments)
    assert verdict.right, (verdict, encoded.notes)
