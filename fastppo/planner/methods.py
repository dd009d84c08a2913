"""What the plan knows of each kind of run: its roles, what these hold, and what needs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastppo.config import AnyConfig, GenerateConfig, OfflineConfig, OnlineConfig
from fastppo.planner import generation_memory, offline_memory, online_memory
from fastppo.planner.memory import Change, Role, Share
from fastppo.planner.meta_models import generation_roles, offline_roles, online_roles


class Method(NamedTuple):
    """Each function takes the settings of its own kind."""

    roles: Callable[..., list[Role]]  # (config, *, cpu), on the meta device
    shares: Callable[[list[Role], Any, int], list[Share]]  # (roles, config, ranks): bytes by role and phase
    smaller_passes: Callable[[Any], Iterator[Change]]
    asks_frozen_roles: Callable[[Any], bool]  # whether there are models that only answer
    drawn: Callable[[Any, int], int]  # (config, ranks): the most responses that a rank draws at once


METHODS = {
    OnlineConfig: Method(
        online_roles,
        online_memory.shares,
        online_memory.smaller_passes,
        asks_frozen_roles=lambda config: True,
        drawn=online_memory.drawn,
    ),
    OfflineConfig: Method(
        offline_roles,
        offline_memory.shares,
        offline_memory.smaller_passes,
        asks_frozen_roles=lambda config: config.frozen_model is not None,
        drawn=lambda config, ranks: 0,
    ),
    GenerateConfig: Method(
        generation_roles,
        generation_memory.shares,
        generation_memory.smaller_passes,
        asks_frozen_roles=lambda config: True,
        drawn=generation_memory.drawn,
    ),
}


def method_of(config: AnyConfig) -> Method:
    """That of the settings' class, or of the class that it is derived from."""
    return next(METHODS[kind] for kind in type(config).__mro__ if kind in METHODS)


def measured_roles(config: AnyConfig, *, cpu: bool) -> list[Role]:
    """The roles of a run. cpu: whether it is on the CPU. Raises ModelError where a model's config cannot be read."""
    return method_of(config).roles(config, cpu=cpu)
