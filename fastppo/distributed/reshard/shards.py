"""Reading a checkpoint of a trained role by the names of its weights, from the files of all ranks that wrote it.

DeepSpeed 0.19.8 saves at stages 1 to 3 one flat tensor of master weights a rank and group of weights (at stage 3: a
part of a group), and Adam's two moments as flat tensors of the same order. At stages 1 and 2 the weights of a group lie
one after another, and the whole is cut into as many equal parts as there were ranks. At stage 3 each weight is cut into
equal parts by itself, and a rank's parts lie one after another. At stage 0 each rank has whole tensors, and the first
one saves them. Files are mapped into memory, so that only what is copied from them takes any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.distributed.reshard.layout import Layout, LayoutError, make_layout

MASTER = "fp32"  # the master weights; at stage 0 the weights
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = (MASTER, *MOMENTS)  # what is known of each number of a weight


@dataclass(frozen=True)
class Piece:
    """A part of a weight that lies in one piece in one file."""

    states: Mapping[str, Tensor]  # flat tensors by their name in `NAMES`; no moments before the first step
    start: int  # in the flat tensors
    numbers: int


@dataclass
class Saved:
    """A weight in a checkpoint."""

    shape: tuple[int, ...]
    step: float = 0.0  # how many times its group was updated
    pieces: list[Piece] = field(default_factory=list)  # in order; together the whole weight

    def copy(self, name: str, start: int, to: Tensor) -> None:
        """Copy the numbers from `start` on, of the flattened weight, into `to` (k,) of any dtype and device.

        name: one of `NAMES`. Moments of a weight that was never updated are 0.
        """
        end, begin = start + to.numel(), 0  # begin: of the piece, in the weight
        for piece in self.pieces:
            low, high = max(start, begin), min(end, begin + piece.numbers)
            if low < high:
                part = to[low - start : high - start]
                if name in piece.states:
                    part.copy_(piece.states[name][piece.start + low - begin : piece.start + high - begin])
                else:
                    part.zero_()
            begin += piece.numbers


@dataclass(frozen=True)
class Shards:
    """A checkpoint of a trained role."""

    layout: Layout
    weights: Mapping[str, Saved]  # of all that trains
    buffers: Mapping[str, Tensor]  # of the module, that are part of its state
    counts: Mapping[str, int]  # what DeepSpeed counts, by the attributes of its engine


def saved_layout(folder: Path) -> Layout:
    """The layout with which the files in `folder` were written. Raises FileNotFoundError, KeyError."""
    return _layout(folder, _first_module(folder))


def read_shards(folder: Path, order: Sequence[str]) -> Shards:
    """Map the files in `folder`. order: the names of the weights that train, in the order of the optimizer's groups.

    Raises OSError, KeyError or ValueError if files are missing or are of another model, LayoutError if they do not say
    where a weight is.
    """
    first = _first_module(folder)
    layout = _layout(folder, first)
    if layout.optimizer == "nvme":
        raise LayoutError(
            f"it was written with {layout}: what is on NVMe lies in files that do not say which weight it belongs to."
            " Resume with the ranks, zero.stage and zero.offload with which it was written."
        )
    if layout.shapes is None:
        weights = _whole(first, order)
    else:
        ranks = [_load(path)["optimizer_state_dict"] for path in _optimizer_files(folder)]
        weights = {name: Saved(shape) for group in layout.shapes for name, shape in group}
        (_split_by_weight if layout.stage == 3 else _split_by_group)(layout, ranks, weights)
    module = first["module"]
    buffers = {name: module[name] for name in first["buffer_names"] if name in module}
    counts = {name: first[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    return Shards(layout, weights, buffers, counts)


def _split_by_group(layout: Layout, ranks: Sequence[Mapping[str, Any]], weights: Mapping[str, Saved]) -> None:
    """Stages 1 and 2: find the pieces of all weights, of each group in the order of `layout.shapes`."""
    assert layout.shapes is not None
    for i, group in enumerate(layout.shapes):
        masters = [rank["single_partition_of_fp32_groups"][i] for rank in ranks]
        # DeepSpeedZeroOptimizer saves them without the padding at the end of the last ranks, BF16_Optimizer with it
        padding = ranks[0]["group_paddings"][i] if "zero_stage" in ranks[0] else 0
        size = len(masters[0]) + padding
        between = ranks[0].get("param_alignment_paddings")  # of the weights, with zero_optimization.parameter_alignment
        states = [
            _with_moments(master, rank["base_optimizer_state"], i) for master, rank in zip(masters, ranks, strict=True)
        ]
        begin = 0
        for number, (name, shape) in enumerate(group):
            weights[name].step = states[0][1]
            end = begin + math.prod(shape)
            for rank, (flat, _) in enumerate(states):
                low, high = max(begin, rank * size), min(end, (rank + 1) * size)
                if low < high:
                    weights[name].pieces.append(Piece(flat, low - rank * size, high - low))
            begin = end + (between[i][number] if between else 0)


def _split_by_weight(layout: Layout, ranks: Sequence[Mapping[str, Any]], weights: Mapping[str, Saved]) -> None:
    """Stage 3: find the pieces of all weights."""
    assert layout.shapes is not None
    for i, group in enumerate(layout.shapes):
        states = [_with_moments(rank["fp32_flat_groups"][i], rank["optimizer_state_dict"], i) for rank in ranks]
        begin = 0
        for name, shape in group:
            numbers, weights[name].step = math.prod(shape), states[0][1]
            size = -(-numbers // len(ranks))
            for rank, (flat, _) in enumerate(states):
                if (left := min(numbers - rank * size, size)) > 0:
                    weights[name].pieces.append(Piece(flat, begin, left))
            begin += size


def _whole(first: Mapping[str, Any], order: Sequence[str]) -> dict[str, Saved]:
    """Stage 0: the weights and the states of a plain optimizer, which knows its weights by their numbers."""
    module, optimizer, weights = first["module"], first["optimizer"], {}
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    if count != len(order):
        raise ValueError(f"its optimizer has {count} weights, and {len(order)} train now")
    for i, name in enumerate(order):
        flat, step = _with_moments(module[name].view(-1), optimizer, i)
        piece = Piece({key: x.reshape(-1) for key, x in flat.items()}, 0, module[name].numel())
        weights[name] = Saved(tuple(module[name].shape), step, [piece])
    return weights


def _with_moments(master: Tensor, optimizer: Any, number: int) -> tuple[dict[str, Tensor], float]:
    """A flat tensor of master weights with its moments, and how many times it was updated."""
    if not isinstance(optimizer, dict):
        raise LayoutError(
            "it was written with zero_optimization.elastic_checkpoint of DeepSpeed (zero.deepspeed), which does not say"
            " how often each group was updated. Resume with the ranks, zero.stage and zero.offload with which it was"
            " written."
        )
    state = optimizer["state"].get(number, {})
    flat = {MASTER: master} | {name: state[name] for name in MOMENTS if name in state}
    return flat, float(state.get("step", 0))


def _layout(folder: Path, first: Mapping[str, Any]) -> Layout:
    return make_layout(len(_optimizer_files(folder)), first["ds_config"], first["param_shapes"])


def _first_module(folder: Path) -> dict[str, Any]:
    """The file that the first rank wrote about the module."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (folder / name).exists():
            return _load(folder / name)
    raise FileNotFoundError(f"{folder} has no state that DeepSpeed can read")


def _optimizer_files(folder: Path) -> list[Path]:
    """Those of the ranks, in their order."""
    files = folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(files, key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return state
