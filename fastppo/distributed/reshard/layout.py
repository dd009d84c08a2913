"""How the states of a trained role are split: over how many ranks, at which ZeRO stage, where, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from fastppo.errors import FastPPOError

Shapes = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]  # of each flat tensor: names and shapes, in its order


class LayoutError(FastPPOError):
    """A checkpoint cannot be read in another layout than its own. The message says why, and the way out."""


@dataclass(frozen=True)
class Layout:
    """Two engines of the same layout can read each other's files rank by rank."""

    ranks: int  # over which states are split; 1 at stage 0, where each rank has all of them
    stage: int  # of ZeRO
    optimizer: str  # where the optimizer states are: none (on the device), cpu or nvme
    parameters: str  # where the parameters are, likewise
    shapes: Shapes | None  # None at stage 0

    def __str__(self) -> str:
        offload = "".join(
            f", {what} on {place}"
            for what, place in (("optimizer", self.optimizer), ("parameters", self.parameters))
            if place != "none"
        )
        ranks = "" if self.stage == 0 else f" over {self.ranks} rank(s)"
        return f"stage {self.stage}{ranks}{offload}"


def layout_of(engine: Any) -> Layout:
    """Of a DeepSpeed engine."""
    shapes = engine._get_zero_param_shapes() if engine.zero_optimization() else None
    ranks = dist.get_world_size(engine.optimizer.dp_process_group) if engine.zero_optimization() else 1
    return make_layout(ranks, engine.config, shapes)


def make_layout(ranks: int, config: Mapping[str, Any], shapes: Any) -> Layout:
    """config: DeepSpeed's configuration of the engine; shapes: of each flat tensor, name -> shape; None at stage 0."""
    zero = config["zero_optimization"]
    places = [(zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")]
    ordered = None
    if shapes is not None:
        ordered = tuple(tuple((name, tuple(shape)) for name, shape in group.items()) for group in shapes)
    return Layout(ranks if zero["stage"] else 1, zero["stage"], str(places[0]), str(places[1]), ordered)
