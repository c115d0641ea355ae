"""Every shape of conversation with every family of template: the right labels, or a refusal. Never a wrong mask.

Each outcome is judged by the slow oracle of `chatcases`, which asks transformers for every served prompt.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chatcases import (
    CALL,
    SHAPES,
    TOOLS,
    Verdict,
    bpe_tokenizer,
    family,
    in_parts,
    judge,
    metaspace_tokenizer,
    shapes,
    trained_runs,
)
from conftest import CHATML

from sft.data.encode import Encoder, EncodeSettings
from sft.data.locality import NotLocal, local_template, prove
from sft.data.render import Renderer, message_dicts
from sft.errors import TemplateError
from sft.pieces import show
from sft.templating import generation_markers
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

OWN = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
BUILT_IN = sorted((Path(__file__).parent.parent / "sft" / "templates").glob("*.jinja"))
REFUSES = {  # by which the whole template is refused, and rightly
    "no_generation_prompt": "no_generation_prompt",
    "deepseek_r1_prefill": "not_after_prompt",
}

MAY_LACK = {  # by which shape a template without a place for tools or reasoning is refused, and rightly
    "tools": ("tool_calls_not_rendered", "tools_left_out"),
    **dict.fromkeys(("reasoning_in_history", "reasoning_last", "thoughts_in_content"), ("reasoning_left_out",)),
}
LEFT_OUT = {reason for reasons in MAY_LACK.values() for reason in reasons}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """file -> bundle, with a tokenizer that knows the template's control tokens."""

    @cache
    def load(file: Path) -> TokenizerBundle:
        folder = tmp_path_factory.mktemp(file.stem)
        bpe_tokenizer(folder, file.read_text(encoding="utf-8"), *family(file.stem))
        return load_tokenizer(str(folder), pinned_date="2026-01-02")

    return load


def verdicts(bundle: TokenizerBundle) -> dict[str, Verdict]:
    """The judgement of each shape."""
    assert bundle.chat is not None
    encoder, tokenizer = Encoder(bundle, EncodeSettings()), bundle.tokenizer
    saved, tokenizer.chat_template = tokenizer.chat_template, bundle.chat.text  # the oracle's clock is pinned too
    found = {}
    for name, sample in shapes(tokenizer.convert_ids_to_tokens(bundle.stop_ids[0])).items():
        encoded = encoder.encode(sample)
        spelled = any(note.reason == "control_tokens" for note in encoded.notes)
        given = in_parts(sample) if bundle.chat.parts else sample
        arguments = {"sanitize_control_tokens": True} if spelled else {}
        found[name] = judge(tokenizer, given, encoded, set(bundle.stop_ids), **arguments)
    tokenizer.chat_template = saved
    return found


@pytest.mark.parametrize("file", [*OWN, *BUILT_IN], ids=lambda file: file.stem)
def test_no_mask_is_wrong(bundles: Any, file: Path) -> None:
    found = verdicts(bundles(file))
    assert not {name: v.wrong for name, v in found.items() if v.wrong}
    assert not [name for name, v in found.items() if v.right and not v.accepted]
    if file.stem in REFUSES:
        assert {v.reason for name, v in found.items() if name != "tools"} == {REFUSES[file.stem]}
    else:  # a template may have no place for tools, and say so or drop the call
        refused = {name: v.reason for name, v in found.items() if v.accepted and not v.right}
        assert all(reason in MAY_LACK.get(name, ()) for name, reason in refused.items()), refused


def test_four_fifths_of_what_templates_accept_is_right(bundles: Any) -> None:
    accepted = [v for file in [*OWN, *BUILT_IN] for v in verdicts(bundles(file)).values() if v.accepted]
    accepted = [v for v in accepted if v.reason not in LEFT_OUT]  # what the template has no place for
    assert sum(v.right for v in accepted) >= 0.8 * len(accepted)


