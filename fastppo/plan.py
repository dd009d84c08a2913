"""The memory of a run before anything is loaded: `python -m fastppo.plan --config PRESET|FILE [--gpus 8 ...]`.

Models are built on the meta device, from their configs alone. The table says what each role holds in each stage, on
each GPU, in the host's memory and on NVMe, whether that fits, and if not, the smallest change that would.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastppo.advice import advice, in_gb
from fastppo.cli import PPO, REWARD, SFT, Command, parse
from fastppo.config import AnyConfig
from fastppo.errors import FastPPOError
from fastppo.fit import Plan, make_plan
from fastppo.machine import Machine, parse_bytes, parse_count, this_machine
from fastppo.world import World


class PlanError(FastPPOError):
    """A run that does not fit. The message names the smallest change that would."""


def _console() -> Console:
    """As wide as the terminal, and where there is none as wide as the table: a log should not lose columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(plan: Plan, console: Console) -> None:
    """The table, and below it what is needed of each memory and what there is."""
    columns = ("weights", "gradients", "optimizer", "buffers", "activations", "cache", "workspace")
    cpu = plan.machine.gpu is None
    where = "rank" if cpu else "GPU"
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"memory in GB of each {where}")
    table.add_column("stage")
    table.add_column("role")
    rows: list[list[str]] = []
    for stage in dict.fromkeys(share.stage for share in plan.shares):
        for share in (s for s in plan.shares if s.stage == stage):
            places = share.places
            held = places.gpu + places.host if cpu else places.gpu
            outside = [] if cpu else [places.host.total, places.nvme.total]
            amounts = [*(getattr(held, name) for name in columns), held.total, *outside]
            rows.append([stage, share.role, *map(in_gb, amounts)])
    for name in (*columns, where, *([] if cpu else ["host", "NVMe"])):
        table.add_column(name, justify="right")
    for row, before in zip(rows, [None, *rows[:-1]], strict=True):
        table.add_row("" if before and before[0] == row[0] else row[0], *row[1:])
    console.print(table)
    stage, _ = plan.peak
    for name, (needed, there) in plan.needs.items():
        verdict = "fits" if needed <= there else "does not fit"
        console.print(f"{name}: {in_gb(needed)} of {in_gb(there)} GB, {verdict}", highlight=False)
    console.print(f"highest in {stage}", highlight=False)


def check_plan(config: AnyConfig, world: World) -> None:
    """Show the plan of a run that begins here; raises PlanError where it does not fit and `plan` is check."""
    if config.plan == "off":
        return
    nodes = max(world.ranks // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1), 1)
    plan = make_plan(config, this_machine(world.ranks // nodes, nodes, cpu=world.device.type == "cpu"))
    console = _console()
    if world.rank == 0:
        show(plan, console)
    if plan.fits:
        return
    if config.plan == "check":
        raise PlanError(f"{advice(plan)} To try it all the same: --plan warn")
    if world.rank == 0:
        console.print(advice(plan))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = argparse.ArgumentParser(prog="python -m fastppo.plan", add_help=False, allow_abbrev=False)
    options.add_argument("--gpus", type=parse_count, help="GPUs of each node; without a GPU, ranks on the CPU")
    options.add_argument("--gpu-memory", type=parse_bytes, metavar="80GB", help="memory of each GPU")
    options.add_argument("--host-memory", type=parse_bytes, metavar="1TB", help="memory of each node")
    options.add_argument("--nvme", type=parse_bytes, metavar="4TB", help="room on NVMe of each node")
    options.add_argument("--nodes", type=parse_count, default=1, help="how many nodes")
    commands: dict[str, Command[Any]] = {command.script.removesuffix(".py"): command for command in (PPO, REWARD, SFT)}
    options.add_argument("--command", choices=commands, default="train", help="whose settings are given; train is PPO")
    given, settings = options.parse_known_args(argv)
    if {"-h", "--help"} & set(settings):
        print(f"{options.format_help()}\nWhat is left out is taken from this machine. All settings of a run:\n")
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
    config: AnyConfig = parse(settings, commands[given.command], ranks=machine.ranks)
    console = _console()
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
