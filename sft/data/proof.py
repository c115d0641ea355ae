"""The proof that a trained span is the message it claims to be.

Two halves. `check_answer` looks at text: is what the template renders for a turn this message, all of it, closed by
the token at which serving stops, and nobody else's words? `Decoder` looks at ids: do they decode back to exactly that
text? Everything raises Refusal with a countable reason and a sentence with what was expected, what was
found and the cure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft.errors import SftError

SHOWN = 80
TELLING = 12  # characters from which a message found in another's turn is no coincidence
TOOL_TEMPLATES = (
    "Set data.template: chatml-tools, which is built in and prints tools, calls and results as parsers named hermes "
    "read them, or give a .jinja of your own."
)
OWN_TOOLS = "Set data.template: model, the model's own, which prints tools."
THINK = re.compile("</?think>")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning", "thought")
"""Where messages bring reasoning beside their content: as templates read it."""


class Refusal(SftError):
    """A row that cannot be trained as it is. `reason` is short and countable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def shown(text: str) -> str:
    """A text for a message: quoted, its middle cut out."""
    text = text.replace("\U000f5f7c", "").replace("\U000f5f7d", "")  # marks of control tokens
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}")


class Decoder:
    """Ids to text, spans in batches, nothing skipped, no blank eaten at the front.

    `anchor` is a control token; `control` matches all of them.
    """

    def __init__(self, tokenizer: Any, anchor: int, control: re.Pattern[str]) -> None:
        self.tokenizer = tokenizer
        self.control = control
        self.unknown_token, self.unknown_id = tokenizer.unk_token, tokenizer.unk_token_id
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        plain = self.backend is not None and type(self.backend.decoder).__name__ in ("ByteLevel", "Fuse")
        self.anchor = [] if plain else [anchor]
        self.front = self.decode([self.anchor])[0] if self.anchor else ""
        token = tokenizer.convert_ids_to_tokens(anchor)
        self.adds_blanks = self([tokenizer(token + "a", add_special_tokens=False)["input_ids"]])[0] == token + " a"

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        if self.backend is not None:
            return list(self.backend.decode_batch([list(s) for s in sequences], skip_special_tokens=False))
        return [
            self.tokenizer.decode(
                s, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
            )
            for s in sequences
        ]

    def __call__(self, spans: Sequence[Sequence[int]]) -> list[str]:
        """The text of each span. Decoders that strip a blank at the start see a token before it, taken off again."""
        if not self.anchor:
            return self.decode(spans)
        texts = self.decode([self.anchor + list(span) for span in spans])
        return [text[len(self.front) :] if text.startswith(self.front) else text for text in texts]

    def same(self, decoded: str, expected: str) -> bool:
        """Whether ids decode to a text, as the tokenizer sees texts: normalised (NFC…), unknown characters one token.

        Some (Llama 2's) put a blank before a text, and before what follows a control token; it is no difference.
        """
        if decoded == expected:
            return True
        normalizer = getattr(self.backend, "normalizer", None)
        if normalizer is not None and normalizer.normalize_str(decoded) == normalizer.normalize_str(expected):
            return True
        if self.adds_blanks and self.with_added(expected).fullmatch(decoded):
            return True
        unknown = self.unknown_token
        if not unknown or unknown not in decoded:
            return False
        known = ".+?".join(re.escape(piece) for piece in re.split(f"(?:{re.escape(unknown)})+", decoded))
        return re.fullmatch(known, expected, re.DOTALL) is not None

    def unknown(self, ids: Sequence[int], text: str) -> int:
        """How many ids stand for characters of a text that the tokenizer does not know.

        The token may have another meaning besides (GPT-2's is its end of text): where the text has it, it is no loss.
        """
        if self.unknown_id is None or not (found := ids.count(self.unknown_id)):
            return 0
        return max(0, found - text.count(self.unknown_token))

    def with_added(self, text: str) -> re.Pattern[str]:
        """Matches a text with or without a blank at its start and behind each control token."""
        pieces = re.split(f"({self.control.pattern})", text)
        return re.compile(" ?" + "".join(re.escape(p) + (" ?" if i % 2 else "") for i, p in enumerate(pieces)))


