"""Fused layers in place of a model's own computation, where they compute the same (the setting `model.fused`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo.errors import log_once
from fastppo.models.layers.classes import is_changed
from fastppo.models.layers.gated import fuse_gated
from fastppo.models.layers.norms import fuse_norm
from fastppo.models.layers.products import choose_products
from fastppo.models.layers.residuals import fuse_residual
from fastppo.models.layers.rotations import fuse_rotary

_fused = True  # set by `choose_layers`

# What is fused, in this order: a layer's residual goes into norms that are fused already.
PARTS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], bool]]] = {
    "RMSNorm": (nn.Module, fuse_norm),
    "gated activations": (nn.Module, fuse_gated),
    "rotary positions": (nn.Module, fuse_rotary),
    "residual sums with RMSNorm": (GradientCheckpointingLayer, fuse_residual),
}


def choose_layers(*, fused: bool) -> None:
    """Set whether models of this process compute with fused layers (the setting `model.fused`)."""
    global _fused
    _fused = fused


@contextmanager
def layers_as(*, fused: bool) -> Iterator[None]:
    """Within this context, roles are made with or without fused layers."""
    before = _fused
    choose_layers(fused=fused)
    try:
        yield
    finally:
        choose_layers(fused=before)


def layers_are_fused() -> bool:
    """Whether roles are made with fused layers."""
    return _fused


def fuse_layers(model: PreTrainedModel) -> None:
    """Let the modules of a model call the ops of `fastppo.ops` that compute what they compute.

    Parameters, names and the classes' names stay as they are. One line is logged for each architecture. A model that
    has been fused stays as it is.
    """
    modules = list(model.modules())
    if not _fused or any(is_changed(module) for module in modules):
        return
    fused = []
    for name, (kind, fuse) in PARTS.items():
        changed = [fuse(module) for module in modules if isinstance(module, kind) and not is_changed(module)]
        fused += [name] if any(changed) else []
    log_once(f"{model.config.get_text_config().model_type}: {_summary(fused)}")
    if any([choose_products(module) for module in modules if isinstance(module, nn.Linear)]):
        log_once("fp32 products of linear layers: oneDNN, because MKL does not use this processor's AVX-512")


def _summary(fused: list[str]) -> str:
    others = [name for name in PARTS if name not in fused]
    if not fused:
        return "no fused layers: it computes none of their parts in a known form"
    return f"fused layers: {', '.join(fused)}" + (
        f"; not fused, where it has them: {', '.join(others)}" if others else ""
    )