@pytest.mark.parametrize(
    ("name", "shape", "examples"),
    [
        ("chatml_plain", "many_turns", 1),
        ("llama3_dated", "tools", 1),
        ("qwen3_style", "one_turn", 1),
        ("qwen3_style", "reasoning_in_history", 2),  # earlier reasoning is stripped from history
        ("qwen3_style", "many_turns", 12),
        ("mistral_merged_system", "system_prompt", 2),  # the system prompt moves to the last question
        ("mistral_merged_system", "two_turns", 1),
        ("gptoss_style", "two_turns", 2),  # the last answer ends otherwise than the earlier ones
        ("glm_open", "two_turns", 2),  # a turn is closed by the next role's marker
    ],
)
def test_one_example_where_one_serves_all_turns(bundles: Any, name: str, shape: str, examples: int) -> None:
    file = next(file for file in OWN if file.stem == name)
    assert len(Encoder(bundles(file), EncodeSettings()).encode(SHAPES[shape]).examples) == examples


def test_tokens_that_merge_across_the_boundary_part_a_conversation(bundles: Any) -> None:
    """`assistant\\n` + `\\nHello`: the text of the prompt is a prefix, its ids are not."""
    bundle = bundles(next(file for file in OWN if file.stem == "chatml_plain"))
    tokenizer = bundle.tokenizer
    prompt, whole = tokenizer("assistant\n")["input_ids"], tokenizer("assistant\n\nHello")["input_ids"]
    assert whole[: len(prompt)] != prompt, "the fixture no longer merges"
    encoded = Encoder(bundle, EncodeSettings()).encode(SHAPES["blanks"])
    assert [example.source for example in encoded.examples] == ["a.jsonl:1#0", "a.jsonl:1#1"]


