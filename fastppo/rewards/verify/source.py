"""Whether the final answer of a response equals the reference answer in a column of the data, as a source of reward."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from fastppo.config import RewardConfig
from fastppo.data import PromptSet
from fastppo.distributed import World, all_gather
from fastppo.rewards.responses import Responses, RewardError
from fastppo.rewards.verify.answers import PLAIN, reference_answer, response_answer
from fastppo.rewards.verify.workers import Task, verdicts

log = logging.getLogger("fastppo")

FORMS = (
    "a number, an expression in LaTeX, a solution that ends with #### and the answer, or one with the answer in"
    " \\boxed{...}"
)
SHOWN = 3  # references of which an error tells
MANY = 1000  # references that take a while to read


class MathSource:
    """Gives 1 to a response whose final answer equals the reference in its row, otherwise 0.

    Answers are compared by math-verify (SymPy), in other processes. A response whose comparison takes more than
    `time_limit` seconds of processor time gets 0, and is counted.
    """

    def __init__(self, reward: RewardConfig, where: str = "rewards"):
        """where: the setting with the source, for errors."""
        assert reward.math is not None
        self._setting, self._column, self._seconds = f"{where}.math = {reward.math}", reward.math, reward.time_limit
        self.scored = self.over_limit = 0  # responses of this rank

    def __call__(self, responses: Responses) -> list[float]:
        values = _column(self._setting, self._column, responses.columns)
        pairs = zip(responses.texts, values, strict=True)
        tasks = [_task(text, reference_answer(value)) for text, value in pairs]
        # Several samples of a prompt often have the same answer.
        distinct = [task for task in dict.fromkeys(tasks) if task is not None and task.answer != task.reference]
        answers = dict(zip(distinct, verdicts(distinct, self._seconds), strict=True))
        self._count(tasks, responses.texts, answers)
        return [float(task is not None and bool(answers.get(task, True))) for task in tasks]

    def _count(self, tasks: Sequence[Task | None], texts: Sequence[str], answers: Mapping[Task, bool | None]) -> None:
        """Count the responses over the limit, and log the first one, the tenth, the hundredth, and so on."""
        pairs = zip(tasks, texts, strict=True)
        over = [text for task, text in pairs if task is not None and task in answers and answers[task] is None]
        before, self.over_limit = self.over_limit, self.over_limit + len(over)
        self.scored += len(texts)
        if over and (before == 0 or len(str(self.over_limit)) > len(str(before))):
            log.warning(
                "%s: %d of %d responses could not be compared within %g s of processor time (time_limit) and 1 GiB, and"
                " got 0, such as %r",
                *(self._setting, self.over_limit, self.scored, self._seconds, over[0][-200:]),
            )


def _task(text: str, reference: str) -> Task | None:
    """What is to be compared; None if there is nothing."""
    answer = response_answer(text)
    return Task(answer.text, answer.found, reference) if answer.text.strip() and reference else None


def check_installed(reward: RewardConfig, where: str) -> None:
    """Raises RewardError if math-verify, an optional package, is not installed."""
    if find_spec("math_verify") is None:
        raise RewardError(
            f"{where}.math is {reward.math}, but the package math-verify is not installed. Run"
            " `pip install 'fastppo[math]'`, or `pip install math-verify`."
        )


def check_column(reward: RewardConfig, where: str, world: World, *prompts: PromptSet) -> None:
    """Check that the column is there and that each reference answer in it can be read.

    Every rank reads a part of them. Raises RewardError on all of them, with the rows of the data.
    """
    assert reward.math is not None
    setting = f"{where}.math = {reward.math}"
    columns = [_column(setting, reward.math, part.columns) for part in prompts]
    first: dict[str, tuple[int, int]] = {}  # of each distinct answer, the first place: of the part, and in it
    for k, column in enumerate(columns):
        for i, value in enumerate(column):
            first.setdefault(reference_answer(value), (k, i))
    unread = [answer for answer in first if answer and not PLAIN.fullmatch(answer)]
    if len(unread) >= MANY and world.rank == 0:
        log.info("%s: reading %d different reference answers", setting, len(unread))
    unreadable = _unreadable(unread, reward.time_limit, world) | {""}
    bad = [place for answer, place in first.items() if answer in unreadable]
    if bad:
        shown = [f"{prompts[k].where(i)}: {str(columns[k][i])[-100:]!r}" for k, i in bad[:SHOWN]]
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise RewardError(
            f"{setting}: these reference answers cannot be read as mathematics: {'; '.join(shown)}{more}. Each must be"
            f" {FORMS}. Correct these rows or leave them out."
        )


def _unreadable(answers: Sequence[str], seconds: float, world: World) -> set[str]:
    """Those of the answers, the same on all ranks, that cannot be read. All ranks call it, and each reads a part."""
    mine = answers[world.rank :: world.ranks]
    outcome: list[str] | RewardError
    try:
        read = verdicts([Task(None, True, answer) for answer in mine], seconds)
        outcome = [answer for answer, readable in zip(mine, read, strict=True) if not readable]
    except RewardError as error:
        outcome = error
    unreadable: set[str] = set()
    for each in all_gather(outcome, world):
        if isinstance(each, RewardError):
            raise each
        unreadable.update(each)
    return unreadable


def _column(setting: str, name: str, columns: Mapping[str, list[Any]]) -> list[Any]:
    if name not in columns:
        raise RewardError(
            f"{setting} names a column that the data does not have; it has: {', '.join(columns)}. Name the one with"
            " the reference answers."
        )
    return columns[name]
