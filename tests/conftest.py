"""Shared by all tests: no network, a tokenizer one can read by eye, models small enough for a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SENTENCES = """
You are a friendly pirate Oh just 6 Are you sure about that ? Yes No How many helicopters can human eat in one
sitting . , ! Hello hello world one two three four five six seven eight nine ten system user assistant tool
"""
WORDS = SENTENCES.split()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A word tokenizer saved as a folder: one id a word, one a newline, one a space; unknown characters are [UNK]."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "\n": 1, " ": 2}
    for word in WORDS:
        vocabulary.setdefault(word, len(vocabulary))
    for character in map(chr, range(33, 127)):
        vocabulary.setdefault(character, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="[UNK]"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def make_model(folder: Path, *, seed: int = 0, tie: bool = True, layers: int = 2, dropout: float = 0.0) -> Path:
    """A random Llama of some ten thousand weights, with the tokenizer above, saved as a folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie, attention_dropout=dropout,
            bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of the test's own, which it may change."""
    return make_model(tmp_path / "model")


CLOCKS = {
    "a leap day": ("2028-02-29T09:08:07", "UTC"),
    "a month's last seconds": ("2027-04-30T23:59:59", "Europe/Berlin"),
    "a year's last seconds": ("2026-12-31T23:59:59", "UTC"),
    "the 9th, where the day begins": ("2029-01-09T00:30:00", "Pacific/Kiritimati"),
    "where it ends, in an hour that comes twice": ("2027-11-07T01:30:00", "America/Los_Angeles"),
}
"""Local times and their zones: days and zones on which a test of dates may fail that passes today."""


@pytest.fixture(params=CLOCKS.values(), ids=CLOCKS)
def moved_clock(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs at each of CLOCKS; the clock goes on from there, over midnight."""
    with clock_at(*request.param):
        yield


def clock_at(local: str, zone: str) -> AbstractContextManager[Any]:
    """This process's clock, in C code too, and its time zone."""
    import time_machine

    return time_machine.travel(datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(zone)), tick=True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data of this test alone, gone with it."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
