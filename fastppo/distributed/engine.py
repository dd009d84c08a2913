"""Models and optimizers: what DeepSpeed does for fastppo, and nothing else of it shows through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from fastppo.distributed.world import World, all_max, quiet

# isort: split
import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from fastppo.config import OptimConfig, ZeroConfig, deepspeed_config
from fastppo.distributed import gradients
from fastppo.errors import FastPPOError

T = TypeVar("T")


class Saved(Protocol):
    """What writes a part of a checkpoint and reads it again, on every rank; see `Engine.save`."""

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None: ...

    def load(self, folder: Path, name: str) -> None: ...


class EngineError(FastPPOError):
    """Something that DeepSpeed needs and this machine does not have."""


def check_nvme(zero: ZeroConfig) -> None:
    """Raises EngineError if something is to be kept on NVMe and this machine cannot. Better said before models load."""
    if "nvme" in (zero.optimizer_on, zero.parameters_on, zero.frozen_on) and not AsyncIOBuilder().is_compatible():
        raise EngineError(
            "zero.offload is nvme, but DeepSpeed's async_io cannot be compiled here: libaio is missing. Install it (apt"
            " install libaio-dev, or dnf install libaio-devel), or set zero.offload to cpu."
        )


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, written_by: int | None = None) -> Iterator[None]:
    """Within this context these parameters are whole; at stage 3 each rank has but a part of them otherwise.

    All ranks enter it together. Whoever reads a weight outside the forward pass of its own module needs it, and so does
    whoever writes one. written_by: the rank whose values are the parameters' afterwards; None: they were only read.
    Nothing happens to those that are not partitioned.
    """
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=written_by):
        yield


def even_passes(parts: Sequence[Tensor], zero: ZeroConfig, world: World) -> list[Tensor]:
    """Microbatches, each the indices of its sequences, and behind them empty ones where another rank has more.

    At stage 3 every forward pass is a collective, so ranks make the same number of them. All ranks call it.
    """
    if zero.stage < 3:
        return list(parts)
    most = int(all_max(torch.tensor(len(parts)), world))
    return [*parts, *[torch.empty(0, dtype=torch.int64)] * (most - len(parts))]


class Frozen:
    """A role that is only asked. At stage 3 its parameters are split among the ranks and fetched layer by layer."""

    def __init__(self, module: nn.Module, optim: OptimConfig, zero: ZeroConfig):
        self.module: Any = module
        self._run: Any = module
        self._own = getattr(module, "adapters", True)  # else it is the actor without them, and the actor's engine's
        if zero.stage == 3 and self._own:
            with quiet():
                self._run = deepspeed.initialize(
                    model=module, config=deepspeed_config.frozen(optim, zero), dist_init_required=False
                )[0]
            module.eval()

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def states(self) -> list[Tensor]:
        """What of it can leave the GPU between two uses: the parameters, or this rank's part of them."""
        return [getattr(p, "ds_tensor", p) for p in self.module.parameters()] if self._own else []


