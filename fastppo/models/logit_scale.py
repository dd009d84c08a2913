"""What a causal model's own forward pass makes of its head's logits: some families multiply or divide them.

Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it, Cohere multiplies by `logit_scale`, MiniCPM divides
the hidden states that the head reads: no name in a config tells which. So the forward pass itself is asked, with a
backbone and a head that compute nothing.
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

PROBE = 1e-3  # a logit small enough for a softcap to leave as it is, but for what `logit_scale` takes back


class _States:
    """Hidden states (1, 1, H) of ones as a backbone's output, whose other fields are all None."""

    def __init__(self, width: int) -> None:
        self.last_hidden_state = torch.ones(1, 1, width, dtype=torch.float64, device="cpu")

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, item: int | slice) -> Any:
        return (self.last_hidden_state,)[item]


def logit_scale(model: PreTrainedModel, head: nn.Module, softcap: float | None) -> float:
    """The factor s of the model's logits, softcap tanh(s l / softcap) or s l, where l is what `head` gives.

    No weight is read, so they may be anywhere: on the meta device, in partitions. 1 where the forward pass cannot be
    asked so, or where what it makes of a logit is no factor; `model_check.check_model` then sees whether that is right.
    """
    try:
        got = _asked(model, head)
    except Exception as error:  # a forward pass may want anything of its backbone
        log.debug("%s: its logits' scale cannot be asked for (%r); taken for 1", type(model).__name__, error)
        return 1.0
    if softcap is not None:
        got = softcap * math.atanh(got / softcap) if abs(got) < softcap else math.nan
    factor = got / PROBE
    if not 0.0 < factor < math.inf:
        log.debug("%s: makes %g of a logit of %g, which is no factor", type(model).__name__, got, PROBE)
        return 1.0
    nearest = float(f"{factor:.6g}")  # a forward pass in fp32 rounds, and a config's numbers are short
    return nearest if math.isclose(nearest, factor, rel_tol=2e-7) else factor


def _asked(model: PreTrainedModel, head: nn.Module) -> float:
    """What the model's forward pass makes of a logit of `PROBE`."""

    def backbone(*_: Any, **__: Any) -> _States:
        return _States(model.config.get_text_config().hidden_size)

    def project(hidden: Tensor) -> Tensor:
        return hidden[..., :1] * PROBE

    inner = {model.base_model, model.get_decoder()} - {model, None}  # OPT calls its decoder past its base model
    if not inner:
        raise ValueError("it has no backbone of its own")
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in inner:
            stack.enter_context(_forward_is(module, backbone))
        stack.enter_context(_forward_is(head, project))
        tokens = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return float(logits.flatten()[0])


@contextlib.contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
