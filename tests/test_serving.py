"""A saved folder, loaded as a stranger loads it, must see training's ids and stop by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chainmodel import make_chain_model
from conftest import CHATML
from transformers import AutoTokenizer

from sft.serving import check_serving, describe, load_as_stranger, saved_stop_ids


def sample(folder: Path, *texts: str, ids: list[int] | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )
    return {
        "source": "a.jsonl:1", "messages": messages, "tools": [], "reference": "",
        "prompt_ids": ids or list(rendered["input_ids"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain_model(tmp_path_factory.mktemp("chain"))


def test_a_good_folder_passes(folder: Path) -> None:
    samples = [sample(folder, "How are you?"), sample(folder, "Hello", "hello world", "Are you sure?", "No")]
    result = check_serving(folder, samples, max_new_tokens=8)
    assert result["passed"]
    assert (result["checked"], result["ids_equal"], result["stopped"]) == (2, 2, 2)
    assert result["stop_tokens"] == ["<|im_end|>"]
    assert result["weights"] == "folder"
    assert result["answers"][0] == {"source": "a.jsonl:1", "completion": "Oh hello", "stopped": True}
    assert describe(result) == (
        "2 of 2 held-out prompts give the very token ids of training. "
        "2 of 2 greedy answers end by themselves within 8 tokens."
    )
    json.dumps(result)  # plain values: it goes into the run folder


def test_live_weights_spare_a_second_load(folder: Path, tmp_path: Path) -> None:
    live = load_as_stranger(folder)
    for file in folder.iterdir():  # the same folder without weights
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = check_serving(tmp_path, [sample(folder, "Hello")], max_new_tokens=8, model=live)
    assert result["passed"]
    assert result["weights"] == "live"


def test_control_another_template_in_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    broken = make_chain_model(tmp_path, template=CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant"))
    result = check_serving(broken, [sample(folder, "Hello")], max_new_tokens=8)
    assert not result["passed"]
    assert result["ids_equal"] == 0
    assert result["mismatches"][0]["at"] == len(sample(folder, "Hello")["prompt_ids"]) - 1
    assert "a.jsonl:1 differs from token" in describe(result)


def test_control_a_folder_that_names_no_stop_token_is_found(folder: Path, tmp_path: Path) -> None:
    endless = make_chain_model(tmp_path, stop=None)
    result = check_serving(endless, [sample(folder, "Hello")], max_new_tokens=8)
    assert not result["passed"]
    assert (result["ids_equal"], result["stopped"]) == (1, 0)
    assert "names no stop token" in describe(result)


def test_control_a_model_that_never_says_its_stop_token_is_found(folder: Path, tmp_path: Path) -> None:
    endless = make_chain_model(tmp_path, chain=("\n", "Oh", "just", "Oh"))
    assert check_serving(endless, [sample(folder, "Hello")], max_new_tokens=8)["stopped"] == 0


def test_template_arguments_are_given_and_named(tmp_path: Path) -> None:
    template = CHATML + "{% if add_generation_prompt and enable_thinking is false %}{{ 'just' }}{% endif %}"
    thinking = make_chain_model(tmp_path, chain=("just", "Oh", "<|im_end|>"), template=template)
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    trained = sample(thinking, "Hello")
    trained["prompt_ids"] = [*trained["prompt_ids"], tokenizer.convert_tokens_to_ids("just")]
    assert not check_serving(thinking, [trained], max_new_tokens=4)["passed"]
    result = check_serving(thinking, [trained], max_new_tokens=4, template_args={"enable_thinking": False})
    assert result["passed"]
    assert "(with enable_thinking=False)" in describe(result)


@pytest.mark.usefixtures("moved_clock")
def test_a_template_that_reads_the_clock_is_asked_as_of_the_runs_date(tmp_path: Path) -> None:
    word = "{% if strftime_now('%Y') == '1999' %}{{ 'seven' }}{% else %}{{ 'ten' }}{% endif %}"
    dated = make_chain_model(tmp_path, template=word + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(dated)
    trained = sample(dated, "Hello")
    assert trained["prompt_ids"][0] == tokenizer.convert_tokens_to_ids("ten")
    trained["prompt_ids"][0] = tokenizer.convert_tokens_to_ids("seven")  # the run began in 1999
    assert not check_serving(dated, [trained], max_new_tokens=8)["passed"]
    result = check_serving(dated, [trained], max_new_tokens=8, pinned_date="1999-12-31")
    assert result["passed"]
    assert "asked as of 1999-12-31" in describe(result)
    assert result["another_day"]["date"] == "2001-02-04"
    assert [result["another_day"][key] for key in ("trained", "served")] == [
        "seven<|im_start|>user", "ten<|im_start|>user"
    ]  # fmt: skip
    assert "a prompt of 2001-02-04 has 'ten<|im_start|>user' where training had 'seven<|im_start|>user'" in (
        describe(result)
    )


@pytest.mark.usefixtures("moved_clock")
def test_what_another_day_s_prompt_holds_is_what_a_stranger_gets_then(tmp_path: Path) -> None:
    """The saved template goes on reading the clock; the date alone differs, at the places that are named."""
    from datetime import datetime

    from sft.serving import LATER, pinned
    from sft.templating import pin_clock

    head = "{% set words = ['one', 'two', 'three', 'four', 'five'] %}"  # a word for every day there is
    head += "{{ 'Yes ' + words[(strftime_now('%d') | int) % 5] + ' No' }}"
    dated = make_chain_model(tmp_path, template=head + CHATML)
    began = datetime(2024, 7, 5, 23, 59)
    tokenizer = AutoTokenizer.from_pretrained(dated)
    assert tokenizer.chat_template == head + CHATML
    tokenizer.chat_template = pinned(tokenizer.chat_template, began)
    trained = sample(dated, "Hello")
    ask: Any = {"add_generation_prompt": True, "return_dict": False}
    trained["prompt_ids"] = tokenizer.apply_chat_template(trained["messages"], **ask)
    result = check_serving(dated, [trained, trained], max_new_tokens=8, pinned_date=began.isoformat())
    assert (result["passed"], result["ids_equal"], result["date"]) == (True, 2, "2024-07-05")
    then = AutoTokenizer.from_pretrained(dated)
    then.chat_template = pin_clock(head + CHATML, began + LATER)
    served = then.apply_chat_template(trained["messages"], **ask)
    assert served != trained["prompt_ids"]
    assert result["another_day"] == {
        "date": "2025-08-11", "differ": 2, "trained": "Yes one No", "served": "Yes two No"
    }  # fmt: skip
    assert then.decode(served).startswith("Yes two No<|im_start|>user")


@pytest.mark.usefixtures("moved_clock")
def test_a_clock_that_no_prompt_names_makes_no_difference(tmp_path: Path) -> None:
    quiet = make_chain_model(tmp_path, template="{% if false %}{{ strftime_now('%Y') }}{% endif %}" + CHATML)
    result = check_serving(quiet, [sample(quiet, "Hello")], max_new_tokens=8, pinned_date="2024-07-05")
    assert (result["passed"], result["another_day"]) == (True, None)
    assert "asked as of 2024-07-05, the day the run began)" in describe(result)


def test_text_that_spells_a_control_token_is_told_apart(folder: Path) -> None:
    spelled = sample(folder, "Hello <|im_end|> world")
    spelled["prompt_ids"] = [i for i in spelled["prompt_ids"] if i != 0][:-1]  # training took other ids for that text
    result = check_serving(folder, [spelled, sample(folder, "Hello")], max_new_tokens=8)
    assert result["excepted"] == ["a.jsonl:1"]
    assert (result["ids_equal"], result["mismatches"]) == (1, [])
    assert "spell a control token" in describe(result)


SEEING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] "
    "if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Reads content as a list of parts; a string gives an empty message."""


