"""`accelerate launch --num_processes N` on a machine without GPUs.

There accelerate starts a single process, whatever N (more need MPI), and says nothing. A user who asked for N
processes gets them here all the same: this process becomes torch's own launcher, which starts N with gloo.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

from sft.errors import LaunchError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def several_were_asked_for() -> bool:
    """accelerate names an address to meet at only where several processes should; a started group has ranks.

    A shell, a terminal or a notebook that was started under it hands these variables on: they may be inherited.
    """
    environ = os.environ
    return "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ and "RANK" not in environ


def become_launcher_where_needed() -> None:
    """Replaces this process by `torchrun`'s module with as many processes as the command line asked for.

    Returns where a single process is what was asked for, MPI brings the others, or no launcher is at work and its
    variables were merely inherited. Raises LaunchError where one is and their number cannot be found.
    """
    from_mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    if not several_were_asked_for() or from_mpi or not any(map(is_launcher, _ancestors())):
        return
    count = _asked_processes()
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "29500")
    if port == "0":
        port = str(_free_port())
    if sys.platform == "linux":  # if accelerate is ended, its ranks are told rather than orphaned
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    arguments = ["--nproc_per_node", str(count), "--master_addr", address, "--master_port", port]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "sft", *sys.argv[1:]]
    os.execv(sys.executable, command)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _asked_processes() -> int:
    """By the launcher's own command line, which is this process's parent's."""
    count = processes_in(next(_ancestors(), ()))
    if count is None:
        raise LaunchError(
            "accelerate launch started one process on this machine without GPUs, though several were asked for. "
            f"Use: torchrun --nproc_per_node N -m sft {' '.join(sys.argv[1:])}"
        )
    return count


def _ancestors() -> Iterator[list[str]]:
    """The command lines of the processes that this one descends from, nearest first, as far as they can be read."""
    import psutil

    for process in psutil.Process().parents():
        try:
            yield process.cmdline()
        except psutil.Error:  # gone, or another user's
            yield []


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is `accelerate launch …`, `accelerate-launch …` or that module's."""
    return _launch_word(command) is not None


def _launch_word(command: Sequence[str]) -> int | None:
    """Where the launcher's own options begin: after `launch`, in the words of an interpreter and a program or module.

    Further words are those of whatever it launches.
    """
    names = [os.path.basename(word).removesuffix(".py") for word in command]
    for index, name in enumerate(names[:4]):
        if name in ("accelerate-launch", "accelerate.commands.launch") or (
            name == "launch" and index > 0 and "accelerate" in command[index - 1] + command[index]
        ):
            return index
    return None


def processes_in(command: Sequence[str]) -> int | None:
    """The number of processes an `accelerate launch …` command line asks for; None where it cannot be told."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    launch = _launch_word(command)
    if launch is None:
        return None
    asked, _ = launch_command_parser().parse_known_args(list(command[launch + 1 :]))
    if asked.num_processes is not None:
        return int(asked.num_processes)
    if asked.config_file is not None:
        return int(load_config_from_file(asked.config_file).num_processes)
    return None
