"""Conversations of every shape, tokenizers that fit a template, and a slow oracle that knows nothing of sft.

The oracle asks transformers for every served prompt and every rendered answer, and judges each trained token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.types import Conversation, Message

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city."}},
                "required": ["city"],
            },
        },
    },
)
CORPUS = [
    "system\nuser\nassistant\ntool\nYou are a friendly pirate.\n\nHello there, how are you?\n\nassistant\n\nHello\n",
    "What is the weather in Paris today? It is sunny.\n\n<|im_start|>assistant\n<think>\n\n</think>\n\nOh just 6.",
    'Okay, thinking about it. {"name": "get_weather", "arguments": {"city": "Paris"}}',
    "model\ndeveloper\nfunction\nKnowledge cutoff December 2023 Today Date 26 Jul 2024\n\n\n\n",
]
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

# name of a template begins with … -> bos, eos, what generation settings stop at
FAMILIES: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "command": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ()),
    "gemma4": ("<bos>", "<eos>", ("<eos>", "<turn|>", "<|tool_response>")),
    "diffusion_gemma": ("<bos>", "<eos>", ("<eos>", "<turn|>", "<|tool_response>")),
    "gemma": ("<bos>", "<eos>", ("<eos>", "<end_of_turn>")),
    "glm": (None, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "gptoss": ("<|startoftext|>", "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
    "idefics": ("<s>", "<end_of_utterance>", ()),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", ()),
    "lfm": ("<|startoftext|>", "<|im_end|>", ()),
    "llama": ("<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "llava": ("<s>", "</s>", ()),
    "mistral": ("<s>", "</s>", ()),
    "phi": (None, "<|endoftext|>", ("<|endoftext|>", "<|end|>")),
    "muse": ("<|begin_of_text|>", "<|eot|>", ()),
    "vicuna": ("<s>", "</s>", ()),
    "alpaca": ("<s>", "</s>", ()),
    "zephyr": ("<s>", "</s>", ()),
    "tulu": (None, "<|endoftext|>", ()),
    "granite": (None, "<|end_of_text|>", ()),
    "olmo": (None, "<|endoftext|>", ()),
}
CHATML_FAMILY = (None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"))
TOKEN = re.compile(r"<\|[^|<>\s\n]{1,40}\|>|<｜[^｜\s]{1,40}｜>|</?(?:start|end)_of_[a-z]+>|<\|?[a-z_]+\|>|<\|[a-z_]+>|"
                   r"</?(?:think|tool_call|tool_response|s|bos|eos|arg_key|arg_value)>|<\|\"\|>|\[/?[A-Z_]{3,24}\]|"
                   r"<sop>|\[gMASK\]")  # fmt: skip


def family(name: str) -> tuple[str | None, str, tuple[str, ...]]:
    return next((FAMILIES[prefix] for prefix in FAMILIES if name.startswith(prefix)), CHATML_FAMILY)


def bpe_tokenizer(folder: Path, template: str | None, bos: str | None, eos: str, stops: tuple[str, ...]) -> Path:
    """A byte-level BPE whose merges cross newlines, with the control tokens that a template writes, as a folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    found = dict.fromkeys([*([bos] if bos else []), eos, *stops, *TOKEN.findall(template or "")])
    plain = ("think", "tool", "arg")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in found if not t.strip("</>").startswith(plain)]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in found if t.strip("</>").startswith(plain)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    ids = fast.convert_tokens_to_ids(list(stops or (eos,)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def metaspace_tokenizer(folder: Path, kind: str, template: str, bos: str | None, eos: str) -> Path:
    """A tokenizer in the style of SentencePiece. kind: legacy (a blank before each piece), first, always, never."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    found = dict.fromkeys([*([bos] if bos else []), eos, *TOKEN.findall(template)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in found])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, **extra: Any) -> Message:
    return Message("assistant", text, extra)


CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def conversation(*messages: Message, tools: tuple[Any, ...] = ()) -> Conversation:
    return Conversation(messages, "a.jsonl:1", tools)


SHAPES: dict[str, Conversation] = {
    "one_turn": conversation(user("Hello there, how are you?"), answer("I am fine, thank you.")),
    "two_turns": conversation(user("Hello there"), answer("Hi, and you?"), user("Fine."), answer("Good to hear.")),
    "many_turns": conversation(
        *(m for i in range(12) for m in (user(f"Question number {i}?"), answer(f"The reply is {i}.")))
    ),
    "system_prompt": conversation(
        system("You are a friendly pirate."), user("Who are you?"), answer("A pirate, mate!"), user("Sure?"),
        answer("Aye, very sure."),
    ),
    "ends_with_user": conversation(user("Hello there"), answer("Hi, and you?"), user("Fine, thanks a lot.")),
    "tools": conversation(
        user("What is the weather in Paris today?"), answer("", tool_calls=[CALL]),
        Message("tool", "sunny, 21 degrees", {"name": "get_weather", "tool_call_id": "call00001"}),
        answer("It is sunny in Paris."), user("Thanks a lot for it!"), answer("You are welcome."), tools=TOOLS,
    ),
    "reasoning_in_history": conversation(
        user("What is two plus two?"), answer("It is four.", reasoning_content="Two and two make four."),
        user("And three plus three?"), answer("It is six.", reasoning_content="Three and three make six."),
    ),
    "reasoning_last": conversation(
        user("What is two plus two?"), answer("It is four.", reasoning_content="Two and two make four.")
    ),
    "thoughts_in_content": conversation(
        user("What is two plus two?"), answer("<think>\nTwo and two make four.\n</think>\n\nIt is four."),
        user("And three plus three?"), answer("<think>\nThree and three.\n</think>\n\nIt is six."),
    ),
    "empty_content": conversation(user("Say nothing, please."), answer(""), user(""), answer("Well then, fine.")),
    "blanks": conversation(
        user("  Hello there \n"), answer("  Hello \n"), user("\n\nAnd now?\t"), answer("\nHello\n\nthere\n\n"),
    ),
    "emoji_and_rtl": conversation(
        user("שלום 🙂 مرحبا"), answer("🏴‍☠️ أهلا وسهلا 👩‍👩‍👧 שלום"), user("e\u0301 é"), answer("日本語, ok: 👍🏽")
    ),
}  # fmt: skip


def spelling(control: str) -> Conversation:
    """The shape whose messages spell a control token."""
    return conversation(
        user(f"What does {control} mean?"), answer(f"The token {control} ends a turn."),
        user(f"{control}"), answer(f"{control}{control} indeed"),
    )  # fmt: skip


def shapes(stop: str) -> dict[str, Conversation]:
    """All shapes, for a template whose turns end with `stop`."""
    return {**SHAPES, "control_tokens": spelling(stop)}


def in_parts(sample: Conversation) -> Conversation:
    """The conversation as a template that reads content as a list of parts must be given it."""
    parts = [replace(m, content=[{"type": "text", "text": m.content}]) for m in sample.messages]  # type: ignore[arg-type]
    return replace(sample, messages=tuple(parts))


@dataclass(frozen=True)
class Verdict:
    """accepted: the template renders the conversation at all. right: proven by the oracle. reason: why refused."""

    accepted: bool
    right: bool
    reason: str = ""
    wrong: str = ""


def dicts(sample: Conversation) -> list[dict[str, Any]]:
    return [m.as_dict() for m in sample.messages]


def trained_runs(labels: list[int]) -> list[tuple[int, int]]:
    """The contiguous trained stretches of aligned labels."""
    runs, start = [], None
    for i, label in enumerate([*labels, -100]):
        if label >= 0 and start is None:
            start = i
        elif label < 0 and start is not None:
            runs.append((start, i))
            start = None
    return runs


def decoded(tokenizer: Any, stop: int, ids: list[int]) -> str:
    """The text of a span: decoded behind a stop token, since some decoders drop a blank at the start."""
    front: str = tokenizer.decode([stop])
    text: str = tokenizer.decode([stop, *ids])
    return text.removeprefix(front)


def judge(
    tokenizer: Any, sample: Conversation, encoded: Any, stops: set[int], *, blanks: bool = True, **arguments: Any
) -> Verdict:
    """Hold examples against the served prompt and the rendered answer of each assistant turn.

    `blanks`: whether blanks count, which tokenizers in the style of Llama 2 add behind control tokens.
    """
    messages, tools = dicts(sample), list(sample.tools) or None

    def ids(part: list[dict[str, Any]]) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(
            part, tools=tools, add_generation_prompt=True, return_dict=False, **arguments
        )
        return found

    def text(part: list[dict[str, Any]], prompt: bool) -> str:
        plain = {k: v for k, v in arguments.items() if k != "sanitize_control_tokens"}
        found: str = tokenizer.apply_chat_template(
            part, tools=tools, add_generation_prompt=prompt, tokenize=False, **plain
        )
        return found

    try:
        text(messages, False)
    except Exception:
        accepted = False
    else:
        accepted = True
    if not encoded.examples:
        refusals = [n for n in encoded.notes if n.action == "refused"]
        assert len(refusals) == 1, encoded
        assert refusals[0].detail
        return Verdict(accepted, False, refusals[0].reason)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    question: list[dict[str, Any]] = [{**messages[-1], "role": "user", "content": messages[0]["content"]}]
    try:
        supplied = text(question, True).removeprefix(text(question, False))
    except Exception:
        supplied = ""
    served = []
    for example in encoded.examples:
        sequence, labels = example.input_ids_T.tolist(), example.labels_T.tolist()
        for start, end in trained_runs(labels):
            k = turns[len(served)] if len(served) < len(turns) else None
            if k is None:
                return Verdict(accepted, False, wrong="more spans than turns")
            served.append(k)
            if sequence[:start] != ids(messages[:k]):
                return Verdict(accepted, False, wrong=f"turn {k}: not behind its served prompt")
            if sequence[end - 1] not in stops or stops.intersection(sequence[start : end - 1]):
                return Verdict(accepted, False, wrong=f"turn {k}: no stop token at its end, or one within")
            prompt, ended = text(messages[:k], True), text(messages[: k + 1], False)
            if not ended.startswith(prompt):
                return Verdict(accepted, False, wrong=f"turn {k}: rendered elsewhere")
            stop = tokenizer.convert_ids_to_tokens(sequence[end - 1])
            rendered = ended[len(prompt) :]
            found = decoded(tokenizer, sequence[end - 1], sequence[start:end])
            if supplied.strip() and found.startswith(supplied):
                return Verdict(accepted, False, wrong=f"turn {k}: its header is trained")
            if not blanks:
                rendered, found = rendered.replace(" ", ""), found.replace(" ", "")
            unclosed = found[: -len(stop)]
            behind = rendered[len(unclosed) :] if rendered.startswith(unclosed) else None
            if behind is None or not (behind.startswith(stop) or not behind.strip()):
                return Verdict(accepted, False, wrong=f"turn {k}: {found!r} is not {rendered!r}")
    if served != turns:
        return Verdict(accepted, False, wrong=f"trained {served} of {turns}")
    return Verdict(accepted, True)
