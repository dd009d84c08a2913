"""A rule check as a source of reward: whether a response matches a regular expression."""

from __future__ import annotations

import re

from fastppo.feedback.responses import Responses, RewardError, Source

COLUMN = re.compile(r"\{([A-Za-z_]\w*)\}")  # {answer}, and not the {2,3} of a regular expression


def pattern_source(pattern: str, where: str = "rewards") -> Source:
    """1 for a response in which the pattern is found, else 0.

    `{column}` in it stands for that column of the data, taken literally: `answer is {answer}\\b`. A
    pattern of Python's `re`, where `(?i)` at the start ignores case. where: the setting it belongs to, for errors.
    """

    def source(responses: Responses) -> list[float]:
        columns = {"prompt": responses.prompts} | responses.columns
        for name in COLUMN.findall(pattern):
            if name not in columns:
                raise RewardError(
                    f"{where}.pattern = {pattern} names the column {name}, which the data lacks; it has:"
                    f" {', '.join(columns)}. Name one of these, or write \\{{{name}\\}} for braces of the text."
                )

        def found(i: int, text: str) -> float:
            filled = COLUMN.sub(lambda match: re.escape(str(columns[match[1]][i])), pattern)
            return float(re.search(filled, text) is not None)

        return [found(i, text) for i, text in enumerate(responses.texts)]

    return source
