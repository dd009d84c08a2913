"""The memory in use and its maximum: of torch's allocator on a GPU, else of this process as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

import torch


def in_use(device: torch.device) -> int:
    """Bytes now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes since `mark`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def mark(device: torch.device) -> None:
    """Begin the maximum anew, at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
