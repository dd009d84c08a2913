"""What actor, critic and reference say of every token of a batch, before the actor learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.config import OnlineConfig
from fastppo.data import Packed, segment_rows
from fastppo.distributed import World, gather_groups, gathered, stop
from fastppo.models import Policy, PrefixStates, Roles, hidden_states, token_stats

TokenRows = dict[str, Tensor]  # name -> (m,) fp32, on response tokens


@torch.no_grad()
def measure(
    packed: Packed,
    mine: Sequence[Tensor],
    roles: Roles,
    prefix_cache: PrefixStates | None,
    config: OnlineConfig,
    world: World,
) -> TokenRows:
    """Logprobs, entropy, the reference's logprobs, values if there is a critic, and the KL if it is the exact one.

    packed: the global batch; mine: the microbatches of it that this rank's group has, as indices of sequences, as many
    on every rank; prefix_cache: is filled; None: actor and reference share each microbatch's prefix, and nothing is
    kept. Returns (M,) tensors in the batch's order, on the CPU, the same on every rank.
    """
    parts = []
    for sequences in mine:
        stop.check(world)
        cache = PrefixStates() if prefix_cache is None else prefix_cache
        rows = _measure(packed.select(sequences).to(world.device), sequences, roles, cache, config)
        parts.append((sequences, {name: x.float() for name, x in rows.items()}))
    parts = [(sequences, {name: x.cpu() for name, x in rows.items()}) for sequences, rows in parts]
    return _assemble(packed, [part for group in gather_groups(parts, world) for part in group])


def _measure(
    packed: Packed, sequences: Tensor, roles: Roles, prefix_cache: PrefixStates, config: OnlineConfig
) -> TokenRows:
    """Logprobs, entropy, KL and values of a microbatch, before the first update."""
    temperature, exact = config.sampling.temperature, config.exact_kl
    reference: Policy = roles.reference.module
    prefix_states = prefix_cache(reference, packed, sequences)
    kl_reference: dict[str, Tensor | None] = {}
    ref_logprobs: Any = None
    if exact:
        kl_reference = reference.head.as_reference(roles.reference(packed, hidden_states, prefix_states))
    else:
        ref_logprobs = roles.reference(
            packed, partial(token_stats, packed.responses, temperature), prefix_states
        ).logprobs

    def act(policy: Policy, hidden: Tensor) -> TokenRows:
        stats = token_stats(packed.responses, temperature, policy, hidden, **kl_reference)
        rows = {"old_logprobs": stats.logprobs, "entropy": stats.entropy, "ref_logprobs": ref_logprobs}
        if exact:
            rows |= {"ref_logprobs": stats.ref_logprobs, "kl": stats.kl}
        if policy.value_head is not None:
            rows["values"] = policy.value_head(hidden)
        return rows

    prefix_states = prefix_cache(roles.policy, packed, sequences)
    with gathered(reference.head.parameters() if exact else ()):  # the actor's forward pass reads both heads
        rows: TokenRows = roles.actor(packed, act, prefix_states)
    if roles.critic is not None:
        prefix_states = prefix_cache(roles.critic.module, packed, sequences)
        rows["values"] = roles.critic(packed, lambda critic, hidden: critic.value_head(hidden), prefix_states)
    return rows


def _assemble(packed: Packed, parts: list[tuple[Tensor, TokenRows]]) -> TokenRows:
    """Microbatches' rows back into (M,) tensors in the batch's own order."""
    total = int(packed.response_cu_seqlens[-1])
    whole = {name: torch.zeros(total) for name in parts[0][1]}
    for sequences, rows in parts:
        token_rows = segment_rows(packed.response_cu_seqlens, sequences)
        for name, x in rows.items():
            whole[name][token_rows] = x
    return whole
