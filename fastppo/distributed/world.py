"""The ranks (processes) of a run: start, end and collectives."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed logs at each import that it found no accelerator
# The extensions that DeepSpeed compiles at first use, and the ninja that compiles them, belong to this environment.
# With the user's cache or another ninja, two environments on one machine would recompile over each other's results,
# which takes a minute each time.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from fastppo.config import check_launch
from fastppo.distributed.neighbours import ALONE, Neighbours, neighbours_of
from fastppo.distributed.rendezvous import meet
from fastppo.errors import FastPPOError, exit_with_message

T = TypeVar("T")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT = 1 << 30  # bytes
LARGE_PAGE = 2 << 20  # bytes

# DeepSpeed calls collectives by names that torch has deprecated; users of fastppo cannot change that.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of ranks, and the device."""

    rank: int
    ranks: int
    device: torch.device
    launcher: int | None = None  # id of the process that started this one; None: a single process without a launcher
    control: Any = None  # the process group for flags; None: the default group
    fewer: Callable[[], int] = int  # the most ranks below these with which the run could go on; 0: none
    sequence: Neighbours = ALONE  # this rank's group of those that read whole sequences together

    @property
    def groups(self) -> int:
        """The number of these groups. Each computes microbatches of its own; a group of one is a rank."""
        return self.ranks // self.sequence.size

    @property
    def group(self) -> int:
        """Which of the groups this rank is in."""
        return self.rank // self.sequence.size


