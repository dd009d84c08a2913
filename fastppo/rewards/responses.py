"""The input of a source of reward, and the validation of the scores that it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.data import Messages, Packed
from fastppo.errors import FastPPOError

LARGEST = torch.finfo(torch.float32).max  # the largest absolute value of a score


class RewardError(FastPPOError):
    """A source of reward is missing, fails, or does not return one finite number per response."""


@dataclass(frozen=True)
class Responses:
    """B responses as text, and as tokens for reward models with the actor's tokenizer.

    A prompt and its response, concatenated, are the text of the whole sequence, also if the tokenizer adds a space at
    the start of a text. With an environment a response is what the policy wrote, its turns joined by a line break, and
    `conversations` have the observations too.
    """

    prompts: list[str]  # chats as formatted by the actor's template
    texts: list[str]  # the responses without special tokens, and therefore without the EOS
    ended: list[bool]  # False if the response was truncated at its maximum length
    columns: dict[str, list[Any]]  # the other columns of the data, one value per response
    packed: Packed
    messages: Sequence[Messages | None] | None = None  # chat of each prompt, None if it is text; None: no chats at all
    conversations: Sequence[Messages] | None = None  # prompt and all that was said; None without an environment


Source = Callable[[Responses], Sequence[float]]


def checked(name: str, answer: Any, texts: Sequence[str], first: int = 0) -> list[float]:
    """Check that `answer` has one finite number in the range of fp32 per response, and return them as floats.

    A bool counts as 1 or 0. Raises RewardError with the first wrong value. name: the source's setting, as in
    `rewards.function = file.py:function`; texts: the responses; first: the index of the first of them in the batch.
    """
    numbers = _listed(name, answer)
    if len(numbers) != len(texts):
        raise RewardError(f"{name} returned {len(numbers)} numbers for {len(texts)} responses")
    for i, (number, text) in enumerate(zip(numbers, texts, strict=True), start=first):
        problem = _problem(number)
        if problem is not None:
            raise RewardError(f"{name} returned {shown(number)}{problem} for response {i}: {text[:200]!r}")
    return [float(n) for n in numbers]


def _listed(name: str, answer: Any) -> list[Any]:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    try:
        if isinstance(answer, str | bytes | bytearray | Mapping | Set):  # iterable, but not lists of scores
            raise TypeError
        return list(answer)
    except Exception as error:  # the iteration of an unknown object may raise anything
        why = f" ({type(error).__name__}: {error})" if str(error) else ""
        raise RewardError(f"{name} returned {type(answer).__name__}, not one number for each response{why}") from error


def _problem(number: Any) -> str | None:
    """Why a value is not a valid score, as text to append to it; None if it is valid."""
    out_of_range = ", outside the range of fp32,"
    try:
        size = math.fabs(number)
    except OverflowError:
        return out_of_range
    except Exception:  # conversions of other libraries' numbers may raise anything
        return f" ({type(number).__name__}), not a number,"
    if size <= LARGEST:
        return None
    return out_of_range if math.isfinite(size) else ""


def shown(value: Any) -> str:
    """A value as text for an error, at most 200 characters."""
    try:
        return repr(value)[:200]
    except Exception:  # Python does not convert integers of thousands of digits to text
        return "a value that cannot be shown as text"
