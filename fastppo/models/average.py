"""An exponential moving average of the actor's weights (Polyak and Juditsky, 1992), stored on the host.

It averages out noisy updates, and so often generalises better than the last weights. It is evaluated and exported
beside the actor, and learning does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.distributed import World, copy_share
from fastppo.models.roles import Policy

# isort: split
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class Average:
    """After each update, average = decay * average + (1 - decay) * weights, in fp32, over the trainable weights.

    At ZeRO stage 3 each rank averages its own partition of each weight. The average saves and loads as an engine does.

    From a GPU the weights are copied to pinned memory on a stream of its own, and a thread averages them there: neither
    the GPU nor the host waits. `before_step` orders the copy before the next change of the weights.
    """

    def __init__(self, actor: Policy, decay: float, world: World, *, staged: bool | None = None):
        """actor: with its initial weights, in its engine. staged: whether weights are copied and then averaged by a
        thread; None: on a GPU."""
        self._decay, self._file = decay, f"rank-{world.rank:05d}.pt"
        self._weights = {name: p for name, p in actor.model.named_parameters() if p.requires_grad}
        self.version = 0  # increases with each change of the actor's weights, which only `in_place` makes
        self._average = {name: _rank_part(p).float().to("cpu", copy=True) for name, p in self._weights.items()}
        self._on_gpu = world.device.type == "cuda"
        self._stream = torch.cuda.Stream(world.device) if self._on_gpu else None
        self._copied: torch.cuda.Event | None = None  # recorded behind the copies of the last update
        self._thread = ThreadPoolExecutor(1, "fastppo-average") if staged or (staged is None and self._on_gpu) else None
        self._averaging: Future[None] | None = None  # the last update, in the thread
        self._staged = {  # weights on their way into the average
            name: torch.empty_like(part, device="cpu", pin_memory=self._on_gpu)
            for name, part in ((name, _rank_part(p)) for name, p in self._weights.items() if self._thread is not None)
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        if self._thread is None:
            self._add({name: _rank_part(p) for name, p in self._weights.items()})
            return
        self._settle()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, p in self._weights.items():
                self._staged[name].copy_(_rank_part(p), non_blocking=True)
            self._copied = None if self._stream is None else self._stream.record_event()
        self._averaging = self._thread.submit(self._add, self._staged, self._copied)

    def before_step(self) -> None:
        """The weights are about to change: on a GPU not before the last update has copied them. The host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    @torch.no_grad()
    def _add(self, weights: dict[str, Tensor], copied: torch.cuda.Event | None = None) -> None:
        if copied is not None:
            copied.synchronize()
        for name, value in weights.items():
            self._average[name].lerp_(value.float().cpu(), 1 - self._decay)

    def _settle(self) -> None:
        """Wait for the thread; what it raised is raised here."""
        if self._averaging is not None:
            self._averaging.result()
        self._averaging = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the actor has the averaged weights; afterwards its trained weights, bit for bit."""
        self._settle()
        trained_weights = {name: _rank_part(p).to("cpu", copy=True) for name, p in self._weights.items()}
        self._set_weights(self._average)
        try:
            yield
        finally:
            self._set_weights(trained_weights)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """Write this rank's part to a file below `folder`/`name`; see `Engine.save`."""
        self._settle()
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(self._average, folder / name / self._file)

    def load(self, folder: Path, name: str) -> None:
        """Read the files that `save` wrote, on any number of ranks and at any ZeRO stage. All ranks call it."""
        self._settle()
        files = sorted((folder / name).glob("rank-*.pt"))
        saved = [torch.load(path, weights_only=True, map_location="cpu", mmap=True) for path in files]
        for key, value in self._average.items():
            copy_share(self._weights[key], [parts[key] for parts in saved], value)

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
