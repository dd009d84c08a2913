"""Engines for trained and frozen roles on top of DeepSpeed, whose API no other room uses for training."""

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
from fastppo.distributed import accumulation, gradients
from fastppo.distributed.reshard.layout import layout_of
from fastppo.distributed.reshard.shards import saved_layout
from fastppo.distributed.reshard.shares import load_shards
from fastppo.errors import FastPPOError

T = TypeVar("T")


class Saved(Protocol):
    """An object that writes a part of a checkpoint and reads it again, on every rank; see `Engine.save`."""

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None: ...

    def load(self, folder: Path, name: str) -> None: ...


class EngineError(FastPPOError):
    """A requirement of DeepSpeed that this machine does not meet."""


def check_nvme(zero: ZeroConfig) -> None:
    """Raises EngineError if the run offloads to NVMe and this machine cannot. Called before models load."""
    if "nvme" in (zero.optimizer_on, zero.parameters_on, zero.frozen_on) and not AsyncIOBuilder().is_compatible():
        raise EngineError(
            "zero.offload is nvme, but DeepSpeed's async_io cannot be compiled here: libaio is missing. Install it (apt"
            " install libaio-dev, or dnf install libaio-devel), or set zero.offload to cpu."
        )


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, written_by: int | None = None) -> Iterator[None]:
    """Within this context these parameters are whole; else, at ZeRO stage 3, each rank has its partition of them only.

    All ranks enter it together. Needed to read or write a weight outside of the forward pass of its module. written_by:
    the rank whose values the parameters have afterwards; None: they were only read. Parameters that are not partitioned
    do not change.
    """
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=written_by):
        yield


def even_passes(parts: Sequence[Tensor], zero: ZeroConfig, world: World) -> list[Tensor]:
    """Microbatches, each given by the indices of its sequences, and empty ones up to the number of the other ranks.

    At ZeRO stage 3 every forward pass is a collective, so all ranks must make the same number. All ranks call it.
    """
    if zero.stage < 3:
        return list(parts)
    most = int(all_max(torch.tensor(len(parts)), world))
    return [*parts, *[torch.empty(0, dtype=torch.int64)] * (most - len(parts))]


def _end_prefetch(run: Any) -> None:
    """Wait for the weights that DeepSpeed began to gather for modules which a pass did not reach, and let them go.

    At stage 3 it gathers ahead in the order of an earlier pass. A pass without the value head would leave weights on
    their way, which nothing else can gather or split then. The next pass would begin with this.
    """
    optimizer = getattr(run, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if offload is not None and hasattr(offload, "get_param_coordinator"):
        offload.get_param_coordinator()._clean_inflight_param_registry()


class Frozen:
    """A role that does not train. At ZeRO stage 3 its parameters are partitioned and gathered layer by layer."""

    def __init__(self, module: nn.Module, optim: OptimConfig, zero: ZeroConfig):
        self.module: Any = module
        self._run: Any = module
        self._owns_weights = getattr(module, "adapters", True)  # else it is the actor's module with its adapters off
        if zero.stage == 3 and self._owns_weights:
            with quiet():
                self._run = deepspeed.initialize(
                    model=module, config=deepspeed_config.frozen(optim, zero), dist_init_required=False
                )[0]
            module.eval()

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        result = self._run(*args)
        _end_prefetch(self._run)
        return result

    def states(self) -> list[Tensor]:
        """The tensors that may be moved out of the GPU between two uses: the parameters, or this rank's partitions."""
        return [getattr(p, "ds_tensor", p) for p in self.module.parameters()] if self._owns_weights else []

    def release(self) -> None:
        """Free the weights; it cannot be called any more.

        DeepSpeed has tables of all engines and their modules, so that at ZeRO stage 3 no weight would be freed with the
        last reference to this object.
        """
        for parameter in self.module.parameters():
            for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
                tensor.data = tensor.data.new_empty(0)


class Engine:
    """A trained role: DeepSpeed manages its parameters and optimizer; gradients accumulate until `step`."""

    def __init__(
        self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]], optim: OptimConfig, zero: ZeroConfig
    ):
        """groups: parameters that share a learning rate; empty groups and frozen parameters are left out."""
        trained = [[p for p in group if p.requires_grad] for group in groups]
        self._group_indices = [i for i, group in enumerate(trained) if group]  # of the groups that train
        self._adam: Any = _adam([trained[i] for i in self._group_indices], optim, offloaded=zero.optimizer_on != "none")
        self._parameters = [p for i in self._group_indices for p in trained[i]]
        self.version = 0  # increases with each change of the weights
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
        self._sums = accumulation.add_once(self._engine, self._optimizer)

    def __call__(self, *args: Any) -> Any:
        result = self._engine(*args)
        if not torch.is_grad_enabled():  # else the backward pass comes, which uses them
            _end_prefetch(self._engine)
        return result

    @property
    def module(self) -> Any:
        return self._engine.module

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of the loss of this microbatch; last: it is the last one before the next `step`.

        DeepSpeed averages gradients over ranks. The loss is a sum over this rank's tokens divided by the tokens of all
        ranks, so its normalizer includes the factor that turns the average into the sum (see `fastppo.ppo.update`).
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._sums.norm = None
        self._engine.backward(loss if self._sums.share == 1 else loss * self._sums.share, scale_wrt_gas=False)
        if self._first:
            gradients.after_first(self._optimizer)
        self._first = last
        if last:
            gradients.after_last(self._optimizer)

    def gradient_norm(self) -> float:
        """The norm of the accumulated gradient of all ranks, before clipping; not finite if a part of it is not."""
        if self._sums.norm is None:
            self._sums.norm = gradients.norm(self._optimizer, self._parameters)
        return self._sums.norm

    def step(self, learning_rates: Sequence[float], *, apply: bool = True) -> None:
        """Clip, update, clear the gradients; without `apply` the weights and the optimizer states do not change.

        Those of a group with a learning rate of 0 do not change either: Adam counts its steps, and after steps without
        a gradient the size of the first step with one would be wrong.
        """
        for group, i in zip(self._optimizer.param_groups, self._group_indices, strict=True):
            group["lr"] = learning_rates[i] if apply else 0.0
        self.version += any(group["lr"] for group in self._optimizer.param_groups)
        self.gradient_norm()
        with _skipping_groups_at_rate_0(self._adam):
            self._engine.step()
        gradients.after_step(self._optimizer)
        self._sums.norm = None

    def states(self) -> list[Tensor]:
        """Tensors that only learning uses and whose values it needs again: optimizer states and master weights."""
        states = [x for state in self._adam.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [*states, *gradients.masters(self._optimizer)]

    def buffers(self) -> list[Tensor]:
        """Tensors that only learning uses and that each update starts from zero: sums and buckets of gradients."""
        return gradients.buffers(self._optimizer)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """Write this rank's part of weights, master weights and optimizer to files below `folder`/`name`.

        All ranks call it. Frozen weights are not saved, because a resumed run loads them from their source; with LoRA
        nearly all weights are frozen. `write` gets the content and the path of each file. It must not raise: the other
        ranks would wait in a collective.
        """
        self._engine.checkpoint_engine = _Files(write)
        self._engine._copy_recovery_script = lambda folder: None  # it would not use `write`, and never changes
        with quiet():
            self._engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, name: str) -> None:
        """Read the files that `save` wrote, with any number of ranks, ZeRO stage and offload. All ranks call it.

        With the same as now the engine is then the one that was saved, bit for bit. Else each rank finds its share of
        each tensor in the files of all ranks. Raises OSError, KeyError, RuntimeError or ValueError.
        """
        self.version += 1
        if saved_layout(folder / name) != layout_of(self._engine):
            load_shards(self._engine, self._adam, self._parameters, folder / name)
            return
        with quiet():
            path, _ = self._engine.load_checkpoint(str(folder), tag=name, custom_load_fn=_load_trained)
        if path is None:
            raise FileNotFoundError(f"{folder / name} has no state that DeepSpeed can read")


