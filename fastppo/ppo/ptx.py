"""Against forgetting: a language-modelling loss on given text, mixed into the actor's updates (PPO-ptx).

Ouyang et al., 2022, equation 2, adds gamma E[log pi(x)] over text x to PPO's objective. Here the loss of an update is
PPO's plus gamma times the text's mean negative logprob a token: one gradient, which is clipped and applied as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.config import Config
from fastppo.data import Examples, batches, load_texts, pack_even, template_arguments
from fastppo.distributed import Engine, World, stop, sum_groups
from fastppo.models import attention_ratio, token_stats


def read_texts(config: Config, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Examples | None:
    """None where `ptx.coef` is 0. context: the actor's longest sequence, in tokens. Raises `DataError`."""
    if config.ptx.coef == 0:
        return None
    return load_texts(config.ptx, tokenizer, context=context, template=template_arguments(config.data))


@dataclass(frozen=True)
class Texts:
    """The text, and who learns which of it when."""

    examples: Examples
    coef: float  # gamma
    batch_size: int  # texts in an update, over all ranks
    microbatch_tokens: int
    seed: int

    @staticmethod
    def of(examples: Examples | None, config: Config) -> Texts | None:
        if examples is None:
            return None
        ptx, budget = config.ptx, config.ppo.microbatch_tokens
        return Texts(examples, ptx.coef, ptx.batch_size, budget, config.seed)

    def from_update(self, number: int) -> Iterator[list[int]]:
        """The texts of each update from this one of the run on, counted from 0: a function of seed and number alone."""
        return batches(self.examples, size=self.batch_size, seed=self.seed, shuffle=True, start=number)

    def microbatches(self, texts: list[int], attention: float, world: World) -> tuple[Tensor, ...]:
        """The share of an update's texts that this rank's group has; each has as many microbatches, as ZeRO-3 asks.

        attention: as in `microbatch.work`.
        """
        lengths = self.examples.lengths
        packed = pack_even(torch.tensor(texts), lengths, self.microbatch_tokens, world.groups, attention)
        return packed[world.group :: world.groups]


def add_gradient(texts: Texts, chosen: list[int], actor: Engine, world: World) -> float:
    """Add gamma times the gradient of the chosen texts' loss to what the actor has accumulated; returns that loss.

    It is their mean negative logprob over all ranks, in nats a token. PPO's own microbatches follow, and the last of
    the update is one of them. Frozen lower layers are computed in each pass, since a text hardly comes again soon.
    """
    examples = texts.examples
    tokens = int(examples.response_lengths[chosen].sum())
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for part in texts.microbatches(chosen, attention_ratio(actor.module.model), world):
        stop.check(world)
        packed = examples.packed.select(part).to(world.device)
        loss = actor(packed, partial(negative_logprob, packed.responses))
        # engines average gradients over ranks, and the loss is to be a mean over the tokens of all of them
        actor.backward(texts.coef * world.ranks / tokens * loss, last=False)
        total += loss.detach()
    return float(sum_groups(total, world)) / tokens


def negative_logprob(targets: Tensor, policy: Any, hidden: Tensor) -> Tensor:
    """Of the targets (m,) int64 that hidden (m, H) predicts, summed, in nats; at temperature 1, however one samples."""
    loss = -token_stats(targets, 1.0, policy, hidden).logprobs.sum()
    if policy.value_head is not None:
        # At stage 3 a gradient begins anew in the first pass of an update, and of what takes no part there it goes on
        # from the update before. So a shared critic's head takes part, with a gradient of 0.
        loss = loss + 0.0 * policy.value_head(hidden).sum()
    return loss
