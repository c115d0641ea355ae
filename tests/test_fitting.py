"""The search for the largest micro-batch, on devices that are functions; what the system says of limits, on folders."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sft import attention
from sft.fitting import Fit, StepMemory, Used, is_out_of_memory, largest, optimizer_bytes
from sft.limits import _cgroup_limits, resident_bytes, rooms, tightest
from sft.trainee import Trainee


def device(room: int, fixed: int, per_token: int, tried: list[int] | None = None) -> Callable[[int], Used | None]:
    """A device on which a pass takes `fixed` + `per_token` bytes a token."""

    def attempt(tokens: int) -> Used | None:
        if tried is not None:
            tried.append(tokens)
        needed = fixed + per_token * tokens
        return Used(needed, needed / room) if needed <= room else None

    return attempt


def test_a_line_is_followed_to_nine_tenths_of_the_room() -> None:
    tried: list[int] = []
    fit = largest(device(1_000_000, 100_000, 100, tried), floor=500, ceiling=100_000)
    assert fit == Fit(tokens=7680, proven=True, bytes_per_token=100.0)  # 0.9 MB is reached at 8,000 tokens
    assert tried == [500, 960, 1920, 3840, 7680]  # a twentieth more is not worth another pass


@given(
    room=st.integers(10_000, 10**9), fixed=st.integers(0, 10**6), per_token=st.integers(1, 10**4),
    floor=st.integers(1, 4000), more=st.integers(0, 10**6),
)  # fmt: skip
def test_what_is_found_fits_and_is_nearly_the_most(
    room: int, fixed: int, per_token: int, floor: int, more: int
) -> None:
    tried: list[int] = []
    fit = largest(device(room, fixed, per_token, tried), floor=floor, ceiling=floor + more)
    if fixed + per_token * floor > room:
        assert fit is None
        return
    assert fit is not None
    assert fit.proven
    assert floor <= fit.tokens <= floor + more
    assert fixed + per_token * fit.tokens <= room
    best = min(floor + more, int((0.9 * room - fixed) / per_token))
    if fixed + per_token * floor >= 0.45 * room:  # the first pass took half of what may be used: no leap from there
        return
    assert fit.tokens == floor + more or fit.tokens >= 0.9 * best - 4 * 64  # sizes are grains of 64 tokens
    assert len(tried) < 40


def test_a_device_that_refuses_before_its_limit_is_approached_from_below() -> None:
    """Memory in pieces: what a line promises is refused. Still the answer is a size that ran."""
    attempt = device(10**9, 0, 1)

    def refuses(tokens: int) -> Used | None:
        return attempt(tokens) if tokens <= 5000 else None

    fit = largest(refuses, floor=100, ceiling=10**6)
    assert fit is not None
    assert fit.proven
    assert 3500 <= fit.tokens <= 5000


def test_without_time_it_is_computed_and_says_so() -> None:
    times = iter(range(0, 10_000, 25))
    fit = largest(device(1_000_000, 0, 100), floor=1000, ceiling=10**6, clock=lambda: float(next(times)))
    assert fit is not None
    assert not fit.proven
    assert 1000 < fit.tokens <= 9000


def test_the_passes_are_those_of_a_step_and_leave_no_trace() -> None:
    """Weights and gradients are as before; a longer pass takes more; the gradient of the stand-ins is the model's."""
    torch.manual_seed(0)
    attention.register()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention.FLAT)
    trainee = Trainee(model, compute_dtype=torch.float32, autocast=False)
    parameters = {name: id(parameter) for name, parameter in trainee.named_parameters()}
    before = {name: tensor.clone() for name, tensor in trainee.state_dict().items()}
    attempt = StepMemory(trainee, torch.device("cpu"), True, longest=100, missing_bytes=1000)
    short, long = attempt(200), attempt(8000)
    assert short is not None
    assert long is not None
    assert long.bytes > 8000 * 32 * 4 * 4  # at least one hidden state a layer
    assert 0 <= short.share < long.share < 1
    assert {name: id(parameter) for name, parameter in trainee.named_parameters()} == parameters
    assert all(parameter.grad is None for parameter in trainee.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.state_dict().items())


def test_the_examples_of_a_pass_fill_it() -> None:
    lengths = {
        (tokens, rows): StepMemory(None, torch.device("cpu"), rows, longest=100)._batch(tokens).segment_lengths  # type: ignore[arg-type]
        for tokens in (60, 100, 101, 250)
        for rows in (True, False)
    }
    assert lengths == {
        (60, True): (60,), (60, False): (60,), (100, True): (100,), (100, False): (100,), (101, True): (100,),
        (101, False): (100,), (250, True): (100, 100, 50), (250, False): (100, 100),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_memory_is_told_from_other_trouble(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_states_of_optimizers() -> None:
    assert optimizer_bytes("adamw", 400, 100) == 800
    assert optimizer_bytes("adamw_8bit", 400, 100) == 210
    assert optimizer_bytes("paged_adamw_8bit", 400, 100) == 0


@pytest.mark.slow  # what others on this machine do shows in it
def test_this_machine_has_room_and_a_footprint() -> None:
    assert resident_bytes() > 10**7
    # others on this machine take and give memory meanwhile
    assert tightest().bytes == pytest.approx(min(room.bytes for room in rooms()), rel=0.2)
    before = resident_bytes()
    with mmap.mmap(-1, 50_000_000) as block:  # new memory, and not what the process has kept
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        grown = resident_bytes() - before
    assert 45_000_000 < grown < 75_000_000


@pytest.mark.parametrize(
    ("version", "membership", "files"),
    [
        (2, "0::/a/b\n", {"": None, "a": ("memory.max", "1000", "memory.current", "700", "inactive_file 100"),
                          "a/b": ("memory.max", "max", "memory.current", "600", "inactive_file 50")}),
        (1, "3:cpu:/\n2:memory,blkio:/x\n0::/\n", {
            "memory": ("memory.limit_in_bytes", f"{1 << 63}", "memory.usage_in_bytes", "9", "anon 0"),
            "memory/x": ("memory.limit_in_bytes", "1000", "memory.usage_in_bytes", "700", "total_inactive_file 100")}),
    ],
)  # fmt: skip
def test_the_limits_of_containers(
    tmp_path: Path, version: int, membership: str, files: dict[str, tuple[str, ...] | None]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, texts in files.items():
        folder = tmp_path / "fs" / name
        folder.mkdir(parents=True, exist_ok=True)
        if texts:
            (folder / texts[0]).write_text(texts[1])
            (folder / texts[2]).write_text(texts[3])
            (folder / "memory.stat").write_text(f"anon 5\n{texts[4]}\n")
    assert list(_cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")) == [(1000, 600)]


def test_no_cgroups_no_limits(tmp_path: Path) -> None:
    assert list(_cgroup_limits(tmp_path / "missing", tmp_path)) == []
