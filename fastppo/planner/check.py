"""Before a run loads anything: show what its memory needs, and refuse a run that does not fit."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from rich.console import Console
from rich.table import Table

from fastppo.config import AnyConfig
from fastppo.distributed import Placement, World, all_gather
from fastppo.errors import FastPPOError
from fastppo.planner.changes import advice, flags, lower_stage
from fastppo.planner.machine import in_gb, least_machine, this_machine
from fastppo.planner.plan import Plan, make_plan, rows_are_open, with_recomputed

log = logging.getLogger("fastppo")

C = TypeVar("C", bound=AnyConfig)


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
    for line in plan.choices:
        console.print(line, highlight=False, soft_wrap=True)
    phase, _ = plan.peak
    for line in [] if plan.vllm is None else plan.vllm.lines():
        console.print(line, highlight=False, soft_wrap=True)
    for name, (needed, there) in plan.needs.items():
        verdict = "fits" if needed <= there else "does not fit"
        console.print(f"{name}: {in_gb(needed)} of {in_gb(there)} GB, {verdict}", highlight=False)
    console.print(f"highest in {phase}", highlight=False)
    if (change := lower_stage(plan)) is not None:
        line = f"{flags(change)} fits as well: weights are then whole on each GPU, and not gathered in each pass"
        console.print(line, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Planned(Generic[C]):
    """What a run takes from its plan."""

    config: C  # the settings, where something is `auto` with what the plan has chosen
    placement: Placement | None  # of its parts; None: there is no plan, or nothing that may be moved


def check_plan(config: C, world: World) -> Planned[C]:
    """Show the plan of a run that begins here; raises PlanError where it does not fit and `plan` is check.

    The choices are the same on all ranks, which all call this: they are made for the least memory that a rank has. A
    resumed run chooses again, as no result depends on them.
    """
    if config.plan == "off" and config.trained and config.optim.activation_checkpointing == "auto":
        config = with_recomputed(config, 0)
    if config.plan == "off" and not rows_are_open(config):
        return Planned(config, None)
    nodes = max(world.ranks // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1), 1)
    machines = all_gather(this_machine(world.ranks // nodes, nodes, cpu=world.device.type == "cpu"), world)
    plan = make_plan(config, least_machine(machines))
    planned = cast(C, plan.config)
    if config.plan == "off":
        log.info(plan.choices[0])
        return Planned(planned, None)
    console = table_console()
    if world.rank == 0:
        show(plan, console)
    if plan.fits:
        return Planned(planned, plan.placement)
    if config.plan == "check":
        raise PlanError(f"{advice(plan)} To try it all the same: --plan warn")
    if world.rank == 0:
        console.print(advice(plan))
    return Planned(planned, plan.placement)
