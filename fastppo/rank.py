"""The main function of one rank, for every command that trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from fastppo.config import AnyConfig, Command, Dtype, computes_bf16, parse
from fastppo.distributed import Stopped, World, leave, start_world, stop_world
from fastppo.errors import ConfigError, exit_with_message
from fastppo.monitor import setup_logging

log = logging.getLogger("fastppo")

C = TypeVar("C", bound=AnyConfig)


def run_rank(
    command: Command[C], train: Callable[[C, World], object], argv: list[str] | None = None, *, unfinished: int = 0
) -> None:
    """Parse the arguments (default: `sys.argv[1:]`), start the world and train.

    Exits with status 2 for invalid settings and with 1 for other errors, each with one message; with `unfinished` if
    `train` returns False. A run that was stopped by a signal has ended well.
    """
    config = parse(argv, command)
    world = start_world(config.threads, config.timeout, config.sequence_ranks)
    world = replace(world, fewer=lambda: _fewer_ranks(command, config, world.ranks))
    setup_logging(world.rank)
    _log_software_bf16(config.optim.dtype)
    result = None
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        result = train(config, world)
    stop_world()
    leave(unfinished if result is False else 0)


def _log_software_bf16(dtype: Dtype) -> None:
    """Say what a machine without instructions for products in bf16 does to a run."""
    if computes_bf16():
        return
    if dtype == "bf16":
        log.warning(
            "dtype is bf16, and this machine has no instructions for it: torch computes a product of matrices many"
            " times more slowly than in fp32. Set optim.dtype (of generate: dtype) to auto or fp32."
        )
    else:
        log.info("dtype fp32: this machine has no instructions for bf16, which `auto` would take else")


def _fewer_ranks(command: Command[C], config: C, ranks: int) -> int:
    """The most ranks below these with which the settings work together; 0 if there are none."""
    for fewer in range(ranks - 1, 0, -1):
        with suppress(ConfigError):
            command.check(config, fewer)
            return fewer
    return 0
