"""What the ranks of test_engine_table.py run: every kind of engine on a few numbers whose sums are known.

The loss is linear in the weights, so the gradient of a microbatch is what the test hands in: small integers, the first
microbatch's 512 times as large as the others'. All of their sums are exact in fp32, few of them are in bf16.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import whole_runs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.config import OptimConfig, ZeroConfig
from fastppo.distributed.engine import Engine, gathered
from fastppo.distributed.world import World, start_world

SHAPES = ((7, 3), (5,), (3, 3))  # of the trained weights; the first two share a learning rate
RATES = (0.5, 0.25, 0.125)  # of their groups, of which the second is empty
CLIP = 100.0  # less than some of the norms, more than others
SMALL = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 16}  # less than the largest weight
Gradients = Callable[[int, int], Sequence[Tensor | None]]  # of a microbatch and a rank; None: no part of the loss


class Part(nn.Module):
    def __init__(self, shape: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter((torch.arange(math.prod(shape)).reshape(shape) / 64).to(dtype))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight.float() * gradient).sum()


class Parts(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.parts = nn.ModuleList([Part(shape, dtype) for shape in SHAPES])
        self.frozen = Part((4,), dtype)
        self.frozen.weight.requires_grad_(False)

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        sums = [part(g) for part, g in zip(self.parts, gradients, strict=True) if g is not None]
        return sum(sums, self.frozen(torch.ones(4)))


def made(microbatch: int, rank: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(10 * microbatch + rank)
    size = 512 if microbatch == 0 else 1
    return [size * torch.randint(-8, 9, shape, generator=draw).double() for shape in SHAPES]


def without(part: int, where: Callable[[int, int], bool]) -> Gradients:
    """As `made`, but one weight has no part in the loss of some microbatches."""
    return lambda k, rank: [None if i == part and where(k, rank) else g for i, g in enumerate(made(k, rank))]


class Bench:
    """An engine, and beside it a plain AdamW in fp64 that gets the sum of all gradients."""

    def __init__(self, zero: ZeroConfig, dtype: str, world: World, settings: Path):
        self.world, self.zero = world, zero
        zero = zero if zero.stage == 0 else replace(zero, deepspeed=str(settings))
        self.before = alive()  # kept, so that what comes later is not where one of them was
        model = Parts({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        weights = [part.weight for part in model.parts]
        self.plain = [w.detach().double().clone().requires_grad_() for w in weights]
        self.adam = torch.optim.AdamW(
            [{"params": self.plain[:2]}, {"params": self.plain[2:]}], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )
        optim = replace(OptimConfig(), dtype=dtype, max_grad_norm=CLIP, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        self.engine = Engine(model, [[*weights[:2], model.frozen.weight], [], weights[2:]], optim, zero)
        self.engine.train()

    def accumulate(self, microbatches: int, gradients: Gradients = made) -> float:
        """The norm of what has been accumulated, as the engine has it."""
        for k in range(microbatches):
            own = [None if g is None else g.float() * self.world.ranks for g in gradients(k, self.world.rank)]
            self.engine.backward(self.engine(own), last=k == microbatches - 1)
        return self.engine.gradient_norm()

    def total(self, microbatches: int, gradients: Gradients = made) -> list[Tensor]:
        sums = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
        for k, rank in itertools.product(range(microbatches), range(self.world.ranks)):
            for i, gradient in enumerate(gradients(k, rank)):
                sums[i] += 0 if gradient is None else gradient
        return sums

    def update(self, microbatches: int, gradients: Gradients = made, rates: Sequence[float] = RATES) -> list[float]:
        """One update of both; the norms that the engine and the plain sum have."""
        norm, total = self.accumulate(microbatches, gradients), self.total(microbatches, gradients)
        self.engine.step(rates)
        expected = math.sqrt(sum(float(g.square().sum()) for g in total))
        for p, g in zip(self.plain, total, strict=True):
            p.grad = g * min(1.0, CLIP / (expected + 1e-6))
        for group, rate in zip(self.adam.param_groups, (rates[0], rates[2]), strict=True):
            group["lr"] = rate
            if rate == 0:
                for p in group["params"]:
                    p.grad = None
        self.adam.step()
        return [norm, expected]

    def weights(self) -> list[Tensor]:
        with gathered(self.engine.module.parameters()):
            return [part.weight.detach().clone() for part in self.engine.module.parts]

    def apart(self) -> float:
        """How far the weights are from the plain ones, in units of what the dtype rounds by."""
        pairs = zip(self.weights(), [p.detach() for p in self.plain], strict=True)
        return max(float(((w - p).abs() / (torch.finfo(w.dtype).eps * p.abs().clamp(min=1))).max()) for w, p in pairs)

    def states(self) -> list[int]:
        """Bytes of what the engine says that it holds between two updates, and of all that is there but weights.

        The third: of master weights and two moments, by counting. Offloaded, what is there has buffers on the host too.
        """
        module = self.engine.module
        own = [
            *self.before,
            *module.parameters(),
            *(getattr(p, "ds_tensor", p) for p in module.parameters()),
            *self.plain,
        ]
        own += [x for state in self.adam.state.values() for x in state.values()] + [p.grad for p in self.plain]
        others = held([x for x in own if x is not None])
        said = held([*self.engine.states(), *self.engine.buffers()])
        there = {place: size for place, size in held(alive()).items() if place not in others}
        masters = 0 if self.zero.stage == 0 else 4
        counted = (8 + masters) * sum(map(math.prod, SHAPES)) // self.world.ranks
        return [sum(said.values()), sum(there.values()), counted]


def alive() -> list[Tensor]:
    """Every tensor made since `gc.freeze`."""
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device.type == "cpu"]


def held(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Their storages: where each is, and its bytes; without single numbers, as Adam counts its steps in."""
    storages = [x.untyped_storage() for x in tensors if x.layout == torch.strided]
    return {x.data_ptr(): x.nbytes() for x in storages if x.nbytes() > 8}


