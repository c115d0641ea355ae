"""Built-in templates to the letter, and the tokenizer with its template, stop tokens, clock and bounds."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chatcases import bpe_tokenizer, family
from conftest import CHATML, make_tokenizer

from sft.data.encode import Encoder
from sft.data.outcome import EncodeSettings
from sft.errors import ModelError, SftError, TemplateError
from sft.templating import ChatTemplate, TemplateTimeout, deadline, pin_clock
from sft.tokenizer import fit_arguments, load_tokenizer, message_form
from sft.types import Conversation, Message, Passage

PIRATE = [
    {"role": "system", "content": "You are a friendly chatbot who always responds in the style of a pirate"},
    {"role": "user", "content": "How many helicopters can a human eat in one sitting?"},
    {"role": "assistant", "content": " Oh just 6.\n"},
    {"role": "user", "content": "Are you sure about that?"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's tokenizer: BOS, end of text, no template."""
    return bpe_tokenizer(tmp_path_factory.mktemp("base"), None, "<s>", "</s>", ())


def render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text


def test_chatml_is_the_book_s(base: Path) -> None:
    tokenizer = load_tokenizer(str(base), template="chatml").tokenizer
    assert render(tokenizer, PIRATE, prompt=True) == (
        "<s><|im_start|>system\n"
        "You are a friendly chatbot who always responds in the style of a pirate<|im_end|>\n"
        "<|im_start|>user\nHow many helicopters can a human eat in one sitting?<|im_end|>\n"
        "<|im_start|>assistant\nOh just 6.<|im_end|>\n"
        "<|im_start|>user\nAre you sure about that?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chatml_without_bos_writes_none(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), template="chatml").tokenizer
    assert render(tokenizer, PIRATE[1:2]) == (
        "<|im_start|>user\nHow many helicopters can a human eat in one sitting?<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "roles",
    ["user user", "assistant", "user system assistant", "user assistant system", "user tool", "system system",
     "user assistant tool assistant", "system assistant", "developer user"],
)  # fmt: skip
def test_chatml_refuses_what_does_not_alternate(base: Path, roles: str) -> None:
    import jinja2

    tokenizer = load_tokenizer(str(base), template="chatml").tokenizer
    with pytest.raises(jinja2.TemplateError, match=r"Conversation roles must alternate user/assistant/user/assistant"):
        render(tokenizer, [{"role": role, "content": "x"} for role in roles.split()])


def test_chatml_refuses_tools(base: Path) -> None:
    import jinja2

    tokenizer = load_tokenizer(str(base), template="chatml").tokenizer
    with pytest.raises(jinja2.TemplateError, match="must alternate"):
        tokenizer.apply_chat_template(PIRATE, tools=[{"type": "function"}], tokenize=False)


def test_zephyr_ends_messages_with_end_of_text(base: Path) -> None:
    tokenizer = load_tokenizer(str(base), template="zephyr").tokenizer
    assert render(tokenizer, PIRATE[:3]) == (
        "<|system|>\nYou are a friendly chatbot who always responds in the style of a pirate</s>\n"
        "<|user|>\nHow many helicopters can a human eat in one sitting?</s>\n"
        "<|assistant|>\n Oh just 6.\n</s>\n"
    )
    assert render(tokenizer, PIRATE[1:2], prompt=True).endswith("sitting?</s>\n<|assistant|>\n")


def test_tulu_ends_answers_with_end_of_text(tokenizer_folder: Path) -> None:
    bundle = load_tokenizer(str(tokenizer_folder), template="tulu")
    question, answer = {"role": "user", "content": "How are you doing?"}, {"role": "assistant", "content": "Fine."}
    tokenizer = bundle.tokenizer
    assert render(tokenizer, [question, answer]) == (
        "<|user|>\nHow are you doing?\n<|assistant|>\nFine.<|im_end|>"  # this tokenizer's own end-of-text token
    )
    assert render(tokenizer, [question, answer, question], prompt=True) == (
        "<|user|>\nHow are you doing?\n<|assistant|>\nFine.<|im_end|>\n<|user|>\nHow are you doing?\n<|assistant|>\n"
    )


def test_chatml_on_a_base_model_adds_its_tokens_and_stops_at_them(base: Path) -> None:
    before = len(load_tokenizer(str(base), template="zephyr").tokenizer)
    bundle = load_tokenizer(str(base), template="chatml")
    tokenizer = bundle.tokenizer
    assert bundle.added_tokens == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(list(bundle.added_tokens)) == [before, before + 1]
    assert tokenizer.convert_ids_to_tokens(list(bundle.stop_ids)) == ["<|im_end|>", "</s>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(bundle.end_of_text) == "</s>"
    assert any("<|im_start|> <|im_end|>" in note for note in bundle.notes)
    assert tokenizer("a<|im_end|>", add_special_tokens=False)["input_ids"][-1] == bundle.stop_ids[0]


def test_the_template_in_use_is_saved_with_the_tokenizer(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bundle = load_tokenizer(str(base), template="chatml")
    bundle.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert render(again, PIRATE) == render(bundle.tokenizer, PIRATE)
    assert again.eos_token == "<|im_end|>"


def test_no_template_names_the_cure(base: Path) -> None:
    bundle = load_tokenizer(str(base))
    assert (bundle.template, bundle.template_name, bundle.chat) == (None, "none", None)
    with pytest.raises(TemplateError, match=r"base\d* has no chat template: .*data\.template: chatml"):
        bundle.require_chat()


def test_no_template_serves_rows_that_need_none_and_no_conversation(base: Path) -> None:
    bundle = load_tokenizer(str(base))
    encoder = Encoder(bundle, EncodeSettings())
    (example,) = encoder.encode(Passage("", "Hello you", "a.jsonl:1", "text")).examples
    assert bundle.tokenizer.decode(example.input_ids_T) == "Hello you</s>"
    assert example.labels_T.tolist() == example.input_ids_T.tolist()
    messages = (Message("user", "Hello"), Message("assistant", "you"))
    with pytest.raises(TemplateError, match="the rows are conversations"):
        encoder.encode(Conversation(messages, "a.jsonl:2"))


def test_neither_template_nor_end_of_text_is_refused(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TemplateError, match="nothing could be trained to stop"):
        load_tokenizer(str(folder))


def test_an_unknown_template_names_the_nearest(base: Path) -> None:
    with pytest.raises(TemplateError, match="Did you mean 'chatml'"):
        load_tokenizer(str(base), template="chatlm")


def test_a_missing_tokenizer_is_a_user_s_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.name"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_template_of_the_user_s_own(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    bundle = load_tokenizer(str(base), template=str(file))
    assert bundle.template == CHATML
    assert bundle.added_tokens == ("<|im_start|>", "<|im_end|>")
    file.write_text("{% for message in messages %}{{ message.content }")
    with pytest.raises(TemplateError, match=r"not valid Jinja.*line 1"):
        load_tokenizer(str(base), template=str(file))
    with pytest.raises(TemplateError, match="cannot read"):
        load_tokenizer(str(base), template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("name", "stop", "closes"),
    [
        ("phi3_style", "<|end|>", True),  # not the <|endoftext|> at the very end
        ("command_r_style", "<|END_OF_TURN_TOKEN|>", True),  # not <|END_RESPONSE|> before it
        ("gptoss_style", "<|return|>", True),
        ("gemma_model_role", "<end_of_turn>", True),
        ("mistral_v1", "</s>", True),
        ("glm_open", "<|endoftext|>", False),  # only the next role's marker closes
        ("alpaca_style", "</s>", False),
    ],
)
def test_the_stop_token_is_found_by_probing(tmp_path: Path, name: str, stop: str, closes: bool) -> None:
    template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, template, *family(name))))
    assert bundle.tokenizer.convert_ids_to_tokens(bundle.stop_ids[0]) == stop
    assert bundle.closes is closes
    assert closes or any("generation settings" in note for note in bundle.notes)


