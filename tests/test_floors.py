"""The house has floors: a file imports only from floors below it, wherever in the file the import stands.

Floors are those of the design; fractions are landings between two of them, for files that were split off. A new file
gets its line in FLOORS. Nothing imports upward, so there are no circles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sft"

# Ground floor: values, errors, text. 1: config and arithmetic. 2: data and model, each part alone. 3: what composes
# them. 4: prepared data. 5: a command each. 6: the loop and the sweep. 7: the command line.
FLOORS: dict[float, str] = {
    0.0: "__init__ data.__init__ errors types foreign secrets heap",
    0.2: "datanames",
    0.5: "yamltree durable pickles signals space limits watchdog templating launch keeper "
    "hush versions modelkind stops data.jsontext data.control data.proof",
    0.6: "data.thoughts",
    0.8: "longattention devices data.arrowjson data.elements data.nulls data.folding data.delimiter data.splits "
    "data.memo",
    1.0: "config loss attention runfolder runlock console distributed pages data.locality",
    1.1: "schedule phases",
    1.2: "liger advice choice meeting configkeys unread hub needed budget progress",
    1.3: "resume credentials timeleft",
    1.5: "configfile",
    1.9: "data.rowkeys",
    2.0: "data.readers data.messages data.align data.masking data.order data.collate data.heldout data.store "
    "data.reasoning data.markers tokenizer gguf optim checkpoint trainee generate modelcard "
    "trial sweepspace sweepstorage adapterparts",
    2.1: "data.outcome data.rendered data.rowargs data.evidence",
    2.2: "weightfiles data.passage data.joined data.trials data.shorten data.spelling data.spans",
    2.3: "data.rest data.templatekeys data.cures",
    2.5: "data.sources data.formats data.render data.ledger model memory fitting isolation sweepfile accelerator",
    2.7: "data.layers",
    2.8: "data.work",
    2.9: "data.reasoned",
    3.0: "data.encode data.pipeline evaluate setup glance sweeprun sweepidentity",
    3.2: "compiling",
    3.5: "serving sweepstore data.samples",
    4.0: "data.loader runcard sweepreport",
    4.2: "picture pieces savedweights",
    4.5: "prepare opening batches sweepresults checkmachine checkview",
    4.8: "suited",
    5.0: "preview check export report chat init session sweepview evalcommand",
    5.2: "shortage",
    5.5: "finish trouble trackers",
    6.0: "train sweep",
    7.0: "__main__",
}


# Answer at once, so they import without torch: floors 0 and 1 but for two files, the sweep and what it needs, and
# the command line.
HEAVY_BELOW_2 = {"devices", "loss", "liger", "attention", "longattention", "distributed", "meeting"}
LIGHT_ABOVE = {"sweepspace", "sweepfile", "trial", "sweeprun", "sweep", "__main__"}


def floor_of() -> dict[str, float]:
    return {name: floor for floor, names in FLOORS.items() for name in names.split()}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(source: str) -> set[str]:
    """The modules of ours that a file imports, at its top, in functions and for type checkers alike."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            module = node.module or ""
            for alias in node.names:  # `from sft.data import order` names a module, `from sft.types import Batch` not
                inner = f"{module}.{alias.name}"
                found.add(inner if _file(inner) else module)
    ours = {name for name in found if name == "sft" or name.startswith("sft.")}
    return {_short(name) for name in ours}


def _file(module: str) -> bool:
    path = PACKAGE.parent / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _short(module: str) -> str:
    short = module.removeprefix("sft").removeprefix(".")
    return {"": "__init__", "data": "data.__init__"}.get(short, short)


def wrong_way(name: str, imports: set[str]) -> list[str]:
    floors = floor_of()
    here = floors.get(name)
    if here is None:
        return [f"{name} has no floor yet"]
    return [
        f"{name} (floor {here}) imports {other} (floor {floors[other]})"
        for other in sorted(imports & set(floors))
        if floors[other] >= here
    ]


def test_every_file_has_its_floor() -> None:
    floors = floor_of()
    assert [module_name(file) for file in FILES if module_name(file) not in floors] == [], "add these to FLOORS"
    names = " ".join(FLOORS.values()).split()
    assert len(names) == len(set(names)), "a file stands on two floors"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_it_imports_only_from_below(file: Path) -> None:
    assert wrong_way(module_name(file), imports_of(file.read_text(encoding="utf-8"))) == []


def test_the_check_sees_imports_in_functions_and_of_modules() -> None:
    source = "import sft.errors\ndef f():\n    from sft.train import train\n    from sft.data import order\n"
    assert imports_of(source) == {"train", "data.order", "errors"}
    assert wrong_way("config", imports_of(source)) == [
        "config (floor 1.0) imports data.order (floor 2.0)",
        "config (floor 1.0) imports train (floor 6.0)",
    ]
    assert wrong_way("config", {"loss"}) == ["config (floor 1.0) imports loss (floor 1.0)"]


def modules(names: set[str]) -> str:
    there = {name for name in names if (PACKAGE / (name.replace(".", "/") + ".py")).is_file()}
    return ", ".join(sorted(f"sft.{name}".removesuffix(".__init__") for name in there))


def test_the_lower_floors_import_nothing_heavy_and_the_sweep_no_torch() -> None:
    low = modules({name for name, floor in floor_of().items() if floor < 2} - HEAVY_BELOW_2)
    code = f"import sys, {low}; print(*sys.modules); import {modules(LIGHT_ABOVE)}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    below, with_sweep = (set(line.split()) for line in out.splitlines())
    assert {"torch", "transformers", "datasets", "accelerate", "peft", "optuna", "rich"} & below == set()
    assert {"torch", "transformers", "datasets", "accelerate", "peft"} & with_sweep == set()


def test_heavy_imports_would_be_noticed() -> None:
    out = subprocess.run(
        [sys.executable, "-c", "import sys, sft.loss; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "torch" in out.stdout.split()
