"""Predict the memory of a run without loading weights: `python -m fastppo.plan --config PRESET|FILE [--gpus 8 ...]`.

Models are built on the meta device from their configs. The table shows how much memory each role uses in each phase, on
each GPU, in the host's memory and on NVMe, and whether this fits; if not, the smallest change that makes it fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastppo.config import COMMANDS, PPO, AnyConfig, parse
from fastppo.errors import FastPPOError
from fastppo.planner import (
    Machine,
    PlanError,
    advice,
    make_plan,
    parse_bytes,
    parse_count,
    show,
    table_console,
    this_machine,
)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = argparse.ArgumentParser(prog="python -m fastppo.plan", add_help=False, allow_abbrev=False)
    options.add_argument("--gpus", type=parse_count, help="GPUs per node, or ranks per node on CPUs")
    options.add_argument("--gpu-memory", type=parse_bytes, metavar="80GB", help="memory per GPU")
    options.add_argument("--host-memory", type=parse_bytes, metavar="1TB", help="host memory per node")
    options.add_argument("--nvme", type=parse_bytes, metavar="4TB", help="free space on NVMe per node")
    options.add_argument("--nodes", type=parse_count, default=1, help="number of nodes")
    scripts = {Path(command.script).stem: command for command in COMMANDS.values()}
    options.add_argument(
        "--command",
        type=lambda name: scripts[name].name if name in scripts else name,
        choices=COMMANDS,
        default=PPO.name,
        help="the command to plan for, by its name or the name of its script (train is PPO)",
    )
    given, settings = options.parse_known_args(argv)
    if {"-h", "--help"} & set(settings):
        print(f"{options.format_help()}\nValues that are not given are those of this machine. Settings of a run:\n")
    cpu = given.gpu_memory is None and not torch.cuda.is_available()
    if given.gpu_memory is None or given.host_memory is None or (given.gpus is None and not cpu):
        here = this_machine(given.gpus, given.nodes, cpu=not torch.cuda.is_available())
    else:
        here = Machine(given.gpus or 1, given.nodes, given.gpu_memory, given.host_memory)
    machine = replace(
        here,
        gpu=here.gpu if given.gpu_memory is None else given.gpu_memory,
        host=given.host_memory or here.host,
        nvme=given.nvme,
    )
    config: AnyConfig = parse(settings, COMMANDS[given.command], ranks=machine.ranks, gpu=machine.gpu is not None)
    console = table_console()
    try:
        plan = make_plan(config, machine)
        show(plan, console)
        if not plan.fits:
            raise PlanError(advice(plan))
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
