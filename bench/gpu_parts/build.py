"""The extension `fastppo._C`, built where it is absent, older than its sources, or without kernels for the GPU here."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts.report import Report

ROOT = Path(__file__).resolve().parents[2]


def run(report: Report) -> None:
    why = stale()
    if why is not None and not (report.small and has_extension()):
        report.add("building", f"building the extension: {why}", why=why)
        start = time.time()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        jobs = {"MAX_JOBS": str(len(os.sched_getaffinity(0)))}
        subprocess.run(command, cwd=ROOT, env=os.environ | jobs, check=True)
        report.add("compiled", f"compiled in {time.time() - start:.0f} s", seconds=round(time.time() - start, 1))
    elif why is not None:
        report.skip("building the extension", f"small form, though {why}")
    about = built()
    report.add("extension", "extension: " + ", ".join(f"{name} {value}" for name, value in about.items()), **about)


def has_extension(root: Path = ROOT) -> bool:
    return bool(_files(root))


def stale(root: Path = ROOT) -> str | None:
    """Why the extension has to be built; None if it need not."""
    files = _files(root)
    if not files:
        return "it is not there"
    newer = [path.name for path in sorted((root / "csrc").iterdir()) if path.stat().st_mtime > files[0].stat().st_mtime]
    if newer:
        return f"{', '.join(newer)} changed since"
    import torch  # a second and more, that is not needed to find it absent

    if torch.cuda.is_available() and shutil.which("nvcc") and not built()["cuda_archs"]:
        return "it was built without the CUDA kernels"
    return None


def _files(root: Path) -> list[Path]:
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return [path for name in names if (path := root / "fastppo" / name).exists()]


def built() -> dict[str, Any]:
    """What the extension says of itself, in a process that has not loaded an older one."""
    code = "import json, torch, fastppo._C; print(json.dumps(fastppo._C.built()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
