"""How a DeepSpeed optimizer adds up the gradients of microbatches: with one pass over each gradient and over its sum.

DeepSpeed 0.19.8 copies a gradient to fp32 before it adds it to a sum that is zeros at first, through a bucket even
where there is no other rank, and divides it by the number of ranks there. Its methods are replaced on the one object
that an engine has, so that a user's own options stay as they are. `fastppo.distributed.gradients` says which optimizer
is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo import ops


@dataclass
class Sums:
    """What is known of the gradients that an optimizer has added up."""

    share: float = 1.0  # factor of this rank's loss: 1 / ranks if the optimizer adds the ranks up and does not divide
    norm: float | None = None  # of the sums of all ranks, once it has been computed


def add_once(engine: Any, optimizer: Any) -> Sums:
    """Replace what passes over a gradient more than once. engine, optimizer: as `deepspeed.initialize` returns them.

    The optimizer's step clips by `Sums.norm`, which is to be there, and does not compute the norm once more.
    """
    sums = Sums()
    if hasattr(optimizer, "fp32_groups_gradients"):  # stage 1 in bf16
        _sum_in_place(engine, optimizer)
        _clip_by_known_norm(optimizer, sums)
    elif hasattr(optimizer, "averaged_gradients") and not hasattr(optimizer, "fp16_groups"):  # other stages 1 and 2
        _sum_in_partition(optimizer)
        _clip_partition_by_known_norm(optimizer, sums)
        optimizer.gradient_average = False
        sums.share = 1 / dist.get_world_size(optimizer.dp_process_group)
    return sums


def _clip_by_known_norm(optimizer: Any, sums: Sums) -> None:
    """For `BF16_Optimizer`, which takes the norm of each weight's sum, and scales those of other ranks' weights too."""

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return []
        norm = optimizer.fp32_groups_gradient_flat_partition[0].new_tensor([sums.norm])
        _clip_in_step(optimizer.optimizer, norm, optimizer.clip_grad)
        return [norm], {}

    optimizer.get_grads_for_norm = gradients


def _clip_partition_by_known_norm(optimizer: Any, sums: Sums) -> None:
    """For `DeepSpeedZeroOptimizer`, which multiplies by 1 where the norm is within its bound."""
    compute, clip = optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads

    def norm(norm_type: int = 2) -> Tensor:
        known: Tensor = compute(norm_type) if sums.norm is None else torch.tensor(sums.norm, device=optimizer.device)
        return known

    def clip_if_needed(gradients: Sequence[Tensor], total_norm: Tensor) -> None:
        assert optimizer.loss_scale == 1.0  # there is no fp16
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            _clip_in_step(optimizer.optimizer, total_norm, optimizer.clip_grad)
        elif float(total_norm) + 1e-6 > optimizer.clip_grad:
            clip(gradients, total_norm)

    optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads = norm, clip_if_needed


def _clip_in_step(adam: Any, norm: Tensor, bound: float) -> None:
    """Let the kernel of AdamW divide each gradient where it reads it: a pass of its own would read and write all."""
    adam.grad_scale = (norm.float() + 1e-6) / bound if float(norm) + 1e-6 > bound else None


def _sum_in_place(engine: Any, optimizer: Any) -> None:
    """For `BF16_Optimizer`: the first gradient of an update overwrites its sum, others are added as they are."""

    @torch.no_grad()
    def add(weight: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        total, has_gradient = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
        if has_gradient[index]:
            ops.accumulate(total.view(weight.shape), weight.grad)
        else:
            total.view(weight.shape).copy_(weight.grad)
        weight._hp_grad = total  # type: ignore[attr-defined]  # which DeepSpeed's functions for users read
        has_gradient[index] = True
        if clear_lp_grads:
            weight.grad.zero_()

    def forget() -> None:
        optimizer.fp32_groups_has_gradients = [[False] * len(group) for group in optimizer.fp32_groups_gradients]

    def sums() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """What the ranks reduce: nothing where there is one rank."""
        pairs = zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True)
        for group, has_gradient in pairs:
            for total, has in zip(group, has_gradient, strict=True):
                if not has:  # in no microbatch of this rank: the sum of an earlier update is there
                    total.zero_()
        alone = dist.get_world_size(optimizer.dp_process_group) == 1
        return [] if alone else optimizer.fp32_groups_gradients_flat, {}

    def reduce(buffers: Sequence[Tensor], group: Any, ranks: float | None = None) -> None:
        for buffer in buffers:  # one by one, so that none is copied to lie beside another
            reduced = engine.allreduce_bucket([buffer], group, ranks)
            if reduced.data_ptr() != buffer.data_ptr():
                buffer.copy_(reduced.view_as(buffer))

    optimizer._update_hp_grad = add
    optimizer.clear_hp_grads = forget
    optimizer.get_grads_for_reduction = sums
    engine.allreduce_and_copy = reduce


def _sum_in_partition(optimizer: Any) -> None:
    """For `DeepSpeedZeroOptimizer`: what has been reduced is added to the flat fp32 partition of this rank."""
    flatten = optimizer.flatten
    alone = dist.get_world_size(optimizer.dp_process_group) == 1

    def add(total: Tensor | None, part: Tensor) -> None:
        if total is not None:
            ops.accumulate(total, part)

    def add_to_weight(weight: Any) -> None:
        """Where each rank adds up the whole gradient until the last microbatch."""
        if weight.grad is None:
            return
        if weight.grad_accum is None:
            weight.grad_accum = weight.grad.to(optimizer.gradient_accumulation_dtype)
        else:
            ops.accumulate(weight.grad_accum, weight.grad)
        weight.grad = None

    def add_alone(weight: Any, group: int) -> None:
        """No other rank has a part of the gradient, and the partition is all of it."""
        if not weight.numel() or not getattr(weight, "ds_grad_is_ready", True):
            return
        number = optimizer.get_param_id(weight)
        if optimizer._use_compact_grad_partition_buffer(group):
            total = optimizer._get_compact_grad_partition_slice(group, 0, number, weight.numel())
            add(total.view(weight.shape), optimizer.get_gradient_for_reduction(weight))
        optimizer.params_already_reduced[number] = True
        if optimizer.cpu_offload:
            optimizer.copy_grads_in_partition(weight, group)
        optimizer.clear_grad_attribute(weight)

    def reduce(bucket: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
        """As DeepSpeed's own, without the copy of the result back into the bucket, which nothing reads."""
        owners, outputs = options.pop("bucket_ranks"), options.pop("output_bucket")
        reduced = optimizer.allreduce_bucket(bucket, dtype, **options)
        if optimizer.overlap_comm and reduced.is_cuda:
            reduced.record_stream(optimizer.reduction_stream)
        own = dist.get_rank(options.get("process_group") or optimizer.dp_process_group)
        for slot, part, owner, total in zip(bucket, optimizer.unflatten(reduced, bucket), owners, outputs, strict=True):
            if own in owner if isinstance(owner, frozenset) else own == owner:
                add(total, part)
                if total is None:
                    slot.copy_(part)

    optimizer._add_to_grad_partition_buffer = add
    optimizer._fill_param_grad_accum_attribute = add_to_weight
    optimizer.flatten = lambda tensors: _as_one(tensors) if _adjacent(tensors) else flatten(tensors)
    optimizer.allreduce_and_copy_with_multiple_ranks = reduce
    if not optimizer.cpu_offload:  # in fp32 too, where DeepSpeed keeps a list of copies and joins them in each step
        optimizer._use_compact_grad_partition_buffer = lambda group: True
    if alone:
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = add_alone


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before ends."""
    ends = [x.data_ptr() + x.nbytes for x in tensors[:-1]]
    return (
        all(x.is_contiguous() and x.dtype == tensors[0].dtype for x in tensors)
        and ends == [x.data_ptr() for x in tensors[1:]]
        and len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    )


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    """Adjacent tensors as one flat tensor, a view."""
    return tensors[0].as_strided((sum(x.numel() for x in tensors),), (1,))
