"""Results of the ops: named tuples (DeepSpeed's hooks support tuples), and sums instead of means.

Means over microbatches and ranks cannot be combined; sums and counts can.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of the policy at M positions, fp32 (fp64 for fp64 inputs). The first three and `kl` have gradients."""

    logprobs: Tensor  # (M,) log p of the target, in nats
    entropy: Tensor  # (M,) in [0, ln V]
    lse: Tensor  # (M,) logsumexp of the scaled logits
    ref_logprobs: Tensor | None  # (M,) log probability of the target under the reference
    ref_lse: Tensor | None  # (M,)
    kl: Tensor | None  # (M,) KL(policy || reference) over the whole vocabulary; +inf if p > 0 = q


class PolicyStats(NamedTuple):
    """Sums over the unmasked tokens of a policy loss, without gradients."""

    sums: Tensor  # (8,) policy loss, entropy, KL to reference, approximate KL (k3), clipped, dual-clipped, ratio, count
    ratio_max: Tensor  # () largest ratio, 0 without tokens


class ValueStats(NamedTuple):
    """Sums over the unmasked tokens of a value loss, without gradients."""

    sums: Tensor  # (7,) loss, clipped, V, V^2, R, R^2, (R-V)^2
