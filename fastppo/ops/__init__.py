"""The ops of PPO, and the only way to call their kernels.

A function here checks its arguments first, and then calls a kernel: C++ (csrc/) on the CPU, Triton (kernels/) or, for
GAE, CUDA (csrc/) on a GPU, each a `torch.library` op with a fake kernel (`fastppo.ops.registration`) and gradients
(`fastppo.ops.derivatives`). fp64 inputs, for tests of gradients, run `fastppo.ops.eager`. The implementation in use is
logged once.

M tokens, vocabulary V, hidden size H, B sequences, R rows. Floating inputs are fp32, bf16 and fp16, in any mixture
unless a docstring excludes it, or all fp64; statistics, losses and sums are fp32, or fp64 for fp64 inputs. Temperatures
and softcaps must be in 1e-20 to 1e20, other numbers within 1e36, so that fp32 can represent the results. All tensors of
a call are on one device, in any memory layout. A wrong dtype raises a TypeError, a wrong shape, device or value a
ValueError; both name the argument. M may be 0.
Values of tensors are checked only on the CPU, where this needs no synchronisation. On CUDA a kernel checks `cu_seqlens`
and fails with an assertion that names the error.

Coefficients (temperature, clips, entropy_coef, kl_coef, gamma, lam) are numbers, or tensors without dimensions, on the
CPU or on the device of the other tensors, which are read when the op runs and receive no gradient: a compiled graph is
valid for all their values. torch.compile traces each op whole, once for all sizes and coefficients that are marked
dynamic, else once for each. top_k, top_p, softcap, scale and other constants of a model are numbers, and constants of a
compiled graph.

Gradients are first-order, in reverse mode. Other derivatives (create_graph, forward mode, torch.func's grad and jvp)
raise NotImplementedError; with fp64 inputs all of them work. Inputs for which a docstring names no gradient are
constants.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastppo.ops import derivatives as derivatives
from fastppo.ops import eager as eager
from fastppo.ops.arguments import (
    Coefficient,
    check_coefficients,
    check_device,
    check_head,
    check_kl_kind,
    check_logits,
    check_mask,
    check_policy_options,
    check_positive,
    check_precision,
    check_reference,
    check_scale,
    check_shape,
    check_targets,
    check_tokens,
    checked_normalizer,
    is_off,
)
from fastppo.ops.backend import by_eager
from fastppo.ops.chunked_head import CHUNKED as CHUNKED
from fastppo.ops.chunked_head import blocks as blocks
from fastppo.ops.coefficients import numbers, overload
from fastppo.ops.gradient_free import accumulate as accumulate
from fastppo.ops.gradient_free import attend_cached as attend_cached
from fastppo.ops.gradient_free import gae as gae
from fastppo.ops.gradient_free import sample_tokens as sample_tokens
from fastppo.ops.layers import geglu as geglu
from fastppo.ops.layers import geglu_joined as geglu_joined
from fastppo.ops.layers import rms_norm as rms_norm
from fastppo.ops.layers import rotary as rotary
from fastppo.ops.layers import swiglu as swiglu
from fastppo.ops.layers import swiglu_joined as swiglu_joined
from fastppo.ops.stats import PolicyStats as PolicyStats
from fastppo.ops.stats import TokenStats as TokenStats
from fastppo.ops.stats import ValueStats as ValueStats

# Memory for the logits of a block of rows, of policy and reference; `linear_*` use no more for any M, but where the
# weight's gradient is one product and its sum in fp32 would take as much. On a GPU a block needs about 2,000 rows so
# that its products take longer than one more read and write of that sum.
WORKSPACE_BYTES = 256 << 20
GPU_WORKSPACE_BYTES = 1 << 30

KlKind = Literal["exact", "k2", "k3"]


def workspace_bytes(*, cpu: bool) -> int:
    """Bytes of memory for the logits of a block, on the CPU or on a GPU."""
    return WORKSPACE_BYTES if cpu else GPU_WORKSPACE_BYTES


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Coefficient = 1.0,
    softcap: float | None = None,
    ref_logits: Tensor | None = None,
) -> TokenStats:
    """Log probability of the targets, entropy and, with a reference, its log probability and the exact KL.

    logits: (M, V) floating, -inf allowed; targets: (M,) int64 in [0, V); ref_logits: (M, V), never receives gradients.
    Logits of both are scaled to z = softcap tanh(logits / softcap) / temperature; temperature > 0, softcap > 0 or None.
    An entry of probability 0 adds nothing to entropy, KL and gradients; KL is +inf if p > 0 = q in a row, and the KL of
    such a row has no gradient. A row of ref_logits with all entries -inf has q = 0: KL +inf, ref_logprobs -inf.
    Gradients flow to logits from `logprobs`, `entropy`, `lse` and `kl`.
    """
    check_logits("logits", logits)
    check_targets(targets, logits.shape[0], logits.shape[1], logits, "logits")
    check_scale(temperature, softcap)
    check_coefficients(logits, "logits", temperature=temperature)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits)
        check_precision("ref_logits", ref_logits, logits, "logits")
        check_shape("ref_logits", ref_logits, tuple(logits.shape), "the shape of logits")
        check_device("ref_logits", ref_logits, logits, "logits")
    scale = numbers(logits, temperature=temperature) | {"softcap": softcap}
    if by_eager(logits):
        return eager.token_logprobs(logits, targets, ref_logits=ref_logits, **scale)
    (ref_logits,) = _detached(ref_logits)
    forward = overload("vocabulary_forward", scale["temperature"])
    return _token_stats(forward(logits, targets, ref_logits=ref_logits, **scale))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Coefficient = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> TokenStats:
    """`token_logprobs` of logits = logit_scale (hidden weight^T + bias), computed for one block of rows at a time.

    hidden: (M, H); weight: (V, H), bias: (V,) of the same dtype; targets: (M,) int64 in [0, V). ref_hidden (M, H'),
    ref_weight (V, H') and ref_bias (V,) or None: the head of the reference, with the same logit_scale, softcap and
    temperature; it never receives gradients, even if ref_weight is weight.
    """
    check_head(hidden, weight, bias, "")
    check_targets(targets, hidden.shape[0], weight.shape[0], hidden, "hidden")
    check_scale(temperature, softcap, logit_scale)
    check_coefficients(hidden, "hidden", temperature=temperature)
    check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    ref_hidden, ref_weight, ref_bias = _detached(ref_hidden, ref_weight, ref_bias)
    head: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}
    head |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    scale = numbers(hidden, temperature=temperature) | {"softcap": softcap}
    if by_eager(hidden):
        return eager.linear_logprobs(**head, **scale, logit_scale=logit_scale)
    scale = _of_plain_logits(**scale, logit_scale=logit_scale)
    forward = overload("linear_logprobs", scale["temperature"])
    return _token_stats(forward(**head, **scale, workspace=workspace_bytes(cpu=not hidden.is_cuda)))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: Coefficient,
    clip_high: Coefficient,
    dual_clip: Coefficient | None = None,
    entropy: Tensor | None = None,
    entropy_coef: Coefficient = 0.0,
    kl: Tensor | None = None,
    kl_coef: Coefficient = 0.0,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), with dual clip (Ye et al. 2020, eq. 5), entropy and KL terms.

    logprobs, old_logprobs, advantages, entropy, kl: (M,) floating. Above e^20 the ratio is continued by its tangent, so
    that it is finite and has a gradient. It is clipped to [1 - clip_low, 1 + clip_high], clip_low in [0, 1],
    clip_high >= 0; dual_clip > 1 bounds the loss of a token with negative advantage by dual_clip times the absolute
    advantage. `kl` is a KL per token that has an expected gradient (exact, k2 or k3; not k1).
    normalizer: the token count that the sum is divided by, > 0, a number or () fp32; mask: (M,) bool, False excludes a
    token.

    Returns the loss, (), with gradients for logprobs, entropy and kl, and sums over the unmasked tokens: the loss of
    the clipped objective alone, entropy, kl, k3 of the old policy to the new ((ratio - 1) - log ratio), number of
    tokens at the clip, number of tokens at the dual clip, ratio, number of tokens. `ratio_max` is 0 without tokens.
    """
    check_tokens("logprobs", logprobs, logprobs)
    tokens: dict[str, Any] = {"old_logprobs": old_logprobs, "advantages": advantages}
    tokens |= {"entropy": entropy, "kl": kl}
    for name, tensor in tokens.items():
        if tensor is not None:
            check_tokens(name, tensor, logprobs, "logprobs")
    check_policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef)
    normalizer = checked_normalizer(normalizer, logprobs, "logprobs")
    check_mask(mask, logprobs, "logprobs")
    for name, coef, tensor in (("entropy", entropy_coef, entropy), ("kl", kl_coef, kl)):
        if tensor is None and not is_off(coef):
            raise ValueError(
                f"{name}_coef is {coef} and {name} is None; give {name} or set {name}_coef to the number 0"
            )
    coefficients: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    coefficients |= {"entropy_coef": entropy_coef, "kl_coef": kl_coef}
    check_coefficients(logprobs, "logprobs", **coefficients)
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    tokens |= {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    options = numbers(logprobs, **coefficients) | {"normalizer": normalizer}
    if by_eager(logprobs):
        return eager.policy_loss(**tokens, **options)
    loss, sums, ratio_max, _ = overload("policy_loss", options["kl_coef"])(**tokens, **options)
    return loss, PolicyStats(sums.detach(), ratio_max.detach())


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    temperature: Coefficient,
    clip_low: Coefficient,
    clip_high: Coefficient,
    dual_clip: Coefficient | None = None,
    entropy_coef: Coefficient = 0.0,
    kl_coef: Coefficient = 0.0,
    kl_kind: KlKind = "exact",
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """`linear_logprobs` and `policy_loss` in one op, which computes the gradients while the logits of a block exist.

    Arguments as in those two. The KL term is of `kl_kind`: exact needs ref_hidden and ref_weight, k2 and k3 need
    ref_logprobs, (M,) floating; k1 is an error, because its expected gradient is zero. With kl_coef 0 the KL is only a
    metric, and 0 without a reference. Entropy is always a metric. Gradients flow to hidden, weight and bias; no
    gradient is computed for a frozen one.
    """
    check_head(hidden, weight, bias, "")
    check_targets(targets, hidden.shape[0], weight.shape[0], hidden, "hidden")
    check_scale(temperature, softcap, logit_scale)
    for name, tensor in {"old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}.items():
        if tensor is not None:
            check_tokens(name, tensor, hidden, "hidden")
    check_policy_options(clip_low, clip_high, dual_clip, entropy_coef, kl_coef)
    normalizer = checked_normalizer(normalizer, hidden, "hidden")
    check_mask(mask, hidden, "hidden")
    check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    check_kl_kind(kl_kind, kl_coef, ref_hidden is not None, ref_logprobs is not None)
    if kl_kind == "exact":
        ref_logprobs = None
        ref_hidden, ref_weight, ref_bias = _detached(ref_hidden, ref_weight, ref_bias)
    else:
        ref_hidden = ref_weight = ref_bias = None
    statistics = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}
    head |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    tokens: dict[str, Any] = {"old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}
    tokens = {name: None if x is None else x.detach().to(statistics) for name, x in tokens.items()}
    coefficients: dict[str, Any] = {"temperature": temperature, "clip_low": clip_low, "clip_high": clip_high}
    coefficients |= {"dual_clip": dual_clip, "entropy_coef": entropy_coef, "kl_coef": kl_coef}
    check_coefficients(hidden, "hidden", **coefficients)
    options = numbers(hidden, **coefficients) | {"softcap": softcap, "kl_kind": kl_kind}
    arguments = head | tokens | options | {"normalizer": normalizer, "mask": mask}
    if by_eager(hidden):
        arguments |= {"logit_scale": logit_scale}
        return eager.linear_policy_loss(**arguments)
    arguments |= _of_plain_logits(options["temperature"], softcap, logit_scale)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, sums, ratio_max, *_ = overload("linear_policy_loss", options["kl_coef"])(
        **arguments, workspace=workspace_bytes(cpu=not hidden.is_cuda), wanted=wanted
    )
    return loss, PolicyStats(sums.detach(), ratio_max.detach())


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip: Coefficient | None = None,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """The loss of the critic, 0.5 max((V - R)^2, (V_clip - R)^2), V_clip = old + clamp(V - old, -clip, clip).

    values, old_values, returns: (M,) floating; clip > 0, or None for (V - R)^2 / 2; normalizer and mask as in
    `policy_loss`. Returns the loss, (), with gradients for values only, and sums over the unmasked tokens: loss, number
    of tokens with a larger clipped error, V, V^2, R, R^2, (R - V)^2.
    """
    check_tokens("values", values, values)
    check_tokens("old_values", old_values, values, "values")
    check_tokens("returns", returns, values, "values")
    normalizer = checked_normalizer(normalizer, values, "values")
    check_mask(mask, values, "values")
    if clip is not None:
        check_positive("clip", clip)
        check_coefficients(values, "values", clip=clip)
    old_values, returns = old_values.detach(), returns.detach()
    arguments: dict[str, Any] = {"values": values, "old_values": old_values, "returns": returns, "mask": mask}
    arguments |= {"normalizer": normalizer} | numbers(values, clip=clip)
    if by_eager(values):
        return eager.value_loss(**arguments)
    loss, sums, _ = overload("value_loss", arguments["clip"])(**arguments)
    return loss, ValueStats(sums.detach())


def _of_plain_logits(temperature: Coefficient, softcap: float | None, logit_scale: float) -> dict[str, Any]:
    """Temperature and softcap with which kernels compute z = softcap tanh(s l / softcap) / temperature from l.

    Dividing both by s gives the same number: (softcap / s) tanh(l / (softcap / s)) / (temperature / s).
    """
    return {
        "temperature": temperature / logit_scale,
        "softcap": None if softcap is None else softcap / logit_scale,
    }


def _token_stats(stats: Tensor) -> TokenStats:
    """The result of `vocabulary_forward` as named statistics."""
    logprobs, entropy, lse, _, _, *of_reference = stats
    if not of_reference:
        return TokenStats(logprobs, entropy, lse, None, None, None)
    ref_logprobs, kl, ref_lse, _, _ = of_reference
    return TokenStats(logprobs, entropy, lse, ref_logprobs.detach(), ref_lse.detach(), kl)


def _detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in tensors)
