"""SimPO (Meng et al., 2024): a policy learns from preference pairs, without a reference model.

The mean logprob of the preferred response, times beta, is to lead that of the other by a margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from fastppo.config import COMMANDS, Command, OfflineConfig, PairsConfig, check_pairs, validate_offline
from fastppo.data import load_pairs
from fastppo.monitor import lock_run_dir
from fastppo.offline import response_logprobs, run, set_up
from fastppo.rank import run_rank


@dataclass(frozen=True)
class SimPOConfig(OfflineConfig):
    """fastppo: SimPO on preference pairs (Meng et al., 2024)."""

    role = "policy"  # what trains; the other is "reward model"
    unit, sequences = "pairs", 2  # what an example is called, and how many sequences it has

    output: str = "runs/simpo"
    """Folder of the run: config, metrics, and the trained model with the lowest held-out loss in `output`/model."""
    beta: float = 2.0
    """What mean logprobs are multiplied by."""
    lead: float = 1.0
    """By how much the preferred response should lead, in units of beta times nats a token."""
    data: PairsConfig = field(default_factory=PairsConfig)


def validate(config, ranks=1):
    validate_offline(config, ranks, (("0 or more", lambda x: 0 <= x < math.inf, "beta lead"),))
    check_pairs(config.data)


def simpo(config):
    """The objective: the loss of a microbatch, and what is summed over a batch: loss, and how many pairs are right."""

    def objective(policy, hidden, *, packed, examples, part):
        logprobs = response_logprobs(policy, hidden, packed.responses)  # (M,) fp32
        means = torch.stack([of_one.mean() for of_one in logprobs.split(packed.response_lengths.tolist())])
        preferred, other = (config.beta * means).view(-1, 2).unbind(1)  # both (P,)
        losses = -F.logsigmoid(preferred - other - config.lead)  # (P,)
        return losses.sum(), torch.stack([losses.sum(), (preferred > other).sum()])

    return objective


def train(config, world):
    with lock_run_dir(Path(config.output), world.rank):
        run(set_up(config, world, load_pairs), simpo(config), statistics=("loss", "accuracy"))


SIMPO = Command("simpo", "docs.examples.simpo", "SimPO, from preference pairs", SimPOConfig, validate)
COMMANDS[SIMPO.name] = SIMPO

if __name__ == "__main__":
    run_rank(SIMPO, train)
