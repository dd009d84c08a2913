"""A process that compares answers with math-verify: `python -m fastppo.rewards.verify.worker`, started by `workers`.

What a response makes it compute may take forever or fill the memory, also within C code that no exception reaches.
Therefore the kernel ends the process: by SIGPROF once one task has used its seconds of processor time, and by refusing
memory. A line of JSON on stdin is a task, and a line on stdout its verdict.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
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
PLACES, PRECISION = 6, 15  # digits behind the point: of decimals, and of expressions with irrational numbers
PERCENT = re.compile(r" ?\\?%$")
ROUNDING = 2**-52  # relative, of a float
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
    if _is_equal(answer, found, reference):
        return True
    # 12.5% is 0.125, and it is also 12.5, which math-verify says of whole numbers alone.
    bare = PERCENT.sub("", answer) if found else answer
    without = PERCENT.sub("", reference)
    return (bare == answer) != (without == reference) and _is_equal(bare, found, without)


def _is_equal(answer: str, found: bool, reference: str) -> bool:
    from math_verify import parse, verify

    expected = _reference(reference)
    given = _parsed(answer) if found else parse(answer, parsing_timeout=None)
    if not (expected and given):
        return False
    zeros = _leading_zeros(reference)
    if _rounds_to(expected[0], given[0], PLACES + zeros):
        return True
    digits = {"float_rounding": PLACES + zeros, "numeric_precision": PRECISION + zeros}
    return bool(verify(expected, given, timeout_seconds=None, **digits))


def _rounds_to(expected: Any, given: Any, places: int) -> bool:
    """Whether a decimal and a whole number are the same after rounding, which SymPy never says of the two kinds:
    120.99999999999999 as a reference and 121, or 6.02e23 and the number with all its digits."""
    from sympy import Float, Integer

    a, b = _evaluated(expected), _evaluated(given)
    if isinstance(a, Float) and isinstance(b, Integer):
        return bool(abs(a - b) < max(10**-places / 2, ROUNDING * abs(a)))
    # A whole number as a reference is met by itself alone, as far as a float can say.
    return isinstance(a, Integer) and isinstance(b, Float) and bool(abs(a - b) <= ROUNDING * abs(a))


def _evaluated(expression: Any) -> Any:
    """A number in an expression without variables; the expression where there is none."""
    if not getattr(expression, "is_number", False):
        return expression
    try:
        return expression.doit()
    except Exception:  # of SymPy, for what has no value; so do the comparisons of math-verify
        return expression


@lru_cache(4096)
def _leading_zeros(reference: str) -> int:
    """The zeros of a reference behind the decimal point: 3 of 0.0001, and 0 of what is no number.

    math-verify counts places from the point, also where that leaves nothing of a number.
    """
    try:
        size = abs(float(_evaluated(_reference(reference)[0])))
    except (TypeError, OverflowError, ValueError):  # no real number, or not one of this range
        return 0
    return -math.floor(math.log10(size)) - 1 if 0 < size < 0.1 else 0


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
