"""What a source of reward sees, and what it must answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.data import Messages, Packed
from fastppo.errors import FastPPOError

LARGEST = torch.finfo(torch.float32).max  # what a score may be, in size


class RewardError(FastPPOError):
    """A source of reward that is missing, fails or answers with something that is not one finite number a response."""


@dataclass(frozen=True)
class Responses:
    """B responses as text, and for reward models with the actor's tokenizer the tokens themselves.

    A prompt and its response together are the text that the actor has written on, also where its tokenizer puts a space
    before a text of its own.
    """

    prompts: list[str]  # chat as the actor's template writes it
    texts: list[str]  # without special tokens, and so without the EOS
    ended: list[bool]  # False where the response was cut at its maximum length
    columns: dict[str, list[Any]]  # every other column of the data, one value a response
    packed: Packed
    messages: Sequence[Messages | None] | None = None  # of each prompt, None where it is no chat; None where none is


Source = Callable[[Responses], Sequence[float]]


def checked(name: str, answer: Any, texts: Sequence[str], first: int = 0) -> list[float]:
    """One number for each response that fp32 can hold, or a RewardError that shows the first that is none.

    A bool counts as 1 or 0. name: the source by its setting, as in `rewards.function = file.py:function`; first: the
    number of the first of these responses among all that are scored.
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
        if isinstance(answer, str | bytes | bytearray | Mapping | Set):  # lists of something else than the scores
            raise TypeError
        return list(answer)
    except Exception as error:  # what is iterated may raise what it likes
        why = f" ({type(error).__name__}: {error})" if str(error) else ""
        raise RewardError(f"{name} returned {type(answer).__name__}, not one number for each response{why}") from error


def _problem(number: Any) -> str | None:
    """Why it can be no score, to be written behind it; None if it can."""
    beyond = ", beyond what fp32 holds,"
    try:
        size = math.fabs(number)
    except OverflowError:
        return beyond
    except Exception:  # conversions of other libraries' numbers may raise what they like
        return f" ({type(number).__name__}), not a number,"
    if size <= LARGEST:
        return None
    return beyond if math.isfinite(size) else ""


def shown(value: Any) -> str:
    """A value in an error."""
    try:
        return repr(value)[:200]
    except Exception:  # Python writes out no integer of thousands of digits
        return "something that cannot be written out"
