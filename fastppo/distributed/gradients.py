"""The gradients that a DeepSpeed optimizer accumulates: their norm, their buffers, and corrections of their handling.

DeepSpeed has different attributes, also private ones, for each ZeRO stage; this module and `accumulation` are the only
ones that use those of version 0.19.8. The optimizers are distinguished by their attributes. At stage 1 in bf16
`BF16_Optimizer` sums all gradients in fp32 on each rank; otherwise at stages 1 and 2 `DeepSpeedZeroOptimizer` sums the
rank's partition (with `cpu_offload` in host memory), as `DeepSpeedZeroOptimizer_Stage3` does at stage 3; at stage 0 the
optimizer is a plain one, and the gradients are in `p.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def norm(optimizer: Any, parameters: Sequence[nn.Parameter]) -> float:
    """The norm of the accumulated gradients of all ranks, equal on all ranks; not finite if a part of it is not.

    optimizer: returned by `deepspeed.initialize`; parameters: those that it trains.
    """
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # stage 1 in bf16; sum over the ranks' partitions
        part = nn.utils.get_total_norm(optimizer.fp32_groups_gradient_flat_partition).double().square()
        dist.all_reduce(part)
        return float(part.sqrt())
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        return float(optimizer.scaled_global_norm())
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3 has no public method
        parts = [float(part) for part in optimizer._get_norm_groups()]  # -1 if a gradient is not finite
        return math.hypot(*parts) if all(part >= 0 for part in parts) else math.inf
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def buffers(optimizer: Any) -> list[Tensor]:
    """The buffers in which gradients are summed and reduced, if they exist between updates, when they are not read.

    Before the next gradients they must contain zeros, or their old values.
    """
    tensors: list[Tensor] = list(getattr(optimizer, "fp32_groups_gradients_flat", []))
    for name in ("grad_partitions_flat_buffer", "temp_grad_buffer_for_gpu_offload"):
        if (buffer := getattr(optimizer, name, None)) is not None:
            tensors.append(buffer)
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        tensors += [x for x in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]) if x is not None]
    return tensors


def after_first(optimizer: Any) -> None:
    """Zero the sums of parameters without a gradient in the first backward pass of an update, after that pass.

    In the first pass DeepSpeed overwrites the sums of the previous update, and in later passes it adds to them, each
    time only for parameters that have a gradient. Without a gradient in the first pass the old sum would remain.
    """
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for name in sums.keys() - optimizer._offload_boundary_param_ids:  # ids of all gradients, offloaded or not
            sums[name].zero_()
    elif getattr(optimizer, "cpu_offload", False):
        sums = optimizer.accumulated_grads_in_cpu
        for name in sums.keys() - optimizer._offload_accumulated_param_ids:
            sums[name].zero_()


def after_last(optimizer: Any) -> None:
    """Pass on the gradients of parameters without a gradient in the last backward pass of an update, after that pass.

    In the last pass DeepSpeed passes gradients to an offloaded optimizer, each when the parameter gets a gradient. For
    a parameter without one in this pass the accumulated gradient would be lost, and an old one would be applied.
    """
    if hasattr(optimizer, "fp16_groups") and optimizer.offload_optimizer:
        passed_on, remaining = optimizer.norm_for_param_grads, set()
        for p in (p for group in optimizer.fp16_groups for p in group):
            # else the whole partition of this rank is padding
            has_elements = p.ds_numel > p.partition_numel() * optimizer._get_param_partition_rank(p)
            if has_elements and optimizer.get_param_id(p) not in passed_on:
                remaining.add(p.ds_id)
        if remaining:
            optimizer._offload_boundary_param_ids = remaining
            optimizer.finalize_gradient_accumulation_boundary()
    elif getattr(optimizer, "cpu_offload", False):
        passed_on = optimizer.norm_for_param_grads
        for name, (group, _, start, size) in optimizer.grad_position.items():
            if name not in passed_on and name not in optimizer._offload_accumulated_param_ids:
                optimizer.single_partition_of_fp32_groups[group].grad[start : start + size].zero_()
        optimizer._offload_accumulated_param_ids -= passed_on.keys()
        if optimizer._offload_accumulated_param_ids:
            optimizer.finalize_gradient_accumulation_boundary()


def after_step(optimizer: Any) -> None:
    """Clear the sums of an update that DeepSpeed skipped: with offload a NaN would stay in all later sums."""
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def masters(optimizer: Any) -> Iterator[Tensor]:
    """The rank's partition of the master weights in fp32."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from getattr(optimizer, name, [])
