"""The seconds of an update of SFT, reward modelling and DPO."""

from __future__ import annotations

from typing import cast

from fastppo.config import OfflineConfig
from fastppo.planner.constants.values import Constants
from fastppo.planner.plan import Plan
from fastppo.planner.time.passes import head_learns, value_work
from fastppo.planner.time.phases import Lengths, Phase, Rank, Step, Tally, groups_of, microbatches


def offline_step(plan: Plan, constants: Constants, lengths: Lengths) -> Step:
    """An update, after what is computed once before training: of frozen lower layers, and by a reference."""
    config = cast(OfflineConfig, plan.config)
    role = next(role for role in plan.roles if role.trains)
    rank, tally = Rank(role, config, plan.machine, constants), Tally(constants)
    mine = config.batch_size * config.sequences // groups_of(config, plan.machine)
    kept = bool(role.size.prefix) and config.zero.stage < 3 and config.keep_trunk_gb > 0 and config.epochs > 1
    for sequences, times in microbatches(mine, lengths.whole, config.microbatch_tokens):
        own, tokens = Tally(constants), -(-sequences * lengths.response // rank.sequence)
        if config.role == "policy":
            head = head_learns(role.size, tokens, None)
        else:
            head = value_work(role.size, sequences, gradient=True)
        rank.learns(own, sequences, lengths.whole, head, kept=kept)
        tally.include(own, times)
    tally.spend(rank.zero.update(constants))
    read = config.batch_size * config.sequences * lengths.whole
    return Step((Phase("learning", tally.seconds, tally.work),), read, "tokens read")