@dataclass(frozen=True)
class Gradients:
    """The gradient buffers of an engine, moved separately from its states because their values are not preserved."""

    engine: Engine

    def states(self) -> list[Tensor]:
        return self.engine.buffers()


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load the state `src` into the module `dst`; it must contain all trainable parameters and nothing unknown.

    It may contain a frozen parameter under the second of two names, for example a tied embedding.
    """
    missing, unknown = dst.load_state_dict(src, strict=False)
    trained = {name for name, p in dst.named_parameters() if p.requires_grad}
    if wrong := [*trained.intersection(missing), *unknown]:
        raise KeyError(f"weights that do not fit: {', '.join(sorted(wrong)[:3])}")


@contextlib.contextmanager
def _skipping_groups_at_rate_0(optimizer: Any) -> Iterator[None]:
    """Within this context the optimizer's step skips the parameter groups whose learning rate is 0.

    The rest of DeepSpeed's step is unchanged and clears all gradients, at every ZeRO stage. A subclass of the optimizer
    would work too, but DeepSpeed warns about optimizer classes that it does not know.
    """
    step = optimizer.step

    def step_of_other_groups(closure: None = None) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["lr"] > 0]
        try:
            step()
        finally:
            optimizer.param_groups = groups

    optimizer.step = step_of_other_groups
    try:
        yield
    finally:
        del optimizer.step


class _Files(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's reader of checkpoint files, with the given function as the writer."""

    def __init__(self, write: Callable[[Any, Path], None]):
        super().__init__()
        self._write = write

    def save(self, state_dict: Any, path: str) -> None:
        self._write(state_dict, Path(path))


def _adam(groups: list[list[nn.Parameter]], optim: OptimConfig, *, offloaded: bool) -> Any:
    """AdamW; offloaded: DeepSpeed's AdamW for the CPU. The two agree within rounding."""
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    parameters = [{"params": group} for group in groups]
    if not offloaded:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        with quiet():
            adam = DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    except RuntimeError as error:
        raise EngineError(
            f"zero.offload: DeepSpeed's Adam for the CPU could not be compiled ({error.__cause__ or error}). It needs a"
            " C++ compiler (g++); or set zero.offload_optimizer to none."
        ) from error
    adam.ds_opt_adam = _BiasOfStep(adam.ds_opt_adam)
    return adam


class _BiasOfStep:
    """DeepSpeed's C++ Adam, with a bias correction that depends on nothing but the number of the step.

    The C++ object keeps beta^t, of which no checkpoint knows. While steps follow each other it multiplies by beta, and
    after a jump, as after loading, it calls `pow`, which rounds differently: a resumed run would not be the same bit
    for bit. Step 0 of no weights makes every step but the first a jump, and the first is beta either way.
    """

    def __init__(self, library: Any):
        self._library = library  # the compiled module, with the states of all optimizers by their ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def adam_update(self, optimizer: int, step: int, *rest: Any) -> None:
        """rest: learning rate, betas, eps, weight decay, bias correction; weights, gradients and both moments."""
        numbers, tensors = rest[:-4], rest[-4:]
        self._library.adam_update(optimizer, 0, *numbers, *(x.new_empty(0) for x in tensors))
        self._library.adam_update(optimizer, step, *numbers, *tensors)


def _clear_padding(module: nn.Module, optimizer: Any) -> None:
    """Zero the padding of a rank's partitions beyond the ends of the weights, which DeepSpeed leaves uninitialised.

    The padding is never read, but it is saved, and checkpoints of equal runs should be equal.
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
