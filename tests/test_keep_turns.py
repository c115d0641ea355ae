"""`data.over_long: keep_turns`: as few turns as possible go, behind the system prompt; held against every cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chatcases import TOOLS
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.configfile import load_config
from sft.data.encode import Encoder, EncodeSettings
from sft.data.loader import prepare
from sft.data.shorten import behind, last_turns, turn_starts
from sft.prepare import load_bundle
from sft.tokenizer import TokenizerBundle, load_tokenizer
from sft.types import Conversation, Message

TOOLED = (Path(__file__).parent / "templates" / "hermes_tools.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TokenizerBundle:
    return load_tokenizer(str(make_tokenizer(tmp_path_factory.mktemp("words"), TOOLED)))


def chat(*messages: tuple[str, str], **more: Any) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in messages), "a.jsonl:1", **more)  # type: ignore[arg-type]


def encoder(bundle: TokenizerBundle, max_tokens: int, **more: Any) -> Encoder:
    return Encoder(bundle, EncodeSettings(**{"over_long": "keep_turns", "max_tokens": max_tokens, **more}))


def tokens(bundle: TokenizerBundle, sample: Conversation) -> int:
    (example,) = encoder(bundle, 10**6).encode(sample).examples
    return len(example.input_ids_T)


TURNS = [("user", "Hello"), ("assistant", "one"), ("user", "two"), ("assistant", "three"), ("user", "four"),
         ("assistant", "five")]  # fmt: skip


def test_the_system_prompt_the_tools_and_the_last_turns_remain(bundle: TokenizerBundle) -> None:
    whole = chat(("system", "Hello"), *TURNS, tools=TOOLS)
    wanted = chat(("system", "Hello"), *TURNS[2:], tools=TOOLS)
    limit = tokens(bundle, wanted)
    encoded = encoder(bundle, limit).encode(whole)
    (example,), (expected,) = encoded.examples, encoder(bundle, limit).encode(wanted).examples
    assert example.input_ids_T.tolist() == expected.input_ids_T.tolist()
    assert example.weights_T.tolist() == expected.weights_T.tolist()
    assert [(n.action, n.reason, n.detail) for n in encoded.notes] == [
        ("cut", "over_long", f"2 of 7 messages, behind the system prompt, left out to fit data.max_tokens: {limit}")
    ]
    fits = encoder(bundle, tokens(bundle, whole)).encode(whole)
    assert not fits.notes, "control: what fits is not cut"
    assert encoder(bundle, limit, over_long="drop").encode(whole).notes[0].action == "dropped", "control: the default"


def test_a_last_exchange_that_is_too_long_drops_the_row(bundle: TokenizerBundle) -> None:
    sample = chat(*TURNS[:4], ("user", "four " * 40), ("assistant", "five"))
    encoded = encoder(bundle, 30).encode(sample)
    assert not encoded.examples
    (note,) = encoded.notes
    assert (note.action, note.reason) == ("dropped", "over_long")
    assert note.detail.endswith("and so is its last exchange with the system prompt and tools")


def test_no_tool_result_stands_without_its_call() -> None:
    called = ("assistant", "call")
    sample = chat(("system", "s"), ("user", "a"), called, ("tool", "r"), ("assistant", "b"), ("user", "c"),
                  ("user", "d"), called, ("tool", "r"), ("tool", "r"), ("assistant", "e"), ("user", "f"))  # fmt: skip
    assert turn_starts(sample, "auto") == (5,), "not between two user messages, nor where nothing trained follows"
    assert [m.role for m in behind(sample, 5).messages][:4] == ["system", "user", "user", "assistant"]


def test_what_is_context_stays_context(bundle: TokenizerBundle) -> None:
    """A row of prompt and completion: its completion alone is trained, whatever of its prompt is left out."""
    sample = chat(("system", "Hello"), *TURNS, context=5)
    lengths = set()
    for limit in range(8, 60):
        for example in encoder(bundle, limit).encode(sample).examples:
            lengths.add(len(example.input_ids_T))
            assert bundle.tokenizer.decode(example.input_ids_T[example.weights_T > 0]) == "five<|im_end|>"
    assert lengths == {17, 18, 29, 30, 41, 42}, "one, two and three turns, with and without what follows the stop token"


LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS, limit=st.integers(5, 120), opening=st.booleans())
def test_the_least_is_left_out(
    bundle: TokenizerBundle, lengths: list[tuple[int, int, bool]], limit: int, opening: bool
) -> None:
    messages = [("system", "Hello")] if opening else []
    for asked, said, tool in lengths:
        messages += [("user", "one " * asked), *([("assistant", "call"), ("tool", "two")] if tool else [])]
        messages += [("assistant", "three " * said)]
    sample = chat(*messages)
    made = encoder(bundle, limit).encode(sample)
    plain = encoder(bundle, limit, over_long="drop")
    candidates = [sample, *(behind(sample, cut) for cut in turn_starts(sample, "auto"))]
    expected = next((found for c in candidates if (found := plain.encode(c)).examples), None)
    assert [e.input_ids_T.tolist() for e in made.examples] == (
        [e.input_ids_T.tolist() for e in expected.examples] if expected else []
    )


def test_the_search_costs_what_is_kept_and_not_what_is_left_out(bundle: TokenizerBundle) -> None:
    sample = chat(*[turn for _ in range(5_000) for turn in (("user", "one"), ("assistant", "two"))])
    inner, looked_at = encoder(bundle, 200, over_long="drop"), []

    def encode(shorter: Conversation) -> Any:
        looked_at.append(len(shorter.messages))
        return inner.encode(shorter)

    found = last_turns(sample, inner.encode(sample), inner.settings, encode)
    kept = len(sample.messages) - int(found.notes[-1].detail.split()[0])
    assert found.examples
    assert sum(looked_at) < 12 * kept


def test_such_rows_count_as_cut_and_others_as_dropped(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "words", TOOLED)
    rows = [TURNS, TURNS[:2], [("user", "one " * 200), ("assistant", "two")]] * 2
    lines = [
        json.dumps({"messages": [{"role": r, "content": f"{c} {n}"} for r, c in row]}) for n, row in enumerate(rows)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = {
        "train": str(tmp_path / "rows.jsonl"),
        "eval": 0,
        "max_tokens": 24,
        "over_long": "keep_turns",
        "max_dropped": 1,
    }
    (tmp_path / "c.yaml").write_text(json.dumps({"model": {"name": str(folder)}, "data": data}))
    config = load_config(tmp_path / "c.yaml").config
    report = prepare(config, load_bundle(config), cache_dir=tmp_path / "cache", say=lambda line: None).report
    assert (report["rows"], report["kept"], report["cut"], report["dropped"]) == (6, 4, 2, {"over_long": 2})
