"""Runs every code block of the README and of pages: python .ci/blocks.py README.md docs/*.md

Blocks of the languages bash, console (the lines after `$ `) and python run from the folder above this one, each in a
shell or an interpreter of its own, with .venv/bin on PATH. Training is shortened, `make test` and `make vllm` are left
out (CI calls them itself), and so is a block with `<!-- not in CI: reason -->` on the line before it.

The first page runs alone: the others read what it makes. Then two pages run side by side, each on a core of its own:
half of a short run is its start, which has one thread anyway. With --first only the first block of these pages runs.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastppo.config import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^(?:<!-- not in CI: (?P<reason>.+?) -->\n)?```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
TRAINING = re.compile(r"fastppo/train\.py|node\.sbatch|-m fastppo\.train\b|\bfastppo train\b")
REST = re.compile(r"fastppo/train_rest\.py|\bfastppo rest\b")
OFFLINE = re.compile(r"fastppo/train_(dpo|reward|sft)\.py|simpo\.py|\bfastppo (dpo|reward|sft)\b")
DPO = re.compile(r"fastppo/train_dpo\.py|\bfastppo dpo\b")
GENERATE = re.compile(r"\bfastppo generate\b")
SHORT = (  # what a command gets, unless it has that setting itself
    (TRAINING, ("--steps 2", "--eval.prompts 4", "--ppo.batch_size 8")),
    (REST, ("--steps 1", "--eval.prompts 4", "--grow.prompts 4")),
    (DPO, ("--data.limit 64",)),  # the reference scores all pairs before the first step
    (OFFLINE, ("--steps 2", "--eval.examples 8", "--batch_size 8")),
    (GENERATE, ("--data.limit 8",)),
    (re.compile(r"^python bench/estimators\.py"), ("--short", "--seeds 1", "--estimators rloo")),
    (re.compile(r"^python bench/conversations\.py"), ("--short", "--seeds 1")),
    (re.compile(r"^make demo\b"), ("STEPS=2",)),
)


def shorten(command: str) -> str:
    """The same command with little to do."""
    if "--help" in command:
        return command
    given = command.replace("=", " ").split()
    settings = [each for what, settings in SHORT if what.search(command) for each in settings]
    return " ".join([command, *(each for each in settings if re.split("[ =]", each)[0] not in given)])


def script(language: str, code: str) -> str:
    """A block of bash or console as a shell script that stops at the first error."""
    code = code.replace("\\\n", "")  # a command that goes on in the next line
    lines = code.splitlines()
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    commands = [re.sub(r"\s+#.*$", "", line).rstrip() for line in lines]
    return "\n".join(shorten(command) for command in commands if command not in ("make test", "make vllm"))


class BlockFailed(Exception):
    pass


def run_page(path: Path, env: Mapping[str, str], failed: threading.Event, most: int | None = None) -> None:
    """Run the page's blocks, or the first `most`, one after the other; what one prints is printed when it has ended."""
    ran = 0
    text = path.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        language, code = block["language"], block["code"]
        where = f"{path}:{text.count(chr(10), 0, block.start('code')) + 1}"
        if language not in ("bash", "console", "python") or failed.is_set():
            continue
        if block["reason"]:
            print(f"--- {where}: left out: {block['reason']}", flush=True)
            continue
        run = (
            ["python", "-c", code]
            if language == "python"
            else ["bash", "-euo", "pipefail", "-c", script(language, code)]
        )
        start = time.monotonic()
        done = subprocess.run(
            run,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1800,
            encoding="utf-8",
            errors="replace",
        )
        how = f"exit status {done.returncode} after" if done.returncode else "passed in"
        result = f"--- {where}: {how} {time.monotonic() - start:.0f} s"
        print(f"--- {where} ({language})\n{run[-1].strip()}\n---\n{done.stdout}\n{result}", flush=True)
        if done.returncode:
            raise BlockFailed(result)
        ran += 1
        if ran == most:
            return


def main(pages: Sequence[Path], most: int | None) -> None:
    failed, cores = threading.Event(), sorted(os.sched_getaffinity(0))
    env = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    run_page(pages[0], env, failed)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(2, len(cores))) as pool:
        lanes = [lane(Path(folder), core, env) for core in cores[:2]]

        def run(page: Path) -> None:
            core, own = lanes.pop()  # there are as many as threads
            os.sched_setaffinity(0, {core})  # of this thread, and of what it starts
            try:
                run_page(page, own, failed, most)
            except Exception:
                failed.set()  # the other page ends after its block
                raise
            lanes.append((core, own))

        for done in [pool.submit(run, page) for page in pages[1:]]:
            done.result()


def lane(folder: Path, core: int, env: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """A core for blocks that run beside others, and their environment, in which runs meet at a port of their own."""
    own, flag = folder / str(core), f"--master_port {29600 + core}"
    own.mkdir()
    deepspeed, fastppo = (shutil.which(name, path=env["PATH"]) for name in ("deepspeed", "fastppo"))
    _write_command(own / "deepspeed", f'exec {deepspeed} {flag} "$@"')
    training = f'{"|".join(COMMANDS)}) name=$1; shift; exec {fastppo} $name {flag} "$@"'
    _write_command(own / "fastppo", f'case $1 in {training};; esac\nexec {fastppo} "$@"')
    return core, {**env, "PATH": f"{own}:{env['PATH']}"}


def _write_command(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)


if __name__ == "__main__":
    try:
        main([Path(page) for page in sys.argv[1:] if page != "--first"], 1 if "--first" in sys.argv else None)
    except BlockFailed as failure:
        sys.exit(str(failure))
