"""What a source of reward sees, and what it must answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastppo.batch import Packed
from fastppo.errors import FastPPOError


class RewardError(FastPPOError):
    """A source of reward that is missing, fails or answers with something that is not one finite number a response."""


@dataclass(frozen=True)
class Responses:
    """B responses as text, and for reward models with the actor's tokenizer the tokens themselves."""

    prompts: list[str]
    texts: list[str]
    columns: dict[str, list[Any]]  # every other column of the data, one value a response
    packed: Packed


Source = Callable[[Responses], Sequence[float]]


def checked(name: str, answer: Any, texts: Sequence[str], first: int = 0) -> list[float]:
    """One finite number for each response, or a RewardError that shows the first that is not.

    name: the source by its setting, as in `rewards.function = file.py:function`; first: the number of the first of
    these responses among all that are scored.
    """
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    try:
        numbers = list(answer)
    except TypeError:
        raise RewardError(f"{name} returned {type(answer).__name__}, not one number for each response") from None
    if len(numbers) != len(texts):
        raise RewardError(f"{name} returned {len(numbers)} numbers for {len(texts)} responses")
    for i, (number, text) in enumerate(zip(numbers, texts, strict=True), start=first):
        try:
            finite = math.isfinite(number)
        except TypeError:
            raise RewardError(
                f"{name} returned {number!r} ({type(number).__name__}), not a number, for response {i}: {text[:200]!r}"
            ) from None
        if not finite:
            raise RewardError(f"{name} returned {number} for response {i}: {text[:200]!r}")
    return [float(n) for n in numbers]
