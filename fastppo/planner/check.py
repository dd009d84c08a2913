"""Before a run loads anything: show what its memory needs, and refuse a run that does not fit."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from fastppo.config import AnyConfig
from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.planner.changes import advice
from fastppo.planner.machine import in_gb, this_machine
from fastppo.planner.plan import Plan, make_plan, measured_roles, rows_are_open, with_rows

log = logging.getLogger("fastppo")

C = TypeVar("C", bound=AnyConfig)

CHOSEN = "sampling.rows: %d, chosen by the memory that there is"


class PlanError(FastPPOError):
    """A run that does not fit. The message names the smallest change that would."""


def table_console() -> Console:
    """As wide as the terminal, and where there is none as wide as the table: a log should not lose columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(plan: Plan, console: Console) -> None:
    """The table, and below it what is needed of each memory and what there is."""
    columns = ("weights", "gradients", "optimizer", "buffers", "activations", "cache", "workspace")
    cpu = plan.machine.gpu is None
    where = "rank" if cpu else "GPU"
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"memory in GB of each {where}")
    table.add_column("phase")
    table.add_column("role")
    rows: list[list[str]] = []
    for phase in dict.fromkeys(share.phase for share in plan.shares):
        for share in (s for s in plan.shares if s.phase == phase):
            places = share.places
            held = places.gpu + places.host if cpu else places.gpu
            outside = [] if cpu else [places.host.total, places.nvme.total]
            amounts = [*(getattr(held, name) for name in columns), held.total, *outside]
            rows.append([phase, share.role, *map(in_gb, amounts)])
    for name in (*columns, where, *([] if cpu else ["host", "NVMe"])):
        table.add_column(name, justify="right")
    for row, before in zip(rows, [None, *rows[:-1]], strict=True):
        table.add_row("" if before and before[0] == row[0] else row[0], *row[1:])
    console.print(table)
    if plan.rows is not None:
        console.print(CHOSEN % plan.rows, highlight=False)
    phase, _ = plan.peak
    for line in [] if plan.vllm is None else plan.vllm.lines():
        console.print(line, highlight=False, soft_wrap=True)
    for name, (needed, there) in plan.needs.items():
        verdict = "fits" if needed <= there else "does not fit"
        console.print(f"{name}: {in_gb(needed)} of {in_gb(there)} GB, {verdict}", highlight=False)
    console.print(f"highest in {phase}", highlight=False)


def check_plan(config: C, world: World) -> C:
    """Show the plan of a run that begins here; raises PlanError where it does not fit and `plan` is check.

    Returns the settings, with the number of rows where `sampling.rows` is auto: the same on all ranks, which all call
    this. A resumed run chooses again, as no response depends on it.
    """
    if config.plan == "off" and not rows_are_open(config):
        return config
    nodes = max(world.ranks // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1), 1)
    machine = this_machine(world.ranks // nodes, nodes, cpu=world.device.type == "cpu")
    roles = measured_roles(config, cpu=machine.gpu is None)
    plan = make_plan(config, machine, roles)
    if plan.rows is not None:  # other processes may hold more of another rank's memory
        rows = min(all_gather(plan.rows, world))
        config = with_rows(config, rows)
        plan = replace(make_plan(config, machine, roles), rows=rows)
        if config.plan == "off":
            log.info(CHOSEN, rows)
            return config
    console = table_console()
    if world.rank == 0:
        show(plan, console)
    if plan.fits:
        return config
    if config.plan == "check":
        raise PlanError(f"{advice(plan)} To try it all the same: --plan warn")
    if world.rank == 0:
        console.print(advice(plan))
    return config
