"""Ranks in groups of neighbours, for `forks.Forks`: `[OUT, SIZE]`; each rank writes what it found to OUT-RANK.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastppo.distributed import neighbours_of
from fastppo.distributed.world import start_world, stop_world


def main(argv: Sequence[str]) -> None:
    out, size = argv
    world = start_world(1)
    group = neighbours_of(world, int(size), timeout=60.0)
    found = {"index": group.index, "gathered": group.gather(world.rank), "any of rank 3": group.any(world.rank == 3)}
    Path(f"{out}-{world.rank}.json").write_text(json.dumps(found))
    stop_world()