def row(zero: ZeroConfig, dtype: str, world: World, settings: Path) -> dict[str, Any]:
    bench, found = Bench(zero, dtype, world, settings), {}
    found["norms"] = [bench.update(n) for n in (1, 2, 3)]
    time.sleep(0.05)  # gloo's thread holds what it has reduced for a moment after the ranks go on
    found["states"] = bench.states()
    before, found["finite"] = bench.weights(), []
    for bad, value in itertools.product(range(3), (math.nan, math.inf)):  # seen wherever it is, and nothing of it stays

        def poisoned(k: int, rank: int, bad: int = bad, value: float = value) -> list[Tensor]:
            gradients = made(k, rank)
            if (k, rank) == (bad, world.ranks - 1):
                gradients[0][-1, -1] = value
            return gradients

        found["finite"].append(math.isfinite(bench.accumulate(3, poisoned)))
        bench.engine.step(RATES, apply=False)
    bench.accumulate(2)
    bench.engine.step(RATES, apply=False)
    found["left alone"] = all(torch.equal(a, b) for a, b in zip(before, bench.weights(), strict=True))
    found["norms"].append(bench.update(3))
    found["norms"].append(bench.update(2, rates=(0.5, 0.25, 0.0)))
    found["norms"].append(bench.update(2))
    for part in range(len(SHAPES)):  # in no microbatch, in the first alone, in the last alone
        for where in (lambda k, _: True, lambda k, _: k > 0, lambda k, _: k < 1):
            found["norms"].append(bench.update(2, without(part, where)))
    if zero.stage == 0 or (zero.stage == 1 and dtype == "bf16" and zero.optimizer_on == "none"):
        found["norms"].append(bench.update(2, without(1, lambda k, rank: rank < world.ranks - 1 or world.ranks == 1)))
    found["apart"], found["weights"] = bench.apart(), [w.tolist() for w in bench.weights()]
    found["resumed"] = resumed(zero, dtype, world, settings)
    found["touched"], found["reads"] = touched(zero, dtype, world, settings)
    return found


