"""Predict a run without loading weights: `python -m fastppo.plan --config PRESET|FILE [--gpus 8 ...] [--time ...]`.

Models are built on the meta device from their configs. The table shows how much memory each role uses in each phase, on
each GPU, in the host's memory and on NVMe, and whether this fits; if not, the smallest change that makes it fit. With
`--time` a second table models the seconds of a step from constants of a machine, which `--measure` measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastppo.config import COMMANDS, PPO, AnyConfig, parse
from fastppo.distributed import start_world, stop_world
from fastppo.errors import FastPPOError
from fastppo.planner import (
    Machine,
    PlanError,
    add_options,
    advice,
    check_options,
    machine_of,
    make_plan,
    measure_machine,
    parse_bytes,
    parse_count,
    show,
    show_time,
    table_console,
    this_machine,
    timing_of,
)


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m fastppo.plan", add_help=False, allow_abbrev=False)
    options.add_argument("--gpus", type=parse_count, help="GPUs per node, or ranks per node on CPUs")
    options.add_argument("--gpu-memory", type=parse_bytes, metavar="80GB", help="memory per GPU")
    options.add_argument("--host-memory", type=parse_bytes, metavar="1TB", help="host memory per node")
    options.add_argument("--nvme", type=parse_bytes, metavar="4TB", help="free space on NVMe per node")
    options.add_argument("--nodes", type=parse_count, default=1, help="number of nodes")
    options.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    scripts = {Path(command.script).stem: command for command in COMMANDS.values()}
    options.add_argument(
        "--command",
        type=lambda name: scripts[name].name if name in scripts else name,
        choices=COMMANDS,
        default=PPO.name,
        help="the command to plan for, by its name or the name of its script (train is PPO)",
    )
    add_options(options)
    given, settings = options.parse_known_args(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(settings):
        print(f"{options.format_help()}\nValues that are not given are those of this machine. Settings of a run:\n")
    try:
        check_options(given)
        if given.measure is not None:
            _measure(given, settings)
        else:
            _plan(given, settings)
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _plan(given: argparse.Namespace, settings: Sequence[str]) -> None:
    """Show the plan, and with `--time` the seconds of a step. Raises PlanError where the run does not fit."""
    machine = machine_of(given) or _machine(given)
    config: AnyConfig = parse(list(settings), COMMANDS[given.command], ranks=machine.ranks, gpu=machine.gpu is not None)
    timing, console = timing_of(given, config, machine), table_console()
    plan = make_plan(config, machine)
    show(plan, console)
    if not plan.fits:
        raise PlanError(advice(plan))
    if timing is not None:
        console.print()
        show_time(plan, *timing, console)


def _measure(given: argparse.Namespace, settings: Sequence[str]) -> None:
    """Measure this machine on all ranks that were started; with settings of a run the kernels of it, too."""
    config: AnyConfig | None = parse(list(settings), COMMANDS[given.command]) if settings else None
    world = start_world(None if config is None else config.threads)
    given.gpus = given.gpus or world.ranks // given.nodes
    measure_machine(given, config, _machine(given), world, table_console())
    stop_world()


def _machine(given: argparse.Namespace) -> Machine:
    """What is given, and else this machine."""
    cpu = given.gpu_memory is None and not torch.cuda.is_available()
    if given.gpu_memory is None or given.host_memory is None or (given.gpus is None and not cpu):
        here = this_machine(given.gpus, given.nodes, cpu=not torch.cuda.is_available())
    else:
        here = Machine(given.gpus or 1, given.nodes, given.gpu_memory, given.host_memory)
    return replace(
        here,
        gpu=here.gpu if given.gpu_memory is None else given.gpu_memory,
        host=given.host_memory or here.host,
        nvme=given.nvme,
    )


if __name__ == "__main__":
    main()