def test_serving_s_stops_come_after_the_template_s(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    bundle = load_tokenizer(str(folder))
    im_end = bundle.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert bundle.stop_ids == (im_end, 5, 6)


@pytest.mark.parametrize(
    ("stops", "comment", "ends"),
    [
        (["<|endoftext|>"], "", "<|im_end|>"),  # as base models have it that bring a template
        ([], "", "<|im_end|>"),
        (["<|endoftext|>", "<|im_end|>"], "", "<|endoftext|>"),  # serving stops at it, whatever eos_token says
        (["<|endoftext|>"], "{# eos_token #}", "<|endoftext|>"),  # another one would change what is rendered
    ],
)
def test_a_turn_s_end_at_which_serving_does_not_stop_becomes_the_eos_token(
    tmp_path: Path, stops: list[str], comment: str, ends: str
) -> None:
    from transformers import AutoTokenizer

    folder = make_tokenizer(tmp_path, CHATML + comment)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(stops)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids or None}))
    bundle = load_tokenizer(str(folder))
    named = bundle.tokenizer.convert_ids_to_tokens([*bundle.stop_ids, bundle.end_of_text])
    assert (bundle.tokenizer.eos_token, named) == (ends, ["<|im_end|>", "<|endoftext|>", "<|endoftext|>"])
    assert any("eos_token is now <|im_end|>" in note for note in bundle.notes) is (ends == "<|im_end|>")
    bundle.tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == ends


