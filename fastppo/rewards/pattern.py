"""A rule check as a source of reward: whether a response matches a regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastppo.rewards.responses import Responses, RewardError, Source

# What is read as one: an escaped character and a set of characters, in which braces are braces; {answer}, which is a
# column, and not the {2,3} of a regular expression.
PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<column>[A-Za-z_]\w*)\}", re.DOTALL)


def pattern_source(pattern: str, where: str = "rewards") -> Source:
    """1 for a response in which the pattern is found, else 0; 0 too where a column that it names is None or empty.

    `{column}` in it stands for that column of the data, taken literally and as a whole: `answer is {answer}\\b`. Braces
    in a set, `[{}]`, and behind a backslash, `\\{answer}`, are braces. A pattern of Python's `re`, where `(?i)` at the
    start ignores case. where: the setting it belongs to, for errors.
    """
    setting = f"{where}.pattern = {pattern}"
    names = list(filter(None, (piece["column"] for piece in PIECE.finditer(pattern))))

    def source(responses: Responses) -> list[float]:
        columns = {"prompt": responses.prompts} | responses.columns
        for name in names:
            if name not in columns:
                raise RewardError(
                    f"{setting} names the column {name}, which the data lacks; it has: {', '.join(columns)}. Name one"
                    f" of these, or write \\{{{name}}} for braces of the text."
                )

        def found(i: int, text: str) -> float:
            values = {name: "" if columns[name][i] is None else str(columns[name][i]) for name in names}
            if not all(values.values()):  # nothing would be found in every response
                return 0.0
            filled = PIECE.sub(lambda piece: _filled(piece, values), pattern)
            try:
                return float(re.search(filled, text) is not None)
            except (re.error, OverflowError, RecursionError) as error:
                raise RewardError(f"{setting} is no regular expression once it is filled, {filled}: {error}") from error

        return [found(i, text) for i, text in enumerate(responses.texts)]

    return source


def _filled(piece: re.Match[str], values: Mapping[str, str]) -> str:
    name = piece["column"]
    return piece[0] if name is None else f"(?:{re.escape(values[name])})"
