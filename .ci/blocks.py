"""Runs every code block of the README and of pages: python .ci/blocks.py README.md docs/*.md

Blocks of the languages bash, console (the lines after `$ `) and python run from the folder above this one, each in a
shell or an interpreter of its own, with .venv/bin on PATH. Training is shortened, `make test` and `make vllm` are left
out (CI calls them itself), and so is a block with `<!-- not in CI: reason -->` on the line before it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(
    r"^(?:<!-- not in CI: (?P<reason>.+?) -->\n)?```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
TRAINING = re.compile(r"fastppo/train\.py|-m fastppo\.train\b|\bfastppo train\b")
REST = re.compile(r"fastppo/train_rest\.py|\bfastppo rest\b")
OFFLINE = re.compile(r"fastppo/train_(dpo|reward|sft)\.py|\bfastppo (dpo|reward|sft)\b")
GENERATE = re.compile(r"\bfastppo generate\b")


def shorten(command: str) -> str:
    """The same command with little to do."""
    if re.fullmatch(r"make demo\b.*", command) and "STEPS=" not in command:
        return f"{command} STEPS=2"
    if TRAINING.search(command) and "--steps" not in command and "--help" not in command:
        return f"{command} --steps 2 --eval.prompts 4"
    if REST.search(command) and "--steps" not in command and "--help" not in command:
        return f"{command} --steps 1 --grow.prompts 4 --eval.prompts 4"
    if command.startswith("python bench/estimators.py"):
        return f"{command} --short --seeds 1 --estimators rloo"
    if command.startswith("python bench/conversations.py"):
        return f"{command} --short" if "--waiting" in command else f"{command} --short --seeds 1"
    if GENERATE.search(command) and "--data.limit" not in command and "--help" not in command:
        return f"{command} --data.limit 8"
    if OFFLINE.search(command) and "--steps" not in command and "--help" not in command:
        return f"{command} --steps 2 --eval.examples 8"
    return command


def script(language: str, code: str) -> str:
    """A block of bash or console as a shell script that stops at the first error."""
    code = code.replace("\\\n", "")  # a command that goes on in the next line
    lines = code.splitlines()
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    commands = [re.sub(r"\s+#.*$", "", line).rstrip() for line in lines]
    return "\n".join(shorten(command) for command in commands if command not in ("make test", "make vllm"))


def main(path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PATH": f"{root / '.venv/bin'}:{os.environ['PATH']}"}
    text = path.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        language, code = block["language"], block["code"]
        where = f"{path}:{text.count(chr(10), 0, block.start('code')) + 1}"
        if language not in ("bash", "console", "python"):
            continue
        if block["reason"]:
            print(f"--- {where}: left out: {block['reason']}", flush=True)
            continue
        run = (
            ["python", "-c", code]
            if language == "python"
            else ["bash", "-euo", "pipefail", "-c", script(language, code)]
        )
        print(f"--- {where} ({language})\n{run[-1].strip()}\n---", flush=True)
        start = time.monotonic()
        if status := subprocess.run(run, cwd=root, env=env, stdin=subprocess.DEVNULL, timeout=1800).returncode:
            sys.exit(f"{where}: exit status {status}")
        print(f"--- {where}: passed in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        main(Path(page))
