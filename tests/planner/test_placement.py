"""Which parts leave the GPU: the fewest bytes of a step, none where all fit."""

from itertools import combinations

import pytest

from fastppo.distributed import Placement, uses
from fastppo.distributed.residency import FROZEN, REMADE
from fastppo.planner.placement import CHOICES, beside_computing, choose_placement, described

PHASES = ("sampling", "feedback", "experience", "learning")
LEAST = Placement(uses(loss_reads_reference=False))
PARTS = {
    ("optimizers", "actor"): 12,
    ("optimizers", "critic"): 5,
    ("gradients", "actor"): 4,
    ("sampling_weights", "actor"): 8,
    ("reference", "reference"): 3,
    ("rewards", "reward 1"): 7,
    ("rewards", "judge 1"): 2,
}
PASSING = {"sampling": 10, "feedback": 3, "experience": 4, "learning": 9}  # that comes on top of parts in use


def taken(parts=PARTS):
    return {p: PASSING[p] + sum(size for name, size in parts.items() if LEAST.holds(p, name)) for p in PHASES}


def filled(placement, parts=PARTS):
    return {p: PASSING[p] + sum(size for name, size in parts.items() if placement.holds(p, name)) for p in PHASES}


def copied(moved, parts=PARTS):
    return sum(parts[name] * (name[0] not in REMADE) * (1 if name[0] in FROZEN else 2) for name in moved)


def test_nothing_leaves_where_all_fits():
    room = sum(PARTS.values()) + max(PASSING.values())
    assert choose_placement(PARTS, LEAST, taken(), room, 0).moved == frozenset()
    tight = choose_placement(PARTS, LEAST, taken(), room - 1, 0)
    assert tight.moved == {("gradients", "actor")}  # which is freed, and not copied; the other that is, is larger


@pytest.mark.parametrize("room", range(28, 52))
def test_no_other_parts_that_could_go_are_fewer_bytes(room):
    found = choose_placement(PARTS, LEAST, taken(), room, 0)
    if max(taken().values()) > room:
        assert found.moved is None or max(filled(found).values()) <= max(taken().values())
        return
    assert max(filled(found).values()) <= room
    for count in range(len(PARTS) + 1):
        for moved in map(frozenset, combinations(PARTS, count)):
            if max(filled(Placement(LEAST.uses, moved)).values()) <= room:
                assert (copied(moved), sum(PARTS[n] for n in moved)) >= (
                    copied(found.moved),
                    sum(PARTS[n] for n in found.moved),
                )


def test_a_phase_that_is_fuller_than_it_should_be_takes_no_part_more_and_the_others_do():
    """Learning needs more than choices are to fill, and what it uses itself may stay."""
    found = choose_placement(PARTS, LEAST, taken() | {"learning": 1000}, 200, 0)
    assert found.moved == frozenset(PARTS) - {name for name in PARTS if name[0] in ("optimizers", "gradients")}


def test_what_the_host_has_no_room_for_stays():
    room = max(taken().values())
    assert choose_placement(PARTS, LEAST, taken(), room, -100).moved
    everything = sum(size for name, size in PARTS.items() if name[0] not in REMADE)
    assert choose_placement(PARTS, LEAST, taken(), 1000, everything).moved == frozenset()
    assert choose_placement(PARTS, LEAST, taken(), room, everything).moved is None  # neither has room


def test_of_many_parts_those_of_a_kind_go_together():
    parts = PARTS | {("rewards", f"judge {i}"): i for i in range(2, 9)}
    assert len(parts) > CHOICES
    used = taken(parts)
    for room in range(max(used.values()), 80, 7):
        moved = choose_placement(parts, LEAST, used, room, 0).moved
        kinds = {kind for kind, _ in moved}
        assert moved == {name for name in parts if name[0] in kinds}


def test_what_moves_is_copied_while_another_phase_computes_as_far_as_there_is_room():
    moved = Placement(LEAST.uses, frozenset(PARTS))
    room = max(taken().values()) + 2
    found = beside_computing(PARTS, moved, LEAST, taken(), room, PHASES)
    assert max(filled(found).values()) <= room
    assert found.beside["feedback"] == {("reference", "reference")}
    assert found.beside["experience"] == {("optimizers", "actor"), ("optimizers", "critic")}
    # Sampling leaves 14 of 32: those to come are first, and of the optimizers, to be copied to the host, one has room.
    assert found.beside["sampling"] == {("rewards", "reward 1"), ("rewards", "judge 1"), ("optimizers", "critic")}
    assert "learning" not in found.beside  # nothing that is copied is used in sampling
    full = beside_computing(PARTS, moved, LEAST, taken(), max(taken().values()), PHASES)
    assert max(filled(full).values()) <= max(taken().values())


def test_the_choice_is_said_in_one_line():
    moved = frozenset({("optimizers", "actor"), ("rewards", "reward 1"), ("gradients", "actor")})
    placement = Placement(LEAST.uses, moved, {"experience": frozenset({("optimizers", "actor")})})
    parts = {name: size * 10**9 for name, size in PARTS.items()}
    assert described(parts, placement) == (
        "moved between GPU and host: optimizer of actor 12.0 GB, reward 1 7.00 GB; 31.0 GB are copied in a step, beside"
        " computing: optimizer of actor during experience; freed and made again: gradients of actor 4.00 GB"
    )
