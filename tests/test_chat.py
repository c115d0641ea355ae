"""Talking to a model from a terminal and from a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chainmodel import make_chain_model
from conftest import CHATML

from sft import chat as chat_module
from sft.chat import Streamer, Talk, _messages, command, open_model, sampling_of, stop_ids_of
from sft.errors import ModelError
from sft.generate import GREEDY, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain_model(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def talk(folder: Path) -> Talk:
    model, tokenizer, arguments = open_model(str(folder))
    return Talk(model, tokenizer, stop_ids_of(str(folder), model, tokenizer), template_args=arguments)


def in_a_terminal(folder: Path, typed: list[tuple[str, str]]) -> tuple[int, str]:
    """(exit code, screen) of a chat on a terminal: of each pair, waits for the first, then types the second."""
    import pty
    import select
    import time

    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, "-m", "sft", "chat", str(folder)])
    seen, end = "", time.monotonic() + 120
    for wanted, keys in [*typed, ("\0", "")]:
        shown = ""
        while wanted not in shown.replace("\r\n", "\n") and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 4096).decode()
                except OSError:  # how Linux says that the other end is closed
                    break
        seen += shown.replace("\r\n", "\n")
        os.write(terminal, keys.encode()) if keys else None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside torch's threads: the child only execs
def test_a_terminal_streams_an_answer_and_leaves_at_the_end_of_input(folder: Path) -> None:
    code, screen = in_a_terminal(folder, [("\n> ", "Hello\n"), ("Oh hello\n\n> ", '"""one\n'), ("> ", 'two"""\n'),
                                          ("Oh hello\n\n> ", "\x04")])  # fmt: skip
    assert code == 0, screen
    assert screen.count("Oh hello") == 2
    assert "Traceback" not in screen


def run_chat(folder: Path, lines: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from sft.chat import chat; sys.exit(chat(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)], input=lines, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip


def test_a_script_gets_one_answer_a_line_on_stdout(folder: Path) -> None:
    result = run_chat(folder, "Hello\n/system You are a pirate\n\nHow are you ?\n/reset\n/dance\nHello\n/quit\nHello\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "Oh hello\n" * 3
    assert "no command /dance" in result.stderr


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\ntwo\n", ["one\n", "two\n"]),
        ('"""one\n  two\n\nthree"""\nfour\n', ["one\n  two\n\nthree", "four\n"]),
        ('"""one"""\n', ["one"]),
        ('"""\none\n"""\n', ["\none\n"]),
        ('"""one\ntwo\n', ["one\ntwo"]),  # the input ended first
        ('say """one""" now\n', ['say """one""" now\n']),
    ],
)
def test_a_message_of_several_lines_stands_in_quotes(typed: str, messages: list[str]) -> None:
    assert list(_messages(typed.splitlines(keepends=True))) == messages


def test_the_conversation_is_remembered_until_it_is_reset(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    command(talk, "/system You are a pirate")
    command(talk, "Hello")
    command(talk, "Are you sure ?")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[2]["content"] == "Oh hello"
    command(talk, "/reset")
    assert talk.messages == [{"role": "system", "content": "You are a pirate"}]
    command(talk, "/system")
    assert talk.messages == []
    assert command(talk, "   ")
    assert not command(talk, "/quit")
    assert capsys.readouterr().out == "Oh hello\nOh hello\n"


def test_the_oldest_turns_make_room(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.model.config.max_position_embeddings = 64
    command(talk, "/system You are a pirate")
    for _ in range(6):
        command(talk, "one two three four five")
    assert talk.messages[0]["role"] == "system"
    assert talk.messages[1]["role"] == "user"
    assert len(talk.messages) < 13
    assert "left out" in capsys.readouterr().err
    command(talk, "one " * 100)
    assert "the model reads at most 64" in capsys.readouterr().err
    assert talk.messages[-1]["role"] == "assistant"  # the message that did not fit is not part of the conversation


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk: Talk) -> None:
    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer("Hello", write)
    assert said == ["Oh"]
    assert talk.messages[-1] == {"role": "assistant", "content": "Oh"}


def test_a_template_that_refuses_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    folder = make_chain_model(tmp_path, template=strict)
    model, tokenizer, _ = open_model(str(folder))
    talk = Talk(model, tokenizer, stop_ids_of(str(folder), model, tokenizer))
    command(talk, "/system be kind")
    command(talk, "Hello")
    assert "refuses this conversation: No system role" in capsys.readouterr().err


def test_a_template_that_reads_parts_is_asked_in_parts(tmp_path: Path) -> None:
    seeing = CHATML.replace("message['content']", "message['content'][0]['text']")
    folder = str(make_chain_model(tmp_path, template=seeing))
    model, tokenizer, arguments = open_model(folder)
    talk = Talk(model, tokenizer, stop_ids_of(folder, model, tokenizer), template_args=arguments)
    command(talk, "/system You are a pirate")
    talk.messages.append({"role": "user", "content": "Hello"})
    assert tokenizer.decode(talk._prompt()[0]) == (
        "<|im_start|>system\nYou are a pirate<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_model_cannot_chat(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        open_model(str(make_chain_model(tmp_path, template=None)))


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        open_model(str(tmp_path / "none"))


class Bytes:
    """Each id is a byte of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_are_written_whole() -> None:
    said: list[str] = []
    streamer = Streamer(Bytes(), [0], said.append)
    streamer.put(torch.tensor([[72, 73]]))  # the prompt
    for byte in "a€b".encode():
        streamer.put(torch.tensor([byte]))
    streamer.put(torch.tensor([0]))
    streamer.end()
    assert said == ["a", "€", "b"]
    assert streamer.text == "a€b"


def test_a_cut_character_is_written_at_the_end() -> None:
    said: list[str] = []
    streamer = Streamer(Bytes(), [0], said.append)
    streamer.put(torch.tensor([[72]]))
    streamer.put(torch.tensor(["€".encode()[0]]))
    assert said == []
    streamer.end()
    assert said == ["\ufffd"]


def test_sampling_follows_the_model_where_it_says_so(folder: Path) -> None:
    model, _, _ = open_model(str(folder))
    assert sampling_of(model) == chat_module.TERMINAL_SAMPLING
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    model.generation_config.top_k = None
    assert sampling_of(model) == Sampling(temperature=0.3)
    assert GREEDY.temperature == 0


def test_sampled_answers_stop_too(talk: Talk) -> None:
    talk.sampling = Sampling(temperature=0.01, top_p=0.9, top_k=5, repetition_penalty=1.0)
    assert talk.answer("Hello", lambda text: None) == "Oh hello"


def test_stop_tokens_of_an_adapter_folder_win_over_the_base(folder: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = open_model(str(folder))
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert stop_ids_of(str(tmp_path), model, tokenizer) == [4, 5]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids_of("some/hub-id", model, tokenizer) == [end]


def test_a_run_remembers_what_its_template_was_given(tmp_path: Path) -> None:
    template = CHATML + "{% if add_generation_prompt and not thinking %}{{ 'just' }}{% endif %}"
    run = tmp_path / "run"
    make_chain_model(run / "final", chain=("just", "Yes", "<|im_end|>"), template=template)
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").write_text(
        "model: {name: x}\ndata: {train: [a.jsonl], template_args: {thinking: false}}\n", encoding="utf-8"
    )
    model, tokenizer, arguments = open_model(str(run))
    assert arguments == {"thinking": False}
    talk = Talk(model, tokenizer, stop_ids_of(str(run), model, tokenizer), template_args=arguments)
    assert talk.answer("Hello", lambda text: None) == "Yes"
