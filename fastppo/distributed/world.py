"""The processes of a run: how they start, what they know of each other, and what they say to each other."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says at each import that it found nothing faster
# What DeepSpeed compiles at first use belongs to this environment, and so does the ninja that compiles it. In the
# user's cache, or by another ninja, two environments on a machine undo each other's work, at a minute a time.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from fastppo.config import check_launch
from fastppo.distributed.rendezvous import meet
from fastppo.errors import FastPPOError, exit_with_message

T = TypeVar("T")

# DeepSpeed calls collectives by names that torch is about to change; nobody who trains can do anything about it.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    ranks: int
    device: torch.device
    launcher: int | None = None  # the process that started this one; None: nobody launched it, it runs alone
    control: Any = None  # the process group for what ranks agree on; None: the default one


def start_world(threads: int | None, timeout: float = 1800.0) -> World:
    """Join the run's processes: those of the `deepspeed` launcher, or this one alone (`python -m fastppo.train`).

    timeout: seconds that a rank waits for the others in a collective before it ends with an error.
    """
    with exit_with_message(0):
        check_launch()
    launcher = os.getppid() if "RANK" in os.environ else None
    if launcher is None:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")
    if device.type == "cpu":
        neighbours = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(threads or max(len(os.sched_getaffinity(0)) // neighbours, 1))
    else:
        with exit_with_message(int(os.environ["RANK"])):
            _take_device(local_rank)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        with exit_with_message(int(os.environ["RANK"])):
            _join(backend, timedelta(seconds=timeout))
        _forget_shared_memory()
    # Agreeing on a flag over gloo leaves a GPU's queue of kernels alone; over NCCL the host would wait for it.
    control = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return World(dist.get_rank(), dist.get_world_size(), device, launcher, control)


def _join(backend: str, timeout: timedelta) -> None:
    try:
        store = meet(timeout.total_seconds())
        with quiet():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        del store  # torch has one of its own there, and rank 0's keeps the port
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise FastPPOError(
            f"port {port} of this machine, where the ranks are to meet, is in use, perhaps by another run. Give this"
            f" one another: deepspeed --master_port {int(port) + 1} fastppo/train.py ..."
        ) from error


def _take_device(local_rank: int) -> None:
    accelerator = get_accelerator()
    if local_rank >= accelerator.device_count():
        raise FastPPOError(
            f"LOCAL_RANK is {local_rank}, and this machine shows {accelerator.device_count()} device(s) for one rank"
            " each. Start as many ranks as there are: deepspeed --num_accelerators, or the hostfile's slots."
        )
    accelerator.set_device(local_rank)


def _forget_shared_memory() -> None:
    """Take the name off the 66 MiB of shared memory that DeepSpeed gives each rank; what is mapped stays.

    DeepSpeed never does, so that every run, killed or not, would leave them in memory, and a run on the same port could
    begin with what a killed one has left there.
    """
    _barrier()  # by then all ranks have mapped it
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def stop_world() -> None:
    """Leave the run's processes in order, and together: rank 0 keeps the store that the others still use."""
    if dist.is_initialized():
        _barrier()
        dist.destroy_process_group()


def _barrier() -> None:
    """NCCL is told this rank's GPU; it would guess one from the rank's number, and may wait for ever if it is wrong."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def all_gather(part: T, world: World) -> list[T]:
    """Every rank's part, in the order of ranks, on every rank. Parts are small: token ids and one number a token."""
    parts: list[Any] = [part] * world.ranks
    if world.ranks == 1:
        return parts
    dist.all_gather_object(parts, part)
    return parts


def on_any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on one rank or more; the answer is the same on every rank."""
    if world.ranks == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=world.control)
    return bool(flags.item())


def all_sum(x: Tensor, world: World) -> Tensor:
    """The sum over ranks, on every rank."""
    x = x.to(world.device)
    dist.all_reduce(x)
    return x


def all_max(x: Tensor, world: World) -> Tensor:
    """The maximum over ranks, on every rank."""
    x = x.to(world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def quiet() -> contextlib.AbstractContextManager[object]:
    """DeepSpeed prints tables of memory while it starts; they would push a run's own lines off the screen."""
    return contextlib.redirect_stdout(io.StringIO())


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


PATIENCE = 30.0  # seconds; a network file system may show a new file to other nodes late


def check_output_is_shared(output: Path, world: World) -> None:
    """Refuse an `output` that is not one and the same folder to all ranks; all of them call it once rank 0 made it.

    Each rank writes its own part of a checkpoint. On disks of their own the nodes would leave halves of it, which only
    shows when the run is to be resumed. Raises FastPPOError.
    """
    if world.ranks == 1:
        return
    marker = output / f".shared-{all_gather(secrets.token_hex(8), world)[0]}"
    failed = None
    if world.rank == 0:
        try:
            marker.touch()
        except OSError as error:
            failed = error.strerror
    if (failed := all_gather(failed, world)[0]) is not None:  # else it is there by now
        raise FastPPOError(
            f"output = {output}: nothing can be written there ({failed}). Make room, or give another --output."
        )
    seen = all_gather((socket.gethostname(), _appears(marker)), world)
    if world.rank == 0:
        marker.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise FastPPOError(
            f"output = {output} is not the same folder on every node: what rank 0 on {seen[0][0]} makes there is not"
            f" seen by {', '.join(blind)}. All ranks write their parts of a checkpoint into it, so give an --output on"
            " a file system that the nodes share, under the same absolute path on each."
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes to be in time."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