@pytest.mark.parametrize("file", [*OWN, *BUILT_IN], ids=lambda file: file.stem)
def test_generation_markers_agree(bundles: Any, file: Path) -> None:
    """Where a template marks what is generated, its mask is ours but for the first row of merged tokens."""
    bundle = bundles(file)
    if generation_markers(bundle.chat.text) == "absent":
        return
    for name in ("one_turn", "two_turns", "many_turns", "system_prompt", "emoji_and_rtl"):
        sample = SHAPES[name]
        theirs = bundle.tokenizer.apply_chat_template(
            message_dicts(sample.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        (example,) = Encoder(bundle, EncodeSettings()).encode(sample).examples
        assert example.input_ids_T.tolist() == theirs["input_ids"]
        assert (example.weights_T > 0).astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize(
    "name", ["chatml_plain", "mistral_v1", "mistral_merged_system", "granite_style", "vicuna_style"]
)
def test_tokenizers_in_the_style_of_sentencepiece(tmp_path: Path, name: str, kind: str) -> None:
    template = next(file for file in OWN if file.stem == name).read_text()
    bos, eos, _ = family(name)
    bundle = load_tokenizer(str(metaspace_tokenizer(tmp_path, kind, template, bos, eos)))
    encoder = Encoder(bundle, EncodeSettings())
    for shape, sample in SHAPES.items():
        verdict = judge(bundle.tokenizer, sample, encoder.encode(sample), set(bundle.stop_ids), blanks=False)
        assert not verdict.wrong, (shape, verdict)
        assert verdict.right or not verdict.accepted or verdict.reason in MAY_LACK.get(shape, ()), (shape, verdict)


# -- tokenizers written in Python, which know no character offsets


@pytest.fixture
def slow(tmp_path: Path) -> TokenizerBundle:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    bundle = load_tokenizer(str(tmp_path))
    assert not bundle.tokenizer.is_fast
    return bundle


@pytest.mark.parametrize("shape", [*SHAPES, "control_tokens"])
def test_a_slow_tokenizer_gives_the_same_guarantees(slow: TokenizerBundle, shape: str) -> None:
    sample = shapes("<|im_end|>")[shape]
    encoded = Encoder(slow, EncodeSettings()).encode(sample)
    spelled = any(note.reason == "control_tokens" for note in encoded.notes)
    assert spelled == (shape == "control_tokens")
    arguments = {"sanitize_control_tokens": True} if spelled else {}
    verdict = judge(slow.tokenizer, sample, encoded, set(slow.stop_ids), **arguments)
    assert verdict.right or verdict.reason in MAY_LACK.get(shape, ()), verdict
    for example in encoded.examples:
        seen = show(example, "a", slow)
        assert "".join(piece.text for piece in seen.pieces) == seen.text
        assert [token for piece in seen.pieces for token in piece.ids] == example.input_ids_T.tolist()


def test_a_slow_tokenizer_that_loses_text_is_refused(slow: TokenizerBundle) -> None:
    """Negative control: without offsets the proof by decoding is the only one, and it fires."""
    from transformers import ByT5Tokenizer

    class Lowering(ByT5Tokenizer):
        def _tokenize(self, text: str) -> list[str]:
            return list(super()._tokenize(text.lower()))

    slow.tokenizer.__class__ = Lowering
    encoder = Encoder(slow, EncodeSettings())
    (note,) = encoder.encode(SHAPES["one_turn"]).notes
    assert (note.action, note.reason) == ("refused", "unprovable")
    assert "expected the trained tokens to decode to 'I am fine, thank you.<|im_end|>', found 'i am fine" in note.detail


# -- templates that write one message after another


def turns_both_ways(renderer: Renderer, sample: Conversation) -> tuple[Any, Any] | None:
    messages = message_dicts(sample.messages)
    trained = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")
    local = renderer.local[bool(sample.tools)]
    if local is None or not local.fits(messages) or trained[0] < local.needs:
        return None
    try:
        whole = renderer.whole(messages, sample.tools)
        slow = list(renderer.each_rendered(messages, sample.tools, trained, whole))
    except ValueError:
        return None
    return renderer.one_by_one(messages, sample.tools, trained, whole, local), slow


@pytest.mark.parametrize("file", [*OWN, *BUILT_IN], ids=lambda file: file.stem)
def test_one_rendering_says_what_many_say(bundles: Any, file: Path) -> None:
    renderer = Encoder(bundles(file), EncodeSettings()).renderer
    for name, sample in SHAPES.items():
        both = turns_both_ways(renderer, sample)
        if both is not None and both[0] is not None:
            assert both[0] == both[1], name


@pytest.mark.parametrize(
    "name",
    ["chatml_plain", "chatml_default_system", "chatml_generation_markers", "mistral_v1", "gemma_model_role",
     "granite_style", "vicuna_style", "phi4_mini_style", "hermes_tools"],
)  # fmt: skip
def test_a_text_rendered_with_marks_is_the_plain_one(bundles: Any, name: str) -> None:
    renderer = Encoder(bundles(next(f for f in OWN if f.stem == name)), EncodeSettings()).renderer
    renderer.unseen = 0  # no longer held against the plain rendering
    for shape, sample in SHAPES.items():
        messages = message_dicts(sample.messages)
        try:
            (plain,) = renderer.ended([messages], sample.tools)
        except TemplateError:
            continue  # it takes no such conversation
        whole = renderer.whole(messages, sample.tools)
        assert whole.starts is not None or sample.tools
        assert (whole.text, whole.marks) == (plain.text, plain.marks), shape


def test_a_message_that_holds_the_mark_is_rendered_plainly(bundles: Any) -> None:
    from sft.data.locality import MARK

    bundle = bundles(next(f for f in OWN if f.stem == "chatml_plain"))
    encoder = Encoder(bundle, EncodeSettings())
    encoder.renderer.unseen = encoder.renderer.unverified = 0
    sample = Conversation((Message("user", f"a{MARK}b"), Message("assistant", f"{MARK}c{MARK}")), "a.jsonl:1")
    encoded = encoder.encode(sample)
    assert judge(bundle.tokenizer, sample, encoded, set(bundle.stop_ids)).right


@pytest.mark.parametrize(
    "name", ["chatml_plain", "chatml_default_system", "mistral_v1", "gemma_model_role", "granite_style", "vicuna_style"]
)
def test_simple_templates_are_rendered_once(bundles: Any, name: str) -> None:
    renderer = Encoder(bundles(next(f for f in OWN if f.stem == name)), EncodeSettings()).renderer
    both = turns_both_ways(renderer, SHAPES["many_turns"])
    assert both is not None
    assert both[0] is not None


def test_tools_are_the_only_look_ahead_of_some() -> None:
    template = (Path(__file__).parent / "templates" / "hermes_tools.jinja").read_text()
    assert prove(template).without_roles == {"tool"}


@pytest.mark.parametrize(
    "body",
    [
        "{% if loop.last %}x{% endif %}",
        "{{ loop.length }}",
        "{{ messages | length }}",
        "{{ messages[-1].content }}",
        "{{ messages[loop.index0 + 1].content }}",
        "{{ messages[loop.index0 - 1].content }}",  # the last message, at the first
        "{{ loop.nextitem.content }}",
        "{% if add_generation_prompt %}x{% endif %}",
        "{% if loop.index0 == 3 %}{% break %}{% endif %}",
        "{% set l = loop %}{{ l.last }}",
        "{% for other in messages %}{{ other.content }}{% endfor %}",
        "{% set message = {'role': 'tool'} %}{% if message.role == 'tool' %}{{ loop.last }}{% endif %}",
        "{{ look() }}",
    ],
)
def test_templates_that_look_ahead_are_not_local(body: str) -> None:
    macro = "{% macro look() %}{{ messages[-1].content }}{% endmacro %}" if "look" in body else ""
    template = macro + "{% for message in messages %}" + body + "{{ message.content }}{% endfor %}"
    with pytest.raises(NotLocal):
        prove(template)


@pytest.mark.parametrize(
    "after", ["{{ ns.n }}", "{{ messages[0].content }}", "{% for m in messages %}{% endfor %}", "{{ messages|length }}"]
)
def test_templates_whose_end_depends_on_messages_are_not_local(after: str) -> None:
    template = (
        "{% set ns = namespace(n=0) %}{% for message in messages %}{% set ns.n = ns.n + 1 %}{{ message.content }}"
        "{% endfor %}"
    )
    assert local_template(template + "{{ 'end' }}") is not None
    assert local_template(template + after) is None


def test_a_wrong_certificate_is_found_out_on_the_first_rows(bundles: Any) -> None:
    """Negative control: marks put elsewhere than where messages begin lead to no turn."""
    from dataclasses import replace

    bundle = bundles(next(file for file in OWN if file.stem == "chatml_plain"))
    encoder = Encoder(bundle, EncodeSettings())
    local = encoder.renderer.local[0]
    assert local is not None
    mark = local.template[local.template.index("{% if true") : local.template.index("{% endif %}") + len("{% endif %}")]
    moved = local.template.replace(mark, "").replace("{% endfor %}", mark + "{% endfor %}")
    encoder.renderer.local = (replace(local, template=moved), None)
    expected = Encoder(bundle, EncodeSettings()).encode(SHAPES["two_turns"])
    found = encoder.encode(SHAPES["two_turns"])
    assert [e.labels_T.tolist() for e in found.examples] == [e.labels_T.tolist() for e in expected.examples]


# -- broken templates: the proof must fire


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (CHATML.replace("message['content']", "messages[0]['content']"), "not_the_message"),
        (CHATML.replace("message['content']", "message['content'][:3]"), "not_the_message"),
        (CHATML.replace("message['content'] +", "message['content'] + ' (' + messages[0]['content'] + ')' +"),
         "more_than_message"),
        (CHATML.replace("message['content'] +", "('<|im_start|>user\n' if message.role == 'assistant' else '') + "
                        "message['content'] +"),
         "header_trained"),
        (CHATML.replace("message['content'] +", "(messages[0].content if message.role == 'assistant' else '') + "
                        "message['content'] +"), "other_message_trained"),
        (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}"), "not_after_prompt"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"), "no_generation_prompt"),
        (CHATML.replace("'<|im_end|>\n'", "('\n' if 'Fine' in message['content'] else '<|im_end|>\n')"), "no_stop"),
    ],
)  # fmt: skip
def test_a_broken_template_is_refused(tmp_path: Path, broken: str, reason: str) -> None:
    assert broken != CHATML
    bpe_tokenizer(tmp_path, broken, None, "<|im_end|>", ())

    sample = Conversation(
        (Message("user", "What is your name, friend?"), Message("assistant", "Fine, I am six.")), "rows.jsonl:7"
    )
    try:
        bundle = load_tokenizer(str(tmp_path))
    except TemplateError as error:
        assert "leaves the answer out" in str(error)  # noqa: PT017 - found at once, even better
        return
    (note,) = Encoder(bundle, EncodeSettings()).encode(sample).notes
    assert (note.source, note.action, note.reason) == ("rows.jsonl:7", "refused", reason), note


