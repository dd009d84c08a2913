"""Processes and optimizers: what DeepSpeed does for fastppo, and nothing else of it shows through."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says at each import that it found nothing faster
# What DeepSpeed compiles at first use belongs to this environment, and so does the ninja that compiles it. In the
# user's cache, or by another ninja, two environments on a machine undo each other's work, at a minute a time.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from fastppo.config import OptimConfig, ZeroConfig

T = TypeVar("T")

# DeepSpeed measures the gradient norm only while it clips, and the norm is a metric of every run.
NO_CLIPPING = 1e9


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    ranks: int
    device: torch.device


def start_world(threads: int | None) -> World:
    """Join the run's processes: those of the `deepspeed` launcher, or this one alone (`python -m fastppo.train`)."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")
    if device.type == "cpu":
        neighbours = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(threads or max(len(os.sched_getaffinity(0)) // neighbours, 1))
    else:
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        with _quiet():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        if device.type == "cpu":
            _unlink_shared_buffer()
    return World(dist.get_rank(), dist.get_world_size(), device)


def stop_world() -> None:
    """Leave the run's processes in order; without it the others' last collective can fail."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(part: T, world: World) -> list[T]:
    """Every rank's part, in the order of ranks, on every rank. Parts are small: token ids and one number a token."""
    parts: list[Any] = [None] * world.ranks
    dist.all_gather_object(parts, part)
    return parts


class Engine:
    """A trained role: DeepSpeed holds its parameters and optimizer; gradients accumulate until `step`."""

    def __init__(
        self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]], optim: OptimConfig, zero: ZeroConfig
    ):
        """groups: parameters that share a learning rate; empty groups and frozen parameters are left out."""
        trained = [[p for p in group if p.requires_grad] for group in groups]
        self._kept = [i for i, group in enumerate(trained) if group]
        optimizer = torch.optim.AdamW(
            [{"params": trained[i]} for i in self._kept],
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self._parameters = [p for i in self._kept for p in trained[i]]
        with _quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=_deepspeed_config(optim, zero), dist_init_required=False
            )

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
        ranks, so its normalizer carries the factor that turns the average into the sum (see `learn.normalizer`).
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Clip, update, clear the gradients; returns the global gradient norm before clipping."""
        for group, i in zip(self._optimizer.param_groups, self._kept, strict=True):
            group["lr"] = learning_rates[i]
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)


def _deepspeed_config(optim: OptimConfig, zero: ZeroConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own counting of batches is not used
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm or NO_CLIPPING,
        "bf16": {"enabled": optim.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": zero.stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def all_sum(x: Tensor, world: World) -> Tensor:
    """The sum over ranks, on every rank."""
    x = x.to(world.device)
    dist.all_reduce(x)
    return x


def all_max(x: Tensor, world: World) -> Tensor:
    """The maximum over ranks, on every rank."""
    x = x.to(world.device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def _quiet() -> contextlib.AbstractContextManager[object]:
    """DeepSpeed prints tables of memory while it starts; they would push a run's own lines off the screen."""
    return contextlib.redirect_stdout(io.StringIO())


def _unlink_shared_buffer() -> None:
    """Give up the name of this rank's buffer for DeepSpeed's reductions, now that every rank has mapped it.

    DeepSpeed does so in no case, and each run would leave 69 MB a rank in /dev/shm, which is memory.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
