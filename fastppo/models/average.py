"""An exponential moving average of the actor's weights (Polyak and Juditsky, 1992), kept on the host.

It forgets what a few noisy updates did, and so often generalises better than the last weights. It is evaluated and
exported beside the actor, and takes no part in learning.
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
    """After each update, average = decay * average + (1 - decay) * weights, in fp32, of the weights that train.

    At ZeRO stage 3 a rank has the average of its own part of each weight. It saves and loads as an engine does.
    """

    def __init__(self, actor: Policy, decay: float, world: World):
        """actor: as it begins, in its engine."""
        self._decay, self._file = decay, f"rank-{world.rank:05d}.pt"
        self._weights = {name: p for name, p in actor.model.named_parameters() if p.requires_grad}
        self.version = 0  # grows with each change of the actor's weights, which only `in_place` makes
        self._average = {name: _own(p).float().cpu().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """With the weights of now."""
        for name, p in self._weights.items():
            self._average[name].lerp_(_own(p).float().cpu(), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the actor has the averaged weights; then its own again, bit for bit."""
        own = {name: _own(p).cpu().clone() for name, p in self._weights.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """This rank's part, as a file below `folder`/`name`; see `Engine.save`."""
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(self._average, folder / name / self._file)

    def load(self, folder: Path, name: str) -> None:
        """What `save` wrote on as many ranks."""
        found = torch.load(folder / name / self._file, weights_only=True)
        for key, value in self._average.items():
            value.copy_(found[key])

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        self.version += 1
        for name, p in self._weights.items():
            _own(p).copy_(weights[name])
        # Small weights are split too, and DeepSpeed keeps them whole beside that: they are gathered anew.
        whole: Any = [p for p in self._weights.values() if _is_whole_beside(p)]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def _own(p: Tensor) -> Tensor:
    """The weight, or this rank's part of it."""
    part: Tensor = getattr(p, "ds_tensor", p)
    return part.detach()


def _is_whole_beside(p: Any) -> bool:
    return bool(getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE)
