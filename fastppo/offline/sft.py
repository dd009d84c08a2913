"""Supervised fine-tuning: the negative logprob of given responses, and a language model's evaluation on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import OfflineConfig
from fastppo.data import Examples, Packed
from fastppo.distributed import World, stop, sum_groups
from fastppo.models import PrefixStates
from fastppo.offline.heldout import heldout_microbatches
from fastppo.offline.model import TrainedModel
from fastppo.ops import TokenStats


def negative_logprob(
    policy: Any, hidden: Tensor, *, packed: Packed, examples: Examples, part: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of a microbatch, summed over its response tokens; prompts teach nothing. An `Objective`."""
    loss = -response_logprobs(policy, hidden, packed.responses).sum()
    return loss, loss[None]


def response_logprobs(policy: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of each response token, under a policy; hidden (M, H), targets (M,) int64 -> (M,) fp32."""
    stats: TokenStats = policy.head(hidden, ops.linear_logprobs, targets)
    return stats.logprobs


@dataclass(frozen=True)
class AnswerEvaluation:
    """A language model on responses."""

    loss: float  # nats a response token
    tokens: float  # of responses

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0)), "tokens": self.tokens}


@torch.no_grad()
def evaluate_answers(
    trained: TrainedModel, answers: Examples, prefix: PrefixStates, config: OfflineConfig, world: World
) -> AnswerEvaluation:
    """Over all response tokens."""
    total = torch.zeros(2, dtype=torch.float64)
    with stop.together(world):
        for part in heldout_microbatches(answers, config, world):
            packed, prefix_states = trained.select(answers, part, prefix)
            found = trained.engine(packed, partial(response_logprobs, targets=packed.responses), prefix_states)
            found = found[: int(answers.response_lengths[part].sum())]
            total += torch.tensor([-float(found.double().sum()), len(found)], dtype=torch.float64)
    negative, tokens = sum_groups(total, world).tolist()
    return AnswerEvaluation(negative / tokens, tokens)