class Engine:
    """A trained role: DeepSpeed holds its parameters and optimizer; gradients accumulate until `step`."""

    def __init__(
        self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]], optim: OptimConfig, zero: ZeroConfig
    ):
        """groups: parameters that share a learning rate; empty groups and frozen parameters are left out."""
        trained = [[p for p in group if p.requires_grad] for group in groups]
        self._kept = [i for i, group in enumerate(trained) if group]
        self._adam: Any = _adam([trained[i] for i in self._kept], optim, offloaded=zero.optimizer_on != "none")
        self._parameters = [p for i in self._kept for p in trained[i]]
        self.version = 0  # grows with each change of the weights
        self._first = True  # whether the next backward pass is the first of an update
        with quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self._adam,
                config=deepspeed_config.trained(optim, zero),
                dist_init_required=False,
            )
        if zero.stage == 3:
            _clear_padding(module, self._optimizer)

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    @property
    def module(self) -> Any:
        return self._engine.module

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this microbatch's share of the loss; `last` of those before the next `step`.

        DeepSpeed averages gradients over ranks. The loss is a sum over this rank's tokens divided by the tokens of all
        ranks, so its normalizer carries the factor that turns the average into the sum (see `learn._accumulate`).
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._first:
            gradients.after_first(self._optimizer)
        self._first = last
        if last:
            gradients.after_last(self._optimizer)

    def gradient_norm(self) -> float:
        """The norm of the gradient that all ranks have accumulated, before clipping; not finite if a part of it is."""
        return gradients.norm(self._optimizer, self._parameters)

    def step(self, learning_rates: Sequence[float], *, apply: bool = True) -> None:
        """Clip, update, clear the gradients; without `apply` the weights and the optimizer stay as they were.

        So do those of a group whose rate is 0: Adam counts its steps, and after steps without a gradient the first with
        one would be too small, or too large.
        """
        for group, i in zip(self._optimizer.param_groups, self._kept, strict=True):
            group["lr"] = learning_rates[i] if apply else 0.0
        self.version += any(group["lr"] for group in self._optimizer.param_groups)
        gradients.before_step(self._optimizer)
        with _resting_at_rate_0(self._adam):
            self._engine.step()
        gradients.after_step(self._optimizer)

    def states(self) -> list[Tensor]:
        """What learning alone uses and goes on from: optimizer states and master weights."""
        states = [x for state in self._adam.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [*states, *gradients.masters(self._optimizer)]

    def buffers(self) -> list[Tensor]:
        """What learning alone uses and begins anew in each update: what gradients are added up in and pass through."""
        return gradients.buffers(self._optimizer)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """This rank's part of weights, master weights and optimizer, in files below `folder`/`name`; all ranks call it.

        Weights that do not train stay where they were loaded from: with LoRA they are nearly all there is.
        `write` gets each file's content and path. It must not raise: the other ranks would wait in a collective.
        """
        self._engine.checkpoint_engine = _Files(write)
        self._engine._copy_recovery_script = lambda folder: None  # written past `write`, and the same in each
        with quiet():
            self._engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, name: str) -> None:
        """What `save` wrote on as many ranks. All ranks call it."""
        self.version += 1
        with quiet():
            found, _ = self._engine.load_checkpoint(str(folder), tag=name, custom_load_fn=_load_trained)
        if found is None:
            raise FileNotFoundError(f"{folder / name} has no state that DeepSpeed knows")


@dataclass(frozen=True)
class Gradients:
    """An engine's gradients as a part that can leave the GPU apart from its states, as nothing of them is kept."""

    engine: Engine

    def states(self) -> list[Tensor]:
        return self.engine.buffers()


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load the state `src` into the module `dst`, all of what trains and nothing that the module has not.

    A frozen parameter may be in it by the second of two names, as a tied embedding is.
    """
    absent, unknown = dst.load_state_dict(src, strict=False)
    trained = {name for name, p in dst.named_parameters() if p.requires_grad}
    if wrong := [*trained.intersection(absent), *unknown]:
        raise KeyError(f"weights that do not fit: {', '.join(sorted(wrong)[:3])}")


@contextlib.contextmanager
def _resting_at_rate_0(optimizer: Any) -> Iterator[None]:
    """Within this context the optimizer's step leaves out the groups whose rate is 0.

    DeepSpeed's own runs on around it and clears the gradients, at every ZeRO stage alike. A subclass would do, but
    DeepSpeed warns of optimizers that it does not know.
    """
    step = optimizer.step

    def step_of_the_others(closure: None = None) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["lr"] > 0]
        try:
            step()
        finally:
            optimizer.param_groups = groups

    optimizer.step = step_of_the_others
    try:
        yield
    finally:
        del optimizer.step


class _Files(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's reader of checkpoint files, with a writer of ours."""

    def __init__(self, write: Callable[[Any, Path], None]):
        super().__init__()
        self._write = write

    def save(self, state_dict: Any, path: str) -> None:
        self._write(state_dict, Path(path))


def _adam(groups: list[list[nn.Parameter]], optim: OptimConfig, *, offloaded: bool) -> Any:
    """AdamW; DeepSpeed's own for the CPU where the states are kept off the GPU. The two agree within rounding."""
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    parameters = [{"params": group} for group in groups]
    if not offloaded:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        with quiet():
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    except RuntimeError as error:
        raise EngineError(
            f"zero.offload: DeepSpeed's Adam for the CPU could not be compiled ({error.__cause__ or error}). It needs a"
            " C++ compiler (g++); or set zero.offload_optimizer to none."
        ) from error


def _clear_padding(module: nn.Module, optimizer: Any) -> None:
    """Zeros where a rank's part reaches beyond the end of its weight: there is whatever the memory held before.

    Nothing reads it, but it is saved, and checkpoints of equal runs should be equal.
    """

    def padding(p: Any) -> int:
        size = int(p.ds_tensor.ds_numel)
        return min(max((dist.get_rank() + 1) * size - int(p.ds_numel), 0), size)

    with torch.no_grad():
        for p in module.parameters():
            part = cast(Any, p).ds_tensor
            part.data[max(part.numel() - padding(p), 0) :].zero_()
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            end = 0
            for p in group:
                end += int(p.ds_tensor.ds_numel)
                flat.data[end - padding(p) : end].zero_()
