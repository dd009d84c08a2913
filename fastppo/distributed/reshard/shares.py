"""Writing the state of a trained role, weight by weight, into the engine of this rank, which has its own shares of it.

Only a rank's own files and tensors take part, and no collective: a rank holds nothing beside its shares. DeepSpeed's
own functions for this (`safe_set_full_fp32_param` and its like) want each weight whole, and moments to be there, which
they are not before the first step; at stage 3 they fail for a weight that ranks do not divide evenly (0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from fastppo.distributed.reshard.layout import LayoutError, layout_of
from fastppo.distributed.reshard.shards import MASTER, MOMENTS, Piece, Saved, read_shards


@dataclass(frozen=True)
class _Share:
    """The part of a weight whose master weights and moments this rank updates; perhaps none of it."""

    name: str
    start: int  # in the weight
    at: int  # in the rank's flat tensor
    numbers: int


@torch.no_grad()
def load_shards(engine: Any, adam: Any, trained: Sequence[nn.Parameter], folder: Path) -> None:
    """Load what any layout has saved in `folder`: weights, master weights, moments, steps, buffers, DeepSpeed's counts.

    engine: of DeepSpeed; adam: the optimizer that it has wrapped; trained: its weights in the order in which it was
    given them. Raises OSError, KeyError or ValueError if the files
    are not those of the weights that train here, LayoutError if one of the two layouts has no way to the other.
    """
    if "nvme" in ((layout := layout_of(engine)).optimizer, layout.parameters):
        raise LayoutError(
            f"it has another layout than this run ({layout}), and what is on NVMe is written by DeepSpeed alone. Resume"
            " with the ranks, zero.stage and zero.offload with which it was written, or with --zero.offload cpu."
        )
    weights = {engine.param_names[p]: p for p in trained}
    shards = read_shards(folder, list(weights))
    _check(weights, shards.weights)
    for master, shares in _flat_shares(engine):
        _write_states(adam, master, shares, shards.weights)
    for name, p in weights.items():
        _write_weight(p, shards.weights[name])
    buffers = dict(engine.module.named_buffers())
    for name, value in shards.buffers.items():
        buffers[name].copy_(value)
    for name, count in shards.counts.items():
        setattr(engine, name, count)


def _check(weights: Mapping[str, nn.Parameter], saved: Mapping[str, Saved]) -> None:
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in weights.items()}
    wrong = [name for name in {*shapes, *saved} if name not in saved or shapes.get(name) != saved[name].shape]
    if wrong:
        raise KeyError(f"weights that do not fit: {', '.join(sorted(wrong)[:3])}")


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The weights of each flat tensor, in the order in which they lie in it; at stage 0 those of each group."""
    for name in ("round_robin_bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            groups: list[list[nn.Parameter]] = getattr(optimizer, name)
            return groups
    return [group["params"] for group in optimizer.param_groups]


def _flat_shares(engine: Any) -> Iterator[tuple[Tensor, list[_Share]]]:
    """Each tensor that the optimizer updates on this rank, and the parts in it of all weights of its group.

    `gradients` says which optimizer has which attributes.
    """
    optimizer, names = engine.optimizer, engine.param_names
    groups = _groups(optimizer)
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, groups, strict=True):
            shares, at = [], 0
            for p in group:
                start, numbers = _own(p)
                shares.append(_Share(names[p], start, at, numbers))
                at += int(p.ds_tensor.ds_numel)  # type: ignore[attr-defined]
            yield flat, shares
        return
    if not engine.zero_optimization():
        for p in (p for group in groups for p in group):
            yield p, [_Share(names[p], 0, 0, p.numel())]
        return
    masters = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
    offsets = getattr(optimizer, "round_robin_bit16_offsets", None)
    for i, (flat, group) in enumerate(zip(masters, groups, strict=True)):
        size, shares, begin = flat.numel(), [], 0
        first = dist.get_rank(optimizer.real_dp_process_group[i]) * size  # of the group, in this rank's part
        for number, p in enumerate(group):
            begin = begin if offsets is None else offsets[i][number]
            low, high = max(begin, first), min(begin + p.numel(), first + size)
            shares.append(_Share(names[p], low - begin, low - first, max(high - low, 0)))
            begin += p.numel()
        yield flat, shares


def _write_states(adam: Any, master: Tensor, shares: list[_Share], saved: Mapping[str, Saved]) -> None:
    """Fill a tensor that the optimizer updates, and its moments; padding stays as it is, or 0.

    A tensor whose weights were never updated gets no moments, as a new one has none.
    """
    for share in shares:
        saved[share.name].copy(MASTER, share.start, _part(master, share))
    steps = {saved[share.name].step for share in shares} - {0.0}
    if len(steps) > 1:
        counts = {step: next(share.name for share in shares if saved[share.name].step == step) for step in steps}
        listed = " and ".join(f"{name} {step:.0f} times" for step, name in sorted(counts.items())[:2])
        raise LayoutError(
            "it was written at zero.stage 0, where each weight counts its own updates, and some had no gradient:"
            f" {listed}. At other stages all weights of a group have one count. Resume with --zero.stage 0."
        )
    if not steps:
        adam.state.pop(master, None)
        return
    state = adam.state[master]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)
        for share in shares:
            saved[share.name].copy(name, share.start, _part(state[name], share))
    step = steps.pop()
    # as each of the two makes it: a plain number, or a tensor on the device for the kernel of AdamW
    in_adam = isinstance(adam, DeepSpeedCPUAdam)
    state["step"] = int(step) if in_adam else torch.tensor(step, dtype=torch.float32, device=master.device)


def _part(flat: Tensor, share: _Share) -> Tensor:
    return flat.data.view(-1)[share.at : share.at + share.numbers]


def _write_weight(p: Any, saved: Saved) -> None:
    """Fill a weight of the module, or at stage 3 this rank's part of it, with its master weights rounded to its dtype.

    After each update DeepSpeed makes the weights so, at every stage.
    """
    if not hasattr(p, "ds_tensor"):
        saved.copy(MASTER, 0, p.data.view(-1))
        return
    start, numbers = _own(p)
    saved.copy(MASTER, start, p.ds_tensor.data.view(-1)[:numbers])
    if p.ds_status == ZeroParamStatus.AVAILABLE:  # a small weight, which each rank has whole beside its part
        saved.copy(MASTER, 0, p.data.view(-1))


@torch.no_grad()
def copy_share(p: Any, saved: Sequence[Tensor], to: Tensor) -> None:
    """Copy what ranks have saved of one tensor into what this rank has of it: all, or at stage 3 its part.

    p: a weight that is split as the tensor is; saved: by each rank, all of it or, at stage 3, its part; to: of this
    rank. Padding stays as it is.
    """
    flat = to.view(-1)
    start, numbers = _own(p) if hasattr(p, "ds_tensor") else (0, p.numel())
    pieces = [Piece({MASTER: part.view(-1)}, 0, part.numel()) for part in saved]  # of whole ones, the first is read
    Saved(tuple(p.shape), pieces=pieces).copy(MASTER, start, flat[:numbers])


def _own(p: Any) -> tuple[int, int]:
    """At stage 3: where this rank's part of a weight begins, and how many numbers of the weight it has, or 0."""
    size = int(p.ds_tensor.ds_numel)
    start = dist.get_rank(p.ds_process_group) * size
    return start, max(min(int(p.ds_numel) - start, size), 0)
