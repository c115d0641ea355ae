"""Decoder layers through torch.compile: when that pays, and whether compiled layers give what plain ones give.

Layers are compiled one by one, so that they share their kernels, for rows of any length. What joins them stays plain:
embedding, head and loss, and on a CPU the attention over flat rows. Evaluations and generated answers run plain too.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sft.config import Auto
from sft.data.collate import flat, padded, to_device
from sft.distributed import gather
from sft.errors import DeviceError
from sft.evaluate import inference_mode_of
from sft.gguf import cache_root
from sft.isolation import compiled_difference, probe, run_once
from sft.model import count_parameters
from sft.needed import is_sharded_launch
from sft.trainee import Trainee
from sft.types import Batch

KEY = "compiled"  # among what a run records
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# Compiling takes half a minute once, and spares about a seventh of a step (docs/BENCHMARKS.md).
WORTHWHILE_SECONDS = 600
THREAD_FLOPS = 1e11  # a second; the order of magnitude of a core's matrix products
# The first row decides how kernels divide their work among threads, so it is the same in every process of a run, and
# long enough to be divided. Its length is a prime, and so no size of a model: torch.compile takes equal sizes for one.
FIRST_ROW = (509, 512)
COMPARED_ROW = (61, 66)  # short: plain layers keep more for their backward pass than compiled ones will


def is_worthwhile(device_type: str, *, flops: float, threads: int) -> bool:
    """What `auto` stands for: long runs on CPUs. On CUDA nothing has been measured yet."""
    return device_type == "cpu" and flops / (threads * THREAD_FLOPS) >= WORTHWHILE_SECONDS


def choose(
    trainee: Trainee,
    setting: Auto | bool,
    recorded: Mapping[str, Any] | None,
    *,
    tokens: int,
    flat_rows: bool,
    pad_id: int,
    checkpointing: bool,
    say: Callable[[str], None],
) -> bool:
    """Whether the decoder layers are compiled now. A collective.

    `recorded`: of the checkpoint that a run continues from, whose choice `auto` keeps. `tokens`: of the whole run on
    this rank. DeviceError where the user insists and the layers fail; under `auto` all ranks then train plain layers.
    """
    wanted = setting
    if setting == "auto" and recorded is not None:
        wanted = bool(recorded.get(KEY, False))
    elif setting == "auto":
        trained, every = count_parameters(trainee)
        device = next(trainee.parameters()).device.type
        flops = (4 * every + 2 * trained) * tokens
        wanted = not is_sharded_launch() and is_worthwhile(device, flops=flops, threads=torch.get_num_threads())
    if not wanted:
        return False
    started = time.monotonic()
    fault = compile_layers(trainee, flat_rows=flat_rows, pad_id=pad_id, checkpointing=checkpointing, say=say)
    fault = next((each for each in gather(fault) if each is not None), None)
    if fault is None:
        if not is_sharded_launch():
            say(f"compiled in {time.monotonic() - started:.0f} s, and equal to the plain layers within rounding")
        return True
    torch.compiler.set_stance("force_eager")
    if setting is True:
        raise DeviceError(
            f"model.compile is true, and the layers of this model cannot be compiled here: {fault}. "
            "With auto or false they are trained as they are."
        )
    until_now = ", as they were until now: sums are rounded otherwise from here on" if recorded is not None else ""
    say(f"note: the layers are not compiled{until_now}: {fault}")
    return False


def compile_layers(
    trainee: Trainee, *, flat_rows: bool, pad_id: int, say: Callable[[str], None], checkpointing: bool = False
) -> str | None:
    """Compiles the decoder layers where they stand, and runs them once beside plain ones. The fault, if there is one.

    With gradient checkpointing the parts of each layer are compiled, since what is run again must not break the graph,
    which flat attention does. A sharded model is not run, since its layers are not whole here: they are compiled in the
    first step.
    """
    layers = decoder_layers(trainee)
    if not layers:
        return "the model does not name its decoder layers"
    _keep_kernels()
    torch.compiler.set_stance("default")
    for unit in [part for layer in layers for part in layer.children()] if checkpointing else layers:
        unit.compile(dynamic=True)
    if is_sharded_launch():
        say("the decoder layers are compiled in the first step; sharded, they are not held against plain ones")
        return None
    say("compiling the decoder layers, once on this machine")
    device = next(trainee.parameters()).device

    def row(lengths: Sequence[int]) -> Batch:
        examples = probe(trainee, lengths, later_half=True)
        return to_device(flat(examples) if flat_rows else padded(examples, pad_id), device)

    try:
        run_once(trainee, row(FIRST_ROW))
        if not flat_rows:  # a padded batch of one is compiled apart: torch.compile takes sizes of one for constants
            run_once(trainee, row(FIRST_ROW[:1]))
        verdict = compiled_difference(trainee, row(COMPARED_ROW))
    except Exception as error:  # no C++ compiler, no Python headers, a model that cannot be traced: all kinds
        return _cause(error)
    if verdict.is_exact:
        return None
    return f"the loss differs by {verdict.loss:.1e}, gradients by {verdict.gradients:.1e} ({verdict.worst})"


def decoder_layers(trainee: Trainee) -> list[nn.Module]:
    """The repeated blocks, by the class names that transformers keeps for launchers which shard."""
    names = set(trainee._no_split_modules or ())
    return [module for module in trainee.backbone.modules() if type(module).__name__ in names]


@contextmanager
def scoring(trainee: Trainee, compiled: bool) -> Iterator[None]:
    """`inference_mode_of`, with layers as they are written: shapes of evaluations and of generation would use up how
    often they may be compiled, and a score should not depend on how training computes."""
    plain = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with inference_mode_of(trainee), plain:
        yield


def _keep_kernels() -> None:
    """In our cache, unless the user says where: torch's own choice is a name that anyone could take in a shared /tmp,
    where code is loaded from, and gone after a restart. torch writes its choice into the environment as it is imported.
    """
    chosen = os.environ.get(FOLDER)
    if chosen is None or chosen.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        os.environ[FOLDER] = str(cache_root() / "compiled")


def _cause(error: BaseException) -> str:
    """What lies at the bottom, in one line: torch.compile wraps errors in errors that quote them at length."""
    while (inner := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
