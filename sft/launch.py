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
from collections.abc import Sequence

from sft.errors import DeviceError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def several_were_asked_for() -> bool:
    """accelerate names an address to meet at only where several processes should; a started group has ranks."""
    environ = os.environ
    return "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ and "RANK" not in environ


def become_launcher_where_needed() -> None:
    """Replaces this process by `torchrun`'s module with as many processes as the command line asked for.

    Returns where a single process is what was asked for, or MPI brings the others. Raises DeviceError where their
    number cannot be found.
    """
    from_mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    if not several_were_asked_for() or from_mpi:
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
    import psutil

    count = processes_in(psutil.Process(os.getppid()).cmdline())
    if count is None:
        raise DeviceError(
            "accelerate launch started one process on this machine without GPUs, though several were asked for. "
            f"Use: torchrun --nproc_per_node N -m sft {' '.join(sys.argv[1:])}"
        )
    return count


def processes_in(command: Sequence[str]) -> int | None:
    """The number of processes an `accelerate launch …` command line asks for; None where it cannot be told."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = [os.path.basename(word).removesuffix(".py") for word in command]
    launch = next((i for i, name in enumerate(names) if name.endswith("launch")), None)
    if launch is None:
        return None
    asked, _ = launch_command_parser().parse_known_args(list(command[launch + 1 :]))
    if asked.num_processes is not None:
        return int(asked.num_processes)
    if asked.config_file is not None:
        return int(load_config_from_file(asked.config_file).num_processes)
    return None
