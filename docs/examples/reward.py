"""A reward for sums: the answer is in its tags, it is correct, and the response has little other text."""

import re

ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")
FREE = 40  # characters that cost nothing


def sums(responses: list[str], answer: list[int]) -> list[float]:
    """One number per response. The parameter `answer` gets the column of that name."""
    return [score(response, number) for response, number in zip(responses, answer, strict=True)]


def score(response: str, number: int) -> float:
    written = ANSWER.search(response)
    form = 0.5 if written else 0.1 if "<answer>" in response else 0.0  # partly right: easier to learn
    right = 1.0 if written and int(written[1]) == number else 0.0
    length = 0.005 * max(len(response) - FREE, 0)
    return form + right - length
