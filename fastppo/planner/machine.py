"""Where a run is to fit: how many GPUs, and how much memory."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

log = logging.getLogger("fastppo")

# What the driver and a CUDA context of ours take at most; `fit` counts them.
CONTEXT = 1 << 30
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Machine:
    """Where a run is to fit. Bytes."""

    gpus: int  # ranks on each node
    nodes: int
    gpu: int | None  # memory of each GPU; None: the ranks run on the CPU, in the host's memory
    host: int  # memory of each node
    nvme: int | None = None  # room for what is offloaded to NVMe on each node; None: not known

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


def this_machine(gpus: int | None, nodes: int, *, cpu: bool) -> Machine:
    """Memory of this process's GPU and what the host has free; gpus: ranks on each node, all GPUs or 1 if left out."""
    if cpu:
        return Machine(gpus or 1, nodes, None, _host_memory())
    return Machine(gpus or torch.cuda.device_count(), nodes, _gpu_memory(), _host_memory())


def least_machine(machines: Sequence[Machine]) -> Machine:
    """What all ranks have, if each has found its own: other processes may hold more of one GPU than of another."""
    gpus = [machine.gpu for machine in machines if machine.gpu is not None]
    return replace(machines[0], gpu=min(gpus, default=None), host=min(machine.host for machine in machines))


def _gpu_memory() -> int:
    """Bytes of this process's GPU, less what other processes hold of it."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved() - CONTEXT
    if others <= 0:
        return total
    log.warning("other processes hold %.1f of the GPU's %.1f GB (nvidia-smi lists them)", others / 1e9, total / 1e9)
    return total - others


def _host_memory() -> int:
    """Bytes that can still be had: by the kernel's account, and by the limit of the container where there is one."""
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    free = int(found[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most))
    return free


def parse_bytes(text: str) -> int:
    """80GB, 80GiB, 1.5TB, 24000000000"""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory; write it as 80GB or 1TB")
    return int(float(match[1]) * UNITS[match[2]])


def in_gb(amount: int) -> str:
    """10.0 and more with one digit, less with two."""
    return f"{amount / 1e9:.1f}" if amount >= 1e10 else f"{amount / 1e9:.2f}"


def parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
