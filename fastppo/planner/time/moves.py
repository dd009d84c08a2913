"""Seconds of the moves of a run's parts between GPU and host, as the plan has placed them."""

from __future__ import annotations

from fastppo.distributed import FROZEN, Placement
from fastppo.planner.constants.values import Constants
from fastppo.planner.plan import Plan


def moves(plan: Plan, constants: Constants) -> dict[str, float]:
    """By phase, seconds at its beginning, one step after another; copies beside computing take none."""
    if plan.placement is None or plan.machine.gpu is None:
        return {}
    moved = moved_bytes(plan, plan.placement)
    return {phase: amount / constants["pcie"] for phase, amount in moved.items() if amount}


def moved_bytes(plan: Plan, placement: Placement, *, back: bool = False) -> dict[str, int]:
    """Bytes that are copied while a phase waits for them. back: frozen weights are copied to the host, too, each time
    that they leave."""
    phases = [phase for phase in ("sampling", "feedback", "experience", "learning") if phase in placement.uses]
    moved = dict.fromkeys(phases, 0)
    for part, size in plan.parts.items():
        for before, phase in zip((phases[-1], *phases[:-1]), phases, strict=True):
            comes = placement.holds(phase, part) and not placement.holds(before, part)
            goes = placement.holds(before, part) and not placement.holds(phase, part)
            if (placement.uses_in(phase, part) and comes) or (placement.uses_in(before, part) and goes):
                copied = placement.copied(part) and (comes or back or part[0] not in FROZEN)
                moved[phase] += size if copied else 0
    return moved
