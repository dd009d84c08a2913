"""An exponential moving average of the actor's weights (Polyak and Juditsky, 1992), stored on the host.

It averages out noisy updates, and so often generalises better than the last weights. It is evaluated and exported
beside the actor, and learning does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.distributed import World
from fastppo.models.roles import Policy

# isort: split
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class Average:
    """After each update, average = decay * average + (1 - decay) * weights, in fp32, over the trainable weights.

    At ZeRO stage 3 each rank averages its own partition of each weight. The average saves and loads as an engine does.
    """

    def __init__(self, actor: Policy, decay: float, world: World):
        """actor: with its initial weights, in its engine."""
        self._decay, self._file = decay, f"rank-{world.rank:05d}.pt"
        self._weights = {name: p for name, p in actor.model.named_parameters() if p.requires_grad}
        self.version = 0  # increases with each change of the actor's weights, which only `in_place` makes
        self._average = {name: _rank_part(p).float().cpu().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        for name, p in self._weights.items():
            self._average[name].lerp_(_rank_part(p).float().cpu(), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the actor has the averaged weights; afterwards its trained weights, bit for bit."""
        trained_weights = {name: _rank_part(p).cpu().clone() for name, p in self._weights.items()}
        self._set_weights(self._average)
        try:
            yield
        finally:
            self._set_weights(trained_weights)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """Write this rank's part to a file below `folder`/`name`; see `Engine.save`."""
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(self._average, folder / name / self._file)

    def load(self, folder: Path, name: str) -> None:
        """Read the files that `save` wrote on the same number of ranks."""
        saved_average = torch.load(folder / name / self._file, weights_only=True)
        for key, value in self._average.items():
            value.copy_(saved_average[key])

    @torch.no_grad()
    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        self.version += 1
        for name, p in self._weights.items():
            _rank_part(p).copy_(weights[name])
        # DeepSpeed partitions small weights too but keeps a whole copy beside the partitions: gather these again.
        persistent: Any = [p for p in self._weights.values() if _is_gathered(p)]
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _rank_part(p: Tensor) -> Tensor:
    """The weight, or at ZeRO stage 3 this rank's partition of it."""
    part: Tensor = getattr(p, "ds_tensor", p)
    return part.detach()


def _is_gathered(p: Any) -> bool:
    return bool(getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE)
