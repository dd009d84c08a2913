"""What `dtype: auto` stands for on this machine."""

from __future__ import annotations

from typing import Literal, TypeVar, cast

from fastppo.config.commands.ppo import AnyConfig

C = TypeVar("C", bound=AnyConfig)


def settled_dtype(*, gpu: bool = False) -> Literal["fp32", "bf16"]:
    """bf16 where products are computed in it, else fp32. gpu: of a machine with GPUs, which this one need not be."""
    return "bf16" if gpu or computes_bf16() else "fp32"


def with_settled_dtype(config: C, *, gpu: bool = False) -> C:
    """The config with fp32 or bf16 in the place of `auto`; no other code meets `auto`."""
    if config.optim.dtype != "auto":
        return config
    return cast(C, config.with_dtype(settled_dtype(gpu=gpu)))


def computes_bf16() -> bool:
    """Whether this machine has instructions for products in bf16: a GPU from Ampere on, or a processor with AVX-512 or its
    like on other architectures.

    Without them torch computes a bf16 product in software: one of 1,024 x 1,024 takes 75 times as long as in fp32 on an
    AMD EPYC (family 25).
    """
    import torch  # not at the top: the settings are read without it

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
