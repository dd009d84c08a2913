"""The main function of one rank, for every command that trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from fastppo.config import AnyConfig, Command, parse
from fastppo.distributed import Stopped, World, leave, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.monitor import setup_logging

C = TypeVar("C", bound=AnyConfig)


def run_rank(
    command: Command[C], train: Callable[[C, World], object], argv: list[str] | None = None, *, unfinished: int = 0
) -> None:
    """Parse the arguments (default: `sys.argv[1:]`), start the world and train.

    Exits with status 2 for invalid settings and with 1 for other errors, each with one message; with `unfinished` if
    `train` returns False. A run that was stopped by a signal has ended well.
    """
    config = parse(argv, command)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    result = None
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        result = train(config, world)
    stop_world()
    leave(unfinished if result is False else 0)
