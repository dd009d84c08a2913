"""The ops over tokens: GAE, beside other ways to compute it, and the losses, beside eager PyTorch and torch.compile.

The ceiling is one read of each input and one write of each output.
"""

from __future__ import annotations

import functools
from typing import Any

import gae_baselines
import torch
from op_case import OpCase
from torch import Tensor

from fastppo import ops
from fastppo.ops import registration

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 1 << 26 if DEVICE.type == "cuda" else 1 << 19
SMALL = 1 << 9


def gae(*packed: Tensor) -> object:
    if DEVICE.type not in registration.GAE_DEVICES:
        raise RuntimeError(f"fastppo._C was built without GAE on {DEVICE.type}")
    return ops.gae(*packed, gamma=0.99, lam=0.95)


def scan(*packed: Tensor) -> object:
    return gae_baselines.associative_scan(*packed, 0.99, 0.95)


def tokens_of_gae(length: int, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(x.to(DEVICE) for x in gae_baselines.packed([length] * count))


def eager_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    count = torch.tensor(float(len(logprobs)), device=logprobs.device)
    return ops.policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.2, normalizer=count)[0]


def eager_value_loss(values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    clipped = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean()


def value_loss(values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    count = torch.tensor(float(len(values)), device=values.device)
    return ops.value_loss(values, old, returns, clip=0.2, normalizer=count)[0]


def with_gradient(loss: Any, first: Tensor, *rest: Tensor) -> Any:
    return torch.autograd.grad(loss(first, *rest), first)


def three_numbers(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Per token, the first with a gradient."""
    torch.manual_seed(0)
    first, second, third = torch.randn(3, count, device=DEVICE).unbind()
    return first.clone().requires_grad_(), second.clone(), third.clone()


def op_cases(*, small: bool = False) -> list[OpCase]:
    """small: only to see that they run."""
    cases, whole, short = [], SMALL if small else TOKENS, 100 if small else 1_000
    for length, count, name in ((short, whole // short, f"sequences of {short:,}"), (whole, 1, "one sequence")):
        made = functools.partial(tokens_of_gae, length, count)
        ways = {"fastppo": gae, "scan": scan}
        moved = 16 * length * count
        cases.append(OpCase("gae", f"gae, {name}", ways, made, lambda _, n=moved: n, dtypes=("fp32",)))  # type: ignore[misc]
    losses = {"policy_loss": (eager_policy_loss, policy_loss), "value_loss": (eager_value_loss, value_loss)}
    count = whole // 8
    for op, (eager_way, way) in losses.items():
        candidates = {"eager": eager_way, "compiled": torch.compile(eager_way, dynamic=False), "fastppo": way}
        ways = {name: functools.partial(with_gradient, f) for name, f in candidates.items()}
        made = functools.partial(three_numbers, count)
        title = f"{op} of {count:,} tokens, forward and backward"
        cases.append(OpCase(op, title, ways, made, lambda _: 4 * 4 * count, dtypes=("fp32",)))
    return cases
