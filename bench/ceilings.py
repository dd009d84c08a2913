"""The ceilings of a device, bandwidth and speed of products, with which benchmarks compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo.config import computes_bf16

# From datasheets: bytes/s of memory and dense bf16 FLOP/s, by torch's name of the card.
CARDS = {
    "GH200": (4.0e12, 989e12),  # before the names that its name contains
    "H200": (4.8e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100 NVL": (3.9e12, 835e12),
    "H100": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
    "A100 80GB PCIe": (1.94e12, 312e12),
    "A100": (1.56e12, 312e12),
    "B200": (8.0e12, 2250e12),
}


LEAD = 4_000_000  # cycles, about 2 ms, that the GPU waits so that the host can launch the timed kernels meanwhile


class Ceilings(NamedTuple):
    device: str
    bandwidth: float  # bytes/s
    flops: float  # FLOP/s of bf16 matrix products
    source: str

    def share(self, seconds: float, *, moved: int = 0, flops: int = 0) -> float:
        """Speed reached, as a share of what the tighter of the two ceilings allows, 0 to 1."""
        return max(moved / self.bandwidth, flops / self.flops) / seconds


def ceilings(device: torch.device) -> Ceilings:
    """From the datasheet of a known card, else `measured`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, (bandwidth, flops) in CARDS.items():
            if card in name:
                return Ceilings(name, bandwidth, flops, "datasheet")
    return measured(device)


def measured(device: torch.device) -> Ceilings:
    """torch.add over 400 MB, and a product in bf16 of 2,048 x 2,048, on a GPU 8,192 x 8,192."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    a, b, c = (torch.ones(1 << 25, device=device) for _ in range(3))
    width = 8192 if gpu else 2048 if computes_bf16() else 256  # without instructions for bf16 2048 would take minutes
    x = torch.randn(width, width, device=device).bfloat16()  # a GPU draws less power on ones, and is faster
    bandwidth = 3 * a.numel() * 4 / median_seconds(lambda: torch.add(a, b, out=c), device)
    return Ceilings(name, bandwidth, 2 * width**3 / median_seconds(lambda: x @ x, device), "measured")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU from its first kernel to its last, by CUDA events."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(LEAD)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    return statistics.median([seconds(call, device) for _ in range(rounds + 1)][1:])