def start_world(threads: int | None, timeout: float = 1800.0, sequence: int = 1) -> World:
    """Join the ranks of the run: those of the `deepspeed` launcher, or this process alone (`python -m fastppo.train`).

    timeout: seconds for which a rank waits for the others in a collective before it ends with an error; sequence: how
    many ranks read whole sequences together, a divisor of their number.
    """
    with exit_with_message(0):
        check_launch()
    launcher = os.getppid() if "RANK" in os.environ else None
    if launcher is None:
        single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single, MASTER_PORT=str(_free_port()))
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")
    if device.type == "cpu":
        local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(threads or max(len(os.sched_getaffinity(0)) // local_ranks, 1))
        _keep_freed_memory()
    else:
        with exit_with_message(int(os.environ["RANK"])):
            _set_device(local_rank)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        with exit_with_message(int(os.environ["RANK"])):
            _join(backend, timedelta(seconds=timeout))
        _unlink_shared_memory()
    # Reducing a flag over gloo does not involve the GPU; over NCCL the host would wait for the queued kernels.
    control = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    world = World(dist.get_rank(), dist.get_world_size(), device, launcher, control)
    return replace(world, sequence=neighbours_of(world, sequence, timeout, exchanging=True))


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB that was freed last, for the next microbatch, which otherwise waits for the kernel to
    clear the same pages again; and have that memory in large pages, as a virtual machine can take 5 to 30 microseconds
    at the first touch of a page. Peak memory stays what it is: blocks above 32 MiB have a mapping of their own, as ever
    (torch asks for large pages there), and of the rest only what is touched counts. What the user has set
    (`MALLOC_...`, `GLIBC_TUNABLES`) stays.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or _malloc_is_tuned():
        return
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc would move it to, but does not once the other is set
    libc.mallopt(M_TRIM_THRESHOLD, KEPT + LARGE_PAGE)
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_TOP_PAD, KEPT)  # what the heap grows by beyond what is asked for
    begin = libc.sbrk(0)
    libc.free(libc.malloc(16 << 20))  # more than it is likely to have left, so it grows
    libc.mallopt(M_TOP_PAD, LARGE_PAGE)
    first = -(-begin // LARGE_PAGE) * LARGE_PAGE
    if (size := libc.sbrk(0) - first) > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        libc.madvise(first, size, mmap.MADV_HUGEPAGE)  # without effect where the system has none


def _malloc_is_tuned() -> bool:
    """Whether the user has set how malloc keeps memory; large pages alone are no such thing."""
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    return any(name.startswith("MALLOC_") for name in os.environ) or any(
        one.startswith("glibc.malloc.") and not one.startswith("glibc.malloc.hugetlb") for one in tunables
    )


def _join(backend: str, timeout: timedelta) -> None:
    try:
        store = meet(timeout.total_seconds())
        with quiet():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        del store  # torch now has its own store at the address, which keeps the port of rank 0 open
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise FastPPOError(
            f"port {port} of this machine, at which the ranks of this run connect, is in use, perhaps by another run."
            f" Use another port: deepspeed --master_port {int(port) + 1} fastppo/train.py ..."
        ) from error


def _set_device(local_rank: int) -> None:
    accelerator = get_accelerator()
    if local_rank >= accelerator.device_count():
        raise FastPPOError(
            f"LOCAL_RANK is {local_rank}, but this machine has {accelerator.device_count()} device(s), for one rank"
            " each. Start as many ranks as devices: deepspeed --num_accelerators, or the slots in the hostfile."
        )
    accelerator.set_device(local_rank)


def _unlink_shared_memory() -> None:
    """Unlink the 66 MiB of shared memory that DeepSpeed creates for each rank; existing mappings stay valid.

    DeepSpeed never unlinks them. Each run, killed or not, would leave them in memory, and a later run on the same port
    could start with the content that a killed run left.
    """
    _barrier()  # after it all ranks have mapped the memory
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def stop_world() -> None:
    """End the process group on all ranks together: rank 0 holds the store that the others still use."""
    if dist.is_initialized():
        _barrier()
        dist.destroy_process_group()


_without_cleanup = False


def leave_without_cleanup() -> None:
    """Let `leave` end this process at once: a library in it cleans up by collectives, and no group is left for them."""
    global _without_cleanup
    _without_cleanup = True


def leave(status: int) -> None:
    """End this process with a status, after `stop_world`; with 0 it may as well go on to its end."""
    if _without_cleanup:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the terminal is closed
                stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _barrier() -> None:
    """Wait for all ranks. NCCL gets the rank's GPU: else it guesses the GPU from the rank, and may hang if wrong."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def all_gather(part: T, world: World) -> list[T]:
    """The parts of all ranks, in the order of ranks, on every rank. For small parts: token ids, one number a token."""
    parts: list[Any] = [part] * world.ranks
    if world.ranks == 1:
        return parts
    dist.all_gather_object(parts, part)
    return parts


def gather_groups(part: T, world: World) -> list[T]:
    """The parts of all groups, in their order, on every rank; `part` is the same on all ranks of a group."""
    parts = all_gather(part if world.sequence.index == 0 else None, world)
    return cast("list[T]", parts[:: world.sequence.size])


def on_any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank; the result is the same on every rank."""
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


def sum_groups(x: Tensor, world: World) -> Tensor:
    """The sum over groups, on every rank; x is floating, and the same on all ranks of a group.

    A group has 1, 2, 4 or 8 ranks, so the division is exact.
    """
    return all_sum(x / world.sequence.size, world)


def all_max(x: Tensor, world: World) -> Tensor:
    """The maximum over ranks, on every rank."""
    x = x.to(world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. From the host to a GPU it goes through pinned memory, and the host does not wait: a copy of
    pageable memory waits until the GPU has done all that it was given before."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device, non_blocking=device.type != "cpu")  # a copy to the host is there when it returns


def quiet() -> contextlib.AbstractContextManager[object]:
    """Within this context nothing is printed to stdout: DeepSpeed prints memory tables while it starts."""
    return contextlib.redirect_stdout(io.StringIO())


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


FILE_TIMEOUT = 30.0  # seconds; on a network file system a new file may appear late on other nodes


def check_output_is_shared(output: Path, world: World) -> None:
    """Raise FastPPOError unless `output` is the same folder on all ranks. All ranks call it after rank 0 has made it.

    Each rank writes its part of a checkpoint. If the nodes wrote to separate disks, no checkpoint would be complete,
    and the user would notice only when resuming the run.
    """
    if world.ranks == 1:
        return
    marker = output / f".shared-{all_gather(secrets.token_hex(8), world)[0]}"
    write_error = None
    if world.rank == 0:
        try:
            marker.touch()
        except OSError as error:
            write_error = error.strerror
    if (write_error := all_gather(write_error, world)[0]) is not None:  # else the marker exists now
        raise FastPPOError(
            f"output = {output}: nothing can be written there ({write_error}). Free disk space, or give another"
            " --output."
        )
    visibility = all_gather((socket.gethostname(), _appears(marker)), world)
    if world.rank == 0:
        marker.unlink(missing_ok=True)
    without_marker = [f"rank {rank} on {host}" for rank, (host, visible) in enumerate(visibility) if not visible]
    if without_marker:
        raise FastPPOError(
            f"output = {output} is not the same folder on every node: a file that rank 0 on {visibility[0][0]} wrote is"
            f" not visible to {', '.join(without_marker)}. All ranks write their parts of a checkpoint into it, so give"
            " an --output on a file system that the nodes share, under the same absolute path on each."
        )


def _appears(path: Path) -> bool:
    """Whether a file exists within `FILE_TIMEOUT`."""
    end = time.monotonic() + FILE_TIMEOUT
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
