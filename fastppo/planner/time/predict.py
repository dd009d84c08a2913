"""The seconds of a plan's step, whatever kind of run it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from fastppo.config import DPO, PPO, REST, REWARD, SFT, AnyConfig, OfflineConfig, OnlineConfig, command_of
from fastppo.errors import FastPPOError
from fastppo.planner.constants.values import NAMES, Constant, Constants
from fastppo.planner.plan import Plan
from fastppo.planner.time.offline import offline_step
from fastppo.planner.time.online import PPOTimes, RestTimes
from fastppo.planner.time.phases import Lengths, Step
from fastppo.planner.time.work import Work

# How a step of each command is modelled.
STEPS: dict[str, Callable[[Plan, Constants, Lengths], Step]] = {
    PPO.name: lambda *of: PPOTimes(*of).step(),
    REST.name: lambda *of: RestTimes(*of).step(),
    **dict.fromkeys((SFT.name, REWARD.name, DPO.name), offline_step),
}


def lengths_of(
    config: AnyConfig, prompt: int | None = None, response: int | None = None, reward_seconds: float = 0.0
) -> Lengths:
    """Where they are not given, prompts and responses are as long as they may be, and all tokens of an example but one
    are of its response. Raises FastPPOError for what cannot be."""
    if command_of(config).name not in STEPS:
        raise FastPPOError("--time knows the commands that train, and not generate.")
    if isinstance(config, OnlineConfig):
        longest = config.data.first_tokens or config.data.max_prompt_tokens
        found = Lengths(prompt or longest, response or config.sampling.max_new_tokens, reward_seconds)
        most, setting = config.microbatch_tokens, config.names.microbatch
    else:
        offline = cast(OfflineConfig, config)
        longest = offline.data.max_tokens
        given = response or max(longest - (prompt or 1), 1)
        found = Lengths(prompt or max(longest - given, 1), given, reward_seconds)
        most, setting = offline.microbatch_tokens // offline.sequences, "microbatch_tokens"
    if found.whole > most:
        raise FastPPOError(
            f"--prompt-tokens {found.prompt} and --response-tokens {found.response} are {found.whole} tokens, more than"
            f" a microbatch holds ({setting})."
        )
    return found


def predict(plan: Plan, constants: Constants, lengths: Lengths) -> Step:
    """Raises FastPPOError where a constant is missing."""
    return STEPS[command_of(plan.config).name](plan, constants, lengths)


def kernels_of(plan: Plan, lengths: Lengths) -> Work:
    """The kernels of a step, on a machine of which nothing is known yet."""
    unknown = {name: Constant(1.0, "unknown") for name in NAMES}
    return predict(plan, Constants("", plan.machine.gpu is None, unknown), lengths).work