def pieces_of(message: Mapping[str, Any]) -> list[str]:
    """What a rendered turn must hold: the content, the tools called and the plain words they are called with."""
    content = message.get("content") or ""
    wanted = [content.strip()] if isinstance(content, str) else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        wanted += [name] if isinstance(name, str) else []
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        values = arguments.values() if isinstance(arguments, Mapping) else ()
        wanted += [value for value in values if isinstance(value, str) and value.isalnum()]  # others may be escaped
    return [piece for piece in wanted if piece]


def check_characters(text: str) -> None:
    """Raises Refusal for what no tokenizer can encode, and for the characters that mark control tokens here."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"the text holds {text[error.start]!r}, half of a character, at {error.start}. Remove it."
        raise Refusal("not_unicode", detail) from error
    for private in "\U000f5f7c\U000f5f7d":
        if private in text:
            raise Refusal("control_tokens", f"the text holds {private!r}, which marks control tokens here. Remove it.")


def missing_piece(message: Mapping[str, Any], text: str) -> str | None:
    """The first piece of a message that a text lacks."""
    for piece in pieces_of(message):
        if piece in text:
            continue
        behind = piece.rsplit("</think>", 1)[-1].strip()
        if "</think>" in piece and behind in text:
            continue  # the template takes reasoning out of the content, or sets it anew
        return piece
    return None


def left_out(message: Mapping[str, Any], answer: str) -> bool:
    """Whether a message brings reasoning, beside its content or within it, that the template does not render.

    It is looked for beside the words behind it, which may well repeat it.
    """
    within, _, words = (message.get("content") or "").rpartition("</think>")
    beside = next((message[field] for field in REASONING_FIELDS if message.get(field)), None)
    thoughts = [*THINK.split(within), beside if isinstance(beside, str) else ""]
    wanted = [thought.strip() for thought in thoughts if thought.strip()]
    if not wanted:
        return False
    before, _, behind = answer.rpartition(words.strip()) if words.strip() else (answer, "", "")
    rest = f"{before}\0{behind}"
    return any(thought not in rest for thought in wanted)


def unmarked(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches what the template wrote of these, not what a message spells."""
    return re.compile("|".join(f"(?<!\U000f5f7c){re.escape(t)}" for t in sorted(tokens, key=len, reverse=True)))


