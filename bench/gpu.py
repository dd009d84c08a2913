"""All that is worth knowing of a GPU, in one command: python bench/gpu.py. At most eight minutes.

From a checkout with torch, Triton, transformers and DeepSpeed, and no network; docs/gpu.md shows how to read it. Each
part is a process of its own with a limit of its own, the most valuable first. What it finds is printed and written to
OUTPUT/results.jsonl at once; OUTPUT/results.json has all of it at the end, OUTPUT/PART.log what a part's libraries say.
What is not installed is left out in one line. Without a GPU, or with `--small`, each part runs in a small form on the
CPU, so that a mistake in it is found where time is cheap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts.report import RESULTS, write_line

BENCH = Path(__file__).resolve().parent
SECONDS = 480  # of all parts
MODELS = ("transformers", "deepspeed")


class Part(NamedTuple):
    seconds: int  # its limit
    shows: str
    needs: tuple[str, ...] = ()  # packages without which it is skipped, torch beside them


# In this order. The limits of all parts are more than there is in all; most end long before.
PARTS = {
    "card": Part(40, "card, machine and versions"),
    "build": Part(130, "the extension, with GAE's CUDA kernels where there is nvcc"),
    "tests": Part(80, "tests that need a GPU", ("pytest", "hypothesis", *MODELS)),
    "step": Part(150, "a warm PPO step of a 1B Llama by phase, and where the GPU waits", MODELS),
    "decode": Part(50, "decode steps by rows, with CUDA graphs and without", MODELS),
    "passes": Part(50, "a profiled microbatch, with fused layers and without", MODELS),
    "ops": Part(100, "every op against eager, compiled and its ceiling"),
    "residency": Part(30, "what moves between GPU and host in a step", MODELS),
    "memory": Part(40, "peak memory of each phase against the plan", MODELS),
    "quickstart": Part(120, "the quickstart: SFT, reward model and PPO", MODELS),
}


class Options(NamedTuple):
    output: Path
    scratch: Path
    small: bool
    end: float  # time.time() at which all parts have to be over


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; 0 if none of them failed or was cut off."""
    parser = argparse.ArgumentParser(description="All that is worth knowing of a GPU, in at most eight minutes.")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in the order of the list")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of all parts together")
    parser.add_argument("--small", action="store_true", help="small forms, as on the CPU")
    given = parser.parse_args(arguments)
    chosen = given.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--parts: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / RESULTS).unlink(missing_ok=True)
    end = time.time() + given.seconds
    scratch = Path(tempfile.mkdtemp(prefix="fastppo-gpu-"))
    small = given.small or not has_gpu()
    if small and not given.small:
        print("no GPU that torch can use: every part runs in its small form, on the CPU", flush=True)
    statuses: dict[str, str] = {}
    try:
        options = Options(given.output.resolve(), scratch, small, end)
        # Each part in its own process, that another's mistake cannot harm it; the small forms in one, which is quick.
        names = [name for name in PARTS if name in chosen]
        for group in [names] if small else [[name] for name in names]:
            statuses |= run_parts(group, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lines = read_lines(given.output)
    (given.output / "results.json").write_text(json.dumps(lines, indent=1))
    print(json.dumps({"seconds": round(given.seconds - (end - time.time()), 1), "parts": statuses}), flush=True)
    return int(any(status in ("failed", "cut off") for status in statuses.values()))


def has_gpu() -> bool:
    """Whether there is one that torch can use. Torch takes seconds to import, here where it may find one only."""
    devices = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
    if not devices or find_spec("torch") is None:
        return False
    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True).returncode == 0


def run_parts(names: list[str], options: Options) -> dict[str, str]:
    """Runs parts in a process of their own, and prints what they find as it comes. Returns how each ended."""
    statuses = {name: _skipped(name, options) for name in names}
    due = [name for name, skipped in statuses.items() if not skipped]
    if not due:
        return statuses
    end = min(time.time() + sum(PARTS[name].seconds for name in due), options.end)
    start, printer = time.time(), Printer(options.output)
    command = [sys.executable, "-m", "gpu_parts", *due, "--output", options.output, "--scratch", options.scratch]
    command += ["--end", end] + ["--small"] * options.small
    log = options.output / f"{due[0] if len(due) == 1 else 'small'}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=_environment(options.small), cwd=BENCH.parent, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.time() < end:
                printer.print_new()
                time.sleep(0.1)
            cut_off = process.poll() is None
        finally:
            kill_tree(process)
    printer.print_new()
    ended = {record["part"]: record["status"] for record in read_lines(options.output) if "status" in record}
    for name in (name for name in due if name not in ended):
        ended[name] = _ended(name, "cut off" if cut_off else "failed", time.time() - start, options)
    if "failed" in ended.values():
        print(f"the end of {log}:\n{_tail(log)}", flush=True)
    return {name: ended[name] for name in names}


def _skipped(name: str, options: Options) -> str:
    """Why a part cannot be run, in one line; empty if it can."""
    missing = [package for package in ("torch", *PARTS[name].needs) if find_spec(package) is None]
    if missing:
        return _ended(name, "skipped", 0.0, options, f", without {', '.join(missing)}")
    if options.end - time.time() < 2:
        return _ended(name, "skipped", 0.0, options, ", no time is left")
    return ""


def _environment(small: bool) -> dict[str, str]:
    """Of a part: this checkout's modules, no network; in the small form one thread, and compilers left out."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # left over from another program
        environment.pop(name, None)
    if small:
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _ended(name: str, status: str, seconds: float, options: Options, why: str = "") -> str:
    text = f"{name}: {status} after {seconds:.1f} s{why}"
    print(text, flush=True)
    write_line(options.output, {"part": name, "status": status, "seconds": round(seconds, 1), "text": text})
    return status


def read_lines(output: Path) -> list[dict[str, Any]]:
    path = output / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Printer:
    """Prints findings from here on, each once, under the name of its part."""

    def __init__(self, output: Path):
        self._path = output / RESULTS
        self._seen, self._part = len(self._whole()), ""

    def print_new(self) -> None:
        whole = self._whole()
        for line in whole[self._seen :].splitlines():
            record = json.loads(line)
            if record["part"] != self._part:
                self._part = record["part"]
                print(f"\n== {self._part}: {PARTS[self._part].shows}")
            print(record["text"], flush=True)
        self._seen = len(whole)

    def _whole(self) -> bytes:
        """The lines that are written to their end."""
        written = self._path.read_bytes() if self._path.exists() else b""
        return written[: written.rfind(b"\n") + 1]


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, also what has left its session, as some libraries' workers do."""
    if process.poll() is None:
        for one in (*_descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # orphans have another parent, but are of its group
    process.wait()


def _descendants(process: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields: Any = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    due = list(children.get(process, ()))
    while due:
        yield (one := due.pop())
        due += children.get(one, ())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out the running part is ended
    raise SystemExit(main())