WANTS_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for call in m.tool_calls or [] %}"
    "{{ call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLING = (
    Message("user", "Paris?"),
    Message("assistant", "", {"tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "näher": [1]}}}]}),
    Message("tool", "sun"),
    Message("assistant", "It shines."),
)  # fmt: skip


PRINTS = WANTS_TEXT.replace("+ ' ' + call['function']['arguments']", "}} {{ call['function']['arguments']")


@pytest.mark.parametrize("template", [WANTS_TEXT, PRINTS])
def test_a_template_that_reads_arguments_as_text_gets_json(tmp_path: Path, template: str) -> None:
    """One that adds them to a string objects to objects; one that prints them would print Python's `{'city': …}`."""
    bundle = load_tokenizer(str(bpe_tokenizer(tmp_path, template, None, "<|im_end|>", ())))
    assert any("arguments of tool calls as text" in note for note in bundle.notes)
    (example,) = Encoder(bundle, EncodeSettings()).encode(Conversation(CALLING, "a.jsonl:1")).examples
    trained = bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0])
    assert trained == 'weather {"city": "Paris", "näher": [1]}<|im_end|>It shines.<|im_end|>'
    form = message_form(bundle.tokenizer, {})
    messages = [form(message.as_dict()) for message in CALLING[:3]]
    served = bundle.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert example.input_ids_T[: len(served)].tolist() == served, "what the check of serving asks"


@pytest.mark.parametrize(
    "template", [CHATML, WANTS_TEXT.replace("['arguments']", "['arguments'] | tojson"), WANTS_TEXT + "{{ 1 + 'a' }}"]
)
def test_arguments_are_objects_where_a_template_takes_them_or_takes_nothing(template: str) -> None:
    chat = ChatTemplate(template, template)
    notes: list[str] = []
    assert fit_arguments(chat, notes) is chat
    assert notes == []


@pytest.mark.parametrize(
    "printed",
    [
        "call['function']",
        "call['function']['arguments'] | string ~ call.function.arguments.pitch.upper()",
        "call['function']['arguments'] if call['function']['arguments'] is mapping",
    ],
)
def test_calls_that_can_only_be_printed_as_python_does_are_a_note(printed: str) -> None:
    chat = ChatTemplate(*[PRINTS.replace("call['function']['arguments']", printed)] * 2)
    notes: list[str] = []
    assert fit_arguments(chat, notes) is chat
    (note,) = notes
    assert "as Python prints them, with {'pitch': 'high'}, which is no JSON" in note


def test_nothing_to_stop_at_is_an_error(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TemplateError, match="nothing could be trained to stop"):
        load_tokenizer(str(folder))


