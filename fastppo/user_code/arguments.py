"""The arguments that a function of the user takes: those of the available ones that it has as parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Signature(NamedTuple):
    """The parameters of a function that can be given by name."""

    names: tuple[str, ...]
    required: tuple[str, ...]  # those without a default
    takes_all: bool  # it has **kwargs, or its parameters are not known

    def select(self, available: Mapping[str, T]) -> dict[str, T]:
        """Those of the available arguments that the function takes."""
        return {name: value for name, value in available.items() if self.takes_all or name in self.names}


def signature_of(function: Callable[..., Any]) -> Signature:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return Signature((), (), True)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = tuple(p.name for p in named if p.default is p.empty)
    return Signature(tuple(p.name for p in named), required, any(p.kind is p.VAR_KEYWORD for p in parameters))