# -- any conversation with any template


WORDS = [
    "Hello", "Hello there, how are you?", "\n", "\n\n", " ", "  ", "\t", "\r\n", "é", "e\u0301", "🙂", "🏴‍☠️", "שלום",
    "assistant\n", "user", "42", "'s", "{{ x }}", "{}", "<", "|", "<b>", "\u00a0", "\u200b", "\ufeff", "\u2028", "日本",
    "<|im_end|>", "<|im_start|>user\n", "</s>", "[INST]", "<end_of_turn>", "<|eot_id|>",
]  # fmt: skip


def any_conversation(random: Random) -> Conversation:
    """Repeated, empty and hostile messages, with calls whose arguments are dicts or strings, with reasoning."""

    def text() -> str:
        return "".join(random.choices(WORDS, k=random.randint(0, 4)))

    same = text() if random.random() < 0.2 else None
    messages = [Message("system", text())] if random.random() < 0.3 else []
    tools = False
    for _ in range(random.randint(1, 5)):
        messages.append(Message("user", text() if same is None else same))
        extra: dict[str, Any] = {"reasoning_content": text()} if random.random() < 0.15 else {}
        if random.random() < 0.1:
            tools = True
            arguments = random.choice([{"city": "Paris"}, '{"city": "Paris"}', {"city": text()}, {}])
            extra["tool_calls"] = [{**CALL, "function": {"name": "get_weather", "arguments": arguments}}]
        messages.append(Message("assistant", text() if same is None else same, extra))
        if "tool_calls" in extra:
            messages.append(Message("tool", text(), {"name": "get_weather", "tool_call_id": "call00001"}))
            messages.append(Message("assistant", text()))
    return Conversation(tuple(messages), "a.jsonl:1", TOOLS if tools else ())


