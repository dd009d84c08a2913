"""Regular expressions as sources of reward: whether a response contains a match."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastppo.rewards.responses import Responses, RewardError, Source

# The parts of a pattern: an escaped character or a character set, in which braces are literal; and {answer}, the name
# of a column (the {2,3} of a regular expression does not match).
PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<column>[A-Za-z_]\w*)\}", re.DOTALL)


def pattern_source(pattern: str, where: str = "rewards") -> Source:
    """A source that gives 1 to a response that contains a match of the pattern, otherwise 0; also 0 if a column named
    in the pattern is None or empty.

    `{column}` stands for the literal text of that column of the data, as one group: `answer is {answer}\\b`. Braces in
    a character set, `[{}]`, and after a backslash, `\\{answer}`, are literal. The syntax is that of Python's `re`;
    `(?i)` at the start ignores case. where: the setting with the source, for errors.
    """
    setting = f"{where}.pattern = {pattern}"
    names = list(filter(None, (piece["column"] for piece in PIECE.finditer(pattern))))

    def source(responses: Responses) -> list[float]:
        columns = {"prompt": responses.prompts} | responses.columns
        for name in names:
            if name not in columns:
                raise RewardError(
                    f"{setting} names the column {name}, which the data does not have; it has: {', '.join(columns)}."
                    f" Name one of these, or write \\{{{name}}} for literal braces."
                )

        def has_match(i: int, text: str) -> float:
            values = {name: "" if columns[name][i] is None else str(columns[name][i]) for name in names}
            if not all(values.values()):  # an empty text would match in every response
                return 0.0
            filled = PIECE.sub(lambda piece: _filled(piece, values), pattern)
            try:
                return float(re.search(filled, text) is not None)
            except (re.error, OverflowError, RecursionError) as error:
                raise RewardError(
                    f"{setting} is not a regular expression after its columns are filled in, {filled}: {error}"
                ) from error

        return [has_match(i, text) for i, text in enumerate(responses.texts)]

    return source


def _filled(piece: re.Match[str], values: Mapping[str, str]) -> str:
    name = piece["column"]
    return piece[0] if name is None else f"(?:{re.escape(values[name])})"
