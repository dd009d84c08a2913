"""The factor by which a causal model's forward pass multiplies the logits of its head; some families have one.

Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it, Cohere multiplies by `logit_scale`, MiniCPM divides
the hidden states that the head reads: the name of a setting does not tell which. So the factor is measured: the
forward pass runs with a backbone and a head that return constants.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger("fastppo")

PROBE = 1e-3  # a logit so small that a softcap hardly changes it; `logit_scale` corrects for the rest


class _ConstantStates:
    """The output of a backbone with hidden states (1, 1, H) of ones; all its other fields are None."""

    def __init__(self, width: int) -> None:
        self.last_hidden_state = torch.ones(1, 1, width, dtype=torch.float64, device="cpu")

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, item: int | slice) -> Any:
        return (self.last_hidden_state,)[item]


def logit_scale(model: PreTrainedModel, head: nn.Module, softcap: float | None) -> float:
    """The factor s of the model's logits, softcap tanh(s l / softcap) or s l, where l is the output of `head`.

    Reads no weights, so they may be on the meta device or partitioned. Returns 1 if the forward pass cannot run with a
    replaced backbone, or if its result is no positive multiple of the logit; `model_check` then compares the outputs.
    """
    try:
        output = _output_for_probe(model, head)
    except Exception as error:  # a forward pass may use any attribute of its backbone
        log.debug("%s: the scale of its logits cannot be measured (%r); 1 is used", type(model).__name__, error)
        return 1.0
    if softcap is not None:
        output = softcap * math.atanh(output / softcap) if abs(output) < softcap else math.nan
    factor = output / PROBE
    if not 0.0 < factor < math.inf:
        log.debug("%s: maps a logit of %g to %g, which is not a factor", type(model).__name__, PROBE, output)
        return 1.0
    nearest = float(f"{factor:.6g}")  # a forward pass in fp32 rounds, and the numbers of a config have few digits
    return nearest if math.isclose(nearest, factor, rel_tol=2e-7) else factor


def _output_for_probe(model: PreTrainedModel, head: nn.Module) -> float:
    """The logit that the model's forward pass returns where its head returns `PROBE`."""

    def backbone(*_: Any, **__: Any) -> _ConstantStates:
        return _ConstantStates(model.config.get_text_config().hidden_size)

    def project(hidden: Tensor) -> Tensor:
        return hidden[..., :1] * PROBE

    backbones = {model.base_model, model.get_decoder()} - {model, None}  # OPT calls its decoder, not its base model
    if not backbones:
        raise ValueError("it has no separate backbone")
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in backbones:
            stack.enter_context(_replaced_forward(module, backbone))
        stack.enter_context(_replaced_forward(head, project))
        tokens = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return float(logits.flatten()[0])


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    forward_before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if forward_before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = forward_before