def resumed(zero: ZeroConfig, dtype: str, world: World, settings: Path) -> dict[int, bool]:
    """Whether a run of updates ends the same, bit for bit, where another engine goes on after some number of them.

    In six updates and more: beta^t as a product of floats and as a power differ first at Adam's sixth step. The other
    engine is new at first, later one that has been further, as after a rollback. One group begins before the others, as
    a shared critic's value head does; then all count the same number of steps.
    """
    updates = [(1, (0.0, 0.0, 0.125)), (1, (0.5, 0.25, 0.0)), *[(2, RATES)] * 9]
    folder = settings.parent / f"saved-{world.ranks}-{zero.stage}-{dtype}-{zero.optimizer_on}-{zero.parameters_on}"
    straight, other = Bench(zero, dtype, world, settings), Bench(zero, dtype, world, settings)

    def saved(bench: Bench, name: str) -> dict[str, Any]:
        """What this rank writes, as it is read again."""
        written = []

        def write(state: Any, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)
            written.append(path)

        bench.engine.save(folder, name, write)
        return {path.name: torch.load(path, weights_only=False) for path in written}

    stops = (10, 7, 1, 0)
    for n, (microbatches, rates) in enumerate(updates):
        if n in stops:
            saved(straight, f"{n}")
        straight.update(microbatches, rates=rates)
    end, same = (straight.weights(), saved(straight, "end")), {}
    for n in stops:
        other.engine.load(folder, f"{n}")
        for microbatches, rates in updates[n:]:
            other.update(microbatches, rates=rates)
        same[n] = whole_runs.same(end, (other.weights(), saved(other, "other")))
    return same


class Touched(TorchDispatchMode):
    """Counts the numbers that ops read or write in memory, where what is read and written in place counts twice, and
    how often the host reads one, for which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.reads += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        a_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not a_view and not func._schema.name.startswith("aten::empty"):
            for name, value in arguments.items():
                overwritten = func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_") and name == "self"
                times = 2 if name in writes and not overwritten else 1
                self.numbers += times * sum(x.numel() for x in tree_leaves(value) if isinstance(x, Tensor))
            if not writes:
                self.numbers += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def touched(zero: ZeroConfig, dtype: str, world: World, settings: Path) -> tuple[float, int]:
    """How many times a backward pass that is neither the first nor the last of an update reads or writes a number
    for each number of its gradient, beside those of the backward pass of a module without an engine; and how often the
    host reads one."""
    bench = Bench(zero, dtype, world, settings)

    def counted(run: Callable[[], object]) -> Touched:
        with Touched() as found:
            run()
        return found

    def gradients(k: int) -> list[Tensor]:
        return [g.float() for g in made(k, world.rank)]

    bench.engine.backward(bench.engine(gradients(0)), last=False)
    loss = bench.engine(gradients(1))
    with_engine = counted(lambda: bench.engine.backward(loss, last=False))
    bench.engine.backward(bench.engine(gradients(2)), last=True)
    bench.engine.step(RATES)
    loss = Parts({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])(gradients(1))
    numbers = with_engine.numbers - counted(loss.backward).numbers
    return numbers / sum(map(math.prod, SHAPES)), with_engine.reads


def table() -> dict[str, tuple[ZeroConfig, str]]:
    rows = {"0 fp32 none": (ZeroConfig(stage=0), "fp32")}
    for stage, dtype, where in itertools.product((1, 2, 3), ("fp32", "bf16"), ("none", "cpu")):
        rows[f"{stage} {dtype} {where}"] = (ZeroConfig(stage=stage, offload_optimizer=where), dtype)
    for dtype in ("fp32", "bf16"):
        rows[f"3 {dtype} all"] = (ZeroConfig(stage=3, offload="cpu"), dtype)
    return rows


def walk(folder: str) -> None:
    world, settings = start_world(1), Path(folder, "small.json")
    gc.collect()
    gc.freeze()  # what the libraries made is not looked through again in each row
    found = {name: row(zero, dtype, world, settings) for name, (zero, dtype) in table().items()}
    Path(folder, f"{world.ranks}-{world.rank}.json").write_text(json.dumps(found))
