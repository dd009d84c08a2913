"""The seconds of a step as a table, below the constants that they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from fastppo.planner.constants.values import NAMES, Constants
from fastppo.planner.time.phases import PARTS, Lengths, Step
from fastppo.planner.time.work import Work

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def show_constants(constants: Constants, work: Work | None, console: Console) -> None:
    """work: the kernels of the plan, of which some may have been measured one by one."""
    print_line(console, f"constants of {constants.name}:")
    said = dict.fromkeys(constant.source for constant in constants.values.values())
    sources = {source: number for number, source in enumerate(said, start=1)}
    table = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "right", "left", "left", "right"):
        table.add_column(justify=justify)
    for name, constant in constants.values.items():
        unit, meaning = NAMES[name]
        reached = "" if constant.efficiency == 1 else f"x efficiency {constant.efficiency:g} "
        table.add_row(name, in_unit(constant.value, unit), reached, meaning, f"({sources[constant.source]})")
    console.print(table, highlight=False)
    for source, number in sources.items():
        print_line(console, f"({number}) {source}")
    if work is not None and constants.kernels:
        print_line(console, _measured(constants, work))


def _measured(constants: Constants, work: Work) -> str:
    """How fast the plan's own kernels were measured to be."""
    known = {call: times for call, times in work.calls.items() if constants.kernels.get(call.name)}
    said = f"{len(known)} of {len(work.calls)} kernels of this plan were measured one by one"
    rates = sorted(call.flops / constants.kernels[call.name] for call in known if call.kind == "products")
    if rates:
        said += f"; products reach {in_unit(rates[0], 'FLOP/s')} to {in_unit(rates[-1], 'FLOP/s')}"
    return said


def show_step(step: Step, lengths: Lengths, peak: float, console: Console) -> None:
    """peak: FLOP/s of products in the run's dtype."""
    columns = [name for name in PARTS if step.parts[name]]
    table = Table(box=None, pad_edge=False, title_justify="left", title="modelled seconds of a step")
    table.add_column("phase")
    for name in ("seconds", *columns):
        table.add_column(name, justify="right")
    for phase in step.phases:
        table.add_row(phase.name, seconds_text(phase.seconds.total), *_cells(phase.seconds.parts, columns))
    table.add_row("step", seconds_text(step.seconds), *_cells(step.parts, columns))
    console.print(table, highlight=False)
    asked = f"prompts of {lengths.prompt} tokens and responses of {lengths.response}"
    print_line(console, f"{asked}; {step.tokens / step.seconds:,.0f} {step.unit} a second" if step.seconds else asked)
    if step.beside:
        print_line(
            console, f"{seconds_text(step.beside)} s of functions and services run beside computing (ppo.steps_ahead)"
        )
    name, share = step.slowest
    flops = step.work.flops()
    used = f"; a rank computes {in_unit(flops, 'FLOP')} in a step, {flops / step.seconds / peak:.0%} of what it could"
    print_line(
        console, f"slowest: {name}, {share:.0%} of the step{used if step.seconds and math.isfinite(peak) else ''}"
    )


def _cells(parts: Mapping[str, float], columns: list[str]) -> list[str]:
    return [seconds_text(parts[name]) if parts.get(name) else "" for name in columns]


def seconds_text(seconds: float) -> str:
    """Three digits."""
    if abs(seconds) >= 100:
        return f"{seconds:.0f}"
    return f"{seconds:.1f}" if abs(seconds) >= 10 else f"{seconds:.2f}" if abs(seconds) >= 0.1 else f"{seconds:.4f}"


def in_unit(value: float, unit: str) -> str:
    """3.35e12 B/s -> 3.35 TB/s; seconds below one as microseconds."""
    if unit == "s":
        return f"{value * 1e6:.3g} us"
    if not unit or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if value >= scale), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}"


def print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