@pytest.mark.slow
@pytest.mark.parametrize("file", [*OWN, *BUILT_IN], ids=lambda file: file.stem)
def test_any_conversation_is_right_or_refused(bundles: Any, file: Path) -> None:
    bundle = bundles(file)
    encoder, tokenizer = Encoder(bundle, EncodeSettings()), bundle.tokenizer
    saved, tokenizer.chat_template = tokenizer.chat_template, bundle.chat.text
    random = Random(file.stem)
    for _ in range(60):
        sample = any_conversation(random)
        encoded = encoder.encode(sample)
        spelled = any(note.reason == "control_tokens" for note in encoded.notes)
        arguments = {"sanitize_control_tokens": True} if spelled else {}
        given = in_parts(sample) if bundle.chat.parts else sample
        verdict = judge(tokenizer, given, encoded, set(bundle.stop_ids), **arguments)
        assert not verdict.wrong, (verdict, sample)
    tokenizer.chat_template = saved


# -- the templates that trl carries


def compare_with_markers(bundle: TokenizerBundle) -> None:
    """What `{% generation %}` marks, and all of it that we train.

    Markers may hold more: what serving supplies itself (`<think>` of a generation prompt) right before a span, or the
    newline after the stop token. So each marked stretch holds one of our spans whole, and nothing of ours lies outside.
    Left out are tool calls, since Gemma 4 stops at the token that begins a tool result, which its markers do not hold,
    and emoji, since transformers maps a character of several tokens to the first of them.
    """
    if generation_markers(bundle.chat.text if bundle.chat else "") == "absent":
        return
    for name, sample in SHAPES.items():
        encoded = Encoder(bundle, EncodeSettings()).encode(sample)
        if len(encoded.examples) != 1 or name in ("tools", "emoji_and_rtl"):
            continue
        given = message_dicts((in_parts(sample) if bundle.chat and bundle.chat.parts else sample).messages)
        theirs = bundle.tokenizer.apply_chat_template(
            given, tools=list(sample.tools) or None, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, labels = encoded.examples[0].input_ids_T.tolist(), encoded.examples[0].labels_T.tolist()
        if theirs["input_ids"] != ids:
            continue  # the one turn is an example of its own, without what follows the stop token
        marked = trained_runs([0 if mark else -100 for mark in theirs["assistant_masks"]])
        ours = trained_runs(labels)
        assert all(any(a <= start and end <= b for a, b in marked) for start, end in ours), (bundle.template_name, name)
        assert len(marked) == len(ours), name


@pytest.mark.slow
def test_the_templates_of_trl(bundles: Any, tmp_path: Path, record_property: Any) -> None:
    """Needs the package index. 72 templates of current model families × 13 shapes."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "trl==1.16.0"]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"trl could not be downloaded: {done.stderr[-200:]}")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("trl/chat_templates/") and n.endswith(".jinja")]
        wheel.extractall(tmp_path, names)
    files = sorted((tmp_path / "trl" / "chat_templates").glob("*.jinja"))
    assert len(files) == 72
    found = {(file.stem, shape): v for file in files for shape, v in verdicts(bundles(file)).items()}
    assert not {key: v.wrong for key, v in found.items() if v.wrong}
    accepted = [v for v in found.values() if v.accepted and v.reason not in LEFT_OUT]
    record_property("refused", dict(Counter(v.reason for v in accepted if not v.right)))
    assert sum(v.right for v in accepted) >= 0.8 * len(accepted)
    for file in files:
        compare_with_markers(bundles(file))
        renderer = Encoder(bundles(file), EncodeSettings()).renderer
        for shape, sample in SHAPES.items():
            both = turns_both_ways(renderer, sample)
            assert both is None or both[0] is None or both[0] == both[1], (file.stem, shape)


def test_the_oracle_finds_a_shifted_span(bundles: Any) -> None:
    """Negative control of the oracle itself."""
    from dataclasses import replace

    import numpy as np

    bundle = bundles(next(file for file in OWN if file.stem == "chatml_plain"))
    sample = SHAPES["two_turns"]
    encoded = Encoder(bundle, EncodeSettings()).encode(sample)
    (example,) = encoded.examples
    start, end = trained_runs(example.labels_T.tolist())[0]
    wrong = []
    for change in ({start: 0.0}, {start - 1: 1.0}, {end - 1: 0.0}, {end: 1.0}):
        weights_T = example.weights_T.copy()
        weights_T[np.array(list(change))] = np.array(list(change.values()))
        shifted = replace(encoded, examples=(replace(example, weights_T=weights_T),))
        wrong.append(judge(bundle.tokenizer, sample, shifted, set(bundle.stop_ids)).wrong)
    assert all(wrong), wrong
