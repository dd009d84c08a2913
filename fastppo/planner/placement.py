"""Which parts of a run leave the GPU, and when: as few bytes as possible are copied in a step, none where all fit.

A function of settings and memory alone, so that it is known before anything loads and the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from fastppo.distributed import FROZEN, REMADE, PartName, Placement
from fastppo.planner.machine import in_gb

# Every choice among so many parts is looked at; among more, the parts of a kind go or stay together.
CHOICES = 10


def choose_placement(
    parts: Mapping[PartName, int],
    least: Placement,
    taken: Mapping[str, int],
    room: int,
    host_excess: int,
) -> Placement:
    """The placement with the fewest bytes that are copied in a step; of these the one that frees the fewest.

    parts: bytes of each part on a GPU; least: each part is on the GPU only while it is used; taken: bytes of the GPU by
    phase with that placement; room: bytes of a GPU that may be filled, where that placement does not fill more;
    host_excess: bytes that it needs of the host's memory for each rank beyond those that are there, negative if there
    are more. Where no placement fits, it is `least`.
    """
    groups = [[name] for name in parts]
    if len(groups) > CHOICES:
        groups = [[name for name in parts if name[0] == kind] for kind in dict.fromkeys(kind for kind, _ in parts)]
    best: tuple[int, int, frozenset[PartName]] | None = None
    for goes in product((False, True), repeat=len(groups)):
        moved = frozenset(name for group, gone in zip(groups, goes, strict=True) if gone for name in group)
        copied = sum(_copied(name, parts[name]) for name in moved)
        cost = copied, sum(parts[name] for name in moved)
        if best is not None and cost >= best[:2]:
            continue
        placement = replace(least, moved=moved)
        saved = sum(size for name, size in parts.items() if least.copied(name) and not placement.copied(name))
        if host_excess <= saved and min(_room(parts, placement, least, taken, room).values()) >= 0:
            best = *cost, moved
    return least if best is None else replace(least, moved=best[2])


def beside_computing(
    parts: Mapping[PartName, int],
    placement: Placement,
    least: Placement,
    taken: Mapping[str, int],
    room: int,
    cycle: Sequence[str],
) -> Placement:
    """The same, with what can be copied while a phase computes that does not use it, as far as there is room.

    A part is brought in during the phase before the one that uses it. One whose values change stays for the phase after
    that, while it is copied to the host. cycle: the phases of a step, in their order.
    """
    found: dict[str, frozenset[PartName]] = {}
    left = _room(parts, placement, least, taken, room)
    copied = sorted((name for name in parts if placement.copied(name)), key=lambda name: -parts[name])
    for i, phase in enumerate(cycle):
        before, after = cycle[i - 1], cycle[(i + 1) % len(cycle)]
        comes = [name for name in copied if placement.uses_in(after, name)]
        goes = [name for name in copied if name[0] not in FROZEN and placement.uses_in(before, name)]
        for name in dict.fromkeys((*comes, *goes)):
            if not placement.holds(phase, name) and parts[name] <= left[phase]:
                left[phase] -= parts[name]
                found[phase] = found.get(phase, frozenset()) | {name}
    return replace(placement, beside=found)


def _copied(name: PartName, size: int) -> int:
    """Bytes a step: frozen values are copied to the GPU only, others back as well, and some are not copied at all."""
    return 0 if name[0] in REMADE else size if name[0] in FROZEN else 2 * size


def _room(
    parts: Mapping[PartName, int], placement: Placement, least: Placement, taken: Mapping[str, int], room: int
) -> dict[str, int]:
    """Bytes of the GPU that are left in each phase; negative if parts stay that have no room."""
    return {
        phase: max(room - used, 0)
        - sum(s for name, s in parts.items() if placement.holds(phase, name) and not least.holds(phase, name))
        for phase, used in taken.items()
    }


def described(parts: Mapping[PartName, int], placement: Placement) -> str:
    """One line for people."""
    moved = [name for name in parts if placement.moved is None or name in placement.moved]
    copied = [name for name in moved if name[0] not in REMADE]
    freed = [name for name in moved if name[0] in REMADE]
    said = []
    if copied:
        total, hidden = sum(_copied(name, parts[name]) for name in copied), []
        for phase, names in placement.beside.items():
            hidden += [f"{_named(name)} during {phase}" for name in sorted(names)]
        text = ", ".join(f"{_named(name)} {in_gb(parts[name])} GB" for name in copied)
        text = f"{text}; {in_gb(total)} GB are copied in a step"
        said.append(f"{text}, beside computing: {', '.join(hidden)}" if hidden else text)
    if freed:
        text = ", ".join(f"{_named(name)} {in_gb(parts[name])} GB" for name in freed)
        said.append(f"freed and made again: {text}")
    return f"moved between GPU and host: {'; '.join(said) or 'nothing, as all parts fit at once'}"


def _named(name: PartName) -> str:
    kind, role = name
    if kind in ("reference", "rewards", "sampled"):
        return role
    return {"sampling_weights": "weights to sample from", "optimizers": f"optimizer of {role}"}.get(
        kind, f"{kind} of {role}"
    )
