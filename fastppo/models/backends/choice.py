"""Which backend computes the attention of a run: the setting `attention`."""

from __future__ import annotations

import logging

import torch

from fastppo.config import AttentionSetting
from fastppo.errors import FastPPOError
from fastppo.models.backends import flash, varlen
from fastppo.models.backends.backend import DTYPES, AttentionBackend

log = logging.getLogger("fastppo")

OLDEST_GPU = (8, 0)  # compute capability: Ampere

# In the order of `auto`. By the values of the setting: the name in messages, and the module.
BACKENDS = {"flash": ("flash-attn", flash), "varlen": ("varlen_attn", varlen)}


def choose_backend(setting: AttentionSetting, dtype: torch.dtype, device: torch.device) -> AttentionBackend | None:
    """The backend for a run in this dtype on this device, or None for PyTorch's SDPA; logs the choice and the reason.

    Raises FastPPOError if the setting names a backend that cannot be used.
    """
    if setting == "sdpa":
        log.info("attention on %s: PyTorch's SDPA, because attention is sdpa", device)
        return None
    candidates: list[str] = list(BACKENDS) if setting == "auto" else [setting]
    obstacle = _common_obstacle(candidates, dtype, device)
    reasons = [] if obstacle is None else [obstacle]
    for candidate in candidates if obstacle is None else []:
        module = BACKENDS[candidate][1]
        if (reason := module.obstacle()) is None:
            backend: AttentionBackend
            backend, version = module.load(required=setting != "auto")
            because = f", because {reasons[0]}" if reasons else ""
            log.info("attention on %s: %s %s%s", device, backend.name, version, because)
            return backend
        reasons.append(reason)
    if setting != "auto":
        raise FastPPOError(_refusal(setting, reasons[0]))
    log.info("attention on %s: PyTorch's SDPA, because %s", device, " and ".join(reasons))
    return None


def _common_obstacle(candidates: list[str], dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why none of the candidates can be used in this dtype on this device; None if there is none."""
    names, one = " and ".join(BACKENDS[candidate][0] for candidate in candidates), len(candidates) == 1
    if device.type != "cuda":
        return f"{names} {'runs' if one else 'run'} on CUDA and this run uses {device.type}"
    if dtype not in DTYPES:
        return f"{names} {'computes' if one else 'compute'} in bf16 or fp16 and optim.dtype is fp32"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        needs = f"{names} {'needs' if one else 'need'} compute capability 8.0 (Ampere)"
        return f"{needs} and this GPU has {capability[0]}.{capability[1]}"
    return None


def _refusal(setting: str, reason: str) -> str:
    needs = "a GPU from Ampere on, bf16"
    if setting == "flash":
        needs += f" and `{flash.INSTALL}`"
    hint = "" if flash.INSTALL in reason else f" It needs {needs}."
    return f"attention is {setting}, but {reason}.{hint} Set attention to auto or sdpa to run without it."
