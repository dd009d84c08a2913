"""The gradients that a DeepSpeed optimizer has accumulated: their norm, their place, and what it forgets of them.

It has names of its own for each ZeRO stage, private ones too; those of 0.19.8 stand here and in no other module.
Optimizers are told apart by what they have. At stage 1 in bf16 `BF16_Optimizer` adds up all gradients in fp32 on each
rank; at stages 1 and 2 else `DeepSpeedZeroOptimizer` keeps the rank's part (with `cpu_offload` in the host's memory),
as does `DeepSpeedZeroOptimizer_Stage3`; at stage 0 it is the plain optimizer, and gradients are the parameters' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def norm(optimizer: Any, parameters: Sequence[nn.Parameter]) -> float:
    """The norm of what all ranks have accumulated, the same on all of them; not finite if a part of it is not.

    optimizer: as `deepspeed.initialize` returns it; parameters: those that it trains.
    """
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # stage 1 in bf16; each rank adds its part
        part = nn.utils.get_total_norm(optimizer.fp32_groups_gradient_flat_partition).double().square()
        dist.all_reduce(part)
        return float(part.sqrt())
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        return float(optimizer.scaled_global_norm())
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3 has no public name for it
        parts = [float(part) for part in optimizer._get_norm_groups()]  # -1 where one is not finite
        return math.hypot(*parts) if all(part >= 0 for part in parts) else math.inf
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def buffers(optimizer: Any) -> list[Tensor]:
    """What gradients are added up in and pass through, where it is kept between updates; nobody reads it then.

    It has to be zeros, or what it was, when the next gradients come.
    """
    found: list[Tensor] = list(getattr(optimizer, "fp32_groups_gradients_flat", []))
    for name in ("grad_partitions_flat_buffer", "temp_grad_buffer_for_gpu_offload"):
        if (buffer := getattr(optimizer, name, None)) is not None:
            found.append(buffer)
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        found += [x for x in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]) if x is not None]
    return found


def after_first(optimizer: Any) -> None:
    """Called after the first backward pass of an update: what it did not reach begins at zero.

    DeepSpeed overwrites the sums of the update before in the first pass and adds to them in the others, each where a
    gradient arrives. A parameter without one in the first pass would go on from the old sum.
    """
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for name in sums.keys() - optimizer._offload_boundary_param_ids:  # of all that have arrived, offloaded or not
            sums[name].zero_()
    elif getattr(optimizer, "cpu_offload", False):
        sums = optimizer.accumulated_grads_in_cpu
        for name in sums.keys() - optimizer._offload_accumulated_param_ids:
            sums[name].zero_()


def after_last(optimizer: Any) -> None:
    """Called after the last backward pass of an update: what it did not reach counts as well.

    An offloaded optimizer's gradients are handed to it in the last pass, each where one arrives. A parameter without
    one there would lose what it has, and be updated by the gradient of an update before.
    """
    if hasattr(optimizer, "fp16_groups") and optimizer.offload_optimizer:
        handed, left = optimizer.norm_for_param_grads, set()
        for p in (p for group in optimizer.fp16_groups for p in group):
            own = p.ds_numel > p.partition_numel() * optimizer._get_param_partition_rank(p)  # else all of it is padding
            if own and optimizer.get_param_id(p) not in handed:
                left.add(p.ds_id)
        if left:
            optimizer._offload_boundary_param_ids = left
            optimizer.finalize_gradient_accumulation_boundary()
    elif getattr(optimizer, "cpu_offload", False):
        handed = optimizer.norm_for_param_grads
        for name, (group, _, start, size) in optimizer.grad_position.items():
            if name not in handed and name not in optimizer._offload_accumulated_param_ids:
                optimizer.single_partition_of_fp32_groups[group].grad[start : start + size].zero_()
        optimizer._offload_accumulated_param_ids -= handed.keys()
        if optimizer._offload_accumulated_param_ids:
            optimizer.finalize_gradient_accumulation_boundary()


def before_step(optimizer: Any) -> None:
    """At stage 1 in bf16 a parameter that only other ranks have a gradient of is clipped as well, and counts.

    DeepSpeed sums the gradients over the ranks, but clips those alone that arrived on this one: ranks would clip by
    norms of their own.
    """
    for group in getattr(optimizer, "fp32_groups_has_gradients", []):
        group[:] = [True] * len(group)


def after_step(optimizer: Any) -> None:
    """Nothing stays of an update that DeepSpeed left out: offloaded, a NaN would be in the sums of all that follow."""
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def masters(optimizer: Any) -> Iterator[Tensor]:
    """The rank's part of the weights in fp32."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from getattr(optimizer, name, [])