class AnswerCheck:
    """Cuts a rendered turn at its stop token and checks that it is the message."""

    def __init__(
        self, stops: Sequence[str], control: re.Pattern[str], *, closes: bool, tail: str, headers: Sequence[str],
        own_header: str, supplied: str, allow: bool, tool_cure: str = TOOL_TEMPLATES, foreign_end: str = "",
    ) -> None:  # fmt: skip
        self.stop = unmarked(stops)
        self.control = control
        self.closes, self.tail = closes, tail
        self.headers = unmarked(headers) if headers and not allow else None
        self.own_header, self.supplied = own_header, supplied
        self.allow = allow
        self.tool_cure, self.foreign_end = tool_cure, foreign_end

    def cut(self, messages: Sequence[Mapping[str, Any]], index: int, rendered: str) -> tuple[str, bool]:
        """(The turn through its stop token, whether the template wrote one). Raises Refusal."""
        message = messages[index]
        absent = missing_piece(message, rendered)
        if absent is not None:
            called = absent != (message.get("content") or "").strip()
            raise Refusal(
                "tool_calls_not_rendered" if called else "not_the_message",
                f"expected {shown(absent)} in the turn, the template renders {shown(rendered)}. "
                + (self.tool_cure if called else "The template changes or drops content."),
            )
        body, closing = self.at_stop(message, rendered)
        self.check_own_words(messages, index, body)
        if closing:
            return body + closing, True
        return body, False

    def at_stop(self, message: Mapping[str, Any], rendered: str) -> tuple[str, str]:
        """(What comes before the stop token, the stop token or an empty string)."""
        first = True
        for match in self.stop.finditer(rendered):
            body = rendered[: match.start()]
            if missing_piece(message, body) is None:
                return body, match.group()
            if first and not self.allow:
                raise Refusal(
                    "stops_within",
                    f"serving would stop at {match.group()} before the turn is over: {shown(rendered)}. "
                    "Check the eos_token_id of the model's generation settings against the template.",
                )
            first = False
        if self.closes:
            raise Refusal(
                "no_stop",
                f"expected the turn to end with a token at which serving stops, found {shown(rendered[-SHOWN:])}. "
                "The template closes other answers; check its branches for this kind of message.",
            )
        return self.to_content_end(message, rendered), ""

    def stop_of(self, answer: str) -> str:
        """The stop token with which a closed answer ends."""
        return next(match.group() for match in self.stop.finditer(answer) if match.end() == len(answer))

    def count_stops(self, answer: str) -> int:
        """Stop tokens that the template wrote into an answer: one, or more where control tokens are allowed."""
        return sum(1 for _ in self.stop.finditer(answer))

    @staticmethod
    def to_content_end(message: Mapping[str, Any], rendered: str) -> str:
        """Without the blanks with which a template parts an unclosed answer from what follows."""
        content = message.get("content") or ""
        end = rendered.rfind(content) + len(content)
        return rendered.rstrip() if not content or end < len(content) or rendered[end:].strip() else rendered[:end]

    def last_place(self, content: str, body: str) -> int:
        """Where the content stands in a turn: at its end but for the template's tail, or where it is found last."""
        end = body.removesuffix(self.tail).rstrip()
        return len(end) - len(content) if end.endswith(content) else body.rfind(content)

    def check_own_words(self, messages: Sequence[Mapping[str, Any]], index: int, body: str) -> None:
        """No header, no other message's words before or behind the content."""
        message = messages[index]
        if self.headers is not None and (header := self.headers.search(body)):
            detail = f"the turn holds another role's header {shown(header.group())}: {shown(body)}"
            raise Refusal("header_trained", detail)
        if self.supplied and body.startswith(self.supplied):
            raise Refusal(
                "header_trained",
                f"the served prompt lacks {shown(self.supplied)} here, which serving supplies elsewhere, and the "
                f"template renders it as part of the turn: {shown(body)}. Set train: false on this message.",
            )
        content = (message.get("content") or "").strip()
        start = self.last_place(content, body) if content else -1
        if start < 0 and "</think>" in content:
            content = content.rsplit("</think>", 1)[-1].strip()
            start = self.last_place(content, body)
        before, behind = (body[:start], body[start + len(content) :]) if start >= 0 else (body, "")
        if self.own_header:
            raise Refusal(
                "no_generation_prompt",
                f"the template ignores add_generation_prompt, so that {shown(self.own_header)} would be trained as if "
                "the model had to write its own header. Add `{% if add_generation_prompt %}` to the template.",
            )
        if message.get("tool_calls"):
            return
        left = self.control.sub("", behind).strip()
        if left and left != self.control.sub("", self.tail).strip():
            foreign = self.foreign_end if behind.strip().startswith(self.foreign_end or "\0") else ""
            setting = f"model.new_tokens: {json.dumps([foreign], ensure_ascii=False)}"
            cure = f" To make {foreign} a token that ends turns, set {setting}."
            raise Refusal(
                "more_than_message",
                f"expected the stop token after {shown(content[-SHOWN:])}, the template renders {shown(behind)} first."
                + (cure if foreign else ""),
            )
        before = self.control.sub("", before).strip()
        if len(before) < TELLING:
            return
        own = " ".join(v for v in message.values() if isinstance(v, str))
        for other, text in enumerate(m.get("content") or "" for m in messages):
            words = text.strip() if isinstance(text, str) else ""
            if other != index and len(words) >= TELLING and words in before and words not in own:
                raise Refusal(
                    "other_message_trained",
                    f"the words of message {other} ({messages[other].get('role')}) stand in the turn: {shown(before)}.",
                )
