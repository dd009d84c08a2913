"""A process that compares answers with math-verify: `python -m fastppo.rewards.verify.worker`, started by `workers`.

What a response makes it compute may take forever or fill the memory, also within C code that no exception reaches.
Therefore the kernel ends the process: by SIGPROF once one task has used its seconds of processor time, and by refusing
memory. A line of JSON on stdin is a task, and a line on stdout its verdict.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MEMORY = 1 << 30  # bytes that tasks may add to those of the process at its start
GROWN = MEMORY // 4  # a process that has kept more than this of them is replaced, so that the next task has its share
# The run's own process decides what a signal to all processes of a job means; this one ends when its stdin does.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def answer_requests() -> None:
    tasks, verdicts = sys.stdin.buffer, _private_stdout()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError):  # where memory runs out, this process should end and not the run
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        is_equal(r"\frac{1}{2}", True, "0.5")  # imports what is needed, and fills the parser's tables
    except Exception as error:
        _write(verdicts, {"error": f"{type(error).__name__}: {error}"})
        return
    size = _size()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    _write(verdicts, {"ready": True})
    for line in tasks:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, task["seconds"])
        verdict = _verdict(task)
        signal.setitimer(signal.ITIMER_PROF, 0)
        last = _size() > size + GROWN
        _write(verdicts, {"verdict": verdict, "last": last})
        if last:
            return


def _verdict(task: dict[str, Any]) -> bool:
    if task["answer"] is None:
        return bool(_reference(task["reference"]))
    return is_equal(task["answer"], task["found"], task["reference"])


def is_equal(answer: str, found: bool, reference: str) -> bool:
    """Whether a final answer equals the reference. found: False if the answer is still to be found in the text, by
    math-verify's own rules."""
    from math_verify import parse, verify

    expected = _reference(reference)
    given = _parsed(answer) if found else parse(answer, parsing_timeout=None)
    # Decimals are compared after rounding to 6 places.
    return bool(expected and given and verify(expected, given, float_rounding=6, timeout_seconds=None))


@lru_cache(4096)
def _reference(text: str) -> list[Any]:
    """A reference as expressions of SymPy; empty if it is none."""
    from sympy import Basic, MatrixBase

    parsed = _parsed(text)
    return parsed if any(isinstance(each, Basic | MatrixBase) for each in parsed) else []


def _parsed(answer: str) -> list[Any]:
    """The expression that the LaTeX of an answer means, and its text."""
    from math_verify import LatexExtractionConfig, parse

    # In a box, all of it is one expression. math-verify's timeouts are alarms, which do not reach C code.
    parsed: list[Any] = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=None)
    return parsed


def _private_stdout() -> BinaryIO:
    """The pipe at stdout; what libraries print there and to stderr goes nowhere."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    pipe = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return pipe


def _write(pipe: BinaryIO, said: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the run has ended
        pipe.write(json.dumps(said).encode() + b"\n")
        pipe.flush()


def _size() -> int:
    """Bytes of the address space of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    answer_requests()