def test_the_digest_sees_template_arguments_and_tokens(base: Path) -> None:
    digests = {
        load_tokenizer(str(base), template=template, template_args=arguments).digest
        for template, arguments in (("chatml", {}), ("zephyr", {}), ("zephyr", {"date_string": "today"}))
    }
    assert len(digests) == 3
    assert load_tokenizer(str(base), template="zephyr").digest in digests


# -- the clock


@pytest.mark.usefixtures("moved_clock")
def test_a_template_that_reads_the_clock_is_pinned(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y, %A %H:%M') }}" + CHATML
    folder = str(make_tokenizer(tmp_path, template))
    bundle = load_tokenizer(folder, pinned_date="2024-07-05T06:07:08")
    assert bundle.chat is not None
    assert bundle.chat.render([PIRATE], generation_prompt=False)[0].startswith("05 Jul 2024, Friday 06:07<|im_start|>")
    assert bundle.tokenizer.chat_template == template, "what is saved still reads the clock"
    assert any("2024-07-05" in note for note in bundle.notes)
    assert bundle.digest != load_tokenizer(folder, pinned_date="2024-07-06").digest


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}x{% endif %}\n", "text "])
def test_pinning_changes_nothing_but_the_clock(start: str) -> None:
    from datetime import datetime

    from transformers.utils.chat_template_utils import render_jinja_template

    plain = start + "{{ messages[0].content }}\n{% if false %}{{ strftime_now('%Y') }}{% endif %}\n"
    texts = [
        render_jinja_template([PIRATE], chat_template=t)[0][0] for t in (plain, pin_clock(plain, datetime(2024, 1, 2)))
    ]
    assert texts[0] == texts[1]


# -- hostile templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ ([1] * 10 ** 12) | length }}",
        "{{ 'a'.ljust(10 ** 12) | length }}",
        "{{ '%999999999999d' % 1 }}",
        "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) | length }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    ],
    ids=lambda template: template[:40],
)
def test_hostile_templates_are_refused(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError):
        load_tokenizer(str(make_tokenizer(tmp_path / "tokenizer", template + CHATML)))
    assert not (tmp_path / "canary").exists()


def test_a_template_without_end_is_stopped() -> None:
    chat = ChatTemplate(*["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"] * 2)
    started = time.monotonic()
    with pytest.raises(TemplateTimeout, match="loop without end"), deadline(0.2, "the chat template"):
        chat.render([PIRATE], generation_prompt=False)
    assert time.monotonic() - started < 5
    assert issubclass(TemplateTimeout, SftError)


def test_constants_that_take_for_ever_to_compute_are_stopped() -> None:
    """Jinja computes constants while it compiles, and drops every Exception that comes."""
    chat = ChatTemplate(*["{{ ('a' * 10 ** 7) | wordwrap(1) | length }}"] * 2)
    started = time.monotonic()
    with pytest.raises(TemplateTimeout), deadline(0.3, "the chat template"):
        chat.render([PIRATE], generation_prompt=False)
    assert time.monotonic() - started < 5


def test_memory_is_bounded_while_a_template_renders_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr("sft.templating.RENDER_BYTES", 256 << 20)
    doubled = "{% for i in range(n) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}"
    text = "{% set ns = namespace(a='aaaaaaaa') %}" + doubled
    with deadline(30, "the chat template"):
        assert len(ChatTemplate(text, text, {"n": 10}).render([PIRATE], generation_prompt=False)[0]) == 8 << 10
        with pytest.raises(TemplateError, match=r"takes more than .* GiB of memory"):
            ChatTemplate(text, text, {"n": 30}).render([PIRATE], generation_prompt=False)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
        assert len(bytes(512 << 20)) == 512 << 20, "what is no template's is not bounded"
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_deadline_gives_somebody_else_s_timer_back() -> None:
    import signal

    def other(signum: int, frame: object) -> None:
        raise AssertionError

    before, timer = signal.signal(signal.SIGALRM, other), signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with deadline(1, "x"):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 1
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) is other
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_the_deadline_is_no_hindrance_in_a_thread() -> None:
    done: list[int] = []

    def work() -> None:
        with deadline(1, "x"):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
