"""The allowed values of single settings."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from fastppo.config.learning import OptimConfig
from fastppo.errors import ConfigError

# The allowed range in words, its test, and the settings that it applies to. A setting that is null is not checked.
# NaN fails every comparison and therefore every test.
Ranges = tuple[tuple[str, Callable[[float], bool], str], ...]


def check_ranges(config: Any, ranges: Ranges) -> None:
    for meaning, holds, names in ranges:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} is {value}; it must be {meaning}.")


def check_betas(optim: OptimConfig) -> None:
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas is {list(optim.betas)}; each must be at least 0 and less than 1.")


def check_train(name: str, train: int | str) -> None:
    if train == "" or (isinstance(train, int) and train < 1):
        raise ConfigError(f"{name} is {train!r}; give all, a number of upper layers (1 or more) or name patterns.")