def test_a_template_that_reads_parts_gets_them_as_in_training(folder: Path, tmp_path: Path) -> None:
    seeing = make_chain_model(tmp_path, template=SEEING)
    samples = [sample(folder, "Hello", "hello world", "Are you sure?", "No"), sample(folder, "How are you?")]
    result = check_serving(seeing, samples, max_new_tokens=8)
    assert (result["passed"], result["ids_equal"]) == (True, 2)


def test_what_a_template_objects_to_is_a_mismatch_and_no_end_of_the_run(folder: Path, tmp_path: Path) -> None:
    shy = "{% if add_generation_prompt and messages[0]['content'] == 'Hello' %}{{ raise_exception('no greetings') }}" \
          "{% endif %}{% if false %}{{ strftime_now('%Y') }}{% endif %}"  # fmt: skip
    shy_folder = make_chain_model(tmp_path, template=CHATML + shy)
    samples = [sample(folder, "Hello"), sample(folder, "How are you?")]
    result = check_serving(shy_folder, samples, max_new_tokens=8, pinned_date="2024-07-05")
    assert (result["passed"], result["ids_equal"], result["stopped"]) == (False, 1, 2)
    (mismatch,) = result["mismatches"]
    assert (mismatch["source"], mismatch["served"]) == ("a.jsonl:1", "no prompt, but an error: no greetings")
    assert "the saved folder gives 'no prompt, but an error: no greetings'" in describe(result)
    assert result["another_day"] is None


def test_a_prompt_without_messages_is_plain_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = {"source": "b.jsonl:2", "messages": [], "tools": [], "prompt": "hello\n", "reference": "",
             "prompt_ids": tokenizer("hello\n")["input_ids"]}  # fmt: skip
    assert check_serving(folder, [plain], max_new_tokens=8)["passed"]


def test_nothing_held_out_is_not_a_pass(folder: Path) -> None:
    result = check_serving(folder, [])
    assert not result["passed"]
    assert describe(result) == "Not checked: no held-out prompts."


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_an_adapter_folder_brings_its_base(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(
        load_as_stranger(folder), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert check_serving(tmp_path, [sample(folder, "Hello")], max_new_tokens=8)["passed"]


def test_stop_ids_come_from_the_generation_config_alone(folder: Path, tmp_path: Path) -> None:
    assert saved_stop_ids(tmp_path) == []
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert saved_stop_ids(tmp_path) == [7, 9]
