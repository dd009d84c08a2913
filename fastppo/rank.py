"""The main function of one rank, for every command that trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from fastppo.config import AnyConfig, Command, parse
from fastppo.distributed import Stopped, World, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.monitor import setup_logging

C = TypeVar("C", bound=AnyConfig)
R = TypeVar("R")


def run_rank(command: Command[C], train: Callable[[C, World], R], argv: list[str] | None = None) -> R | None:
    """Parse the arguments (default: `sys.argv[1:]`), start the world and train.

    Returns the result of `train`, or None if the run was stopped by a signal. Exits with status 2 for invalid settings
    and with 1 for other errors, each with one message.
    """
    config = parse(argv, command)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    result = None
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        result = train(config, world)
    stop_world()
    return result
